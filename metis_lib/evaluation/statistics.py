"""From scores of utterances to means with intervals: bootstrap over speakers or utterances (Bisani and Ney 2004)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from metis_lib.evaluation import metrics
from metis_lib.evaluation.metrics import TASKS, TaskSummary

MIN_SPEAKERS = 8
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean (or ratio) with its 95 % interval; ``ci95`` is None below two resampling units."""

    mean: float
    ci95: tuple[float, float] | None
    n: int
    unit: str


def resampling_units(speakers: Sequence[str], utterances: Sequence[str]) -> tuple[Sequence[str], str]:
    """The labels to resample by and their kind: ``"speakers"`` from eight of them on, else ``"utterances"``.

    Utterances of one speaker are not independent (Bisani and Ney 2004), nor are the seeds of one utterance.
    """
    enough = len(set(speakers)) >= MIN_SPEAKERS
    return (speakers, "speakers") if enough else (utterances, "utterances")


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], speakers: Sequence[str], utterances: Sequence[str]
) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a percentile bootstrap (seed 0) over speakers or utterances."""
    from scipy.stats import bootstrap

    labels, unit = resampling_units(speakers, utterances)
    _, group = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    top = np.bincount(group, weights=np.asarray(numerators, dtype=float))
    bottom = np.bincount(group, weights=np.asarray(denominators, dtype=float))
    mean = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(mean, None, len(numerators), unit)
    interval = bootstrap(
        (top, bottom), lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Estimate(mean, (float(interval.low), float(interval.high)), len(numerators), unit)


def mean_interval(values: Sequence[float], speakers: Sequence[str], utterances: Sequence[str]) -> Estimate:
    """Mean of ``values`` with a 95 % percentile bootstrap interval over speakers or utterances."""
    return ratio_interval(values, [1.0] * len(values), speakers, utterances)


def summarise(rows: Sequence[dict[str, Any]], task: str) -> TaskSummary:
    """Means with intervals over the utterances of every system; see ``TaskSummary``."""
    wer, *others = TASKS[task]["metrics"]
    summary: TaskSummary = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        summary[system] = {key: _entry(mine, key) for key in (wer, "wer_corpus", *others)}
    return summary


def _entry(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    value, weight = ("word_errors", "words") if key == "wer_corpus" else (key, None)
    good = [row for row in rows if row[value] is not None]
    entry: dict[str, Any] = {"mean": None, "ci95": None, "n": len(good), "n_failed": len(rows) - len(good)}
    if good:
        weights = [row[weight] if weight else 1.0 for row in good]
        speakers, ids = [row["speaker"] for row in good], [row["id"] for row in good]
        estimate = ratio_interval([row[value] for row in good], weights, speakers, ids)
        entry["mean"] = round(estimate.mean, 6)
        entry["ci95"] = [round(value, 6) for value in estimate.ci95] if estimate.ci95 else None
    return entry | {"protocol": metrics.METRICS[key]}
