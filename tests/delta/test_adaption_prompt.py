"""LLaMA-Adapter."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.gpt2 import Conv1D
from models.llama import LlamaConfig, LlamaForCausalLM

from mindpet.delta import AdaptionPrompt
from mindpet.errors import AdapterError, ConfigError
from mindpet.files.names import NameMap
from mindpet.graph import freeze_delta
from mindpet.peft import AdaptionPromptConfig, PeftConfig, PeftModel, get_peft_model, plan_targets

HIDDEN, HEADS, KV_HEADS, DIM, LENGTH = 6, 4, 2, 3, 5


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layers_of(name, rng):
    """Layers of key and value, and the weights and biases of both: `(kv_heads * head_dim, hidden)`."""
    width, query = KV_HEADS * DIM, HEADS * DIM
    if name == "fused":
        layers = [Conv1D(HIDDEN, query + 2 * width)]
    else:
        layers = [nn.Dense(HIDDEN, width, has_bias=name == "bias") for _ in range(2)]
    for layer in nn.CellList(layers):
        for param in layer.get_parameters():
            param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    if name == "fused":
        weight, bias = layers[0].weight.asnumpy().T, layers[0].bias.asnumpy()
        return layers, *((weight[at : at + width], bias[at : at + width]) for at in (query, query + width))
    biases = [layer.bias.asnumpy() if layer.has_bias else 0 for layer in layers]
    return layers, *((layer.weight.asnumpy(), bias) for layer, bias in zip(layers, biases))


@pytest.mark.parametrize("name", ["plain", "bias", "fused"])
def test_the_formula(name, mode, rng):
    layers, (key, key_bias), (value, value_bias) = layers_of(name, rng)
    cell = AdaptionPrompt(layers, HEADS, DIM, KV_HEADS, LENGTH, compute_dtype=ms.float32)
    query, context = rng.normal(size=(2, 2, HEADS, 7, DIM)).astype(np.float32)
    np.testing.assert_array_equal(cell(None, Tensor(query), Tensor(context)).asnumpy(), context)
    prompt = cell.mindpet_delta_adaption_prompt.asnumpy()[0]
    assert prompt.shape == (LENGTH, HIDDEN) and 0.5 < prompt.std() < 1.5
    cell.mindpet_delta_adaption_prompt_gate.set_data(Tensor(np.array([0.7], np.float32)))
    k, v = (
        (prompt @ weight.T + bias).reshape(LENGTH, KV_HEADS, DIM).transpose(1, 0, 2).repeat(HEADS // KV_HEADS, 0)
        for weight, bias in ((key, key_bias), (value, value_bias))
    )
    delta = 0.7 * softmax(query @ k.transpose(0, 2, 1) / np.sqrt(DIM)) @ v
    np.testing.assert_allclose(cell(None, Tensor(query), Tensor(context)).asnumpy(), context + delta, atol=1e-5)
    behind = [x.transpose(0, 2, 1, 3).reshape(2, 7, HEADS * DIM) for x in (context, delta)]
    np.testing.assert_allclose(cell(None, Tensor(query), Tensor(behind[0])).asnumpy(), sum(behind), atol=1e-5)


@pytest.mark.parametrize("dtype", [ms.float16, ms.float32, ms.bfloat16])
def test_types(dtype, rng):
    cell = AdaptionPrompt(layers_of("bias", rng)[0], HEADS, DIM, KV_HEADS, LENGTH, dtype)
    assert {param.dtype for param in cell.get_parameters() if "mindpet" in param.name} == {dtype}
    query = Tensor(rng.normal(size=(2, HEADS, 7, DIM)), ms.float16)
    out = cell(None, query, query)
    assert out.dtype == ms.float16
    np.testing.assert_array_equal(out.asnumpy(), query.asnumpy())


class ByHand(nn.Cell):
    """An attention's layers, and an adaption prompt."""

    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Dense(HIDDEN, 6), nn.Dense(HIDDEN, 6)
        self.adaption = AdaptionPrompt((self.key, self.value), 2, 3)


