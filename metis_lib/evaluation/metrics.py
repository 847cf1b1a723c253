"""Metrics that need no model (word errors, PESQ, STOI, cosine), their protocols and their confidence intervals.

Every number is printed with a protocol id; numbers of different protocols never share a column.
A metric that cannot be computed raises :class:`MetricFailure` with a reason: ``null``, never a number.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

JUDGE_RATE = 16_000
"""Sample rate in Hz at which every judge listens (soxr HQ from whatever the system gives)."""
MAX_DELAY_MS = 50.0
"""Generated speech is aligned by at most this delay before PESQ and STOI."""

_TABLES = json.loads(Path(__file__).with_name("protocols.json").read_text(encoding="utf-8"))
PROTOCOLS: dict[str, str] = _TABLES["protocols"]
"""Protocol id to what it means."""
METRICS: dict[str, str] = {key: about["protocol"] for key, about in _TABLES["metrics"].items()}
"""Metric key to protocol id."""
LABELS: dict[str, str] = {key: about["label"] for key, about in _TABLES["metrics"].items()}
BETTER: dict[str, str] = {key: about["better"] for key, about in _TABLES["metrics"].items()}
"""An arrow; empty for the control ``sim_other``, the similarity to somebody else, which must be low."""
TASKS: dict[str, dict[str, Any]] = _TABLES["tasks"]
"""Task to its title, its metrics and its systems that are not the model."""
SYSTEM_ABOUT: dict[str, str] = _TABLES["systems"]
WER, SIM, DNSMOS, PESQ, STOI = (METRICS[key] for key in ("wer", "sim_other", "dnsmos_sig", "pesq_wb", "stoi"))
TaskSummary = dict[str, dict[str, dict[str, Any]]]
"""``{system: {metric: {mean, ci95, n, n_failed, protocol}}}``; ``mean`` and ``ci95`` are null at n = 0."""
Wave = NDArray[np.float32]


class MetricFailure(Exception):
    """A metric could not be computed; the message is the reason that is written beside the ``null``."""


class WordErrors(NamedTuple):
    """Word errors of one utterance (substitutions, deletions, insertions) and the words of its reference."""

    errors: int
    words: int

    @property
    def rate(self) -> float:
        """Errors divided by reference words (a fraction; may exceed 1)."""
        return self.errors / self.words


@functools.cache
def _english_normaliser() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalise_english(text: str) -> str:
    """Whisper's English normalisation: lower case, no punctuation, numbers and spellings made equal."""
    return _english_normaliser()(text).strip()


def word_errors(reference: str, heard: str) -> WordErrors:
    """Word errors of ``heard`` against ``reference``, both normalised first.

    Raises:
        MetricFailure: the reference has no words after normalisation.
    """
    import jiwer

    truth = normalise_english(reference)
    if not any(character.isalnum() for character in truth):
        raise MetricFailure("the reference text has no words after normalisation")
    counts = jiwer.process_words(truth, normalise_english(heard))
    return WordErrors(counts.substitutions + counts.deletions + counts.insertions, len(truth.split()))


def _delay(reference: Wave, signal: Wave, limit: int) -> tuple[int, float]:
    """Samples by which ``signal`` is late, at most ``limit``, and the normalised correlation there."""
    from scipy.signal import correlate

    correlation = correlate(signal, reference, mode="full", method="fft")
    zero = len(reference) - 1
    delay = int(np.argmax(correlation[zero - limit : zero + limit + 1])) - limit
    scale = float(np.linalg.norm(reference) * np.linalg.norm(signal))
    return delay, float(correlation[zero + delay]) / max(scale, 1e-12)


def _envelope(wav: Wave, rate: int) -> Wave:
    """Log envelope of ``[S]`` over 20 ms, mean removed."""
    window = np.hanning(rate // 50)
    envelope = np.log(np.convolve(np.abs(wav), window / window.sum(), "same") + 1e-3)
    return (envelope - envelope.mean()).astype(np.float32)


def align(reference: Wave, signal: Wave, rate: int) -> tuple[Wave, Wave, float]:
    """Remove a constant delay of ``signal`` ``[S']`` against ``reference`` ``[S]``; both cut to the shorter.

    The delay is the highest peak of the cross-correlation within 50 ms; returned in ms (positive: late).
    Generated speech has phases of its own: where the waveforms correlate by less than 0.3 their peak says
    nothing about time, and the log envelopes are correlated in their place.
    """
    size = min(len(reference), len(signal))
    limit = min(int(round(rate * MAX_DELAY_MS / 1000)), max(size - 1, 0))
    delay, likeness = _delay(reference, signal, limit)
    if likeness < 0.3:
        delay, _ = _delay(_envelope(reference[:size], rate), _envelope(signal[:size], rate), limit)
    late, early = (signal[delay:], reference) if delay >= 0 else (signal, reference[-delay:])
    size = min(len(late), len(early))
    return early[:size], late[:size], 1000.0 * delay / rate


def _pair(reference: Wave, signal: Wave) -> tuple[Wave, Wave]:
    difference = abs(len(reference) - len(signal)) / JUDGE_RATE
    if difference > 0.25:
        raise MetricFailure(f"the lengths differ by {difference:.2f} s: not the same utterance sample by sample")
    return align(reference, signal, JUDGE_RATE)[:2]


def pesq_wb(reference_16k: Wave, signal_16k: Wave) -> float:
    """PESQ P.862.2 wide band, about 1.0 to 4.64, of ``[S]`` at 16 kHz.

    Raises:
        MetricFailure: no utterance found, too short, or a score above 3 for what STOI finds unintelligible
            (below 0.5): P.862 compares nothing where it finds no active speech, and then reports about 4.4.
    """
    import pesq

    reference, signal = _pair(reference_16k, signal_16k)
    try:
        with np.errstate(invalid="ignore"):
            value = float(pesq.pesq(JUDGE_RATE, reference, signal, "wb"))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        reason = reason.decode() if isinstance(reason, bytes) else str(reason)
        raise MetricFailure(f"PESQ: {reason}") from error
    if value > 3.0 and stoi(reference_16k, signal_16k) < 0.5:
        raise MetricFailure(f"PESQ: found no active speech to compare (it gave {value:.2f} at a STOI below 0.5)")
    return value


def stoi(reference_16k: Wave, signal_16k: Wave) -> float:
    """Short-time objective intelligibility, 0 to 1, of ``[S]`` at 16 kHz.

    Raises:
        MetricFailure: fewer than 30 frames that are not silent.
    """
    from pystoi import stoi as pystoi

    reference, signal = _pair(reference_16k, signal_16k)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi(reference, signal, JUDGE_RATE, extended=False))
        except (RuntimeWarning, ValueError, ZeroDivisionError) as error:
            raise MetricFailure(f"STOI: {str(error).splitlines()[0]}") from error


def cosine(a: Sequence[float] | NDArray[np.float64], b: Sequence[float] | NDArray[np.float64]) -> float:
    """Cosine of two vectors ``[C]``, -1 to 1."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
