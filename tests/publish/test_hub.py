"""Push, inspect, apply and load through a local Hub, with the real client and the real command line: rows H1-H15.

Long because pushing and reading are two ends of the same local Hub.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import yaml
from transformers import AutoTokenizer

from attnprune.sidecar import format, loading
from attnprune.sidecar.damage import Damage, fingerprints, write_damage
from attnprune.sidecar.folder import open_sidecar
from attnprune.sidecar.merged import write_merged
from attnprune.units import percent, size
from tests.helpers.command import ENVIRONMENT, python
from tests.helpers.factory import save_tiny_llama
from tests.helpers.hub_server import READ, HubServer
from tests.helpers.paths import VECTORS
from tests.helpers.sidecars import TEMPLATES, base_with_a_rich_tokenizer, save_sidecar

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

CANARY = "hf_" + "canary" * 5
SIDECAR = VECTORS / "first-release"
OTHER = SIDECAR.parent / "llama-gqa-delta"
REPO = "tester/sparse"
COMMIT, INFO, RESOLVE = "POST /api/models/.*/commit/", "GET /api/models/tester/sparse", "GET /.*/resolve/.*"
SENT = {
    ".gitattributes", "README.md", "density.png", "attnprune.json", "gates.safetensors", "run.toml",
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(a Hub, the folder of its caches): at one address for all tests, so that their programs are forks of one."""
    with HubServer() as server:
        yield server, tmp_path_factory.mktemp("hub") / "home"


@pytest.fixture
def hub(place):
    """A Hub on which the canary token may write."""
    server, _ = place
    server.clear()
    server.tokens[CANARY] = "write"
    return server


@pytest.fixture
def home(place):
    """The folder of the client's caches, empty."""
    shutil.rmtree(place[1], ignore_errors=True)
    return place[1]


@pytest.fixture
def run(hub, home, tmp_path):
    """The command line against that Hub: (exit code, stdout, stderr); a failure is one line, and no token is shown."""

    def call(*arguments, code=0, part="", token: str | None = CANARY, **variables):
        environment = ENVIRONMENT | hub.environment(home, token) | variables
        done = python("-m", "attnprune", *arguments, cwd=tmp_path, env=environment)
        output = done.stdout + done.stderr
        assert done.returncode == code, output
        lines = [line for line in done.stderr.splitlines() if line.startswith("attnprune:")]
        assert len(lines) == (code != 0), output
        assert part in (lines[0] if lines else output)
        assert CANARY not in output
        assert "Traceback" not in output
        return done

    yield call
    leaked = [p for p in (*tmp_path.rglob("*"), *home.rglob("*")) if p.is_file() and CANARY.encode() in p.read_bytes()]
    assert leaked == []


@pytest.fixture
def pushed(hub, run):
    """A repository with the sidecar in it, and nothing in the log."""
    run("push", SIDECAR, REPO)
    hub.log.clear()
    return hub


def writes(hub):
    return [r for r in hub.log if r.method in ("POST", "PUT", "DELETE") and "preupload" not in r.path]


# --- what arrives


def test_a_sidecar_arrives_whole_and_a_second_push_sends_nothing(hub, run):
    facts = json.loads(run("push", SIDECAR, REPO, "--json").stdout)
    files = hub.files(REPO)
    assert set(files) == SENT
    for name in SENT - {".gitattributes", "README.md", "density.png", "run.toml"}:
        assert files[name] == (SIDECAR / name).read_bytes()
    assert files["density.png"].startswith(b"\x89PNG")
    titles = [commit.title for commit in hub.commits(REPO)]
    assert titles[:-1] == ["attnprune: model card", "attnprune: sidecar at density 33.9 %"]
    assert facts["sent"] == 6
    hub.log.clear()
    again = json.loads(run("push", SIDECAR, REPO, "--json").stdout)
    assert again["sent"] == 0
    assert {f["state"] for f in again["files"].values()} == {"unchanged"}
    assert again["commit"] == facts["commit"]
    assert writes(hub) == []


def test_the_card_pins_a_commit_that_holds_the_files(hub, run):
    hub.put("someone/base", {"README.md": b"---\nlicense: mit\n---\n# Base\n", "config.json": b"{}"})
    run("push", OTHER, REPO, "--base-model", "someone/base")
    card = hub.files(REPO)["README.md"].decode()
    about = yaml.safe_load(card.split("---")[1])
    assert about["base_model"] == "someone/base"
    assert about["base_model_relation"] == "adapter"
    assert about["license"] == "mit"
    assert about["library_name"] == "attnprune"
    (commit,) = set(re.findall(r'revision="([0-9a-f]{40})"', card))
    pinned = hub.files(REPO, commit)
    assert {n: pinned[n] for n in pinned if n != "README.md"} == {
        n: d for n, d in hub.files(REPO).items() if n != "README.md"
    }
    manifest = json.loads(pinned["attnprune.json"])
    assert manifest["base"]["repo_id"] == "someone/base"
    assert manifest["base"]["revision"] == hub.commits("someone/base")[0].sha


