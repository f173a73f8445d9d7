"""What a sparse model lost against its base, beyond the mean loss.

    python examples/what_is_lost.py SIDECAR --base MODEL --data state_union.txt --data wikitext2_valid.txt --out l.json

Per text: next-token agreement, loss by position in the context, and three zero-shot tasks cut from it. Once: copying of
random repeated tokens (induction), and ten greedy continuations side by side. Everything is seeded by --seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from attnprune.measure import BATCH_TOKENS, token_losses
from attnprune.sidecar import bases, loading
from attnprune.sidecar.folder import open_sidecar

CHOICES = 4


@torch.no_grad()
def losses_of(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, argmax) [N, T - 1] of every next-token prediction of `ids` [N, T]."""
    losses, best = [], []
    for batch in ids.split(max(1, BATCH_TOKENS // ids.shape[1])):
        log_p, loss = token_losses(model(input_ids=batch, use_cache=False).logits, batch)
        losses.append(loss.view(len(batch), -1))
        best.append(log_p.argmax(-1).view(len(batch), -1))
    return torch.cat(losses), torch.cat(best)


def by_position(losses: Tensor) -> dict[str, float]:
    """Mean loss by the number of tokens of context: 1-15, 16-31, 32-63, ..."""
    length, edges = losses.shape[1] + 1, [1, 16]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return {f"{low}-{high - 1}": losses[:, low - 1 : high - 1].mean().item() for low, high in itertools.pairwise(edges)}


def induction(model: Any, vocabulary: int, seq_len: int, rows: int, seed: int) -> float:
    """Share of right argmax predictions in the second half of a random token sequence that is repeated once."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(vocabulary, (rows, seq_len // 2), generator=generator)
    ids = torch.cat([half, half], 1)
    _, best = losses_of(model, ids)
    second = slice(seq_len // 2, None)  # the first repeated token cannot be known; all later ones can
    return (best[:, second] == ids[:, 1:][:, second]).float().mean().item()


Task = list[tuple[str, list[str]]]
"""Items of a multiple-choice task: a context and its possible endings, the right one first."""


def passages(text: str) -> list[str]:
    """Paragraphs of 60 to 120 words, on one line each."""
    cut = [" ".join(part.split()) for part in re.split(r"\n\s*\n|\n", text)]
    return [part for part in cut if 60 <= part.count(" ") <= 120]


def continuation_task(texts: list[str], rng: random.Random, items: int) -> Task:
    """Which of four half paragraphs continues this one (the other three come from elsewhere in the text)."""
    halves = [(" ".join(w[:40]), " " + " ".join(w[40:60])) for w in (t.split() for t in texts)]
    chosen = rng.sample(range(len(halves)), items)
    return [
        (halves[i][0], [halves[i][1], *(halves[j][1] for j in rng.sample([j for j in chosen if j != i], CHOICES - 1))])
        for i in chosen
    ]


def word_task(texts: list[str], rng: random.Random, items: int, *, seen: bool) -> Task:
    """Which of four words ends the passage: words `seen` earlier in the same passage, or words from other passages."""
    task: Task = []
    everywhere = [w for t in texts for w in sorted(set(re.findall(r"[A-Za-z]{5,}", t)))]
    for text in rng.sample(texts, len(texts)):
        words = text.split()[:60]
        before = sorted(set(re.findall(r"[A-Za-z]{5,}", " ".join(words[:-1]))))
        last = next((i for i in range(len(words) - 1, 30, -1) if re.fullmatch(r"[A-Za-z]{5,}", words[i])), None)
        if last is None or (seen and words[last] not in " ".join(words[:last]).split()):
            continue
        others = [w for w in (before if seen else everywhere) if w != words[last]]
        if len(others) < CHOICES - 1:
            continue
        task.append((" ".join(words[:last]), [f" {w}" for w in [words[last], *rng.sample(others, CHOICES - 1)]]))
        if len(task) == items:
            break
    return task


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: Task) -> float:
    """Share of items whose right ending has the lowest mean loss per token."""
    right = 0
    for context, endings in task:
        start = torch.tensor([tokenizer(context, add_special_tokens=False)["input_ids"]])
        rows = [tokenizer(ending, add_special_tokens=False)["input_ids"] for ending in endings]
        width = max(map(len, rows))
        # Causal: what fills up the shorter rows is seen by no token that counts.
        ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows])
        first = model(input_ids=start, use_cache=True, logits_to_keep=1)
        first.past_key_values.batch_repeat_interleave(len(rows))
        later = model(input_ids=ids, past_key_values=first.past_key_values).logits[:, :-1]
        logits = torch.cat([first.logits.expand(len(rows), -1, -1), later], 1)
        losses = -torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None]).squeeze(-1)
        means = [loss[: len(row)].mean().item() for loss, row in zip(losses, rows, strict=True)]
        right += means.index(min(means)) == 0
    return right / len(task)


def continuation(model: Any, tokenizer: Any, prompt: Tensor, tokens: int) -> str:
    """Greedy continuation of `prompt` [T]."""
    ids = prompt[None]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sidecar", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--items", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    sidecar = open_sidecar(str(options.sidecar))
    seq_len = sidecar.manifest.result.seq_len
    base = bases.load_base(options.base)
    sparse, tokenizer = loading.load(str(options.sidecar), base=options.base)
    models = {"base": base.model.eval(), "sparse": sparse.eval()}
    rng = random.Random(options.seed)
    result: dict[str, Any] = {
        "density": sidecar.manifest.result.density,
        "seq_len": seq_len,
        "induction": {n: induction(m, len(tokenizer), seq_len, 16, options.seed) for n, m in models.items()},
        "texts": {},
        "continuations": [],
    }
    prompts: list[Tensor] = []
    for path in options.data:
        texts = list(documents(str(path), "text"))
        ids = pack(texts, tokenizer, seq_len, options.tokens, path.name).input_ids
        measured = {name: losses_of(model, ids) for name, model in models.items()}
        short = passages("\n".join(texts))
        tasks = {
            "which continuation (chance 25 %)": continuation_task(short, rng, options.items),
            "last word, all choices seen before (chance 25 %)": word_task(short, rng, options.items, seen=True),
            "last word, choices from elsewhere (chance 25 %)": word_task(short, rng, options.items, seen=False),
        }
        result["texts"][path.name] = {
            "agreement": (measured["base"][1] == measured["sparse"][1]).float().mean().item(),
            "loss by position": {name: by_position(losses) for name, (losses, _) in measured.items()},
            "tasks": {
                title: {"items": len(task), **{n: accuracy(m, tokenizer, task) for n, m in models.items()}}
                for title, task in tasks.items()
            },
        }
        rows = torch.linspace(0, len(ids) - 1, min(len(ids), 10 // len(options.data))).long()
        prompts += list(ids[rows, : min(48, seq_len // 2)])
    for prompt in prompts:
        texts = {name: continuation(model, tokenizer, prompt, 30) for name, model in models.items()}
        result["continuations"].append({"prompt": tokenizer.decode(prompt), **texts})
    options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
