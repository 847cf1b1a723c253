"""What every metric is, and those that need no model: errors of words, intrusive scores, pitch, duration, cosine.

Every number is printed with a protocol id; numbers of different protocols never share a column.
A metric that cannot be computed raises :class:`MetricFailure` with a reason: ``null``, never a number.
"""

from __future__ import annotations

import functools
import json
import string
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from metis_lib.tasks import own

JUDGE_RATE = 16_000
"""Sample rate in Hz at which every judge listens (soxr HQ from whatever the system gives)."""
MAX_DELAY_MS = 50.0
"""Generated speech is aligned by at most this delay before PESQ and STOI."""

SHORTEST = 0.1
"""Seconds; nothing is said of shorter audio."""


@dataclass(frozen=True)
class Metric:
    """What a metric is; see ``SPECS``.

    Attributes:
        key: its name in rows and summaries.
        protocol: protocol id with the offline judges.
        label, better: its column's head, and the arrow to the better side ("" for controls and shares).
        unit: unit or range.
        needs: what it compares with: ``text``, or a recording or a fact of the item or clip.
        licence: of the judge or library that does the measuring.
        source: paper, and library.
        intrusive: it compares sample by sample, and so punishes phase and timing of generated speech.
        paper: protocol id with the paper's judges, where it is another.
        only: the one set of judges that has it, if not all have.
    """

    key: str
    protocol: str
    label: str
    better: str
    unit: str
    needs: tuple[str, ...]
    licence: str
    source: str
    intrusive: bool = False
    paper: str = ""
    only: str = ""


_TABLES = json.loads(Path(__file__).with_name("protocols.json").read_text(encoding="utf-8"))
SPECS = {key: Metric(key, **about | {"needs": tuple(about["needs"])}) for key, about in _TABLES["metrics"].items()}
"""Every metric by its key."""
PROTOCOLS: dict[str, str] = _TABLES["protocols"]
"""Protocol id to what it means."""
METRICS: dict[str, str] = {key: spec.protocol for key, spec in SPECS.items()}
"""Metric key to protocol id with the offline judges; see :func:`protocol`."""
LABELS: dict[str, str] = {key: spec.label for key, spec in SPECS.items()}
BETTER: dict[str, str] = {key: spec.better for key, spec in SPECS.items()}
"""An arrow; empty for controls such as ``sim_other``, the similarity to somebody else, which must be low."""
TASKS: dict[str, dict[str, Any]] = _TABLES["tasks"]
"""Task to its ``title``, its ``metrics``, headline first, its ``measures`` (what only some systems or judges can tell)
and its ``systems`` that are not the model."""
TASKS |= {name: {**TASKS[new.like], "title": new.title or name} for name, new in own().items()}
SYSTEM_ABOUT: dict[str, str] = _TABLES["systems"]
WER, SIM, PESQ = (METRICS[key] for key in ("wer", "sim_other", "pesq_wb"))
TaskSummary = dict[str, dict[str, dict[str, Any]]]
"""``{system: {metric: {mean, ci95, n, n_failed, protocol}}}``; ``mean`` and ``ci95`` are null at n = 0."""
Wave = NDArray[np.float32]


class MetricFailure(Exception):
    """A metric could not be computed; the message is the reason that is written beside the ``null``."""


class Unheard(MetricFailure):
    """There is nothing to hear: silence, or too little sound.  For word errors that is a verdict: no word was said."""


def protocol(key: str, judges: str = "offline", task: str = "") -> str:
    """Protocol id of a metric under a set of judges (``offline`` or ``paper``) in a task."""
    spec = SPECS[key]
    if judges == "offline":
        return spec.protocol
    return TASKS.get(task, {}).get("paper", {}).get(key) or spec.paper or spec.protocol


def check(wav: Wave, shortest: float = SHORTEST) -> None:
    """Raise MetricFailure unless ``wav`` ``[S]`` at 16 kHz is finite and at least ``shortest`` seconds of sound."""
    if not len(wav) or not np.isfinite(wav).all():
        raise MetricFailure("the audio is empty or not finite")
    if not np.any(wav):
        raise Unheard("the audio is silent")
    if len(wav) < shortest * JUDGE_RATE:
        raise Unheard(f"{len(wav) / JUDGE_RATE:.2f} s is too short; at least {shortest:g} s of audio are needed")


# --- text ------------------------------------------------------------------------------------------------


class WordErrors(NamedTuple):
    """Errors of one utterance and the words (or characters) of its reference."""

    errors: int
    words: int
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def rate(self) -> float:
        """Errors divided by reference words (a fraction; may exceed 1)."""
        return self.errors / self.words


SPLIT_LANGUAGES = ("zh", "ja")
"""Languages whose words are characters."""


