"""The bidirectional transformer of both stages (``DiffLlama`` of the released code).

Choices: Llama layers without a causal mask; SwiGLU of width 4H; rotary positions (theta 10,000);
no biases; every RMSNorm is adaptive, its weight a linear function of the time embedding
(MaskGCT section 4.1, table 7; Metis section 4.1).  State-dict names are those of the released files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metis_lib.tokenizers.ssl import HAS_ONEDNN, product

LARGE = 2**20
"""Elements of a weight from which on :class:`Packs` pay."""

BUCKET = 64
"""Compiled, a pass works on multiples of so many rows: few shapes, each compiled (on CUDA, recorded) once."""


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

    A CPU writes it out to train, and in bf16: PyTorch's fused kernel takes two to three times as long there (it spares
    the ``B N T^2`` probabilities, which are kept here).
    """
    if q.device.type != "cpu" or not (q.requires_grad or q.dtype == torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _attend_bf16(q, k, v, mask)
    batch, heads, frames, depth = q.shape
    seen = k.shape[2]
    bias = q.new_zeros(batch, heads, seen)
    if mask is not None:
        bias.masked_fill_(~mask[:, 0], -torch.inf)
    if k.requires_grad and not torch.compiler.is_compiling():
        k.register_hook(Tensor.contiguous)  # it comes transposed, which slows all that goes before
    q, k, v = (x.reshape(batch * heads, -1, depth) for x in (q, k, v))
    scores = torch.baddbmm(bias.view(batch * heads, 1, seen), q, k.transpose(1, 2), alpha=depth**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, frames, depth)


def _attend_bf16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same where nothing is learned: softmax in place, over rows of whole vectors (ends cost it as much again)."""
    seen, more = k.shape[2], -k.shape[2] % 32
    k, v = F.pad(k, (0, 0, 0, more)), F.pad(v, (0, 0, 0, more))
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3))
    scores[..., seen:] = -torch.inf
    if mask is not None:
        scores[..., :seen].masked_fill_(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1, out=scores), v)


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

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """``x [B, T, H]``; ``scale [B, 1, H]`` is ``to_weight(time)``, or ``[H]`` where all have one time."""
        if scale.dim() == 1:
            return F.rms_norm(x, (x.shape[-1],), scale.to(x.dtype), self.eps).to(scale.dtype)
        return F.rms_norm(x, (x.shape[-1],), eps=self.eps).to(scale.dtype) * scale


def fuse(*layers: nn.Linear) -> Tensor:
    """The weights of linear layers as one matrix, of which the layers' own become views: no second copy is kept."""
    weights = [layer.weight.data for layer in layers]
    first, at = weights[0], weights[0].data_ptr()
    adjacent = first.is_contiguous()
    for weight in weights:
        adjacent = adjacent and weight.data_ptr() == at and weight.is_contiguous()
        at += weight.nbytes
    rows = sum(len(weight) for weight in weights)
    room = first.untyped_storage().nbytes() // first.itemsize - first.storage_offset()
    if adjacent and room >= rows * first.shape[1]:
        return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))  # fused by somebody who shares them
    whole, row = torch.cat(weights), 0
    for layer in layers:
        layer.weight.data = whole[row : row + layer.out_features]
        row += layer.out_features
    return whole


class Packs:
    """bf16 weights in the layout that oneDNN multiplies in, made at first use: else a CPU reorders them every time.

    They are held a second time; :meth:`forget` them where weights change.
    """

    def __init__(self) -> None:
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by address, which the weight itself keeps taken

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """``x weight^T`` of ``[..., C_in]`` and ``[C_out, C_in]``."""
        key = (weight.data_ptr(), len(weight))
        if key not in self.held:
            rows = x.numel() // x.shape[-1]
            self.held[key] = weight, torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.held[key][1], None, "none", [], "")

    def forget(self) -> None:
        """Make all anew when they are next used."""
        self.held.clear()


def fused(whole: Tensor | None, first: nn.Linear) -> bool:
    """Whether a fused matrix may stand for its layers: they are still its views, and nothing is learned."""
    if whole is None or torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or whole.data_ptr() == first.weight.data_ptr()


