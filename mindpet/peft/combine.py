"""Sums of LoRA adapters, on their values, in float32."""

import math
import numbers
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Optional, Union

import numpy as np

from mindpet.delta.lora import SCALING, A, B, LoraConfig, starts_from_weight
from mindpet.errors import AdapterError
from mindpet.network.match import exact_targets, exactly
from mindpet.peft.merge import in_float32
from mindpet.utils.hints import Arrays
from mindpet.utils.validate import Checker, is_int


def combine(
    adapters: Sequence[Any],
    weights: Sequence[float],
    combination_type: str = "svd",
    svd_rank: Optional[int] = None,
    svd_clamp: Optional[float] = None,
    svd_full_matrices: bool = True,
    svd_driver: Optional[str] = None,
    density: Optional[float] = None,
    majority_sign_method: str = "total",
    seed: Union[int, np.random.Generator, None] = None,
) -> tuple[LoraConfig, Arrays]:
    """The configuration and the values of a sum of LoRA adapters with weights w, as Hugging Face PEFT computes it.

    Of the adapters that have a delta beside a layer, with scales s:

    * 'cat': their `w s A` below one another and their B side by side, which is the exact sum. The rank is the sum of
      ranks.
    * 'linear': `sum sign(w s) sqrt(|w s|) A` and `sum sqrt(|w s|) B`, for equal ranks.
    * 'svd': the best approximation of `sum w s B A` of rank `svd_rank`.
    * 'magnitude_prune', 'ties', 'dare_linear' and 'dare_ties': as 'linear', but elements are dropped before the sum.
      'magnitude_prune' and 'ties' keep those of largest magnitude in each A and B, 'dare' keeps each by chance and
      divides it by `density`. With 'ties', the mean of the elements that have the sign of the majority stands in place
      of the sum. All four with '_svd': as 'svd', with `s B A` in place of A and B.

    Source: TIES, Yadav et al. 2023, arXiv:2306.01708, section 3; DARE, Yu et al. 2023, arXiv:2311.03099, section 3.

    Args:
        adapters (list of Adapter): each has `config`, `plan`, `slot` and `values`.
        weights: one for each; a negative one subtracts.
        combination_type: see above. Default: 'svd'.
        svd_rank: rank of the result of the types with 'svd'. Default: None, for the largest of all adapters.
        svd_clamp: quantile in (0, 1] of the elements of A and B, beyond which the types with 'svd' clamp them.
            Default: None.
        svd_full_matrices: kept for Hugging Face PEFT; of no effect on the result. Default: True.
        svd_driver: kept for Hugging Face PEFT, a method of cuSOLVER; of no effect. Default: None.
        density: share in (0, 1] of the elements that are kept; the types that drop elements need it, the others ignore
            it. Default: None.
        majority_sign_method: the sign of the majority is that of the sum of the elements, 'total', or of their signs,
            'frequency'. Default: 'total'.
        seed: of the chance of 'dare'. Default: None, for NumPy's global state, which `mindspore.set_seed` sets too.

    Returns:
        The configuration, and the values by path.

    Raises:
        AdapterError: an adapter is not plain LoRA on linear layers and embeddings, holds NaN or infinite numbers, or
            has another rank where the type needs equal ones; all is in the message.
        TypeError, ValueError: another argument is wrong; all are in the message.
    """
    adapters = list(adapters)
    _check_arguments(SimpleNamespace(**locals()))
    _check_plain(adapters)
    layers = {}
    for weight, adapter in zip(weights, adapters):
        stored = adapter.values
        for target in adapter.plan.targets:
            values = in_float32(adapter.slot.values_of(target.path, stored))
            layers.setdefault(target.path, []).append((weight, target.delta, values))
    _check_layers(layers, combination_type)
    rank = svd_rank or max(rank for each in adapters for rank in (each.config.r, *each.config.rank_pattern.values()))
    seed = np.random.randint(2**31) if seed is None else seed
    merge = _merger(combination_type, density, majority_sign_method, np.random.default_rng(seed))
    values = {}
    for path, parts in layers.items():
        weight, deltas, stored = zip(*parts)
        parts_a, parts_b = ([values[name] for values in stored] for name in (A, B))
        scales = np.multiply(weight, [float(values[SCALING]) for values in stored])
        whole_a = np.concatenate([scale * lora_a for scale, lora_a in zip(np.float32(scales), parts_a)])
        whole_b = np.hstack(parts_b)
        if combination_type == "cat":
            lora_a, lora_b = whole_a, whole_b
        elif combination_type == "svd" and len(whole_a) >= rank:
            lora_a, lora_b = _factors(_svd_of_product(whole_b, whole_a), rank, svd_clamp)
        elif combination_type.endswith("svd"):
            nothing = np.zeros((len(parts_b[0]), parts_a[0].shape[1]), np.float32)
            changes = [delta.fold(nothing, values) for delta, values in zip(deltas, stored)]
            decomposition = np.linalg.svd(merge(changes, weight), full_matrices=False)
            lora_a, lora_b = _factors(decomposition, rank, svd_clamp)
        else:
            roots = np.sqrt(np.abs(scales))
            lora_a, lora_b = merge(parts_a, np.copysign(roots, scales)), merge(parts_b, roots)
        values[f"{path}.{A}"], values[f"{path}.{B}"] = np.ascontiguousarray(lora_a), np.ascontiguousarray(lora_b)
    ranks = {path: len(values[f"{path}.{A}"]) for path in layers}
    most = max(ranks.values())
    others = {exactly(path): rank for path, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most,
        lora_alpha=most,
        target_modules=exact_targets(
            path for adapter in adapters for target in adapter.plan.targets for path in target.paths
        ),
        rank_pattern=others,
        alpha_pattern=dict(others),
        task_type=adapters[0].config.task_type,
        base_model_name_or_path=adapters[0].config.base_model_name_or_path,
    )
    return config, values


