"""What LoHa and LoKr have in common: a network with many layers, files, batches, dropout."""

import copy

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from small import Small, Tiny, check_tied, check_turns, contents, ids, move, numbers, same

from mindpet.delta import LoHaDense, LoKrDense
from mindpet.errors import CheckpointError, ConfigError, MergeError
from mindpet.files.adapter import save_adapter
from mindpet.files.convert import convert
from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model

TARGETS = ["query", "mlp.0", "turned", "shared", "conv"]  # mlp.0 has 6 outputs of 8 inputs, the others 8 of 8
FIELDS = {
    "loha": (LoHaConfig, {"r": 2, "alpha": 3}),
    "lokr": (LoKrConfig, {"r": 1, "alpha": 2}),
    "lokr of whole matrices": (LoKrConfig, {"r": 4, "alpha": 3, "decompose_factor": 2}),
}
EVERY = pytest.mark.parametrize("name", list(FIELDS))
METHODS = pytest.mark.parametrize("name", ["loha", "lokr"])
TENSORS = "adapter_model.safetensors"


def config(name, **more):
    cls, fields = FIELDS[name]
    return cls(**{"target_modules": TARGETS, **fields, **more})


@METHODS
def test_a_network_with_layers_of_several_kinds(name, mode, rng, tmp_path):
    network, x = Small(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config(name))
    same(numbers(model, x), base)
    move(model, 1)
    tuned = numbers(model, x)
    assert np.abs(tuned - base).max() > 1e-2
    param = model.trainable_params()[0]
    kept = param.asnumpy().copy()
    param.set_data(Tensor(np.full(param.shape, np.nan, np.float32)))
    assert np.isnan(numbers(model, x)).any()
    with model.disable_adapter():
        same(numbers(model, x), base)
    param.set_data(Tensor(kept))
    same(numbers(model, x), tuned)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    assert contents(model.unload()) == before
    again = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(again, x), tuned)
    again.merge_adapter()
    np.testing.assert_allclose(numbers(again, x), tuned, atol=1e-5)
    again.unmerge_adapter()
    same(numbers(again, x), tuned)
    np.testing.assert_allclose(numbers(again.merge_and_unload(), x), tuned, atol=1e-5)
    same(numbers(twin, x), tuned)


@EVERY
def test_a_step_moves_the_factors_and_nothing_else(name, mode, rng):
    model, x = get_peft_model(Small(), config(name, rank_dropout=0.1, module_dropout=0.1)), ids(rng)
    move(model, 1)
    before = {param.name: param.asnumpy().copy() for param in model.get_parameters()}
    step = nn.TrainOneStepCell(nn.WithLossCell(model, nn.CrossEntropyLoss()), nn.Adam(model.trainable_params(), 0.1))
    step.set_train()
    for _ in range(3):
        step(x, Tensor(np.arange(4, dtype=np.int32) % 3))
    moved = {name for name, param in model.parameters_dict().items() if np.any(param.asnumpy() != before[name])}
    assert moved == {param.name for param in model.trainable_params()}


@EVERY
def test_merging_files_gives_the_merged_network(name, rng, tmp_path):
    network = Small()
    ms.save_checkpoint(network, str(tmp_path / "base.safetensors"), format="safetensors")
    own = config(name, target_modules=["query", "mlp.0", "shared", "conv"], alpha_pattern={"mlp.0": 5})
    model = get_peft_model(network, own)
    move(model, 1)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    convert(tmp_path / "adapter", tmp_path / "delta.safetensors")
    merge(tmp_path / "base.safetensors", tmp_path / "delta.safetensors", tmp_path / "other.safetensors", config=own)
    merged, other = (TensorFile(tmp_path / f"{file}.safetensors").read_all() for file in ("merged", "other"))
    for path, param in model.merge_and_unload().parameters_and_names():
        np.testing.assert_allclose(merged[path], param.asnumpy(), atol=1e-6, err_msg=path)
        np.testing.assert_array_equal(merged[path], other[path])