def test_no_local_path_leaves_the_machine(pushed, tmp_path):
    run_file = pushed.files(REPO)["run.toml"].decode()
    assert '"/' not in run_file
    assert 'folder = ""' in run_file
    for data in pushed.files(REPO).values():
        assert str(tmp_path).encode() not in data


def test_dry_run_shows_the_plan_and_writes_nothing(hub, run):
    shown = run("push", SIDECAR, REPO, "--dry-run", token=None)
    assert "gates.safetensors" in shown.stderr
    assert "to send" in shown.stderr
    assert json.loads(run("push", SIDECAR, REPO, "--dry-run", "--json").stdout)["parent"] is None
    assert writes(hub) == []
    assert REPO not in hub.repos


def test_private_branch_and_pull_request(hub, run):
    run("push", SIDECAR, REPO, "--private")
    assert hub.repos[REPO].private
    run("push", SIDECAR, REPO, "--revision", "trial")
    assert set(hub.files(REPO, "trial")) == SENT
    main = hub.commits(REPO)[0].sha
    assert hub.commits(REPO, "trial")[0].sha == main  # the branch starts at main, where everything is
    run("push", OTHER, "tester/other", "--private", "--base-model", "tester/none", code=2, part="not found")
    hub.create("tester/public")
    run("push", SIDECAR, "tester/public", "--private", code=2, part="exists and is public")
    run("push", SIDECAR, "tester/public", "--create-pr")
    assert set(hub.files("tester/public")) == {".gitattributes"}
    assert set(hub.files("tester/public", "refs/pr/1")) == SENT


def test_a_card_written_by_hand_stays(pushed, run):
    pushed.put(REPO, {"README.md": b"# Mine\n"})
    run("push", SIDECAR, REPO, part="is kept")
    assert pushed.files(REPO)["README.md"] == b"# Mine\n"


def test_a_card_in_the_folder_is_sent_as_it_is(hub, run, tmp_path):
    folder = shutil.copytree(SIDECAR, tmp_path / "sidecar")
    (folder / "README.md").write_text("# Mine\n")
    run("push", folder, REPO)
    assert hub.files(REPO)["README.md"] == b"# Mine\n"


