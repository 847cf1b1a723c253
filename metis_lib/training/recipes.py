"""How every part of a system is trained: what it reads, what its weights are called, where they go.

``train(Job(...))`` is behind ``metis train part``, ``metis train finetune`` and the queue of ``recipes/nano``.
A job works in a system's folder: it reads the parts that earlier jobs left there and writes its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from metis_lib.assets import sha256_file
from metis_lib.checkpoints import TaskConfig, fill, load_config_and_card, load_state, locate, save_part, system_hash
from metis_lib.config import FRAME_RATE, DecodeSettings, Stage1Config, Stage2Config, SystemConfig, from_dict
from metis_lib.data.examples import Pool, Simulation, Sources
from metis_lib.data.perturb import Perturb, VoiceShift
from metis_lib.data.shards import LIMITS, Shards, tokenise
from metis_lib.data.simulate import Degradation, Prompt, Rooms
from metis_lib.data.store import UNKNOWN, FlatStore, read_manifest, write_text
from metis_lib.errors import MetisError
from metis_lib.models import adapt
from metis_lib.models.discriminators import NANO, DiscriminatorConfig
from metis_lib.models.masked import MaskingSettings
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.stores import PARTS, phone_head, phone_table, sizes
from metis_lib.tasks import TASKS, like, own, task
from metis_lib.tokenizers.lips import LipEncoder
from metis_lib.tokenizers.text import VOICES, PhoneTokenizer
from metis_lib.training import data
from metis_lib.training import generative as gen
from metis_lib.training import tokenizers as tok
from metis_lib.training.durations import time_phones
from metis_lib.training.loop import Objective, TrainSettings, fit, make_fabric
from metis_lib.training.prepared import Mixed, Prepared, Voices, prepare
from metis_lib.training.teacher import ASSET, WIDTH, Taught, teach

FOLDERS = {"semantic": "semantic_codec", "acoustic": "acoustic_codec"} | {name: f"tasks/{name}" for name in TASKS}
"""Folder of a part below a system's, where it is not the part's name."""
OFTEN = 30
"""Readings of the same recordings beyond which fine-tuning loses what it had learned (docs/claims.md: 29 did)."""


def settings_for(model: str, preset_name: str, **changes: Any) -> TrainSettings:
    """The preset's settings of a model (``settings.json``: the paper's where it states them), with changes."""
    table = json.loads(Path(__file__).with_name("settings.json").read_text())
    if preset_name not in table:
        raise MetisError(f"no training settings for the preset {preset_name!r}; choose one of {', '.join(table)}")
    chosen = {**table[preset_name][""], **table[preset_name].get(model, {}), **changes}
    if "steps" in changes and "warmup" not in changes:  # else few steps would never come to the learning rate
        chosen["warmup"] = min(chosen.get("warmup", TrainSettings.warmup), max(chosen["steps"] // 5, 0))
    chosen.pop("options", None)
    if "betas" in chosen:
        chosen["betas"] = tuple(chosen["betas"])
    unknown = sorted(set(chosen) - {f.name for f in dataclasses.fields(TrainSettings)})
    if unknown:
        raise MetisError(f"unknown training settings: {', '.join(unknown)}")
    if min(chosen.get("steps", 1), chosen["frames"], chosen.get("accumulate", 1)) < 1:
        raise MetisError("steps, frames and accumulate must be at least 1")
    if min(chosen.get("seed", 0), chosen.get("warmup", 0), chosen.get("lr", 1)) < 0:
        raise MetisError("seed, warmup and lr must not be negative")
    return TrainSettings(**chosen)


def scale_of(system: SystemConfig) -> str:
    """The preset that a system is nearest to in size: ``nano`` or ``paper``."""
    return "paper" if system.stage1.hidden_size >= 1024 else "nano"


def options_for(model: str, preset_name: str) -> dict[str, Any]:
    """The preset's options of a model's builder."""
    table = json.loads(Path(__file__).with_name("settings.json").read_text())
    return dict(table.get(preset_name, {}).get(model, {}).get("options", {}))


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        model: a key of :data:`BUILD`.
        system: the sizes of all parts.
        out: the system's folder.
        settings: of the loop.
        manifest: of the recordings (24 kHz or any rate), with splits; the corpus's noise and rooms lie beside it.
        shards: folder of token shards, with a sub-folder for each split; made from the manifest where not given.
        mode, rank: of a task: ``full``, ``lora`` or ``adapter``; the rank of its LoRA.
        options: of a model, by name (see the builders).
        workers: processes that prepare batches.
        check: held-out batches that validation takes.
        about: facts for the card (data, licence, notes).
        device: where frozen encoders prepare examples; :func:`train` sets its own (else CUDA where there is one).
    """

    model: str
    system: SystemConfig
    out: Path
    settings: TrainSettings
    manifest: Path | None = None
    shards: Path | None = None
    mode: str = "lora"
    rank: int = 16
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    check: int = 6
    about: dict[str, Any] = field(default_factory=dict)
    device: str = ""

    @property
    def folder(self) -> Path:
        """Where the part goes."""
        return self.out / FOLDERS.get(self.model, self.model)

    @property
    def chosen(self) -> dict[str, Any]:
        """All options of the model; MetisError names what it does not know or cannot use."""
        known = OPTIONS[self.model]
        for name, value in self.options.items():
            if name not in known:
                raise MetisError(f"{self.model} has no option {name!r}; it has: {', '.join(known) or 'none'}")
            if isinstance(value, str) != isinstance(known[name], str) and value is not None:
                raise MetisError(f"the option {name} of {self.model} must not be {value!r}")
        return {**known, **self.options}

    @property
    def recordings(self) -> Path:
        """The manifest; MetisError where none was given."""
        if self.manifest is None:
            raise MetisError(f"training {self.model} needs recordings: give a manifest (metis prepare manifest)")
        return self.manifest

    @cached_property
    def frozen(self) -> tok.Frozen:
        """SSL encoder, and semantic codec where there is one, of the system's folder."""
        encoder = load_part(self.out, "ssl")
        encoder.set_stats(**load_state(self.out / "ssl", "stats"))
        made = (self.out / "semantic_codec" / "config.json").is_file() and self.model != "semantic"
        return tok.Frozen(encoder, load_part(self.out, "semantic") if made else None)

    @property
    def voice(self) -> Callable[[Any], Any] | None:
        """SSL tokens ``[1, T]`` to samples ``[S]`` by stage 2 and codec, where the folder has them."""
        nets = ("stage2_layer1", "stage2_full", "acoustic")
        if not all((self.out / PARTS[part][2] / "config.json").is_file() for part in nets):
            return None
        first, rest, codec = (load_part(self.out, part) for part in nets)

        def speak(tokens: torch.Tensor) -> torch.Tensor:
            generator, tokens = torch.Generator().manual_seed(0), tokens.cpu()
            empty = tokens[:, :0, None].expand(1, 0, codec.config.num_quantizers)
            settings = DecodeSettings(temperature=1.5)
            layer = first.generate(tokens, empty, steps=(10,), settings=settings, generator=generator)
            steps = (10, 5) + (1,) * (codec.config.num_quantizers - 2)
            more = {"steps": steps, "settings": settings, "generator": generator}
            return codec.decode(rest.generate(tokens, empty, first_layer=layer, **more))[0]

        return speak

    def waves(self, split: str) -> FlatStore:
        """The recordings of a split."""
        return data.waves_of(self.recordings, split)

    def sources(self, split: str, pool: Pool | None = None) -> Sources:
        """Noise, rooms and other speakers; only coloured noise where the corpus has none."""
        folder = self.recordings.parent
        if not (folder / "noise.jsonl").is_file():
            return Sources(pool, rooms=Rooms.load(folder) if (folder / "rirs.safetensors").is_file() else None)
        return data.sources_of(self.recordings, split, pool)

    @cached_property
    def phones(self) -> PhoneTokenizer:
        """The phone table that the system's tasks are told texts by."""
        return phone_table(self.out)

    @cached_property
    def phone_head(self) -> torch.nn.Linear:
        """Of the system's SSL encoder."""
        return phone_head(self.out / "ssl")

    def timed(self, split: str) -> dict[str, Any]:
        """Durations of the phones of a split by recording, by the phone head of the system's SSL encoder."""
        name = f"durations-{system_hash(self.out / 'ssl')[:8]}{data.languages_mark()}"
        folder = data.prepared(self.recordings) / name / split
        folder.parent.mkdir(parents=True, exist_ok=True)
        return time_phones(self.waves(split), self.frozen.encoder, self.phone_head, folder)

    def tokens(self, split: str) -> Any:
        """Token shards of a split, made by the system's tokenizers on first use; acoustic codes only for stage 2."""
        if self.shards is not None:
            return Shards(self.shards / split)
        parts = [system_hash(self.out / part)[:8] for part in ("ssl", "semantic_codec", "acoustic_codec")]
        mark = data.languages_mark()
        both = data.prepared(self.recordings) / f"tokens-{'-'.join(parts)}{mark}" / split
        acoustic = self.model.startswith("stage2") or (both / "index.json").is_file()
        folder = both if acoustic else both.parent.with_name(f"tokens-{'-'.join(parts[:2])}{mark}") / split
        if not (folder / "index.json").is_file():  # whole, wherever it was made
            tokenise(self.recordings, folder, system=self.out, split=split, rank=0, world=1, acoustic=acoustic)
        shards, rows = Shards(folder), [row for row in read_manifest(self.recordings) if row.split == split]
        longest = LIMITS["max_seconds"]
        if (left := len(rows) - len(shards)) > 0:
            why = f"{sum(row.duration > longest for row in rows)} of them above {longest:g} s"
            warnings.warn(f"{left} of {len(rows)} recordings of {split} have no tokens, {why}", stacklevel=2)
        return shards


