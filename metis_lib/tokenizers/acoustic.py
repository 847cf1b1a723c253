"""Acoustic codec: 24 kHz speech to ``Q`` streams of 50 codes a second and back.

Encoder (DAC style on the waveform as released, or ConvNeXt over log-mel frames), residual vector quantiser
(arXiv 2306.06546), Vocos decoder with an inverse STFT head (arXiv 2306.00814).  The settings are those of
arXiv 2409.00750 section 3.2.4; ``encoder.*`` and ``decoder.*`` carry the released parameter names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.config import AcousticCodecConfig
from metis_lib.errors import MetisError
from metis_lib.tokenizers.semantic import ResidualVQ, VocosBackbone, WNConv1d, init_trunc_normal


class Snake1d(nn.Module):
    """``x + sin(alpha x)^2 / alpha`` with one alpha a channel; ``[B, C, T]``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.plain(x)
        out, inverse = torch.empty_like(x), (self.alpha + 1e-9).reciprocal()
        # a few channels at a time, which a cache holds: a third of the time
        for y, part, alpha, over in zip(*(t.split(4, dim=1) for t in (out, x, self.alpha, inverse)), strict=True):
            torch.addcmul(part, (alpha * part).sin_().square_(), over, out=y)
        return out

    def plain(self, x: Tensor) -> Tensor:
        """The same in the released order."""
        return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).square()


