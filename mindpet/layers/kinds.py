"""Which Cells are linear layers, embeddings or convolutions, and where they keep their weight."""

from dataclasses import dataclass

from mindspore import mint, nn

from mindpet.utils.validate import Checker

NAMES = ("linear", "embedding", "conv2d")


@dataclass(frozen=True)
class LayerKind:
    """How a class of Cells computes `weight * x + bias`.

    Attributes:
        name (str): 'linear', 'embedding' or 'conv2d'.
        weight (str): attribute of the weight: of a linear layer `(out, in)`, of an embedding `(vocab, features)`, of a
            convolution `(out, in / groups, height, width)`.
        bias (str): attribute of the bias `(out,)`, which may be missing or None.
        fan_in_fan_out (bool): whether a linear layer has its weight as `(in, out)`.
    """

    name: str
    weight: str = "weight"
    bias: str = "bias"
    fan_in_fan_out: bool = False

    @property
    def transposed(self):
        """Whether the weight has the features that come out on its last axis."""
        return self.fan_in_fan_out or self.name == "embedding"

    def weight_of(self, cell):
        """The Parameter of the weight."""
        return getattr(cell, self.weight)

    def bias_of(self, cell):
        """The Parameter of the bias, or None."""
        return getattr(cell, self.bias, None)

    def to_matrix(self, weight):
        """A weight as `(out, rest)`; NumPy array or Tensor."""
        return weight.T if self.transposed else weight.reshape(weight.shape[0], -1)

    def from_matrix(self, matrix, shape):
        """The inverse of `to_matrix`."""
        return matrix.T if self.transposed else matrix.reshape(shape)


KINDS = {
    nn.Dense: LayerKind("linear"),
    mint.nn.Linear: LayerKind("linear"),
    nn.Embedding: LayerKind("embedding", "embedding_table"),
    mint.nn.Embedding: LayerKind("embedding"),
    nn.Conv2d: LayerKind("conv2d"),
}


def register_layer(cls, name="linear", weight="weight", bias="bias", fan_in_fan_out=False):
    """Let Cells of a class, and of its subclasses, carry deltas.

    The Cell's `construct` takes the input first and returns one Tensor. If it has an activation of its own, it is
    called `activation` and is switched by `activation_flag`, as in `mindspore.nn.Dense`.

    Args:
        cls (type): subclass of `mindspore.nn.Cell`.
        name (str): 'linear', 'embedding' or 'conv2d'. Default: 'linear'.
        weight (str): attribute of the weight. Default: 'weight'.
        bias (str): attribute of the bias. Default: 'bias'.
        fan_in_fan_out (bool): whether the weight of a linear layer is `(in, out)`. Default: False.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `name` is unknown.
    """
    check = Checker("register_layer")
    check.require(isinstance(cls, type) and issubclass(cls, nn.Cell), TypeError, "cls", cls, "a subclass of Cell")
    check.choice("name", name, NAMES)
    for argument, value in (("weight", weight), ("bias", bias)):
        check.require(isinstance(value, str), TypeError, argument, value, "a str")
    check.boolean(fan_in_fan_out=fan_in_fan_out)
    check.done()
    KINDS[cls] = LayerKind(name, weight, bias, fan_in_fan_out)


def layer_kind(cell):
    """The LayerKind of a Cell, or None."""
    return next((KINDS[cls] for cls in type(cell).__mro__ if cls in KINDS), None)