def _check_arguments(given):
    check, weights, kind = Checker("add_weighted_adapter"), given.weights, given.combination_type
    check.require(given.adapters, ValueError, "adapters", given.adapters, "names of adapters, at least one")
    rule = f"a list of finite numbers, one for each of {len(given.adapters)} adapters"
    if check.require(isinstance(weights, (list, tuple)), TypeError, "weights", weights, rule):
        is_fit = len(weights) == len(given.adapters)
        is_fit = is_fit and all(_is_real(weight) and math.isfinite(weight) for weight in weights)
        check.require(is_fit, ValueError, "weights", weights, rule)
    check.choice("combination_type", kind, COMBINATIONS)
    if given.svd_rank is not None:
        check.positive_int(svd_rank=given.svd_rank)
    if given.svd_clamp is not None:
        check.require(_is_share(given.svd_clamp), ValueError, "svd_clamp", given.svd_clamp, "in (0, 1] or None")
    if given.svd_driver is not None:
        check.choice("svd_driver", given.svd_driver, ("gesvd", "gesvda", "gesvdj"))
    if kind in COMBINATIONS and kind not in ("cat", "linear", "svd"):
        check.require(_is_share(given.density), ValueError, "density", given.density, f"in (0, 1] for {kind!r}")
    check.boolean(svd_full_matrices=given.svd_full_matrices)
    check.choice("majority_sign_method", given.majority_sign_method, ("total", "frequency"))
    seed = given.seed
    known = seed is None or isinstance(seed, np.random.Generator) or (is_int(seed) and seed >= 0)
    check.require(known, ValueError, "seed", seed, "an int from 0 on, a numpy.random.Generator or None")
    check.done()


