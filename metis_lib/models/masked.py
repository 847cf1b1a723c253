"""Masked generative modelling as pure functions: schedule, masking, guidance, iterative decoding.

Formulas: Metis section 3.1 (training) and MaskGCT sections 3.1 and 4.1 (decoding), with the constants of
the released code.  Randomness comes from a ``torch.Generator`` or from a ``noise`` function.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_lib.config import DecodeSettings

Noise = Callable[[tuple[int, ...]], Tensor]
Predict = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]


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
    t = torch.tensor(1 - (step + 1) / steps if step + 1 < steps else 0.0, device=lengths.device)
    return (SCHEDULES[schedule](t) * lengths).long()


def _pinned(source: torch.device, device: torch.device) -> bool:
    """Whether what is drawn needs pinned memory: the copy would else wait for all that the GPU has to do."""
    return source.type == "cpu" and device.type == "cuda"


def _gumbel_of(u: Tensor, device: torch.device) -> Tensor:
    u = u.to(device, non_blocking=_pinned(u.device, device))
    return -torch.log(-torch.log(u + 1e-10) + 1e-10)


def gumbel(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard Gumbel noise, float32.  Drawn where the generator lives, so CPU seeds hold on any device."""
    source = generator.device if generator is not None else device
    u = torch.rand(shape, generator=generator, device=source, pin_memory=_pinned(source, device))
    return _gumbel_of(u, device)


_THREADS = ThreadPoolExecutor(min(16, os.cpu_count() or 1))  # they start at their first use


def _uniform(
    sizes: Sequence[int], width: tuple[int, ...], generators: Sequence[torch.Generator], pinned: bool
) -> Tensor:
    """Uniform noise ``[B, max(sizes), *width]`` on the CPU, each utterance's drawn by a thread; 0 beyond its size."""

    def fill(row: Tensor, n: int, generator: torch.Generator) -> None:
        row[:n].uniform_(generator=generator)
        row[n:].zero_()

    with torch.inference_mode(False):  # or no other thread could write to it
        u = torch.empty((len(sizes), max(sizes), *width), pin_memory=pinned)
    list(_THREADS.map(fill, u, sizes, generators))
    return u


class Draws:
    """Gumbel noise for one decoding.

    One generator is drawn from for the whole batch (as released).  A sequence has one an utterance: each gets the
    noise that it would get alone, whatever else is in the batch and however long that is.
    """

    def __init__(self, generator: torch.Generator | Sequence[torch.Generator] | None, device: torch.device) -> None:
        self.device, self.shared = device, None
        if generator is None or isinstance(generator, torch.Generator):
            self.shared = (generator,)
            return
        # An utterance that is done earlier than the batch draws more here than alone: the draws get a generator of
        # their own, and what comes after them is the same.
        self.own = [
            torch.Generator(g.device).manual_seed(int(torch.randint(2**62, (1,), generator=g))) for g in generator
        ]

    def __call__(self, sizes: Sequence[int], *width: int) -> Tensor:
        """``[B, max(sizes), *width]``, of which each utterance uses the first of ``sizes`` rows."""
        if self.shared:
            return gumbel((len(sizes), max(sizes), *width), self.shared[0], self.device)
        if len(sizes) > 1 and _pinned(self.own[0].device, self.device):  # a GPU would wait for one thread's numbers
            return _gumbel_of(_uniform(sizes, width, self.own, True), self.device)
        rows = [gumbel((n, *width), g, self.device) for n, g in zip(sizes, self.own, strict=True)]
        return rows[0][None] if len(rows) == 1 else torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def exists(lengths: Tensor, horizon: int) -> Tensor:
    """True where utterances of ``lengths [B]`` have a frame: ``[B, horizon]``."""
    return torch.arange(horizon, device=lengths.device)[None] < lengths[:, None]


def places(mask: Tensor | None) -> Tensor | None:
    """Position of each frame ``[B, T]`` among those of its utterance that exist, as if there were no padding."""
    return None if mask is None else (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, K]`` of ``x [B, T, H]``."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def kept(settings: DecodeSettings, vocabulary: int) -> int:
    """How many of the best logits may be drawn: ``top_k``, or ``ceil(top_fraction * V)``."""
    return min(settings.top_k or max(1, math.ceil(settings.top_fraction * vocabulary)), vocabulary)


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


