"""What readers see of a run: tables, plots and one HTML page with players and transcripts."""

from __future__ import annotations

import base64
import difflib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record
from metis_lib.evaluation.systems import SYSTEM_ABOUT, Item, load_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

TITLES = {"codec": "Codec", "se": "Speech enhancement", "tts": "Zero-shot text to speech"}
LABELS = {
    "wer": "WER (mean)",
    "wer_corpus": "WER (corpus)",
    "sim_prompt": "SIM prompt",
    "sim_target": "SIM target",
    "sim_other": "SIM other (control)",
    "dnsmos_sig": "SIG",
    "dnsmos_bak": "BAK",
    "dnsmos_ovrl": "OVRL",
    "pesq_wb": "PESQ",
    "stoi": "STOI",
}
_BEFORE = {"se": ("noisy", "clean"), "codec": ("recording",), "tts": ("recording",)}
TaskSummary = dict[str, dict[str, dict[str, Any]]]


def cell(entry: dict[str, Any]) -> str:
    """``mean [low, high]``, and how many failed if any did."""
    if entry["mean"] is None:
        return f"failed ({entry['n_failed']})"
    interval = "[{:.2f}, {:.2f}]".format(*entry["ci95"]) if entry["ci95"] else "[no interval]"
    failed = f" ({entry['n_failed']} failed)" if entry["n_failed"] else ""
    return f"{entry['mean']:.2f} {interval}{failed}"


def check_protocols(summary: TaskSummary) -> dict[str, str]:
    """Metric to protocol id of one task; numbers of different protocols must not share a column."""
    found: dict[str, str] = {}
    for system, entries in summary.items():
        for metric, entry in entries.items():
            if found.setdefault(metric, entry["protocol"]) != entry["protocol"]:
                raise MetisError(f"{metric} of {system} is {entry['protocol']}, not {found[metric]}: not comparable")
    return found


def table(summary: TaskSummary) -> DataFrame:
    """One task's summary for reading: systems down, metrics across, ``mean [95 % interval]``."""
    import pandas

    columns = check_protocols(summary)
    rows = {s: {LABELS[m]: cell(entries[m]) for m in columns if m in entries} for s, entries in summary.items()}
    return pandas.DataFrame.from_dict(rows, orient="index")


def text_table(summary: dict[str, TaskSummary]) -> str:
    """All tasks as plain text for a terminal: metrics down, systems across, with n and protocols."""
    lines = []
    for task, systems in summary.items():
        protocols = check_protocols(systems)
        count = max(entry["n"] + entry["n_failed"] for entries in systems.values() for entry in entries.values())
        cells = {metric: [cell(entries[metric]) for entries in systems.values()] for metric in protocols}
        width = 2 + max(len(text) for texts in (systems, *cells.values()) for text in texts)
        lines += ["", f"{TITLES[task]} (n = {count}; mean [95 % interval])"]
        lines.append(" " * 20 + "".join(f"{system:>{width}}" for system in systems))
        for metric, texts in cells.items():
            row = "".join(f"{text:>{width}}" for text in texts)
            lines.append(f"{LABELS[metric]:<20}{row}  {protocols[metric]}")
    return "\n".join(lines[1:])


def plot_scores(rows: Sequence[dict[str, Any]], summary: TaskSummary) -> Figure:
    """Every metric: utterances as dots, the mean and its 95 % interval as a bar, one line a system."""
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    shown = [metric for metric in check_protocols(summary) if metric != "wer_corpus"]
    systems = list(summary)
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(3.2 * across, (0.3 * len(systems) + 0.9) * down), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    frame = pandas.DataFrame(rows)
    palette = dict(zip(systems, seaborn.color_palette("colorblind", len(systems)), strict=True))
    for axis, metric in zip(axes.flat, shown, strict=False):
        values = frame.assign(**{metric: pandas.to_numeric(frame[metric])})
        seaborn.stripplot(
            values, x=metric, y="system", order=systems, hue="system", palette=palette, size=3.5, alpha=0.7,
            legend=False, ax=axis, jitter=0.15,
        )  # fmt: skip
        for place, system in enumerate(systems):
            entry = summary[system][metric]
            if entry["mean"] is not None and entry["ci95"]:
                axis.hlines(place, *entry["ci95"], color="black", linewidth=2.5, zorder=5)
            if entry["mean"] is not None:
                axis.plot(entry["mean"], place, "|", color="black", markersize=12, zorder=6)
        axis.set(title=LABELS[metric], xlabel="", ylabel="")
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    plt.close(figure)
    return figure


def transcript_html(text: str, heard: str | None) -> str:
    """What the judge heard, with the words that differ from ``text`` (after normalisation) marked."""
    if heard is None:
        return "<em>not judged</em>"
    truth, words = metrics.normalise_english(text).split(), metrics.normalise_english(heard).split()
    pieces = []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, truth, words, autojunk=False).get_opcodes():
        wrong, right = html.escape(" ".join(words[c:d])), html.escape(" ".join(truth[a:b]))
        if kind == "equal":
            pieces.append(wrong)
        elif wrong:
            pieces.append(f"<mark title='should be: {right or 'nothing'}'>{wrong}</mark>")
        else:
            pieces.append(f"<del title='not heard'>{right}</del>")
    return " ".join(pieces) or "<em>nothing</em>"


