"""The training loop: one for every model.

A trainer is a function from a batch to losses; everything else (schedule, bf16, clipping, logging, guarding
against numbers that are not finite) is here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_lib.errors import MetisError


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.  ``steps`` sets the schedule: linear warm-up, then cosine to a tenth."""

    steps: int = 1000
    lr: float = 1e-3
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    log_every: int = 25


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate at ``step`` (from 0)."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def train(
    model: nn.Module,
    loss_of: Callable[[Any], dict[str, Tensor]],
    batches: Iterator[Any],
    settings: TrainSettings,
    *,
    log: Path | None = None,
    after_step: Callable[[int], None] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """Train the parameters of ``model`` that require a gradient.

    Args:
        loss_of: batch to named scalar losses; ``loss`` is minimised, the rest is logged.
        batches: endless.
        log: JSONL file to which one line is added every ``log_every`` steps.
        after_step: called with the step number after each update.
        validate: called at the end (and at a quarter, half and three quarters of the run).

    Returns:
        The last validation's values, with ``seconds``, ``cpu_seconds`` and ``steps``.

    Raises:
        MetisError: ten losses in a row were not finite.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    device = parameters[0].device
    started, cpu_started, bad = time.time(), time.process_time(), 0
    sums: dict[str, float] = {}
    count = 0
    scores: dict[str, float] = {}
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        batch = next(batches)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            losses = loss_of(batch)
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        if torch.isfinite(norm) and torch.isfinite(losses["loss"]):
            optimizer.step()
            bad = 0
        else:
            bad += 1
            if bad == 10:
                raise MetisError("ten losses in a row were not finite; lower the learning rate")
        if after_step is not None:
            after_step(step)
        count += 1
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + float(value.detach())
        quarter = validate is not None and (step + 1) % max(settings.steps // 4, 1) == 0
        if quarter or (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            line: dict[str, Any] = {"step": step + 1, "seconds": round(time.time() - started, 1)}
            line |= {key: round(value / count, 5) for key, value in sums.items()}
            sums, count = {}, 0
            if quarter and validate is not None:
                model.eval()
                with torch.no_grad():
                    scores = validate()
                model.train()
                line["validation"] = {key: round(value, 5) for key, value in scores.items()}
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "a") as stream:
                    stream.write(json.dumps(line) + "\n")
    model.eval()
    return {
        **scores,
        "steps": settings.steps,
        "seconds": round(time.time() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 3),
    }


def card(scores: dict[str, float], settings: TrainSettings, **facts: Any) -> dict[str, Any]:
    """What is written beside the weights: settings, measured scores, facts about the data."""
    return {"scores": scores, "settings": asdict(settings), **facts}
