"""Prompt tuning from Hugging Face PEFT to mindpet and back: logits, steps, files, generation."""

import json

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from models.generate import generate

from mindpet.files.convert import convert
from mindpet.files.tensors import TensorFile, save_tensors
from mindpet.graph import load_delta
from mindpet.peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model

pytestmark = pytest.mark.interop

TOKENS = 3
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
KINDS = pytest.mark.parametrize("kind", list(TASKS))
DECODERS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
PATHS = {  # of the Parameter
    "bert": "bert.embeddings.mindpet_delta_prompt",
    "gpt2": "transformer.mindpet_delta_prompt",
    "llama": "model.mindpet_delta_prompt",
}
TENSORS = "adapter_model.safetensors"
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])


def theirs_with_prompt(kind, folder, rng, **fields):
    """A torch model with a prompt, in a folder too, and the network."""
    import peft
    from pairs import disturb, make_pair

    theirs, ours = make_pair(kind, folder / "base")
    fields = {"num_virtual_tokens": TOKENS, "task_type": TASKS[kind], **fields}
    wrapped = peft.get_peft_model(theirs, peft.PromptTuningConfig(**fields)).eval()
    disturb(wrapped, rng)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped, ours


def logits_of_tokens(wrapped, arguments, tokens=TOKENS):
    """Theirs, without those of the prompt."""
    from pairs import their_logits

    logits = their_logits(wrapped, arguments)
    return logits[:, tokens:] if logits.ndim == 3 else logits


@KINDS
def test_it_loads(kind, mode, rng, tmp_path):
    from pairs import inputs

    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    torch_inputs, our_inputs = inputs(kind, rng)
    expected, base = logits_of_tokens(wrapped, torch_inputs), ours(*our_inputs).asnumpy()
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), expected, atol=1e-5)
    assert np.abs(base - expected).max() > 1e-2
    with model.disable_adapter():
        np.testing.assert_array_equal(model(*our_inputs).asnumpy(), base)
    model.save_pretrained(tmp_path / "again")
    one, other = (TensorFile(tmp_path / folder / TENSORS).read_all() for folder in ("adapter", "again"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    np.testing.assert_array_equal(model.unload()(*our_inputs).asnumpy(), base)


@KINDS
def test_ours_loads_there_also_by_way_of_a_delta_file(kind, rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, move

    theirs, ours = make_pair(kind, tmp_path / "base")
    torch_inputs, our_inputs = inputs(kind, rng)
    model = get_peft_model(ours, PromptTuningConfig(num_virtual_tokens=TOKENS, task_type=TASKS[kind]))
    move(model, rng)
    model.save_pretrained(tmp_path / "ours")
    expected = model(*our_inputs).asnumpy()
    trained = {param.name.replace("mindpet_trained_", ""): param.asnumpy() for param in model.trainable_params()}
    assert set(trained) == {PATHS[kind], *(["classifier.weight", "classifier.bias"] if kind == "bert" else [])}
    save_tensors(tmp_path / "d.safetensors", trained)
    convert(tmp_path / "d.safetensors", tmp_path / "converted", PromptTuningConfig(task_type=TASKS[kind]))
    for folder in ("ours", "converted"):
        content = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert [content[name] for name in ("peft_type", "num_virtual_tokens", "token_dim")] == ["PROMPT_TUNING", 3, 32]
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / folder).eval()
        np.testing.assert_allclose(logits_of_tokens(wrapped, torch_inputs), expected, atol=1e-5)


@KINDS
def test_a_folder_of_theirs_is_a_delta_file(kind, rng, tmp_path):
    from pairs import inputs

    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    torch_inputs, our_inputs = inputs(kind, rng)
    path, _, _ = PATHS[kind].rpartition(".")
    convert(tmp_path / "adapter", tmp_path / "d.safetensors", prefix_path=path)
    model = get_peft_model(ours, PromptTuningConfig(num_virtual_tokens=TOKENS))
    load_delta(model, tmp_path / "d.safetensors")
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), logits_of_tokens(wrapped, torch_inputs), atol=1e-5)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from pairs import inputs, step_both

    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    torch_inputs, our_inputs = inputs(kind, rng)
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    step_both(wrapped, model, torch_inputs, our_inputs, TOKENS)
    wrapped.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    start, one, other = (TensorFile(tmp_path / who / TENSORS).read_all() for who in ("adapter", "ours", "theirs"))
    assert one.keys() == other.keys() and np.abs(one["prompt_embeddings"] - start["prompt_embeddings"]).max() > 1e-4
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=2e-6, err_msg=name)


