"""The model card of a pushed model: metadata, results, a picture of the heads, and how to load it. No torch."""

from __future__ import annotations

from io import BytesIO

import numpy as np

from attnprune.runs.folder import RUN_FILE, load_run_file
from attnprune.sidecar.folder import Sidecar
from attnprune.training.constraint import constraint_text
from attnprune.units import percent

PICTURE = "density.png"
MARK = "<!-- written by attnprune push; a card without this line is kept -->"

# Density of a head -> colour (viridis); the scale is logarithmic, a colour per factor of ten. Closed heads are grey.
_CLOSED = (226, 226, 226)
_SCALE = [
    (1e-4, (68, 1, 84)),
    (1e-3, (59, 82, 139)),
    (1e-2, (33, 145, 140)),
    (1e-1, (94, 201, 98)),
    (1.0, (253, 231, 37)),
]


def model_card(sidecar: Sidecar, repo: str, commit: str, base_model: str | None, license: str | None) -> str:
    """README.md of a repository: `commit` is the one that holds the model's files and that the snippets pin."""
    from huggingface_hub import ModelCardData

    merged = sidecar.manifest.merged is not None
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name="transformers" if merged else "attnprune",
        pipeline_tag="text-generation",
        tags=["attnprune", "sparse-attention", "interpretability", *(["custom_code"] if merged else [])],
    )
    if base_model is not None:
        data.base_model_relation = "finetune" if merged else "adapter"  # pyright: ignore[reportAttributeAccessIssue]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {repo.split('/')[-1]}",
        _summary(sidecar, base_model),
        _results(sidecar),
        f"![density of every head]({PICTURE})",
        "Rows are layers, columns are heads, grey is a head that never opened on the held-out text. Density is open "
        "edges over visible (query, key) pairs; it depends on the block length T.",
        "## Load it",
        _snippets(sidecar, repo, commit),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(sidecar: Sidecar, base_model: str | None) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else _unnamed(sidecar)
    result = sidecar.manifest.result
    form = "merged into one model" if sidecar.manifest.merged is not None else "stored as a sidecar"
    return (
        f"{base}, post-trained with [attnprune](https://pypi.org/project/attnprune/) so that its attention keeps "
        f"{percent(result.density)} of its edges at T = {result.seq_len} ({form}). Each head has a learned bias; an "
        "edge stays only where score + bias > 0. The method is constrained sparse post-training (arXiv 2512.05865)."
    )


def _unnamed(sidecar: Sidecar) -> str:
    """A base that is not known to be on the Hub: what it was, and how to recognise it."""
    base = sidecar.manifest.base
    if base.kind == "bundled":
        return "A bundled model"
    what = "`.gguf` file" if base.kind == "gguf" else "folder"
    return (
        f"A {_plain(base.model_type)} model from a local {what}, whose name on the Hub was not given "
        f"(fingerprint of its weights: `{base.content[:16]}`)"
    )


def _results(sidecar: Sidecar) -> str:
    result = sidecar.manifest.result
    closed = sum(int((layer == 0).sum()) for layer in sidecar.density)
    verdict = "met" if result.feasible else "**not met**"
    rows = [
        ("density", f"{percent(result.density)} ({result.edges_per_query:.3g} edges per query and head)"),
        ("heads without an open edge", f"{closed} of {sum(sidecar.manifest.gate.heads)}"),
        ("loss", f"{result.loss:.4f} nats per token"),
        ("loss of the base on the same text", f"{result.base_loss:.4f} ({result.loss - result.base_loss:+.4f})"),
        ("the same weights with every gate open", "" if result.control_loss is None else f"{result.control_loss:.4f}"),
        ("KL(base ‖ sparse)", f"{result.kl:.4f} nats per token"),
        ("asked for", f"{constraint_text(result.constraint, result.limit).replace('||', '‖')}: {verdict}"),
        ("measured on", f"{_plain(result.data)}, {result.tokens:,} held-out tokens in blocks of T = {result.seq_len}"),
        ("trained for", f"{result.steps:,} steps, seed {result.seed}{_start(sidecar)}"),
    ]
    body = "\n".join(f"| {name} | {value} |" for name, value in rows if value)
    return f"| | |\n|---|---|\n{body}"