class Attention(nn.Module):
    """Multi-head self-attention over the whole sequence, padding masked by key."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.qkv: Tensor | None = None
        self.packs: Packs | None = None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, keep: Tensor | None = None
    ) -> Tensor:
        """``x [B, T, H]``; ``mask [B, 1, 1, T]`` True where a key may be seen; ``keep [B, K]``: rows to answer for."""
        cos, sin = (table.to(x.dtype) for table in rotary)  # [T, D], or [B, 1, T, D]
        split = (*x.shape[:2], self.heads, -1)
        whole = self.qkv if fused(self.qkv, self.q_proj) else None
        packs = None if whole is None else self.packs
        if whole is not None:
            if packs:
                both, v = packs.product(x, whole[: -x.shape[-1]]), packs.product(x, self.v_proj.weight)
            else:
                both, v = product(x, whole).split([2 * x.shape[-1], x.shape[-1]], dim=-1)
            both, v = both.unflatten(-1, (2 * self.heads, -1)).transpose(1, 2), v.unflatten(-1, split[2:])
            q, k = rotate(both, cos, sin).chunk(2, dim=1)
            v = v.transpose(1, 2)
        else:
            q, k, v = (p(x).view(split).transpose(1, 2).contiguous() for p in (self.q_proj, self.k_proj, self.v_proj))
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if keep is not None:
            q = q.gather(2, keep[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        heard = attend(q, k, v, mask).transpose(1, 2).reshape(x.shape[0], q.shape[2], -1)
        return packs.product(heard, self.o_proj.weight) if packs else self.o_proj(heard)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, width 4H."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 4 * width, bias=False)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)
        self.gate_up: Tensor | None = None
        self.packs: Packs | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packs and fused(self.gate_up, self.gate_proj):  # apart: each result in one piece of memory
            gate, up, down = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            inner = F.silu(self.packs.product(x, gate), inplace=True).mul_(self.packs.product(x, up))
            return self.packs.product(inner, down)
        if fused(self.gate_up, self.gate_proj):
            gate, up = product(x, self.gate_up).chunk(2, dim=-1)
            return self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm transformer layer with time-conditioned norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.input_layernorm = AdaptiveRMSNorm(width)
        self.post_attention_layernorm = AdaptiveRMSNorm(width)

    def scales(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Scales ``[B, H]`` of both norms at the embedded times ``[B, H]``."""
        return self.input_layernorm.to_weight(time), self.post_attention_layernorm.to_weight(time)

    def forward(
        self, x: Tensor, scales: tuple[Tensor, Tensor], rotary: tuple[Tensor, Tensor], mask: Tensor | None,
        keep: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """``x [B, T, H]`` to the same, or to the rows ``keep [B, K]`` alone; ``scales`` as the norms take them."""
        heard = self.self_attn(self.input_layernorm(x, scales[0]), rotary, mask, keep)
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = x + heard
        return x + self.mlp(self.post_attention_layernorm(x, scales[1]))


class MaskedTransformer(nn.Module):
    """``[B, T, H]`` to ``[B, T, H]``, every frame seeing every other, conditioned on the time ``t``.

    ``cond_mlp`` (where asked for) belongs to the owner: stage 1 sends phone embeddings through it and
    prepends them, stage 2 sends the semantic condition through it and adds it.
    """

    def __init__(self, width: int, num_layers: int, heads: int, *, cond_mlp: bool) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.gradient_checkpointing = False
        self.compiled: Callable[..., Tensor] | None = None
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
        x, time, (rotary, keys) = residual(x), self.embed_time(t), self.plan(x, mask, positions)
        for layer in self.layers:
            scales = tuple(scale[:, None] for scale in layer.scales(time))
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, scales, rotary, keys, use_reentrant=False)
            else:
                x = layer(x, scales, rotary, keys)
        return self.norm(x, self.norm.to_weight(time)[:, None])

    def embed_time(self, t: Tensor) -> Tensor:
        """Times ``[B]`` as ``[B, H]``."""
        net = self.diff_step_mlp
        return net(sinusoidal_embedding(t, net[0].in_features).to(net[0].weight.dtype))

    def plan(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Plan:
        """What every pass over rows like ``x [B, T, H]`` shares: rotary tables and the mask of the keys."""
        if self.compiled is not None:  # always of one kind, and padded
            more = -x.shape[1] % BUCKET
            there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            mask, positions = F.pad(there if mask is None else mask.bool(), (0, more)), F.pad(positions, (0, more))
        place = torch.arange(x.shape[1], device=x.device) if positions is None else positions[:, None]
        return rotary_table(place, self.head_dim), None if mask is None else mask.bool()[:, None, None, :]

    def steps(self, times: Sequence[float], together: bool = True) -> Tensor:
        """Scales of all norms at the times of a decoding, ``[N, norms, H]``: each weight is read once for all steps.

        Not ``together``: one time after the other, which rounds as the released code does.
        """
        if not together:
            return torch.cat([self.steps([t]) for t in times])
        time = self.embed_time(torch.tensor(times, device=self.norm.to_weight.weight.device))
        found = [scale for layer in self.layers for scale in layer.scales(time)]
        return torch.stack([*found, self.norm.to_weight(time)], dim=1)

    def pass_over(self, x: Tensor, scales: Tensor, plan: Plan, keep: Tensor | None = None) -> Tensor:
        """One pass of a decoding: ``x [B, T, H]`` to ``[B, T, H]``, or to the rows ``keep [B, K]`` alone.

        ``scales`` are a row of :meth:`steps`, ``plan`` is of :meth:`plan`.  The same as :meth:`forward` at one time.
        """
        if self.compiled is None:
            return self._pass(x, scales, plan, keep)
        rows = x.shape[1] if keep is None else keep.shape[1]
        x = F.pad(x, (0, 0, 0, plan[0][0].shape[-2] - x.shape[1]))
        keep = None if keep is None else F.pad(keep, (0, -rows % BUCKET))
        torch.compiler.cudagraph_mark_step_begin()
        return self.compiled(x, scales, plan, keep)[:, :rows].clone()  # a CUDA graph writes its result over the last

    def _pass(self, x: Tensor, scales: Tensor, plan: Plan, keep: Tensor | None) -> Tensor:
        x = residual(x)
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            x = layer(x, (scales[2 * i], scales[2 * i + 1]), *plan, keep if last else None)
        return self.norm(x, scales[-1])

    def fuse(self, packs: Packs | None = None) -> None:
        """Join the projections of queries, keys and values, and of gates and values, for inference.

        ``packs`` is used where it pays: on a CPU, for bf16 weights that its caches do not hold.
        """
        weight = self.layers[0].mlp.gate_proj.weight
        pays = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.numel() >= LARGE and HAS_ONEDNN
        for module in self.modules():
            if isinstance(module, Attention):
                module.qkv = fuse(module.q_proj, module.k_proj, module.v_proj)
            elif isinstance(module, SwiGLU):
                module.gate_up = fuse(module.gate_proj, module.up_proj)
            if isinstance(module, Attention | SwiGLU):
                module.packs = packs if pays else None

    def compile_passes(self) -> None:
        """Compile :meth:`pass_over` at its first use; on CUDA its kernels are recorded as graphs, one a shape.

        The weights must stay where they are (:meth:`fuse` comes first).
        """
        import torch._dynamo as dynamo

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 64)  # three nets share the code
        for module in self.modules():
            for whole in (getattr(module, "qkv", None), getattr(module, "gate_up", None)):
                if isinstance(whole, Tensor):
                    dynamo.mark_static_address(whole)  # a weight, not an input to be copied
        mode = "reduce-overhead" if self.norm.to_weight.weight.is_cuda else None
        self.compiled = torch.compile(self._pass, dynamic=True, mode=mode)


Plan = tuple[tuple[Tensor, Tensor], Tensor | None]
"""Rotary tables, and True where a key may be seen."""


def residual(x: Tensor) -> Tensor:
    """The residual stream: never less exact than fp32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def initialise_mlp(net: nn.Module) -> None:
    """Normal weights of deviation 0.02 and zero biases in every linear or embedding below ``net``."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
