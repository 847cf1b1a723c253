"""Visual encoder of lip-to-speech: mouth crops at 25 fps to features at 25 Hz, and from there to 50 Hz.

Auto-AVSR's (arXiv 2303.14307): a convolution over space and time, a ResNet on each picture, a Conformer with
relative positions; what follows its last LayerNorm is the feature.  The parameter names are those of the released
"VSR" files below ``encoder.``.  Inside the network the real frames of a batch lie packed, ``[M, ...]``, so that
padding costs little and enters neither a result nor the statistics of a BatchNorm.  Axes: B utterances, N pictures,
M real pictures of all utterances, C channels, A heads, D channels of a head, P = 2N - 1 relative positions.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.config import LipConfig
from metis_lib.errors import MetisError

CROP, INPUT = 96, 88
"""Sides of a stored mouth crop and of the part of it that the network sees, in pixels."""
MEAN, DEVIATION = 0.421, 0.165
"""Of grey values in 0..1, as the released networks expect them."""


def read_released_config(released: Mapping[str, Any] | Sequence[Any]) -> LipConfig:
    """The configuration in a parsed ``vis_model.json``: a dict, or a list whose third element it is.

    The file does not say the sizes of stem and ResNet, which are the published ones.

    Raises:
        MetisError: not such a file, or an encoder of another kind than the one built here.
    """
    if isinstance(released, (list, tuple)) and len(released) > 2:
        released = released[2]
    if not isinstance(released, Mapping):
        raise MetisError("the model's JSON must be an object, or a list whose third element is one")
    wanted = dict(
        transformer_input_layer="conv3d", transformer_encoder_attn_layer_type="rel_mha", rel_pos_type="latest",
        macaron_style=True, use_cnn_module=True, zero_triu=False, relu_type="swish",
    )  # fmt: skip
    sizes = dict(
        adim="hidden_size", aheads="num_heads", eunits="intermediate_size", elayers="num_layers",
        cnn_module_kernel="conv_kernel",
    )  # fmt: skip
    for key in (*wanted, *sizes):
        if key not in released:
            raise MetisError(f"the model's JSON lacks {key}; is it the one published beside the weights?")
        if key in wanted and released[key] != wanted[key]:
            raise MetisError(f"the model's JSON has {key} = {released[key]!r}; only {wanted[key]!r} can be loaded")
    found: dict[str, Any] = {ours: int(released[theirs]) for theirs, ours in sizes.items()}
    return LipConfig(**found, dropout=float(released.get("dropout_rate", LipConfig.dropout)))


def normalise(video: Tensor) -> Tensor:
    """Mouth crops uint8 ``[..., 96, 96]`` to the network's input, fp32 ``[..., 88, 88]``: the middle, standardised."""
    if video.dtype != torch.uint8 or video.shape[-2:] != (CROP, CROP):
        raise MetisError(f"mouth crops must be uint8 [..., {CROP}, {CROP}], got {video.dtype} {tuple(video.shape)}")
    edge = (CROP - INPUT) // 2
    return (video[..., edge:-edge, edge:-edge].float() / 255 - MEAN) / DEVIATION


