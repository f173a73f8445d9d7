"""The stored probe: a short text whose loss and open-edge count every reader must reproduce."""

from __future__ import annotations

import math
from typing import Any

import torch

from attnprune.data.blocks import Blocks
from attnprune.errors import VerificationError
from attnprune.measure import measure
from attnprune.sidecar import format

# (nats, share of the open edges) by which the stored probe may differ elsewhere: other kernels round differently, and
# in 16 bits that moves scores across their gates.
TOLERANCE = {torch.float32: (1e-3, 1e-3)}
HALF_TOLERANCE = (2e-2, 2e-2)


def probe_blocks(input_ids: list[int]) -> Blocks:
    """The stored probe as one block."""
    ids = torch.tensor([input_ids])
    return Blocks(ids, ids.clone(), "probe")


def measure_probe(model: Any, input_ids: list[int]) -> format.ProbeEntry:
    """Run the probe through a model with gates; the tolerances follow its dtype."""
    report = measure(model, probe_blocks(input_ids))
    loss_tolerance, edge_share = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    return format.ProbeEntry(
        input_ids=input_ids,
        loss=report.loss,
        open_edges=report.open_edges,
        tolerance=loss_tolerance,
        edge_tolerance=math.ceil(edge_share * report.open_edges),
    )


def check_probe(found: format.ProbeEntry, stored: format.ProbeEntry) -> None:
    """Compare a measured probe with the stored one; catches a wrong kernel, another dtype, silently dense attention.

    Raises:
        VerificationError: loss or open-edge count differ by more than the stored tolerances.
    """
    edges_off = abs(found.open_edges - stored.open_edges)
    if edges_off > stored.edge_tolerance or not abs(found.loss - stored.loss) <= stored.tolerance:
        raise VerificationError(
            f"probe: loss {found.loss:.6f} with {found.open_edges} open edges, "
            f"the sidecar says {stored.loss:.6f} with {stored.open_edges}"
        )
