"""The sixth task of the docs: one file, through training, generation and evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metis_lib.errors import MetisError
from metis_lib.evaluation.record import ROOT
from metis_lib.tasks import TASKS, Task, add, load
from tests.training_jobs import make_corpus

FILE = ROOT / "examples" / "declip.py"


def run(*lines: str, home: Path) -> str:
    """Python lines in a process that knows the task."""
    environment = {**os.environ, "METIS_TASKS": str(FILE), "METIS_HOME": str(home), "METIS_PLAIN_PROGRESS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_task_in_one_file_is_trained_generated_and_evaluated(tmp_path: Path) -> None:
    manifest = make_corpus(tmp_path / "corpus")
    assert len(FILE.read_text().splitlines()) <= 60
    system, tests, out = tmp_path / "system", tmp_path / "tests", tmp_path / "results"
    clip = tmp_path / "corpus" / "audio" / "9.wav"
    said = run(
        "import runpy, sys",
        f"sys.argv = ['declip.py', {str(tests)!r}]",
        f"runpy.run_path({str(FILE)!r}, run_name='__main__')",
        "from metis_lib import cli",
        f"assert not cli.main(['train', 'finetune', '--task', 'declip', '--data', {str(manifest)!r},"
        f" '--out', {str(system)!r}, '--steps', '3', '--frames', '300', '--lora', '4'])",
        f"assert not cli.main(['generate', 'declip', '--model', {str(system)!r}, '--input', {str(clip)!r},"
        f" '--output', {str(tmp_path / 'whole.wav')!r}])",
        "from metis_lib.evaluation import runner, systems",
        f"names = systems.systems_of('declip', {str(system)!r})",
        f"made = systems.produce(systems.load_items({str(tests)!r}, 'declip', 1), names[-1:], {str(out)!r},"
        f" maker=systems.Systems({str(system)!r}))",
        "import json",
        "notebook = runner.task_notebook('declip').name",
        "print(json.dumps([names, str(made[0].path), made[0].error, notebook]))",
        home=tmp_path / "home",
    )
    names, path, error, notebook = json.loads(said.splitlines()[-1])
    assert names[:4] == ["clean", "noisy", "resynthesis", "nsnet2"] and names[4] == str(system)
    assert error is None and Path(path).is_file() and notebook == "se.ipynb"
    assert (tmp_path / "whole.wav").stat().st_size > 10_000
    card = json.loads((system / "tasks" / "declip" / "config.json").read_text())["card"]
    assert card["scores"]["steps"] == 3


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (Task("se", False, False, True, like="se", simulate=print), "name of its own"),
        (Task("de clip", False, False, True, like="se", simulate=print), "identifier"),
        (Task("declip", False, False, True, like="tts", simulate=print), "like se, vc or tse"),
        (Task("declip", False, False, True, like="se"), "simulate"),
        (Task("declip", False, False, True, like="se", simulate=print), "before the pipeline"),
    ],
)
def test_bad_tasks_are_refused(new: Task, why: str) -> None:
    import metis_lib.pipeline  # noqa: F401

    with pytest.raises(MetisError, match=why):
        add(new)
    assert "declip" not in TASKS


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MetisError, match="nowhere.py"):
        load("nowhere.py")


def test_a_missing_file_ends_commands_in_one_line(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("METIS_TASKS", str(tmp_path / "gone.py"))
    found = subprocess.run([sys.executable, "-m", "metis_lib", "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "gone.py" in found.stderr


@pytest.mark.parametrize("named", [True, False])
def test_the_example_can_be_imported_wherever_it_is_named(named: bool) -> None:
    environment = {**os.environ, "METIS_TASKS": str(FILE) if named else ""}
    first = "from metis_lib import Metis" if named else "import examples.declip"
    call = f"{first}; import examples.declip; from metis_lib.pipeline import SOURCES; assert 'declip' in SOURCES"
    subprocess.run([sys.executable, "-c", call], env=environment, cwd=ROOT, check=True)
