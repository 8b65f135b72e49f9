"""Layers that the delta Cells are made of."""

from mindpet.layers.activation import get_activation
from mindpet.layers.linear import Dense

__all__ = ["Dense", "get_activation"]