def upsample(features: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Features ``[B, N, C]`` at 25 Hz to ``[B, 2N, C]`` at 50 Hz, linear between the middles of the frames.

    With ``lengths [B]`` (pictures of each utterance) the last frame is not blended with the padding after it.
    """
    if lengths is not None:
        place = torch.arange(features.shape[1], device=features.device)
        place = torch.minimum(place, lengths.to(features.device)[:, None] - 1)
        features = features.gather(1, place[..., None].expand_as(features))
    return F.interpolate(features.transpose(1, 2), scale_factor=2, mode="linear", align_corners=False).transpose(1, 2)


class Frames:
    """Which frames of a padded batch are real, and the way from the batch to them and back."""

    def __init__(self, video: Tensor, lengths: Tensor | None) -> None:
        batch, count = self.shape = video.shape[:2]
        self.real: Tensor | None = None  # [B, N] bool; None if every frame is real
        if lengths is not None:
            if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > count:
                raise MetisError(f"lengths must be {batch} numbers in 1..{count}, got {lengths.tolist()}")
            if int(lengths.min()) < count:
                self.real = torch.arange(count, device=video.device) < lengths.to(video.device)[:, None]
                self.index = self.real.flatten().nonzero()[:, 0]

    def pack(self, x: Tensor) -> Tensor:
        """``[B, N, ...] -> [M, ...]``"""
        x = x.flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.index)

    def pad(self, x: Tensor) -> Tensor:
        """``[M, ...] -> [B, N, ...]`` with zeros where there is no frame"""
        if self.real is not None:
            x = x.new_zeros(self.real.numel(), *x.shape[1:]).index_copy(0, self.index, x)
        return x.unflatten(0, self.shape)


class Block(nn.Module):
    """Basic ResNet block: ``[M, C_in, H, W] -> [M, C_out, H / stride, W / stride]``."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        shortcut = (nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.downsample = nn.Sequential(*shortcut) if stride > 1 or c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x)))))
        return F.silu(y + self.downsample(x))


class Frontend(nn.Module):
    """Pictures to vectors, each from five neighbouring pictures: ``[B, N, H, W] -> [M, widths[-1]]``."""

    def __init__(self, config: LipConfig) -> None:
        super().__init__()
        stem = nn.Conv3d(1, config.stem, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False)
        self.frontend3D = nn.Sequential(stem, nn.BatchNorm2d(config.stem), nn.SiLU(), nn.MaxPool2d(3, 2, 1))
        self.trunk, c_in = nn.Sequential(), config.stem
        for i, width in enumerate(config.widths):
            blocks = (Block(width if j else c_in, width, 2 if i and not j else 1) for j in range(config.blocks))
            self.trunk.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = width

    def forward(self, video: Tensor, frames: Frames) -> Tensor:
        # The 3-d convolution has one input channel: it is a 2-d one whose channels are the five neighbours.  They are
        # the last axis of the unfolded view, so that packing copies it to channels-last.
        x = frames.pack(F.pad(video, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1)).permute(0, 3, 1, 2)
        x = F.conv2d(x, self.frontend3D[0].weight[:, 0], stride=2, padding=3)
        return self.trunk(self.frontend3D[1:](x)).mean((2, 3))


def sinusoids(count: int, like: Tensor) -> Tensor:
    """Sinusoids ``[2N - 1, C]`` of the relative positions N - 1 ... -(N - 1)."""
    place = torch.arange(count - 1, -count, -1, device=like.device, dtype=torch.float32)[:, None]
    even = torch.arange(0, like.shape[-1], 2, device=like.device)
    angle = place * torch.exp(even * (-math.log(10_000.0) / like.shape[-1]))
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)


