"""Prompt pairs for circuits, on real tokenizers: what differs, what is asked, where the roles are, what is refused."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attnprune.circuit.tasks import Ability, accuracy, check_ability, load_task, task_names, text, words
from attnprune.circuit.tasks.encoding import Encoder, Lexicon, example
from attnprune.circuit.tasks.prompts import (
    NO_TOKEN,
    Example,
    Metric,
    Prompts,
    batched,
    logit_difference,
    probability_difference,
)
from attnprune.data.texts import addition_task
from attnprune.errors import AttnPruneError
from attnprune.sidecar import bases
from tests.factory import byte_tokenizer, refused
from tests.test_real_model import gguf_file

SMALL_LM = Path(__file__).parent.parent / "examples" / "small-lm"
ADDITION_FINGERPRINT = "3705b7e4d31b29bd5305fa3e4f46221bbadc25c94838c1e8579506a65d7e3dfd"
INDUCTION_FINGERPRINTS = {
    "induction": "864781f6c22f09b255f9d9c5fd4a6df18005ff5b03da8c8aa1bf0c03d27f85aa",
    "induction:keys": "7581b93340cb8a0a530a2cfe84d1feed6124562ce033629b2fb994a541688237",
    "induction:values": "6d9266b7965801a8241eed311e28f9cd3a824dbf5b593aa05538ed6b6a6d01b3",
}
IOI_FINGERPRINT = "f5247ca9c3b6866dcbd859e9997e42c80c19162073e9f3af597ae8a6ade4d04e"
INDUCTION = ["induction", "induction:keys", "induction:values"]
SENTENCES = ["ioi", "ioi:s2-flip", "ioi:abc", "greater-than", "sva", "pronoun", "docstring"]


@pytest.fixture(scope="module")
def smol():
    """SmolLM2's tokenizer: one token per digit, no BOS."""
    file = gguf_file()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="module")
def demo():
    return AutoTokenizer.from_pretrained(bases.demo_folder())


def word_tokenizer(bos: bool = True, leave_out: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """GPT-2's way of writing years (two tokens of two digits) and Llama's BOS, with every word of the tasks a token."""
    lists = [words.FEMALE, words.MALE, words.PLACES, words.OBJECTS, words.EVENTS, words.ARGUMENTS, words.METHODS]
    forms = [*chain(*lists), *chain(*words.THINGS), *chain(*words.PEOPLE), *chain(*words.VERBS), "she", "he", "the"]
    forms += [f"{number:02d}" for number in range(100)]
    forms += chain(*(re.findall(r"\w+", template) for template in text.IOI + text.PRONOUN + text.GREATER_THAN))
    vocabulary = {"<s>": 0, "<unk>": 1, " ": 2} | {symbol: 3 + i for i, symbol in enumerate(".,;:'()@\"\n")}
    for form in forms:
        for piece in (form, f" {form}"):
            if form not in leave_out:
                vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d\d| ?[A-Za-z]+|[^\w]"), "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def pairs():
    return word_tokenizer()


def all_batches(task) -> list[Prompts]:
    return [*task.train, *task.validation, *task.test]


def rows(batches):
    """(batch, row) of all prompts."""
    return [(batch, row) for batch in batches for row in range(len(batch))]


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


# BOS and tokenizers that cannot


def test_bos_comes_first_and_roles_move_with_it(pairs):
    without = word_tokenizer(bos=False)
    for name in ("ioi", "greater-than", "pronoun"):
        with_bos, plain = load_task(name, pairs, count=12), load_task(name, without, count=12)
        for batch, other in zip(all_batches(with_bos), all_batches(plain), strict=True):
            assert batch.texts == other.texts
            assert (batch.clean[:, 0] == pairs.bos_token_id).all()
            assert torch.equal(batch.clean[:, 1:], other.clean)
            assert torch.equal(batch.corrupted[:, 1:], other.corrupted)
            assert torch.equal(batch.answers, other.answers)
            assert all(torch.equal(batch.roles[role], other.roles[role] + 1) for role in batch.roles)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_tokenizer_without_words_is_refused(name, demo):
    for tokenizer in (byte_tokenizer(), demo, AutoTokenizer.from_pretrained(SMALL_LM)):
        error = refused(lambda tokenizer=tokenizer: load_task(name, tokenizer), f"{name}: this tokenizer", "needed")
        assert "induction" in str(error.hint)


def test_words_that_become_the_unknown_token_are_no_words(pairs):
    refused(lambda: load_task("pronoun", word_tokenizer(leave_out=tuple(words.MALE))), "pronoun", "0 male names", "12")
    refused(lambda: load_task("pronoun", word_tokenizer(leave_out=("she",))), "pronoun", "she")
    refused(lambda: load_task("sva", word_tokenizer(leave_out=tuple(chain(*words.VERBS[3:])))), "sva", "3 verbs")


def test_prompts_that_are_not_aligned_token_by_token_are_refused(smol):
    lexicon = Lexicon("mine", Encoder(smol), "0", 0)
    template = (0, "We saw {first} and {second} again")
    slots = {"first": "Mary", "second": "antidisestablishment"}
    refused(lambda: example(lexicon, template, slots, {"second": "John"}, [1], [2]), "mine", "does not align")
    swapped = {"first": slots["second"], "second": slots["first"]}  # equally many tokens, but the roles have moved
    refused(lambda: example(lexicon, template, slots, swapped, [1], [2]), "mine", "does not align")
    assert example(lexicon, template, slots, {"first": "John"}, [1], [2]).roles["first"] == (2, 3)


def test_tokenizers_without_enough_tokens(demo):
    refused(lambda: load_task("induction", demo), "induction", "13 printable tokens, 39 are needed")
    refused(
        lambda: load_task("addition", AutoTokenizer.from_pretrained(SMALL_LM)), "addition", "one token per character"
    )


def test_bad_arguments(smol):
    assert "greater-than" in str(refused(lambda: load_task("ioii", smol), "ioii: no such task").hint)
    refused(lambda: load_task("ioi", smol, count=0), "0 prompts")
    refused(lambda: load_task("pronoun", smol, count=4000), "pronoun: 4000 prompts in each split are too many")
    assert load_task("pronoun", smol, count=300).train


# Metrics and ability


def test_metrics_by_hand():
    logits = torch.zeros(2, 3, 5)
    logits[:, -1] = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.0, -1.0, 2.0, 1.0]])
    logits[:, 0] = 99.0  # only the last position counts
    answers, wrong = torch.tensor([[4, 0], [3, NO_TOKEN]]), torch.tensor([[1], [0]])
    found = logit_difference(logits, answers, wrong)
    assert found.tolist() == pytest.approx([math.log(math.exp(5) + math.exp(1)) - 2.0, 1.5], abs=1e-5)
    p = logits[:, -1].softmax(-1)
    expected = [p[0, 4] + p[0, 0] - p[0, 1], p[1, 3] - p[1, 0]]
    assert probability_difference(logits, answers, wrong).tolist() == pytest.approx([float(e) for e in expected])


