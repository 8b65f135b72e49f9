"""Several methods in one adapter."""

import json
import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.llama import LlamaForCausalLM
from small import Tiny, contents, ids, move, numbers, same

from mindpet.delta import AdapterLayer, LoRADense, PrefixLayer
from mindpet.errors import AdapterError, CheckpointError, ConfigError, MergeError, NoMatchError
from mindpet.files.convert import convert, inspect, load_config
from mindpet.files.merge import merge
from mindpet.files.names import NameMap
from mindpet.graph import freeze_delta, load_delta
from mindpet.peft import (
    BitFitConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    UnionConfig,
    VeraConfig,
    get_peft_config,
    get_peft_model,
    mam_config,
    plan_targets,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LORA = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, lora_alpha=6)
IA3 = IA3Config(target_modules=["classifier"], feedforward_modules=[])
TENSORS = "adapter_model.safetensors"


def llama():
    return LlamaForCausalLM.from_pretrained(GOLDEN / "llama")


def mam(**fields):
    return mam_config(["mlp"], **{"num_virtual_tokens": 3, "bottleneck_size": 5, **fields})


def words(rng):
    return Tensor(rng.integers(0, 48, (2, 6)).astype(np.int32))


def test_the_paper_counts_the_parameters_of_mam():
    config = mam_config(["mlp"])
    prefix, beside = config.parts
    assert (prefix.num_virtual_tokens, beside.bottleneck_size, beside.scale, beside.form) == (30, 512, 4.0, "parallel")
    model = get_peft_model(llama(), mam())  # two layers of 32 features, two key and value heads of 8
    prefixes, adapters = 2 * (3 * 2 * 16), 2 * (32 * 5 + 5 + 5 * 32 + 32)
    assert sum(param.size for param in model.trainable_params()) == prefixes + adapters
    assert {target.config.peft_name for target in plan_targets(model.unload(), mam()).targets} == {
        "PREFIX_TUNING",
        "ADAPTER",
    }


@pytest.mark.parametrize("fields", [{}, {"prefix_projection": True, "encoder_hidden_size": 6}], ids=["", "projected"])
def test_mam_is_both_methods_at_once(fields, mode, rng, tmp_path):
    network, x = llama(), words(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, mam(**fields))
    move(model, 1)
    trained = numbers(model, x)
    with model.disable_adapter():
        same(numbers(model, x), base)
    same(numbers(model, x), trained)
    model.save_pretrained(tmp_path)
    tensors = model.adapter_tensors("default")
    assert len(tensors) == 1 + 2 * 4 and tensors["prompt_embeddings"].shape == (3, 2 * 2 * 16)
    assert contents(model.unload()) == before

    loaded = PeftModel.from_pretrained(network, tmp_path)
    np.testing.assert_allclose(numbers(loaded, x), trained, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    for file in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()
    # Each of the methods alone gives other numbers.
    for part in loaded.peft_config["default"].computed().parts:
        alone = get_peft_model(llama(), part)
        keys = alone.adapter_tensors("default").keys()
        alone.set_adapter_tensors("default", {key: tensors[key] for key in keys})
        assert np.abs(numbers(alone, x) - trained).max() > 1e-3
    with pytest.raises(MergeError, match="'default' is of PREFIX_TUNING and ADAPTER, which cannot be folded"):
        loaded.merge_adapter()
    with pytest.raises(AdapterError, match="'default' cannot share a batch"):
        loaded(x, adapter_names=["default", "default"])


def test_training_moves_the_parameters_of_both(mode, rng):
    model, x = get_peft_model(llama(), mam(modules_to_save=["lm_head"])), words(rng)

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__()
            self.network = model

        def construct(self, x):
            return self.network(x).square().mean()

    before = [param.asnumpy().copy() for param in model.trainable_params()]
    step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), 0.01)).set_train()
    losses = [float(step(x).asnumpy()) for _ in range(3)]
    assert losses[-1] < losses[0]
    names = [param.name for param in model.trainable_params()]
    assert all(np.abs(param.asnumpy() - old).max() > 0 for param, old in zip(model.trainable_params(), before))
    assert all(any(what in name for name in names) for what in ("prefix", "adapter", "lm_head"))


def test_what_is_linear_is_merged_together(mode, rng, tmp_path):
    network, x = Tiny(), ids(rng)
    ms.save_checkpoint(network, str(tmp_path / "base.ckpt"))
    model = get_peft_model(network, UnionConfig(configs=[LORA, IA3]))
    move(model, 2)
    trained = numbers(model, x)
    query, classifier = network.query.mindpet_delta, network.classifier.mindpet_delta
    a, b = query.mindpet_delta_lora_a.asnumpy(), query.mindpet_delta_lora_b.asnumpy()
    hidden = numbers(network.embed, x)
    hidden = hidden @ (network.query.weight.asnumpy() + 3 * b @ a).T + network.query.bias.asnumpy()
    out = hidden.mean(1) @ network.classifier.weight.asnumpy().T + network.classifier.bias.asnumpy()
    np.testing.assert_allclose(trained, out * classifier.mindpet_delta_ia3.asnumpy()[:, 0], atol=1e-5)
    model.merge_adapter()
    np.testing.assert_allclose(numbers(model, x), trained, atol=1e-5)
    model.unmerge_adapter()
    same(numbers(model, x), trained)
    model.add_adapter("lora", LORA)
    mixed = model(x, adapter_names=["default", "__base__", "default", "lora"]).asnumpy()
    np.testing.assert_allclose(mixed[[0, 2]], trained[[0, 2]], atol=1e-5)

    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "merged.ckpt")
    other = Tiny()
    ms.load_checkpoint(str(tmp_path / "merged.ckpt"), other)
    np.testing.assert_allclose(numbers(other, x), trained, atol=1e-5)
    text = inspect(tmp_path / "adapter")
    assert "LORA, rank 2, 1 layers" in text and "IA3" in text


