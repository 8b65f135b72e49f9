"""Padding on the left in the causal language models, as transformers has it; alone, and after a prefix of PEFT."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from models.generate import generate

from mindpet.peft import PeftModel

pytestmark = pytest.mark.interop
KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])
MASK = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])


def make(kind, prefix, rng, folder):
    """Both models, with the prefix of PEFT if one is wanted."""
    import peft
    import torch
    from pairs import make_pair

    theirs, ours = make_pair(kind, folder / "base")
    if prefix:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        theirs = peft.get_peft_model(theirs, config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.tensor(rng.normal(size=tuple(parameter.shape))))
        theirs.save_pretrained(folder / "adapter")
        ours = PeftModel.from_pretrained(ours, folder / "adapter").set_train(False)
    return theirs, ours


@KINDS
def test_padding_on_the_left_gives_their_logits(kind, mode, rng, tmp_path):
    import torch

    theirs, ours = make(kind, False, rng, tmp_path)
    ids = rng.integers(0, 60, MASK.shape)
    places = np.maximum(MASK.cumsum(1) - 1, 0)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(MASK), position_ids=torch.tensor(places))
    logits = ours(Tensor(ids, ms.int32), Tensor(MASK, ms.int32)).asnumpy()
    np.testing.assert_allclose(logits[MASK == 1], expected.logits.numpy()[MASK == 1], atol=1e-5)


@KINDS
@pytest.mark.parametrize("prefix", [False, True], ids=["plain", "prefix"])
def test_generation_gives_their_tokens(kind, prefix, rng, tmp_path):
    import torch

    theirs, ours = make(kind, prefix, rng, tmp_path)
    ids = rng.integers(1, 60, MASK.shape) * MASK
    expected = theirs.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(MASK),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    np.testing.assert_array_equal(generate(ours, ids, 6, MASK), expected.numpy())