@pytest.mark.parametrize("metric", ["logit_difference", "probability_difference"])
def test_metrics_are_differentiable_and_fp32(metric):
    examples = [
        Example([1, 2], [1, 3], [0, 4], [1], {}, 0, ("", "")),
        Example([1, 2], [1, 3], [2], [1, 0], {}, 0, ("", "")),
    ]
    prompts = batched(examples, metric)[0]
    logits = torch.randn(2, 2, 6, dtype=torch.bfloat16, requires_grad=True)
    score = prompts.score(logits)
    assert score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, 0] == 0).all()
    assert (gradient[0, -1, [0, 4]] > 0).all()
    assert gradient[0, -1, 1] < 0


def test_take_and_to_keep_rows_together(smol):
    batch = load_task("sva", smol, count=12).train[0]
    part = batch.take(torch.tensor([7, 2])).to("cpu")
    assert part.texts == (batch.texts[7], batch.texts[2])
    for name in ("clean", "corrupted", "answers", "wrong", "template"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[7, 2]])
    assert all(torch.equal(part.roles[role], batch.roles[role][[7, 2]]) for role in batch.roles)
    logits = torch.randn(len(batch), 1, len(smol))
    assert torch.equal(batch.score(logits)[[7, 2]], part.score(logits[[7, 2]]))


def test_accuracy_is_the_share_above_zero():
    assert accuracy(torch.tensor([1.0, 0.0, -1.0, 0.1])) == 0.5
    assert accuracy(torch.tensor([math.nan, 1.0])) == 0.5


def test_ability_rule():
    good, bad = torch.tensor([2.0, 1.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    assert check_ability("ioi", "logit_difference", good, bad) == Ability(0.75, 0.75, 0.0)
    cases: list[tuple[torch.Tensor, torch.Tensor, Metric, str]] = [
        (torch.tensor([1.0, -1.0]), torch.tensor([-5.0, -5.0]), "logit_difference", "accuracy 0.50, 0.75 is needed"),
        (torch.tensor([1.0, 1.0]), torch.tensor([0.6, 0.6]), "logit_difference", "1.00 and 0.60"),
        (torch.tensor([0.1, 0.1]), torch.tensor([0.05, 0.05]), "probability_difference", "a gap of 0.1 is needed"),
        (torch.full((2,), math.nan), torch.zeros(2), "logit_difference", "accuracy 0.00"),
        (torch.ones(2), torch.full((2,), math.nan), "logit_difference", "nan"),
    ]
    for clean, corrupted, metric, part in cases:
        with pytest.raises(AttnPruneError) as caught:
            check_ability("ioi", metric, clean, corrupted)
        assert caught.value.exit_code == 1
        assert caught.value.message.startswith("ioi: ")
        assert part in caught.value.message
    ability = check_ability("sva", "probability_difference", torch.full((2,), 0.2), torch.zeros(2))
    assert ability.gap == pytest.approx(0.2)


# The user's own file

INDICES = "clean,corrupted,correct_idx,incorrect_idx\n"
HEADER = "clean,corrupted,answer,wrong\n"
ROW = '"The key near the doors","The keys near the doors"," is| was"," are| were"\n'


def pair(noun):
    return f'"The {noun} here","The {noun}s here"," is| was"," are| were"\n'


NOUNS = ["key", "door", "lamp", "book", "car", "tree", "hat", "map", "wall"]


def write(tmp_path, content, name="mine.csv"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


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
