"""The configurations: fields, defaults, files that Hugging Face PEFT wrote, and what is refused."""

import json

import pytest

from mindpet.errors import ConfigError
from mindpet.peft import (
    AdaLoraConfig,
    AdapterConfig,
    AdaptionPromptConfig,
    BitFitConfig,
    CompacterConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LowRankAdapterConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    Ptuning2Config,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_config,
)

# What Hugging Face PEFT 0.21 writes for LoRA on a BERT, and for prefix tuning.
HF_LORA = """{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": null,
"base_model_name_or_path": null, "bias": "none", "corda_config": null, "ensure_weight_tying": false, "eva_config": null,
"exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true,
"kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null, "loftq_config": {},
"lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null, "megatron_config": null,
"megatron_core": "megatron.core", "modules_to_save": ["classifier", "score"], "monteclora_config": null,
"peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": null,
"target_modules": ["value", "query"], "target_parameters": null, "task_type": "SEQ_CLS",
"trainable_token_indices": null, "use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false,
"velora_config": null}"""
HF_PREFIX = """{"auto_mapping": null, "base_model_name_or_path": "bert", "encoder_hidden_size": 32,
"inference_mode": true, "init_weights": null, "modules_to_save": ["classifier"], "num_attention_heads": 4,
"num_layers": 2, "num_transformer_submodules": 1, "num_virtual_tokens": 5, "peft_type": "PREFIX_TUNING",
"peft_version": "0.21.2", "prefix_projection": false, "revision": null, "task_type": "SEQ_CLS", "token_dim": 32}"""
EVERY = [
    LoraConfig(r=4, lora_alpha=16, target_modules={"v", "q"}, rank_pattern={"q": 2}, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True),
    AdapterConfig(target_modules="all-linear", exclude_modules=["head"], bottleneck_size=8),
    LowRankAdapterConfig(target_modules=["dense"], layers_to_transform=[0, 1], layers_pattern="layer"),
    Ptuning2Config(num_virtual_tokens=5, dropout_prob=0.1),
    BitFitConfig(modules_to_save=["classifier"]),
    IA3Config(target_modules=["key", "dense"], feedforward_modules=["dense"]),
    VeraConfig(r=4, target_modules=["query"], vera_dropout=0.1),
    HiraConfig(r=4, target_modules=["query"], rank_pattern={"query": 2}, init_weights=None),
    MissConfig(r=4, target_modules=["query"], init_weights="mini", mini_r=2),
    AdaLoraConfig(init_r=4, total_step=9, target_r=2, target_modules=["query"], rank_pattern={"q.lora_E": [True] * 4}),
    OFTConfig(r=4, oft_block_size=0, target_modules=["query"], coft=True),
    LoHaConfig(r=4, alpha=2, target_modules=["query"], rank_dropout=0.1, alpha_pattern={"query": 3}),
    LoKrConfig(r=4, target_modules=["query"], decompose_factor=4, init_weights="lycoris"),
    PromptTuningConfig(num_virtual_tokens=5),
    TrainableTokensConfig(token_indices=[7, 3]),
    LNTuningConfig(target_modules=["norm"]),
    CompacterConfig(target_modules=["dense"], reduction_factor=4, phm_dim=2),
    PromptEncoderConfig(num_virtual_tokens=5, encoder_reparameterization_type="LSTM"),
    AdaptionPromptConfig(target_modules="self_attn", adapter_len=10, adapter_layers=2),
]


def test_defaults_of_lora_are_those_of_hugging_face():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias) == (8, 8, 0.0, "none")
    assert config.init_lora_weights is True and config.rank_pattern == {} and config.target_modules is None
    assert not any((config.fan_in_fan_out, config.use_rslora, config.use_dora, config.lora_bias, config.inference_mode))
    assert config.peft_type == PeftType.LORA == "LORA" and not config.is_prompt_learning
    assert PrefixTuningConfig().is_prompt_learning


