"""Many items of a task from a folder or a manifest: in batches, going on after an interruption, bad items set apart."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from metis_lib.assets import sha256_file
from metis_lib.audio import FORMATS
from metis_lib.errors import MetisError
from metis_lib.generation import Options
from metis_lib.pipeline import SOURCES, Job, Metis

SOUNDS = (*FORMATS, ".mp3", ".opus", ".m4a", ".aiff", ".aif")
FILMS = (".npz", ".mp4", ".mov", ".mkv", ".avi", ".webm")
PLACES = ("source", "prompt", "video", "like")
"""Fields of an item that name a file."""
LOG = "generated.jsonl"

Named = list[tuple[str, str, Job]]
"""Jobs with their ids and keys."""
Refused = list[tuple[str, str, Exception]]
"""Ids and keys of items that cannot be used, and why."""


def is_bulk(task: str, path: Path) -> bool:
    """Whether an input holds many items: a folder, a manifest, or (TTS) a text with a sentence a line."""
    return path.is_dir() or path.suffix in (".jsonl", ".csv", ".tsv") or (task == "tts" and path.suffix == ".txt")


def read_items(task: str, path: Path, given: Mapping[str, Any], out: Path | None = None) -> list[dict[str, Any]]:
    """The items of a folder (one a file, by name; not those below ``out``), a manifest or a text, each with its ``id``.

    A manifest is .jsonl, .csv or .tsv with the fields of the task (``pipeline.SOURCES``), ``id`` and ``seed``; places
    are relative to it; ``path`` and ``audio`` (training manifests) stand for ``source``.  What a row lacks is
    ``given``.

    Raises:
        MetisError: nothing there, a row that cannot be read or is part of a recording, the same id twice.
    """
    key = {"l2s": "video", "tts": "text", "base": "prompt"}.get(task, "source")
    rows: list[dict[str, Any]]
    if path.is_dir():
        endings = FILMS if task == "l2s" else SOUNDS
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and not p.name.startswith("."))
        if out is not None and out.resolve() != path.resolve():  # what an earlier run made is no input
            files = [p for p in files if not p.resolve().is_relative_to(out.resolve())]
        rows = [{"id": str(p.relative_to(path).with_suffix("")), key: str(p)} for p in files]
    elif not path.is_file():
        raise MetisError(f"nothing at {path}; give a file, a folder or a manifest (.jsonl, .csv, .tsv)")
    elif path.suffix == ".txt":
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise MetisError(f"{path} is not in UTF-8; save it so") from error
        rows = [{"id": f"{i:04d}", "text": line} for i, line in enumerate(lines, 1)]
    else:
        rows = list(_rows(path, key))
    if not rows:
        raise MetisError(f"{path} holds nothing to work on")
    known, items = {*SOURCES[task][0], *SOURCES[task][1], "seed"}, []
    for number, row in enumerate(rows, 1):
        item = {**given, **{k: v for k, v in row.items() if k in known and v not in (None, "")}}
        if row.get("start") or row.get("end"):
            raise MetisError(f"{path}, row {number}: a part of a recording (start, end); cut it out into a file first")
        for name in PLACES:
            if name in row and row[name] and not path.is_dir():
                if not isinstance(row[name], str):
                    raise MetisError(f"{path}, row {number}: {name} is the name of a file, not {row[name]!r}")
                item[name] = str(path.parent / row[name])
        for name, kind in (("seconds", float), ("seed", int)):
            if isinstance(item.get(name), str):
                try:
                    item[name] = kind(item[name])
                except ValueError as error:
                    raise MetisError(f"{path}, row {number}: {name} is a number, not {item[name]!r}") from error
        items.append({"id": str(row.get("id") or f"{number:04d}"), **item})
    counts = Counter(item["id"] for item in items)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise MetisError(f"{path} has the id {twice[0]!r} twice")
    bad = next((item["id"] for item in items if Path(item["id"]).is_absolute() or ".." in Path(item["id"]).parts), None)
    if bad is not None:
        raise MetisError(f"{path}: the id {bad!r} leads out of the folder")
    return items


def _rows(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """Rows of a manifest, as they stand there."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ","))
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"a row is an object with fields, not {row!r:.40}")
            for other in ("path", "audio"):
                if key == "source" and row.get(other) and not row.get("source"):
                    row["source"] = row[other]
            yield row
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise MetisError(f"{path} is no manifest: {error}") from error