def load_part(system: Path, name: str) -> Any:
    """A part of a system by its name in :data:`~metis_lib.stores.PARTS`, filled."""
    config, cls, at = PARTS[name]
    module = cls(load_config_and_card(system / at, config)[0])
    fill(module, load_state(system / at), system / at)
    return module.eval()


Built = tuple[Objective, Any, Callable[[], dict[str, Any]]]
"""The objective, the source of its batches, and what is to be saved: arguments of :func:`save_part`."""


def _check(job: Job, source: Any) -> list[Any]:
    settings = replace(job.settings, frames=min(job.settings.frames, 3000), seed=1)
    return (source if isinstance(source, Mixed) else data.Feed(source, settings)).held_out(job.check)


def _ssl(job: Job) -> Built:
    """Options: ``ctc`` (weight, 0 for none), ``noisy`` (part heard degraded), ``longest`` (frames), ``hidden``
    (share of the frames), ``teacher`` (``none`` or ``moonshine``)."""
    o = job.chosen
    if o["teacher"] not in ("none", ASSET):
        raise MetisError(f"unknown teacher {o['teacher']!r}; choose none or {ASSET}")
    taught: dict[str, Taught | None] = {"train": None, "validation": None}
    for split in taught if o["teacher"] == ASSET else ():
        folder = data.prepared(job.recordings) / f"{ASSET}-{split}"
        taught[split] = teach(job.waves(split), folder, taught["train"])
    sources = job.sources("train") if o["noisy"] else None
    source = data.Speech(
        job.waves("train"), sources, o["noisy"], o["longest"], job.settings.seed, o["hidden"], taught["train"]
    )
    held_out = data.Speech(job.waves("validation"), longest=600, share=o["hidden"], taught=taught["validation"])
    objective = tok.SSLTraining(
        job.system.ssl, phones=PhoneTokenizer().size, ctc=o["ctc"], taught=WIDTH if taught["train"] else 0,
        check=_check(job, held_out),
    )  # fmt: skip

    def saved() -> dict[str, Any]:
        feed = data.Feed(source, replace(job.settings, frames=6000))
        tok.set_statistics(objective.encoder, feed.held_out(20))
        save_part(job.folder, objective.encoder.stats_state(), job.system.ssl, name="stats")
        save_part(job.folder, objective.heads.phones, job.system.ssl, name="phones")
        return {"state": objective.encoder, "config": job.system.ssl}

    return objective, source, saved


