"""Masked generative modelling as pure functions: schedule, masking, guidance, iterative decoding.

Formulas: Metis section 3.1 (training) and MaskGCT sections 3.1 and 4.1 (decoding), with the constants of
the released code.  Randomness comes from a ``torch.Generator`` or from a ``noise`` function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_lib.config import DecodeSettings
from metis_lib.errors import MetisError

Noise = Callable[[tuple[int, ...]], Tensor]
Predict = Callable[[Tensor, Tensor, float], Tensor]


def mask_ratio(t: Tensor) -> Tensor:
    """Share of tokens that are masked at time ``t`` in [0, 1]: ``sin(pi t / 2)``."""
    return torch.sin(t * math.pi / 2)


SCHEDULES: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": lambda t: torch.sin(math.pi / 2 * t),
    "linear": lambda t: t,
    "square": lambda t: 1 - (1 - t) ** 2,
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "sqrt": lambda t: 1 - (1 - t).sqrt(),
}
"""Share of tokens still masked at time ``t``, by the names of MaskGIT (arXiv 2202.04200, section 3.3, of 1 - t)."""


def still_masked(step: int, steps: int, lengths: Tensor, schedule: str = "cosine") -> Tensor:
    """How many of ``lengths [B]`` tokens stay masked after ``step`` (0-based) of ``steps``; ``[B]`` int64.

    ``schedule`` is a key of :data:`SCHEDULES`; the published one is ``cosine``, of progress ``1 - t``: sin(pi t / 2).
    """
    if schedule not in SCHEDULES:
        raise MetisError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    t = torch.tensor(1 - (step + 1) / steps if step + 1 < steps else 0.0, device=lengths.device)
    return (SCHEDULES[schedule](t) * lengths).long()


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard Gumbel noise, float32.  Drawn where the generator lives, so CPU seeds hold on any device."""
    source = generator.device if generator is not None else device
    u = torch.rand(shape, generator=generator, device=source)
    return -torch.log(-torch.log(u + 1e-10) + 1e-10).to(device)


