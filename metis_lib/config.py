"""Configurations: one frozen dataclass per model, saved as JSON beside every checkpoint.

A system is seven parts.  ``preset(name)`` gives the whole set for ``debug`` (random weights,
seconds on a CPU, for tests), ``nano`` (39 MB in bf16; ships with the repository) and
``paper`` (published sizes; arXiv 2502.03128 section 4.1 and appendix A, arXiv 2409.00750 table 9).

Axis letters used in the whole library: ``B`` batch, ``T`` frames at 50 Hz, ``Q`` codebooks,
``C`` channels, ``S`` samples, ``L`` phones, ``P`` prompt frames, ``V`` vocabulary, ``H`` hidden width.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from metis_lib.errors import MetisError

FRAME_RATE = 50
"""Frames (tokens) a second, of every token stream."""
SSL_RATE = 16_000
"""Sample rate in Hz of what the SSL encoder hears."""
AUDIO_RATE = 24_000
"""Sample rate in Hz of the acoustic codec and of everything the system says."""


@dataclass(frozen=True)
class SSLConfig:
    """SSL encoder: a w2v-BERT 2.0 conformer, of which only ``output_layer`` layers are computed."""

    hidden_size: int = 1024
    num_layers: int = 24
    output_layer: int = 17
    num_heads: int = 16
    intermediate_size: int = 4096
    input_dim: int = 160
    conv_kernel: int = 31
    left_positions: int = 64
    right_positions: int = 8


@dataclass(frozen=True)
class SemanticCodecConfig:
    """VQ-VAE over SSL features ("RepCodec"): one codebook, 50 tokens a second."""

    hidden_size: int = 1024
    codebook_size: int = 8192
    codebook_dim: int = 8
    vocos_dim: int = 384
    vocos_intermediate_dim: int = 2048
    vocos_num_layers: int = 12
    commitment: float = 0.15
    codebook_loss_weight: float = 1.0


@dataclass(frozen=True)
class AcousticCodecConfig:
    """24 kHz codec: encoder, residual vector quantiser, Vocos decoder.

    ``encoder`` is ``"waveform"`` (DAC style, as published) or ``"mel"`` (ConvNeXt over log-mel frames:
    our choice for nano, six times faster to train on a CPU).  ``codebook_search`` is ``"cosine"``, as published, or
    ``"distance"``: ours too, for codebooks fitted by k-means (``ResidualVQ.fit``), which leave less over.
    """

    encoder: str = "waveform"
    encoder_dim: int = 96
    strides: tuple[int, ...] = (3, 4, 5, 8)
    mel_bins: int = 100
    encoder_intermediate_dim: int = 0
    encoder_num_layers: int = 0
    latent_dim: int = 256
    num_quantizers: int = 12
    codebook_size: int = 1024
    codebook_dim: int = 8
    codebook_search: str = "cosine"
    quantizer_dropout: float = 0.5
    commitment: float = 0.25
    codebook_loss_weight: float = 1.0
    vocos_dim: int = 512
    vocos_intermediate_dim: int = 4096
    vocos_num_layers: int = 30
    n_fft: int = 1920
    hop_size: int = 480
    sample_rate: int = AUDIO_RATE


@dataclass(frozen=True)
class Stage1Config:
    """Masked generative transformer over SSL tokens (Metis sections 3.2 and 4.1).

    ``adapter`` is ``"none"``, ``"gated"`` (a zero-initialised gate: VC, TSE, SE, Omni) or ``"plain"`` (L2S).
    ``text_hint`` is ``"none"`` (as published), ``"even"`` or ``"timed"``: the phones are also stretched over the
    target frames, evenly or by predicted durations, and added to the input, which lets small models align text soon;
    ``hint_width`` is that of its convolutions (0: ``hidden_size``).
    """

    hidden_size: int = 1536
    num_layers: int = 16
    num_heads: int = 16
    codebook_size: int = 8192
    use_phones: bool = False
    phone_vocab: int = 1024
    adapter: str = "none"
    cond_dim: int = 1024
    text_hint: str = "none"
    hint_kernel: int = 7
    hint_width: int = 0


@dataclass(frozen=True)
class Stage2Config:
    """Masked generative acoustic decoder (MaskGCT section 3.2.3): SSL tokens to ``Q`` acoustic layers.

    Two of them make a system: one that predicts layer 1 alone (``num_quantizers=1``) and one that
    predicts layers 2 to ``Q`` given layer 1.
    """

    num_quantizers: int = 12
    predict_layer_1: bool = False
    hidden_size: int = 1024
    num_layers: int = 16
    num_heads: int = 16
    codebook_size: int = 1024
    semantic_codebook_size: int = 8192


@dataclass(frozen=True)
class LipConfig:
    """Visual encoder of lip-to-speech (Auto-AVSR, arXiv 2303.14307).

    ``widths`` are the channels of the ResNet's layers, each but the first of which halves the picture, ``blocks`` the
    blocks in each layer.
    """

    stem: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: int = 2
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    num_layers: int = 12
    conv_kernel: int = 31
    dropout: float = 0.1


@dataclass(frozen=True)
class SystemConfig:
    """All parts of one system."""

    name: str = "paper"
    ssl: SSLConfig = field(default_factory=SSLConfig)
    semantic: SemanticCodecConfig = field(default_factory=SemanticCodecConfig)
    acoustic: AcousticCodecConfig = field(default_factory=AcousticCodecConfig)
    stage1: Stage1Config = field(default_factory=Stage1Config)
    stage2_layer1: Stage2Config = field(default_factory=lambda: Stage2Config(num_quantizers=1, predict_layer_1=True))
    stage2_full: Stage2Config = field(default_factory=Stage2Config)
    lips: LipConfig = field(default_factory=LipConfig)


@dataclass(frozen=True)
class DecodeSettings:
    """How one masked generative model is decoded (values of the released scripts by default).

    ``top_fraction`` of the vocabulary is kept before sampling (released ``filter_thres`` is one minus it), or the
    ``top_k`` best where that is given.  ``schedule`` says how many tokens stay masked (:func:`masked.still_masked`).
    ``released`` works as the released code does: every row and both passes of guidance, even without effect.
    """

    steps: int = 25
    cfg: float = 0.0
    rescale: float = 0.75
    temperature: float = 0.9
    top_fraction: float = 1 - 0.98
    choice_temperature: float = 1.0
    top_k: int | None = None
    schedule: str = "cosine"
    released: bool = False


def preset(name: str) -> SystemConfig:
    """The configuration of a whole system by name: ``debug``, ``nano`` or ``paper``.

    What ``debug`` and ``nano`` change in the published sizes stands in ``presets.json``.
    """
    presets = {"paper": {}, **json.loads(Path(__file__).with_name("presets.json").read_text())}
    if name not in presets:
        raise MetisError(f"unknown preset {name!r}; choose one of {', '.join(presets)}")
    return from_dict(SystemConfig, presets[name])


C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[C], values: dict[str, Any]) -> C:
    """A configuration of type ``cls`` from plain JSON types; unknown keys are an error that names them."""
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise MetisError(f"unknown keys in a {cls.__name__}: {', '.join(unknown)}")
    default = cls()
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(default, key)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            value = from_dict(type(current), value)
        elif isinstance(current, tuple):
            value = tuple(value)
        arguments[key] = value
    return cls(**arguments)
