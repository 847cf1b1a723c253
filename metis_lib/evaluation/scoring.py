"""Judges at work: every metric of every clip, verdicts cached by the contents of what was judged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import audio
from metis_lib.assets import metis_home
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record
from metis_lib.evaluation.judges import ABSENT, BROKE, DnsmosJudge, Judge, reason_of
from metis_lib.evaluation.metrics import JUDGE_RATE, SPECS, TASKS, MetricFailure, Unheard
from metis_lib.evaluation.paper_judges import choose
from metis_lib.evaluation.systems import Clip
from metis_lib.notebook import progress
from metis_lib.tasks import like

_CODE = ("audio.py", "data/align.py", *(f"evaluation/{name}.py" for name in ("judges", "metrics", "paper_judges")))
PROSODY = ("f0_rmse", "f0_corr", "vuv_f1")
PAIRS: dict[str, Callable[..., Any]] = {
    "pesq_wb": metrics.pesq_wb, "pesq_nb": functools.partial(metrics.pesq_wb, band="nb"), "stoi": metrics.stoi,
    "estoi": functools.partial(metrics.stoi, extended=True), "si_sdr": metrics.si_sdr,
    "f0_rmse": metrics.prosody, "duration_ratio": metrics.duration_ratio,
}  # fmt: skip
"""Metrics of a clip against ``clean``; ``f0_rmse`` gives all of ``PROSODY``."""
TEXTS = {
    "wer": metrics.word_errors, "cer": metrics.character_errors, "wer_seedtts": metrics.word_errors_seedtts,
}  # fmt: skip

NEARER = {"vc": ("sim_prompt", "sim_source"), "tse": ("sim_target", "sim_interferer")}
"""Of each task the similarities whose first must be the larger one."""
CLEAR_DB = 10.0
"""Signal-to-noise ratio from which on word errors count into ``wer_10db``."""


class Verdicts:
    """Verdicts of judges on files, cached under ``$METIS_HOME/cache/judges`` by the files' contents.

    Failures are not cached there: what could not be judged is tried again by the next run.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.reused, self.computed = folder or metis_home() / "cache" / "judges", 0, 0
        self._code = record.code_hash(*_CODE)
        self._hash = functools.cache(record.sha256_file)
        self._memory: dict[str, Any] = {}
        self.weights: dict[str, str] = {}
        """Of judges whose weights their users put there: protocol to what tells them from others."""

    def get(self, protocol: str, judge: Callable[..., Any], *paths: Path) -> Any:
        """What ``judge`` says of the recordings at ``paths`` (16 kHz arrays), or the MetricFailure that it raised."""
        key = self._key(protocol, *paths)
        if not self._recall(protocol, key):
            try:
                self._keep(protocol, key, judge(*(audio.read(path, JUDGE_RATE).numpy() for path in paths)))
            except ImportError as error:
                self._keep(protocol, key, MetricFailure(f"{ABSENT}: {error}"))
            except Exception as error:  # of whatever library: one file's failure is its own
                refused = isinstance(error, (MetricFailure, MetisError))
                self._keep(protocol, key, reason_of(error, "" if refused else BROKE))
        return self._memory[key]

    def many(self, judge: Judge, paths: Sequence[Path], label: str = "") -> list[Any]:
        """What ``judge`` says of every recording at ``paths``, in order: a verdict or a MetricFailure each.

        Recordings are read and judged ``judge.batch`` at a time, equal ones once; verdicts are kept batch by batch.
        """
        protocol = judge.protocol if judge.language == "en" else f"{judge.protocol}:{judge.language}"
        if (identity := judge.identity()) and paths:
            self.weights[judge.protocol] = identity
        keys = [self._key(protocol, path, identity=identity) for path in paths]
        left = {key: path for key, path in zip(keys, paths, strict=True) if not self._recall(protocol, key)}
        wanted = list(left.items())
        for start in progress(range(0, len(wanted), judge.batch), label or protocol):
            waves = {}
            for key, path in wanted[start : start + judge.batch]:
                try:
                    waves[key] = audio.read(path, JUDGE_RATE, silence=True).numpy()  # the judge says what it hears
                except Exception as error:
                    self._keep(protocol, key, reason_of(error))
            for key, verdict in zip(waves, judge.many(list(waves.values())), strict=True):
                self._keep(protocol, key, verdict)
        return [self._memory[key] for key in keys]

    def _key(self, protocol: str, *paths: Path, identity: str = "") -> str:
        return record.sha256_of([protocol, self._code, *map(self._hash, paths), *filter(None, [identity])])

    def _file(self, protocol: str, key: str) -> Path:
        return self.folder / protocol.replace("/", "_").replace(":", "_") / key[:2] / f"{key}.json"

    def _recall(self, protocol: str, key: str) -> bool:
        """Whether the verdict is known, from this run or from the disk."""
        if key not in self._memory and (stored := record.read_json(self._file(protocol, key))):
            self._memory[key] = stored["verdict"]
            self.reused += 1
        return key in self._memory

    def _keep(self, protocol: str, key: str, verdict: Any) -> None:
        self._memory[key] = verdict
        self.computed += 1
        if not isinstance(verdict, MetricFailure):
            record.write_json(self._file(protocol, key), {"verdict": verdict})


