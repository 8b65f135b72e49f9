"""The example LLaMA against golden numbers, and its shard plans."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest
from mindspore import Tensor, nn
from models.llama import LORA_TARGETS, CausalLoss, LlamaConfig, LlamaForCausalLM, load_folder
from parallel import plan_llama

from mindpet.graph import freeze_delta
from mindpet.parallel import dry_run, dry_run_many

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/llama"
EXPECTED = np.load(GOLDEN / "expected.npz")


def golden_model(**overrides):
    model = LlamaForCausalLM(LlamaConfig.from_folder(GOLDEN, **overrides))
    load_folder(model, GOLDEN)
    return model.set_train(False)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_forward_gives_the_golden_numbers(lora_rank, mode):
    """Fresh LoRA changes nothing."""
    logits = golden_model(lora_rank=lora_rank)(Tensor(EXPECTED["input_ids"]))
    np.testing.assert_allclose(logits.asnumpy(), EXPECTED["logits"], atol=2e-5)


def test_the_loss_is_that_of_next_tokens(mode):
    config = LlamaConfig.from_folder(GOLDEN)
    loss = CausalLoss(config)
    load_folder(loss.network, GOLDEN)
    ids = EXPECTED["input_ids"]
    labels = np.concatenate([ids[:, 1:], np.full((len(ids), 1), -100, np.int32)], 1)
    assert float(loss(Tensor(ids), Tensor(labels)).asnumpy()) == pytest.approx(float(EXPECTED["loss"]), abs=1e-5)


def test_lora_learns(mode):
    config = LlamaConfig.from_folder(GOLDEN, lora_rank=4)
    loss = CausalLoss(config)
    load_folder(loss.network, GOLDEN)
    freeze_delta(loss, "lora")
    names = {param.name for param in loss.trainable_params()}
    assert names == {
        f"model.layers.{layer}.{part}_proj.mindpet_delta_lora_{ab}"
        for layer in (0, 1)
        for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
        for ab in "ab"
    }
    step = nn.TrainOneStepCell(loss, nn.Adam(loss.trainable_params(), 0.01)).set_train()
    ids = Tensor(EXPECTED["input_ids"])
    losses = [float(step(ids, ids).asnumpy()) for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_only_the_targets_carry_lora():
    model = LlamaForCausalLM(LlamaConfig.from_folder(GOLDEN, lora_rank=4, lora_targets=("q_proj", "v_proj")))
    carriers = {name.rsplit(".", 2)[1] for name, _ in model.parameters_and_names() if "mindpet_delta" in name}
    assert carriers == {"q_proj", "v_proj"} and set(LORA_TARGETS) > carriers


def change_config(tmp_path, **changes):
    folder = shutil.copytree(GOLDEN, tmp_path / "model")
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))
    return folder


def test_older_configs_have_rope_theta_at_the_top(tmp_path):
    folder = change_config(tmp_path, rope_parameters="drop", rope_theta=500000.0)
    assert LlamaConfig.from_folder(folder).rope_theta == 500000.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "'model_type' must be 'llama'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "'rope_scaling' must be None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'rope_scaling' must be None"),
        ({"hidden_act": "gelu"}, "'hidden_act' must be 'silu'"),
        ({"num_key_value_heads": 3}, "'num_attention_heads', 4, must be a multiple of 'num_key_value_heads', 3"),
    ],
)
def test_other_configs_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_folder(change_config(tmp_path, **changes))


def test_weights_that_do_not_fit_are_listed(tmp_path):
    folder = change_config(tmp_path, intermediate_size=32)
    with pytest.raises(ValueError, match=r"(?s)mlp.gate_proj.weight: \(32, 32\) in the model, \(64, 32\) in the file"):
        load_folder(LlamaForCausalLM(LlamaConfig.from_folder(folder)), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no .*safetensors in this folder"):
        load_folder(golden_model(), folder)


def test_a_config_that_cannot_be_cut():
    with pytest.raises(ValueError, match="'num_key_value_heads', 4, must be a multiple of 'model_parallel', 8"):
        LlamaConfig(num_attention_heads=8, num_key_value_heads=4, model_parallel=8)


TINY = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8)
SIZES = dict(data_parallel=2, model_parallel=4)


def tiny(make=plan_llama.build, **overrides):
    return functools.partial(make, batch=4, seq_length=8, **{**TINY, **SIZES, **overrides})


def test_tensor_parallel_communication_is_what_the_mathematics_needs():
    report = dry_run(tiny(num_key_value_heads=4), 8)
    plans = [plan for plan in report.operators if plan.slot not in ("", "strategy_lora_dropout")]
    assert all(plan.is_set for plan in plans if plan.cell.startswith("network"))
    assert not [plan for plan in report.collectives if plan.kind != "AllReduce"]
    tokens, rank, hidden = 4 // 2 * 8, 8, 32
    sums = {}
    for plan in report.collectives:
        if plan.phase == "forward":
            sums[plan.cause.removeprefix("sum over network.model.layers.0.")] = (plan.bytes // 4, plan.count)
    row_splits = {
        f"{name}.strategy_{which}": (tokens * width, 4)
        for name in ("self_attn.o_proj", "mlp.down_proj")
        for which, width in (("org_dense_matmul", hidden), ("lora_a_matmul", rank))
    }
    assert sums == {
        **row_splits,
        "sum in network.model.embed_tokens": (tokens * hidden, 1),
        "sum over loss.max": (tokens, 1),
        "sum over loss.sum": (tokens, 1),
        "sum over loss.picked": (tokens, 1),
        "sum over loss.total": (1, 1),
        "sum over loss.count": (1, 1),
    }


def test_lora_communicates_no_gradient_of_the_base():
    lora, full = dry_run_many([tiny(), tiny(lora_rank=0)], 8)
    assert all("weight" not in plan.cause and "table" not in plan.cause for plan in lora.collectives)
    assert any("q_proj.weight" in plan.cause for plan in full.collectives)
    assert lora.gradient_bytes == sum(plan.bytes for plan in lora.parameters if "mindpet_delta" in plan.name) / 3
    assert full.gradient_bytes == full.weight_bytes


def test_pipeline_stages():
    first, last = (dry_run(tiny(pipeline_stages=2, model_parallel=2, micro_batches=2), 8, rank=rank) for rank in (0, 4))
    layers = [
        {int(p.name.split(".")[2]) for p in r.parameters if p.name.startswith("model.layers")} for r in (first, last)
    ]
    assert layers == [{0, 1}, {2, 3}]
    sends = [(p.kind, p.phase, p.ranks, p.cause) for p in first.collectives if p.kind in ("Send", "Receive")]
    assert {send[:3] for send in sends} == {("Send", "forward", (0, 4)), ("Receive", "backward", (0, 4))}
    assert first.collectives and not any("lm_head" in p.name for p in first.parameters)


def test_the_parallel_optimizer_cuts_the_base_too():
    settings = {"enable_parallel_optimizer": True, "parallel_optimizer_config": {"parallel_optimizer_threshold": 0}}
    plain, cut = dry_run(tiny(), 8), dry_run(tiny(plan_llama.make), 8, **settings)
    assert cut.weight_bytes < 0.6 * plain.weight_bytes and cut.optimizer_bytes < 0.6 * plain.optimizer_bytes
    gathered = {plan.cause for plan in cut.collectives if plan.kind == "AllGather"}
    assert "parts of model.layers.0.mlp.up_proj.weight (parallel optimizer)" in gathered


@pytest.mark.parametrize("ranks", [8, 64, 1024, 8192])
def test_seven_billion_parameters(ranks):
    """32 layers, LoRA on seven linear layers each, a training step with Adam; the weights are never made."""
    report = dry_run(plan_llama.case(ranks), ranks)
    weights = {plan.name: plan for plan in report.parameters if plan.role != "optimizer"}
    total = sum(np.prod(plan.shape, dtype=int) for name, plan in weights.items() if "mindpet_delta" not in name)
    assert total == 6_738_415_616  # LLaMA 7B
    q = weights["model.layers.31.self_attn.q_proj.weight"]
    assert (q.shape, q.slice, q.dtype) == ((4096, 4096), (512, 4096), "Float16")
    down = weights["model.layers.0.mlp.down_proj.mindpet_delta_lora_a"]
    assert (down.shape, down.slice, down.dtype) == ((8, 11008), (8, 1376), "Float32")
    groups = {plan.group_size for plan in report.collectives if "self_attn.q_proj.mindpet_delta_lora_a" in plan.cause}
    assert groups == {ranks}
    norms, width, inner = 65 * 4096, 4096, 11008
    # Of the column splits (q, k, v, gate, up) A is whole and B cut; of the row splits (o, down) it is the reverse.
    whole = 5 * 8 * width + 2 * 8 * width
    cut = 8 * (3 * width + 2 * inner) // 8 + 8 * (width + inner) // 8
    assert report.gradient_bytes == 32 * 4 * (whole + cut)
    assert report.weight_bytes == 2 * (total - norms) // 8 + 4 * norms + report.gradient_bytes
    assert report.optimizer_bytes == 2 * report.gradient_bytes + 16
