"""What the adapters of a model do: a record for each layer, and one for the model."""

from dataclasses import dataclass

import mindspore as ms

from mindpet.peft.model import PeftModel
from mindpet.peft.state_dict import check_model


@dataclass(frozen=True)
class TunerLayerStatus:
    """A layer that has the delta of an adapter, whether or not it is active.

    Attributes:
        name: path of the layer.
        module_type: class of the layer.
        enabled: whether deltas are computed: not within `disable_adapter`.
        active_adapters: that is active and has a delta here.
        merged_adapters: that are merged and have a delta here.
        requires_grad: name of an adapter -> whether its delta trains.
        available_adapters: that have a delta here.
        devices: name of an adapter -> list of the targets that it is on.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class TunerModelStatus:
    """A model with adapters.

    Attributes:
        base_model_type: class of the network.
        adapter_model_type: class of the model with adapters.
        peft_types: name of an adapter -> its method.
        trainable_params, total_params: see `PeftModel.get_nb_trainable_parameters`.
        num_adapter_layers: layers that have a delta.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices: as in TunerLayerStatus.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: PeftModel) -> list[TunerLayerStatus]:
    """The layers of a model that have deltas, in the order of the network.

    Raises:
        TypeError: `model` is not a PeftModel.
    """
    check_model(model)
    layers = {}
    for adapter in model.adapters.values():
        for layer in adapter.plan.reached:
            layers.setdefault(layer.path, layer.cell)
    order = {path: place for place, (path, _) in enumerate(model.network.cells_and_names())}
    return [_layer_status(model, path, layers[path]) for path in sorted(layers, key=order.__getitem__)]


def _layer_status(model, path, cell):
    here = {name: adapter for name, adapter in model.adapters.items() if path in adapter.slot.deltas}
    return TunerLayerStatus(
        name=path,
        module_type=type(cell).__name__,
        enabled=model.is_enabled,
        active_adapters=[name for name in model.active_adapters if name in here],
        merged_adapters=[name for name in model.merged_adapters if name in here],
        requires_grad={
            name: _trains(model, name, _parameters(adapter.slot.deltas[path])) for name, adapter in here.items()
        },
        available_adapters=sorted(here),
        devices={name: [ms.get_context("device_target")] for name in here},
    )


def get_model_status(model: PeftModel) -> TunerModelStatus:
    """What the adapters of a model do.

    Raises:
        TypeError: `model` is not a PeftModel.
    """
    check_model(model)
    trainable, total = model.get_nb_trainable_parameters()
    return TunerModelStatus(
        base_model_type=type(model.network).__name__,
        adapter_model_type=type(model).__name__,
        peft_types={name: config.peft_name for name, config in model.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len({path for adapter in model.adapters.values() for path in adapter.slot.deltas}),
        enabled=model.is_enabled,
        active_adapters=model.active_adapters,
        merged_adapters=model.merged_adapters,
        requires_grad={
            name: _trains(model, name, adapter.slot.params.values()) for name, adapter in model.adapters.items()
        },
        available_adapters=sorted(model.adapters),
        devices={name: [ms.get_context("device_target")] for name in model.adapters},
    )


def _parameters(delta):
    """Those of a delta, without what it sees of the base."""
    return [param for name, param in delta.parameters_and_names() if not name.startswith("base_")]


def _trains(model, name, params):
    return name in model.active_adapters and any(param.requires_grad for param in params)
