"""The stand-in for the Hub, driven by the real huggingface_hub client in subprocesses."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.hub_server import READ, WRITE, HubServer

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

REPO = "tester/model"
CONFIG, WEIGHTS = b'{"model_type": "tiny"}' * 20, bytes(range(256)) * 40
PRELUDE = """
import json, os, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub import snapshot_download

constants.DOWNLOAD_CHUNK_SIZE = 1000  # so that an interrupted download has something to resume
repo, api, told, waits = "tester/model", HfApi(), {}, []
time.sleep = waits.append

def tell(name, call, *arguments, **options):
    waits.clear()
    try:
        told[name] = call(*arguments, **options)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        told[name] = [type(error).__name__, status] if status else type(error).__name__
    if waits:
        told[name] = {"told": told[name], "waits": [*waits]}

def commit(api=api, path="new.safetensors", content=b"new", **options):
    return api.create_commit(repo, [CommitOperationAdd(path, content)], commit_message="Add", **options).oid

def fetch(path, **options):
    return Path(hf_hub_download(repo, path, **options)).read_bytes().hex()
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def client(hub: HubServer, home: Path, code: str, token: str | None = WRITE) -> dict:
    """What a script told about the calls that it made with the real client."""
    command = [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(told, default=str))"]
    environment = os.environ | hub.environment(home, token)
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def request(url: str, **headers: str) -> tuple[int, bytes, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def test_a_folder_is_pushed_and_fetched(hub, tmp_path):
    files = {"README.md": b"---\nlicense: mit\n---\n", "model.safetensors": WEIGHTS, "sub/config.json": CONFIG}
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    told = client(hub, tmp_path, """
tell("name", lambda: api.whoami()["name"])
tell("create", api.create_repo, repo, private=True)
tell("create again", api.create_repo, repo)
tell("create anyhow", api.create_repo, repo, exist_ok=True)
tell("push", lambda: api.upload_folder(repo_id=repo, folder_path="folder", commit_message="First").oid)
tell("push again", lambda: api.upload_folder(repo_id=repo, folder_path="folder", commit_message="Second").oid)
tell("info", lambda: vars(api.model_info(repo, files_metadata=True).siblings[2]))
tell("tree", lambda: [entry.path for entry in api.list_repo_tree(repo, recursive=True)])
tell("top", lambda: [entry.path for entry in api.list_repo_tree(repo)])
tell("paths", lambda: [(entry.path, entry.size) for entry in api.get_paths_info(repo, ["sub/config.json", "none"])])
tell("fetch", lambda: sorted(p.name for p in Path(snapshot_download(repo)).rglob("*")))
tell("weights", fetch, "model.safetensors")
tell("none", fetch, "none")
tell("delete", lambda: bool(api.create_commit(repo, [CommitOperationDelete("sub/")], commit_message="Delete")))
tell("delete again", lambda: api.create_commit(repo, [CommitOperationDelete("sub/")], commit_message="Delete"))
""")  # fmt: skip
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert told["name"] == hub.user
    assert told["create"] == told["create anyhow"] == f"{hub.url}/{REPO}"
    assert told["create again"] == ["HfHubHTTPError", 409]
    assert told["push"] == told["push again"]
    assert told["info"]["rfilename"] == "model.safetensors"
    assert (told["info"]["size"], told["info"]["lfs"]["sha256"]) == (len(WEIGHTS), digest)
    assert told["tree"] == ["sub", ".gitattributes", "README.md", "model.safetensors", "sub/config.json"]
    assert told["top"] == ["sub", ".gitattributes", "README.md", "model.safetensors"]
    assert told["paths"] == [["sub/config.json", len(CONFIG)]]
    assert told["fetch"] == [".gitattributes", "README.md", "config.json", "model.safetensors", "sub"]
    assert bytes.fromhex(told["weights"]) == WEIGHTS
    assert told["none"] == told["delete again"] == ["RemoteEntryNotFoundError", 404]
    assert told["delete"] is True
    assert [commit.title for commit in hub.commits(REPO)] == ["Delete", "First", "initial commit"]
    pushed = {name: data for name, data in hub.files(REPO, told["push"]).items() if name != ".gitattributes"}
    assert pushed == files
    assert hub.log.received(f"PUT /lfs/{digest}") == len(WEIGHTS)  # once, without a token
    assert [record.authorized for record in hub.log.matching("PUT")] == [False]
    assert hub.log.sent("GET .*/resolve/.*/model.safetensors") == len(WEIGHTS)
    assert all("hf_hub/" in record.agent for record in hub.log.matching("/resolve/"))
    assert {record.status for record in hub.log.matching("/resolve/")} == {200, 404}
    hub.log.clear()
    assert hub.log.sent() == 0


def test_branches_tags_and_pull_requests(hub, tmp_path):
    first = hub.put(REPO, {"config.json": CONFIG})
    told = client(hub, tmp_path, """
first = api.model_info(repo).sha
tell("branch", api.create_branch, repo, branch="dev/one")
tell("branch again", api.create_branch, repo, branch="dev/one")
tell("branch anyhow", api.create_branch, repo, branch="dev/one", exist_ok=True)
tell("on branch", commit, path="branch.txt", revision="dev/one")
tell("tag", api.create_tag, repo, tag="v1", revision="dev/one")
tell("tag again", api.create_tag, repo, tag="v1")
tell("on tag", commit, revision="v1")
tell("current", commit, path="main.txt", parent_commit=first)
tell("stale", commit, parent_commit=first)
tell("pull", lambda: vars(api.create_commit(repo, [CommitOperationAdd("pull.txt", b"1")], commit_message="Pull",
                                            create_pr=True, parent_commit=first)))
tell("on pull", commit, path="more.txt", revision="refs/pr/1")
for revision in ("main", first, "v1", "dev/one", "refs/pr/1", "v2"):
    tell(revision, lambda: [file.rfilename for file in api.model_info(repo, revision=revision).siblings])
tell("snapshot", lambda: sorted(os.listdir(snapshot_download(repo, revision="refs/pr/1"))))
tell("fetch", fetch, "config.json", revision="v2")
refs = api.list_repo_refs(repo, include_pull_requests=True)
told["refs"] = {ref.ref: ref.target_commit for ref in refs.branches + refs.tags + refs.pull_requests}
""")  # fmt: skip
    base = [".gitattributes", "config.json"]
    assert told["branch again"] == told["tag again"] == ["HfHubHTTPError", 409]
    assert told["branch"] is told["branch anyhow"] is told["tag"] is None
    assert told["on tag"] == told["v2"] == told["fetch"] == ["RevisionNotFoundError", 404]
    assert told["stale"] == ["HfHubHTTPError", 412]
    assert (told["pull"]["pr_num"], told["pull"]["pr_revision"]) == (1, "refs/pr/1")
    assert told["main"] == [*base, "main.txt"]
    assert told[first] == base
    assert told["v1"] == told["dev/one"] == [".gitattributes", "branch.txt", "config.json"]
    assert told["refs/pr/1"] == told["snapshot"] == [*base, "more.txt", "pull.txt"]
    assert told["refs"] == {
        "refs/heads/main": told["current"],
        "refs/heads/dev/one": told["on branch"],
        "refs/tags/v1": told["on branch"],
        "refs/pr/1": told["on pull"],
    }
    history = [commit.sha for commit in hub.commits(REPO, "refs/pr/1")]
    assert history[:3] == [told["on pull"], told["pull"]["oid"], first]


def test_tokens_decide_who_sees_and_writes(hub, tmp_path):
    hub.create(REPO, private=True)
    hub.put(REPO, {"config.json": CONFIG})
    told = client(hub, tmp_path, """
for name, token in {"read": "hf_read", "bad": "hf_other", "none": False}.items():
    api = HfApi(token=token)
    tell(f"{name} whoami", lambda: api.whoami()["auth"]["accessToken"]["role"])
    tell(f"{name} info", lambda: api.model_info(repo).private)
    tell(f"{name} fetch", lambda: len(fetch("config.json", token=token, cache_dir=name)) // 2)
    tell(f"{name} create", api.create_repo, "tester/new")
    tell(f"{name} commit", commit, api)
    tell(f"{name} pull", commit, api, create_pr=True)
    tell(f"{name} tag", api.create_tag, repo, tag="v1")
tell("no repo", lambda: HfApi().model_info("tester/none"))
""")  # fmt: skip
    writes = ("create", "commit", "pull", "tag")
    assert told["read whoami"] == "read"
    assert told["read info"] is True
    assert told["read fetch"] == len(CONFIG)
    assert [told[f"read {call}"] for call in writes] == [["HfHubHTTPError", 403]] * 4
    assert {str(told[f"bad {call}"]) for call in ("whoami", "info", "fetch", *writes)} == {"['HfHubHTTPError', 401]"}
    assert told["none info"] == told["none fetch"] == told["none commit"] == ["RepositoryNotFoundError", 401]
    assert told["none create"] == ["HfHubHTTPError", 401]
    assert told["no repo"] == ["RepositoryNotFoundError", 404]
    assert list(hub.repos) == [REPO]
    assert len(hub.commits(REPO)) == 2


def test_statuses_in_place_of_answers(hub, tmp_path):
    """The client retries what it may repeat, and never a commit."""
    hub.put(REPO, {"config.json": CONFIG})
    once = [
        hub.fail("/preupload/", status=429, headers={"Retry-After": "0"}),
        hub.fail("/batch$", status=503),
        hub.fail("PUT /lfs/", status=500),
        hub.fail("/tree/", status=429, headers={"Retry-After": "3"}),
        hub.fail("GET .*/resolve/", status=429),
        hub.fail("HEAD .*/resolve/", status=503),
    ]
    told = client(hub, tmp_path, """
tell("commit", lambda: bool(commit()))
tell("tree", lambda: len(list(api.list_repo_tree(repo))))
tell("fetch", lambda: len(fetch("config.json")) // 2)
""")  # fmt: skip
    assert told["commit"] == {"told": True, "waits": [1, 1, 1]}
    assert told["tree"] == {"told": 3, "waits": [4]}
    assert told["fetch"] == {"told": len(CONFIG), "waits": [1]}
    assert [fault.times for fault in once] == [0] * 6

    hub.fail("/commit/", status=500)
    hub.fail("/commit/", status=412)
    hub.fail("/tree/", status=503, times=math.inf)
    told = client(hub, tmp_path, """
tell("500", commit, path="a.txt")
tell("412", commit, path="a.txt")
tell("info", lambda: api.model_info(repo).sha)
tell("tree", lambda: list(api.list_repo_tree(repo)))
""")  # fmt: skip
    assert told["500"] == ["HfHubHTTPError", 500]
    assert told["412"] == ["HfHubHTTPError", 412]
    assert told["info"] == hub.commits(REPO)[0].sha
    assert told["tree"] == {"told": ["HfHubHTTPError", 503], "waits": [1, 2, 4, 8, 8]}
    assert len(hub.log.matching("GET .*/tree/")) == 2 + 6
    assert "a.txt" not in hub.files(REPO)


def test_damaged_downloads(hub, tmp_path):
    names = ("drop", "lost", "short", "corrupt", "html", "garbage")
    contents = {f"{name}.bin": name[:1].encode() + WEIGHTS[1:] for name in names}  # the client caches by content
    hub.put(REPO, contents)
    for name in names:
        kind = "drop" if name == "lost" else name
        hub.fail(f"GET .*/resolve/.*{name}", times=math.inf if name == "lost" else 1, kind=kind)
    told = client(hub, tmp_path, "".join(f'tell("{name}", fetch, "{name}.bin")\n' for name in names))
    size, half = len(WEIGHTS), len(WEIGHTS) // 2
    assert told["drop"] == {"told": contents["drop.bin"].hex(), "waits": [1]}
    assert [(r.status, r.sent) for r in hub.log.matching("GET .*drop")] == [(200, half), (206, size - 5000)]
    assert told["lost"]["told"] == "RemoteProtocolError"
    assert {*told["lost"]["waits"]} == {1}
    corrupt = contents["corrupt.bin"]
    assert bytes.fromhex(told["corrupt"]) == corrupt[:half] + bytes([corrupt[half] ^ 1]) + corrupt[half + 1 :]
    assert told["short"] == told["html"] == told["garbage"] == "OSError"
    assert (hub.log.sent("GET .*corrupt"), hub.log.sent("GET .*short")) == (size, half)


def test_strange_answers_and_lost_ones(hub, tmp_path):
    hub.put(REPO, {"config.json": CONFIG})
    for kind in ("html", "garbage"):
        for pattern in ("whoami", f"GET /api/models/{REPO}$", "/tree/", "/preupload/", "/commit/"):
            hub.fail(pattern, kind=kind)
    calls = """
tell("whoami", api.whoami)
tell("info", api.model_info, repo)
tell("tree", lambda: list(api.list_repo_tree(repo)))
tell("preupload", commit, path="a.txt")
tell("commit", commit, path="a.txt")
"""
    told = client(hub, tmp_path, f"{calls}\nhtml, told = told, {{}}\n{calls}\ntold['html'] = html")
    assert {*told.pop("html").values(), *told.values()} == {"JSONDecodeError"}
    assert "a.txt" not in hub.files(REPO)

    hub.fail("/commit/", kind="drop")
    hub.fail("/refs", call=lambda: hub.put(REPO, {"other.txt": b"1"}, "Meanwhile"))
    told = client(hub, tmp_path, """
tell("lost", commit, path="a.txt")
parent = api.model_info(repo).sha
api.list_repo_refs(repo)
tell("meanwhile", commit, path="b.txt", parent_commit=parent)
""")  # fmt: skip
    assert told == {"lost": "RemoteProtocolError", "meanwhile": ["HfHubHTTPError", 412]}
    assert [commit.title for commit in hub.commits(REPO)] == ["Meanwhile", "Add", "Update", "initial commit"]


def test_hostile_paths_are_listed_but_not_written(hub, tmp_path):
    hub.put("tester/up", {"../../x": b"1"})
    hub.put("tester/root", {"/abs": b"1"})
    told = client(hub, tmp_path, """
for name in ("up", "root"):
    tell(name, api.list_repo_files, f"tester/{name}")
    tell(f"{name} snapshot", snapshot_download, f"tester/{name}")
""")  # fmt: skip
    assert "../../x" in told["up"]
    assert "/abs" in told["root"]
    assert told["up snapshot"] == told["root snapshot"] == "ValueError"
    assert not list(tmp_path.rglob("x"))


def test_ranges(hub):
    sha = hub.put(REPO, {"config.json": CONFIG})
    url = f"{hub.url}/{REPO}/resolve/{sha}/config.json"
    for given, expected in (("bytes=2-5", CONFIG[2:6]), ("bytes=400-", CONFIG[400:]), ("bytes=9-9999", CONFIG[9:])):
        status, body, headers = request(url, Range=given)
        assert (status, body) == (206, expected)
        assert headers["Content-Range"].endswith(f"/{len(CONFIG)}")
    assert request(url, Range=f"bytes={len(CONFIG)}-")[0] == 416
    assert request(url)[:2] == (200, CONFIG)


def test_put_files_and_errors(hub):
    hub.put(REPO, {"a": b"1", "b": b"2"})
    hub.repos[REPO].refs["refs/heads/dev"] = hub.put(REPO, {"a": None, "c": b"3"}, "Change")
    hub.put(REPO, {"d": b"4"}, revision="dev")
    assert {*hub.files(REPO)} == {".gitattributes", "b", "c"}
    assert {*hub.files(REPO, "dev")} == {".gitattributes", "b", "c", "d"}
    status, body, headers = request(f"{hub.url}/api/models/{REPO}/revision/a%0Ab%C3%A9")
    assert (status, headers["X-Error-Code"]) == (404, "RevisionNotFound")
    assert json.loads(body)["error"] == "Invalid rev id: a\nbé"
    assert request(f"{hub.url}/nothing/here")[0] == 404


def test_two_servers_and_clients_that_leave(hub, capfd):
    big = os.urandom(8 << 20)
    starts = (
        "GET /other/model/resolve/main/big.bin HTTP/1.1\r\n\r\n",
        "PUT /x HTTP/1.1\r\nContent-Length: 9\r\n\r\n1234",
        "PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        "GET /oth",
    )
    with HubServer("other") as other:
        other.put("other/model", {"big.bin": big})
        assert other.url != hub.url
        assert not hub.repos
        host = ("127.0.0.1", int(other.url.rsplit(":", 1)[1]))
        for start in starts:
            with socket.create_connection(host) as connection:
                connection.sendall(start.encode())
        assert request(f"{other.url}/other/model/resolve/main/big.bin")[1] == big
        assert json.loads(request(f"{other.url}/api/whoami-v2", Authorization=f"Bearer {READ}")[1])["name"] == "other"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(host)
    assert capfd.readouterr().err == ""
