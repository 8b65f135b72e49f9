"""load_delta."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from toy import DELTA, Toy, batch, lora, train, values

from mindpet.delta import LoRADense
from mindpet.errors import CheckpointError, MindPetError
from mindpet.graph import load_delta


@pytest.fixture
def files(tmp_path, rng):
    """A trained network with its base and its delta in files."""
    network = lora()
    base = str(tmp_path / "base.ckpt")
    ms.save_checkpoint([{"name": p.name, "data": p} for p in network.get_parameters() if p.name not in DELTA], base)
    train(network, *batch(rng), steps=3)
    delta = str(tmp_path / "delta.ckpt")
    ms.save_checkpoint([{"name": p.name, "data": p} for p in network.trainable_params()], delta)
    return network, base, delta


def save(path, content, **options):
    ms.save_checkpoint([{"name": name, "data": Tensor(value)} for name, value in content.items()], str(path), **options)
    return str(path)


def test_base_and_delta(files):
    network, base, delta = files
    fresh = Toy("lora")
    load_delta(fresh, base, delta)
    assert values(fresh) == values(network)


def test_a_single_file_needs_only_what_trains(files, tmp_path):
    network, _, delta = files
    fresh = Toy("lora")
    load_delta(fresh, delta)
    assert fresh.head.weight.asnumpy().tobytes() == network.head.weight.asnumpy().tobytes()
    only_delta = save(
        tmp_path / "only.ckpt", {p.name: p.asnumpy() for p in network.trainable_params() if "lora" in p.name}
    )
    load_delta(Toy("lora"), only_delta)
    with pytest.raises(CheckpointError, match="missing: head.weight \\(3, 8\\)\n  missing: head.bias"):
        load_delta(lora(), only_delta)


def test_paths_and_safetensors(files, tmp_path):
    network, base, _ = files
    delta = tmp_path / "delta.safetensors"
    save(delta, {p.name: p.asnumpy() for p in network.trainable_params()}, format="safetensors")
    fresh = Toy("lora")
    load_delta(fresh, base, delta)
    assert values(fresh) == values(network)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("mindpet_delta", "tk_delta"),
        lambda name: name.replace("lora_a", "lora_A").replace("lora_b", "lora_B"),
        lambda name: name.replace("mindpet_delta", "tk_delta").replace("lora_a", "lora_A").replace("lora_b", "lora_B"),
    ],
)
def test_old_keys(files, rename, tmp_path):
    network, base, _ = files
    old = save(tmp_path / "old.ckpt", {rename(p.name): p.asnumpy() for p in network.trainable_params()})
    fresh = Toy("lora")
    load_delta(fresh, base, old)
    assert values(fresh) == values(network)


@pytest.mark.parametrize("names_in_file", ["aA", "ab"])
def test_a_layer_that_stands_alone(names_in_file, tmp_path):
    cell = LoRADense(4, 6, 2, 4)
    a, b = {
        "aA": ("mindpet_delta_lora_A", "mindpet_delta_lora_B"),
        "ab": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    }[names_in_file]
    load_delta(cell, save(tmp_path / "x.ckpt", {a: np.full((2, 4), 2, np.float32), b: np.full((6, 2), 3, np.float32)}))
    assert (cell.mindpet_delta_lora_a.asnumpy() == 2).all() and (cell.mindpet_delta_lora_b.asnumpy() == 3).all()


def test_a_base_saved_with_its_optimizer(files, tmp_path):
    network, _, delta = files
    step = nn.TrainOneStepCell(network, nn.Adam(network.get_parameters(), 0.1))
    full = str(tmp_path / "full.ckpt")
    ms.save_checkpoint(step, full)
    load_delta(Toy("lora"), full, delta)


def test_types_are_cast_to_the_parameters(files, tmp_path):
    network, base, _ = files
    half = save(tmp_path / "half.ckpt", {p.name: p.asnumpy().astype(np.float16) for p in network.trainable_params()})
    fresh = Toy("lora")
    load_delta(fresh, base, half)
    assert fresh.head.weight.dtype == ms.float32
    np.testing.assert_array_equal(
        fresh.head.weight.asnumpy(), network.head.weight.asnumpy().astype(np.float16).astype(np.float32)
    )


def test_everything_that_does_not_fit_is_in_one_error(files, tmp_path):
    _, base, _ = files
    wrong = save(
        tmp_path / "wrong.ckpt",
        {
            "fc.mindpet_delta_lora_a": np.ones((3, 8), np.float32),
            "fc.mindpet_delta_lora_b": np.ones((8, 2), np.int32),
            "other.weight": np.ones((2, 2), np.float32),
            "head.weight": np.ones((3, 8), np.float32),
        },
    )
    fresh = lora()
    before = values(fresh)
    with pytest.raises(CheckpointError) as caught:
        load_delta(fresh, base, wrong)
    lines = str(caught.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "missing: head.bias (3,)",
        "surplus: other.weight (2, 2)",
        "fc.mindpet_delta_lora_a: (2, 8) Float32 in the network, (3, 8) Float32 in the file",
        "fc.mindpet_delta_lora_b: (8, 2) Float32 in the network, (8, 2) Int32 in the file",
    ]
    assert values(fresh) == before and isinstance(caught.value, (MindPetError, ValueError))
    with pytest.raises(CheckpointError, match="Int32 in the file"):
        load_delta(fresh, base, wrong, strict=False)
    assert values(fresh) == before


def test_not_strict_warns_of_missing_and_surplus(files, tmp_path):
    network, base, _ = files
    part = save(tmp_path / "part.ckpt", {"head.bias": np.full(3, 9, np.float32), "other": np.ones(2, np.float32)})
    with pytest.warns(UserWarning) as warned:
        load_delta(network, base, part, strict=False)
    texts = [str(warning.message) for warning in warned]
    assert "load_delta: surplus: other (2,)" in texts and "load_delta: missing: head.weight (3, 8)" in texts
    assert (network.head.bias.asnumpy() == 9).all()


def test_a_checkpoint_of_another_model(tmp_path):
    other = save(tmp_path / "other.ckpt", {"conv.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match="(?s)missing: fc.mindpet_delta_lora_a.*surplus: conv.weight"):
        load_delta(Toy("lora"), other)


@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 0.5, 0.95])
def test_truncated_and_empty_files(files, ending, kept, tmp_path):
    network, _, _ = files
    whole = save(tmp_path / f"whole.{ending}", {p.name: p.asnumpy() for p in network.trainable_params()}, format=ending)
    content = open(whole, "rb").read()
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(content[: kept if kept in (0, 1) else int(kept * len(content))])
    fresh = lora()
    before = values(fresh)
    with pytest.raises(CheckpointError, match="cannot be read|missing:"):
        load_delta(fresh, str(cut))
    assert values(fresh) == before


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: load_delta(Toy()), ValueError, "'files' must be at least one path"),
        (lambda: load_delta("network", "a.ckpt"), TypeError, "'network' must be a Cell"),
        (lambda: load_delta(Toy(), 3), TypeError, "'files' must be paths, but got 3"),
        (lambda: load_delta(Toy(), "a.npz"), ValueError, "'files' must be paths that end in .ckpt or .safetensors"),
        (
            lambda: load_delta(Toy(), "none.ckpt", "nor.ckpt"),
            FileNotFoundError,
            "no such file: \\['none.ckpt', 'nor.ckpt'\\]",
        ),
        (lambda: load_delta(Toy(), "a.ckpt", strict=1), TypeError, "'strict' must be a bool"),
    ],
)
def test_wrong_load_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_compiled_network_uses_what_was_loaded(files, rng):
    network, base, delta = files
    x, _ = batch(rng)
    expected = network(x).asnumpy()
    ms.set_context(mode=ms.GRAPH_MODE)
    fresh = Toy("lora")
    assert np.abs(fresh(x).asnumpy() - expected).max() > 1e-3
    load_delta(fresh, base, delta)
    np.testing.assert_allclose(fresh(x).asnumpy(), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_round_trip(tmp_path):
    network = nn.Dense(4, 2)
    network.weight = Parameter(Tensor(np.arange(8).reshape(2, 4) / 3, ms.bfloat16), name="weight")
    file = str(tmp_path / "bf16.ckpt")
    ms.save_checkpoint(network, file)
    fresh = nn.Dense(4, 2)
    fresh.weight = Parameter(Tensor(np.zeros((2, 4)), ms.bfloat16), name="weight")
    load_delta(fresh, file)
    assert fresh.weight.get_bytes() == network.weight.get_bytes()


class Named(nn.Cell):
    """Two parameters with names of their own, and two layers that got the same name when they were put in."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.SequentialCell(nn.Dense(2, 2)), nn.SequentialCell(nn.Dense(2, 2))
        self.left[0].weight.name, self.right[0].weight.name = "student.weight", "teacher.weight"
        self.left[0].bias.name = self.right[0].bias.name = "fc.bias"


