"""Trainable tokens: hand-made embeddings, deltas in a network, tied layers, files and merging."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from small import VOCAB, WIDTH, Tied, Tiny, check_turns, contents, ids, move, numbers, same

from mindpet.delta import TrainableTokensEmbedding
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.convert import convert, read_delta
from mindpet.files.merge import merge
from mindpet.files.names import NameMap
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model, plan_targets, register_layer

TOKENS = [7, 2]
ROWS = "mindpet_delta_trainable_tokens"
TENSORS = "adapter_model.safetensors"


def config(**fields):
    return TrainableTokensConfig(**{"token_indices": TOKENS, "target_modules": ["embed"], **fields})


def replaced(table, rows, tokens=TOKENS):
    """The table with other rows."""
    return np.stack([rows[tokens.index(i)] if i in tokens else row for i, row in enumerate(table)])


def every_id():
    """All ids, `(2, 5)`."""
    return Tensor(np.arange(VOCAB, dtype=np.int32).reshape(2, 5))


# The hand-made embedding


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3), (2, 0)])
def test_the_embedding_is_that_of_the_formula(shape, mode, rng):
    cell = TrainableTokensEmbedding(6, 4, [5, 0, 3])
    table, rows = cell.embedding_table.asnumpy(), rng.normal(size=(3, 4)).astype(np.float32)
    start = cell(Tensor(np.arange(6, dtype=np.int32))).asnumpy()
    np.testing.assert_array_equal(start, table)
    getattr(cell, ROWS).set_data(Tensor(rows))
    expected = replaced(table, rows, [5, 0, 3])
    x = rng.integers(0, 6, shape)
    np.testing.assert_array_equal(numbers(cell, Tensor(x, ms.int32)), expected[x])
    np.testing.assert_array_equal(cell.table().asnumpy(), expected)
    np.testing.assert_array_equal(cell.merged_weight().asnumpy(), expected)
    np.testing.assert_array_equal(cell.embedding_table.asnumpy(), table)
    getattr(cell, ROWS).set_data(Tensor(np.full((3, 4), np.nan, np.float32)))
    cell.reset()
    np.testing.assert_array_equal(numbers(cell, Tensor(x, ms.int32)), table[x])


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_types_of_table_and_rows(dtype, rng):
    table = Tensor(rng.normal(size=(6, 4)).astype(np.float32))
    for own, of_rows in ((dtype, ms.float32), (ms.float32, dtype), (dtype, dtype)):
        cell = TrainableTokensEmbedding(6, 4, [5], embedding_table=table, dtype=own, param_init_type=of_rows)
        assert [param.dtype for param in cell.get_parameters()] == [own, of_rows, ms.int32]
        assert cell.merged_weight().dtype == own
        if ms.bfloat16 not in (own, of_rows):  # no kernels on a CPU
            assert cell(Tensor([5, 1], ms.int32)).dtype == own
    same(cell.embedding_table.astype(ms.float32).asnumpy()[5], getattr(cell, ROWS).astype(ms.float32).asnumpy()[0])


class Hand(nn.Cell):
    """A language model of an embedding, tied by hand."""

    def __init__(self, has_delta=True):
        super().__init__()
        made = TrainableTokensEmbedding(VOCAB, WIDTH, TOKENS) if has_delta else nn.Embedding(VOCAB, WIDTH)
        self.embed, self.has_delta = made, has_delta

    def construct(self, x):
        hidden = self.embed(x)
        return ops.matmul(hidden, self.embed.table().T if self.has_delta else self.embed.embedding_table.T)


def test_a_hand_made_model_trains_its_rows_and_a_tied_head_sees_them(mode, rng, tmp_path):
    base, network, x = Hand(has_delta=False), Hand(), every_id()
    ms.load_param_into_net(network, base.parameters_dict())
    network.embed.start_from_table()
    same(numbers(network, x), numbers(base, x))
    freeze_delta(network, "trainable_tokens")
    assert [param.name for param in network.trainable_params()] == [f"embed.{ROWS}"]
    table = network.embed.embedding_table.asnumpy().copy()
    step = nn.TrainOneStepCell(nn.WithLossCell(network, nn.MSELoss()), nn.SGD(network.trainable_params(), 5.0))
    step(x, Tensor(np.ones((2, 5, VOCAB), np.float32)))
    rows = getattr(network.embed, ROWS).asnumpy()
    assert np.abs(rows - table[TOKENS]).min(1).max() > 0
    np.testing.assert_array_equal(network.embed.embedding_table.asnumpy(), table)
    tuned = replaced(table, rows)
    np.testing.assert_allclose(numbers(network, x), tuned[x.asnumpy()] @ tuned.T, atol=1e-5)

    saved = [{"name": name, "data": param} for name, param in saved_parameters(network).items()]
    assert [entry["name"] for entry in saved] == [f"embed.{ROWS}"]
    ms.save_checkpoint(saved, f"{tmp_path}/delta.ckpt")
    convert(f"{tmp_path}/delta.ckpt", f"{tmp_path}/adapter", config())
    model = PeftModel.from_pretrained(base, f"{tmp_path}/adapter", force=True)
    np.testing.assert_array_equal(numbers(model.network.embed, x), tuned[x.asnumpy()])


def test_wrong_arguments_are_all_told():
    message = "'vocab_size' .* got 0.*'token_indices' must be from 0 on.*'token_indices' .*different.*'dtype'"
    with pytest.raises(ValueError, match=message):
        TrainableTokensEmbedding(0, 4, [-1, -1], dtype=ms.int32)
    for wrong in ([6], [], [0, 1, 17]):
        with pytest.raises(ValueError, match="'token_indices' must be below 'vocab_size', 6, and at least one, but"):
            TrainableTokensEmbedding(6, 4, wrong)
    for wrong in (3, "3", [True], [1.0], None):
        with pytest.raises(TypeError, match="'token_indices' must be a list of int"):
            TrainableTokensEmbedding(6, 4, wrong)
        with pytest.raises(TypeError, match="'token_indices' must be a list of int"):
            TrainableTokensConfig(token_indices=wrong)


# In a network


class Head(nn.Cell):
    """An embedding, and a head with a bias that has its table."""

    def __init__(self, has_bias=True):
        super().__init__()
        self.embed, self.fc = nn.Embedding(VOCAB, WIDTH), nn.Dense(WIDTH, WIDTH)
        self.head = nn.Dense(WIDTH, VOCAB, has_bias=has_bias, bias_init="normal", activation="sigmoid")
        self.head.weight = self.embed.embedding_table

    def construct(self, x):
        return self.head(self.fc(self.embed(x)))


def expected_of(network, rows, x):
    """What a Head computes with other rows of its table."""
    table = replaced(network.embed.embedding_table.asnumpy(), rows)
    hidden = table[x.asnumpy()] @ network.fc.weight.asnumpy().T + network.fc.bias.asnumpy()
    return 1 / (1 + np.exp(-hidden @ table.T - (network.head.bias.asnumpy() if network.head.has_bias else 0)))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_tied_head_sees_the_rows(has_bias, mode, rng):
    network, x = Head(has_bias), every_id()
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config())
    np.testing.assert_array_equal(numbers(model, x), base)
    (rows,) = model.trainable_params()
    assert rows.name == f"embed.{ROWS}"
    new = rng.normal(size=rows.shape).astype(np.float32)
    rows.set_data(Tensor(new))
    expected = expected_of(network, new, x)
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    rows.set_data(Tensor(np.full(rows.shape, np.nan, np.float32)))
    with model.disable_adapter():
        np.testing.assert_array_equal(numbers(model, x), base)
    rows.set_data(Tensor(new))
    model.merge_adapter()
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    model.unmerge_adapter()
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    assert [(name, value) for name, value, _ in contents(model.unload())] == [(one[0], one[1]) for one in before]
    same(numbers(network, x), base)


def test_a_step_has_the_gradients_of_both_ends(mode, rng):
    """As that of the whole table has, in its rows."""
    network, x = Head(), every_id()
    table = network.embed.embedding_table
    labels = Tensor(rng.normal(size=(2, 5, VOCAB)).astype(np.float32))
    loss = nn.WithLossCell(network, nn.MSELoss())
    whole = ms.grad(loss, None, [table])(x, labels)[0].asnumpy()
    model = get_peft_model(network, config())
    loss = nn.WithLossCell(model, nn.MSELoss())
    (found,) = ms.grad(loss, None, model.trainable_params())(x, labels)
    np.testing.assert_allclose(found.asnumpy(), whole[TOKENS], atol=1e-7)
    assert np.abs(whole).min() > 0


def test_it_trains_and_merges_for_good_and_the_head_stays_tied(mode, rng, tmp_path):
    network, x = Head(), ids(rng)
    table = network.embed.embedding_table.asnumpy().copy()
    model = get_peft_model(network, config())
    loss = nn.WithLossCell(model, nn.MSELoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(model.trainable_params(), 0.1)).set_train()
    labels = Tensor(np.ones((4, 5, VOCAB), np.float32))
    losses = [float(step(x, labels).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    rows = model.trainable_params()[0].asnumpy().copy()
    tuned = numbers(model.set_train(False), x)
    model.save_pretrained(tmp_path)
    keys = [f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("embed", "head")]
    found = TensorFile(tmp_path / TENSORS).read_all()
    assert sorted(found) == keys
    for key in keys:
        np.testing.assert_array_equal(found[key], rows)
    model = PeftModel.from_pretrained(model.unload(), tmp_path)
    same(numbers(model, x), tuned)
    merged = model.merge_and_unload()
    np.testing.assert_array_equal(merged.embed.embedding_table.asnumpy(), replaced(table, rows))
    assert merged.head.weight is merged.embed.embedding_table
    np.testing.assert_allclose(numbers(merged, x), tuned, atol=1e-5)


def test_the_rows_follow_the_base_until_they_are_trained(rng):
    network, x = Head(), every_id()
    model = get_peft_model(network, config())
    other = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    name = network.embed.embedding_table.name
    ms.load_param_into_net(network, {name: ms.Parameter(Tensor(other), name=name)})
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), other[TOKENS])
    move(model, 0)
    rows = model.trainable_params()[0].asnumpy().copy()
    network.embed.embedding_table.set_data(Tensor(other + 1))
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), rows)
    np.testing.assert_allclose(numbers(model, x), expected_of(network, rows, x), atol=1e-5)


def test_a_random_start():
    model = get_peft_model(Tiny(), config(token_indices=list(range(VOCAB)), init_weights=False))
    rows = model.trainable_params()[0].asnumpy()
    assert 0.7 < rows.std() < 1.3 and abs(rows.mean()) < 0.4  # 80 numbers of N(0, 1)


def test_adapters_take_turns_and_need_no_new_graph(mode, rng, tmp_path):
    check_turns(config(), config(token_indices=[0, 9]), ids(rng), tmp_path)


@pytest.mark.parametrize("cls", [Tiny, Head])
def test_a_mixed_batch_with_lora_and_other_tokens(cls, mode, rng):
    network, x = cls(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config())
    move(model, 0)
    expected = {"__base__": base, "default": numbers(model, x)}
    targets = ["embed", "query" if cls is Tiny else "head"]
    others = {
        "lora": LoraConfig(r=2, target_modules=targets, init_lora_weights=False),
        "tokens": config(token_indices=[1, 2, 3], init_weights=False),
    }
    for name, other in others.items():
        model.add_adapter(name, other)
        model.set_adapter(name)
        expected[name] = numbers(model, x)
    names = ["lora", "default", "__base__", "tokens"]
    mixed = model(x, adapter_names=names).asnumpy()
    for row, name in enumerate(names):
        np.testing.assert_allclose(mixed[row], expected[name][row], atol=1e-5)
    assert np.abs(expected["default"] - base).max() > 1e-3


def test_adapters_that_are_merged_one_after_the_other():
    network = Head()
    table = network.embed.embedding_table.asnumpy().copy()
    model = get_peft_model(network, config())
    move(model, 0)
    first = model.trainable_params()[0].asnumpy().copy()
    model.add_adapter("more", config(token_indices=[2, 5]))
    model.set_adapter("more")
    move(model, 1)
    second = model.trainable_params()[0].asnumpy().copy()
    model.merge_adapter(["default", "more"])
    expected = replaced(replaced(table, first), second, [2, 5])
    np.testing.assert_array_equal(network.embed.embedding_table.asnumpy(), expected)
    model.unmerge_adapter()
    np.testing.assert_array_equal(network.embed.embedding_table.asnumpy(), table)
    for target, message in (
        ("head", "head has a delta of its own, and that of embed, whose weight it has"),
        ("embed", r"embed has its weight in common with \['head'\]"),
    ):
        model.add_adapter(target, LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        for names in (["default", target], [target, "default"]):
            with pytest.raises(MergeError, match=message):
                model.merge_adapter(names)
        np.testing.assert_array_equal(network.embed.embedding_table.asnumpy(), table)


class Two(nn.Cell):
    """An encoder's and a decoder's embedding of one table, and one of another table."""

    def __init__(self):
        super().__init__()
        self.embed, self.other, self.free = (nn.Embedding(VOCAB, WIDTH) for _ in range(3))
        self.other.embedding_table = self.embed.embedding_table

    def construct(self, x):
        return self.embed(x) + 2 * self.other(x) + 4 * self.free(x)


def test_embeddings_of_one_table_and_of_several(rng):
    network, x = Two(), every_id()
    model = get_peft_model(network, config(target_modules=["embed", "free"]))
    move(model, 0)
    tables = [
        replaced(cell.embedding_table.asnumpy(), rows.asnumpy())
        for cell, rows in zip((network.embed, network.free), model.trainable_params())
    ]
    expected = 3 * tables[0][x.asnumpy()] + 4 * tables[1][x.asnumpy()]
    np.testing.assert_allclose(numbers(model, x), expected, atol=1e-5)
    np.testing.assert_allclose(numbers(model.merge_and_unload(), x), expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"or targets themselves: other \(Embedding\) has the weight of embed"):
        get_peft_model(network, config(target_modules=["embed", "other"]))


class Own(nn.Cell):
    """A head of a class that is not known."""

    def __init__(self, table):
        super().__init__()
        self.weight = table

    def construct(self, x):
        return ops.matmul(x, self.weight.T)


class Turned(nn.Cell):
    """A linear layer with its weight as `(in, out)`."""

    def __init__(self, table):
        super().__init__()
        self.weight = table

    def construct(self, x):
        return ops.matmul(x, self.weight)


register_layer(Turned, fan_in_fan_out=True)


def test_what_has_the_table_and_cannot_see_the_rows_is_refused():
    network = Tied()
    network.head = Own(network.embed.embedding_table)
    before = contents(network)
    with pytest.raises(ConfigError, match=r"no layers that can, .*: head \(Own\) has the weight of embed as weight"):
        get_peft_model(network, config())
    assert contents(network) == before
    network.head = Turned(network.embed.embedding_table)
    with pytest.raises(ConfigError, match=r"head: its weight is the table of an embedding, but not as \(out, in\)"):
        get_peft_model(network, config())
    network = Head()
    network.head.matmul.shard(((1, 1), (1, 1)))
    with pytest.raises(ConfigError, match="head: no rows of an embedding beside a head with strategies"):
        get_peft_model(network, config())
    with pytest.raises(ConfigError, match=r"head is to be trained as a whole, but carries \['head'\] of the targets"):
        get_peft_model(Head(), config(modules_to_save=["head"]))


def test_what_the_configuration_cannot_mean_is_refused():
    for fields, message in (
        ({"token_indices": []}, "'token_indices' must be given"),
        ({"token_indices": [VOCAB, 3]}, r"embed: it has 10 rows, but 'token_indices' has \[10\]"),
        ({"target_modules": ["query"]}, r"of a type that cannot carry it: \['query \(Dense\)'\]"),
        ({"target_modules": None}, "'target_modules' must be given: the network has none of the layers that are known"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(Tiny(), config(**fields))
    with pytest.raises(ValueError, match="'token_indices' must be of different numbers"):
        config(token_indices=[1, 1])
    with pytest.raises(ConfigError, match="not supported: {'trainable_token_indices': "):
        get_peft_model(Tiny(), LoraConfig(target_modules=["query"], unknown={"trainable_token_indices": [1]}))


def test_the_plan_names_what_it_reaches_and_the_usual_embedding_is_found():
    assert str(plan_targets(Tied(), config())).splitlines() == [
        "embed  Embedding  TRAINABLE_TOKENS",
        "head   Dense      TRAINABLE_TOKENS",
    ]
    network = nn.Cell()
    network.embed_tokens, network.score = nn.Embedding(VOCAB, WIDTH), nn.Dense(WIDTH, 2)
    plan = plan_targets(network, TrainableTokensConfig(token_indices=[1], task_type="SEQ_CLS"))
    assert [target.path for target in plan.targets] == ["embed_tokens"] and not plan.trained  # as there, no head


# Files


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("cls", [Tiny, Head])
def test_merge_and_convert_without_a_network(cls, ending, rng, tmp_path):
    network, x = cls(), every_id()
    base, merged, delta = (str(tmp_path / f"{name}.{ending}") for name in ("base", "merged", "delta"))
    ms.save_checkpoint(network, base, format=ending)
    model = get_peft_model(network, config())
    move(model, 0)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    merge(base, tmp_path / "adapter", merged)
    other = cls()
    ms.load_param_into_net(other, ms.load_checkpoint(merged, format=ending))
    np.testing.assert_allclose(numbers(other, x), tuned, atol=1e-5)

    convert(tmp_path / "adapter", delta)
    assert list(read_delta(delta)) == [f"embed.{ROWS}"]
    rows = model.trainable_params()[0].asnumpy().copy()
    move(model, 1)
    load_delta(model, delta)
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), rows)
    convert(delta, tmp_path / "back", config())
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "back")
    same(numbers(again, x), tuned)


def test_other_names_in_the_pytorch_model(rng, tmp_path):
    names = NameMap(lambda name: name.replace("embed", "wte").replace("head", "lm_head"))
    network, x = Head(), every_id()
    model = get_peft_model(network, config(), name_map=names)
    move(model, 0)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path)
    keys = [f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("lm_head", "wte")]
    assert sorted(TensorFile(tmp_path / TENSORS).shapes) == keys
    same(numbers(PeftModel.from_pretrained(model.unload(), tmp_path, name_map=names), x), tuned)


def test_files_that_do_not_fit(rng, tmp_path):
    network = Head()
    model = get_peft_model(network, config())
    move(model, 0)
    model.save_pretrained(tmp_path)
    model.unload()
    good = TensorFile(tmp_path / TENSORS).read_all()
    key, double = (f"base_model.model.{layer}.trainable_tokens_delta" for layer in ("embed", "head"))
    before = contents(network)
    for content, message in (
        ({key: good[key][:1]}, r"\[2, 8\] is needed, but it is \[1, 8\]"),
        ({**good, double: good[double] + 1}, rf"surplus: {double} \[2, 8\]"),
        ({"base_model.model.head.trainable_tokens_delta": good[key]}, f"missing: {key}"),
        ({key: good[key] * np.nan}, "NaN or infinite numbers"),
    ):
        save_tensors(tmp_path / TENSORS, content)
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(network, tmp_path)
        assert contents(network) == before


def test_a_dict_of_tensors_comes_and_goes(rng):
    from mindpet.peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = get_peft_model(Head(), config())
    move(model, 0)
    rows, tensors = model.trainable_params()[0].asnumpy().copy(), get_peft_model_state_dict(model)
    assert len(tensors) == 2
    move(model, 1)
    set_peft_model_state_dict(model, tensors)
    np.testing.assert_array_equal(model.trainable_params()[0].asnumpy(), rows)
