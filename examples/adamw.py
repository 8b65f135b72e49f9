"""AdamW as the literature and `torch.optim.AdamW` have it: with bias correction."""

import math

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops


class AdamW(nn.Optimizer):
    r"""Adam with bias correction and decoupled weight decay.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
        w_t = w_{t-1} - \eta_t \left( \frac{m_t / c_1}{\sqrt{v_t / c_2} + \epsilon} + \lambda w_{t-1} \right), \quad
        c_i = 1 - \beta_i^t

    `nn.AdamWeightDecay` has `c_i = 1`. Both `m` and `v` start from zero, and `v` takes the longer way from there, so
    that its first step is 3.2 times the one here, the 12th 6.5 times, and the 300th still twice. Here its kernel,
    `ops.AdamWeightDecay`, which Ascend, GPU and CPU have, gets the corrections in its rate, epsilon and decay.

    Args:
        params (list of Parameter): what is trained; or dicts of groups as `nn.Optimizer` has them.
        learning_rate (float, list, Tensor or LearningRateSchedule): a number, one a step, or a schedule. Default: 1e-3.
        beta1 (float): how much of the mean of gradients stays. Default: 0.9.
        beta2 (float): how much of the mean of their squares stays. Default: 0.999.
        eps (float): added to the denominator. Default: 1e-8.
        weight_decay (float): share of the weight that a learning rate of 1 takes off. As in every optimizer of `nn` it
            is not for Parameters with `beta` or `gamma` in the name. Default: 0.01.

    Inputs:
        gradients: tuple of Tensor, in the order of `params`.

    Raises:
        ValueError: a beta is not in (0, 1), or `eps` is not positive.

    Source: Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
    """

    def __init__(self, params, learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
        problems = [
            f"'{name}' must be in (0, 1), but got {beta}"
            for name, beta in (("beta1", beta1), ("beta2", beta2))
            if not 0 < beta < 1
        ]
        if not eps > 0:
            problems.append(f"'eps' must be positive, but got {eps}")
        if problems:
            raise ValueError("AdamW: " + "; ".join(problems))
        super().__init__(learning_rate, params, weight_decay)
        self.beta1, self.beta2, self.eps = (Tensor(value, ms.float32) for value in (beta1, beta2, eps))
        # of what float32 makes of a beta, so that the weights of all gradients sum to 1
        self.log_beta1, self.log_beta2 = (math.log(float(np.float32(beta))) for beta in (beta1, beta2))
        self.moments1 = self.parameters.clone("adam_m", "zeros")
        self.moments2 = self.parameters.clone("adam_v", "zeros")
        self.update = ops.AdamWeightDecay()

    def construct(self, gradients):
        rate, decay = self.get_lr(), self.get_weight_decay()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.global_step.astype(ms.float32).reshape(())
        first, second = -ops.expm1(self.log_beta1 * step), ops.sqrt(-ops.expm1(self.log_beta2 * step))
        for index, gradient in enumerate(gradients):
            param = self.parameters[index]
            own_decay = (decay[index] if self.is_group else decay) if self.decay_flags[index] else 0.0
            self.update(
                param,
                self.moments1[index],
                self.moments2[index],
                (rate[index] if self.is_group_lr else rate) * second / first,
                self.beta1,
                self.beta2,
                self.eps * second,
                own_decay * first / second,
                gradient.astype(param.dtype),
            )
        return True
