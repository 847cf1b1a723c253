"""The steps of one task's evaluation, as the notebooks call them: scores, summary, files.

Verdicts are cached by the contents of what was judged: a second run has almost nothing to do.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import audio
from metis_lib.assets import metis_home
from metis_lib.errors import MetisError
from metis_lib.evaluation import judges, metrics, record
from metis_lib.evaluation.metrics import JUDGE_RATE, MetricFailure, TaskSummary
from metis_lib.evaluation.systems import Clip, Item, Systems, load_items, produce, systems_of, testset_folder
from metis_lib.notebook import progress

_DNSMOS = tuple(judges.DnsmosJudge.POLYNOMIALS)
TASK_METRICS = {
    "codec": ("wer", "sim_target", "sim_other", *_DNSMOS, "pesq_wb", "stoi"),
    "se": ("wer", "sim_target", "sim_other", *_DNSMOS, "pesq_wb", "stoi"),
    "tts": ("wer", "sim_prompt", "sim_other", *_DNSMOS),
}


class Verdicts:
    """Verdicts of judges on files, cached under ``$METIS_HOME/cache/judges`` by the files' contents."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.reused, self.computed = folder or metis_home() / "cache" / "judges", 0, 0
        self._code = record.code_hash("audio.py", "evaluation/judges.py", "evaluation/metrics.py")
        self._hash = functools.cache(record.sha256_file)
        self._memory: dict[str, Any] = {}

    def get(self, protocol: str, judge: Callable[..., Any], *paths: Path) -> Any:
        """What ``judge`` says of the recordings at ``paths`` (16 kHz arrays), or the MetricFailure that it raised.

        Failures are not cached: what could not be judged is tried again by the next run.
        """
        key = record.sha256_of([protocol, self._code, *[self._hash(path) for path in paths]])
        if key not in self._memory:
            file = self.folder / protocol.replace("/", "_") / key[:2] / f"{key}.json"
            stored = record.read_json(file)
            if stored is not None:
                self.reused += 1
            else:
                self.computed += 1
                try:
                    stored = {"verdict": judge(*(audio.read(path, JUDGE_RATE).numpy() for path in paths))}
                    record.write_json(file, stored)
                except (MetricFailure, MetisError, ValueError) as failure:
                    reason = str(failure).splitlines() or [type(failure).__name__]
                    stored = {"verdict": MetricFailure(reason[0])}
            self._memory[key] = stored["verdict"]
        return self._memory[key]


def score(clips: Sequence[Clip], *, verdicts: Verdicts | None = None) -> list[dict[str, Any]]:
    """One row of JSON types per clip: every metric as a number, or ``null`` with ``<metric>_error``.

    Judges work one after the other, each loaded once and released; ``heard`` is what the WER judge heard.
    """
    verdicts = verdicts or Verdicts()
    task = clips[0].item.task
    keys = TASK_METRICS[task]
    rows = [_row(clip) for clip in clips]
    judged = [(clip.path, clip.item, row) for clip, row in zip(clips, rows, strict=True) if clip.path]
    for row in rows:
        if row["error"] is not None:
            for key in keys:
                _put(row, key, MetricFailure(f"no audio: {row['error']}"))

    def each(*protocols: str) -> Iterator[tuple[Path, Item, dict[str, Any]]]:
        return progress(judged, f"{task}: {', '.join(protocols)}")

    whisper = judges.WhisperJudge()
    for path, item, row in each(metrics.WER):
        _put_words(row, item.text, verdicts.get(metrics.WER, whisper, path))
    whisper.release()

    speaker = judges.SpeakerJudge()
    for path, item, row in each(metrics.SIM):
        for key in (key for key in keys if key.startswith("sim_")):
            reference = item.reference(key)
            if reference is None:
                _put(row, key, MetricFailure("the test set has no other speaker here"))
                continue
            voices = [verdicts.get(metrics.SIM, speaker, voice) for voice in (path, reference)]
            failed = [voice for voice in voices if isinstance(voice, MetricFailure)]
            _put(row, key, failed[0] if failed else metrics.cosine(*voices))
    speaker.release()

    dnsmos = judges.DnsmosJudge()
    for path, _, row in each(metrics.DNSMOS):
        verdict = verdicts.get(metrics.DNSMOS, dnsmos, path)
        for key in _DNSMOS:
            _put(row, key, verdict if isinstance(verdict, MetricFailure) else verdict[key])
    dnsmos.release()

    if "stoi" in keys:
        for path, item, row in each(metrics.PESQ, metrics.STOI):
            _put(row, "pesq_wb", verdicts.get(metrics.PESQ, metrics.pesq_wb, item.clean, path))
            _put(row, "stoi", verdicts.get(metrics.STOI, metrics.stoi, item.clean, path))
    return rows