def score(
    clips: Sequence[Clip], *, verdicts: Verdicts | None = None, judges: str = "offline", device: str = "auto"
) -> list[dict[str, Any]]:
    """One row of JSON types per clip: every metric as a number, or ``null`` with ``<metric>_error``.

    Judges work one after the other, batch by batch, each loaded once and released; ``heard`` is what the WER judge
    heard.  A metric that no item has the reference for is in no row, and a measure that a system
    cannot have (the real-time factor of a recording) is not in its rows.

    Args:
        clips: of one task.
        verdicts: the cache to use.
        judges: ``offline``, or ``paper`` (see :func:`metis_lib.evaluation.metrics.protocol`).
        device: ``auto``, ``cpu`` or ``cuda``, for the judges.
    """
    task = clips[0].item.task
    keys = [
        key for key in TASKS[task]["metrics"] + TASKS[task]["measures"]
        if SPECS[key].only in ("", judges)  # facts of clips, which no item has, are looked for later
        and all(any(getattr(clip.item, need, True) for clip in clips) for need in SPECS[key].needs)
    ]  # fmt: skip
    if not {*NEARER.get(like(task), ())} <= {*keys}:  # a test set without the other voice
        keys = [key for key in keys if key != "nearer"]
    verdicts, rows = verdicts or Verdicts(), [_row(clip) for clip in clips]
    heard = [(clip.path, clip, row) for clip, row in zip(clips, rows, strict=True) if clip.path]
    chosen = choose(judges, task, device, list(dict.fromkeys(clip.item.language for _, clip, _ in heard)))
    for row in rows:
        if row["error"] is not None:
            lost = [key for key in keys if not {"seconds_to_make", "measured"} & set(SPECS[key].needs)]
            lost = [key for key in lost if key != "wer_10db" or _clear(row)]
            _put(row, **dict.fromkeys(lost, MetricFailure(f"no audio: {row['error']}")))
    for role, judge in chosen.items():
        kind, _, language = role.partition(":")
        mine = [(path, clip, row) for path, clip, row in heard if kind != "words" or clip.item.language == language]
        voices = [key for key in keys if key.startswith("sim_")] if kind == "voice" else []
        others = [voice for _, clip, _ in mine for key in voices if (voice := clip.item.reference(key))]
        paths = [path for path, _, _ in mine]
        found = dict(
            zip(paths + others, verdicts.many(judge, paths + others, f"{task}: {judge.protocol}"), strict=True)
        )
        judge.release()
        for path, clip, row in mine:
            if kind == "words":
                words = "" if isinstance(found[path], Unheard) else found[path]  # seed-tts-eval too counts all as lost
                _put_words(row, clip.item.text or "", words, keys, language)
            elif kind == "voice":
                for key in voices:
                    _put(row, **{key: _similarity(found[path], found.get(clip.item.reference(key)))})  # type: ignore[arg-type]
                if "nearer" in keys:
                    first, second = NEARER[like(task)]
                    why = next((row[f"{key}_error"] for key in (first, second) if row[key] is None), None)
                    _put(row, nearer=MetricFailure(why) if why else float(row[first] > row[second]))
            else:
                _put_all(row, DnsmosJudge.KEYS if kind == "opinion" else ("nisqa",), found[path])
    for path, clip, row in progress(heard, f"{task}: against the clean recording"):
        for key in (key for key in keys if key in PAIRS):
            absent = MetricFailure("the test set has no clean recording here")
            clean = clip.item.clean
            verdict = verdicts.get(SPECS[key].protocol, PAIRS[key], clean, path) if clean else absent
            _put_all(row, PROSODY if key == "f0_rmse" else (key,), verdict)
        measured: dict[str, Any] = dict(clip.measured)
        if clip.seconds_to_make is not None:
            measured["rtf"] = clip.seconds_to_make / row["seconds"] if row["seconds"] else MetricFailure("no audio")
        _put(row, **{key: value for key, value in measured.items() if key in keys})
    return rows


