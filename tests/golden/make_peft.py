"""Makes `gpt2/`, a tiny random Hugging Face GPT-2, `peft/`: adapters of Hugging Face PEFT, and what they compute, and
`sums.npz`: weighted sums of adapters.

Run it where torch 2.13, transformers and peft are installed, after `make_bert.py` and `make_llama.py`:
`python tests/golden/make_peft.py`. Each folder in `peft/` is an adapter on the base with the name before the dash. Its
`expected.npz` holds `input_ids`, without the padding token 0, whose embedding PyTorch does not train, and the `output`
of the adapted model; and for LoRA, by key, the adapter's tensors after one step of SGD with a rate of 0.05 on the mean
square of the output.

`sums.npz` holds of each adapter and layer `adapter/layer/A`, `/B` and `/scaling`, and of each sum `sum/layer`, its
`s B A`.
"""

import pathlib

import numpy as np
import peft
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
LORA = {"r": 4, "lora_alpha": 6}
ADAPTERS = {
    "bert-lora": peft.LoraConfig(**LORA, target_modules=["query", "output.dense"], bias="lora_only"),
    "bert-dora": peft.LoraConfig(**LORA, target_modules=["query", "word_embeddings"], use_dora=True),
    "gpt2-rslora": peft.LoraConfig(**LORA, target_modules=["c_attn", "mlp.c_proj"], use_rslora=True),
    "llama-lora": peft.LoraConfig(
        **LORA, target_modules=["q_proj", "down_proj"], rank_pattern={"0.self_attn.q_proj": 2}, task_type="CAUSAL_LM"
    ),
    "llama-pissa": peft.LoraConfig(**LORA, target_modules=["v_proj"], init_lora_weights="pissa"),
    "llama-prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def make_gpt2():
    """A GPT-2 with random biases and norms too, which start as zeros and ones."""
    config = transformers.GPT2Config(
        vocab_size=48, n_positions=24, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(FOLDER / "gpt2")


def load_base(name):
    """The base of an adapter."""
    classes = {"bert": "BertModel", "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}
    return getattr(transformers, classes[name]).from_pretrained(FOLDER / name).eval()


def output(model, ids):
    """Logits, or hidden states of an encoder."""
    out = model(input_ids=ids)
    return out.logits if "logits" in out else out.last_hidden_state


def make_adapter(name, config):
    """Save an adapter, random where it trains, and what it computes."""
    base = load_base(name.split("-")[0])
    ids = torch.tensor(np.random.default_rng(0).integers(1, 19 if name.startswith("bert") else 48, (3, 8)))
    model = peft.get_peft_model(base, config).eval()
    config.base_model_name_or_path = name.split("-")[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(FOLDER / "peft" / name)
    (FOLDER / "peft" / name / "README.md").unlink(missing_ok=True)
    result = output(model, ids)
    expected = {"input_ids": ids.numpy().astype(np.int32), "output": result.detach().numpy()}
    if isinstance(config, peft.LoraConfig):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        result.square().mean().backward()
        optimizer.step()
        expected.update({key: value.numpy() for key, value in peft.get_peft_model_state_dict(model).items()})
    np.savez(FOLDER / "peft" / name / "expected.npz", **expected)


class Colliding(torch.nn.Module):
    """Linear layers whose paths are ends of others, and an embedding."""

    def __init__(self):
        super().__init__()
        self.fc, self.embed = torch.nn.Linear(6, 5), torch.nn.Embedding(7, 6)
        self.block = torch.nn.ModuleDict({"fc": torch.nn.Linear(6, 6), "attn": torch.nn.Linear(5, 6)})


SUMMED = {
    "a": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["block.fc", "embed"]),
    "b": peft.LoraConfig(r=2, lora_alpha=-5, target_modules=["fc", "attn"]),
    "c": peft.LoraConfig(r=2, lora_alpha=4, target_modules=["fc", "embed"], use_rslora=True),
    "wide": peft.LoraConfig(r=1, lora_alpha=4, target_modules=["fc"], rank_pattern={"block.fc": 3}),
}
PRUNED = {"density": 0.4}
SUMS = {
    "linear": (["a", "b", "c"], {"combination_type": "linear"}),
    "cat": (["a", "b", "c"], {"combination_type": "cat"}),
    "svd": (["a", "b", "wide"], {}),
    "svd of rank 1": (["a", "b", "wide"], {"combination_type": "svd", "svd_rank": 1}),
    "ties": (["a", "b", "c"], {"combination_type": "ties", **PRUNED}),
    "ties by frequency": (
        ["a", "b", "c"],
        {"combination_type": "ties", "majority_sign_method": "frequency", "density": 0.7},
    ),
    "ties_svd": (["a", "b", "wide"], {"combination_type": "ties_svd", **PRUNED}),
    "magnitude_prune": (["a", "b", "c"], {"combination_type": "magnitude_prune", **PRUNED}),
    "magnitude_prune_svd": (["a", "b", "wide"], {"combination_type": "magnitude_prune_svd", "svd_rank": 2, **PRUNED}),
}
SUM_WEIGHTS = [0.7, -0.4, 0.3]


def make_sums():
    """Save adapters and their weighted sums."""
    model = peft.get_peft_model(Colliding(), SUMMED["a"], "a")
    for name in list(SUMMED)[1:]:
        model.add_adapter(name, SUMMED[name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    for name, (names, keywords) in SUMS.items():
        model.add_weighted_adapter(names, SUM_WEIGHTS, name, **keywords)
    content = {}
    for path, layer in model.base_model.model.named_modules():
        for name, scaling in getattr(layer, "scaling", {}).items():
            embedding = name in layer.lora_embedding_A
            lora_a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
            lora_b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
            found = {"A": lora_a.detach().numpy(), "B": lora_b.detach().numpy()}
            if name in SUMS:
                content[f"{name}/{path}"] = np.float32(scaling) * (found["B"] @ found["A"])
            else:
                content.update({f"{name}/{path}/{key}": value for key, value in found.items()})
                content[f"{name}/{path}/scaling"] = np.float32(scaling)
    np.savez(FOLDER / "sums.npz", **content)


torch.manual_seed(0)
make_gpt2()
for adapter_name, adapter_config in ADAPTERS.items():
    make_adapter(adapter_name, adapter_config)
make_sums()
