"""How fast speech is generated, against the released order of operations in the same run (random weights serve).

The reference is ``compat="released"`` in fp32, one utterance: every row and every pass, projections one by one, eager
attention, weight norm computed anew, all 24 layers of the SSL encoder.  Variants run in turns; figures are medians of
CPU seconds.  Decoding steps cost the same each, so a part of them is run and counted up; ``full`` runs them all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from metis_lib.config import AUDIO_RATE, FRAME_RATE, preset
from metis_lib.errors import MetisError
from metis_lib.generation import RELEASED_STEPS, run
from metis_lib.models import masked, stage1, transformer
from metis_lib.pipeline import Metis, pick_device
from metis_lib.stores import Random
from metis_lib.tokenizers import semantic, ssl

VARIANTS = ("released", "fp32", "bf16")
TEXT = "He said that the long day was over, and that they were all going to be home before it was dark again."
SHARE = {"stage1": 5, "stage2_layer1": 8, "stage2_full": 4}
"""Decoding steps that are run of each stage (of ``stage2_full``: in its first layer, 1 in the others)."""


@contextlib.contextmanager
def as_released() -> Iterator[None]:
    """The order of operations of the released code, for a while."""

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v)

    relative: Any = ssl._relative_attention()
    with (
        mock.patch.object(transformer, "attend", eager), mock.patch.object(transformer, "fused", lambda *_: False),
        mock.patch.object(semantic.WNConv1d, "weight", semantic.WNConv1d._weight),
        mock.patch.object(relative, "forward", relative.__mro__[1].forward),
    ):  # fmt: skip
        yield


class Clock:
    """CPU and wall seconds, and calls, of the parts of a system."""

    PARTS = {
        "ssl": ("ssl", "encode"), "semantic": ("semantic", "quantize"), "acoustic_encode": ("acoustic", "encode"),
        "stage2_layer1": ("stage2_layer1", "generate"), "stage2_full": ("stage2_full", "generate"),
        "acoustic_decode": ("acoustic_decoder", "decode"),
    }  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu, self.wall = device, dict[str, float](), dict[str, float]()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with its time written down."""

        def wrapped(*args: Any, **more: Any) -> Any:
            self.wait()
            cpu, wall = time.process_time(), time.perf_counter()
            out = call(*args, **more)
            self.wait()
            self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
            self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall
            return out

        return wrapped

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextlib.contextmanager
    def watch(self, metis: Metis, task: str) -> Iterator[None]:
        """Time a system's parts, and stage 1 of a task."""
        with contextlib.ExitStack() as stack:
            pairs = {
                name: (getattr(metis, at), method) for name, (at, method) in self.PARTS.items() if at in vars(metis)
            }
            for name, (part, method) in {**pairs, "stage1": (metis.task_model(task), "generate")}.items():
                stack.enter_context(mock.patch.object(part, method, self.timed(name, getattr(part, method))))
            yield