def noise_from(
    generator: torch.Generator | Sequence[torch.Generator] | None, lengths: Tensor, device: torch.device
) -> Noise:
    """Gumbel noise for one decoding of utterances of ``lengths [B]``.

    One generator is drawn from for the whole batch (as released).  A sequence has one an utterance: each gets the
    noise that it would get alone, whatever else is in the batch and however long that is.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return lambda shape: gumbel(shape, generator, device)
    # An utterance that is done earlier than the batch draws more here than alone: the draws get a generator of
    # their own, and what comes after them is the same.
    own = [torch.Generator(g.device).manual_seed(int(torch.randint(2**62, (1,), generator=g))) for g in generator]
    sizes = lengths.tolist()

    def draw(shape: tuple[int, ...]) -> Tensor:
        rows = [gumbel((n, *shape[2:]), g, device) for n, g in zip(sizes, own, strict=True)]
        return rows[0][None] if len(rows) == 1 else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return draw


def exists(lengths: Tensor, horizon: int) -> Tensor:
    """True where utterances of ``lengths [B]`` have a frame: ``[B, horizon]``."""
    return torch.arange(horizon, device=lengths.device)[None] < lengths[:, None]


def places(mask: Tensor | None) -> Tensor | None:
    """Position of each frame ``[B, T]`` among those of its utterance that exist, as if there were no padding."""
    return None if mask is None else (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def keep_top(logits: Tensor, fraction: float, count: int | None = None) -> Tensor:
    """All but the highest ``count`` or ``ceil(fraction * V)`` logits of the last axis become ``-inf``."""
    k = min(count or max(1, math.ceil(fraction * logits.shape[-1])), logits.shape[-1])
    values, indices = logits.topk(k, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, indices, values)


def guide(cond: Tensor, uncond: Tensor, scale: float, rescale: float, mask: Tensor | None = None) -> Tensor:
    """Classifier-free guidance on hidden states, rescaled per utterance.

    Args:
        cond, uncond: ``[B, T, H]``.
        scale: 0 is no guidance.
        rescale: share of the result brought back to the deviation of ``cond`` (0.75 as released).
        mask: ``[B, T]`` True where a frame exists.  Each utterance has a deviation of its own, so a
            batch equals its items (the released code takes one over the whole batch).
    """
    cond, uncond = (x if x.dtype == torch.float64 else x.float() for x in (cond, uncond))
    out = cond + scale * (cond - uncond)
    rescaled = out * deviation(cond, mask) / deviation(out, mask)
    return rescale * rescaled + (1 - rescale) * out


def deviation(x: Tensor, mask: Tensor | None) -> Tensor:
    """Unbiased standard deviation of ``x [B, T, H]`` over all existing elements of an utterance: ``[B, 1, 1]``."""
    if mask is None:
        return x.flatten(1).std(dim=1)[:, None, None]
    weight = mask[..., None].to(x.dtype)
    count = weight.sum(dim=(1, 2), keepdim=True) * x.shape[-1]
    mean = (x * weight).sum(dim=(1, 2), keepdim=True) / count
    return (((x - mean) ** 2 * weight).sum(dim=(1, 2), keepdim=True) / (count - 1)).sqrt()


@dataclass
class MaskedTrace:
    """What a decoder did: ``tokens [B, T]``, and per iteration ``sequences [N, B, T]`` and ``masks [N, B, T]``.

    ``sequences[i]`` are the tokens chosen after step ``i``, ``masks[i]`` is True where step ``i`` sent them back.
    """

    tokens: Tensor
    sequences: Tensor
    masks: Tensor

    def item(self, i: int, length: int) -> MaskedTrace:
        """Utterance ``i`` of ``length`` tokens alone."""
        return MaskedTrace(
            self.tokens[i : i + 1, :length], self.sequences[:, i : i + 1, :length], self.masks[:, i : i + 1, :length]
        )


def decode(predict: Predict, lengths: Tensor, settings: DecodeSettings, *, noise: Noise) -> MaskedTrace:
    """Fill a fully masked sequence in ``settings.steps`` steps, most confident tokens first.

    Args:
        predict: ``(tokens [B, T], masked [B, T], t) -> logits [B, T, V]``.
        lengths: ``[B]`` int64, tokens to make for each utterance; the longest sets ``T``.
        settings: steps, temperatures, kept fraction.
        noise: ``shape -> Gumbel noise``; see :func:`gumbel`.

    Once kept, a token never changes.  Temperatures fall linearly to zero with ``t``; the last of several
    steps is greedy, a single step samples at temperature 0.2 (as released).
    """
    device, steps, horizon = lengths.device, settings.steps, int(lengths.max())
    masked = exists(lengths, horizon)
    tokens = torch.zeros(masked.shape, dtype=torch.long, device=device)
    sequences, masks = [], []
    for step in range(steps):
        t = 1 - step / steps
        logits = keep_top(predict(tokens, masked, t).float(), settings.top_fraction, settings.top_k)
        if steps > 1 and step == steps - 1:
            chosen = logits.argmax(dim=-1)
        else:
            temperature = 0.2 if steps == 1 else max(settings.temperature * t, 1e-3)
            chosen = (logits / temperature + noise(tuple(logits.shape))).argmax(dim=-1)
        tokens = torch.where(masked, chosen, tokens)
        confidence = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + settings.choice_temperature * t * noise(tuple(confidence.shape))
        sequences.append(tokens)
        count = still_masked(step, steps, lengths, settings.schedule)
        if int(count.max()) == 0:
            masks.append(torch.zeros_like(masked))
            break
        order = confidence.masked_fill(~masked, torch.inf).argsort(dim=-1)
        ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(horizon, device=device).expand_as(order))
        masked = ranks < count[:, None]
        masks.append(masked)
        tokens = tokens.masked_fill(masked, 0)
    return MaskedTrace(tokens, torch.stack(sequences), torch.stack(masks))


@dataclass(frozen=True)
class MaskingSettings:
    """How training examples are masked (Metis section 4.1; the floor and 0.15 are the released code's)."""

    prompt_probability: float = 0.8
    max_prompt_fraction: float = 0.4
    ratio_floor: float = 0.0


def draw_masks(lengths: Tensor, settings: MaskingSettings, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a time, a prompt and a mask for each utterance.

    Returns:
        ``t [B]`` in (0, 1], ``prompt_lengths [B]`` and ``masked [B, T]`` (True where a token is hidden and to
        be predicted; never in the prompt or in padding, at least one an utterance).
    """
    batch, horizon = lengths.shape[0], int(lengths.max())
    t = torch.rand(batch, generator=generator).clamp(1e-5, 1.0)
    kept = torch.rand(batch, generator=generator) < settings.prompt_probability
    share = torch.rand(batch, generator=generator) * settings.max_prompt_fraction
    prompt = (share * lengths * kept).long()
    ratio = mask_ratio(t).clamp(min=settings.ratio_floor)
    masked = torch.rand(batch, horizon, generator=generator) < ratio[:, None]
    return t, prompt, confine_masks(masked, prompt, lengths)


def confine_masks(masked: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Keep masks out of prompts and padding; an utterance left without any gets its first target token masked."""
    position = torch.arange(masked.shape[1], device=masked.device)[None]
    masked = masked & (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    empty = ~masked.any(dim=1, keepdim=True)
    return masked | (empty & (position == prompt_lengths[:, None]))
