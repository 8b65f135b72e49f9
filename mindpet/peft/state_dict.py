"""The values of an adapter as a dict, with the keys of its file."""

from typing import Any, NamedTuple, Optional, Union

import numpy as np
from mindspore import Tensor

from mindpet.peft.model import PeftModel


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` returns for Hugging Face PEFT's sake: both are empty, else there is an error.

    Attributes:
        missing_keys: keys that were not in the dict.
        unexpected_keys: keys that have no place.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: PeftModel, state_dict: Optional[dict[str, Tensor]] = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """What `save_pretrained` would write: tensors by the keys of `adapter_model.safetensors`.

    Args:
        model: has the adapter.
        state_dict: by key; those of the adapter are taken from it, and not from the model. Default: None.
        adapter_name: Default: 'default'.

    Raises:
        TypeError: `model` is not a PeftModel.
        AdapterError: there is no such adapter.
        KeyError: a key of the adapter is not in `state_dict`.
    """
    check_model(model)
    tensors = {key: Tensor(value) for key, value in model.adapter_tensors(adapter_name).items()}
    return tensors if state_dict is None else {key: state_dict[key] for key in tensors}


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Union[Tensor, np.ndarray]], adapter_name: str = "default"
) -> LoadResult:
    """Give an adapter the values of a dict as `get_peft_model_state_dict` returns it.

    Args:
        model: has the adapter.
        peft_model_state_dict: by key.
        adapter_name: Default: 'default'.

    Raises:
        TypeError: `model` is not a PeftModel.
        AdapterError: there is no such adapter, or one is merged.
        CheckpointError: tensors are missing, surplus, or do not fit; all are in the message, and nothing was changed.
    """
    check_model(model)
    tensors = {
        key: value.asnumpy() if isinstance(value, Tensor) else value for key, value in peft_model_state_dict.items()
    }
    model.set_adapter_tensors(adapter_name, tensors)
    return LoadResult([], [])


def check_model(model: Any) -> None:
    """Refuse what is not a PeftModel."""
    if not isinstance(model, PeftModel):
        raise TypeError(f"'model' must be a PeftModel, but got {model!r} ({type(model).__name__}).")
