"""Presets, settings, and errors that name everything at once."""

import dataclasses
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workload.config import Config, check, list_presets, load_config, parse_config, render_toml
from workload.errors import WorkloadError


def test_every_preset_loads_and_fits_its_tokenizer() -> None:
    assert {"demo", "gpt2-124m", "gpt2-355m", "gpt2-774m", "gpt2-1558m", "book-163m", "speedrun"} <= set(
        list_presets()
    )
    for name in list_presets():
        config = load_config(name)
        assert config.model.vocab_size == {"gpt2": 50257, "bytes": 257}[config.data.tokenizer]
        assert config.data.tokenizer == "gpt2"


def test_settings_override_the_preset_with_or_without_the_section() -> None:
    config = load_config(
        "demo", ["model.n_layer=2", "steps=8", "lr=1", "tied=false", 'sample_prompt="a\\nb"']
    )
    assert (config.model.n_layer, config.train.steps, config.train.lr, config.model.tied) == (
        2,
        8,
        1.0,
        False,
    )
    assert config.train.sample_prompt == "a\nb"
    assert load_config("demo", ["data.source=/some/where"]).data.source == "/some/where"


def test_the_vocabulary_follows_the_tokenizer_unless_it_is_set() -> None:
    assert load_config("demo", ["data.tokenizer=bytes"]).model.vocab_size == 257
    assert load_config("gpt2-124m", ["vocab_size=50304"]).model.vocab_size == 50304
    with pytest.raises(WorkloadError, match="50256 does not fit"):
        load_config("gpt2-124m", ["vocab_size=50256"])


def test_all_errors_come_at_once_with_suggestions() -> None:
    with pytest.raises(WorkloadError) as caught:
        load_config(
            "demo", ["model.n_layr=2", "train.steps=many", "optimiser.lr=1", "batch", "tied=1", "lr=1.5"]
        )
    message = caught.value.message
    assert len(message.splitlines()) == 5
    for part in (
        "no key model.n_layr; did you mean model.n_layer?",
        "train.steps must be a whole number, not 'many'",
        "no key optimiser.lr; did you mean train.lr?",
        "--set batch: expected key=value",
        "model.tied must be true or false, not '1'",
    ):
        assert part in message


def test_numbers_that_make_no_sense_are_all_named() -> None:
    settings = [
        "n_embd=30",
        "batch=3",
        "micro_batch=2",
        "steps=0",
        "dropout=1.0",
        "val_fraction=0.0",
        "lr=nan",
    ]
    with pytest.raises(WorkloadError) as caught:
        load_config("demo", settings)
    for key in (
        "model.n_embd = 30",
        "train.batch = 3",
        "train.steps",
        "model.dropout",
        "data.val_fraction",
        "train.lr",
    ):
        assert key in caught.value.message


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(WorkloadError) as caught:
        load_config("gpt2-124")
    assert "did you mean gpt2-124m?" in caught.value.message
    assert all(name in caught.value.hint for name in list_presets())


def test_a_table_or_text_that_is_none_is_refused() -> None:
    with pytest.raises(WorkloadError, match="modle is not a table of a run; did you mean model"):
        parse_config("[modle]\nn_layer = 2\n", where="x.toml")
    with pytest.raises(WorkloadError, match=r"x\.toml: not TOML"):
        parse_config("n_layer = = 2", where="x.toml")


@settings(deadline=None)  # other work on the machine is not an error
@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.floats(1e-9, 1e9),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_toml_reads_back_what_was_written(prompt: str, lr: float, tied: bool, seed: int) -> None:
    config = load_config("demo")
    config = Config(
        dataclasses.replace(config.model, tied=tied),
        config.data,
        dataclasses.replace(config.train, sample_prompt=prompt, lr=lr, seed=seed),
    )
    assert parse_config(render_toml(config), where="test") == config
    assert tomllib.loads(render_toml(config))["train"]["lr"] == lr


def test_the_defaults_are_consistent() -> None:
    assert check(load_config("gpt2-124m")) == []
    assert check(Config(model=dataclasses.replace(load_config("demo").model, vocab_size=50257))) == []


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("optimizer=mouon", "train.optimizer must be adamw or muon, not mouon; did you mean muon?"),
        ("schedule=cosin", "train.schedule must be cosine or wsd, not cosin; did you mean cosine?"),
        ("decay=0.0", "train.decay is a fraction of train.steps and must be in (0, 1], not 0.0"),
        ("guard=-1", "train.guard must not be less than 0, not -1.0"),
        ("muon_momentum=1", "train.muon_momentum must be in [0, 1), not 1.0"),
        ("guard_window=0", "train.guard_window must be more than 0, not 0"),
        ("micro_batch=-1", "train.micro_batch must not be less than 0, not -1"),
    ],
)
def test_words_and_numbers_that_make_no_sense(setting: str, complaint: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load_config("demo", [setting])
    assert caught.value.message == complaint


def test_a_configuration_from_before_there_were_these_keys_still_loads() -> None:
    new = ("optimizer", "muon_lr", "muon_momentum", "schedule", "decay", "guard", "guard_window")
    lines = render_toml(load_config("gpt2-124m", ["micro_batch=8"])).splitlines()
    old = "\n".join(line for line in lines if line.partition(" = ")[0] not in new)
    assert len(lines) - len(old.splitlines()) == len(new)
    assert parse_config(old, where="test") == load_config("gpt2-124m", ["micro_batch=8"])