def _key(task: str, item: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Hash of all that an item's speech depends on."""
    item = {k: sha256_file(v) if k in PLACES and os.path.isfile(v) else v for k, v in item.items() if k != "id"}
    return hashlib.sha256(json.dumps([task, item, about], sort_keys=True, default=str).encode()).hexdigest()


def read_log(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line about each item; a line that was cut off is passed over."""
    path, found = folder / LOG, {}
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            entry = json.loads(line)
            found[entry["id"]] = entry
        except (ValueError, KeyError, TypeError):
            continue
    return found


def sweep(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for partial in folder.rglob(".*.part"):
        if partial.is_file():
            partial.unlink(missing_ok=True)


def generate_all(
    metis: Metis, task: str, items: Sequence[Mapping[str, Any]], out: Path, *, options: dict[str, Any], seed: int = 0,
    suffix: str = ".flac", fresh: bool = False, about: Mapping[str, Any] | None = None,
    measure: Callable[[str, Job], dict[str, float]] = lambda id, job: {},
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> dict[str, Any]:  # fmt: skip
    """Do a task for all items; the speech of each lies at ``<out>/<id><suffix>``, a line about it in generated.jsonl.

    What was made by the same of everything is kept unless ``fresh``.  An item that cannot be used, or fails, is
    reported and the rest is done.  While the models work on some items, the next ones are read and prepared in a
    thread of its own, and the last ones decoded and written in another (``measure`` and ``progress`` too).

    Args:
        options: of :meth:`Metis.generate`.
        about: what else the speech depends on (the model).
        measure: what else to write about an item, as ``measured``, from its id and what was generated.
        progress: told the number of items that are finished, of all, and the last one's id.

    Returns:
        ``done``, ``kept`` (numbers) and ``failed`` (id: reason).

    Raises:
        MetisError: an output would take the place of an input, and what :meth:`Metis.options` raises.
    """
    inputs = {Path(item[k]).resolve() for item in items for k in PLACES if isinstance(item.get(k), str | Path)}
    for path in (out / f"{item['id']}{suffix}" for item in items):
        if path.resolve() in inputs:
            raise MetisError(f"{path} is an input and would be overwritten; choose another folder for the output")
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    log, failed, finished = out / LOG, dict[str, str](), 0
    if fresh:
        log.unlink(missing_ok=True)
    known, total, kept, done = read_log(out), len(items), 0, 0
    if log.is_file() and not log.read_bytes().endswith(b"\n"):  # a line was cut off
        with open(log, "a", encoding="utf-8") as file:
            file.write("\n")
    model = {**(about or {}), "options": options}
    stop, waiting = threading.Event(), deque[Future[None]]()

    def prepare() -> Iterator[tuple[int, Refused, Named, Options]]:
        """Items by the group: how many are kept, those that cannot be used, and the jobs of the rest, all by the same
        options."""
        same, refused, jobs, frames = 0, Refused(), Named(), 0
        chosen = metis.options(task, items[0], **options)
        for item in items:
            if stop.is_set():
                return
            name, rest = item["id"], {"seed": seed} | {k: v for k, v in item.items() if k != "id"}
            key, before = _key(task, rest, model), known.get(name, {})
            path = out / f"{name}{suffix}"
            if before.get("key") == key and path.is_file() and sha256_file(path) == before.get("sha256"):
                same += 1
                continue
            metis.load_all(task)  # here alone: while a part is loaded, no model may be at work
            settings = metis.options(task, rest, **options)
            try:
                job = metis.job(task, rest, settings)
            except (MetisError, RuntimeError) as error:
                refused.append((name, key, error))
                continue
            if jobs and (job.windows is not None or settings != chosen):  # windows cannot be tried again
                yield same, refused, jobs, chosen
                same, refused, jobs, frames = 0, Refused(), Named(), 0
            chosen = settings
            jobs.append((name, key, job))
            frames += sum(request.size for request in job.requests)
            if frames >= 4 * settings.batch_frames or job.windows is not None:  # some batches of like length
                yield same, refused, jobs, chosen
                same, refused, jobs, frames = 0, Refused(), Named(), 0
        yield same, refused, jobs, chosen

    def note(item: str, entry: dict[str, Any]) -> None:
        nonlocal finished
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"id": item, **entry}, sort_keys=True) + "\n")
        failed.update({item: entry["error"]} if "error" in entry else {})
        finished += 1
        progress(finished, total, item)

    def report(same: int, refused: Refused) -> None:
        nonlocal kept, finished
        kept, finished = kept + same, finished + same
        for item, key, error in refused:
            kind = "" if isinstance(error, MetisError) else f"{type(error).__name__}: "
            note(item, {"key": key, "error": kind + " ".join(str(error).split())})

    def write(jobs: Named, took: float) -> None:
        nonlocal done
        began, spoken = time.perf_counter(), []
        for item, key, job in jobs:
            try:
                spoken.append((item, key, job, metis._finish(job)[0]))
            except (MetisError, RuntimeError) as error:
                report(0, [(item, key, error)])
        share = (took + time.perf_counter() - began) / max(sum(speech.seconds for *_, speech in spoken), 1e-9)
        for item, key, job, speech in spoken:
            try:
                path = speech.save(out / f"{item}{suffix}")
            except MetisError as error:
                report(0, [(item, key, error)])
                continue
            entry = {"key": key, "output": path.relative_to(out).as_posix(), "sha256": sha256_file(path)}
            entry |= {"seconds": round(speech.seconds, 4), "seconds_to_make": round(share * speech.seconds, 3)}
            try:
                entry |= {"measured": found} if (found := measure(item, job)) else {}
            except (MetisError, RuntimeError) as error:  # a bad reference, which is no fault of the speech
                entry["not_measured"] = " ".join(str(error).split())
            note(item, entry | speech.info)
            done += 1

    def work(jobs: Named, settings: Options) -> None:
        """Run some jobs, one by one if that fails together, and hand on what was made."""
        began = time.perf_counter()
        try:
            metis.run([job for *_, job in jobs], settings)
        except (MetisError, RuntimeError) as error:
            if len(jobs) == 1:
                hand_on(report, 0, [(*jobs[0][:2], error)])
                return
            for *_, job in jobs:
                job.made.clear()
            for one in jobs:
                work([one], settings)
            return
        hand_on(write, jobs, time.perf_counter() - began)

    def hand_on(what: Callable[..., None], *about: Any) -> None:
        """To the writer, who does one thing after the other; one may wait."""
        while len(waiting) > 1:
            waiting.popleft().result()
        waiting.append(writer.submit(what, *about))

    # One thread reads and prepares the next group, this one runs the models, one decodes and writes the last group.
    with ThreadPoolExecutor(1, "metis-reader") as reader, ThreadPoolExecutor(1, "metis-writer") as writer:
        try:
            groups = prepare()
            ahead = reader.submit(next, groups, None)
            while (group := ahead.result()) is not None:
                ahead = reader.submit(next, groups, None)
                hand_on(report, *group[:2])
                if group[2]:
                    work(*group[2:])
            for written in waiting:
                written.result()
        finally:  # interrupted or failed: what was made is still written, nothing more is read
            stop.set()
    return {"done": done, "kept": kept, "failed": failed}
