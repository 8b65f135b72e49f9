"""A training that is interrupted and resumed ends with the bits of one that is not."""

import random

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.train import Callback, CheckpointConfig, Model
from toy import DELTA_SHAPES, LABELS, WIDTH, Toy

from mindpet.delta import AdaLoraOptimizer, LoRADense, OrthogonalLoss
from mindpet.errors import CheckpointError
from mindpet.graph import TrainableParamsCheckPoint, freeze_delta, lora_plus_groups, resume
from mindpet.graph.state_files import RunFolder
from mindpet.peft import AdaLoraConfig, LoraConfig, get_peft_model

ROWS, BATCH, EPOCHS = 12, 4, 3
STEPS = EPOCHS * ROWS // BATCH


class Net(nn.Cell):
    """The least with LoRA: `(batch, WIDTH) -> (batch, LABELS)`."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.fc = LoRADense(WIDTH, LABELS, 2, 4, lora_dropout=dropout, compute_dtype=ms.float32)
        freeze_delta(self, "lora")

    def construct(self, x):
        return self.fc(x)


def shuffled(shape=(WIDTH,), rows=ROWS):
    """A dataset in another order in each epoch."""
    rng = np.random.default_rng(3)
    columns = {
        "x": rng.normal(size=(rows, *shape)).astype(np.float32),
        "y": np.arange(rows, dtype=np.int32) % LABELS,
    }
    return ds.NumpySlicesDataset(columns, shuffle=True).batch(BATCH)


def adam(network):
    return nn.Adam(network.trainable_params(), 0.05)


class Script:
    """A training script: called again, it makes everything anew, with the same seed.

    Args:
        network, optimizer, data: what makes each of them.
        model: what makes a Model of network and optimizer. Default: with a cross entropy.
    """

    def __init__(self, network=Net, optimizer=adam, data=shuffled, model=None):
        self.network, self.optimizer, self.data = network, optimizer, data
        self.model = model or (lambda network, optimizer: Model(network, nn.CrossEntropyLoss(), optimizer))

    def start(self):
        ms.set_seed(7)
        network = self.network()
        return self.model(network, self.optimizer(network)), self.data()

    def train(self, folder, epochs=EPOCHS, callbacks=(), config=None, train=None, **options):
        """Train, or go on if `train` is `resume`; returns the model."""
        model, data = self.start()
        config = {"keep_checkpoint_max": 100, **(config or {})}
        checkpoint = TrainableParamsCheckPoint(str(folder), config=CheckpointConfig(**config), resumable=True)
        options = {"dataset_sink_mode": False, **options}
        callbacks = [*callbacks, checkpoint]
        if train:
            self.done = train(model, folder, epochs, data, callbacks, **options)
        else:
            model.train(epochs, data, callbacks, **options)
        return model

    def check(self, folder, step, **arguments):
        """Train at a stretch, and again from the middle; returns the bits that both end with."""
        whole = bits(self.train(folder, **arguments))
        resumed = bits(self.train(folder, train=lambda *a, **o: resume(*a, step=step, **o), **arguments))
        assert self.done == step
        assert [name for name in whole if whole[name] != resumed[name]] == []
        return whole


def bits(model):
    """All that a training ends with."""
    params = {param.name: param.asnumpy().tobytes() for param in model.train_network.get_parameters()}
    scale = model._loss_scale_manager
    return {**params, "scale": sorted(vars(scale).items()) if scale else None}


class Interrupt(Exception):
    pass


class InterruptAt(Callback):
    """Ends a training before a step, as an error does."""

    def __init__(self, step):
        self.step = step

    def on_train_step_begin(self, run_context):
        if run_context.original_args().cur_step_num == self.step:
            raise Interrupt


class Toys:
    """The network of a method."""

    def __init__(self, method):
        self.method = method

    def __call__(self):
        network = Toy(self.method)
        freeze_delta(network, self.method)
        return network


@pytest.mark.parametrize("method", DELTA_SHAPES)
def test_every_method_goes_on_with_the_same_bits(method, tmp_path):
    script = Script(Toys(method), data=lambda: shuffled((5, WIDTH)))
    script.check(tmp_path, 4, epochs=2, config={"save_checkpoint_steps": 4})


class Accumulating(nn.TrainOneStepCell):
    """Adds up the gradients of two steps, then makes one of the optimizer."""

    def __init__(self, network, optimizer):
        super().__init__(network, optimizer)
        self.sums = optimizer.parameters.clone("sums", "zeros")
        self.count = Parameter(Tensor(0, ms.int32), name="count")
        self.add = ops.HyperMap()

    def construct(self, *inputs):
        loss = self.network(*inputs)
        grads = self.grad(self.network, self.weights)(*inputs, ops.ones_like(loss))
        loss = ops.depend(loss, self.add(ops.assign_add, self.sums, grads))
        self.count += 1
        if self.count % 2 == 0:
            loss = ops.depend(loss, self.optimizer(self.sums))
            loss = ops.depend(loss, self.add(ops.partial(_scale, 0.0), self.sums))
        return loss


def _scale(factor, param):
    return ops.assign(param, param * factor)


def with_loss(network):
    return nn.WithLossCell(network, nn.CrossEntropyLoss())


class Scaling(nn.TrainOneStepCell):
    """Scales the loss, by MindSpore's own update; its TrainOneStepWithLossScaleCell needs an Ascend in 2.7."""

    def __init__(self, network, optimizer):
        super().__init__(network, optimizer)
        self.scale = Parameter(Tensor(2.0**10, ms.float32), name="scale")
        self.update = nn.DynamicLossScaleUpdateCell(2.0**10, 2, 2)
        self.divide = ops.HyperMap()

    def construct(self, *inputs):
        loss = self.network(*inputs)
        grads = self.grad(self.network, self.weights)(*inputs, self.scale * 1.0)
        grads = self.divide(ops.partial(_divide, self.scale), grads)
        loss = ops.depend(loss, self.optimizer(grads))
        return loss, self.update(self.scale, loss > 1.0)


