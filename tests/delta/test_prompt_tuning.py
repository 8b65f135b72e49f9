"""Prompt tuning: the Cell, the adapter of a network that takes a prompt, its files, and what is refused."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.cli import main
from mindpet.delta import PromptEmbedding
from mindpet.errors import AdapterError, CheckpointError, ConfigError, MergeError
from mindpet.files.convert import convert, inspect
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_layer_status,
    get_peft_config,
    get_peft_model,
    set_peft_model_state_dict,
)

TOKENS, VOCAB, WIDTH = 3, 10, 4
TENSORS = "adapter_model.safetensors"
CONFIG = PromptTuningConfig(num_virtual_tokens=TOKENS)


class Body(nn.Cell):
    """A running mean of embeddings: every token sees what is before it."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.prompt_source, self.token_dim, self.prompt_table = None, width, "embed"
        self.embed = nn.Embedding(VOCAB, width, embedding_table="normal")

    def construct(self, ids):
        hidden = self.embed(ids)
        if self.prompt_source is not None:
            hidden = self.prompt_source(hidden)
        return (ops.cumsum(hidden, 1) / hidden.shape[1])[:, hidden.shape[1] - ids.shape[1] :]


class Network(nn.Cell):
    """A body with a head."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.classifier = nn.Dense(WIDTH, 3)

    def construct(self, ids):
        return self.classifier(self.body(ids).mean(1))


class ByHand(nn.Cell):
    """The same with a prompt that is made by hand."""

    def __init__(self):
        super().__init__()
        self.embed, self.prompt = nn.Embedding(VOCAB, WIDTH), PromptEmbedding(TOKENS, WIDTH)
        self.head = nn.Dense(WIDTH, 3)

    def construct(self, ids):
        return self.head(self.prompt(self.embed(ids)).mean(1))


class Two(nn.Cell):
    """Two bodies, as those of an encoder and a decoder."""

    def __init__(self, first=WIDTH, second=WIDTH):
        super().__init__()
        self.encoder, self.decoder = Body(first), Body(second)

    def construct(self, ids):
        return self.encoder(ids) - self.decoder(ids)


def ids(rng):
    return Tensor(rng.integers(0, VOCAB, (2, 5)).astype(np.int32))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def give(model, rng):
    """Give what trains other values."""
    for param in model.trainable_params():
        param.set_data(Tensor(normal(rng, *param.shape)))


def with_prompt(network, prompt, ids):
    """What a Network computes, in NumPy."""
    table, weight, bias = (
        param.asnumpy()
        for param in (network.body.embed.embedding_table, network.classifier.weight, network.classifier.bias)
    )
    rows = np.stack([np.concatenate([prompt, table[row]]) for row in ids.asnumpy()])
    return (rows.cumsum(1) / rows.shape[1])[:, len(prompt) :].mean(1) @ weight.T + bias


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_prompt_stands_in_front_in_the_type_of_the_embeddings(dtype, mode, rng):
    values, embeddings = normal(rng, TOKENS, WIDTH), normal(rng, 2, 5, WIDTH).astype(dtype)
    cell = PromptEmbedding(TOKENS, WIDTH, init=Tensor(values))
    expected = np.concatenate([np.broadcast_to(values.astype(dtype), (2, TOKENS, WIDTH)), embeddings], 1)
    got = cell(Tensor(embeddings)).asnumpy()
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


def test_a_fresh_prompt_has_normal_numbers_of_deviation_1():
    values = PromptEmbedding(50, 40).mindpet_delta_prompt.asnumpy()
    assert abs(values.mean()) < 0.1 and abs(values.std() - 1) < 0.1
    assert PromptEmbedding(2, 3, param_init_type=ms.bfloat16).mindpet_delta_prompt.dtype == ms.bfloat16
    assert repr(PromptEmbedding(2, 3)) == "PromptEmbedding(tokens=2, features=3)"


@pytest.mark.parametrize(
    "changes, error, match",
    [
        ({"tokens": 0, "features": 1.5}, TypeError, "'tokens' must be a positive int, but got 0.*'features' must be a"),
        ({"init": Tensor(np.zeros((2, 2)))}, ValueError, r"'init' must .*\(3, 4\)"),
        ({"init": "nothing"}, ValueError, "'init' must"),
        ({"param_init_type": ms.int32}, TypeError, "'param_init_type' must be mindspore.float16"),
    ],
)
def test_arguments_that_the_cell_refuses(changes, error, match):
    with pytest.raises(error, match=match):
        PromptEmbedding(**{"tokens": TOKENS, "features": WIDTH, **changes})


def test_shard_reaches_every_operator():
    cell = PromptEmbedding(TOKENS, WIDTH)
    assert cell.shard(2) is cell
    assert cell.tile.in_strategy == ((2, 1, 1),) and cell.concat.in_strategy == ((2, 1, 1), (2, 1, 1))
    assert all(primitive.in_strategy for primitive in cell._primitives.values())


def test_a_prompt_made_by_hand_trains_alone(mode, rng):
    network, x = ByHand(), ids(rng)
    freeze_delta(network, "prompt_tuning")
    assert [param.name for param in network.trainable_params()] == ["prompt.mindpet_delta_prompt"]
    before, first = network.prompt.mindpet_delta_prompt.asnumpy().copy(), network(x).asnumpy()
    weight = network.head.weight.asnumpy()
    (gradient,) = ms.grad(network, None, network.trainable_params())(x)  # of the sum of what comes out
    expected = np.broadcast_to(2 * weight.sum(0) / (TOKENS + 5), (TOKENS, WIDTH))  # two samples
    np.testing.assert_allclose(gradient.asnumpy(), expected, rtol=1e-4, atol=1e-6)
    network.prompt.mindpet_delta_prompt.set_data(Tensor(before + 1))
    expected = first + weight.sum(1) * TOKENS / (TOKENS + 5)
    np.testing.assert_allclose(network(x).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_save_load_disable_and_unload(mode, rng, tmp_path):
    network, x = Network(), ids(rng)
    base, before = (
        network(x).asnumpy(),
        [(p.name, p.asnumpy().tobytes(), p.requires_grad) for p in network.get_parameters()],
    )
    model = get_peft_model(network, CONFIG)
    assert [param.name for param in model.trainable_params()] == ["body.mindpet_delta_prompt"]
    give(model, rng)
    prompt = model.trainable_params()[0].asnumpy()
    tuned = model(x).asnumpy()
    np.testing.assert_allclose(tuned, with_prompt(network, prompt, x), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(x).asnumpy(), base)
    np.testing.assert_array_equal(model(x).asnumpy(), tuned)
    model.save_pretrained(tmp_path)
    assert TensorFile(tmp_path / TENSORS).shapes == {"prompt_embeddings": (TOKENS, WIDTH)}
    np.testing.assert_array_equal(TensorFile(tmp_path / TENSORS).read("prompt_embeddings"), prompt)
    assert model.unload() is network and network.body.prompt_source is None
    np.testing.assert_array_equal(network(x).asnumpy(), base)
    assert [(p.name, p.asnumpy().tobytes(), p.requires_grad) for p in network.get_parameters()] == before
    loaded = PeftModel.from_pretrained(network, tmp_path)
    np.testing.assert_array_equal(loaded(x).asnumpy(), tuned)
    loaded.save_pretrained(tmp_path / "again")
    for file in (TENSORS, "adapter_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_training_moves_the_prompt_and_the_head_alone(mode, rng):
    network, x, labels = Network(), ids(rng), Tensor(np.array([0, 2], np.int32))
    model = get_peft_model(network, PromptTuningConfig(num_virtual_tokens=TOKENS, task_type="SEQ_CLS"))
    names = {"body.mindpet_delta_prompt", "classifier.mindpet_trained_weight", "classifier.mindpet_trained_bias"}
    assert {param.name for param in model.trainable_params()} == names
    before = {param.name: param.asnumpy().copy() for param in network.get_parameters()}
    loss = nn.WithLossCell(model, nn.CrossEntropyLoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(model.trainable_params(), 0.1)).set_train()
    losses = [float(step(x, labels).asnumpy()) for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]
    assert {p.name for p in network.get_parameters() if (p.asnumpy() != before[p.name]).any()} == names


def test_prompts_of_several_lengths_and_a_lora_take_turns(mode, rng):
    network, x = Network(), ids(rng)
    model = get_peft_model(network, CONFIG, "short")
    model.add_adapter("long", PromptTuningConfig(num_virtual_tokens=6))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["embed"]))
    outputs = {}
    for name in ("short", "long", "lora"):
        model.set_adapter(name)
        give(model, rng)
        outputs[name] = model(x).asnumpy()
    for name in ("lora", "short", "long"):
        model.set_adapter(name)
        np.testing.assert_array_equal(model(x).asnumpy(), outputs[name])
        prompts = [param.asnumpy() for param in model.trainable_params() if "prompt" in param.name]
        assert len(prompts) == (name != "lora")
        for prompt in prompts:
            np.testing.assert_allclose(outputs[name], with_prompt(network, prompt, x), rtol=1e-4, atol=1e-5)
    model.delete_adapter("long")
    assert list(model.adapters) == ["short", "lora"]


def test_two_submodules_have_two_prompts_in_one_table(rng, tmp_path):
    """As Hugging Face PEFT keeps those of an encoder and a decoder."""
    network, x = Two(), ids(rng)
    model = get_peft_model(network, CONFIG)
    give(model, rng)
    assert model.peft_config["default"].num_transformer_submodules == 2
    tuned, (first, second) = model(x).asnumpy(), (param.asnumpy() for param in model.trainable_params())
    model.save_pretrained(tmp_path)
    table = TensorFile(tmp_path / TENSORS).read("prompt_embeddings")
    np.testing.assert_array_equal(table, np.concatenate([first, second]))
    np.testing.assert_array_equal(PeftModel.from_pretrained(model.unload(), tmp_path)(x).asnumpy(), tuned)


def test_a_network_that_takes_the_prompt_itself(mode, rng, tmp_path):
    network, x = Body(), ids(rng)
    base = network(x).asnumpy()
    model = get_peft_model(network, CONFIG)
    give(model, rng)
    assert [param.name for param in model.trainable_params()] == ["mindpet_delta_prompt"]
    tuned = model(x).asnumpy()
    assert np.abs(tuned - base).max() > 1e-3
    model.save_pretrained(tmp_path)
    save_tensors(tmp_path / "d.safetensors", {"mindpet_delta_prompt": model.trainable_params()[0].asnumpy()})
    again = get_peft_model(model.unload(), CONFIG)
    load_delta(again, tmp_path / "d.safetensors")
    np.testing.assert_array_equal(again(x).asnumpy(), tuned)
    again.unload()
    np.testing.assert_array_equal(network(x).asnumpy(), base)
    np.testing.assert_array_equal(PeftModel.from_pretrained(network, tmp_path)(x).asnumpy(), tuned)


def test_the_type_of_a_file_is_kept(rng, tmp_path):
    model = get_peft_model(Network(), CONFIG)
    model.save_pretrained(tmp_path)
    half = {name: value.astype(np.float16) for name, value in TensorFile(tmp_path / TENSORS).read_all().items()}
    (tmp_path / "mindpet_passport.json").unlink()  # it is not the file that was saved
    save_tensors(tmp_path / TENSORS, half)
    with pytest.warns(UserWarning, match="no mindpet_passport.json"):
        loaded = PeftModel.from_pretrained(Network(), tmp_path, is_trainable=True)
    assert [param.dtype for param in loaded.trainable_params()] == [ms.float16]


def test_status_and_repr_tell_of_the_prompt(rng):
    model = get_peft_model(Network(), CONFIG)
    assert [(row.name, row.module_type) for row in get_layer_status(model)] == [("body", "Body")]
    assert "PromptDelta(tokens=3, features=4)" in repr(model.network)


def test_a_folder_and_a_delta_file_become_each_other(rng, tmp_path, capsys):
    model, x = get_peft_model(Network(), PromptTuningConfig(num_virtual_tokens=TOKENS, task_type="SEQ_CLS")), ids(rng)
    give(model, rng)
    tuned = model(x).asnumpy()
    model.save_pretrained(tmp_path / "a")
    folder, delta, again = (str(tmp_path / name) for name in ("a", "d.ckpt", "again"))
    assert main(["convert", folder, delta, "--prefix-path", "body"]) == 0
    names = set(ms.load_checkpoint(delta))
    assert names == {"body.mindpet_delta_prompt", "classifier.weight", "classifier.bias"}
    network = Network()
    ms.load_param_into_net(network, {p.name: p for p in model.network.get_parameters() if "mindpet" not in p.name})
    fresh = get_peft_model(network, CONFIG)
    load_delta(fresh, delta)
    np.testing.assert_array_equal(fresh(x).asnumpy(), tuned)
    (tmp_path / "c.json").write_text('{"peft_type": "PROMPT_TUNING", "task_type": "SEQ_CLS"}')
    assert main(["convert", delta, again, "--config", str(tmp_path / "c.json")]) == 0
    one, other = (TensorFile(f"{path}/{TENSORS}").read_all() for path in (folder, again))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    content = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (content["num_virtual_tokens"], content["token_dim"]) == (TOKENS, WIDTH)
    for path in (folder, delta):
        assert "method: PROMPT_TUNING\n" in inspect(path)
    assert "method: PREFIX_TUNING or PROMPT_TUNING or P_TUNING\n" in inspect(f"{folder}/{TENSORS}")


def test_without_a_path_a_delta_file_is_that_of_a_prompt_made_by_hand(rng, tmp_path):
    model = get_peft_model(Network(), CONFIG)
    model.save_pretrained(tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "d.safetensors")]) == 0
    network = ByHand()
    freeze_delta(network, "prompt_tuning")
    load_delta(network, tmp_path / "d.safetensors")
    expected = model.trainable_params()[0].asnumpy()
    np.testing.assert_array_equal(network.prompt.mindpet_delta_prompt.asnumpy(), expected)


@pytest.mark.parametrize(
    "tensors, fields, error, match",
    [
        (
            {"a.mindpet_delta_prompt": (3, 4)},
            {"num_virtual_tokens": 5},
            ConfigError,
            r"the prompt is \[3, 4\]: .*5 \* 1",
        ),
        ({"a.mindpet_delta_prompt": (3, 4)}, {"token_dim": 8}, ConfigError, r"must say .* has None \* 1, 8"),
        ({"a.mindpet_delta_prompt": (3, 4)}, {"num_transformer_submodules": 2}, ConfigError, r"the prompt is \[3, 4\]"),
        ({"a.mindpet_delta_prompt": (3,)}, {}, ConfigError, r"the prompt is \[3\]"),
        ({"a.weight": (3, 4)}, {}, CheckpointError, "must have a delta of PROMPT_TUNING, .* there are .'a.weight'"),
        (
            {"a.mindpet_delta_prompt": (3, 4), "b.mindpet_delta_lora_a": (2, 4)},
            {},
            CheckpointError,
            "a delta of PROMPT_TUNING, and no other; .*mindpet_delta_lora_a",
        ),
        (
            {"a.mindpet_delta_ptuning2_embedding.embedding_table": (3, 4)},
            {},
            CheckpointError,
            "must have a delta of PROMPT_TUNING",
        ),
    ],
)
def test_delta_files_that_do_not_fit(tensors, fields, error, match, tmp_path):
    save_tensors(tmp_path / "d.safetensors", {name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    with pytest.raises(error, match=match):
        convert(tmp_path / "d.safetensors", tmp_path / "a", PromptTuningConfig(**fields))
    assert not (tmp_path / "a").exists()


def test_folders_that_do_not_fit_their_configuration(tmp_path, capsys):
    get_peft_model(Network(), CONFIG).save_pretrained(tmp_path)
    (tmp_path / "mindpet_passport.json").unlink()
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_virtual_tokens": 3', '"num_virtual_tokens": 2'))
    with pytest.raises(CheckpointError, match=r"prompt_embeddings: \[2, 4\] is needed, but it is \[3, 4\]"):
        PeftModel.from_pretrained(Network(), tmp_path)
    with pytest.warns(UserWarning, match="no mindpet_passport.json"):
        assert main(["convert", str(tmp_path), str(tmp_path / "d.ckpt")]) == 2
    assert "prompt_embeddings: [2, 4] is needed, but it is [3, 4]" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"token_dim": 4', '"token_dim": 8'))
    with pytest.raises(ConfigError, match="'token_dim' must be 4 for this network, but is 8"):
        PeftModel.from_pretrained(Network(), tmp_path)


def test_networks_that_take_no_such_prompt():
    with pytest.raises(ConfigError, match="no Cell of ByHand has an attribute 'prompt_source'; .* takes a prompt"):
        get_peft_model(ByHand(), CONFIG)
    with pytest.raises(ConfigError, match="all Cells with 'prompt_source' must have the same 'token_dim', but .*4.*8"):
        get_peft_model(Two(4, 8), CONFIG)
    network = Network()
    network.body.prompt_source = PromptEmbedding(TOKENS, WIDTH)
    with pytest.raises(ConfigError, match="body carries a prompt already"):
        get_peft_model(network, CONFIG)
    network = Network()
    network.body.token_dim = None
    with pytest.raises(ConfigError, match="body: 'token_dim' must be positive ints, but are .None."):
        get_peft_model(network, CONFIG)
    network.body.token_dim = WIDTH
    network.body.prompt_strategy = 2
    with pytest.raises(ConfigError, match="body: its attribute 'prompt_strategy' must say .* but is 2"):
        get_peft_model(network, CONFIG)
    network = Body()
    network.prompt_source = PromptEmbedding(TOKENS, WIDTH)
    with pytest.raises(ConfigError, match="the network carries a prompt already"):
        get_peft_model(network, CONFIG)
    with pytest.raises(ConfigError, match="'num_virtual_tokens' must be given"):
        get_peft_model(Network(), PromptTuningConfig())


@pytest.mark.parametrize(
    "fields, error, match",
    [
        ({"num_virtual_tokens": 0}, ValueError, "'num_virtual_tokens' must be a positive int, but got 0"),
        ({"prompt_tuning_init": "NOISE"}, ValueError, "'prompt_tuning_init' must be one of"),
        (
            {"prompt_tuning_init_text": 3, "tokenizer_kwargs": []},
            TypeError,
            "init_text' must be a str .*kwargs' must be a",
        ),
    ],
)
def test_fields_that_the_configuration_refuses(fields, error, match):
    with pytest.raises(error, match=match):
        PromptTuningConfig(**fields)


TEXT = [7, 1, 3]


@pytest.mark.parametrize("tokens, rows", [(2, [7, 1]), (3, [7, 1, 3]), (7, [7, 1, 3, 7, 1, 3, 7])])
def test_a_prompt_that_starts_as_a_text(tokens, rows, rng, tmp_path):
    network, x = Network(), ids(rng)
    config = PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init="TEXT", prompt_tuning_init_ids=TEXT)
    assert get_peft_config(config.to_dict()) == config
    model = get_peft_model(network, config)
    table = network.body.embed.embedding_table.asnumpy()
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), table[rows])
    np.testing.assert_allclose(model(x).asnumpy(), with_prompt(network, table[rows], x), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "prompt_tuning_init_ids" not in content and content["prompt_tuning_init"] == "RANDOM"
    other = Network()  # of another table
    loaded = PeftModel.from_pretrained(other, tmp_path, is_trainable=True, force=True)
    np.testing.assert_array_equal(loaded.trainable_params()[0].asnumpy(), table[rows])
    set_peft_model_state_dict(model, {"prompt_embeddings": np.ones((tokens, WIDTH), np.float32)})
    assert (model.trainable_params()[0].asnumpy() == 1).all()


def test_a_prompt_that_starts_as_tokens_by_chance():
    tables = []
    for seed in (3, 3, 4):
        network = Network()
        ms.set_seed(seed)
        model = get_peft_model(network, PromptTuningConfig(num_virtual_tokens=20, prompt_tuning_init="SAMPLE_VOCAB"))
        rows = (model.trainable_params()[0].asnumpy()[:, None] == network.body.embed.embedding_table.asnumpy()).all(2)
        assert (rows.sum(1) == 1).all()
        tables.append(rows.argmax(1).tolist())
    assert tables[0] == tables[1] != tables[2] and len(set(tables[0])) > 3


def test_a_start_follows_the_base_until_it_is_trained(rng, tmp_path):
    network = Network()
    config = PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_ids=TEXT)
    model = get_peft_model(network, config)
    embedding, prompt = network.body.embed.embedding_table, model.trainable_params()[0]
    embedding.set_data(Tensor(normal(rng, VOCAB, WIDTH)))
    np.testing.assert_array_equal(prompt.asnumpy(), embedding.asnumpy()[TEXT])
    prompt.set_data(Tensor(trained := normal(rng, 3, WIDTH)))
    embedding.set_data(Tensor(normal(rng, VOCAB, WIDTH)))
    np.testing.assert_array_equal(prompt.asnumpy(), trained)
    model.save_pretrained(tmp_path)


def test_two_submodules_start_from_the_table_of_each():
    network = Two()
    config = PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_ids=TEXT)
    for param, body in zip(get_peft_model(network, config).trainable_params(), (network.encoder, network.decoder)):
        np.testing.assert_array_equal(param.asnumpy(), body.embed.embedding_table.asnumpy()[[7, 1]])


def test_starts_that_cannot_be():
    def refused(match, network, **fields):
        before = [param.name for param in network.get_parameters()]
        with pytest.raises(ConfigError, match=match):
            get_peft_model(network, PromptTuningConfig(num_virtual_tokens=2, **fields))
        assert [param.name for param in network.get_parameters()] == before

    text = {"prompt_tuning_init": "TEXT"}
    refused("body: a start from a text needs the ids of its tokens", Network(), **text)
    refused(
        "body: 'prompt_tuning_init_ids' must be below 10, but are .3, 10",
        Network(),
        **text,
        prompt_tuning_init_ids=[3, 10],
    )
    for wrong in (None, "classifier", "nothing", 3):
        network = Body()
        network.prompt_table = wrong
        refused(
            f"the network: .*'prompt_table' must be .* but is {wrong!r}", network, prompt_tuning_init="SAMPLE_VOCAB"
        )
    network = Body()
    network.embed = nn.Embedding(VOCAB, WIDTH + 1)
    refused("of 4 features, but is 'embed'", network, prompt_tuning_init="SAMPLE_VOCAB")
    for ids, error in (([1.5], TypeError), ([-1], TypeError), ("one", TypeError)):
        with pytest.raises(error, match="'prompt_tuning_init_ids' must be a list of ints, from 0 on"):
            PromptTuningConfig(**text, prompt_tuning_init_ids=ids)
    with pytest.raises(ValueError, match="must be None where 'prompt_tuning_init' is not 'TEXT'"):
        PromptTuningConfig(prompt_tuning_init_ids=[1])


def test_a_prompt_is_not_merged_and_shares_no_batch(rng, tmp_path, capsys):
    network, x = Network(), ids(rng)
    model = get_peft_model(network, CONFIG, "prompt")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["embed"]))
    tuned = model(x).asnumpy()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MergeError, match="'prompt' is of PROMPT_TUNING, which cannot be folded into weights"):
            merge()
    with pytest.raises(AdapterError, match="'prompt' cannot share a batch, .* or a prompt"):
        model(x, adapter_names=["prompt", "lora"])
    with pytest.raises(AdapterError, match="an adapter is of PROMPT_TUNING"):
        model.add_weighted_adapter(["prompt", "lora"], [1.0, 1.0], "sum")
    np.testing.assert_array_equal(model(x).asnumpy(), tuned)
    model(x, adapter_names=["lora", "__base__"])
    np.testing.assert_array_equal(model(x).asnumpy(), tuned)
    model.save_pretrained(tmp_path)
    save_tensors(tmp_path / "base.safetensors", {"classifier.weight": network.classifier.weight.asnumpy()})
    arguments = ["--base", str(tmp_path / "base.safetensors"), "--adapter", str(tmp_path / "prompt")]
    assert main(["merge", *arguments, "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "PROMPT_TUNING cannot be folded into weights" in capsys.readouterr().err


def test_a_prompt_and_a_prefix_are_told_apart_in_a_folder(tmp_path):
    """Both are called `prompt_embeddings`; the configuration says which it is."""
    get_peft_model(Network(), CONFIG).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "PROMPT_TUNING" and type(get_peft_config(content)) is PromptTuningConfig
    with pytest.raises(ConfigError, match="is a PromptTuningConfig, but a PrefixTuningConfig is asked for"):
        PrefixTuningConfig.from_pretrained(tmp_path)
