"""Discriminators and losses of the acoustic codec's adversarial training.

Multi-period and multi-band multi-scale STFT discriminators after DAC (arXiv 2306.06546 section 3.4), as MaskGCT
trains its codec (arXiv 2409.00750 appendix A.4, which weighs reconstruction 10, adversarial 2, feature matching 2,
codebook 1 and commitment 0.25).  Every loss is one value an item, ``[B]``, so that a mean over a global batch is
the same however the batch is spread over processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError

Maps = list[list[Tensor]]
"""One list a discriminator of feature maps ``[B, ...]``, the last of them the score map."""
PEAK, QUIETEST = 0.8, 1e-3
"""Peak the input is scaled to, and the peak below which the gain grows no more (or silence had huge gradients)."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of all discriminators (DAC's by default).

    ``bands`` are fractions of the spectrum from 0 to 1, ``overlap`` is the STFT's window over its hop.
    """

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    fft_sizes: tuple[int, ...] = (2048, 1024, 512)
    bands: tuple[tuple[float, float], ...] = ((0.0, 0.1), (0.1, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    band_channels: int = 32
    overlap: int = 4
    sample_rate: int = AUDIO_RATE


NANO = DiscriminatorConfig(
    (2, 3, 5), (1024, 256), ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)), period_channels=(8, 16, 32, 32), band_channels=8,
    overlap=2,
)  # fmt: skip
"""Small enough to train beside the nano codec on two CPU cores."""


def _run(convs: nn.ModuleList, x: Tensor) -> list[Tensor]:
    maps = []
    for conv in convs:
        x = F.leaky_relu(conv(x), 0.1)
        maps.append(x)
    return maps


def _score(conv: nn.Module, x: Tensor) -> Tensor:
    """The score map, always fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return conv(x.float())


class PeriodDiscriminator(nn.Module):
    """Convolutions along every ``period``-th sample (HiFi-GAN, arXiv 2010.05646 section 2.3).

    ``[B, S]`` to maps ``[B, period, C, L]``; the end is reflected up to a multiple of the period.
    """

    def __init__(self, period: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.period = period
        widths = (1, *channels)
        strides = [3] * (len(channels) - 1) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv1d(a, b, 5, stride, padding=2))
            for a, b, stride in zip(widths, channels, strides, strict=False)
        )
        self.post = weight_norm(nn.Conv1d(channels[-1], 1, 3, padding=1))

    def forward(self, wav: Tensor) -> list[Tensor]:
        wav = F.pad(wav[:, None], (0, -wav.shape[1] % self.period), mode="reflect")
        columns = wav.unflatten(2, (-1, self.period)).permute(0, 3, 1, 2).flatten(0, 1)
        maps = _run(self.convs, columns)
        maps.append(_score(self.post, maps[-1]))
        return [m.unflatten(0, (-1, self.period)) for m in maps]