def _start(sidecar: Sidecar) -> str:
    """Steps alone would say too little of a run that continued another one."""
    file = sidecar.path / RUN_FILE
    return ", starting from another sidecar" if file.is_file() and load_run_file(file).model.init else ""


def _plain(text: str) -> str:
    """Text from a manifest as one table cell of printable characters."""
    return "".join(c if c.isalnum() or c in " .,:/_+()-" else "_" for c in text)[:100]


def _snippets(sidecar: Sidecar, repo: str, commit: str) -> str:
    base = ', base="PATH/TO/BASE"' if _needs_a_named_base(sidecar) else ""
    ours = (
        f'```python\nimport attnprune  # pip install "attnprune"\n\n'
        f'model, tokenizer = attnprune.load("{repo}", revision="{commit}"{base})\n```'
    )
    if sidecar.manifest.merged is None:
        how = f"`attnprune inspect {repo}` shows it without downloading weights."
        config = f" How it was made is in `{RUN_FILE}`." if (sidecar.path / RUN_FILE).is_file() else ""
        return f"{ours}\n\nGates and weights are added to the base when it is loaded. {how}{config}"
    plain = (
        f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'kwargs = {{"revision": "{commit}", "trust_remote_code": True}}\n'
        f'model = AutoModelForCausalLM.from_pretrained("{repo}", **kwargs)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}", **kwargs)\n```'
    )
    return (
        f"Without attnprune installed, with the code in this repository:\n\n{plain}\n\nWith attnprune:\n\n{ours}\n\n"
        "Keep the revision pinned: it fixes the code that `trust_remote_code=True` runs. Any other attention "
        "implementation is refused, because it would run the model dense."
    )


def _needs_a_named_base(sidecar: Sidecar) -> bool:
    base = sidecar.manifest.base
    return sidecar.manifest.merged is None and base.kind in ("local", "gguf") and not base.repo_id


def density_png(density: list[np.ndarray]) -> bytes:
    """A picture of the density of every head, [layers][heads]: one cell per head, and the colour scale below."""
    from PIL import Image, ImageDraw, ImageFont

    layers, heads = len(density), max(len(layer) for layer in density)
    cell = max(2, min(16, 4096 // max(layers, heads)))
    top, left = 28, 40
    scale_top = top + layers * cell + 12
    image = Image.new("RGB", (max(left + heads * cell + 8, 380), scale_top + 22), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    draw.text((8, 6), "density of each head (rows: layers, columns: heads)", "black", font)
    for layer, row in enumerate(density):
        y = top + layer * cell
        if layer % max(1, 14 // cell) == 0:
            draw.text((8, y), f"{layer}", "black", font)
        for head, share in enumerate(row):
            x = left + head * cell
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), _colour(float(share)))
    for step, (share, colour) in enumerate([(0.0, _CLOSED), *_SCALE]):
        x = 8 + step * 62
        draw.rectangle((x, scale_top, x + 12, scale_top + 12), colour)
        draw.text((x + 16, scale_top - 1), percent(share) if share else "closed", "black", font)
    raw = BytesIO()
    image.save(raw, "PNG", optimize=True)
    return raw.getvalue()


def _colour(share: float) -> tuple[int, int, int]:
    """Linear between the scale's colours on the logarithm of the density."""
    if share <= 0:
        return _CLOSED
    shares, colours = zip(*_SCALE, strict=True)
    place = np.log10(max(share, shares[0]))
    mixed = [np.interp(place, np.log10(shares), channel) for channel in zip(*colours, strict=True)]
    return (round(mixed[0]), round(mixed[1]), round(mixed[2]))
