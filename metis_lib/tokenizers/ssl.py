"""SSL features: the hidden state of one w2v-BERT 2.0 layer, 50 frames a second, normalised per channel.

Metis appendix A uses layer 17 of 24; only the layers up to that one are built and computed here.  The
filterbank is that of the released feature extractor (Kaldi style: 80 mel bands, 25 ms Povey window, 10 ms
hop, normalised per utterance and band, two frames stacked).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.compat import prepare_torchaudio
from metis_lib.config import SSLConfig
from metis_lib.errors import MetisError

WINDOW, HOP, FFT, BANDS = 400, 160, 512, 80
SHORTEST = WINDOW + HOP
"""Samples at 16 kHz of the shortest utterance with a whole stacked frame."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: ``[..., C_in]``, ``[C_out, C_in]`` and ``[C_out]`` to ``[..., C_out]``.

    For inference in fp32 on a CPU it is oneDNN's.  PyTorch takes MKL's, which uses no AVX-512 on processors that are
    not Intel's: on an AMD EPYC that takes 2.1 to 2.5 times as long.
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and HAS_ONEDNN
    learns = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if not plain or learns:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether PyTorch lends us oneDNN's products."""


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`product`."""

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)


def quicken(module: nn.Module) -> nn.Module:
    """Let all ``nn.Linear`` below ``module`` work by :func:`product`; names and weights stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
    return module


