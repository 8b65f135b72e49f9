"""Adapters that Hugging Face PEFT wrote, and what it computed with them; see `tests/golden/make_peft.py`."""

import pathlib

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from models.bert import BertConfig, BertModel, read_weights
from models.gpt2 import Gpt2ForCausalLM
from models.llama import LlamaForCausalLM
from models.weights import load_weights

from mindpet.files.tensors import TensorFile
from mindpet.peft import PeftModel

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(path.name for path in (GOLDEN / "peft").iterdir())


class Hidden(nn.Cell):
    """The hidden states of a BERT."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.bert = BertModel(BertConfig.from_folder(GOLDEN / "bert"))
        load_weights(self.bert, read_weights(GOLDEN / "bert"))

    def construct(self, ids):
        return self.bert(ids, ops.ones_like(ids))[0]


BASES = {
    "bert": Hidden,
    "gpt2": lambda: Gpt2ForCausalLM.from_pretrained(GOLDEN / "gpt2"),
    "llama": lambda: LlamaForCausalLM.from_pretrained(GOLDEN / "llama"),
}


def load(name, **keywords):
    """A base with an adapter; the adapter's names are those of the BERT itself."""
    base = BASES[name.split("-")[0]]().set_train(False)
    around = lambda x: base(x)  # noqa: E731
    model = PeftModel.from_pretrained(getattr(base, "bert", base), GOLDEN / "peft" / name, **keywords)
    return model, around, np.load(GOLDEN / "peft" / name / "expected.npz")


@pytest.mark.parametrize("name", ADAPTERS)
def test_output_and_merged_output(name, mode):
    model, base, expected = load(name)
    ids = Tensor(expected["input_ids"])
    scale = np.abs(expected["output"]).max()
    np.testing.assert_allclose(base(ids).asnumpy(), expected["output"], atol=1e-5 * scale)
    if "prefix" not in name:
        model.merge_and_unload()
        np.testing.assert_allclose(base(ids).asnumpy(), expected["output"], atol=1e-5 * scale)


class Loss(nn.Cell):
    """The mean square of a network's output."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, ids):
        return ops.square(self.network(ids)).mean()


@pytest.mark.parametrize("name", [name for name in ADAPTERS if "prefix" not in name])
def test_a_step_of_sgd(name, mode, tmp_path):
    base = BASES[name.split("-")[0]]()
    model = PeftModel.from_pretrained(getattr(base, "bert", base), GOLDEN / "peft" / name, is_trainable=True)
    for _, cell in base.cells_and_names():
        if isinstance(cell, nn.Dropout):
            cell.p, cell.keep_prob = 0.0, 1.0
    expected = np.load(GOLDEN / "peft" / name / "expected.npz")
    step = nn.TrainOneStepCell(Loss(base), nn.SGD(model.trainable_params(), 0.05))
    step.set_train(False)
    step(Tensor(expected["input_ids"]))
    model.save_pretrained(tmp_path)
    start = TensorFile(GOLDEN / "peft" / name / "adapter_model.safetensors").read_all()
    for key, value in TensorFile(tmp_path / "adapter_model.safetensors").read_all().items():
        np.testing.assert_allclose(value, expected[key], atol=1e-5, err_msg=key)
        assert np.abs(value - start[key]).max() > 0


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_saved_again_is_the_same(name, tmp_path):
    model, _, _ = load(name)
    model.save_pretrained(tmp_path)
    again = TensorFile(tmp_path / "adapter_model.safetensors").read_all()
    there = TensorFile(GOLDEN / "peft" / name / "adapter_model.safetensors").read_all()
    there = {key: value for key, value in there.items() if not key.endswith("base_layer.weight")}
    assert {key: value.tobytes() for key, value in again.items()} == {k: v.tobytes() for k, v in there.items()}
