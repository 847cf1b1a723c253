"""Judges at work: every metric of every clip, verdicts cached by the contents of what was judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import audio
from metis_lib.assets import metis_home
from metis_lib.errors import MetisError
from metis_lib.evaluation import judges, metrics, record
from metis_lib.evaluation.metrics import JUDGE_RATE, TASKS, MetricFailure
from metis_lib.evaluation.systems import Clip, Item
from metis_lib.notebook import progress


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
        key = record.sha256_of([protocol, self._code, *map(self._hash, paths)])
        if key in self._memory:
            return self._memory[key]
        file = self.folder / protocol.replace("/", "_") / key[:2] / f"{key}.json"
        stored = record.read_json(file)
        self.reused, self.computed = self.reused + bool(stored), self.computed + (not stored)
        try:
            if not stored:
                stored = {"verdict": judge(*(audio.read(path, JUDGE_RATE).numpy() for path in paths))}
                record.write_json(file, stored)
        except (MetricFailure, MetisError, ValueError) as failure:
            stored = {"verdict": MetricFailure((str(failure) or type(failure).__name__).splitlines()[0])}
        self._memory[key] = stored["verdict"]
        return self._memory[key]


def score(clips: Sequence[Clip], *, verdicts: Verdicts | None = None) -> list[dict[str, Any]]:
    """One row of JSON types per clip: every metric as a number, or ``null`` with ``<metric>_error``.

    Judges work one after the other, each loaded once and released; ``heard`` is what the WER judge heard.
    """
    task, keys = clips[0].item.task, TASKS[clips[0].item.task]["metrics"]
    ask = (verdicts or Verdicts()).get
    rows = [_row(clip) for clip in clips]
    for row in rows:
        if row["error"] is not None:
            _put(row, **dict.fromkeys(keys, MetricFailure(f"no audio: {row['error']}")))

    def each(protocol: str, judge: judges.Judge | None = None) -> Iterator[tuple[Path, Item, dict[str, Any]]]:
        """Clips that have audio; after the last one the judge is released."""
        heard = [(clip.path, clip.item, row) for clip, row in zip(clips, rows, strict=True) if clip.path]
        yield from progress(heard, f"{task}: {protocol}")
        if judge:
            judge.release()

    whisper = judges.WhisperJudge()
    for path, item, row in each(metrics.WER, whisper):
        _put_words(row, item.text, ask(metrics.WER, whisper, path))
    speaker = judges.SpeakerJudge()
    for path, item, row in each(metrics.SIM, speaker):
        for key in (key for key in keys if key.startswith("sim_")):
            voices = [ask(metrics.SIM, speaker, voice) for voice in (path, item.reference(key)) if voice]
            failed = [voice for voice in voices if isinstance(voice, MetricFailure)]
            if len(voices) < 2:
                failed = [MetricFailure("the test set has no other speaker here")]
            _put(row, **{key: failed[0] if failed else metrics.cosine(*voices)})
    dnsmos = judges.DnsmosJudge()
    for path, _, row in each(metrics.DNSMOS, dnsmos):
        verdict = ask(metrics.DNSMOS, dnsmos, path)
        _put(row, **(verdict if isinstance(verdict, dict) else dict.fromkeys(dnsmos.POLYNOMIALS, verdict)))
    if "stoi" in keys:
        for path, item, row in each(f"{metrics.PESQ}, {metrics.STOI}"):
            _put(row, pesq_wb=ask(metrics.PESQ, metrics.pesq_wb, item.clean, path))
            _put(row, stoi=ask(metrics.STOI, metrics.stoi, item.clean, path))
    return rows


def _row(clip: Clip) -> dict[str, Any]:
    """What is known of a clip before anybody judges it."""
    item, path = clip.item, clip.path
    return {
        "id": item.id, "system": clip.system, "seed": clip.seed, "speaker": item.speaker, "text": item.text,
        "heard": None, "audio": f"audio/{path.name}" if path else None,
        "sha256": record.sha256_file(path) if path else None,
        "seconds": round(soundfile.info(str(path)).duration, 4) if path else None,
        "seconds_to_make": clip.seconds_to_make, "error": clip.error, "word_errors": None, "words": None,
    }  # fmt: skip


def _put(row: dict[str, Any], **values: float | MetricFailure) -> None:
    """Numbers, or ``null`` and a reason each."""
    for key, value in values.items():
        good = not isinstance(value, MetricFailure) and bool(np.isfinite(value))
        row[key] = round(float(value), 6) if good else None  # type: ignore[arg-type]
        if not good:
            row[f"{key}_error"] = str(value) if isinstance(value, MetricFailure) else f"not a finite number ({value})"


def _put_words(row: dict[str, Any], text: str, heard: str | MetricFailure) -> None:
    """What was heard, its word errors and their rate."""
    if isinstance(heard, MetricFailure):
        return _put(row, wer=heard)
    row["heard"] = heard
    try:
        row["word_errors"], row["words"] = counts = metrics.word_errors(text, heard)
        _put(row, wer=counts.rate)
    except MetricFailure as failure:
        _put(row, wer=failure)
