"""Learning on a made-up effect of messages: what it must find whatever a model does."""

import torch

from attnprune.tracing.learning import learn


class Cancelling:
    """Messages that pull by 1 in either direction, one that pulls by 3, and some that do nothing; KL: pull squared."""

    def __init__(self, each=40, idle=400):
        self.pull = torch.cat([torch.ones(each), -torch.ones(each), torch.tensor([3.0]), torch.zeros(idle)]).double()
        self.device = self.pull.device

    def __len__(self):
        return len(self.pull)

    def missing(self, kept):
        opened = torch.zeros(len(self))
        opened[kept] = 1
        return self.pull @ (1 - opened).double()

    def kl(self, sets):
        return torch.stack([self.missing(kept) ** 2 for kept in sets])

    def derivatives(self, kept):
        missing = self.missing(kept)
        return missing.item() ** 2, -2 * missing * self.pull

    def slopes(self, kept, points):
        return self.pull.sum() * self.pull[kept]


def test_messages_that_cancel_are_not_closed_on_one_side_alone():
    """By sign those that pull the other way are the least useful of all; without all of them nothing is left."""
    messages = Cancelling()
    steps = []
    kept = learn(messages, 0.5, (0.5,), steps.append)
    assert messages.kl([kept]) <= 0.5
    assert len(kept) <= 81
    assert len(steps) == 60
