"""How fast this machine trains: the pre-training step of stage 1 against its bf16 matrix products.

``bench_train`` (``metis bench train``) lets :func:`metis_lib.training.loop.fit` itself train random weights on random
tokens, batched and masked as in pre-training, and looks at the clock between the loop's own calls.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_lib.config import Stage1Config
from metis_lib.config import preset as sizes_of
from metis_lib.models.stage1 import Stage1
from metis_lib.training.data import Feed, Tokens
from metis_lib.training.generative import Stage1Training
from metis_lib.training.loop import TrainSettings, fit, make_fabric
from metis_lib.training.recipes import settings_for

TOKENS = {"paper": 2000}  # padded frames a step at most, where the training settings' own take too long on a CPU
WARM_UP = 2  # steps before the clock counts: memory is allotted, torch.compile is done
PARTS = ("data", "forward", "backward", "clip", "optimizer", "other")


class RandomShards:
    """Token shards, in memory, of random utterances of 100 to 300 frames (2 to 6 s)."""

    def __init__(self, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        self.frames, self.ends = rng.integers(100, 301, 512), [512]
        self.tokens = [rng.integers(0, vocabulary, (n, 1)) for n in self.frames]

    def lengths(self) -> np.ndarray:
        return self.frames

    def __getitem__(self, item: int) -> tuple[dict[str, Any], np.ndarray]:
        return {}, self.tokens[item]


def count_parameters(model: Stage1) -> dict[str, int]:
    """Parameters that are no embeddings (``all``), by how often a step uses them: once a ``frame`` (the layers'
    projections), a ``masked`` frame (the logits) or an ``utterance`` (weights of the norms, network of the time)."""
    count = {"frame": 0, "masked": 0, "utterance": 0}
    for name, parameter in model.named_parameters():
        if "_emb." not in name:
            kind = "masked" if name.startswith("to_logit") else "frame" if "_proj." in name else "utterance"
            count[kind] += parameter.numel()
    return count | {"all": sum(count.values())}


def step_flops(config: Stage1Config, parameters: dict[str, int], lengths: Tensor, masked: int) -> dict[str, float]:
    """Floating-point operations of one step, forward and backward, on utterances of ``lengths [B]``; none for padding.

    ``nominal = 6 P N + sum over utterances of 12 L H T^2``: ``P`` parameters that are no embeddings, ``N`` frames in
    all, ``L`` layers of width ``H``, ``T`` frames of an utterance (forward, a parameter is 2 operations a frame, and
    queries by keys and weights by values are ``2 T H`` each; backward is twice as much).  ``done`` counts parameters
    as often as they are used: ``6 (projections * N + logits * masked + others * utterances)``, and that attention.
    """
    attention = 12.0 * config.num_layers * config.hidden_size * float((lengths.double() ** 2).sum())
    frames, p = float(lengths.sum()), parameters
    done = p["frame"] * frames + p["masked"] * masked + p["utterance"] * len(lengths)
    return {"frames": frames, "nominal": 6 * p["all"] * frames + attention, "done": 6 * done + attention}


class Enough(Exception):
    """Ends the run when it was timed for long enough, without a state on the disk."""


class Timed(Stage1Training):
    """Pre-training with a clock: ``steps`` has the seconds and operations of each step, and the seconds of one bf16
    ``product`` ``[tokens, H] @ [H, 4H]``, measured after it."""

    def __init__(self, model: Stage1, settings: TrainSettings, fabric: Any, seconds: float) -> None:
        super().__init__(model)
        self.parameters_of, self.device, self.seconds = count_parameters(model), fabric.device, seconds
        width, self.until = model.config.hidden_size, 0.0
        self.left = torch.randn(settings.frames, width, device=self.device, dtype=torch.bfloat16)
        self.right = torch.randn(width, 4 * width, device=self.device, dtype=torch.bfloat16)
        fabric.backward = self.marked("backward", fabric.backward)
        fabric.clip_gradients = self.marked("clip", fabric.clip_gradients)
        self.steps: list[dict[str, float]] = []
        self.now, self.last = dict.fromkeys(PARTS, 0.0), self.clock()

    def clock(self) -> float:
        """Seconds, when the device has done all it was asked."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self, part: str) -> None:
        """All time since the last mark belongs to ``part``."""
        now = self.clock()
        self.now[part], self.last = self.now[part] + now - self.last, now

    def marked(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            out = call(*arguments, **named)
            self.mark(part)
            return out

        return run

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        self.mark("data")
        found = super().counts(batch)
        work = step_flops(self.model.config, self.parameters_of, batch["lengths"], int(found["loss"]))
        self.now |= {key: self.now.get(key, 0.0) + value for key, value in work.items()}
        return found

    def forward(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        self.mark("other")
        return self.marked("forward", super().forward)(batch, part)

    def after_step(self, step: int, fabric: Any, settings: TrainSettings) -> None:
        self.mark("optimizer")
        taken = []
        for _ in range(6):  # the first warms up
            began = self.clock()
            torch.mm(self.left, self.right)
            taken.append(self.clock() - began)
        if step >= WARM_UP:
            self.steps.append(self.now | {"step": sum(self.now[p] for p in PARTS), "product": median(taken[1:])})
        self.until = self.until if step >= WARM_UP else self.clock() + self.seconds
        if len(self.steps) >= 3 and self.clock() > self.until:
            raise Enough
        self.now, self.last = dict.fromkeys(PARTS, 0.0), self.clock()


def bench_train(
    preset: str = "nano", *, layers: int | None = None, tokens: int | None = None, seconds: float = 20.0,
    device: str = "auto", compile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Time the pre-training step of stage 1 in bf16, at a preset's sizes and training settings.

    ``layers``: another number of layers; ``tokens``: padded frames a step at most; ``seconds``: how long steps are
    timed (at least three), after two that warm up; ``device``: ``auto``, ``cpu``, ``cuda``; ``compile``: torch.compile.

    Returns:
        Medians over steps: ``tokens_per_s`` (without padding), ``flops_per_s`` (``nominal`` of :func:`step_flops`),
        ``matmul_flops_per_s`` (the product's, see :class:`Timed`), their quotient ``matmul_share``,
        ``matmul_share_done`` (of the operations really done) and ``parts``, seconds of a step.
    """
    config = sizes_of(preset).stage1
    config = replace(config, num_layers=layers or config.num_layers)
    settings = settings_for("stage1", preset)
    settings = replace(
        settings, frames=tokens or TOKENS.get(preset, settings.frames), steps=10**9, log_every=10**9, validate_every=0,
        save_every=0, save_minutes=1e9, precision="bf16-mixed", compile=compile,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    fabric = make_fabric(settings, device=device)
    objective = Timed(Stage1(config), settings, fabric, seconds)
    feed = Feed(Tokens(RandomShards(config.codebook_size)), settings)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fit(objective, feed, settings, folder, fabric=fabric)
    middle = {key: median(step[key] for step in objective.steps) for key in objective.steps[0]}
    rate = {key: median(s[key] / s["step"] for s in objective.steps) for key in ("frames", "nominal", "done")}
    product = 8 * settings.frames * config.hidden_size**2 / middle["product"]
    return {
        "tokens_per_s": round(rate["frames"], 1), "flops_per_s": round(rate["nominal"]),
        "matmul_share": round(rate["nominal"] / product, 4), "parts": {key: round(middle[key], 5) for key in PARTS},
        "matmul_flops_per_s": round(product), "matmul_share_done": round(rate["done"] / product, 4),
        "step_s": round(middle["step"], 5), "steps": len(objective.steps), "tokens_a_step": round(middle["frames"]),
        "padded_tokens_at_most": settings.frames, "preset": preset, "layers": config.num_layers,
        "width": config.hidden_size, "parameters": objective.parameters_of, "device": str(fabric.device),
        "dtype": settings.precision, "compile": compile, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