def test_files_that_the_model_no_longer_has_are_deleted_and_others_stay(hub, run, tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    for kind in ("lora", "delta"):
        save_sidecar(tmp_path / kind, base, kind)
    hub.put("someone/base", {"config.json": b"{}"})
    run("push", tmp_path / "lora", REPO, "--base-model", "someone/base")
    hub.put(REPO, {"notes.md": b"kept"})
    shown = run("push", tmp_path / "delta", REPO, "--base-model", "someone/base", "--replace", "--json")
    assert json.loads(shown.stdout)["deleted"] == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    assert set(hub.files(REPO)) == {
        ".gitattributes", "README.md", "density.png", "attnprune.json", "gates.safetensors", "delta.safetensors",
        "notes.md",
    }  # fmt: skip


@pytest.mark.parametrize("step", ["POST /api/repos/create", "POST .*/preupload/"])
def test_what_somebody_puts_into_a_new_repository_meanwhile_is_not_overwritten(hub, run, step):
    theirs = {"README.md": b"# Theirs", "gates.safetensors": b"theirs"}
    hub.fail(step, call=lambda: hub.put(REPO, theirs))
    run("push", SIDECAR, REPO, code=1, part="somebody else changed it meanwhile")
    assert {name: hub.files(REPO)[name] for name in theirs} == theirs


def test_a_revision_that_is_no_branch_is_refused(pushed, run, tmp_path):
    first = pushed.commits(REPO)[0].sha
    pushed.repos[REPO].refs["refs/tags/v1"] = first
    for revision, part in (("", "is not a branch"), (first, "is not a branch"), ("v1", "is a tag")):
        run("push", SIDECAR, REPO, "--revision", revision, code=2, part=part)
    run("push", SIDECAR, REPO, "--revision", "new", "--create-pr", code=2, part="has no branch 'new'")
    folder = shutil.copytree(SIDECAR, tmp_path / "sidecar")
    (folder / "metrics.jsonl").write_text("{}\n")
    run("push", folder, REPO, "--create-pr")
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    run("push", folder, REPO, "--revision", "refs/pr/1")
    assert pushed.files(REPO, "refs/pr/1")["metrics.jsonl"] == b"{}\n{}\n"
    assert set(pushed.repos[REPO].refs) == {"refs/heads/main", "refs/tags/v1", "refs/pr/1"}
    assert pushed.commits(REPO)[0].sha == first


def test_a_base_model_that_cannot_be_is_refused(hub, run):
    hub.put("someone/bert", {"config.json": b'{"model_type": "bert"}'})
    for name in ("../x", "a b", "/tmp/x", "u/n--m", "someone/bert@main", "https://huggingface.co/someone/bert"):
        run("push", OTHER, REPO, "--base-model", name, code=2, part="bad repo id")
    run("push", OTHER, REPO, "--base-model", "someone/bert", code=2, part="is a bert model, not llama")
    run("push", SIDECAR, REPO, "--base-model", "someone/bert", code=2, part="was made from the bundled model")
    run("push", OTHER, REPO, "--merged", "--base", OTHER, code=2, part="this is a sidecar, not a base model")
    run("push", OTHER, REPO, "--base", OTHER, code=2, part="goes with --merged")
    assert REPO not in hub.repos


def test_a_downloaded_model_is_pushed_on_with_a_card_of_its_own(pushed, run, home, tmp_path):
    run("apply", REPO)
    (snapshot,) = (home / "hub").glob("models--*/snapshots/*")
    for name, data in pushed.files(REPO).items():
        if name == "README.md":
            (snapshot / name).write_bytes(data)
    run("push", snapshot, "tester/second")
    assert "tester/sparse" not in pushed.files("tester/second")["README.md"].decode()


def test_a_merged_model_is_pushed_on_from_the_cache_whole(hub, run, home, tmp_path):
    run("push", SIDECAR, REPO, "--merged")
    run("verify", REPO)
    (snapshot,) = (home / "hub").glob("models--*/snapshots/*")
    about, config = (json.loads((snapshot / n).read_text()) for n in ("config.json", "tokenizer_config.json"))
    del about["attnprune"]["files"]["tokenizer_config.json"], about["attnprune"]["merged"]["config"]  # an older folder
    for name, values in (
        ("config.json", about),
        ("tokenizer_config.json", config | {"name_or_path": "/home/me/model"}),
    ):
        (snapshot / name).unlink()
        (snapshot / name).write_text(json.dumps(values))
    run("push", snapshot, "tester/second")
    assert set(hub.files("tester/second")) == set(hub.files(REPO))
    assert b"/home/me" not in b"".join(hub.files("tester/second").values())
    run("verify", "tester/second", part="verified")


def test_a_tokenizer_arrives_with_all_that_belongs_to_it(hub, run, home, tmp_path):
    base = base_with_a_rich_tokenizer(tmp_path / "base")
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    commit = hub.put("someone/base", files)
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    values = json.loads((sidecar.path / "attnprune.json").read_bytes())
    values["base"] |= {"kind": "hub", "repo_id": "someone/base", "revision": commit}
    (sidecar.path / "attnprune.json").write_text(json.dumps(values))
    hub.put("someone/base", {"tokenizer.model": b"a later one"})
    run("push", sidecar.path, REPO, "--merged")
    sent = hub.files(REPO)
    templates = ("chat_template.jinja", *(f"additional_chat_templates/{name}.jinja" for name in ("tool_use", "rag 2")))
    for name in (*templates, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        assert sent[name] == files[name]
    run("verify", REPO, part="verified")
    (snapshot,) = (home / "hub").glob("models--tester--sparse/snapshots/*")
    assert AutoTokenizer.from_pretrained(snapshot).chat_template == TEMPLATES
    run("push", snapshot, "tester/second")
    assert set(hub.files("tester/second")) == set(sent)


def test_an_answer_without_files_is_no_empty_repository(pushed, run):
    before = pushed.commits(REPO)
    for missing in ({"siblings": None}, {"sha": None}, {"sha": "../x"}):
        broken = pushed.fail(INFO, times=math.inf, change=missing)
        run("push", SIDECAR, REPO, code=1, part="unexpected answer")
        run("inspect", REPO, code=1, part="unexpected answer")
        broken.times = 0
    assert pushed.commits(REPO) == before


def test_a_cache_that_was_damaged_is_fetched_again(pushed, run, home, tmp_path):
    run("inspect", REPO)
    for blob in (home / "hub").glob("models--*/blobs/*"):
        blob.write_bytes(blob.read_bytes()[:-1])
    for name in ("attnprune.json", "gates.safetensors"):
        run("inspect", REPO, code=1, part=f"damaged download of {name}")
    run("inspect", REPO)


def test_ctrl_c_is_one_line_and_the_push_is_completed_by_the_next(hub, run, home, tmp_path):
    waiting = [sys.executable, "-m", "attnprune", "push", str(SIDECAR), REPO]
    environment = os.environ | hub.environment(home, CANARY)
    processes: list[subprocess.Popen] = []
    hub.fail("POST .*/preupload/", call=lambda: processes[0].send_signal(signal.SIGINT))
    processes.append(subprocess.Popen(waiting, env=environment, stderr=subprocess.PIPE, text=True))
    _, shown = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 130
    assert shown.splitlines()[-1] == "attnprune: interrupted"
    run("push", SIDECAR, REPO)
    assert set(hub.files(REPO)) == SENT


# --- the catalogue


def test_h1_bad_repository_names(run):
    run("push", "nosuch", REPO, code=2, part="no such folder")
    for name in ("a/b/c", "..", "u" * 200 + "/n", "a b/c", "u/n--m", "/n", "name", ""):
        run("push", SIDECAR, name, code=2, part="bad repo id")
    run("push", SIDECAR, "--", "--x", code=2, part="bad repo id")
    run("inspect", "a/b/c", code=2, part="no such file or folder")
    run("inspect", "u/n--m", code=2, part="bad repo id")


def test_h2_no_token_or_a_bad_one(hub, run):
    run("push", SIDECAR, REPO, code=2, part="not logged in", token=None)
    run("push", SIDECAR, REPO, code=2, part="not logged in", token=CANARY + "x")
    run("push", SIDECAR, REPO, code=2, part="token is not valid", token="hf_ü")
    assert hub.repos == {}


def test_h3_a_token_that_may_only_read(pushed, run, tmp_path):
    before = pushed.commits(REPO)
    run("push", OTHER, "tester/new", "--base-model", REPO, code=1, part="no write access", token=READ)
    pushed.put(REPO, {"density.png": None})
    run("push", SIDECAR, REPO, code=1, part="no write access", token=READ)
    assert pushed.commits(REPO)[1:] == before
    assert "tester/new" not in pushed.repos


def test_h4_h5_no_such_repository_or_revision(hub, run):
    hub.create("tester/hidden", private=True)
    hub.create("tester/empty")
    run("inspect", REPO, code=2, part="not found on the Hub, or private")
    run("inspect", "tester/hidden", code=2, part="not found on the Hub, or private", token=None)
    run("inspect", "tester/empty", code=2, part="neither a sidecar nor a merged model")
    for command in ("inspect", "apply", "verify", "eval"):
        run(command, "tester/empty", "--revision", "v9", code=2, part="no revision 'v9'")
    run("inspect", "tester/empty", "--revision", "", code=2, part="--revision")
    run("inspect", SIDECAR, "--revision", "main", code=2, part="no revisions")


def test_h6_a_commit_in_between_is_not_overwritten(hub, run):
    hub.create(REPO)
    hub.fail(COMMIT, call=lambda: hub.put(REPO, {"theirs.txt": b"x"}))
    run("push", SIDECAR, REPO, code=1, part="somebody else changed it meanwhile")
    assert set(hub.files(REPO)) == {".gitattributes", "theirs.txt"}
    run("push", SIDECAR, REPO, code=2, part="holds other files")


def test_h7_a_busy_hub_is_asked_again(hub, run):
    hub.fail("GET /api/models/", times=2, status=429, headers={"Retry-After": "0"})
    hub.fail(COMMIT, status=503)
    done = run("push", SIDECAR, REPO)
    assert [done.stderr.count(f"retried {n} times") for n in (1, 2)] == [2, 1]
    assert set(hub.files(REPO)) == SENT
    assert len(hub.commits(REPO)) == 3


def test_h8_a_failed_commit_changes_nothing_and_is_repeated(hub, run):
    hub.fail(COMMIT, status=500)
    run("push", SIDECAR, REPO, code=1, part="safe to repeat")
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.log.clear()
    run("push", SIDECAR, REPO)
    assert set(hub.files(REPO)) == SENT
    assert hub.log.matching("^PUT") == []  # the large files were there already


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("GET /api/models/", {"status": 500}),
        ("GET /api/models/", {"kind": "drop"}),
        ("POST /api/repos/create", {"status": 500}),
        ("POST /api/repos/create", {"kind": "drop"}),  # created, but the answer is lost
        ("POST .*/preupload/", {"status": 400}),
        ("POST .*/objects/batch", {"status": 400}),
        ("PUT /", {"status": 400}),
        (COMMIT, {"status": 500}),
        (COMMIT, {"kind": "drop"}),  # committed, but the answer is lost
        (COMMIT, {"kind": "garbage"}),
    ],
)
def test_a_push_that_failed_at_any_step_is_completed_by_the_next(hub, run, step, fault):
    hub.fail(step, **fault)
    run("push", SIDECAR, REPO, code=1)
    if REPO in hub.repos:
        assert set(hub.files(REPO)) in ({".gitattributes"}, SENT - {"README.md"})  # all of a commit or nothing
    run("push", SIDECAR, REPO)
    assert set(hub.files(REPO)) == SENT
    run("inspect", REPO)


