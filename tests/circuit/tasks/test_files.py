"""A user's own prompts, .csv and .jsonl: read as they are, refused with the line."""

from __future__ import annotations

import json
from itertools import chain

import pytest

from attnprune.circuit.tasks import load_task, words
from tests.helpers.factory import refused
from tests.helpers.tasks import all_batches, pair, rows

# The user's own file

INDICES = "clean,corrupted,correct_idx,incorrect_idx\n"

HEADER = "clean,corrupted,answer,wrong\n"

ROW = '"The key near the doors","The keys near the doors"," is| was"," are| were"\n'


NOUNS = ["key", "door", "lamp", "book", "car", "tree", "hat", "map", "wall"]


def write(tmp_path, content, name="mine.csv"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


@pytest.mark.parametrize("name", ["MINE.CSV", "Mine.Jsonl"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, smol, name):
    texts = [pair(noun).strip().strip('"').split('","') for noun in NOUNS]
    lines = [json.dumps(dict(zip(HEADER.strip().split(","), text, strict=True))) for text in texts]
    content = HEADER + "".join(map(pair, NOUNS)) if name.endswith("CSV") else "\n".join(lines)
    assert load_task(write(tmp_path, content, name), smol, count=10, seed=1).name == name


def test_a_csv_file(tmp_path, smol):
    file = write(
        tmp_path,
        "\ufeff" + HEADER.replace("\n", ",note\r\n") + "\r\n".join(f"{pair(noun).strip()},x" for noun in NOUNS),
    )
    task = load_task(file, smol, count=10, seed=1)
    assert (task.name, task.metric) == ("mine.csv", "logit_difference")
    found = [
        [clean.split()[1] for batch in part for clean, _ in batch.texts]
        for part in (task.train, task.validation, task.test)
    ]
    assert [len(part) for part in found] == [3, 3, 3]
    assert sorted(chain(*found)) == sorted(NOUNS)
    for batch, row in rows(all_batches(task)):
        assert smol.decode(batch.clean[row]) == batch.texts[row][0]
        assert smol.decode(batch.answers[row]) == " is was"
        assert smol.decode(batch.wrong[row]) == " are were"
        assert batch.roles["END"][row].tolist() == [batch.length - 1, batch.length]
    assert load_task(file, smol, count=10, seed=1).fingerprint == task.fingerprint
    assert load_task(file, smol, count=10, seed=2).fingerprint != task.fingerprint
    assert sum(map(len, load_task(file, smol, count=1).train)) == 1


def test_a_jsonl_file_and_token_ids(tmp_path, smol):
    yes, no = (smol(f" {verb}")["input_ids"][0] for verb in ("is", "are"))
    lines = [
        {"clean": f"The {noun} here", "corrupted": f"The {noun}s here"}
        | ({"answer": [" is"], "wrong": " are"} if i % 2 else {"correct_idx": yes, "incorrect_idx": [no]})
        for i, noun in enumerate(NOUNS)
    ]
    file = write(tmp_path, "\n\n".join(map(json.dumps, lines)), "mine.jsonl")
    for batch in all_batches(load_task(file, smol)):
        assert batch.answers.tolist() == [[yes]] * len(batch)
        assert batch.wrong.tolist() == [[no]] * len(batch)


def test_the_columns_of_eap_ig(tmp_path, smol):
    yes, no, was = (smol(f" {verb}")["input_ids"][0] for verb in ("is", "are", "was"))
    lines = [f"{i},The {noun} here,The {noun}s here,{yes}|{was},{no}" for i, noun in enumerate(NOUNS)]
    file = write(tmp_path, ",clean,corrupted,correct_idx,incorrect_idx\n" + "\n".join(lines))
    for batch in all_batches(load_task(file, smol)):
        assert batch.answers.tolist() == [[yes, was]] * len(batch)
        assert batch.wrong.tolist() == [[no]] * len(batch)


def test_rows_with_the_same_clean_prompt_stay_together(tmp_path, smol):
    twice = [f'"The {noun} here","The {other} here"," is"," are"\n' for noun in NOUNS for other in ("men", "boys")]
    task = load_task(write(tmp_path, HEADER + "".join(twice)), smol)
    found = [{clean for batch in part for clean, _ in batch.texts} for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in found] == [3, 3, 3]
    assert len(set.union(*found)) == 9
    assert [sum(map(len, part)) for part in (task.train, task.validation, task.test)] == [6, 6, 6]


def test_files_get_bos_too(tmp_path, pairs):
    lines = [f'"We know the {noun}","We know the {other}"," is"," are"\n' for noun, other in words.THINGS[:6]]
    lines = [line.replace("know", "waited").replace("We", "The") for line in lines]
    for batch in all_batches(load_task(write(tmp_path, HEADER + "".join(lines)), pairs)):
        assert batch.clean[:, 0].tolist() == [pairs.bos_token_id] * len(batch)
        assert (batch.answers[:, 0] == pairs.convert_tokens_to_ids(" is")).all()


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (HEADER + ROW + '"The key","The keys there"," is"," are"\n', 3, "clean has 2 tokens, corrupted 3"),
        (HEADER + '"a\nb","a\nc"," is"," are"\n"The key","The key"," is"," are"\n', 5, "the same"),
        (HEADER + '"The key","The keys"," isolationism is"," are"\n', 2, "answer ' isolationism is' is not one token"),
        (HEADER + '"The key ","The keys ","is"," are"\n', 2, "answer 'is' is not one token after the clean prompt"),
        (HEADER + '"The key","The keys"," is"," is| are"\n', 2, "an answer is also wrong"),
        (HEADER + '"The key","The keys"," is|"," are"\n', 2, "answer '' is not one token"),
        (HEADER + '"The key","The keys",," are"\n', 2, "no answer"),
        (HEADER + ',"The keys"," is"," are"\n', 2, "no clean"),
        (HEADER + ROW + '"The key","The keys"," is"\n', 3, "3 values for 4 columns"),
        (HEADER + ROW + '"The key","The keys" x," is"," are"\n', 3, "not valid CSV"),
        (HEADER + ROW + '"The key', 3, "not valid CSV"),
        (HEADER + ROW + f'"{"a" * 200_000}",b,c,d\n', 3, "not valid CSV"),
        ("clean,clean,answer,wrong\n", 1, "a column occurs twice"),
        ("clean,corrupted,answer\na,b,c\n", 2, "no wrong"),
        ("clean,corrupted\na,b\n", 2, "no correct_idx (or answer)"),
        ("corrupted,answer,wrong\na,b,c\n", 2, "no clean"),
        (HEADER.encode() + b'"caf\xe9","x"," is"," are"\n', 2, "not UTF-8"),
        (HEADER + "a\0,b,c,d\n", 2, "NUL"),
        (INDICES + "The key,The keys,99999999,1\n", 2, "correct_idx '99999999' is not a token id"),
        (INDICES + "The key,The keys,1,-1\n", 2, "incorrect_idx '-1' is not a token id"),
        (INDICES + "The key,The keys,1,is\n", 2, "incorrect_idx 'is' is not a token id"),
    ],
)  # fmt: skip
def test_bad_csv_files_are_refused_with_the_line(tmp_path, smol, content, line, part):
    refused(lambda: load_task(write(tmp_path, content), smol), f"mine.csv: line {line}: ", part)


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"clean": 3, "corrupted": "a", "answer": " a", "wrong": " b"}', "clean is not text"),
        (r'{"clean": "\ud800", "corrupted": "a", "answer": " a", "wrong": " b"}', "clean is not text"),
        (r'{"clean": "b", "corrupted": "a", "answer": "\ud800", "wrong": " b"}', "answer"),
        ('{"clean": "b", "corrupted": "a", "answer": [" a", 3], "wrong": " b"}', "answer 3 is not one token"),
        ('{"clean": "b", "corrupted": "a", "answer": {"a": 1}, "wrong": " b"}', "is not one token"),
        ('{"clean": "b", "corrupted": "a", "answer": [], "wrong": " b"}', "no answer"),
        ('{"clean": "b", "corrupted": "a", "correct_idx": true, "incorrect_idx": 2}', "correct_idx True is not"),
        ('{"clean": "b", "corrupted": "a", "correct_idx": 1.5, "incorrect_idx": 2}', "correct_idx 1.5 is not"),
        ('{"clean": "b", "corrupted": "a", "answer": " a"}', "no wrong"),
    ],
)  # fmt: skip
def test_bad_jsonl_files_are_refused_with_the_line(tmp_path, smol, line, part):
    good = json.dumps({"clean": "The key", "corrupted": "The keys", "answer": " is", "wrong": " are"})
    refused(lambda: load_task(write(tmp_path, f"{good}\n\n{line}\n", "mine.jsonl"), smol), "mine.jsonl: line 3: ", part)


