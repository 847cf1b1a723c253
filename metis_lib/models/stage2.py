"""Stage 2: masked generative acoustic decoder (MaskGCT section 3.2.3; shared by all tasks of Metis).

SSL tokens enter as a frame-level condition.  Codec layers are predicted one after the other: layers below are
given, the layer at hand is masked, layers above are unknown except in the prompt.  Two models make the system:
one for layer 1 alone, one for layers 2 to Q.  State-dict names are those of the released ``MaskGCT_S2A`` files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from metis_lib.config import DecodeSettings, Stage2Config
from metis_lib.errors import MetisError
from metis_lib.models import masked
from metis_lib.models.transformer import MaskedTransformer, initialise_mlp


class Stage2(nn.Module):
    """Predicts acoustic codes ``[B, T, Q]`` from SSL tokens, layer by layer."""

    def __init__(self, config: Stage2Config) -> None:
        super().__init__()
        self.config = config
        width, layers = config.hidden_size, config.num_quantizers
        self.layer_emb = nn.Embedding(layers, width)
        self.mask_emb = nn.Embedding(1, width)
        self.token_emb = nn.ModuleList(nn.Embedding(config.codebook_size, width) for _ in range(layers))
        self.to_logits = nn.ModuleList(nn.Linear(width, config.codebook_size) for _ in range(layers))
        self.cond_emb = nn.Embedding(config.semantic_codebook_size, width)
        for part in self.children():
            initialise_mlp(part)
        self.diff_estimator = MaskedTransformer(width, config.num_layers, config.num_heads, cond_mlp=True)

    @property
    def first_layer(self) -> int:
        """The lowest layer (0-based) that this model predicts."""
        return 0 if self.config.predict_layer_1 else 1

    def layer_weights(self) -> Tensor:
        """How often each layer is trained, ``[Q]``, falling linearly as released: Q, Q-1, ... 1; without layer 1
        Q, Q-1, ... 2 for the others."""
        count = self.config.num_quantizers
        weights = torch.tensor([float(count - layer + self.first_layer) for layer in range(count)])
        weights[: self.first_layer] = 0
        return weights / weights.sum()

    def context(self, codes: Tensor, layer: int, in_prompt: Tensor) -> Tensor:
        """Embeddings of all layers but ``layer``, ``[B, T, H]``.

        ``codes [B, T, Q]``; ``in_prompt [B, T]`` is True where the layers above are known too.
        """
        hidden_part = self.mask_emb.weight[0]
        total = torch.zeros((*codes.shape[:2], self.config.hidden_size), device=codes.device)
        for other in range(self.config.num_quantizers):
            if other < layer:
                total = total + self.token_emb[other](codes[..., other])
            elif other > layer:
                known = self.token_emb[other](codes[..., other])
                total = total + torch.where(in_prompt[..., None], known, hidden_part)
        return total

    def condition(self, semantic: Tensor, layer: int) -> Tensor:
        """Semantic condition ``[B, T, H]`` for ``layer``, from SSL tokens ``[B, T]``."""
        embedding = self.cond_emb(semantic) + self.layer_emb.weight[layer]
        return self.diff_estimator.cond_mlp(embedding)

    def forward(
        self, codes: Tensor, semantic: Tensor, layer: int, is_masked: Tensor, t: Tensor, prompt_lengths: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Training: hidden states ``[B, T, H]``; project those to be predicted with ``to_logits[layer]``.

        Args:
            codes: ``[B, T, Q]`` int64.
            semantic: ``[B, T]`` SSL tokens.
            layer: which layer is masked (0-based).
            is_masked: ``[B, T]`` True where that layer's code is hidden.
            t: ``[B]`` times.
            prompt_lengths: ``[B]`` frames whose layers are all known.
            mask: ``[B, T]`` True where a frame exists.
        """
        x = self.training_input(codes, layer, is_masked, prompt_lengths)
        return self.diff_estimator(x + self.condition(semantic, layer), t, mask)

    def training_input(self, codes: Tensor, layer: int, is_masked: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Input embeddings ``[B, T, H]`` before the condition is added."""
        in_prompt = torch.arange(codes.shape[1], device=codes.device)[None] < prompt_lengths[:, None]
        own = self.token_emb[layer](codes[..., layer])
        own = torch.where(is_masked[..., None], self.mask_emb.weight[0], own)
        return self.context(codes, layer, in_prompt) + own

    @torch.no_grad()
    def generate(
        self, semantic: Tensor, prompt: Tensor, *, prompt_lengths: Tensor | None = None,
        lengths: Tensor | None = None, first_layer: Tensor | None = None, steps: Sequence[int] = (40,),
        settings: DecodeSettings | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, noise: masked.Noise | None = None,
        traces: list[masked.MaskedTrace] | None = None,
    ) -> Tensor:  # fmt: skip
        """Generate acoustic codes after an acoustic prompt.

        Args:
            semantic: ``[B, P+T]`` SSL tokens, the prompt's in the first P columns.
            prompt: ``[B, P, Q]`` acoustic codes, P may be 0; a model for layer 1 uses only that.
            prompt_lengths, lengths: ``[B]`` frames of each prompt and target, all if absent; what lies beyond
                changes nothing.
            first_layer: ``[B, T, 1]`` codes of layer 1, for the model of the other layers.
            steps: decoding steps of each layer (an entry for a given layer 1 is passed over).
            settings: temperatures and guidance; its ``steps`` are replaced by the list.  Guidance drops the
                prompt and keeps the semantic condition, so without a prompt it is skipped, being the identity.
            generator, noise: as in :meth:`Stage1.generate`.
            traces: filled with one trace a generated layer.

        Returns:
            ``[B, T, Q]`` codes of the target.
        """
        settings = settings or DecodeSettings(temperature=1.5, cfg=2.5)
        device = semantic.device
        batch, start = prompt.shape[:2]
        frames = semantic.shape[1] - start
        count = self.config.num_quantizers
        if len(steps) < count:
            raise MetisError(f"stage 2 needs the steps of {count} layers, got {len(steps)}")
        lengths = torch.full((batch,), frames, device=device) if lengths is None else lengths
        there = masked.exists(lengths, frames)
        given = there.new_ones(batch, start) if prompt_lengths is None else masked.exists(prompt_lengths, start)
        mask = torch.cat([given, there], dim=1)
        whole = (None, None) if bool(mask.all()) else (mask, masked.places(mask))
        alone = None if bool(there.all()) else there
        codes = torch.zeros(batch, start + frames, count, dtype=torch.long, device=device)
        codes[:, :start] = prompt[..., :count]
        if first_layer is not None:
            codes[:, start:, :1] = first_layer
        in_prompt = (torch.arange(start + frames, device=device) < start).expand(batch, -1)
        guided = settings.cfg > 0 and (start > 0 or settings.released)
        net, plan = self.diff_estimator, self.diff_estimator.plan(mask, *whole)
        free_plan = net.plan(there, alone, None)
        target = torch.arange(start, start + frames, device=device).expand(batch, -1)
        scales_of: dict[int, Tensor] = {}
        for layer in range(self.first_layer, count):
            fixed = self.context(codes, layer, in_prompt) + self.condition(semantic, layer)
            prompt_rows = fixed[:, :start] + self.token_emb[layer](codes[:, :start, layer])
            target_rows = fixed[:, start:]
            own_settings = replace(settings, steps=steps[layer])
            if steps[layer] not in scales_of:
                together = noise is None and not settings.released
                scales_of[steps[layer]] = net.steps(masked.times(own_settings), together)

            def predict(
                tokens: Tensor, is_masked: Tensor, step: int, wanted: Tensor | None, layer: int = layer,
                prompt_rows: Tensor = prompt_rows, target_rows: Tensor = target_rows,
                scales: Tensor = scales_of[steps[layer]],
            ) -> Tensor:  # fmt: skip
                own = self.token_emb[layer](tokens)
                rows = target_rows + torch.where(is_masked[..., None], self.mask_emb.weight[0], own)
                x = torch.cat([prompt_rows, rows], dim=1)
                if guided:  # as in stage 1
                    out = net.pass_over(x, scales[step], plan, None if wanted is None else target)
                    out = out[:, start:] if wanted is None else out
                    free = net.pass_over(rows, scales[step], free_plan)
                    out = masked.guide(out, free, settings.cfg, settings.rescale, alone)
                    out = out if wanted is None else masked.rows_of(out, wanted)
                else:
                    out = net.pass_over(x, scales[step], plan, None if wanted is None else wanted + start)
                    out = out[:, start:] if wanted is None else out
                logits = self.to_logits[layer]
                return logits(out.to(logits.weight.dtype))

            trace = masked.decode(predict, lengths, own_settings, generator=generator, noise=noise)
            codes[:, start:, layer] = trace.tokens
            if traces is not None:
                traces.append(trace)
        return codes[:, start:]
