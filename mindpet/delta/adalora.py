"""AdaLoRA: an update beside a frozen layer as a singular value decomposition, whose ranks are cut to a budget."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.common.initializer import Normal

from mindpet.delta._base import Delta, DeltaDense, delta_parameter, matrix_shape, scale_problems
from mindpet.delta._config import PeftConfig, TargetConfig
from mindpet.delta._method import Method
from mindpet.errors import CheckpointError, ConfigError
from mindpet.layers.linear import cast, from_rows, to_rows
from mindpet.network.kinds import LayerKind
from mindpet.network.values import assign
from mindpet.utils.hints import Arrays, Operators, Shape
from mindpet.utils.quote import quote
from mindpet.utils.sharding import PARALLEL_MODES
from mindpet.utils.validate import Checker, is_int, is_number
from mindpet.utils.version_control import get_dropout

A, B, E = (f"mindpet_delta_adalora_{name}" for name in "abe")
FILE_NAMES = {A: "lora_A", B: "lora_B", E: "lora_E"}
MOST_ZEROS = 2**22  # that a file of an adapter may lack, however small it is
LEAVE, CUT_AGAIN = -1, -2  # what to do with the ranks after a step, where it is not how many to cut


@dataclass
class AdaLoraConfig(TargetConfig):
    """AdaLoRA, Zhang et al. 2023, arXiv:2303.10512. `OrthogonalLoss` and `AdaLoraOptimizer` train it.

    Args beyond those of PeftConfig and TargetConfig:
        target_r: ranks of a layer in the end, on average. Default: 8.
        init_r: ranks of each layer at the start. Default: 12.
        tinit: steps before the budget shrinks. Default: 0.
        tfinal: steps at the end in which the ranks stay as they are. Default: 0.
        deltaT: steps from one cut to the next. Default: 1.
        beta1: smooths the sensitivity. Default: 0.85.
        beta2: smooths its uncertainty. Default: 0.85.
        orth_reg_weight: weight of the orthogonality term, for `OrthogonalLoss`. Default: 0.5.
        total_step: steps of the training; must be given.
        lora_alpha: scale; the update is multiplied by `lora_alpha / init_r`. Default: 8.
        lora_dropout: probability in [0, 1) of zeroing an input of the update. Default: 0.0.
        fan_in_fan_out: kept for Hugging Face PEFT, see `LoraConfig`. Default: False.
        bias: which biases train: 'none', 'all', or 'lora_only' for those of the targets. Default: 'none'.
        init_lora_weights: True for zero E and small A and B, False for none that is small. Default: True.
        rank_pattern: of a file, path of a layer and `.lora_E` -> list of bool, for each rank whether the file
            has it. Default: None, for all.
    """

    peft_type, method_name = "ADALORA", "adalora"

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: Optional[int] = None
    lora_alpha: Union[int, float] = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: Any = True
    rank_pattern: Optional[dict[str, list[bool]]] = None

    patterns = ()
    required = ("lora_alpha", "init_r")

    def delta_arguments(self, path: str) -> dict[str, Any]:
        return {
            "rank": self.init_r,
            "alpha": self.lora_alpha,
            "dropout": float(self.lora_dropout),
            "init": self.init_lora_weights is not False,
        }

    def check_fields(self, check: Checker) -> None:
        super().check_fields(check)
        sizes = ("target_r", "init_r", "deltaT", "total_step")
        check.positive_int(**{name: getattr(self, name) for name in sizes})
        for name in ("tinit", "tfinal"):
            steps = getattr(self, name)
            if check.require(is_int(steps), TypeError, name, steps, "an int"):
                check.require(steps >= 0, ValueError, name, steps, "at least 0")
        if not check.problems:
            rest = self.total_step - self.tfinal
            check.require(self.tinit < rest, ValueError, "tinit", self.tinit, f"below total_step - tfinal, {rest}")
            fits = self.target_r <= self.init_r or self.inference_mode
            check.require(fits, ValueError, "target_r", self.target_r, f"at most init_r, {self.init_r}")
        check.probability((int, float), beta1=self.beta1, beta2=self.beta2, lora_dropout=self.lora_dropout)
        check_weight(check, "orth_reg_weight", self.orth_reg_weight)
        check_alpha(check, self.lora_alpha)
        check.boolean(fan_in_fan_out=self.fan_in_fan_out)
        check.choice("bias", self.bias, ("none", "all", "lora_only"))
        init = self.init_lora_weights
        known = isinstance(init, bool) or self.inference_mode
        check.require(known, TypeError, "init_lora_weights", init, "a bool")
        masks = {} if self.rank_pattern is None else self.rank_pattern
        if check.require(isinstance(masks, dict), TypeError, "rank_pattern", masks, "a dict or None"):
            for key, mask in masks.items():
                fits = isinstance(mask, list) and set(map(type, mask)) <= {bool} and len(mask) == self.init_r
                rule = f"a list of {self.init_r} bools, one for each of init_r"
                check.require(fits, ValueError, f"rank_pattern[{quote(key)}]", mask, rule)

    def check_supported(self, from_file: bool = False) -> None:
        super().check_supported(from_file)
        if self.rank_pattern and not (from_file or self.inference_mode):
            raise ConfigError("AdaLoraConfig: 'rank_pattern' is of a file that lacks ranks; a fresh adapter has all.")

    def unpack(self, tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        """The tensors with all of init_r ranks: those that `rank_pattern` says the file lacks are zeros."""
        tensors, problems, lacking = dict(tensors), [], {}
        for key, mask in (self.rank_pattern or {}).items():
            path, kept = key.rpartition(".")[0], np.array(mask, bool)
            keys = {name: f"{self.key_start}{path}.{file}" for name, file in FILE_NAMES.items()}
            counts = {key: _ranks(name, tensors[key]) for name, key in keys.items() if key in tensors}
            if not counts:
                problems.append(f"{key}: there is no such layer")
            for name, file in keys.items():
                if counts.get(file) == kept.sum():
                    others = tensors[file].shape[name != B]
                    lacking[file] = ((others, len(kept)), (..., kept)) if name == B else ((len(kept), others), kept)
                elif counts.get(file) not in (None, len(kept)):
                    problems.append(f"{key} keeps {kept.sum()} of {len(kept)}, but {file} has {counts[file]}")
        if problems:
            raise CheckpointError("rank_pattern does not fit the tensors:\n  " + "\n  ".join(problems))
        # A tensor without ranks can be of any size in the file; a real adapter has kept some of all.
        there = sum(value.size for value in tensors.values())
        wanted = sum(math.prod(shape) for shape, _ in lacking.values())
        if wanted > MOST_ZEROS + 64 * there:
            raise CheckpointError(f"rank_pattern: of {wanted:,} numbers the file has only {there:,}.")
        for file, (shape, kept) in lacking.items():
            stored, tensors[file] = tensors[file], np.zeros(shape, tensors[file].dtype)
            tensors[file][kept] = stored
        return dataclasses.replace(self, rank_pattern=None), tensors

    def pack(self, tensors: Arrays) -> tuple[PeftConfig, Arrays]:
        """The tensors without the ranks that are zero in A, B and E, and with them `rank_pattern`; see `unpack`."""
        tensors, masks = dict(tensors), {}
        for path in [key[: -len(".lora_E")] for key in tensors if key.endswith(".lora_E")]:
            a, b, e = (tensors.get(f"{path}.{file}", np.zeros((1, 1))) for file in FILE_NAMES.values())
            if not a.ndim == b.ndim == e.ndim == 2 or not len(a) == b.shape[1] == len(e) == self.init_r:
                continue
            kept = (a != 0).any(1) | (b != 0).any(0) | (e != 0).any(1)
            masks[f"{path[len(self.key_start) :]}.lora_E"] = kept.tolist()
            for file, rest in zip(FILE_NAMES.values(), (a[kept], b[:, kept], e[kept])):
                tensors[f"{path}.{file}"] = np.ascontiguousarray(rest)
        if all(map(all, masks.values())):
            return self, tensors
        return dataclasses.replace(self, rank_pattern=masks), tensors


def check_alpha(check: Checker, alpha: Any) -> None:
    """Note what is wrong with a scale."""
    check.nonzero_number(lora_alpha=alpha)
    if not check.problems:
        check.require(alpha > 0, ValueError, "lora_alpha", alpha, "above 0")


def check_weight(check: Checker, name: str, weight: Any) -> None:
    """Note what is wrong with a weight of a term of the loss."""
    if check.require(is_number(weight), TypeError, name, weight, "an int or a float"):
        check.require(0 <= weight < math.inf, ValueError, name, weight, "finite and at least 0")


def _ranks(name, tensor):
    """How many ranks a tensor has; -1 where it is no matrix."""
    return tensor.shape[name == B] if tensor.ndim == 2 else -1


class AdaLoRADelta(Delta):
    """The AdaLoRA delta of a linear layer.

    .. math::
        y = out + s\\, B\\, (E \\odot A\\, dropout(x)), \\quad s = alpha / (rank + 10^{-5})

    The columns of B and the rows of A are singular vectors as far as `OrthogonalLoss` makes them orthogonal, and E the
    singular values. Those that `AdaLoraOptimizer` cuts are zero; s stays what it was.

    Source: Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv:2303.10512,
    equation 3, where B is P, E is Lambda and A is Q; s is Hugging Face PEFT's.

    Delta arguments:
        rank (int): rows of A.
        alpha (Union[int, float]): scale.
        dropout (float): probability in [0, 1) of zeroing an input of the delta while training. Default: 0.0.
        init (bool): True for zero E, and A and B normal with deviation 0.02; False for all normal with deviation 1.
            Default: True.
        dtype (mindspore.dtype): of the parameters. Default: float32.

    Parameters:
        mindpet_delta_adalora_a: `(rank, in)`, mindpet_delta_adalora_b: `(out, rank)`, mindpet_delta_adalora_e:
        `(rank, 1)`.
    """

    before_activation = True
    file_names = FILE_NAMES

    @classmethod
    def problems(
        cls, cell: nn.Cell, kind: LayerKind, is_sharded: bool, rank: int, alpha: Union[int, float], **others: Any
    ) -> list[str]:
        return scale_problems(alpha / (rank + 1e-5), kind)

    def setup(self, cell, rank, alpha, dropout=0.0, init=True, dtype=ms.float32):
        outs, ins = matrix_shape(cell, self.kind)
        self.rank, self.scale = rank, scale_of(rank, alpha)
        normal = Normal(0.02 if init else 1.0)
        self.mindpet_delta_adalora_a = delta_parameter(normal, (rank, ins), dtype, A)
        self.mindpet_delta_adalora_b = delta_parameter(normal, (outs, rank), dtype, B)
        self.mindpet_delta_adalora_e = delta_parameter("zeros" if init else normal, (rank, 1), dtype, E)
        self.adalora_dropout = get_dropout(dropout)
        self.adalora_a_matmul, self.adalora_b_matmul = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        self.adalora_e_mul, self.adalora_mul, self.adalora_add = ops.Mul(), ops.Mul(), ops.Add()

    def after(self, x, out):
        rows = self.adalora_dropout(self.to_compute(to_rows(x)))
        inner = self.adalora_a_matmul(rows, self.to_compute(self.mindpet_delta_adalora_a))
        inner = self.adalora_e_mul(inner, ops.reshape(self.to_compute(self.mindpet_delta_adalora_e), (-1,)))
        inner = self.adalora_mul(inner, self.scale)
        delta = self.adalora_b_matmul(inner, self.to_compute(self.mindpet_delta_adalora_b))
        return from_rows(self.adalora_add(to_rows(out), cast(delta, out.dtype)), out)

    @classmethod
    def fold(cls, matrix: np.ndarray, values: Arrays, rank: int, alpha: Union[int, float], **others: Any) -> np.ndarray:
        return matrix + np.float32(scale_of(rank, alpha)) * (values[B] @ (values[E] * values[A]))

    @classmethod
    def fits(cls, shape: Shape, values: Arrays, **arguments: Any) -> bool:
        return (len(values[B]), values[A].shape[1]) == tuple(shape)

    @classmethod
    def file_shapes(cls, shapes: dict[str, Shape], rank: int, **others: Any) -> dict[str, tuple]:
        a, b = shapes.get(A, ()), shapes.get(B, ())
        return {A: (rank, (*a, "in", "in")[1]), B: ((*b, "out")[0], rank), E: (rank, 1)}

    @property
    def operators(self) -> Operators:
        return {
            "strategy_adalora_dropout": (self.adalora_dropout.dropout, "ni"),
            "strategy_adalora_a_matmul": (self.adalora_a_matmul, "ni,ri"),
            "strategy_adalora_e_mul": (self.adalora_e_mul, "nr,r"),
            "strategy_adalora_mul": (self.adalora_mul, "nr,"),
            "strategy_adalora_b_matmul": (self.adalora_b_matmul, "nr,or"),
            "strategy_adalora_add": (self.adalora_add, "no,no"),
        }

    @property
    def signature(self) -> Any:
        return type(self), self.rank, self.scale, self.adalora_dropout.p

    def extend_repr(self) -> str:
        return f"rank={self.rank}"


def scale_of(rank: int, alpha: Union[int, float]) -> float:
    """s, of the ranks that a layer had at the start."""
    return alpha / (rank + 1e-5)


class AdaLoRADense(DeltaDense, AdaLoRADelta):
    """A Dense layer with an AdaLoRA delta.

    .. math::
        y = activation(x W^T + b + \\frac{lora\\_alpha}{init\\_r} (E \\odot dropout(x) A^T) B^T)

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 3. E starts as zeros, so a fresh AdaLoRADense computes what
    the Dense layer computed.

    Args:
        in_channels: features of the input.
        out_channels: features of the output.
        init_r: rows of A and columns of B, before any is cut.
        lora_alpha: scale of the update, above 0.
        lora_dropout: probability in [0, 1) of zeroing an input of the update while training. Default: 0.0.
        dense: keywords of `DeltaDense`.

    Parameters:
        weight `(out_channels, in_channels)`, bias `(out_channels,)`, and those of `AdaLoRADelta`.

    Inputs:
        x: `(*, in_channels)`.

    Outputs:
        `(*, out_channels)`, in the type of `x`.

    Raises:
        TypeError, ValueError, KeyError: an argument is wrong, see `LoRADense`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        init_r: int,
        lora_alpha: Union[int, float],
        lora_dropout: float = 0.0,
        **dense: Any,
    ):
        check = Checker(type(self).__name__)
        check.positive_int(init_r=init_r)
        check_alpha(check, lora_alpha)
        check.probability(lora_dropout=lora_dropout)
        super().__init__(
            in_channels, out_channels, check=check, rank=init_r, alpha=lora_alpha, dropout=lora_dropout, **dense
        )

    def extend_repr(self) -> str:
        return f"{super().extend_repr()}, rank={self.rank}"