def _row(clip: Clip) -> dict[str, Any]:
    item = clip.item
    row: dict[str, Any] = {"id": item.id, "system": clip.system, "seed": clip.seed, "speaker": item.speaker}
    row |= {"text": item.text, "heard": None, "audio": None, "sha256": None, "seconds": None}
    row |= {"seconds_to_make": clip.seconds_to_make, "error": clip.error, "word_errors": None, "words": None}
    if clip.path is not None:
        row["audio"] = f"audio/{clip.path.name}"
        row["sha256"] = record.sha256_file(clip.path)
        row["seconds"] = round(soundfile.info(str(clip.path)).duration, 4)
    return row


def _put(row: dict[str, Any], key: str, value: float | MetricFailure) -> None:
    """A number, or ``null`` and a reason."""
    if not isinstance(value, MetricFailure) and np.isfinite(value):
        row[key] = round(float(value), 6)
        return
    row[key] = None
    row[f"{key}_error"] = str(value) if isinstance(value, MetricFailure) else f"not a finite number ({value})"


def _put_words(row: dict[str, Any], text: str, heard: str | MetricFailure) -> None:
    """What was heard, its word errors and their rate."""
    if isinstance(heard, MetricFailure):
        return _put(row, "wer", heard)
    row["heard"] = heard
    try:
        counts = metrics.word_errors(text, heard)
    except MetricFailure as failure:
        return _put(row, "wer", failure)
    row["word_errors"], row["words"] = counts
    _put(row, "wer", counts.rate)


def summarise(rows: Sequence[dict[str, Any]], task: str) -> TaskSummary:
    """Means with intervals over the utterances of every system; see ``TaskSummary``."""
    wer, *others = TASK_METRICS[task]
    mine: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        mine.setdefault(row["system"], []).append(row)
    return {system: {key: _entry(some, key) for key in (wer, "wer_corpus", *others)} for system, some in mine.items()}


def _entry(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    good = [row for row in rows if row["wer" if key == "wer_corpus" else key] is not None]
    entry: dict[str, Any] = {"mean": None, "ci95": None, "n": len(good), "n_failed": len(rows) - len(good)}
    entry["protocol"] = metrics.METRICS[key]
    if good:
        speakers, ids = [row["speaker"] for row in good], [row["id"] for row in good]
        if key == "wer_corpus":
            errors, words = [row["word_errors"] for row in good], [row["words"] for row in good]
            estimate = metrics.ratio_interval(errors, words, speakers, ids)
        else:
            estimate = metrics.mean_interval([row[key] for row in good], speakers, ids)
        entry["mean"] = round(estimate.mean, 6)
        entry["ci95"] = [round(value, 6) for value in estimate.ci95] if estimate.ci95 else None
    return entry


def save(rows: Sequence[dict[str, Any]], task: str, out: str | Path, *, allow_missing: bool = False) -> TaskSummary:
    """Write ``<out>/<task>/<system>/utterances.jsonl`` and ``<out>/<task>/summary.json``; return the summary.

    Raises:
        MetisError: (after writing) a system gave no audio for some item, unless ``allow_missing``.
    """
    folder = Path(out) / task
    summary = summarise(rows, task)
    for old in folder.glob("*/utterances.jsonl"):
        if old.parent.name not in summary:
            old.unlink()
    for system in summary:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows if row["system"] == system]
        record.write_atomic(folder / system / "utterances.jsonl", "\n".join(lines) + "\n")
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
    task: str,
    *,
    testset: str | Path,
    out: str | Path,
    systems: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    limit: int | None = None,
    checkpoint: str = "nano",
    device: str = "auto",
    allow_missing: bool = False,
) -> TaskResult:
    """All steps of one task and their record in ``<out>/<task>/run.json`` (no ``systems``: all of them)."""
    started = time.perf_counter()
    items = load_items(testset, task, limit)
    maker, verdicts = Systems(checkpoint, device), Verdicts()
    chosen = list(systems) or systems_of(task, checkpoint)
    rows = score(produce(items, chosen, out, seeds=seeds, maker=maker), verdicts=verdicts)
    units = metrics.resampling_units([item.speaker for item in items], [item.id for item in items])[1]
    settings = {"systems": chosen, "seeds": list(seeds), "limit": limit, "checkpoint": checkpoint}
    run = {
        "task": task,
        "settings": settings,
        "settings_sha256": record.sha256_of(settings),
        "items": len(items),
        "bootstrap": {"units": units, "resamples": metrics.RESAMPLES, "interval": "percentile, 95 %"},
        "device": maker.used_device,
        "verdicts": {"computed": verdicts.computed, "reused": verdicts.reused},
        "wall_s": round(time.perf_counter() - started, 2),
        **record.peak_memory(),
        **record.provenance(checkpoint, testset_folder(testset) / "manifest.jsonl"),
    }
    record.write_json(Path(out) / task / "run.json", run)
    summary = save(rows, task, out, allow_missing=allow_missing)
    return TaskResult(task, items, rows, summary, Path(out))
