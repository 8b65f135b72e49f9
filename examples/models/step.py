"""Training steps that need less memory."""

import mindspore as ms
from mindspore import nn, ops


class AccumulatedStep(nn.TrainOneStepCell):
    """A training step whose gradient is the mean over equal parts of the batch, which are computed one after the other.

    It is that of the whole batch where the loss is a mean over samples, or over as many tokens in each part.

    Args:
        network: from inputs to a loss.
        optimizer: takes the gradients.
        parts: into how many parts the batch is cut, which it must be a multiple of.

    Inputs:
        of the network, each with the samples along its first axis.

    Outputs:
        the mean loss.
    """

    def __init__(self, network, optimizer, parts):
        super().__init__(network, optimizer)
        self.parts = parts
        self.function = ms.value_and_grad(network, None, optimizer.parameters)

    def construct(self, *inputs):
        size = inputs[0].shape[0] // self.parts
        if inputs[0].shape[0] != size * self.parts:
            raise ValueError("AccumulatedStep: the batch must be a multiple of the parts")
        loss, gradients = self.function(*[x[:size] for x in inputs])
        for index in range(1, self.parts):
            after = ops.depend(inputs[0], gradients)  # so that nothing of a part is kept when the next one begins
            part = [x[index * size : (index + 1) * size] for x in (after, *inputs[1:])]
            more, others = self.function(*part)
            loss, gradients = loss + more, [one + other for one, other in zip(gradients, others)]
        gradients = tuple(gradient / self.parts for gradient in gradients)
        return ops.depend(loss / self.parts, self.optimizer(gradients))
