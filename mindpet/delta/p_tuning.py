"""P-tuning: vectors in front of the embeddings of the input, which a small network computes while they train."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal, Uniform

from mindpet.delta._base import PROMPT, Delta, delta_parameter
from mindpet.delta._config import PeftConfig
from mindpet.delta._method import Method
from mindpet.delta.prompt_tuning import PromptCell, PromptConfig
from mindpet.errors import CheckpointError, NotPositiveIntError
from mindpet.layers.linear import Dense, cast
from mindpet.network.kinds import InputEmbeddingKind
from mindpet.utils.hints import Arrays
from mindpet.utils.sharding import shard_whole
from mindpet.utils.validate import Checker
from mindpet.utils.version_control import get_dropout

TABLE, LSTM, MLP = (f"mindpet_delta_p_tuning_{name}" for name in ("table", "lstm", "mlp"))
ENCODERS = ("MLP", "LSTM")
WEIGHTS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")  # of a direction of an LSTM


@dataclass
class PromptEncoderConfig(PromptConfig):
    """P-tuning, Liu et al. 2021, arXiv:2103.10385.

    Args beyond those of PromptLearningConfig:
        encoder_reparameterization_type: what computes the prompt, 'MLP' or 'LSTM'; None for a prompt that is not
            computed, as it is when it comes from a file. Default: 'MLP'.
        encoder_hidden_size: features inside of it. Default: None, for `token_dim`.
        encoder_num_layers: layers of the LSTM; the MLP has three. Default: 2.
        encoder_dropout: probability in [0, 1) of zeroing an element between the layers of the LSTM. Default: 0.0.
    """

    peft_type = "P_TUNING"

    encoder_reparameterization_type: Optional[str] = "MLP"
    encoder_hidden_size: Optional[int] = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def delta_arguments(self, path: str) -> dict[str, Any]:
        arguments = {
            "encoder_type": self.encoder_reparameterization_type,
            "hidden_size": self.encoder_hidden_size,
            "num_layers": self.encoder_num_layers,
            "dropout": float(self.encoder_dropout),
        }
        return {**super().delta_arguments(path), **(arguments if self.encoder_reparameterization_type else {})}

    @property
    def method_name(self) -> str:
        """A prompt that is not computed is that of prompt tuning."""
        return "p_tuning" if self.encoder_reparameterization_type else "prompt_tuning"

    def computed(self) -> PeftConfig:
        return replace(self, encoder_reparameterization_type=None)

    def complete(self, kinds: Sequence[Any]) -> None:
        super().complete(kinds)
        self.encoder_hidden_size = self.encoder_hidden_size or self.token_dim

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        if self.encoder_reparameterization_type is not None:
            check.choice("encoder_reparameterization_type", self.encoder_reparameterization_type, ENCODERS)
        if self.encoder_hidden_size is not None:
            check.positive_int(encoder_hidden_size=self.encoder_hidden_size)
        check.positive_int(encoder_num_layers=self.encoder_num_layers)
        check.probability((int, float), encoder_dropout=self.encoder_dropout)


class PromptEncoder(PromptCell):
    """Vectors in front of embeddings, computed: `(batch, seq, features) -> (batch, tokens + seq, features)`.

    .. math::
        E \\mapsto [P; E], \\quad
        P = W_3 relu(W_2 relu(W_1 H + b_1) + b_2) + b_3 \\quad or \\quad P = W_2 relu(W_1 BiLSTM(H) + b_1) + b_2

    Source: Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3.2; the layers are those of Hugging Face
    PEFT. All is computed in float32.

    Args:
        tokens: vectors in front.
        features: of an embedding.
        encoder_type: 'MLP', three Dense layers, or 'LSTM', one in both directions with two Dense layers behind it.
            Default: 'MLP'.
        hidden_size: features between the Dense layers, or of the LSTM in each direction. Default: None, for `features`.
        num_layers: of the LSTM; the MLP does without. Default: 2.
        dropout: probability in [0, 1) of zeroing an element between two layers of the LSTM. Default: 0.0.
        param_init_type: type of the parameters: float16, float32 or bfloat16. Default: float32.

    Parameters:
        mindpet_delta_p_tuning_table `(tokens, features)`, H; mindpet_delta_p_tuning_mlp, the Dense layers;
        mindpet_delta_p_tuning_lstm, see `BiLSTM`.

    Inputs, Outputs: of `PromptCell`.

    Raises:
        TypeError: a size is not a positive int (also a ValueError, if it is an int), `encoder_type` not a str,
            `dropout` not a number, the type none of those above.
        ValueError: `encoder_type` is unknown, `dropout` outside [0, 1).
    """

    def __init__(
        self,
        tokens: int,
        features: int,
        encoder_type: str = "MLP",
        hidden_size: Optional[int] = None,
        num_layers: int = 2,
        dropout: float = 0.0,
        param_init_type: ms.Type = ms.float32,
    ):
        hidden_size = features if hidden_size is None else hidden_size
        check = Checker(type(self).__name__)
        check.positive_int(
            NotPositiveIntError, tokens=tokens, features=features, hidden_size=hidden_size, num_layers=num_layers
        )
        check.choice("encoder_type", encoder_type, ENCODERS)
        check.probability((int, float), dropout=dropout)
        check.float_type(param_init_type=param_init_type)
        check.done()
        super().__init__(tokens, features)
        self.encoder_type, self.hidden_size = encoder_type, hidden_size
        self.num_layers, self.dropout = num_layers, dropout
        self.mindpet_delta_p_tuning_table = delta_parameter(Normal(1.0), (tokens, features), param_init_type, TABLE)
        sizes = [features, hidden_size, hidden_size, features]
        if encoder_type == "LSTM":
            sizes = [2 * hidden_size, 2 * hidden_size, features]
            self.mindpet_delta_p_tuning_lstm = nn.SequentialCell(
                [
                    BiLSTM(
                        tokens, sizes[0] if layer else features, hidden_size, dropout if layer else 0.0, param_init_type
                    )
                    for layer in range(num_layers)
                ]
            )
        layers = [dense(*pair, param_init_type) for pair in zip(sizes, sizes[1:])]
        layers[1:] = [cell for layer in layers[1:] for cell in (nn.ReLU(), layer)]
        self.mindpet_delta_p_tuning_mlp = nn.SequentialCell(layers)

    def prompt(self):
        rows = cast(self.mindpet_delta_p_tuning_table, ms.float32)
        if self.encoder_type == "LSTM":
            rows = self.mindpet_delta_p_tuning_lstm(rows)
        return self.mindpet_delta_p_tuning_mlp(rows)

    def shard(self, batch: int) -> "PromptEncoder":
        """Cut the result over the batch; every rank computes the whole prompt, without communication.

        Args:
            batch: slices of the batch.

        Returns:
            Itself.
        """
        for layer in self.mindpet_delta_p_tuning_lstm if self.encoder_type == "LSTM" else ():
            layer.shard()
        shard_whole(*self.mindpet_delta_p_tuning_mlp)
        return super().shard(batch)

    def extend_repr(self) -> str:
        inner = f"encoder_type={self.encoder_type}, hidden_size={self.hidden_size}"
        return f"{super().extend_repr()}, {inner}, num_layers={self.num_layers}, dropout={self.dropout}"


class BiLSTM(nn.Cell):
    """A layer of an LSTM in both directions: `(tokens, features) -> (tokens, 2 * hidden_size)`.

    .. math::
        i, f, g, o = W_x x_t + b_x + W_h h_{t-1} + b_h, \\quad
        c_t = sig(f) c_{t-1} + sig(i) tanh(g), \\quad h_t = sig(o) tanh(c_t)

    Source: Hochreiter and Schmidhuber 1997, "Long Short-Term Memory". It is made of operators, and not of `nn.LSTM`,
    which cannot be sharded, and wants a hidden size that is a multiple of 16 on Ascend.

    Args:
        tokens: rows of the input.
        features: of the input.
        hidden_size: of the output in each direction.
        dropout: probability in [0, 1) of zeroing an element of the input while training.
        dtype: of the parameters.

    Parameters:
        weight_ih `(4 * hidden_size, features)`, weight_hh `(4 * hidden_size, hidden_size)`, bias_ih and bias_hh
        `(1, 4 * hidden_size)`, and for the way from the last row to the first the same with the ending _reverse.
    """

    def __init__(self, tokens: int, features: int, hidden_size: int, dropout: float, dtype: ms.Type):
        super().__init__()
        init, gates = Uniform(1 / math.sqrt(hidden_size)), 4 * hidden_size
        shapes = dict(zip(WEIGHTS, ((gates, features), (1, gates), (gates, hidden_size), (1, gates))))
        for name in (f"{name}{way}" for way in ("", "_reverse") for name in WEIGHTS):
            setattr(self, name, delta_parameter(init, shapes[name.replace("_reverse", "")], dtype, name))
        self.start = Tensor(np.zeros((2, 1, hidden_size), np.float32))
        self.tokens, self.backwards = tokens, Tensor(list(range(tokens))[::-1], ms.int32)
        self.dropout, self.gather, self.expand_dims = get_dropout(dropout), ops.Gather(), ops.ExpandDims()
        self.both, self.join, self.ends = ops.Concat(axis=0), ops.Concat(axis=1), ops.Concat(axis=1)
        self.rows, self.gates, self.ways = (ops.Split(axis, count) for axis, count in ((1, tokens), (2, 4), (0, 2)))
        self.matmul, self.squeeze = ops.BatchMatMul(transpose_b=True), ops.Squeeze(0)
        self.add, self.mul, self.sigmoid, self.tanh = ops.Add(), ops.Mul(), ops.Sigmoid(), ops.Tanh()

    def construct(self, rows):
        rows = self.dropout(rows)
        rows = self.stack(rows, self.gather(rows, self.backwards, 0))
        weight = self.stack(self.weight_hh, self.weight_hh_reverse)
        bias = self.add(self.stack(self.bias_ih, self.bias_ih_reverse), self.stack(self.bias_hh, self.bias_hh_reverse))
        entering = self.matmul(rows, self.stack(self.weight_ih, self.weight_ih_reverse))
        steps = self.rows(self.add(entering, bias))
        hidden, memory, outputs = self.start, self.start, ()
        for step in steps:
            gates = self.gates(self.add(step, self.matmul(hidden, weight)))
            kept = self.mul(self.sigmoid(gates[1]), memory)
            memory = self.add(kept, self.mul(self.sigmoid(gates[0]), self.tanh(gates[2])))
            hidden = self.mul(self.sigmoid(gates[3]), self.tanh(memory))
            outputs = (*outputs, hidden)
        forth, back = self.ways(self.join(outputs))
        return self.ends((self.squeeze(forth), self.gather(self.squeeze(back), self.backwards, 0)))

    def stack(self, first, second):
        """Two matrices as one tensor `(2, ...)`, float32."""
        return self.both([self.expand_dims(cast(matrix, ms.float32), 0) for matrix in (first, second)])

    def shard(self) -> None:
        """Have every rank compute it as a whole."""
        shard_whole(self.dropout)
        whole = (1, 1, 1)
        for primitive in (self.rows, self.gates, self.ways, self.squeeze, self.sigmoid, self.tanh):
            primitive.shard((whole,))
        for primitive in (self.both, self.add, self.mul, self.matmul):
            primitive.shard((whole, whole))
        self.join.shard((whole,) * self.tokens)
        self.ends.shard(((1, 1), (1, 1)))
        self.expand_dims.shard(((1, 1),))
        self.gather.shard(((1, 1), (1,)))


def dense(in_channels: int, out_channels: int, dtype: ms.Type) -> Dense:
    """A Dense layer that starts as PyTorch's do."""
    init = Uniform(1 / math.sqrt(in_channels))
    return Dense(in_channels, out_channels, init, init, dtype=dtype)


