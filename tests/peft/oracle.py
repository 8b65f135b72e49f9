"""A small network with adapters in NumPy: what it computes is told by the base's weights and each adapter's values.

Weights are a dict of path -> array, where a Parameter that several layers have stands under the path of each. Of
mindpet only its contract is used: a method's record, and, where `EFFECTS` has no formula of it, `Delta.fold`.
"""

from typing import Any, NamedTuple

import numpy as np

from mindpet.delta.registry import method_of
from mindpet.network.parameters import matches

COPY = "mindpet_trained_"
A, B, MAGNITUDE, BIAS = (f"mindpet_delta_lora_{name}" for name in ("a", "b", "magnitude", "bias"))
START_A, START_B, SCALING = "mindpet_lora_start_a", "mindpet_lora_start_b", "mindpet_lora_scaling"
TABLE = "embed.embedding_table"
HEADS = 2


class Place(NamedTuple):
    """Where an adapter has a delta.

    Attributes:
        method (Method): of the delta.
        delta (type): its class.
        arguments (dict): delta arguments.
        paths (dict): name of a value -> its path.
    """

    method: Any
    delta: type
    arguments: dict
    paths: dict

    @property
    def folds(self):
        """Whether it can be folded into a weight."""
        return self.delta.fold is not None

    @property
    def folds_bias(self):
        """Whether that changes the bias, too."""
        return self.folds and self.delta.folds_bias(**self.arguments)

    @property
    def starts(self):
        """Names of the values that start from the weight."""
        return self.delta.start_names(**self.arguments)


def places(config, values):
    """Path -> Place of all deltas of an adapter.

    Args:
        config (PeftConfig): of the adapter.
        values (dict): its values by path.
    """
    names = {}
    for path in values:
        place, mark, name = path.partition("mindpet_")
        if COPY not in path:
            names.setdefault(place.rstrip("."), {})[mark + name] = path
    places = {}
    for path, paths in names.items():
        part = next(part for part in config.parts if any(matches(name, method_of(part).trainable) for name in paths))
        method = method_of(part)
        delta = next(method.deltas[kind] for kind in kinds_of(path) if kind in method.deltas)
        shared = {name: key for other in names.values() for name, key in other.items() if name in delta.shared_names}
        places[path] = Place(method, delta, part.delta_arguments(path), {**shared, **paths})
    return places


def kinds_of(path):
    """What a place of the network may be for a delta."""
    if path.endswith("attention"):
        return ("attention", "context")
    kinds = {"": "input_embedding", "embed": "embedding", "blocks.0": "block", "blocks.1": "block"}
    return (kinds.get(path, "linear"),)


def weight_of(path):
    """Path of the weight of a layer, or of the table behind a prompt."""
    return TABLE if path in ("", "embed") else f"{path}.weight"


def forward(weights, blocks, ids):
    """Logits `(batch, labels)` of ids `(batch, seq)`.

    Args:
        weights (dict): path -> array.
        blocks (list of str): paths of the layer of each block.
        ids (array): the input.
    """

    def layer(path, x):
        return x @ weights[f"{path}.weight"].T + weights[f"{path}.bias"]

    hidden = 1 / (1 + np.exp(-layer("fc", weights[TABLE][ids])))
    for path in blocks:
        block, inner = path.rpartition(".")[0], hidden
        if f"{block}.norm.gamma" in weights:
            inner = hidden + attend(hidden, *(layer(f"{block}.attention.{name}", hidden) for name in ("key", "value")))
            inner = inner - inner.mean(-1, keepdims=True)
            inner = inner / np.sqrt((inner**2).mean(-1, keepdims=True) + 1e-5)
            inner = inner * weights[f"{block}.norm.gamma"] + weights[f"{block}.norm.beta"]
        hidden = hidden + layer(path, inner)
    return layer("classifier", hidden.mean(1))


def attend(*inputs):
    """What an attention makes of query, key and value, each `(batch, seq, features)`."""
    query, key, value = (np.stack(np.split(x, HEADS, -1)) for x in inputs)
    scores = np.exp(query @ key.swapaxes(-1, -2))
    return np.concatenate(scores / scores.sum(-1, keepdims=True) @ value, -1)


def with_copies(weights, values):
    """The weights with what an adapter trains of the base in the place of the base's own."""
    copies = {path.replace(COPY, ""): value for path, value in values.items() if COPY in path}
    return {**weights, **copies}


def with_deltas(weights, places, values):
    """The weights with an adapter's deltas folded into them.

    Args:
        weights (dict): path -> array.
        places (dict): path -> Place.
        values (dict): path -> array.
    """
    changed = dict(weights)
    for path, place in places.items():
        if not place.folds:
            continue
        here = {name: values[key] for name, key in place.paths.items()}
        short = {_short(name): value.astype(float) for name, value in here.items()}
        key, bias = weight_of(path), f"{path}.bias"
        before = changed[key].T if path == "embed" else changed[key]
        effect = EFFECTS.get(place.method.name)
        if effect is None:
            after = place.delta.fold(before, here, **place.arguments)
        else:
            after = effect(before.astype(float), short, table=path == "embed", **place.arguments)
        seen = [key] if not place.delta.tied_deltas else [name for name in changed if changed[name] is weights[key]]
        changed.update(dict.fromkeys(seen, after.T if path == "embed" else after))
        if place.folds_bias:
            fold_bias = BIASES.get(place.method.name, place.delta.fold_bias)
            changed[bias] = fold_bias(changed[bias], {**here, **short}, **place.arguments)
    return changed