def test_names_of_parameters_are_understood_where_they_leave_no_doubt(tmp_path):
    network = Named()
    values = {"student.weight": 1, "teacher.weight": 2, "left.0.bias": 3, "right.0.bias": 4}
    arrays = {key: np.full((2, 2) if "weight" in key else 2, value, np.float32) for key, value in values.items()}
    load_delta(network, save(tmp_path / "named.ckpt", arrays))
    assert [param.asnumpy().flat[0] for param in network.get_parameters()] == [1, 3, 2, 4]
    doubtful = {**arrays, "fc.bias": arrays["left.0.bias"]}
    with pytest.raises(CheckpointError, match="unchanged:\\n  surplus: fc.bias \\(2,\\)"):
        load_delta(network, save(tmp_path / "doubtful.ckpt", doubtful))


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "w" * 1000], ids=["escape", "line feed", "long"])
def test_names_that_cannot_be_shown(name, tmp_path):
    network = nn.Dense(2, 2)
    before = network.weight.asnumpy().tobytes()
    save(tmp_path / "a.ckpt", {"weight": np.ones((2, 2), np.float32), name: np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match="is no name of a tensor") as caught:
        load_delta(network, tmp_path / "a.ckpt")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert network.weight.asnumpy().tobytes() == before


@pytest.mark.parametrize("names", [("lora_a", "lora_A"), ("lora_A", "lora_a")])
def test_one_parameter_by_two_keys_of_a_file(names, files, tmp_path):
    network, _, delta = files
    content = {name: param.asnumpy() for name, param in ms.load_checkpoint(delta).items()}
    first = content.pop("fc.mindpet_delta_lora_a")
    doubled = {f"fc.mindpet_delta_{name}": first + number for number, name in enumerate(names)}
    before = values(network)
    with pytest.raises(CheckpointError, match=r"keys that mean the same parameter: \[\['fc.mindpet_delta_lora_"):
        load_delta(network, save(tmp_path / "a.ckpt", {**content, **doubled}))
    assert all(np.array_equal(value, before[name]) for name, value in values(network).items())