def test_a_lost_card_is_written_by_the_next_push(hub, run):
    def second_commit():
        hub.fail(COMMIT, status=500)

    hub.fail(COMMIT, call=second_commit)
    run("push", SIDECAR, REPO, code=1, part="safe to repeat")
    assert set(hub.files(REPO)) == SENT - {"README.md"}
    run("push", SIDECAR, REPO)
    assert set(hub.files(REPO)) == SENT


def test_a_file_that_arrived_otherwise_is_noticed(hub, run):
    def swap():
        hub.fail("GET /api/models/.*/revision/", call=lambda: hub.repos[REPO].at("main").files.pop("gates.safetensors"))

    hub.fail(COMMIT, call=swap)
    run("push", SIDECAR, REPO, code=1, part="gates.safetensors on the Hub is not what was sent")


@pytest.mark.parametrize("kind", ["drop", "short"])
def test_h9_a_download_that_breaks_off(pushed, run, kind):
    fault = pushed.fail(f"{RESOLVE}gates", times=math.inf, kind=kind)
    run("inspect", REPO, code=1)
    fault.times = 0
    run("inspect", REPO)


def test_h10_a_damaged_download_is_not_kept(pushed, run):
    for name in ("attnprune.json", "gates.safetensors"):
        pushed.fail(f"GET /.*/resolve/.*{name}", kind="corrupt")
        run("inspect", REPO, code=1, part=f"damaged download of {name}")
    run("inspect", REPO)


