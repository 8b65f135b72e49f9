"""What a method is made of: a Delta for each kind of place, and a Dense layer that has one."""

from collections.abc import Sequence
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import initializer

from mindpet.errors import CheckpointError, MergeError
from mindpet.layers.activation import ACTIVATIONS
from mindpet.layers.linear import Dense, cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.values import assign
from mindpet.utils.hints import ActivationLike, Arrays, InitLike, Operators, Shape, Strategy
from mindpet.utils.sharding import apply_strategies
from mindpet.utils.validate import Checker

PROMPT = "prompt_embeddings"  # what the one tensor of a prefix or a prompt is called in a file of Hugging Face PEFT


class Delta(nn.Cell):
    """What a method adds to one layer, which itself stays as it is.

    .. math::
        y = after(x, layer(before(x)))

    A method overrides `setup` and `after`, and of the rest what it needs. `create` makes an object. All of its
    parameters stand in the object or in Cells of it, and their paths from here are their names in `values` below.

    Attributes:
        is_patched_in (bool): whether it is put into a network, and so is no component of the paths of its parameters.
        before_activation (bool): whether `after` gets what the layer gives to its own activation, and not what that
            returns. Default: False.
        file_names (dict): name of a parameter -> its name in a file of an adapter, behind the path of the layer. What
            is not in it is not in a file. Default: None, for all parameters by their own names.
        shared_names (dict): name of a parameter that several layers share -> its name in a file, where it stands once.
            Default: {}.
        fold (callable): `fold(matrix, values, **arguments)`, a class method in NumPy: from the layer's weight as
            `(out, rest)` and the delta's values by name, all float32, and the delta arguments to the weight that makes
            up for the delta. Default: None, for a delta that cannot be folded into a weight.
        tied_deltas (dict): kind of a layer -> the Delta that a further layer of that kind gets, if it has the weight of
            this delta's layer as its own; `setup` gets this delta's parameters by name as `shared`. All places of the
            weight must be such layers. Default: {}, for a delta of its own layer alone.
        fixed_names (tuple): names of parameters that do not train, though the method's others do. Default: ().
        can_reset (bool): whether `reset` can make it the identity. Default: True.
        usual_path (str): where a network usually has the Cell of a method whose tensors `to_file` gives; for files
            without a network. Default: ''.
        kind (LayerKind): of the layer.
        compute_dtype (mindspore.dtype): that the layer computes in.
    """

    is_patched_in = True
    before_activation = False
    can_reset = True
    usual_path = ""
    file_names = None
    shared_names = {}
    fixed_names = ()
    tied_deltas = {}
    fold = None

    @classmethod
    def create(cls, cell: nn.Cell, kind: LayerKind, **arguments: Any) -> "Delta":
        """A Delta for a layer; the arguments are those of `setup`."""
        delta = cls(auto_prefix=False)
        delta.kind, delta.compute_dtype = kind, kind.compute_dtype
        delta.setup(cell, **arguments)
        return delta

    def setup(self, cell, **arguments):
        """Make the parameters and operators.

        Args:
            cell (Cell): the layer.
            arguments: delta arguments, see `PeftConfig.delta_arguments`.
        """
        raise NotImplementedError

    @classmethod
    def shared(cls, targets: Sequence[Any]) -> dict[str, Parameter]:
        """The parameters that the deltas of an adapter share; `setup` gets them as `shared`.

        Args:
            targets: of the adapter that have this delta; each has `cell`, `kind` and `arguments`.

        Returns:
            By name, see `shared_names`; empty if there are none.
        """
        return {}

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, **arguments: Any) -> list[str]:
        """What speaks against this delta in a place; `is_sharded` says whether operators there have strategies."""
        return []

    def construct(self, x, out):
        return self.after(x, out)

    def before(self, x):
        """What the layer gets in place of its input `x`."""
        return x

    def after(self, x, out):
        """The output with the delta, from the layer's input and output; in the type of `out`."""
        raise NotImplementedError

    def to_compute(self, value):
        """A tensor in the compute type."""
        return cast(value, self.compute_dtype)

    def keep_weight(self, cell: nn.Cell) -> None:
        """Keep the layer's weight beside the delta's parameters, for a delta that computes with it."""
        self.base_weight = self.kind.kept_weight(cell)
        self.computes_weight = isinstance(self.base_weight, nn.Cell)

    def kept_weight(self):
        """The layer's weight, see `keep_weight`; it does not train."""
        return self.base_weight() if self.computes_weight else self.base_weight

    def base_places(self, cell: nn.Cell) -> dict[str, tuple[nn.Cell, str]]:
        """Where parameters of the base stand that it computes with, and that the adapter may have copies of.

        Args:
            cell: the layer.

        Returns:
            name of an attribute, which begins with `base_` -> (Cell, attribute there); by default of `base_bias`, the
            layer's bias.
        """
        return {} if getattr(self, "base_bias", None) is None else {"base_bias": (cell, self.kind.bias)}

    def reset(self) -> None:
        """Make the delta the identity bit for bit, whatever its parameters hold: all of them are lost.

        Each one is set, not only what the last product needs, for `0 * NaN` is NaN. Keep the values that are to come
        back.
        """
        set_zeros(*(param for name, param in self.parameters_and_names() if name.startswith("mindpet_")))

    @classmethod
    def constants(cls, **arguments: Any) -> Arrays:
        """Values that the delta arguments fix, name -> array; they are parameters, but in no file."""
        return {}

    @classmethod
    def start_names(cls, **arguments: Any) -> tuple[str, ...]:
        """Names of the values that `start` gives, a tuple."""
        return ()

    @classmethod
    def start(cls, matrix: np.ndarray, values: Arrays, **arguments: Any) -> Arrays:
        """Values that a fresh delta takes from the layer's weight.

        Args:
            matrix: the weight as `(out, rest)`, float32.
            values: of a fresh delta, by name.
            arguments: delta arguments.

        Returns:
            Those of `start_names`, by name. What of them is not in `file_names` is computed from the
            weight again when a file is read.
        """
        return {}

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        """Whether the values can be of a layer whose weight has a shape, `(out, in)` or `(out, in / groups, *kernel)`.

        It must tell, for a linear layer, whether a shape that is not square is the wrong way round.
        """
        return True

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], **arguments: Any) -> dict[str, tuple]:
        """The tensors that a file must have for a layer, as far as its tensors and the arguments tell.

        Args:
            shapes: by name, of the layer's tensors in the file, and of those that layers share.
            arguments: delta arguments.

        Returns:
            Shapes by name.
        """
        return {name: shapes.get(name, ()) for name in (*(cls.file_names or shapes), *cls.shared_names)}

    @classmethod
    def folds_bias(cls, **arguments: Any) -> bool:
        """Whether folding changes the layer's bias."""
        return False

    @classmethod
    def fold_bias(cls, bias: np.ndarray, values: Arrays, **arguments: Any) -> np.ndarray:
        """The bias `(out,)` that makes up for the delta, from the layer's own; see `fold`."""
        return bias

    @classmethod
    def to_file(cls, values: dict[str, Arrays]) -> Arrays:
        """The tensors that a file has for all layers together, where they are not the parameters one by one.

        Args:
            values: path of a layer -> name -> value.

        Returns:
            By key; empty if all are in `file_names` and `shared_names`.
        """
        return {}

    @classmethod
    def from_file(cls, tensors: Arrays, paths: Sequence[str]) -> dict[str, Arrays]:
        """The inverse of `to_file`: path -> name -> value, from tensors by key and the paths of the layers."""
        return {}

    @property
    def positions(self) -> int:
        """How many positions a network must leave free before the first token."""
        return 0

    @property
    def operators(self) -> Operators:
        """The operator behind each slot of `shard()`, and the axes of its inputs; see `mindpet.utils.sharding`."""
        return {}

    def shard(self, **strategies: Optional[Strategy]) -> "Delta":
        """Set the strategies of the operators; the slots are the keys of `operators`."""
        return apply_strategies(self, strategies)

    @property
    def signature(self) -> Any:
        """What must be equal for two deltas to have each other's values, besides shapes and types."""
        return str(self)


