"""The validation ladder of `attnprune verify`: one function per level, one error each, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attnprune.errors import AttnPruneError
from attnprune.sidecar import format
from attnprune.sidecar.contents import check_files, check_weights
from attnprune.sidecar.folder import Sidecar, check_release_code, is_merged, open_merged, open_sidecar
from attnprune.units import counted


@dataclass(frozen=True)
class Level:
    """One level's outcome: `detail` says what was checked, `error` is None where it passed."""

    name: str
    detail: str
    error: AttnPruneError | None = None


def climb(path: Path, base: str | None = None) -> Iterator[Level]:
    """Walk the ladder for a sidecar or merged folder; stops after the first level that fails."""
    steps = _merged_steps(path) if is_merged(path) else _sidecar_steps(path, base)
    for name, check in steps:
        try:
            detail = check()
        except AttnPruneError as error:
            yield Level(name, error.message, error)
            return
        yield Level(name, detail)


Steps = Iterator[tuple[str, Callable[[], str]]]


def _sidecar_steps(path: Path, base: str | None) -> Steps:
    opened: list[Sidecar] = []
    loaded: list[object] = []

    def schema() -> str:
        opened.append(open_sidecar(path))
        format.check_weights_entry(opened[0].manifest)
        return f"format {opened[0].manifest.format_version}"

    def tensors() -> str:
        heads, weights = opened[0].manifest.gate.heads, opened[0].manifest.weights.kind
        assert opened[0].gates
        opened[0].weight_bytes()
        return f"{sum(heads)} gates in {len(heads)} layers, weights: {weights}"

    def identity() -> str:
        from attnprune.sidecar import loading

        sidecar = opened[0]
        name, _ = loading.which_base(sidecar, base)
        found = loading.load_dense(sidecar, base)
        loading.apply_sidecar(found.model, sidecar)
        loaded.append(found.model)
        return f"{name} is the base it was made for"

    def probe() -> str:
        from attnprune.sidecar import loading

        loading.verify_probe(loaded[0], opened[0].manifest)
        return _probe_detail(opened[0].manifest)

    yield "schema", schema
    yield "files", lambda: _files(opened[0])
    yield "tensors", tensors
    yield "base", identity
    yield "probe", probe


def _merged_steps(path: Path) -> Steps:
    opened: list[Sidecar] = []

    def schema() -> str:
        opened.append(open_merged(path))
        return f"format {opened[0].manifest.format_version}, merged"

    def tensors() -> str:
        heads = opened[0].manifest.gate.heads
        count = len(check_weights(opened[0]))
        return f"{sum(heads)} gates in {len(heads)} layers, the same inside the weights; {count} tensors"

    def code() -> str:
        check_release_code(path)
        from attnprune.sidecar.merged import check_classes

        check_classes(opened[0])
        return f"{format.CODE_FILE} is that of this release, and no file names other code"

    def probe() -> str:
        from attnprune.sidecar.merged import load_merged

        load_merged(path, verify=True)
        return _probe_detail(opened[0].manifest)

    yield "schema", schema
    yield "files", lambda: _files(opened[0])
    yield "tensors", tensors
    yield "code", code
    yield "probe", probe


def _files(sidecar: Sidecar) -> str:
    check_files(sidecar)
    return f"{counted(len(sidecar.manifest.files), 'file')}, sizes and sha256"


def _probe_detail(manifest: format.Manifest) -> str:
    return f"loss {manifest.probe.loss:.6f} with {manifest.probe.open_edges} open edges is reproduced"
