"""The historical import path of what once depended on MindSpore's version.

MindSpore 2.7 to 2.10 need no such switch; a difference that comes up between versions belongs here.
"""

from mindspore import nn

from mindpet.layers.activation import get_activation

__all__ = ["get_activation", "get_dropout"]


def get_dropout(dropout_prob: float) -> nn.Dropout:
    """A Dropout that zeroes an element with probability `dropout_prob`, in [0, 1), while training."""
    return nn.Dropout(p=dropout_prob)
