"""Arms: the small trainings that claims compare, each a function of its fields, and what is measured of them.

Arms of one comparison see the same number of padded frames in batches of the same size; their held-out cross-entropy
is kept utterance by utterance, so that they compare in pairs.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metis_lib.assets import metis_home
from metis_lib.checkpoints import TaskConfig, fill, load_config_and_card, load_state, save_part, system_hash
from metis_lib.config import FRAME_RATE, Stage2Config, SystemConfig
from metis_lib.data.store import FlatStore
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.models.masked import MaskingSettings
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.stores import sizes
from metis_lib.tasks import TASKS
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.text import PhoneTokenizer
from metis_lib.training import data, recipes
from metis_lib.training import generative as gen
from metis_lib.training.loop import Objective, TrainSettings, fit
from metis_lib.training.prepared import Mixed

SCALES: dict[str, dict[str, Any]] = {
    "ablate": {},
    "paper": {"tokens": 500_000_000, "longer": 0, "pretraining": 2_000_000_000, "frames": 10_000, "lr": 1e-4,
              "pretraining_lr": 1e-4},
    "debug": {
        "tokens": 900, "longer": 1800, "pretraining": 900, "frames": 300, "lr": 3e-3, "pretraining_lr": 3e-3,
        "precision": "32-true", "held_out": 2, "hours": (0.001, 0.01),
    },
}  # fmt: skip
"""What each scale changes; the sizes of the nets are those of the system that is measured (nano: 4.7 M in stage 1)."""
LEAST = 0.35
"""Share of the recordings that examples are prepared of, where the system's training made fewer: more than an arm
reads."""
QUARTER = 0.25
"""Part of an utterance that is given to text-to-speech and to the pre-trained model when they are measured."""
DRAWS = 2
"""Random masks an utterance."""


code = functools.lru_cache(record.code_hash)
"""Hash of the library's own code, read once: what a process has imported does not change."""


def once(what: Callable[[Path], Any], path: Path) -> Any:
    """``what(path)``, made again only where a file of it has another time or size: the list of all that is done asks
    for the hashes of the same few files a hundred times."""
    files = sorted(file for file in (path, *path.rglob("*")) if file.is_file())
    return _once(what, path, tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files))


@functools.lru_cache(maxsize=256)
def _once(what: Callable[[Path], Any], path: Path, stamp: tuple[Any, ...]) -> Any:
    return what(path)