def read_rows(out: str | Path, task: str, system: str) -> list[dict[str, Any]]:
    """The utterance rows of one system."""
    path = Path(out) / task / system / "utterances.jsonl"
    if not path.is_file():
        raise MetisError(f"no utterances at {path}; run: metis evaluate")
    return [json.loads(line) for line in path.read_text().splitlines()]


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:1rem;color:#111}
h1,h2{line-height:1.2}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
th,td{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;white-space:nowrap}
article{border-top:1px solid #ccc;padding:.6rem 0}.clips{display:flex;flex-wrap:wrap;gap:.8rem}
figure{margin:0;width:265px}figure.plot{width:auto}figcaption{font-weight:600}audio{width:100%;height:34px}
small{color:#555}mark{background:#ffe2a8}img{max-width:100%}details{margin:.6rem 0}
@media(prefers-color-scheme:dark){body{background:#161616;color:#eee}small{color:#aaa}mark{background:#7a5200;color:#fff}
th,td,article{border-color:#444}img{background:#fff}a{color:#9cf}}
"""


def write_page(out: str | Path, summary: dict[str, TaskSummary], testset: str | Path, limit: int | None) -> Path:
    """Write ``<out>/index.html``: per task the table, the plots and every item's players and transcripts.

    The page holds its audio (Opus) and its plots: one file, no network.
    """
    from metis_lib import notebook

    notebook.style()
    parts = []
    for task, systems in summary.items():
        rows = {system: read_rows(out, task, system) for system in systems}
        flat = [row for some in rows.values() for row in some]
        about = "".join(
            f"<li><b>{html.escape(s)}</b>: {html.escape(SYSTEM_ABOUT.get(s, 'the model'))}</li>" for s in systems
        )
        plot = _png(plot_scores(flat, systems), f"{TITLES[task]}: scores of every utterance, mean and interval")
        items = [_item(Path(out), item, rows) for item in load_items(testset, task, limit)]
        parts.append(
            f"<section id='{task}'><h2>{TITLES[task]}</h2>"
            f"<div class='wide'>{table(systems).to_html(border=0)}</div>"
            f"<ul>{about}</ul><figure class='plot'>{plot}</figure><h3>Listen</h3>{''.join(items)}</section>"
        )
    used = sorted({e["protocol"] for t in summary.values() for entries in t.values() for e in entries.values()})
    protocols = "".join(f"<dt><code>{p}</code></dt><dd>{html.escape(metrics.PROTOCOLS[p])}</dd>" for p in used)
    run = record.read_json(Path(out) / "run.json") or {}
    links = " · ".join(f"<a href='#{task}'>{TITLES[task]}</a>" for task in summary)
    commit = f"{(run.get('commit') or 'no commit')[:12]}{' with changes' if run.get('dirty') else ''}"
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Metis: evaluation</title>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body><h1>Metis: evaluation</h1><p>{links}</p>"
        "<p>Mean [95 % bootstrap interval]; rates are fractions. Words heard wrongly are marked. "
        "SIM other is the control: the similarity to another speaker, which should be low.</p>"
        f"<p><small>Code {commit}.</small></p>{''.join(parts)}"
        f"<h2>Protocols</h2><dl>{protocols}</dl></body></html>\n"
    )
    path = Path(out) / "index.html"
    record.write_atomic(path, page)
    return path


def _item(out: Path, item: Item, rows: dict[str, list[dict[str, Any]]]) -> str:
    """One item: text, then the players of every system side by side."""
    from metis_lib import notebook

    clips = []
    if item.prompt:
        said = f"<small>says: {html.escape(item.prompt_text)}</small>"
        clips.append(f"<figure><figcaption>prompt</figcaption>{notebook.player_html(item.prompt)}{said}</figure>")
    first = [system for system in _BEFORE[item.task] if system in rows]
    for system in [*first, *[system for system in rows if system not in first]]:
        for row in (row for row in rows[system] if row["id"] == item.id):
            name = system if row["seed"] in (None, 0) else f"{system}, seed {row['seed']}"
            shown = ("wer", "sim_prompt", "sim_target", "dnsmos_ovrl", "pesq_wb", "stoi")
            scores = [f"{LABELS[m].replace(' (mean)', '')} {row[m]:.2f}" for m in shown if row.get(m) is not None]
            failures = [f"{m}: {row[f'{m}_error']}" for m in LABELS if row.get(f"{m}_error")]
            sound = notebook.player_html(out / item.task / system / row["audio"]) if row["audio"] else "no audio"
            clips.append(
                f"<figure><figcaption>{html.escape(name)}</figcaption>{sound}"
                f"<div>{transcript_html(item.text, row['heard'])}</div><small>{', '.join(scores)}"
                f"{'<br>' if failures else ''}{html.escape('; '.join(failures))}</small></figure>"
            )
    what = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in item.extra.items() if key != "licence")
    return (
        f"<article><p><b>{html.escape(item.text)}</b><br><small>{html.escape(item.id)}, speaker "
        f"{html.escape(item.speaker)}{', ' if what else ''}{html.escape(what)}</small></p>"
        f"<div class='clips'>{''.join(clips)}</div></article>"
    )


def _png(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"<img alt='{html.escape(description)}' src='data:image/png;base64,{data}'>"
