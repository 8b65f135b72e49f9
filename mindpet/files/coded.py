"""Files with quantised weights, read as the weights that they stand for."""

import json
from typing import Union

import numpy as np

from mindpet.errors import CheckpointError
from mindpet.files.tensors import CODES, TYPES, TensorFile
from mindpet.utils.hints import Shape
from mindpet.utils.parse import parse_json
from mindpet.utils.quantization import RANGE, SCALE, WEIGHT, Format, dequantize_matrix, format_of
from mindpet.utils.quote import quote

DTYPES = "mindpet_quantized"  # key in the metadata: name of a weight -> type that it had, as JSON
PARTS = {part: part[len(WEIGHT) :] for part in (WEIGHT, SCALE, RANGE)}  # array of a format -> end of its name


class CodedFile:
    """A file with quantised weights, with the interface of a TensorFile.

    Args:
        file: what is in it.

    Attributes:
        file (TensorFile): the file itself.
        codes (dict): name of a weight -> its Format.
        metadata, shapes, dtypes: as those of a TensorFile, with weights in the place of their codes and scales. A
            weight has the type that it had before, or float32 if that is not known.

    Raises:
        CheckpointError: codes are not those of a format.
    """

    def __init__(self, file: TensorFile):
        self.file, self.codes = file, {}
        types = _types(file)
        self.metadata = {key: value for key, value in file.metadata.items() if key != DTYPES}
        self.shapes, self.dtypes, hidden = {}, {}, set()
        for name in coded_names(file):
            form, shape = _format(file, name)
            self.codes[name] = form
            self.shapes[name], self.dtypes[name] = shape, types.get(name, np.dtype(np.float32))
            hidden.update(f"{name}{end}" for end in PARTS.values() if end)
        plain = [name for name in file.shapes if name not in hidden]
        self.shapes = {name: self.shapes.get(name, file.shapes[name]) for name in plain}
        self.dtypes = {name: self.dtypes.get(name, file.dtypes[name]) for name in plain}

    def read(self, name: str) -> np.ndarray:
        """A tensor; a quantised weight is dequantised."""
        if name not in self.codes:
            return self.file.read(name)
        arrays = {
            part: self.file.read(f"{name}{end}") for part, end in PARTS.items() if f"{name}{end}" in self.file.shapes
        }
        return dequantize_matrix(arrays, self.codes[name]).astype(self.dtypes[name])

    def raw(self, name: str) -> np.ndarray:
        """A tensor of the file itself: codes as they are."""
        return self.file.read(name)


def open_tensors(path: str) -> Union[TensorFile, CodedFile]:
    """A safetensors file, a CodedFile if it has quantised weights."""
    file = TensorFile(path)
    return CodedFile(file) if coded_names(file) else file


def coded_names(file: TensorFile) -> list[str]:
    """The names of quantised weights in a file."""
    return [
        name
        for name in file.shapes
        if name.endswith(WEIGHT) and f"{name}{PARTS[SCALE]}" in file.shapes and file.dtypes[name].kind in "iu"
    ]


def _format(file, name) -> tuple[Format, Shape]:
    present = {part: f"{name}{end}" for part, end in PARTS.items() if f"{name}{end}" in file.shapes}
    shapes = {part: file.shapes[key] for part, key in present.items()}
    try:
        return format_of(shapes, {part: file.dtypes[key] for part, key in present.items()})
    except ValueError as error:
        raise CheckpointError(f"{file.path}: {name}: {error}.") from error


def _types(file):
    """Name of a weight -> the type that it had."""
    text = file.metadata.get(DTYPES)
    try:
        types = {} if text is None else parse_json(text.encode())
        return {name: TYPES[code] for name, code in types.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file.path}: {DTYPES!r} must tell types of tensors, but is {quote(text)}.") from error


def types_as_text(types: dict[str, np.dtype]) -> str:
    """What the metadata has under `DTYPES`."""
    return json.dumps({name: CODES[dtype] for name, dtype in types.items()})