class Attention(nn.Module):
    """Self-attention with Transformer-XL's relative positions: ``[M, C] -> [M, C]``."""

    def __init__(self, config: LipConfig) -> None:
        super().__init__()
        dim, heads = config.hidden_size, config.num_heads
        self.dropout = config.dropout
        self.linear_q, self.linear_k, self.linear_v = (nn.Linear(dim, dim) for _ in range(3))
        self.linear_out = nn.Linear(dim, dim)
        self.linear_pos = nn.Linear(dim, dim, bias=False)
        biases = nn.init.xavier_uniform_(torch.empty(2, heads, dim // heads))
        self.pos_bias_u, self.pos_bias_v = (nn.Parameter(bias.clone()) for bias in biases)

    def forward(self, x: Tensor, table: Tensor, frames: Frames) -> Tensor:
        x, (_, count), shape = frames.pad(x), frames.shape, self.pos_bias_u.shape
        q, k, v = (f(x).unflatten(2, shape).transpose(1, 2) for f in (self.linear_q, self.linear_k, self.linear_v))
        positions = self.linear_pos(table).unflatten(1, shape).permute(1, 2, 0)  # [A, D, P]
        score = (q + self.pos_bias_v[:, None]) @ positions / math.sqrt(shape[1])  # [B, A, N, P]
        # Relative shift: column j of row i becomes the score of position i - j, which is column N - 1 - i + j.
        score = F.pad(score, (1, 0)).unflatten(2, (1, count)).flatten(2).unflatten(2, (2 * count, count))[:, :, 1:]
        score = score.reshape(*q.shape[:3], 2 * count - 1)[..., :count]
        if frames.real is not None:
            score = score.masked_fill(~frames.real[:, None, None], -math.inf)
        y = F.scaled_dot_product_attention(
            (q + self.pos_bias_u[:, None]).to(v.dtype), k, v, score.to(v.dtype), self.dropout if self.training else 0.0
        )
        return self.linear_out(frames.pack(y.transpose(1, 2).flatten(2)))


class Convolution(nn.Module):
    """The Conformer's convolution: gate, depthwise over time, BatchNorm; ``[M, C] -> [M, C]``."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.pointwise_cov1 = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise_conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.BatchNorm1d(dim)
        self.pointwise_cov2 = nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = F.glu(F.linear(x, self.pointwise_cov1.weight[..., 0], self.pointwise_cov1.bias))
        x = frames.pack(self.depthwise_conv(frames.pad(x).transpose(1, 2)).transpose(1, 2))
        return F.linear(F.silu(self.norm(x)), self.pointwise_cov2.weight[..., 0], self.pointwise_cov2.bias)


def feed_forward(config: LipConfig) -> nn.Sequential:
    """``[M, C] -> [M, C]``"""
    w_1 = nn.Linear(config.hidden_size, config.intermediate_size)
    w_2 = nn.Linear(config.intermediate_size, config.hidden_size)
    return nn.Sequential(OrderedDict(w_1=w_1, relu=nn.ReLU(), dropout=nn.Dropout(config.dropout), w_2=w_2))


class Layer(nn.Module):
    """One Conformer block: ``[M, C] -> [M, C]``."""

    def __init__(self, config: LipConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.feed_forward, self.feed_forward_macaron = feed_forward(config), feed_forward(config)
        self.conv_module = Convolution(config.hidden_size, config.conv_kernel)
        for name in ("ff", "mha", "ff_macaron", "conv", "final"):
            self.add_module(f"norm_{name}", nn.LayerNorm(config.hidden_size, eps=1e-12))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: Tensor, frames: Frames) -> Tensor:
        x = x + 0.5 * self.dropout(self.feed_forward_macaron(self.norm_ff_macaron(x)))
        x = x + self.dropout(self.self_attn(self.norm_mha(x), table, frames))
        x = x + self.dropout(self.conv_module(self.norm_conv(x), frames))
        x = x + 0.5 * self.dropout(self.feed_forward(self.norm_ff(x)))
        return self.norm_final(x)


class LipEncoder(nn.Module):
    """Mouth crops ``[B, N, 96, 96]`` at 25 fps to features ``[B, N, C]`` at 25 Hz."""

    def __init__(self, config: LipConfig) -> None:
        super().__init__()
        if config.hidden_size % 2 or config.hidden_size % config.num_heads or config.conv_kernel % 2 == 0:
            raise MetisError("hidden_size must be even and a multiple of num_heads, conv_kernel odd")
        self.config = config
        self.frontend = Frontend(config)
        self.embed = nn.Sequential(nn.Linear(config.widths[-1], config.hidden_size))
        self.encoders = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.after_norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def load_released(self, state: Mapping[str, Tensor]) -> None:
        """Load a released file of either layout ("VSR", "AA"), without its decoder and its CTC head.

        Raises:
            MetisError: a key of the encoder is missing, unknown or of another shape; the first is named.
        """
        ours, kept = self.state_dict(), {}
        for key, value in state.items():
            if key.startswith(("decoder.", "ctc.")):
                continue
            name = key.removeprefix("encoder.")
            for old, new in (("proj_encoder.", "embed.0."), ("input_layer.", "embed."), ("norm.", "after_norm.")):
                if name.startswith(old):
                    name = new + name.removeprefix(old)
            if name not in ours or name in kept:
                raise MetisError(f"{key} is no weight of this visual encoder; is the configuration that of the file?")
            if value.shape != (shape := ours[name].shape):
                raise MetisError(f"{key} has the shape {[*value.shape]}, but the configuration needs {[*shape]}")
            kept[name] = value
        if missing := [name for name in ours if name not in kept]:
            raise MetisError(f"encoder.{missing[0]} and {len(missing) - 1} more are missing; is the file whole?")
        self.load_state_dict(kept, strict=True, assign=self.after_norm.weight.is_meta)

    def forward(self, video: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Video ``[B, N, H, W]`` to features ``[B, N, C]``.

        ``video`` is uint8 ``[B, N, 96, 96]`` or floating and normalised (see :func:`normalise`).  ``lengths [B]``:
        pictures of each utterance, all if absent; what lies beyond changes nothing, and the features there are 0.
        """
        if video.dim() != 4 or video.shape[1] == 0:
            raise MetisError(f"video must have the shape [B, N, H, W] with N > 0, got {tuple(video.shape)}")
        stream = self.after_norm.weight.dtype
        video = (video if video.is_floating_point() else normalise(video)).to(stream)
        frames = Frames(video, lengths)
        if frames.real is not None:
            video = video.masked_fill(~frames.real[..., None, None], 0.0)
        # The residual stream stays in the dtype of the weights, whatever autocast says.
        x = self.embed(self.frontend(video, frames)).to(stream) * math.sqrt(self.config.hidden_size)
        x, table = self.dropout(x), self.dropout(sinusoids(video.shape[1], x))
        for layer in self.encoders:
            x = layer(x, table, frames)
        return frames.pad(self.after_norm(x))
