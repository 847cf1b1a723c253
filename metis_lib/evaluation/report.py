"""What readers see of a run: tables, plots, one HTML page with players and transcripts, the table of README.md."""

from __future__ import annotations

import difflib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_lib import notebook
from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record
from metis_lib.evaluation.metrics import LABELS, PROTOCOLS, TASKS, TaskSummary
from metis_lib.evaluation.systems import load_items

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

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
        parts.append(f"{TASKS[task]['title']} (n = {_count(systems)}; mean [95 % interval])\n{text}")
    return "\n\n".join(parts)


def plot_scores(rows: Sequence[dict[str, Any]], summary: TaskSummary) -> Figure:
    """Every metric: utterances as dots, the mean and its 95 % interval as a bar, one line a system."""
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    shown, systems = [metric for metric in check_protocols(summary) if metric != "wer_corpus"], list(summary)
    frame = pandas.DataFrame(rows).melt(["system"], shown, "metric").astype({"value": float})
    height = 0.3 * len(systems) + 0.9
    with plt.rc_context({"figure.constrained_layout.use": False}):  # the grid has a layout of its own
        grid = seaborn.catplot(
            frame, kind="strip", x="value", y="system", order=systems, hue="system", hue_order=systems, col="metric",
            col_order=shown, col_wrap=min(3, len(shown)), sharex=False, palette="colorblind", size=3.5, alpha=0.7,
            jitter=0.15, legend=False, height=height, aspect=3.2 / height,
        )  # fmt: skip
    for metric, axis in grid.axes_dict.items():
        axis.set(title=LABELS[metric], xlabel="", ylabel="")
        for place, entry in enumerate(summary[system][metric] for system in systems):
            if entry["mean"] is not None:
                axis.plot(entry["mean"], place, "|", color="black", markersize=12, zorder=6)
                axis.hlines(place, *(entry["ci95"] or [entry["mean"]] * 2), color="black", linewidth=2.5, zorder=5)
    plt.close(grid.figure)
    return grid.figure


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
    notebook.style()
    out = Path(out)
    tasks: list[dict[str, Any]] = []
    for task, systems in summary.items():
        rows = [row for system in systems for row in read_rows(out, task, system)]
        tasks.append({
            "name": task, "title": TASKS[task]["title"], "table": table(systems).to_html(border=0),
            "systems": {system: metrics.SYSTEM_ABOUT.get(system, "the model") for system in systems},
            "plot": plot_scores(rows, systems),
            "utterances": [
                (item, [row for row in rows if row["id"] == item.id]) for item in load_items(testset, task, limit)
            ],
        })  # fmt: skip
    used = sorted({e["protocol"] for t in summary.values() for entries in t.values() for e in entries.values()})
    text = notebook.page(
        Path(__file__).with_name("page.html"), tasks=tasks, labels=LABELS, out=out, transcript=transcript_html,
        protocols={protocol: PROTOCOLS[protocol] for protocol in used},
        commit=_commit(record.read_json(out / "run.json") or {}),
    )  # fmt: skip
    write_text(out / "index.html", text)
    return out / "index.html"


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
    rows = [["", *(f"{LABELS[metric]} {metrics.BETTER[metric]}".strip() for metric in columns)]]
    rows.append(["---", *["---:"] * len(columns)])
    for task, systems in summary.items():
        rows.append([f"**{TASKS[task]['title']}**", *[""] * len(columns)])
        for system, entries in systems.items():
            found = (entries.get(metric) for metric in columns)
            rows.append([system, *(cell(e, "<br><sub>{:.2f} to {:.2f}</sub>", "") if e else "" for e in found)])
    many = ", ".join(f"{_count(systems)} of {TASKS[task]['title'].lower()}" for task, systems in summary.items())
    meanings = "\n".join(f"- `{protocol}`: {PROTOCOLS[protocol]}" for protocol in dict.fromkeys(protocols.values()))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{lines}

Mean and 95 % bootstrap interval over utterances ({many}); rates are fractions; empty: not asked of the task. \
Code {_commit(run)}, weights {(run.get("checkpoint_sha256") or "none")[:12]}, test set {run["manifest_sha256"][:12]}.

<details><summary>How it was measured</summary>

{meanings}

</details>"""


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
    write_text(readme, f"{before}{BEGIN}\n{text}\n{END}{after}")
    return readme