class DeltaDense(Dense):
    """A Dense layer with a Delta; the base parameters keep their names `weight` and `bias`.

    A method's own Dense layer derives from this class and from its Delta, in this order, and so has the parameters and
    the operators of both.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        weight_init: of the weight W. Default: 'normal'.
        bias_init: of the bias b. Default: 'zeros'.
        has_bias: whether there is a bias. Default: True.
        activation: applied to the output. Default: None.
        param_init_type: type of the delta's parameters: float16, float32 or bfloat16. Default: float32.
        compute_dtype: type of the computation: float16, float32 or bfloat16. Default: float16.
        check: what the method has found wrong with its own arguments. Default: None.
        arguments: delta arguments.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong; all wrong ones are in the message.
    """

    is_patched_in = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: InitLike = "normal",
        bias_init: InitLike = "zeros",
        has_bias: bool = True,
        activation: ActivationLike = None,
        param_init_type: ms.Type = ms.float32,
        compute_dtype: ms.Type = ms.float16,
        check: Optional[Checker] = None,
        **arguments: Any,
    ):
        check = check or Checker(type(self).__name__)
        check.positive_int(in_channels=in_channels, out_channels=out_channels)
        check.initial("weight_init", weight_init, (out_channels, in_channels))
        check.initial("bias_init", bias_init, (out_channels,))
        check.boolean(has_bias=has_bias)
        check.activation("activation", activation, ACTIVATIONS)
        check.float_type(param_init_type=param_init_type, compute_dtype=compute_dtype)
        check.done()
        super().__init__(
            in_channels, out_channels, weight_init, bias_init, has_bias, activation, compute_dtype=compute_dtype
        )
        self.param_init_type = param_init_type
        self.kind = LayerKind(compute_dtype=compute_dtype)
        self.arguments = arguments
        self.setup(self, dtype=param_init_type, **arguments)

    def transform(self, rows):
        out = self.linear(self.before(rows))
        if self.before_activation:
            return self.activate(self.after(rows, out))
        return self.after(rows, self.activate(out))

    def keep_weight(self, cell: nn.Cell) -> None:
        """Do nothing: the weight is the layer's own."""

    def kept_weight(self):
        return self.weight

    @property
    def operators(self) -> Operators:
        return {
            "strategy_org_dense_matmul": (self.matmul, "ni,oi"),
            "strategy_org_bias_add": (self.bias_add if self.has_bias else None, "no,o"),
            **super().operators,
            "strategy_activation": (self.activation, "no"),
        }

    def merged_weight(self) -> Tensor:
        """The weight that makes up for the delta, computed in float32, in the type of the weight."""
        values = self._values()
        return Tensor(self.fold(values["weight"], values, **self.arguments), self.weight.dtype)

    def merged_bias(self) -> Optional[Tensor]:
        """The bias that goes with `merged_weight`, in the type of the bias; None if there is none."""
        values = self._values()
        if not self.has_bias:
            return None
        return Tensor(self.fold_bias(values["bias"], values, **self.arguments), self.bias.dtype)

    def _values(self):
        """The parameters and constants by name, float32, as `fold` takes them."""
        if self.fold is None:
            raise MergeError(f"{type(self).__name__}: its delta cannot be folded into a weight.")
        values = {name: param.asnumpy().astype(np.float32) for name, param in self.parameters_and_names()}
        return {**values, **self.constants(**self.arguments)}

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, param_init_type={self.param_init_type}, compute_dtype={self.compute_dtype}"