def _row(clip: Clip) -> dict[str, Any]:
    """What is known of a clip before anybody judges it."""
    item, path = clip.item, clip.path
    return {
        "id": item.id, "system": clip.system, "seed": clip.seed, "speaker": item.speaker, "text": item.text,
        "heard": None, "audio": (Path("audio") / Path(item.id).parent / path.name).as_posix() if path else None,
        "sha256": record.sha256_file(path) if path else None,
        "seconds": round(soundfile.info(str(path)).duration, 4) if path else None,
        "seconds_to_make": clip.seconds_to_make, "error": clip.error, **dict.fromkeys(_COUNTS),
        **({"snr_db": item.extra["snr_db"]} if "snr_db" in item.extra else {}),
    }  # fmt: skip


def _clear(row: dict[str, Any]) -> bool:
    """Whether the noise in a row's input is known to be weak."""
    return row.get("snr_db") is not None and row["snr_db"] >= CLEAR_DB


def _put_all(row: dict[str, Any], keys: Sequence[str], verdict: Any) -> None:
    """A verdict on several metrics at once, or on one, or why there is none."""
    _put(row, **(verdict if isinstance(verdict, dict) else dict.fromkeys(keys, verdict)))


def _put(row: dict[str, Any], **values: float | MetricFailure) -> None:
    """Numbers, or ``null`` and a reason each."""
    for key, value in values.items():
        good = not isinstance(value, MetricFailure) and bool(np.isfinite(value))
        row[key] = round(float(value), 6) if good else None  # type: ignore[arg-type]
        if not good:
            row[f"{key}_error"] = str(value) if isinstance(value, MetricFailure) else f"not a finite number ({value})"


def _similarity(mine: Any, other: Any) -> float | MetricFailure:
    """Cosine of two embeddings, or why there is none."""
    if other is None:
        return MetricFailure("the test set has no such recording here")
    failed = [voice for voice in (mine, other) if isinstance(voice, MetricFailure)]
    return failed[0] if failed else metrics.cosine(mine, other)


_COUNTS = ("word_errors", "words", "substitutions", "deletions", "insertions")


def _put_words(row: dict[str, Any], text: str, heard: str | MetricFailure, keys: Sequence[str], language: str) -> None:
    """What was heard, its errors by every protocol of text, and the counts of the first."""
    if isinstance(heard, str):
        row["heard"] = heard
    for key in (key for key in TEXTS if key in keys):
        try:
            if isinstance(heard, MetricFailure):
                raise heard
            counts = TEXTS[key](text, heard, language)
            rate: float | MetricFailure = counts.rate
            row.update(zip(_COUNTS, counts, strict=True) if key == "wer" else {})
        except MetricFailure as failure:
            rate = failure
        _put(row, **{key: rate}, **({"wer_10db": rate} if key == "wer" and "wer_10db" in keys and _clear(row) else {}))
