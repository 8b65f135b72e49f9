"""LayerNorm tuning: which norms train, as copies, their files, and the way into the base."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn, ops
from small import VOCAB, WIDTH, contents, ids, move, numbers, same

from mindpet.errors import AdapterError, CheckpointError, ConfigError, NoMatchError
from mindpet.files.convert import convert, read_delta
from mindpet.files.merge import merge
from mindpet.files.names import NameMap
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import freeze_delta, load_delta
from mindpet.peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, plan_targets

TENSORS = "adapter_model.safetensors"


class RMSNorm(nn.Cell):
    """A norm of a model library."""

    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(Tensor(np.ones(WIDTH, np.float32)), name="weight")

    def construct(self, x):
        return self.weight * x * ops.rsqrt(ops.square(x).mean(-1, keep_dims=True) + 1e-6)


class MintNorm(mint.nn.LayerNorm):
    """The LayerNorm of mint, whose operator has no kernel on a CPU (MindSpore 2.7 to 2.10)."""

    def construct(self, x):
        centred = x - x.mean(-1, keep_dims=True)
        return self.weight * centred * ops.rsqrt(ops.square(centred).mean(-1, keep_dims=True) + 1e-5) + self.bias


class Block(nn.Cell):
    """A linear layer between two norms."""

    def __init__(self, norm):
        super().__init__()
        self.norm_in, self.fc, self.norm_out = nn.LayerNorm((WIDTH,)), nn.Dense(WIDTH, WIDTH), norm

    def construct(self, x):
        return x + self.norm_out(self.fc(self.norm_in(x)))


class Network(nn.Cell):
    """Norms of several classes, and one that stands at two places."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        shared = nn.LayerNorm((WIDTH,))
        self.blocks = nn.CellList([Block(shared), Block(shared), Block(RMSNorm())])
        self.last = MintNorm((WIDTH,))
        self.classifier = nn.Dense(WIDTH, 3)

    def construct(self, x):
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.classifier(self.last(hidden).mean(1))


TARGETS = ["norm_in", "norm_out", "last"]
NORMS = ["blocks.0.norm_in", "blocks.0.norm_out", "blocks.1.norm_in", "blocks.2.norm_in", "blocks.2.norm_out", "last"]
LEAVES = {"blocks.2.norm_out": ["weight"], "last": ["weight", "bias"]}
COPIES = [f"{norm}.mindpet_trained_{leaf}" for norm in NORMS for leaf in LEAVES.get(norm, ["gamma", "beta"])]


def config(**fields):
    return LNTuningConfig(**{"target_modules": TARGETS, **fields})


def test_the_norms_compute_with_their_copies(mode, rng):
    cell, x = nn.SequentialCell(nn.LayerNorm((4,), epsilon=1e-5)), rng.normal(size=(3, 4)).astype(np.float32)
    model = get_peft_model(cell, LNTuningConfig(target_modules=["0"]))
    scale, shift = rng.normal(size=(2, 4)).astype(np.float32)
    for param, value in zip(model.trainable_params(), (scale, shift)):
        param.set_data(Tensor(value))
    normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(numbers(model, Tensor(x)), scale * normal + shift, atol=1e-5)


def test_from_training_to_the_merged_network(mode, rng, tmp_path):
    network, x = Network(), ids(rng)
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, config())
    assert [param.name for param in model.trainable_params()] == COPIES
    np.testing.assert_array_equal(numbers(model, x), base)
    loss = nn.WithLossCell(model, nn.CrossEntropyLoss())
    step = nn.TrainOneStepCell(loss, nn.Adam(model.trainable_params(), 0.05)).set_train()
    labels = Tensor(np.arange(4, dtype=np.int32) % 3)
    losses = [float(step(x, labels).asnumpy()) for _ in range(5)]
    assert losses[-1] < losses[0]
    move(model, 0)
    tuned = numbers(model.set_train(False), x)
    assert np.abs(tuned - base).max() > 1e-2
    values = {param.name: param.asnumpy().copy() for param in model.trainable_params()}
    model.trainable_params()[0].set_data(Tensor(np.full(WIDTH, np.nan, np.float32)))
    with model.disable_adapter():
        np.testing.assert_array_equal(numbers(model, x), base)
    model.trainable_params()[0].set_data(Tensor(values[COPIES[0]]))
    model.save_pretrained(tmp_path)
    found = TensorFile(tmp_path / TENSORS).read_all()
    keys = {
        f"base_model.model.{norm}.ln_tuning_layers.{leaf}"
        for norm in NORMS
        for leaf in LEAVES.get(norm, ["weight", "bias"])
    }
    assert set(found) == keys
    np.testing.assert_array_equal(found["base_model.model.last.ln_tuning_layers.bias"], values[COPIES[-1]])
    network = model.unload()
    assert contents(network) == before
    loaded = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(loaded, x), tuned)
    merged = loaded.merge_and_unload()
    same(numbers(merged, x), tuned)
    assert [name for name, _, _ in contents(merged)] == [name for name, _, _ in before]
    for name, value in values.items():
        path = name.replace("mindpet_trained_", "")
        np.testing.assert_array_equal(dict(merged.parameters_and_names())[path].asnumpy(), value)