class PrefixDelta(Delta):
    """Trained keys and values in front of those of one attention: `(K, V) -> ([P_k; K], [P_v; V])`.

    The attention calls it as its attribute `prefix_source`. A method overrides `past`, `positions` and the attributes
    below, and derives from the Cell that has the parameters, too.

    Attributes:
        table (str): name of the embedding of the prefix.
        projection (tuple): names of the two Dense layers behind it, of a prefix that is computed.
        may_be_plain (bool): whether they may be missing. Default: False.
        concat (Primitive): joins along the tokens.

    Inputs:
        key, value: `(batch, heads, seq, head_dim)`.

    Outputs:
        key, value: `(batch, heads, tokens + seq, head_dim)`.
    """

    table, projection, may_be_plain = None, None, False
    can_reset = False
    usual_path = "prefix_encoder"
    file_names = {}

    def construct(self, key, value):
        past_key, past_value = self.past(key.shape[0], key.dtype)
        return self.concat((past_key, key)), self.concat((past_value, value))

    def past(self, batch, dtype):
        """The trained keys and values, each `(batch, heads, tokens, head_dim)`."""
        raise NotImplementedError

    def shard(self, batch: int, heads: int) -> "PrefixDelta":
        """Cut the result over the batch and the heads; the parameters are the same on every rank.

        Args:
            batch: slices of the batch.
            heads: slices of the key and value heads.

        Returns:
            Itself.
        """
        layout = (batch, heads, 1, 1)
        self.concat.shard((layout, layout))
        return self

    @classmethod
    def to_file(cls, values: dict[str, Arrays]) -> Arrays:
        """One table of all layers, `(tokens, layers * 2 * width)`: of layer i the keys in slot 2i, the values next."""
        return {PROMPT: np.concatenate([cls.computed(layer) for layer in values.values()], 1)}

    @classmethod
    def from_file(cls, tensors: Arrays, paths: Sequence[str]) -> dict[str, Arrays]:
        parts = np.split(tensors[PROMPT], len(paths), 1)
        return {path: {cls.table: np.ascontiguousarray(part)} for path, part in zip(paths, parts)}

    @classmethod
    def computed(cls, values: Arrays) -> np.ndarray:
        """What is computed from the embedding E of one layer: `W_2 tanh(W_1 E + b_1) + b_2`, or itself."""
        if cls.table not in values:
            raise CheckpointError(f"no prefix in the file: {cls.table} is missing; there are {sorted(values)}.")
        dense = [f"{name}.{leaf}" for name in cls.projection for leaf in ("weight", "bias")]
        lacking = [name for name in dense if name not in values]
        if cls.may_be_plain and lacking == dense:
            return values[cls.table]
        if lacking:
            raise CheckpointError(f"{cls.table} is projected, but the file lacks {lacking}.")
        weight_in, bias_in, weight_out, bias_out = (values[name].astype(np.float32) for name in dense)
        return np.tanh(values[cls.table].astype(np.float32) @ weight_in.T + bias_in) @ weight_out.T + bias_out


