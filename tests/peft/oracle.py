"""A small network with adapters in NumPy: what it computes is told by the base's weights and each adapter's factors.

Nothing of mindpet is used here. Weights are a dict of path -> array, where a Parameter that several layers have stands
under the path of each.
"""

import numpy as np

COPY = "mindpet_trained_"
A, B, MAGNITUDE, BIAS = (f"mindpet_delta_lora_{name}" for name in ("a", "b", "magnitude", "bias"))
START_A, START_B = "mindpet_lora_start_a", "mindpet_lora_start_b"
BLOCK = "mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter"
TABLE = "embed.embedding_table"


def forward(weights, blocks, ids, behind=None):
    """Logits `(batch, labels)` of ids `(batch, seq)`.

    Args:
        weights (dict): path -> array.
        blocks (list of str): paths of the layer of each block.
        ids (array): the input.
        behind (dict): values of adapters that stand behind a layer. Default: None.
    """
    behind = behind or {}

    def layer(path, x, activation=np.asarray):
        out = activation(x @ weights[f"{path}.weight"].T + weights[f"{path}.bias"])
        down, up = f"{path}.{BLOCK}_down_sampler", f"{path}.{BLOCK}_up_sampler"
        if f"{down}.weight" not in behind:
            return out
        inner = sigmoid(out @ behind[f"{down}.weight"].T + behind[f"{down}.bias"])
        return out + inner @ behind[f"{up}.weight"].T + behind[f"{up}.bias"]

    hidden = layer("fc", weights[TABLE][ids], sigmoid)
    for path in blocks:
        hidden = hidden + layer(path, hidden)
    return layer("classifier", hidden.mean(1))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def with_copies(weights, values):
    """The weights with what an adapter trains of the base in the place of the base's own."""
    copies = {path.replace(COPY, ""): value for path, value in values.items() if COPY in path}
    return {**weights, **copies}


def with_deltas(weights, values):
    """The weights with an adapter's LoRA folded into them: `W + s (B A - B0 A0)`, with DoRA of norm m in each row."""
    found = dict(weights)
    for path in layers_of(values):
        key = TABLE if path == "embed" else f"{path}.weight"
        own = {name: values.get(f"{path}.{name}") for name in (MAGNITUDE, BIAS)}
        matrix = found[key].T if path == "embed" else found[key]
        matrix = matrix + product(values, path)
        if own[MAGNITUDE] is not None:
            matrix = matrix * (own[MAGNITUDE] / np.linalg.norm(matrix, axis=1))[:, None]
        found[key] = matrix.T if path == "embed" else matrix
        if own[BIAS] is not None:
            found[f"{path}.bias"] = found[f"{path}.bias"] + values[f"{path}.mindpet_lora_scaling"] * own[BIAS]
    return found


def layers_of(values):
    """Paths of the layers that have LoRA."""
    return [path[: -len(A) - 1] for path in values if path.endswith(f".{A}")]


def product(values, path):
    """`s (B A - B0 A0)` of a layer."""
    delta = _times(values, path, B, A)
    if f"{path}.{START_A}" in values:
        delta = delta - _times(values, path, START_B, START_A)
    return values[f"{path}.mindpet_lora_scaling"] * delta


def _times(values, path, left, right):
    return values[f"{path}.{left}"].astype(float) @ values[f"{path}.{right}"].astype(float)


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
    scales = [weight * values[f"{path}.mindpet_lora_scaling"] for weight, values in here]
    lora_a = sum(np.sign(s) * abs(s) ** 0.5 * values[f"{path}.{A}"] for s, (_, values) in zip(scales, here))
    lora_b = sum(abs(s) ** 0.5 * values[f"{path}.{B}"] for s, (_, values) in zip(scales, here))
    return lora_b @ lora_a
