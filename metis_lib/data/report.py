"""A page about a corpus: how much there is of whom, how it sounds, what is wrong with it, who may use it."""

from __future__ import annotations

import base64
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metis_lib.data import checks
from metis_lib.data.importers import UNKNOWN, sentence_key
from metis_lib.data.store import Row, read_jsonl, read_manifest, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = dict[str, Any]


def _share(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
    """Hours, utterances and voices of each value of ``key``, the greatest first."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    found = {name: _amount(some) for name, some in groups.items()}
    return dict(sorted(found.items(), key=lambda item: (-item[1]["hours"], item[0])))


def _amount(rows: Sequence[Row]) -> dict[str, Any]:
    seconds = [sum(r.duration for r in some) for some in (rows, [r for r in rows if r.human])]
    voices = len({r.speaker for r in rows} - {UNKNOWN})
    hours, human = (round(s / 3600, 3) for s in seconds)
    return {"hours": hours, "human_hours": human, "utterances": len(rows), "voices": voices}


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
        facts: what :func:`checks.measure_all` found of each row, in their order; None leaves out what needs them.
        refused: lines of ``refused.jsonl``.

    Returns:
        ``hours``, ``human_hours``, ``utterances``, ``voices``, the same by ``splits``, ``languages``, ``sources`` and
        ``licences``; ``duration_s`` (quantiles); ``without_text``; ``shared`` (:func:`shared`); ``refused`` (reason
        to count); and from facts ``sample_rates`` and ``warnings`` (name to count), quantiles of ``rms_db``,
        ``bandwidth_hz`` and ``letters_per_second``, ``clipped`` (recordings).
    """
    out = _amount(rows) | {
        "splits": _share(rows, lambda r: r.split),
        "languages": _share(rows, lambda r: r.language),
        "sources": _share(rows, lambda r: r.source),
        "licences": _share(rows, lambda r: r.licence),
        "duration_s": _quantiles([r.duration for r in rows]),
        "without_text": sum(not r.text for r in rows),
        "shared": shared(rows),
    }
    reasons = Counter(r["reason"] for r in refused)
    if facts is not None:
        good = [(r, f) for r, f in zip(rows, facts, strict=True) if "reason" not in f]
        reasons.update(f["reason"] for f in facts if "reason" in f)
        pace = [checks.letters(r.text) / max(f["speech"], 0.1) for r, f in good if r.text]
        warned = Counter(name for r, f in good for name in checks.warnings_of(f, r.text, r.language))
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

    from metis_lib import notebook

    notebook.style()
    kept = [(r, f) for r, f in zip(rows, facts, strict=True) if "reason" not in f]
    frame = pandas.DataFrame({
        "seconds": [r.duration for r, _ in kept], "of": ["people" if r.human else "synthetic" for r, _ in kept],
        "level (dB RMS)": [f["rms_db"] for _, f in kept], "kHz": [f["bandwidth_hz"] / 1000 for _, f in kept],
        "speaker": [r.speaker for r, _ in kept],
    })  # fmt: skip
    colours = dict(zip(("people", "synthetic"), seaborn.color_palette("colorblind"), strict=False))
    kinds = [kind for kind in colours if kind in set(frame["of"])]
    figures = {}
    shown = {
        "Durations (people and synthetic voices stacked)": "seconds",
        "Levels (0 dB is full scale)": "level (dB RMS)",
        "Bandwidth: the highest frequency that the speech reaches": "kHz",
    }
    for caption, column in shown.items():
        figure, axis = plt.subplots(figsize=(5.2, 2.7))
        look: dict[str, Any] = dict(hue="of", hue_order=kinds, palette=colours, multiple="stack", bins=40)
        seaborn.histplot(frame, x=column, ax=axis, **look)
        axis.set(ylabel="recordings")
        axis.get_legend().set_title("")
        figures[caption] = figure
    hours = frame.groupby(["speaker", "of"], as_index=False)["seconds"].sum().sort_values("seconds", ascending=False)
    figure, axis = plt.subplots(figsize=(5.2, 2.7))
    minutes = (hours["seconds"] / 60).to_numpy()
    axis.bar(range(len(hours)), minutes, width=1.0, color=[colours[kind] for kind in hours["of"]], linewidth=0)
    scale = "log" if minutes.max() > 30 * minutes.min() else "linear"
    axis.set(xlabel="voices, in order", ylabel="minutes", yscale=scale)
    figures["Speech of each voice, in minutes"] = figure
    for figure in figures.values():
        plt.close(figure)
    return figures


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def corpus_report(
    manifest: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, title: str | None = None,
    facts: str | os.PathLike[str] | None = None, workers: int = 2, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """The numbers of a corpus (:func:`summarise`); with ``out`` also a page that holds its plots, and its JSON.

    Args:
        manifest: the ``manifest.jsonl``; ``refused.jsonl`` is looked for beside it.
        out: where the page goes (``.html``); the numbers go beside it (``.json``).  It names no path of the machine.
        title: heading; default the name of the manifest's folder.
        facts: what was measured; default ``facts.jsonl`` beside the manifest.  What is missing there (all of it, in a
            corpus that was not imported) is measured now, and written there.
        workers: threads that measure.
        say: called with lines about the progress.

    Raises:
        MetisError: no such manifest, or a bad one.
    """
    import jinja2

    manifest = Path(manifest).expanduser()
    rows, refused = read_manifest(manifest), read_jsonl(manifest.with_name("refused.jsonl"))
    store = Path(facts).expanduser() if facts is not None else manifest.with_name("facts.jsonl")
    found = checks.measure_all([(r.path, r.start, r.end) for r in rows], manifest.parent, store, workers, say)
    summary = summarise(rows, found, refused)
    if out is None:
        return summary
    faults, warned = defaultdict[str, list[Any]](list), defaultdict[str, list[Any]](list)
    for line in refused + [{"id": r.id} | f for r, f in zip(rows, found, strict=True) if "reason" in f]:
        faults[line["reason"]].append((line["id"], line["detail"]))
    for row, fact in zip(rows, found, strict=True):
        for name, detail in {} if "reason" in fact else checks.warnings_of(fact, row.text, row.language).items():
            warned[name].append((row.id, detail))
    figures = plots(rows, found) if summary["sample_rates"] else {}
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template)
    text = page.render(
        title=title or manifest.resolve().parent.name,
        s=summary,
        plots={caption: _png(figure) for caption, figure in figures.items()},
        faults={
            heading: dict(sorted(some.items(), key=lambda item: -len(item[1])))
            for heading, some in (("Left out", faults), ("Kept, with a warning", warned))
        },
    )
    out = Path(out).expanduser()
    write_text(out.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(out, text)
    return summary