def test_h11_offline(pushed, run):
    run("inspect", REPO, code=1, part="offline, and not in the cache", HF_HUB_OFFLINE="1")
    run("inspect", REPO, code=1, part="cannot be reached", HF_ENDPOINT="http://127.0.0.1:9")
    run("inspect", REPO)
    pushed.log.clear()
    run("inspect", REPO, HF_HUB_OFFLINE="1")
    run("apply", REPO, code=1, part="adapter", HF_HUB_OFFLINE="1")
    assert pushed.log == []
    run("apply", REPO)
    for command in (("apply", REPO), ("diff", REPO, SIDECAR), ("eval", REPO, "--data", "task")):
        run(*command, HF_HUB_OFFLINE="1")


def test_h12_only_listed_files_are_sent(hub, run, tmp_path):
    folder = shutil.copytree(SIDECAR, tmp_path / "sidecar")
    (folder / ".env").write_text("SECRET=1")
    (folder / "training_args.bin").write_bytes(b"\x80\x02.")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[remote]")
    (folder / "leak.txt").symlink_to("/etc/passwd")
    run("push", folder, REPO)
    assert set(hub.files(REPO)) == SENT
    (folder / "metrics.jsonl").symlink_to("/etc/passwd")
    run("push", folder, REPO, code=2, part="link leaves the folder")


