"""Adapters that go from Hugging Face PEFT to mindpet and back: the same numbers, trained, saved, loaded and merged."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpet.errors import ConfigError
from mindpet.files.convert import convert
from mindpet.files.tensors import save_tensors
from mindpet.peft import LoraConfig, PeftModel, PrefixTuningConfig, Ptuning2Config, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
TARGETS = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}
EMBEDDINGS = {"bert": "word_embeddings", "gpt2": "wpe", "llama": "embed_tokens"}
LORA = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 3}},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "embedding": {"embedding": True},
    "embedding_dora": {"embedding": True, "use_dora": True},
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))
# LLaMA has no biases that lora_bias could be folded into, or that could train; PEFT cannot start OLoRA from a Conv1D.
IMPOSSIBLE = {("llama", "lora_bias"), ("llama", "bias_lora_only"), ("llama", "bias_all"), ("gpt2", "olora")}
LORA_CASES = [(kind, method) for kind in TASKS for method in LORA if (kind, method) not in IMPOSSIBLE]


def fields(kind, method):
    """The keywords of LoraConfig."""
    extra = dict(LORA[method])
    targets = TARGETS[kind] + ([EMBEDDINGS[kind]] if extra.pop("embedding", False) else [])
    return {"r": 4, "lora_alpha": 6, "task_type": TASKS[kind], "target_modules": targets, **extra}


BOTH_MODES = [(ms.PYNATIVE_MODE, *case) for case in LORA_CASES]
BOTH_MODES += [(ms.GRAPH_MODE, kind, method) for kind, method in LORA_CASES if method in ("lora", "embedding_dora")]


@pytest.mark.parametrize("mode, kind, method", BOTH_MODES)
def test_lora_of_hugging_face_loads_and_merges(mode, kind, method, rng, tmp_path):
    import peft
    from pairs import disturb, inputs, make_pair, their_logits

    ms.set_context(mode=mode)
    theirs, ours = make_pair(kind, tmp_path / "base")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields(kind, method))).eval()
    disturb(wrapped, rng)
    wrapped.save_pretrained(tmp_path / "adapter")
    torch_inputs, our_inputs = inputs(kind, rng)
    expected = their_logits(wrapped, torch_inputs)
    base = ours(*our_inputs).asnumpy()
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), expected, atol=1e-5)
    assert np.abs(base - expected).max() > 1e-2
    with model.disable_adapter():
        np.testing.assert_allclose(model(*our_inputs).asnumpy(), base, atol=1e-5)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(*our_inputs).asnumpy(), expected, atol=1e-5)
    np.testing.assert_allclose(their_logits(wrapped.merge_and_unload(), torch_inputs), expected, atol=1e-5)


@pytest.mark.parametrize("kind, method", LORA_CASES)
def test_lora_of_mindpet_loads_in_hugging_face(kind, method, rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, move, their_logits

    theirs, ours = make_pair(kind, tmp_path / "base")
    model = get_peft_model(ours, LoraConfig(**fields(kind, method)))
    move(model, rng)
    model.save_pretrained(tmp_path / "adapter")
    torch_inputs, our_inputs = inputs(kind, rng)
    expected = model(*our_inputs).asnumpy()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    np.testing.assert_allclose(their_logits(wrapped, torch_inputs), expected, atol=1e-5)
    content = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert content["peft_type"] == "LORA" and content["inference_mode"] is True


@KINDS
@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_go_both_ways(kind, projection, rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, move, their_logits

    theirs, ours = make_pair(kind, tmp_path / "base")
    common = {"num_virtual_tokens": 3, "prefix_projection": projection, "task_type": TASKS[kind]}
    torch_inputs, our_inputs = inputs(kind, rng)
    model = get_peft_model(ours, PrefixTuningConfig(**common, encoder_hidden_size=8 if projection else None))
    move(model, rng)
    expected = model(*our_inputs).asnumpy()
    model.save_pretrained(tmp_path / "ours")
    model.unload()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(wrapped, torch_inputs), expected, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    np.testing.assert_allclose(again(*our_inputs).asnumpy(), expected, atol=1e-5)


STEPS = [(ms.PYNATIVE_MODE, method) for method in ("lora", "dora", "rslora", "embedding")] + [(ms.GRAPH_MODE, "lora")]


@KINDS
@pytest.mark.parametrize("mode, method", STEPS)
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, method, rng, tmp_path):
    import peft
    from pairs import disturb, inputs, make_pair, step_both

    ms.set_context(mode=mode)
    theirs, ours = make_pair(kind, tmp_path / "base")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields(kind, method))).eval()
    disturb(wrapped, rng)
    wrapped.save_pretrained(tmp_path / "start")
    torch_inputs, our_inputs = inputs(kind, rng)
    model = PeftModel.from_pretrained(ours, tmp_path / "start", is_trainable=True)
    step_both(wrapped, model, torch_inputs, our_inputs)
    wrapped.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    a, b = (
        ms.load_checkpoint(str(tmp_path / who / "adapter_model.safetensors"), format="safetensors")
        for who in ("ours", "theirs")
    )
    assert set(a) == {name for name in b if not name.endswith("base_layer.weight")}  # an embedding's, not trained
    for name in a:
        np.testing.assert_allclose(a[name].asnumpy(), b[name].asnumpy(), atol=2e-6, err_msg=name)
    start = ms.load_checkpoint(str(tmp_path / "start/adapter_model.safetensors"), format="safetensors")
    assert max(np.abs(a[name].asnumpy() - start[name].asnumpy()).max() for name in a) > 1e-4


@KINDS
def test_the_line_about_trainable_parameters_is_the_same(kind, capsys, tmp_path):
    import peft
    from pairs import make_pair

    theirs, ours = make_pair(kind, tmp_path)
    peft.get_peft_model(theirs, peft.LoraConfig(**fields(kind, "dora"))).print_trainable_parameters()
    get_peft_model(ours, LoraConfig(**fields(kind, "dora"))).print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("trainable params: ")


SUMS = {
    "linear": {"combination_type": "linear"},
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd"},
    "svd of rank 3": {"combination_type": "svd", "svd_rank": 3, "svd_full_matrices": False},
    "ties": {"combination_type": "ties", "density": 0.4},
    "ties_svd": {"combination_type": "ties_svd", "density": 0.4, "majority_sign_method": "frequency"},
    "magnitude_prune": {"combination_type": "magnitude_prune", "density": 0.4},
    "magnitude_prune_svd": {"combination_type": "magnitude_prune_svd", "density": 0.4, "svd_rank": 3},
    # All is kept, so that nothing is left to chance.
    "dare_linear": {"combination_type": "dare_linear", "density": 1.0},
    "dare_ties": {"combination_type": "dare_ties", "density": 1.0},
    "dare_ties_svd": {"combination_type": "dare_ties_svd", "density": 1.0},
}


@pytest.mark.parametrize("name", list(SUMS))
@pytest.mark.parametrize("targets", [("fc", "fc"), ("fc|block.attn", ["fc", "classifier"]), (["fc", "attn"], ["fc"])])
def test_weighted_sums_of_adapters_are_the_same(name, targets, rng, tmp_path):
    """Layers of one adapter only, paths that are ends of others, a negative weight; also what is saved of the sum."""
    import peft
    import torch
    from pairs import WIDTH, make_colliding

    theirs, ours = make_colliding()
    fields = [{"r": 4, "lora_alpha": alpha, "target_modules": target} for alpha, target in zip((8, 6), targets)]
    if isinstance(targets[0], str) != isinstance(targets[1], str):  # PEFT adds up either lists or regular expressions
        fields[1]["target_modules"] = r".*fc|classifier"
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields[0]), adapter_name="one").eval()
    wrapped.add_adapter("two", peft.LoraConfig(**fields[1]))
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.tensor(rng.normal(size=tuple(parameter.shape)) * 0.5))
    wrapped.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(ours, tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    for target in (wrapped, model):
        target.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", **SUMS[name])
        target.set_adapter("sum")
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = wrapped(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "ours", selected_adapters=["sum"])
    again = peft.PeftModel.from_pretrained(make_colliding()[0], tmp_path / "ours/sum").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(x)).numpy(), expected, atol=1e-4)


CHOICES = {
    "one of two": {"target_modules": "fc"},
    "ranks": {"target_modules": ["fc"], "rank_pattern": {"^fc": 3, "block.fc": 2}, "alpha_pattern": {"^fc": 5}},
    "numbers": {"target_modules": ["fc", "attn"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "modules": {"target_modules": ["attn"], "modules_to_save": ["norm"]},
    "module": {"target_modules": ["attn"], "modules_to_save": ["classifier"]},
    "bias": {"target_modules": ["fc"], "bias": "all"},
}
# Those that Hugging Face PEFT does not take itself.
OURS = {
    "numbers of a regex": {"target_modules": r".*\.fc", "layers_to_transform": [1]},
    "numbers of all": {"target_modules": "all-linear", "layers_to_transform": [0]},
    "a str of modules": {"target_modules": ["attn"], "modules_to_save": "norm"},
}


@pytest.mark.parametrize("choice", [*CHOICES, *OURS])
def test_names_that_end_alike_go_to_hugging_face(choice, rng, tmp_path):
    import peft
    import torch
    from pairs import WIDTH, make_colliding, move

    theirs, ours = make_colliding()
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    model = get_peft_model(ours, LoraConfig(r=4, lora_alpha=6, **{**CHOICES, **OURS}[choice]))
    move(model, rng, 0.3)
    expected = model(Tensor(x)).asnumpy()
    model.save_pretrained(tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(wrapped(torch.tensor(x)).numpy(), expected, atol=1e-5)
    again = PeftModel.from_pretrained(model.unload(), tmp_path)
    np.testing.assert_allclose(again(Tensor(x)).asnumpy(), expected, atol=1e-5)


LOOSE = {
    "target_modules": ["fc", "gate_proj"],
    "exclude_modules": ["tower"],
    "rank_pattern": {"up_proj": 2, "layers.0.fc": 2},
    "alpha_pattern": {"down_proj": 2},
    "modules_to_save": ["score", "my_classifier"],
}


@pytest.mark.parametrize("choice", [*CHOICES, "loose"])
def test_names_that_end_alike_come_from_hugging_face(choice, rng, tmp_path):
    import peft
    import torch
    from pairs import WIDTH, disturb, make_colliding

    theirs, ours = make_colliding()
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)
    choices = {**CHOICES, "loose": LOOSE}
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=6, **choices[choice])).eval()
    disturb(wrapped, rng)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = wrapped(torch.tensor(x)).numpy()
    model = PeftModel.from_pretrained(ours, tmp_path)
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), expected, atol=1e-5)


def test_a_batch_norm_goes_both_ways(rng, tmp_path):
    import peft
    import torch
    from pairs import WIDTH, disturb

    fields = {"target_modules": ["0"], "modules_to_save": ["1"]}
    x = rng.normal(size=(5, WIDTH)).astype(np.float32)

    def pair():
        torch.manual_seed(1)
        theirs = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH)).eval()
        ours = nn.SequentialCell(nn.Dense(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).set_train(False)
        for name in ("weight", "bias"):
            getattr(ours[0], name).set_data(Tensor(getattr(theirs[0], name).detach().numpy()))
        return theirs, ours

    theirs, ours = pair()
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields)).eval()
    disturb(wrapped, rng)
    with torch.no_grad():
        wrapped.base_model.model[1].modules_to_save["default"].running_mean.add_(0.5)
        expected = wrapped(torch.tensor(x)).numpy()
    wrapped.save_pretrained(tmp_path / "theirs")
    model = PeftModel.from_pretrained(ours, tmp_path / "theirs").set_train(False)
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), expected, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(pair()[0], tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(x)).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("projection", ["layers", "encoder"])
def test_a_delta_file_of_projected_prefixes_goes_to_hugging_face(projection, rng, tmp_path):
    """Of a PrefixLayer in each attention, and of P-Tuning v2 in each attention."""
    import peft
    from pairs import inputs, make_pair, move, their_logits

    theirs, ours = make_pair("gpt2", tmp_path / "base")
    torch_inputs, our_inputs = inputs("gpt2", rng)
    cls = PrefixTuningConfig if projection == "layers" else Ptuning2Config
    config = cls(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM")
    model = get_peft_model(ours, config)
    move(model, rng)
    expected = model.set_train(False)(*our_inputs).asnumpy()
    save_tensors(tmp_path / "d.safetensors", {param.name: param.asnumpy() for param in model.trainable_params()})
    convert(tmp_path / "d.safetensors", tmp_path / "a", model.peft_config["default"])
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "a").eval()
    np.testing.assert_allclose(their_logits(wrapped, torch_inputs), expected, atol=1e-4)


def test_ptuning2_goes_to_hugging_face(rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, their_logits

    theirs, ours = make_pair("gpt2", tmp_path / "base")
    torch_inputs, our_inputs = inputs("gpt2", rng)
    model = get_peft_model(ours, Ptuning2Config(num_virtual_tokens=3, dropout_prob=0.1, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    expected = model.set_train(False)(*our_inputs).asnumpy()
    np.testing.assert_allclose(their_logits(wrapped, torch_inputs), expected, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa_niter_4", "pissa"])
def test_an_approximate_start_of_hugging_face_is_refused_and_ours_is_exact(init, rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, move, their_logits

    theirs, ours = make_pair("llama", tmp_path / "base")
    torch_inputs, our_inputs = inputs("llama", rng)
    config = {**fields("llama", "lora"), "init_lora_weights": init}
    model = get_peft_model(ours, LoraConfig(**config))
    move(model, rng)
    expected = model(*our_inputs).asnumpy()
    model.save_pretrained(tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    np.testing.assert_allclose(their_logits(wrapped, torch_inputs), expected, atol=1e-5)
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    if init != "pissa":
        peft.get_peft_model(make_pair("llama", tmp_path)[0], peft.LoraConfig(**config)).save_pretrained(tmp_path / "a")
        with pytest.raises(ConfigError, match="init_lora_weights='pissa_niter_4', which takes a part off the base"):
            PeftModel.from_pretrained(model.unload(), tmp_path / "a")
