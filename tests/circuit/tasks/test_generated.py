"""Generated prompt pairs on real tokenizers: what differs, what is asked, where the roles are.

Long because every task is looked at on its own.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from attnprune.circuit.tasks import check_ability, load_task, task_names, words
from attnprune.circuit.tasks.prompts import NO_TOKEN, Prompts
from attnprune.data.texts import addition_task
from attnprune.errors import AttnPruneError
from attnprune.sidecar import bases
from tests.helpers.factory import byte_tokenizer, refused
from tests.helpers.tasks import SENTENCES, SMALL_LM, all_batches, rows, word_tokenizer

ADDITION_FINGERPRINT = "3705b7e4d31b29bd5305fa3e4f46221bbadc25c94838c1e8579506a65d7e3dfd"

INDUCTION_FINGERPRINTS = {
    "induction": "864781f6c22f09b255f9d9c5fd4a6df18005ff5b03da8c8aa1bf0c03d27f85aa",
    "induction:keys": "7581b93340cb8a0a530a2cfe84d1feed6124562ce033629b2fb994a541688237",
    "induction:values": "6d9266b7965801a8241eed311e28f9cd3a824dbf5b593aa05538ed6b6a6d01b3",
}

IOI_FINGERPRINT = "f5247ca9c3b6866dcbd859e9997e42c80c19162073e9f3af597ae8a6ade4d04e"

INDUCTION = ["induction", "induction:keys", "induction:values"]


def said(tokenizer, batch: Prompts, role: str, row: int, ids: str = "clean") -> str:
    """The text under a role."""
    first, end = batch.roles[role][row].tolist()
    return tokenizer.decode(getattr(batch, ids)[row, first:end])


def tokens_of(batch: Prompts, name: str, row: int) -> list[int]:
    return [token for token in getattr(batch, name)[row].tolist() if token != NO_TOKEN]


# Properties that all tasks share


@pytest.mark.parametrize("name", [*SENTENCES, *INDUCTION, "addition"])
def test_every_task_on_a_real_tokenizer(name, smol):
    task = load_task(name, smol, count=24, seed=3)
    assert name in task_names()
    for part in (task.train, task.validation, task.test):
        assert sum(map(len, part)) == 24
        assert [batch.length for batch in part] == sorted({batch.length for batch in part})
    for batch in all_batches(task):
        assert batch.clean.shape == batch.corrupted.shape == (len(batch), batch.length)
        assert batch.clean.dtype == batch.answers.dtype == batch.template.dtype == torch.int64
        assert (batch.clean != batch.corrupted).any(1).all()
        assert batch.metric == task.metric
        assert batch.template.max() < len(task.templates)
        assert batch.roles["END"].tolist() == [[batch.length - 1, batch.length]] * len(batch)
    for batch, row in rows(all_batches(task)):
        answers, wrong = tokens_of(batch, "answers", row), tokens_of(batch, "wrong", row)
        assert answers
        assert wrong
        assert not set(answers) & set(wrong)
        if name not in INDUCTION:  # random tokens need not be what their text is tokenized to
            clean, corrupted = batch.texts[row]
            assert smol(clean)["input_ids"] == batch.clean[row].tolist()
            assert smol(corrupted)["input_ids"] == batch.corrupted[row].tolist()
        for spans in batch.roles.values():
            first, end = spans[row].tolist()
            assert 0 <= first <= end <= batch.length


@pytest.mark.parametrize("name", SENTENCES)
def test_only_the_corrupted_roles_differ(name, smol, pairs):
    changed = {
        "ioi": {"S2"}, "ioi:s2-flip": {"S2"}, "ioi:abc": {"IO", "S1", "S2"}, "greater-than": {"year"},
        "sva": {"subject"}, "pronoun": {"name"}, "docstring": {"A", "B", "C", "A doc", "B doc"},
    }[name]  # fmt: skip
    for tokenizer in (smol, pairs):
        for batch, row in rows(all_batches(load_task(name, tokenizer, count=16))):
            inside = torch.zeros(batch.length, dtype=torch.bool)
            for role in changed:
                first, end = batch.roles[role][row].tolist()
                assert end > first
                assert (batch.clean[row, first:end] != batch.corrupted[row, first:end]).all()
                inside[first:end] = True
            assert torch.equal(batch.clean[row] != batch.corrupted[row], inside)


@pytest.mark.parametrize("name", ["ioi", "sva", "pronoun", "docstring"])
def test_answers_are_words_with_a_leading_space(name, smol):
    for batch, row in rows(load_task(name, smol, count=16).train):
        clean = batch.texts[row][0]
        for token in tokens_of(batch, "answers", row) + tokens_of(batch, "wrong", row):
            word = smol.decode([token])
            assert word.startswith(" ")
            assert smol(clean + word)["input_ids"] == [*batch.clean[row].tolist(), token]


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("ioi", ["IO", "S1", "object", "place"]),
        ("greater-than", ["event"]),
        ("sva", ["subject", "attractor", "clause subject"]),
        ("pronoun", ["name"]),
        ("docstring", ["A", "B", "C", "method", "noun 1", "noun 2", "noun 3"]),
    ],
)
def test_splits_have_no_word_in_common(name, roles, smol):
    task = load_task(name, smol, count=48)
    singular = {plural: one for one, plural in words.THINGS + words.PEOPLE}
    used = []
    for part in (task.train, task.validation, task.test):
        found = {
            said(smol, *at[:1], role, at[1], ids).strip()
            for at in rows(part)
            for role in roles
            for ids in ("clean", "corrupted")
        }
        used.append({singular.get(word, word) for word in found} - {""})
    assert all(len(found) >= 6 for found in used)
    assert not used[0] & used[1]
    assert not used[0] & used[2]
    assert not used[1] & used[2]


def test_templates_are_used_equally_often(smol):
    task = load_task("ioi", smol, count=32)
    counts = torch.cat([batch.template for batch in task.train]).bincount()
    assert counts.tolist() == [2] * len(task.templates)


@pytest.mark.parametrize("name", [*SENTENCES, *INDUCTION])
def test_a_seed_gives_the_same_prompts_and_another_seed_others(name, smol):
    task = load_task(name, smol, count=6, seed=1)
    again = load_task(name, smol, count=6, seed=1)
    assert task.fingerprint == again.fingerprint
    assert [batch.texts for batch in all_batches(task)] == [batch.texts for batch in all_batches(again)]
    assert load_task(name, smol, count=6, seed=2).fingerprint != task.fingerprint


@pytest.mark.parametrize(("name", "more", "least"), [("ioi", 48, 48), ("addition", 48, 48), ("sva", 3000, 500)])
def test_more_train_prompts_hold_those_of_the_train_split(name, more, least, smol, demo):
    tokenizer = demo if name == "addition" else smol
    plain = load_task(name, tokenizer, count=8)
    task = load_task(name, tokenizer, count=8, more=more)
    assert not plain.more
    assert least <= sum(map(len, task.more)) <= max(48, more - 1000)  # as many as there are
    for part in ("train", "validation", "test"):
        assert [b.texts for b in getattr(task, part)] == [b.texts for b in getattr(plain, part)]
    texts = {
        part: {t for b in getattr(task, part) for t in b.texts} for part in ("train", "validation", "test", "more")
    }
    assert texts["train"] < texts["more"]
    assert not texts["more"] & (texts["validation"] | texts["test"])
    assert task.fingerprint != plain.fingerprint


def test_prompts_do_not_depend_on_the_global_random_state(smol):
    random.seed(1)
    fingerprint = load_task("ioi", smol, count=8).fingerprint
    random.seed(2)
    assert load_task("ioi", smol, count=8).fingerprint == fingerprint


def test_the_bundled_tasks_data_never_changes(demo):
    """A published fingerprint stays reproducible: words, templates or drawing cannot change unnoticed."""
    assert load_task("addition", demo, count=8).fingerprint == ADDITION_FINGERPRINT
    for name, fingerprint in INDUCTION_FINGERPRINTS.items():
        assert load_task(name, byte_tokenizer(), count=8).fingerprint == fingerprint
    assert load_task("ioi", word_tokenizer(), count=8).fingerprint == IOI_FINGERPRINT


def test_the_fingerprint_sees_every_tensor(smol):
    task = load_task("ioi", smol, count=4)
    first, *rest = task.train
    changed = [
        replace(first, **{name: getattr(first, name) + 1}) for name in ("clean", "corrupted", "answers", "wrong")
    ]
    changed.append(replace(first, template=first.template.roll(1) + 1))
    changed.append(replace(first, roles=first.roles | {"IO": first.roles["IO"] + 1}))
    others = [replace(task, train=(batch, *rest)) for batch in changed]
    others.append(replace(task, train=task.test, test=task.train))
    assert len({other.fingerprint for other in [task, *others]}) == 8


def test_more_prompts_begin_with_those_of_fewer(smol):
    few, many = (load_task("ioi", smol, count=count).train for count in (5, 20))
    assert few[0].texts == many[0].texts[:5]


def test_the_three_corruptions_share_their_clean_prompts(smol):
    tasks = [load_task(name, smol, count=12) for name in ("ioi", "ioi:s2-flip", "ioi:abc")]
    assert len({tuple(clean for batch in task.test for clean, _ in batch.texts) for task in tasks}) == 1
    assert len({task.fingerprint for task in tasks}) == 3


# The single tasks


def test_ioi_names(smol):
    for corruption in ("", ":s2-flip", ":abc"):
        orders = set()
        for batch, row in rows(load_task(f"ioi{corruption}", smol, count=32).train):
            io, s1, s2 = (said(smol, batch, role, row) for role in ("IO", "S1", "S2"))
            assert s1 == s2 != io
            assert smol.decode(tokens_of(batch, "answers", row)) == io
            assert smol.decode(tokens_of(batch, "wrong", row)) == s1
            assert batch.roles["S1+1"][row].tolist() == [batch.roles["S1"][row, 1], batch.roles["S1"][row, 1] + 1]
            orders.add(bool(batch.roles["IO"][row, 0] < batch.roles["S1"][row, 0]))
            other_io, other_s1, other_s2 = (said(smol, batch, role, row, "corrupted") for role in ("IO", "S1", "S2"))
            if corruption == ":s2-flip":
                assert other_s2 == io
            else:
                assert other_s2 not in (io, s1)
            if corruption == ":abc":
                assert len({io, s1, other_io, other_s1, other_s2}) == 5
        assert orders == {True, False}


def test_greater_than_with_one_token_per_digit(smol):
    task = load_task("greater-than", smol, count=40)
    for batch, row in rows(task.train):
        year, century = said(smol, batch, "year", row), said(smol, batch, "century", row)
        assert batch.texts[row][0].endswith(f" {century}")
        assert said(smol, batch, "last century", row) == century
        assert said(smol, batch, "year", row, "corrupted") == "01"
        answers, wrong = (smol.decode(tokens_of(batch, name, row)) for name in ("answers", "wrong"))
        assert answers == "".join(str(digit) for digit in range(int(year[0]) + 1, 10))
        assert wrong == "".join(str(digit) for digit in range(int(year[0])))
        assert min(len(answers), len(wrong)) >= 2


def test_greater_than_with_two_digits_in_a_token(pairs):
    task = load_task("greater-than", pairs, count=40)
    for batch, row in rows(task.train):
        first, end = batch.roles["year"][row].tolist()
        assert end == first + 1
        year = int(said(pairs, batch, "year", row))
        answers, wrong = (
            [int(pairs.decode([t])) for t in tokens_of(batch, name, row)] for name in ("answers", "wrong")
        )
        assert answers == list(range(year + 1, 100))
        assert wrong == list(range(year + 1))


def test_greater_than_needs_years_that_split():
    for missing in (("01",), tuple(f"{year:02d}" for year in range(20, 90))):
        refused(
            lambda missing=missing: load_task("greater-than", word_tokenizer(leave_out=missing)),
            "greater-than",
            "years",
        )


def test_agreement(smol):
    task = load_task("sva", smol, count=60)
    numbers = {noun: number for forms in words.THINGS + words.PEOPLE for number, noun in enumerate(forms)}
    kinds = set()
    for batch, row in rows(task.train):
        number = numbers[said(smol, batch, "subject", row).strip()]
        assert numbers[said(smol, batch, "subject", row, "corrupted").strip()] == 1 - number
        verbs = [smol.decode([token]).strip() for token in tokens_of(batch, "answers", row)]
        assert verbs == [forms[number] for forms in words.VERBS]
        others = [said(smol, batch, role, row).strip() for role in ("attractor", "clause subject")]
        assert [numbers[noun] for noun in others if noun] == [1 - number] * sum(map(bool, others))
        kinds.add(tuple(map(bool, others)))
    assert kinds == {(False, False), (True, False), (False, True)}


def test_pronouns(smol):
    for batch, row in rows(load_task("pronoun", smol, count=40).train):
        name, other = (said(smol, batch, "name", row, ids).strip() for ids in ("clean", "corrupted"))
        answer, wrong = (smol.decode(tokens_of(batch, tokens, row)) for tokens in ("answers", "wrong"))
        assert (answer, wrong) == ((" she", " he") if name in words.FEMALE else (" he", " she"))
        assert (name in words.FEMALE) != (other in words.FEMALE)


def test_docstrings(smol):
    for batch, row in rows(load_task("docstring", smol, count=20).train):
        a, b, c, a_again, b_again = (said(smol, batch, role, row) for role in ("A", "B", "C", "A doc", "B doc"))
        assert (a, b) == (a_again, b_again)
        assert len({a, b, c}) == 3
        assert smol.decode(tokens_of(batch, "answers", row)) == c
        assert smol.decode(tokens_of(batch, "wrong", row)) == a + b
        others = {said(smol, batch, role, row, "corrupted") for role in ("A", "B", "C")}
        assert not others & {a, b, c}


@pytest.mark.parametrize("which", ["smol", "bytes", "small LM", "bos"])
def test_induction_works_with_any_tokenizer(which, smol, pairs):
    tokenizer = {
        "smol": lambda: smol, "bytes": byte_tokenizer, "bos": lambda: pairs,
        "small LM": lambda: AutoTokenizer.from_pretrained(SMALL_LM),
    }[which]()  # fmt: skip
    task = load_task("induction", tokenizer, count=20)
    start = 1 if which == "bos" else 0
    pools = [
        {t for batch in part for t in batch.clean[:, start:].flatten().tolist()}
        for part in (task.train, task.validation, task.test)
    ]
    assert not pools[0] & pools[1]
    assert not (pools[0] | pools[1]) & pools[2]
    assert all(tokenizer.decode([token]).strip() for token in set.union(*pools))
    assert not set.union(*pools) & set(tokenizer.all_special_ids)
    for batch, row in rows(all_batches(task)):
        ids, other = batch.clean[row].tolist(), batch.corrupted[row].tolist()
        a, b = (batch.roles[role][row, 0] for role in ("A1", "B1"))
        listed = batch.length - (a + 1 - start)  # where the second copy begins
        assert ids[start : a + 1] == ids[listed:]
        assert b == a + 1
        other_a, other_b = (batch.roles[role][row, 0] for role in ("A2", "B2"))
        assert b < other_a == other_b - 1 < listed - 1
        assert ids[b] == batch.answers[row, 0]
        assert ids[other_b] == batch.wrong[row, 0]
        changed = [(i, two) for i, (one, two) in enumerate(zip(ids, other, strict=True)) if one != two]
        assert changed == [(batch.length - 1, ids[other_a])]
        assert len(set(ids[start:listed])) == listed - start
        if start:
            assert ids[0] == other[0] == tokenizer.bos_token_id


def test_the_corruptions_of_induction_change_what_heads_look_for_are_found_by_or_copy(smol):
    tasks = [load_task(name, smol, count=12) for name in INDUCTION]
    for query, keys, values in zip(*(list(all_batches(task)) for task in tasks), strict=True):
        assert torch.equal(query.clean, keys.clean)
        assert torch.equal(query.clean, values.clean)
        assert torch.equal(query.answers, keys.answers)
        assert torch.equal(query.wrong, values.wrong)
        for row, clean in enumerate(query.clean.tolist()):
            a, b, other_a, other_b, end = (query.roles[r][row, 0].item() for r in ("A1", "B1", "A2", "B2", "END"))
            for changed, moved in (
                (query, {end: other_a}),
                (keys, {a: other_a, other_a: a}),
                (values, {b: other_b, other_b: b}),
            ):
                expected = [clean[moved.get(place, place)] for place in range(len(clean))]
                assert changed.corrupted[row].tolist() == expected


def test_addition_asks_for_each_digit_of_sums_that_were_held_out(demo):
    task = load_task("addition", demo, count=60)
    held_out = {tuple(row) for row in addition_task(demo)[1].input_ids.tolist()}
    pools = []
    for part in (task.train, task.validation, task.test):
        assert [len(batch) for batch in part] == [20, 20, 20]
        pools.append({sums[:6] for batch in part for pair in batch.texts for sums in pair})
        for batch, row in rows(part):
            cut = 7 + int(batch.template[row])
            digits = []
            for ids, prompt, asked in (
                (batch.clean, batch.texts[row][0], batch.answers),
                (batch.corrupted, batch.texts[row][1], batch.wrong),
            ):
                a, b = int(prompt[1:3]), int(prompt[4:6])
                whole = f"#{a:02d}+{b:02d}={a + b:03d}"
                assert prompt == whole[:cut]
                assert demo(prompt)["input_ids"] == ids[row].tolist()
                assert tuple(demo(whole)["input_ids"]) in held_out
                assert demo(whole)["input_ids"][cut] == asked[row]
                digits.append(int(asked[row]))
            assert digits[0] != digits[1]
            assert said(demo, batch, "tens of a", row) + said(demo, batch, "units of b", row) == prompt_digits(
                batch, row
            )
    assert not pools[0] & pools[1]
    assert not (pools[0] | pools[1]) & pools[2]


def prompt_digits(batch, row):
    return batch.texts[row][0][1] + batch.texts[row][0][5]


def test_the_bundled_model_can_add():
    base = bases.load_base("demo")
    task = load_task("addition", base.tokenizer, count=30)
    with torch.no_grad():
        scores = [
            torch.cat([batch.score(base.model(input_ids=getattr(batch, ids)).logits) for batch in task.test])
            for ids in ("clean", "corrupted")
        ]
    ability = check_ability("addition", task.metric, *scores)
    assert ability.accuracy > 0.95
    assert ability.gap > 10
    with pytest.raises(AttnPruneError):
        check_ability("addition", task.metric, *reversed(scores))
