"""RunConfig: TOML round trips, ranges, helpful one-line errors, merging."""

import math
import string
import tomllib
from typing import Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprune.errors import InputError
from attnprune.runs.config import RunConfig, build_config, read_toml

FIELDS = [
    (section, name, field)
    for section, outer in RunConfig.model_fields.items()
    for name, field in outer.annotation.model_fields.items()
]
NAMES = [f"{section}.{name}" for section, name, _ in FIELDS]


def refused(values):
    with pytest.raises(InputError) as caught:
        build_config(values)
    assert caught.value.exit_code == 2
    assert len(caught.value.message.splitlines()) == 1
    return caught.value.message


def get(config, section, name):
    return getattr(getattr(config, section), name)


def round_trip(config):
    return build_config(tomllib.loads(config.to_toml()))


# TOML round trips


CHOSEN = {  # where any text would not do
    "time": "1h30m", "micro_batch_size": 8, "weights": [0.3], "frontier": [0.5, 0.1 + 1e-17], "recover": [0, 18],
    "rest_learning_rate": 1e-4 / 3,
}  # fmt: skip
WITH = {"frontier": {"kind": "density"}, "keep_quantised": {"load_in": "8bit"}}  # what a value needs beside it


def another_value(name, field):
    """A valid value that is not the default."""
    if name in CHOSEN:
        return CHOSEN[name]
    if get_origin(field.annotation) is Literal:
        return get_args(field.annotation)[-1]
    if field.annotation is bool:
        return not field.default
    if field.annotation is int:
        return field.default + 8
    if field.annotation is float:
        return field.default / 3 + 1e-7
    return 'a "quoted" \\ näme\n\t\x1b 🙂'


@pytest.mark.parametrize(("section", "name", "field"), FIELDS, ids=NAMES)
def test_every_field_survives_toml(section, name, field):
    value = another_value(name, field)
    assert value != field.default
    config = build_config({section: {name: value, **WITH.get(name, {})}})
    assert get(config, section, name) == value
    assert round_trip(config) == config
    assert config != RunConfig()


@pytest.mark.parametrize(("section", "name", "field"), FIELDS, ids=NAMES)
def test_every_field_is_documented_and_its_default_is_valid(section, name, field):
    assert field.description
    assert get(build_config({section: {name: field.default}}), section, name) == field.default


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="train: batch_size 16 is not a multiple of micro_batch_size"):
        build_config({"train": {"batch_size": 16, "micro_batch_size": 5}})
    with pytest.raises(InputError, match="train: time gives the number of steps"):
        build_config({"train": {"time": "10m", "steps": 5}})
    with pytest.raises(InputError, match="constraint: initial 1 is not within minimum and maximum"):
        build_config({"constraint": {"minimum": 2.0}})


def test_the_defaults_survive_toml():
    assert round_trip(RunConfig()) == RunConfig()
    assert "revision" not in tomllib.loads(RunConfig().to_toml())["model"]  # None is left out


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"])),
    positive=st.floats(1e-300, 1e300, allow_subnormal=False),
    any_float=st.floats(-100, 100),
    temperature=st.floats(1e-3, 1e3),
    density=st.floats(0, 1, exclude_min=True),
    share=st.floats(0, 1, exclude_max=True),
    count=st.integers(1, 2**62),
    flag=st.booleans(),
)
def test_any_valid_value_survives_toml(text, positive, any_float, temperature, density, share, count, flag):
    config = build_config(
        {
            "model": {"name": text, "revision": text},
            "data": {"source": text, "train_tokens": count},
            "gate": {"temperature": temperature, "slope_temperature": temperature, "bias_init": any_float},
            "constraint": {"tolerance": positive, "target_density": density, "smoothing": share},
            "train": {"gradient_checkpointing": flag, "learning_rate": positive, "steps": count},
            "output": {"folder": text},
        }
    )
    assert round_trip(config) == config


def test_two_configurations_share_nothing():
    first, second = RunConfig(), RunConfig()
    first.train.steps = 5
    first.model.name = "other"
    assert second == RunConfig()
    assert RunConfig().train.steps != 5


# Ranges


BAD = [
    ("constraint.target_density", 0),
    ("constraint.target_density", 1.5),
    ("constraint.target_density", -0.1),
    ("constraint.target_density", math.nan),
    ("constraint.target_density", "abc"),
    ("constraint.tolerance", 0),
    ("constraint.tolerance", -0.01),
    ("constraint.tolerance", math.inf),
    ("constraint.tolerance", math.nan),
    ("constraint.kind", "entropy"),
    ("constraint.update", "adam"),
    ("constraint.rate", 0),
    ("constraint.rate", math.inf),
    ("constraint.gain", -1),
    ("constraint.smoothing", 1.0),
    ("constraint.smoothing", -0.1),
    ("constraint.smoothing", math.nan),
    ("constraint.initial", 0),
    ("constraint.minimum", 0),
    ("constraint.minimum", -1e-3),
    ("constraint.maximum", math.inf),
    ("train.learning_rate", -1e-4),
    ("train.learning_rate", 0),
    ("train.learning_rate", math.nan),
    ("train.gate_learning_rate", -1),
    ("train.steps", 0),
    ("train.steps", -5),
    ("train.steps", 1.5),
    ("train.steps", None),
    ("train.steps", []),
    ("train.batch_size", 0),
    ("train.micro_batch_size", -1),
    ("train.micro_batch_size", 1.5),
    ("train.micro_batch_size", "some"),
    ("train.micro_batch_size", True),
    ("train.time", "10"),
    ("train.time", ""),
    ("train.time", "0m"),
    ("train.time", "1m30"),
    ("train.time", "-5m"),
    ("train.time", 600),
    ("train.warmup_steps", -1),
    ("train.decay_fraction", 1.0),
    ("train.final_fraction", math.nan),
    ("train.weight_decay", -0.1),
    ("train.max_grad_norm", 0),
    ("train.lora_rank", 0),
    ("train.lora_rank", 1025),
    ("train.lora_rank", 100_000),
    ("train.optimizer", "sgd"),
    ("train.precision", "fp8"),
    ("train.scope", "everything"),
    ("train.gradient_checkpointing", "perhaps"),
    ("train.seed", -1),
    ("train.eval_every", 0),
    ("train.save_every", 0),
    ("data.seq_len", -1),
    ("data.train_tokens", 0),
    ("data.eval_tokens", 0),
    ("data.text_field", 3),
    ("gate.temperature", 0),
    ("gate.slope_temperature", 0),
    ("gate.slope_temperature", 1e-9),
    ("gate.temperature", 1e308),
    ("gate.bias_init", math.inf),
    ("gate.estimator", "hard"),
    ("model.dtype", "int8"),
    ("model.name", ["demo"]),
    ("output.folder", 5),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[f"{key}={value}" for key, value in BAD])
