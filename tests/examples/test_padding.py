"""Padding, on either side, in the causal language models: logits, gradients, generation; alone and after a prefix."""

import functools
import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.generate import generate, pad_left
from models.gpt2 import Gpt2ForCausalLM
from models.llama import CausalLoss, CrossEntropy, LlamaConfig, LlamaForCausalLM, load_folder
from parallel import plan_llama

from mindpet.parallel import dry_run_many
from mindpet.peft import PrefixTuningConfig, get_peft_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = {"gpt2": Gpt2ForCausalLM, "llama": LlamaForCausalLM}
KINDS = pytest.mark.parametrize("kind", list(MODELS))
ROWS = [np.array(row) for row in ([5, 9, 2, 7, 1], [3, 8], [4])]


def make(kind, prefix=False):
    model = MODELS[kind].from_pretrained(GOLDEN / kind).set_train(False)
    if prefix:
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).set_train(False)
        for param in model.trainable_params():
            param.set_data(Tensor(np.random.default_rng(2).normal(size=param.shape).astype(np.float32)))
    return model


def pad(side, filler=0):
    """`ROWS` in one array, and its mask."""
    ids, mask = pad_left(ROWS)
    if side == "right":
        ids, mask = (np.stack([np.roll(row, n.sum()) for row, n in zip(part, mask)]) for part in (ids, mask))
    return np.where(mask, ids, filler).astype(np.int32), mask


@KINDS
@pytest.mark.parametrize(
    "mode, side, prefix",
    [(ms.PYNATIVE_MODE, side, prefix) for side in ("left", "right") for prefix in (False, True)]
    + [(ms.GRAPH_MODE, "right", False), (ms.GRAPH_MODE, "left", True)],
)
def test_padding_changes_no_logit(kind, mode, side, prefix):
    ms.set_context(mode=mode)
    model = make(kind, prefix)
    alone = np.concatenate([model(Tensor(row[None], ms.int32)).asnumpy()[0] for row in ROWS])
    ids, mask = pad(side)
    logits = model(Tensor(ids), Tensor(mask)).asnumpy()
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[mask == 1], alone, atol=1e-5)
    other = model(Tensor(pad(side, filler=6)[0]), Tensor(mask.astype(bool))).asnumpy()
    np.testing.assert_array_equal(other[mask == 1], logits[mask == 1])
    whole = np.ones_like(mask)
    np.testing.assert_allclose(model(Tensor(ids), Tensor(whole)).asnumpy(), model(Tensor(ids)).asnumpy(), atol=1e-5)


@KINDS
def test_a_row_of_padding_alone_gives_numbers(kind):
    model = make(kind)
    ids = np.array([[1, 2, 3], [0, 0, 0]], np.int32)
    assert np.isfinite(model(Tensor(ids), Tensor(np.array([[1, 1, 1], [0, 0, 0]], np.int32))).asnumpy()).all()


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__(auto_prefix=False)
        self.model, self.loss = model, CrossEntropy(LlamaConfig.from_folder(GOLDEN / "llama"))
        self.loss.vocab_size = model.lm_head.weight.shape[0]

    def construct(self, ids, labels, mask):
        return self.loss(self.model(ids, mask), labels)


@KINDS
@pytest.mark.parametrize("mode, prefix", [(ms.PYNATIVE_MODE, False), (ms.PYNATIVE_MODE, True), (ms.GRAPH_MODE, True)])
def test_padding_changes_no_gradient(kind, mode, prefix):
    """It is the sum of the gradients of each row alone, weighed by its share of the labels."""
    ms.set_context(mode=mode)
    model = make(kind, prefix)
    gradient = ms.value_and_grad(Loss(model), None, model.trainable_params())

    def run(ids, mask):
        labels = np.full_like(ids, -100)
        labels[:, :-1] = np.where(mask[:, 1:] * mask[:, :-1], ids[:, 1:], -100)
        loss, gradients = gradient(*(Tensor(part, ms.int32) for part in (ids, labels, mask)))
        return [float(loss.asnumpy()), *(part.asnumpy() for part in gradients)], (labels >= 0).sum()

    rows = [row for row in ROWS if len(row) > 1]  # a row of one token asks for nothing
    got, total = run(*pad_left(rows))
    parts = [run(row[None], np.ones_like(row[None])) for row in rows]
    assert total == sum(count for _, count in parts) == 5
    for index, values in enumerate(zip(*(part for part, _ in parts))):
        expected = sum(value * (count / total) for value, (_, count) in zip(values, parts))
        np.testing.assert_allclose(got[index], expected, atol=1e-5)


def test_the_loss_of_llama_takes_a_mask(mode):
    loss = CausalLoss(LlamaConfig.from_folder(GOLDEN / "llama"))
    load_folder(loss.network, GOLDEN / "llama")
    loss.set_train(False)
    ids, mask = pad_left(ROWS[:1] + ROWS[:1])
    padded = np.pad(ids, ((0, 0), (2, 0))), np.pad(ids, ((0, 0), (2, 0)), constant_values=-100)
    expected = loss(Tensor(ids), Tensor(ids)).asnumpy()
    got = loss(*map(Tensor, padded), Tensor(np.pad(mask, ((0, 0), (2, 0))))).asnumpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


@KINDS
@pytest.mark.parametrize("mode, prefix", [(ms.PYNATIVE_MODE, True), (ms.GRAPH_MODE, False)])
def test_rows_of_several_lengths_continue_as_each_alone(kind, mode, prefix):
    ms.set_context(mode=mode)
    model = make(kind, prefix)
    ids, mask = pad_left(ROWS)
    np.testing.assert_array_equal(ids, [[5, 9, 2, 7, 1], [0, 0, 0, 3, 8], [0, 0, 0, 0, 4]])
    got = generate(model, ids, 4, mask)
    assert got.shape == (3, 9)
    for row, begun in zip(got, ROWS):
        np.testing.assert_array_equal(row[5 - len(begun) :], generate(model, begun[None], 4)[0])


@pytest.mark.parametrize(
    "mask, match",
    [
        (np.ones((2, 2), int), r"'attention_mask' must be of shape \(2, 3\), as 'ids' is, not \(2, 2\)"),
        (np.array([[0, 1, 1], [1, 1, 0]]), r"must be on the left, but 'attention_mask' ends with 0 in rows \[1\]"),
    ],
)
def test_generation_wants_padding_on_the_left(mask, match):
    with pytest.raises(ValueError, match=match):
        generate(None, np.ones((2, 3), int), 2, mask)


def build_padded(**overrides):
    network, (ids, labels) = plan_llama.make(2, 4, batch=4, seq_length=8, **overrides)
    return network, (ids, labels, ids)


def test_a_mask_is_cut_as_the_batch_is():
    """On 8 ranks a padded batch communicates what any batch does."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8)
    plain = functools.partial(plan_llama.make, 2, 4, batch=4, seq_length=8, **sizes)
    without, padded = dry_run_many([plain, functools.partial(build_padded, **sizes)], 8)
    assert padded.communication_bytes == without.communication_bytes > 0
    one, other = (
        sorted((plan.kind, plan.phase, plan.bytes, plan.count) for plan in report.collectives)
        for report in (without, padded)
    )
    assert one == other