class Sharing(Random):
    """Random weights of which the SSL encoder has all its layers (``deep``) or those that are needed, shared."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name, dtype)
        self.config = replace(self.config, ssl=replace(self.config.ssl, output_layer=self.config.ssl.num_layers))


def systems(preset_name: str, task: str, device: torch.device) -> dict[str, Metis]:
    """A system a variant; the two in fp32 share their weights."""
    found = {}
    for name, dtype in (("released", torch.float32), ("bf16", torch.bfloat16)):
        store = Sharing(preset_name, dtype) if name == "released" else Random(preset_name, dtype)
        found[name] = Metis(store, device, compat="released" if name == "released" else None)
        found[name].load_task(task)
    slim = Metis(Random(preset_name), device)
    deep = found["released"]
    vars(slim).update({part: value for part, value in vars(deep).items() if part in Clock.PARTS or part == "stage1"})
    slim._task_models = deep._task_models
    if "acoustic_decoder" in vars(deep):
        slim.acoustic_decoder = deep.acoustic_decoder
    if "acoustic" in vars(deep):
        slim.acoustic = deep.acoustic
    slim._asked = dict(deep._asked)
    slim.ssl = Random(preset_name).part("ssl").to(device)  # type: ignore[assignment]
    slim.ssl.model.encoder.layers = deep.ssl.model.encoder.layers[: slim.ssl.config.output_layer]
    found["fp32"] = slim
    return found


def item_of(task: str, seconds: float, prompt: float) -> dict[str, Any]:
    """Something to do of so many seconds; noise serves."""
    noise = torch.Generator().manual_seed(0)
    sounds = [0.1 * torch.randn(round(s * AUDIO_RATE), generator=noise) for s in (seconds, prompt)]
    made: dict[str, dict[str, Any]] = {
        "se": {"source": sounds[0]}, "vc": {"source": sounds[0], "prompt": sounds[1]},
        "tse": {"source": sounds[0], "prompt": sounds[1]},
        "tts": {"text": TEXT, "prompt": sounds[1], "prompt_text": TEXT, "seconds": seconds},
    }  # fmt: skip
    if task not in made:
        raise MetisError(f"no measurement of {task!r}; choose among {', '.join(made)}")
    return made[task]


def once(metis: Metis, task: str, item: dict[str, Any], full: bool, batch: int = 1) -> tuple[Clock, dict[str, float]]:
    """One generation: the clock, and by what each part has to be multiplied for all steps."""
    options = metis.options(task, item)
    every, steps2 = options.stage1.steps, RELEASED_STEPS
    if not full:
        few = (SHARE["stage2_layer1"], SHARE["stage2_full"], *(1,) * (len(steps2) - 2))
        options = replace(options, stage1=replace(options.stage1, steps=SHARE["stage1"]), stage2_steps=few)
    else:
        options = replace(options, stage2_steps=steps2)
    more = {
        "stage1": every / options.stage1.steps, "stage2_layer1": steps2[0] / options.stage2_steps[0],
        "stage2_full": sum(steps2[1:]) / sum(options.stage2_steps[1:]),
    }  # fmt: skip
    clock = Clock(metis.device)
    metis._voices.clear()
    with clock.watch(metis, task):
        jobs = [metis.job(task, {**item, "seed": i}, options) for i in range(batch)]
        for job in metis.run(jobs, options):
            metis._finish(job)
    return clock, more


def agreement(systems: dict[str, Metis], task: str, item: dict[str, Any], steps: int = 4) -> float:
    """Share of tokens that the fp32 variant would choose as the reference does, of those masked at ``steps`` states."""
    held: dict[str, Any] = {}

    def capture(name: str) -> Callable[..., Any]:
        def decode(predict: Any, lengths: Tensor, settings: Any, **_: Any) -> Any:
            held[name] = (predict, lengths, settings)
            raise StopIteration

        return decode

    for name in ("released", "fp32"):
        metis = systems[name]
        options = metis.options(task, item, steps=steps)
        request = metis.job(task, item, systems["released"].options(task, item)).requests[0]
        request = systems["released"].job(task, item, options).requests[0]  # both are fed the same
        with mock.patch.object(stage1.masked, "decode", capture(name)), contextlib.suppress(StopIteration):
            run(metis.task_model(task), metis.stage2_layer1, metis.stage2_full, [request], options)
    same = total = 0
    (theirs, lengths, _), (ours, _, _) = held["released"], held["fp32"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(1, int(lengths[0]), dtype=torch.bool, device=lengths.device)
    tokens = torch.zeros_like(hidden, dtype=torch.long)
    for step in range(steps):
        with as_released():
            wanted = theirs(tokens, hidden, step, None).float().argmax(-1)
        rows = hidden[0].nonzero()[:, 0][None]
        got = ours(tokens, hidden, step, rows).float().argmax(-1)
        same += int((got == wanted.gather(1, rows)).sum())
        total += rows.shape[1]
        left = int(masked.still_masked(step, steps, lengths.cpu())[0])
        keep = torch.rand(hidden.shape, generator=generator).to(hidden.device).masked_fill(~hidden, 2.0).argsort(-1)
        hidden = torch.zeros_like(hidden).scatter(1, keep[:, :left], True)
        tokens = torch.where(hidden, 0, wanted)
    return same / total


def product_rate(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> float:
    """FLOP a CPU second (a second on a GPU) of a matrix product of the size that the transformers have most of."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    w = torch.randn(8 * width, width, device=device, dtype=dtype)
    best = 0.0
    for _ in range(8):
        clock = Clock(device)
        clock.timed("product", lambda: [torch.nn.functional.linear(x, w) for _ in range(8)])()
        best = max(
            best, 8 * 2 * rows * width * 8 * width / (clock.cpu if device.type == "cpu" else clock.wall)["product"]
        )
    return best