@DECODERS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_gives_their_logits(kind, side, mode, rng, tmp_path):
    import torch

    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    mask = MASK if side == "left" else MASK[:, ::-1].copy()
    ids = rng.integers(0, 60, mask.shape)
    expected = logits_of_tokens(wrapped, {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    logits = model(Tensor(ids, ms.int32), Tensor(mask, ms.int32)).asnumpy()
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-5)


@DECODERS
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_generation_gives_their_tokens(kind, mask, mode, rng, tmp_path):
    import torch

    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    ids = rng.integers(1, 60, MASK.shape) * (1 if mask is None else mask)
    expected = wrapped.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(np.ones_like(MASK) if mask is None else mask),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter").set_train(False)
    got = generate(model, ids, 6, mask)
    np.testing.assert_array_equal(got, expected.numpy())
    with model.disable_adapter():
        assert (generate(model, ids, 6, mask) != got).any()


def test_several_adapters_take_turns(rng, tmp_path):
    import peft
    from pairs import inputs, their_logits

    wrapped, ours = theirs_with_prompt("gpt2", tmp_path, rng)
    wrapped.add_adapter("long", peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"))
    wrapped.save_pretrained(tmp_path / "both")
    torch_inputs, our_inputs = inputs("gpt2", rng)
    model = PeftModel.from_pretrained(ours, tmp_path / "both")
    model.load_adapter(tmp_path / "both/long", "long")
    model.add_adapter("lora", LoraConfig(r=2, target_modules=["c_attn"]))
    for name, tokens in (("default", TOKENS), ("long", 5), ("default", TOKENS)):
        for one in (wrapped, model):
            one.set_adapter(name)
        expected = their_logits(wrapped, torch_inputs)[:, tokens:]
        np.testing.assert_allclose(model(*our_inputs).asnumpy(), expected, atol=1e-5)
        model.set_adapter("lora")
        with wrapped.disable_adapter():
            np.testing.assert_allclose(model(*our_inputs).asnumpy(), their_logits(wrapped, torch_inputs), atol=1e-5)


def test_a_prompt_that_started_as_tokens_loads(rng, tmp_path):
    """How it was made does not matter once it is in a file."""
    from pairs import inputs

    wrapped, ours = theirs_with_prompt("gpt2", tmp_path, rng, prompt_tuning_init="SAMPLE_VOCAB")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["prompt_tuning_init"] == "SAMPLE_VOCAB"
    torch_inputs, our_inputs = inputs("gpt2", rng)
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), logits_of_tokens(wrapped, torch_inputs), atol=1e-5)


@KINDS
@pytest.mark.parametrize("tokens", [2, 5])
def test_a_start_from_a_text_is_theirs_and_loads_there(kind, tokens, rng, tmp_path, monkeypatch):
    import peft
    import transformers
    from pairs import inputs, make_pair

    text = [7, 1, 3]
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: lambda _: {"input_ids": text})
    common = {"num_virtual_tokens": tokens, "task_type": TASKS[kind], "prompt_tuning_init": "TEXT"}
    theirs, ours = make_pair(kind, tmp_path / "base")
    own = peft.PromptTuningConfig(**common, prompt_tuning_init_text="a b c", tokenizer_name_or_path="none")
    wrapped = peft.get_peft_model(theirs, own).eval()
    model = get_peft_model(ours, PromptTuningConfig(**common, prompt_tuning_init_ids=text))
    (prompt,) = (param.asnumpy() for param in model.trainable_params() if "prompt" in param.name)
    np.testing.assert_array_equal(prompt, wrapped.prompt_encoder["default"].embedding.weight.detach().numpy())
    model.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(make_pair(kind, tmp_path / "again")[0], tmp_path / "ours").eval()
    torch_inputs, our_inputs = inputs(kind, rng)
    expected = logits_of_tokens(loaded, torch_inputs, tokens)
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), expected, atol=1e-5)


@KINDS
def test_the_line_about_trainable_parameters_is_the_same(kind, rng, capsys, tmp_path):
    wrapped, ours = theirs_with_prompt(kind, tmp_path, rng)
    capsys.readouterr()
    wrapped.print_trainable_parameters()
    config = PromptTuningConfig(num_virtual_tokens=TOKENS, task_type=TASKS[kind])
    get_peft_model(ours, config).print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("trainable params: ")
