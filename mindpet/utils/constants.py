"""Constants whose names other software relies on."""

import os
import stat

from mindpet.delta.registry import METHODS

DELTA_LIST = list(METHODS)
"""The names of the delta methods, the modes of `freeze_delta`."""

DEFAULT_FLAGS = os.O_RDWR | os.O_CREAT
"""Flags for `os.open` of a file that is written."""

DEFAULT_MODES = stat.S_IRUSR | stat.S_IWUSR
"""Permissions of such a file: the owner reads and writes."""
