"""freeze_modules, freeze_delta and freeze_from_config."""

import os
import warnings

import pytest
from mindspore import nn
from toy import Toy

from mindpet.errors import LinkPathError, MindPetError, ModelConfigFreezeInfoError, NoMatchError, ReadYamlFileError
from mindpet.graph import freeze_delta, freeze_from_config, freeze_modules

HEAD = {"head.weight", "head.bias"}
LORA = {"fc.mindpet_delta_lora_a", "fc.mindpet_delta_lora_b"}


def trainable(network):
    return {param.name for param in network.trainable_params()}


def test_include_freezes_and_exclude_trains():
    network = Toy()
    freeze_modules(network, include=["fc.*"])
    assert trainable(network) == HEAD
    freeze_modules(network, exclude=["fc.weight"])
    assert trainable(network) == HEAD | {"fc.weight"}


@pytest.mark.parametrize("flag", [True, False])
def test_a_name_that_both_lists_match_is_left_as_it_was(flag):
    network = Toy()
    network.head.weight.requires_grad = flag
    freeze_modules(network, include=["*"], exclude=["head.*"])
    assert trainable(network) == ({"head.weight", "head.bias"} if flag else {"head.bias"})


def test_freeze_modules_conflict_with_star():
    network = Toy()
    freeze_modules(network, include=["*"])
    freeze_modules(network, include=["*"], exclude=["head.*"])
    assert trainable(network) == set()


@pytest.mark.parametrize(
    "mode, method, expected",
    [
        ("lora", "lora", LORA),
        ("LoRA", "lora", LORA),
        ("LORA", "lora", LORA),
        ("bitfit", None, {"fc.bias", "head.bias"}),
        ("BitFit", None, {"fc.bias", "head.bias"}),
    ],
)
def test_modes_in_any_letter_case(mode, method, expected):
    network = Toy(method)
    freeze_delta(network, mode)
    assert trainable(network) == expected


@pytest.mark.parametrize(
    "mode, method",
    [
        ("prefix", "prefixtuning"),
        ("prefixtuning", "prefixtuning"),
        ("Adapter", "adapter"),
        ("low_rank_adapter", "low_rank_adapter"),
        ("PTUNING2", "ptuning2"),
    ],
)
def test_modes_train_their_delta_only(mode, method):
    network = Toy(method)
    freeze_delta(network, mode)
    assert trainable(network)
    assert all("mindpet_delta_" + method in name for name in trainable(network))


def test_token_ids_never_train():
    network = Toy("ptuning2")
    freeze_delta(network, "ptuning2", exclude=["*"])
    assert "prefix.mindpet_delta_ptuning2_prefix" not in trainable(network)
    freeze_modules(network, exclude=["*ptuning2_prefix"])
    assert "prefix.mindpet_delta_ptuning2_prefix" not in trainable(network)


def test_a_delta_that_was_frozen_is_made_trainable():
    network = Toy("lora")
    freeze_modules(network, include=["*"])
    freeze_delta(network, "lora")
    assert trainable(network) == LORA


def test_include_and_exclude_on_top_of_a_mode():
    network = Toy("lora")
    freeze_delta(network, "lora", include=["*lora_a"], exclude=["*head*"])
    assert trainable(network) == HEAD | {"fc.mindpet_delta_lora_b"}
    freeze_delta(network, "lora", include=["*"], exclude=["*"])
    assert trainable(network) == LORA


def test_an_optimizer_in_the_network_is_not_touched():
    network = Toy("lora")
    train = nn.TrainOneStepCell(network, nn.Adam(network.trainable_params()))
    freeze_delta(train, "lora")
    assert trainable(network) == LORA
    assert all(param.requires_grad for param in train.optimizer.moment1)


@pytest.mark.parametrize(
    "method, mode, match",
    [
        ("adapter", "lora", "mode 'lora' finds no parameter .* deltas in the network: \\['adapter'\\]"),
        (None, "lora", "mode 'lora' finds no parameter like .*; nearest: \\["),
        (None, "prefix", "mode 'prefixtuning' finds no parameter"),
    ],
)
def test_a_mode_without_its_delta(method, mode, match):
    network = Toy(method)
    before = trainable(network)
    with pytest.raises(NoMatchError, match=match):
        freeze_delta(network, mode)
    assert trainable(network) == before
    with pytest.warns(UserWarning, match="finds no parameter"):
        freeze_delta(network, mode, exclude=["head.*"], strict=False)
    assert trainable(network) == HEAD


def test_a_pattern_that_matches_nothing_names_the_nearest():
    network = Toy("lora")
    before = trainable(network)
    with pytest.raises(
        NoMatchError, match="(?s)pattern '\\*haed\\*' of 'exclude' matches no parameter; nearest: \\['head.*"
    ) as caught:
        freeze_delta(network, "lora", include=["dense.*"], exclude=["*haed*"])
    assert "pattern 'dense.*' of 'include'" in str(caught.value)
    assert isinstance(caught.value, (MindPetError, ValueError)) and trainable(network) == before
    with pytest.warns(UserWarning, match="haed"):
        freeze_delta(network, "lora", exclude=["*haed*", "head.bias"], strict=False)
    assert trainable(network) == LORA | {"head.bias"}