def trained_deltas(network: nn.Cell) -> tuple[AdaLoRADelta, ...]:
    """The AdaLoRA deltas of a network that train."""
    cells = [cell for _, cell in network.cells_and_names()]
    return tuple(cell for cell in cells if isinstance(cell, AdaLoRADelta) and getattr(cell, E).requires_grad)


class OrthogonalLoss(nn.Cell):
    """A loss that keeps the singular vectors of AdaLoRA orthogonal.

    .. math::
        loss + weight \\cdot \\frac{1}{2n}
        \\sum_{i=1}^{n} (\\lVert A_i A_i^T - I \\rVert + \\lVert B_i^T B_i - I \\rVert)

    over the n deltas of the network that train when it is called, with the Frobenius norm. Of ranks that a file lacked
    I has no entry.

    Source: Zhang et al. 2023, arXiv:2303.10512, equation 4, with the norm and the mean as Hugging Face PEFT has them,
    where the paper has squares and a sum.

    Args:
        network: the loss network, say `nn.WithLossCell(model, loss)`: it returns the loss.
        weight: of the term. Default: 0.5.

    Inputs:
        those of `network`.

    Outputs:
        the loss with the term, in the type of the loss.

    Raises:
        TypeError, ValueError: an argument is wrong; the network has no AdaLoRA delta that trains.
    """

    def __init__(self, network: nn.Cell, weight: float = 0.5):
        super().__init__(auto_prefix=False)
        check = Checker(type(self).__name__)
        check_weight(check, "weight", weight)
        check_network(check, "network", network)
        check.done()
        self.network, self.weight = network, weight

    def __getattr__(self, name):
        # Graph mode parses a property, but asks this whenever it compiles, so that the adapter may change.
        if name == "deltas":
            return trained_deltas(self.network)
        return super().__getattr__(name)

    def construct(self, *inputs):
        loss = self.network(*inputs)
        total, count = 0.0, 0
        for delta in self.deltas:
            a = cast(delta.mindpet_delta_adalora_a, ms.float32)
            b = cast(delta.mindpet_delta_adalora_b, ms.float32)
            total = total + gap(ops.matmul(a, ops.transpose(a, (1, 0)))) + gap(ops.matmul(ops.transpose(b, (1, 0)), b))
            count += 2
        return loss if count == 0 else loss + cast(self.weight * total / count, loss.dtype)