@METHODS
def test_a_hand_made_network_and_its_files(name, mode, rng, tmp_path):
    def build():
        cell = LoHaDense if name == "loha" else LoKrDense
        return nn.SequentialCell(cell(6, 8, 1, 3, compute_dtype=ms.float32))

    network, x = build(), Tensor(rng.normal(size=(5, 6)).astype(np.float32))
    freeze_delta(network, name)
    names = [param.name for param in network.trainable_params()]
    assert names and all(own.startswith(f"0.mindpet_delta_{name}_") for own in names)
    move(network, 1)
    ms.save_checkpoint([{"name": k, "data": v} for k, v in saved_parameters(network).items()], f"{tmp_path}/d.ckpt")
    own = config(name, r=1, alpha=3, target_modules=None)
    convert(tmp_path / "d.ckpt", tmp_path / "adapter", own)
    convert(tmp_path / "adapter", tmp_path / "back.safetensors")
    again = build()
    ms.load_param_into_net(again, {k: p for k, p in network.parameters_dict().items() if "mindpet" not in k})
    load_delta(again, tmp_path / "back.safetensors")
    np.testing.assert_array_equal(numbers(again, x), numbers(network, x))
    plain = nn.SequentialCell(nn.Dense(6, 8, weight_init=network[0].weight, bias_init=network[0].bias))
    same(numbers(PeftModel.from_pretrained(plain, tmp_path / "adapter"), x), numbers(network, x))


def damaged(name, folder, change):
    """The folder of an adapter whose tensors were changed, and a file of its base."""
    save_tensors(folder / "base.safetensors", {"0.weight": np.zeros((8, 6), np.float32)})
    own = config(name, r=1, target_modules=["0"])
    tensors = get_peft_model(nn.SequentialCell(nn.Dense(6, 8)), own).adapter_tensors("default")
    keys = {key.rpartition(".")[2]: key for key in tensors}
    change(
        {
            "names": list(keys),
            "get": lambda leaf: tensors[keys[leaf]],
            "pop": lambda leaf: tensors.pop(keys[leaf]),
            "set": lambda leaf, value: tensors.update({keys[leaf]: value}),
        }
    )
    save_adapter(folder / "adapter", own, tensors, {})


def zeros(*shape):
    return np.zeros(shape, np.float32)


