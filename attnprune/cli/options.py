"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model: Hub id, folder or .gguf file. Default: the one that was sparsified."),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a Hub repository. Default: main.", show_default=False),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept a base of equal structure with other weights.")
]

AnyModel = Annotated[str, typer.Argument(help="Sidecar or merged folder, base model, Hub name, .gguf file or 'demo'.")]
TextField = Annotated[
    str, typer.Option("--text-field", help="Column of text or chat messages; without a column text, messages.")
]
LookedAt = Annotated[
    list[str], typer.Option("--data", help="Text to look at: file, folder, pattern or Hub data set (repeatable).")
]
MostTokens = Annotated[int, typer.Option("--tokens", help="At most this many tokens of the text.", min=2)]
BlockLength = Annotated[
    int,
    typer.Option(
        "--seq-len", help="Tokens per block, up to 1,024. 0: as the sparse model was measured, else 512.", min=0
    ),
]

# What `attnprune sparsify` does without an option whose help does not say it itself. tests/cli/test_help.py compares it
# with RunConfig, whose import would make every --help wait.
RUN_DEFAULTS = {
    "--data": "general web text from the Hub",
    "--steps": "3000",
    "--time": "none",
    "--batch-size": "16",
    "--eval-tokens": "16384",
    "--constraint": "kl",
    "--tolerance": "0.05",
    "--target-density": "0.01",
    "--estimator": "threshold",
    "--temperature": "0.5",
    "--lr": "0.0003",
    "--gate-lr": "0.02",
    "--fsdp": "auto",
    "--load-in": "full",
    "--keep-quantised": "off",
    "--lora-rank": "16",
    "--lora-targets": "attention",
    "--match": "0",
    "--optimizer": "adamw",
    "--precision": "auto",
    "--gradient-checkpointing": "off",
    "--eval-every": "100",
    "--save-every": "200",
    "--seed": "0",
    "--device": "auto",
    "--dtype": "auto, bfloat16 on CUDA",
    "--revision": "main",
    "--init": "none",
    "--config": "none",
    "--resume": "none",
    "--finish": "none",
    "--report-to": "none",
}
