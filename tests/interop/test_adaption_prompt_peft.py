"""LLaMA-Adapter from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest

from mindpet.peft import AdaptionPromptConfig, PeftModel

pytestmark = pytest.mark.interop

FIELDS = {
    "gpt2": {"target_modules": "attn", "adapter_len": 3, "adapter_layers": 2},
    "llama": {"target_modules": "self_attn", "adapter_len": 3, "adapter_layers": 1},
}
KINDS = pytest.mark.parametrize("kind", list(FIELDS))


def theirs(kind):
    import peft

    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", **FIELDS[kind])


@KINDS
def test_it_loads_and_saves(kind, mode, rng, tmp_path):
    import peft
    from both_ways import SIZE, TENSORS, close, same_tensors
    from pairs import disturb, inputs, make_pair, their_logits

    model, ours = make_pair(kind, tmp_path / "base")
    wrapped = peft.get_peft_model(model, theirs(kind)).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path / "theirs")
    torch_inputs, our_inputs = inputs(kind, rng)
    expected, base = their_logits(wrapped, torch_inputs), ours(*our_inputs).asnumpy()
    loaded = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    close(loaded(*our_inputs).asnumpy(), expected)
    assert np.abs(base - expected).max() > 1e-2
    with loaded.disable_adapter():
        close(loaded(*our_inputs).asnumpy(), base)
    loaded.save_pretrained(tmp_path / "ours")
    same_tensors(tmp_path / "ours" / TENSORS, tmp_path / "theirs" / TENSORS)


@KINDS
@pytest.mark.parametrize("is_named", [True, False])
def test_ours_loads_there(kind, is_named, rng, tmp_path):
    from both_ways import ours_loads_there

    fields = FIELDS[kind] if is_named else {**FIELDS[kind], "target_modules": None}
    ours_loads_there(kind, AdaptionPromptConfig(task_type="CAUSAL_LM", **fields), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


@KINDS
def test_padding_and_what_is_generated(kind, rng, tmp_path):
    import mindspore as ms
    import peft
    import torch
    from both_ways import SIZE
    from mindspore import Tensor
    from models.generate import generate
    from pairs import SEQ, disturb, make_pair, their_logits

    model, ours = make_pair(kind, tmp_path / "base")
    wrapped = peft.get_peft_model(model, theirs(kind)).eval()
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path / "theirs")
    ids, mask = rng.integers(0, 60, (3, SEQ)), (np.arange(SEQ) >= np.array([[0], [4], [7]])).astype(np.int64)
    places = np.maximum(mask.cumsum(1) - 1, 0)
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    expected = their_logits(wrapped, {name: torch.tensor(value) for name, value in arguments.items()})
    loaded = PeftModel.from_pretrained(ours, tmp_path / "theirs")
    got = loaded(Tensor(ids, ms.int32), Tensor(mask, ms.int32)).asnumpy()
    np.testing.assert_allclose(got[mask == 1], expected[mask == 1], atol=1e-5)
    more = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    continued = wrapped.generate(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), **more).numpy()
    np.testing.assert_array_equal(generate(loaded, ids.astype(np.int32), 4, mask.astype(np.int32)), continued)