def test_patterns_mind_letter_case():
    with pytest.raises(NoMatchError, match="'HEAD.\\*'"):
        freeze_modules(Toy(), include=["HEAD.*"])


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: freeze_delta("network", "lora"), TypeError, "'model' must be a Cell, but got 'network'"),
        (lambda: freeze_delta(Toy(), 123), ValueError, "'mode' must be one of \\['lora', .*\\], but got 123 \\(int\\)"),
        (lambda: freeze_from_config(Toy(), None), TypeError, "'config_path' must be a path, but got None"),
        (lambda: freeze_from_config(Toy(), 3.5), TypeError, "'config_path' must be a path, but got 3.5"),
        (lambda: freeze_delta(Toy(), "lor"), ValueError, "'mode' must be one of \\['lora', .*\\], but got 'lor'"),
        (lambda: freeze_delta(Toy(), "bitfit", include="head.*"), TypeError, "'include' must be a list of str or None"),
        (lambda: freeze_delta(Toy(), "bitfit", exclude=[1]), TypeError, "'exclude' must be a list of str or None"),
        (lambda: freeze_delta(Toy(), "bitfit", strict="no"), TypeError, "'strict' must be a bool"),
        (lambda: freeze_modules(None, ["*"]), TypeError, "'model' must be a Cell"),
        (lambda: freeze_modules(Toy()), ValueError, "'include' or 'exclude' must hold a pattern"),
    ],
)
def test_wrong_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_warning_free_call_stays_warning_free():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_delta(Toy("lora"), "lora", exclude=["head.*"])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("freeze:\n  include: ['fc.*']\n", HEAD),
        ("freeze:\n  include: ['*']\n  exclude: ['head.*']\n", HEAD),
        ("freeze: {include: ['fc.*', 'head.bias'], exclude: ['fc.bias']}", {"head.weight", "fc.bias"}),
    ],
)
def test_config_file(text, expected, tmp_path):
    network = Toy()
    path = write(tmp_path / "freeze.yaml", text)
    os.chmod(path, 0o400)
    freeze_from_config(network, path)
    assert trainable(network) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "freeze:",
        "freeze: {}",
        "freeze: [fc]",
        "[freeze]",
        "include: ['*']",
        "freeze: {include: ['*'], extra: 1}",
        "freeze: {include: ['*']}\nmore: 1",
        "freeze: {include: '*'}",
        "freeze: {include: []}",
        "freeze: {include: [1]}",
        "freeze: {include: }",
        "just text",
        "a: 0x" + "f" * 900,
        "freeze: " + "[" * 30 + "]" * 30,
        "freeze: [" + "fc, " * 10_000 + "]",
        "freeze: {include: [" + "[fc], " * 5_000 + "]}",
    ],
    ids=range(17),
)
def test_config_with_other_content(text, tmp_path):
    network = Toy()
    with pytest.raises(ModelConfigFreezeInfoError, match="freeze_from_config: .*must") as caught:
        freeze_from_config(network, write(tmp_path / "freeze.yaml", text))
    assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()
    assert trainable(network) == HEAD | {"fc.weight", "fc.bias"}


def test_config_that_cannot_be_read(tmp_path):
    good = write(tmp_path / "good.yaml", "freeze: {include: ['*']}")
    link = tmp_path / "link.yaml"
    link.symlink_to(good)
    broken = write(tmp_path / "broken.yaml", "freeze: [")
    unsafe = write(tmp_path / "unsafe.yaml", "freeze: !!python/object/apply:os.getcwd []")
    bomb = write(tmp_path / "bomb.yaml", "a: &a [x]\nb: &b [*a, *a]\nfreeze: [*b, *b]")
    double = write(tmp_path / "double.yaml", "freeze: {include: ['*']}\nfreeze: {exclude: ['*']}")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\xff")
    for path, cause in (
        (str(link), LinkPathError),
        (str(tmp_path / "none.yaml"), FileNotFoundError),
        (str(tmp_path), FileNotFoundError),
        (broken, Exception),
        (unsafe, ValueError),
        (bomb, ValueError),
        (double, ValueError),
        (str(binary), Exception),
    ):
        with pytest.raises(ReadYamlFileError, match="cannot read 'config_path' [^\n]*$") as caught:
            freeze_from_config(Toy(), path)
        assert isinstance(caught.value.__cause__, cause)


def test_config_pattern_that_matches_nothing(tmp_path):
    path = write(tmp_path / "freeze.yaml", "freeze: {include: ['nothing.*']}")
    with pytest.raises(NoMatchError, match="'nothing.\\*'"):
        freeze_from_config(Toy(), path)


def test_the_optimizer_gets_only_what_trains():
    network = Toy("lora")
    freeze_delta(network, "lora")
    optimizer = nn.Adam(network.trainable_params())
    assert {param.name for param in optimizer.parameters} == LORA
