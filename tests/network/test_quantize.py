"""Quantised layers: what they compute, their gradient, and adapters of every method on them."""

import copy

import mindspore as ms
import numpy as np
import pytest
from graphs import dumped, final_nodes, readers
from mindspore import Parameter, Tensor, nn
from models.bert import BertConfig, SelfAttention
from small import TARGETS, Small, Tied, contents, ids, numbers, same

from mindpet.errors import CheckpointError, ConfigError, MergeError, NoMatchError
from mindpet.graph import QuantizationConfig, freeze_delta, freeze_modules, load_delta, quantize, summary
from mindpet.layers.quantized import AscendProduct, QuantizedDense
from mindpet.peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    BottleneckConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from mindpet.utils.quantization import dequantize_matrix, quantize_matrix

CONFIGS = [QuantizationConfig("int8"), QuantizationConfig("int4", 4, False), QuantizationConfig("nf4", 4)]
LINEAR = ["query", "mlp.0", "mlp.2", "turned", "shared"]


def of(rng, form, bias=True, **keywords):
    """A layer with seeded values, and its weight in float32."""
    cell = QuantizedDense(12, 6, form.bits, form.group_size, form.double_quant, has_bias=bias, **keywords)
    for name, value in quantize_matrix(rng.normal(size=(6, 12)).astype(np.float32), cell.form).items():
        getattr(cell, name).set_data(Tensor(value))
    if bias:
        cell.bias.set_data(Tensor(rng.normal(size=6).astype(np.float32)))
    return cell, cell.dequantized()


class Scaled(nn.Cell):
    """A layer behind a factor that trains."""

    def __init__(self, layer):
        super().__init__()
        self.factor, self.layer = Parameter(Tensor(np.ones(12, np.float32)), name="factor"), layer

    def construct(self, x):
        return (self.layer(x * self.factor) ** 2).sum()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.bits)