def test_the_damage_of_a_sidecar_travels_with_it(hub, run, tmp_path):
    sidecar = open_sidecar(shutil.copytree(SIDECAR, tmp_path / "sidecar"))
    heads = sidecar.manifest.gate.heads
    names = {"head_teacher_error": 0.1, "head_student_error": 0.2, "head_kl_patched": None, "head_kl_open": None}
    lists = [{name: [value] * count for name, value in names.items()} for count in heads]
    layers = [
        {"teacher_error": 0.1, "student_error": 0.2, "kl_patched": 0.3, "kl_open": 0.4, "loss_open": 3, **one}
        for one in lists
    ]
    facts = {"created_by": "attnprune", "data": "text.txt", "data_sha256": "0" * 64, "seq_len": 16, "tokens": 15}
    numbers = {"loss": 3.5, "base_loss": 3.0, "kl": 0.5, "layers": layers}
    write_damage(sidecar, Damage.model_validate({**facts, **numbers, "files": fingerprints(sidecar)}))
    run("push", sidecar.path, REPO)
    assert set(hub.files(REPO)) == SENT | {"damage.json"}
    shown = json.loads(run("inspect", REPO, "--damage", "--json").stdout)
    assert shown["damage"]["kl"] == 0.5
    (sidecar.path / "damage.json").write_text("{")
    before = hub.commits(REPO)
    run("push", sidecar.path, REPO, code=2, part="damage.json: not valid JSON")
    assert hub.commits(REPO) == before


def test_h13_another_model_is_replaced_only_on_demand(pushed, run):
    pushed.put("someone/base", {"config.json": b"{}"})
    other = ("push", OTHER, REPO, "--base-model", "someone/base")
    before = pushed.commits(REPO)
    run(*other, code=2, part="holds a sparse model of another base")
    assert pushed.commits(REPO) == before
    run(*other, "--replace")
    assert set(pushed.files(REPO)) == {
        ".gitattributes", "README.md", "density.png", "attnprune.json", "gates.safetensors", "delta.safetensors"
    }  # fmt: skip
    run("push", SIDECAR, "someone/base", code=2, part="holds other files, and no sparse model")


@pytest.fixture
def runs(hub, run, tmp_path):
    """A repository with one run, a note and a card by hand, and the folders of it and of another run on its base."""
    base = save_tiny_llama(tmp_path / "base")
    hub.put("someone/base", {"config.json": b"{}"})
    one, other = (save_sidecar(tmp_path / name, base, "delta", seed).path for seed, name in enumerate(("one", "other")))
    run("push", one, REPO, "--base-model", "someone/base")
    hub.put(REPO, {"notes.md": b"kept", "README.md": b"# Mine"})
    return one, other


def test_another_run_on_the_same_base_is_replaced_only_on_demand(hub, run, runs):
    one, other = runs
    before, files = hub.commits(REPO), hub.files(REPO)
    hub.log.clear()
    for more in (("--dry-run",), ("--create-pr",)):
        shown = run(
            "push", other, REPO, "--base-model", "someone/base", *more, code=2,
            part=f"{REPO}: holds another sparse model of this base (--replace replaces its files)", COLUMNS="200",
        )  # fmt: skip
        told = " ".join(shown.stderr.split())
        was, now = (json.loads((folder / "attnprune.json").read_text())["result"] for folder in runs)
        assert f"replaces another sparse model of this base: {_outcome(was)}" in told
        assert f"by a sidecar: {_outcome(now)}" in told
        for name in ("gates.safetensors", "delta.safetensors"):
            there = size(len(files[name]))
            assert f"changed {name} ({there} replaced by {there})" in told
    assert writes(hub) == []
    assert hub.commits(REPO) == before
    planned = run("push", other, REPO, "--base-model", "someone/base", "--replace", "--dry-run", "--json").stdout
    plan = json.loads(planned)
    assert plan["replaced"] == {"what": "another sparse model of this base", "result": _facts(was)}
    assert plan["result"] == _facts(now)
    assert plan["files"]["gates.safetensors"]["size_there"] == len(files["gates.safetensors"])
    assert writes(hub) == []
    run("push", other, REPO, "--base-model", "someone/base", "--replace")
    assert hub.files(REPO)["delta.safetensors"] == (other / "delta.safetensors").read_bytes()
    assert hub.files(REPO)["notes.md"] == b"kept"
    assert hub.files(REPO)["README.md"] == b"# Mine"
    run("push", other, REPO, "--base-model", "someone/base")
    run("push", one, REPO, "--base-model", "someone/base", code=2, part="holds another sparse model of this base")


def test_the_same_artefact_is_pushed_again_without_a_flag(hub, run, runs):
    one, _ = runs
    manifest = json.loads((one / "attnprune.json").read_text())
    (one / "attnprune.json").write_text(json.dumps(manifest | {"created_by": "attnprune 9.9"}))  # not what it computes
    facts = json.loads(run("push", one, REPO, "--base-model", "someone/base", "--json").stdout)
    assert facts["replaced"] is None
    assert [name for name, file in facts["files"].items() if file["state"] != "unchanged"] == ["attnprune.json"]


def _facts(result):
    return {key: result[key] for key in ("density", "loss", "seq_len", "steps", "seed")}