def test_several_adapters_a_head_and_a_mixed_batch(rng, tmp_path):
    network, x = Network(), ids(rng)
    base = numbers(network, x)
    model = get_peft_model(network, config(task_type="SEQ_CLS"))
    names = [param.name for param in model.trainable_params()]
    assert names == [*COPIES, "classifier.mindpet_trained_weight", "classifier.mindpet_trained_bias"]
    move(model, 0)
    expected = {"default": numbers(model, x)}
    others = {
        "one": config(target_modules=r"blocks\.[01]\..*", exclude_modules=["fc"]),
        "lora": LoraConfig(r=2, target_modules=["fc"], init_lora_weights=False),
    }
    for name, other in others.items():
        model.add_adapter(name, other)
        model.set_adapter(name)
        move(model, 1)
        expected[name] = numbers(model, x)
    for name in ("default", "lora", "one", "default"):
        model.set_adapter(name)
        same(numbers(model, x), expected[name])
    assert [layer.path for layer in model.adapters["one"].plan.copied] == NORMS[:3]
    with pytest.raises(AdapterError, match="'default' cannot share a batch, for there is more than deltas of layers"):
        model(x, adapter_names=["default", "lora", "__base__", "lora"])
    model.merge_adapter()
    same(numbers(model, x), expected["default"])
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "one", "one")
    same(numbers(again, x), expected["one"])
    same(numbers(again.unload(), x), base)


def test_the_plan_and_what_is_refused():
    network = Network()
    before = contents(network)
    assert str(plan_targets(network, config(target_modules=["last", "classifier"]))).splitlines() == [
        "last        MintNorm  trained as a whole",
        "classifier  Dense     trained as a whole",
    ]
    for fields, error, message in (
        ({"target_modules": None}, ConfigError, "'target_modules' must be given: the network has none of the layers"),
        ({"target_modules": ["nothing"]}, NoMatchError, "'target_modules': no layer matches 'nothing'"),
        ({"target_modules": r"blocks\.1\.norm_out"}, ConfigError, "is the same layer as"),
        ({"target_modules": ["blocks.2", "norm_in"]}, ConfigError, "the target blocks.2 has Parameters in common with"),
        ({"modules_to_save": ["last"]}, ConfigError, r"the target last has Parameters in common with \['last'"),
        ({"modules_to_save": ["blocks"]}, ConfigError, r"has Parameters in common with \['blocks'"),
    ):
        with pytest.raises(error, match=message):
            get_peft_model(network, config(**fields))
        assert contents(network) == before
    empty = nn.SequentialCell(nn.Dense(2, 2), nn.ReLU())
    with pytest.raises(ConfigError, match=r"of a type that cannot carry it: \['1 \(ReLU\)'\]"):
        get_peft_model(empty, LNTuningConfig(target_modules=["1"]))


@pytest.mark.parametrize("names", [("ln_1", "ln_2", "ln_f"), ("input_layernorm", "post_attention_layernorm", "norm")])
def test_the_usual_norms_are_found(names):
    network = nn.Cell()
    for name in (*names, "other"):
        setattr(network, name, nn.LayerNorm((4,)))
    plan = plan_targets(network, LNTuningConfig())
    assert [layer.path for layer in plan.copied] == list(names)