DAMAGES = {
    "missing": ("loha", lambda do: do["pop"]("hada_w2_b"), r"missing: .*hada_w2_b \[1, 6\]"),
    "rank": ("loha", lambda do: do["set"]("hada_w1_b", zeros(2, 6)), r"hada_w1_b: \[1, 6\] is needed"),
    "other size": ("loha", lambda do: do["set"]("hada_w2_a", zeros(9, 1)), r"hada_w2_a: \[8, 1\] is needed"),
    "axes": ("loha", lambda do: do["set"]("hada_w1_a", zeros(8)), r"hada_w1_a: \[8, 1\] is needed"),
    "no factor": ("lokr", lambda do: do["pop"]("lokr_w2_a"), r"missing: .*lokr_w2_a \['out', 1\]"),
    "no matrix": ("lokr", lambda do: do["pop"]("lokr_w1"), r"missing: .*lokr_w1 \['out', 'in'\]"),
    "rank of B": ("lokr", lambda do: do["set"]("lokr_w2_a", zeros(4, 2)), r"lokr_w2_a: \[4, 1\] is needed"),
    "axes of C": ("lokr", lambda do: do["set"]("lokr_w1", zeros(4)), r"lokr_w1: \[4, 'in'\] is needed"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_tensors_that_do_not_fit_are_refused(damage, tmp_path):
    name, change, message = DAMAGES[damage]
    damaged(name, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "adapter", tmp_path / "d.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    network = nn.SequentialCell(nn.Dense(6, 8))
    with pytest.raises(CheckpointError, match="hada_|lokr_"):
        PeftModel.from_pretrained(network, tmp_path / "adapter")
    assert len(network.trainable_params()) == 2


@METHODS
def test_a_base_that_is_the_other_way_round_or_of_another_size(name, tmp_path):
    damaged(name, tmp_path, lambda do: [do["set"](leaf, np.ones_like(do["get"](leaf))) for leaf in do["names"]])
    weight = np.arange(48, dtype=np.float32).reshape(8, 6)
    merged = []
    for base in (weight, weight.T):
        save_tensors(tmp_path / "base.safetensors", {"0.weight": np.ascontiguousarray(base)})
        merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", force=True)
        merged.append(TensorFile(tmp_path / "out.safetensors").read_all()["0.weight"])
        (tmp_path / "out.safetensors").unlink()
    np.testing.assert_array_equal(merged[0], merged[1].T)
    assert (merged[0] > weight).all()
    save_tensors(tmp_path / "base.safetensors", {"0.weight": np.zeros((8, 9), np.float32)})
    with pytest.raises(MergeError, match=r"0.weight: \[8, 9\] in the base, but the adapter has"):
        merge(tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out.safetensors", force=True)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_rank_that_is_larger_than_every_matrix(rng, tmp_path):
    """With it the matrices of LoKr are whole, as LyCORIS' users have them; LoHa would make a tensor of that size."""
    network, x = nn.SequentialCell(nn.Dense(6, 8)), Tensor(rng.normal(size=(3, 6)).astype(np.float32))
    model = get_peft_model(network, LoKrConfig(r=10**9, alpha=10**9, target_modules=["0"]))
    move(model, 1)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "lokr")
    same(numbers(PeftModel.from_pretrained(model.unload(), tmp_path / "lokr"), x), tuned)
    tensors = get_peft_model(nn.SequentialCell(nn.Dense(6, 8)), config("loha", target_modules=["0"]))
    tensors = tensors.adapter_tensors("default")
    save_adapter(tmp_path / "loha", config("loha", r=10**9, target_modules=["0"]), tensors, {})
    with pytest.raises(CheckpointError, match="rank 1000000000, but no axis of a tensor is longer than 8"):
        PeftModel.from_pretrained(nn.SequentialCell(nn.Dense(6, 8)), tmp_path / "loha")


def test_adapters_in_one_batch(mode, rng):
    network, x = Small(), ids(rng, 6)
    base = numbers(network, x)
    targets = ["query", "mlp.0", "turned"]
    model = get_peft_model(network, config("loha", target_modules=targets), "loha")
    model.add_adapter("lokr", config("lokr", target_modules=["mlp.0", "shared", "conv"]))
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["mlp.0", "turned", "embed"]))
    model.add_adapter("ia3", IA3Config(target_modules=["mlp.0"], feedforward_modules=["mlp.0"]))
    expected = {"__base__": base}
    for seed, name in enumerate(("loha", "lokr", "lora", "ia3")):
        model.set_adapter(name)
        move(model, seed)
        expected[name] = numbers(model, x)
    names = ["lokr", "lora", "__base__", "ia3", "loha", "lokr"]
    got = model(x, adapter_names=names).asnumpy()
    np.testing.assert_allclose(got, [expected[name][row] for row, name in enumerate(names)], atol=1e-5)


@METHODS
def test_adapters_of_one_shape_take_turns_without_a_new_graph(name, mode, rng, tmp_path):
    check_turns(config(name), config(name), ids(rng), tmp_path)


@METHODS
def test_adapters_of_another_alpha_take_turns(name, mode, rng):
    model, x = get_peft_model(Tiny(), config(name, target_modules=["query"])), ids(rng)
    move(model, 1)
    model.add_adapter("other", config(name, target_modules=["query"], alpha=7))
    expected = {"default": numbers(model, x)}
    model.set_adapter("other")
    move(model, 1)
    expected["other"] = numbers(model, x)
    assert np.abs(expected["other"] - expected["default"]).max() > 1e-4
    for own in ("default", "other", "default"):
        model.set_adapter(own)
        same(numbers(model, x), expected[own])


@EVERY
def test_a_weight_in_common_with_another_layer(name, mode, rng):
    check_tied(config(name, target_modules=["head"]), ids(rng))


def make_dropout(name, **more):
    """A network of two equal layers with a delta each, and what the deltas give without dropout: both the same."""
    network = Pair()
    model = get_peft_model(network, config(name, target_modules=["one", "other"], init_weights=False, **more))
    for name, param in network.other.mindpet_delta.parameters_and_names():
        param.set_data(getattr(network.one.mindpet_delta, name))
    return model


class Pair(nn.Cell):
    """Two layers without a base, side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Dense(6, 64, weight_init="zeros", has_bias=False) for _ in range(2))

    def construct(self, x):
        return self.one(x), self.other(x)


@pytest.mark.parametrize("name, rescales", [("loha", True), ("lokr", False), ("lokr", True)])
def test_dropout_of_rows(name, rescales, mode, rng):
    more = {"rank_dropout_scale": rescales} if name == "lokr" else {}
    model, x = make_dropout(name, rank_dropout=0.25, **more), Tensor(np.ones((3, 6), np.float32))
    whole = model.set_train(False)(x)[0].asnumpy()
    np.testing.assert_array_equal(model(x)[1].asnumpy(), whole)
    found = []
    for _ in range(3):
        for out in model.set_train()(x):
            ratio = out.asnumpy() / whole
            kept = ratio[0] > 0.5
            np.testing.assert_allclose(ratio, np.tile(kept / (kept.mean() if rescales else 1), (3, 1)), rtol=1e-4)
            found.append(kept)
    assert len({kept.tobytes() for kept in found}) == 6  # each time, and in each layer, others
    assert 0.6 < np.mean(found) < 0.9


@METHODS
def test_dropout_of_the_whole_delta(name, mode, rng):
    model, x = make_dropout(name, module_dropout=0.5), Tensor(np.ones((3, 6), np.float32))
    whole = model.set_train(False)(x)[0].asnumpy()
    kept = []
    for _ in range(20):
        for out in model.set_train()(x):
            ratio = out.asnumpy() / whole
            assert np.ptp(ratio) < 1e-4 and (abs(ratio.max()) < 1e-6 or abs(ratio.max() - 1) < 1e-4)
            kept.append(ratio.max() > 0.5)
    assert 8 < sum(kept) < 32 and len(set(zip(kept[::2], kept[1::2]))) >= 3


@METHODS
def test_dropout_that_leaves_no_row_gives_zeros_and_not_nan(name, mode):
    more = {"rank_dropout_scale": True} if name == "lokr" else {}
    model = make_dropout(name, rank_dropout=0.9999, **more).set_train()
    assert np.isfinite([out.asnumpy() for _ in range(3) for out in model(Tensor(np.ones((3, 6), np.float32)))]).all()


@METHODS
@pytest.mark.parametrize("dropout", [{}, {"rank_dropout": 0.5, "module_dropout": 0.1}])
def test_layers_of_half_precision(name, dropout, mode, rng):
    network = nn.SequentialCell(nn.Dense(20, 30, dtype=ms.float16))
    model = get_peft_model(network, config(name, target_modules=["0"], **dropout))
    x = Tensor(rng.normal(size=(3, 20)).astype(np.float16))
    move(model, 1)
    out = model.set_train()(x)
    assert out.dtype == ms.float16 and np.isfinite(out.asnumpy()).all()
    assert {param.dtype for param in model.trainable_params()} == {ms.float32}
    tuned = model.set_train(False)(x).asnumpy()
    np.testing.assert_allclose(model.merge_and_unload()(x).asnumpy(), tuned, atol=2e-2)


@METHODS
def test_a_scale_that_the_compute_type_cannot_hold_is_refused(name):
    with pytest.raises(ConfigError, match="0: the scale, .*, must be a number of Float16"):
        own = config(name, alpha=10**6, target_modules=["0"])
        get_peft_model(nn.SequentialCell(nn.Dense(4, 6, dtype=ms.float16)), own)


@METHODS
def test_wrong_fields_are_all_told(name):
    with pytest.raises(ValueError, match="'r' .* got 0.*'alpha' .* got 0.*'rank_dropout' .* got 1.*'use_effective_con"):
        config(name, r=0, alpha=0, rank_dropout=1, use_effective_conv2d="yes")
    with pytest.raises(ValueError, match="'init_weights' must be a bool( or 'lycoris')?, but got 1"):
        config(name, init_weights=1)
    with pytest.raises(ConfigError, match="of a type that cannot carry it: .'embed .Embedding."):
        get_peft_model(Small(), config(name, target_modules=["embed", "query"]))


@METHODS
def test_a_convolution_with_strategies_is_refused(name):
    network = Small()
    network.conv.conv2d.shard(((2, 1, 1, 1), (1, 1, 1, 1)))
    with pytest.raises(ConfigError, match="conv: no Lo[hk][ar]Convolution beside a layer with strategies"):
        get_peft_model(network, config(name))
