"""A queue of trainings that make one system, piece after piece, over days and machines (``recipes/nano/queue.json``).

Each entry names a model, its settings and options, and keeps what was reached: ``state`` (todo, part, done), ``steps``
done, CPU hours, frames, and its score on held-out speech.  A piece that was cut off goes on with its state; where
that is lost, with its weights at the step they have.  ``anew``: it does not go on from what is there of the part;
``device`` names one that is not two CPU cores.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from metis_lib.assets import metis_home
from metis_lib.checkpoints import SHIPPED
from metis_lib.config import preset, to_dict
from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.training.recipes import BUILD, FOLDERS, Job, options_for, settings_for, train

KEYS = {"model", "settings", "options", "mode", "rank", "anew", "device", "workers"}
KEYS |= {"state", "steps", "score", "cpu_hours", "frames"}


def read(path: Path) -> dict[str, Any]:
    """A queue file, checked."""
    if not path.is_file():
        raise MetisError(f"no queue at {path}; a clone of the repository has recipes/nano/queue.json")
    try:
        queue = json.loads(path.read_text())
        entries, missing = queue["pieces"], {"system", "preset", "data", "licence"} - set(queue)
    except (ValueError, KeyError, TypeError) as error:
        raise MetisError(f"{path} is no queue: {error}") from error
    if missing:
        raise MetisError(f"{path} lacks {', '.join(sorted(missing))}")
    for entry in entries:
        if entry.get("model") not in BUILD or set(entry) - KEYS:
            raise MetisError(f"{path}: bad entry {entry.get('model')!r} (unknown keys: {sorted(set(entry) - KEYS)})")
    return queue


def next_piece(queue: dict[str, Any], only: str | None = None) -> int | None:
    """Number of the first entry (of the model ``only``) that is not done."""
    left = (i for i, e in enumerate(queue["pieces"]) if e.get("state") != "done" and only in (None, e["model"]))
    return next(left, None)


def table(queue: dict[str, Any]) -> str:
    """The queue as lines of text."""
    lines = [f"{'':2} {'piece':<14} {'state':<5} {'steps':>14} {'CPU h':>6}  score"]
    for i, entry in enumerate(queue["pieces"]):
        horizon = settings_for(entry["model"], queue["preset"], **entry.get("settings", {})).steps
        score = ", ".join(f"{k} {v:.4g}" for k, v in entry.get("score", {}).items())
        steps, hours = f"{entry.get('steps', 0)}/{horizon}", entry.get("cpu_hours", 0.0)
        lines.append(f"{i:2} {entry['model']:<14} {entry.get('state', 'todo'):<5} {steps:>14} {hours:>6.2f}  {score}")
    return "\n".join(lines)


def home(queue: dict[str, Any]) -> Path:
    """Where the system grows."""
    return metis_home() / "runs" / queue["system"]


def bring_shipped(queue: dict[str, Any]) -> None:
    """Copy shipped parts that the growing system lacks and that have its sizes: the weights to go on from."""
    sizes, target, source = preset(queue["preset"]), home(queue), SHIPPED / queue["system"]
    for model in BUILD:
        name = FOLDERS.get(model, model)
        if (target / name / "config.json").exists() or not (source / name / "config.json").is_file():
            continue
        wanted = getattr(sizes, model, None)  # a task fits where its stage 1 does
        own = source / "stage1" if wanted is None else source / name
        config = own / "config.json"
        if config.is_file() and json.loads(config.read_text())["config"] == to_dict(wanted or sizes.stage1):
            part = target / ".part" / name
            shutil.copytree(source / name, part, dirs_exist_ok=True)  # one may have been cut off
            shutil.rmtree(target / name, ignore_errors=True)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            part.replace(target / name)
    shutil.rmtree(target / ".part", ignore_errors=True)


def run_next(
    path: Path, *, budget: str | None = None, manifest: Path | None = None, only: str | None = None,
    device: str = "auto", say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Train the next piece (or the next of the model ``only``) and write down what came of it.

    Returns:
        The entry, with ``number`` and ``finished``; MetisError where nothing is left, or what ``train`` raises.
    """
    queue = read(path)
    number = next_piece(queue, only)
    if number is None:
        raise MetisError(f"{path}: nothing is left to train" + (f" of {only}" if only else ""))
    entry = queue["pieces"][number]
    bring_shipped(queue)
    options = options_for(entry["model"], queue["preset"]) | entry.get("options", {})
    job = Job(
        entry["model"], preset(queue["preset"]), home(queue),
        settings_for(entry["model"], queue["preset"], **entry.get("settings", {})),
        manifest or metis_home() / "corpora" / queue["system"] / "manifest.jsonl", mode=entry.get("mode", "lora"),
        rank=entry.get("rank", 16), options=options, workers=entry.get("workers", 0),
        about={"data": queue["data"], "licence": queue["licence"]},
    )  # fmt: skip
    say(f"piece {number}: {entry['model']}, from step {entry.get('steps', 0)} to {job.settings.steps}")
    pid = home(queue) / f"queue-{entry['model']}.pid"  # two models may train beside each other, each on one core
    lock = lock_of(pid)
    try:
        lock.acquire()
    except filelock.Timeout:
        who = pid.read_text() if pid.is_file() else "another"
        raise MetisError(f"process {who} works on {entry['model']} already") from None
    write_text(pid, str(os.getpid()))
    run, now = job.out / "runs" / entry["model"], read(path)
    if now["pieces"][number:][:1] == [entry]:  # another model may have begun to train meanwhile
        queue, entry = now, now["pieces"][number]
    if entry.get("state", "todo") == "todo":  # states of an earlier piece of this model are not its own
        shutil.rmtree(run, ignore_errors=True)
        if entry.get("anew"):  # of another rank, say
            shutil.rmtree(job.folder, ignore_errors=True)
        entry["state"] = "part"
        write(path, queue)
    try:
        if (run / "finished").is_file():  # it ended, and was stopped before that was written down
            found = json.loads((job.folder / "config.json").read_text())["card"]["scores"]
        else:
            found = train(job, budget=budget, first=entry.get("steps", 0), device=device, say=say)
    finally:
        pid.unlink(missing_ok=True)
        lock.release()
    queue = read(path)  # somebody may have edited the other entries meanwhile
    asked = {
        key: value for key, value in entry.items() if key not in ("state", "steps", "cpu_hours", "frames", "score")
    }
    places = [
        i for i, e in enumerate(queue["pieces"])
        if e.get("state") != "done" and asked == {key: value for key, value in e.items() if key in asked}
    ]  # fmt: skip
    entry |= outcome(found)
    if not places:
        raise MetisError(f"{path}: the piece that was trained is gone from it; its result: {json.dumps(entry)}")
    number = number if number in places else places[0]
    queue["pieces"][number] = entry
    write(path, queue)
    return {**entry, "number": number, "finished": found["finished"]}