class ResidualAdapter(nn.Cell):
    """`h + bottleneck(h)` after a layer, or `h + bottleneck(x)` beside it. A method overrides `bottleneck(rows)`.

    Args:
        hidden_size: features of the input and the output.
        param_init_type: type of the parameters.
        compute_dtype: type of the bottleneck's computation. The residual is added in the input's own type, so that an
            untrained bottleneck that gives zeros leaves the input bit for bit.
    """

    form = "sequential"  # or 'parallel', with the layer's input x

    def __init__(self, hidden_size: int, param_init_type: ms.Type, compute_dtype: ms.Type):
        super().__init__()
        self.hidden_size = hidden_size
        self.param_init_type = param_init_type
        self.compute_dtype = compute_dtype
        self.residual_add = ops.Add()

    def construct(self, hidden, x=None):
        rows = to_rows(hidden)
        entering = to_rows(x) if self.form == "parallel" else rows
        delta = ops.cast(self.bottleneck(ops.cast(entering, self.compute_dtype)), hidden.dtype)
        return from_rows(self.residual_add(rows, delta), hidden)

    def reset(self) -> None:
        """Make the adapter the identity: every parameter is zero, for `0 * NaN` is NaN."""
        set_zeros(*self.get_parameters())

    def bottleneck(self, rows):
        """The delta on rows of the compute type: `(rows, features of x) -> (rows, hidden_size)`."""
        raise NotImplementedError

    def extend_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, param_init_type={self.param_init_type}, "
            f"compute_dtype={self.compute_dtype}"
        )


def out_features(cell: nn.Cell, kind: LayerKind) -> int:
    """Features of a place's output."""
    return kind.out_features(cell)


def matrix_shape(cell: nn.Cell, kind: LayerKind) -> tuple[int, int]:
    """`(out, in)` of a linear layer, `(features, vocab)` of an embedding."""
    shape = kind.weight_of(cell).shape
    return shape[::-1] if kind.transposed else shape


def scale_problems(scale: Union[float, np.ndarray], kind: LayerKind) -> list[str]:
    """What speaks against a scale of a delta beside a layer of a kind: that its compute type cannot hold it."""
    with np.errstate(over="ignore"):
        held = abs(float(np.asarray(scale).astype(ms.dtype_to_nptype(kind.compute_dtype))))
    if 0 < held < np.inf:
        return []
    return [f"the scale, {scale:g}, must be a number of {kind.compute_dtype}, in which it computes"]


def set_zeros(*params: Parameter) -> None:
    """Fill Parameters with zeros."""
    for param in params:
        assign(param, initializer("zeros", param.shape, param.dtype).init_data())


def delta_parameter(init: InitLike, shape: Sequence[int], dtype: ms.Type, name: str) -> Parameter:
    """A parameter of a delta, of `dtype` also where `init` is a Tensor of another type."""
    if isinstance(init, Tensor):
        # A Tensor of `initializer()` has no values yet: a cast of it kills the process (MindSpore 2.10) or gives zeros.
        init = init.init if init.has_init else init.astype(dtype)
    return Parameter(initializer(init, shape, dtype), name=name)
