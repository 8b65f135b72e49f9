"""From the names of a MindSpore network to those of the PyTorch model, and back."""

import re
from dataclasses import dataclass, field
from typing import Callable

# MindSpore's names of parameters -> PyTorch's, at the end of a name.
LEAVES = {"embedding_table": "weight", "gamma": "weight", "beta": "bias"}
NORM = re.compile(r"(?i)norm|(^|\.)ln(_\w+)?(\.|$)")


def to_torch(name):
    """The PyTorch name of a parameter or Cell whose path is the same in both."""
    head, _, leaf = name.rpartition(".")
    return f"{head}.{LEAVES[leaf]}" if head and leaf in LEAVES else name


@dataclass(frozen=True)
class NameMap:
    """How paths of Cells, and names of parameters, differ between a MindSpore network and the PyTorch model.

    Args:
        to_torch (callable): from a name in the network to that in the PyTorch model; names that it does not know, it
            returns as they are. Default: the end of a name is MindSpore's or PyTorch's (`embedding_table`, `gamma`,
            `beta`), and all before it is the same.
        fused (dict): end of the path of a linear layer in the network, say 'attention.w_qkv' -> tuple of the names that
            the PyTorch model has in its place, next to one another and in that order, say ('q_proj', 'k_proj',
            'v_proj'). Default: {}.
    """

    to_torch: Callable = to_torch
    fused: dict = field(default_factory=dict)
