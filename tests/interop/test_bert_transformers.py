"""The example BERT and the LoRA delta against transformers and PEFT, run in the same process."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from models.bert import BertClassifier, BertConfig, BertModel, read_weights
from models.weights import load_weights

pytestmark = pytest.mark.interop


def tiny(kind):
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=24,
        num_labels=5,
        initializer_range=0.3,
        hidden_act=kind,
    )
    return config


def inputs(rng):
    ids = rng.integers(0, 60, (4, 12))
    mask = (np.arange(12) < np.array([[12], [7], [3], [12]])).astype(np.int64)
    return ids, mask


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("cls", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_any_bert_folder_gives_the_same_numbers(activation, cls, mode, rng, tmp_path):
    import torch
    import transformers

    theirs = getattr(transformers, cls)(tiny(activation)).eval()
    theirs.save_pretrained(tmp_path)
    encoder = getattr(theirs, "bert", theirs)
    ours = BertModel(BertConfig.from_folder(tmp_path), add_pooler=cls != "BertForMaskedLM")
    load_weights(ours, read_weights(tmp_path))
    ids, mask = inputs(rng)
    with torch.no_grad():
        expected = encoder(torch.tensor(ids), torch.tensor(mask))
    hidden, pooled = ours.set_train(False)(Tensor(ids, ms.int32), Tensor(mask, ms.int32))
    np.testing.assert_allclose(hidden.asnumpy(), expected.last_hidden_state.numpy(), atol=1e-5)
    if pooled is not None:
        np.testing.assert_allclose(pooled.asnumpy(), expected.pooler_output.numpy(), atol=1e-5)


def test_lora_has_the_shapes_and_the_scaling_of_peft(mode, rng, tmp_path):
    import peft
    import torch
    import transformers

    theirs = transformers.BertForSequenceClassification(tiny("gelu"))
    theirs.save_pretrained(tmp_path)
    ours = BertClassifier(BertConfig.from_folder(tmp_path, method="lora", lora_rank=4, lora_alpha=6), 5)
    load_weights(ours.bert, read_weights(tmp_path))
    ours.classifier.weight.set_data(Tensor(theirs.classifier.weight.detach().numpy()))
    ours.classifier.bias.set_data(Tensor(theirs.classifier.bias.detach().numpy()))
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"])
    ).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            path, which = name.replace("base_model.model.", "").split(".lora_")
            ours.parameters_dict()[f"{path}.mindpet_delta_lora_{which[0].lower()}"].set_data(
                Tensor(parameter.detach().numpy())
            )
    ids, mask = inputs(rng)
    with torch.no_grad():
        expected = wrapped(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    got = ours.set_train(False)(Tensor(ids, ms.int32), Tensor(mask, ms.int32)).asnumpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_ptuning2_without_projection_is_the_table_of_peft(rng):
    import peft
    import torch

    from mindpet.delta import PrefixEncoder

    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3, num_layers=2, num_attention_heads=2, token_dim=8, num_transformer_submodules=1
    )
    table = rng.normal(size=(3, 2 * 2 * 8)).astype(np.float32)
    theirs = peft.PrefixEncoder(config)
    with torch.no_grad():
        theirs.embedding.weight.copy_(torch.tensor(table))
        prompts = theirs(torch.arange(3)[None]).view(1, 3, 4, 2, 4).permute(2, 0, 3, 1, 4).numpy()
    ours = PrefixEncoder(3, 2, 2, 4)
    ours.mindpet_delta_ptuning2_embedding.embedding_table.set_data(Tensor(table))
    got = np.stack([past.asnumpy() for past in ours(1, ms.float32)])
    np.testing.assert_array_equal(got.reshape(prompts.shape), prompts)


def test_a_classifier_comes_with_its_head(rng, tmp_path):
    import torch
    import transformers

    config = tiny("gelu")
    config.num_labels = 4
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = BertClassifier.from_pretrained(tmp_path).set_train(False)
    ids, mask = inputs(rng)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), torch.tensor(mask)).logits.numpy()
    got = ours(Tensor(ids, ms.int32), Tensor(mask, ms.int32)).asnumpy()
    assert got.shape == (4, 4)
    np.testing.assert_allclose(got, expected, atol=1e-5)