class PromptEncoderDelta(PromptEncoder, Delta):
    """A PromptEncoder that a network calls as its attribute `prompt_source`.

    Delta arguments:
        tokens (int): vectors in front.
        further ones: see `PromptEncoder`.
    """

    can_reset = False
    file_names = {}

    @classmethod
    def create(cls, cell: nn.Cell, kind: InputEmbeddingKind, tokens: int, **arguments: Any) -> "PromptEncoderDelta":
        return cls(tokens, kind.token_dim, **arguments)

    @classmethod
    def to_file(cls, values: dict[str, Arrays]) -> Arrays:
        """The table that is computed, as prompt tuning has it: `(prompts * tokens, features)`."""
        return {PROMPT: np.concatenate([computed(prompt) for prompt in values.values()])}


def computed(values: Arrays) -> np.ndarray:
    """The prompt of a PromptEncoder in NumPy, from its parameters by name.

    Raises:
        CheckpointError: some are missing.
    """
    layers = {int(match[1]) for name in values if (match := re.match(rf"{LSTM}\.(\d+)\.", name))}
    lstm = [f"{LSTM}.{layer}" for layer in range(max(layers, default=-1) + 1)]
    mlp = [f"{MLP}.{index}" for index in ((0, 2) if lstm else (0, 2, 4))]
    wanted = {TABLE, *(f"{name}.{part}" for name in mlp for part in ("weight", "bias"))}
    wanted |= {f"{name}.{part}{way}" for name in lstm for part in WEIGHTS for way in ("", "_reverse")}
    if wanted != set(values):
        raise CheckpointError(f"no prompt can be computed: the file must have {sorted(wanted)}, has {sorted(values)}.")
    values = {name: value.astype(np.float32) for name, value in values.items()}
    rows = values[TABLE]
    for name in lstm:
        forth, back = ([values[f"{name}.{part}{way}"] for part in WEIGHTS] for way in ("", "_reverse"))
        rows = np.concatenate([_one_way(rows, *forth), _one_way(rows[::-1], *back)[::-1]], 1)
    for name in mlp:
        rows = rows if name == mlp[0] else np.maximum(rows, 0)
        rows = rows @ values[f"{name}.weight"].T + values[f"{name}.bias"]
    return rows


def _one_way(rows, weight_ih, bias_ih, weight_hh, bias_hh):
    """One direction of a BiLSTM."""
    hidden = memory = np.zeros((1, weight_hh.shape[1]), np.float32)
    outputs = []
    for row in rows @ weight_ih.T + bias_ih:
        enter, forget, new, leave = np.split(row + hidden @ weight_hh.T + bias_hh, 4, 1)
        memory = _sigmoid(forget) * memory + _sigmoid(enter) * np.tanh(new)
        hidden = _sigmoid(leave) * np.tanh(memory)
        outputs.append(hidden)
    return np.concatenate(outputs)


def _sigmoid(x):
    return (1 + np.tanh(x / 2)) / 2  # without numbers that become infinite


METHOD = Method(
    "p_tuning",
    PromptEncoderConfig,
    ("*mindpet_delta_p_tuning*",),
    {"input_embedding": PromptEncoderDelta},
    (PromptEncoder,),
)
