"""What is judged: the items of a test set, and the systems that make audio of them.

Audio is kept by the hash of everything that made it, so that a killed run goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metis_lib import audio, bulk
from metis_lib.assets import metis_home
from metis_lib.checkpoints import folder_of
from metis_lib.config import AUDIO_RATE, FRAME_RATE
from metis_lib.data.store import UNKNOWN
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.evaluation.judges import NSNet2
from metis_lib.evaluation.metrics import JUDGE_RATE, TASKS
from metis_lib.notebook import progress
from metis_lib.pipeline import Job, Limits, Metis
from metis_lib.tasks import like, own

NEEDED = {
    "codec": ("text", "clean"), "se": ("noisy",), "tts": ("text", "clean", "prompt", "prompt_text"),
    "vc": ("text", "clean", "prompt"), "tse": ("text", "clean", "noisy", "prompt"),
    "l2s": ("text", "clean", "video", "prompt"),
}  # fmt: skip
NEEDED |= {name: NEEDED[new.like] for name, new in own().items()}
"""What a row of a task has besides id and speaker (real noisy recordings have neither text nor clean speech)."""
PLACES = ("clean", "noisy", "prompt", "other", "interferer", "video")


@dataclass(frozen=True)
class Item:
    """One row of a test set.

    Attributes:
        clean: what is to be said (codec, se, tse, tts, l2s), or the source (vc).
        noisy: the input of se, the mixture of tse.
        prompt, prompt_text: a recording of the wanted voice, and what it says.
        other: a recording of another speaker (the control).
        interferer: a recording of the other voice in a mixture.
        video: a film, or mouth crops uint8 [N, 96, 96] as .npz (key ``crops``).
    """

    id: str
    task: str
    speaker: str
    text: str = ""
    clean: Path | None = None
    noisy: Path | None = None
    prompt: Path | None = None
    prompt_text: str = ""
    other: Path | None = None
    interferer: Path | None = None
    video: Path | None = None
    language: str = "en"
    extra: dict[str, Any] = field(default_factory=dict)

    def reference(self, key: str) -> Path | None:
        """The recording that a similarity metric compares with."""
        return {
            "sim_prompt": self.prompt, "sim_target": self.clean, "sim_source": self.clean, "sim_other": self.other,
            "sim_interferer": self.interferer,
        }[key]  # fmt: skip


@dataclass(frozen=True)
class Clip:
    """What one system made of one item; ``path`` is None and ``error`` says why when there is nothing."""

    item: Item
    system: str
    seed: int | None
    path: Path | None
    seconds_to_make: float | None = None
    error: str | None = None
    measured: dict[str, float] = field(default_factory=dict)
    """What the system knows of it: ``token_accuracy``, ``codes_used`` (shares)."""


def testset_folder(testset: str | Path) -> Path:
    """The folder of a test set, given by path or by its name under ``eval/testsets`` or ``$METIS_HOME/testsets``."""
    made = metis_home() / "testsets" / str(testset)
    for place in (folder_of(testset), record.ROOT / "eval" / "testsets" / str(testset), made):
        if (place / "manifest.jsonl").is_file():
            return place.resolve()
    raise MetisError(f"no test set {str(testset)!r}: expected a folder with a manifest.jsonl (metis prepare testset)")


def known_task(task: str) -> None:
    """MetisError where nothing is known of how to evaluate a task of this name."""
    if task not in TASKS:
        raise MetisError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")


def load_items(testset: str | Path, task: str, limit: int | None = None) -> list[Item]:
    """The items of ``task``, in the manifest's order; the first ``limit`` of them.

    Raises:
        MetisError: unknown task or test set, a broken row, a missing file or the same id twice.
    """
    known_task(task)
    if limit is not None and limit < 1:
        raise MetisError(f"limit is a positive number of items, got {limit}")
    folder = testset_folder(testset)
    needed = ["id", "speaker", *NEEDED[task]]
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate((folder / "manifest.jsonl").read_text(encoding="utf-8").split("\n"), 1):
        try:
            row: dict[str, Any] = json.loads(line) if line.strip() else {"task": None}
            if "task" not in row and "source" in row and "split" in row:
                raise MetisError(f"{folder} holds a manifest to train with, not a test set (docs/testsets.md)")
            if row["task"] != task:
                continue
        except (ValueError, KeyError, TypeError) as error:
            raise MetisError(f"test set row {number} of {folder.name} is not valid ({error})") from error
        if missing := [key for key in needed if not row.get(key)]:
            raise MetisError(f"test set row {number} lacks {', '.join(missing)}")
        if row["id"] in rows:
            raise MetisError(f"the test set {folder.name} has the same id twice in the task {task}")
        rows[row["id"]] = row
    if not rows:
        raise MetisError(f"the test set {folder.name} has no items for the task {task}")
    key = "prompt" if task in ("tts", "l2s") else "clean"
    voices = {row["speaker"]: row[key] for row in reversed(rows.values()) if row.get(key)}
    known_voices = _recordings(folder) if task == "codec" else {}
    speakers = sorted(voices)
    items = []
    for row in list(rows.values())[:limit]:
        others = [speaker for speaker in speakers if speaker not in (row["speaker"], row.get("target_speaker"))]
        after = next((speaker for speaker in others if speaker > row["speaker"]), others[0] if others else None)
        row["other"] = voices[after] if after else None
        if task == "codec" and not row.get("prompt") and row["speaker"] != UNKNOWN:  # stage 2 asks for a voice
            row["prompt"] = next((name for name in known_voices[row["speaker"]] if name != row["clean"]), None)
        row |= {key: (folder / row[key]).resolve() for key in PLACES if row.get(key)}
        for path in row.values():
            if isinstance(path, Path) and not path.is_file():
                raise MetisError(f"the test set {folder.name} lacks {path.name} of item {row['id']}")
        row["language"] = str(row.get("language") or "en").lower().replace("_", "-").split("-")[0]
        known = {key: row[key] for key in Item.__dataclass_fields__ if row.get(key)}
        extra = {key: value for key, value in row.items() if key not in Item.__dataclass_fields__}
        items.append(Item(**known | {"extra": extra}))
    return items


def _recordings(folder: Path) -> dict[str, list[str]]:
    """The clean recordings of each speaker of a test set, by name; without those that are only scaled (of mixtures)."""
    found: dict[str, set[str]] = {}
    for line in filter(str.strip, (folder / "manifest.jsonl").read_text(encoding="utf-8").split("\n")):
        row = json.loads(line)
        if row["task"] in ("codec", "tts"):
            found.setdefault(row["speaker"], set()).update(filter(None, (row.get("clean"), row.get("prompt"))))
    return {speaker: sorted(names) for speaker, names in found.items()}


OMNI, TOLD = "-omni", "-omni-text"
"""What the name of a checkpoint's row ends in where Omni does the task, and where it is told the words (tse)."""


