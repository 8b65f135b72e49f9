"""Trainable tokens from Hugging Face PEFT to mindpet and back."""

import numpy as np
import pytest

from mindpet.files.merge import merge
from mindpet.files.tensors import TensorFile
from mindpet.peft import PeftModel, TrainableTokensConfig, get_peft_model

pytestmark = pytest.mark.interop

TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
TARGETS = {"bert": "word_embeddings", "gpt2": "wte", "llama": "embed_tokens"}
TOKENS = [57, 3, 11, 20, 21, 22, 23, 24, 25]
KINDS = pytest.mark.parametrize("kind", list(TASKS))
TENSORS = "adapter_model.safetensors"


def fields(kind, **more):
    """The keywords of the configuration, there and here."""
    return {"token_indices": TOKENS, "task_type": TASKS[kind], "target_modules": [TARGETS[kind]], **more}


def theirs(kind, **more):
    import peft

    return peft.TrainableTokensConfig(**fields(kind, **more))


@KINDS
def test_it_loads_and_merges(kind, mode, rng, tmp_path):
    """The head of the GPT-2 has the table of the embedding as its weight."""
    from both_ways import theirs_loads_and_merges

    theirs_loads_and_merges(kind, theirs(kind), rng, tmp_path)


@KINDS
def test_ours_loads_there(kind, rng, tmp_path):
    from both_ways import ours_loads_there

    ours_loads_there(kind, TrainableTokensConfig(**fields(kind)), rng, tmp_path)


@KINDS
def test_a_step_of_sgd_gives_the_same_adapter(kind, mode, rng, tmp_path):
    from both_ways import a_step_gives_the_same

    a_step_gives_the_same(kind, theirs(kind), rng, tmp_path)


def test_several_embeddings_and_a_random_start(rng, tmp_path):
    from both_ways import theirs_loads_and_merges

    targets = ["word_embeddings", "position_embeddings"]
    more = {"target_modules": targets, "token_indices": [3, 1], "init_weights": False}
    theirs_loads_and_merges("bert", theirs("bert", **more), rng, tmp_path)


def test_the_embedding_is_found_by_itself(tmp_path):
    import peft
    from pairs import make_pair

    for kind in TASKS:
        their_model, ours = make_pair(kind, tmp_path / kind)
        one = {"token_indices": TOKENS, "task_type": TASKS[kind]}
        get_peft_model(ours, TrainableTokensConfig(**one)).save_pretrained(tmp_path / "ours")
        peft.get_peft_model(their_model, peft.TrainableTokensConfig(**one)).save_pretrained(tmp_path / "theirs")
        files = [TensorFile(tmp_path / who / TENSORS).read_all() for who in ("ours", "theirs")]
        assert set(files[0]) == set(files[1])
        for key, value in files[0].items():
            np.testing.assert_array_equal(value, files[1][key])


def test_a_random_start_is_as_large_as_theirs(tmp_path):
    import peft
    from pairs import make_pair

    their_model, ours = make_pair("llama", tmp_path)
    one = {"token_indices": list(range(50)), "init_weights": False}
    model = get_peft_model(ours, TrainableTokensConfig(**one))
    wrapped = peft.get_peft_model(their_model, peft.TrainableTokensConfig(**one))
    (theirs_rows,) = [param.detach().numpy() for param in wrapped.parameters() if param.requires_grad]
    assert abs(model.trainable_params()[0].asnumpy().std() / theirs_rows.std() - 1) < 0.05


def test_several_adapters_of_one_network(rng, tmp_path):
    import peft
    from both_ways import SIZE, close
    from pairs import disturb, inputs, make_pair, their_logits

    their_model, ours = make_pair("llama", tmp_path / "base")
    wrapped = peft.get_peft_model(their_model, theirs("llama"), adapter_name="one").eval()
    wrapped.add_adapter("two", theirs("llama", token_indices=[1, 2, 3]))
    torch_inputs, our_inputs = inputs("llama", rng)
    expected = {}
    for name in ("one", "two"):
        wrapped.set_adapter(name)
        disturb(wrapped, rng, SIZE)
        expected[name] = their_logits(wrapped, torch_inputs)
    wrapped.save_pretrained(tmp_path / "adapters")
    model = PeftModel.from_pretrained(ours, tmp_path / "adapters/one", "one")
    model.load_adapter(tmp_path / "adapters/two", "two")
    for name in ("two", "one", "two"):
        model.set_adapter(name)
        close(model(*our_inputs).asnumpy(), expected[name])
    mixed = model(*our_inputs, adapter_names=["one", "two", "one"]).asnumpy()
    close(mixed, np.where(np.arange(3)[:, None, None] % 2, expected["two"], expected["one"]))


def test_a_base_that_has_the_table_twice_is_merged_twice(rng, tmp_path):
    """A file that was made without knowledge of the tie."""
    import peft
    from both_ways import SIZE, TENSORS
    from pairs import disturb, make_pair

    from mindpet.files.tensors import save_tensors

    their_model, _ = make_pair("gpt2", tmp_path / "base")
    wrapped = peft.get_peft_model(their_model, theirs("gpt2"))
    disturb(wrapped, rng, SIZE)
    wrapped.save_pretrained(tmp_path / "adapter")
    table = their_model.transformer.wte.base_layer.weight.detach().numpy().copy()
    base = {"transformer.wte.weight": table, "lm_head.weight": table}
    save_tensors(tmp_path / "twice.safetensors", base)
    merge(tmp_path / "twice.safetensors", tmp_path / "adapter", tmp_path / "merged.safetensors")
    expected = table.copy()
    expected[TOKENS] = TensorFile(tmp_path / "adapter" / TENSORS).read_all()[
        "base_model.model.transformer.wte.trainable_tokens_delta"
    ]
    for value in TensorFile(tmp_path / "merged.safetensors").read_all().values():
        np.testing.assert_array_equal(value, expected)
