"""The steps of one task's evaluation, as the notebooks call them: scores, summary, files.

Verdicts are cached by the contents of what was judged: a second run has almost nothing to do.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib import audio
from metis_lib.errors import MetisError
from metis_lib.evaluation import judges, metrics, record, stats
from metis_lib.evaluation.metrics import JUDGE_RATE, MetricFailure
from metis_lib.evaluation.systems import Clip, Item, Systems, load_items, produce, systems_of, testset_folder

_SCORES = ("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl")
TASK_METRICS = {
    "codec": ("wer", "sim_target", "sim_other", *_SCORES, "pesq_wb", "stoi"),
    "se": ("wer", "sim_target", "sim_other", *_SCORES, "pesq_wb", "stoi"),
    "tts": ("wer", "sim_prompt", "sim_other", *_SCORES),
}


class Verdicts:
    """Verdicts of judges on files, cached under ``$METIS_HOME/cache/judges`` by the files' contents."""

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            from metis_lib.assets import metis_home

            folder = metis_home() / "cache" / "judges"
        self.folder, self.reused, self.computed = folder, 0, 0
        self._code = record.code_hash("audio.py", "evaluation/judges.py", "evaluation/metrics.py")
        self._memory: dict[str, Any] = {}
        self._hashes: dict[Path, str] = {}

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = record.sha256_file(path)
        return self._hashes[path]

    def get(self, protocol: str, paths: tuple[Path, ...], judge: Callable[[list[Any]], Any]) -> Any:
        """The verdict of ``judge`` on the 16 kHz arrays of ``paths``, or the MetricFailure that it raised.

        Failures are not cached: what could not be judged is tried again by the next run.
        """
        key = record.sha256_of([protocol, self._code, *[self._hash(path) for path in paths]])
        if key in self._memory:
            return self._memory[key]
        file = self.folder / protocol.replace("/", "_") / key[:2] / f"{key}.json"
        stored = record.read_json(file)
        if stored is not None:
            self.reused += 1
            self._memory[key] = stored["verdict"]
            return stored["verdict"]
        self.computed += 1
        try:
            verdict = judge([audio.read(path, JUDGE_RATE).numpy() for path in paths])
            record.write_json(file, {"verdict": verdict})
        except (MetricFailure, MetisError, ValueError) as failure:
            verdict = MetricFailure(str(failure).splitlines()[0] if str(failure) else type(failure).__name__)
        self._memory[key] = verdict
        return verdict


def _one(judge: judges.Judge) -> Callable[[list[Any]], Any]:
    def verdict(wavs: list[Any]) -> Any:
        (result,) = judge.judge_batch(wavs)
        if isinstance(result, MetricFailure):
            raise result
        return result

    return verdict


def score(clips: Sequence[Clip], *, verdicts: Verdicts | None = None) -> list[dict[str, Any]]:
    """One row of JSON types per clip: every metric as a number, or ``null`` with ``<metric>_error``.

    Judges work one after the other, each loaded once and released; ``heard`` is what the WER judge heard.
    """
    from metis_lib.notebook import progress

    verdicts = verdicts or Verdicts()
    rows = [_row(clip) for clip in clips]
    task = clips[0].item.task
    keys = TASK_METRICS[task]
    pairs = [(clip, row) for clip, row in zip(clips, rows, strict=True)]

    whisper = judges.WhisperJudge()
    for clip, row in progress(pairs, f"{task}: {metrics.WER}"):
        _transcript(clip, row, lambda path: verdicts.get(metrics.WER, (path,), _one(whisper)))
    whisper.release()

    speaker = judges.SpeakerJudge()
    for clip, row in progress(pairs, f"{task}: {metrics.SIM}"):
        for key in (key for key in keys if key.startswith("sim_")):
            reference = clip.item.reference(key)
            if reference is None:
                _put(row, key, MetricFailure("the test set has no other speaker here"))
                continue
            voices = [verdicts.get(metrics.SIM, (p,), _one(speaker)) for p in (clip.path, reference) if p]
            failed = [voice for voice in voices if isinstance(voice, MetricFailure)]
            _put(row, key, failed[0] if failed else _similarity(voices))
    speaker.release()

    dnsmos = judges.DnsmosJudge()
    for clip, row in progress(pairs, f"{task}: {metrics.DNSMOS}"):
        verdict = verdicts.get(metrics.DNSMOS, (clip.path,), _one(dnsmos)) if clip.path else None
        for key in _SCORES:
            _put(row, key, verdict[key] if isinstance(verdict, dict) else verdict)
    dnsmos.release()

    for clip, row in progress(pairs if "stoi" in keys else [], f"{task}: {metrics.PESQ}, {metrics.STOI}"):
        for key, function in (("pesq_wb", metrics.pesq_wb), ("stoi", metrics.stoi)):
            measure, protocol = functools.partial(_spread, function), metrics.METRICS[key]
            pair = (clip.item.clean, clip.path) if clip.path else None
            _put(row, key, verdicts.get(protocol, pair, measure) if pair else None)
    return rows


