"""The training loop, one for every model, on Lightning Fabric: a laptop's core or many hosts under torchrun.

An :class:`Objective` holds the nets and says what a batch costs; a :class:`~metis_lib.training.data.Feed` gives the
batches of any step.  Every random choice is drawn from (seed, step) or (seed, epoch, item), so a run stopped at any
step goes on bit for bit, and several processes compute what one would with the same global batch: sums over the
whole global batch are divided by counts over the whole global batch (Metis equation 1 sums over masked tokens).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import logging
import math
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.models.transformer import MaskedTransformer

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "100")
"""Of the thousand products that oneDNN remembers by default few come again, as batches differ in shape: a gigabyte."""
TRIM_SECONDS = 10.0
"""How often freed memory is given back."""


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        steps: the horizon of the schedule and the end of the run.
        lr, warmup, schedule: linear warm-up, then ``cosine`` to a tenth, ``inverse_sqrt`` (MaskGCT section 4.1),
            ``constant``, or ``budget``: the cosine over the time of the budget, whatever steps it gives.
        betas, weight_decay, clip: of AdamW; the largest norm of the gradient.
        frames: padded frames (tokens) of a batch on one process.
        accumulate: batches a step on each process.
        precision: ``bf16-mixed`` or ``32-true``.
        checkpointing: recompute activations: a third more work, a fraction of the memory.
        compile: torch.compile the nets.
        seed: of everything random.
        log_every, validate_every, save_every: steps (0: only at the end); besides, a state is saved every
            ``save_minutes``.
        keep: how many states stay on the disk.
        best: a score of the validation: the weights with its lowest value are the result ("": the last ones are).
    """

    steps: int = 1000
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    frames: int = 4000
    accumulate: int = 1
    precision: str = "bf16-mixed"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    log_every: int = 25
    validate_every: int = 0
    save_every: int = 0
    save_minutes: float = 10.0
    keep: int = 2
    best: str = ""


