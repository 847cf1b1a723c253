"""Losses that more than one trainer uses."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from metis_lib.tokenizers.acoustic import mel_filters

WINDOWS = {2048: 160, 1024: 80, 512: 40, 256: 20, 128: 10}
"""Window in samples to number of mel bands; the hop is a quarter of the window."""
FLOOR = 1e-5


@lru_cache(maxsize=32)
def _tables(window: int, bands: int, sample_rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    filters = mel_filters(bands, window, sample_rate).t().contiguous()
    return torch.hann_window(window, device=device), filters.to(device)


def mel_magnitudes(wav: Tensor, window: int, bands: int, sample_rate: int) -> Tensor:
    """Mel magnitudes of ``wav [B, S]``: ``[B, frames, bands]`` fp32.

    Frames are centred, the edges reflected; frames before bins is a quarter faster on a CPU than torch.stft.
    """
    taper, filters = _tables(window, bands, sample_rate, wav.device)
    with torch.autocast(wav.device.type, enabled=False):
        padded = F.pad(wav.float()[:, None], (window // 2, window // 2), mode="reflect")[:, 0]
        spectrum = torch.fft.rfft(padded.unfold(1, window, window // 4) * taper)
        return spectrum.abs() @ filters


def multi_scale_mel_losses(recon: Tensor, target: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """Two distances of mel spectra of each item, averaged over five windows; fp32 ``[B]`` >= 0.

    Returns:
        mean absolute difference of natural-log mel spectra (arXiv 2306.06546 section 3.5), and spectral
        convergence (norm of the difference of magnitudes over the norm of the target's), which keeps the level
        right where the logarithm alone settles below it.  ``recon`` and ``target`` are ``[B, S]``, S > 1024.
    """
    log_l1 = recon.new_zeros(len(recon), dtype=torch.float32)
    convergence = torch.zeros_like(log_l1)
    for window, bands in WINDOWS.items():
        with torch.no_grad():
            wanted = mel_magnitudes(target, window, bands, sample_rate)
        found = mel_magnitudes(recon, window, bands, sample_rate)
        log_l1 = log_l1 + (found.clamp(min=FLOOR).log() - wanted.clamp(min=FLOOR).log()).abs().mean((1, 2))
        distance, size = (x.flatten(1).norm(dim=1) for x in (found - wanted, wanted))
        convergence = convergence + distance / size.clamp(min=1.0)  # silence must not outweigh all else
    return log_l1 / len(WINDOWS), convergence / len(WINDOWS)
