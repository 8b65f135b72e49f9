"""Trainable tokens: some rows of an embedding train, the others are frozen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import Delta, delta_parameter, set_zeros
from mindpet.delta._config import TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import ConfigError
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.values import assign, value_of
from mindpet.utils.hints import Arrays, InitLike, Operators, Shape
from mindpet.utils.validate import Checker, is_int

ROWS, SLOTS = "mindpet_delta_trainable_tokens", "mindpet_trainable_tokens_slots"


@dataclass
class TrainableTokensConfig(TargetConfig):
    """Trainable tokens, as Hugging Face PEFT has them.

    Args beyond those of PeftConfig and TargetConfig:
        token_indices: numbers of the rows that train, each once. Default: [], they must be given before the adapter is
            made.
        init_weights: True for rows that start as those of the table, False for normal ones. Default: True.
    """

    peft_type, method_name = "TRAINABLE_TOKENS", "trainable_tokens"

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    required = ("token_indices",)
    not_in_peft = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    task_heads = ()  # in Hugging Face PEFT this method trains no head, and its files have none
    usual_targets = (("embed_tokens",), ("word_embeddings",), ("wte",), ("tok_embeddings",), ("shared",))

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {"token_indices": tuple(self.token_indices), "init": self.init_weights}

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        _check_tokens(check, self.token_indices)
        check.boolean(init_weights=self.init_weights)

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        if not self.token_indices:
            raise ConfigError("TrainableTokensConfig: 'token_indices' must be given.")


class TrainableTokensDelta(Delta):
    """Other rows of an embedding for some tokens.

    .. math::
        y_n = R_j \\text{ where } x_n = t_j, \\quad out_n \\text{ elsewhere}

    with the tokens t and their rows R. A layer that has the embedding's table as its weight, say a head that is tied to
    it, sees the rows, too.

    Source: the method of this name in Hugging Face PEFT.

    Delta arguments:
        token_indices (tuple of int): t.
        init (bool): True for rows that start as those of the table, False for normal ones. Default: True.
        shared (dict): the parameters of the embedding, for another layer with its table. Default: None.
        dtype (mindspore.dtype): of the rows. Default: float32.

    Parameters:
        mindpet_delta_trainable_tokens: R, `(tokens, features)`; not trained: mindpet_trainable_tokens_slots, int32
        `(vocab,)`: 1 + j for t_j, 0 for the others.
    """

    before_activation = True
    file_names = {ROWS: "trainable_tokens_delta"}

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, token_indices: Sequence[int], **others: Any
    ) -> list[str]:
        return _beyond(token_indices, kind.weight_of(cell).shape[0])

    def setup(self, cell, token_indices, init=True, shared=None, dtype=ms.float32):
        weight = self.kind.weight_of(cell)
        if shared is None:
            start = "zeros" if init else Normal(1.0)  # `start` sets those of the table
            shape = (len(token_indices), weight.shape[1])
            slots = np.zeros(weight.shape[0], np.int32)
            slots[list(token_indices)] = 1 + np.arange(len(token_indices))
            shared = {
                ROWS: delta_parameter(start, shape, dtype, ROWS),
                SLOTS: Parameter(Tensor(slots), name=SLOTS, requires_grad=False),
            }
        self.mindpet_delta_trainable_tokens, self.mindpet_trainable_tokens_slots = shared[ROWS], shared[SLOTS]
        self.tokens_zero, self.tokens_concat = Tensor(np.zeros((1, weight.shape[1]), np.float32)), ops.Concat()
        self.tokens_slot, self.tokens_gather = ops.Gather(), ops.Gather()
        self.tokens_equal, self.tokens_mul, self.tokens_add = ops.Equal(), ops.Mul(), ops.Add()

    def after(self, x, out):
        slot = self.tokens_slot(self.mindpet_trainable_tokens_slots, ops.reshape(x, (-1,)), 0)
        return from_rows(self.replace(slot, to_rows(out)), out)

    def replace(self, slot, rows):
        """`rows`, and in place of those whose slot is not 0 the trained ones."""
        stays = cast(self.tokens_equal(ops.reshape(slot, (-1, 1)), 0), rows.dtype)
        new = self.tokens_gather(self.padded_rows(rows.dtype), slot, 0)
        return self.tokens_add(self.tokens_mul(rows, stays), new)

    def padded_rows(self, dtype):
        """R behind a row of zeros, so that slot 0 is zero whatever R holds; in a type."""
        return self.tokens_concat((cast(self.tokens_zero, dtype), cast(self.mindpet_delta_trainable_tokens, dtype)))

    def reset(self) -> None:
        """Make the delta the identity: no token has a slot."""
        set_zeros(self.mindpet_delta_trainable_tokens, self.mindpet_trainable_tokens_slots)

    @classmethod
    def start_names(cls, init: bool = True, **others: Any) -> tuple[str, ...]:
        return (ROWS,) if init else ()

    @classmethod
    def start(cls, matrix: np.ndarray, values: Arrays, token_indices: Sequence[int], **others: Any) -> Arrays:
        return {ROWS: matrix[:, list(token_indices)].T}

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, token_indices: Sequence[int], **others: Any) -> bool:
        features, vocab = shape
        return values[ROWS].shape[1] == features and not _beyond(token_indices, vocab)

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], token_indices: Sequence[int], **others: Any) -> dict[str, tuple]:
        return {ROWS: (len(token_indices), (*shapes.get(ROWS, ()), "features", "features")[1])}

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, token_indices: Sequence[int], **others: Any) -> np.ndarray:
        merged = matrix.copy()
        merged[:, list(token_indices)] = values[ROWS].T
        return merged

    @property
    def operators(self) -> Operators:
        return {
            "strategy_tokens_concat": (self.tokens_concat, "kf,kf"),
            "strategy_tokens_slot": (self.tokens_slot, "f,n"),
            "strategy_tokens_equal": (self.tokens_equal, "nf,"),
            "strategy_tokens_gather": (self.tokens_gather, "ko,n"),
            "strategy_tokens_mul": (self.tokens_mul, "no,nf"),
            "strategy_tokens_add": (self.tokens_add, "no,no"),
        }

    @property
    def signature(self) -> Any:
        return (type(self),)

    def extend_repr(self) -> str:
        return f"tokens={len(self.mindpet_delta_trainable_tokens)}"


class TrainableTokensHead(TrainableTokensDelta):
    """The same rows for a linear layer whose weight W is the table of the embedding.

    .. math::
        y_{t_j} = R_j x + b_{t_j}, \\quad y_i = out_i \\text{ elsewhere}
    """

    @classmethod
    def problems(cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, **others: Any) -> list[str]:
        problems = ["its weight is the table of an embedding, but not as (out, in)"] if kind.transposed else []
        return problems + ["no rows of an embedding beside a head with strategies"] * is_sharded

    def setup(self, cell, **arguments):
        super().setup(cell, **arguments)
        self.base_bias = self.kind.bias_of(cell) if self.kind.adds_bias else None
        self.tokens_matmul = ops.MatMul(transpose_b=True)

    def after(self, x, out):
        slots, rows = self.mindpet_trainable_tokens_slots, to_rows(out)
        new = self.tokens_matmul(self.to_compute(to_rows(x)), self.padded_rows(self.compute_dtype))
        new = cast(self.tokens_gather(new, slots, 1), out.dtype)
        stays = cast(self.tokens_equal(slots, 0), out.dtype)
        if self.base_bias is not None:
            new = new + (1 - stays) * cast(self.base_bias, out.dtype)
        return from_rows(self.tokens_add(self.tokens_mul(rows, stays), new), out)

    @property
    def operators(self) -> Operators:
        """None: it has no strategies, see `problems`."""
        return {}


# Layers that have the table of the embedding as their weight see its rows.
TrainableTokensDelta.tied_deltas = {"embedding": TrainableTokensDelta, "linear": TrainableTokensHead}


class TrainableTokensEmbedding(TrainableTokensDelta):
    """An embedding of which some rows train.

    .. math::
        y_n = R_j \\text{ where } x_n = t_j, \\quad T_{x_n} \\text{ elsewhere}

    Source: the method of this name in Hugging Face PEFT. The rows R start as those of the table T; after a base was
    loaded into the table, `start_from_table()` lets them start as its rows. A head that is tied to the embedding
    multiplies by `table()`.

    Args:
        vocab_size: rows of the table.
        embedding_size: features of a row.
        token_indices: numbers t of the rows that train, each once.
        embedding_table: of the table. Default: 'normal'.
        dtype: of the table, and of the output: float16, float32 or bfloat16. Default: float32.
        param_init_type: of the rows: float16, float32 or bfloat16. Default: float32.

    Parameters:
        embedding_table `(vocab_size, embedding_size)`, mindpet_delta_trainable_tokens `(tokens, embedding_size)`, and
        mindpet_trainable_tokens_slots `(vocab_size,)`, int32, which does not train.

    Inputs:
        ids: `(*)`, integers.

    Outputs:
        `(*, embedding_size)`.

    Raises:
        TypeError, ValueError: an argument is wrong; all wrong ones are in the message.
    """

    is_patched_in = False

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        token_indices: Sequence[int],
        embedding_table: InitLike = "normal",
        dtype: ms.Type = ms.float32,
        param_init_type: ms.Type = ms.float32,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(vocab_size=vocab_size, embedding_size=embedding_size)
        _check_tokens(check, token_indices)
        if not check.problems:
            problems = _beyond(token_indices, vocab_size)
            rule = f"below 'vocab_size', {vocab_size}, and at least one"
            check.require(token_indices and not problems, ValueError, "token_indices", token_indices, rule)
        check.initial("embedding_table", embedding_table, (vocab_size, embedding_size))
        check.float_type(dtype=dtype, param_init_type=param_init_type)
        check.done()
        super().__init__()
        self.vocab_size, self.embedding_size, self.token_indices = vocab_size, embedding_size, tuple(token_indices)
        self.param_init_type = param_init_type
        shape = (vocab_size, embedding_size)
        self.embedding_table = delta_parameter(embedding_table, shape, dtype, "embedding_table")
        self.gather = ops.Gather()
        self.kind = LayerKind("embedding", "embedding_table", compute_dtype=dtype)
        self.setup(self, self.token_indices, dtype=param_init_type)
        self.start_from_table()

    def construct(self, ids):
        rows = self.gather(self.embedding_table, ops.reshape(ids, (-1,)), 0)
        return ops.reshape(self.after(ids, rows), ids.shape + (self.embedding_size,))

    def start_from_table(self) -> None:
        """Set the rows to those of the table."""
        rows = value_of(self.embedding_table)[list(self.token_indices)]
        assign(self.mindpet_delta_trainable_tokens, Tensor(rows.astype(ms.dtype_to_nptype(self.param_init_type))))

    def table(self) -> Tensor:
        """The table with the rows, `(vocab_size, embedding_size)`."""
        return self.replace(self.mindpet_trainable_tokens_slots, self.embedding_table)

    def merged_weight(self) -> Tensor:
        """The table with the rows, in the type of the table, for a plain embedding."""
        params = (self.embedding_table, self.mindpet_delta_trainable_tokens)
        table, rows = (param.asnumpy().astype(np.float32) for param in params)
        return Tensor(self.fold(table.T, {ROWS: rows}, self.token_indices).T.copy(), self.embedding_table.dtype)

    @property
    def operators(self) -> Operators:
        return {"strategy_org_gather": (self.gather, "vo,n"), **super().operators}

    def extend_repr(self) -> str:
        return (
            f"vocab_size={self.vocab_size}, embedding_size={self.embedding_size}, tokens={len(self.token_indices)}, "
            f"param_init_type={self.param_init_type}"
        )


def _check_tokens(check, tokens):
    listed = isinstance(tokens, (list, tuple)) and all(is_int(token) for token in tokens)
    if check.require(listed, TypeError, "token_indices", tokens, "a list of int"):
        check.require(all(token >= 0 for token in tokens), ValueError, "token_indices", tokens, "from 0 on")
        once = len(set(tokens)) == len(tokens)
        check.require(once, ValueError, "token_indices", tokens, "of different numbers")


def _beyond(tokens, vocab):
    """What speaks against tokens of a table with so many rows."""
    over = sorted(token for token in tokens if token >= vocab)
    return [f"it has {vocab} rows, but 'token_indices' has {over[:9]}"] if over else []


METHOD = Method(
    "trainable_tokens",
    TrainableTokensConfig,
    ("*mindpet_delta_trainable_tokens",),
    {"embedding": TrainableTokensDelta},
    (TrainableTokensEmbedding,),
    constants=("*mindpet_trainable_tokens_slots",),
    identity=True,
)