def test_a_value_out_of_range_is_refused_by_name(key, value):
    section, name = key.split(".")
    message = refused({section: {name: value}})
    assert message.startswith(f"{key}: ")
    assert repr(value) in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("constraint.target_density", 1.0),
        ("constraint.smoothing", 0.0),
        ("train.lora_rank", 1024),
        ("train.steps", 1),
        ("train.seed", 0),
        ("train.micro_batch_size", 0),
        ("train.time", "1s"),
        ("data.seq_len", 0),
        ("gate.bias_init", -3.5),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(key, value):
    section, name = key.split(".")
    assert get(build_config({section: {name: value}}), section, name) == value


def test_an_assignment_is_checked_too():
    config = RunConfig()
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        config.train.steps = 0


# Unknown keys


@pytest.mark.parametrize(
    ("values", "key", "meant"),
    [
        ({"train": {"batchsize": 3}}, "train.batchsize", "batch_size"),
        ({"train": {"learning_rat": 3}}, "train.learning_rat", "learning_rate"),
        ({"constraint": {"tolerence": 0.1}}, "constraint.tolerence", "tolerance"),
        ({"model": {"nam": "demo"}}, "model.nam", "name"),
        ({"trian": {"steps": 3}}, "trian", "train"),
        ({"Train": {}}, "Train", "train"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(values, key, meant):
    assert refused(values) == f"{key}: unknown option; did you mean {meant!r}?"


@pytest.mark.parametrize(
    "values", [{"train": {"zzzz": 1}}, {"zzzz": 1}, {"steps": 3, "zzzz": 1}, {"model": {"": "x"}}, {"": {}}]
)
def test_an_unknown_key_unlike_any_other_is_refused_without_a_guess(values):
    message = refused(values)
    assert "unknown option" in message
    assert "zzzz" not in message or "did you mean" not in message


@pytest.mark.parametrize("value", [5, "text", [], None, True])
def test_a_section_that_is_no_table_is_refused(value):
    assert refused({"train": value}).startswith("train: ")


@pytest.mark.parametrize("values", [{"train": {"st\neps": 1}}, {"a\nb": 1}, {"constraint": {"kind": "a\nb"}}])
def test_a_message_is_one_line_whatever_the_names_hold(values):
    refused(values)


# Reading files


def test_read_toml_returns_the_raw_values(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[train]\nsteps = 7\nunknown = "ä"\n', encoding="utf-8")
    assert read_toml(file) == {"train": {"steps": 7, "unknown": "ä"}}


def test_a_written_configuration_is_read_back(tmp_path):
    config = build_config({"model": {"name": "demo"}, "train": {"steps": 11, "gradient_checkpointing": True}})
    (tmp_path / "run.toml").write_text(config.to_toml(), encoding="utf-8")
    assert build_config(read_toml(tmp_path / "run.toml")) == config


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"steps = \n", id="no-value"),
        pytest.param(b"[train\nsteps = 1\n", id="open-table"),
        pytest.param(b"a = 1\na = 2\n", id="duplicate-key"),
        pytest.param(b"a = 1\nb = \xff\n", id="invalid-utf8"),
        pytest.param("a = 1\n".encode("utf-16"), id="utf-16"),
        pytest.param(b"a = 1\n\x00", id="nul"),
        pytest.param(b'{"a": 1}', id="json"),
        pytest.param(b"a = " + b"9" * 5000, id="long-number"),
        pytest.param(b"a = " + b"[" * 100_000, id="deep-nesting"),
        pytest.param(b".".join([b"a"] * 3000) + b" = 1", id="deep-key"),
    ],
)
def test_a_file_that_is_not_toml_is_refused(tmp_path, content):
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        build_config(read_toml(file))
    assert caught.value.exit_code == 2
    assert len(caught.value.message.splitlines()) == 1
    assert caught.value.message.startswith((str(file), "a"))


@pytest.mark.parametrize("name", ["missing.toml", "folder", "missing/run.toml", "x" * 300])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError) as caught:
        read_toml(tmp_path / name)
    assert caught.value.message.startswith(str(tmp_path / name))
    assert len(caught.value.message.splitlines()) == 1


def test_all_field_names_are_lower_case_words():
    for name in NAMES:
        assert set(name) <= set(string.ascii_lowercase + string.digits + "._")
