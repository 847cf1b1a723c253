"""Pictures of an evaluation, out of the rows of utterances and the summaries of runs.

Colours are safe for colour-blind readers; every figure is returned, for a notebook, a page or a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metis_lib.errors import MetisError
from metis_lib.evaluation.metrics import LABELS, TaskSummary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from metis_lib.evaluation.record import Run


def distributions(rows: Sequence[dict[str, Any]], summary: TaskSummary, protocols: dict[str, str]) -> Figure:
    """Every metric: utterances as dots, the mean and its 95 % interval as a bar, one line a system."""
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    shown, systems = [metric for metric in protocols if metric != "wer_corpus"], list(summary)
    frame = pandas.DataFrame(rows).reindex(columns=["system", *shown]).melt(["system"], shown, "metric")
    height = 0.3 * len(systems) + 0.9
    plt.close(plt.figure())  # a kernel's first figure switches the plots on, which the end of the context would undo
    with plt.rc_context({"figure.constrained_layout.use": False}):  # the grid has a layout of its own
        grid = seaborn.catplot(
            frame.astype({"value": float}), kind="strip", x="value", y="system", order=systems, hue="system",
            hue_order=systems, col="metric", col_order=shown, col_wrap=min(3, len(shown)), sharex=False,
            palette="colorblind", size=3.5, alpha=0.7, jitter=0.15, legend=False, height=height, aspect=3.2 / height,
        )  # fmt: skip
    for metric, axis in grid.axes_dict.items():
        axis.set(title=LABELS[metric], xlabel="", ylabel="")
        for place, entry in enumerate(summary[system].get(metric) for system in systems):
            if entry and entry["mean"] is not None:
                axis.plot(entry["mean"], place, "|", color="black", markersize=12, zorder=6)
                axis.hlines(place, *(entry["ci95"] or [entry["mean"]] * 2), color="black", linewidth=2.5, zorder=5)
    plt.close(grid.figure)
    return grid.figure


def by(
    rows: Sequence[dict[str, Any]], x: str, metric: str, *, label: str = "", title: str = "", bins: int = 4
) -> Figure:
    """``metric`` against ``x`` (a number that the rows carry): means of equally full bins with 95 % intervals
    over their recordings.

    Raises:
        MetisError: fewer than two values of ``x`` to show.
    """
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    kept = [row for row in rows if row.get(x) is not None and row.get(metric) is not None]
    if len({row[x] for row in kept}) < 2:
        raise MetisError(f"fewer than two values of {x} with {metric}")
    frame = pandas.DataFrame(kept)
    values = frame[x].astype(float)
    if values.nunique() > bins:
        full = pandas.qcut(values, bins, duplicates="drop")
        values = values.groupby(full, observed=True).transform("mean")
    systems = list(dict.fromkeys(frame["system"]))
    apart = frame["system"].map(systems.index) - (len(systems) - 1) / 2  # so that bars do not hide each other
    frame = frame.assign(place=values.astype(float) + 0.012 * float(np.ptp(values)) * apart)
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    seaborn.lineplot(
        frame, x="place", y=metric, hue="system", style="system", markers=True, dashes=False, palette="colorblind",
        errorbar=("ci", 95), err_style="bars", err_kws={"capsize": 3}, seed=0, ax=axis,
    )  # fmt: skip
    axis.set(xlabel=label or x, ylabel=LABELS.get(metric, metric), title=title)
    axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]) if metric == "wer" else None)
    axis.legend(title="", loc="center left", bbox_to_anchor=(1.0, 0.5))
    plt.close(figure)
    return figure


def guidance(runs: Sequence[Run], task: str, x: str = "wer", y: str = "sim_prompt", option: str = "cfg") -> Figure:
    """Two metrics of the model over a decoding option: one point a run, bars are 95 % intervals, lines join a system.

    The option is read from ``settings`` of the task in ``run.json``; runs without it are left out.

    Raises:
        MetisError: fewer than two runs of the task name the option and have both metrics.
    """
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    points = []
    for run in runs:
        settings = ((run.about.get("tasks") or {}).get(task) or {}).get("settings") or {}
        value, name = (settings.get("options") or {}).get(option), Path(settings.get("checkpoint") or "").name
        entries = run.summary.get(task, {}).get(name, {})
        if value is not None and all(entries.get(key, {}).get("mean") is not None for key in (x, y)):
            ids = {key: entries[key]["protocol"] for key in (x, y)}
            points.append({"system": name, option: value, x: entries[x], y: entries[y], "protocols": ids})
    if len(points) < 2:
        raise MetisError(f"fewer than two runs of {task} name the option {option!r} and have {x} and {y}")
    if any(point["protocols"] != points[0]["protocols"] for point in points):
        raise MetisError("the runs were measured by different protocols: not comparable")
    frame = pandas.DataFrame(points).sort_values(["system", option])
    for key in (x, y):
        frame = frame.assign(
            **{key: [entry["mean"] for entry in frame[key]], f"{key}_ci": [e["ci95"] for e in frame[key]]}
        )
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    seaborn.lineplot(frame, x=x, y=y, hue="system", style="system", markers=True, sort=False, estimator=None, ax=axis)
    for point in frame.to_dict("records"):
        for low_high, draw, other in (
            (point[f"{x}_ci"], axis.hlines, point[y]),
            (point[f"{y}_ci"], axis.vlines, point[x]),
        ):
            if low_high:
                draw(other, *low_high, color="grey", linewidth=0.8, zorder=0)
        axis.annotate(f"{option} {point[option]:g}", (point[x], point[y]), (5, 5), textcoords="offset points")
    axis.set(xlabel=LABELS[x], ylabel=LABELS[y])
    plt.close(figure)
    return figure