def times(settings: DecodeSettings) -> list[float]:
    """The time of each step, from 1 down."""
    return [1 - step / settings.steps for step in range(settings.steps)]


def decode(
    predict: Predict, lengths: Tensor, settings: DecodeSettings, *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None, noise: Noise | None = None,
) -> MaskedTrace:  # fmt: skip
    """Fill a fully masked sequence in ``settings.steps`` steps, most confident tokens first.

    Args:
        predict: ``(tokens [B, T], masked [B, T], step, rows) -> logits``: ``[B, K, V]`` of the positions
            ``rows [B, K]``, or ``[B, T, V]`` where ``rows`` is None.
        lengths: ``[B]`` int64, tokens to make for each utterance; the longest sets ``T``.
        settings: steps, temperatures, kept fraction.  Only tokens that are still masked are predicted and drawn, and
            only among the logits that are kept; with ``released`` all are, and drawn from the whole vocabulary.
        generator: see :class:`Draws`.
        noise: ``shape -> Gumbel noise``, recorded: the released order of draws.

    Once kept, a token never changes.  Temperatures fall linearly to zero with ``t``; the last of several
    steps is greedy, a single step samples at temperature 0.2 (as released).
    """
    device, steps, sizes = lengths.device, settings.steps, lengths.tolist()
    batch, horizon = len(sizes), max(sizes)
    whole, draw = settings.released or noise is not None, Draws(generator, device)
    on_host = lengths.cpu()  # how many stay masked is known beforehand: nothing waits for the device
    plan = [still_masked(step, steps, on_host, settings.schedule).tolist() for step in range(steps)]
    left = torch.tensor(plan, device=device)[..., None]
    masked = exists(lengths, horizon)
    tokens = torch.zeros(masked.shape, dtype=torch.long, device=device)
    place = torch.arange(horizon, device=device).expand(batch, -1)
    rows, hidden = place, sizes
    sequences, masks = [], []
    for step, t in enumerate(times(settings)):
        logits = predict(tokens, masked, step, None if whole else rows).float()
        values, indices = logits.topk(kept(settings, logits.shape[-1]), dim=-1)
        if steps > 1 and step == steps - 1:
            pick = values.new_zeros(*values.shape[:2], 1, dtype=torch.long)  # topk is sorted
        else:
            drawn = values / (0.2 if steps == 1 else max(settings.temperature * t, 1e-3))
            if noise is not None:
                drawn = drawn + noise(tuple(logits.shape)).gather(-1, indices)
            elif whole:
                drawn = drawn + draw(sizes, logits.shape[-1]).gather(-1, indices)
            else:
                drawn = drawn + draw(hidden, values.shape[-1])
            pick = drawn.argmax(dim=-1, keepdim=True)
        chosen = indices.gather(-1, pick)[..., 0]
        likely = values.softmax(dim=-1).gather(-1, pick)[..., 0]
        spread = noise(tuple(likely.shape)) if noise is not None else draw(sizes if whole else hidden)
        likely = likely + settings.choice_temperature * t * spread
        if whole:
            tokens, confidence = torch.where(masked, chosen, tokens), likely
        else:  # positions that are no longer masked (of an utterance that has fewer) keep what they have
            chosen = torch.where(masked.gather(1, rows), chosen, tokens.gather(1, rows))
            tokens = tokens.scatter(1, rows, chosen)
            confidence = likely.new_zeros(batch, horizon).scatter(1, rows, likely)
        sequences.append(tokens)
        hidden = plan[step]
        if max(hidden) == 0:
            masks.append(torch.zeros_like(masked))
            break
        order = confidence.masked_fill(~masked, torch.inf).argsort(dim=-1)
        ranks = torch.empty_like(order).scatter_(-1, order, place)
        masked = ranks < left[step]
        rows = (place + horizon * ~masked).argsort(dim=-1)[:, : max(hidden)]  # the masked ones first, in their order
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