@functools.cache
def _normaliser(language: str) -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return (
        EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(split_letters=language in SPLIT_LANGUAGES)
    )


def normalise(text: str, language: str = "en") -> str:
    """Whisper's normalisation: lower case, no punctuation; in English also numbers and spellings made equal."""
    return _normaliser(language)(text).strip()


def normalise_seedtts(text: str, language: str = "en") -> str:
    """As seed-tts-eval: no punctuation but the apostrophe, lower case, numbers as written; Chinese by characters."""
    from zhon import hanzi

    text = text.translate(dict.fromkeys(map(ord, set(hanzi.punctuation + string.punctuation) - {"'"})))
    text = text.replace("  ", " ")
    return " ".join(text) if language in SPLIT_LANGUAGES else text.lower()


def _errors(truth: str, heard: str, *, characters: bool = False) -> WordErrors:
    import jiwer

    if not any(character.isalnum() for character in truth):
        raise MetricFailure("the reference text has no words after normalisation")
    found = (jiwer.process_characters if characters else jiwer.process_words)(truth, heard)
    kinds = (found.substitutions, found.deletions, found.insertions)
    return WordErrors(sum(kinds), found.hits + found.substitutions + found.deletions, *kinds)


def word_errors(reference: str, heard: str, language: str = "en") -> WordErrors:
    """Word errors of ``heard`` against ``reference``, both by :func:`normalise`.

    Raises:
        MetricFailure: the reference has no words after normalisation.
    """
    return _errors(normalise(reference, language), normalise(heard, language))


def word_errors_seedtts(reference: str, heard: str, language: str = "en") -> WordErrors:
    """:func:`word_errors` of texts by :func:`normalise_seedtts`."""
    return _errors(normalise_seedtts(reference, language), normalise_seedtts(heard, language))


def character_errors(reference: str, heard: str, language: str = "en") -> WordErrors:
    """Character errors, spaces not counted, of texts by :func:`normalise`; raises as :func:`word_errors`."""
    texts = (normalise(text, language).replace(" ", "") for text in (reference, heard))
    return _errors(*texts, characters=True)


# --- sample by sample ------------------------------------------------------------------------------------


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
    if min(len(reference), len(signal)) < SHORTEST * JUDGE_RATE:
        raise MetricFailure(f"at least {SHORTEST:g} s of audio are needed")
    if not np.isfinite(reference).all() or not np.isfinite(signal).all():
        raise MetricFailure("the audio is not finite")
    difference = abs(len(reference) - len(signal)) / JUDGE_RATE
    if difference > 0.25:
        raise MetricFailure(f"the lengths differ by {difference:.2f} s: not the same utterance sample by sample")
    return align(reference, signal, JUDGE_RATE)[:2]


def pesq_wb(reference_16k: Wave, signal_16k: Wave, band: str = "wb") -> float:
    """PESQ P.862.2 wide band, about 1.0 to 4.64, of ``[S]`` at 16 kHz (``nb``: P.862.1 narrow band, 1.0 to 4.55).

    Raises:
        MetricFailure: no utterance found, too short, or a score above 3 for what STOI finds unintelligible
            (below 0.5): P.862 compares nothing where it finds no active speech, and then reports about 4.4.
    """
    import pesq

    reference, signal = _pair(reference_16k, signal_16k)
    try:
        with np.errstate(invalid="ignore"):
            value = float(pesq.pesq(JUDGE_RATE, reference, signal, band))
    except (pesq.PesqError, ValueError, ZeroDivisionError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        reason = reason.decode() if isinstance(reason, bytes) else str(reason)
        raise MetricFailure(f"PESQ: {reason}") from error
    if value > 3.0:
        try:
            unlike = stoi(reference_16k, signal_16k) < 0.5
        except MetricFailure:  # too short for STOI
            unlike = si_sdr(reference_16k, signal_16k) < 0
        if unlike:
            raise MetricFailure(f"PESQ: found no active speech to compare (it gave {value:.2f} for what is not alike)")
    return value


def stoi(reference_16k: Wave, signal_16k: Wave, *, extended: bool = False) -> float:
    """Short-time objective intelligibility, 0 to 1, of ``[S]`` at 16 kHz (``extended``: ESTOI).

    Raises:
        MetricFailure: fewer than 30 frames that are not silent.
    """
    from pystoi import stoi as pystoi

    reference, signal = _pair(reference_16k, signal_16k)
    if not np.any(reference) or not np.any(signal):
        raise MetricFailure("STOI: the audio is silent")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi(reference, signal, JUDGE_RATE, extended=extended))
        except (RuntimeWarning, ValueError, ZeroDivisionError) as error:
            raise MetricFailure(f"STOI: {str(error).splitlines()[0]}") from error


