"""A prompt in the example models: vectors in front of the embeddings are as good as tokens in front."""

import functools
import pathlib

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from models.bert import BertClassifier, BertConfig, BertModel
from models.generate import generate
from models.gpt2 import Gpt2ForCausalLM
from models.llama import CausalLoss, LlamaConfig, LlamaForCausalLM

from mindpet.parallel import dry_run_many
from mindpet.peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TOKENS = [7, 3, 11]
CONFIG = PromptTuningConfig(num_virtual_tokens=len(TOKENS))
BERT = BertConfig(20, 8, 2, 2, 12, max_position_embeddings=12, method="full")
MODELS = {"gpt2": Gpt2ForCausalLM, "llama": LlamaForCausalLM}
KINDS = pytest.mark.parametrize("kind", list(MODELS))


def prompted(model, table):
    """A model with a prompt that is the embeddings of `TOKENS`."""
    model = get_peft_model(model, CONFIG).set_train(False)
    (prompt,) = model.trainable_params()
    prompt.set_data(Tensor(table.asnumpy()[TOKENS]))
    return model


def make(kind):
    """A decoder with such a prompt."""
    model = MODELS[kind].from_pretrained(GOLDEN / kind).set_train(False)
    body = model.transformer.wte if kind == "gpt2" else model.model.embed_tokens
    return prompted(model, body.embedding_table)


def in_front(ids):
    """`TOKENS` before each row."""
    return np.concatenate([np.broadcast_to(TOKENS, (len(ids), len(TOKENS))), ids], 1).astype(np.int32)


@KINDS
def test_logits_are_those_after_the_tokens(kind, mode, rng):
    model, ids = make(kind), rng.integers(0, 48, (2, 5)).astype(np.int32)
    got = model(Tensor(ids)).asnumpy()
    with model.disable_adapter():
        expected = model(Tensor(in_front(ids))).asnumpy()[:, len(TOKENS) :]
        assert np.abs(got - model(Tensor(ids)).asnumpy()).max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-5)


@KINDS
def test_padding_is_seen_by_no_token(kind, mode, rng):
    model, ids = make(kind), rng.integers(1, 48, (2, 5)).astype(np.int32)
    whole = model(Tensor(ids)).asnumpy()
    np.testing.assert_allclose(model(Tensor(ids), Tensor(np.ones_like(ids))).asnumpy(), whole, atol=1e-5)
    right = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.int32)
    np.testing.assert_allclose(model(Tensor(ids), Tensor(right)).asnumpy()[right == 1], whole[right == 1], atol=1e-5)
    left = right[:, ::-1].copy()
    one, other = (model(Tensor(np.where(left, ids, filler)), Tensor(left)).asnumpy() for filler in (0, 6))
    np.testing.assert_array_equal(one[left == 1], other[left == 1])


@KINDS
def test_generation_continues_the_tokens_and_what_is_given(kind, mode, rng):
    model, ids = make(kind), rng.integers(0, 48, (2, 4)).astype(np.int32)
    got = generate(model, ids, 4)
    with model.disable_adapter():
        np.testing.assert_array_equal(got, generate(model, in_front(ids), 4)[:, len(TOKENS) :])


@KINDS
@pytest.mark.parametrize("config", [CONFIG, PrefixTuningConfig(num_virtual_tokens=3)], ids=["prompt", "prefix"])
def test_a_body_without_its_head_takes_it_too(kind, config, mode, rng):
    """What the body itself has, a prompt's place and the offset of positions, is found as in a network around it."""
    whole, other = (MODELS[kind].from_pretrained(GOLDEN / kind).set_train(False) for _ in range(2))
    body, ids = other.transformer if kind == "gpt2" else other.model, Tensor(rng.integers(0, 48, (2, 5)), ms.int32)
    models = [get_peft_model(network, config).set_train(False) for network in (whole, body)]
    for trained in zip(*(model.trainable_params() for model in models)):
        value = Tensor(rng.normal(size=trained[0].shape).astype(np.float32))
        for param in trained:
            param.set_data(value)
    np.testing.assert_allclose(other.lm_head(models[1](ids)).asnumpy(), models[0](ids).asnumpy(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_bert_pools_the_first_vector_of_the_prompt_or_the_tokens(pooling, mode, rng):
    model = BertClassifier(BERT, 3, pooling).set_train(False)
    ids = rng.integers(0, 20, (2, 5)).astype(np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32)
    model = prompted(model, model.bert.embeddings.word_embeddings.embedding_table)
    got = model(Tensor(ids), Tensor(mask)).asnumpy()
    with model.disable_adapter():
        network, whole = model.network, np.concatenate([np.ones((2, 3), np.int32), mask], 1)
        hidden, pooled = network.bert(Tensor(in_front(ids)), Tensor(whole))
        if pooling == "mean":
            weights = whole[..., None] * (np.arange(8) >= 3)[:, None]
            pooled = Tensor((hidden.asnumpy() * weights).sum(1).astype(np.float32) / mask.sum(1, keepdims=True))
        expected = network.classifier(pooled.astype(ms.float32)).asnumpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_the_token_type_of_a_prompt_is_0(mode, rng):
    model = prompted(BertModel(BERT).set_train(False), table := nn.Embedding(20, 8).embedding_table)
    model.embeddings.word_embeddings.embedding_table.set_data(table)
    ids, types = rng.integers(0, 20, (2, 5)).astype(np.int32), np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], np.int32)
    ones = np.ones((2, 5), np.int32)
    got, _ = model(Tensor(ids), Tensor(ones), Tensor(types))
    with model.disable_adapter():
        more = [np.concatenate([np.full((2, 3), value, np.int32), part], 1) for value, part in ((1, ones), (0, types))]
        expected, _ = model(Tensor(in_front(ids)), *map(Tensor, more))
    np.testing.assert_allclose(got.asnumpy(), expected.asnumpy()[:, 3:], atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, PrefixTuningConfig(num_virtual_tokens=3)], ids=["prompt", "prefix"])
