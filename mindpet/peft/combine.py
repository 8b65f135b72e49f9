"""Arithmetic on the values of LoRA adapters: sums of adapters, and starts from a layer's weight. All in float32."""

import math

import numpy as np

from mindpet.delta.lora_layer import FOLD
from mindpet.errors import AdapterError
from mindpet.layers.kinds import layer_kind
from mindpet.peft.config import LoraConfig, PeftType

A, B, SCALING = "mindpet_delta_lora_a", "mindpet_delta_lora_b", "mindpet_lora_scaling"


def fold_arguments(path, values):
    """The keywords of `fold_lora` for a layer, and its 'bias' if there is one."""
    found = {argument: values.get(f"{path}.{name}") for name, argument in {**FOLD, SCALING: "scaling"}.items()}
    return {argument: value.astype(np.float32) for argument, value in found.items() if value is not None}


def start_from_weight(weight, init, rank, scaling):
    """A, B and the rest of a weight W, so that `W = rest + s B A`.

    PiSSA: with W = U S V^T, `B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) V_r^T`. OLoRA: with W = Q R, `B = Q_r`,
    `A = R_r`.

    Source: PiSSA, Meng et al. 2024, arXiv:2404.02948, section 3; OLoRA, Büyükakyüz 2024, arXiv:2406.01775, section 3.

    Args:
        weight (numpy.ndarray): W, `(out, in)`, float32.
        init (str): 'pissa', 'pissa_niter_N', which is computed exactly too, or 'olora'.
        rank (int): rows of A.
        scaling (float): s.

    Returns:
        tuple of numpy.ndarray: A, B, rest.
    """
    scaling = np.float32(scaling)
    if init == "olora":
        left, right = np.linalg.qr(weight)
        lora_b, lora_a = left[:, :rank], right[:rank]
    else:
        left, roots, right = np.linalg.svd(weight, full_matrices=False)
        root = np.sqrt(roots[:rank] / scaling)
        lora_b, lora_a = left[:, :rank] * root, root[:, None] * right[:rank]
    return lora_a, lora_b, weight - scaling * (lora_b @ lora_a)


def initial_from_weight(frame, base):
    """A, B and what is left of the weights, for an adapter that starts from them; see `start_from_weight`.

    Args:
        frame (Frame): of the adapter.
        base (dict): name -> numpy.ndarray, the base's weights.

    Returns:
        dict of name -> numpy.ndarray.
    """
    values = {}
    for layer in frame.plan.targets:
        delta, kind = frame.deltas[layer.path], layer_kind(layer.cell)
        name = kind.weight_of(layer.cell).name
        weight = kind.to_matrix(base[name].astype(np.float32))
        init = frame.plan.config.init_lora_weights
        lora_a, lora_b, rest = start_from_weight(weight, init, delta.rank, delta.scaling)
        values[f"{layer.path}.{A}"] = np.ascontiguousarray(lora_a)
        values[f"{layer.path}.{B}"] = np.ascontiguousarray(lora_b)
        values[name] = np.ascontiguousarray(kind.from_matrix(rest, base[name].shape)).astype(base[name].dtype)
    return values


def combine(adapters, weights, combination_type, svd_rank):
    """The configuration and the values of a sum of adapters with weights; see `PeftModel.add_weighted_adapter`.

    Args:
        adapters (list of Adapter): the adapters.
        weights (list of float): one for each.
        combination_type (str): 'linear', 'cat' or 'svd'.
        svd_rank (int): of the result of 'svd', or None.

    Returns:
        tuple of LoraConfig and dict of name -> numpy.ndarray.

    Raises:
        AdapterError: an adapter is not plain LoRA on linear layers and embeddings, or has another rank where 'linear'
            needs equal ones.
        ValueError: `combination_type` is unknown, or the numbers of adapters and weights differ.
    """
    if combination_type not in COMBINATIONS:
        raise ValueError(f"'combination_type' must be one of {sorted(COMBINATIONS)}, but got {combination_type!r}.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"'weights' must have one for each of {len(adapters)} adapters, but got {weights!r}.")
    _check_plain(adapters, combination_type)
    values, ranks = {}, {}
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.frame.deltas))
    for path in paths:
        parts = [
            (weight * float(found["scaling"]), found["lora_a"], found["lora_b"])
            for weight, adapter in zip(weights, adapters)
            if path in adapter.frame.deltas
            for found in [fold_arguments(path, adapter.values)]
        ]
        lora_a, lora_b = COMBINATIONS[combination_type](parts, svd_rank)
        ranks[path] = len(lora_a)
        values[f"{path}.{A}"], values[f"{path}.{B}"] = np.ascontiguousarray(lora_a), np.ascontiguousarray(lora_b)
    first = adapters[0].config
    rank = max(ranks.values())
    others = {path: own for path, own in ranks.items() if own != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=paths,
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
    )
    return config, values


def _check_plain(adapters, combination_type):
    problems = []
    for adapter in adapters:
        config = adapter.config
        if config.peft_type != PeftType.LORA:
            problems.append(f"an adapter is of {config.peft_type.value}")
        elif config.use_dora or config.lora_bias or adapter.plan.owned or adapter.plan.residual:
            problems.append("an adapter has more than A and B: DoRA, biases, modules_to_save or a changed base")
        elif any(layer_kind(layer.cell).name == "conv2d" for layer in adapter.plan.targets):
            problems.append("an adapter is beside convolutions")
    if not problems and combination_type == "linear":
        for path in adapters[0].frame.deltas:
            ranks = {len(other.values[f"{path}.{A}"]) for other in adapters if f"{path}.{A}" in other.values}
            if len(ranks) > 1:
                problems.append(f"'linear' needs equal ranks, but {path} has {sorted(ranks)}")
    if problems:
        raise AdapterError("add_weighted_adapter: " + "; ".join(dict.fromkeys(problems)) + ".")


def _linear(parts, svd_rank):
    lora_a = sum(math.sqrt(abs(factor)) * lora_a for factor, lora_a, _ in parts)
    lora_b = sum(math.copysign(math.sqrt(abs(factor)), factor) * lora_b for factor, _, lora_b in parts)
    return lora_a.astype(np.float32), lora_b.astype(np.float32)


def _cat(parts, svd_rank):
    scaled = [np.float32(factor) * lora_a for factor, lora_a, _ in parts]
    return np.concatenate(scaled, 0), np.concatenate([lora_b for _, _, lora_b in parts], 1)


def _svd(parts, svd_rank):
    rank = svd_rank or max(len(lora_a) for _, lora_a, _ in parts)
    left, roots, right = np.linalg.svd(sum(np.float32(f) * (b @ a) for f, a, b in parts), full_matrices=False)
    return right[:rank], left[:, :rank] * roots[:rank]


COMBINATIONS = {"linear": _linear, "cat": _cat, "svd": _svd}
