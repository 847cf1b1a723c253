"""How fast speech is generated and tokenised, against the released order of operations (random weights serve).

The reference is ``compat="released"`` in fp32, one utterance: every row and every pass, projections one by one, eager
attention, weight norm computed anew, all 24 layers of the SSL encoder.  Variants run in turns; figures are medians of
CPU seconds (of seconds on a GPU).  Decoding steps cost the same each, so a part of them is run and counted up;
``full`` runs them all.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from metis_lib.config import AUDIO_RATE, FRAME_RATE, preset
from metis_lib.errors import MetisError
from metis_lib.generation import RELEASED_STEPS, run
from metis_lib.models import masked, stage1, transformer
from metis_lib.pipeline import Metis, pick_device
from metis_lib.stores import Random
from metis_lib.tokenizers import acoustic, semantic, ssl
from metis_lib.tokenizers.semantic import freeze

VARIANTS = ("released", "fp32", "bf16")
TEXT = "He said that the long day was over, and that they were all going to be home before it was dark again."
SHARE = {"stage1": 5, "stage2_layer1": 8, "stage2_full": 4}
"""Decoding steps that are run of each stage (of ``stage2_full``: in its first layer, 1 in the others)."""
BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Utterances together, on CUDA."""


@contextlib.contextmanager
def as_released() -> Iterator[None]:
    """The order of operations of the released code, for a while."""

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype), v)

    quicker: Any = ssl._quicker()
    relative, convolution = quicker
    with (
        mock.patch.object(transformer, "attend", eager), mock.patch.object(transformer, "fused", lambda *_: False),
        mock.patch.object(semantic.WNConv1d, "weight", semantic.WNConv1d._weight),
        mock.patch.object(relative, "forward", relative.__mro__[1].forward),
        mock.patch.object(convolution, "forward", convolution.__mro__[1].forward),
        mock.patch.object(transformer, "product", F.linear), mock.patch.object(ssl, "product", F.linear),
        mock.patch.object(acoustic.Snake1d, "forward", acoustic.Snake1d.plain),
    ):  # fmt: skip
        yield


def _linear_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **more: Any) -> int:
    return 2 * prod(x) * weight[0]


def _attention_flop(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **more: Any) -> int:
    return 2 * prod(q) * k[2] + 2 * prod(q[:3]) * k[2] * v[3]


def count_flops() -> Any:
    """PyTorch's counter, which passes over two operations of CPUs."""
    from torch.utils.flop_counter import FlopCounterMode

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {torch.ops.mkldnn._linear_pointwise: _linear_flop} if ssl.HAS_ONEDNN else {}
    return FlopCounterMode(display=False, custom_mapping=known | {attention: _attention_flop})


