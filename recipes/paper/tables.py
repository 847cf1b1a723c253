"""The tables of the Metis paper as data (``results/paper``), and our numbers beside the published ones.

Numbers of different protocols never share a column: ours have columns of their own that bear their protocol's id,
with a dagger where the judge is not the paper's; rows on another test set than the paper's have a double dagger.
"""

from __future__ import annotations

import csv
import functools
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.evaluation.metrics import PROTOCOLS
from metis_lib.evaluation.record import Run

if TYPE_CHECKING:
    from pandas import DataFrame

FOLDER = record.ROOT / "results" / "paper"
TRUTH = "Ground truth"
_TRUTHS = ("recording", "clean", "source")
_TEX = {
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "±": r"$\pm$",
    "×": r"$\times$",
}
_CSS = """.paper table{border-collapse:collapse;font:14px/1.4 system-ui,sans-serif;font-variant-numeric:tabular-nums}
.paper td,.paper th{border-bottom:1px solid #ddd;padding:.25rem .6rem;text-align:left;vertical-align:bottom}
.paper td,.paper th{white-space:nowrap}.paper p{margin:.15rem 0}.paper small{font-weight:400}
.paper caption{text-align:left;font-weight:600}.paper tr.ours{background:#ddeeff55}
.paper{font:13px/1.5 system-ui,sans-serif;overflow-x:auto;max-width:1400px}"""


@functools.cache
def index() -> dict[str, Any]:
    """What the tables' protocols and test sets mean: ``{source, about, protocols, testsets}``."""
    found = record.read_json(FOLDER / "index.json")
    if found is None:
        raise MetisError("results/paper is not here; the tables of the paper come with a clone of the repository")
    return found


def tables() -> list[dict[str, Any]]:
    """The eleven tables, in order; values are strings as printed, or None."""
    index()
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("table*.json"))]


def records(table: dict[str, Any], runs: Sequence[Run] = ()) -> list[dict[str, Any]]:
    """A table as one record a number: the paper's, and ours where a run has the task, the language and the metric.

    Ours are scaled as the paper's (per cent) and carry ``low``, ``high``, ``n``, ``n_failed``, and whether judge
    and test set are the paper's.
    """
    found: list[dict[str, Any]] = []
    for part in table["parts"]:
        about = index()["testsets"][part["testset"]]
        base = {"table": table["table"], "test_set": about["title"]}
        columns = [c | {"protocol": part.get("protocols", {}).get(c["key"], c["protocol"])} for c in table["columns"]]
        for row in part["rows"]:
            mine = base | {"of": "paper", "system": row["system"], "data": row["data"]}
            for column in columns:
                if row["values"].get(column["key"]) is not None:
                    shown = {"metric": column["key"], "protocol": column["protocol"]}
                    found.append(mine | shown | {"value": row["values"][column["key"]]})
        for run in (run for run in runs if _language(run) == about["language"]):
            used = [c for c in columns if any(row["values"].get(c["key"]) for row in part["rows"])]
            task = part.get("task") or table["task"]
            count, how = _how(run, task)
            same_set = about["published"] and _testset(run) == part["testset"] and count == about["items"]
            for system, entries in run.summary.get(task, {}).items():
                mine = base | {"of": run.name, "system": system, "data": None, "how": how}
                for column in used:
                    same = {"same_test_set": same_set and column["key"] not in about.get("drawn", ())}
                    found += [mine | same | ours] if (ours := _ours(column, entries, task)) else []
    return found


def _how(run: Run, task: str) -> tuple[int | None, str]:
    """How many items a run had of a task, and how it decoded where that was not left to the defaults."""
    about = (run.about.get("tasks") or {}).get(task) or {}
    settings = about.get("settings") or {}
    dtype = settings.get("dtype") or "float32"
    told = [f"{name} {value}" for name, value in (settings.get("options") or {}).items() if value is not None]
    return about.get("items"), ", ".join(told + [dtype] * (dtype != "float32"))


def _testset(run: Run) -> str:
    """The name of the test set of a run; empty where the run does not tell."""
    return Path(str(run.about.get("testset") or "")).name


def _language(run: Run) -> str:
    return index()["testsets"].get(_testset(run), {}).get("language") or run.about.get("language", "en")


