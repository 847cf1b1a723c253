"""The bidirectional transformer of both stages (``DiffLlama`` of the released code).

Choices: Llama layers without a causal mask; SwiGLU of width 4H; rotary positions (theta 10,000);
no biases; every RMSNorm is adaptive, its weight a linear function of the time embedding
(MaskGCT section 4.1, table 7; Metis section 4.1).  State-dict names are those of the released files.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Embed times ``t [B]`` in [0, 1], unscaled, as ``[B, width]`` (sines, then cosines)."""
    half = width // 2
    k = torch.arange(half, device=t.device, dtype=torch.float32)
    angle = t.float()[:, None] * torch.exp(-math.log(10_000) / (half - 1) * k)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def mlp(width_in: int, width: int) -> nn.Sequential:
    """``Linear(in, 4H), SiLU, Linear(4H, H)``: the small network used for time and conditions."""
    return nn.Sequential(nn.Linear(width_in, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


def rotary_table(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[..., T, head_dim]`` (float32) for integer ``positions [..., T]``.

    The first half of the sines is negative, as :func:`rotate` wants it.
    """
    k = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[..., None] * (1.0 / 10_000.0 ** (k / head_dim))
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, rotate-half form; ``cos`` and ``sin`` of :func:`rotary_table`."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` of ``[B, N, T, D]``; ``mask [B, 1, 1, T]`` True where a key may be seen.

    Training on a CPU writes it out: PyTorch's fused kernel takes three times as long there (it spares the
    ``B N T^2`` probabilities, which are kept here).
    """
    if q.device.type != "cpu" or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    batch, heads, frames, depth = q.shape
    bias = q.new_zeros(batch, heads, frames)
    if mask is not None:
        bias.masked_fill_(~mask[:, 0], -torch.inf)
    if k.requires_grad and not torch.compiler.is_compiling():
        k.register_hook(Tensor.contiguous)  # it comes transposed, which slows all that goes before
    q, k, v = (x.reshape(batch * heads, frames, depth) for x in (q, k, v))
    scores = torch.baddbmm(bias.view(batch * heads, 1, frames), q, k.transpose(1, 2), alpha=depth**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, frames, depth)


class AdaptiveRMSNorm(nn.Module):
    """``Linear(time embedding) * x / rms(x)``.

    Starts as a plain RMSNorm (weight 0, bias 1).  The released code intends the same, but a later
    generic initialisation overwrites it there, so that its norms start near zero.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.to_weight = nn.Linear(width, width)
        self.eps = eps
        nn.init.zeros_(self.to_weight.weight)
        nn.init.ones_(self.to_weight.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """``x [B, T, H]``, ``time [B, H]``."""
        scale = self.to_weight(time)[:, None]
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps).to(scale.dtype) * scale


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence, padding masked by key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """``x [B, T, H]``; ``mask [B, 1, 1, T]`` True where a key may be seen."""
        cos, sin = rotary  # [T, D], or [B, 1, T, D]
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (p(x).view(split).transpose(1, 2).contiguous() for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, width 4H."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 4 * width, bias=False)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer with time-conditioned norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.input_layernorm = AdaptiveRMSNorm(width)
        self.post_attention_layernorm = AdaptiveRMSNorm(width)

    def forward(self, x: Tensor, time: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x, time), rotary, mask)
        return x + self.mlp(self.post_attention_layernorm(x, time))


class MaskedTransformer(nn.Module):
    """``[B, T, H]`` to ``[B, T, H]``, every frame seeing every other, conditioned on the time ``t``.

    ``cond_mlp`` (where asked for) belongs to the owner: stage 1 sends phone embeddings through it and
    prepends them, stage 2 sends the semantic condition through it and adds it.
    """

    def __init__(self, width: int, num_layers: int, heads: int, *, cond_mlp: bool) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.gradient_checkpointing = False
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(num_layers))
        self.norm = AdaptiveRMSNorm(width)
        self.diff_step_mlp = mlp(width, width)
        if cond_mlp:
            self.cond_mlp = mlp(width, width)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                nn.init.normal_(module.weight, std=0.02)
        for net in [self.diff_step_mlp] + ([self.cond_mlp] if cond_mlp else []):
            initialise_mlp(net)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Run the layers.

        Args:
            x: ``[B, T, H]`` embeddings; the residual stream is kept in fp32 where the weights are bf16.
            t: ``[B]`` times in [0, 1]; 1 means that everything is masked.
            mask: ``[B, T]`` True where a position exists; ``None`` when all do.
            positions: ``[B, T]`` int64 where the rows are not simply one after the other (see ``masked.places``).
        """
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        time = self.diff_step_mlp(sinusoidal_embedding(t, x.shape[-1]).to(self.diff_step_mlp[0].weight.dtype))
        place = torch.arange(x.shape[1], device=x.device) if positions is None else positions[:, None]
        rotary = rotary_table(place, self.head_dim)
        keys = None if mask is None else mask.bool()[:, None, None, :]
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, time, rotary, keys, use_reentrant=False)
            else:
                x = layer(x, time, rotary, keys)
        return self.norm(x, time)


def initialise_mlp(net: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases in every linear or embedding below ``net``."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