def count_frames(samples: int) -> int:
    """Frames of features for ``samples`` at 16 kHz: half the number of filterbank frames, rounded up."""
    return -(-(1 + (samples - WINDOW) // HOP) // 2)


@lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Povey window ``[400]`` and filters ``[257, 80]``, triangles on Kaldi's mel scale, 20 to 8000 Hz."""
    window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85)

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    low, high = (mel(torch.tensor(f, dtype=torch.float64)).item() for f in (20.0, 8000.0))
    edges = torch.linspace(low, high, BANDS + 2, dtype=torch.float64)
    bins = mel(torch.arange(FFT // 2 + 1, dtype=torch.float64) * 16_000 / FFT)[:, None]
    width = edges.diff()
    filters = torch.minimum((bins - edges[:-2]) / width[:-1], (edges[2:] - bins) / width[1:]).clamp(min=0)
    return window.to(device), filters.to(device)


def _fbank_one(wav: Tensor) -> Tensor:
    """One utterance ``[S]`` to normalised log-mel frames ``[n, 80]`` float64."""
    window, filters = _tables(wav.device)
    wav = wav.double() * 2.0**15
    # Mean removal and pre-emphasis by 0.97 of each frame, written as one step over the whole waveform.
    sharp = torch.cat([wav[:1], wav[1:] - 0.97 * wav[:-1]])
    frames = wav.unfold(0, WINDOW, HOP)
    padded = wav.new_zeros(len(frames), FFT)
    inside = padded[:, :WINDOW]
    inside.copy_(sharp.unfold(0, WINDOW, HOP))
    inside[:, 0] = 0.03 * frames[:, 0]
    inside.sub_(0.03 * frames.mean(1, keepdim=True)).mul_(window)
    spectrum = torch.fft.rfft(padded)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = (power @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
    return (mel - mel.mean(0)) / (mel.var(0) + 1e-7).sqrt()


def fbank(wavs_16k: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stacked filterbank features of waveforms ``[S]`` at 16 kHz in [-1, 1].

    Returns (features ``[B, T, 160]`` fp32, lengths ``[B]``).  With n filterbank frames, an utterance has
    ceil(n / 2) rows; when n is odd its last row is half padding, which the released attention mask leaves
    out, so its length is floor(n / 2).  Padding holds the value 1, as released.

    Computed in fp64 and equal to the feature extractor of transformers within 1e-5, five times faster (only
    for pure digital silence that one returns rounding noise up to 3e-3, where this returns 0).
    """
    if not wavs_16k:
        raise MetisError("no waveforms given")
    for wav in wavs_16k:
        if wav.dim() != 1 or wav.shape[0] < SHORTEST:
            raise MetisError(
                f"a waveform must have the shape [S] with at least {SHORTEST} samples at 16 kHz "
                f"(35 ms), got {tuple(wav.shape)}"
            )
    rows = [_fbank_one(wav).float() for wav in wavs_16k]
    longest = max(len(row) for row in rows)
    longest += longest % 2
    features = torch.stack([F.pad(row, (0, 0, 0, longest - len(row)), value=1.0) for row in rows])
    lengths = torch.tensor([len(row) // 2 for row in rows], device=features.device)
    return features.reshape(len(rows), longest // 2, 2 * BANDS), lengths


@lru_cache(maxsize=1)
def _quicker() -> tuple[type, type]:
    """Classes that take over the library's attention and convolution (which are imported at their first use)."""
    prepare_torchaudio()
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
        Wav2Vec2BertConvolutionModule,
        Wav2Vec2BertSelfAttention,
    )

    class RelativeAttention(Wav2Vec2BertSelfAttention):
        """The attention of w2v-BERT 2.0, its position bias gathered.

        The bias of a pair of frames depends on the query and on their distance, clipped to 73 values: ``q E^T`` has 73
        columns, of which each pair takes one.  The library's way makes an embedding for each pair, ``T^2 D`` numbers.
        """

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **more: Any) -> Any:
            batch, frames, _ = hidden_states.shape
            split = (batch, frames, self.num_heads, self.head_size)
            nets = (self.linear_q, self.linear_k, self.linear_v)
            q, k, v = (net(hidden_states).view(split).transpose(1, 2) for net in nets)
            scores = torch.matmul(q, self.distance_embedding.weight.to(q.dtype).t()) * self.scaling
            place = torch.arange(frames, device=q.device)
            low, high = self.left_max_position_embeddings, self.right_max_position_embeddings
            distance = (place[None] - place[:, None]).clamp(-low, high) + low
            bias = scores.gather(-1, distance.expand(batch, self.num_heads, -1, -1))
            if attention_mask is not None:
                there = attention_mask.dtype == torch.bool
                bias = bias.masked_fill(~attention_mask, -torch.inf) if there else bias + attention_mask
            if bias.requires_grad:  # no fused kernel has the gradient of a bias
                weights = (torch.matmul(q * self.scaling, k.transpose(-1, -2)) + bias).softmax(-1)
                out = torch.matmul(weights.to(v.dtype), v)
            else:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scaling)
            return self.linear_out(out.transpose(1, 2).reshape(batch, frames, -1)), None

    class Convolution(Wav2Vec2BertConvolutionModule):
        """The causal convolution of w2v-BERT 2.0; its pointwise convolutions are the products they are.

        Channels stay last, but for the depthwise convolution.
        """

        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.layer_norm(hidden_states)
            if attention_mask is not None:
                x = x.masked_fill(~attention_mask.bool()[..., None], 0.0)
            x = F.glu(product(x, self.pointwise_conv1.weight[..., 0])).transpose(1, 2)
            x = self.depthwise_conv(F.pad(x, (self.depthwise_conv.kernel_size[0] - 1, 0))).transpose(1, 2)
            return product(self.activation(self.depthwise_layer_norm(x)), self.pointwise_conv2.weight[..., 0])

    return RelativeAttention, Convolution


class SSLEncoder(nn.Module):
    """w2v-BERT 2.0 up to ``output_layer``; its state dict is ``model.`` + the hub's names and nothing else.

    The normalisation statistics ``mean`` and ``var`` ``[C]`` are kept apart, as released
    (:meth:`stats_state`).
    """

    mean: Tensor
    var: Tensor

    def __init__(self, config: SSLConfig) -> None:
        super().__init__()
        prepare_torchaudio()
        from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

        if not 1 <= config.output_layer <= config.num_layers:
            raise MetisError(f"output_layer must lie in 1..{config.num_layers}, got {config.output_layer}")
        self.config = config
        left_out = ("hidden", "activation", "attention", "feat_proj", "conformer_conv")
        sizes = Wav2Vec2BertConfig(
            vocab_size=None, hidden_size=config.hidden_size, num_hidden_layers=config.output_layer,
            num_attention_heads=config.num_heads, intermediate_size=config.intermediate_size,
            feature_projection_input_dim=config.input_dim, conv_depthwise_kernel_size=config.conv_kernel,
            left_max_position_embeddings=config.left_positions, right_max_position_embeddings=config.right_positions,
            position_embeddings_type="relative_key", layerdrop=0.0, **{f"{name}_dropout": 0.0 for name in left_out},
        )  # fmt: skip
        self.model = Wav2Vec2BertModel(sizes)
        for layer in quicken(self.model).encoder.layers:
            layer.self_attn.__class__, layer.conv_module.__class__ = _quicker()
        self.register_buffer("mean", torch.zeros(config.hidden_size), persistent=False)
        self.register_buffer("var", torch.ones(config.hidden_size), persistent=False)

    def set_stats(self, mean: Tensor, var: Tensor) -> None:
        """Set mean and variance ``[C]`` of the hidden state; every variance must be positive."""
        if mean.shape != self.mean.shape or var.shape != self.var.shape or not (var > 0).all():
            raise MetisError(f"statistics must be two vectors of {len(self.mean)}, the variance above zero")
        self.mean.copy_(mean)
        self.var.copy_(var)

    def stats_state(self) -> dict[str, Tensor]:
        """The statistics to save beside the weights: ``{"mean": [C], "var": [C]}``."""
        return {"mean": self.mean.clone(), "var": self.var.clone()}

    def load_hub_state(self, state: Mapping[str, Tensor]) -> None:
        """Load weights under the hub's names (no prefix), without the layers that are not computed."""
        kept = dict(state)
        for name in state:
            if name.startswith("encoder.layers.") and int(name.split(".")[2]) >= self.config.output_layer:
                del kept[name]
        self.model.load_state_dict(kept, strict=True)

    def forward(self, features: Tensor, lengths: Tensor | None = None, mask_time: Tensor | None = None) -> Tensor:
        """Features ``[B, T, 160]`` to the un-normalised hidden state ``[B, T, C]`` of ``output_layer``.

        ``lengths [B]``: frames that are attended to (see :func:`fbank`), all if absent.  ``mask_time [B, T]``
        (bool): frames whose projected input is replaced by the learned mask embedding, for masked prediction.
        """
        hidden, _ = self.model.feature_projection(features)
        if mask_time is not None:
            hidden = torch.where(mask_time[..., None], self.model.masked_spec_embed.to(hidden.dtype), hidden)
        attention = None
        if lengths is not None and int(lengths.min()) < features.shape[1]:
            attention = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        return self.model.encoder(hidden, attention_mask=attention).last_hidden_state

    def normalise(self, hidden: Tensor) -> Tensor:
        """Hidden state ``[..., C]`` to zero mean and unit variance by the stored statistics."""
        return (hidden - self.mean) / self.var.sqrt()

    @torch.no_grad()
    def encode(self, wavs_16k: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Waveforms ``[S]`` at 16 kHz to (normalised features ``[B, T, C]``, frames ``[B]``).

        The frames of an utterance are those of the released code, ``count_frames(S)``; a frame that is half
        padding is among them.  An utterance gets the same features alone and in a batch.
        """
        features, lengths = fbank(wavs_16k)
        parameter = self.model.feature_projection.projection.weight
        features, lengths = features.to(parameter.device, parameter.dtype), lengths.to(parameter.device)
        frames = torch.tensor([count_frames(len(wav)) for wav in wavs_16k], device=parameter.device)
        return self.normalise(self(features, lengths)), frames
