"""What a recording is like and what is wrong with it, measured once at its own sample rate.

A recording that cannot be used has a ``reason`` (a key of :data:`REASONS`) and a ``detail``; one that can, but with
care, has warnings.  Levels are in dB relative to full scale.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib.data.simulate import frame_db
from metis_lib.data.store import read_jsonl, write_jsonl
from metis_lib.errors import MetisError

MIN_SECONDS, LONG_SECONDS, MAX_SECONDS = 0.3, 30.0, 600.0
"""Shorter and longer recordings than the first and last are refused; from the second on one is warned of."""
LETTERS_PER_SECOND = (3.0, 35.0)
"""A text outside of this range cannot be what is said; counted between the first and last loud moment."""
SILENT_DB, LOW_DB = -75.0, -50.0
"""RMS below which a recording is silent, and below which its level is warned of."""
CLIPPED, DC_OFFSET = 0.001, 0.01
"""Share of samples at full scale, and mean of the samples, that are warned of."""

REASONS = {
    "missing": "the file does not exist",
    "empty": "the file or the recording in it has no content",
    "not audio": "the file is no recording that can be read",
    "damaged": "the file is cut off or broken",
    "channels": "more than two channels",
    "8-bit": "linear samples of 8 bits: noise at about -50 dB",
    "span": "start and end lie outside of the recording or out of order",
    "too short": f"less than {MIN_SECONDS} s",
    "too long": f"more than {MAX_SECONDS:.0f} s; cut it, or give start and end of each utterance",
    "not finite": "NaN or infinite samples",
    "silent": f"nothing above {SILENT_DB:.0f} dB RMS",
    "wrong text": "the text cannot be what is said in this time, or has no letters",
    "same id": "another recording has this id",
    "same sound": "another recording has the same samples",
    "held-out text": "the sentence is also said in another split",
    "bad row": "the list names it in a way that cannot be used",
}
SOFT = ("8-bit", "wrong text", "same sound")
"""Reasons that the user may overrule, so that they only warn."""


def bandwidth(wav: np.ndarray, rate: int) -> float:
    """Highest frequency in Hz that the speech of [S] reaches: within 60 dB of its strongest in the loud frames.

    Each frequency counts by the 98th percentile of its power over time, so that sibilants show it.  On human
    recordings limited to 2, 4, 5.5 and 8 kHz it is right within 10 %.
    """
    size = min(1 << round(np.log2(rate / 23)), len(wav))  # about 43 ms
    starts = np.linspace(0, len(wav) - size, min(max(2 * len(wav) // size - 1, 1), 1500)).astype(int)
    frames = wav[starts[:, None] + np.arange(size)] * np.hanning(size).astype(np.float32)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    energy = power.sum(axis=1)
    reached = np.percentile(power[energy > energy.max() * 1e-4], 98, axis=0)
    smooth = np.convolve(reached, np.ones(5) / 5, "same")
    return float(min((np.flatnonzero(smooth > smooth.max() * 1e-6)[-1] + 1) * rate / size, rate / 2))


def letters(text: str) -> int:
    """Letters to say: a digit counts as 4 (its name), a Chinese, Japanese or Korean sign as 3 (a syllable)."""
    return sum(4 if c.isdigit() else (3 if ord(c) >= 0x2E80 else 1) for c in text if c.isalnum())


def _bad(reason: str, detail: object = "") -> dict[str, Any]:
    if isinstance(detail, Exception):  # what a library says about a file, without the file's name
        detail = (str(detail).splitlines() or [""])[0].rsplit(": ", 1)[-1].strip().rstrip(".")
    return {"reason": reason, "detail": detail or REASONS[reason]}


def _file_fault(file: Any) -> dict[str, Any] | None:
    if file.channels > 2:
        return _bad("channels", f"{file.channels} channels; make one or two of them")
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    # a WAV written to a pipe says a size near 2 or 4 GB, which is no fault
    if cut and int(cut[2]) < int(cut[1]) < 0x7FFF0000:
        return _bad("damaged", f"only {int(cut[2])} of {int(cut[1])} bytes of sound are there")
    return None if file.frames else _bad("empty", "no samples")


def _measure_span(file: Any, start: float | None, end: float | None) -> dict[str, Any]:
    """Facts of one span of an open file, or why it cannot be used."""
    rate, total = file.samplerate, file.frames
    first, last = round((start or 0.0) * rate), total if end is None else round(end * rate)
    last = total if 0 < last - total <= 0.05 * rate else last
    if not 0 <= first < last <= total:
        return _bad("span", f"{first / rate:.2f} to {last / rate:.2f} s of {total / rate:.2f} s")
    seconds = (last - first) / rate
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        return _bad("too short" if seconds < MIN_SECONDS else "too long", f"{seconds:.2f} s")
    try:
        file.seek(first)
        data = file.read(last - first, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, ValueError) as error:
        return _bad("damaged", error)
    if len(data) < 0.95 * (last - first) - 0.1 * rate:  # headers of MP3 are not exact
        return _bad("damaged", f"only {len(data) / rate:.2f} of {seconds:.2f} s can be read")
    if not np.isfinite(data).all():
        return _bad("not finite")
    wav = data.mean(axis=1)
    rms_db = 10 * np.log10(np.mean(np.square(wav, dtype=np.float64)) + 1e-20)
    if rms_db < SILENT_DB:
        return _bad("silent")
    db = frame_db(wav, rate)
    loud = np.flatnonzero(db > db.max() - 38)
    samples = np.clip(np.round(wav * 32767), -32768, 32767).astype("<i2").tobytes()
    return {
        "seconds": round(len(wav) / rate, 3), "speech": round(float(loud[-1] - loud[0] + 1) / 100, 2),
        "rate": rate, "channels": file.channels, "subtype": file.subtype,
        "peak": round(float(np.abs(data).max()), 4), "rms_db": round(float(rms_db), 2),
        "clipped": round(float(np.mean(np.abs(data) > 0.9995)), 6), "dc": round(float(wav.mean()), 5),
        "bandwidth_hz": round(bandwidth(wav, rate)),
        "sound": hashlib.blake2b(samples + str(rate).encode(), digest_size=8).hexdigest(),
    }  # fmt: skip


def measure(path: Path, spans: Sequence[tuple[float | None, float | None]]) -> list[dict[str, Any]]:
    """Facts of each span (seconds; None, None: all) of a file; in place of facts ``reason`` and ``detail``.

    Nothing raises: whatever is wrong with the file is the result.
    """
    import soundfile

    try:
        if not path.is_file() or path.stat().st_size == 0:
            return [_bad("empty", "the file has no bytes") if path.is_file() else _bad("missing")] * len(spans)
        file = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        return [_bad("not audio", error)] * len(spans)
    with file:
        fault = _file_fault(file)
        return [fault or _measure_span(file, *span) for span in spans]


def measure_all(
    items: Sequence[tuple[str, float | None, float | None]], root: Path, cache: Path, workers: int = 2,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Facts of ``items`` (path relative to ``root``, start, end) in their order, as :func:`measure` gives them.

    ``cache`` holds the lines of an earlier run: only new or changed files are decoded, in ``workers`` threads.
    What is measured goes to ``cache`` with the suffix ``.part`` at once, so that a stopped run goes on from there.

    Raises:
        MetisError: ``cache`` cannot be read or written.
    """
    part = cache.with_name(cache.name + ".part")
    try:
        lines = read_jsonl(part)
        write_jsonl(part, lines)  # without a last line that was cut short
        lines = [{k: v for k, v in r.items() if k not in ("id", "warnings")} for r in read_jsonl(cache) + lines]
    except (OSError, ValueError) as error:
        raise MetisError(f"{cache}: cannot be read and written ({error}); remove it or give another place") from None
    known = {(r["path"], r["start"], r["end"], r["size"], r["mtime"]): r for r in lines}
    stamps: dict[str, tuple[int, int]] = {}
    todo: dict[str, list[int]] = defaultdict(list)
    results: list[dict[str, Any]] = [{}] * len(items)
    for i, (path, start, end) in enumerate(items):
        if path not in stamps:
            stat = (root / path).stat() if (root / path).is_file() else None
            stamps[path] = (stat.st_size, stat.st_mtime_ns) if stat else (-1, 0)
        results[i] = dict(known.get((path, start, end, *stamps[path]), {}))
        if not results[i]:
            todo[path].append(i)
    with ThreadPoolExecutor(workers) as pool, open(part, "a", encoding="utf-8") as stream:
        measured = pool.map(lambda path: measure(root / path, [items[i][1:] for i in todo[path]]), todo)
        for done, (path, found) in enumerate(zip(todo, measured, strict=True), 1):
            for i, facts in zip(todo[path], found, strict=True):
                size, mtime = stamps[path]
                results[i] = {"path": path, "start": items[i][1], "end": items[i][2], "size": size, "mtime": mtime}
                results[i] |= facts
                stream.write(json.dumps(results[i], ensure_ascii=False) + "\n")
            stream.flush()
            if done % 1000 == 0:
                say(f"{done} of {len(todo)} recordings looked at")
    if todo:
        known |= {(r["path"], r["start"], r["end"], r["size"], r["mtime"]): r for r in results}
        write_jsonl(cache, known.values())
    part.unlink(missing_ok=True)
    return results