class Clock:
    """Seconds of the parts of a system, as the device counts them (CPU seconds, or wall seconds of a GPU), and wall
    seconds; where it is ``counting`` (slower), also floating-point operations and the memory that a part took for its
    work, beside what was held before."""

    PARTS = {
        "ssl": ("ssl", "encode"), "semantic": ("semantic", "quantize"), "acoustic_encode": ("acoustic", "encode"),
        "stage2_layer1": ("stage2_layer1", "generate"), "stage2_full": ("stage2_full", "generate"),
        "acoustic_decode": ("acoustic_decoder", "decode"),
    }  # fmt: skip

    def __init__(self, device: torch.device, counting: bool = False) -> None:
        self.device, self.counting = device, counting
        self.took, self.wall, self.flops, self.bytes = (dict[str, float]() for _ in range(4))

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` with its time written down."""

        def wrapped(*args: Any, **more: Any) -> Any:
            self.wait()
            if self.counting:
                with count_flops() as counter:
                    held = self.memory(fresh=True)
                    out = call(*args, **more)
                    self.wait()
                self.flops[name] = self.flops.get(name, 0.0) + counter.get_total_flops()
                self.bytes[name] = max(self.bytes.get(name, 0.0), self.memory() - held)
                return out
            cpu, wall = time.process_time(), time.perf_counter()
            out = call(*args, **more)
            self.wait()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            self.took[name] = self.took.get(name, 0.0) + (cpu if self.device.type == "cpu" else wall)
            self.wall[name] = self.wall.get(name, 0.0) + wall
            return out

        return wrapped

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self, fresh: bool = False) -> int:
        """The most bytes since the last ``fresh``: of tensors on CUDA, of the process on a CPU (Linux, else 0)."""
        if self.device.type == "cuda":
            if fresh:
                torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        with contextlib.suppress(OSError, AttributeError, StopIteration):
            if fresh:
                ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, but not given back, would hide what is taken
                Path("/proc/self/clear_refs").write_text("5")
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
        return 0

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

    def __init__(self, name: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(name, dtype, device=device)
        self.config = replace(self.config, ssl=replace(self.config.ssl, output_layer=self.config.ssl.num_layers))


def systems(preset_name: str, task: str, device: torch.device, compile: bool = False) -> dict[str, Metis]:
    """A system a variant; the two in fp32 share their weights."""
    found = {}
    if compile:
        found["compiled"] = Metis(Random(preset_name, torch.bfloat16, device=device), device, compile=True)
        found["compiled"].load_task(task)
    for name, dtype in (("released", torch.float32), ("bf16", torch.bfloat16)):
        kind = Sharing if name == "released" else Random
        store = kind(preset_name, dtype, device=device)  # a GPU makes two thousand million numbers at once
        found[name] = Metis(store, device, compat="released" if name == "released" else None)
        found[name].load_task(task)
    slim = Metis(Random(preset_name, device=device), device)
    deep = found["released"]
    vars(slim).update({part: value for part, value in vars(deep).items() if part in Clock.PARTS or part == "stage1"})
    slim._task_models = deep._task_models
    if "acoustic_decoder" in vars(deep):
        slim.acoustic_decoder = deep.acoustic_decoder
    if "acoustic" in vars(deep):
        slim.acoustic = deep.acoustic
    slim._asked = dict(deep._asked)
    slim.ssl = Random(preset_name, device=device).part("ssl").to(device)  # type: ignore[assignment]
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


def once(
    metis: Metis, task: str, item: dict[str, Any], full: bool, batch: int = 1, counting: bool = False
) -> tuple[Clock, dict[str, float]]:
    """One generation: the clock, and by what each part has to be multiplied for all steps."""
    options = metis.options(task, item)
    every, steps2 = options.stage1.steps, RELEASED_STEPS[: metis.stage2_full.config.num_quantizers]
    if not full:
        few = (SHARE["stage2_layer1"], SHARE["stage2_full"], *(1,) * (len(steps2) - 2))
        options = replace(options, stage1=replace(options.stage1, steps=SHARE["stage1"]), stage2_steps=few)
    else:
        options = replace(options, stage2_steps=steps2)
    more = {
        "stage1": every / options.stage1.steps, "stage2_layer1": steps2[0] / options.stage2_steps[0],
        "stage2_full": sum(steps2[1:]) / sum(options.stage2_steps[1:]),
    }  # fmt: skip
    clock = Clock(metis.device, counting)
    metis._voices.clear()
    with clock.watch(metis, task):
        jobs = [metis.job(task, {**item, "seed": i}, options) for i in range(batch)]
        whole = sum(request.size for job in jobs for request in job.requests)  # all in one batch
        options = replace(options, batch_frames=max(options.batch_frames, whole))
        for job in metis.run(jobs, options):
            metis._finish(job)
    return clock, more


def together(
    metis: Metis, task: str, item: dict[str, Any], full: bool, batch: int, repeats: int, rate: float,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """``batch`` utterances in one pass, as often as ``repeats``, after two runs that count and warm up.

    Args:
        rate: of matrix products, FLOP a second.

    Returns:
        Medians: ``parts`` (seconds), ``seconds`` of them all, ``wall_s``, ``utterances_per_s`` (wall),
        ``matmul_share`` (operations by ``rate``) and ``peak_mb``, the most memory that was held at once, weights too
        (on a CPU the process's); or ``error``, where memory ran out.
    """
    clocks, memory = [], Clock(metis.device)
    try:
        counted, steps = once(metis, task, item, False, batch, counting=True)
        memory.memory(fresh=True)
        for _ in range(repeats + 1):
            clock, more = once(metis, task, item, full, batch)
            clocks.append(clock)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        say(f"{batch} together: out of memory")
        return {"error": "out of memory"}
    clocks = clocks[1:]
    parts = {part: median(c.took[part] for c in clocks) * more.get(part, 1.0) for part in clocks[0].took}
    wall = median(sum(value * more.get(part, 1.0) for part, value in c.wall.items()) for c in clocks)
    flop = sum(value * steps.get(part, 1.0) for part, value in counted.flops.items())
    say(f"{batch} together: {batch / wall:.2f} a second")
    return {
        "seconds": round(sum(parts.values()), 4), "wall_s": round(wall, 4), "utterances_per_s": round(batch / wall, 4),
        "matmul_share": round(flop / rate / sum(parts.values()), 4),
        "peak_mb": round(memory.memory() / 1e6, 1), "parts": {part: round(took, 4) for part, took in parts.items()},
    }  # fmt: skip


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
    clock, best = Clock(device), 0.0
    for _ in range(8):
        clock.took.clear()
        clock.timed("product", lambda: [ssl.product(x, w) for _ in range(8)])()
        best = max(best, 8 * 2 * rows * width * 8 * width / clock.took["product"])
    return best


Run = Callable[[bool], tuple[Clock, Mapping[str, float]]]
"""One run of a variant, ``counting`` or timed: the clock, and by what its parts are to be multiplied."""


def measure(
    variants: Mapping[str, Run], rates: Mapping[str, float], repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run variants in turns, the first of which counts operations and warms up.

    Args:
        rates: of matrix products, for each variant, in FLOP a second.

    Returns:
        By variant and part: ``parts`` (median seconds), ``gflop``, ``share`` (of the rate of matrix products) and
        ``work_mb`` (memory for the work); by variant ``wall_s``, the median of all parts together.
    """
    if repeats < 1:
        raise MetisError(f"repeats must be at least 1, not {repeats}")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    walls: dict[str, list[float]] = {name: [] for name in variants}
    flops, work = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for turn in range(repeats + 1):
        for name, go in variants.items():
            clock, more = go(not turn)
            if turn:
                runs[name].append({part: value * more.get(part, 1.0) for part, value in clock.took.items()})
                walls[name].append(sum(value * more.get(part, 1.0) for part, value in clock.wall.items()))
                say(f"{name}: {sum(runs[name][-1].values()):.2f} s")
            else:
                flops[name] = {part: value * more.get(part, 1.0) for part, value in clock.flops.items()}
                work[name] = {part: round(value / 1e6, 1) for part, value in clock.bytes.items()}
    parts = {name: {part: median(run[part] for run in turns) for part in turns[0]} for name, turns in runs.items()}
    return {
        "parts": {name: {part: round(took, 4) for part, took in found.items()} for name, found in parts.items()},
        "gflop": {name: {part: round(n / 1e9, 3) for part, n in found.items()} for name, found in flops.items()},
        "share": {
            name: {part: round(flops[name][part] / rates[name] / took, 4) for part, took in found.items()}
            for name, found in parts.items()
        },
        "work_mb": work, "wall_s": {name: round(median(found), 4) for name, found in walls.items()},
    }  # fmt: skip


def weights_mb(*parts: torch.nn.Module) -> float:
    """Megabytes of the weights of some parts, shared ones once."""
    sizes = {p.data_ptr(): p.nbytes for part in parts for p in part.parameters()}
    return round(sum(sizes.values()) / 1e6, 1)


@contextlib.contextmanager
def _order(name: str) -> Iterator[None]:
    """The order of operations of a variant."""
    with as_released() if name == "released" else contextlib.nullcontext():
        yield


@torch.no_grad()
def bench_generate(
    preset_name: str = "paper", tasks: Sequence[str] = ("tts", "se"), *, seconds: float = 5.0, prompt: float = 5.0,
    repeats: int = 3, full: bool = False, batch: int = 8, batches: Sequence[int] = (), device: str = "auto",
    compile: bool = False, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure tasks at a preset's sizes; see the module for the reference.

    ``batches``: how many utterances together; each is measured in bf16 as one batch, by default on CUDA 1 to 64.

    Returns:
        For each task: ``bf16_ratio`` and ``fp32_ratio`` (how many times less CPU time than the reference; on a GPU
        less time), ``step_agreement`` (fp32 against the reference at equal states), ``reference_cpu_s``,
        ``matmul_share`` (FLOP by the rate of matrix products in this run, bf16), ``batch_gain`` (throughput of
        ``batch`` utterances together by that of single ones, bf16; None: out of memory),
        ``rtf`` (wall seconds a second of speech, bf16), ``batches`` (of each of them what :func:`together` returns),
        ``weights_mb`` and what :func:`measure` returns; with ``compile`` a variant ``compiled`` (bf16).  ``about``
        says what was asked and where it ran.
    """
    where = pick_device(device)
    if not set(tasks):
        raise MetisError("name at least one task")
    if min(batch, *batches, 1) < 1:
        raise MetisError("a batch holds at least one utterance")
    if where.type == "cuda":
        batches = batches or BATCHES
    rows, width = round((seconds + prompt) * FRAME_RATE), preset(preset_name).stage1.hidden_size
    about = _about(where, preset=preset_name, seconds=seconds, prompt=prompt, repeats=repeats, full=full, batch=batch)
    out: dict[str, Any] = {}
    for task in tasks:
        item = item_of(task, seconds, prompt)
        found = variants = {}  # the systems of the task before would not fit beside these
        gc.collect()
        found = systems(preset_name, task, where, compile)
        single = product_rate(where, torch.float32, rows, width)
        half = product_rate(where, torch.bfloat16, rows, width)
        rates = {name: half if name in ("bf16", "compiled") else single for name in found}

        def run(name: str, counting: bool) -> tuple[Clock, dict[str, float]]:
            with _order(name):
                return once(found[name], task, item, full, counting=counting)  # noqa: B023

        variants = {name: partial(run, name) for name in (*VARIANTS, *(["compiled"] if compile else []))}
        values = measure(variants, rates, repeats, lambda line: say(f"{task} {line}"))  # noqa: B023
        totals = {name: sum(parts.values()) for name, parts in values["parts"].items()}
        many = {
            n: together(
                found["bf16"], task, item, full, n, repeats if n in batches else 1, half,
                lambda line: say(f"{task} {line}"),  # noqa: B023
            )
            for n in sorted({*batches, batch})
        }  # fmt: skip
        taken = many[batch].get("seconds")
        out[task] = {
            "bf16_ratio": round(totals["released"] / totals["bf16"], 3),
            "fp32_ratio": round(totals["released"] / totals["fp32"], 3),
            "step_agreement": round(agreement(found, task, item), 5),
            "reference_cpu_s": round(totals["released"], 2),
            "matmul_share": round(1e9 * sum(values["gflop"]["bf16"].values()) / half / totals["bf16"], 4),
            "batch_gain": round(batch * totals["bf16"] / taken, 3) if taken else None,
            "rtf": round(values["wall_s"]["bf16"] / seconds, 4),
            **({"compiled_ratio": round(totals["released"] / totals["compiled"], 3)} if compile else {}),
            "batches": {str(n): values for n, values in many.items() if n in batches},
            "weights_mb": {
                name: weights_mb(*(m for m in (*vars(metis).values(), metis.task_model(task)) if _is_net(m)))
                for name, metis in found.items()
            },
            **values, "gflops_per_s": {"fp32": round(single / 1e9, 1), "bf16": round(half / 1e9, 1)}, "about": about,
        }  # fmt: skip
    return out


def _is_net(part: Any) -> bool:
    return isinstance(part, torch.nn.Module)


def _about(device: torch.device, **asked: Any) -> dict[str, Any]:
    """What was asked, and where it ran."""
    asked["unit"] = "CPU seconds" if device.type == "cpu" else "seconds"
    where = {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return asked | where


@torch.no_grad()
def bench_tokenise(
    preset_name: str = "paper", *, seconds: float = 5.0, batch: int = 8, repeats: int = 3, device: str = "auto",
    dtypes: Sequence[str] = ("float32", "bfloat16"), acoustic: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure how fast recordings become tokens, by the functions of ``metis prepare tokens``.

    ``batch`` recordings of ``seconds`` of noise are read, resampled, and their filterbanks, SSL features, SSL tokens
    and acoustic tokens computed: in the released order of operations (24 layers, fp32, one by one), and for each dtype
    one by one and in a batch.

    Returns:
        By variant ``ratio`` (how many times less time than the released order), ``ssl_ratio`` (of the SSL encoder
        alone), ``times_real_time`` (wall), ``matmul_share``, ``weights_mb``, and what :func:`measure` returns;
        ``ssl_difference``, the largest one between the features in the released order and in fp32; ``about``.
    """
    from metis_lib import audio
    from metis_lib.data import shards
    from metis_lib.data.store import Row

    where = pick_device(device)
    wrong = set(dtypes) - {"float32", "bfloat16"}
    if wrong or not dtypes or batch < 1 or not shards.LIMITS["min_seconds"] <= seconds <= shards.LIMITS["max_seconds"]:
        raise MetisError("dtypes are float32 and bfloat16, batch is at least 1, seconds lie in 0.2..60")
    sizes = preset(preset_name)
    released = {name: Random(preset_name, device=where).part(name).to(where) for name in ("semantic", "acoustic")}
    released["ssl"] = Sharing(preset_name, torch.float32, where).part("ssl").to(where)
    slim: Any = Random(preset_name, device=where).part("ssl").to(where)
    slim.model.encoder.layers = released["ssl"].model.encoder.layers[: sizes.ssl.output_layer]  # type: ignore[union-attr, index]
    sets = {"released": released, "float32": released | {"ssl": slim}}
    if "bfloat16" in dtypes:
        sets["bfloat16"] = {
            name: Random(preset_name, torch.bfloat16, device=where).part(name).to(where, torch.bfloat16)
            for name in released
        }
    for models in sets.values():
        for model in models.values():
            freeze(model)
    rate = {
        d: product_rate(where, getattr(torch, d), round(seconds * FRAME_RATE), sizes.ssl.hidden_size) for d in dtypes
    }
    rate["released"] = rate.get("float32") or product_rate(
        where, torch.float32, round(seconds * FRAME_RATE), sizes.ssl.hidden_size
    )
    with tempfile.TemporaryDirectory() as folder:
        rows, noise = [], torch.Generator().manual_seed(0)
        for i in range(batch):
            audio.write(
                Path(folder) / f"{i}.flac", 0.1 * torch.randn(round(seconds * AUDIO_RATE), generator=noise), AUDIO_RATE
            )
            rows.append(Row(str(i), f"{i}.flac", "", "en", "", seconds, "", "", "", False, root=Path(folder)))

        def run(of: str, size: int, counting: bool) -> tuple[Clock, dict[str, float]]:
            clock, models = Clock(where, counting), {f"{n}_codec" if n != "ssl" else n: m for n, m in sets[of].items()}
            if not acoustic:
                del models["acoustic_codec"]
            calls = {"ssl": "forward", "semantic_codec": "quantize", "acoustic_codec": "encode"}
            with contextlib.ExitStack() as stack:
                stack.enter_context(_order(of))
                for name, model in models.items():
                    timed = clock.timed(name, getattr(model, calls[name]))
                    stack.enter_context(mock.patch.object(model, calls[name], timed))
                heard = [clock.timed("read", shards._hear)(row) for row in rows]
                for at in range(0, batch, size):
                    list(shards._encode(models, heard[at : at + size]))
            return clock, {}

        variants: dict[str, Run] = {"released": partial(run, "released", 1)}
        for dtype in dtypes:
            variants[f"{dtype} one by one"] = partial(run, dtype, 1)
            variants[f"{dtype} batch"] = partial(run, dtype, batch)
        of = {name: name.split()[0] for name in variants}
        values = measure(variants, {name: rate[of[name]] for name in variants}, repeats, say)
        heard = shards._hear(rows[0])
    features, attended = heard[1][None].to(where), heard[2].to(where)  # type: ignore[index, union-attr]
    with as_released():
        wanted = slim.normalise(slim(features, attended))
    totals = {name: sum(parts.values()) for name, parts in values["parts"].items()}
    ssl_took = {name: parts["ssl"] for name, parts in values["parts"].items()}
    return {
        "ratio": {name: round(totals["released"] / took, 3) for name, took in totals.items()},
        "ssl_ratio": {name: round(ssl_took["released"] / took, 3) for name, took in ssl_took.items()},
        "times_real_time": {name: round(seconds * batch / wall, 3) for name, wall in values["wall_s"].items()},
        "matmul_share": {
            name: round(1e9 * sum(found.values()) / rate[of[name]] / totals[name], 4)
            for name, found in values["gflop"].items()
        },
        "weights_mb": {name: weights_mb(*sets[kind].values()) for name, kind in of.items()},
        "ssl_difference": float((slim.normalise(slim(features, attended)) - wanted).abs().max()), **values,
        "gflops_per_s": {name: round(value / 1e9, 1) for name, value in rate.items() if name != "released"},
        "about": _about(where, preset=preset_name, seconds=seconds, batch=batch, repeats=repeats),
    }  # fmt: skip


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


def keep(found: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write benches by their titles (see :func:`measure`) as ``<name>.json``, with a plot of where the time goes, and
    of what batches gain."""
    import matplotlib.pyplot as plt
    import pandas

    from metis_lib import notebook
    from metis_lib.evaluation.record import write_figure, write_json

    notebook.style()
    path = folder / f"{name}.json"
    write_json(path, found)
    most = max(len(values["parts"]) for values in found.values())
    batched = {title: good for title, values in found.items() if (good := _measured(values.get("batches", {})))}
    size = (max(4.2, 1.3 * most) * len(found), 3.2 * (1 + bool(batched)))
    figure, axes = plt.subplots(1 + bool(batched), len(found), figsize=size, squeeze=False)
    names = list(dict.fromkeys(p for values in found.values() for parts in values["parts"].values() for p in parts))
    for axis, (title, values) in zip(axes[0], found.items(), strict=True):
        if "fp32_ratio" in values:
            title += f": {values['fp32_ratio']:.2f} times faster in fp32, {values['bf16_ratio']:.2f} in bf16"
        frame = pandas.DataFrame(values["parts"]).T.reindex(columns=names).fillna(0.0)
        frame.index = [word.replace(" ", "\n", 1) for word in frame.index]
        frame.plot.bar(stacked=True, ax=axis, rot=0, legend=axis is axes[0][-1], width=0.7)
        axis.set(title=title, ylabel=values["about"]["unit"], xlabel="")
    axes[0][-1].legend(fontsize=7, frameon=False)
    for axis, title in zip(axes[-1] if batched else (), found, strict=False):
        rates = {int(n): b["utterances_per_s"] * found[title]["about"]["seconds"] for n, b in batched.get(title, ())}
        axis.plot(list(rates), list(rates.values()), marker="o")
        axis.set(xlabel="utterances together", ylabel="seconds of speech a second", xscale="log", ylim=(0, None))
        axis.set_xticks(list(rates), [str(n) for n in rates])
        axis.minorticks_off()
    write_figure(path.with_suffix(".png"), figure)
    plt.close(figure)
    return path


def _measured(batches: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Those that the memory sufficed for."""
    return [(n, values) for n, values in batches.items() if "error" not in values]


def title_of(preset_name: str, about: Mapping[str, Any]) -> str:
    """Name of a bench's file: the preset, and of a GPU its name, so that none replaces another's."""
    gpu = about["unit"] != "CPU seconds"
    return "-".join([preset_name, *re.findall("[a-z0-9]+", about["device"].lower())] if gpu else [preset_name])
