"""The same tiny random model, as transformers has it and as the examples have it."""

import mindspore as ms
import numpy as np
import torch
import transformers
from mindspore import Tensor
from models.bert import BertClassifier, BertConfig, read_weights
from models.gpt2 import Gpt2ForCausalLM
from models.llama import LlamaForCausalLM
from models.weights import load_weights, read_folder

VOCAB = 60
SEQ = 9


def make_pair(kind, folder):
    """A transformers model and an example model with the same weights."""
    torch.manual_seed(3)
    theirs = THEIRS[kind]().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too, which start as zeros and ones
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs, OURS[kind](folder).set_train(False)


def their_bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=24,
            num_labels=5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
        )
    )


def their_gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=24,
            n_embd=32,
            n_layer=2,
            n_head=4,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            initializer_range=0.1,
        )
    )


def their_llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    )


def our_bert(folder):
    model = BertClassifier(BertConfig.from_folder(folder, method="full"), 5)
    load_weights(model.bert, read_weights(folder))
    weights = read_folder(folder)
    for name in ("weight", "bias"):
        getattr(model.classifier, name).set_data(Tensor(weights[f"classifier.{name}"]))
    return model


THEIRS = {"bert": their_bert, "gpt2": their_gpt2, "llama": their_llama}
OURS = {"bert": our_bert, "gpt2": Gpt2ForCausalLM.from_pretrained, "llama": LlamaForCausalLM.from_pretrained}


def inputs(kind, rng):
    """(arguments for transformers, arguments for the example)."""
    ids = rng.integers(0, VOCAB, (3, SEQ))
    if kind != "bert":
        return {"input_ids": torch.tensor(ids)}, [Tensor(ids, ms.int32)]
    mask = (np.arange(SEQ) < np.array([[SEQ], [5], [2]])).astype(np.int64)
    return (
        {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)},
        [Tensor(ids, ms.int32), Tensor(mask, ms.int32)],
    )


def their_logits(model, arguments):
    """What transformers computes."""
    with torch.no_grad():
        return model(**arguments).logits.numpy()