@pytest.mark.parametrize("text, cls", [(HF_LORA, LoraConfig), (HF_PREFIX, PrefixTuningConfig)])
def test_a_file_of_hugging_face_is_kept_whole(text, cls, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is cls and config.task_type is TaskType.SEQ_CLS
    config.check_supported()
    config.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/adapter_config.json").read_text()) == json.loads(text)
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["adapter_config.json"]


@pytest.mark.parametrize("config", EVERY, ids=lambda config: config.peft_type.value)
def test_round_trip(config, tmp_path):
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    content = json.loads(text)
    # P-Tuning v2 goes by a name that Hugging Face PEFT knows.
    name = "PREFIX_TUNING" if type(config) is Ptuning2Config else config.peft_type.value
    assert text == json.dumps(content, indent=2, sort_keys=True) and content["peft_type"] == name
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is type(config) and again.to_dict() == config.to_dict()
    assert type(config).from_pretrained(tmp_path / "adapter_config.json", inference_mode=True).inference_mode
    assert {config.peft_type for config in EVERY} == set(PeftType)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"r": 0}, ValueError, "'r' must be a positive int"),
        ({"r": True}, TypeError, "'r' must be a positive int"),
        ({"lora_alpha": 0}, ValueError, "'lora_alpha' must be finite and not zero"),
        ({"lora_dropout": 1.0}, ValueError, r"'lora_dropout' must be in \[0, 1\)"),
        ({"bias": "some"}, ValueError, "'bias' must be one of"),
        ({"use_dora": 1}, TypeError, "'use_dora' must be a bool"),
        ({"init_lora_weights": "xavier"}, ValueError, "'init_lora_weights' must be a bool, 'gaussian'"),
        ({"task_type": "CLS"}, ValueError, "'task_type' must be one of"),
        ({"target_modules": 3}, TypeError, "'target_modules' must be a str, a list of str or None"),
        ({"target_modules": ["q", 3]}, TypeError, "'target_modules' must be a str, a list of str or None"),
        ({"target_modules": "("}, ValueError, "'target_modules' must be a regular expression"),
        ({"modules_to_save": {"a": 1}}, TypeError, "'modules_to_save' must be"),
        ({"layers_to_transform": [-1]}, TypeError, "'layers_to_transform' must be"),
        ({"layers_to_transform": "0"}, TypeError, "'layers_to_transform' must be"),
        ({"layers_pattern": "layer"}, ValueError, "'layers_pattern' must be given with layers_to_transform"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"'rank_pattern\['q'\]' must be a positive int"),
        ({"alpha_pattern": {"(": 1}}, ValueError, "'alpha_pattern' must be keyed by regular expressions"),
        ({"rank_pattern": ["q"]}, TypeError, "'rank_pattern' must be a dict"),
        ({"rank_pattern": {"(?i)q": 2}}, ValueError, "'rank_pattern' must be keyed by regular expressions"),
        ({"target_modules": "q{99999999999}"}, ValueError, "'target_modules' must be a regular expression"),
        ({"layers_pattern": "(", "layers_to_transform": 0}, ValueError, "'layers_pattern' must be of regular expr"),
        ({"lora_alpha": 10**400}, ValueError, "'lora_alpha' must be finite and not zero, but got <int of 1329 bits>"),
        ({"lora_alpha": float("nan")}, ValueError, "'lora_alpha' must be finite and not zero"),
        ({"auto_mapping": 5}, TypeError, "'auto_mapping' must be a dict or None, but got 5"),
        ({"base_model_name_or_path": 5}, TypeError, "'base_model_name_or_path' must be a str or None, but got 5"),
    ],
)
def test_wrong_fields(change, error, match):
    with pytest.raises(error, match="LoraConfig: " + match):
        LoraConfig(**change)


def test_all_wrong_fields_are_in_one_error():
    with pytest.raises(ValueError, match="(?s)(?=.*'r' must)(?=.*'bias' must).*'rank_pattern"):
        LoraConfig(r=0, bias="x", rank_pattern={"q": -1})


@pytest.mark.parametrize(
    "cls, field, value",
    [
        (PrefixTuningConfig, "num_virtual_tokens", 0),
        (PrefixTuningConfig, "encoder_hidden_size", 0),
        (Ptuning2Config, "dropout_prob", 1.5),
        (AdapterConfig, "bottleneck_size", 0),
        (AdapterConfig, "non_linearity", "gulu"),
        (LowRankAdapterConfig, "reduction_factor", 0),
    ],
)
def test_wrong_fields_of_the_other_methods(cls, field, value):
    with pytest.raises(ValueError, match=f"{cls.__name__}: '{field}' must be"):
        cls(**{field: value})


