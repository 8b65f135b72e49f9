"""What is done to a network: freezing, saving and loading what trains, watching that it does."""

from mindpet.graph.ckpt_util import TrainableParamsCheckPoint
from mindpet.graph.distributed import gather_delta, slice_delta
from mindpet.graph.freeze_utils import freeze_delta, freeze_from_config, freeze_modules
from mindpet.graph.guard import DeltaGuard, summary
from mindpet.graph.load import load_delta
from mindpet.graph.lora_plus import lora_plus_groups
from mindpet.graph.reshard import reshard_state
from mindpet.graph.resume import resume
from mindpet.network.quantize import QuantizationConfig, quantize

__all__ = [
    "DeltaGuard",
    "QuantizationConfig",
    "TrainableParamsCheckPoint",
    "freeze_delta",
    "freeze_from_config",
    "freeze_modules",
    "gather_delta",
    "load_delta",
    "lora_plus_groups",
    "quantize",
    "reshard_state",
    "resume",
    "slice_delta",
    "summary",
]
