"""Tasks made of sentences with slots: indirect objects, greater-than, agreement, pronouns, docstrings.

What is corrupted and measured follows Wang et al. 2022 (IOI), Hanna et al. 2023 (greater-than), Linzen et al. 2016
(agreement with attractors), Mathwin et al. 2023 (gendered pronouns) and Heimersheim and Janiak 2023 (docstring); the
sentences are our own. Every slot follows a space, so its words are tokens with a leading space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal

from attnprune.circuit.tasks import words
from attnprune.circuit.tasks.encoding import Encoder, Lexicon, example, in_turn
from attnprune.circuit.tasks.prompts import Example
from attnprune.errors import InputError

# The sentences of a task have equally many words where possible, so that most prompts share one batch.
# Each in the two orders of the names; {IO} stands first in the even ones.
IOI = tuple(
    text.replace("{A} and {B}", names)
    for text in (
        "After {A} and {B} closed the {place} for the night, {S2} handed the {object} to",
        "While {A} and {B} were busy cleaning the {place} together, {S2} passed the {object} to",
        "Later {A} and {B} met near the old {place}, and {S2} gave the {object} to",
        "Because {A} and {B} came home from the {place} early, {S2} showed the {object} to",
        "Once {A} and {B} found a seat at the {place}, {S2} offered the {object} to",
        "On Sunday {A} and {B} walked around the {place}, and {S2} sold the {object} to",
        "Just before {A} and {B} both left the old {place}, {S2} returned the {object} to",
        "Long ago {A} and {B} both worked at the {place}; {S2} lent the {object} to",
    )
    for names in ("{IO} and {S1}", "{S1} and {IO}")
)

GREATER_THAN = (
    "The {event} began in the year {century}{year} and ended in the year {last century}",
    "They say that the {event} went on from {century}{year} until the year {last century}",
    "The long {event} had started in {century}{year} and was only over in {last century}",
    "In that old town the {event} went on from {century}{year} up to {last century}",
)

# Two plain ones, two with a prepositional phrase and two with a relative clause before the verb.
AGREEMENT = (
    "As far as we know, the {subject}",
    "In the end I saw that the {subject}",
    "We know that the {subject} near the {attractor}",
    "And then the old {subject} behind the {attractor}",
    "Perhaps the {subject} that the {clause subject} really liked",
    "I think the {subject} which the {clause subject} found",
)

PRONOUN = (
    "My friend {name} sings very well, doesn't",
    "The cook {name} is very good, isn't",
    "The whole team now trusts {name} a lot because",
    "Nobody at school saw {name} all last week because",
    "We waited a whole hour for {name}, but",
    "Today I asked {name} to help us, but",
    "The letter says that {name} is home, and",
    "When {name} came home very late last night,",
)

DOCSTRING = (
    "def {method}(self, {A}, {B}, {C}):\n"
    '    """Work with the {noun 1}.\n\n'
    "    :param {A doc}: the {noun 2} to use\n"
    "    :param {B doc}: about the {noun 3}\n"
    "    :param",
    "def {method}(self, {A}, {B}, {C}):\n"
    '    """Change the {noun 1} here.\n\n'
    "    @param {A doc}: of the {noun 2}\n"
    "    @param {B doc}: a {noun 3} or none\n"
    "    @param",
)


def ioi(lexicon: Lexicon, draw: Random, corruption: Literal["s2-rand", "s2-flip", "abc"]) -> Iterator[Example]:
    """Two people, one of them acts: the other one (IO) is the receiver, not the subject S.

    Corrupted: `s2-rand` a third name acts; `s2-flip` IO acts, so that S is right; `abc` three other names.
    """
    names = lexicon.words("names", words.FEMALE + words.MALE, 6)
    places = lexicon.words("places", words.PLACES, 2)
    objects = lexicon.words("objects", words.OBJECTS, 4)
    for template in in_turn(IOI, draw):
        io, subject, a, b, c = draw.sample(names, 5)
        slots = {"IO": io, "S1": subject, "S2": subject, "place": draw.choice(places), "object": draw.choice(objects)}
        changes = {"s2-rand": {"S2": c}, "s2-flip": {"S2": io}, "abc": {"IO": a, "S1": b, "S2": c}}[corruption]
        encode = lexicon.encoder.words
        made = example(lexicon, template, slots, changes, encode([io]), encode([subject]))
        after = made.roles["S1"][1]
        yield made._replace(roles={**made.roles, "S1+1": (after, after + 1)})