def outcome(scores: dict[str, Any]) -> dict[str, Any]:
    """What a training returned, as an entry of the queue keeps it."""
    counted = ("steps", "finished", "seconds", "cpu_seconds", "frames", "skipped")
    return {
        "state": "done" if scores["finished"] else "part", "steps": scores["steps"],
        "cpu_hours": round(scores["cpu_seconds"] / 3600, 3), "frames": int(scores["frames"]),
        "score": {key: value for key, value in scores.items() if key not in counted},
    }  # fmt: skip


def lock_of(pid: Path) -> filelock.FileLock:
    """The lock of who works on a piece; the kernel lets go of it when that process dies."""
    return filelock.FileLock(pid.with_suffix(".lock"), timeout=0)


def working(pid: Path) -> bool:
    """Whether somebody works on the piece."""
    try:
        with lock_of(pid):
            return False
    except filelock.Timeout:
        return True


def write(path: Path, queue: dict[str, Any]) -> None:
    """Write a queue file, one line an entry."""
    head = {key: value for key, value in queue.items() if key != "pieces"}
    lines = ",\n".join(f"  {json.dumps(entry, ensure_ascii=False)}" for entry in queue["pieces"])
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2]
    write_text(path, f'{text},\n "pieces": [\n{lines}\n ]\n}}\n')


def pause(path: Path, paused: bool) -> list[int]:
    """Stop (or let go on) the processes that work on the queue; their numbers.  MetisError where there is none."""
    numbers = [int(pid.read_text()) for pid in sorted(home(read(path)).glob("queue-*.pid")) if working(pid)]
    if not numbers:
        raise MetisError("nobody works on the queue now")
    for number in numbers:
        os.kill(number, signal.SIGSTOP if paused else signal.SIGCONT)
    return numbers