class BandDiscriminator(nn.Module):
    """Complex STFT (hop ``n_fft / overlap``), a stack of convolutions for each band, one score map.

    ``[B, S]`` to maps ``[B, C, frames, bins]``, all of the first band first, frames = ceil(S / hop).
    """

    window: Tensor

    def __init__(self, n_fft: int, bands: tuple[tuple[float, float], ...], channels: int, overlap: int = 4) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, n_fft // overlap
        bins = n_fft // 2 + 1
        self.edges = [(int(low * bins), int(high * bins)) for low, high in bands]
        ends = [0, *(high for _, high in self.edges)]
        if [(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b] != self.edges or ends[-1] != bins:
            raise MetisError(
                f"the bands {bands} must follow one another from 0 to 1 and hold at least one of {bins} bins each"
            )
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.bands = nn.ModuleList(self._stack(channels) for _ in bands)
        self.post = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    @staticmethod
    def _stack(channels: int) -> nn.ModuleList:
        first = nn.Conv2d(2, channels, (3, 9), padding=(1, 4))
        halve = [nn.Conv2d(channels, channels, (3, 9), (1, 2), padding=(1, 4)) for _ in range(3)]
        return nn.ModuleList(weight_norm(conv) for conv in (first, *halve, nn.Conv2d(channels, channels, 3, padding=1)))

    def spectrogram(self, wav: Tensor) -> Tensor:
        """Real and imaginary part ``[B, 2, frames, bins]`` fp32 (channels last in memory: a CPU's fastest)."""
        edge = (self.n_fft - self.hop) // 2
        with torch.autocast(wav.device.type, enabled=False):
            padding = (edge, edge + -wav.shape[1] % self.hop)
            padded = F.pad(wav.float()[:, None], padding, mode="reflect")[:, 0]
            spectrum = torch.fft.rfft(padded.unfold(1, self.n_fft, self.hop) * self.window.float())
            return torch.view_as_real(spectrum).permute(0, 3, 1, 2)

    def forward(self, wav: Tensor) -> list[Tensor]:
        spectrum = self.spectrogram(wav)
        found = [
            _run(stack, spectrum[..., low:high].contiguous(memory_format=torch.channels_last))
            for stack, (low, high) in zip(self.bands, self.edges, strict=True)
        ]
        joined = torch.cat([maps[-1] for maps in found], dim=3)
        return [m for maps in found for m in maps] + [_score(self.post, joined)]


class Discriminators(nn.Module):
    """All discriminators on samples ``[B, S]`` without DC and with a peak of 0.8."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.shortest = max((*config.fft_sizes, *config.periods), default=1)
        self.parts = nn.ModuleList(PeriodDiscriminator(period, config.period_channels) for period in config.periods)
        for n_fft in config.fft_sizes:
            self.parts.append(BandDiscriminator(n_fft, config.bands, config.band_channels, config.overlap))

    def forward(self, wav: Tensor) -> Maps:
        if wav.dim() != 2 or wav.shape[1] < self.shortest:
            least = f"S >= {self.shortest} ({self.shortest / self.config.sample_rate:.3f} s)"
            raise MetisError(f"audio must have the shape [B, S] with {least}, got {tuple(wav.shape)}; crop it longer")
        with torch.autocast(wav.device.type, enabled=False):
            wav = wav.float() - wav.float().mean(1, keepdim=True)
            wav = PEAK * wav / wav.abs().amax(1, keepdim=True).clamp(min=QUIETEST)
        return [part(wav) for part in self.parts]


def _per_item(x: Tensor) -> Tensor:
    return x.float().flatten(1).mean(1)


def discriminator_loss(real: Maps, fake: Maps) -> Tensor:
    """Least squares ``mean (1 - D(x))^2 + mean D(G(x))^2`` (LSGAN, arXiv 1611.04076), summed over the discriminators
    as DAC does: ``[B]`` fp32.

    Each mean runs over an item's score map.  Compute ``fake`` from detached audio.
    """
    pairs = [(r[-1].float(), f[-1].float()) for r, f in zip(real, fake, strict=True)]
    return torch.stack([_per_item((1 - r).square()) + _per_item(f.square()) for r, f in pairs]).sum(0)


def adversarial_loss(fake: Maps) -> Tensor:
    """The generator's ``mean (1 - D(G(x)))^2`` (LSGAN), summed over the discriminators as DAC does: ``[B]``."""
    return torch.stack([_per_item((1 - maps[-1].float()).square()) for maps in fake]).sum(0)


def feature_matching_loss(real: Maps, fake: Maps) -> Tensor:
    """Mean ``|D_l(x) - D_l(G(x))|`` (arXiv 1910.06711 eq. 4) of an item's map l, summed over all maps but the scores
    and over the discriminators as DAC does: ``[B]`` fp32.  ``real`` is detached.
    """
    pairs = [pair for r, f in zip(real, fake, strict=True) for pair in zip(r[:-1], f[:-1], strict=True)]
    return torch.stack([_per_item((a.detach().float() - b.float()).abs()) for a, b in pairs]).sum(0)
