"""The papermill runner: one kernel per task's notebook, then one summary, one record and one page.

Every kernel is a process of its own, which ends with this one; a failed notebook is kept with its error and
does not stop the others, but the run ends with an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report
from metis_lib.evaluation.systems import TASKS, check_systems, load_items, systems_of, testset_folder


class EvaluationFailed(MetisError):
    """Some notebooks failed; ``summary`` holds the tasks that were done."""

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


def task_notebook(task: str) -> Path:
    """The notebook of a task, in the checkout."""
    path = record.ROOT / "eval" / f"{task}.ipynb"
    if not path.is_file():
        raise MetisError(f"no notebook eval/{task}.ipynb; evaluation runs from a clone of the repository")
    return path


def run_notebook(notebook: Path, executed: Path, parameters: Mapping[str, Any], log: Path) -> str | None:
    """Execute a notebook in a kernel of its own; None, or the reason why it failed in one line.

    The executed copy goes to ``executed`` (with the error in it if it failed), what it printed to ``log``.

    Raises:
        MetisError: parameters that the notebook does not declare (papermill alone would only log them).
    """
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise MetisError(f"{notebook.name} has no parameter {', '.join(unknown)}; it knows {', '.join(known)}")
    executed.parent.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    partial, reason = executed.with_name(f".{executed.name}"), None
    with open(log, "w") as output, _environment_of_kernels():
        try:
            papermill.execute_notebook(
                record.relative(notebook),
                record.relative(partial),
                dict(parameters),
                kernel_name="python3",
                progress_bar=False,
                stdout_file=output,
                stderr_file=output,
            )
        except Exception as error:  # an error of a cell, or a kernel that died: the other notebooks go on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            output.write("\n".join(lines) + "\n")
            reason = lines[-1][:300]
    if partial.is_file():
        document = json.loads(partial.read_text())
        document["metadata"]["papermill"]["output_path"] = record.relative(executed)
        record.write_json(executed, document)
        partial.unlink()
    return reason


@contextlib.contextmanager
def _environment_of_kernels() -> Iterator[None]:
    """Kernels find this library and their own packages first, print progress in lines and spin no idle threads."""
    before = dict(os.environ)
    paths = [str(record.ROOT), *filter(None, [before.get("PYTHONPATH")])]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "METIS_PLAIN_PROGRESS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "OMP_WAIT_POLICY": before.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def evaluate(
    tasks: Sequence[str] = TASKS,
    systems: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    testset: str | Path = "human",
    out: str | Path = "results/evaluation",
    *,
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    checkpoint: str = "nano",
    device: str = "auto",
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Evaluate ``tasks`` and return ``{task: {system: {metric: {mean, ci95, n, n_failed, protocol}}}}``.

    Args:
        tasks: among ``codec``, ``se``, ``tts``.
        systems: names for every task, or a mapping from task to names; None: all of each task.
        testset: a folder with ``manifest.jsonl``, or a name under ``eval/testsets``.
        out: one run's folder: ``summary.json``, ``run.json``, ``index.html``, ``executed/<task>.ipynb``,
            ``logs/``, ``<task>/<system>/utterances.jsonl`` and ``audio/``.
        seeds: the model generates once for each.
        limit: only the first items of each task.
        checkpoint: name or folder of the system to evaluate; its row bears its name.
        allow_missing: accept utterances for which a system gave no audio (else the run fails).

    Raises:
        MetisError: bad arguments (before anything runs).
        EvaluationFailed: a notebook failed (after the others are done and everything is written).
    """
    started, folder = time.perf_counter(), Path(out)
    chosen: dict[str, list[str]] = {}
    for task in tasks:
        load_items(testset, task, limit)
        asked = systems.get(task) if isinstance(systems, Mapping) else systems
        chosen[task] = list(asked) if asked else systems_of(task, checkpoint)
        check_systems(task, chosen[task], checkpoint)
    if not chosen or not seeds or len(set(seeds)) < len(seeds):
        raise MetisError("name at least one task and one seed, each once")
    failures: dict[str, str] = {}
    for task, names in chosen.items():
        for old in ("summary.json", "run.json"):
            (folder / task / old).unlink(missing_ok=True)
        parameters: dict[str, Any] = {"task": task, "systems": names}
        parameters |= {"testset": record.relative(testset_folder(testset)), "out": record.relative(folder)}
        parameters |= {"seeds": list(seeds), "limit": limit or 0}
        parameters |= {"checkpoint": checkpoint, "device": device, "allow_missing": allow_missing}
        print(f"{task}: {', '.join(names)} ...", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        executed, log = folder / "executed" / f"{task}.ipynb", folder / "logs" / f"{task}.log"
        reason = run_notebook(task_notebook(task), executed, parameters, log)
        end = f"failed: {reason}" if reason else "done"
        print(f"{task}: {end} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr, flush=True)
        if reason:
            failures[task] = reason
    found = {task: record.read_json(folder / task / "summary.json") for task in chosen}
    summary = {task: values for task, values in found.items() if values is not None}
    run = {
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"),
        "seeds": list(seeds),
        "limit": limit,
        "checkpoint": checkpoint,
        "wall_s": round(time.perf_counter() - started, 2),
        "failed": failures,
        "tasks": {task: record.read_json(folder / task / "run.json") for task in chosen},
    }
    record.write_json(folder / "run.json", run)
    record.write_json(folder / "summary.json", summary)
    report.write_page(folder, summary, testset, limit)
    if failures:
        task, reason = next(iter(failures.items()))
        where = record.relative(folder / "executed" / f"{task}.ipynb")
        raise EvaluationFailed(f"{', '.join(failures)} failed; {task}: {reason} (see {where})", summary)
    return summary
