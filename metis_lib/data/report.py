"""What a recording is like and what is wrong with it, measured once at its own sample rate; and a page about a corpus.

A recording that cannot be used has a ``reason`` (a key of :data:`REASONS`) and a ``detail``; one that can, but with
care, has warnings.  Levels are in dB relative to full scale.  The page says how much there is of whom, how it sounds,
what is wrong with it, and who may use it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from metis_lib import notebook
from metis_lib.audio import LOUDEST, SILENT_DB, frame_db
from metis_lib.data.store import UNKNOWN, Row, read_jsonl, read_manifest, write_jsonl, write_text
from metis_lib.errors import MetisError
from metis_lib.tokenizers.text import VOICES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = dict[str, Any]
"""What was measured of a recording, or the ``reason`` and ``detail`` why it cannot be used."""

MIN_SECONDS, LONG_SECONDS, MAX_SECONDS = 0.3, 30.0, 600.0
"""Shorter and longer recordings than the first and last are refused; from the second on one is warned of."""
LETTERS_PER_SECOND = (3.0, 35.0)
"""A text outside of this range cannot be what is said; counted between the first and last loud moment."""
LOW_DB = -50.0
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
    "format": "a format that is not read",
    "scale": "samples beyond -1..1, as of integers kept as floats",
    "silent": f"nothing above {SILENT_DB:.0f} dB RMS",
    "wrong text": "the text cannot be what is said in this time, or has no letters",
    "same id": "another recording has this id",
    "same sound": "another recording has the same samples",
    "held-out text": "the sentence is also said in another split",
    "bad row": "the list names it in a way that cannot be used",
}
SOFT = ("8-bit", "wrong text", "same sound")
"""Reasons that the user may overrule, so that they only warn."""


# ---------------------------------------------------------------- recordings


def bandwidth(wav: np.ndarray, rate: int) -> float:
    """Highest frequency in Hz that the speech of [S] reaches: within 60 dB of its strongest in the loud frames.

    Each frequency counts by the 98th percentile of its power over time, so that sibilants show it.  On human
    recordings limited to 2, 4, 5.5 and 8 kHz it is right within 10 %.
    """
    size = min(1 << max(round(np.log2(rate / 23)), 3), len(wav))  # about 43 ms
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
    if (peak := float(np.abs(data).max())) > LOUDEST:
        return _bad("scale", f"samples lie in -1..1, not at {peak:.3g}; divide 16-bit numbers by 32768")
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
    if not os.path.isfile(path) or path.stat().st_size == 0:  # Path.is_file raises for a name that is too long
        return [_bad("empty", "the file has no bytes") if os.path.isfile(path) else _bad("missing")] * len(spans)
    try:
        file = soundfile.SoundFile(str(path))
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:  # TypeError: headerless
        return [_bad("not audio", error)] * len(spans)
    with file:
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        fault = None if file.frames else _bad("empty", "no samples")
        # a WAV written to a pipe says a size near 2 or 4 GB, which is no fault
        if cut and int(cut[2]) < int(cut[1]) < 0x7FFF0000:
            fault = _bad("damaged", f"only {int(cut[2])} of {int(cut[1])} bytes of sound are there")
        if file.channels > 2:
            fault = _bad("channels", f"{file.channels} channels; make one or two of them")
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
    part, fields = cache.with_name(cache.name + ".part"), ("path", "start", "end", "size", "mtime")
    try:
        lines = read_jsonl(part)
        write_jsonl(part, lines)  # without a last line that was cut short
        lines = [r for r in read_jsonl(cache) + lines if isinstance(r, dict) and isinstance(r.get("path"), str)]
    except (OSError, ValueError) as error:
        raise MetisError(f"{cache}: cannot be read and written ({error}); remove it or give another place") from None

    @functools.cache
    def stamp(path: str) -> tuple[int, int]:
        stat = (root / path).stat() if os.path.isfile(root / path) else None
        return (stat.st_size, stat.st_mtime_ns) if stat else (-1, 0)

    told, known = {}, {}  # what an import wrote beside the facts, and the facts
    for row in lines:
        key = tuple(row.get(k) for k in fields)
        told[key], known[key] = {k: row.pop(k) for k in ("id", "warnings") if k in row}, row
    keys = [(path, start, end, *stamp(path)) for path, start, end in items]
    todo: dict[str, list[Any]] = defaultdict(list)
    for key in dict.fromkeys(keys):
        if key not in known:
            todo[key[0]].append(key)
    with ThreadPoolExecutor(workers) as pool, open(part, "a", encoding="utf-8") as stream:
        measured = pool.map(lambda path: measure(root / path, [key[1:3] for key in todo[path]]), todo)
        for done, (path, found) in enumerate(zip(todo, measured, strict=True), 1):
            for key, facts in zip(todo[path], found, strict=True):
                known[key] = dict(zip(fields, key, strict=True)) | facts
                stream.write(json.dumps(known[key], ensure_ascii=False) + "\n")
            stream.flush()
            if done % 1000 == 0:
                say(f"{done} of {len(todo)} recordings looked at")
    if todo:
        now = (key for key in known if key[3:] == stamp(key[0]))  # what has changed since is not known any more
        write_jsonl(cache, (told.get(key, {}) | known[key] for key in now))
    part.unlink(missing_ok=True)
    return [dict(known[key]) for key in keys]


def warnings_of(facts: Facts, text: str, language: str) -> dict[str, str]:
    """What to know of a recording that can be read: short name to detail; soft reasons are among them."""
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
        "long": facts["seconds"] > LONG_SECONDS
        and f"{facts['seconds']:.0f} s: cut it into utterances"
        + " (above 60 s it is not tokenised)" * (facts["seconds"] > 60),
        "language": language not in VOICES and f"no phones for {language!r}: not for text to speech",
    }
    return {name: detail for name, detail in found.items() if detail}


# ---------------------------------------------------------------- corpora


def sentence_key(text: str) -> str:
    """What makes two sentences the same: their letters and digits, whatever their case."""
    return "".join(c for c in text.casefold() if c.isalnum())


def _amount(rows: Sequence[Row]) -> dict[str, Any]:
    hours, human = (round(sum(r.duration for r in some) / 3600, 3) for some in (rows, [r for r in rows if r.human]))
    voices = len({r.speaker for r in rows} - {UNKNOWN})
    return {"hours": hours, "human_hours": human, "utterances": len(rows), "voices": voices}


def _share(rows: Sequence[Row], key: str) -> dict[str, dict[str, Any]]:
    """Hours, utterances and voices of each value of the field ``key``, the greatest first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[getattr(row, key)].append(row)
    found = {name: _amount(some) for name, some in groups.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1]["hours"], item[0])))


