"""The results of README.md: one table between two markers, written from a run's files, never by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record, report

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def _arrow(metric: str) -> str:
    if metric == "sim_other":  # the control
        return ""
    return "↓" if metric in metrics.LOWER_IS_BETTER else "↑"


def _cell(entry: dict[str, Any] | None) -> str:
    """Mean with its interval below it; how many failed if any did."""
    if entry is None:
        return ""
    if entry["mean"] is None:
        return f"failed ({entry['n_failed']})"
    interval = "<br><sub>{:.2f} to {:.2f}</sub>".format(*entry["ci95"]) if entry["ci95"] else ""
    failed = f"<br><sub>{entry['n_failed']} failed</sub>" if entry["n_failed"] else ""
    return f"{entry['mean']:.2f}{interval}{failed}"


def results(summary: dict[str, report.TaskSummary], run: dict[str, Any]) -> str:
    """Markdown of a run: tasks and systems down, metrics across, and what the numbers belong to.

    Raises:
        MetisError: numbers of different protocols would share a column.
    """
    protocols: dict[str, str] = {}
    for scores in summary.values():
        for metric, protocol in report.check_protocols(scores).items():
            if protocols.setdefault(metric, protocol) != protocol:
                raise MetisError(f"{metric} was measured by {protocol} and by {protocols[metric]}")
    protocols.pop("wer_corpus", None)
    columns = [metric for metric in report.LABELS if metric in protocols]
    heads = [f"{report.LABELS[metric]} {_arrow(metric)}".strip() for metric in columns]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    for task, systems in summary.items():
        lines.append(f"| **{report.TITLES[task]}** |" + " |" * len(columns))
        for system, entries in systems.items():
            lines.append(f"| {system} | " + " | ".join(_cell(entries.get(metric)) for metric in columns) + " |")
    counts = {task: max(e["n"] + e["n_failed"] for s in systems.values() for e in s.values())
              for task, systems in summary.items()}  # fmt: skip
    many = ", ".join(f"{count} of {report.TITLES[task].lower()}" for task, count in counts.items())
    commit = f"{(run.get('commit') or 'none')[:12]}{' with changes' if run.get('dirty') else ''}"
    weights = (run.get("checkpoint_sha256") or "none")[:12]
    lines += [
        "",
        f"Mean and 95 % bootstrap interval over utterances ({many}); rates are fractions; empty: not asked of "
        f"the task. Code {commit}, weights {weights}, test set {run['manifest_sha256'][:12]}.",
        "",
        "<details><summary>How it was measured</summary>",
        "",
        *(f"- `{protocol}`: {metrics.PROTOCOLS[protocol]}" for protocol in dict.fromkeys(protocols.values())),
        "",
        "</details>",
    ]
    return "\n".join(lines)


def fill(readme: Path, text: str) -> Path:
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