def check_options(options: Mapping[str, Any], tasks: Collection[str] = ("tts",)) -> None:
    """MetisError for a ``length`` that cannot be, or that no task of an evaluation has."""
    if options.get("length", "recording") != "recording":
        raise MetisError(f"the option length can only be 'recording', not {options['length']!r}")
    if "length" in options and not {"tts", "omni"} & set(tasks):
        raise MetisError("the option length is of text-to-speech, which is not among the tasks")


class Systems:
    """Makes audio: every system is a function of an item and a seed; models load at their first use.

    A row is one of the task's fixed systems, or a checkpoint (its name), done by the weights of the task or (``-omni``,
    ``-omni-text``) by Omni's.  ``options`` are those of :meth:`Metis.generate`, and ``length``: ``recording`` makes
    text-to-speech as long as the recording, as the paper's table 1 probably does; by default the system says how long.
    """

    def __init__(
        self, checkpoint: str = "nano", device: str = "auto", *, dtype: str = "float32",
        options: dict[str, Any] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.checkpoint, self.device, self.dtype, self.options = checkpoint, device, dtype, options or {}
        self.seed, self.decoding = seed, {key: value for key, value in self.options.items() if key != "length"}
        check_options(self.options)
        self._nsnet2, self._loaded = NSNet2(), dict[str, Metis]()
        self._hashes = record.checkpoint_hashes(checkpoint)
        self._code = {"model": record.code_hash(*record.MODEL_CODE), "nsnet2": record.code_hash("evaluation/judges.py")}
        files = record.task_files()
        self._tasks = {"task_files": files} if files else {}

    def metis(self, checkpoint: str | None = None) -> Metis:
        """A model, loaded once."""
        name = checkpoint or self.checkpoint
        if name not in self._loaded:
            self._loaded = {key: held for key, held in self._loaded.items() if key == self.checkpoint}
            self._loaded[name] = Metis.from_pretrained(name, device=self.device, dtype=self.dtype)
        return self._loaded[name]

    @property
    def used_device(self) -> str:
        """Where the models ran, if they did."""
        return ", ".join(dict.fromkeys(str(metis.device) for metis in self._loaded.values())) or "cpu"

    def close(self) -> None:
        """Let go of the models, so that the judges have the memory."""
        self._loaded.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def source(self, system: str, item: Item) -> Path | None:
        """The file of the test set that a system is, or None if it has to be made."""
        names = {"recording": "clean", "clean": "clean", "source": "clean", "noisy": "noisy", "mixture": "noisy"}
        return getattr(item, names[system]) if system in names else None

    def key(self, system: str, item: Item) -> str:
        """Hash of everything that the audio of a fixed system depends on."""
        heard = item.noisy if system in ("nsnet2", "noisy", "mixture") else item.clean
        if heard is None:
            raise MetisError(f"the test set has no clean recording of {item.id}")
        parts: dict[str, Any] = {"system": system, "task": item.task, "source": record.sha256_file(heard)}
        if system == "nsnet2":
            parts |= {"code": self._code["nsnet2"]}
        elif self.source(system, item) is None:
            if system in ("stage2", "still"):
                prompt = {"prompt": record.sha256_file(item.prompt)} if item.prompt else {}
                parts |= {**prompt, "options": self.options, "seed": self.seed}
            if system == "still" and item.video:
                parts |= {"video": record.sha256_file(item.video)}
            parts |= self.about(self.checkpoint)
        return record.sha256_of(parts)

    def ready(self, system: str) -> None:
        """Load what a fixed system needs: it is no part of the time that a recording takes."""
        if system == "nsnet2":
            _ = self._nsnet2.model
        elif system == "still":
            self.metis().load_all("l2s")
        else:
            for part in ("acoustic", *(("ssl", "semantic", "stage2_layer1", "stage2_full") * (system == "stage2"))):
                getattr(self.metis(), part)

    def make(self, system: str, item: Item) -> audio.Speech:
        """Let a fixed system work on ``item``."""
        if system == "nsnet2":
            wav = self._nsnet2(audio.read(str(item.noisy), JUDGE_RATE).numpy())
            return audio.Speech(torch.from_numpy(wav), JUDGE_RATE)
        prompt = None if item.prompt is None else str(item.prompt)
        if system == "stage2":
            options = {key: value for key, value in self.decoding.items() if key.startswith("stage2_")}
            tokens = self.metis().tokens(str(item.clean))["ssl"]
            return self.metis().decode_tokens(tokens, prompt, seed=self.seed, **options)
        if system == "still":
            still_face = {"video": still(item), "prompt": prompt}
            return self.metis().generate("l2s", [still_face], seed=self.seed, **self.decoding)[0]
        return self.metis().resynthesise(str(item.clean))

    def about(self, checkpoint: str) -> dict[str, Any]:
        """What the audio of a checkpoint depends on, besides the items."""
        hashes = self._hashes if checkpoint == self.checkpoint else record.checkpoint_hashes(checkpoint)
        kind = self.device.partition(":")[0]  # a run that goes on may be given another GPU
        given = {"code": self._code["model"], "device": kind, "dtype": self.dtype, "name": checkpoint}
        return given | hashes | self._tasks


def still(item: Item) -> Any:
    """The first picture of an item's video for all of its length: mouth crops uint8 ``[N, 96, 96]``."""
    from metis_lib.data.video import read_lips

    crops = read_lips(str(item.video))
    return crops[:1].repeat(len(crops), 0)


def split_name(system: str) -> tuple[str, str]:
    """A row's name as (checkpoint, ``""``, ``-omni`` or ``-omni-text``)."""
    ending = next((end for end in (TOLD, OMNI) if system.endswith(end)), "")
    return system.removesuffix(ending), ending


def label(system: str) -> str:
    """How a row is called: of a checkpoint's path only the last part, with what stands behind an ``@``."""
    checkpoint, ending = split_name(system)
    place, *marks = [checkpoint] if Path(checkpoint).is_dir() else checkpoint.split("@")
    return "@".join([Path(place).name, *(mark.replace("/", "-") for mark in marks)]) + ending


def checkpoints_of(task: str, systems: Sequence[str]) -> list[str]:
    """The checkpoints among a task's rows (of Omni's notebook: none, its rows are tasks)."""
    fixed = TASKS[task]["systems"] if task in TASKS else systems
    return list(dict.fromkeys(split_name(name)[0] for name in systems if name not in fixed))


def systems_of(task: str, checkpoint: str = "nano") -> list[str]:
    """All systems of a task: the fixed rows and, where the checkpoint has weights for it, the model's."""
    fixed = list(TASKS[task]["systems"])
    if task == "codec":
        return fixed
    try:
        tasks = tasks_of(checkpoint)
    except MetisError:
        tasks = {task}  # the notebook says what is wrong with it
    omni = "omni" in tasks and task != "l2s"
    rows = [(task in tasks, ""), (omni, OMNI), (omni and task == "tse", TOLD)]
    if task == "l2s" and task not in tasks:
        fixed.remove("still")
    return [*fixed, *(f"{checkpoint}{end}" for there, end in rows if there)]


def tasks_of(checkpoint: str) -> set[str]:
    """The tasks that a checkpoint has weights for."""
    from metis_lib.checkpoints import own_system
    from metis_lib.stores import Folder

    known = {*TASKS, "omni"}
    if checkpoint == "debug" or checkpoint.startswith("random-"):
        return known
    if not own_system(checkpoint):
        from metis_lib.released import Released
        from metis_lib.released_files import variants

        kind = Released(checkpoint).preferred
        return {task for task in known if kind is None or kind in variants(like(task))}
    return set(Folder(checkpoint).tasks)


def choose_systems(task: str, asked: Sequence[str] | None, checkpoint: str) -> list[str]:
    """The systems that are asked for (other checkpoints among them), or all; a MetisError for an unknown one."""
    known = systems_of(task, checkpoint)
    by_label = {label(name): name for name in known}
    chosen = [by_label.get(name, name) for name in asked or known]
    for name in chosen:
        other, ending = split_name(name)
        if name in known or (task != "codec" and _can(other, "omni" if ending else task)):
            continue
        raise MetisError(f"unknown system {name!r} for the task {task}; choose among {', '.join(by_label)}")
    twice = next((name for name in chosen if [label(other) for other in chosen].count(label(name)) > 1), None)
    if twice is not None:
        raise MetisError(f"a system twice for the task {task}: {label(twice)}")
    return chosen


def _can(checkpoint: str, task: str) -> bool:
    try:
        return task in tasks_of(checkpoint)
    except MetisError:
        return False


def produce(
    items: Sequence[Item], systems: Sequence[str], out: str | Path, *, seeds: Sequence[int] = (0,),
    maker: Systems | None = None,
) -> list[Clip]:  # fmt: skip
    """Audio of every system for every item under ``<out>/<task>/<system>/audio``; what is there is kept.

    An item that a system refuses (a MetisError) becomes a clip without a path that carries the reason.
    """
    task, maker = items[0].task, maker or Systems()
    clips: list[Clip] = []
    for system in choose_systems(task, systems, maker.checkpoint):
        folder = Path(out) / task / label(system) / "audio"
        bulk.sweep(folder)
        if system in TASKS[task]["systems"]:
            clips += [_fixed(maker, system, item, folder) for item in progress(items, f"{task}: {system}")]
        else:
            clips += _generated(maker, system, items, folder, seeds)
    return clips


def _fixed(maker: Systems, system: str, item: Item, folder: Path) -> Clip:
    """A recording of the test set, or what is made of it the same way every time."""
    source = maker.source(system, item)
    path, note_path = folder / f"{item.id}{source.suffix if source else '.flac'}", folder / f"{item.id}.json"
    try:
        key, note = maker.key(system, item), record.read_json(note_path)
    except MetisError as error:
        return Clip(item, system, None, None, error=str(error))
    if note and note["key"] == key and path.is_file() and record.sha256_file(path) == note["sha256"]:
        return Clip(item, system, None, path, note["seconds_to_make"])
    path.parent.mkdir(parents=True, exist_ok=True)
    took = None
    try:
        if source:
            partial = path.with_name(f".{path.name}.part")
            shutil.copyfile(source, partial)
            partial.replace(path)
        else:
            maker.ready(system)
            start = time.perf_counter()
            made = maker.make(system, item)
            audio.write(path, made.wav, made.sample_rate)
            took = round(time.perf_counter() - start, 3)
    except (MetisError, RuntimeError) as error:
        path.unlink(missing_ok=True)
        return Clip(item, system, None, None, error=" ".join(str(error).split()))
    record.write_json(note_path, {"key": key, "sha256": record.sha256_file(path), "seconds_to_make": took})
    return Clip(item, system, None, path, took)


def _generated(maker: Systems, system: str, items: Sequence[Item], folder: Path, seeds: Sequence[int]) -> list[Clip]:
    """What a checkpoint generates, in batches."""
    checkpoint, ending = split_name(system)
    metis, task = maker.metis(checkpoint), items[0].task
    wanted = {f"{item.id}.seed{seed}": (item, seed) for seed in seeds for item in items}
    true_length = task == "tts" and "length" in maker.options
    given = [{"id": id, "seed": seed, **_ask(item, ending, true_length)} for id, (item, seed) in wanted.items()]
    shown = iter(progress(range(len(given)), f"{task}: {label(system)}"))
    found = bulk.generate_all(
        metis, task, given, folder, options=maker.decoding, about=maker.about(checkpoint),
        measure=_measures(metis, {id: item for id, (item, _) in wanted.items()}),
        progress=lambda *_: next(shown, None),  # type: ignore[arg-type]
    )  # fmt: skip
    deque(shown, maxlen=0)  # what was made before counts as done, and the bar ends
    log, clips = bulk.read_log(folder), []
    for id, (item, seed) in wanted.items():
        entry = log.get(id, {})
        path = None if id in found["failed"] else folder / entry["output"]
        error = found["failed"].get(id)
        took = None if path is None else entry["seconds_to_make"]
        clips.append(Clip(item, label(system), seed, path, took, error, entry.get("measured", {})))
    return clips


def _ask(item: Item, ending: str, true_length: bool = False) -> dict[str, Any]:
    """An item as :meth:`Metis.generate` takes it; ``true_length``: as long as its recording."""
    if true_length and item.clean is None:
        raise MetisError(f"the test set has no recording of {item.id} to take the length of")
    prompt = {"prompt": str(item.prompt)} if item.prompt else {}
    texts = {"text": item.text, "prompt_text": item.prompt_text, "language": item.language}
    asked = {
        "se": {"source": str(item.noisy)}, "vc": {"source": str(item.clean), **prompt}, "tts": {**texts, **prompt},
        "tse": {"source": str(item.noisy), **prompt, **(texts if ending == TOLD else {})},
        "l2s": {"video": str(item.video), **prompt},
    }[like(item.task)]  # fmt: skip
    return asked | ({"like": str(item.clean)} if true_length else {}) | ({"by": "omni"} if ending else {})


def _measures(metis: Metis, items: dict[str, Item]) -> Callable[[str, Job], dict[str, float]]:
    """What is told of a job's tokens: how many distinct ones a frame, and how many are those of the clean recording."""

    def measure(id: str, job: Job) -> dict[str, float]:
        tokens = torch.cat([made.tokens for made in job.made])
        found = {"codes_used": round(len(tokens.unique()) / len(tokens), 4)}
        recording = items[id].clean
        short = len(tokens) <= Limits().whole * FRAME_RATE  # attention over all of it at once
        if like(items[id].task) in ("se", "tse") and recording is not None and short:
            clean = metis.ssl_tokens(metis.features(audio.read(recording, AUDIO_RATE, silence=True)))[0]
            size = min(len(clean), len(tokens))
            same = clean[:size] == tokens[:size].to(clean.device)
            found["token_accuracy"] = round(float(same.float().mean()), 4)
        return found

    return measure
