"""Reading the `config.json` of a Hugging Face folder."""

import json
import pathlib
from dataclasses import fields


def read_config(folder):
    """The path of a folder's `config.json`, and what is in it.

    Raises:
        OSError: there is no readable `config.json`.
        ValueError: it is not a JSON object.
    """
    path = pathlib.Path(folder) / "config.json"
    try:
        return path, dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error


def make_config(cls, path, content, understood, overrides):
    """A config of a dataclass from the fields that it knows.

    Args:
        cls (type): the dataclass.
        path (str): of the file, for the message.
        content (dict): of the file.
        understood (dict): field -> the only value that the model can be built for; it may be absent.
        overrides (dict): fields that take the place of those in the file.

    Raises:
        ValueError: a field has a value that is not understood.
    """
    for key, value in understood.items():
        if content.get(key, value) != value:
            raise ValueError(f"{path}: '{key}' must be {value!r}, but is {content[key]!r}")
    known = {field.name for field in fields(cls)}
    return cls(**{**{key: value for key, value in content.items() if key in known}, **overrides})