def gap(gram):
    """`||G - I||`, of which I has no entry where G has none; differentiable where it is zero, too."""
    difference = gram - ops.eye(gram.shape[0], gram.shape[0], ms.float32) * cast(gram > 0, ms.float32)
    return ops.sqrt(ops.square(difference).sum() + 1e-12)


def check_network(check: Checker, name: str, network: Any) -> bool:
    """Note what is wrong with a network; returns whether it has AdaLoRA deltas that train."""
    if not check.require(isinstance(network, nn.Cell), TypeError, name, network, "a Cell"):
        return False
    rule = "a network with AdaLoRA deltas that train"
    return check.require(bool(trained_deltas(network)), ValueError, name, type(network).__name__, rule)


class AdaLoraOptimizer(nn.Optimizer):
    """An optimizer that cuts the ranks of AdaLoRA to a budget.

    After each step of the optimizer, t = 0, 1, ..., it smooths the sensitivity of every number w of A, B and E, and the
    uncertainty of that:

    .. math::
        \\bar I_t = \\beta_1 \\bar I_{t-1} + (1 - \\beta_1) I_t,\\quad
        \\bar U_t = \\beta_2 \\bar U_{t-1} + (1 - \\beta_2) |I_t - \\bar I_t|,\\quad
        I_t = |w \\nabla_w loss|

    The score of a rank is the `\\bar I \\bar U` of its number in E, and the means of those of its row of A and of its
    column of B. Every deltaT steps, if tinit < t < total_step - tfinal = T, E is set to zero but for the ranks with
    the highest scores, in the network as a whole as many as the budget, which goes from b_0, all, to
    b_T = target_r for each layer:

    .. math::
        b_t = b_T + (b_0 - b_T) (1 - \\frac{t - tinit}{T - tinit})^3

    In between, what was cut may grow again. At t = T the ranks are chosen for good.

    All of it is part of the step, in graph mode of the graph: it works wherever an optimizer is called, with any loss
    scale, for accumulated gradients, and with `Model.train`, sink mode included. Whatever else is asked of it, say
    `learning_rate`, is the optimizer's.

    Source: Zhang et al. 2023, arXiv:2303.10512, equations 7 to 12.

    Args:
        optimizer: any one, over the parameters of `network` that train.
        network: with AdaLoRA deltas, hand-made or of a `PeftModel`: those that train now.
        config: the budget: target_r, tinit, tfinal, deltaT, total_step, beta1, beta2.

    Parameters:
        mindpet_adalora_step `()`, mindpet_adalora_kept `(ranks,)`, and for each of A, B and E its sensitivity and
        uncertainty; `mindspore.save_checkpoint` of this Cell has them and those of the optimizer.

    Inputs:
        gradients (tuple of Tensor): as the optimizer takes them.

    Outputs:
        what the optimizer returns.

    Raises:
        TypeError, ValueError: an argument is wrong; the optimizer lacks parameters of a delta; the layers have fewer
            ranks than `target_r`; in semi-auto parallel mode.
    """

    def __init__(self, optimizer: nn.Cell, network: nn.Cell, config: AdaLoraConfig):
        nn.Cell.__init__(self, auto_prefix=False)  # by its class an Optimizer, for those who ask; `optimizer` is one
        check = Checker(type(self).__name__)
        check.require(isinstance(config, AdaLoraConfig), TypeError, "config", config, "an AdaLoraConfig")
        known = [id(param) for param in getattr(optimizer, "parameters", ())]
        check.require(known, TypeError, "optimizer", optimizer, "an optimizer, with `parameters`")
        deltas = trained_deltas(network) if check_network(check, "network", network) else ()
        params = [getattr(delta, name) for delta in deltas for name in (A, B, E)]
        lacking = [param.name for param in params if id(param) not in known]
        rule = "over all parameters of the deltas that train"
        check.require(not (known and lacking), ValueError, "optimizer", f"one without {lacking}", rule)
        check.done()
        ranks = [delta.rank for delta in deltas]
        budget = config.target_r * len(ranks)
        check.require(
            budget <= sum(ranks), ValueError, "target_r", config.target_r, f"at most {sum(ranks) / len(ranks):g}"
        )
        check.done()
        _refuse_cut_parameters()
        self.optimizer = optimizer
        self.ranks = tuple(ranks)
        self.beta1, self.beta2 = config.beta1, config.beta2
        self.final = config.total_step - config.tfinal
        # A Parameter would be one of this Cell as well; it is the optimizer's.
        vars(self)["params"] = ParameterTuple(params)
        self.indices = tuple(known.index(id(param)) for param in params)
        self.grad_scale = float(getattr(optimizer, "reciprocal_scale", 1.0))
        self.schedule = Tensor(schedule(config, sum(ranks), budget))
        for name in ("sensitivity", "uncertainty"):
            zeros = [_state(f"mindpet_adalora_{name}.{p.name}", np.zeros(p.shape, np.float32)) for p in params]
            setattr(self, name, ParameterTuple(zeros))
        self.mindpet_adalora_step = _state("mindpet_adalora_step", np.zeros((), np.int32))
        self.mindpet_adalora_kept = _state("mindpet_adalora_kept", np.ones(sum(ranks), np.float32))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "optimizer" or "optimizer" not in vars(self).get("_cells", ()):
                raise
            return getattr(self.optimizer, name)

    def construct(self, gradients):
        _refuse_cut_parameters()
        done = self.optimizer(gradients)
        step = self.mindpet_adalora_step
        action = ops.gather(self.schedule, ops.minimum(step, self.final + 1), 0)
        self.smooth(gradients, step < self.final)
        kept = self.choose(action)
        ops.assign(self.mindpet_adalora_kept, kept)
        self.cut(ops.logical_or(kept > 0, action == LEAVE))
        ops.assign(step, step + 1)
        return done

    def smooth(self, gradients, learns):
        """Update sensitivity and uncertainty, if it `learns`."""
        for i in range(len(self.indices)):
            value = cast(self.params[i], ms.float32)
            value = ops.abs(value * cast(gradients[self.indices[i]], ms.float32) * self.grad_scale)
            mean = self.beta1 * self.sensitivity[i] + (1 - self.beta1) * value
            spread = self.beta2 * self.uncertainty[i] + (1 - self.beta2) * ops.abs(value - mean)
            ops.assign(self.sensitivity[i], ops.select(learns, mean, self.sensitivity[i]))
            ops.assign(self.uncertainty[i], ops.select(learns, spread, self.uncertainty[i]))

    def choose(self, action):
        """1 for every rank that is kept, else 0: all but as many as `action` says, or as before if it is none."""
        scores = []
        for i in range(len(self.ranks)):
            a, b, e = [self.sensitivity[j] * self.uncertainty[j] for j in (3 * i, 3 * i + 1, 3 * i + 2)]
            scores.append(ops.reshape(e, (-1,)) + a.mean(1) + b.mean(0))
        scores = ops.concat(scores)
        worst = ops.gather(ops.sort(scores)[0], ops.maximum(action - 1, 0), 0)
        chosen = cast(ops.logical_or(scores > worst, action == 0), ms.float32)
        return ops.select(action >= 0, chosen, self.mindpet_adalora_kept)

    def cut(self, stays):
        """Set E to zero but for the ranks that stay."""
        start = 0
        for i in range(len(self.ranks)):
            e = self.params[3 * i + 2]
            stay = ops.reshape(stays[start : start + self.ranks[i]], (-1, 1))
            ops.assign(e, ops.select(stay, e, ops.zeros_like(e)))
            start += self.ranks[i]

    @property
    def rank_pattern(self) -> dict[str, list[bool]]:
        """Path of a layer and `.lora_E` -> list of bool, for each rank whether the last choice kept it."""
        parts = np.split(self.mindpet_adalora_kept.asnumpy() > 0, np.cumsum(self.ranks)[:-1])
        names = [param.name.replace(E, FILE_NAMES[E]) for param in self.params[2::3]]
        return {name: part.tolist() for name, part in zip(names, parts)}

    def prune(self) -> None:
        """Set to zero what A and B have of the ranks that were not chosen; files of the adapter then lack them.

        Raises:
            ValueError: the ranks are not chosen for good yet.
        """
        steps = int(self.mindpet_adalora_step.asnumpy())
        if steps <= self.final:
            raise ValueError(f"prune: the ranks are chosen after {self.final + 1} steps, but there were {steps}.")
        for i, kept in enumerate(self.rank_pattern.values()):
            a, b, e = self.params[3 * i : 3 * i + 3]
            for param, mask in ((a, np.array(kept)[:, None]), (b, np.array(kept)), (e, np.array(kept)[:, None])):
                assign(param, Tensor(np.where(mask, param.asnumpy(), np.zeros((), param.asnumpy().dtype))))


