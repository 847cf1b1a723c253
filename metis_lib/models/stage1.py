"""Stage 1: the masked generative transformer over SSL tokens (Metis sections 3.2 to 3.5).

Conditions enter in two ways.  Text: phone embeddings, sent through an MLP and put in front of the sequence.
Frame-level conditions (features of noisy speech, of a source, of lips): through an adapter, added to the input
over prompt and target.  State-dict names are those of the released ``MetisStage1`` files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metis_lib.config import DecodeSettings, Stage1Config
from metis_lib.errors import MetisError
from metis_lib.models import masked
from metis_lib.models.adapt import ConditionAdapter
from metis_lib.models.transformer import MaskedTransformer, initialise_mlp, mlp


class TextHint(nn.Module):
    """Frame-level phones as an extra input: embedding, two convolutions, a gate that starts at 0 (our addition).

    A prefix alone needs far more data to align than a small model ever sees; phones stretched evenly over the
    frames give a rough place for each sound, and the convolutions look at the neighbours.  ``inner`` is their width
    where it is less than the model's.
    """

    def __init__(self, vocab: int, width: int, kernel: int, inner: int = 0) -> None:
        super().__init__()
        inner = inner or width
        self.embedding = nn.Embedding(vocab, inner)
        self.first = nn.Conv1d(inner, inner, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(inner, inner, kernel, padding=kernel // 2)
        self.out = nn.Linear(inner, width) if inner != width else nn.Identity()
        self.gate_scale = nn.Parameter(torch.zeros(1))
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, phones: Tensor) -> Tensor:
        """Frame-level phone ids ``[B, T]`` to ``[B, T, H]``."""
        x = self.embedding(phones).transpose(1, 2)
        x = x + self.second(nn.functional.silu(self.first(x)))
        return self.out(x.transpose(1, 2)) * self.gate_scale

    def alone(self, phones: Tensor, pad: int) -> Tensor:
        """Those of one utterance, ``[T]`` to ``[T, H]``, followed by padding as nearly all are in training."""
        reach = 2 * (self.first.kernel_size[0] // 2)
        return self(nn.functional.pad(phones, (0, reach), value=pad)[None])[0, : len(phones)]


def stretch(phones: Tensor, frames: int) -> Tensor:
    """Spread ``phones [B, L]`` evenly over ``frames``: ``[B, frames]``."""
    index = (torch.arange(frames, device=phones.device) + 0.5) * phones.shape[1] / max(frames, 1)
    return phones[:, index.long().clamp(max=phones.shape[1] - 1)]


class Durations(nn.Module):
    """How long phones are, relative to each other: embedding and two convolutions (our addition)."""

    def __init__(self, vocab: int, width: int = 64, kernel: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.first = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.out = nn.Linear(width, 1)

    def forward(self, phones: Tensor, mask: Tensor | None = None) -> Tensor:
        """Phone ids ``[B, L]`` to logarithms of durations ``[B, L]``; only their differences mean anything.

        ``mask [B, L]`` is True where there is a phone.
        """
        there = torch.ones_like(phones, dtype=torch.bool)[:, None] if mask is None else mask[:, None]
        x = self.embedding(phones).transpose(1, 2) * there
        x = x + self.second(nn.functional.silu(self.first(x)) * there)
        return self.out(nn.functional.silu(x).transpose(1, 2))[..., 0]


def spread(phones: Tensor, weights: Tensor, frames: int) -> Tensor:
    """Spread ``phones [L]`` over ``frames``, each in proportion to its weight ``[L]`` > 0: ``[frames]``."""
    ends = weights.cpu().double().cumsum(0)  # MPS has no float64
    at = (torch.arange(frames) + 0.5) * ends[-1] / max(frames, 1)
    return phones[torch.searchsorted(ends, at, right=True).clamp(max=len(phones) - 1).to(phones.device)]


class Stage1(nn.Module):
    """Masked generative transformer over one stream of SSL tokens."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.mask_emb = nn.Embedding(1, width)
        self.cond_emb = nn.Embedding(config.codebook_size, width)  # released name of the token embedding
        self.to_logit = nn.Linear(width, config.codebook_size)
        if config.use_phones:
            self.phone_emb = nn.Embedding(config.phone_vocab, width, padding_idx=config.phone_vocab - 1)
        for part in self.children():
            initialise_mlp(part)
        self.diff_estimator = MaskedTransformer(width, config.num_layers, config.num_heads, cond_mlp=config.use_phones)
        if config.adapter == "gated":
            self.cond_adapter: nn.Module = ConditionAdapter(config.cond_dim, width)
        elif config.adapter == "plain":
            self.cond_adapter = mlp(config.cond_dim, width)
            initialise_mlp(self.cond_adapter)
        elif config.adapter != "none":
            raise MetisError(f"adapter must be none, gated or plain, not {config.adapter!r}")
        if config.text_hint not in ("none", "even", "timed"):
            raise MetisError(f"text_hint must be none, even or timed, not {config.text_hint!r}")
        if config.text_hint != "none":
            self.text_hint = TextHint(config.phone_vocab, width, config.hint_kernel, config.hint_width)
        if config.text_hint == "timed":
            self.durations = Durations(config.phone_vocab)

    def embed(self, tokens: Tensor, is_masked: Tensor) -> Tensor:
        """Embeddings ``[B, T, H]`` of ``tokens [B, T]``, with the mask embedding where ``is_masked [B, T]``."""
        return torch.where(is_masked[..., None], self.mask_emb.weight[0], self.cond_emb(tokens))

    def forward(
        self, tokens: Tensor, is_masked: Tensor, t: Tensor, *, mask: Tensor | None = None,
        phones: Tensor | None = None, phone_mask: Tensor | None = None, condition: Tensor | None = None,
        hint: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Training: hidden states ``[B, T, H]``; project those to be predicted with ``to_logit``.

        Args:
            tokens: ``[B, T]`` int64.
            is_masked: ``[B, T]`` True where the token is hidden.
            t: ``[B]`` times.
            mask: ``[B, T]`` True where a frame exists.
            phones, phone_mask: ``[B, L]`` phones that are put in front, True where there is one.
            condition: ``[B, T, C]`` frame-level condition.
            hint: ``[B, T]`` frame-level phone ids.
        """
        x = self.embed(tokens, is_masked) + self.condition_embedding(condition, hint)
        frames = x.shape[1]
        if phones is not None:
            x = torch.cat([self.diff_estimator.cond_mlp(self.phone_emb(phones)), x], dim=1)
            if mask is not None or phone_mask is not None:
                mask = mask if mask is not None else x.new_ones(x.shape[0], frames, dtype=torch.bool)
                phone_mask = phone_mask if phone_mask is not None else torch.ones_like(phones, dtype=torch.bool)
                mask = torch.cat([phone_mask.bool(), mask.bool()], dim=1)
        return self.diff_estimator(x, t, mask)[:, -frames:]

    def times_of(self, phones: Tensor) -> Tensor:
        """Relative durations ``[L]`` of ``phones [L]``: predicted where the hint is timed, else all the same."""
        if self.config.text_hint != "timed":
            return torch.ones(len(phones), device=phones.device)
        return self.durations(phones[None])[0].float().exp()

    def condition_embedding(self, condition: Tensor | None, hint: Tensor | None) -> Tensor | float:
        """What is added to the input: adapter output plus text hint (phones, or embedded), ``[B, T, H]``; 0.0 when
        there is neither."""
        added: Tensor | float = 0.0
        if condition is not None:
            added = self.cond_adapter(condition)
        if hint is not None and self.config.text_hint != "none":
            added = added + (hint if hint.is_floating_point() else self.text_hint(hint))
        return added

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, target_len: int | Tensor, *, prompt_lengths: Tensor | None = None,
        phones: Tensor | None = None, phone_lengths: Tensor | None = None, condition: Tensor | None = None,
        hint: Tensor | None = None, settings: DecodeSettings | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None, noise: masked.Noise | None = None,
        return_iterations: bool = False,
    ) -> Tensor | masked.MaskedTrace:  # fmt: skip
        """Generate SSL tokens after a prompt.

        Args:
            prompt: ``[B, P]`` int64, P may be 0.
            target_len: frames to generate, one number or ``[B]``.
            prompt_lengths: ``[B]`` frames of each prompt, all P if absent; what lies beyond changes nothing.
            phones: ``[B, L]`` phones of prompt text and text; ``phone_lengths [B]`` as for prompts.
            condition: ``[B, P+T, C]`` frame-level condition, the prompt's in the first P rows.
            hint: ``[B, P+T]`` frame-level phones (models with a text hint), or ``[B, P+T, H]``, embedded.
            settings: see :class:`DecodeSettings`.  Guidance drops prompt, phones and hint and keeps the
                frame-level condition (as released); without any of those three it is skipped, being the identity.
            generator: of the noise; one an utterance makes a batch equal to its items (see :class:`masked.Draws`).
            noise: replaces the Gumbel noise drawn from ``generator``.

        Returns:
            ``[B, T]`` tokens (beyond an utterance's length they are 0), or the whole trace.
        """
        settings = settings or DecodeSettings()
        device = prompt.device
        batch, start = prompt.shape
        lengths = torch.as_tensor(target_len, device=device).expand(batch)
        there = masked.exists(lengths, int(lengths.max()))
        given = there.new_ones(batch, start) if prompt_lengths is None else masked.exists(prompt_lengths, start)
        said = there[:, :0]
        added = self.condition_embedding(condition, hint)
        kept = self.condition_embedding(condition, None)
        before = self.embed(prompt, torch.zeros_like(prompt, dtype=torch.bool))
        if isinstance(added, Tensor):
            before = before + added[:, :start]
            added = added[:, start:]
            kept = kept[:, start:] if isinstance(kept, Tensor) else kept
        if phones is not None:
            before = torch.cat([self.diff_estimator.cond_mlp(self.phone_emb(phones)), before], dim=1)
            count = torch.full_like(lengths, phones.shape[1]) if phone_lengths is None else phone_lengths
            said = masked.exists(count, phones.shape[1])
        mask = torch.cat([said, given, there], dim=1)
        whole = (None, None) if bool(mask.all()) else (mask, masked.places(mask))
        alone = None if bool(there.all()) else there
        net, offset = self.diff_estimator, before.shape[1]
        guided = settings.cfg > 0 and (offset > 0 or hint is not None or settings.released)
        plan = net.plan(mask, *whole)
        scales = net.steps(masked.times(settings), together=noise is None and not settings.released)
        free_plan = net.plan(there, alone, None)
        target = torch.arange(offset, offset + there.shape[1], device=device).expand(batch, -1)

        def predict(tokens: Tensor, is_masked: Tensor, step: int, wanted: Tensor | None) -> Tensor:
            rows = self.embed(tokens, is_masked)
            x = torch.cat([before, rows + added], dim=1)
            if guided:  # the deviation is taken over the whole target, but of nothing else
                out = net.pass_over(x, scales[step], plan, None if wanted is None else target)
                out = out[:, offset:] if wanted is None else out
                free = net.pass_over(rows + kept, scales[step], free_plan)
                out = masked.guide(out, free, settings.cfg, settings.rescale, alone)
                out = out if wanted is None else masked.rows_of(out, wanted)
            else:
                out = net.pass_over(x, scales[step], plan, None if wanted is None else wanted + offset)
                out = out[:, offset:] if wanted is None else out
            return self.to_logit(out.to(self.to_logit.weight.dtype))

        trace = masked.decode(predict, lengths, settings, generator=generator, noise=noise)
        return trace if return_iterations else trace.tokens
