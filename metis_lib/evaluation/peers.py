"""Other people's systems, run as they are, to compare with.

NSNet2 (Braun and Tashev 2020, the baseline of the DNS challenge): a recurrent network that gives one gain per
time-frequency bin.  It works at 16 kHz, so its output holds nothing above 8 kHz.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from metis_lib.evaluation.judges import asset_file, onnx_session
from metis_lib.evaluation.metrics import Wave


class NSNet2:
    """Speech enhancement at 16 kHz; 20 ms windows, 10 ms hop, square-root Hann, gains limited to -80 dB."""

    sample_rate = 16_000
    WINDOW, HOP = 320, 160

    @functools.cached_property
    def model(self) -> Any:
        return onnx_session(asset_file("nsnet2", "nsnet2-20ms-baseline.onnx"))

    def __call__(self, noisy_16k: Wave) -> Wave:
        """Enhance ``[S]`` at 16 kHz; returns ``[S]``."""
        window = np.sqrt(np.hanning(self.WINDOW))
        frames = -(-len(noisy_16k) // self.HOP)
        padded = np.zeros((frames + 1) * self.HOP)
        padded[: len(noisy_16k)] = noisy_16k
        position = np.arange(frames)[:, None] * self.HOP + np.arange(self.WINDOW)
        spectrum = np.fft.rfft(padded[position] * window, axis=1)
        log_power = np.log10(np.maximum(np.abs(spectrum) ** 2, 1e-12)).astype(np.float32)
        gain = np.clip(self.model.run(None, {"input": log_power[None]})[0][0], 1e-4, 1.0)
        pieces = np.fft.irfft(spectrum * gain, self.WINDOW, axis=1) * window
        output = np.zeros_like(padded)
        np.add.at(output, position, pieces)
        return output[: len(noisy_16k)].astype(np.float32)
