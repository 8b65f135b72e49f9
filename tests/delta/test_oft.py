"""OFT: hand-made layers, deltas in a network, files and merging."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from sharded import CELLS, strategy
from small import Small, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import OFTDense
from mindpet.delta.oft import nearest_size
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.parallel import shard_like
from mindpet.peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_config, get_peft_model

OFT = "mindpet_delta_oft"
TARGETS = ["embed", "query", "mlp.0", "turned", "shared"]  # of 8 features each
TENSORS = "adapter_model.safetensors"
BASE = "base_model.model."


def config(**fields):
    return OFTConfig(**{"oft_block_size": 4, "target_modules": TARGETS, **fields})


def rotations(upper, exact=False, terms=5):
    """R of each block, from the upper triangles of Q: the formula in float64."""
    size = int((1 + np.sqrt(1 + 8 * upper.shape[1])) / 2)
    skew, one = np.zeros((len(upper), size, size)), np.eye(size)
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns], skew[:, columns, rows] = upper, -upper
    if exact:
        return (one - skew) @ np.linalg.inv(one + skew)
    last = 1 if terms == 2 else max(terms, 4) - 1
    powers = sum(2 * np.linalg.matrix_power(skew, power) for power in range(1, max(last, 2)))
    return one + powers + (np.linalg.matrix_power(skew, last) if terms > 2 else 0)


def diagonal(blocks, count):
    """A matrix with blocks on its diagonal, of which one may stand for all."""
    blocks = np.broadcast_to(blocks, (count, *blocks.shape[1:]))
    return np.block([[block if i == j else 0 * block for j in range(count)] for i, block in enumerate(blocks)])


def turn(rng, delta, size=0.4):
    """Give a delta other rotations; returns what they are made of."""
    param = delta.mindpet_delta_oft
    param.set_data(Tensor((size * rng.normal(size=param.shape)).astype(np.float32)))
    return param.asnumpy().copy()


FORMS = {
    "series": ({}, {}),
    "two terms": ({"num_cayley_neumann_terms": 2}, {"terms": 2}),
    "three terms": ({"num_cayley_neumann_terms": 3}, {"terms": 3}),
    "seven terms": ({"num_cayley_neumann_terms": 7}, {"terms": 7}),
    "exact": ({"use_cayley_neumann": False}, {"exact": True}),
    "shared": ({"block_share": True}, {}),
    "shared, exact": ({"block_share": True, "use_cayley_neumann": False}, {"exact": True}),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_the_layer_is_that_of_the_formula(form, mode, rng):
    keywords, said = FORMS[form]
    cell = OFTDense(12, 6, 4, activation="relu", compute_dtype=ms.float32, bias_init="ones", **keywords)
    weight, bias = cell.weight.asnumpy(), cell.bias.asnumpy()
    turned = diagonal(rotations(turn(rng, cell), **said), 3)
    x = rng.normal(size=(2, 5, 12)).astype(np.float32)
    same(numbers(cell, Tensor(x)), np.maximum(x @ turned @ weight.T + bias, 0))
    same(cell.merged_weight().asnumpy(), weight @ turned.T)
    np.testing.assert_array_equal(cell.merged_bias().asnumpy(), bias)
    cell.mindpet_delta_oft.set_data(Tensor(np.full(cell.mindpet_delta_oft.shape, np.nan, np.float32)))
    cell.reset()
    plain = nn.Dense(12, 6, weight_init=cell.weight, bias_init=cell.bias, activation="relu")
    np.testing.assert_array_equal(numbers(cell, Tensor(x)), numbers(plain, Tensor(x)))


def test_names_and_shapes_of_the_layer():
    assert [(p.name, p.shape) for p in OFTDense(12, 6, 4).get_parameters()] == [
        ("weight", (6, 12)),
        ("bias", (6,)),
        (OFT, (3, 6)),
    ]
    assert OFTDense(12, 6, 4, block_share=True).mindpet_delta_oft.shape == (1, 6)
    assert OFTDense(12, 6, 4, has_bias=False).merged_bias() is None
    assert not OFTDense(12, 6, 4).mindpet_delta_oft.asnumpy().any()
    start = get_peft_model(nn.SequentialCell(nn.Dense(64, 4)), config(target_modules=["0"], init_weights=False))
    value = start.trainable_params()[0].asnumpy()
    assert 0.06 < value.std() < 0.14 and abs(value.mean()) < 0.05  # of deviation 0.1


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 100.0])
def test_the_exact_rotation_is_as_near_as_float32_can_be(scale, mode, rng):
    cell = OFTDense(
        32, 32, 16, compute_dtype=ms.float32, use_cayley_neumann=False, weight_init=Tensor(np.eye(32, dtype=np.float32))
    )
    turned = diagonal(rotations(turn(rng, cell, scale), exact=True), 2)
    got = numbers(cell, Tensor(np.eye(32, dtype=np.float32)))
    np.testing.assert_allclose(got, turned, atol=2e-5 if scale > 10 else 2e-6)
    np.testing.assert_allclose(got @ got.T, np.eye(32), atol=4e-5 if scale > 10 else 4e-6)
    np.testing.assert_allclose(cell.merged_weight().asnumpy(), turned.T, atol=2e-5)


@pytest.mark.parametrize("form", ["series", "exact", "shared"])
def test_gradients_are_those_of_differences(form, mode, rng):
    keywords, said = FORMS[form]
    cell = OFTDense(8, 3, 4, compute_dtype=ms.float32, **keywords)
    upper, x = turn(rng, cell), rng.normal(size=(5, 8)).astype(np.float32)

    def total(x):
        return cell(x).sum()

    freeze_delta(cell, "oft")
    got = ms.grad(total, None, cell.trainable_params())(Tensor(x))[0].asnumpy()
    weight, expected = cell.weight.asnumpy().astype(np.float64), np.zeros(upper.shape)
    for place in np.ndindex(*upper.shape):
        for sign in (1, -1):
            moved = upper.astype(np.float64)
            moved[place] += sign * 1e-5
            expected[place] += sign * (x @ diagonal(rotations(moved, **said), 2) @ weight.T).sum() / 2e-5
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_constrained_rotations(shared, mode, rng):
    """What is longer than allowed is shortened, in a training step for good; what is short is left alone."""
    cell = OFTDense(12, 6, 4, coft=True, eps=0.5, block_share=shared, compute_dtype=ms.float32)
    rows = 1 if shared else 3
    value = turn(rng, cell)
    value[-1] = 0.01 if not shared else value[-1]
    cell.mindpet_delta_oft.set_data(Tensor(value))
    length = np.sqrt(2) * np.linalg.norm(value, axis=1, keepdims=True)  # of Q, with both triangles
    near = value * np.minimum(1, 0.5 / np.sqrt(rows) / length)
    x, weight = rng.normal(size=(5, 12)).astype(np.float32), cell.weight.asnumpy()
    expected = x @ diagonal(rotations(near), 3) @ weight.T
    same(numbers(cell.set_train(False), Tensor(x)), expected)
    np.testing.assert_array_equal(cell.mindpet_delta_oft.asnumpy(), value)
    same(cell.merged_weight().asnumpy(), weight @ diagonal(rotations(near), 3).T)

    freeze_delta(cell, "oft")
    step = nn.TrainOneStepCell(nn.WithLossCell(cell, nn.MSELoss()), nn.SGD(cell.trainable_params(), 0.0)).set_train()
    step(Tensor(x), Tensor(np.zeros((5, 6), np.float32)))
    same(cell.mindpet_delta_oft.asnumpy(), near)
    if not shared:
        np.testing.assert_array_equal(cell.mindpet_delta_oft.asnumpy()[-1], value[-1])


def test_dropout_leaves_out_whole_blocks_while_training(mode, rng):
    cell = OFTDense(
        64, 64, 2, module_dropout=0.5, compute_dtype=ms.float32, weight_init=Tensor(np.eye(64, dtype=np.float32))
    )
    turned, one = diagonal(rotations(turn(rng, cell)), 32), np.eye(64, dtype=np.float32)
    same(numbers(cell.set_train(False), Tensor(one)), turned)
    masks = []
    for _ in range(8):
        got = numbers(cell.set_train(), Tensor(one))
        blocks = [slice(2 * index, 2 * index + 2) for index in range(32)]
        left_out = [np.array_equal(got[block, block], np.eye(2)) for block in blocks]
        for block, is_out in zip(blocks, left_out):
            same(got[block, block], np.eye(2) if is_out else turned[block, block])
        masks.append(left_out)
    assert 0.35 < np.mean(masks) < 0.65 and len(set(map(tuple, masks))) > 1


def test_wrong_arguments_are_all_told():
    with pytest.raises(
        ValueError, match="'oft_block_size' must be a divisor of 12.* got 5.*'module_dropout' .* got 1.0"
    ):
        OFTDense(12, 6, 5, module_dropout=1.0)
    with pytest.raises(
        ValueError, match="'oft_block_size' must be a divisor of 12, 'in_channels', and no 1, but got 1"
    ):
        OFTDense(12, 6, 1)
    with pytest.raises(TypeError, match="'coft' must be a bool.*'eps' must be an int or a float.*'num_cayley"):
        OFTDense(12, 6, 4, coft=1, eps="a", num_cayley_neumann_terms=2.0)
    with pytest.raises(ValueError, match="'r' or 'oft_block_size' must be given if the other one is 0, and only then"):
        OFTConfig(r=2)
    with pytest.raises(ValueError, match="'r' or 'oft_block_size' must be given .*0, 0"):
        OFTConfig(oft_block_size=0)
    with pytest.raises(
        ValueError, match="'r' must be an int, at least 0, but got -1.*'eps' must be finite and not zero"
    ):
        OFTConfig(r=-1, oft_block_size=0, eps=0)
    with pytest.raises(ValueError, match="'eps' must be above 0, but got -0.1"):
        OFTConfig(eps=-0.1)
    with pytest.raises(ValueError, match="'num_cayley_neumann_terms' must be at least 2, for with fewer nothing"):
        OFTConfig(num_cayley_neumann_terms=1)


def test_a_block_size_that_does_not_divide_the_features():
    assert [nearest_size(8, 0, size) for size in (3, 6, 7, 32)] == [2, 4, 8, 8]  # of two the smaller one
    assert [nearest_size(8, blocks, 0) for blocks in (2, 3, 9)] == [4, 4, 1]
    network = nn.SequentialCell(nn.Dense(8, 4))
    with pytest.warns(UserWarning, match="OFT: oft_block_size 32 does not divide 8 features; 8 is taken"):
        model = get_peft_model(network, OFTConfig(target_modules=["0"]))
    assert model.trainable_params()[0].shape == (1, 28)
    model.unload()
    with pytest.warns(UserWarning, match="OFT: r 3 does not divide 8 features; 2 is taken"):
        assert get_peft_model(network, config(target_modules=["0"], r=3, oft_block_size=0)).trainable_params()[
            0
        ].shape == (2, 6)
    with pytest.raises(ConfigError, match="0: its 7 features would be in blocks of one, which cannot be rotated"):
        get_peft_model(nn.SequentialCell(nn.Dense(7, 4)), config(target_modules=["0"], oft_block_size=3))


def test_files_of_another_series_are_refused():
    content = {"peft_type": "OFT", "oft_block_size": 4, "use_cayley_neumann": True, "target_modules": ["query"]}
    with pytest.raises(ConfigError, match="not supported: use_cayley_neumann=True with peft_version='0.17.1'"):
        get_peft_model(Small(), get_peft_config({**content, "peft_version": "0.17.1"}))
    for fields in ({"peft_version": "0.18.0"}, {"peft_version": "0.17.1", "use_cayley_neumann": False}):
        get_peft_model(Small(), get_peft_config({**content, **fields}))


def test_freezing_training_and_files_of_a_hand_made_network(mode, rng, tmp_path):
    def build():
        return nn.SequentialCell(OFTDense(8, 3, 4, compute_dtype=ms.float32))

    network = build()
    freeze_delta(network, "oft")
    assert [param.name for param in network.trainable_params()] == [f"0.{OFT}"]
    turn(rng, network[0])
    x = Tensor(rng.normal(size=(5, 8)).astype(np.float32))
    ms.save_checkpoint([{"name": p.name, "data": p} for p in network.trainable_params()], f"{tmp_path}/d.ckpt")
    convert(tmp_path / "d.ckpt", tmp_path / "adapter", OFTConfig(oft_block_size=4))
    convert(tmp_path / "adapter", tmp_path / "back.safetensors")
    again = build()
    ms.load_param_into_net(again, {name: p for name, p in network.parameters_dict().items() if OFT not in name})
    load_delta(again, tmp_path / "back.safetensors")
    np.testing.assert_array_equal(numbers(again, x), numbers(network, x))
    plain = nn.SequentialCell(nn.Dense(8, 3, weight_init=network[0].weight, bias_init=network[0].bias))
    same(numbers(PeftModel.from_pretrained(plain, tmp_path / "adapter"), x), numbers(network, x))
    for fields in ({"oft_block_size": 2}, {"oft_block_size": 4, "block_share": True}, {"r": 4, "oft_block_size": 0}):
        with pytest.raises(CheckpointError, match=r"0.oft_R.weight: \[.*\] is needed, but it is \[2, 6\]"):
            convert(tmp_path / "d.ckpt", tmp_path / "no", OFTConfig(**fields))


@pytest.mark.parametrize("fields", [{}, {"use_cayley_neumann": False, "block_share": True, "bias": "oft_only"}])
def test_a_network_of_every_kind_of_layer(fields, mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config(**fields))
    np.testing.assert_array_equal(numbers(model, x), base)
    found = {param.name: param.shape for param in model.trainable_params() if OFT in param.name}
    layers = ["embed", "query", "mlp.0", "turned", "blocks.0.shared"]
    assert found == {f"{path}.{OFT}": (1 if fields else 2, 6) for path in layers}
    move(model, 1)
    turn(rng, network.mlp[0].mindpet_delta)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 0.1
    kept = network.query.mindpet_delta.mindpet_delta_oft.asnumpy().copy()
    network.query.mindpet_delta.mindpet_delta_oft.set_data(Tensor(np.full(kept.shape, np.nan, np.float32)))
    with model.disable_adapter():
        np.testing.assert_array_equal(numbers(model, x), base)
    network.query.mindpet_delta.mindpet_delta_oft.set_data(Tensor(kept))
    same(numbers(model, x), tuned)
    twin = copy.deepcopy(model)
    same(numbers(twin, x), tuned)
    model.save_pretrained(tmp_path)
    shapes = TensorFile(tmp_path / TENSORS).shapes
    assert {key for key in shapes if "oft" in key} == {
        f"{BASE}{path}.oft_{'embedding_' if path == 'embed' else ''}R.weight" for path in layers
    }
    assert contents(model.unload()) == before
    again = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(again, x), tuned)
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    np.testing.assert_allclose(numbers(again.merge_and_unload(), x), tuned, atol=1e-5)
    same(numbers(twin, x), tuned)


def test_a_step_moves_the_rotations_alone(mode, rng):
    model, x = get_peft_model(Small(), config(module_dropout=0.1)), ids(rng)
    before = {param.name: param.asnumpy().copy() for param in model.get_parameters()}

    def loss(x):
        return (model(x) ** 2).mean()

    optimizer = nn.SGD(model.set_train().trainable_params(), 0.5)
    optimizer(ms.value_and_grad(loss, None, optimizer.parameters)(x)[1])
    moved = {name for name, param in model.parameters_dict().items() if np.any(param.asnumpy() != before[name])}
    assert moved <= {param.name for param in model.trainable_params()} and moved


def test_merging_files_gives_the_merged_network(rng, tmp_path):
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    model = get_peft_model(network, config(target_modules=["embed", "query", "mlp.0", "shared"]))
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    merged = TensorFile(tmp_path / "merged.safetensors").read_all()
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)


@pytest.mark.parametrize("fields", [{}, {"block_share": True}])
def test_a_weight_the_other_way_round_is_told_by_its_shape(fields, rng, tmp_path):
    upper, weight = (0.3 * rng.normal(size=(1 if fields else 2, 6))).astype(np.float32), rng.normal(size=(3, 8))
    tensors = {f"{BASE}fc.oft_R.weight": upper}
    save_adapter(tmp_path / "adapter", config(target_modules=["fc"], **fields), tensors, {})
    expected = weight @ diagonal(rotations(upper), 2).T
    for name, stored in (("there", weight), ("turned", weight.T)):
        save_tensors(tmp_path / f"{name}.safetensors", {"fc.weight": np.ascontiguousarray(stored.astype(np.float32))})
        merge(tmp_path / f"{name}.safetensors", tmp_path / "adapter", tmp_path / f"m{name}.safetensors", force=True)
        found = TensorFile(tmp_path / f"m{name}.safetensors").read_all()["fc.weight"]
        same(found if name == "there" else found.T, expected)
    save_tensors(tmp_path / "no.safetensors", {"fc.weight": np.zeros((3, 10), np.float32)})
    with pytest.raises(MergeError, match=r"fc.weight: \[3, 10\] in the base, but the adapter has mindpet_delta_oft"):
        merge(tmp_path / "no.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", force=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_tensor_that_is_no_triangle_is_refused(tmp_path):
    save_adapter(
        tmp_path, config(target_modules=["query"]), {f"{BASE}query.oft_R.weight": np.zeros((2, 5), np.float32)}, {}
    )
    with pytest.raises(CheckpointError, match=r"query.oft_R.weight: \[2, 'size \(size - 1\) / 2'\] is needed"):
        convert(tmp_path, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="oft_R.weight"):
        PeftModel.from_pretrained(Small(), tmp_path)


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 5)
    base = numbers(network, x)
    model = get_peft_model(network, config(), "one")
    model.add_adapter("two", config(target_modules=["query", "mlp.0"], use_cayley_neumann=False))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    model.add_adapter("ia3", IA3Config(target_modules=["mlp.0"], feedforward_modules=["mlp.0"]))
    expected = {"__base__": base}
    for seed, name in enumerate(("one", "two", "lora", "ia3")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["two", "lora", "__base__", "ia3", "one"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


def test_adapters_of_one_shape_take_turns_without_a_new_graph(mode, rng, tmp_path):
    check_turns(config(), config(), ids(rng), tmp_path)


def test_adapters_of_one_shape_and_other_rotations_are_told_apart(mode, rng):
    model, x = get_peft_model(Small(), config(target_modules=["query"]), "a"), ids(rng)
    model.add_adapter("b", config(target_modules=["query"], use_cayley_neumann=False))
    move(model, 0)
    upper = model.query.mindpet_delta.mindpet_delta_oft.asnumpy().copy()
    one = numbers(model, x)
    model.set_adapter("b")
    model.query.mindpet_delta.mindpet_delta_oft.set_data(Tensor(-upper))  # it turns the other way
    other = numbers(model, x)
    assert 1e-5 < np.abs(one - other).max() < 0.5
    model.set_adapter("a")
    same(numbers(model, x), one)


def test_a_weight_in_common_with_another_layer(mode, rng):
    check_tied(config(target_modules=["head"]), ids(rng))


def test_layers_that_are_not_linear_are_refused():
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'conv .Conv2d"):
        get_peft_model(Small(), config(target_modules=["query", "conv"]))


@pytest.mark.parametrize("exact", [False, True])
def test_layers_of_half_precision(exact, mode, rng):
    network = nn.SequentialCell(nn.Dense(8, 6, dtype=ms.float16))
    model = get_peft_model(network, config(target_modules=["0"], use_cayley_neumann=not exact))
    x = Tensor(rng.normal(size=(3, 8)).astype(np.float16))
    move(model, 1)
    assert model(x).dtype == ms.float16 and {param.dtype for param in model.trainable_params()} == {ms.float32}
    tuned = model(x).asnumpy()
    np.testing.assert_allclose(model.merge_and_unload()(x).asnumpy(), tuned, atol=2e-2)


def test_blocks_are_not_cut():
    cell = CELLS["oft"]()
    with pytest.raises(ValueError, match="'strategy_oft_matmul' must be one that cuts the 32 blocks into equal parts"):
        shard_like(cell, strategy(i=64))
    with pytest.raises(ValueError, match="OFTDense.shard: 'coft' must be False where there are strategies"):
        shard_like(CELLS["oft"](coft=True), strategy(n=2))
    assert getattr(cell.oft_gather, "in_strategy", None) is None and cell.parts == 1
    sharded = nn.SequentialCell(nn.Dense(8, 8))
    sharded[0].matmul.shard(strategy(n=2))
    with pytest.raises(ConfigError, match="0: no COFT beside a layer with strategies"):
        get_peft_model(sharded, config(target_modules=["0"], coft=True))


def test_what_is_cut_computes_the_same_with_any_number_of_rows(mode, rng):
    cell = OFTDense(8, 6, 4, compute_dtype=ms.float32)
    turn(rng, cell)
    for rows in (4, 3):
        x = Tensor(rng.normal(size=(rows, 8)).astype(np.float32))
        before = numbers(cell, x)
        same(numbers(shard_like(cell, strategy(n=2, i=2)), x), before)
    assert cell.parts == 2
