"""What readers see of a run: tables, plots, one HTML page with players and transcripts, the table of README.md."""

from __future__ import annotations

import difflib
import html
import json
import os
import urllib.parse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metis_lib import notebook
from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, plots, record, statistics
from metis_lib.evaluation.metrics import LABELS, PROTOCOLS, TASKS, TaskSummary
from metis_lib.evaluation.systems import load_items, testset_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

HEADLINE = (
    *("wer", "wer_10db", "nearer", "sim_prompt", "sim_target", "sim_other"),
    *("dnsmos_sig", "dnsmos_bak", "dnsmos_ovrl", "nisqa", "pesq_wb", "stoi"),
)
"""The metrics that fit into a line: README.md, and below every player."""
_LEFT = "text-align:left;white-space:normal"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""What stands around the results in README.md."""


def cell(entry: dict[str, Any], interval: str = " [{:.2f}, {:.2f}]", none: str = " [no interval]") -> str:
    """``mean [low, high]``, the spread of several seeds, and how many failed if any did."""
    if entry["mean"] is None:
        return f"failed ({entry['n_failed']})"
    failed = f" ({entry['n_failed']} failed)" if entry["n_failed"] else ""
    seeds = f" (seeds ± {entry['seed_sd']:.2f})" if entry.get("seed_sd") is not None else ""
    return f"{entry['mean']:.2f}{interval.format(*entry['ci95']) if entry['ci95'] else none}{seeds}{failed}"


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


def tall(summary: TaskSummary) -> DataFrame:
    """:func:`table` for many metrics: metrics down, systems across, the protocol beside."""
    return table(summary).T.assign(protocol=list(check_protocols(summary).values())).fillna("")


def utterances(systems: TaskSummary) -> int:
    """Utterances of a task, failed ones among them; the seeds of one are one."""
    found = [entry for entries in systems.values() for entry in entries.values()]
    return max((entry["n"] + entry["n_failed"]) // entry.get("seeds", 1) for entry in found)


def text_table(summary: dict[str, TaskSummary]) -> str:
    """All tasks as plain text for a terminal: metrics down, systems across, with n and protocols."""
    parts = []
    for task, systems in summary.items():
        text = tall(systems).to_string(col_space=10)
        parts.append(f"{TASKS[task]['title']} (n = {utterances(systems)}; mean [95 % interval])\n{text}")
    return "\n\n".join(parts)


def plot_scores(rows: Sequence[dict[str, Any]], summary: TaskSummary) -> Figure:
    """Every metric of one task: utterances, means and intervals; see :func:`plots.distributions`."""
    return plots.distributions(rows, summary, check_protocols(summary))


def differences(rows: Sequence[dict[str, Any]], task: str, system: str) -> DataFrame:
    """``system`` minus every other system for reading: ``difference [95 % interval] p``.

    Of the headline metrics alone, for which p is corrected (Holm): many metrics that tell the same cost power.
    """
    import pandas

    others = [name for name in dict.fromkeys(row["system"] for row in rows) if name != system]
    found = {f"{system} − {other}": statistics.compare(rows, system, other, task, only=HEADLINE) for other in others}
    cells = {pair: {LABELS[metric]: _difference(e) for metric, e in table.items()} for pair, table in found.items()}
    return pandas.DataFrame.from_dict(cells, orient="index").fillna("")


def _difference(entry: dict[str, Any]) -> str:
    if entry["difference"] is None:
        return "not both scored"
    if entry["ci95"] is None:
        return f"{entry['difference']:+.2f} [no interval]"
    p = f"p {entry['p_holm']:.3f}" if entry["p_holm"] >= 0.001 else "p < 0.001"
    return f"{entry['difference']:+.2f} [{entry['ci95'][0]:+.2f}, {entry['ci95'][1]:+.2f}] {p}"


def compare_runs(first: str | Path, second: str | Path, task: str, system: str) -> dict[str, dict[str, Any]]:
    """Paired differences of ``system`` between two runs, ``first - second``; see :func:`statistics.compare`.

    Raises:
        MetisError: not comparable: other protocols, another test set, or no such run.
    """
    sides = {"first": record.read_run(first), "second": record.read_run(second)}
    if len({side.about["manifest_sha256"] for side in sides.values()}) > 1:
        raise MetisError(f"{first} and {second} are not comparable: not the same test set")
    found = {name: side.summary.get(task, {}).get(system) for name, side in sides.items()}
    if None in found.values():
        raise MetisError(f"{system} was not evaluated at {task} in both runs")
    checked = check_protocols({name: entries for name, entries in found.items() if entries})
    rows = [row | {"system": name} for name in sides for row in read_rows(sides[name].folder, task, system)]
    table = statistics.compare(rows, "first", "second", task)
    return {metric: entry | {"protocol": checked[metric]} for metric, entry in table.items()}


def failures(rows: Sequence[dict[str, Any]], system: str, many: int = 5) -> list[dict[str, Any]]:
    """What to listen to first: rows of ``system`` without audio, then the most word errors, then the least similar."""

    def badness(row: dict[str, Any]) -> tuple[bool, float, float]:
        like = next((row[key] for key in ("sim_prompt", "sim_target") if row.get(key) is not None), 0.0)
        return bool(row.get("error")), np.inf if row.get("wer") is None else row["wer"], -like

    return sorted((row for row in rows if row["system"] == system), key=badness, reverse=True)[:many]


def failures_html(run: str | Path, task: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of :func:`failures` with players (where the audio is there) and marked transcripts."""
    lines = []
    for row in rows:
        clip = Path(run) / task / row["system"] / row["audio"] if row["audio"] else None
        player = notebook.player_html(clip) if clip and clip.is_file() else html.escape(row.get("error") or "no audio")
        scores = ", ".join(f"{LABELS[key]} {row[key]:.2f}" for key in HEADLINE if row.get(key) is not None)
        seed = "" if row["seed"] is None else f", seed {row['seed']}"
        text = row["text"] or ""
        said = f"{html.escape(text)}<br>{transcript_html(text, row['heard'])}"
        cells = html.escape(row["id"]) + seed, f"<div style=width:17em>{player}</div>", said, f"<small>{scores}</small>"
        lines.append("<tr>" + "".join(f"<td style='{_LEFT}'>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(
        f"<th scope=col>{name}</th>" for name in ("utterance", "listen", "text, and what was heard", "scores")
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def transcript_html(text: str, heard: str | None, language: str = "en") -> str:
    """What the judge heard, with the words that differ from ``text`` (after normalisation) marked."""
    if heard is None:
        return "<em>not judged</em>"
    truth, words = (metrics.normalise(said, language).split() for said in (text, heard))
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
    """The utterance rows of one system (``<task>/<system>/utterances.jsonl``; ``<task>/<system>.jsonl`` if kept)."""
    path = Path(out) / task / system / "utterances.jsonl"
    if not path.is_file():
        path = Path(out) / task / f"{system}.jsonl"
    if not path.is_file():
        raise MetisError(f"no utterances at {path}; run: metis evaluate")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def run_rows(run: record.Run, task: str, testset: str | Path | None = None) -> list[dict[str, Any]]:
    """All utterance rows of a task; with the run's own test set, also what its items tell in numbers (``snr_db``)."""
    rows = [row for system in run.summary[task] for row in read_rows(run.folder, task, system)]
    try:
        folder = testset_folder(testset) if testset else None
    except MetisError:
        folder = None
    if folder and record.sha256_file(folder / "manifest.jsonl") == run.about["manifest_sha256"]:
        extras = {item.id: item.extra for item in load_items(folder, task)}
        numbers = {id: {k: v for k, v in extra.items() if isinstance(v, (int, float))} for id, extra in extras.items()}
        rows = [numbers.get(row["id"], {}) | row for row in rows]
    return rows


HELD = 6000
"""Clips that a page holds itself, about 15 kB each: 90 MB, which browsers still open."""


def _linked(clip: Path, out: Path) -> str:
    """A player of a file, loaded when it is played."""
    source = Path(os.path.relpath(clip.resolve(), out.resolve())).as_posix()
    return f"<audio controls preload='none' src='{html.escape(urllib.parse.quote(source), quote=True)}'></audio>"


def write_page(out: str | Path, summary: dict[str, TaskSummary], testset: str | Path, limit: int | None) -> Path:
    """Write ``<out>/index.html``: per task the table, the plots and every item's players and transcripts.

    The page holds its audio (Opus) and its plots: one file, no network; of more than ``HELD`` clips it points to the
    files beside it.  Its layout is ``page.html``.
    """
    notebook.style()
    out = Path(out)
    tasks: list[dict[str, Any]] = []
    for task, systems in summary.items():
        rows = [row for system in systems for row in read_rows(out, task, system)]
        tasks.append({
            "name": task, "title": TASKS[task]["title"], "table": tall(systems).to_html(border=0),
            "systems": {system: metrics.SYSTEM_ABOUT.get(system, "the model") for system in systems},
            "plot": plot_scores(rows, systems), "n": utterances(systems), "unit": units(systems),
            "differences": _all_differences(rows, task, systems), "first": _first(rows, systems),
            "utterances": [
                (item, [row for row in rows if row["id"] == item.id]) for item in load_items(testset, task, limit)
            ],
        })  # fmt: skip
    clips = sum(bool(row["audio"]) for task in tasks for _, rows in task["utterances"] for row in rows)
    more = {} if clips <= HELD else {"player": lambda clip: _linked(clip, out)}
    used = sorted({e["protocol"] for t in summary.values() for entries in t.values() for e in entries.values()})
    text = notebook.page(
        Path(__file__).with_name("page.html"), tasks=tasks, labels=LABELS, headline=HEADLINE, out=out,
        transcript=transcript_html,
        protocols={protocol: PROTOCOLS[protocol] for protocol in used},
        commit=_commit(record.read_json(out / "run.json") or {}), **more,
    )  # fmt: skip
    write_text(out / "index.html", text)
    return out / "index.html"


def models(systems: Iterable[str]) -> list[str]:
    """The systems that are not fixed rows of some task: the models."""
    fixed = {name for about in TASKS.values() for name in about["systems"]}
    return [name for name in systems if name not in fixed]


def units(systems: TaskSummary) -> str:
    """What was resampled for the intervals of a task."""
    found = {entry.get("unit") or "" for entries in systems.values() for entry in entries.values()} - {""}
    return ", ".join(sorted(found)) or "utterances"


def _all_differences(rows: Sequence[dict[str, Any]], task: str, systems: TaskSummary) -> str:
    """HTML of the differences between each model and the others; empty where there is nothing to compare."""
    complete = all("text" in row for row in rows) and len(systems) > 1
    compared = models(systems) or [name for name in ("stage2", "resynthesis") if name in systems]  # those of codec
    tables = [differences(rows, task, model) for model in compared] if complete else []
    return "".join(table.T.to_html(border=0) for table in tables)


def _first(rows: Sequence[dict[str, Any]], systems: TaskSummary) -> list[dict[str, Any]]:
    """The three worst utterances of each model that was judged."""
    judged = [row for row in rows if row.get("wer") is not None or row.get("error")]
    return [row for model in models(systems) for row in failures(judged, model, 3)]


def _commit(run: dict[str, Any]) -> str:
    return f"{(run.get('commit') or 'no commit')[:12]}{' with changes' if run.get('dirty') else ''}"


def readme_results(summary: dict[str, TaskSummary], run: dict[str, Any]) -> str:
    """Markdown of a run: tasks and systems down, metrics across, and what the numbers belong to.

    Raises:
        MetisError: numbers of different protocols would share a column.
    """
    protocols = check_protocols({f"{task} {name}": found for task in summary for name, found in summary[task].items()})
    columns = [metric for metric in HEADLINE if metric in protocols]
    rows = [["", *(f"{LABELS[metric]} {metrics.BETTER[metric]}".strip() for metric in columns)]]
    rows.append(["---", *["---:"] * len(columns)])
    for task, systems in summary.items():
        rows.append([f"**{TASKS[task]['title']}**", *[""] * len(columns)])
        for system, entries in systems.items():
            found = (entries.get(metric) for metric in columns)
            rows.append([system, *(cell(e, "<br><sub>{:.2f} to {:.2f}</sub>", "") if e else "" for e in found)])
    many = ", ".join(f"{utterances(systems)} of {TASKS[task]['title'].lower()}" for task, systems in summary.items())
    resampled = ", ".join(sorted({units(systems) for systems in summary.values()}))
    meanings = "\n".join(
        f"- `{protocol}`: {PROTOCOLS[protocol]}" for protocol in dict.fromkeys(protocols[metric] for metric in columns)
    )
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""{lines}

Mean and 95 % bootstrap interval ({many}; resampled: {resampled}); rates are fractions; empty: not asked of the task. \
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
