"""Another voice says the same words: timbre perturbation for training voice conversion (Metis section 4.2.2).

The paper converts every training target by OpenVoice, on the fly, to the voice of a random utterance.
Any callable ``(wav_24k [S], numpy Generator) -> wav_24k [S]`` does here; :class:`VoiceShift` needs no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError

Perturb = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""What takes the speaker from speech: float32 [S] at 24 kHz in, as many samples out, in time with it; the same
generator gives the same samples."""


# Praat keeps its own source of chance for unvoiced stretches: seeded in the same script, nothing comes between.
# A spread that takes the lowest pitch below zero would keep it adding periods for ever.
_SCRIPT = """
form voice
    real formants 1
    real pitch 1
    real spread 1
    real floor 75
    real ceiling 500
    integer seed 0
endform
random_initializeWithSeedUnsafelyButPredictably (seed)
sound = selected ("Sound")
track = To Pitch (ac): 0, floor, 15, "no", 0.03, 0.45, 0.01, 0.35, 0.14, ceiling
median = Get quantile: 0, 0, 0.5, "Hertz"
if median = undefined
    median = 0
else
    old = median
    median = min (max (old * pitch, floor), ceiling)
    lowest = Get minimum: 0, 0, "Hertz", "none"
    lowest = lowest * median / old
    if lowest < median
        spread = min (spread, (median - floor / 2) / (median - lowest))
    endif
endif
selectObject: sound, track
Change gender: formants, median, spread, 1
"""


@dataclass(frozen=True)
class VoiceShift:
    """Praat's "Change gender" (by parselmouth): formants, pitch and liveliness move, words and rhythm stay.

    A shift goes up (a shorter vocal tract, a higher voice) or down, at even odds; the ratios are those of up.
    The defaults are ours, chosen by measurement: ``results/data/vc_perturbation.json``.

    Attributes:
        formants: range of the ratio of formant frequencies (1: as they are).
        pitch: range of the ratio of median F0.
        spread: range of the factor on the F0 range around its median.
        f0_hz: lowest and highest F0, searched and made.
        mild: how often the shift is a small one (its logarithm times ``MILD``): far shifts blur phones, and what is
            converted in the end is natural speech.
    """

    formants: tuple[float, float] = (1.2, 1.4)
    pitch: tuple[float, float] = (1.3, 2.0)
    spread: tuple[float, float] = (0.6, 1.4)
    f0_hz: tuple[float, float] = (60.0, 400.0)
    mild: float = 0.3

    MILD: ClassVar = 0.4

    def draw(self, generator: np.random.Generator) -> dict[str, float]:
        """``formants``, ``pitch`` and ``spread`` as :meth:`__call__` draws them, and ``praat_seed``."""
        up = (1 if generator.random() < 0.5 else -1) * (self.MILD if generator.random() < self.mild else 1.0)
        return {
            "formants": round(float(generator.uniform(*self.formants)) ** up, 4),
            "pitch": round(float(generator.uniform(*self.pitch)) ** up, 4),
            "spread": round(float(generator.uniform(*self.spread)), 4),
            "praat_seed": int(generator.integers(1, 2**31)),
        }

    def __call__(self, wav_24k: np.ndarray, generator: np.random.Generator, /) -> np.ndarray:
        """Shift [S] at 24 kHz; level (RMS) and length stay, what is too short to have a pitch stays as it is.

        Raises:
            MetisError: parselmouth is not installed, not one channel of finite samples, or Praat gives up.
        """
        try:
            import parselmouth
        except ImportError:
            raise MetisError("the voice shift needs Praat: pip install praat-parselmouth") from None
        wav = np.asarray(wav_24k, dtype=np.float32)
        if wav.ndim != 1 or not np.isfinite(wav).all():
            raise MetisError(f"the voice shift takes one channel [S] of finite samples, not {list(wav.shape)}")
        how = self.draw(generator)
        loudness = float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)))) if len(wav) else 0.0
        if len(wav) < 4 / self.f0_hz[0] * AUDIO_RATE or loudness < 1e-6:  # three periods are searched for
            return wav.copy()
        numbers = (how["formants"], how["pitch"], how["spread"], *self.f0_hz, how["praat_seed"])
        sound = parselmouth.Sound(wav.astype(np.float64), AUDIO_RATE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", parselmouth.PraatWarning)  # nothing is voiced: only formants move
            try:
                shifted = parselmouth.praat.run(sound, _SCRIPT, *numbers)[0].values[0]
            except parselmouth.PraatError as error:
                raise MetisError(f"Praat cannot shift this voice ({str(error).splitlines()[0]})") from error
        shifted = np.pad(shifted, (0, max(len(wav) - len(shifted), 0)))[: len(wav)]
        gain = loudness / (float(np.sqrt(np.mean(shifted**2))) + 1e-12)
        return (shifted * min(gain, 0.99 / (float(np.abs(shifted).max()) + 1e-12))).astype(np.float32)
