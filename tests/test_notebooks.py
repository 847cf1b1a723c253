"""Conventions of every notebook; the players, pictures and progress that notebooks use; the quick start runs."""

from __future__ import annotations

import ast
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metis_lib import audio, notebook
from metis_lib.models.masked import MaskedTrace

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted([*ROOT.glob("eval/*.ipynb"), *ROOT.glob("notebooks/*.ipynb")])
MAX_LINES, MAX_CELL = 150, 30


def code_cells(path: Path) -> list[tuple[str, dict[str, Any]]]:
    cells = json.loads(path.read_text())["cells"]
    return [("".join(c["source"]), c) for c in cells if c["cell_type"] == "code"]


def problems(document: dict[str, Any]) -> list[str]:
    """What a notebook does against the conventions of this repository."""
    found: list[str] = []
    if document["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    sources = ["".join(cell["source"]) for cell in document["cells"]]
    code = [(s, cell) for s, cell in zip(sources, document["cells"], strict=True) if cell["cell_type"] == "code"]
    lengths = [len(source.splitlines()) for source, _ in code]
    if sum(lengths) > MAX_LINES:
        found.append(f"more than {MAX_LINES} lines of code")
    if max(lengths) > MAX_CELL:
        found.append(f"a cell of more than {MAX_CELL} lines")
    if any(cell["outputs"] or cell["execution_count"] is not None for _, cell in code):
        found.append("stored output")
    trees = [ast.parse("\n".join(x for x in source.splitlines() if not x.startswith(("%", "!")))) for source, _ in code]
    if any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for tree in trees for node in ast.walk(tree)):
        found.append("functions belong into the library")
    tagged = [source for source, cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        found.append("there is not exactly one parameters cell")
    for statement in (statement for source in tagged for statement in ast.parse(source).body):
        try:
            ast.literal_eval(statement.value)  # type: ignore[attr-defined]
            plain = isinstance(statement, (ast.Assign, ast.AnnAssign))
        except (ValueError, AttributeError):
            plain = False
        if not plain:
            found.append(f"parameters cell: {ast.unparse(statement)!r} is not a literal")
    if not sources[0].startswith("# "):
        found.append("it does not begin with a title")
    found += [f"the first cell lacks **{w}**" for w in OPENING if f"**{w}**" not in sources[0]]
    if "What this produced" not in "".join(sources[-2:]):
        found.append("it does not end with 'What this produced'")
    if re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/", "".join(sources)):
        found.append("it names a path of somebody's machine")
    return found


OPENING = ("Inputs", "Outputs", "Time", "Paper")


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_conventions(path: Path) -> None:
    assert problems(json.loads(path.read_text())) == []


def test_the_task_notebooks_exist() -> None:
    assert {"codec.ipynb", "se.ipynb", "tts.ipynb", "00_quickstart.ipynb"} <= {path.name for path in NOTEBOOKS}


def code_cell(source: str, *tags: str, outputs: Any = ()) -> dict[str, Any]:
    cell = {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}}
    return cell | {"execution_count": None, "outputs": list(outputs)}


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ([], None),
        ([code_cell("a = 1\ntwice = 2 * a", "parameters")], "is not a literal"),
        ([code_cell("import os", "parameters")], "is not a literal"),
        ([code_cell("a = 1", "parameters"), code_cell("b = 2", "parameters")], "exactly one parameters cell"),
        ([code_cell("x = 1\n" * 31)], "more than 30 lines"),
        ([code_cell("x = 1\n" * 26)] * 6, "more than 150 lines"),
        ([code_cell("1", outputs=[{"output_type": "stream"}])], "stored output"),
        ([code_cell("%time\ndef f(): pass")], "belong into the library"),
        ([code_cell("open('/home/me/x.wav')")], "somebody's machine"),
    ],
)
def test_the_checker_finds_what_is_wrong(extra: list[dict[str, Any]], problem: str | None) -> None:
    title = {"cell_type": "markdown", "metadata": {}, "source": "# T **Inputs** **Outputs** **Time** **Paper**"}
    last = {"cell_type": "markdown", "metadata": {}, "source": "## What this produced"}
    good = [] if any(cell["metadata"]["tags"] for cell in extra) else [code_cell("a = 1", "parameters")]
    found = problems({"metadata": {"kernelspec": {"name": "python3"}}, "cells": [title, *good, *extra, last]})
    assert found == [] if problem is None else any(problem in one for one in found)
    bare = problems({"metadata": {"kernelspec": {"name": "conda-me"}}, "cells": [code_cell("a = 1", "parameters")]})
    assert len(bare) == 3 + len(OPENING)


def tone(seconds: float, level: float) -> torch.Tensor:
    return level * torch.sin(2 * torch.pi * 220 * torch.arange(int(seconds * 24_000)) / 24_000)


