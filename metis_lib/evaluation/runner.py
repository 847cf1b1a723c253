"""An evaluation: the notebook of every task in a papermill kernel, then one summary, one record and one page.

The notebooks call :func:`run_task`, which lets systems work, lets judges listen and writes the scores.  Verdicts are
cached by the contents of what was judged: a second run has almost nothing to do.  Every kernel is a process of its
own, which ends with this one; a failed notebook is kept with its error and does not stop the others, but the run
ends with an error.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from metis_lib.data.store import write_jsonl
from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report, statistics
from metis_lib.evaluation.judges import ABSENT, BROKE
from metis_lib.evaluation.metrics import TASKS, TaskSummary
from metis_lib.evaluation.scoring import Verdicts, score
from metis_lib.evaluation.statistics import summarise
from metis_lib.evaluation.systems import (
    Item,
    Systems,
    check_options,
    checkpoints_of,
    choose_systems,
    label,
    load_items,
    produce,
    split_name,
    tasks_of,
    testset_folder,
)
from metis_lib.tasks import like

# --- one task --------------------------------------------------------------------------------------------


def save(
    rows: Sequence[dict[str, Any]], task: str, out: str | Path, *, judges: str = "offline", allow_missing: bool = False
) -> TaskSummary:  # fmt: skip
    """Write ``<out>/<task>/<system>/utterances.jsonl`` and ``<out>/<task>/summary.json``; return the summary.

    Raises:
        MetisError: (after writing) a system gave no audio for some item, unless ``allow_missing``.
    """
    folder, summary = Path(out) / task, summarise(rows, task, judges)
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
    limit: int | None = None, checkpoint: str = "nano", device: str = "auto", dtype: str = "float32",
    options: Mapping[str, Any] | None = None, judges: str = "offline", allow_missing: bool = False,
) -> TaskResult:  # fmt: skip
    """All steps of one task and their record in ``<out>/<task>/run.json`` (no ``systems``: all of them).

    ``options`` are those of :meth:`Metis.generate`; ``judges`` is ``offline`` or ``paper`` (scoring.score).
    """
    started = time.perf_counter()
    items = load_items(testset, task, limit)
    maker, verdicts = Systems(checkpoint, device, dtype=dtype, options=dict(options or {})), Verdicts()
    chosen = choose_systems(task, systems, checkpoint)
    clips = produce(items, chosen, out, seeds=seeds, maker=maker)
    used = maker.used_device
    maker.close()
    rows = score(clips, verdicts=verdicts, judges=judges, device=device)
    units = statistics.unit_of([item.speaker for item in items])
    settings = {
        "systems": chosen, "seeds": list(seeds), "limit": limit, "checkpoint": checkpoint, "dtype": dtype,
        "options": maker.options, "judges": judges,
    }  # fmt: skip
    run = {
        "task": task, "testset": testset_folder(testset).name, "settings": settings,
        "settings_sha256": record.sha256_of(settings), "items": len(items),
        "bootstrap": {"units": units, "resamples": statistics.RESAMPLES, "interval": statistics.INTERVAL},
        "device": used, "verdicts": {"computed": verdicts.computed, "reused": verdicts.reused},
        "judge_weights": verdicts.weights,
        "wall_s": round(time.perf_counter() - started, 2), **record.peak_memory(),
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"),
        "checkpoints": {name: record.checkpoint_hashes(name) for name in checkpoints_of(task, chosen)},
        "task_files": record.task_files(),
    }  # fmt: skip
    record.write_json(Path(out) / task / "run.json", run)
    return TaskResult(task, items, rows, save(rows, task, out, judges=judges, allow_missing=allow_missing), Path(out))


# --- all tasks, by their notebooks ------------------------------------------------------------------------


class EvaluationFailed(MetisError):
    """Some notebooks failed; ``summary`` holds the tasks that were done."""

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


def task_notebook(task: str) -> Path:
    """The notebook of a task, in the checkout."""
    path = record.ROOT / "eval" / f"{like(task)}.ipynb"
    if not path.is_file():
        raise MetisError(f"no notebook eval/{path.name}; evaluation runs from a clone of the repository")
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
    partial = executed.with_name(f".{executed.name}.part.ipynb")
    ready = os.environ.items() >= environment().items()  # as evaluate() sees to, for all its threads
    surroundings: Any = contextlib.nullcontext() if ready else mock.patch.dict(os.environ, environment())
    with open(log, "w") as file, surroundings:
        output = _Log(file, notebook.stem)
        try:
            papermill.execute_notebook(
                record.relative(notebook), record.relative(partial), dict(parameters), kernel_name="python3",
                progress_bar=False, stdout_file=output, stderr_file=output,
            )  # fmt: skip
        except Exception as error:  # an error of a cell, or a kernel that died: the other notebooks go on
            lines = str(error).strip().splitlines() or [type(error).__name__]
            output.write("\n".join(lines) + "\n")
            return lines[-1][:300]
        finally:
            if partial.is_file():
                partial.replace(executed)
    return None


def environment() -> dict[str, str]:
    """What kernels are started with: this library, their own packages, progress in lines, no spinning threads."""
    here = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([str(record.ROOT), *filter(None, here)])),
        "JUPYTER_PREFER_ENV_PATH": "1", "METIS_PLAIN_PROGRESS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }  # fmt: skip


class _Log:
    """The log of a kernel; its progress lines (``label: done/all``) are said on stderr too."""

    def __init__(self, file: Any, name: str) -> None:
        self.file, self.name, self.flush = file, name, file.flush

    def write(self, text: str) -> None:
        self.file.write(text)
        for line in re.findall(r"^.*: \d+/\d+$", text, re.M):
            print(f"  [{self.name}] {line}", file=sys.stderr, flush=True)


def devices_of(device: str) -> list[str]:
    """Where notebooks run, one on each at a time: all GPUs for ``auto``, those named (``cuda:0,cuda:1``), or one."""
    if device != "auto":
        return device.split(",")
    import torch

    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.device_count() > 1 else ["auto"]


def omni_tasks(testset: str | Path, checkpoint: str, limit: int | None = None) -> list[str]:
    """The tasks that a test set can try Omni at; MetisError where the checkpoint has no Omni, or there are none."""
    if "omni" not in tasks_of(checkpoint):
        raise MetisError(f"the system {checkpoint!r} has no weights for the task 'omni'")
    kinds = []
    for kind in ("tts", "vc", "tse", "se"):
        with contextlib.suppress(MetisError):
            load_items(testset, kind, limit)
            kinds.append(kind)
    if not kinds:
        raise MetisError(f"the test set {testset} has no items for Omni")
    return kinds


def unit_key(task: str, parameters: Mapping[str, Any], checkpoint: str, manifest: Path) -> str:
    """Hash of everything that a finished notebook depends on, except where it ran."""
    given = {key: value for key, value in parameters.items() if key not in ("out", "device")}
    hashes = [record.sha256_file(task_notebook(task)), record.testset_hash(manifest.parent)]
    names = dict.fromkeys([checkpoint, *checkpoints_of(task, parameters["systems"])])
    weights = {name: record.checkpoint_hashes(name) for name in names}
    return record.sha256_of([given, hashes, record.code_hash("."), record.task_files(), weights])


def _fetch(wanted: Iterable[tuple[str, str]]) -> None:
    """Get published weights (of a checkpoint for a task) before hashes are taken of them, and where one sees it."""
    from metis_lib.checkpoints import own_system
    from metis_lib.released import Released

    for name, task in wanted:
        if name != "debug" and not name.startswith("random-") and not own_system(name):
            place = Released(name)
            place.require(like(task) if like(task) in place.tasks else "base")


def _unjudged(folder: Path) -> bool:
    """Whether a judge or its package was not to be had, or broke off: the next run asks again (audio and verdicts are
    kept)."""
    found = (path.read_text(encoding="utf-8") for path in folder.rglob("utterances.jsonl"))
    return any(reason in text for text in found for reason in (ABSENT, BROKE))


def evaluate(
    tasks: Sequence[str] = ("codec", "se", "tts"), systems: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    testset: str | Path = "human", out: str | Path = "results/evaluation", *, seeds: Sequence[int] = (0,),
    limit: int | None = None, checkpoint: str = "nano", device: str = "auto", dtype: str = "float32",
    options: Mapping[str, Any] | None = None, judges: str = "offline", allow_missing: bool = False, fresh: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate ``tasks`` and return ``{task: {system: {metric: {mean, ci95, n, n_failed, protocol}}}}``.

    A notebook that is done, with the same of everything, is kept; so are the audio and the verdicts of one that was
    interrupted.  With several GPUs each takes the next notebook.

    Args:
        tasks: keys of ``metrics.TASKS``, and ``omni``.
        systems: names for every task, or a mapping from task to names; None: all of each task.
        testset: a folder with ``manifest.jsonl``, or a name under ``eval/testsets``.
        out: one run's folder: ``summary.json``, ``run.json``, ``index.html``, ``executed/<task>.ipynb``,
            ``logs/``, ``<task>/<system>/utterances.jsonl`` and ``audio/``.
        seeds: the model generates once for each.
        limit: only the first items of each task.
        checkpoint: name or folder of the system to evaluate; its row bears its name.
        device: ``auto``, ``cpu``, ``cuda``, or several, ``cuda:0,cuda:1``.
        dtype, options, judges: see :func:`run_task`.
        allow_missing: accept utterances for which a system gave no audio (else the run fails).
        fresh: run again what is done.

    Raises:
        MetisError: bad arguments (before anything runs).
        EvaluationFailed: a notebook failed (after the others are done and everything is written).
    """
    started, folder = time.perf_counter(), Path(out)
    manifest = testset_folder(testset) / "manifest.jsonl"
    chosen: dict[str, list[str]] = {}
    for task in tasks:
        if task == "omni":
            chosen[task] = omni_tasks(testset, checkpoint, limit)
            continue
        load_items(testset, task, limit)
        asked = systems.get(task) if isinstance(systems, Mapping) else systems
        chosen[task] = choose_systems(task, asked, checkpoint)
    check_options(options or {}, tasks)
    if not chosen or not seeds or len(set(seeds)) < len(seeds):
        raise MetisError("name at least one task and one seed, each once")
    for task, names in chosen.items():
        rows = [split_name(name) for name in names if task in TASKS and name not in TASKS[task]["systems"]]
        _fetch([(checkpoint, task), *((name, "omni" if ending else task) for name, ending in rows)])
    free: queue.Queue[str] = queue.Queue()
    for name in devices_of(device):
        free.put(name)

    def work(task: str) -> str | None:
        """Run one notebook where a device is free; why it failed."""
        where = free.get()
        try:
            parameters = {
                "task": task, "systems": chosen[task], "testset": record.relative(testset_folder(testset)),
                "out": record.relative(folder, record.ROOT), "seeds": list(seeds), "limit": limit or 0,
                "checkpoint": checkpoint, "device": where, "dtype": dtype, "options": dict(options or {}),
                "judges": judges, "allow_missing": allow_missing,
            }  # fmt: skip
            done, key = folder / task / "done.json", unit_key(task, parameters, checkpoint, manifest)
            if not fresh and (record.read_json(done) or {}).get("key") == key:
                print(f"{task}: done already", file=sys.stderr, flush=True)
                return None
            for old in ("done.json", "summary.json", "run.json"):
                (folder / task / old).unlink(missing_ok=True)
            print(f"{task}: {', '.join(map(label, chosen[task]))} ...", file=sys.stderr, flush=True)
            begin = time.perf_counter()
            executed, log = folder / "executed" / f"{task}.ipynb", folder / "logs" / f"{task}.log"
            reason = run_notebook(task_notebook(task), executed, parameters, log)
            took = round(time.perf_counter() - begin, 1)
            print(f"{task}: {f'failed: {reason}' if reason else 'done'} ({took:.0f} s)", file=sys.stderr, flush=True)
            if not reason and not _unjudged(folder / task):
                record.write_json(done, {"key": key, "wall_s": took, "device": where})
            return reason
        finally:
            free.put(where)

    with mock.patch.dict(os.environ, environment()), ThreadPoolExecutor(free.qsize()) as pool:
        reasons = list(pool.map(work, chosen))
    failures = {task: reason for task, reason in zip(chosen, reasons, strict=True) if reason}
    summary = finish(
        folder, list(chosen), testset=testset, limit=limit, checkpoint=checkpoint, seeds=seeds, failures=failures,
        wall_s=round(time.perf_counter() - started, 2),
    )  # fmt: skip
    if failures:
        task, why = next(iter(failures.items()))
        place = record.relative(folder / "executed" / f"{task}.ipynb")
        raise EvaluationFailed(f"{', '.join(failures)} failed; {task}: {why} (see {place})", summary)
    return summary


def finish(
    folder: Path, tasks: Sequence[str], *, testset: str | Path, limit: int | None, checkpoint: str,
    seeds: Sequence[int], failures: Mapping[str, str] | None = None, wall_s: float | None = None, **_: Any,
) -> dict[str, TaskSummary]:  # fmt: skip
    """Put the tasks of a run together: ``summary.json``, ``run.json`` and the page; return the summary."""
    found = {task: record.read_json(folder / task / "summary.json") for task in tasks if task in TASKS}
    summary = {task: values for task, values in found.items() if values is not None}
    run = {
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"), "seeds": list(seeds),
        "testset": testset_folder(testset).name, "limit": limit, "checkpoint": checkpoint,
        "wall_s": wall_s, "failed": dict(failures or {}),
        "tasks": {task: record.read_json(folder / task / "run.json") for task in tasks},
    }  # fmt: skip
    record.write_json(folder / "run.json", run)
    record.write_json(folder / "summary.json", summary)
    report.write_page(folder, summary, testset, limit)
    return summary
