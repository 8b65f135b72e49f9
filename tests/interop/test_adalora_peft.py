"""AdaLoRA from Hugging Face PEFT to mindpet and back, and the same training in both."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from mindpet.delta import AdaLoraOptimizer, OrthogonalLoss
from mindpet.files.convert import convert
from mindpet.files.tensors import TensorFile
from mindpet.peft import AdaLoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
FIELDS = {
    "bert": {"target_modules": ["query", "value", "output.dense"]},
    "gpt2": {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}
BUDGET = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def fields(kind, **more):
    """The keywords of the configuration, there and here."""
    return {**BUDGET, "task_type": TASKS[kind], **FIELDS[kind], **more}


def theirs(kind, **more):
    import peft

    return peft.AdaLoraConfig(**fields(kind, **more))


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_train_along(bias, rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges("bert", theirs("bert", bias=bias), rng, tmp_path)


@KINDS
@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_ours_loads_there(kind, bias, rng, tmp_path):
    from both_ways import ours_loads_there

    if kind != "llama" or bias == "none":  # LLaMA has no biases
        ours_loads_there(kind, AdaLoraConfig(**fields(kind, bias=bias)), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_adapters_and_a_module_that_is_saved(rng, tmp_path):
    """Hugging Face PEFT trains one at a time."""
    import peft
    from both_ways import several_adapters

    one = peft.AdaLoraConfig(target_modules=["fc", "attn"], modules_to_save=["my_classifier"], **BUDGET)
    two = peft.AdaLoraConfig(target_modules=["fc"], inference_mode=True, **{**BUDGET, "init_r": 3})
    several_adapters((one, two), rng, tmp_path)


@pytest.mark.parametrize(
    "choice", [{"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": "fc"}]
)
def test_a_choice_of_layers_is_understood_there(choice, rng, tmp_path):
    from both_ways import ours_loads_there_without_a_warning

    config = AdaLoraConfig(target_modules=["fc", "attn"], **choice, **BUDGET)
    ours_loads_there_without_a_warning(config, rng, tmp_path)


def test_the_term_of_the_loss(mode, rng, tmp_path):
    """Of a language model, whose loss Hugging Face PEFT adds it to."""
    import peft
    from both_ways import SIZE
    from pairs import disturb, inputs, make_pair

    theirs_model, ours = make_pair("gpt2", tmp_path / "base")
    wrapped = peft.get_peft_model(theirs_model, theirs("gpt2", orth_reg_weight=0.3)).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path / "adapter")
    torch_inputs, our_inputs = inputs("gpt2", rng)
    with_term = wrapped(**torch_inputs, labels=torch_inputs["input_ids"]).loss.item()
    wrapped.peft_config["default"].orth_reg_weight = 1e-9
    without = wrapped(**torch_inputs, labels=torch_inputs["input_ids"]).loss.item()
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    loss = OrthogonalLoss(Mean(model), model.peft_config["default"].orth_reg_weight)
    got = float(loss(*our_inputs).asnumpy()) - float(Mean(model)(*our_inputs).asnumpy())
    assert with_term - without > 0.1
    np.testing.assert_allclose(got, with_term - without, atol=1e-5)


class Mean(nn.Cell):
    """The mean square of a network's output."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, x):
        return ops.square(self.network(x)).mean()