def test_rows_of_a_file_that_share_prompts_stay_together(tmp_path, smol):
    nouns = ("key", "lamp", "dog", "road", "book", "hand", "king", "tree", "ship")
    lines = [f"The {noun},The {noun}s, is, are\nThe {noun}s,The {noun}, are, is\n" for noun in nouns]
    task = load_task(write(tmp_path, HEADER + "".join(lines)), smol)
    parts = [
        {text for prompts in part for pair in prompts.texts for text in pair}
        for part in (task.train, task.validation, task.test)
    ]
    assert [len(part) for part in parts] == [6, 6, 6]
    assert len(set.union(*parts)) == 18


def test_unreadable_and_too_small_files(tmp_path, smol):
    refused(lambda: load_task(str(tmp_path / "none.csv"), smol), "none.csv: no such file")
    (tmp_path / "folder.csv").mkdir()
    refused(lambda: load_task(str(tmp_path / "folder.csv"), smol), "folder.csv: is a directory")
    refused(lambda: load_task(write(tmp_path, ""), smol), "mine.csv: 0 independent clean prompts, 3 are needed")
    refused(
        lambda: load_task(write(tmp_path, HEADER + ROW), smol), "mine.csv: 1 independent clean prompts, 3 are needed"
    )


def test_characters_that_a_tokenizer_does_not_know(tmp_path, demo):
    file = write(tmp_path, "clean,corrupted,answer,wrong\n#12+34=,#12+x4=,0,1\n")
    refused(lambda: load_task(file, demo), "line 2: corrupted has characters that this tokenizer does not know")
    file = write(tmp_path, "clean,corrupted,answer,wrong\n#12+34=,#12+54=,0,x\n")
    refused(lambda: load_task(file, demo), "line 2: wrong 'x' is not one token")
