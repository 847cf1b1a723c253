"""Semantic codec ("RepCodec"): SSL features to one stream of 50 tokens a second and back.

A VQ-VAE (arXiv 2409.00750 section 3.2.1): Vocos backbone, one factorised codebook with l2-normalised search,
Vocos backbone.  The parameter names are those of the released file.  The Vocos backbone, the
weight-normalised convolution and the quantisers are shared with the acoustic codec.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.config import SemanticCodecConfig
from metis_lib.errors import MetisError


class WNConv1d(nn.Module):
    """1-d convolution of weight ``weight_g * weight_v / |weight_v|`` (norm over all dims but the first).

    The parameters carry the names of the old ``torch.nn.utils.weight_norm``, as released files do.
    ``[B, C_in, T] -> [B, C_out, T']``.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
    ) -> None:
        super().__init__()
        start = nn.Conv1d(c_in, c_out, kernel)
        assert start.bias is not None
        self.weight_v = nn.Parameter(start.weight.detach().clone())
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(self.weight_v.detach(), dim=(1, 2), keepdim=True))
        self.bias = nn.Parameter(start.bias.detach().clone())
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.frozen = False
        self._folded: Tensor | None = None

    def weight(self) -> Tensor:
        """The convolution's weight ``[C_out, C_in, K]``; computed once where it is ``frozen`` (see :func:`freeze`)."""
        if not self.frozen or torch.is_grad_enabled():
            return self._weight()
        if self._folded is None or self._folded.device != self.bias.device or self._folded.dtype != self.bias.dtype:
            self._folded = self._weight()
        return self._folded

    def _weight(self) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=(1, 2), keepdim=True)
        return self.weight_v * (self.weight_g / norm)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight().to(x.dtype), self.bias.to(x.dtype)
        return F.conv1d(x, weight, bias, self.stride, self.padding, self.dilation)


def freeze(module: nn.Module) -> nn.Module:
    """Say that the convolutions below ``module`` will not change any more: their weights are computed only once."""
    for part in module.modules():
        if isinstance(part, WNConv1d):
            part.frozen, part._folded = True, None
    return module


class ConvNeXtBlock(nn.Module):
    """ConvNeXt block over time: depthwise convolution of width 7, inverted bottleneck, layer scale, residual.

    ``[B, C, T] -> [B, C, T]`` (arXiv 2306.00814 section 3.2).
    """

    def __init__(self, dim: int, intermediate_dim: int, layer_scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, intermediate_dim)
        self.pwconv2 = nn.Linear(intermediate_dim, dim)
        self.gamma = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).transpose(1, 2))
        y = self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + (self.gamma * y).transpose(1, 2)


