"""Prefixes: keys and values in front of those of every attention of a network."""

import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.bert import BertClassifier, BertConfig
from models.llama import LlamaForCausalLM
from small import Small, contents, move, numbers, same

from mindpet.errors import AdapterError, ConfigError, MergeError
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.peft import PeftModel, PrefixTuningConfig, Ptuning2Config, get_peft_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CONFIGS = {
    "table": PrefixTuningConfig(num_virtual_tokens=3),
    "projection": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
    "ptuning2": Ptuning2Config(num_virtual_tokens=3),
    "ptuning2 projection": Ptuning2Config(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
}


def llama():
    return LlamaForCausalLM.from_pretrained(GOLDEN / "llama")


def ids(rng):
    return Tensor(rng.integers(0, 48, (2, 6)).astype(np.int32))


@pytest.mark.parametrize("name", list(CONFIGS))
def test_save_load_disable_and_unload(name, mode, rng, tmp_path):
    network, x = llama(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, CONFIGS[name])
    config = model.peft_config["default"]
    assert (config.num_layers, config.num_attention_heads, config.token_dim) == (2, 2, 16)
    move(model, 1)
    expected = numbers(model, x)
    assert np.abs(expected - base).max() > 1e-3
    with model.disable_adapter():
        same(numbers(model, x), base)
    same(numbers(model, x), expected)
    model.save_pretrained(tmp_path)
    assert TensorFile(tmp_path / "adapter_model.safetensors").shapes == {"prompt_embeddings": (3, 2 * 2 * 16)}
    assert model.unload() is network
    same(numbers(network, x), base)
    assert contents(network) == before
    loaded = PeftModel.from_pretrained(network, tmp_path)
    # A file has what NumPy computes of a projection, and not the network, whose tanh is less exact on a CPU.
    np.testing.assert_allclose(numbers(loaded, x), expected, atol=1e-5)
    assert loaded.peft_config["default"].prefix_projection == CONFIGS[name].prefix_projection
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_two_prefixes_of_one_shape_switch_and_train(mode, rng):
    model, x = get_peft_model(llama(), CONFIGS["table"]), ids(rng)
    move(model, 1)
    first = numbers(model, x)
    model.add_adapter("two", CONFIGS["table"])
    model.set_adapter("two")
    labels = Tensor(rng.integers(0, 48, (2 * 6,)).astype(np.int32))

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model, self.loss = model, nn.CrossEntropyLoss()

        def construct(self, ids):
            return self.loss(self.model(ids).reshape(-1, 48), labels)

    step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), 0.1)).set_train()
    losses = [float(step(x).asnumpy()) for _ in range(5)]
    assert losses[-1] < losses[0]
    model.set_adapter("default")
    same(numbers(model.set_train(False), x), first)


