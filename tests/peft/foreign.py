"""Small networks that were not written for mindpet. All take ids `(batch, SEQ)` and return `(batch, LABELS)`."""

import math

from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import initializer

VOCAB, SEQ, WIDTH, LABELS = 10, 5, 8, 3


class ClassLevel(nn.Cell):
    """What it needs stands on the class: an activation, sizes, what a subclass may override, and no prefix."""

    activation = nn.GELU(approximate=False)
    width, labels, layer = WIDTH, LABELS, nn.Dense
    scale = 0.5

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, self.width)
        self.up, self.down = self.layer(self.width, self.width), self.layer(self.width, self.width)
        self.classifier = self.layer(self.width, self.labels)

    def construct(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.scale * self.down(self.activation(self.up(hidden)))
        return self.classifier(hidden.mean(1))


class PythonList(nn.Cell):
    """Layers in a Python list, registered one by one, and another reference in a dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.steps = []
        for number in range(2):
            layer = nn.Dense(WIDTH, WIDTH, activation="tanh")
            self.insert_child_to_cell(f"step{number}", layer)
            self.steps.append(layer)
        self.classifier = nn.Dense(WIDTH, LABELS)
        self.heads = {"logits": self.classifier}

    def construct(self, ids):
        hidden = self.embed(ids)
        for step in self.steps:
            hidden = hidden + step(hidden)
        return self.heads["logits"](hidden.mean(1))


class Mint(nn.Cell):
    """Layers of `mindspore.mint`, and one of its functions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)  # that of mint has no kernel on a CPU
        self.first = mint.nn.Linear(WIDTH, WIDTH)
        self.second = mint.nn.Linear(WIDTH, WIDTH, bias=False)
        self.classifier = mint.nn.Linear(WIDTH, LABELS)

    def construct(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.second(mint.nn.functional.relu(self.first(hidden)))
        return self.classifier(hidden.mean(1))


class Twice(nn.Cell):
    """A block that is called twice, and a parameter of the network itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = nn.SequentialCell(nn.Dense(WIDTH, WIDTH), nn.Tanh())
        self.shift = Parameter(initializer("ones", (WIDTH,)), name="shift")
        self.classifier = nn.Dense(WIDTH, LABELS)

    def construct(self, ids):
        hidden = self.block(self.embed(ids) + self.shift)
        return self.classifier(self.block(hidden).mean(1))


class Sliced(nn.Cell):
    """A slice of a CellList, as in Qwen3 and Mistral: MindSpore renames the Parameters of the new list."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.CellList([Layer(), Layer(), Layer()])
        self.classifier = nn.Dense(WIDTH, LABELS)

    def construct(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers[:3]:
            hidden = layer(hidden)
        return self.classifier(hidden.mean(1))


class Layer(nn.Cell):
    """One of a list."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((WIDTH,))
        self.fc = nn.Dense(WIDTH, WIDTH)

    def construct(self, x):
        return x + self.fc(self.norm(x))


class Colliding(nn.Cell):
    """The path of `fc` is the end of those of others, and so is that of the head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.fc = nn.Dense(WIDTH, WIDTH)
        self.block = nn.SequentialCell()
        self.block.insert_child_to_cell("fc", nn.Dense(WIDTH, WIDTH))
        self.block.insert_child_to_cell("classifier", nn.Dense(WIDTH, WIDTH))
        self.block.cell_list = tuple(self.block._cells.values())
        self.classifier = nn.Dense(WIDTH, LABELS)

    def construct(self, ids):
        hidden = ops.tanh(self.fc(self.embed(ids)))
        return self.classifier(self.block(hidden).mean(1))


class Attention(nn.Cell):
    """Takes a prefix. What it has none of by itself stands on the class."""

    prefix_source = None
    kv_heads, head_dim = 2, WIDTH // 2

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Dense(WIDTH, 3 * WIDTH), nn.Dense(WIDTH, WIDTH)

    def construct(self, x):
        batch, seq, _ = x.shape
        query, key, value = ops.transpose(
            ops.reshape(self.qkv(x), (batch, seq, 3, self.kv_heads, self.head_dim)), (2, 0, 3, 1, 4)
        )
        if self.prefix_source is not None:
            key, value = self.prefix_source(key, value)
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) / math.sqrt(self.head_dim)
        found = ops.matmul(ops.softmax(scores), value)
        return self.out(ops.reshape(ops.transpose(found, (0, 2, 1, 3)), (batch, seq, WIDTH)))


class Attending(nn.Cell):
    """Two attentions and a convolution: something for every method."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.attention = nn.CellList([Attention(), Attention()])
        self.conv = nn.Conv2d(1, 4, 3, has_bias=True)
        self.classifier = nn.Dense(WIDTH + 4, LABELS)

    def construct(self, ids):
        hidden = self.embed(ids)
        for attention in self.attention:
            hidden = hidden + attention(hidden)
        image = self.conv(ops.expand_dims(hidden, 1)).mean((2, 3))
        return self.classifier(ops.concat((hidden.mean(1), image), 1))


# Network -> names of layers that can be targets, and of all of their paths.
FOREIGN = {
    ClassLevel: (["up", "down"], ["up", "down"]),
    PythonList: (["step0", "step1"], ["step0", "step1"]),
    Mint: (["first", "second", "embed"], ["embed", "first", "second"]),
    Twice: (["block.0"], ["block.0"]),
    Sliced: (["fc"], ["layers.0.fc", "layers.1.fc", "layers.2.fc"]),
    Colliding: (["fc"], ["block.fc", "fc"]),
}