@dataclass(frozen=True)
class Lab:
    """Where and how arms are trained.

    Attributes:
        system: folder whose tokenizers, lip encoder, stage 2 and sizes are used; it stays as it is.
        manifest: of the corpus.
        home: for results (``arms/``, ``decode/``), weights (``systems/``) and runs that were cut off.
        tokens: padded frames that an arm sees (Omni: as many for each of its tasks).
        longer: those of an arm that is trained longer; at most ``tokens``: no arm is.
        pretraining: those of the pre-training arms.
        frames: padded frames a step.
        lr, pretraining_lr: peak learning rates; nothing is tuned for one side of a comparison.
        hours: small and large amount of labelled data.
        held_out: utterances of the validation split that all arms are measured on.
        seeds: of arms and of decoding.
        testset, items: what is decoded; the first ``items`` of a task (0: all).
    """

    system: Path
    manifest: Path
    home: Path
    tokens: int = 256_000
    longer: int = 3_000_000
    pretraining: int = 2_400_000
    frames: int = 2500
    lr: float = 1e-3
    pretraining_lr: float = 2e-3
    precision: str = "bf16-mixed"
    hours: tuple[float, float] = (0.5, 10.0)
    held_out: int = 60
    seeds: tuple[int, ...] = (0, 1, 2)
    testset: str = "human"
    items: int = 0

    @classmethod
    def of(cls, scale: str = "ablate", **changes: Any) -> Lab:
        """The laboratory of a scale, with changes (those that are None are none).

        Raises:
            MetisError: unknown scale, or values that cannot be.
        """
        if scale not in SCALES:
            raise MetisError(f"unknown scale {scale!r}; choose one of {', '.join(SCALES)}")
        folder = metis_home() / "runs" / ("claims" if scale == "ablate" else f"claims-{scale}")
        places = {"system": metis_home() / "runs" / "nano", "manifest": metis_home() / "corpora/nano/manifest.jsonl"}
        given = {key: value for key, value in changes.items() if value is not None}
        given = {"longer": 0, **given} if "tokens" in given else given  # asked for a length: that of all arms
        lab = cls(**{**places, "home": folder, **SCALES[scale], **given})
        if min(lab.tokens, lab.pretraining) < lab.frames or lab.frames < 1 or not lab.seeds or lab.held_out < 1:
            raise MetisError("an arm needs at least one step, one seed and one held-out utterance")
        if not 0 < lab.hours[0] < lab.hours[1]:
            raise MetisError(f"the two amounts of labelled data must be hours in rising order, not {lab.hours}")
        return lab

    @classmethod
    def for_notebook(
        cls, scale: str, out: str | Path, *, system: str = "", manifest: str = "", tokens: int = 0,
        seeds: Sequence[int] = (), home: str = "",
    ) -> Lab:  # fmt: skip
        """The laboratory of a notebook's parameters: empty ones and 0 are those of the scale, folders are those of the
        repository.

        Where no ``home`` is given and system, corpus, tokens or seeds are not the scale's, measurements are kept below
        ``out``: their names are the same, and they would take the place of the usual ones.

        Raises:
            MetisError: as :meth:`of`.
        """
        usual = cls.of(scale)
        places = {"system": system, "manifest": manifest, "home": home}
        given: dict[str, Any] = {key: record.ROOT / place for key, place in places.items() if place}
        lab = cls.of(scale, **given, tokens=tokens or None, seeds=tuple(seeds) or None)
        same = all(getattr(lab, key) == getattr(usual, key) for key in ("system", "manifest", "tokens", "seeds"))
        return lab if home or same else replace(lab, home=record.ROOT / out / "measured")

    @cached_property
    def sizes(self) -> SystemConfig:
        """The configurations of the system's parts; of those that it lacks, nano's."""
        return sizes(self.system)

    def settings(self, tokens: int, seed: int, lr: float | None = None) -> TrainSettings:
        """How an arm of ``tokens`` padded frames is trained."""
        steps = max(1, tokens // self.frames)
        return TrainSettings(
            steps=steps, lr=lr or self.lr, warmup=max(1, steps // 10), frames=self.frames, precision=self.precision,
            seed=seed, log_every=max(1, steps // 10), keep=1,
        )  # fmt: skip

    def job(self, task: str, seed: int = 0, passes: float = 0) -> recipes.Job:
        """The recipe's job of a task in the system, which is only read."""
        options = {"passes": passes, "text_hint": "even", "dropout": 0.0} if task in TASKS else {}
        return recipes.Job(task, self.sizes, self.system, self.settings(self.tokens, seed), self.manifest,
                           options=options)  # fmt: skip

    def passes(self, task: str) -> float:
        """How often each recording was simulated in examples that are prepared already; at least a share of them
        once (``LEAST``)."""
        made = once(data.prepared, self.manifest).glob(f"examples-{task}-*/train/index.json")
        most = max((float(path.parts[-3].split("-")[2]) for path in made), default=0.0)
        return int(most) if most >= 1 else max(most, LEAST)


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        task: a task, ``stage1`` (pre-training) or ``direct`` (stage 2 that enhances by itself).
        base: where it begins: ``none`` (random weights), ``system`` (the system's own stage 1), or one of the
            laboratory's own pre-trainings, ``pretrained`` and ``pretrained-noprompt``; of ``stage1`` what it makes.
        rank: of LoRA; 0 trains all weights.
        hours: of labelled data, at most.
        data: ``all`` recordings, or ``clean`` ones: synthetic speech, which says its text exactly.
        floor: least share of masked tokens in training.
        longer: whether it sees the larger number of frames.
    """

    task: str
    base: str = "system"
    rank: int = 0
    hours: float = 10.0
    data: str = "all"
    floor: float = 0.0
    longer: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """Its name, which tells all fields."""
        if self.task == "stage1":
            return f"{self.base}-s{self.seed}"
        how = f"lora{self.rank}" if self.rank else "full"
        more = [self.data] * (self.data != "all") + [f"floor{self.floor:g}"] * (self.floor > 0)
        more += ["longer"] * self.longer
        return "-".join([self.task, self.base, how, f"{self.hours:g}h", *more, f"s{self.seed}"])

    @property
    def needs(self) -> Arm | None:
        """The pre-training that it begins from."""
        own = self.task not in ("stage1", "direct") and self.base.startswith("pretrained")
        return Arm("stage1", self.base, seed=self.seed) if own else None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks whose examples it sees."""
        if self.task in TASKS:
            return tuple(TASKS[self.task].mixture) or (self.task,)
        return ("se",) if self.task == "direct" else (self.task,)

    def settings(self, lab: Lab) -> TrainSettings:
        """How it is trained."""
        return lab.settings(self.budget(lab), self.seed, lab.pretraining_lr if self.task == "stage1" else None)

    def budget(self, lab: Lab) -> int:
        """Padded frames it sees (``direct``: each of its two nets, see :func:`direct_tokens`)."""
        if self.task == "stage1":
            return lab.pretraining
        tokens = lab.longer if self.longer else lab.tokens
        return tokens * len(self.tasks) if self.task in TASKS else direct_tokens(lab, tokens)


@functools.lru_cache
def direct_tokens(lab: Lab, tokens: int) -> int:
    """Padded frames of each direct net, so that both together compute what an arm of stage 1 does with ``tokens``.

    Compute is counted as frames times parameters of the transformer (embeddings and outputs are look-ups or small).
    """
    nets: list[Any] = [Stage1(lab.sizes.stage1), Stage2(lab.sizes.stage2_layer1), Stage2(lab.sizes.stage2_full)]
    one, *two = (sum(p.numel() for p in net.diff_estimator.parameters()) for net in nets)
    return round(tokens * one / sum(two))


# ---------------------------------------------------------------- data


def first(
    ids: Sequence[Any], lengths: np.ndarray, *, hours: float | None = None, count: int | None = None
) -> np.ndarray:
    """``lengths [N]`` in frames, 0 for what lies beyond the first ``hours`` or ``count`` in the order of hashed ids.

    The order is the same every time, so a smaller amount is part of any larger one.  Of examples with the same id (of
    one recording) all are taken, and the hours are those of the first.
    """
    usable = np.flatnonzero(lengths).tolist()
    order = np.array(sorted(usable, key=lambda i: hashlib.sha256(str(ids[i]).encode()).hexdigest()), dtype=int)
    taken = order[:count]
    if hours is not None:
        names = [ids[i] for i in taken]
        fresh = np.array([k == 0 or names[k] != names[k - 1] for k in range(len(names))], bool)
        taken = taken[np.cumsum(lengths[taken] * fresh) <= hours * 3600 * FRAME_RATE]
    out = np.zeros_like(lengths)
    out[taken] = lengths[taken]
    return out


def hours_of(ids: Sequence[Any], lengths: np.ndarray) -> float:
    """Hours of the recordings that are used, each once, however many examples were made of it."""
    frames = {ids[i]: int(lengths[i]) for i in np.flatnonzero(lengths).tolist()}
    return sum(frames.values()) / FRAME_RATE / 3600


@functools.lru_cache(maxsize=16)
def whole(lab: Lab, task: str, split: str) -> tuple[Any, tuple[Any, ...]]:
    """The source of all examples of a task (of ``stage1``: all recordings), and what tells its items apart."""
    seed = 0 if split == "train" else 1
    job = lab.job(task, passes=lab.passes(task))
    if task == "stage1":
        source: Any = data.Tokens(job.tokens(split))
    else:
        lips = recipes.load_part(lab.system, "lips") if task == "l2s" else None
        source = recipes.task_source(job, split, seed, None if task == "tts" else job.frozen, lips)
    if isinstance(source, data.Tokens):
        return source, tuple(source.shards.record(i)["id"] for i in range(len(source.lengths)))
    return source, tuple(item["id"] for item in source.store.items)


def sources(lab: Lab, arm: Arm, split: str, *, clean: bool = False) -> dict[str, Any]:
    """The sources of an arm's examples by task, restricted to its data; ``validation``: the held-out utterances, of
    all recordings or of the ``clean`` ones, whatever the arm has learned from."""
    found = {}
    for task in arm.tasks:
        kept, ids = whole(lab, task, split)
        found[task] = source = copy.copy(kept)
        if clean or (split == "train" and arm.data == "clean"):
            human = np.array([source.shards.record(i)["human"] for i in range(len(source.lengths))])
            source.lengths = np.where(human, 0, source.lengths)
        if split != "train":
            source.seed = 1  # the same masks for all arms
            source.lengths = first(ids, source.lengths, count=lab.held_out)
            continue
        if task == "stage1" and arm.base == "pretrained-noprompt":
            source.masking = MaskingSettings(prompt_probability=0.0)
        source.seed, source.masking = arm.seed, replace(source.masking, ratio_floor=arm.floor)
        if task != "stage1":
            source.lengths = first(ids, source.lengths, hours=arm.hours)
    return found


def feed_of(lab: Lab, arm: Arm, found: dict[str, Any], settings: TrainSettings) -> Any:
    """The batches of a run; Omni draws its tasks equally often, so that each sees as much as its single arm."""
    if arm.task == "omni":
        return Mixed(found, dict.fromkeys(found, 1.0), settings)
    return data.Feed(found[arm.task], settings)


@dataclass
class Pairs:
    """Prepared examples of enhancement as token shards for stage 2: SSL tokens of the *noisy* speech, clean codes."""

    store: FlatStore
    shards: Any
    at: list[int]
    codec: SemanticCodec
    known: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ends = np.array([len(self.at)])

    def lengths(self) -> np.ndarray:
        """Frames of every example; 0 where the recording is not that of the example."""
        same = [self.at[j] >= 0 and np.array_equal(self.shards[self.at[j]][1][: self.store.length(j), 0],
                                                   self.store[j][:, 0]) for j in range(len(self.at))]  # fmt: skip
        return np.where(same, self.store.ends - self.store.starts, 0)

    def record(self, j: int) -> dict[str, Any]:
        """The recording's row."""
        return self.shards.record(self.at[j])

    def __getitem__(self, j: int) -> tuple[dict[str, Any], np.ndarray]:
        if j not in self.known:
            bits = np.ascontiguousarray(self.store[j][:, 1:])
            features = torch.from_numpy(bits).view(torch.float16).float()
            with torch.no_grad():
                noisy = self.codec.quantize(features[None])[0][0].numpy()
            codes = self.shards[self.at[j]][1][: len(noisy), 1:]
            self.known[j] = np.concatenate([noisy[:, None], codes], axis=1).astype(np.int32)
        return {}, self.known[j]


def pairs(lab: Lab, split: str) -> Pairs:
    """The examples of enhancement with the acoustic codes of their recordings."""
    made, _ = whole(lab, "se", split)
    codec, shards = lab.job("se").frozen.semantic, lab.job("stage2_full").tokens(split)
    assert codec is not None
    known = {shards.record(i)["id"]: i for i in range(len(shards))}
    return Pairs(made.store, shards, [known.get(item["id"], -1) for item in made.store.items], codec)


# ---------------------------------------------------------------- training


def build(lab: Lab, arm: Arm) -> tuple[Stage1, dict[str, Tensor], TaskConfig]:
    """The model of an arm, the weights it begins from and the task's configuration.

    With and without pre-training the nets are the same, and so are the first values of what the task adds.
    """
    torch.manual_seed(arm.seed)
    base = Stage1(lab.sizes.stage1).state_dict()
    if arm.needs:
        folder = lab.home / "systems" / arm.needs.id / "stage1"
        if result_of(lab, arm.needs) is None or not (folder / "config.json").is_file():
            raise MetisError(f"{arm.id} begins from {arm.needs.id}, which is not trained yet")
        base = load_state(folder)
    elif arm.base == "system":
        base = load_state(lab.system / "stage1")
    entry = TASKS[arm.task]
    hint = {"text_hint": "even"} if entry.takes_text else {}
    changes = entry.changes(lab.sizes, phone_vocab=PhoneTokenizer().size, **hint)
    config = TaskConfig(arm.task, changes, arm.rank, apart=bool({"vc", "tse"} & set(arm.tasks)))
    torch.manual_seed(arm.seed + 1)
    return gen.task_model(lab.sizes.stage1, base, config, 0.0), base, config


def key_of(lab: Lab, arm: Arm) -> str:
    """Hash of all that an arm's result depends on."""
    parts = ["ssl", "semantic_codec"] + ["lips"] * (arm.task == "l2s")
    parts += ["stage1"] * (arm.task in TASKS and arm.base == "system")
    parts += ["stage2_layer1", "stage2_full", "acoustic_codec"] * (arm.task == "direct")
    about = {name: once(system_hash, lab.system / name) for name in parts}
    settings = [asdict(arm.settings(lab)), lab.held_out, lab.pretraining]
    given = [{task: lab.passes(task) for task in arm.tasks}, once(record.sha256_file, lab.manifest)]
    return record.sha256_of([asdict(arm), settings, about, given, code("models", "tasks.py", "training")])


def result_of(lab: Lab, arm: Arm) -> dict[str, Any] | None:
    """What was measured of an arm, or None where it is not finished or was made otherwise."""
    found = record.read_json(lab.home / "arms" / f"{arm.id}.json")
    return found if found and found["key"] == key_of(lab, arm) else None


def train(
    lab: Lab, arm: Arm, *, budget: str | None = None, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any] | None:
    """Train and measure an arm; it goes on where it was cut off.

    Returns:
        The result, which is also written to ``home/arms/ID.json``; None where the budget or a signal ended it before.

    Raises:
        MetisError: parts of the system or the base are missing, and what ``fit`` raises.
    """
    key, settings = key_of(lab, arm), arm.settings(lab)
    run, place = lab.home / "runs" / f"{arm.id}-{key[:8]}", lab.home / "systems" / arm.id
    shutil.rmtree(place, ignore_errors=True)
    if arm.task == "direct":
        done = _direct(lab, arm, settings, run, place, budget, say)
    else:
        done = _stage1(lab, arm, settings, run, place, budget, say)
    if done is None:
        return None
    found = {"id": arm.id, **asdict(arm), "tokens": settings.steps * settings.frames, **done, "key": key}
    record.write_json(lab.home / "arms" / f"{arm.id}.json", found)
    shutil.rmtree(run, ignore_errors=True)
    return found


def _stage1(
    lab: Lab, arm: Arm, settings: TrainSettings, run: Path, place: Path, budget: str | None, say: Any
) -> dict[str, Any] | None:
    if arm.task == "stage1":
        torch.manual_seed(arm.seed)
        model, trained = Stage1(lab.sizes.stage1), None
    else:
        model, base, config = build(lab, arm)
        trained = gen.choose_trained(model, base, "lora" if arm.rank else "full")
    given = sources(lab, arm, "train")
    scores = fit(gen.Stage1Training(model), feed_of(lab, arm, given, settings), settings, run, budget=budget, say=say)
    if not scores["finished"]:
        return None
    measured = {
        task: held_out(model, source, lab.precision) for task, source in sources(lab, arm, "validation").items()
    }
    if arm.task == "tts":  # most utterances are human: an arm that learned from clean ones alone is judged on such
        alone = held_out(model, sources(lab, arm, "validation", clean=True)["tts"], lab.precision)
        measured["tts"] |= {f"{name}_clean": values for name, values in alone.items()}
    if arm.task == "stage1":
        save_part(place / "stage1", model, lab.sizes.stage1, dtype=torch.float32)
    elif not arm.rank and arm.hours == lab.hours[1] and arm.task in ("se", "tse", "omni"):  # decoded later
        save_part(place / "tasks" / arm.task, gen.task_state(model, base, full=True), config)
    amounts = {task: round(hours_of(whole(lab, task, "train")[1], source.lengths), 4) for task, source in given.items()}
    return {
        "trained": trained or sum(p.numel() for p in model.parameters()), "seconds": scores["seconds"],
        "frames_seen": scores["frames"], "skipped": scores["skipped"], "hours_used": amounts, "held_out": measured,
    }  # fmt: skip


def _direct(
    lab: Lab, arm: Arm, settings: TrainSettings, run: Path, place: Path, budget: str | None, say: Any
) -> dict[str, Any] | None:
    """Both nets of stage 2 go on from the system's own, now given what the noisy speech sounds like."""
    masking, amount, total = MaskingSettings(prompt_probability=0.0), 0.0, 0.0
    shards = pairs(lab, "train")
    for name in ("stage2_layer1", "stage2_full"):
        config = load_config_and_card(lab.system / name, Stage2Config)[0]
        objective = gen.Stage2Training(config)
        fill(objective.model, load_state(lab.system / name), lab.system / name)
        weights = objective.model.layer_weights().tolist()
        source = data.Tokens(shards, masking, layer_weights=weights, seed=arm.seed)  # type: ignore[arg-type]
        ids = [item["id"] for item in shards.store.items]
        source.lengths = first(ids, source.lengths, hours=arm.hours)
        scores = fit(objective, data.Feed(source, settings), settings, run / name, budget=budget, say=say)
        if not scores["finished"]:
            return None
        save_part(place / name, objective.model, config)
        total, amount = total + scores["seconds"], hours_of(ids, source.lengths)
    return {"seconds": total, "hours_used": {"se": round(amount, 4)}, "held_out": {}}


# ---------------------------------------------------------------- what is measured


def nats(model: Stage1, batch: dict[str, Any], hidden: Tensor, t: Tensor, told: bool = True) -> Tensor:
    """Cross-entropy of the hidden tokens of each utterance ``[B]``, in nats a token."""
    given = ("phones", "phone_mask", "hint", "condition") if told else ()
    out = model(batch["tokens"], hidden, t, mask=gen.exists(batch), **{key: batch.get(key) for key in given})
    loss = F.cross_entropy(model.to_logit(out).float().transpose(1, 2), batch["tokens"], reduction="none")
    return (loss * hidden).sum(1) / hidden.sum(1)


@torch.no_grad()
def held_out(model: Stage1, source: Any, precision: str = "32-true") -> dict[str, list[float]]:
    """Of each held-out utterance, in the order of the source: cross-entropy in nats a token; in ``precision``.

    ``told``: everything after the prompt hidden, with the condition; ``untold``: without it; ``random``: under random
    masks, with the condition.  The prompt is the example's own; of text-to-speech and pre-training, the first quarter.
    """
    items = np.flatnonzero(source.lengths)
    found: dict[str, np.ndarray] = {name: np.zeros(len(source.lengths)) for name in ("told", "untold", "random")}
    objective: Objective = gen.Stage1Training(model).eval()
    device = next(objective.parameters()).device
    half = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
    for some in data.batches_of(items[np.argsort(source.lengths[items], kind="stable")], source.lengths, 4000):
        for epoch in range(DRAWS):
            made = source.batch(some, epoch=epoch, step=0)
            batch = gen.encode({k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}, None)
            with half():
                found["random"][some] += nats(model, batch, batch["hidden"], batch["t"]).cpu().numpy() / DRAWS
        start = batch["prompt"] if "condition" in batch else (batch["lengths"] * QUARTER).long()
        later = torch.arange(batch["tokens"].shape[1], device=device)[None] >= start[:, None]
        ones, hidden = torch.ones_like(batch["t"]), gen.exists(batch) & later
        for name in ("told", "untold"):
            with half():
                found[name][some] = nats(model, batch, hidden, ones, name == "told").cpu().numpy()
    return {name: [round(float(x), 5) for x in values[items]] for name, values in found.items()}
