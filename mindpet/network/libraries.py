"""Layers of released libraries, by the path of their class. Nothing here imports a library.

What works with which version is in docs/libraries.md. Layers that cut their weights over ranks themselves, as those for
inference of mindformers do, are not here: a delta beside one of them would be computed from a part of its input.
"""

from mindspore import nn


def has_in_first(cell: nn.Cell) -> bool:
    """Whether the weight is `(in, out)`: these layers leave it to the object."""
    return not cell.transpose_b


def adds_bias(cell: nn.Cell) -> bool:
    """Whether the bias is in the output; else it is returned beside it."""
    return not cell.skip_bias_add


GRAPH = "mindformers.experimental.graph.tensor_parallel.layers"
TRAINING = "mindformers.parallel_core.training_graph.tensor_parallel.layers"
PAIR = {"fan_in_fan_out": has_in_first, "adds_bias": adds_bias}  # construct returns (output, bias)
SEQUENCE_FIRST = {**PAIR, "batch_axis": 1}

# Path of the class -> what `register_layer` takes.
LIBRARIES = {
    "mindformers.modules.layers.Linear": {"fan_in_fan_out": has_in_first, "compute_dtype": "dtype"},
    "mindformers.models.llama.llama_layer.LlamaEmbedding": {"name": "embedding", "weight": "embedding_weight"},
    "mindformers.modules.transformer.transformer.VocabEmbedding": {"name": "embedding", "weight": "embedding_table"},
    f"{GRAPH}.ColumnParallelLinear": {**PAIR, "bias": "bias_"},
    f"{GRAPH}.RowParallelLinear": {**PAIR, "bias": "bias_"},
    f"{GRAPH}.VocabParallelEmbedding": {"name": "embedding"},
    f"{TRAINING}.ColumnParallelLinear": SEQUENCE_FIRST,
    f"{TRAINING}.RowParallelLinear": SEQUENCE_FIRST,
    f"{TRAINING}.VocabParallelEmbedding": {"name": "embedding"},
    "mindformers.pynative.layers.linear.Linear": {"flattens": False},
    "mindformers.pynative.base_models.common.embeddings.vocab_embedding.VocabEmbedding": {"name": "embedding"},
    "mindone.transformers.mindspore_utils.Conv1D": {"fan_in_fan_out": True},
    "mindone.transformers.mindspore_adapter._conv.Conv1d": {"name": "conv1d"},
}
