"""What every method in the registry must do."""

import inspect
import itertools

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from toy import BASE_SHAPES, DELTA_SHAPES, DENSE, WIDTH, Toy, batch, train, values

from mindpet.delta._base import DeltaDense
from mindpet.delta.registry import METHODS
from mindpet.graph import freeze_delta, load_delta
from mindpet.graph.ckpt_util import saved_parameters
from mindpet.layers.activation import activation_operators
from mindpet.network.parameters import matches

EVERY = pytest.mark.parametrize("method", list(METHODS))
DENSE_METHODS = pytest.mark.parametrize("method", list(DENSE))


def test_the_toy_knows_every_method():
    assert set(DELTA_SHAPES) == set(METHODS)


@EVERY
def test_parameter_tree(method):
    shapes = {param.name: tuple(param.shape) for param in Toy(method).get_parameters()}
    assert shapes == {**BASE_SHAPES, **DELTA_SHAPES[method]}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.identity])
def test_a_fresh_delta_is_the_identity(method, mode, rng):
    plain, tuned = Toy(method, base=True), Toy(method)
    ms.load_param_into_net(tuned, plain.parameters_dict())
    x, _ = batch(rng)
    np.testing.assert_allclose(tuned(x).asnumpy(), plain(x).asnumpy(), atol=1e-6)


@EVERY
def test_training_moves_the_delta_and_nothing_else(method, mode, rng):
    network = Toy(method)
    freeze_delta(network, method, exclude=["head.*"])
    expected = {
        name
        for name in {**BASE_SHAPES, **DELTA_SHAPES[method]}
        if name.startswith("head.") or matches(name, METHODS[method].trainable)
    }
    assert {param.name for param in network.trainable_params()} == expected
    before = values(network)
    x, labels = batch(rng)
    losses = train(network, x, labels, steps=12)
    after = values(network)
    assert losses[-1] < 0.8 * losses[0]
    assert {name for name in before if before[name] != after[name]} == expected


@EVERY
def test_only_the_delta_gets_a_gradient(method, rng):
    network = Toy(method)
    freeze_delta(network, method)
    if method in DENSE or METHODS[method].identity:
        train(network, *batch(rng), steps=1)  # zeros (LoRA's B) keep the gradient of what they multiply at zero
    x, labels = batch(rng)
    loss = nn.WithLossCell(network, nn.CrossEntropyLoss())
    gradients = ms.grad(loss, None, network.trainable_params())(x, labels)
    assert all(np.abs(gradient.asnumpy()).max() > 0 for gradient in gradients)
    assert {p.name for p in network.trainable_params()} == {
        name for name in {**BASE_SHAPES, **DELTA_SHAPES[method]} if matches(name, METHODS[method].trainable)
    }


@EVERY
def test_pynative_equals_graph(method, rng):
    network = Toy(method)
    freeze_delta(network, method)
    x, labels = batch(rng)
    train(network, x, labels, steps=2)
    outputs = []
    for mode in (ms.PYNATIVE_MODE, ms.GRAPH_MODE):
        ms.set_context(mode=mode)
        outputs.append(network(x).asnumpy())
    ms.set_context(mode=ms.PYNATIVE_MODE)

    @ms.jit
    def jitted(inputs):
        return network(inputs)

    outputs.append(jitted(x).asnumpy())
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs[2], outputs[0], rtol=1e-5, atol=1e-6)


@EVERY
def test_save_and_load_round_trip(method, rng, tmp_path):
    trained, fresh = Toy(method), Toy(method)
    base = tmp_path / "base.ckpt"
    ms.save_checkpoint(Toy(method, base=True), str(base))
    for network in (trained, fresh):
        freeze_delta(network, method, exclude=["head.*"])
    ms.load_checkpoint(str(base), trained)
    x, labels = batch(rng)
    train(trained, x, labels, steps=3)
    delta = tmp_path / "delta.safetensors"
    ms.save_checkpoint(
        [{"name": key, "data": p} for key, p in saved_parameters(trained).items()], str(delta), format="safetensors"
    )
    load_delta(fresh, base, delta)
    assert values(fresh) == values(trained)
    np.testing.assert_array_equal(fresh(x).asnumpy(), trained(x).asnumpy())


@DENSE_METHODS
@pytest.mark.parametrize("compute_dtype", [ms.float32, ms.float16])
def test_shape_and_type_of_the_output(method, compute_dtype, mode):
    cell = DENSE[method](compute_dtype=compute_dtype, activation="relu")
    shapes = [(WIDTH,), (3, WIDTH), (2, 3, WIDTH), (2, 1, 3, WIDTH), (0, WIDTH), (2, 0, WIDTH)]
    if mode == ms.GRAPH_MODE:  # each shape and type is a compile
        shapes = [(WIDTH,), (2, 0, WIDTH)] if compute_dtype == ms.float32 else [(2, 1, 3, WIDTH)]
    for shape, dtype in itertools.product(shapes, (np.float32, np.float16)):
        out = cell(Tensor(np.ones(shape, dtype)))
        assert out.shape == shape[:-1] + (WIDTH,), (shape, dtype)
        assert out.asnumpy().dtype == dtype, (shape, dtype)


