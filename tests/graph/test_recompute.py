"""Cells that recompute, beside freezing and adapters, in every order."""

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from compiled import kept_bytes
from mindspore import Tensor, nn, ops

from mindpet.delta import LoRADense
from mindpet.errors import NotLearningError
from mindpet.graph import DeltaGuard, freeze_delta, freeze_modules
from mindpet.peft import LoraConfig, get_peft_model

WIDTH, ROWS = 8, 6


class Block(nn.Cell):
    def __init__(self, make):
        super().__init__()
        self.first, self.second = make(WIDTH, WIDTH), make(WIDTH, WIDTH)

    def construct(self, x):
        return x + self.second(ops.tanh(self.first(x)))


class Net(nn.Cell):
    """Two blocks behind an embedding that does not train, so that the input of the first needs no gradient."""

    def __init__(self, make=nn.Dense):
        super().__init__()
        self.embed = nn.Embedding(10, WIDTH)
        self.blocks = nn.CellList([Block(make), Block(make)])
        self.head = nn.Dense(WIDTH, 3)

    def construct(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def by_hand(ins, outs):
    return LoRADense(ins, outs, 2, 4, lora_b_init="normal", compute_dtype=ms.float32)


def seeded(make=nn.Dense):
    """A network that is always the same."""
    ms.set_seed(3)
    np.random.seed(3)
    return Net(make)


def recompute(network, **options):
    for block in network.blocks:
        block.recompute(**options)


def gradients(network):
    """The gradients of what trains, by name."""
    ids = Tensor(np.arange(ROWS).astype(np.int32))
    loss = nn.WithLossCell(network.set_train(), nn.CrossEntropyLoss())
    params = network.trainable_params()
    values = ms.grad(loss, None, ms.ParameterTuple(params))(ids, Tensor(np.arange(ROWS).astype(np.int32) % 3))
    return {param.name: value.asnumpy() for param, value in zip(params, values)}


def check(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, atol=1e-6, err_msg=name)
        assert np.abs(value).max() > 0, name


ORDERS = (recompute, freeze_delta), (freeze_delta, recompute)


def apply(network, calls):
    for call in calls:
        call(network, *(("lora",) if call is freeze_delta else ()))
    return network


def test_layers_made_by_hand_train_in_every_order(mode):
    expected = gradients(apply(seeded(by_hand), [freeze_delta]))
    for calls in ORDERS:
        check(gradients(apply(seeded(by_hand), calls)), expected)


def test_what_is_thawed_behind_a_recompute_trains():
    """In PyNative mode; a graph has no list of parameters."""
    network, plain = apply(seeded(), [recompute]), seeded()
    for one in (network, plain):
        freeze_modules(one, include=["*"])
        freeze_modules(one, exclude=["blocks.0.first.*", "head.*"])
    check(gradients(network), gradients(plain))


def test_what_is_frozen_behind_a_recompute_costs_no_gradient():
    network = apply(seeded(by_hand), [recompute, freeze_delta])
    for block in network.blocks:  # what MindSpore asks gradients for
        assert {param.name.split(".")[-1] for param in block._recompute_cell.internal_params} == {
            "mindpet_delta_lora_a",
            "mindpet_delta_lora_b",
        }


HOOKS = [] if ms.__version__.startswith("2.7.") else [{"use_reentrant": False}]


def test_adapters_train_in_both_orders(mode):
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    expected = gradients(get_peft_model(seeded(), config))
    pynative = mode == ms.PYNATIVE_MODE
    for options in ({}, *(HOOKS if pynative else ())):
        for order in ("before", "after"):
            network = seeded()
            if order == "before":
                recompute(network, **options)
            model = get_peft_model(network, config)
            if order == "after":
                recompute(network, **options)
            check(gradients(model), expected)
            if pynative:  # a compiled graph has no memory of other adapters
                model.add_adapter("other", config)
                model.set_adapter("other")
                assert all(np.abs(value).max() > 0 for value in gradients(model).values())
                model.set_adapter("default")
                check(gradients(model), expected)


@pytest.mark.parametrize("order", ["before", "after"])
def test_dropout_that_recomputes_is_a_warning(order, recwarn):
    """MindSpore draws another mask in the backward pass on a CPU, so that its gradient is not that of the output."""
    network = seeded()
    if order == "before":
        network.blocks[0].recompute()
    model = get_peft_model(network, LoraConfig(r=1, target_modules=["blocks.0.first", "head"], lora_dropout=0.5))
    if order == "after":
        assert not recwarn.list
        network.blocks[0].recompute()
        train(model)
    (warning,) = {str(one.message) for one in recwarn.list if "recompute" in str(one.message)}
    assert "wrong: ['blocks.0.first.mindpet_delta.lora_dropout']" in warning.replace("network.", "")


def train(model, cell=None, steps=1):
    data = ds.NumpySlicesDataset(
        {"ids": np.arange(ROWS, dtype=np.int32), "labels": np.arange(ROWS, dtype=np.int32) % 3}, shuffle=False
    )
    optimizer = nn.SGD(model.trainable_params(), 0.1)
    ms.Model(cell or model, nn.CrossEntropyLoss(), optimizer).train(
        steps, data.batch(ROWS), callbacks=[DeltaGuard(steps=2)], dataset_sink_mode=False
    )


def test_both_orders_keep_the_inputs_of_the_blocks_alone():
    """In the graph, what goes into the blocks stays, and not the activations in them."""
    ms.set_context(mode=ms.GRAPH_MODE)
    kept = {}
    for order in ("never", "before", "after"):
        network = seeded()
        if order == "before":
            recompute(network)
        model = get_peft_model(network, LoraConfig(r=2, target_modules=["first", "second"]))
        if order == "after":
            recompute(network)
        step = Gradients(model)
        step(Tensor(np.arange(ROWS).astype(np.int32)))
        kept[order] = sum(kept_bytes(step).values())
    inputs = 2 * ROWS * WIDTH * 4  # of the blocks
    assert kept["before"] == kept["after"]
    assert inputs <= kept["before"] <= inputs + ROWS * 2 * 4  # MindSpore does not compute A x of the last layer again
    assert kept["never"] == inputs + 2 * ROWS * WIDTH * 4 + 4 * ROWS * 2 * 4  # of the second layers, and A x


class Gradients(nn.Cell):
    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network, self.params = network.set_train(), ms.ParameterTuple(network.trainable_params())
        self.gradient = ops.GradOperation(get_by_list=True)

    def construct(self, ids):
        return self.gradient(self.network, self.params)(ids)


def test_the_guard_tells_of_a_recompute_around_the_model_that_came_first():
    """A Cell around the network is not reached from it: its recompute() keeps what trained when it was called."""
    network = seeded()
    around = nn.SequentialCell(network)
    around.recompute()
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(NotLearningError, match="lora_b"):
        train(model, around, steps=3)
