"""The players, pictures and progress that notebooks use; the notebooks themselves are tested in test_course.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metis_lib import audio, notebook
from metis_lib.errors import MetisError
from metis_lib.models.masked import MaskedTrace


def tone(seconds: float, level: float) -> torch.Tensor:
    return level * torch.sin(2 * torch.pi * 220 * torch.arange(int(seconds * 24_000)) / 24_000)


def test_a_kernel_that_starts_beside_its_notebook_finds_the_recipes() -> None:
    """JupyterLab and editors start it there, with nothing but the installed library in reach."""
    code = "from metis_lib import notebook; from recipes.testsets import of_recordings; from recipes.claims import arms"
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1] / "notebooks",
        env=bare,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


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
    expected = [[np.nan, 1, np.nan], [np.nan, 1, 2], [3, 1, 2]]
    masks = torch.from_numpy(history == mask)[:, None]
    trace = MaskedTrace(torch.tensor([[3, 5, 7]]), torch.zeros(3, 1, 3), masks)
    shown = notebook.token_grid(trace).axes[0].images[0].get_array()
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


def test_curves_show_what_was_logged(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("METIS_PLAIN_PROGRESS", "1")
    lines = [{"step": n, "lr": 0.1, "seconds": 1.0, "loss": 5.0 / n, "frames": 9.0, "skipped": 0} for n in (1, 2, 3)]
    lines[-1]["validation"] = {"with_condition": 2.0, "without": 3.0}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training, held_out = notebook.training_curves(tmp_path).axes
    assert training.lines[0].get_ydata().tolist() == [5.0, 2.5, 5.0 / 3] and held_out.get_title() == "held out"
    notebook.live_curves(tmp_path)("step 3")
    assert capsys.readouterr().out == "step 3\n"


def test_a_notebook_empties_only_what_it_made(tmp_path: Path, monkeypatch: Any) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    notebook.fresh(mine)  # empty: nothing to lose
    (mine / "made.txt").write_text("x")
    notebook.fresh(mine)
    assert not (mine / "made.txt").exists()
    (tmp_path / "speech.wav").write_bytes(b"precious")
    for folder in (tmp_path, tmp_path / "speech.wav"):
        with pytest.raises(MetisError, match="did not make"):
            notebook.fresh(folder)
    assert (tmp_path / "speech.wav").read_bytes() == b"precious"
    monkeypatch.setattr(notebook, "ROOT", tmp_path)
    runs = tmp_path / "results" / "runs"
    (runs / "another").mkdir(parents=True)
    with pytest.raises(MetisError, match="did not make"):
        notebook.fresh(runs)  # the folder of all notebooks is nobody's own
    (runs / "mine").mkdir()
    (runs / "mine" / "made.txt").write_text("x")
    notebook.fresh(runs / "mine")
    assert (runs / "another").is_dir() and not (runs / "mine" / "made.txt").exists()