def _ours(column: dict[str, Any], entries: dict[str, Any], task: str) -> dict[str, Any] | None:
    """Our number for a column of the paper, or None."""
    judge, key = index()["protocols"][column["protocol"]], column["key"]
    same = (*judge["same"], *judge.get("same_in", {}).get(task, ()))
    entry = next((entries[name] for ours in judge["ours"] if (name := ours.format(key=key)) in entries), None)
    if entry is None:
        return None
    mean, interval = (entry["mean"], entry["ci95"] or (None, None))
    value, low, high = (None if x is None else round(x * column["scale"], 4) for x in (mean, *interval))
    return {
        "metric": key, "protocol": entry["protocol"], "value": value, "low": low, "high": high, "n": entry["n"],
        "n_failed": entry["n_failed"], "same_judge": entry["protocol"].startswith(same),
    }  # fmt: skip


def _cell(record: dict[str, Any]) -> str:
    if record["of"] == "paper":
        return str(record["value"])
    failed = f" ({record['n_failed']} failed)" if record["n_failed"] else ""
    interval = "" if record["low"] is None else f" [{record['low']:.2f}, {record['high']:.2f}]"
    return "failed" if record["value"] is None else f"{record['value']:.2f}{interval}{failed}"


def beside(table: dict[str, Any], found: Sequence[dict[str, Any]]) -> tuple[DataFrame, list[str]]:
    """A table for reading out of its records, and its footnotes: our columns beside the paper's.

    A recording of a person (``recording``, ``clean``, ``source``) stands in the row of the paper's ground truth.
    """
    import pandas

    rows: dict[tuple[str, ...], dict[str, str]] = {}
    names: dict[str, None] = {}
    several = len({one["of"] for one in found} - {"paper"}) > 1
    truths = {one["test_set"] for one in found if one["system"] == TRUTH}
    for column in table["columns"]:
        label = " ".join(x for x in (column["label"], column["unit"], column["better"]) if x)
        here = [one for one in found if one["metric"] == column["key"]]
        for one in sorted(here, key=lambda one: one["of"] != "paper"):
            text = _cell(one)
            if one["of"] == "paper":
                name, row = label, (one["test_set"], one["system"], one["data"] or "")
            else:
                label_ours = " ".join(x for x in (column["label"], column["unit"], "ours") if x)
                name = f"{label_ours}{'' if one['same_judge'] else ' †'} {one['protocol']}"
                mark = "" if one["same_test_set"] else " ‡"
                how = f", {one['how']}" * bool(one["how"])
                who = f"{one['of'] + ': ' if several else ''}ours{how}, n = {one['n'] + one['n_failed']}{mark}"
                row = (one["test_set"], f"{one['system']} ({who})", "")
                if one["system"] in _TRUTHS and one["test_set"] in truths and not several:
                    row, text = (one["test_set"], TRUTH, ""), f"{text}{mark}"
            names[name] = None
            rows.setdefault(row, {})[name] = text
    order = list(dict.fromkeys(one["test_set"] for one in found))
    head = ("test set", "system", "training data")
    lines = [dict(zip(head, row, strict=True)) | rows[row] for row in sorted(rows, key=lambda row: order.index(row[0]))]
    return pandas.DataFrame(lines, columns=[*head, *names]).fillna(""), _notes(table, found)