def _is_real(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_share(value):
    return _is_real(value) and 0 < value <= 1


def _check_plain(adapters):
    problems = []
    for adapter in adapters:
        config = adapter.config
        if not isinstance(config, LoraConfig):
            problems.append(f"an adapter is of {config.peft_name}")
        elif config.use_dora or config.lora_bias or adapter.plan.trained:
            problems.append("an adapter has more than A and B: DoRA, biases, modules_to_save or statistics")
        elif starts_from_weight(config.init_lora_weights):
            problems.append(f"an adapter starts from the base's weights: {config.init_lora_weights!r}")
        elif any(target.kind.is_convolution for target in adapter.plan.targets):
            problems.append("an adapter is beside convolutions")
    _refuse(problems)


def _check_layers(layers, combination_type):
    problems = []
    for path, parts in layers.items():
        ranks = {len(values[A]) for _, _, values in parts}
        if len(ranks) > 1 and combination_type in RULES:
            problems.append(f"{combination_type!r} needs equal ranks, but {path} has {sorted(ranks)}")
        if not all(np.isfinite(value).all() for _, _, values in parts for value in values.values()):
            problems.append(f"{path} holds NaN or infinite numbers")
    _refuse(problems)


def _refuse(problems):
    if problems:
        raise AdapterError("add_weighted_adapter: " + "; ".join(dict.fromkeys(problems)) + ".")


def _merger(combination_type, density, majority_sign_method, rng):
    """A function that makes one tensor of several and their factors."""
    prune, total = RULES.get(combination_type.replace("_svd", ""), RULES["linear"])

    def merge(tensors, factors):
        kept = np.stack([prune(tensor, density, rng) for tensor in tensors])
        factors = np.reshape(factors, (-1, *(1,) * tensors[0].ndim)).astype(np.float32)
        return total(kept, factors, majority_sign_method)

    return merge


def _keep(tensor, density, rng):
    return tensor


def _keep_largest(tensor, density, rng):
    order = np.argsort(-np.abs(tensor), axis=None, kind="stable")
    kept = np.zeros_like(tensor)
    kept.flat[order[: int(density * tensor.size)]] = 1
    return tensor * kept


def _keep_by_chance(tensor, density, rng):
    return np.where(rng.random(tensor.shape) < density, tensor / np.float32(density), np.float32(0))


def _sum(tensors, factors, majority_sign_method):
    return (factors * tensors).sum(0)


def _mean_of_majority(tensors, factors, majority_sign_method):
    """The sum of the elements with the sign of the majority, by their number; in a draw it is positive."""
    votes = tensors if majority_sign_method == "total" else np.sign(tensors)
    agree = np.sign(tensors) == np.where(votes.sum(0) >= 0, 1, -1)
    return (factors * tensors * agree).sum(0) / np.maximum(agree.sum(0), 1).astype(np.float32)


def _svd_of_product(lora_b, lora_a):
    """The singular value decomposition of B A, which takes a thousandth of the time if the rank is low."""
    (left, upper), (right, lower) = np.linalg.qr(lora_b), np.linalg.qr(lora_a.T)
    inner_left, roots, inner_right = np.linalg.svd(upper @ lower.T, full_matrices=False)
    return left @ inner_left, roots, inner_right @ right.T


def _factors(decomposition, rank, clamp):
    """A and B of a rank, whose product is next to a matrix, from its singular value decomposition."""
    left, roots, right = decomposition
    lora_a, lora_b = right[:rank], left[:, :rank] * roots[:rank]
    if clamp is not None:
        limit = np.quantile(np.concatenate((lora_a, lora_b), axis=None), clamp)
        # The order counts where the limit is negative: it is that of torch.clamp.
        lora_a, lora_b = (
            np.minimum(np.maximum(factor, -limit), limit).astype(np.float32) for factor in (lora_a, lora_b)
        )
    return lora_a, lora_b


# How elements are dropped, and what is made of the rest.
RULES = {
    "linear": (_keep, _sum),
    "magnitude_prune": (_keep_largest, _sum),
    "ties": (_keep_largest, _mean_of_majority),
    "dare_linear": (_keep_by_chance, _sum),
    "dare_ties": (_keep_by_chance, _mean_of_majority),
}
COMBINATIONS = ("cat", "svd", *RULES, *(f"{name}_svd" for name in RULES if name != "linear"))