def _divide(factor, grad):
    return grad / factor


def scaling(network, optimizer):
    """A loss scale in the graph, and one in Python."""
    model = Model(Scaling(with_loss(network), optimizer))
    model._loss_scale_manager = ms.amp.DynamicLossScaleManager(2**10, 2, 2)  # on a CPU MindSpore takes none
    return model


class Moving(nn.Cell):
    """A network with running statistics, and with a buffer that it moves itself."""

    def __init__(self):
        super().__init__()
        self.norm, self.net = nn.BatchNorm1d(WIDTH), Net()
        self.calls = Parameter(Tensor(np.zeros(3, np.float32)), name="calls", requires_grad=False)

    def construct(self, x):
        self.calls += x.mean()
        return self.net(self.norm(x)) + self.calls


class Flat(nn.Cell):
    """A base without a delta."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Dense(WIDTH, WIDTH), nn.Dense(WIDTH, LABELS)

    def construct(self, x):
        return self.head(self.fc(x))


def adapted(active="default", **fields):
    model = get_peft_model(Flat(), LoraConfig(r=2, target_modules=["fc"], **fields))
    model.add_adapter("other", LoraConfig(r=3, target_modules=["fc", "head"]))
    model.set_adapter(active)
    return model


ADALORA = AdaLoraConfig(target_modules=["fc"], init_r=4, target_r=1, tinit=1, tfinal=2, deltaT=2, total_step=STEPS)
SCRIPTS = {
    "groups": Script(optimizer=lambda net: nn.AdamWeightDecay(lora_plus_groups(net, 0.01, 4, weight_decay=0.1))),
    "adalora": Script(
        lambda: get_peft_model(Flat(), ADALORA),
        lambda net: AdaLoraOptimizer(adam(net), net, ADALORA),
        model=lambda net, optimizer: Model(nn.TrainOneStepCell(OrthogonalLoss(with_loss(net)), optimizer)),
    ),
    "rates and loss scale": Script(
        optimizer=lambda net: nn.Momentum(net.trainable_params(), [0.1 / n for n in range(1, 20)], 0.9), model=scaling
    ),
    "schedule and accumulation": Script(
        optimizer=lambda net: nn.Adam(net.trainable_params(), nn.CosineDecayLR(1e-4, 0.1, STEPS)),
        model=lambda net, optimizer: Model(Accumulating(with_loss(net), optimizer)),
    ),
    "buffers": Script(Moving),
    "adapters": Script(adapted),
    "second adapter": Script(lambda: adapted("other", init_lora_weights="pissa")),
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_all_that_decides_about_the_bits_comes_back(kind, mode, tmp_path):
    SCRIPTS[kind].check(tmp_path, 5, dataset_sink_mode=True)


class Drawing(Callback):
    """Moves a parameter by random numbers of three kinds."""

    def on_train_step_end(self, run_context):
        param = run_context.original_args().network.trainable_params()[0]
        noise = np.random.normal() + random.gauss(0, 1) + float(ops.randn(1).asnumpy()[0])
        ops.assign(param, Tensor(param.asnumpy() + np.float32(noise)))


@pytest.mark.parametrize("step", [4, 6])
def test_random_numbers_go_on(step, tmp_path):
    Script(lambda: Net(dropout=0.5)).check(tmp_path, step, callbacks=[Drawing()])


def changing():
    """A dataset with a Python function that draws from NumPy's global generator."""
    change = lambda x: (x + np.random.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    rows = {"x": np.ones((ROWS, WIDTH), np.float32), "y": np.arange(ROWS, dtype=np.int32) % LABELS}
    return ds.NumpySlicesDataset(rows, shuffle=False).map(change, ["x"], num_parallel_workers=1).batch(BATCH)


def interrupt(script, folder, step, **arguments):
    with pytest.raises(Interrupt):
        script.train(folder, callbacks=[InterruptAt(step)], **arguments)


def there(folder):
    """The steps that are saved, as `run/step`."""
    return sorted(f"{path.parent.name[4:]}/{path.name[5:]}" for path in folder.glob("resume/run_*/step_*"))


def deltas(folder):
    return sorted(path.name for path in folder.glob("*.ckpt"))


def test_again_and_again_in_one_folder_and_beyond_the_end(tmp_path):
    script = Script(lambda: Net(dropout=0.5))
    whole = bits(script.train(tmp_path / "whole", epochs=4))
    folder, few = tmp_path / "parts", {"keep_checkpoint_max": 2}
    interrupt(script, folder, 3, config=few)
    for step in (4, 7):  # the second one falls into another epoch
        with pytest.raises(Interrupt):
            script.train(folder, callbacks=[InterruptAt(step)], config=few, train=resume)
    assert there(folder) == ["2/5", "2/6"]
    script.train(folder, config=few, train=resume)
    assert script.done == 6 and there(folder) == ["3/8", "3/9"]
    with pytest.warns(UserWarning, match="9 steps are done, which is the whole training"):
        over = bits(script.train(folder, config=few, train=resume))
    assert bits(script.train(folder, epochs=4, config=few, train=resume)) == whole
    assert script.done == 9 and there(folder) == ["4/11", "4/12"]
    with pytest.warns(UserWarning, match="12 steps are done"):
        assert bits(script.train(folder, epochs=4, config=few, train=resume)) == whole
    assert over != whole


def test_the_same_model_is_resumed_without_a_new_process(mode, tmp_path):
    script = Script(Moving)
    whole = bits(script.train(tmp_path))
    model, _ = script.start()
    for step in (2, 5):
        assert resume(model, tmp_path, EPOCHS, shuffled(), step=step, dataset_sink_mode=False) == step
        assert bits(model) == whole


def test_the_numbers_and_files_that_callbacks_see_and_write(tmp_path):
    seen = []

    class See(Callback):
        def on_train_step_end(self, run_context):
            params = run_context.original_args()
            seen.append((params.cur_epoch_num, params.cur_step_num))

    script, config = Script(), {"save_checkpoint_steps": 2, "keep_checkpoint_max": 3}
    whole = script.train(tmp_path / "whole", config=config)
    interrupt(script, tmp_path, 6, config=config)
    resumed = script.train(tmp_path, callbacks=[See()], config=config, train=resume)
    assert seen == [((step - 1) // 3 + 1, step) for step in range(5, 10)]
    assert deltas(tmp_path / "whole") == ["DELTA_CKP-2_3.ckpt", "DELTA_CKP-3_2.ckpt", "DELTA_CKP-3_3.ckpt"]
    assert deltas(tmp_path) == deltas(tmp_path / "whole")
    assert bits(whole) == bits(resumed)
    for name in deltas(tmp_path):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


class Halve(Callback):
    """Halves the learning rate at the end of each epoch."""

    def on_train_epoch_end(self, run_context):
        rate = run_context.original_args().optimizer.learning_rate
        ops.assign(rate, rate.value() / 2)


def test_what_is_done_at_the_end_of_an_epoch_is_in_the_state_of_its_last_step(tmp_path):
    def evaluated():
        return ds.NumpySlicesDataset({"x": np.ones((4, WIDTH), np.float32), "y": np.zeros(4, np.int32)}).batch(4)

    script = Script()
    script.model = lambda network, optimizer: Model(network, nn.CrossEntropyLoss(), optimizer, metrics={"loss"})
    whole = bits(script.train(tmp_path, callbacks=[Halve()]))
    for step in (5, 6):
        options = {"train": resume, "step": step, "valid_dataset": evaluated()}
        resumed = script.train(tmp_path, callbacks=[Halve()], **options)
        assert bits(resumed) == whole and resumed._optimizer.learning_rate.asnumpy() == np.float32(0.05) / 8


def test_a_file_whose_state_was_not_complete_is_written_again(tmp_path):
    script = Script()
    whole = script.train(tmp_path / "whole", epochs=2)
    interrupt(script, tmp_path, 6)
    (tmp_path / "resume/run_0/step_5/rank_0_of_1.json").unlink()
    for step in (1, 2, 3, 4):
        (tmp_path / f"DELTA_CKP-{(step - 1) // 3 + 1}_{(step - 1) % 3 + 1}.ckpt").unlink()
    seen = []

    class See(Callback):
        def on_train_step_begin(self, run_context):
            seen.append(deltas(tmp_path))

    resumed = script.train(tmp_path, epochs=2, callbacks=[See()], config={"keep_checkpoint_max": 1}, train=resume)
    assert script.done == 4 and seen == [["DELTA_CKP-2_2.ckpt"]] * 2
    assert deltas(tmp_path) == ["DELTA_CKP-2_3.ckpt"] and bits(resumed) == bits(whole)


def test_a_training_that_was_asked_to_stop_goes_on(tmp_path):
    class Stop(Callback):
        def on_train_step_end(self, run_context):
            if run_context.original_args().cur_step_num == 4:
                run_context.request_stop()

    script = Script(lambda: Net(dropout=0.5))
    whole = bits(script.train(tmp_path / "whole"))
    script.train(tmp_path, callbacks=[Stop()], config={"save_checkpoint_steps": 3})
    assert bits(script.train(tmp_path, train=resume, replay=False)) == whole
    assert script.done == 4


def test_no_state_in_the_files_for_inference(tmp_path):
    Script().train(tmp_path, epochs=1)
    assert set(ms.load_checkpoint(str(tmp_path / "DELTA_CKP-1_3.ckpt"))) == {
        "fc.mindpet_delta_lora_a",
        "fc.mindpet_delta_lora_b",
    }


def test_a_first_start(tmp_path):
    script = Script()
    with pytest.raises(CheckpointError, match="has no step that is complete of all ranks; complete are: none"):
        script.train(tmp_path, train=resume)
    resumed = script.train(tmp_path, train=resume, missing_ok=True)
    assert script.done == 0 and bits(resumed) == bits(script.train(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="has not step 50 .* complete are: 1, 2, 3, 4, 5, 6, 7, 8, 9"):
        script.train(tmp_path, train=resume, step=50, missing_ok=True)


def test_incomplete_steps_are_passed_over_with_a_word(tmp_path):
    script = Script()
    whole = bits(script.train(tmp_path))
    steps = tmp_path / "resume/run_0"
    (steps / "step_9/rank_0_of_1.json").unlink()
    with open(steps / "step_8/rank_0_of_1.safetensors", "ab") as file:
        file.truncate(100)
    (steps / "step_7/rank_0_of_1.json").write_text("{")
    (steps / "step_6/rank_0_of_1.json").rename(steps / "step_6/rank_0_of_2.json")
    (steps / "step_6/rank_0_of_1.safetensors").rename(steps / "step_6/rank_0_of_2.safetensors")
    with pytest.warns(UserWarning) as warned:
        assert bits(script.train(tmp_path, train=resume)) == whole
    told = [str(one.message) for one in warned if "passed over" in str(one.message)]
    assert [text.split("/")[-1] for text in told] == [
        "step_9 has no commit marker: it is passed over.",
        "step_8 has no commit marker: it is passed over.",
        "step_7 has no commit marker: it is passed over.",
        "step_6 lacks rank_1_of_2: it is passed over.",
    ]
    assert script.done == 5


def test_a_damaged_step_is_one_error(tmp_path):
    script = Script()
    script.train(tmp_path)
    file = tmp_path / "resume/run_0/step_9/rank_0_of_1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="step_9.*: damaged: not the content that its commit marker was written"):
        script.train(tmp_path, epochs=4, train=resume)


def test_what_is_no_state_is_one_error(tmp_path):
    RunFolder(tmp_path, 0, 1, 1).write(1, {"value": np.zeros(3, np.float32)}, {})
    with pytest.raises(CheckpointError, match="step_1: not a state that TrainableParamsCheckPoint has saved"):
        Script().train(tmp_path, train=resume)


def wide():
    network = Net()
    network.fc.weight.set_data(Tensor(np.ones((LABELS, WIDTH), np.float32)))
    return network


OTHERS = {
    "base": (Script(wide), "base: fc.weight: other values"),
    "length": (Script(data=lambda: shuffled(rows=16)), "dataset: batches: 3 there, 4 here"),
    "optimizer": (
        Script(optimizer=lambda net: nn.Momentum(net.trainable_params(), 0.05, 0.9)),
        "class: 'Adam' there, 'Momentum' here.*training.moment1.*: not in this training.*: not in the state",
    ),
    "rate": (
        Script(optimizer=lambda net: nn.Adam(net.trainable_params(), 0.1)),
        "init_learning_rate: 0.05 there, 0.1 here",
    ),
    "beta": (
        Script(optimizer=lambda net: nn.Adam(net.trainable_params(), 0.05, beta1=0.8)),
        "beta1: 0.89.* there, 0.80.* here",
    ),
    "dropout": (Script(lambda: Net(dropout=0.1)), "dropout: \\[\\] there, \\[0.9\\] here"),
    "network": (Script(lambda: adapted()), "network: 'Net' there, 'PeftModel' here"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_another_training_is_one_error_that_changes_nothing(kind, tmp_path):
    Script().train(tmp_path, epochs=1)
    other, message = OTHERS[kind]
    model, data = other.start()
    before = bits(model)
    with pytest.raises(CheckpointError, match="(?s)is of another training; nothing is changed:.*" + message):
        resume(model, tmp_path, EPOCHS, data, dataset_sink_mode=False)
    assert bits(model) == before and data.get_init_step() == 0


def test_another_seed_another_mode_and_another_active_adapter(tmp_path):
    script = Script(adapted)
    script.train(tmp_path, epochs=1)
    model, data = Script(lambda: adapted("other")).start()
    ms.set_seed(8)
    ms.set_context(mode=ms.GRAPH_MODE)
    with pytest.raises(CheckpointError) as error:
        resume(model, tmp_path, EPOCHS, data)
    for text in ("seed: mindspore: 7 there, 8 here", "mode: 'PyNative'", "active: 'default' there, 'other' here"):
        assert text in str(error.value)


def test_inactive_adapters_come_back(tmp_path):
    script = Script(adapted)
    model, data = script.start()
    other = model._network.adapters["other"]
    other.write({path: np.asarray(value * value.dtype.type(2)) for path, value in other.values.items()})
    checkpoint = TrainableParamsCheckPoint(str(tmp_path), resumable=True)
    model.train(1, data, [checkpoint], dataset_sink_mode=False)
    resumed = script.train(tmp_path, epochs=2, train=resume)
    for path, value in other.values.items():
        np.testing.assert_array_equal(resumed._network.adapters["other"].values[path], value)


def test_arguments(tmp_path):
    model, data = Script().start()
    with pytest.raises(TypeError, match="(?s)'model'.*'directory'.*'epoch'.*'train_dataset'.*'callbacks'.*'step'"):
        resume(None, 3, "4", None, [1], step="5")
    with pytest.raises(TypeError, match="'initial_epoch' must be left out"):
        resume(model, tmp_path, 3, data, initial_epoch=1)
    with pytest.raises(TypeError, match="'resumable' must be a bool"):
        TrainableParamsCheckPoint(str(tmp_path), resumable=1)
    with pytest.raises(ValueError, match="'resumable' must be False with an 'enc_key'"):
        TrainableParamsCheckPoint(str(tmp_path), config=CheckpointConfig(enc_key=b"0" * 16), resumable=True)


def test_no_seed(tmp_path):
    ms.set_seed(7)
    ds.config.set_seed(5489)  # as before there was one
    data, network = shuffled(), Net()
    model = Model(network, nn.CrossEntropyLoss(), adam(network))
    with pytest.raises(CheckpointError, match="can be resumed only with a seed"):
        model.train(1, data, TrainableParamsCheckPoint(str(tmp_path), resumable=True), dataset_sink_mode=False)


def test_dropout_is_left_as_it_was(tmp_path):
    model = Script(lambda: Net(dropout=0.5)).train(tmp_path, epochs=1)
    (dropout,) = [cell.dropout for _, cell in model._network.cells_and_names() if isinstance(cell, nn.Dropout)]
    assert type(dropout) is ops.Dropout


def test_data_that_draws_from_the_global_generator(tmp_path):
    with pytest.warns(UserWarning, match="NumPy's random state has moved since the training went on"):
        Script(data=changing).check(tmp_path, 4)
