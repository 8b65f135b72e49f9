"""From the names of a MindSpore network to those of the PyTorch model, and back."""

import copy
import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from mindpet.delta.lora_layer import LoraLayer
from mindpet.errors import CheckpointError
from mindpet.peft.config import pattern_value
from mindpet.peft.match import ends_with, list_layers

# MindSpore's names of parameters -> PyTorch's, at the end of a name.
LEAVES = {"embedding_table": "weight", "gamma": "weight", "beta": "bias"}
A, B, BIAS, MAGNITUDE = (LoraLayer.file_names[f"mindpet_delta_lora_{name}"] for name in ("a", "b", "bias", "magnitude"))


EMBEDDING = re.compile(r"(?i)(^|[._])(embed\w*|wte|wpe)$")
NORM = re.compile(r"(^|\.)(LayerNorm|ln_\w+)$")


def to_torch(name):
    """The PyTorch name of a parameter or Cell whose path is the same in both."""
    head, _, leaf = name.rpartition(".")
    return f"{head}.{LEAVES[leaf]}" if head and leaf in LEAVES else name


def to_mindspore(name):
    """The inverse of `to_torch`, for networks that call embeddings and norms as the examples do."""
    head, _, leaf = name.rpartition(".")
    if NORM.search(head) and leaf in ("weight", "bias"):
        return f"{head}.{'gamma' if leaf == 'weight' else 'beta'}"
    return f"{head}.embedding_table" if leaf == "weight" and EMBEDDING.search(head) else name


@dataclass(frozen=True)
class NameMap:
    """How paths of Cells, and names of parameters, differ between a MindSpore network and the PyTorch model.

    Args:
        to_torch (callable): from a name in the network, of a Cell or a Parameter, to that in the PyTorch model.
            Default: the end of a name is translated (`embedding_table`, `gamma`, `beta`), what is before it is the
            same.
        to_mindspore (callable): the inverse, which is needed for files without a network only. Default: that of the
            default.
        fused (dict): name of a linear layer that the PyTorch model has several in place of, as `to_torch` gives it,
            without what comes before the last dot -> dict of their names and numbers of output features, in the order
            in which the layer has them: `{"w_qkv": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}}`. Default: {}.
    """

    to_torch: Callable = to_torch
    to_mindspore: Callable = to_mindspore
    fused: dict = field(default_factory=dict)

    def fuse(self, tensors, config):
        """The tensors and the configuration of a LoRA file, with one layer in place of those that are fused.

        The layers' A stand below one another, their B are the blocks of one B.

        Raises:
            CheckpointError: layers that are fused have other inputs, or only some have what all must have.
        """
        tensors, config = dict(tensors), copy.deepcopy(config)
        for name, parts in self.fused.items():
            starts = {key[: -len(f"{part}.{A}")] for part in parts for key in tensors if key.endswith(f".{part}.{A}")}
            for start in sorted(starts):
                found = {part: _take(tensors, f"{start}{part}.") for part in parts}
                before = start.split("base_model.model.", 1)[-1]
                scales = {part: config.scaling(before + part) for part, own in found.items() if own}
                scale = next(iter(scales.values()))
                for part, own_scale in scales.items():
                    if own_scale != scale:  # one layer has one scale
                        found[part][B] = (found[part][B] * np.float32(own_scale / scale)).astype(found[part][B].dtype)
                tensors.update({f"{start}{name}.{key}": value for key, value in _fuse(start, parts, found).items()})
                rank = len(tensors[f"{start}{name}.{A}"])
                config.rank_pattern = {re.escape(before + name): rank, **config.rank_pattern}
                config.alpha_pattern = {re.escape(before + name): scale * config.divisor(rank), **config.alpha_pattern}
        return tensors, config

    def split(self, tensors, config):
        """The inverse of `fuse`: layers apart, in place of those that are fused. Columns of B that are zero go."""
        tensors, config = dict(tensors), copy.deepcopy(config)
        for name, parts in self.fused.items():
            starts = [key[: -len(f"{name}.{A}")] for key in tensors if key.endswith(f".{name}.{A}")]
            for start in starts:
                own = _take(tensors, f"{start}{name}.")
                before = start.split("base_model.model.", 1)[-1]
                scale = config.scaling(before + name)
                for pattern in (config.rank_pattern, config.alpha_pattern):
                    pattern.pop(re.escape(before + name), None)
                for part, values in _split(own, parts).items():
                    tensors.update({f"{start}{part}.{key}": value for key, value in values.items()})
                    rank, alpha = len(values[A]), scale * config.divisor(len(values[A]))
                    if rank != config.r:
                        config.rank_pattern = {re.escape(before + part): rank, **config.rank_pattern}
                    if not math.isclose(alpha, config.lora_alpha):
                        config.alpha_pattern = {re.escape(before + part): alpha, **config.alpha_pattern}
        return tensors, config