def test_types_are_kept(mode, rng, tmp_path):
    model, x = get_peft_model(llama(), CONFIGS["table"]), ids(rng)
    move(model, 1)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    half = {name: value.astype(np.float16) for name, value in TensorFile(path).read_all().items()}
    (tmp_path / "mindpet_passport.json").unlink()  # it is not the file that was saved
    save_tensors(path, half)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert {param.dtype for param in loaded.trainable_params()} == {ms.float16}
    np.testing.assert_allclose(numbers(loaded, x), numbers(model, x), atol=1e-2)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_head_is_saved_beside_the_prefix(rng, tmp_path):
    config = BertConfig(20, 8, 2, 2, 12, max_position_embeddings=12, method="full")
    model = get_peft_model(BertClassifier(config, 3), PrefixTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    shapes = TensorFile(tmp_path / "adapter_model.safetensors").shapes
    assert shapes == {
        "base_model.classifier.weight": (3, 8),
        "base_model.classifier.bias": (3,),
        "prompt_embeddings": (2, 32),
    }


def test_a_classifier_on_the_first_token_trains_with_the_prefix(mode, rng, tmp_path):
    """P-Tuning v2, section 3.2: in place of a verbalizer, a head that starts by chance."""
    config = BertConfig(20, 8, 2, 2, 12, hidden_dropout_prob=0.0, max_position_embeddings=12, method="full")
    network, fresh = (BertClassifier(config, 3).set_train(False) for _ in range(2))
    own = {param.name: param for param in network.bert.get_parameters()}
    ms.load_param_into_net(fresh.bert, own)  # one base, and two heads by chance
    inputs = Tensor(rng.integers(0, 20, (4, 6)), ms.int32), Tensor(np.ones((4, 6), np.int32))
    before = {param.name: param.asnumpy().copy() for param in network.get_parameters()}
    model = get_peft_model(network, Ptuning2Config(num_virtual_tokens=2, task_type="SEQ_CLS"))
    heads = {"classifier.mindpet_trained_weight", "classifier.mindpet_trained_bias"}
    trained = {param.name: param.asnumpy().copy() for param in model.trainable_params()}
    assert {name for name in trained if "ptuning2" not in name} == heads and len(trained) == 4

    class Loss(nn.Cell):
        def __init__(self):
            super().__init__(auto_prefix=False)
            self.model, self.loss, self.labels = model, nn.CrossEntropyLoss(), Tensor([0, 1, 2, 0], ms.int32)

        def construct(self, ids, mask):
            return self.loss(self.model(ids, mask), self.labels)

    step = nn.TrainOneStepCell(Loss(), nn.Adam(model.trainable_params(), 0.1)).set_train()
    losses = [float(step(*inputs).asnumpy()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert all((param.asnumpy() != trained[param.name]).any() for param in model.trainable_params())
    expected = model.set_train(False)(*inputs).asnumpy()
    model.save_pretrained(tmp_path)
    keys = {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}
    assert set(TensorFile(tmp_path / "adapter_model.safetensors").shapes) == keys

    base, loaded = fresh(*inputs).asnumpy(), PeftModel.from_pretrained(fresh, tmp_path)
    same(loaded(*inputs).asnumpy(), expected)
    same(loaded.unload()(*inputs).asnumpy(), base)  # its own head again
    model.unload()
    assert all((param.asnumpy() == before[param.name]).all() for param in network.get_parameters())


def test_an_attention_computes_the_formula(mode, rng):
    """One head, one layer: the softmax runs over the prefix and the tokens that come before."""
    network = llama()
    model = get_peft_model(network, CONFIGS["table"])
    move(model, 2)
    source = network.model.layers[0].self_attn.prefix_source
    key, value = (Tensor(rng.normal(size=(2, 2, 4, 8)).astype(np.float32)) for _ in range(2))
    got_key, got_value = source(key, value)
    table = source.mindpet_delta_ptuning2_embedding.embedding_table.asnumpy().reshape(3, 2, 2, 8)
    for got, given, slot in ((got_key, key, 0), (got_value, value, 1)):
        same(got.asnumpy()[:, :, 3:], given.asnumpy())
        for row in range(2):
            same(got.asnumpy()[row, :, :3], table[:, slot].swapaxes(0, 1))


def test_a_step_while_it_is_disabled_is_refused(mode, rng):
    """The step's momentum would go on, and move a prefix that is out of the network."""
    model, x = get_peft_model(llama(), CONFIGS["table"]), ids(rng)
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.MSELoss()), nn.Momentum(model.trainable_params(), 0.1, 0.9))
    step.set_train()(x, Tensor(np.zeros((2, 6, 48), np.float32)))
    before = numbers(model, x)
    with pytest.raises(AdapterError, match="'default' were written to meanwhile"), model.disable_adapter():
        assert not model.trainable_params()
        step(x, Tensor(np.zeros((2, 6, 48), np.float32)))
    same(numbers(model, x), before)


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="no Cell of Small has an attribute 'prefix_source'"):
        get_peft_model(Small(), CONFIGS["table"])
    with pytest.raises(
        ConfigError, match="(?s)'num_layers' must be 2 for this network, but is 5.*'num_virtual_tokens' must"
    ):
        get_peft_model(llama(), PrefixTuningConfig(num_layers=5))
    model = get_peft_model(llama(), CONFIGS["table"])
    with pytest.raises(MergeError, match="PREFIX_TUNING, which cannot be folded"):
        model.merge_and_unload()
    with pytest.raises(AdapterError, match="cannot share a batch"):
        model(Tensor(np.zeros((1, 2), np.int32)), adapter_names=["default"])
    with pytest.raises(ConfigError, match="has adapters already"):
        get_peft_model(model.network, CONFIGS["table"])
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
