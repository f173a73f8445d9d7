"""The stored probe: a short text, and a longer one where there is room, whose loss and open-edge count every reader
must reproduce.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnprune.data.blocks import Blocks
from attnprune.errors import InputError, VerificationError
from attnprune.measure import measure
from attnprune.sidecar import format
from attnprune.sidecar.quantised import is_quantised

# (nats, share of the open edges) by which the stored probe may differ elsewhere: other kernels round differently, and
# in 16 bits that moves scores across their gates.
TOLERANCE = {torch.float32: (1e-3, 1e-3)}
HALF_TOLERANCE = (2e-2, 2e-2)


SHORT, LONG = 64, 256  # tokens: every load pays for them


def probe_rows(input_ids: Tensor, context: int | None) -> tuple[list[int], list[int] | None]:
    """The short and the longer row of a probe from the first blocks of a text, [N, T] token ids.

    The longer one is None where the text or the context (None: unlimited) has no more than the short one holds.
    """
    ids = input_ids.flatten()[: min(LONG, context or LONG)].tolist()
    return input_ids[0, :SHORT].tolist(), ids if len(ids) > SHORT else None


def measure_probe(model: Any, input_ids: list[int], long: list[int] | None = None) -> format.ProbeEntry:
    """Run the probe's rows through a model with gates; the tolerances follow its dtype.

    Raises:
        InputError: a token that the model does not have.
    """
    row = None if long is None else format.ProbeRow(**_measure_row(model, long))
    return format.ProbeEntry(**_measure_row(model, input_ids), long=row)


def measure_again(model: Any, probe: format.ProbeEntry) -> format.ProbeEntry:
    """Run the rows of a stored probe."""
    return measure_probe(model, probe.input_ids, None if probe.long is None else probe.long.input_ids)


def _measure_row(model: Any, input_ids: list[int]) -> dict[str, Any]:
    ids = torch.tensor([input_ids])
    if max(input_ids) >= model.config.vocab_size:
        raise InputError(
            f"probe: token id {max(input_ids)} is beyond the model's vocabulary of {model.config.vocab_size}"
        )
    report = measure(model, Blocks(ids, ids.clone(), "probe"))
    # The layers of a quantised base round on each device in their own way.
    known = HALF_TOLERANCE if is_quantised(model) else TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    loss_tolerance, edge_share = known
    return {
        "input_ids": input_ids,
        "loss": report.loss,
        "open_edges": report.open_edges,
        "tolerance": loss_tolerance,
        "edge_tolerance": math.ceil(edge_share * report.open_edges),
    }


def check_probe(found: format.ProbeEntry, stored: format.ProbeEntry) -> None:
    """Compare a measured probe with the stored one; catches a wrong kernel, another dtype, silently dense attention.

    Raises:
        VerificationError: loss or open-edge count differ by more than the stored tolerances.
    """
    _check_row(found, stored)
    if found.long is not None and stored.long is not None:
        _check_row(found.long, stored.long)


def _check_row(found: format.ProbeRow, stored: format.ProbeRow) -> None:
    edges_off = abs(found.open_edges - stored.open_edges)
    if edges_off > stored.edge_tolerance or not abs(found.loss - stored.loss) <= stored.tolerance:
        raise VerificationError(
            f"probe of {len(stored.input_ids)} tokens: loss {found.loss:.6f} with {found.open_edges} open edges, "
            f"the sidecar says {stored.loss:.6f} with {stored.open_edges}"
        )
