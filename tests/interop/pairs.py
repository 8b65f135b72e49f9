"""The same tiny random model, as transformers has it and as the examples have it."""

import mindspore as ms
import numpy as np
import torch
import transformers
from mindspore import Tensor, nn, ops
from models.bert import BertClassifier, BertConfig, read_weights
from models.gpt2 import Gpt2ForCausalLM
from models.llama import LlamaForCausalLM
from models.weights import load_weights, read_folder

from mindpet.files.names import to_torch

VOCAB = 60
SEQ = 9


def make_pair(kind, folder):
    """A transformers model and an example model with the same weights."""
    torch.manual_seed(3)
    theirs = THEIRS[kind]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, which start as zeros and ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs, OURS[kind](folder).set_train(False)


def their_bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=24,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
    )


def their_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.1,
        )
    )


def their_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    )


def our_bert(folder):
    model = BertClassifier(BertConfig.from_folder(folder, method="full"), 5)
    load_weights(model.bert, read_weights(folder))
    weights = read_folder(folder)
    for name in ("weight", "bias"):
        getattr(model.classifier, name).set_data(Tensor(weights[f"classifier.{name}"]))
    return model


WIDTH = 6


class TheirPart(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.attn = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.norm, self.prenorm = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.norm(self.attn(torch.tanh(self.fc(self.prenorm(x)))))


class TheirColliding(torch.nn.Module):
    """Paths that are ends of others, and names that are ends of others."""

    def __init__(self):
        super().__init__()
        self.fc, self.block, self.norm = torch.nn.Linear(WIDTH, WIDTH), TheirPart(), torch.nn.LayerNorm(WIDTH)
        self.net = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([TheirPart(), TheirPart()])})
        self.classifier, self.my_classifier = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.block(self.fc(self.norm(x)))
        for layer in self.net["layers"]:
            x = layer(x)
        return self.my_classifier(torch.tanh(self.classifier(x)))


class OurPart(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc, self.attn = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.norm, self.prenorm = nn.LayerNorm((WIDTH,), epsilon=1e-5), nn.LayerNorm((WIDTH,), epsilon=1e-5)

    def construct(self, x):
        return x + self.norm(self.attn(ops.tanh(self.fc(self.prenorm(x)))))


class OurColliding(nn.Cell):
    """The same with MindSpore."""

    def __init__(self):
        super().__init__()
        self.fc, self.block, self.norm = nn.Dense(WIDTH, WIDTH), OurPart(), nn.LayerNorm((WIDTH,), epsilon=1e-5)
        self.net = nn.Cell()
        self.net.layers = nn.CellList([OurPart(), OurPart()])
        self.classifier, self.my_classifier = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, 2)

    def construct(self, x):
        x = self.block(self.fc(self.norm(x)))
        for layer in self.net.layers:
            x = layer(x)
        return self.my_classifier(ops.tanh(self.classifier(x)))


def make_colliding():
    """A torch model and a MindSpore network with the same weights."""
    torch.manual_seed(3)
    theirs, ours = TheirColliding().eval(), OurColliding().set_train(False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = theirs.state_dict()
    for path, parameter in ours.parameters_and_names():
        parameter.set_data(Tensor(weights[to_torch(path)].numpy()))
    return theirs, ours


THEIRS = {"bert": their_bert, "gpt2": their_gpt2, "llama": their_llama}
OURS = {"bert": our_bert, "gpt2": Gpt2ForCausalLM.from_pretrained, "llama": LlamaForCausalLM.from_pretrained}


def inputs(kind, rng):
    """(arguments for transformers, arguments for the example)."""
    ids = rng.integers(0, VOCAB, (3, SEQ))
    if kind != "bert":
        return {"input_ids": torch.tensor(ids)}, [Tensor(ids, ms.int32)]
    mask = (np.arange(SEQ) < np.array([[SEQ], [5], [2]])).astype(np.int64)
    return (
        {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)},
        [Tensor(ids, ms.int32), Tensor(mask, ms.int32)],
    )


def their_logits(model, arguments):
    """What transformers computes."""
    with torch.no_grad():
        return model(**arguments).logits.numpy()


def disturb(model, rng, size=0.1):
    """Add noise to what trains in a torch model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.tensor(rng.normal(size=tuple(parameter.shape)) * size, dtype=parameter.dtype))


def move(model, rng, size=0.1):
    """Add noise to what trains in a network."""
    for param in model.trainable_params():
        param.set_data(Tensor((param.asnumpy() + size * rng.normal(size=param.shape)).astype(np.float32)))


def step_both(theirs, ours, torch_inputs, our_inputs, first=0):
    """One step of SGD in each, on the mean square of the logits; of theirs, those of the tokens from `first` on."""
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    logits = theirs(**torch_inputs).logits
    (logits[:, first:] if logits.ndim == 3 else logits).square().mean().backward()
    optimizer.step()

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model = ours

        def construct(self, *arguments):
            return ops.square(self.model(*arguments)).mean()

    step = nn.TrainOneStepCell(Loss(), nn.SGD(ours.trainable_params(), 0.05))
    step.set_train(False)
    step(*our_inputs)