def _semantic(job: Job) -> Built:
    source = data.Speech(job.waves("train"), None, 0.0, job.chosen["longest"], job.settings.seed)
    held_out = data.Speech(job.waves("validation"), longest=600)
    weight = job.chosen["phones"]
    head = job.phone_head if weight and (job.out / "ssl" / "phones.safetensors").is_file() else None
    objective = tok.SemanticTraining(
        job.system.semantic, job.frozen, head=head, phones=weight, sound=job.chosen["sound"],
        follow=job.chosen["follow"], check=_check(job, held_out),
    )  # fmt: skip
    return objective, source, lambda: {"state": objective.codec, "config": job.system.semantic}


def _acoustic(job: Job) -> Built:
    """Options: ``seconds`` of a crop, ``convergence`` (weight), ``adversarial_from`` (step; None: never),
    ``discriminators`` (``nano`` or ``paper``), ``fit_every`` (steps between fits of the codebooks by k-means; None:
    none), ``follow`` (as of the semantic one), ``decoder_only`` (encoder and quantiser stay, so do the tokens),
    ``dropout`` (of layers, in place of the configuration's: share, fewest, most)."""
    o = job.chosen
    frames = max(1, round(o["seconds"] * 50))
    source = data.Crops(job.waves("train"), frames, job.settings.seed)
    held_out = _check(job, data.Crops(job.waves("validation"), 4 * frames, 1))
    critics = None
    if o["adversarial_from"] is not None:
        critics = NANO if o["discriminators"] == "nano" else DiscriminatorConfig()
    objective = tok.AcousticTraining(
        job.system.acoustic, discriminators=critics, adversarial_from=o["adversarial_from"] or 0,
        convergence=o["convergence"], decoder_only=o["decoder_only"], fit_every=o["fit_every"],
        follow=o["follow"], dropout=o["dropout"], check=held_out,
    )  # fmt: skip
    return objective, source, lambda: {"state": objective.codec, "config": job.system.acoustic}