def test_more_tokens_than_positions_are_told(config, mode):
    for model, name, most, count in (
        (Gpt2ForCausalLM.from_pretrained(GOLDEN / "gpt2"), "n_positions", 24, 1),
        (BertClassifier(BERT, 3), "max_position_embeddings", 12, 2),
    ):
        model = get_peft_model(model, config).set_train(False)
        fits, longer = (Tensor(np.ones((1, length), np.int32)) for length in (most - 3, most - 2))
        assert len(model(*[fits] * count)) == 1
        with pytest.raises(ValueError, match=f"{most + 1} tokens, with those of a prompt .*, but '{name}' is {most}"):
            model(*[longer] * count)


SHAPE = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8)


def sharded(prompt, tokens, masked=False, **fields):
    """A LLaMA cut over 8 ranks, in which nothing but a prompt trains, or a norm."""
    loss = CausalLoss(LlamaConfig(**SHAPE, data_parallel=2, model_parallel=4, **fields))
    if prompt:
        get_peft_model(loss.network, prompt)
    for param in loss.get_parameters() if not prompt else ():
        param.requires_grad = param.name == "model.layers.0.input_layernorm.weight"
    ids = Tensor(np.zeros((4, tokens), np.int32))
    return loss, (ids,) * (3 if masked else 2), nn.Adam(loss.trainable_params(), 1e-3)


def sums(report, *causes):
    """(kind, phase, bytes, ranks, count) of what a rank communicates, without what is for `causes`."""
    return sorted(
        (plan.kind, plan.phase, plan.bytes, plan.group_size, plan.count)
        for plan in report.collectives
        if not plan.cause.startswith(causes)
    )


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_a_prompt_in_a_sharded_llama_communicates_its_gradient_only(dtype):
    """Besides what the layers need for that many tokens: 4 of a prompt and 12 are as good as 16."""
    prompt = PromptTuningConfig(num_virtual_tokens=4)
    cases = [(None, 16), (prompt, 12), (prompt, 12, True)]
    plain, *with_prompt = dry_run_many([functools.partial(sharded, *case, compute_dtype=dtype) for case in cases], 8)
    # The embedding and the loss are of the 12 tokens alone.
    others = (
        "gradient of model",
        "sum in network.model.embed_tokens",
        "sum over loss",
        "gradient of the sum over loss",
    )
    for report in with_prompt:
        assert sums(report, *others) == sums(plain, *others) != []
        assert {plan.kind for plan in report.collectives} == {"AllReduce"}
        gradients = [plan for plan in report.collectives if plan.cause.startswith("gradient of model")]
        assert [(plan.cause, plan.bytes, plan.group_size) for plan in gradients] == [
            ("gradient of model.mindpet_delta_prompt", 4 * 4 * 64, 8)
        ]
        ours = [plan for plan in report.operators if "prompt" in plan.cell]
        assert len(ours) >= 4 and all(plan.is_set for plan in ours)
        (own,) = (plan for plan in report.parameters if plan.role == "trainable")
        assert own.slice == own.shape == (4, 64)


def test_an_encoder_in_a_sharded_llama_is_computed_on_every_rank():
    """Nothing is cut, so that nothing is communicated but what a plain prompt needs, and the gradients."""
    prompts = [PromptTuningConfig(num_virtual_tokens=4)]
    prompts += [
        PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type=kind) for kind in ("MLP", "LSTM")
    ]
    plain, *computed = dry_run_many([functools.partial(sharded, prompt, 12) for prompt in prompts], 8)
    for report, parameters in zip(computed, (7, 21)):
        assert sums(report, "gradient of model") == sums(plain, "gradient of model") != []
        own = [plan for plan in report.parameters if plan.role == "trainable"]
        assert len(own) == parameters and all(plan.slice == plan.shape for plan in own)
        gradients = [plan for plan in report.collectives if plan.cause.startswith("gradient of model")]
        summed = [plan.cause[len("gradient of ") :] for plan in gradients]
        # Both biases of an LSTM have the same gradient, which is summed up once, and the table goes in both ways.
        assert {name.replace("bias_ih", "bias_hh") for name in summed} | set(summed) == {plan.name for plan in own}
        assert len(summed) == len(set(summed)) + (parameters > 7) and all(plan.group_size == 8 for plan in gradients)
        ours = [plan for plan in report.operators if "prompt_source" in plan.cell]
        assert len(ours) >= 10 and all(plan.is_set for plan in ours)
