"""A small gated Llama: what it computes and counts."""

from __future__ import annotations

import torch

BIAS = torch.linspace(-0.7, 0.9, 12).view(3, 4)


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **{"use_cache": False} | options).logits
