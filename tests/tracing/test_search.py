"""Deletion on a made-up effect of messages: what it must find whatever a model does."""

import torch

from attnprune.tracing import search


class Substitutes:
    """Messages of which each harms by one nat, if it and its substitute are both closed; no other is needed."""

    ids = torch.zeros(1, 8, dtype=torch.int64)
    device = torch.device("cpu")

    def __init__(self, pairs):
        self.pairs, self.runs = pairs, 0

    def kl(self, sets):
        self.runs += len(sets)
        opened = [set(kept.tolist()) for kept in sets]
        return torch.tensor([float(sum(not {a, b} & kept for a, b in self.pairs)) for kept in opened])

    def slopes(self, kept, points):
        return torch.zeros(len(kept))


def left(pairs, size):
    messages, kept = Substitutes(pairs), torch.arange(size)
    kept = search._deleted(messages, kept, 0.5, lambda *told: None)
    return messages, kept.tolist()


def test_what_cannot_go_with_others_does_not_keep_the_rest():
    """One of each pair stays: a pair in front must not end the round for those behind it."""
    pairs = [(2 * i, 2 * i + 1) for i in range(12)]
    messages, kept = left(pairs, 60)
    assert len(kept) == len(pairs)
    assert messages.kl([torch.tensor(kept)]) == 0
    assert messages.runs < 400


def test_a_set_that_could_lose_a_message_is_not_an_answer(monkeypatch):
    """Where the runs that delete are used up, the exact effects still say what can go."""
    monkeypatch.setattr(search, "learn", lambda messages, *rest: torch.arange(60))
    monkeypatch.setattr(search, "FEWEST", 0)
    monkeypatch.setattr(search, "DELETION_TOKENS", 0)
    found = search.smallest(Substitutes([(2 * i, 2 * i + 1) for i in range(20)]), 0.5, lambda *told: None)
    assert (len(found.kept), found.can_go) == (20, 0)
