"""From scores of utterances to means with intervals, and to differences between systems with tests.

Utterances of one speaker are not independent, so speakers are resampled where there are enough of them (Bisani and
Ney 2004), else utterances within their speakers.  Seeds are not utterances: what a system gave for one utterance is
averaged over its seeds first, and how far the seeds lie apart is told beside the interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics
from metis_lib.evaluation.metrics import TASKS, TaskSummary

MIN_SPEAKERS, MIN_STRATUM = 8, 4
RESAMPLES = 10_000
INTERVAL = "expanded percentile, 95 %"
"""The kind of interval, for records."""


class Estimate(NamedTuple):
    """A mean (or ratio) with its 95 % interval; ``ci95`` is None below two resampling units."""

    mean: float
    ci95: tuple[float, float] | None
    n: int
    unit: str


class _Units(NamedTuple):
    """What is resampled: sums ``top`` and ``bottom`` ``[N]`` of every unit, and the units of each stratum."""

    top: NDArray[np.float64]
    bottom: NDArray[np.float64]
    strata: list[NDArray[np.intp]]
    unit: str


def unit_of(speakers: Sequence[str]) -> str:
    """What is resampled: ``"speakers"`` from eight of them on, else ``"utterances"``."""
    return "speakers" if len(set(speakers)) >= MIN_SPEAKERS else "utterances"


def _units(top: Sequence[float], bottom: Sequence[float], speakers: Sequence[str], ids: Sequence[str]) -> _Units:
    """Average the seeds of each utterance, then sum by speaker, or sort the utterances into strata by speaker.

    Speakers with fewer than four utterances hardly show their own spread: they share a stratum.
    """
    _, first, utterance = np.unique(np.asarray(ids, dtype=str), return_index=True, return_inverse=True)
    seeds = np.bincount(utterance)
    above, below = (np.bincount(utterance, weights=np.asarray(x, float)) / seeds for x in (top, bottom))
    _, voice = np.unique(np.asarray(speakers, dtype=str)[first], return_inverse=True)
    unit = unit_of(speakers)
    if unit == "speakers":
        above, below = (np.bincount(voice, weights=x).astype(float) for x in (above, below))
        return _Units(above, below, [np.arange(len(above))], unit)
    parts = sorted((np.flatnonzero(voice == index) for index in range(voice.max() + 1)), key=len)
    shared = sum(len(part) < MIN_STRATUM for part in parts)
    if shared and sum(map(len, parts[:shared])) < MIN_STRATUM:
        shared += 1  # too few even together: they join the next smallest
    strata = [np.concatenate(parts[:shared]), *parts[shared:]] if shared else parts
    return _Units(above, below, strata, unit)


def _interval(units: _Units) -> tuple[float, float] | None:
    """Percentile bootstrap (seed 0) of ``sum(top) / sum(bottom)`` within strata, at an expanded level.

    The plain percentile interval is too short for few units; its level is set so that the interval of a mean would
    be as long as Student's (Hesterberg 2015, "expanded percentile interval"), with the degrees of freedom that the
    strata leave.
    """
    from scipy import stats

    units_n, free = len(units.top), len(units.top) - len(units.strata)
    if free < 1:
        return None
    level = 1 - 2 * stats.norm.sf(np.sqrt(units_n / free) * stats.t.ppf(0.975, free))

    def ratio(*drawn: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        chosen = np.concatenate(drawn, axis=axis)
        return units.top[chosen].sum(axis=axis) / units.bottom[chosen].sum(axis=axis)

    interval = stats.bootstrap(
        units.strata, ratio, vectorized=True, n_resamples=RESAMPLES, batch=1000, method="percentile",
        confidence_level=float(level), rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], speakers: Sequence[str], utterances: Sequence[str]
) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a 95 % bootstrap interval over speakers or utterances.

    All arguments have one entry a recording; recordings of one utterance (its seeds) are averaged first.
    """
    units = _units(numerators, denominators, speakers, utterances)
    return Estimate(float(units.top.sum() / units.bottom.sum()), _interval(units), len(numerators), units.unit)


def mean_interval(values: Sequence[float], speakers: Sequence[str], utterances: Sequence[str]) -> Estimate:
    """Mean of ``values`` with its interval; see :func:`ratio_interval`."""
    return ratio_interval(values, [1.0] * len(values), speakers, utterances)


# --- one system ------------------------------------------------------------------------------------------


def _keys(rows: Sequence[dict[str, Any]], task: str) -> list[str]:
    """The metrics of a task that were asked of these rows; the corpus rate follows the mean rate of word errors."""
    known = [*TASKS[task]["metrics"], *TASKS[task].get("measures", [])]
    asked = [key for key in known if any(key in row for row in rows)]
    return [name for key in asked for name in ((key, "wer_corpus") if key == "wer" else (key,))]