def _stage1(job: Job) -> Built:
    """Options: ``floor`` (least mask ratio; 0.2 in the released code), ``prompt`` (how often there is one; 0.85 in the
    released code), ``prompt_longest`` (its largest share of an utterance), ``longest``."""
    o, longest = job.chosen, job.chosen["longest"]
    masking = MaskingSettings(o["prompt"], o["prompt_longest"], o["floor"])
    source = data.Tokens(job.tokens("train"), masking, longest=longest, seed=job.settings.seed)
    check = _check(job, data.Tokens(job.tokens("validation"), masking, seed=1))
    objective = gen.Stage1Training(Stage1(job.system.stage1), check=check, voice=job.voice)
    return objective, source, lambda: {"state": objective.model, "config": job.system.stage1}


def _stage2(job: Job) -> Built:
    """Options: ``longest`` (frames), ``joined`` (share of the recordings that another one of the speaker is the prompt
    of, in place of their own beginning)."""
    config: Stage2Config = getattr(job.system, job.model)
    weights = Stage2(config).layer_weights().tolist()
    made = {
        split: data.Tokens(
            job.tokens(split), gen.STAGE2_MASKING, layer_weights=weights, longest=job.chosen["longest"], seed=seed,
            joined=share,
        )
        for split, seed, share in (("train", job.settings.seed, job.chosen["joined"]), ("validation", 1, 0.0))
    }  # fmt: skip
    if made["train"].shards[0][1].shape[1] <= config.num_quantizers:
        raise MetisError("these token shards hold no acoustic codes; make them without --no-acoustic")
    objective = gen.Stage2Training(config, check=_check(job, made["validation"])[: max(1, job.check // 2)])
    return objective, made["train"], lambda: {"state": objective.model, "config": config}


def _lips(job: Job) -> Built:
    """Options: ``longest`` (frames): longer recordings are left out."""
    made = {
        split: data.Lips(job.waves(split), longest=job.chosen["longest"], seed=seed)
        for split, seed in (("train", job.settings.seed), ("validation", 1))
    }
    objective = tok.LipTraining(job.system.lips, phones=PhoneTokenizer().size, check=_check(job, made["validation"]))
    return objective, made["train"], lambda: {"state": objective.encoder, "config": job.system.lips}


def _task(job: Job) -> Built:
    """Options: ``text_hint`` (``even``, ``timed``), ``longest`` (frames), ``audio`` (targets from audio, not from token
    shards), ``passes`` (examples made once, so many of each recording, below 1 of a share of them; 0: made anew),
    ``dropout`` (before LoRA), ``joined`` (share of the texts that are said after another recording of the speaker),
    ``begin`` (trained tasks of the system, such as ``vc+tts``, whose weights it begins with where they fit; of what
    several have, the last one's)."""
    entry, o = task(job.model), job.chosen
    told = o["text_hint"] != "none" and entry.takes_text
    hint = {"text_hint": o["text_hint"], "hint_width": o["hint_width"]} if told else {}
    changes = entry.changes(job.system, phone_vocab=job.phones.size, **hint)
    apart = bool(o["passes"]) and bool({"vc", "tse"} & set(entry.mixture or (job.model,)))
    config = TaskConfig(job.model, changes, job.rank if job.mode == "lora" else 0, apart)
    base, (base_config, _) = load_state(job.out / "stage1"), load_config_and_card(job.out / "stage1", Stage1Config)
    model = gen.task_model(base_config, base, config, o["dropout"])
    gen.choose_trained(model, base, job.mode)
    texts = job.model == "tts" and (job.shards is not None or not o["audio"])
    frozen = None if texts else job.frozen
    lips = load_part(job.out, "lips") if entry.takes_video else None
    for name in o["begin"].split("+") if o["begin"] else ():
        if name not in TASKS or not (job.out / FOLDERS[name] / "config.json").is_file():
            raise MetisError(f"{job.model} cannot begin with {name!r}: {job.out} has no such trained task")
        of = load_config_and_card(job.out / FOLDERS[name], TaskConfig)[1].get("mode", "lora")
        if (of == "full") != (job.mode == "full"):  # what it learned besides LoRA would not be saved with this one
            raise MetisError(f"{job.model} cannot begin with {name!r}, whose mode is {of}, in the mode {job.mode}")
    made: dict[str, Any] = {}
    for split, seed in (("train", job.settings.seed), ("validation", 1)):
        made[split] = task_source(job, split, seed, frozen, lips)
    check = _check(replace(job, check=4 * job.check) if job.model == "omni" else job, made["validation"])
    objective = gen.Stage1Training(model, frozen=frozen, lips=lips, check=check, voice=job.voice)
    full = job.mode == "full"
    return objective, made["train"], lambda: {"state": gen.task_state(model, base, full=full), "config": config}


def unchanged(wav: Any, generator: Any) -> Any:
    """A perturbation that perturbs nothing."""
    return wav


def simulation(given: dict[str, Any]) -> Simulation:
    """The paper's numbers of simulated examples but for those ``given``, as ``{"se": {"snr_db": [0, 20]}}``."""
    try:
        made = from_dict(Simulation, given)
        if isinstance(worse := made.tse.degradation, dict):
            made = replace(made, tse=replace(made.tse, degradation=from_dict(Degradation, worse)))
    except (TypeError, ValueError, AttributeError) as error:
        raise MetisError(f"the option simulate is not as {{'se': {{'snr_db': [0, 20]}}}}: {error}") from error
    return made


def changer(name: str) -> Perturb:
    """What changes voices for conversion: ``package.module:callable``, or by default Praat's shift."""
    module, _, call = name.partition(":")
    try:
        found: Perturb = getattr(importlib.import_module(module), call) if name else VoiceShift()
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise MetisError(f"the option perturb is package.module:callable, and {name!r} is none ({error})") from error


def task_source(job: Job, split: str, seed: int, frozen: tok.Frozen | None, lips: LipEncoder | None) -> Any:
    """What a task's batches of a split come from: a source, or a feed of several."""
    entry, o = task(job.model), job.chosen
    longest = o["longest"]
    drop = entry.condition_dropout if split == "train" else 0.0

    def spoken() -> data.Tokens:
        timed = job.timed(split) if o["text_hint"] == "timed" else None
        return data.Tokens(
            job.tokens(split), entry.masking, text=True, dropout=drop, longest=longest, seed=seed, timed=timed,
            joined=o["joined"] if split == "train" else 0.0, tokenizer=job.phones,
        )  # fmt: skip

    def simulated(odds: dict[str, float], **changes: Any) -> Any:
        if entry.takes_video:
            return data.Lips(job.waves(split), changes.get("masking", entry.masking), longest, seed)
        pool = Pool(job.waves(split))
        shards = job.tokens(split) if not o["audio"] else None
        around = replace(job.sources(split, pool), perturb=changer(o["perturb"]))
        given: dict[str, Any] = {"sources": around, "params": params, "masking": entry.masking, **changes}
        given |= {"shards": shards, "tokenizer": job.phones}
        return data.Adaptation(pool, odds=odds, dropout=drop, longest=longest, seed=seed, **given)

    if frozen is None:
        return spoken()
    params = simulation(o["simulate"])
    odds = entry.mixture or {job.model: 1.0}
    if not o["passes"]:
        return simulated(odds)

    def examples(name: str, source: Any, passes: float, *parts: str) -> FlatStore:
        made_by = "-".join(system_hash(job.out / part)[:8] for part in ("ssl", "semantic_codec", *parts))
        if name in ("se", "tse", *own()):
            around = (job.recordings.parent / file for file in ("noise.jsonl", "rirs.safetensors"))
            hashes = "".join(sha256_file(file) for file in around if file.is_file())
            made_by += f"-{hashlib.sha256(hashes.encode()).hexdigest()[:8]}" if hashes else ""
        if name != "clean" and (o["simulate"] or o["perturb"]):
            changed = json.dumps([o["simulate"], o["perturb"]], sort_keys=True)
            made_by += f"-{hashlib.sha256(changed.encode()).hexdigest()[:8]}"
        folder = data.prepared(job.recordings) / f"examples-{name}-{passes}-{longest}-{made_by}" / split
        folder.parent.mkdir(parents=True, exist_ok=True)
        device = job.device or ("cuda" if torch.cuda.is_available() else "cpu")

        def encoded(batch: data.Batch) -> data.Batch:
            moved = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
            return gen.encode(moved, frozen, lips)

        return prepare(source, encoded, folder, passes=passes, workers=job.workers)

    # Prompts are drawn for every batch, so nothing of an example is one.
    whole = replace(params, vc=Prompt(p=0.0), tse=replace(params.tse, prompt=Prompt(p=0.0)))
    silent = replace(entry.masking, prompt_probability=0.0)
    voices = None
    if prompted := {"vc", "tse", "l2s"} & set(odds):
        waves = job.waves(split)
        same = Sources(perturb=unchanged)  # a conversion that changes nothing: clean speech is the condition
        shards = job.tokens(split) if not o["audio"] else None
        clean = data.Adaptation(Pool(waves), same, {"vc": 1.0}, whole, shards=shards, longest=longest, seed=seed)
        voices = Voices(examples("clean", clean, 1), {item["id"]: item["speaker"] for item in waves.items})
    sources: dict[str, Any] = {}
    for name in odds:
        if name == "tts":
            sources[name] = spoken()
            continue
        source = simulated({name: 1.0}, params=whole, masking=silent) if name in prompted else simulated({name: 1.0})
        store = examples(name, source, o["passes"] if split == "train" else 1, *(("lips",) if lips else ()))
        free = drop if like(name) in ("vc", "tse") else 0.0
        sources[name] = Prepared(
            store, name, entry.masking, free, seed, voices if name in prompted else None, entry.takes_video
        )
    return sources[job.model] if len(sources) == 1 else Mixed(sources, odds, job.settings)


OPTIONS: dict[str, dict[str, Any]] = {
    "ssl": {"ctc": 1.0, "noisy": 0.3, "longest": 300, "hidden": 0.35, "teacher": "none"},
    "semantic": {"longest": 300, "phones": 0.0, "sound": 0.0, "follow": 0.0},
    "acoustic": {
        "seconds": 0.6, "convergence": 5.0, "adversarial_from": None, "discriminators": "nano", "decoder_only": False,
        "fit_every": None, "follow": 0.0, "dropout": None,
    },
    "stage1": {"floor": 0.0, "prompt": 0.8, "prompt_longest": 0.4, "longest": 600},
    **dict.fromkeys(("stage2_layer1", "stage2_full"), {"longest": 600, "joined": 0.0}),
    "lips": {"longest": 300},
    **{name: {
        "longest": 300 if entry.takes_video else 600, "text_hint": "none", "hint_width": 0, "audio": False,
        "passes": 0, "dropout": 0.01, "joined": 0.0, "begin": "", "simulate": {}, "perturb": "",
    } for name, entry in TASKS.items()},
}  # fmt: skip
"""What each model's builder can be told, with what holds otherwise."""


BUILD: dict[str, Callable[[Job], Built]] = {
    "acoustic": _acoustic, "ssl": _ssl, "semantic": _semantic, "stage1": _stage1, "stage2_layer1": _stage2,
    "stage2_full": _stage2, "lips": _lips,
}  # fmt: skip
BUILD |= dict.fromkeys(TASKS, _task)
"""In the order in which they depend on each other."""


def _warm(job: Job, objective: Any) -> dict[str, Any]:
    """Load the part's weights where the folder has them (bf16 will do); what its card says, or {}.

    A task that has none yet begins with those of others (option ``begin``), where shapes are alike.
    """

    def learned(folder: Path) -> dict[str, torch.Tensor]:
        state = load_state(folder)
        if job.rank and job.mode == "lora":  # what was learned at another rank, as far as this one can say it
            state = adapt.fit_lora(state, job.rank)
        return {k.removeprefix("model."): v for k, v in state.items()}

    if not (job.folder / "config.json").is_file():
        for name in filter(None, (job.chosen.get("begin") or "").split("+")):
            shapes = {k: v.shape for k, v in objective.model.state_dict().items()}
            have = {k: v for k, v in learned(job.out / f"tasks/{name}").items() if shapes.get(k) == v.shape}
            objective.model.load_state_dict(have, strict=False)
        return {}
    document = json.loads((job.folder / "config.json").read_text())
    if job.model in TASKS:
        have = learned(job.folder)
        shapes = {k: v.shape for k, v in objective.model.state_dict().items()}
        wrong = [k for k, v in have.items() if shapes.get(k) != v.shape]
        if wrong or document["card"].get("mode", job.mode) != job.mode:
            raise MetisError(f"{job.folder} was trained in another mode, size or rank; take another --out")
        objective.model.load_state_dict(have, strict=False)
    else:
        nets = [m for name, m in objective.named_children() if name in ("encoder", "codec", "model")]
        fill(nets[0], load_state(job.folder), job.folder)
    return document["card"]


def train(
    job: Job, *, budget: str | None = None, resume: bool = True, first: int = 0, device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Train one part into its system's folder; it goes on from the part's weights where there are any.

    Args:
        budget: time after which it stops with a state, such as ``100m``.
        resume: go on with the run that was stopped; False begins a new one from the weights.
        first: steps that a run has behind it whose state is lost (the weights alone are left).
        device: of Fabric.

    Returns:
        What :func:`~metis_lib.training.loop.fit` returns.

    Raises:
        MetisError: an unknown model, data or earlier parts that are missing, and what ``fit`` raises.
    """
    if job.model not in BUILD:
        raise MetisError(f"cannot train {job.model!r}; choose one of {', '.join(BUILD)}")
    fabric = make_fabric(job.settings, device=device)
    job = replace(job, device=str(fabric.device))
    if fabric.world_size > 1 and fabric.global_rank:  # the first process prepares what is missing
        fabric.barrier("prepared")
    torch.manual_seed(job.settings.seed)
    objective, source, saved = BUILD[job.model](job)
    if fabric.world_size > 1 and not fabric.global_rank:
        fabric.barrier("prepared")
    before, run = _warm(job, objective), job.out / "runs" / job.model
    if fabric.is_global_zero:
        if not resume:
            shutil.rmtree(run, ignore_errors=True)
        if (run / "finished").is_file():
            raise MetisError(f"{run} is finished; to train on from its weights say --fresh, or take another folder")
    fabric.barrier()
    about = json.loads(json.dumps({"data": data_of(job), "mode": job.mode, "rank": job.rank, "options": job.options}))
    beside = run / "data.json"
    began = json.loads(beside.read_text(encoding="utf-8")) if (run / "states").is_dir() and beside.is_file() else about
    changed = [f"{key} {began.get(key)} -> {value}" for key, value in about.items() if began.get(key) != value]
    fabric.barrier()
    if fabric.is_global_zero:
        if changed:
            say(f"goes on with others: {', '.join(changed)}; the best weights are chosen anew")
        write_text(beside, json.dumps(about))
    scores = fit(
        objective, source if isinstance(source, Mixed) else data.Feed(source, job.settings, workers=job.workers),
        job.settings, run, fabric=fabric, budget=budget, first=first, forget_best=bool(changed), say=say,
    )  # fmt: skip
    if fabric.is_global_zero:
        done = saved()
        earlier = before.get("earlier", []) + ([before["scores"]] if before.get("scores", {}).get("finished") else [])
        facts = {**job.about, "mode": job.mode, "options": job.options, **({"earlier": earlier} if earlier else {})}
        save_part(
            job.folder, done["state"], done["config"],
            {"scores": scores, "settings": dataclasses.asdict(job.settings), **facts},
        )  # fmt: skip
    fabric.barrier()
    if scores["finished"] and fabric.is_global_zero:  # the next run begins from the weights
        (run / "finished").touch()
        shutil.rmtree(run / "states", ignore_errors=True)
    return scores


def data_of(job: Job) -> str:
    """What tells the recordings of a run from others: their prepared folder, or a hash of the shards' index."""
    if job.shards is None:
        return data.prepared(job.recordings).name
    index = job.shards / "train" / "index.json"
    return sha256_file(index)[:12] if index.is_file() else str(job.shards)


def derive(base: str | Path, out: Path) -> SystemConfig:
    """A new system folder that has all parts of ``base``, weights linked where that goes, the rest copied: people edit
    it; returns its sizes.

    Raises:
        MetisError: ``out`` has parts of another base.
    """
    source, parts = locate(base), {FOLDERS.get(name, name).split("/")[0] for name in BUILD}
    for part in ("ssl", "semantic_codec", "acoustic_codec", "stage1"):
        mine, theirs = (root / part / "model.safetensors" for root in (out, source))
        if not (mine.is_file() and theirs.is_file()) or mine.samefile(theirs):
            continue
        if sha256_file(mine) != sha256_file(theirs):
            raise MetisError(f"{out} has the {part} of another system than {base}; take another --out")
    beside = [source / name for name in ("decode.json", "vocab.json")]
    for path in sorted(file for part in (*map(source.joinpath, parts), *beside) for file in (part, *part.rglob("*"))):
        if not path.is_file():
            continue
        target = out / path.relative_to(source)
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix != ".safetensors":
                raise OSError
            os.link(path, target)
        except OSError:
            shutil.copy(path, target.with_name(f".{target.name}.part"))
            os.replace(target.with_name(f".{target.name}.part"), target)
    return sizes(out)


def finetune(
    name: str, source: str | Path, out: str | Path, *, base: str | Path = "nano", mode: str = "lora", rank: int = 16,
    settings: TrainSettings | None = None, shorten: bool | None = None, validate_every: int | None = None,
    keep: str = "best", workers: int = 0, options: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """Adapt a system to a task with recordings of one's own, in a system folder of its own.

    Args:
        name: the task.
        source: a manifest, or anything that ``metis prepare manifest`` reads.
        out: the new system's folder; goes on where it holds the same task already.
        base: ``nano``, or the folder of a system, which stays as it is.
        mode, rank: ``lora`` of that rank, ``full`` or ``adapter``.
        settings: by default the preset's that is nearest in size.
        shorten: take fewer steps than the settings say where these would read the recordings more than 30 times
            (:data:`OFTEN`); by default where no settings are given.
        validate_every: steps between validations, 0: at the end; by default as the settings say where they have
            another number than the preset, else with ``best`` a twentieth of the steps, or ten.
        keep: the ``best`` weights, those with the lowest cross-entropy of held-out recordings, or the ``last`` ones.
        options: of the task, such as ``simulate`` (docs/training.md), beside those that are chosen here.
        more: of :func:`train`: budget, resume, device.

    Returns:
        What :func:`train` returns.  Use the result by ``Metis.from_pretrained(out)``.

    Raises:
        MetisError: unusable recordings, none held out for validation, and what ``train`` raises.
    """
    from metis_lib.data.importers import build_manifest

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MetisError("finetune is one process; for several run `metis train part` in a system's folder")
    if mode == "lora" and rank < 1:
        raise MetisError(f"the rank of LoRA is at least 1, not {rank}")
    if keep not in ("best", "last"):
        raise MetisError(f"keep the 'best' or the 'last' weights, not {keep!r}")
    takes = task(name)  # MetisError for one that there is not
    manifest, out, rank = Path(source), Path(out), rank if mode == "lora" else 0
    try:
        splits = {row.split for row in read_manifest(manifest)} if manifest.suffix == ".jsonl" else set()
    except MetisError:
        head = manifest.read_text(encoding="utf-8").partition("\n")[0] if manifest.is_file() else ""
        if all(f'"{key}"' in head for key in ("id", "duration", "split")):
            raise  # a manifest with something wrong in it, and no list in some other form
        splits = set()
    if not splits:
        manifest = build_manifest(manifest, out / "data", say=say).manifest
        splits = {row.split for row in read_manifest(manifest)}
    for split in ("train", "validation"):
        if split not in splits:
            raise MetisError(
                f"{manifest} has no recordings of the split {split!r}; see metis prepare manifest --splits"
            )
    for split in ("train", "validation") if "tse" in (like(name), *takes.mixture) else ():
        if len({row.speaker for row in read_manifest(manifest) if row.split == split} - {UNKNOWN}) < 2:
            raise MetisError(
                f"{manifest}: extraction needs two known speakers in {split}; see metis prepare manifest --splits"
            )
    system = derive(base, out)
    scale = scale_of(system)
    given, options = options or {}, {"audio": True, **match_task(out, name, mode, rank, locate(base), say)}
    if scale == "nano" and takes.takes_prompt and not takes.like:  # prompts are whole other recordings
        options |= {"joined": 0.5} if takes.takes_text else {"passes": 4}
    if options.get("text_hint") == "timed":  # durations belong to whole recordings, which are tokenised first
        options |= {"audio": False, "passes": int(name == "omni")}
    options |= given
    shorten = settings is None if shorten is None else shorten
    settings = settings or settings_for(name, scale)
    rows = [row for row in read_manifest(manifest) if row.split == "train" and row.duration >= 1]
    if takes.takes_text and not takes.takes_features:
        rows = [row for row in rows if row.text and row.language in VOICES]
    known = sum(row.duration for row in rows)
    times = settings.steps * settings.frames * settings.accumulate / FRAME_RATE / max(known, 1e-3)
    if times > OFTEN:
        enough = max(1, round(settings.steps * OFTEN / times))
        stopped = out / "runs" / name
        if shorten and more.get("resume", True) and any((stopped / "states").glob("*")):  # it goes on as it began
            began = json.loads((stopped / "settings.json").read_text())
            settings = dataclasses.replace(settings, steps=began["steps"], warmup=began["warmup"])
        elif shorten:
            settings = dataclasses.replace(settings, steps=enough, warmup=min(settings.warmup, enough // 5))
            say(f"{enough} steps read {known / 60:.1f} minutes of speech {OFTEN} times (another number: --steps)")
        else:
            say(
                f"{settings.steps} steps read {known / 60:.1f} minutes of speech {times:.0f} times; about "
                f"{enough} read them {OFTEN} times (--steps)"
            )
    usual = settings_for(name, scale).validate_every
    if validate_every is None and keep == "best" and settings.validate_every in (0, usual):
        often = max(10, settings.steps // 20)
        validate_every = min(usual or often, often)
    settings = dataclasses.replace(
        settings, best="cross_entropy" if keep == "best" else settings.best,
        validate_every=settings.validate_every if validate_every is None else validate_every,
    )  # fmt: skip
    about = {"data": str(source), "licence": "that of the base and of your data, whichever is stricter"}
    job = Job(
        name, system, out, settings, manifest, mode=mode, rank=rank, options=options, workers=workers, about=about,
    )  # fmt: skip
    return train(job, say=say, **more)


def match_task(
    out: Path, name: str, mode: str, rank: int, base: Path, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Make room for a task of another mode than the one in ``out``; the options (text hint) of what was there.

    A task of the mode stays, to go on from (LoRA at whatever rank).  MetisError for one of another mode or rank that
    was trained there, and not only linked from ``base`` (again, where a run died before it had written its own).
    """
    folder, theirs = out / FOLDERS[name], base / FOLDERS[name] / "config.json"
    if not (folder / "config.json").is_file():  # a hint is nano's; the paper puts phones in front and no more
        return {"text_hint": "even"} if task(name).takes_text and scale_of(sizes(out)) == "nano" else {}
    config, about = load_config_and_card(folder, TaskConfig)
    had = about.get("mode", "lora" if config.lora_rank else "adapter")
    if config.lora_rank != rank or had != mode:
        itself = theirs.resolve() == (folder / "config.json").resolve()
        linked = theirs.is_file() and theirs.read_bytes() == (folder / "config.json").read_bytes()
        if itself or not linked:
            raise MetisError(f"{folder} was trained here in another mode or rank; take another --out")
        if had != mode:
            say(f"{name} begins from stage 1: what the base has learned of it is of the mode {had}, not {mode}")
            shutil.rmtree(folder)
        else:
            say(f"{name} goes on from the base's LoRA of rank {config.lora_rank}, at rank {rank}")
    return {key: config.stage1[key] for key in ("text_hint", "hint_width") if key in config.stage1}