def _spread(function: Callable[..., float], wavs: list[Any]) -> float:
    return function(*wavs)


def _row(clip: Clip) -> dict[str, Any]:
    item = clip.item
    row: dict[str, Any] = {"id": item.id, "system": clip.system, "seed": clip.seed, "speaker": item.speaker}
    row |= {"text": item.text, "heard": None, "audio": None, "sha256": None, "seconds": None}
    row |= {"seconds_to_make": clip.seconds_to_make, "error": clip.error}
    if clip.path is not None:
        import soundfile

        row["audio"] = f"audio/{clip.path.name}"
        row["sha256"] = record.sha256_file(clip.path)
        row["seconds"] = round(soundfile.info(str(clip.path)).duration, 4)
    return row


def _put(row: dict[str, Any], key: str, value: Any) -> None:
    """A number, or ``null`` and a reason."""
    if row["error"] is not None:
        value = MetricFailure(f"no audio: {row['error']}")
    if isinstance(value, (int, float)) and np.isfinite(value):
        row[key] = round(float(value), 6)
        return
    row[key] = None
    row[f"{key}_error"] = str(value) if isinstance(value, MetricFailure) else f"not a finite number ({value})"


def _similarity(voices: Sequence[Any]) -> float:
    return metrics.cosine(np.asarray(voices[0]), np.asarray(voices[-1]))


def _transcript(clip: Clip, row: dict[str, Any], transcribe: Callable[[Path], Any]) -> None:
    row["word_errors"] = row["words"] = None
    try:
        heard = transcribe(clip.path) if clip.path else None
        if isinstance(heard, MetricFailure):
            raise heard
        row["heard"] = heard
        if heard is None:
            return _put(row, "wer", None)
        counts = metrics.word_errors(clip.item.text, heard)
        row["word_errors"], row["words"] = counts.errors, counts.words
        _put(row, "wer", counts.rate)
    except MetricFailure as failure:
        _put(row, "wer", failure)


def summarise(rows: Sequence[dict[str, Any]], task: str) -> dict[str, dict[str, dict[str, Any]]]:
    """``{system: {metric: {mean, ci95, n, n_failed, protocol}}}``; ``mean``, ``ci95`` are null at n = 0."""
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        keys = list(TASK_METRICS[task])
        keys.insert(1, "wer_corpus")
        summary[system] = {key: _entry(mine, key) for key in keys}
    return summary


def _entry(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    good = [row for row in rows if row["wer" if key == "wer_corpus" else key] is not None]
    entry: dict[str, Any] = {"mean": None, "ci95": None, "n": len(good), "n_failed": len(rows) - len(good)}
    entry["protocol"] = metrics.METRICS[key]
    if good:
        speakers, ids = [row["speaker"] for row in good], [row["id"] for row in good]
        if key == "wer_corpus":
            errors, words = [row["word_errors"] for row in good], [row["words"] for row in good]
            estimate = stats.ratio_interval(errors, words, speakers, ids)
        else:
            estimate = stats.mean_interval([row[key] for row in good], speakers, ids)
        entry["mean"] = round(estimate.mean, 6)
        entry["ci95"] = [round(value, 6) for value in estimate.ci95] if estimate.ci95 else None
    return entry


def save(
    rows: Sequence[dict[str, Any]], task: str, out: str | Path, *, allow_missing: bool = False
) -> dict[str, dict[str, dict[str, Any]]]:
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
    summary: dict[str, dict[str, dict[str, Any]]]
    out: Path

    def clip(self, item: Item, system: str) -> Path | None:
        """The audio of ``system`` for ``item`` (its first seed)."""
        for row in self.rows:
            if row["id"] == item.id and row["system"] == system and row["audio"]:
                return self.out / self.task / system / row["audio"]
        return None


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
    clips = produce(items, chosen, out, checkpoint=checkpoint, seeds=seeds, maker=maker)
    rows = score(clips, verdicts=verdicts)
    units = stats.resampling_units([item.speaker for item in items], [item.id for item in items])[1]
    settings = {"systems": chosen, "seeds": list(seeds), "limit": limit, "checkpoint": checkpoint}
    run = {
        "task": task,
        "settings": settings,
        "settings_sha256": record.sha256_of(settings),
        "manifest_sha256": record.sha256_file(testset_folder(testset) / "manifest.jsonl"),
        **record.checkpoint_hashes(checkpoint),
        "items": len(items),
        "bootstrap": {"units": units, "resamples": stats.RESAMPLES, "interval": "percentile, 95 %"},
        "device": maker.used_device,
        "verdicts": {"computed": verdicts.computed, "reused": verdicts.reused},
        "wall_s": round(time.perf_counter() - started, 2),
        **record.peak_memory(),
        **record.git_state(),
        "versions": record.versions(),
    }
    record.write_json(Path(out) / task / "run.json", run)
    summary = save(rows, task, out, allow_missing=allow_missing)
    return TaskResult(task, items, rows, summary, Path(out))