class ByHand(nn.Cell):
    """Layers of several methods, made by hand."""

    def __init__(self):
        super().__init__()
        self.query, self.adapter = LoRADense(4, 4, 2, 6), AdapterLayer(4, 3)
        self.prefix_encoder = PrefixLayer(3, 1, 2, 4, embed_dim=4, mid_dim=4)


def test_freeze_delta_of_several_modes():
    network = ByHand()
    freeze_delta(network, ["lora", "Prefix"])
    names = {param.name for param in network.trainable_params()}
    assert {"query.mindpet_delta_lora_a", "query.mindpet_delta_lora_b"} < names
    assert any("prefix" in name for name in names) and not any("adapter" in name for name in names)
    flags = [param.requires_grad for param in network.get_parameters()]
    with pytest.raises(NoMatchError, match="mode 'ia3' finds no parameter like"):
        freeze_delta(network, ["adapter", "ia3"])
    with pytest.raises(ValueError, match="'mode' must be one of .* got 'other'"):
        freeze_delta(network, ["adapter", "other"])
    with pytest.raises(ValueError, match=r"'mode' must be one of .* got \[\]"):
        freeze_delta(network, [])
    assert [param.requires_grad for param in network.get_parameters()] == flags


def test_conversion_both_ways(rng, tmp_path):
    network, x = llama(), words(rng)
    model = get_peft_model(network, mam(modules_to_save=["lm_head"]))
    move(model, 3)
    trained = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors")
    sizes = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(mam(modules_to_save=["lm_head"], **sizes).to_json())
    convert(tmp_path / "delta.safetensors", tmp_path / "back", load_config(tmp_path / "config.json"))
    same_tensors = model.adapter_tensors("default")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "back")
    assert loaded.adapter_tensors("default").keys() == same_tensors.keys()
    np.testing.assert_allclose(numbers(loaded, x), trained, atol=1e-5)

    network = get_peft_model(Tiny(), UnionConfig(configs=[LORA, VeraConfig(r=3, target_modules=["classifier"])]))
    move(network, 1)
    network.save_pretrained(tmp_path / "two")
    convert(tmp_path / "two", tmp_path / "two.ckpt")
    fresh = get_peft_model(Tiny(), network.peft_config["default"])
    load_delta(fresh, tmp_path / "two.ckpt")
    theirs = network.adapter_tensors("default")
    assert all(np.array_equal(value, theirs[key]) for key, value in fresh.adapter_tensors("default").items())


def test_a_file_must_say_what_each_method_needs(tmp_path):
    model = get_peft_model(Tiny(), UnionConfig(configs=[LORA, IA3]))
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [one["peft_type"] for one in content["configs"]] == ["LORA", "IA3"]
    assert PeftConfig.from_pretrained(tmp_path).parts[0].r == 2
    del content["configs"][0]["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"'r' is missing \(a configuration of UNION\)"):
        convert(tmp_path, tmp_path / "d.ckpt", force=True)


def test_wrong_unions():
    for configs in ([], [LORA], None, [LORA, "IA3"], [LORA, UnionConfig(configs=[LORA, IA3])]):
        with pytest.raises(TypeError, match="'configs' must be a list of at least two configurations"):
            UnionConfig(configs=configs)
    with pytest.raises(ValueError, match="'configs' must be of different methods"):
        UnionConfig(configs=[LORA, LORA])
    with pytest.raises(ValueError, match="at most one of them a prefix or a prompt"):
        UnionConfig(configs=[PrefixTuningConfig(num_virtual_tokens=2), PromptTuningConfig(num_virtual_tokens=2)])
    with pytest.raises(ValueError, match=r"'configs \(LORA\)' must be given once, to the UnionConfig"):
        UnionConfig(configs=[LoraConfig(modules_to_save=["classifier"]), IA3])
    with pytest.raises(ConfigError, match="'peft_type' must be one of .* got 'NONE'"):
        get_peft_config({"peft_type": "UNION", "configs": [{"peft_type": "NONE"}]})
    with pytest.raises(ConfigError, match="query would have two deltas, of LORA too"):
        plan_targets(Tiny(), UnionConfig(configs=[LORA, IA3Config(target_modules=["query"], feedforward_modules=[])]))
    with pytest.raises(NoMatchError, match="no layer matches 'nowhere'(.|\n)*no layer matches 'neither'"):
        plan_targets(
            Tiny(),
            UnionConfig(configs=[LoraConfig(target_modules=["nowhere"]), BottleneckConfig(target_modules=["neither"])]),
        )
    names = NameMap(fused={"query": {"q": 4, "k": 4}})
    model = get_peft_model(Tiny(), UnionConfig(configs=[LORA, BitFitConfig()]), name_map=names)
    with pytest.raises(CheckpointError, match=r"'fused' is for LoRA; UNION has deltas of \['query'\]"):
        model.adapter_tensors("default")
