"""The real model through a Hub and back: sparsified from it, pushed in both forms, loaded by users with and without
attnprune, and by every wrong way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from attnprune.sidecar import bases
from tests.helpers.factory import gguf_file, save_text
from tests.helpers.hub_server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.allow_hosts(["127.0.0.1"])]

BASE, SIDECAR, MERGED = "HuggingFaceTB/SmolLM2-135M-Instruct", "tester/smollm2-sidecar", "tester/smollm2-merged"
RUN = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{load}
ids, prompt, out = {arguments!r}
with torch.no_grad():
    result = model(torch.tensor([ids]), output_attentions=True)
    text = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
open_edges = sum(int((a > 0).sum()) for a in result.attentions)
torch.save({{"logits": result.logits, "open_edges": open_edges, "text": text}}, out)
"""
OURS = "import attnprune\nmodel, tokenizer = attnprune.load({repo!r})"
THEIRS = """
options = {{"trust_remote_code": True, "revision": {revision!r}}}
model = AutoModelForCausalLM.from_pretrained({repo!r}, dtype="auto", **options)
tokenizer = AutoTokenizer.from_pretrained({repo!r}, **options)
"""
WRONG_WAYS = """
from transformers import AutoModelForCausalLM, LlamaForCausalLM
trusted = {{"trust_remote_code": True}}
ways = {{
    "no flag": lambda: AutoModelForCausalLM.from_pretrained({repo!r}),
    "stock class": lambda: LlamaForCausalLM.from_pretrained({repo!r}),
    "stock class, sdpa": lambda: LlamaForCausalLM.from_pretrained({repo!r}, attn_implementation="sdpa"),
    "sdpa": lambda: AutoModelForCausalLM.from_pretrained({repo!r}, attn_implementation="sdpa", **trusted),
    "sidecar": lambda: AutoModelForCausalLM.from_pretrained({sidecar!r}, **trusted),
    "missing gates": lambda: AutoModelForCausalLM.from_pretrained("tester/no-gates", **trusted),
    "root adapter": lambda: AutoModelForCausalLM.from_pretrained("tester/root-adapter", **trusted),
}}
for way, load in ways.items():
    try:
        load()
    except Exception as error:
        print("raised:", way, "-", type(error).__name__, str(error).splitlines()[0][:100])
    else:
        raise SystemExit(f"{{way}}: loaded")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(server, folder, command): a Hub that holds the base model as its publisher would put it there."""
    folder = tmp_path_factory.mktemp("round-trip")
    found = bases.load_base(str(gguf_file()))
    found.model.save_pretrained(folder / "base")
    found.tokenizer.save_pretrained(folder / "base")
    save_text(folder / "text.txt", 60)
    with HubServer() as hub:
        card = b"---\nlicense: apache-2.0\n---\n# SmolLM2\n"
        hub.put(BASE, {p.name: p.read_bytes() for p in (folder / "base").iterdir()} | {"README.md": card})
        environment = os.environ | hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}

        def command(*arguments: object) -> str:
            done = subprocess.run(
                [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True,
                timeout=900, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        options = {
            "--data": "text.txt", "--steps": 2, "--scope": "lora", "--seq-len": 64, "--eval-tokens": 128,
            "--batch-size": 2, "--eval-every": 2, "--save-every": 2, "--tolerance": 5, "--out": "run",
        }  # fmt: skip
        command("-m", "attnprune", "sparsify", BASE, *[part for pair in options.items() for part in pair], "-q")
        command("-m", "attnprune", "push", "run", SIDECAR)
        command("-m", "attnprune", "push", "run", MERGED, "--merged")
        yield hub, folder, command


def test_the_cards_name_base_license_and_relation(place):
    hub, _, _ = place
    for repo, relation in ((SIDECAR, "adapter"), (MERGED, "finetune")):
        card = hub.files(repo)["README.md"].decode()
        assert f"base_model: {BASE}\n" in card
        assert f"base_model_relation: {relation}\n" in card
        assert "license: apache-2.0\n" in card


def test_inspect_of_the_merged_model_transfers_little(place):
    hub, _, command = place
    hub.log.clear()
    shown = json.loads(command("-m", "attnprune", "inspect", MERGED, "--json"))
    assert len(shown["density"]) == 30
    assert hub.log.sent() < 200_000
    assert len(hub.files(MERGED)["model.safetensors"]) > 500_000_000


def test_the_same_model_with_and_without_attnprune(place, stranger):
    hub, folder, command = place
    manifest = json.loads(hub.files(SIDECAR)["attnprune.json"])
    assert manifest["base"]["revision"] == hub.commits(BASE)[0].sha
    arguments = manifest["probe"]["input_ids"], "The capital of France is"
    for name, repo in (("sidecar", SIDECAR), ("merged", MERGED)):
        loaded = OURS.format(repo=repo)
        command("-c", RUN.format(load=loaded, arguments=(*arguments, str(folder / f"{name}.pt"))))
    theirs = THEIRS.format(repo=MERGED, revision=hub.commits(MERGED)[0].sha)
    program = RUN.format(load=theirs, arguments=(*arguments, str(folder / "stranger.pt")))
    stranger(program, timeout=600, **hub.environment(folder / "strangers-home"))
    sidecar, *others = (torch.load(folder / f"{name}.pt") for name in ("sidecar", "merged", "stranger"))
    assert sidecar["open_edges"] == manifest["probe"]["open_edges"]
    for other in others:
        assert (other["logits"] - sidecar["logits"]).abs().max() <= 1e-5
        assert other["open_edges"] == sidecar["open_edges"]
        assert torch.equal(other["text"], sidecar["text"])


def test_every_wrong_way_raises(place, stranger):
    hub, folder, _ = place
    files = {name: data for name, data in hub.files(MERGED).items() if name != ".gitattributes"}
    tensors = {n: t for n, t in load(files["model.safetensors"]).items() if "attnprune_gate" not in n}
    hub.put("tester/no-gates", files | {"model.safetensors": save(tensors, {"format": "pt"})})
    adapter = {n.removeprefix("adapter/"): d for n, d in hub.files(SIDECAR).items() if n.startswith("adapter/")}
    hub.put("tester/root-adapter", files | adapter)
    program = WRONG_WAYS.format(repo=MERGED, sidecar=SIDECAR)
    shown = stranger(program, timeout=600, **hub.environment(folder / "strangers-home"))
    ways = [line[line.index("raised:") :].split(" - ")[0] for line in shown.splitlines() if "raised:" in line]
    names = ("no flag", "stock class", "stock class, sdpa", "sdpa", "sidecar", "missing gates", "root adapter")
    assert ways == [f"raised: {name}" for name in names]
    assert Path(folder / "strangers-home").is_dir()  # it did go through the Hub