@DENSE_METHODS
@pytest.mark.parametrize("dtype", [ms.float16, ms.float32, ms.bfloat16])
def test_delta_parameters_have_the_asked_type(method, dtype):
    cell = DENSE[method](param_init_type=dtype)
    assert {param.dtype for param in cell.get_parameters() if "mindpet_delta" in param.name} == {dtype}
    assert cell.weight.dtype == ms.float32


@DENSE_METHODS
def test_bfloat16_delta_computes(method, mode, rng):
    cell = DENSE[method](param_init_type=ms.bfloat16, compute_dtype=ms.float32)
    x = Tensor(rng.normal(size=(3, WIDTH)).astype(np.float32))
    assert np.isfinite(cell(x).asnumpy()).all()


@pytest.mark.parametrize("method", [name for name in DENSE if METHODS[name].mergeable])
def test_merged_weight_gives_the_forward(method, mode, rng):
    cell = DENSE[method](compute_dtype=ms.float32)
    for name, param in cell.parameters_and_names():
        if matches(name, METHODS[method].trainable) or name == "bias":
            param.set_data(Tensor(rng.normal(size=param.shape).astype(np.float32)))
    x = Tensor(rng.normal(size=(4, WIDTH)).astype(np.float32))
    weight, bias = (Tensor(value.asnumpy()) for value in (cell.merged_weight(), cell.merged_bias()))
    merged = nn.Dense(WIDTH, WIDTH, weight_init=weight, bias_init=bias)
    np.testing.assert_allclose(merged(x).asnumpy(), cell(x).asnumpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(cell.merged_weight().asnumpy() - cell.weight.asnumpy()).max() > 1e-4


SHARDED = [
    cell
    for method in METHODS.values()
    for cell in method.cells
    # Those of an attention are cut by two numbers.
    if hasattr(cell, "operators") and "heads" not in inspect.signature(cell.shard).parameters
]
SIZES = {
    "in_channels": 8,
    "out_channels": 8,
    "hidden_size": 8,
    "reduction_factor": 2,
    "lora_rank": 2,
    "scale": 2.0,
    "init_r": 2,
    "vera_rank": 2,
    "hira_rank": 2,
    "miss_rank": 2,
    "oft_block_size": 4,
    "loha_rank": 2,
    "loha_alpha": 4,
    "lokr_rank": 1,
    "lokr_alpha": 4,
    "vocab_size": 8,
    "embedding_size": 8,
    "token_indices": [5, 2],
    "lora_alpha": 4,
    "activation": "leakyrelu",
    "non_linearity": "silu",
}


def make(cell_class, **changes):
    """A Cell of a class with the arguments of SIZES that it takes."""
    taken = {**inspect.signature(cell_class.__init__).parameters}
    if "dense" in taken:
        taken.update(inspect.signature(DeltaDense.__init__).parameters)
    return cell_class(**{name: value for name, value in {**SIZES, **changes}.items() if name in taken})


def some_strategy(axes):
    """A strategy that fits the axes."""
    return tuple((2,) * len(names) for names in axes.split(","))


@pytest.mark.parametrize("cell_class", SHARDED)
def test_each_slot_reaches_its_operator_and_no_other(cell_class):
    slots = list(make(cell_class).operators)
    arguments = list(inspect.signature(cell_class.shard).parameters)[1:]
    assert arguments in (slots, ["strategies"])
    reached = []
    for slot in slots:
        cell = make(cell_class)
        operator, axes = cell.operators[slot]
        assert cell.shard(**{slot: some_strategy(axes)}) is cell
        sharded = {
            id(prim)
            for _, inner in cell.cells_and_names()
            for prim in inner._primitives.values()
            if getattr(prim, "in_strategy", None) is not None
        }
        assert sharded == {id(prim) for prim, _ in activation_operators(operator)}
        reached.append(len(sharded))
    assert all(reached)


@pytest.mark.parametrize("cell_class", SHARDED)
def test_every_primitive_that_computes_has_a_slot(cell_class):
    cell = make(cell_class)
    with_slot = {id(prim) for operator, _ in cell.operators.values() for prim, _ in activation_operators(operator)}
    unreached = {
        prim.name
        for _, inner in cell.cells_and_names()
        for prim in inner._primitives.values()
        if id(prim) not in with_slot
    }
    assert unreached <= {"Reshape", "Shape"}


@pytest.mark.parametrize("cell_class", SHARDED)
def test_strategies_change_no_number(cell_class, mode, rng):
    cell = make(cell_class, compute_dtype=ms.float32)
    is_embedding = "vocab_size" in inspect.signature(cell_class.__init__).parameters
    x = Tensor(np.arange(8, dtype=np.int32) if is_embedding else rng.normal(size=(4, 8)).astype(np.float32))
    before = cell(x).asnumpy()
    for slot, (_, axes) in cell.operators.items():
        cell.shard(**{slot: some_strategy(axes)})
    np.testing.assert_array_equal(cell(x).asnumpy(), before)


@pytest.mark.parametrize("cell_class", SHARDED)
def test_repr_shows_what_a_person_needs(cell_class):
    text = repr(make(cell_class))
    assert "param_init_type=Float32" in text
    assert "compute_dtype=Float16" in text or "vocab_size=8" in text
