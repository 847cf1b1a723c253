"""An evaluation: the notebook of every task in a papermill kernel, then one summary, one record and one page.

The notebooks call :func:`run_task`, which lets systems work, lets judges listen and writes the scores.  Verdicts are
cached by the contents of what was judged: a second run has almost nothing to do.  Every kernel is a process of its
own, which ends with this one; a failed notebook is kept with its error and does not stop the others, but the run
ends with an error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from metis_lib.data.store import write_jsonl
from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report, statistics
from metis_lib.evaluation.metrics import TASKS, TaskSummary
from metis_lib.evaluation.scoring import Verdicts, score
from metis_lib.evaluation.statistics import summarise
from metis_lib.evaluation.systems import Item, Systems, choose_systems, load_items, produce, testset_folder

# --- one task --------------------------------------------------------------------------------------------


def save(rows: Sequence[dict[str, Any]], task: str, out: str | Path, *, allow_missing: bool = False) -> TaskSummary:
    """Write ``<out>/<task>/<system>/utterances.jsonl`` and ``<out>/<task>/summary.json``; return the summary.

    Raises:
        MetisError: (after writing) a system gave no audio for some item, unless ``allow_missing``.
    """
    folder, summary = Path(out) / task, summarise(rows, task)
    for old in folder.glob("*/utterances.jsonl"):
        if old.parent.name not in summary:
            old.unlink()
    for system in summary:
        write_jsonl(folder / system / "utterances.jsonl", (row for row in rows if row["system"] == system))
    record.write_json(folder / "summary.json", summary)
    missing = [f"{row['system']}/{row['id']}: {row['error']}" for row in rows if row["error"]]
    if missing and not allow_missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise MetisError(f"no audio from {missing[0]}{more}; pass allow_missing to accept this")
    return summary


@dataclass
class TaskResult:
    """What :func:`run_task` gives to its notebook."""

    task: str
    items: list[Item]
    rows: list[dict[str, Any]]
    summary: TaskSummary
    out: Path

    def clip(self, item: Item, system: str) -> Path | None:
        """The audio of ``system`` for ``item`` (its first seed)."""
        names = [row["audio"] for row in self.rows if row["id"] == item.id and row["system"] == system and row["audio"]]
        return self.out / self.task / system / names[0] if names else None


def run_task(
    task: str, *, testset: str | Path, out: str | Path, systems: Sequence[str] = (), seeds: Sequence[int] = (0,),
    limit: int | None = None, checkpoint: str = "nano", device: str = "auto", allow_missing: bool = False,
) -> TaskResult:  # fmt: skip
    """All steps of one task and their record in ``<out>/<task>/run.json`` (no ``systems``: all of them)."""
    started = time.perf_counter()
    items = load_items(testset, task, limit)
    maker, verdicts = Systems(checkpoint, device), Verdicts()
    chosen = choose_systems(task, systems, checkpoint)
    rows = score(produce(items, chosen, out, seeds=seeds, maker=maker), verdicts=verdicts)
    units = statistics.resampling_units([item.speaker for item in items], [item.id for item in items])[1]
    settings = {"systems": chosen, "seeds": list(seeds), "limit": limit, "checkpoint": checkpoint}
    run = {
        "task": task, "settings": settings, "settings_sha256": record.sha256_of(settings), "items": len(items),
        "bootstrap": {"units": units, "resamples": statistics.RESAMPLES, "interval": "percentile, 95 %"},
        "device": maker.used_device, "verdicts": {"computed": verdicts.computed, "reused": verdicts.reused},
        "wall_s": round(time.perf_counter() - started, 2), **record.peak_memory(),
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"),
    }  # fmt: skip
    record.write_json(Path(out) / task / "run.json", run)
    return TaskResult(task, items, rows, save(rows, task, out, allow_missing=allow_missing), Path(out))


# --- all tasks, by their notebooks ------------------------------------------------------------------------


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
    # kernels find this library and their own packages first, print progress in lines and spin no idle threads
    environment = {
        "PYTHONPATH": os.pathsep.join([str(record.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JUPYTER_PREFER_ENV_PATH": "1", "METIS_PLAIN_PROGRESS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }  # fmt: skip
    with open(log, "w") as output, mock.patch.dict(os.environ, environment):
        try:
            papermill.execute_notebook(
                record.relative(notebook), record.relative(executed), dict(parameters), kernel_name="python3",
                progress_bar=False, stdout_file=output, stderr_file=output,
            )  # fmt: skip
        except Exception as error:  # an error of a cell, or a kernel that died: the other notebooks go on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            output.write("\n".join(lines) + "\n")
            return lines[-1][:300]
    return None


def evaluate(
    tasks: Sequence[str] = tuple(TASKS), systems: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    testset: str | Path = "human", out: str | Path = "results/evaluation", *, seeds: Sequence[int] = (0,),
    limit: int | None = None, checkpoint: str = "nano", device: str = "auto", allow_missing: bool = False,
) -> dict[str, Any]:  # fmt: skip
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
        chosen[task] = choose_systems(task, asked, checkpoint)
    if not chosen or not seeds or len(set(seeds)) < len(seeds):
        raise MetisError("name at least one task and one seed, each once")
    failures: dict[str, str] = {}
    for task, names in chosen.items():
        for old in ("summary.json", "run.json"):
            (folder / task / old).unlink(missing_ok=True)
        parameters = {
            "task": task, "systems": names, "testset": record.relative(testset_folder(testset)),
            "out": record.relative(folder), "seeds": list(seeds), "limit": limit or 0, "checkpoint": checkpoint,
            "device": device, "allow_missing": allow_missing,
        }  # fmt: skip
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
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"), "seeds": list(seeds),
        "limit": limit, "checkpoint": checkpoint, "wall_s": round(time.perf_counter() - started, 2),
        "failed": failures, "tasks": {task: record.read_json(folder / task / "run.json") for task in chosen},
    }  # fmt: skip
    record.write_json(folder / "run.json", run)
    record.write_json(folder / "summary.json", summary)
    report.write_page(folder, summary, testset, limit)
    if failures:
        task, reason = next(iter(failures.items()))
        where = record.relative(folder / "executed" / f"{task}.ipynb")
        raise EvaluationFailed(f"{', '.join(failures)} failed; {task}: {reason} (see {where})", summary)
    return summary