def si_sdr(reference_16k: Wave, signal_16k: Wave) -> float:
    """Scale-invariant signal-to-distortion ratio in dB, within -100 and 100, of ``[S]`` at 16 kHz, means removed.

    Raises:
        MetricFailure: one of them is silent, or see :func:`pesq_wb` for lengths.
    """
    reference, signal = (np.asarray(wav, dtype=np.float64) for wav in _pair(reference_16k, signal_16k))
    reference, signal = reference - reference.mean(), signal - signal.mean()
    if not np.any(reference) or not np.any(signal):
        raise MetricFailure("SI-SDR: the audio is silent")
    target = reference * (signal @ reference) / (reference @ reference)
    noise = signal - target
    return float(np.clip(10 * np.log10(max(target @ target, 1e-30) / max(noise @ noise, 1e-30)), -100, 100))


# --- pitch and duration ----------------------------------------------------------------------------------

PITCH_HZ = (75.0, 600.0)
"""Range in which Praat's pitch tracker looks first."""


def _pitch(wav_16k: Wave, count: int, low: float, high: float) -> NDArray[np.float64]:
    """Pitch in Hz by Praat's autocorrelation at ``count`` moments 10 ms apart; NaN where it is not voiced."""
    try:
        import parselmouth
    except ImportError:
        raise MetricFailure("pitch needs Praat: pip install praat-parselmouth") from None
    try:
        sound = parselmouth.Sound(np.asarray(wav_16k, dtype=np.float64), JUDGE_RATE)
        pitch = sound.to_pitch_ac(time_step=0.01, pitch_floor=low, pitch_ceiling=high)
    except parselmouth.PraatError as error:
        raise MetricFailure(f"Praat: {str(error).splitlines()[0]}") from error
    return np.array([pitch.get_value_at_time(0.01 * index) for index in range(count)])


def prosody(reference_16k: Wave, signal_16k: Wave) -> dict[str, float]:
    """How the pitch of ``[S']`` follows that of ``[S]``: ``f0_rmse`` (cents), ``f0_corr``, ``vuv_f1``.

    Frames of 10 ms are aligned by dynamic time warping of mel cepstra.  Error and correlation are of the log pitch over
    frames voiced in both; the F1 says how well voiced and unvoiced frames agree.  The tracker looks from three quarters
    of the reference's lower quartile to twice its upper one, so it takes no octave for another (De Looze
    and Hirst, Speech Prosody 2008): in a wide range a rough voice is most often heard an octave too low.

    Raises:
        MetricFailure: unusable audio, fewer than 10 frames voiced in both, or a pitch that moves by less than 5 cents.
    """
    from metis_lib.data.align import cepstra, warp

    for wav in (reference_16k, signal_16k):
        check(wav)
    frames = [cepstra(np.asarray(wav, dtype=np.float32)) for wav in (reference_16k, signal_16k)]
    if not np.isfinite(first := _pitch(reference_16k, len(frames[0]), *PITCH_HZ)).any():
        raise MetricFailure("pitch: 0 frames are voiced in both recordings; at least 10 are needed")
    span = (0.75 * np.nanpercentile(first, 25), 2.0 * np.nanpercentile(first, 75))
    truth, heard = (
        _pitch(wav, len(part), *span) for wav, part in zip((reference_16k, signal_16k), frames, strict=True)
    )
    truth = truth[np.round(warp(*frames)).astype(int)]
    voiced, said = np.isfinite(truth), np.isfinite(heard)
    both = voiced & said
    if both.sum() < 10:
        raise MetricFailure(f"pitch: {int(both.sum())} frames are voiced in both recordings; at least 10 are needed")
    a, b = 1200 * np.log2(truth[both]), 1200 * np.log2(heard[both])
    if min(a.std(), b.std()) < 5.0:
        raise MetricFailure("pitch: it never moves")
    return {
        "f0_rmse": float(np.sqrt(np.mean((a - b) ** 2))), "f0_corr": float(np.corrcoef(a, b)[0, 1]),
        "vuv_f1": 2 * float(both.sum()) / float(voiced.sum() + said.sum()),
    }  # fmt: skip


def duration_ratio(reference_16k: Wave, signal_16k: Wave) -> float:
    """Duration of ``[S']`` divided by that of ``[S]``; MetricFailure for unusable audio."""
    for wav in (reference_16k, signal_16k):
        check(wav)
    return len(signal_16k) / len(reference_16k)


def cosine(a: Sequence[float] | NDArray[np.float64], b: Sequence[float] | NDArray[np.float64]) -> float:
    """Cosine of two vectors ``[C]``, -1 to 1."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