def _quantiles(values: Sequence[float], digits: int = 2) -> dict[str, float] | None:
    """Minimum, 5th, 50th and 95th percentile and maximum; None of nothing."""
    names, points = ("min", "p5", "median", "p95", "max"), (0, 5, 50, 95, 100)
    if not len(values):
        return None
    return {n: round(float(q), digits) for n, q in zip(names, np.percentile(values, points), strict=True)}


def shared(rows: Sequence[Row]) -> dict[str, int]:
    """Known speakers, and sentences, that are in training and in a split held out from it.

    Speakers of ``seen`` are those of the training by design and do not count.
    """
    voices, sentences = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for row in rows:
        if row.speaker != UNKNOWN and row.split != "seen":
            voices[row.speaker].add(row.split)
        sentences[sentence_key(row.text)].add("test" if row.split == "seen" else row.split)
    sentences.pop("", None)
    return {
        "speakers": sum(len(s) > 1 for s in voices.values()),
        "sentences": sum(len(s) > 1 for s in sentences.values()),
    }


def summarise(
    rows: Sequence[Row], facts: Sequence[Facts] | None = None, refused: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The numbers of the report as JSON types.

    Args:
        rows: the manifest.
        facts: what :func:`measure_all` found of each row, in their order; None leaves out what needs them.
        refused: lines of ``refused.jsonl``.

    Returns:
        ``hours``, ``human_hours``, ``utterances``, ``voices``, the same by ``splits``, ``languages``, ``sources`` and
        ``licences``; ``duration_s`` (quantiles); ``without_text``; ``shared`` (:func:`shared`); ``refused`` (reason
        to count); and from facts ``sample_rates`` and ``warnings`` (name to count), quantiles of ``rms_db``,
        ``bandwidth_hz`` and ``letters_per_second``, ``clipped`` (recordings).
    """
    out = _amount(rows) | {
        **{f"{key}s": _share(rows, key) for key in ("split", "language", "source", "licence")},
        "duration_s": _quantiles([r.duration for r in rows]),
        "without_text": sum(not r.text for r in rows),
        "shared": shared(rows),
    }
    reasons = Counter(r["reason"] for r in refused)
    if facts is not None:
        good = [(r, f) for r, f in zip(rows, facts, strict=True) if "reason" not in f]
        reasons.update(f["reason"] for f in facts if "reason" in f)
        pace = [letters(r.text) / max(f["speech"], 0.1) for r, f in good if r.text]
        warned = Counter(name for r, f in good for name in warnings_of(f, r.text, r.language))
        out |= {
            "sample_rates": {str(rate): n for rate, n in sorted(Counter(f["rate"] for _, f in good).items())},
            "rms_db": _quantiles([f["rms_db"] for _, f in good], 1),
            "bandwidth_hz": _quantiles([f["bandwidth_hz"] for _, f in good], 0),
            "letters_per_second": _quantiles(pace, 1),
            "clipped": warned["clipped"],
            "warnings": dict(warned.most_common()),
        }
    return out | {"refused": dict(reasons.most_common())}


def plots(rows: Sequence[Row], facts: Sequence[Facts]) -> dict[str, Figure]:
    """Histograms of durations, levels and bandwidths, and the hours of each voice; caption to figure."""
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    notebook.style()
    frame = pandas.DataFrame(
        (r.speaker, "people" if r.human else "synthetic", r.duration, f["rms_db"], f["bandwidth_hz"] / 1000)
        for r, f in zip(rows, facts, strict=True) if "reason" not in f
    ).set_axis(["speaker", "of", "seconds", "level (dB RMS)", "kHz"], axis=1)  # fmt: skip
    colours = dict(zip(("people", "synthetic"), seaborn.color_palette("colorblind"), strict=False))
    shown = {
        "Durations (people and synthetic voices stacked)": "seconds",
        "Levels (0 dB is full scale)": "level (dB RMS)",
        "Bandwidth: the highest frequency that the speech reaches": "kHz",
        "Speech of each voice, in minutes": None,
    }
    figures = {}
    for caption, column in shown.items():
        figures[caption], axis = plt.subplots(figsize=(5.2, 2.7))
        if column:
            order = [kind for kind in colours if kind in set(frame["of"])]
            look: dict[str, Any] = dict(hue="of", hue_order=order, palette=colours, multiple="stack", bins=40)
            seaborn.histplot(frame, x=column, ax=axis, **look).set(ylabel="recordings")
            axis.get_legend().set_title("")
        else:
            minutes = (frame.groupby(["speaker", "of"])["seconds"].sum() / 60).sort_values(ascending=False)
            kinds = minutes.index.get_level_values("of")
            axis.bar(range(len(minutes)), minutes, width=1.0, color=[colours[kind] for kind in kinds], linewidth=0)
            scale = "log" if minutes.max() > 30 * minutes.min() else "linear"
            axis.set(xlabel="voices, in order", ylabel="minutes", yscale=scale)
        plt.close(figures[caption])
    return figures


def corpus_report(
    manifest: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, title: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of a corpus (:func:`summarise`); with ``out`` also a page that holds its plots, and its JSON.

    Args:
        manifest: the ``manifest.jsonl``; ``refused.jsonl`` and ``facts.jsonl`` are looked for beside it.  What is
            missing of the facts (all of them, in a corpus that was not imported) is measured now, and written there.
        out: where the page goes (``.html``); the numbers go beside it (``.json``).  It names no path of the machine.
        title: heading; default the name of the manifest's folder.
        say: called with lines about the progress.

    Raises:
        MetisError: no such manifest, or a bad one.
    """
    manifest = Path(manifest).expanduser()
    rows, refused = read_manifest(manifest), read_jsonl(manifest.with_name("refused.jsonl"))
    spans = [(r.path, r.start, r.end) for r in rows]
    found = measure_all(spans, manifest.parent, manifest.with_name("facts.jsonl"), say=say)
    summary = summarise(rows, found, refused)
    if out is None:
        return summary
    faults = [(f["reason"], f["id"], f["detail"]) for f in refused]
    warned = []
    for row, fact in zip(rows, found, strict=True):
        if "reason" in fact:
            faults.append((fact["reason"], row.id, fact["detail"]))
        else:
            warned += [(name, row.id, said) for name, said in warnings_of(fact, row.text, row.language).items()]
    text = notebook.page(
        Path(__file__).with_name("report.html"), title=title or manifest.resolve().parent.name, s=summary,
        plots=plots(rows, found) if summary["sample_rates"] else {},
        faults={"Left out": (summary["refused"], faults), "Kept, with a warning": (summary["warnings"], warned)},
    )  # fmt: skip
    out = Path(out).expanduser()
    write_text(out.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(out, text)
    return summary