@pytest.mark.parametrize(
    "field, value",
    [("layer_replication", [[0, 4]]), ("target_parameters", ["w"]), ("use_qalora", True), ("arrow_config", {"a": 1})],
)
def test_what_would_change_the_result_is_refused(field, value):
    config = get_peft_config({**json.loads(HF_LORA), field: value})
    with pytest.raises(ConfigError, match=f"LoraConfig: not supported: .*{field}"):
        config.check_supported()


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq"])
def test_starts_that_change_the_base_in_a_way_that_the_file_does_not_tell(init):
    with pytest.raises(ConfigError, match=f"init_lora_weights='{init}', which takes a part off the base"):
        get_peft_config({**json.loads(HF_LORA), "init_lora_weights": init}).check_supported()


@pytest.mark.parametrize("init", ["pissa_niter_1", "pissa_niter_16"])
def test_an_approximate_start_is_for_fresh_adapters(init):
    """Hugging Face PEFT computes it with random numbers, and does not say which."""
    LoraConfig(init_lora_weights=init).check_supported()
    for config, from_file in (
        (get_peft_config({**json.loads(HF_LORA), "init_lora_weights": init}), False),
        (LoraConfig(init_lora_weights=init), True),
    ):
        with pytest.raises(
            ConfigError, match=f"init_lora_weights='{init}', which takes a part off the base .* plain LoRA"
        ):
            config.check_supported(from_file=from_file)
    LoraConfig(init_lora_weights="pissa").check_supported(from_file=True)


def test_files_of_ptuning2_by_its_own_name(tmp_path):
    content = {**json.loads(HF_PREFIX), "peft_type": "PTUNING2", "dropout_prob": 0.2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is Ptuning2Config and config.dropout_prob == 0.2
    assert type(get_peft_config(config.to_dict())) is Ptuning2Config
    assert type(get_peft_config(PrefixTuningConfig(num_virtual_tokens=1).to_dict())) is PrefixTuningConfig


def test_a_field_of_a_file_that_is_called_unknown_is_kept():
    config = get_peft_config({**json.loads(HF_LORA), "unknown": 3})
    assert config.to_dict()["unknown"] == 3 and get_peft_config(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(TypeError, match="LoraConfig: 'unknown' must be a dict, but got 3"):
        LoraConfig(unknown=3)


@pytest.mark.parametrize("content, match", [(3, "'config_dict' must be a dict"), ([1], "'config_dict' must be a dict")])
def test_a_configuration_from_something_else(content, match):
    with pytest.raises(TypeError, match=match):
        get_peft_config(content)


def test_initial_values_of_a_loaded_adapter_do_not_matter():
    content = {**json.loads(HF_LORA), "init_lora_weights": "eva"}
    assert get_peft_config(content).init_lora_weights == "eva"
    with pytest.raises(ValueError, match="'init_lora_weights'"):
        get_peft_config({**content, "inference_mode": False})


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "not JSON"),
        ("[1]", "must hold an object"),
        ("{}", "'peft_type' must be one of .* but got None"),
        ('{"peft_type": "MAGIC"}', "'peft_type' must be one of .* but got 'MAGIC'"),
        ('{"peft_type": ["LORA"]}', r"'peft_type' must be one of .* but got \['LORA'\]"),
        ("[" * 100_000, "not JSON: more than 32 levels deep"),
        ('{"peft_type": "LORA", "r": 8, "r": 4}', "not JSON: the key 'r' is there twice"),
        ('{"peft_type": "LORA", "lora_alpha": 1e400}', "not JSON: '1e400' is no number"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "not JSON: 'NaN' is no number"),
        ('{"peft_type": "BITFIT"}', "is a BitFitConfig, but a LoraConfig is asked for"),
    ],
)
def test_files_that_are_no_configuration(text, match, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=match):
        LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["\x1b[2J" * 100_000, [["a"] * 1000] * 1000, {"x" * 10**6: 1}])
@pytest.mark.parametrize("field", ["r", "lora_alpha", "bias", "task_type", "auto_mapping", "peft_type", "rank_pattern"])
def test_what_an_error_quotes_is_short_and_can_be_shown(field, value, tmp_path):
    content = {"peft_type": "LORA", field: {"a": value} if field == "rank_pattern" else value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    if field == "auto_mapping" and isinstance(value, dict):
        assert PeftConfig.from_pretrained(tmp_path).auto_mapping == value
        return
    with pytest.raises((TypeError, ValueError), match=field) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        PeftConfig.from_pretrained(tmp_path)


def test_a_configuration_without_a_method_is_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="PeftConfig: no method to save"):
        PeftConfig().save_pretrained(tmp_path)
