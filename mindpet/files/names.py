"""From the names of a MindSpore network to those of the PyTorch model, and back."""

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from mindpet.delta._config import PeftConfig
from mindpet.delta.lora import LoraConfig, LoraDelta
from mindpet.errors import CheckpointError
from mindpet.files.keys import target_paths
from mindpet.network.match import exactly
from mindpet.utils.hints import Arrays

# MindSpore's names of parameters -> PyTorch's, at the end of a name.
LEAVES = {
    "embedding_table": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
A, B, BIAS, MAGNITUDE = LoraDelta.file_names.values()


EMBEDDING = re.compile(r"(?i)(^|[._])(embed\w*|wte|wpe)$")
NORM = re.compile(r"(^|\.)(LayerNorm|ln_\w+)$")


def to_torch(name: str) -> str:
    """The PyTorch name of a parameter or Cell whose path is the same in both."""
    head, _, leaf = name.rpartition(".")
    return f"{head}.{LEAVES[leaf]}" if head and leaf in LEAVES else name


def to_mindspore(name: str) -> str:
    """The inverse of `to_torch`, for networks that call embeddings and norms as the examples do."""
    head, _, leaf = name.rpartition(".")
    if NORM.search(head) and leaf in ("weight", "bias"):
        return f"{head}.{'gamma' if leaf == 'weight' else 'beta'}"
    return f"{head}.embedding_table" if leaf == "weight" and EMBEDDING.search(head) else name


PREFIX = "base_model.model."  # begins the keys of a file


@dataclass(frozen=True)
class NameMap:
    """How paths of Cells, and names of parameters, differ between a MindSpore network and the PyTorch model.

    Args:
        to_torch: from a name in the network, of a Cell or a Parameter, to that in the PyTorch model. Default: the end
            of a name is translated (`embedding_table`, `gamma`, `beta`), what is before it is the same.
        to_mindspore: the inverse, which is needed for files without a network only. Default: that of the default.
        fused: name of a linear layer that the PyTorch model has several in place of, as `to_torch` gives it, without
            what comes before the last dot -> dict of their names and numbers of output features, in the order in which
            the layer has them: `{"w_qkv": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}}`. Default: {}.
    """

    to_torch: Callable[[str], str] = to_torch
    to_mindspore: Callable[[str], str] = to_mindspore
    fused: dict[str, dict[str, int]] = field(default_factory=dict)

    def fuse(self, tensors: Arrays, config: PeftConfig) -> tuple[Arrays, PeftConfig]:
        """The tensors and the configuration of a LoRA file, with one layer in place of those that are fused.

        The layers' A stand below one another, their B are the blocks of one B.

        Raises:
            CheckpointError: layers that are fused have other inputs, or another rank than the configuration says, or
                only some have what all must have.
        """
        tensors, config = dict(tensors), copy.deepcopy(config)
        _refuse_others(tensors, config, {part for parts in self.fused.values() for part in parts})
        for name, parts in self.fused.items():
            starts = {key[: -len(f"{part}.{A}")] for part in parts for key in tensors if key.endswith(f".{part}.{A}")}
            for start in sorted(starts):
                layers = {part: _take(tensors, f"{start}{part}.") for part in parts}
                before = start.split(PREFIX, 1)[-1]
                for part, layer in layers.items():
                    if layer:
                        _check_pair(before + part, layer, config.delta_arguments(before + part)["rank"])
                scales = {part: config.scaling(before + part) for part, layer in layers.items() if layer}
                scale = next(iter(scales.values()))
                for part, own_scale in scales.items():
                    if own_scale != scale:  # one layer has one scale
                        lora_b = layers[part][B]
                        layers[part][B] = (lora_b * np.float32(own_scale / scale)).astype(lora_b.dtype)
                tensors.update({f"{start}{name}.{key}": value for key, value in _fuse(start, parts, layers).items()})
                rank, key = len(tensors[f"{start}{name}.{A}"]), exactly(before + name)
                config.rank_pattern = {key: rank, **config.rank_pattern}
                config.alpha_pattern = {key: scale * config.divisor(rank), **config.alpha_pattern}
        return tensors, config

    def split(self, tensors: Arrays, config: PeftConfig) -> tuple[Arrays, PeftConfig]:
        """The inverse of `fuse`: layers apart, in place of those that are fused. Columns of B that are zero go."""
        tensors, config = dict(tensors), copy.deepcopy(config)
        _refuse_others(tensors, config, set(self.fused))
        for name, parts in self.fused.items():
            starts = [key[: -len(f"{name}.{A}")] for key in tensors if key.endswith(f".{name}.{A}")]
            for start in starts:
                layer = _take(tensors, f"{start}{name}.")
                before = start.split(PREFIX, 1)[-1]
                _check_pair(before + name, layer, len(layer[A]))
                scale = config.scaling(before + name)
                for pattern in (config.rank_pattern, config.alpha_pattern):
                    pattern.pop(exactly(before + name), None)
                for part, values in _split(before + name, layer, parts).items():
                    tensors.update({f"{start}{part}.{key}": value for key, value in values.items()})
                    rank, alpha = len(values[A]), scale * config.divisor(len(values[A]))
                    if rank != config.r:
                        config.rank_pattern = {exactly(before + part): rank, **config.rank_pattern}
                    if not math.isclose(alpha, config.lora_alpha):
                        config.alpha_pattern = {exactly(before + part): alpha, **config.alpha_pattern}
        return tensors, config


def _refuse_others(tensors, config, names):
    """Refuse deltas of other methods than LoRA on layers that are fused, or are parts of one."""
    others = [path for path in target_paths(tensors, config) if path.rpartition(".")[2] in names] if names else []
    if others and not isinstance(config, LoraConfig):
        raise CheckpointError(f"NameMap: 'fused' is for LoRA; {config.peft_name} has deltas of {others}.")


def _take(tensors, start):
    """Take the tensors of one layer out of a dict."""
    return {key: tensors.pop(start + key) for key in (A, B, BIAS, MAGNITUDE) if start + key in tensors}


def _check_pair(path, layer, rank):
    """Refuse tensors of a layer that are not those of a linear layer's delta of this rank."""
    a, b = layer.get(A), layer.get(B)
    pair = a is not None and b is not None and a.ndim == b.ndim == 2 and len(a) == b.shape[1] == rank
    if not pair or any(layer[key].shape != (len(b),) for key in (BIAS, MAGNITUDE) if key in layer):
        shapes = {key: list(value.shape) for key, value in layer.items()}
        raise CheckpointError(
            f"{path}: {A} and {B} must be [{rank}, in] and [out, {rank}], {BIAS} and {MAGNITUDE} [out], but they are "
            f"{shapes}."
        )


def _fuse(start, parts, layers):
    """One layer's tensors from those of its parts; a part without a delta has zeros in B."""
    present = {part: layer for part, layer in layers.items() if layer}
    some = {key for layer in present.values() for key in layer} - {A, B}
    lacking = [part for part in parts if not some <= set(layers[part])]
    if lacking:
        raise CheckpointError(f"{start}: {sorted(some)} must be of all of {list(parts)}, but {lacking} have none.")
    first = next(iter(present.values()))[A]
    inputs = {part: layer[A].shape[1] for part, layer in present.items()}
    if len(set(inputs.values())) > 1:
        raise CheckpointError(f"{start}: one layer has one number of input features, but they have {inputs}.")
    is_same = all(np.array_equal(layer[A], first) for layer in present.values())  # as `split` may have left them
    rank = len(first) if is_same else sum(len(layer[A]) for layer in present.values())
    lora_b = np.zeros((sum(parts.values()), rank), first.dtype)
    row, column = 0, 0
    for part, size in parts.items():
        if part in present:
            block = present[part][B]
            if len(block) != size:
                raise CheckpointError(f"{start}{part}: {size} output features are expected, but it has {len(block)}.")
            lora_b[row : row + size, column : column + block.shape[1]] = block
            column += 0 if is_same else block.shape[1]
        row += size
    fused = {A: first if is_same else np.concatenate([layer[A] for layer in present.values()]), B: lora_b}
    return {**fused, **{key: np.concatenate([layers[part][key] for part in parts]) for key in some}}


def _split(name, layer, parts):
    """The tensors of the parts from those of the layer."""
    features = len(layer[B])
    if sum(parts.values()) != features:
        raise CheckpointError(
            f"NameMap: 'fused' has {parts} for {name}, {sum(parts.values())} output features, but it has {features}."
        )
    rows = np.split(np.arange(features), np.cumsum(list(parts.values()))[:-1])
    result = {}
    for part, chosen in zip(parts, rows):
        used = np.flatnonzero(layer[B][chosen].astype(np.float32).any(0))
        used = used if len(used) else np.arange(len(layer[A]))
        result[part] = {A: layer[A][used], B: np.ascontiguousarray(layer[B][chosen][:, used])}
        result[part].update({key: layer[key][chosen] for key in (BIAS, MAGNITUDE) if key in layer})
    return result
