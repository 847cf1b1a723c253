"""How fast this machine trains: the stage-1 step of the training loop against the machine's matrix products.

``bench_train`` is behind ``metis bench train``.  It lets :func:`metis_lib.training.loop.fit` itself train a stage 1 of
random weights on random tokens (utterances of 2 to 6 s, cut into batches and masked as in pre-training) and looks at
the clock around the loop's own calls, so that whatever the loop does is in the figure.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_lib.config import Stage1Config, preset
from metis_lib.models.stage1 import Stage1
from metis_lib.training.data import Feed, Tokens
from metis_lib.training.generative import Stage1Training
from metis_lib.training.loop import fit, make_fabric
from metis_lib.training.recipes import settings_for

TOKENS = {"paper": 2000}
"""Padded frames a step where the training settings of a preset are too many for a benchmark."""
WARM_UP = 2
"""Steps before the clock counts: caches are filled, torch.compile is done."""


class RandomShards:
    """Token shards of random utterances, 2 to 6 s (100 to 300 frames) long, held in memory."""

    def __init__(self, vocabulary: int, count: int = 512, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.frames, self.ends = rng.integers(100, 301, count), [count]
        self.tokens = [rng.integers(0, vocabulary, (n, 1)) for n in self.frames]

    def lengths(self) -> np.ndarray:
        """Frames of each utterance."""
        return self.frames

    def __getitem__(self, item: int) -> tuple[dict[str, Any], np.ndarray]:
        return {}, self.tokens[item]


class Enough(Exception):
    """Raised in the loop when it was timed for long enough: the run ends without a state on the disk."""


def count_parameters(model: Stage1) -> dict[str, int]:
    """Parameters that are no embeddings (``all``), by what they are multiplied with.

    ``frame``: the layers' projections; ``masked``: the logits, computed of masked frames only; ``utterance``: weights
    of norms and the network of the time, applied once an utterance.
    """
    count = {"frame": 0, "masked": 0, "utterance": 0}
    for name, parameter in model.named_parameters():
        kind = "masked" if name.startswith("to_logit") else "frame" if "_proj." in name else "utterance"
        if "_emb." not in name:
            count[kind] += parameter.numel()
    return count | {"all": sum(count.values())}


def step_flops(config: Stage1Config, parameters: dict[str, int], lengths: Tensor, masked: int) -> dict[str, float]:
    """Floating-point operations of one step, forward and backward; padding counts for nothing.

    ``nominal = 6 P N + sum over utterances of 12 L H T^2`` with ``P`` the parameters that are no embeddings, ``N``
    frames, ``L`` layers, ``H`` width and ``T`` the frames of an utterance (a product of ``P`` weights is ``2 P``
    operations a frame, its backward pass twice that; queries by keys and weights by values are ``2 T H`` each).
    ``done`` counts each weight only as often as it is used: 6 x (projections x N + logits x masked frames + weights
    of norms and time x utterances) + the same attention.
    """
    frames, utterances = float(lengths.sum()), len(lengths)
    attention = 12.0 * config.num_layers * config.hidden_size * float((lengths.double() ** 2).sum())
    p = parameters
    done = p["frame"] * frames + p["masked"] * masked + p["utterance"] * utterances
    return {"nominal": 6 * p["all"] * frames + attention, "done": 6 * done + attention}


class Clock:
    """Seconds of the parts of each step; between steps, of the matrix product that they are compared with."""

    def __init__(self, device: torch.device, frames: int, width: int, seconds: float) -> None:
        self.device, self.seconds, self.until = device, seconds, 0.0
        self.left = torch.randn(frames, width, device=device, dtype=torch.bfloat16)
        self.right = torch.randn(width, 4 * width, device=device, dtype=torch.bfloat16)
        self.now: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self.count, self.began, self.last = 0, self.read(), 0.0

    def read(self) -> float:
        """The time in seconds, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, its time added to ``part``."""

        def run(*arguments: Any, **named: Any) -> Any:
            began = self.read()
            out = call(*arguments, **named)
            self.last = self.read()
            self.now[part] = self.now.get(part, 0.0) + self.last - began
            return out

        return run

    def step_done(self) -> None:
        """End a step (what came after clipping was the optimizer), time five products, begin the next step."""
        end, taken = self.read(), []
        self.now |= {"optimizer": end - self.last, "step": end - self.began}
        self.now["other"] = self.now["step"] - sum(
            self.now[part] for part in ("data", "forward", "backward", "clip", "optimizer")
        )
        for _ in range(6):
            began = self.read()
            self.left @ self.right
            taken.append(self.read() - began)
        self.now["product"] = median(taken[1:])
        self.count += 1
        if self.count > WARM_UP:
            self.steps.append(self.now)
            if self.read() > self.until and len(self.steps) >= 3:
                raise Enough
        else:
            self.until = self.read() + self.seconds
        self.now, self.began = {}, self.read()


def bench_train(
    name: str = "nano", *, layers: int | None = None, tokens: int | None = None, seconds: float = 20.0,
    device: str = "auto", compile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Time the pre-training step of stage 1.

    Args:
        name: preset whose sizes and training settings are taken (``debug``, ``nano``, ``paper``).
        layers: another number of layers.
        tokens: padded frames a step; the training settings' by default, 2,000 for ``paper``.
        seconds: how long steps are timed (at least three are), after two that warm up.
        device: ``auto``, ``cpu``, ``cuda``.
        compile: torch.compile the model.

    Returns:
        Medians over steps: ``tokens_per_s`` (frames without padding), ``flops_per_s`` (``nominal`` operations of
        :func:`step_flops`), ``matmul_flops_per_s`` (the bf16 product ``[tokens, H] @ [H, 4H]``, measured between the
        steps), ``matmul_share`` (their quotient), ``matmul_share_done`` (the same of operations really ``done``) and
        ``parts``: seconds of a step by part.
    """
    config = preset(name).stage1
    config = replace(config, num_layers=layers or config.num_layers)
    settings = settings_for("stage1", name)
    settings = replace(
        settings, frames=tokens or TOKENS.get(name, settings.frames), steps=10**9, log_every=10**9, validate_every=0,
        save_every=0, save_minutes=1e9, precision="bf16-mixed", compile=compile,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    fabric, model = make_fabric(settings, device=device), Stage1(config)
    parameters = count_parameters(model)
    width = config.hidden_size
    clock = Clock(fabric.device, settings.frames, width, seconds)
    fabric.backward = clock.timed("backward", fabric.backward)
    fabric.clip_gradients = clock.timed("clip", fabric.clip_gradients)

    class Timed(Stage1Training):
        def forward(self, *arguments: Any) -> dict[str, Tensor]:
            return clock.timed("forward", super().forward)(*arguments)

        def after_step(self, *_: Any) -> None:
            clock.step_done()

    class Fed(Feed):
        def open(self, *arguments: int) -> Iterator[Any]:
            batches, take = super().open(*arguments), clock.timed("data", next)
            while True:
                batch = take(batches)
                work = step_flops(config, parameters, batch["lengths"], int(batch["hidden"].sum()))
                clock.now |= work | {"frames": float(batch["lengths"].sum())}
                yield batch

    tokens_of = Tokens(RandomShards(config.codebook_size))  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        fit(Timed(model), Fed(tokens_of, settings), settings, folder, fabric=fabric)
    found = {key: median(step[key] for step in clock.steps) for key in clock.steps[0]}
    rate = {key: median(step[key] / step["step"] for step in clock.steps) for key in ("frames", "nominal", "done")}
    product = 8 * settings.frames * width**2 / found["product"]
    parts = {key: round(found[key], 5) for key in ("data", "forward", "backward", "clip", "optimizer", "other")}
    return {
        "tokens_per_s": round(rate["frames"], 1), "flops_per_s": round(rate["nominal"]),
        "matmul_share": round(rate["nominal"] / product, 4), "matmul_share_done": round(rate["done"] / product, 4),
        "parts": parts, "step_s": round(found["step"], 5), "steps": len(clock.steps),
        "matmul_flops_per_s": round(product), "tokens_a_step": found["frames"], "padded_tokens_a_step": settings.frames,
        "preset": name, "layers": config.num_layers, "width": width, "parameters": parameters,
        "device": str(fabric.device), "dtype": settings.precision, "compile": compile,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
