"""What readers see of a run: tables, plots, one HTML page with players and transcripts, the table of README.md."""

from __future__ import annotations

import base64
import difflib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_lib import notebook
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record
from metis_lib.evaluation.metrics import TaskSummary
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
BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""What stands around the results in README.md."""


def cell(entry: dict[str, Any], interval: str = " [{:.2f}, {:.2f}]", none: str = " [no interval]") -> str:
    """``mean [low, high]``, and how many failed if any did."""
    if entry["mean"] is None:
        return f"failed ({entry['n_failed']})"
    failed = f" ({entry['n_failed']} failed)" if entry["n_failed"] else ""
    return f"{entry['mean']:.2f}{interval.format(*entry['ci95']) if entry['ci95'] else none}{failed}"


def check_protocols(summary: TaskSummary) -> dict[str, str]:
    """Metric to protocol id of one task; numbers of different protocols must not share a column."""
    found: dict[str, str] = {}
    for system, entries in summary.items():
        for metric, entry in entries.items():
            if found.setdefault(metric, entry["protocol"]) != entry["protocol"]:
                raise MetisError(
                    f"{metric} of {system} was measured by {entry['protocol']}, not {found[metric]}: not comparable"
                )
    return found


def table(summary: TaskSummary) -> DataFrame:
    """One task's summary for reading: systems down, metrics across, ``mean [95 % interval]``."""
    import pandas

    columns = check_protocols(summary)
    rows = {s: {LABELS[m]: cell(entries[m]) for m in columns if m in entries} for s, entries in summary.items()}
    return pandas.DataFrame.from_dict(rows, orient="index")


def _count(systems: TaskSummary) -> int:
    """Utterances of a task, failed ones among them."""
    return max(entry["n"] + entry["n_failed"] for entries in systems.values() for entry in entries.values())


def text_table(summary: dict[str, TaskSummary]) -> str:
    """All tasks as plain text for a terminal: metrics down, systems across, with n and protocols."""
    parts = []
    for task, systems in summary.items():
        shown = table(systems).T.assign(protocol=list(check_protocols(systems).values()))
        text = shown.to_string(na_rep="", col_space=10)
        parts.append(f"{TITLES[task]} (n = {_count(systems)}; mean [95 % interval])\n{text}")
    return "\n\n".join(parts)


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


def write_page(out: str | Path, summary: dict[str, TaskSummary], testset: str | Path, limit: int | None) -> Path:
    """Write ``<out>/index.html``: per task the table, the plots and every item's players and transcripts.

    The page holds its audio (Ogg Vorbis) and its plots: one file, no network.  Its layout is ``page.html``.
    """
    import jinja2

    notebook.style()
    out = Path(out)
    tasks = []
    for task, systems in summary.items():
        rows = {system: read_rows(out, task, system) for system in systems}
        shown: dict[str, Any] = {"name": task, "title": TITLES[task], "table": table(systems).to_html(border=0)}
        shown["systems"] = {system: SYSTEM_ABOUT.get(system, "the model") for system in systems}
        shown["plot"] = _png(plot_scores([row for some in rows.values() for row in some], systems))
        shown["utterances"] = [(item, _clips(out, item, rows)) for item in load_items(testset, task, limit)]
        tasks.append(shown)
    used = sorted({e["protocol"] for t in summary.values() for entries in t.values() for e in entries.values()})
    values = {"tasks": tasks, "protocols": {protocol: metrics.PROTOCOLS[protocol] for protocol in used}}
    values["commit"] = _commit(record.read_json(out / "run.json") or {})
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html")
    text = page.render(values, player=notebook.player_html, transcript=transcript_html)
    record.write_atomic(out / "index.html", text)
    return out / "index.html"


def _clips(out: Path, item: Item, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the page shows of an item: a clip for every system and seed, the input and the best possible first."""
    first = [system for system in _BEFORE[item.task] if system in rows]
    shown = ("wer", "sim_prompt", "sim_target", "dnsmos_ovrl", "pesq_wb", "stoi")
    clips = []
    for system in dict.fromkeys([*first, *rows]):
        for row in (row for row in rows[system] if row["id"] == item.id):
            clip: dict[str, Any] = {"name": system if row["seed"] in (None, 0) else f"{system}, seed {row['seed']}"}
            clip["path"] = out / item.task / system / row["audio"] if row["audio"] else None
            clip["heard"] = row["heard"]
            scores = {LABELS[m].replace(" (mean)", ""): row[m] for m in shown if row.get(m) is not None}
            clip["scores"] = [f"{label} {value:.2f}" for label, value in scores.items()]
            clip["failures"] = [f"{m}: {row[f'{m}_error']}" for m in LABELS if row.get(f"{m}_error")]
            clips.append(clip)
    return clips


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _commit(run: dict[str, Any]) -> str:
    return f"{(run.get('commit') or 'no commit')[:12]}{' with changes' if run.get('dirty') else ''}"


def readme_results(summary: dict[str, TaskSummary], run: dict[str, Any]) -> str:
    """Markdown of a run: tasks and systems down, metrics across, and what the numbers belong to.

    Raises:
        MetisError: numbers of different protocols would share a column.
    """
    protocols = check_protocols({f"{task} {name}": found for task in summary for name, found in summary[task].items()})
    protocols.pop("wer_corpus", None)
    columns = [metric for metric in LABELS if metric in protocols]
    arrows = {metric: " ↓" if metric in metrics.LOWER_IS_BETTER else " ↑" for metric in columns}
    arrows["sim_other"] = ""  # the control
    lines = [f"| | {' | '.join(LABELS[metric] + arrows[metric] for metric in columns)} |"]
    lines.append("|---|" + "---:|" * len(columns))
    for task, systems in summary.items():
        lines.append(f"| **{TITLES[task]}** |" + " |" * len(columns))
        for system, entries in systems.items():
            found = (entries.get(metric) for metric in columns)
            cells = (cell(entry, "<br><sub>{:.2f} to {:.2f}</sub>", "") if entry else "" for entry in found)
            lines.append(f"| {system} | {' | '.join(cells)} |")
    many = ", ".join(f"{_count(systems)} of {TITLES[task].lower()}" for task, systems in summary.items())
    weights = (run.get("checkpoint_sha256") or "none")[:12]
    lines += [
        "",
        f"Mean and 95 % bootstrap interval over utterances ({many}); rates are fractions; empty: not asked of "
        f"the task. Code {_commit(run)}, weights {weights}, test set {run['manifest_sha256'][:12]}.",
        "",
        "<details><summary>How it was measured</summary>",
        "",
        *(f"- `{protocol}`: {metrics.PROTOCOLS[protocol]}" for protocol in dict.fromkeys(protocols.values())),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def fill_readme(readme: Path, text: str) -> Path:
    """Replace what stands between the markers of ``readme`` by ``text`` (atomically); return the path.

    Raises:
        MetisError: no such file, or not exactly one pair of markers.
    """
    if not readme.is_file():
        raise MetisError(f"no {readme.name} here; this command runs in a clone of the repository")
    whole = readme.read_text()
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(BEGIN) > whole.index(END):
        raise MetisError(f"{readme.name} lacks the markers {BEGIN} … {END}, once each")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    record.write_atomic(readme, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return readme
