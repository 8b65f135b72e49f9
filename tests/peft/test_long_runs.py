"""What stays after models and switches: nothing. And what several threads may do."""

import gc
import threading
import weakref

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.errors import AdapterError
from mindpet.network.construct import construct_like
from mindpet.peft import LoraConfig, get_peft_model
from mindpet.peft.turns import Turns
from tests.peft.small import Tiny, ids, numbers, same

CONFIG = {"r": 2, "target_modules": ["query", "embed"], "init_lora_weights": False}


class Options(nn.Cell):
    """A network that takes inputs in every way."""

    def __init__(self):
        super().__init__()
        self.query = nn.Dense(4, 4)

    def construct(self, x, scale=2.0, *, mask=None):
        out = self.query(x) * scale
        return out if mask is None else out * mask


def model_of(network=Tiny, **fields):
    return get_peft_model(network(), LoraConfig(**{**CONFIG, **fields}))


def resident():
    """Megabytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


def alone(model, x):
    return model(x)


def in_a_loss(model, x):
    return nn.WithLossCell(model, nn.CrossEntropyLoss())(x, Tensor(np.zeros(len(x), np.int32)))


def mixed(model, x):
    return model(x, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("call", [alone, in_a_loss, mixed])
def test_a_model_that_was_called_is_freed(call, mode, rng):
    x = ids(rng, 2)
    model = model_of()
    call(model, x)
    alive = [weakref.ref(cell) for _, cell in model.cells_and_names()] + [weakref.ref(model)]
    del model
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_a_model_takes_what_its_network_takes(mode, rng):
    model, x = model_of(Options, target_modules=["query"]), Tensor(rng.normal(size=(2, 4)).astype(np.float32))
    mask = Tensor(np.array([[1.0], [0.0]], np.float32))
    once = numbers(lambda x: model(x, 1.0), x)
    same(model(x).asnumpy(), 2 * once)
    same(model(x, scale=3.0, mask=mask).asnumpy(), 3 * once * mask.asnumpy())
    same(model(x, mask=mask, adapter_names=["default"] * 2).asnumpy(), 2 * once * mask.asnumpy())

    def total(x):
        return model(x, mask=mask).sum()

    same(ops.value_and_grad(total, None, model.trainable_params())(x)[0].asnumpy(), (2 * once * mask.asnumpy()).sum())


@pytest.mark.parametrize("given", ["x", "x, y=None, *rest, z=2, **more", "*rest", ""])
def test_parameters_are_passed_on_as_they_are(given):
    source = {}
    exec(f"def method(self, {given}): return locals()", source)
    passed = construct_like(source["method"].__get__(object()), "self.method({arguments})", __name__)
    holder = type("Holder", (), source)()
    for values, names in [((1,), {}), ((1, 2, 3), {"z": 4, "w": 5}), ((), {"x": 6}), ((), {})]:
        try:
            expected = holder.method(*values, **names)
        except TypeError:
            with pytest.raises(TypeError):
                passed(holder, *values, **names)
        else:
            assert passed(holder, *values, **names) == expected


def test_a_default_that_cannot_be_written_down_is_that_of_the_network(mode, rng):
    class Typed(nn.Cell):
        def __init__(self):
            super().__init__()
            self.query = nn.Dense(4, 4)

        def construct(self, x, dtype=ms.float16):
            return ops.cast(self.query(x), dtype)

    model, x = model_of(Typed, target_modules=["query"]), Tensor(rng.normal(size=(2, 4)).astype(np.float32))
    assert model(x).dtype == ms.float16 and model(x, ms.float32).dtype == ms.float32


def test_dropped_graphs_are_freed(rng):
    ms.set_context(mode=ms.GRAPH_MODE)
    from mindspore.common import api

    model, x = model_of(), ids(rng)
    model.add_adapter("other", LoraConfig(**{**CONFIG, "r": 1}))
    model(x)
    (phase,) = model.compile_cache
    assert api._cell_graph_executor.has_compiled(phase)
    model.set_adapter("other")
    assert not api._cell_graph_executor.has_compiled(phase)


def test_memory_is_flat_over_a_thousand_switches(mode, rng):
    model, x = model_of(inference_mode=True), ids(rng)
    model.add_adapter("other", LoraConfig(**CONFIG, inference_mode=True))

    def switch(times):
        for number in range(times):
            model.set_adapter(("other", "default")[number % 2])
            if number % 50 < 2:
                model(x)

    switch(100)
    before = resident()
    switch(1000)
    assert resident() - before < 8


def test_an_adapter_that_was_computed_is_freed_when_it_is_deleted(mode, rng):
    model, x = model_of(), ids(rng)
    model.add_adapter("other", LoraConfig(**{**CONFIG, "r": 1}))
    model.set_adapter("other")
    model(x)
    alive = [weakref.ref(delta) for delta in model.adapters["other"].slot.deltas.values()]
    model.delete_adapter("other")
    model(x)
    gc.collect()
    assert alive and not [ref for ref in alive if ref() is not None]


CHANGES = {
    "set_adapter": lambda model, x, folder: model.set_adapter("other"),
    "add_adapter": lambda model, x, folder: model.add_adapter("new", LoraConfig(**CONFIG)),
    "delete_adapter": lambda model, x, folder: model.delete_adapter("other"),
    "merge_adapter": lambda model, x, folder: model.merge_adapter(),
    "unload": lambda model, x, folder: model.unload(),
    "save_pretrained": lambda model, x, folder: model.save_pretrained(folder),
    "prepare_for_training": lambda model, x, folder: model.prepare_for_training("other"),
    "adapter_names": lambda model, x, folder: model(x, adapter_names=["default"] * len(x)),
    "disable_adapter": lambda model, x, folder: model.disable_adapter().__enter__(),
}


class Waiting(Tiny):
    """A network whose calls in PyNative mode last until they are told to end."""

    def construct(self, ids):
        if hasattr(self, "inside"):
            self.inside.wait(60)
            self.end.wait(60)
        return super().construct(ids)


def started(*calls):
    """Threads, and what their calls will return or raise."""
    results = []

    def run(call):
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=[call]) for call in calls]
    for thread in threads:
        thread.start()
    return threads, results


def ended(threads, results):
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_beside_a_call_of_another_thread_is_refused(change, rng, tmp_path):
    x = ids(rng)
    model = model_of(Waiting)
    model.add_adapter("other", LoraConfig(**CONFIG))
    model.network.inside, model.network.end = threading.Barrier(2), threading.Event()
    call = started(lambda: model(x).asnumpy())
    model.network.inside.wait(60)
    with pytest.raises(AdapterError, match=f"^{change}: another thread is using the model"):
        CHANGES[change](model, x, tmp_path)
    model.network.end.set()
    (result,) = ended(*call)
    del model.network.inside
    same(result, numbers(model, x))
    assert not list(tmp_path.iterdir())
    CHANGES[change](model, x, tmp_path)


def test_calls_may_run_beside_one_another():
    model = model_of()
    turns, placement = Turns(), model._placement
    with turns.call(placement), turns.call(placement):
        assert ended(*started(lambda: turns.call(placement).__enter__())) == [None]


@pytest.mark.parametrize("call", ["the call", *CHANGES])
def test_nothing_goes_beside_a_disabled_adapter_of_another_thread(call, rng, tmp_path):
    x = ids(rng)
    model = model_of()
    model.add_adapter("other", LoraConfig(**CONFIG))
    run = {"the call": lambda model, x, folder: model(x), **CHANGES}[call]
    with model.disable_adapter():
        base = numbers(model, x)
        (error,) = ended(*started(lambda: run(model, x, tmp_path)))
        same(numbers(model, x), base)
    assert isinstance(error, AdapterError) and "another thread" in str(error)
    assert np.abs(numbers(model, x) - base).max() > 1e-3


def test_a_thread_that_switched_does_not_get_what_another_one_switched_to(rng):
    x = ids(rng)
    model = model_of()
    model.add_adapter("other", LoraConfig(**CONFIG))
    first = numbers(model, x)
    ended(*started(lambda: model.set_adapter("other")))
    with pytest.raises(AdapterError, match="this thread made 'default' the active adapter, but another thread 'other'"):
        model(x)
    (second,) = ended(*started(lambda: numbers(model, x)))  # one that never switched takes what there is
    model.set_adapter("default")
    same(numbers(model, x), first)
    model.set_adapter("other")
    same(numbers(model, x), second)


def test_threads_that_switch_under_a_lock_get_their_own(rng):
    x, lock, start = ids(rng), threading.Lock(), threading.Barrier(2)
    model = model_of(inference_mode=True)
    model.add_adapter("other", LoraConfig(**CONFIG, inference_mode=True))
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = numbers(model, x)
    before = {name: adapter.values for name, adapter in model.adapters.items()}

    def turns(name):
        start.wait(60)
        for _ in range(50):
            with lock:
                model.set_adapter(name)
                same(numbers(model, x), expected[name])
        return "well"

    assert ended(*started(lambda: turns("default"), lambda: turns("other"))) == ["well"] * 2
    for name, values in before.items():
        for path, value in values.items():
            np.testing.assert_array_equal(model.adapters[name].values[path], value)
