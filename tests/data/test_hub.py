"""Hub data sets: what is streamed, and what every failure says."""

from __future__ import annotations

import json

import pytest

from attnprune.data.sources import documents
from attnprune.errors import AttnPruneError, InputError
from tests.helpers.factory import refused

# Hub data sets


def test_a_hub_data_set_out_of_reach_fails_with_a_way_out():
    with pytest.raises(AttnPruneError) as caught:
        list(documents("no-such-organisation/no-such-set"))
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, InputError)
    assert caught.value.message.startswith("no-such-organisation/no-such-set: cannot read")
    assert len(caught.value.message.splitlines()) == 1
    assert "--data" in caught.value.hint


def test_a_folder_that_is_not_there_is_no_data_set():
    refused(lambda: documents("nosuch/"), "nosuch/: no such file")


@pytest.mark.parametrize("source", ["#27+58=085", "a/b/c", "two  words", "x--y", "+:sub", "n" * 97])
def test_a_name_that_the_hub_does_not_allow_is_bad_input(source):
    hint = refused(lambda: documents(source), f"{source}: no such file, and no data set can have this name").hint
    assert "names a file, folder, pattern or Hub data set" in hint


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), FileNotFoundError("x"), ValueError("bad"), OSError()])
@pytest.mark.parametrize("rows_before", [0, 2])
def test_any_hub_failure_is_one_error(monkeypatch, error, rows_before):
    def load_dataset(*args, **kwargs):
        if not rows_before:
            raise error
        return stream()

    def stream():
        yield from [{"text": "x"}] * rows_before
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(AttnPruneError) as caught:
        list(documents("some/set"))
    assert caught.value.exit_code == 1
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("some/set", ("some/set", None, "train")),
        ("some/set:sub", ("some/set", "sub", "train")),
        ("some/set:sub:validation", ("some/set", "sub", "validation")),
        ("some/set::test", ("some/set", None, "test")),
    ],
)
def test_a_hub_source_names_set_configuration_and_split(monkeypatch, source, expected):
    seen = []

    def load_dataset(name, subset, *, split, streaming):
        seen.append((name, subset, split))
        assert streaming
        return iter([{"text": "x"}, {"text": "y"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents(source)) == ["x", "y"]
    assert seen == [expected]


def test_a_hub_data_set_without_the_field_is_refused_with_its_fields(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{"body": "x", "id": 1}]))
    error = refused(lambda: list(documents("some/set")), "no text field 'text'")
    assert "body, id" in error.hint


@pytest.fixture
def real_set(tmp_path, monkeypatch):
    """Data sets that the real library reads, as if they were on the Hub: one with two configurations, one with none."""
    import datasets

    for name, header in {
        "two": "configs:\n"
        "- {config_name: de, data_files: [{split: train, path: de.jsonl}, {split: test, path: de.jsonl}]}\n"
        "- {config_name: en, data_files: [{split: train, path: en.jsonl}]}",
        "one": "configs:\n- {config_name: default, data_files: [{split: validation, path: de.jsonl}]}",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for language in ("de", "en"):
            (folder / f"{language}.jsonl").write_text(json.dumps({"text": language}) + "\n")
        (folder / "README.md").write_text(f"---\n{header}\n---\n")
    for function in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names"):
        original = getattr(datasets, function)

        def there(name, *args, original=original, **kwargs):
            return original(str(tmp_path / name.partition("/")[2]), *args, **kwargs)

        monkeypatch.setattr(datasets, function, there)


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("org/two", "Config name is missing", "configurations: de, en; as in org/two:de"),
        ("org/two:fr", "'fr' not found", "configurations: de, en"),
        ("org/two:test", "'test' not found", "configurations: de, en"),
        ("org/two:en:test", "test", "splits: train; as in org/two:en:train"),
        ("org/two:de:dev", "dev", "splits: train, test"),
        ("org/one", "train", "splits: validation; as in org/one::validation"),
        ("org/two:de:train[:10%]", "slice", "no more of it is read than the run needs"),
        ("org/one:train[:10%]", "slice", "the split alone"),
    ],
)
def test_a_wrong_configuration_or_split_says_which_there_are(real_set, source, message, hint):
    assert hint in refused(lambda: list(documents(source)), source, message).hint


@pytest.mark.parametrize(
    ("source", "text"), [("org/two:en", "en"), ("org/two:de:test", "de"), ("org/one::validation", "de")]
)
def test_a_right_configuration_and_split_is_read(real_set, source, text):
    assert list(documents(source)) == [text]


def test_data_that_is_private_or_not_there_says_how_to_log_in(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'some/set' is a gated dataset on the Hub.\nVisit the page")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    error = refused(lambda: list(documents("some/set")), "is a gated dataset on the Hub.")
    assert "hf auth login" in error.hint


def test_the_first_line_of_any_other_failure_is_passed_on(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(AttnPruneError, match=r"RuntimeError: Dataset scripts are no longer supported$"):
        list(documents("some/set"))