def _outcome(result):
    measured = f"density {percent(result['density'])}, loss {result['loss']:.4f} at T = {result['seq_len']}"
    return f"{measured}, {result['steps']} steps, seed {result['seed']}"


def test_another_merged_run_is_replaced_only_on_demand(hub, run, runs, tmp_path):
    for folder in runs:
        model, tokenizer = loading.load(folder, str(tmp_path / "base"))
        write_merged(model, tokenizer, open_sidecar(folder), tmp_path / f"merged-{folder.name}", same_dtype=True)
    push = partial(run, "push", "--base-model", "someone/base")
    push("merged-one", "tester/merged")
    before = hub.files("tester/merged")
    push("merged-other", "tester/merged", code=2, part="tester/merged: holds another sparse model of this base")
    assert hub.files("tester/merged") == before
    push("merged-other", "tester/merged", "--replace")
    assert hub.files("tester/merged")["model.safetensors"] != before["model.safetensors"]
    push("merged-other", "tester/merged", part="nothing to send")


def test_the_same_merged_model_with_other_tokenizer_files_needs_no_replace(hub, run, runs, tmp_path):
    model, tokenizer = loading.load(runs[0], str(tmp_path / "base"))
    push = partial(run, "push", "--base-model", "someone/base")
    for name, template in (("first", None), ("again", "{{ messages[0].content }}")):
        tokenizer.chat_template = template
        write_merged(model, tokenizer, open_sidecar(runs[0]), tmp_path / name, same_dtype=True)
        push(name, "tester/merged")
    assert "chat_template.jinja" in hub.files("tester/merged")


def test_sigterm_during_the_upload_of_a_merged_model_leaves_nothing(hub, home, tmp_path):
    (scratch := tmp_path / "tmp").mkdir()
    environment = os.environ | hub.environment(home, CANARY) | {"TMPDIR": str(scratch)}
    processes: list[subprocess.Popen] = []
    seen = []

    def interrupt():
        seen.extend(path.name for path in scratch.rglob("model.safetensors"))
        processes[0].send_signal(signal.SIGTERM)

    hub.fail("POST .*/preupload/", call=interrupt)
    command = [sys.executable, "-m", "attnprune", "push", str(SIDECAR), REPO, "--merged"]
    processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    _, shown = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 143
    assert shown.splitlines()[-1] == "attnprune: interrupted"
    assert seen == ["model.safetensors"]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("kind", ["html", "garbage"])
def test_h14_an_answer_that_is_none(pushed, run, kind):
    fault = pushed.fail(INFO, times=math.inf, kind=kind)
    run("inspect", REPO, code=1, part="unexpected answer from the Hub")
    run("push", SIDECAR, REPO, code=1, part="unexpected answer from the Hub")
    fault.times = 0
    pushed.fail(f"{RESOLVE}gates", times=math.inf, kind=kind)
    run("inspect", REPO, code=1)


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "C:\\x", "a\\..\\x"])
def test_h15_a_bad_file_name_in_the_tree(pushed, run, tmp_path, name):
    pushed.put(REPO, {name: b"x"})
    run("inspect", REPO, code=2, part="bad file name")
    run("push", SIDECAR, REPO, code=2, part="bad file name")
    assert pushed.log.matching("/resolve/") == []


@pytest.mark.parametrize(
    ("name", "part"),
    [("x.py", "refused"), ("a/b/x.PKL", "refused"), ("custom_generate/generate.py", "refused"),
     ("adapter_config.json", "without the gates")],
)  # fmt: skip
def test_code_in_a_repository_is_refused_before_anything_is_fetched(pushed, run, name, part):
    pushed.put(REPO, {name: b"{}"})
    run("inspect", REPO, code=2, part=part)
    assert pushed.log.matching("/resolve/") == []


def test_a_repository_whose_files_are_not_those_of_its_manifest(pushed, run):
    pushed.put(REPO, {"adapter/adapter_model.safetensors": b"x"})
    run("inspect", REPO, code=2, part="adapter_model.safetensors is damaged")
    pushed.put(REPO, {"adapter/adapter_model.safetensors": None})
    run("inspect", REPO, code=2, part="adapter_model.safetensors is missing")
    pushed.put(REPO, {"attnprune.json": b"x" * (format.MAX_JSON_BYTES + 1)})
    run("inspect", REPO, code=2, part="larger than 1 MiB")
    assert pushed.log.sent("/resolve/") < 2 * len((SIDECAR / "attnprune.json").read_bytes())


