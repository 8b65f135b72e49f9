"""Networks in AutoParallel: their plans are those of the parallel context that means the same."""

import functools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from mindspore.parallel.auto_parallel import AutoParallel
from mindspore.parallel.nn import Pipeline

from mindpet.delta import AdaLoRADense
from mindpet.delta.adalora import AdaLoraOptimizer
from mindpet.errors import BuildError, ConfigError, DryRunError
from mindpet.graph import freeze_delta
from mindpet.parallel import dry_run_many
from mindpet.peft import AdaLoraConfig, LoraConfig, get_peft_model

MINT_STRATEGY = ((2, 1), (4, 1), (4,))
LORA = LoraConfig(r=4, target_modules=["up", "down"])


class Stack(nn.Cell):
    """Two layers, the one cut along its outputs, the other along its inputs, and a sum, the loss."""

    def __init__(self, n, o):
        super().__init__()
        self.up, self.down, self.sum = nn.Dense(64, 128), nn.Dense(128, 64), ops.ReduceSum().shard(((n, 1),))
        self.up.matmul.shard(((n, 1), (o, 1)))
        self.up.bias_add.shard(((n, o), (o,)))
        self.down.matmul.shard(((n, o), (1, o)))
        self.down.bias_add.shard(((n, 1), (1,)))

    def construct(self, x):
        return self.sum(self.down(self.up(x)))


class Summed(nn.Cell):
    """A layer and a sum, the loss; nothing has a strategy."""

    def __init__(self, layer):
        super().__init__()
        self.fc, self.sum = layer, ops.ReduceSum()

    def construct(self, x):
        return self.sum(self.fc(x))


def rows():
    return Tensor(np.ones((64, 64), np.float32))


WHOLE = {"dataset_strategy": "full_batch"}
OPTIMIZER = {
    "enable_parallel_optimizer": True,
    "parallel_optimizer_config": {"parallel_optimizer_threshold": 0, "optimizer_level": "level2"},
}
# (slices of the rows, of the features), what is called on an AutoParallel, and what the parallel context is set to.
SETTINGS = {
    "hsdp": ((4, 2), [("dataset_strategy", "full_batch"), ("hsdp", -1, 0, "level2")], {**WHOLE, **OPTIMIZER}),
    "data parallel": ((8, 1), [], {"dataset_strategy": "data_parallel"}),
    "dataset": ((4, 2), [("dataset_strategy", ((4, 1),))], {"dataset_strategy": ((4, 1),)}),
    "pipeline": ((2, 2), [("dataset_strategy", "full_batch"), ("pipeline", 2)], {**WHOLE, "pipeline_stages": 2}),
}


def build(name, way):
    """A network with LoRA; the cells are named by their paths in the base, which does not change them."""
    (n, o), calls, settings = SETTINGS[name]
    network = Stack(n, o)
    get_peft_model(network, LORA)
    if name == "pipeline":
        network = (Pipeline if way == "auto" else nn.PipelineCell)(network, 2, {"up": 0, "down": 1})
    if way == "auto":
        network = AutoParallel(network)
        for method, *arguments in calls:
            getattr(network, method)(*arguments)
    else:
        ms.set_auto_parallel_context(**settings)
    return network, rows()


def adalora():
    network = Summed(AdaLoRADense(64, 64, 4, 8, compute_dtype=ms.float32))
    freeze_delta(network, "adalora")
    ms.reset_auto_parallel_context()  # as it is where no dry run is
    config = AdaLoraConfig(target_r=1, init_r=4, tinit=0, tfinal=2, total_step=9)
    optimizer = AdaLoraOptimizer(nn.SGD(network.trainable_params(), 0.1), network, config)
    return AutoParallel(network), rows(), optimizer


def mint_layer(strategy=None, config=LoraConfig(r=4, target_modules=["fc"])):
    network = Summed(mint.nn.Linear(64, 128))
    if strategy:
        network.fc.dense.shard(strategy)
    if config:
        get_peft_model(network, config)
    return network, rows()


def ignored():
    return mint_layer(MINT_STRATEGY, None)


def of_a_function():
    return AutoParallel(ops.ReduceSum()), rows()


@pytest.fixture(scope="module")
def results():
    """Of everything, compiled in one child."""
    pairs = [(name, way) for name in SETTINGS for way in ("auto", "context")]
    builds = [functools.partial(build, *pair) for pair in pairs] + [adalora, mint_layer, ignored, of_a_function]
    return dict(zip([*pairs, "adalora", "mint", "ignored", "function"], dry_run_many(builds, 8, rank=5)))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_plan_is_that_of_the_parallel_context(name, results):
    auto, context = results[name, "auto"], results[name, "context"]
    assert auto == context and str(auto) == str(context)
    shards = {plan.optimizer_shards for plan in auto.parameters}
    assert (max(shards) > 1) == (name == "hsdp")


def test_what_needs_whole_parameters_is_refused_when_it_is_compiled(results):
    assert isinstance(results["adalora"], DryRunError)
    assert "AdaLoraOptimizer: 'parallel_mode' must be one without cut parameters" in str(results["adalora"])


def test_lora_beside_a_layer_of_mint_is_left_to_mindspore_as_the_layer_is(results):
    report = results["mint"]
    assert not [plan for plan in report.collectives if "layout" in plan.cause]
    summed = {plan.cause: plan.group_size for plan in report.collectives if plan.phase == "backward"}
    assert summed == {f"gradient of fc.mindpet_delta_lora_{name}": 8 for name in "ab"}
    assert [plan.strategy for plan in report.operators if plan.operator == "Dense"] == [((8, 1), (1, 1), (1,))]


def test_the_strategy_of_a_layer_of_mint_is_not_used_and_no_delta_follows_it(results):
    (dense,) = [plan for plan in results["ignored"].operators if plan.operator == "Dense"]
    assert dense.strategy == ((8, 1), (1, 1), (1,)) and not dense.is_set
    with pytest.raises(
        ConfigError, match=r"fc: .* one MatMul, but 0 have one in this layer; what has one: \['Dense'\]"
    ):
        mint_layer(MINT_STRATEGY)


def test_only_cells_can_be_compiled(results):
    assert isinstance(results["function"], BuildError) and "it returned" in str(results["function"])


def test_settings_beside_an_auto_parallel():
    (result,) = dry_run_many([functools.partial(build, "dataset", "auto")], 8, pipeline_stages=2)
    assert isinstance(result, BuildError)
    assert "AutoParallel, which has its own; set there what ['pipeline_stages'] mean" in str(result)


def test_an_auto_parallel_goes_around_the_peft_model(monkeypatch):
    monkeypatch.setattr("mindspore.parallel.auto_parallel.get_rank", lambda: 0)
    monkeypatch.setattr("mindspore.parallel.auto_parallel.get_group_size", lambda: 1)
    network = Stack(2, 2)
    with pytest.raises(ConfigError, match=r"around the PeftModel, not into it: AutoParallel\(get_peft_model\("):
        get_peft_model(AutoParallel(network), LORA)
    model = get_peft_model(network, LORA)
    parallel = AutoParallel(model)
    freeze_delta(parallel, "lora")
    assert {param.name for param in parallel.trainable_params()} == {param.name for param in model.trainable_params()}