def test_value_and_gradient(config, mode, rng):
    cell, weight = of(rng, config.form)
    x = rng.normal(size=(4, 5, 12)).astype(np.float32)
    out = x @ weight.T + cell.bias.asnumpy()
    same(cell(Tensor(x)).asnumpy(), out)
    for shape in ((12,), (0, 12), (2, 1, 3, 12)):
        assert cell(Tensor(np.ones(shape, np.float32))).shape == (*shape[:-1], 6)
    network = Scaled(cell)
    gradients = ms.value_and_grad(network, None, [network.factor, cell.bias])(Tensor(x))[1]
    np.testing.assert_allclose(gradients[0].asnumpy(), (2 * out @ weight * x).sum((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(gradients[1].asnumpy(), (2 * out).sum((0, 1)), rtol=1e-4)


def test_the_step_has_no_gradient_of_a_weight_and_keeps_none(rng, tmp_path):
    """The products of the step, forward and for the input; and the codes are read twice."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Scaled(of(rng, CONFIGS[2].form)[0])
    with dumped(tmp_path):
        nn.TrainOneStepCell(network, nn.SGD([network.factor])).set_train()(Tensor(np.ones((4, 12), np.float32)))
    nodes = final_nodes(tmp_path)
    products = [node.tensors[:3] for node in nodes if node.operator == "MatMul"]
    shapes = [[shape for _, shape in product] for product in products]
    assert shapes == [[(4, 12), (6, 12), (4, 6)], [(4, 6), (6, 12), (4, 12)]]
    assert [node.operator for node in nodes].count("Gather") == 2  # the table, forward and backward
    # Codes are there when they are needed, by a Depend, and nothing copies them; what broadcasts keeps memory on a CPU.
    assert set(readers(nodes, "layer.weight")) <= {"Reshape"}
    large = [node.tensors for node in nodes if node.operator in ("Mul", "Add") and node.largest[2] >= 4 * 6 * 12]
    assert large and all(len(set(tensors)) == 1 for tensors in large)


def test_ascends_kernel_is_in_the_forward_pass(rng, tmp_path):
    """Compiled, for a CPU has no such kernel; the backward pass has a plain product."""
    ms.set_context(mode=ms.GRAPH_MODE)
    cell, _ = of(rng, CONFIGS[0].form, compute_dtype=ms.float16)
    cell.product.kernel = AscendProduct()
    network = Scaled(cell)
    with dumped(tmp_path), pytest.raises(RuntimeError, match="WeightQuantBatchMatmul"):
        ms.value_and_grad(network, None, [network.factor])(Tensor(np.ones((4, 12), np.float32)))
    operators = [node.operator for node in final_nodes(tmp_path) if "Mat" in node.operator]
    assert operators == ["WeightQuantBatchMatmul", "MatMul"]


def test_half_precision(rng):
    cell, weight = of(rng, CONFIGS[2].form, compute_dtype=ms.float16, bias=False)
    x = rng.normal(size=(4, 12)).astype(np.float32)
    assert cell(Tensor(x)).dtype == ms.float32
    np.testing.assert_allclose(cell(Tensor(x)).asnumpy(), x @ weight.T, atol=0.02)


METHODS = {
    "lora": LoraConfig(r=2, init_lora_weights=False),
    "dora": LoraConfig(r=2, use_dora=True, lora_dropout=0.0),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa"),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=100),
    "ia3": IA3Config(feedforward_modules=["mlp.2"]),
    "vera": VeraConfig(r=4),
    "hira": HiraConfig(r=2),
    "miss": MissConfig(r=2),
    "bat": MissConfig(r=2, init_weights="bat"),
    "oft": OFTConfig(oft_block_size=2),
    "loha": LoHaConfig(r=2),
    "lokr": LoKrConfig(r=2),
    "adapter": BottleneckConfig(bottleneck_size=4),
    "low_rank_adapter": LowRankAdapterConfig(reduction_factor=2, low_rank_size=1),
    "compacter": CompacterConfig(reduction_factor=2, phm_dim=2),
    "bitfit": BitFitConfig(),
}


class Two(nn.Cell):
    """Linear layers that are quantised, and a head."""

    def __init__(self):
        super().__init__()
        self.query = nn.Dense(8, 8, activation="tanh")
        self.mlp = nn.SequentialCell(nn.Dense(8, 8), nn.ReLU(), nn.Dense(8, 8, has_bias=False))
        self.classifier = nn.Dense(8, 3)

    def construct(self, x):
        hidden = self.query(x)
        return self.classifier(hidden + self.mlp(hidden))


def two(rng, config=None):
    """The network with seeded values: quantised, or in float32 with the same weights."""
    network, coded = Two(), Two()
    for param, other in zip(network.get_parameters(), coded.get_parameters()):
        value = rng.normal(size=param.shape).astype(np.float32)
        param.set_data(Tensor(value))
        other.set_data(Tensor(value))
    quantize(coded, config)
    for one, other in zip((network.query, network.mlp[0], network.mlp[2]), (coded.query, coded.mlp[0], coded.mlp[2])):
        one.weight.set_data(Tensor(other.dequantized()))
    return network, coded


# To compile takes time: in graph mode those that differ in how they come to the weight.
IN_GRAPH_MODE = ("dora", "hira")
RUNS = [(name, ms.PYNATIVE_MODE) for name in METHODS] + [(name, ms.GRAPH_MODE) for name in IN_GRAPH_MODE]


@pytest.mark.parametrize("method, run_mode", RUNS)
def test_every_method_does_what_it_does_with_the_weights_in_float32(method, run_mode, rng):
    ms.set_context(mode=run_mode)
    models, x, outputs = [], Tensor(rng.normal(size=(4, 8)).astype(np.float32)), []
    for network in two(rng, CONFIGS[2]):
        config = copy.deepcopy(METHODS[method])
        if hasattr(config, "target_modules"):
            config.target_modules = ["query", "mlp.0", "mlp.2"]
        models.append(get_peft_model(network, config))
        values = np.random.default_rng(3)
        for param in models[-1].trainable_params():
            moved = param.asnumpy() if method == "pissa" else 0.3 * values.normal(size=param.shape) + (method == "ia3")
            param.set_data(Tensor(moved.astype(np.float32)))
    for model in models:
        loss = nn.WithLossCell(model, nn.CrossEntropyLoss())
        params = model.trainable_params()
        value, gradients = ms.value_and_grad(loss, None, params)(x, Tensor(np.arange(4, dtype=np.int32) % 3))
        outputs.append([value.asnumpy(), numbers(model.set_train(False), x), *(one.asnumpy() for one in gradients)])
    for one, other in zip(*outputs):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    model, tuned = models[1], outputs[1][1]
    try:
        merged = model.merge_and_unload()
    except MergeError as error:
        assert "cannot be folded into weights" in str(error)
        return
    np.testing.assert_allclose(numbers(merged, x), tuned, rtol=1e-4, atol=1e-4)
    if method != "bitfit":
        assert merged.query.weight.dtype == ms.float32 and not merged.query.is_quantized


def test_a_prompt_of_an_attention_takes_keys_of_quantised_layers(rng):
    outputs, values = [], rng.normal(size=(2, 3, 8)).astype(np.float32)
    for coded in (False, True):
        ms.set_seed(1)
        attention = SelfAttention(BertConfig(hidden_size=8, num_attention_heads=2, attention_probs_dropout_prob=0.0))
        network = nn.SequentialCell(attention)
        weights = np.random.default_rng(5)
        for param in attention.get_parameters():
            param.set_data(Tensor(weights.normal(size=param.shape).astype(np.float32)))
        layers = [attention.query, attention.key, attention.value]
        if coded:
            quantize(network, CONFIGS[2])
        for layer in () if coded else layers:
            arrays = quantize_matrix(layer.weight.asnumpy(), CONFIGS[2].form)
            layer.weight.set_data(Tensor(dequantize_matrix(arrays, CONFIGS[2].form)))
        model = get_peft_model(network, AdaptionPromptConfig(target_modules="0", adapter_len=2, adapter_layers=1))
        moved = np.random.default_rng(6)
        for param in model.trainable_params():
            param.set_data(Tensor(moved.normal(size=param.shape).astype(np.float32)))
        outputs.append(attention(Tensor(values), Tensor(np.zeros((2, 1, 1, 3), np.float32)), None).asnumpy())
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def small(seed=1):
    """A quantised network."""
    np.random.seed(seed)
    ms.set_seed(seed)
    network = Small()
    return network, quantize(network, QuantizationConfig("int8", target_modules=LINEAR))


def test_the_life_of_an_adapter_on_a_quantised_base(mode, rng, tmp_path):
    network, report = small()
    x = ids(rng)
    base, before = numbers(network, x), contents(network)
    assert [row.path for row in report] == ["query", "mlp.0", "mlp.2", "turned", "blocks.0.shared"]
    assert str(report[0]).startswith("query: int8, 256 to 96 bytes, error up to 0.00")
    assert isinstance(network.by_hand[0], QuantizedDense)  # the same object as before
    model = get_peft_model(network, LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    tuned = numbers(model, x)
    assert all(np.isfinite(tuned).ravel()) and np.abs(tuned - base).max() > 1e-2
    twin = copy.deepcopy(model)
    same(numbers(twin, x), tuned)
    model.save_pretrained(tmp_path / "adapter")
    for _ in range(2):
        model.merge_adapter()
        np.testing.assert_allclose(numbers(model, x), tuned, atol=1e-5)
        assert {row.dtype for row in model.merge_report} == {"float32"}
        model.unmerge_adapter()
        same(numbers(model, x), tuned)
    assert contents(model.unload()) == before
    same(numbers(network, x), base)
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    for load in (lambda net, file: ms.load_checkpoint(file, net, format="safetensors"), load_delta):
        other, _ = small(2)
        numbers(other, x)
        load(other, str(tmp_path / "base.safetensors"))
        same(numbers(other, x), base)
        again = PeftModel.from_pretrained(other, tmp_path / "adapter")
        same(numbers(again, x), tuned)
    merged = again.merge_and_unload()
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)
    assert set(Small().parameters_dict()) - set(merged.parameters_dict()) == {"turned.table", "turned.shift"}
    other, _ = small(3)
    with pytest.raises(CheckpointError, match="(?s)trained on another base.*query.weight: other values"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_a_merge_that_fails_leaves_codes(rng):
    network, _ = small()
    model, x = get_peft_model(network, LoraConfig(r=2, target_modules=LINEAR)), ids(rng)
    base = numbers(model, x)
    model.trainable_params()[0].set_data(Tensor(np.full((2, 8), np.nan, np.float32)))
    with pytest.raises(MergeError, match="NaN"):
        model.merge_adapter()
    assert network.query.is_quantized and network.turned.is_quantized
    model.trainable_params()[0].set_data(Tensor(np.zeros((2, 8), np.float32)))
    same(numbers(model, x), base)


def test_training_and_freezing(rng):
    network, _ = small()
    x, labels = ids(rng), Tensor(np.arange(4, dtype=np.int32) % 3)
    model = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=LINEAR))
    codes = [network.query.weight.asnumpy().copy(), network.query.weight_scale.asnumpy().copy()]
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), nn.Adam(model.trainable_params(), 0.02))
    losses = [float(step.set_train()(x, labels).asnumpy()) for _ in range(6)]
    assert losses[-1] < losses[0]
    for before, now in zip(codes, (network.query.weight, network.query.weight_scale)):
        np.testing.assert_array_equal(before, now.asnumpy())


def test_codes_never_train(rng):
    network, _ = small()
    freeze_modules(network, exclude=["*"])
    frozen = {name for name, param in network.parameters_dict().items() if not param.requires_grad}
    assert frozen == {f"{path}.weight{end}" for path in LINEAR[:4] + ["blocks.0.shared"] for end in ("", "_scale")}
    with pytest.raises(NoMatchError, match="query.weight_scale.*quantised weights, which no optimizer may have"):
        freeze_modules(network, exclude=["query.weight_scale"])
    with pytest.raises(ConfigError, match=r"\['query'\] are to be trained as a whole, but have quantised weights"):
        get_peft_model(network, LoraConfig(r=2, target_modules=["mlp.0"], modules_to_save=["query"]))
    with pytest.raises(NoMatchError, match="no layer has a frozen weight"):
        network = nn.SequentialCell(nn.Dense(8, 8))
        quantize(network, CONFIGS[0])
        get_peft_model(network, LoraConfig(r=2, target_modules=["0"]), frozen_dtype=ms.float16)


def test_bytes(rng):
    network = Two()
    before = summary(network).weight_bytes
    report = quantize(network, CONFIGS[2])
    after = summary(network).weight_bytes
    assert before - after == sum(row.bytes_before - row.bytes_after for row in report)
    # 64 codes of half a byte, 16 scales, and a block of them with two float32
    assert [row.bytes_after for row in report] == [32 + 16 + 8] * 3


def test_what_cannot_be_quantised(rng):
    class Odd(nn.Cell):
        def __init__(self):
            super().__init__()
            self.narrow, self.half, self.broken = nn.Dense(6, 8), nn.Dense(8, 8).to_float(ms.float16), nn.Dense(8, 8)
            self.broken.weight.set_data(Tensor(np.full((8, 8), np.inf, np.float32)))
            self.conv = nn.Conv2d(1, 4, 3)

    network = Odd()
    before = contents(network)
    text = (
        "quantize: narrow has 6 input features, which is no multiple of group_size, 4; half computes in another type "
        "by to_float.*; broken has NaN or infinite numbers"
    )
    with pytest.raises(ConfigError, match=text):
        quantize(network, CONFIGS[2])
    with pytest.raises(ConfigError, match=r"of a type that cannot carry it: \['conv"):
        quantize(network, QuantizationConfig(target_modules=["conv"]))
    with pytest.raises(NoMatchError, match="no layer matches 'brokem'; near: \\['broken'\\]"):
        quantize(network, QuantizationConfig(target_modules=["brokem"]))
    assert contents(network) == before
    with pytest.raises(
        ConfigError, match=r"head has its weight in common with \['embed.embedding_table'\]|head.weight"
    ):
        quantize(Tied(), QuantizationConfig("int8", target_modules=["head"]))
    network, _ = small()
    with pytest.raises(ConfigError, match="of a type that cannot carry it"):  # twice
        quantize(network, QuantizationConfig("int8", target_modules=["query"]))
    get_peft_model(network, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigError, match="query carries a delta of an adapter; quantise before get_peft_model"):
        quantize(network, QuantizationConfig("int8", target_modules=["classifier"]))


def test_wrong_arguments():
    with pytest.raises(TypeError) as error:
        QuantizationConfig(bits=8, group_size=0.5, double_quant=1, target_modules=None, compute_dtype=ms.int8)
    for name in ("bits", "group_size", "double_quant", "target_modules", "compute_dtype"):
        assert f"'{name}' must be" in str(error.value)
    for arguments in ({"bits": "fp4"}, {"group_size": 3}, {"group_size": -2}):
        with pytest.raises(ValueError, match=f"'{next(iter(arguments))}' must be"):
            QuantizationConfig(**arguments)
        with pytest.raises(ValueError, match=f"'{next(iter(arguments))}' must be"):
            QuantizedDense(12, 6, **arguments)
    with pytest.raises(ValueError, match="'group_size' must be a divisor of 'in_channels', but got 64"):
        QuantizedDense(12, 6)
    with pytest.raises(TypeError, match="'network' must be a Cell"):
        quantize(None)
    with pytest.raises(TypeError, match="'config' must be a QuantizationConfig"):
        quantize(Two(), {"bits": "nf4"})
    with pytest.raises(ValueError, match="'strategy_matmul' must be one whose slices have whole groups and blocks"):
        QuantizedDense(12, 6, group_size=4).shard(((1, 2), (1, 2)))


def test_formats_are_not_mistaken(rng, tmp_path):
    """Checkpoints of another format do not load."""
    file = str(tmp_path / "coded.safetensors")
    for index, config in enumerate(CONFIGS):
        ms.save_checkpoint(two(rng, config)[1], file, format="safetensors")
        for other in CONFIGS[:index] + CONFIGS[index + 1 :]:
            network = two(rng, other)[1]
            with pytest.raises(CheckpointError, match="query.weight"):
                load_delta(network, file)


def test_a_hand_made_layer(rng):
    """In a network that is written with it."""
    network = nn.SequentialCell(of(rng, CONFIGS[2].form)[0], nn.Dense(6, 6))
    network = nn.SequentialCell(network, nn.Dense(6, 3))
    with pytest.raises(NoMatchError):
        freeze_delta(network, "lora")
    assert network(Tensor(np.ones((2, 12), np.float32))).shape == (2, 3)
    assert "bits=nf4, group_size=4, double_quant=True" in str(network)