def test_the_mode_of_freeze_delta(rng, tmp_path):
    network, x = Network(), ids(rng)
    freeze_delta(network, "ln_tuning")
    names = [name for name in COPIES if "norm" in name]
    assert [param.name for param in network.trainable_params()] == [n.replace("mindpet_trained_", "") for n in names]
    assert np.isfinite(numbers(network, x)).all()


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_merge_and_convert_without_a_network(ending, rng, tmp_path):
    network, x = Network(), ids(rng)
    base, merged, delta = (str(tmp_path / f"{name}.{ending}") for name in ("base", "merged", "delta"))
    ms.save_checkpoint(network, base, format=ending)
    # The names of MindSpore's LayerNorms and PyTorch's: what is called gamma here, the file has as weight.
    leaves = {f"{norm}.{ours}": f"{norm}.{theirs}" for norm in NORMS[:4] for ours, theirs in PAIRS}
    back = {theirs: ours for ours, theirs in leaves.items()}
    names = NameMap(lambda name: leaves.get(name, name), lambda name: back.get(name, name))
    model = get_peft_model(network, config(modules_to_save=["classifier"]), name_map=names)
    move(model, 0)
    tuned = numbers(model, x)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", merged, name_map=names) == []
    other = Network()
    ms.load_param_into_net(other, ms.load_checkpoint(merged, format=ending))
    same(numbers(other, x), tuned)

    convert(tmp_path / "adapter", delta, name_map=names)
    own = [name.replace("mindpet_trained_", "") for name in COPIES]
    assert sorted(read_delta(delta)) == sorted([*own, "classifier.weight", "classifier.bias"])
    convert(delta, tmp_path / "back", config(modules_to_save=["classifier"]), name_map=names)
    tensors = [TensorFile(tmp_path / folder / TENSORS).read_all() for folder in ("adapter", "back")]
    assert tensors[0].keys() == tensors[1].keys()
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "back", name_map=names)
    same(numbers(again, x), tuned)
    plain = again.unload()
    load_delta(plain, base, delta)
    same(numbers(plain, x), tuned)


PAIRS = (("gamma", "weight"), ("beta", "bias"))


def test_files_that_do_not_fit(rng, tmp_path):
    network = Network()
    get_peft_model(network, config(target_modules=["last"])).save_pretrained(tmp_path / "adapter")
    network = Network()
    good, before = TensorFile(tmp_path / "adapter" / TENSORS).read_all(), contents(network)
    ms.save_checkpoint(network, str(tmp_path / "base.ckpt"))
    key = "base_model.model.last.ln_tuning_layers.weight"
    for content, message in (
        ({key: good[key]}, "missing: base_model.model.last.ln_tuning_layers.bias"),
        ({**good, key: good[key][:3]}, r"\[8\] is needed, but it is \[3\]"),
        ({**good, "base_model.model.last.weight": good[key]}, "surplus: base_model.model.last.weight"),
    ):
        save_tensors(tmp_path / "adapter" / TENSORS, content)
        with pytest.raises(CheckpointError, match=message):
            PeftModel.from_pretrained(network, tmp_path / "adapter")
        assert contents(network) == before
    with pytest.raises(CheckpointError, match="surplus: base_model.model.last.weight"):
        merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "out.ckpt", force=True)
    get_peft_model(network, LoraConfig(r=2, target_modules=["fc"])).save_pretrained(tmp_path / "lora")
    tensors = TensorFile(tmp_path / "lora" / TENSORS).read_all()
    for infix in ("None", "ln_tuning_layers"):
        other = f"base_model.model.last.{infix}.weight"
        save_tensors(tmp_path / "lora" / TENSORS, {**tensors, other: good[key]})
        with pytest.raises(CheckpointError, match=f"surplus: {other}"):
            merge(tmp_path / "base.ckpt", tmp_path / "lora", tmp_path / "out.ckpt", force=True)


class Image(nn.Cell):
    """Two BatchNorms, of which one trains."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def construct(self, x):
        return self.second(self.first(x))


def test_a_batch_norm_has_its_statistics_in_the_adapter(mode, rng, tmp_path):
    network, x = Image().set_train(False), Tensor(rng.normal(3, 2, (4, 3, 5, 5)).astype(np.float32))
    base, before = numbers(network, x), contents(network)
    model = get_peft_model(network, LNTuningConfig(target_modules=["first"]))
    assert len(model.trainable_params()) == 2
    loss = nn.WithLossCell(model, nn.MSELoss())
    step = nn.TrainOneStepCell(loss, nn.SGD(model.trainable_params(), 0.1)).set_train()
    for _ in range(3):
        step(x, x)
    tuned = numbers(model.set_train(False), x)
    assert np.abs(tuned - base).max() > 0.1
    model.save_pretrained(tmp_path)
    keys = set(TensorFile(tmp_path / TENSORS).shapes)
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {f"base_model.model.first.ln_tuning_layers.{leaf}" for leaf in leaves}
    network = model.unload()
    assert contents(network) == before
    loaded = PeftModel.from_pretrained(network, tmp_path)
    same(numbers(loaded, x), tuned)
    same(numbers(loaded.merge_and_unload(), x), tuned)