class ResidualUnit(nn.Module):
    """Two weight-normalised convolutions, the first dilated, around a residual; ``[B, C, T]``."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake1d(dim),
            WNConv1d(dim, dim, 7, padding=3 * dilation, dilation=dilation),
            Snake1d(dim),
            WNConv1d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class EncoderBlock(nn.Module):
    """Three residual units, then a convolution: the rate divided by ``stride``, the channels doubled."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        half = dim // 2
        self.block = nn.Sequential(
            *(ResidualUnit(half, dilation) for dilation in (1, 3, 9)),
            Snake1d(half),
            WNConv1d(half, dim, 2 * stride, stride=stride, padding=math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class CodecEncoder(nn.Module):
    """The released waveform encoder: ``[B, S] -> [B, latent_dim, T]``, T about S / 480."""

    def __init__(self, config: AcousticCodecConfig) -> None:
        super().__init__()
        dim = config.encoder_dim
        layers: list[nn.Module] = [WNConv1d(1, dim, 7, padding=3)]
        for stride in config.strides:
            dim *= 2
            layers.append(EncoderBlock(dim, stride))
        layers += [Snake1d(dim), WNConv1d(dim, config.latent_dim, 3, padding=1)]
        self.block = nn.Sequential(*layers)

    def forward(self, wav: Tensor) -> Tensor:
        return self.block(wav[:, None].to(self.block[0].bias.dtype))


def mel_filters(bins: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters on the HTK mel scale from 0 Hz to Nyquist: ``[bins, n_fft // 2 + 1]``, peak 1."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    hertz = 700 * (10 ** (torch.linspace(0, top, bins + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    slopes = hertz[:, None] - frequencies[None]
    widths = hertz.diff()[:, None]
    down, up = -slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]
    return torch.minimum(down, up).clamp(min=0).float()


class MelEncoder(nn.Module):
    """Log-mel frames, ConvNeXt blocks, a projection: ``[B, S] -> [B, latent_dim, T]``, T = ceil(S / hop)."""

    window: Tensor
    filters: Tensor

    def __init__(self, config: AcousticCodecConfig) -> None:
        super().__init__()
        self.n_fft, self.hop = config.n_fft, config.hop_size
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        filters = mel_filters(config.mel_bins, config.n_fft, config.sample_rate)
        self.register_buffer("filters", filters, persistent=False)
        self.backbone = VocosBackbone(
            config.mel_bins, config.encoder_dim, config.encoder_intermediate_dim, config.encoder_num_layers
        )
        self.out = nn.Linear(config.encoder_dim, config.latent_dim)
        init_trunc_normal(self.out)

    def log_mel(self, wav: Tensor) -> Tensor:
        """Log of mel magnitudes (floor 1e-5) ``[B, mel_bins, T]`` fp32; frame t is centred on hop t."""
        with torch.autocast(wav.device.type, enabled=False):
            edge = (self.n_fft - self.hop) // 2
            missing = -wav.shape[1] % self.hop
            wav = F.pad(wav.float(), (edge, missing + self.n_fft - self.hop - edge))
            frames = wav.unfold(1, self.n_fft, self.hop) * self.window.float()
            magnitude = torch.fft.rfft(frames).abs()
            return (magnitude @ self.filters.float().t()).clamp(min=1e-5).log().transpose(1, 2)

    def forward(self, wav: Tensor) -> Tensor:
        return self.out(self.backbone(self.log_mel(wav).to(self.out.weight.dtype))).transpose(1, 2)


class ISTFT(nn.Module):
    """Inverse STFT with "same" padding: T frames give exactly ``hop * T`` samples.

    Windowed frames are overlap-added as ``n_fft / hop`` shifted sums, then divided by the summed squared
    window.
    """

    window: Tensor

    def __init__(self, n_fft: int, hop: int) -> None:
        super().__init__()
        if n_fft % hop or (n_fft - hop) % 2:
            raise MetisError(f"n_fft ({n_fft}) must be a multiple of hop_size ({hop}), their difference even")
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft))

    def overlap_add(self, frames: Tensor) -> Tensor:
        """Frames ``[B, T, n_fft]`` to ``[B, hop * T]``, the edges trimmed."""
        batch, count, _ = frames.shape
        parts = self.n_fft // self.hop
        pieces = frames.reshape(batch, count, parts, self.hop)
        total = sum(F.pad(pieces[:, :, k], (0, 0, k, parts - 1 - k)) for k in range(parts))
        edge = (self.n_fft - self.hop) // 2
        return total.reshape(batch, -1)[:, edge : edge + count * self.hop]

    def forward(self, spectrum: Tensor) -> Tensor:
        """Complex spectrum ``[B, T, n_fft / 2 + 1]`` to samples ``[B, hop * T]`` fp32."""
        window = self.window.float()
        frames = torch.fft.irfft(spectrum, n=self.n_fft) * window
        envelope = self.overlap_add(window.square().expand(1, spectrum.shape[1], -1))
        return self.overlap_add(frames) / envelope


class ISTFTHead(nn.Module):
    """Linear to log-magnitude (at most 100 after exp) and phase, then the inverse STFT; always fp32."""

    def __init__(self, dim: int, n_fft: int, hop: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, n_fft + 2)
        self.istft = ISTFT(n_fft, hop)
        init_trunc_normal(self.out)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            both = F.linear(x.float(), self.out.weight.float(), self.out.bias.float())
            log_magnitude, phase = both.chunk(2, dim=-1)
            return self.istft(torch.polar(log_magnitude.exp().clamp(max=100), phase))


class Vocos(nn.Module):
    """Vocos: latents ``[B, C, T]`` to samples ``[B, hop * T]``."""

    def __init__(self, config: AcousticCodecConfig) -> None:
        super().__init__()
        self.backbone = VocosBackbone(
            config.latent_dim, config.vocos_dim, config.vocos_intermediate_dim, config.vocos_num_layers
        )
        self.head = ISTFTHead(config.vocos_dim, config.n_fft, config.hop_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class CodecDecoder(nn.Module):
    """The released decoder file: residual quantiser and Vocos."""

    def __init__(self, config: AcousticCodecConfig) -> None:
        super().__init__()
        self.quantizer = ResidualVQ(
            config.latent_dim, config.num_quantizers, config.codebook_size, config.codebook_dim, config.commitment,
            config.codebook_loss_weight, config.codebook_search == "distance",
        )  # fmt: skip
        self.model = Vocos(config)


class AcousticCodec(nn.Module):
    """The whole codec: samples ``[B, S]`` at ``sample_rate`` to codes ``[B, T, Q]`` and back."""

    def __init__(self, config: AcousticCodecConfig) -> None:
        super().__init__()
        encoders: dict[str, Any] = {"waveform": CodecEncoder, "mel": MelEncoder}
        if config.codebook_search not in ("cosine", "distance"):
            raise MetisError(f"unknown codebook search {config.codebook_search!r}; choose 'cosine' or 'distance'")
        if config.encoder not in encoders:
            raise MetisError(f"unknown acoustic encoder {config.encoder!r}; choose 'waveform' or 'mel'")
        if config.encoder == "waveform" and math.prod(config.strides) != config.hop_size:
            raise MetisError(f"the strides {config.strides} must multiply to hop_size {config.hop_size}")
        self.config = config
        self.encoder = encoders[config.encoder](config)
        self.decoder = CodecDecoder(config)

    def _check(self, wav: Tensor) -> None:
        shortest = self.config.hop_size if self.config.encoder == "waveform" else 1
        if wav.dim() != 2 or wav.shape[1] < shortest:
            raise MetisError(f"audio must have the shape [B, S] with S >= {shortest}, got {tuple(wav.shape)}")

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """Samples ``[B, S]`` to codes ``[B, T, Q]`` int64.

        T is ceil(S / 480) with the mel encoder and as released with the waveform encoder (7003 give 14).
        """
        self._check(wav)
        return self.decoder.quantizer(self.encoder(wav)).codes.permute(1, 2, 0)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes ``[B, T, Q']`` (the first ``Q' <= Q`` layers) to samples ``[B, 480 T]`` fp32."""
        config = self.config
        if codes.dim() != 3 or not codes.shape[1] or not 1 <= codes.shape[2] <= config.num_quantizers:
            raise MetisError(
                f"codes must have the shape [B, T, Q] with T > 0 and Q <= {config.num_quantizers}, "
                f"got {tuple(codes.shape)}"
            )
        if codes.min() < 0 or codes.max() >= config.codebook_size:
            raise MetisError(f"codes must lie in 0..{config.codebook_size - 1}")
        return self.decoder.model(self.decoder.quantizer.vq2emb(codes.permute(2, 0, 1)))

    @torch.no_grad()
    def decode_long(self, codes: Tensor, chunk: int = 3000) -> Tensor:
        """:meth:`decode` in pieces of ``chunk`` frames: the same samples at constant memory.

        Each piece is decoded with as many frames around it as its samples depend on.
        """
        reach = 3 * (self.config.vocos_num_layers + 1) + self.config.n_fft // self.config.hop_size
        pieces = []
        for first in range(0, codes.shape[1], chunk):
            left = min(first, reach)
            wav = self.decode(codes[:, first - left : first + chunk + reach])
            pieces.append(wav[:, left * self.config.hop_size :][:, : chunk * self.config.hop_size])
        return torch.cat(pieces, dim=1) if pieces else self.decode(codes)

    def draw_layers(
        self, batch: int, generator: torch.Generator | None = None, *, share: float | None = None, fewest: int = 1,
        most: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Quantiser dropout ``[batch]``: with probability ``share`` (of the configuration) ``fewest`` to ``most`` (Q)
        layers, all of them else."""
        count = self.config.num_quantizers
        fewer = torch.randint(fewest, (most or count) + 1, (batch,), generator=generator)
        drop = torch.rand(batch, generator=generator) < (self.config.quantizer_dropout if share is None else share)
        return torch.where(drop, fewer, torch.full_like(fewer, count))

    def forward(self, wav: Tensor, layers: Tensor | None = None) -> dict[str, Tensor]:
        """Reconstruct ``wav [B, S]`` from the first ``layers [B]``, by default all.

        Returns ``recon [B, S]`` fp32, ``codes [B, T, Q]`` and the scalars ``commit_loss`` and
        ``codebook_loss``, summed over the layers, with their weights.
        """
        self._check(wav)
        latent = self.encoder(wav)
        found = self.decoder.quantizer(latent, layers)
        recon = self.decoder.model(found.output.to(latent.dtype))[:, : wav.shape[1]]
        return {
            "recon": F.pad(recon, (0, wav.shape[1] - recon.shape[1])),
            "codes": found.codes.permute(1, 2, 0),
            "commit_loss": found.commit_loss.sum(),
            "codebook_loss": found.codebook_loss.sum(),
        }