def test_names_of_the_base_stay_and_only_the_adapter_trains():
    network = ByHand()
    names = ["mindpet_delta_adaption_prompt", "mindpet_delta_adaption_prompt_gate"]
    own = [f"adaption.{name}" for name in names]
    base = ["key.weight", "key.bias", "value.weight", "value.bias"]
    assert [param.name for param in network.get_parameters()] == [*base, *own]
    outer = nn.SequentialCell(network)
    assert [param.name for param in outer.get_parameters()] == [f"0.{name}" for name in (*base, *own)]
    freeze_delta(outer, "adaption_prompt")
    assert [param.name for param in outer.trainable_params()] == [f"0.{name}" for name in own]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"heads": 0, "adapter_len": -1}, ValueError, "'heads'.*'adapter_len'"),
        ({"head_dim": 1.5}, TypeError, "'head_dim'"),
        ({"param_init_type": ms.int32}, (TypeError, ValueError), "'param_init_type'"),
        ({"kv_heads": 3}, ValueError, "4 heads are no multiple of 3 key and value heads"),
        ({"layers": []}, ValueError, "the layers of key and value, or one of query, key and value"),
        ({"layers": [nn.ReLU()]}, ValueError, "ReLU: it is none"),
        ({"layers": [nn.Dense(6, 6), nn.Dense(6, 5)]}, ValueError, r"must have 6 outputs, but have \[6, 5\]"),
        ({"layers": [nn.Dense(6, 6)]}, ValueError, r"must have 24 outputs, but have \[6\]"),
        ({"layers": [nn.Dense(6, 6), nn.Dense(5, 6)]}, ValueError, r"have other inputs, \[6, 5\]"),
    ],
)
def test_wrong_arguments(changes, error, message):
    arguments = {"layers": [nn.Dense(6, 6), nn.Dense(6, 6)], "heads": HEADS, "head_dim": DIM, "kv_heads": KV_HEADS}
    with pytest.raises(error, match=message):
        AdaptionPrompt(**{**arguments, **changes})


def test_heads_that_cannot_be_cut(rng):
    cell = AdaptionPrompt(layers_of("bias", rng)[0], HEADS, DIM, KV_HEADS)
    with pytest.raises(ConfigError, match="2 key and value heads cannot be cut in 4 slices"):
        cell.shard(1, 4)
    with pytest.raises(ConfigError, match="one layer of query and key has strategies"):
        AdaptionPrompt(layers_of("fused", rng)[0], HEADS, DIM, KV_HEADS).shard(2, 1)


def llama(layers=3, **fields):
    """A tiny LLaMA."""
    shape = dict(vocab_size=12, hidden_size=8, intermediate_size=8, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **shape, **fields)).set_train(False)


def config(**fields):
    return AdaptionPromptConfig(**{"target_modules": "self_attn", "adapter_len": 2, "adapter_layers": 1, **fields})


@pytest.mark.parametrize(
    "fields, numbers",
    [
        ({}, [2]),
        ({"adapter_layers": 2}, [1, 2]),
        ({"target_modules": None, "adapter_layers": 3}, [0, 1, 2]),
        ({"target_modules": r".*\.[01]\.self_attn"}, [1]),
        ({"target_modules": ["layers.0.self_attn"]}, [0]),
        ({"layers_to_transform": [0, 1]}, [1]),
    ],
)
def test_the_last_attentions_have_it(fields, numbers):
    paths = [target.path for target in plan_targets(llama(), config(**fields)).targets]
    assert paths == [f"model.layers.{number}.self_attn" for number in numbers]


def without_layers(network):
    network.model.layers[1].self_attn.key_value_layers = None
    network.model.layers[2].self_attn.key_value_layers = ("k_proj", "rotary")


@pytest.mark.parametrize(
    "fields, change, message",
    [
        ({"adapter_layers": 4}, None, "'adapter_layers' is 4, but there are 3 attentions"),
        ({"adapter_layers": None, "adapter_len": None}, None, "'adapter_len' must be .*; 'adapter_layers' must be"),
        ({"target_modules": ["q_proj"]}, None, r"cannot carry it: .*q_proj \(Dense\)"),
        (
            {"adapter_layers": 2},
            without_layers,
            "1.self_attn: its 'key_value_layers' must name its .* None; .*2.self_attn: .*Rotary: it is none",
        ),
    ],
)
def test_what_is_refused(fields, change, message):
    network = llama()
    if change:
        change(network)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(network, config(**fields))
    assert not [param.name for param in network.get_parameters() if "mindpet" in param.name]