def schedule(config: AdaLoraConfig, start: int, end: int) -> np.ndarray:
    """For each step how many ranks are cut, or LEAVE; what comes behind the last one is CUT_AGAIN.

    Args:
        config: tinit, tfinal, deltaT and total_step.
        start: ranks at the start.
        end: ranks that are left.

    Returns:
        int32, `(total_step - tfinal + 2,)`.
    """
    final = config.total_step - config.tfinal
    cuts = [LEAVE] * (config.tinit + 1)
    for step in range(config.tinit + 1, final + 1):
        rest = 1 - (step - config.tinit) / (final - config.tinit)
        cut = start - int((start - end) * rest**3 + end)
        cuts.append(cut if step % config.deltaT == 0 or step == final else LEAVE)
    return np.array([*cuts, CUT_AGAIN], np.int32)


@ops.constexpr  # graph mode runs it while it compiles, when AutoParallel has set the mode
def _refuse_cut_parameters():
    check, mode = Checker("AdaLoraOptimizer"), ms.get_auto_parallel_context("parallel_mode")
    check.require(mode not in PARALLEL_MODES, ValueError, "parallel_mode", mode, "one without cut parameters")
    check.done()


def _state(name, value):
    return Parameter(Tensor(value), name=name, requires_grad=False)


METHOD = Method(
    "adalora",
    AdaLoraConfig,
    ("*mindpet_delta_adalora_?",),
    {"linear": AdaLoRADelta},
    (AdaLoRADense,),
    identity=True,
)