def lora(w, v, **_):
    """`W + s (B A - B0 A0)`, with DoRA of norm m in each row."""
    w = w + lora_product(v)
    return w * (v["lora_magnitude"] / np.linalg.norm(w, axis=1))[:, None] if "lora_magnitude" in v else w


def lora_product(v):
    """`s (B A - B0 A0)`."""
    start = v["lora_start_b"] @ v["lora_start_a"] if "lora_start_a" in v else 0
    return v["lora_scaling"] * (v["lora_b"] @ v["lora_a"] - start)


def miss(w, v, init, **_):
    """`W + D^T` for all shards of the input; with 'bat' `W + W_jk D_j + D_j`."""
    block = v["miss"]
    if init != "bat":
        return w + np.tile(block, (w.shape[1] // block.shape[0], w.shape[0] // block.shape[1])).T
    rank = block.shape[1]
    rows = [np.split(row, w.shape[1] // rank, 1) for row in np.split(w, len(w) // rank)]
    return w + np.block([[part @ own + own for part in row] for row, own in zip(rows, block)])


def oft(w, v, table, **_):
    """`W diag(R_1, ...)^T` with `R = (I - Q) (I + Q)^-1`; of an embedding, whose rows are features, `diag(R)^T W`."""
    size = (1 + int((1 + 8 * v["oft"].shape[1]) ** 0.5)) // 2
    upper, one = np.zeros((len(v["oft"]), size, size)), np.eye(size)
    upper[(slice(None), *np.triu_indices(size, 1))] = v["oft"]
    skew = upper - upper.swapaxes(1, 2)
    blocks, features = (one - skew) @ np.linalg.inv(one + skew), len(w) if table else w.shape[1]
    blocks = blocks if len(blocks) > 1 else np.repeat(blocks, features // size, 0)
    turn = sum(np.kron(np.diag(place), block) for place, block in zip(np.eye(len(blocks)), blocks))
    return turn.T @ w if table else w @ turn.T


def lokr(w, v, alpha, rank, **_):
    """`W + s (C x B)`, a Kronecker product."""
    return w + alpha / rank * np.kron(v["lokr_w1"], v["lokr_w2"] if "lokr_w2" in v else v["lokr_w2_a"] @ v["lokr_w2_b"])


def tokens(w, v, token_indices, **_):
    """Some columns are others."""
    w[:, list(token_indices)] = v["trainable_tokens"].T
    return w


# Method -> the matrix `(out, rest)` that makes up for the delta, from that of the weight and the values by name.
EFFECTS = {
    "lora": lora,
    "ia3": lambda w, v, **_: w * v["ia3"],
    "vera": lambda w, v, **_: (
        w + v["vera_lambda_b"][:, None] * (v["vera_b"][: len(w)] * v["vera_lambda_d"] @ v["vera_a"])
    ),
    "hira": lambda w, v, **_: w * (1 + v["hira_b"] @ v["hira_a"]),
    "miss": miss,
    "adalora": lambda w, v, alpha, rank, **_: w + alpha / rank * v["adalora_b"] @ (v["adalora_e"] * v["adalora_a"]),
    "oft": oft,
    "loha": lambda w, v, alpha, rank, **_: (
        w + alpha / rank * (v["loha_w1_a"] @ v["loha_w1_b"]) * (v["loha_w2_a"] @ v["loha_w2_b"])
    ),
    "lokr": lokr,
    "trainable_tokens": tokens,
}
# The same for the bias.
BIASES = {
    "lora": lambda b, v, **_: b + v["lora_scaling"] * v.get("lora_bias", 0),
    "ia3": lambda b, v, **_: b * v["ia3"][:, 0],
}
STARTS = {"trainable_tokens": lambda w, token_indices, **_: w[list(token_indices)]}


def layers_of(values):
    """Paths of the layers that have LoRA."""
    return [path[: -len(A) - 1] for path in values if path.endswith(f".{A}")]


def product(values, path):
    """`s (B A - B0 A0)` of a layer."""
    names = (A, B, START_A, START_B, SCALING)
    here = {name: values[f"{path}.{name}"].astype(float) for name in names if f"{path}.{name}" in values}
    return lora_product({_short(name): value for name, value in here.items()})


def _short(name):
    """Name of a value in the formulas."""
    return name.replace("mindpet_", "").replace("delta_", "")


def largest(matrix, rank):
    """The best approximation of a matrix of a rank, with which PiSSA starts."""
    left, roots, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * roots[:rank]) @ right[:rank]


def weighted_sum(parts, weights, path, combination):
    """`s B A` of a sum of adapters beside a layer.

    Args:
        parts (list of dict): the values of each adapter.
        weights (list of float): one for each.
        path (str): of the layer.
        combination (str): 'cat' or 'svd' (without a loss of rank): the sum of the products; 'linear': the product of
            the sums of A and of B, each times the root of weight and scale.
    """
    here = [(weight, values) for weight, values in zip(weights, parts) if f"{path}.{A}" in values]
    if combination != "linear":
        return sum(weight * product(values, path) for weight, values in here)
    scales = [weight * values[f"{path}.{SCALING}"] for weight, values in here]
    lora_a = sum(np.sign(s) * abs(s) ** 0.5 * values[f"{path}.{A}"] for s, (_, values) in zip(scales, here))
    lora_b = sum(abs(s) ** 0.5 * values[f"{path}.{B}"] for s, (_, values) in zip(scales, here))
    return lora_b @ lora_a
