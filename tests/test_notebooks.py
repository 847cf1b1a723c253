"""Notebooks: thin, clean, and they run without anybody watching."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("eval/*.ipynb")])


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [("".join(c["source"]), c) for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_thin_and_holds_no_output(path):
    cells = code_cells(path)
    lengths = [len(source.splitlines()) for source, _ in cells]
    assert sum(lengths) <= 150 and max(lengths) <= 30
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for _, cell in cells)
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
    assert sum(source.count("def ") for source, _ in cells) == 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_says_what_it_is_and_takes_literals(path):
    opening = "".join(json.loads(path.read_text())["cells"][0]["source"])
    assert opening.startswith("# ")
    for word in ("**Inputs**", "**Outputs**", "**Time**", "**Paper**"):
        assert word in opening
    (parameters,) = [source for source, cell in code_cells(path) if "parameters" in cell["metadata"].get("tags", [])]
    for statement in ast.parse(parameters).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)


@pytest.mark.notebooks
def test_the_quick_start_runs_on_random_weights(tmp_path):
    from metis_lib.evaluation.runner import run_notebook

    folder = ROOT / "eval" / "testsets" / "human"
    parameters = {
        "model": "debug",
        "noisy": str(folder / "cmu-something-noisy.flac"),
        "clean": str(folder / "cmu-something.flac"),
        "prompt": str(folder / "cmu-forward.flac"),
        "prompt_text": "Go forward ten meters.",
        "text": "Hello there.",
        "out": str(tmp_path / "out"),
    }
    executed, log = tmp_path / "executed.ipynb", tmp_path / "log"
    assert run_notebook(ROOT / "notebooks" / "00_quickstart.ipynb", executed, parameters, log) is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["enhanced.flac", "spoken.flac"]
    shown = [output for _, cell in code_cells(executed) for output in cell["outputs"]]
    kinds = [kind for output in shown for kind in output.get("data", {})]
    assert kinds.count("image/png") == 5
    assert sum("<audio" in "".join(output.get("data", {}).get("text/html", "")) for output in shown) == 3
    assert "same seed, same samples: True" in "".join(output.get("text", [""])[0] for output in shown)