def learning_rate(step: int, settings: TrainSettings, spent: float = 0.0) -> float:
    """Learning rate at ``step`` (from 0), with a share ``spent`` of the budget's time behind it."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.schedule == "inverse_sqrt":
        return settings.lr * math.sqrt(max(settings.warmup, 1) / (step + 1))
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    if settings.schedule == "budget":
        progress = spent
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def seconds_of(text: str) -> float:
    """A budget in seconds: ``90s``, ``100m``, ``1.5h``."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([smh])", text.strip())
    if not found or not float(found[1]):
        raise MetisError(f"a budget is a number with s, m or h, such as 100m, not {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


class Objective(nn.Module):
    """What one model is trained for.

    The loss is the sum over the terms of ``weights[term] * sum / count``, where sums come from :meth:`forward`, counts
    from :meth:`counts`; a term without a weight is logged only.
    """

    weights: dict[str, float] = {"loss": 1.0}

    def parts(self, step: int) -> tuple[str, ...]:
        """Which groups of parameters step ``step`` updates, one after the other."""
        return ("model",)

    def trained(self, part: str) -> list[nn.Parameter]:
        """The parameters of a group; those that ask for a gradient by default."""
        return [p for p in self.parameters() if p.requires_grad]

    def counts(self, batch: dict[str, Any]) -> dict[str, float]:
        """What each term is divided by, from the batch alone."""
        raise NotImplementedError

    def forward(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Sums of the terms over the batch, fp32 scalars."""
        raise NotImplementedError

    def after_step(self, step: int, fabric: Any, settings: TrainSettings) -> None:
        """Called after every update."""

    def spoiled(self) -> None:
        """Called in its place where the update was left out because it was not finite."""

    def validate(self) -> dict[str, float]:
        """Scores on held-out data (the same on every process)."""
        return {}

    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """Audio for the log: name to samples ``[S]`` and rate."""
        return {}


# ---------------------------------------------------------------- the parts of a run


def make_fabric(settings: TrainSettings, *, device: str = "auto") -> Any:
    """Fabric for this process: alone, or one of those that torchrun started (DDP; gloo on CPUs, NCCL on GPUs)."""
    try:
        fabric_module = importlib.import_module("lightning_fabric")
    except ModuleNotFoundError:  # the package lightning carries it under another name
        fabric_module = importlib.import_module("lightning.fabric")

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # a batch may pass by a task's modules: no text, another codec layer
    strategy = "ddp_find_unused_parameters_true" if world > 1 else "auto"
    if device != "auto":
        from metis_lib.pipeline import pick_device

        pick_device(device)
    accelerator = "auto" if device == "auto" else device.partition(":")[0].replace("cuda", "gpu")
    if settings.precision == "bf16-mixed" and accelerator == "auto" and torch.backends.mps.is_available():
        accelerator = "cpu"  # autocast to bf16 is not complete there
    devices: Any = local if world > 1 else [int(device[5:])] if device.startswith("cuda:") else 1
    try:
        fabric = fabric_module.Fabric(
            accelerator=accelerator, devices=devices, num_nodes=world // local, strategy=strategy,
            precision=settings.precision,  # type: ignore[arg-type]
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise MetisError(f"device {device!r}: {error}") from error
    if settings.precision.endswith("-mixed"):  # Fabric would round waveforms, and what they are compared with, to bf16
        fabric._precision.convert_input = lambda data: data
    fabric.launch()
    return fabric


class Checkpoints:
    """States of a run under ``folder``: written beside and renamed, the last ``keep`` of them stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, max(keep, 1)

    def found(self) -> list[Path]:
        """Complete states, oldest first."""
        return sorted(self.folder.glob("step-*.ckpt"))

    def save(self, step: int, state: dict[str, Any], fabric: Any, trained: set[str]) -> None:
        """Write the state after ``step`` steps; MetisError where the disk does not take it (older ones stay)."""
        part, path = self.folder / f".step-{step:08d}.part", self.folder / f"step-{step:08d}.ckpt"
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(".step-*.part") if fabric.is_global_zero else ():  # of a killed process
            old.unlink(missing_ok=True)
        try:
            fabric.save(part, state, filter={"model": lambda key, _: key in trained})
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            last = self.found()[-1].name if self.found() else "none"
            raise MetisError(f"cannot write {path} ({error}); make room; the last whole state is {last}") from error
        if fabric.is_global_zero:
            os.replace(part, path)
            for old in self.found()[: -self.keep]:
                old.unlink()
        fabric.barrier()

    def load(self, state: dict[str, Any], fabric: Any) -> dict[str, Any]:
        """Restore the newest state into ``state``'s objects; returns what else it holds ({} where there is none)."""
        found = self.found()
        if not found:
            return {}
        try:
            return fabric.load(found[-1], state, strict=False, weights_only=True)
        except (RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise MetisError(f"{found[-1]} does not fit this run or is damaged ({error}); delete it") from error


class Log:
    """``log.jsonl`` and TensorBoard events of a run, written by the first process."""

    def __init__(self, folder: Path, active: bool, first_step: int) -> None:
        self.path, self.writer, self.active = folder / "log.jsonl", None, active
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = self.path.read_text().splitlines() if self.path.is_file() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= first_step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        with suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def add(self, line: dict[str, Any], samples: dict[str, tuple[Tensor, int]] | None = None) -> None:
        """One line of numbers (a nested dict is a group), and audio."""
        if not self.active:
            return
        with open(self.path, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        if self.writer is None:
            return
        flat = {f"{k}/{j}": w for k, v in line.items() if isinstance(v, dict) for j, w in v.items()}
        for key, value in ({k: v for k, v in line.items() if not isinstance(v, dict)} | flat).items():
            self.writer.add_scalar(key, value, line["step"])
        for name, (wav, rate) in (samples or {}).items():
            self.writer.add_audio(name, wav[None].float().clamp(-1, 1), line["step"], sample_rate=rate)
        self.writer.flush()


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """A question whether SIGTERM or Ctrl-C came meanwhile; the run then ends with a state."""
    asked, before = threading.Event(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the loop


def _trim() -> None:
    """Give freed memory back to the system, where the C library can: batches of other lengths each time leave holes
    that else grow to gigabytes."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def fit(
    objective: Objective, feed: Any, settings: TrainSettings, folder: str | Path, *, fabric: Any = None,
    budget: str | None = None, first: int = 0, forget_best: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Train ``objective`` in ``folder``, or go on from the newest state that lies there.

    Args:
        objective: nets on the CPU, which come back with the trained weights.
        feed: ``feed.open(step, rank, world, accumulate)`` iterates over this process's batches from a step on.
        folder: for ``states/``, ``log.jsonl`` and TensorBoard events.
        fabric: of :func:`make_fabric`; made if not given.
        first: steps already done by the weights that ``objective`` holds, where no state is left.
        forget_best: choose the best weights anew: their scores are of other data.
        budget: time after which the run ends with a state, such as ``100m``; SIGTERM and Ctrl-C do the same.
        say: called with a line now and then.

    Returns:
        The last validation's scores, with ``steps`` (done in all), ``finished``, ``seconds``, ``cpu_seconds``,
        ``frames`` (all sessions together) and ``skipped`` (updates left out because a gradient was not finite); with
        ``settings.best`` those of the best validation, and ``best_step``.

    Raises:
        MetisError: ten updates in a row were not finite, the memory or the disk does not suffice, a state that does
            not fit, or ``settings.best`` that is no score.
    """
    folder, allowed = Path(folder), seconds_of(budget) if budget else math.inf
    if settings.schedule == "budget" and not budget:
        raise MetisError("the schedule budget needs one: say how long, such as --budget 100m")
    started = ready = time.monotonic()
    fabric = fabric or make_fabric(settings)
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    groups = {
        part: objective.trained(part)
        for part in dict.fromkeys(p for s in (0, settings.steps) for p in objective.parts(s))
    }
    optimizers = [
        torch.optim.AdamW(group, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
        for group in groups.values()
    ]
    if settings.checkpointing:
        for module in objective.modules():
            if hasattr(module, "gradient_checkpointing_enable"):  # of transformers
                module.gradient_checkpointing_enable({"use_reentrant": False})
            elif isinstance(module, MaskedTransformer):
                module.gradient_checkpointing = True
    if settings.compile:
        for child in objective.children():
            child.compile(dynamic=True)
    # each process counts by itself which codes it used (``revive`` joins the counts), and DDP would send the first's
    objective._ddp_params_and_buffers_to_ignore = [
        name for name, _ in objective.named_buffers() if name.rpartition(".")[2] == "idle"
    ]
    module, *wrapped = fabric.setup(objective, *optimizers)
    by_name = dict(objective.named_parameters())
    states = Checkpoints(folder / "states", settings.keep)
    state: dict[str, Any] = {"model": module} | {f"optimizer.{k}": o for k, o in zip(groups, wrapped, strict=True)}
    rest = states.load(state, fabric)
    buffers = dict(objective.named_buffers())
    for key, value in rest.get("buffers", {}).items():
        buffers[key].copy_(value)
    progress: dict[str, Any] = {"step": first, "skipped": 0, "seconds": 0.0, "cpu_seconds": 0.0, "frames": 0.0}
    progress |= rest.get("progress", {})
    scores: dict[str, Any] = rest.get("scores", {})
    best: dict[str, Any] = rest.get("best", {}) if settings.best and not forget_best else {}
    ramp = rest.get("ramp", first)
    first = progress["step"]
    if fabric.is_global_zero:
        now = json.loads(json.dumps({**asdict(settings), "processes": fabric.world_size}))
        old = now
        if rest and (folder / "settings.json").is_file():  # of an older run, without what came later
            old = asdict(TrainSettings()) | json.loads((folder / "settings.json").read_text())
        changed = [f"{key} {old.get(key)} -> {value}" for key, value in now.items() if old.get(key) != value]
        if changed:
            say(f"goes on with other settings: {', '.join(changed)}")
        write_text(folder / "settings.json", json.dumps(now, indent=1) + "\n")
    log = Log(folder, fabric.is_global_zero, first)

    def save() -> None:
        now = dict(state, progress=dict(progress), scores=scores, buffers=buffers, ramp=ramp, best=best)
        states.save(progress["step"], now, fabric, set(names))

    began, cpu_began, saved = time.monotonic(), time.process_time(), time.monotonic()
    trimmed = began
    totals: dict[str, Tensor | float] = {}
    counted: dict[str, float] = {}
    bad, stopped, batches = 0, False, feed.open(first, fabric.global_rank, fabric.world_size, settings.accumulate)

    def tick() -> None:
        nonlocal began, cpu_began
        now, cpu = time.monotonic(), time.process_time()
        progress["seconds"] += now - began
        progress["cpu_seconds"] += cpu - cpu_began
        began, cpu_began = now, cpu

    module.train()
    with stop_asked() as asked:
        while progress["step"] < settings.steps and not stopped:
            step = progress["step"]
            torch.manual_seed((settings.seed * 1_000_003 + step) * 4096 + fabric.global_rank)  # dropout
            micro = [fabric.to_device(next(batches)) for _ in range(settings.accumulate)]
            if step == first:  # what it took to begin is not part of the schedule
                ready = time.monotonic()
            votes = [
                float(asked() or time.monotonic() - started > allowed),
                float(time.monotonic() - saved > 60 * settings.save_minutes),
                (time.monotonic() - ready) / max(started + allowed - ready, 1e-3),
            ]
            counts, votes = _sum_counts(fabric, [objective.counts(batch) for batch in micro], votes)
            rate = learning_rate(step, settings, votes[2] / fabric.world_size)  # by the mean of their clocks
            if ramp:  # a new optimiser knows no second moments yet
                rate *= min(1.0, (step - ramp + 1) / max(settings.warmup, 1))
            finite = True
            for part, optimizer in zip(groups, wrapped, strict=True):
                if part not in objective.parts(step):
                    continue
                for group in optimizer.param_groups:
                    group["lr"] = rate
                for name, parameters in groups.items() if len(groups) > 1 else ():
                    for p in parameters:
                        p.requires_grad_(name == part)
                with _memory_advice(settings):
                    for k, batch in enumerate(micro):
                        with fabric.no_backward_sync(module, enabled=k + 1 < len(micro)):
                            sums = module(batch, part)
                            terms = [w * sums[t] / counts[t] for t, w in objective.weights.items() if t in sums]
                            fabric.backward(sum(terms) * fabric.world_size)
                        for term, value in sums.items():
                            totals[term] = totals.get(term, 0.0) + value.detach()
                    norm = fabric.clip_gradients(module, optimizer, max_norm=settings.clip, error_if_nonfinite=False)
                    if bool(torch.isfinite(norm)):
                        optimizer.step()
                    else:
                        finite = False
                optimizer.zero_grad(set_to_none=True)
                for term in sums:
                    counted[term] = counted.get(term, 0.0) + counts[term]
            bad = 0 if finite else bad + 1
            progress["skipped"] += not finite
            if bad == 10:
                raise MetisError(
                    f"ten updates in a row (to step {step + 1}) were not finite; lower the learning rate "
                    f"(now {settings.lr:g}), take precision 32-true, or look for bad data"
                )
            if finite:
                objective.after_step(step, fabric, settings)
            else:  # else codebooks would take in what the weights were spared
                objective.spoiled()
            progress["step"] += 1
            progress["frames"] += counts.get("frames", 0.0)
            if time.monotonic() - trimmed > TRIM_SECONDS:
                _trim()
                trimmed = time.monotonic()
            stopped = votes[0] > 0
            last = stopped or progress["step"] == settings.steps
            checked = last or (settings.validate_every and progress["step"] % settings.validate_every == 0)
            if checked or progress["step"] % settings.log_every == 0:
                sums = _all_sum(fabric, totals)
                tick()
                line: dict[str, Any] = {"step": progress["step"], "lr": rate, "seconds": round(progress["seconds"], 1)}
                line |= {term: round(value / counted[term], 7) for term, value in sums.items()}
                line |= {"frames": progress["frames"], "skipped": progress["skipped"]}
                totals, counted, samples = {}, {}, None
                if checked:
                    scores, samples = _validated(fabric, objective, module, last or not settings.best)
                    line["validation"] = scores
                    if settings.best and settings.best not in scores:
                        known = ", ".join(scores) or "nothing"
                        raise MetisError(f"no score {settings.best!r} to choose weights by: the validation has {known}")
                    # where a run was stopped is chance: it must not choose among the weights of the whole run
                    chance = stopped and progress["step"] % (settings.validate_every or settings.steps)
                    given = settings.best and (not chance or settings.schedule == "budget")
                    if given and scores[settings.best] < best.get("scores", {}).get(settings.best, math.inf):
                        kept = {name: by_name[name].detach().to("cpu", copy=True) for name in names}
                        best = {"step": progress["step"], "scores": scores, "values": kept}
                    tick()
                log.add(line, samples)
                if fabric.is_global_zero:
                    numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, float | int)}
                    said = "".join(f" {k} {v:.4g}" for k, v in numbers.items()) + (f" {scores}" if checked else "")
                    say(f"step {line['step']}/{settings.steps}{said}")
            if last or votes[1] > 0 or (settings.save_every and progress["step"] % settings.save_every == 0):
                tick()
                save()
                saved = time.monotonic()
    for parameters in groups.values():
        for p in parameters:
            p.requires_grad_(True)
    if best:
        with torch.no_grad():
            for name, value in best["values"].items():
                by_name[name].copy_(value)
        scores = best["scores"] | {"best_step": best["step"]}
    module.eval()
    objective.to("cpu")
    progress["steps"] = progress.pop("step")
    spent = settings.schedule == "budget" and time.monotonic() - started > allowed
    finished = spent or progress["steps"] >= settings.steps
    return {**scores, **{k: round(v, 3) for k, v in progress.items()}, "finished": finished}


def _validated(fabric: Any, objective: Objective, module: nn.Module, audible: bool) -> tuple[dict[str, float], Any]:
    module.eval()
    with torch.no_grad(), fabric.autocast():
        scores = {key: round(float(value), 5) for key, value in objective.validate().items()}
        samples = objective.samples() if fabric.is_global_zero and audible else {}
    module.train()
    return scores, samples


def _all_sum(fabric: Any, values: dict[str, Any]) -> dict[str, float]:
    """Scalars summed over all processes, by name; every process has the same names."""
    if not values:
        return {}
    stacked = torch.stack([torch.as_tensor(v.cpu() if isinstance(v, Tensor) else v, dtype=torch.float64)
                           for v in values.values()])  # fmt: skip
    if fabric.world_size > 1:
        stacked = fabric.all_reduce(stacked.to(fabric.device), reduce_op="sum").cpu()
    return dict(zip(values, stacked.tolist(), strict=True))


def _sum_counts(
    fabric: Any, counts: list[dict[str, float]], votes: list[float]
) -> tuple[dict[str, float], list[float]]:
    """Counts summed over batches and processes (at least 1), and the votes of all processes, in one exchange."""
    local = {key: sum(one[key] for one in counts) for key in counts[0]}
    summed = _all_sum(fabric, local | {f"vote {i}": vote for i, vote in enumerate(votes)})
    return {key: max(summed[key], 1.0) for key in local}, [summed[f"vote {i}"] for i in range(len(votes))]


@contextmanager
def _memory_advice(settings: TrainSettings) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise MetisError(
            f"out of memory with {settings.frames} frames a batch; lower frames (and raise accumulate, now "
            f"{settings.accumulate}, as much)" + ("" if settings.checkpointing else ", or set checkpointing")
        ) from error
