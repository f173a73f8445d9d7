"""The notebooks run from the first cell to the last, on the bundled model, in a folder of their own."""

from __future__ import annotations

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.helpers.command import ENVIRONMENT
from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def outputs(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_to_the_end(file, tmp_path):
    book = nbformat.read(file, as_version=4)
    manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=str(tmp_path / "kernel"))
    client = NotebookClient(book, km=manager, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(cleanup_kc=True, env=ENVIRONMENT)  # ends the kernel, whose one thread leaves room for other tests
    shown = [output for output in outputs(book) if output.output_type in ("execute_result", "display_data")]
    assert any("text/html" in output.data for output in shown)
    assert not [output for output in outputs(book) if output.output_type == "error"]
    noise = [output.text for output in outputs(book) if output.get("name") == "stderr"]
    assert [text for text in noise if "TqdmWarning: IProgress" not in text] == []  # tqdm, where Jupyter lacks widgets


def test_they_are_committed_without_outputs():
    assert [file.stem for file in NOTEBOOKS] == ["1_sparsify_and_look", "2_trace_and_intervene", "3_circuits"]
    for file in NOTEBOOKS:
        assert not outputs(nbformat.read(file, as_version=4))