@torch.no_grad()
def bench_generate(
    preset_name: str = "paper", tasks: Sequence[str] = ("tts", "se"), *, seconds: float = 5.0, prompt: float = 5.0,
    repeats: int = 3, full: bool = False, batch: int = 8, device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure tasks at a preset's sizes; see the module for the reference.

    Returns:
        For each task: ``bf16_ratio`` and ``fp32_ratio`` (how many times less CPU time than the reference; on a GPU
        less time), ``step_agreement`` (fp32 against the reference at equal states), ``reference_cpu_s``,
        ``matmul_share`` (FLOP by the rate of matrix products in this run, bf16), ``batch_gain`` (throughput of
        ``batch`` utterances together by that of single ones, bf16), ``rtf`` (wall seconds a second of speech) and
        the parts of each variant.
    """
    from torch.utils.flop_counter import FlopCounterMode

    where, out = pick_device(device), dict[str, Any]()
    on_cpu = where.type == "cpu"
    if not set(tasks):
        raise MetisError("name at least one task")
    for task in tasks:
        item = item_of(task, seconds, prompt)
        found = systems(preset_name, task, where)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
        walls: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for turn in range(repeats + 1):  # the first one warms up
            for name in VARIANTS:
                with as_released() if name == "released" else contextlib.nullcontext():
                    clock, more = once(found[name], task, item, full)
                took = clock.cpu if on_cpu else clock.wall
                if turn:
                    runs[name].append({part: value * more.get(part, 1.0) for part, value in took.items()})
                    walls[name].append(sum(value * more.get(part, 1.0) for part, value in clock.wall.items()))
                say(f"{task} {name}: {sum(v * more.get(p, 1.0) for p, v in took.items()):.2f} s")
        parts = {
            name: {part: round(median(run[part] for run in turns), 4) for part in turns[0]}
            for name, turns in runs.items()
        }
        totals = {name: sum(values.values()) for name, values in parts.items()}
        with FlopCounterMode(display=False) as counter:
            once(found["bf16"], task, item, full)
        rows, width = round((seconds + prompt) * FRAME_RATE), preset(preset_name).stage1.hidden_size
        rate = product_rate(where, torch.bfloat16, rows, width)
        short, many = once(found["bf16"], task, item, full)[0], once(found["bf16"], task, item, full, batch)[0]
        single, together = ((clock.cpu if on_cpu else clock.wall) for clock in (short, many))
        spent = {name: sum(once_run) for name, once_run in (("one", single.values()), ("many", together.values()))}
        share = counter.get_total_flops() / rate / spent["one"]
        out[task] = {
            "bf16_ratio": round(totals["released"] / totals["bf16"], 3),
            "fp32_ratio": round(totals["released"] / totals["fp32"], 3),
            "step_agreement": round(agreement(found, task, item), 5),
            "reference_cpu_s": round(totals["released"], 2), "matmul_share": round(share, 4),
            "batch_gain": round(batch * spent["one"] / spent["many"], 3),
            "rtf": round(median(walls["bf16"]) / seconds, 4), "parts": parts,
        }  # fmt: skip
    about = {
        "preset": preset_name,
        "seconds": seconds,
        "prompt": prompt,
        "repeats": repeats,
        "full": full,
        "batch": batch,
    }
    return about | {
        "device": device_name(where),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "tasks": out,
    }


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def keep(found: dict[str, Any], folder: Path) -> Path:
    """Write what :func:`bench_generate` found as ``generate-<preset>.json``, with a plot of where the time goes."""
    import matplotlib.pyplot as plt
    import pandas

    from metis_lib import notebook
    from metis_lib.data.store import write_text

    notebook.style()
    path = folder / f"generate-{found['preset']}.json"
    write_text(path, json.dumps(found, indent=1) + "\n")
    figure, axes = plt.subplots(1, len(found["tasks"]), figsize=(4.2 * len(found["tasks"]), 3.2), squeeze=False)
    names = list(dict.fromkeys(p for values in found["tasks"].values() for p in values["parts"]["released"]))
    for axis, (task, values) in zip(axes[0], found["tasks"].items(), strict=True):
        frame = pandas.DataFrame(values["parts"]).T.reindex(columns=names).fillna(0.0)
        frame.plot.bar(stacked=True, ax=axis, rot=0, legend=axis is axes[0][-1], width=0.7)
        title = f"{task}: {values['fp32_ratio']:.2f} times faster in fp32, {values['bf16_ratio']:.2f} in bf16"
        axis.set(title=title, ylabel="CPU seconds", xlabel="")
    axes[0][-1].legend(fontsize=7, frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)
    return path
