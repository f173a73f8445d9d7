"""Shared fixtures: one torch thread, seeded tests, a quiet and offline transformers, tiny random models."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Triton reads this when it is imported, which transformers does.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers
from transformers.utils import logging as transformers_logging

from tests.helpers.factory import spread

if threading.current_thread() is threading.main_thread():
    # A suite in the background ignores Ctrl-C, under nohup a hang-up, and so would processes that tests send one to.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


# The files that take longest begin first, so that no process is left with one of them at the end.
LONGEST = ("test_round_trip.py", "test_real_model.py", "test_scripts.py", "test_catalogue.py", "test_hub.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """Runs collect garbage, which takes a quarter of a second among all that tests import: that is never garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # or extensions report at the end what is left of theirs


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """Factory of random Llama models: 3 layers, 4 heads on 2 key/value heads, 97 tokens."""

    def make(**options):
        defaults = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        return spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(**defaults | options)))

    return make


@pytest.fixture
def tokens():
    """Factory of random token ids [rows, length] without the padding token 0."""

    def make(rows, length, vocabulary=97):
        return torch.randint(1, vocabulary, (rows, length))

    return make


@pytest.fixture
def as_nobody():
    """A public folder and a switch to a user who may not read everything (root may)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)

        def switch():
            if os.geteuid() == 0:
                os.seteuid(65534)

        uid = os.geteuid()
        yield folder, switch
        os.seteuid(uid)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A Python in a virtual environment that has transformers and peft, but not attnprune."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # A path listed here is searched for packages, but its own .pth files (editable installs) are not followed.
    (Path(site) / "packages.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")

    def run(program: str, *, timeout: float = 300, **variables: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HOME": str(folder / "home")}
        environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"} | variables
        check = "import importlib.util as u; assert u.find_spec('attnprune') is None\n"
        done = subprocess.run(
            [python, "-c", check + program], cwd=folder, env=environment, capture_output=True, text=True,
            timeout=timeout, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
