"""What is judged: the items of a test set, and the systems that make audio of them.

Audio is kept by the hash of everything that made it, so that a killed run goes on where it was.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from metis_lib import audio
from metis_lib.assets import metis_home
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.evaluation.judges import NSNet2
from metis_lib.evaluation.metrics import JUDGE_RATE, TASKS
from metis_lib.notebook import progress
from metis_lib.pipeline import Metis

_MODEL_CODE = (
    *("audio.py", "config.py", "pipeline.py", "generation.py", "stores.py", "checkpoints.py"),
    *("models", "tokenizers", "tasks"),
)


@dataclass(frozen=True)
class Item:
    """One row of a test set; ``other`` is a recording of another speaker (the control)."""

    id: str
    task: str
    speaker: str
    text: str
    clean: Path
    noisy: Path | None = None
    prompt: Path | None = None
    prompt_text: str = ""
    other: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def reference(self, key: str) -> Path | None:
        """The recording that a similarity metric compares with."""
        return {"sim_prompt": self.prompt, "sim_target": self.clean, "sim_other": self.other}[key]


@dataclass(frozen=True)
class Clip:
    """What one system made of one item; ``path`` is None and ``error`` says why when there is nothing."""

    item: Item
    system: str
    seed: int | None
    path: Path | None
    seconds_to_make: float | None = None
    error: str | None = None


def testset_folder(testset: str | Path) -> Path:
    """The folder of a test set, given by path or by its name under ``eval/testsets`` or ``$METIS_HOME/testsets``."""
    made = metis_home() / "testsets" / str(testset)
    for place in (Path(testset).expanduser(), record.ROOT / "eval" / "testsets" / str(testset), made):
        if (place / "manifest.jsonl").is_file():
            return place.resolve()
    raise MetisError(f"no test set {str(testset)!r}: expected a folder with a manifest.jsonl (metis prepare testset)")


def load_items(testset: str | Path, task: str, limit: int | None = None) -> list[Item]:
    """The items of ``task``, in the manifest's order; the first ``limit`` of them.

    Raises:
        MetisError: unknown task or test set, a broken row, a missing file or the same id twice.
    """
    if task not in TASKS:
        raise MetisError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise MetisError(f"limit is a positive number of items, got {limit}")
    folder = testset_folder(testset)
    needed = ["id", "speaker", "text", "clean", *{"se": ["noisy"], "tts": ["prompt", "prompt_text"]}.get(task, [])]
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate((folder / "manifest.jsonl").read_text().splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line) if line.strip() else {"task": None}
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
    voices = {row["speaker"]: row["prompt" if task == "tts" else "clean"] for row in reversed(rows.values())}
    speakers = sorted(voices)
    items = []
    for row in list(rows.values())[:limit]:
        neighbour = speakers[(speakers.index(row["speaker"]) + 1) % len(speakers)]
        row["other"] = voices[neighbour] if neighbour != row["speaker"] else None
        row |= {key: (folder / row[key]).resolve() for key in ("clean", "noisy", "prompt", "other") if row.get(key)}
        for path in row.values():
            if isinstance(path, Path) and not path.is_file():
                raise MetisError(f"the test set {folder.name} lacks {path.name} of item {row['id']}")
        known = {key: row[key] for key in Item.__dataclass_fields__ if row.get(key)}
        extra = {key: value for key, value in row.items() if key not in Item.__dataclass_fields__}
        items.append(Item(**known | {"extra": extra}))
    return items


def systems_of(task: str, checkpoint: str = "nano") -> list[str]:
    """All systems of a task: the fixed rows and, except for the codec, the model (named as its folder)."""
    return [*TASKS[task]["systems"], *([] if task == "codec" else [Path(checkpoint).name])]


def choose_systems(task: str, asked: Sequence[str] | None, checkpoint: str) -> list[str]:
    """The systems that are asked for, or all; a MetisError if one is unknown or named twice."""
    known = systems_of(task, checkpoint)
    unknown = [system for system in asked or () if system not in known]
    if unknown or len(set(asked or ())) < len(asked or ()):
        what = f"unknown system {unknown[0]!r}" if unknown else "a system twice"
        raise MetisError(f"{what} for the task {task}; choose among {', '.join(known)}")
    return list(asked or known)


class Systems:
    """Makes audio: every system is a function of an item and a seed; models load at their first use."""

    def __init__(self, checkpoint: str = "nano", device: str = "auto") -> None:
        self.checkpoint, self.device, self._nsnet2 = checkpoint, device, NSNet2()
        self._hashes = record.checkpoint_hashes(checkpoint)
        self._code = {"model": record.code_hash(*_MODEL_CODE), "nsnet2": record.code_hash("evaluation/judges.py")}

    @functools.cached_property
    def _metis(self) -> Metis:
        return Metis.from_pretrained(self.checkpoint, device=self.device)

    @property
    def used_device(self) -> str:
        """Where the model ran, if it did; the judges run on the CPU."""
        return str(self._metis.device) if "_metis" in self.__dict__ else "cpu"

    def source(self, system: str, item: Item) -> Path | None:
        """The file of the test set that a system is, or None if it has to be made."""
        return {"recording": item.clean, "clean": item.clean, "noisy": item.noisy}.get(system)

    def key(self, system: str, item: Item, seed: int | None) -> str:
        """Hash of everything that the audio depends on."""
        inputs = [item.noisy if item.task == "se" and system != "resynthesis" else item.clean, item.prompt]
        parts: dict[str, Any] = {
            "system": system if system in TASKS[item.task]["systems"] else "model", "task": item.task,
            "inputs": [record.sha256_file(path) if path else None for path in inputs],
            "texts": [item.text, item.prompt_text], "seed": seed,
        }  # fmt: skip
        if system == "nsnet2":
            parts["code"] = self._code["nsnet2"]
        elif self.source(system, item) is None:
            parts |= {"code": self._code["model"], "device": self.device, **self._hashes}
            parts["name"] = self.checkpoint if self._hashes["checkpoint_sha256"] is None else None
        return record.sha256_of(parts)

    def make(self, system: str, item: Item, seed: int | None) -> audio.Speech:
        """Let ``system`` work on ``item``."""
        if system == "nsnet2":
            wav = self._nsnet2(audio.read(str(item.noisy), JUDGE_RATE).numpy())
            return audio.Speech(torch.from_numpy(wav), JUDGE_RATE)
        if system == "resynthesis":
            return self._metis.resynthesise(str(item.clean))
        if item.task == "se":
            return self._metis.enhance(str(item.noisy), seed=seed or 0)
        return self._metis.speak(item.text, prompt=str(item.prompt), prompt_text=item.prompt_text, seed=seed or 0)


def produce(
    items: Sequence[Item], systems: Sequence[str], out: str | Path, *, seeds: Sequence[int] = (0,),
    maker: Systems | None = None,
) -> list[Clip]:  # fmt: skip
    """Audio of every system for every item under ``<out>/<task>/<system>/audio``; what is there is kept.

    An item that a system refuses (a MetisError) becomes a clip without a path that carries the reason.
    """
    task, maker = items[0].task, maker or Systems()
    chosen = choose_systems(task, systems, maker.checkpoint)
    seeds_of = {system: (None,) if system in TASKS[task]["systems"] else seeds for system in chosen}
    jobs = [(system, seed, item) for system in chosen for seed in seeds_of[system] for item in items]
    clips = []
    for system, seed, item in progress(jobs, f"{task}: audio"):
        path = Path(out) / task / system / "audio" / (item.id if seed is None else f"{item.id}.seed{seed}")
        source, note_path = maker.source(system, item), path.with_name(f"{path.name}.json")
        path = path.with_name(f"{path.name}{source.suffix if source else '.flac'}")
        key, note = maker.key(system, item, seed), record.read_json(note_path)
        if note and note["key"] == key and path.is_file() and record.sha256_file(path) == note["sha256"]:
            clips.append(Clip(item, system, seed, path, note["seconds_to_make"]))
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        start, took = time.perf_counter(), None
        try:
            if source:
                shutil.copyfile(source, path)
            else:
                made = maker.make(system, item, seed)
                audio.write(path, made.wav, made.sample_rate)
                took = round(time.perf_counter() - start, 3)
        except MetisError as error:
            path.unlink(missing_ok=True)
            clips.append(Clip(item, system, seed, None, error=str(error)))
            continue
        record.write_json(note_path, {"key": key, "sha256": record.sha256_file(path), "seconds_to_make": took})
        clips.append(Clip(item, system, seed, path, took))
    return clips