def test_b3_a_base_at_a_newer_revision(hub, run, tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    save_sidecar(tmp_path / "sidecar", base)
    first = hub.put("someone/base", {p.name: p.read_bytes() for p in base.iterdir()})
    run("push", tmp_path / "sidecar", REPO, "--base-model", "someone/base")
    newer = save_tiny_llama(tmp_path / "newer", seed=1)
    hub.put("someone/base", {p.name: p.read_bytes() for p in newer.iterdir()})
    run("apply", REPO)  # takes the revision that the manifest names
    run("apply", "someone/base", REPO, code=2, part=f"revision {first}")


# --- what loads


def test_inspect_fetches_no_weights(pushed, run):
    shown = json.loads(run("inspect", REPO, "--json").stdout)
    assert shown["manifest"] == json.loads((SIDECAR / "attnprune.json").read_text())
    assert {r.path.split("/")[-1] for r in pushed.log.matching("^GET .*/resolve/")} == {
        "attnprune.json", "gates.safetensors"
    }  # fmt: skip
    assert f"{REPO} @ {pushed.commits(REPO)[0].sha[:12]}" in run("inspect", REPO).stdout


def test_a_base_at_a_revision_and_offline(hub, run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The gate opens when the score is above zero. " * 40)
    bases = [save_tiny_llama(tmp_path / f"base-{seed}", seed=seed) for seed in (0, 1)]
    first, second = (hub.put("someone/base", {p.name: p.read_bytes() for p in base.iterdir()}) for base in bases)
    command = ("eval", "someone/base", "--data", text, "--json")
    losses = [json.loads(run(*command, "--revision", r).stdout)["reports"][0]["loss"] for r in (first, second)]
    assert losses[0] != losses[1]
    assert json.loads(run(*command).stdout)["reports"][0]["loss"] == losses[1]
    assert json.loads(run(*command, HF_HUB_OFFLINE="1").stdout)["reports"][0]["loss"] == losses[1]


def test_a_link_out_of_the_cache_is_not_followed(pushed, run, home, tmp_path):
    run("inspect", REPO)
    (tmp_path / "victim").write_text("mine")
    (gates,) = (home / "hub").glob("models--*/snapshots/*/gates.safetensors")
    gates.unlink()
    gates.symlink_to(tmp_path / "victim")
    run("inspect", REPO, code=1, part="damaged download of gates.safetensors")
    assert (tmp_path / "victim").read_text() == "mine"
    run("inspect", REPO)


def test_what_nobody_could_load_is_not_pushed(hub, run, tmp_path):
    run("push", SIDECAR, REPO)
    hub.put(REPO, {"x.py": b""})
    run("push", SIDECAR, REPO, code=2, part="x.py: pickle or code")
    run("apply", SIDECAR, "--merge", "merged")
    code = tmp_path / "merged" / format.CODE_FILE
    code.write_text(code.read_text() + "# mine\n")
    run("push", "merged", "tester/merged", code=2, part="code differs")
    assert "tester/merged" not in hub.repos


def test_every_command_takes_a_repository(pushed, run):
    commit = pushed.commits(REPO)[1].sha
    run("verify", REPO, "--revision", commit, part="verified")
    run("apply", REPO, "--merge", "merged")
    run("eval", REPO, "--data", "task", "--json")
    run("diff", REPO, SIDECAR, "--json")
    run("push", "merged", "tester/merged")
    run("verify", "tester/merged", part="verified")
    run("apply", "tester/merged", part="reproduced")
    run("apply", "tester/merged", "--merge", "again", code=2, part="merged already")
    pushed.log.clear()
    run("inspect", "tester/merged", part="matches this release")
    assert "model.safetensors" not in {r.path.split("/")[-1] for r in pushed.log}


def test_a_merged_model_of_a_local_base_is_pushed_and_says_what_is_known_of_it(hub, run, tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    sidecar = save_sidecar(tmp_path / "sidecar", base, "lora")
    run("push", sidecar.path, REPO, code=2, part="made from a local folder")
    run("push", sidecar.path, REPO, "--merged", "--base", base)
    card = hub.files(REPO)["README.md"].decode()
    about = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in about
    assert "A llama model from a local folder, whose name on the Hub was not given" in card
    assert sidecar.manifest.base.content[:16] in card
    assert str(tmp_path) not in card
    run("verify", REPO, part="verified")
    hub.put("someone/base", {"config.json": b"{}"})
    run("push", sidecar.path, REPO, "--merged", "--base", base, "--base-model", "someone/base")
    card = hub.files(REPO)["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "someone/base"