def greater_than(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """An event ends after it began: the end's next token is a later year than the beginning's YY; corrupted: YY = 01.

    Where years are two tokens of two digits, answers are all later years of the century, wrong ones the others. Where
    every digit is a token, the next token is the tens digit: answers are higher digits than the beginning's, wrong ones
    lower digits, and an equal digit, which decides nothing yet, counts for neither.
    """
    encoder = lexicon.encoder
    tokens = _number_tokens(encoder)
    in_pairs = len(tokens) > 10
    candidates = range(2, 99) if in_pairs else [year for year in range(20, 80) if year % 10 > 1]
    years = [
        (str(century), year)
        for century in range(11, 18)
        for year in candidates
        if all(_is_split(encoder, str(century), f"{last:02d}", in_pairs) for last in (year, 1))
    ]
    if not tokens or len(years) < 60:
        raise InputError(
            f"{lexicon.task}: this tokenizer writes years neither as two pairs of digits nor digit by digit",
            hint="the task induction works with any tokenizer",
        )
    events = lexicon.words("events", words.EVENTS, 3)
    for template in in_turn(GREATER_THAN, draw):
        century, year = draw.choice(years)
        slots = {"event": draw.choice(events), "century": century, "year": f"{year:02d}", "last century": century}
        first = year if in_pairs else year // 10
        later = [token for number, token in tokens.items() if number > first]
        others = [token for number, token in tokens.items() if number < first or (in_pairs and number == first)]
        yield example(lexicon, template, slots, {"year": "01"}, later, others)


def _number_tokens(encoder: Encoder) -> dict[int, int]:
    """number -> token for what may follow "17": two-digit numbers, or digits where a digit is a token, or nothing."""
    for width, needed in ((2, 90), (1, 10)):
        found = {number: encoder.continuation("the year 17", f"{number:0{width}d}") for number in range(10**width)}
        tokens = {number: token for number, token in found.items() if token is not None}
        if len(tokens) >= needed:
            return tokens
    return {}


def _is_split(encoder: Encoder, century: str, year: str, in_pairs: bool) -> bool:
    """Whether the year's last two digits are one token of their own, or one token each."""
    text = f"the year {century}"
    for digits in [year] if in_pairs else year:
        if encoder.continuation(text, digits) is None:
            return False
        text += digits
    return True


def agreement(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """The verb has the number of its subject, not of a closer noun, which always has the other number.

    Corrupted: the subject in its other number. Answers: all verbs of the right number in a closed list.
    """
    things = lexicon.words("nouns with a plural", words.THINGS, 4)
    people = lexicon.words("nouns for people with a plural", words.PEOPLE, 3)
    verbs = [verb for verb in words.VERBS if all(lexicon.encoder.word(form) is not None for form in verb)]
    if len(verbs) < 4:
        raise InputError(f"{lexicon.task}: this tokenizer has {len(verbs)} verbs that are one token each, 4 are needed")
    forms = [lexicon.encoder.words([verb[number] for verb in verbs]) for number in range(2)]
    for template in in_turn(AGREEMENT, draw):
        number = draw.randrange(2)
        other = 1 - number
        subject, attractor = draw.sample(things, 2)
        person = draw.choice(people)
        slots = {"subject": subject[number], "attractor": attractor[other], "clause subject": person[other]}
        yield example(lexicon, template, slots, {"subject": subject[other]}, forms[number], forms[other])


def pronoun(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """A name, then "she" or "he"; corrupted: a name of the other gender."""
    names = [lexicon.words("female names", words.FEMALE, 4), lexicon.words("male names", words.MALE, 4)]
    pronouns = [lexicon.encoder.words([word]) for word in ("she", "he")]
    if not all(pronouns):
        raise InputError(f"{lexicon.task}: 'she' and 'he' are not one token each in this tokenizer")
    for template in in_turn(PRONOUN, draw):
        gender = draw.randrange(2)
        name, other = draw.choice(names[gender]), draw.choice(names[1 - gender])
        yield example(lexicon, template, {"name": name}, {"name": other}, pronouns[gender], pronouns[1 - gender])


def docstring(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """The third argument of a function is documented third; wrong are the first two. Corrupted: other arguments."""
    arguments = lexicon.words("argument names", words.ARGUMENTS, 6)
    methods = lexicon.words("method names", words.METHODS, 2)
    nouns = lexicon.words("nouns", [singular for singular, _ in words.THINGS], 4)
    for template in in_turn(DOCSTRING, draw):
        chosen = draw.sample(arguments, 6)
        slots = {"method": draw.choice(methods)} | {
            f"noun {i + 1}": noun for i, noun in enumerate(draw.sample(nouns, 3))
        }
        a, b, c = lexicon.encoder.words(chosen[:3])
        yield example(lexicon, template, slots | _arguments(chosen[:3]), _arguments(chosen[3:]), [c], [a, b])


def _arguments(names: Sequence[str]) -> dict[str, str]:
    return {"A": names[0], "B": names[1], "C": names[2], "A doc": names[0], "B doc": names[1]}