def warnings_of(facts: dict[str, Any], text: str, language: str) -> dict[str, str]:
    """What to know of a recording that can be read: short name to detail; soft reasons are among them."""
    from metis_lib.tokenizers.text import VOICES

    pace = letters(text) / max(facts["speech"], 0.1)
    spoken = not text or LETTERS_PER_SECOND[0] <= pace <= LETTERS_PER_SECOND[1]
    found = {
        "wrong text": "" if spoken else (f"{pace:.1f} letters a second" if pace else "no letters in the text"),
        "8-bit": facts["subtype"] in ("PCM_U8", "PCM_S8") and REASONS["8-bit"],
        "clipped": facts["clipped"] > CLIPPED and f"{100 * facts['clipped']:.2f} % of the samples at full scale",
        "low rate": facts["rate"] < 16_000 and f"{facts['rate']} Hz: nothing above {facts['rate'] / 2000:g} kHz",
        "low level": facts["rms_db"] < LOW_DB and f"{facts['rms_db']:.0f} dB RMS",
        "DC offset": abs(facts["dc"]) > DC_OFFSET and f"mean of the samples {facts['dc']:.3f}",
        "stereo": facts["channels"] == 2 and "the channels are averaged",
        "long": facts["seconds"] > LONG_SECONDS and f"{facts['seconds']:.0f} s: cut it into utterances",
        "language": language not in VOICES and f"no phones for {language!r}: not for text to speech",
    }
    return {name: detail for name, detail in found.items() if detail}
