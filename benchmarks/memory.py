"""How much memory a training step takes, by recipe.

Every number is of a process of its own, which makes three steps with Adam on a small BERT, or LLaMA, with random
weights and LoRA on all linear layers: its largest memory, less what it had when the network was made. That is
activations, gradients, what Adam has, and what MindSpore takes to compile.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from models.bert import BertClassifier, BertConfig
from models.llama import CrossEntropy, LlamaConfig, LlamaForCausalLM
from models.loss import ChunkedLoss
from models.step import AccumulatedStep

from benchmarks.measure import in_child, report
from mindpet.peft import LoraConfig, get_peft_model

BATCH, LENGTH, WIDTH, LAYERS, PARTS = 16, 128, 256, 4, 4
# Recipe -> for which models it is.
RECIPES = {
    "as it is": ("bert", "llama"),
    "freeze_a": ("bert", "llama"),
    "recompute": ("bert", "llama"),
    "accumulate": ("bert", "llama"),
    "chunked loss": ("llama",),
    "all": ("bert", "llama"),
}


class BertLoss(nn.Cell):
    """BERT with its loss."""

    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model, self.loss = model, nn.CrossEntropyLoss()

    def construct(self, ids, labels):
        return self.loss(self.model(ids, ids >= 0), labels[:, 0])


class LlamaLoss(nn.Cell):
    """LLaMA with its loss from all logits."""

    def __init__(self, model, config):
        super().__init__(auto_prefix=False)
        self.model, self.loss = model, CrossEntropy(config)

    def construct(self, ids, labels):
        return self.loss(self.model(ids), labels)


def make(name, has):
    """The network with its loss; `has` tells whether a recipe is wanted."""
    if name == "bert":
        config = BertConfig(1000, WIDTH, LAYERS, 4, 4 * WIDTH, hidden_dropout_prob=0.0)
        base = BertClassifier(config, 2)
        layers = base.bert.encoder.layer
    else:
        config = LlamaConfig(32000, WIDTH, 4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4)
        base = LlamaForCausalLM(config)
        layers = base.model.layers
    if has("recompute"):
        for layer in layers:
            layer.recompute()
    get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", freeze_a=has("freeze_a")))
    if name == "bert":
        return BertLoss(base)
    return ChunkedLoss(base.model, base.lm_head, 2000) if has("chunked loss") else LlamaLoss(base, config)


def memory(field):
    """A line of what Linux tells about this process, in MB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(field))


def measure(name, recipe, mode):
    """MB that three steps take."""
    ms.set_context(mode=mode)
    network = make(name, lambda wanted: recipe in (wanted, "all"))
    optimizer = nn.Adam(network.trainable_params(), 1e-3)
    if recipe in ("accumulate", "all"):
        step = AccumulatedStep(network, optimizer, PARTS).set_train()
    else:
        step = nn.TrainOneStepCell(network, optimizer).set_train()
    ids = Tensor(np.random.default_rng(1).integers(0, 2, (BATCH, LENGTH)).astype(np.int32))
    before = memory("VmRSS")
    for _ in range(3):
        step(ids, ids).asnumpy()
    return memory("VmHWM") - before


def run(short: bool = False) -> None:
    """Print the table."""
    rows = []
    for name in ("bert",) if short else ("bert", "llama"):
        for recipe in ("as it is",) if short else [recipe for recipe, models in RECIPES.items() if name in models]:
            sizes = [round(in_child(measure, name, recipe, mode)) for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE)]
            rows.append({"model": name, "recipe": recipe, "PyNative MB": sizes[0], "graph MB": sizes[1]})
    report("memory", rows)