SCHEDULES = {
    "every step": {},
    "every second step": {"tinit": 1, "tfinal": 3, "deltaT": 2, "beta1": 0.5, "beta2": 0.7},
    "a rank of all": {"target_r": 1, "init_r": 3, "tinit": 2, "tfinal": 2},
}


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_training_chooses_the_same_ranks(schedule, mode, rng, tmp_path):
    """The same E, masks, losses and files in twelve steps, as many as are scheduled and two more."""
    import peft
    import torch
    from both_ways import close
    from pairs import WIDTH, disturb, make_colliding

    theirs_model, ours = make_colliding()
    own = {"target_modules": ["fc", "attn"], **BUDGET, **SCHEDULES[schedule]}
    wrapped = peft.get_peft_model(theirs_model, peft.AdaLoraConfig(**own))
    disturb(wrapped, rng, 0.5)
    wrapped.save_pretrained(tmp_path / "start")
    model = PeftModel.from_pretrained(ours, tmp_path / "start", is_trainable=True).set_train()
    config = model.peft_config["default"]
    x = rng.normal(size=(12, 5, WIDTH)).astype(np.float32)

    their_optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    optimizer = AdaLoraOptimizer(nn.SGD(model.trainable_params(), 0.1), model, config)
    step = nn.TrainOneStepCell(OrthogonalLoss(Mean(model), 0.5), optimizer).set_train()
    patterns = []
    for i in range(12):
        terms = [
            (g - torch.eye(len(g))).norm()
            for name, p in wrapped.named_parameters()
            for g in ([p @ p.T] if "lora_A" in name else [p.T @ p] if "lora_B" in name else [])
        ]
        loss = wrapped(torch.tensor(x[i])).square().mean() + 0.5 * torch.stack(terms).mean()
        their_optimizer.zero_grad()
        loss.backward()
        their_optimizer.step()
        wrapped.base_model.update_and_allocate(i)
        close(float(step(Tensor(x[i])).asnumpy()), loss.item())
        theirs_e = {n: p.detach().numpy() for n, p in wrapped.named_parameters() if "lora_E" in n}
        ours_e = [p.asnumpy() for p in model.trainable_params() if p.name.endswith("adalora_e")]
        for got, expected in zip(ours_e, theirs_e.values()):
            close(got, expected)
        masks = wrapped.peft_config["default"].rank_pattern or {}
        patterns.append(str(masks))
        assert not masks or list(optimizer.rank_pattern.values()) == list(masks.values())
    assert list(optimizer.rank_pattern) == [key.replace(".default", "") for key in masks]
    assert len(set(patterns)) > 2 and not all(all(mask) for mask in masks.values())

    wrapped.save_pretrained(tmp_path / "theirs")
    optimizer.prune()
    model.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    expected = model.set_train(False)(Tensor(x[0])).asnumpy()
    again = peft.PeftModel.from_pretrained(make_colliding()[0], tmp_path / "ours").eval()
    close(again(torch.tensor(x[0])).detach().numpy(), expected)
    reloaded = PeftModel.from_pretrained(make_colliding()[1], tmp_path / "theirs")
    close(reloaded(Tensor(x[0])).asnumpy(), expected)
    reloaded.save_pretrained(tmp_path / "saved back")
    same_files(tmp_path / "saved back", tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "d.ckpt")
    convert(tmp_path / "d.ckpt", tmp_path / "converted", AdaLoraConfig.from_pretrained(tmp_path / "theirs"))
    same_files(tmp_path / "converted", tmp_path / "theirs")


def same_files(ours, theirs):
    """The same tensors, and masks of their ranks."""
    from both_ways import TENSORS, same_tensors

    same_tensors(ours / TENSORS, theirs / TENSORS)
    masks = [json.loads((folder / "adapter_config.json").read_text())["rank_pattern"] for folder in (ours, theirs)]
    assert masks[0] == masks[1] and not all(all(mask) for mask in masks[0].values())
    counts = [TensorFile(folder / TENSORS).shapes for folder in (ours, theirs)]
    assert counts[0] == counts[1]


def test_the_start_is_as_large_as_theirs(tmp_path):
    """Other random numbers, but of the same distribution."""
    import peft
    from pairs import make_pair

    for init in (True, False):
        theirs_model, ours = make_pair("llama", tmp_path)
        config = fields("llama", init_r=64, init_lora_weights=init)
        peft.get_peft_model(theirs_model, peft.AdaLoraConfig(**config)).save_pretrained(tmp_path / "theirs")
        get_peft_model(ours, AdaLoraConfig(**config)).save_pretrained(tmp_path / "ours")
        found = [TensorFile(tmp_path / who / "adapter_model.safetensors").read_all() for who in ("ours", "theirs")]
        assert found[0].keys() == found[1].keys()
        for file in ("lora_A", "lora_B", "lora_E"):
            mine, other = (np.concatenate([v.ravel() for k, v in own.items() if k.endswith(file)]) for own in found)
            assert abs(mine.std() - other.std()) <= 0.1 * other.std() and abs(mine.mean()) <= 0.2 * other.std()


def test_a_field_that_is_wrong_there_is_wrong_here():
    import peft

    for wrong in ({"total_step": None}, {"total_step": 0}, {"tinit": 6, "tfinal": 4}, {"tinit": 10}):
        for cls in (peft.AdaLoraConfig, AdaLoraConfig):
            with pytest.raises((TypeError, ValueError)):
                cls(target_modules=["fc"], **{**BUDGET, **wrong})
    assert ms.float32