class VocosBackbone(nn.Module):
    """Stack of ConvNeXt blocks: ``[B, input_dim, T] -> [B, T, dim]``."""

    def __init__(self, input_dim: int, dim: int, intermediate_dim: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(input_dim, dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(ConvNeXtBlock(dim, intermediate_dim, 1 / num_layers) for _ in range(num_layers))
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_trunc_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        return self.final_layer_norm(x.transpose(1, 2))


def init_trunc_normal(module: nn.Module) -> None:
    """Vocos initialisation: weights from a normal of deviation 0.02 cut at two, biases zero."""
    if isinstance(module, (nn.Conv1d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Quantised(NamedTuple):
    """What a quantiser returns.  Losses are fp32 and carry their weights (commitment, codebook)."""

    output: Tensor
    """``[B, C, T]`` sum of the layers' outputs, straight-through for gradients."""
    codes: Tensor
    """``[B, T]`` (one layer) or ``[Q, B, T]`` (residual), int64."""
    commit_loss: Tensor
    """scalar, or ``[Q]``"""
    codebook_loss: Tensor
    """scalar, or ``[Q]``"""


def _masked_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Mean of ``values`` over the channels and the frames where ``weight`` (one channel) is one."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / (weight.sum().clamp(min=1) * (values.numel() // weight.numel()))


class FactorizedVQ(nn.Module):
    """One codebook, searched by cosine in a low-dimensional projection (arXiv 2306.06546 section 3.3).

    The search, the losses and the projections run in fp32 whatever autocast says.  The emitted vector is the
    un-normalised codebook row, projected out.  ``by_distance``: the nearest row, not that of the nearest direction.
    """

    idle: Tensor

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int, commitment: float, codebook_loss_weight: float,
        by_distance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.by_distance = by_distance
        self.in_project = WNConv1d(dim, codebook_dim, 1)
        self.out_project = WNConv1d(codebook_dim, dim, 1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.commitment, self.codebook_loss_weight = commitment, codebook_loss_weight
        self.track_usage = False
        self.register_buffer("idle", torch.zeros(codebook_size, dtype=torch.long), persistent=False)
        self._latents: Tensor | None = None
        self._used: Tensor | None = None

    def search(self, latents: Tensor) -> Tensor:
        """Nearest codes: latents ``[B, D, T]`` fp32 to codes ``[B, T]``."""
        flat = latents.transpose(1, 2).reshape(-1, latents.shape[1])
        codebook = self.codebook.weight.to(flat.dtype)
        if not self.by_distance:
            flat, codebook = F.normalize(flat), F.normalize(codebook)
        distance = (
            flat.square().sum(1, keepdim=True) - 2 * flat @ codebook.t() + codebook.square().sum(1, keepdim=True).t()
        )
        return (-distance).argmax(1).view(latents.shape[0], -1)

    def codes_to_output(self, codes: Tensor) -> Tensor:
        """Codes ``[B, T]`` to vectors ``[B, C, T]`` in the dtype of the weights."""
        return self.out_project(self.codebook(codes).transpose(1, 2))

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantised:
        """Quantise ``z [B, C, T]``; frames where ``mask [B, T]`` is false count in no loss.

        With ``track_usage`` set and in training mode it also counts for how many calls each code was idle.
        """
        with torch.autocast(z.device.type, enabled=False):
            latents = self.in_project(z.float())
            with torch.no_grad():
                codes = self.search(latents)
            chosen = F.embedding(codes, self.codebook.weight).transpose(1, 2).to(latents.dtype)
            weight = None if mask is None else mask[:, None].to(latents.dtype)
            commit = self.commitment * _masked_mean((latents - chosen.detach()).square(), weight)
            codebook = self.codebook_loss_weight * _masked_mean((chosen - latents.detach()).square(), weight)
            output = self.out_project(latents + (chosen - latents).detach())
        if self.training and self.track_usage:
            self._count(latents.detach(), codes, mask)
        return Quantised(output, codes, commit, codebook)

    def _count(self, latents: Tensor, codes: Tensor, mask: Tensor | None) -> None:
        flat = latents.transpose(1, 2).reshape(-1, latents.shape[1])
        used = codes.reshape(-1)
        if mask is not None:
            flat, used = flat[mask.reshape(-1)], used[mask.reshape(-1)]
        self.idle += 1
        self.idle[used] = 0
        self._latents, self._used = flat, used

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move the codes of the last training call by ``share`` of the way to the mean of their latents.

        A gradient step moves a code by the learning rate at most, too slowly for latents whose scale grows.
        """
        if self._latents is None or self._used is None or not len(self._used):
            return
        codes, place = self._used.unique(return_inverse=True)
        sums = self._latents.new_zeros(len(codes), self._latents.shape[1]).index_add_(0, place, self._latents)
        means = sums / place.bincount(minlength=len(codes))[:, None]
        weight = self.codebook.weight
        weight[codes] += share * (means.to(weight.dtype) - weight[codes])

    @torch.no_grad()
    def revive(self, after: int = 10, generator: torch.Generator | None = None) -> int:
        """Replace codes idle for at least ``after`` training calls by random latents of the last call.

        Needs ``track_usage``.  ``generator`` lives on the CPU.  Returns how many codes were replaced.
        """
        if self._latents is None or not len(self._latents):
            return 0
        dead = (self.idle >= after).nonzero()[:, 0]
        count, have = len(dead), len(self._latents)
        if count:
            if count <= have:
                pick = torch.randperm(have, generator=generator)[:count]
            else:
                pick = torch.randint(have, (count,), generator=generator)
            chosen = self._latents[pick.to(self._latents.device)]
            self.codebook.weight[dead] = chosen.to(self.codebook.weight.dtype)
            self.idle[dead] = 0
        self._latents = None
        return count


class ResidualVQ(nn.Module):
    """Residual stack of :class:`FactorizedVQ` (arXiv 2306.06546); with one quantiser a plain VQ."""

    def __init__(
        self, dim: int, num_quantizers: int, codebook_size: int, codebook_dim: int, commitment: float,
        codebook_loss_weight: float, by_distance: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.quantizers = nn.ModuleList(
            FactorizedVQ(dim, codebook_size, codebook_dim, commitment, codebook_loss_weight, by_distance)
            for _ in range(num_quantizers)
        )

    def forward(self, z: Tensor, layers: Tensor | int | None = None, mask: Tensor | None = None) -> Quantised:
        """Quantise ``z [B, C, T]``, layer after layer.

        ``layers``: how many layers to use, one number, or one for each item ``[B]`` (quantiser dropout: the
        codes of all layers are returned, but the item's output and losses hold only its first ``layers``).
        ``mask [B, T]``: frames that count in the losses.
        """
        count = layers if isinstance(layers, int) else len(self.quantizers)
        frames, share, kept = mask, torch.ones((), device=z.device), torch.ones((), device=z.device)
        residual = z.float()
        output = torch.zeros_like(residual)
        codes, commits, codebooks = [], [], []
        for i, quantizer in enumerate(self.quantizers[:count]):
            if isinstance(layers, Tensor):
                keep = layers.to(z.device) > i
                frames = keep[:, None].expand(-1, z.shape[2])
                share = keep.float().mean()
                if mask is not None:
                    share = (mask & frames).sum() / mask.sum().clamp(min=1)
                    frames = mask & frames
                kept = keep[:, None, None]
            found = quantizer(residual, frames)
            output = output + found.output * kept
            residual = residual - found.output
            codes.append(found.codes)
            commits.append(found.commit_loss * share)
            codebooks.append(found.codebook_loss * share)
        return Quantised(output, torch.stack(codes), torch.stack(commits), torch.stack(codebooks))

    def vq2emb(self, codes: Tensor) -> Tensor:
        """Codes ``[Q', B, T]`` of the first ``Q'`` layers to the sum of their vectors ``[B, C, T]``."""
        output = self.quantizers[0].codes_to_output(codes[0])
        for quantizer, layer in zip(self.quantizers[1:], codes[1:], strict=False):
            output = output + quantizer.codes_to_output(layer)
        return output

    @torch.no_grad()
    def fit(self, latents: Tensor, generator: torch.Generator | None = None) -> float:
        """Set all layers anew for ``latents [N, C]``: main axes as projections, codebooks by k-means of what is left.

        For codebooks searched by distance.  Returns the share of the latents' energy that is left over at the end;
        MetisError where there are fewer latents than codes.
        """
        left, size = latents.float(), self.quantizers[0].codebook.num_embeddings
        if len(left) < size:
            raise MetisError(f"{len(left)} latents cannot fill {size} codes")
        for layer in self.quantizers:
            width = layer.codebook.embedding_dim
            axes = torch.linalg.eigh(left.t() @ left).eigenvectors[:, -width:]  # [C, D]
            for conv, weight in ((layer.in_project, axes.t()), (layer.out_project, axes)):
                conv.weight_v.copy_(weight[..., None])
                conv.weight_g.copy_(torch.linalg.vector_norm(conv.weight_v, dim=(1, 2), keepdim=True))
                conv.bias.zero_()
            inside = left @ axes
            codes = inside[torch.randperm(len(inside), generator=generator)[:size].to(inside.device)]
            for _ in range(12):
                nearest = torch.cdist(inside, codes).argmin(1)
                count = nearest.bincount(minlength=size)[:, None]
                means = torch.zeros_like(codes).index_add_(0, nearest, inside) / count.clamp(min=1)
                codes = torch.where(count > 0, means, codes)
            layer.codebook.weight.copy_(codes)
            left = left - codes[torch.cdist(inside, codes).argmin(1)] @ axes.t()
            layer._latents = layer._used = None  # of the old axes: nothing to follow, or to revive by
            layer.idle.zero_()
        return float(left.square().sum() / latents.float().square().sum())

    def track_usage(self, on: bool = True) -> None:
        """Start (or stop) counting idle codes in training mode; needed by :meth:`revive`."""
        for quantizer in self.quantizers:
            quantizer.track_usage = on

    def revive(self, after: int = 10, generator: torch.Generator | None = None) -> int:
        """Revive dead codes in every layer (see :meth:`FactorizedVQ.revive`); returns how many."""
        return sum(quantizer.revive(after, generator) for quantizer in self.quantizers)


class SemanticCodec(nn.Module):
    """RepCodec: normalised SSL features ``[B, T, C]`` to tokens ``[B, T]`` and back."""

    def __init__(self, config: SemanticCodecConfig) -> None:
        super().__init__()
        self.config = config

        def backbone() -> nn.Sequential:
            out = nn.Linear(config.vocos_dim, config.hidden_size)
            init_trunc_normal(out)
            body = VocosBackbone(
                config.hidden_size, config.vocos_dim, config.vocos_intermediate_dim, config.vocos_num_layers
            )
            return nn.Sequential(body, out)

        self.encoder = backbone()
        self.decoder = backbone()
        self.quantizer = ResidualVQ(
            config.hidden_size, 1, config.codebook_size, config.codebook_dim, config.commitment,
            config.codebook_loss_weight,
        )  # fmt: skip

    def _encode(self, feat: Tensor) -> Tensor:
        if feat.dim() != 3 or feat.shape[2] != self.config.hidden_size or feat.shape[1] == 0:
            raise MetisError(
                f"features must have the shape [B, T, {self.config.hidden_size}] with T > 0, got {tuple(feat.shape)}"
            )
        return self.encoder(feat.transpose(1, 2)).transpose(1, 2)

    def quantize(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, T, C]`` to (tokens ``[B, T]`` int64, quantised features ``[B, T, C]``)."""
        found = self.quantizer(self._encode(feat))
        return found.codes[0], found.output.transpose(1, 2)

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, T]`` to reconstructed normalised features ``[B, T, C]``."""
        return self.decoder(self.quantizer.vq2emb(tokens[None]))

    def forward(self, feat: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Reconstruct ``feat [B, T, C]``; frames where ``mask [B, T]`` (bool) is false count in no loss.

        Returns (reconstruction ``[B, T, C]``, losses, tokens ``[B, T]``).  Losses: ``recon_l1`` (mean
        absolute error), ``commit_loss`` and ``codebook_loss`` (with their weights) and ``total``, their sum.
        """
        found = self.quantizer(self._encode(feat), mask=mask)
        recon = self.decoder(found.output.to(feat.dtype))
        l1 = _masked_mean((recon.float() - feat.float()).abs(), None if mask is None else mask[..., None])
        commit, codebook = found.commit_loss.sum(), found.codebook_loss.sum()
        losses = {"recon_l1": l1, "commit_loss": commit, "codebook_loss": codebook, "total": l1 + commit + codebook}
        return recon, losses, found.codes[0]