def to_network(config, tensors, network, names):
    """A LoRA configuration of the PyTorch model with the names of the network.

    Args:
        config (LoraConfig): names layers as the PyTorch model does.
        tensors (dict): key -> numpy.ndarray, what is in its file: it tells the layers.
        network (Cell): the network.
        names (NameMap): between the names.
    """
    layers = list_layers(network)
    paths = {names.to_torch(layer.path): layer.paths for layer in layers}
    config = _explicit(config, [(path, own) for path in target_paths(tensors) for own in paths.get(path, ())])
    entries = [config.modules_to_save] if isinstance(config.modules_to_save, str) else config.modules_to_save or []
    theirs = {entry: [own[0] for path, own in paths.items() if ends_with(path, entry)] for entry in entries}
    config.modules_to_save = [own for entry, found in theirs.items() for own in found or [entry]] or None
    return config


def to_model(config, tensors, plan, names):
    """The inverse of `to_network`: with the names of the PyTorch model."""
    paths = {names.to_torch(layer.path): layer.path for layer in plan.targets}
    config = _explicit(config, [(paths.get(path, path), path) for path in target_paths(tensors)])
    config.modules_to_save = sorted(names.to_torch(layer.path) for layer in plan.modules_to_save) or None
    return config


def target_paths(tensors):
    """The paths of the layers that have a LoRA delta in a file."""
    found = (re.fullmatch(r"base_model\.model\.(.+)\.lora_(A\.weight|embedding_A)", key) for key in tensors)
    return [match[1] for match in found if match]


def _explicit(config, pairs):
    """A LoRA configuration that lists every target, given pairs of the path before and after."""
    ranks = {new: pattern_value(config.rank_pattern, old, config.r) for old, new in pairs}
    alphas = {new: pattern_value(config.alpha_pattern, old, config.lora_alpha) for old, new in pairs}
    return dataclasses.replace(
        config,
        target_modules=sorted(ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={re.escape(path): rank for path, rank in ranks.items() if rank != config.r},
        alpha_pattern={re.escape(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def _take(tensors, start):
    """Take the tensors of one layer out of a dict."""
    return {key: tensors.pop(start + key) for key in (A, B, BIAS, MAGNITUDE) if start + key in tensors}


def _fuse(start, parts, found):
    """One layer's tensors from those of its parts; a part without a delta has zeros in B."""
    present = {part: own for part, own in found.items() if own}
    some = {key for own in present.values() for key in own} - {A, B}
    lacking = [part for part in parts if not some <= set(found[part])]
    if lacking:
        raise CheckpointError(f"{start}: {sorted(some)} must be of all of {list(parts)}, but {lacking} have none.")
    rank = sum(len(own[A]) for own in present.values())
    dtype = next(iter(present.values()))[A].dtype
    lora_b = np.zeros((sum(parts.values()), rank), dtype)
    row, column = 0, 0
    for part, size in parts.items():
        if part in present:
            block = present[part][B]
            if len(block) != size:
                raise CheckpointError(f"{start}{part}: {size} output features are expected, but it has {len(block)}.")
            lora_b[row : row + size, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += size
    fused = {A: np.concatenate([own[A] for own in present.values()]), B: lora_b}
    return {**fused, **{key: np.concatenate([found[part][key] for part in parts]) for key in some}}


def _split(own, parts):
    """The tensors of the parts from those of the layer."""
    rows = np.split(np.arange(len(own[B])), np.cumsum(list(parts.values()))[:-1])
    result = {}
    for part, chosen in zip(parts, rows):
        used = np.flatnonzero(own[B][chosen].astype(np.float32).any(0))
        used = used if len(used) else np.arange(len(own[A]))
        result[part] = {A: own[A][used], B: np.ascontiguousarray(own[B][chosen][:, used])}
        result[part].update({key: own[key][chosen] for key in (BIAS, MAGNITUDE) if key in own})
    return result