def test_player_keeps_the_level_and_cuts_long_clips() -> None:
    import soundfile

    for level in (0.02, 0.5):
        data = re.search(r"base64,([^\"]+)", notebook.player_html(tone(1.0, level)))
        assert data
        wav, rate = soundfile.read(io.BytesIO(base64.b64decode(data[1])))
        assert np.abs(wav[rate // 4 : -rate // 4]).max() == pytest.approx(level, rel=0.1)
    long = notebook.player_html(audio.Speech(tone(31.0, 0.1), 24_000), "<b>")
    assert "first 30 s of 31 s" in long and "<b>" not in long


def test_listening_table_escapes_text_and_plays_recordings(tmp_path: Path) -> None:
    audio.write(tmp_path / "a.wav", tone(0.5, 0.1), 24_000)
    table = notebook.listening_table([{"text": "<i>", "one": tmp_path / "a.wav"}, {"text": "x", "two": None}]).data
    assert table.count("<audio") == 1 and table.count("<tr>") == 3 and "<i>" not in table


def test_log_mel_puts_a_tone_into_its_band() -> None:
    mel = notebook.log_mel(tone(1.0, 0.3), bands=80)
    assert mel.shape == (80, 100) and mel.max() == 0.0 and mel.min() == -80.0
    low = mel.mean(axis=1).argmax()
    high = notebook.log_mel(torch.sin(2 * torch.pi * 4000 * torch.arange(24_000) / 24_000)).mean(axis=1).argmax()
    assert low < 10 < 40 < high


def test_token_grid_shows_the_step_of_every_decision() -> None:
    mask = 99
    history = np.array([[mask, 5, mask], [mask, 5, 7], [3, 5, 7]])
    expected = [[np.nan, 0, np.nan], [np.nan, 0, 1], [2, 0, 1]]
    masks = torch.from_numpy(history == mask)[:, None]
    trace = MaskedTrace(torch.tensor([[3, 5, 7]]), torch.zeros(3, 1, 3), masks)
    for figure in (notebook.token_grid(history[:, None], mask), notebook.token_grid(trace)):
        shown = figure.axes[0].images[0].get_array()
        np.testing.assert_array_equal(np.ma.filled(shown, np.nan), expected)


def test_spectrograms_share_their_axis() -> None:
    figure = notebook.spectrograms({"one": tone(1.0, 0.1), "two": tone(0.5, 0.1)})
    first, second = figure.axes[:2]
    assert (first.get_title(), second.get_title()) == ("one", "two")
    assert first.get_xlim() == second.get_xlim() == pytest.approx((0.0, 1.0))


def test_progress_prints_few_lines_without_a_terminal(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("METIS_PLAIN_PROGRESS", "1")
    assert list(notebook.progress(list(range(200)), "work")) == list(range(200))
    assert capsys.readouterr().err.splitlines() == [f"work: {n}/200" for n in (50, 100, 150, 200)]


def test_produced_lists_files_with_hashes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / ".hidden").write_text("x")
    frame = notebook.produced(tmp_path)
    assert list(frame["file"]) == ["a.json"] and frame["sha256"][0].startswith("44136fa355b3678a")


@pytest.mark.notebooks
def test_the_quick_start_runs_on_random_weights(tmp_path: Path) -> None:
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


@pytest.mark.notebooks
@pytest.mark.training
def test_fine_tuning_runs_on_the_shipped_system(tmp_path: Path) -> None:
    from metis_lib.evaluation.runner import run_notebook

    executed, log = tmp_path / "executed.ipynb", tmp_path / "log"
    parameters = {"steps": 6, "frames": 600, "out": str(tmp_path / "out"), "device": "cpu"}
    assert run_notebook(ROOT / "notebooks" / "08_finetune.ipynb", executed, parameters, log) is None
    assert {"before.flac", "after.flac", "mine.jsonl"} <= {path.name for path in (tmp_path / "out").iterdir()}
    lines = [json.loads(x) for x in (tmp_path / "out/system/runs/se/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and lines[-1]["validation"]["with_condition"] > 0
    shown = [output for _, cell in code_cells(executed) for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    assert sum("<audio" in "".join(output.get("data", {}).get("text/html", "")) for output in shown) == 2


def test_curves_show_what_was_logged(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("METIS_PLAIN_PROGRESS", "1")
    lines = [{"step": n, "lr": 0.1, "seconds": 1.0, "loss": 5.0 / n, "frames": 9.0, "skipped": 0} for n in (1, 2, 3)]
    lines[-1]["validation"] = {"with_condition": 2.0, "without": 3.0}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, held_out = notebook.training_curves(tmp_path).axes
    assert training.lines[0].get_ydata().tolist() == [5.0, 2.5, 5.0 / 3] and held_out.get_title() == "held out"
    notebook.live_curves(tmp_path)("step 3")
    assert capsys.readouterr().out == "step 3\n"
