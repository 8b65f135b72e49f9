"""BitFit: only the biases of the network train."""

from dataclasses import dataclass

from mindpet.delta._config import PeftConfig
from mindpet.delta._method import Method


@dataclass
class BitFitConfig(PeftConfig):
    """BitFit, Ben Zaken et al. 2021, arXiv:2106.10199: every parameter that is named `bias` trains."""

    peft_type, method_name = "BITFIT", "bitfit"
    trained_parameters = ("*bias",)


METHOD = Method("bitfit", BitFitConfig, BitFitConfig.trained_parameters, identity=True)
