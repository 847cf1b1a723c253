"""Statistics: bootstrap confidence intervals of means and of ratios of sums.

Resampled are whole speakers when there are at least eight of them, else utterances (several seeds of one
utterance stay together): utterances of one speaker are not independent (Bisani and Ney 2004).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_SPEAKERS = 8
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean (or ratio) with its 95 % interval; ``ci95`` is None below two resampling units."""

    mean: float
    ci95: tuple[float, float] | None
    n: int
    unit: str


def resampling_units(speakers: Sequence[str], utterances: Sequence[str]) -> tuple[Sequence[str], str]:
    """The labels to resample by and their kind: ``"speakers"`` or ``"utterances"``."""
    if len(set(speakers)) >= MIN_SPEAKERS:
        return speakers, "speakers"
    return utterances, "utterances"


def ratio_interval(
    numerators: Sequence[float],
    denominators: Sequence[float],
    speakers: Sequence[str],
    utterances: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a percentile bootstrap over speakers or utterances."""
    from scipy.stats import bootstrap

    labels, unit = resampling_units(speakers, utterances)
    _, group = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    top = np.bincount(group, weights=np.asarray(numerators, dtype=float))
    bottom = np.bincount(group, weights=np.asarray(denominators, dtype=float))
    mean = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Estimate(mean, None, len(numerators), unit)
    result = bootstrap(
        (top, bottom),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, (float(result.low), float(result.high)), len(numerators), unit)


def mean_interval(
    values: Sequence[float], speakers: Sequence[str], utterances: Sequence[str], **options: int
) -> Estimate:
    """Mean of ``values`` with a 95 % percentile bootstrap interval over speakers or utterances."""
    return ratio_interval(values, [1.0] * len(values), speakers, utterances, **options)
