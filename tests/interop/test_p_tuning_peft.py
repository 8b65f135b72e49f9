"""P-tuning from Hugging Face PEFT to mindpet and back: the encoder, logits, steps, files, generation."""

import json
import re

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from models.generate import generate
from test_prompt_tuning_peft import DECODERS, KINDS, MASK, PATHS, TASKS, TENSORS, TOKENS, logits_of_tokens

from mindpet.files.convert import convert
from mindpet.files.tensors import TensorFile
from mindpet.graph import load_delta
from mindpet.peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

pytestmark = pytest.mark.interop

TYPES = pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
LSTM, MLP = "mindpet_delta_p_tuning_lstm", "mindpet_delta_p_tuning_mlp"


def both(kind, encoder, folder, rng, **fields):
    """A torch model with an encoder, in a folder too, the network, and the fields of the configuration."""
    import peft
    from pairs import disturb, make_pair

    theirs, ours = make_pair(kind, folder / "base")
    fields = {
        "num_virtual_tokens": TOKENS,
        "task_type": TASKS[kind],
        "encoder_reparameterization_type": encoder,
        "encoder_hidden_size": 10,
        **fields,
    }
    wrapped = peft.get_peft_model(theirs, peft.PromptEncoderConfig(**fields)).eval()
    disturb(wrapped, rng)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped, ours, fields


def encoder_of_theirs(wrapped):
    """The values of their encoder by the names that a PromptEncoder has for them."""
    theirs = {name: value.numpy().copy() for name, value in wrapped.prompt_encoder["default"].state_dict().items()}
    found = {"mindpet_delta_p_tuning_table": theirs["embedding.weight"]}
    for name, value in theirs.items():
        if name.startswith("mlp_head"):
            found[name.replace("mlp_head", MLP)] = value
        elif name.startswith("lstm_head"):
            layer = re.search(r"_l(\d+)", name)
            own = value.reshape(1, -1) if "bias" in name else value
            found[f"{LSTM}.{layer[1]}.{name[len('lstm_head.') :].replace(layer[0], '')}"] = own
    return found


@TYPES
@KINDS
def test_it_loads(kind, encoder, rng, tmp_path):
    from pairs import inputs

    wrapped, ours, _ = both(kind, encoder, tmp_path, rng)
    torch_inputs, our_inputs = inputs(kind, rng)
    expected, base = logits_of_tokens(wrapped, torch_inputs), ours(*our_inputs).asnumpy()
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter")
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), expected, atol=1e-5)
    with model.disable_adapter():
        np.testing.assert_array_equal(model(*our_inputs).asnumpy(), base)
    model.save_pretrained(tmp_path / "again")
    one, other = (TensorFile(tmp_path / folder / TENSORS).read_all() for folder in ("adapter", "again"))
    assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    contents = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "again")]
    keys = [key for key in contents[0] if key.startswith(("encoder", "num", "token", "peft_type", "task"))]
    keys.remove("num_attention_heads"), keys.remove("num_layers")  # of no effect here
    assert len(keys) == 9 and all(contents[0][key] == contents[1][key] for key in keys)


@TYPES
def test_the_encoder_computes_theirs_and_a_step_of_sgd_gives_the_same_prompt(encoder, mode, rng, tmp_path):
    from pairs import inputs, step_both

    wrapped, ours, fields = both("gpt2", encoder, tmp_path, rng, encoder_num_layers=2)
    torch_inputs, our_inputs = inputs("gpt2", rng)
    model = get_peft_model(ours, PromptEncoderConfig(**fields)).set_train(False)
    values = {f"transformer.{name}": value for name, value in encoder_of_theirs(wrapped).items()}
    params = {param.name: param for param in model.trainable_params()}
    assert {name: value.shape for name, value in values.items()} == {name: p.shape for name, p in params.items()}
    for name, value in values.items():
        params[name].set_data(Tensor(value))
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), logits_of_tokens(wrapped, torch_inputs), atol=2e-5)
    step_both(wrapped, model, torch_inputs, our_inputs, TOKENS)
    stepped = {f"transformer.{name}": value for name, value in encoder_of_theirs(wrapped).items()}
    for name, value in stepped.items():
        np.testing.assert_allclose(params[name].asnumpy(), value, atol=5e-6, err_msg=name)
    assert max(np.abs(stepped[name] - values[name]).max() for name in values) > 1e-4
    wrapped.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    one, other = (TensorFile(tmp_path / who / TENSORS).read("prompt_embeddings") for who in ("ours", "theirs"))
    np.testing.assert_allclose(one, other, atol=5e-6)


@TYPES
@KINDS
def test_ours_loads_there(kind, encoder, rng, tmp_path):
    import peft
    from pairs import inputs, make_pair, move

    theirs, ours = make_pair(kind, tmp_path / "base")
    torch_inputs, our_inputs = inputs(kind, rng)
    config = PromptEncoderConfig(
        num_virtual_tokens=TOKENS, task_type=TASKS[kind], encoder_reparameterization_type=encoder
    )
    model = get_peft_model(ours, config).set_train(False)
    move(model, rng)
    model.save_pretrained(tmp_path / "ours")
    expected = model(*our_inputs).asnumpy()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of_tokens(wrapped, torch_inputs), expected, atol=2e-5)
    own = wrapped.peft_config["default"]
    assert (own.peft_type, own.encoder_reparameterization_type, own.encoder_hidden_size) == ("P_TUNING", encoder, 32)


def test_a_folder_of_theirs_is_a_delta_file_of_a_prompt(rng, tmp_path):
    from pairs import inputs

    wrapped, ours, _ = both("llama", "LSTM", tmp_path, rng)
    torch_inputs, our_inputs = inputs("llama", rng)
    path, _, _ = PATHS["llama"].rpartition(".")
    convert(tmp_path / "adapter", tmp_path / "d.safetensors", prefix_path=path)
    model = get_peft_model(ours, PromptTuningConfig(num_virtual_tokens=TOKENS))
    load_delta(model, tmp_path / "d.safetensors")
    np.testing.assert_allclose(model(*our_inputs).asnumpy(), logits_of_tokens(wrapped, torch_inputs), atol=1e-5)


@DECODERS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_generation(kind, side, rng, tmp_path):
    import torch

    wrapped, ours, _ = both(kind, "MLP", tmp_path, rng)
    mask = MASK if side == "left" else MASK[:, ::-1].copy()
    ids = rng.integers(1, 60, mask.shape) * mask
    arguments = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    expected = logits_of_tokens(wrapped, arguments)
    model = PeftModel.from_pretrained(ours, tmp_path / "adapter").set_train(False)
    logits = model(Tensor(ids, ms.int32), Tensor(mask, ms.int32)).asnumpy()
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=1e-5)
    if side == "left":
        more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        np.testing.assert_array_equal(generate(model, ids, 4, mask), wrapped.generate(**arguments, **more).numpy())


@TYPES
def test_trainable_parameters_are_as_many(encoder, rng, tmp_path):
    wrapped, ours, fields = both("gpt2", encoder, tmp_path, rng)
    model = get_peft_model(ours, PromptEncoderConfig(**fields))
    theirs = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert sum(param.size for param in model.trainable_params()) == sum(parameter.numel() for parameter in theirs)