def _value(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    """Numerator and denominator of a metric, or None where it failed."""
    value, weight = (row.get("word_errors"), row.get("words")) if key == "wer_corpus" else (row.get(key), 1.0)
    return None if value is None or weight is None else (float(value), float(weight))


def summarise(rows: Sequence[dict[str, Any]], task: str, judges: str = "offline") -> TaskSummary:
    """Means with intervals of every system: ``{system: {metric: entry}}``.

    An entry has ``mean``, ``ci95`` (null below two units), ``unit`` (what was resampled: speakers, or utterances
    within speakers), ``n`` and ``n_failed`` (recordings: utterances times seeds), ``seeds``, ``seed_sd`` (standard
    deviation of the seeds' means; null for one seed) and ``protocol`` (of ``judges``: offline or paper).
    """
    summary: TaskSummary = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        mine = [row for row in rows if row["system"] == system]
        summary[system] = {
            key: _entry(mine, key) | {"protocol": metrics.protocol(key, judges, task)} for key in _keys(mine, task)
        }
    return summary


def _asked(row: dict[str, Any], key: str) -> bool:
    """Whether a metric was asked of a row: scoring then writes at least a null.

    Where nothing was made, it writes none for what systems tell of themselves (such as the real-time factor).
    """
    told = {"seconds_to_make", "measured"} & {*metrics.SPECS[key].needs}
    return key in row or key == "wer_corpus" or bool(told and row.get("error"))


def _entry(rows: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    rows = [row for row in rows if _asked(row, key)]
    pairs = [(row, value) for row in rows if (value := _value(row, key)) is not None]
    entry: dict[str, Any] = {"mean": None, "ci95": None, "n": len(pairs), "n_failed": len(rows) - len(pairs)}
    entry |= {"unit": None, "seeds": len({row["seed"] for row in rows}), "seed_sd": None}
    if pairs:
        good, values = zip(*pairs, strict=True)
        top, bottom = zip(*values, strict=True)
        estimate = ratio_interval(top, bottom, [row["speaker"] for row in good], [row["id"] for row in good])
        entry["mean"], entry["unit"] = round(estimate.mean, 6), estimate.unit
        entry["ci95"] = [round(value, 6) for value in estimate.ci95] if estimate.ci95 else None
        by_seed: dict[Any, list[tuple[float, float]]] = {}
        for row, value in pairs:
            by_seed.setdefault(row["seed"], []).append(value)
        means = [np.divide(*np.sum(part, axis=0)) for part in by_seed.values()]
        entry["seed_sd"] = round(float(np.std(means, ddof=1)), 6) if len(means) > 1 else None
    return entry


# --- two systems -----------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the given order."""
    order = np.argsort(p_values)
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted.tolist()


def compare(
    rows: Sequence[dict[str, Any]], a: str, b: str, task: str, only: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Paired differences ``a - b`` over the same utterances: ``{metric: entry}``, of all metrics or ``only`` some.

    An entry has ``difference``, ``ci95`` (bootstrap over the units of :func:`unit_of`), ``p`` (two-sided
    sign-flip test over the same units: every sign pattern, or 9,999 random ones), ``p_holm`` (corrected for the
    metrics of this table), ``n`` (utterances that both were scored on) and ``unit``.

    Raises:
        MetisError: not comparable: a system without rows, other utterances or other texts.
    """
    sides = []
    for system in (a, b):
        mine = [row for row in rows if row["system"] == system]
        if not mine:
            raise MetisError(f"no rows of the system {system!r} to compare")
        sides.append(mine)
    sets = [{(row["id"], row["speaker"], row["text"]) for row in mine} for mine in sides]
    if sets[0] != sets[1]:
        lost = sorted(sets[0] ^ sets[1])[0][0]
        raise MetisError(f"{a} and {b} are not comparable: not the same test set (the utterance {lost} differs)")
    shared = [key for key in _keys(sides[0], task) if key in _keys(sides[1], task) and (only is None or key in only)]
    table = {key: _difference(sides[0], sides[1], key) for key in shared}
    tested = [entry for entry in table.values() if entry["p"] is not None]
    for entry, p in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = round(p, 6)
    return table


def _difference(rows_a: Sequence[dict[str, Any]], rows_b: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    from scipy.stats import permutation_test

    means: list[dict[str, tuple[float, float]]] = []
    for rows in (rows_a, rows_b):
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if (value := _value(row, key)) is not None:
                found.setdefault(row["id"], []).append(value)
        means.append({name: tuple(np.mean(values, axis=0)) for name, values in found.items()})
    speakers = {row["id"]: row["speaker"] for row in rows_a}
    both = [name for name in means[0] if name in means[1]]
    entry: dict[str, Any] = {"difference": None, "ci95": None, "p": None, "p_holm": None, "n": len(both), "unit": None}
    if both:
        top = [means[0][name][0] - means[1][name][0] for name in both]  # the weights (words) of both are equal
        units = _units(top, [means[0][name][1] for name in both], [speakers[name] for name in both], both)
        interval = _interval(units)
        entry |= {"difference": round(float(units.top.sum() / units.bottom.sum()), 6), "unit": units.unit}
        if interval:
            entry["ci95"] = [round(value, 6) for value in interval]
            test = permutation_test(
                (units.top,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", vectorized=True,
                n_resamples=RESAMPLES - 1, batch=1000, rng=np.random.default_rng(0),
            )  # fmt: skip
            entry["p"] = round(float(test.pvalue), 6)
    return entry