def _notes(table: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """Footnotes: what the protocols are, which of ours are not the paper's, what is odd in the paper."""
    ours = [one for one in found if one["of"] != "paper"]
    ids = dict.fromkeys(one["protocol"] for one in found if one["of"] == "paper")
    labels = {id: dict.fromkeys(one["metric"].upper() for one in found if one["protocol"] == id) for id in ids}
    where = {id: dict.fromkeys(one["test_set"] for one in found if one["protocol"] == id) for id in ids}
    all_sets = {one["test_set"] for one in found}
    of = {id: "" if set(where[id]) == all_sets else f" of {', '.join(where[id])}" for id in ids}
    judges = {id: index()["protocols"][id]["judge"] for id in ids}
    notes = [f"{', '.join(labels[id])}{of[id]} in the paper ({id}): {judges[id]}." for id in ids]
    for one in {one["protocol"]: one for one in ours}.values():
        mark = "" if one["same_judge"] else "† Not the paper's judge, or not known to be. "
        notes.append(f"{mark}{one['protocol']}: {PROTOCOLS.get(one['protocol'], 'see the run')}.")
    if any(not one["same_test_set"] for one in ours):
        notes.append("‡ Not the paper's test set, or not known to be: not comparable with its numbers.")
    if ours:
        notes.append("Ours: mean [95 % bootstrap interval], in the paper's units; ours of a ground truth row: our own.")
    return notes + table["notes"]


# --- files -----------------------------------------------------------------------------------------------


def _caption(table: dict[str, Any]) -> str:
    return f"Table {table['table']} of the Metis paper ({table['section']}): {table['title']}"


def to_html(table: dict[str, Any], frame: DataFrame, notes: Sequence[str]) -> str:
    """A fragment with its style; protocols on a line of their own."""
    head = "".join(f"<th scope='col'>{_head(name)}</th>" for name in frame.columns)
    lines = []
    last = ""
    for row in frame.itertuples(index=False):
        row, last = ("" if row[0] == last else row[0], *row[1:]), row[0]
        ours = " class='ours'" if "ours" in row[1] else ""
        lines.append(f"<tr{ours}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>")
    feet = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    caption = f"<caption>{html.escape(_caption(table))}</caption>"
    body = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>{feet}"
    return f"<meta charset='utf-8'><style>{_CSS}</style><div class='paper'>{body}</div>\n"


def _head(name: str) -> str:
    label, _, protocol = name.rpartition(" ")
    return f"{html.escape(label)}<br><small>{html.escape(protocol)}</small>" if "@" in protocol else html.escape(name)


def to_markdown(table: dict[str, Any], frame: DataFrame, notes: Sequence[str]) -> str:
    """A table of GitHub's Markdown with its footnotes below."""
    lines = [list(frame.columns), ["---", "---", "---", *["---:"] * (len(frame.columns) - 3)], *frame.values.tolist()]
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return f"**{_caption(table)}**\n\n{text}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def to_latex(table: dict[str, Any], frame: DataFrame, notes: Sequence[str]) -> str:
    """A ``table*`` with booktabs rules, scaled to the width of the page (packages: booktabs, graphicx)."""

    def escape(text: str) -> str:
        plain = "".join({"\\": r"\textbackslash{}"}.get(c, f"\\{c}" if c in "%_&#${}" else c) for c in text)
        return "".join(_TEX.get(c, c) for c in plain.replace("~", r"\textasciitilde{}").replace("^", r"\^{}"))

    lines = [" & ".join(map(escape, line)) + r" \\" for line in [list(frame.columns), *frame.values.tolist()]]
    feet = "".join(f"\\par {escape(note)}\n" for note in notes)
    return f"""\\begin{{table*}}
\\caption{{{escape(_caption(table))}}}
\\label{{tab:metis-{table["table"]:02d}}}
\\resizebox{{\\textwidth}}{{!}}{{%
\\begin{{tabular}}{{lll{"r" * (len(frame.columns) - 3)}}}
\\toprule
{lines[0]}
\\midrule
{chr(10).join(lines[1:])}
\\bottomrule
\\end{{tabular}}}}
{{\\footnotesize
{feet}}}
\\end{{table*}}
"""


def to_csv(found: Sequence[dict[str, Any]]) -> str:
    """One line a number, for machines; ``of`` is ``paper`` or the name of our run."""
    keys = ("table", "test_set", "of", "system", "data", "metric", "value", "low", "high", "n", "n_failed", "protocol")
    text = io.StringIO()
    writer = csv.DictWriter(text, [*keys, "same_judge", "same_test_set", "how"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def write_tables(folder: str | Path, runs: Sequence[Run] = ()) -> list[Path]:
    """Write every table as ``tableNN.html``, ``.md``, ``.csv`` and ``.tex``; return the paths."""
    if len({run.name for run in runs}) < len(runs):  # of two test sets' folders, say: rows go by name
        runs = [run._replace(name=run.folder.resolve().as_posix()) for run in runs]
    written = []
    for table in tables():
        found = records(table, runs)
        frame, notes = beside(table, found)
        texts = {
            "html": to_html(table, frame, notes), "md": to_markdown(table, frame, notes), "csv": to_csv(found),
            "tex": to_latex(table, frame, notes),
        }  # fmt: skip
        for kind, text in texts.items():
            written.append(Path(folder) / f"table{table['table']:02d}.{kind}")
            write_text(written[-1], text)
    return written
