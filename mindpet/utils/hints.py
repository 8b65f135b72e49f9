"""Names for types in signatures."""

import numbers
import os
from typing import Any, Union

import numpy as np
from mindspore import Layout, Tensor, nn
from mindspore.common.initializer import Initializer
from mindspore.ops import Primitive

PathLike = Union[str, os.PathLike]
InitLike = Union[Tensor, str, Initializer, numbers.Number]
ActivationLike = Union[str, nn.Cell, Primitive, None]
Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Strategy = tuple[Union[Shape, Layout], ...]  # of an operator: for each input into how many slices each axis is cut
Operators = dict[str, tuple[Any, str]]  # see `mindpet.utils.sharding`