def test_the_file_says_what_hugging_face_peft_understands(tmp_path):
    content = config().to_dict()
    assert content["target_modules"] == "self_attn"
    assert set(content) == {
        "adapter_layers",
        "adapter_len",
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
    config().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config()
    for fields, name in (
        ({"exclude_modules": ["layers.0.self_attn"]}, "self_attn"),
        ({"layers_to_transform": 0}, None),
    ):
        model = get_peft_model(llama(), config(**fields))
        model.save_pretrained(tmp_path)
        saved = PeftConfig.from_pretrained(tmp_path)
        assert saved.exclude_modules is saved.layers_to_transform is None
        if name:
            assert saved.to_dict()["target_modules"] == name
        again = PeftModel.from_pretrained(llama(), tmp_path, force=True)
        assert list(again.get_base_model().parameters_dict()) == list(model.get_base_model().parameters_dict())


def test_names_of_another_model(tmp_path):
    names = NameMap(lambda name: f"base.{name}", lambda name: name[len("base.") :])
    get_peft_model(llama(), config(), name_map=names).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict()["target_modules"] == "self_attn"
    loaded = PeftModel.from_pretrained(llama(), tmp_path, name_map=names, force=True)
    assert loaded.peft_config["default"].adapter_layers == 1


def disturb(model, rng):
    for param in model.trainable_params():
        param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))


IDS = Tensor([[1, 2, 3, 4], [5, 6, 7, 8]], ms.int32)


def test_a_trained_copy_of_the_key_layer_is_that_of_the_prompt(rng):
    network, plain = llama(attention_bias=True), llama(attention_bias=True)
    ms.load_param_into_net(plain, network.parameters_dict())
    model = get_peft_model(network, config(modules_to_save=["2.self_attn.k_proj"]))
    disturb(model, rng)
    other = get_peft_model(plain, config())
    attention, theirs = (one.model.layers[2].self_attn for one in (network, plain))
    for name in ("mindpet_delta_adaption_prompt", "mindpet_delta_adaption_prompt_gate"):
        getattr(theirs.context_source, name).set_data(getattr(attention.context_source, name))
    for name in ("weight", "bias"):
        theirs.k_proj._params[name].set_data(getattr(attention.k_proj, name))
    np.testing.assert_allclose(model(IDS).asnumpy(), other(IDS).asnumpy(), atol=1e-5)


def test_nan_disable_and_mixed_batches(rng):
    network = llama()
    base = network(IDS).asnumpy()
    model = get_peft_model(network, config(adapter_layers=3))
    disturb(model, rng)
    model.add_adapter("more", config(adapter_len=3))
    trained = model(IDS).asnumpy()
    assert np.abs(trained - base).max() > 1e-3
    with pytest.raises(AdapterError, match="'default' cannot share a batch"):
        model(IDS, adapter_names=["default", "__base__"])
    model.set_adapter("more")
    np.testing.assert_array_equal(model(IDS).asnumpy(), base)
    model.set_adapter("default")
    np.testing.assert_array_equal(model(IDS).asnumpy(), trained)
    for param in model.trainable_params():
        param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    with model.disable_adapter():
        np.testing.assert_array_equal(model(IDS).asnumpy(), base)
    assert np.isnan(model(IDS).asnumpy()).all()


@pytest.mark.parametrize(
    "fields, message", [({}, None), ({"adapter_len": 3}, "'adapter_len' is 3, but 2 in the tensors")]
)
def test_sizes_that_a_delta_file_tells(fields, message):
    told, path = AdaptionPromptConfig(**fields), "model.layers.2.self_attn"
    shapes = {path: {"mindpet_delta_adaption_prompt": (1, 2, 8), "mindpet_delta_adaption_prompt_gate": (1,)}}
    if message:
        with pytest.raises(ConfigError, match=message):
            told.of_delta_file(shapes, {})
    else:
        assert told.of_delta_file(shapes, {})[0] == config()
