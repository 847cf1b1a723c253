"""Train pieces of nano on a machine that has PyTorch and nothing of ours: no corpus, no tyro, no audio libraries.

    python -m recipes.nano.trip pack OUT --megabytes 50      here: tokens and weights into one folder
    python -m recipes.nano.trip train OUT stage1 tts --budget 9m --results RESULTS --largest 15     there
    python -m recipes.nano.trip join RESULTS                 here again: the parts into the growing system

Tasks on audio need speech to simulate from.  ``pack --hear`` takes along tokenizers, noise, rooms and the durations of
phones; there ``listen`` decodes the codes to waveforms, from which ``examples`` makes what ``train ... se tse`` learns
from (soxr, soundfile and, for vc, praat-parselmouth are needed for that).

What comes back are weights (bf16), logs, and the state to go on from, cut into files of at most ``--largest`` MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metis_lib.checkpoints import system_hash
from metis_lib.config import preset
from metis_lib.data.examples import Pool, Sources
from metis_lib.data.simulate import HOP, Noises, Recording, Rooms
from metis_lib.data.store import FlatStore, read_jsonl, write_jsonl
from metis_lib.errors import MetisError
from metis_lib.training.data import prepared
from metis_lib.training.loop import seconds_of
from metis_lib.training.recipes import FOLDERS, Job, load_part, options_for, settings_for, task_source, train
from recipes.nano import queue
from recipes.nano.packed import Packed, pack

QUEUE = Path(__file__).with_name("queue.json")
FROM_TOKENS = ("stage1", "stage2_layer1", "stage2_full", "tts")
"""Pieces that need nothing but tokens and earlier weights."""
FROM_CODES = ("se", "tse", "vc", "omni")
"""Pieces that learn from simulated audio, made of decoded codes."""
ROOMS = 120


def pack_up(
    out: Path, megabytes: float, path: Path = QUEUE, layers: int | None = None, hear: bool = False
) -> dict[str, object]:
    """Write ``train`` and ``validation`` tokens and the weights so far into ``out``; what it holds."""
    found = queue.read(path)
    queue.bring_shipped(found)
    manifest = queue.metis_home() / "corpora" / found["system"] / "manifest.jsonl"
    job = Job(
        "stage2_full", preset(found["preset"]), queue.home(found), settings_for("stage1", found["preset"]), manifest
    )
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):  # of an earlier packing
        (out / f"{split}.safetensors").unlink(missing_ok=True)
    held: dict[str, object] = {}
    heard = ("ssl", "semantic_codec", "acoustic_codec") if hear else ()
    for part in ("stage1", "stage2_layer1", "stage2_full", "tasks/tts", *heard):
        if (job.out / part / "config.json").is_file():
            shutil.copytree(job.out / part, out / "system" / part, dirs_exist_ok=True)
    if hear:
        pack_sounds(job, out)
    shutil.copy(path, out / "queue.json")
    taken = sum(file.stat().st_size for file in out.rglob("*.*") if file.is_file()) / 1e6
    few = megabytes / 40 if hear else megabytes / 20
    held["validation"] = pack(job.tokens("validation"), out / "validation.safetensors", megabytes=few, layers=layers)
    held["train"] = pack(
        job.tokens("train"), out / "train.safetensors", megabytes=megabytes - few - taken, layers=layers
    )
    return held


def pack_sounds(job: Job, out: Path) -> None:
    """Noise (Opus), rooms, and the durations of phones where the SSL encoder has a head for them."""
    import soundfile

    corpus, times = job.recordings.parent, f"durations-{system_hash(job.out / 'ssl')[:8]}"
    (out / "corpus/noise").mkdir(parents=True, exist_ok=True)
    rows = []
    for row in read_jsonl(corpus / "noise.jsonl"):
        wav, rate = soundfile.read(corpus / row["path"], dtype="float32")
        name = f"noise/{row['id']}.ogg"
        soundfile.write(out / "corpus" / name, wav, rate, format="OGG", subtype="OPUS")
        rows.append({**row, "path": name})
    write_jsonl(out / "corpus/noise.jsonl", rows)
    rooms = Rooms.load(corpus)
    Rooms(*(getattr(rooms, key)[:ROOMS] for key in ("rirs", "length", "direct", "rt60"))).save(out / "corpus")
    for split in ("train", "validation") if (job.out / "ssl/phones.safetensors").is_file() else ():
        job.timed(split)
        shutil.copytree(prepared(job.recordings) / times / split, out / times / split, dirs_exist_ok=True)


@dataclass(frozen=True)
class There(Job):
    """A job whose recordings are decoded codes, and whose babble is made of them; nothing is said for the log."""

    voice = None

    def tokens(self, split: str) -> Packed:
        return Packed((self.shards or Path()) / f"{split}.safetensors")

    def sources(self, split: str, pool: Pool | None = None) -> Sources:
        import soundfile

        corpus, waves = self.recordings.parent, self.waves(split)
        chosen = np.random.default_rng(0).permutation(len(waves))[:160]
        talk = [Recording(waves.items[int(i)]["speaker"], np.array(waves[int(i)])) for i in chosen]
        rows = [row for row in read_jsonl(corpus / "noise.jsonl") if (row["split"] == "train") == (split == "train")]
        around = [Recording(row["id"], soundfile.read(corpus / row["path"], dtype="int16")[0]) for row in rows]
        return Sources(pool, Noises(around, talk), Rooms.load(corpus))


def listen(folder: Path, device: str = "", frames: int = 60_000) -> float:
    """Decode the packed codes to waveforms, where a job looks for its recordings; how many hours."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows, manifest = [], folder / "corpus/manifest.jsonl"
    packed = {split: Packed(folder / f"{split}.safetensors") for split in ("train", "validation")}
    for split, shards in packed.items():
        for i, n in enumerate(shards.lengths()):
            record = shards.record(i)
            rows.append({
                "id": record["id"], "path": "-", "text": "", "language": "en", "speaker": record["speaker"] or "-",
                "duration": float(n) * HOP / 24_000, "split": split, "source": "decoded codes", "licence": "-",
                "human": False,
            })  # fmt: skip
    write_jsonl(manifest, rows)
    codec = load_part(folder / "system", "acoustic").to(device)
    for split, shards in packed.items():
        lengths, at, waves = shards.lengths(), 0, dict[int, np.ndarray]()
        order = np.argsort(lengths, kind="stable")[::-1]
        while at < len(order):
            some = order[at : at + max(1, frames // int(lengths[order[at]]))]
            at += len(some)
            codes = [torch.from_numpy(shards[int(i)][1][:, 1:].astype(np.int64)) for i in some]
            widest = len(codes[0])  # a shorter one goes on with its last frame
            both = torch.stack([torch.cat([c, c[-1:].expand(widest - len(c), -1)]) for c in codes])
            with torch.no_grad():
                wav = (codec.decode(both.to(device)).clamp(-1, 1) * 32767).round().to(torch.int16).cpu().numpy()
            waves |= {int(i): row[: len(c) * HOP] for i, row, c in zip(some, wav, codes, strict=True)}

        def pieces(shards: Packed = shards, waves: dict[int, np.ndarray] = waves) -> Iterator[Any]:
            for i in range(len(shards)):
                record = shards.record(i)
                about = {"id": record["id"], "speaker": record["speaker"], "text": "", "human": False}
                yield about, waves[i]

        home = prepared(manifest)
        home.mkdir(parents=True, exist_ok=True)
        FlatStore.write(home / f"waves-{split}", pieces())
        for times in folder.glob("durations-*"):
            shutil.copytree(times / split, home / times.name / split, dirs_exist_ok=True)
    return float(sum(shards.lengths().sum() for shards in packed.values())) / 50 / 3600


def job_there(folder: Path, piece: str, changes: dict[str, Any], workers: int) -> tuple[There, dict[str, Any]]:
    """The job of the queue's open piece, and its entry; ``changes`` go over its settings, ``mode`` and ``rank``."""
    found = queue.read(folder / "queue.json")
    entry = next((e for e in found["pieces"] if e["model"] == piece and e.get("state") != "done"), None)
    if entry is None:
        raise MetisError(
            f"the queue has no open piece {piece}; before packing add one to recipes/nano/queue.json, such as "
            f'{{"model": "{piece}", "settings": {{"steps": 5000}}}}'
        )
    changes = dict(changes)
    chosen = {key: changes.pop(key, entry.get(key, default)) for key, default in (("mode", "lora"), ("rank", 16))}
    options = options_for(piece, found["preset"]) | entry.get("options", {}) | changes.pop("options", {})
    manifest = folder / "corpus/manifest.jsonl"
    job = There(
        piece, preset(found["preset"]), folder / "system",
        settings_for(piece, found["preset"], **{**entry.get("settings", {}), **changes}),
        manifest if manifest.is_file() else None, shards=folder, **chosen, options=options, workers=workers,
        about={"data": found["data"], "licence": found["licence"]},
    )  # fmt: skip
    return job, entry


def examples(folder: Path, piece: str, changes: dict[str, Any], workers: int) -> None:
    """Make a task's examples, which training then finds."""
    job, _ = job_there(folder, piece, changes, workers)
    for split, seed in (("validation", 1), ("train", job.settings.seed)):
        task_source(job, split, seed, job.frozen, None)


def split_file(file: Path, largest: int) -> None:
    """Cut a file into ``NAME.000``, ``NAME.001``, ... of at most ``largest`` bytes, where it is larger."""
    if file.stat().st_size <= largest:
        return
    with open(file, "rb") as stream:
        for number, _ in enumerate(range(0, file.stat().st_size, largest)):
            file.with_name(f"{file.name}.{number:03d}").write_bytes(stream.read(largest))
    file.unlink()


def join_files(folder: Path) -> None:
    """Undo :func:`split_file` in a folder and below."""
    for first in sorted(folder.rglob("*.000")):
        whole = first.with_suffix("")
        with open(whole.with_name(f".{whole.name}.part"), "wb") as stream:
            for part in sorted(first.parent.glob(f"{whole.name}.[0-9][0-9][0-9]")):
                stream.write(part.read_bytes())
        whole.with_name(f".{whole.name}.part").replace(whole)
        for part in first.parent.glob(f"{whole.name}.[0-9][0-9][0-9]"):
            part.unlink()


def train_there(
    folder: Path, pieces: list[str], results: Path, budget: str, largest: float, device: str = "auto",
    changes: dict[str, Any] | None = None, workers: int = 0, states: bool = True,
) -> dict[str, object]:  # fmt: skip
    """Train pieces one after the other, each for an equal part of the budget; the parts and logs go to ``results``."""
    if set(pieces) - {*FROM_TOKENS, *FROM_CODES} or not pieces:
        raise MetisError(f"from tokens alone: {', '.join(FROM_TOKENS + FROM_CODES)}; not {', '.join(pieces)}")
    scores = dict[str, object]()
    for piece in pieces:
        job, entry = job_there(folder, piece, changes or {}, workers)
        left = f"{seconds_of(budget) / len(pieces):.0f}s"
        scores[piece] = train(
            job, budget=left, first=entry.get("steps", 0), device=device,
            say=partial(print, f"{piece}:", flush=True),
        )  # fmt: skip
        part, run = FOLDERS.get(piece, piece).replace("/", "-"), job.out / "runs" / piece
        shutil.rmtree(results / part, ignore_errors=True)
        (results / part).mkdir(parents=True)
        for file in [
            *job.folder.glob("*.*"),
            run / "log.jsonl",
            *(sorted((run / "states").glob("*"))[-1:] if states else ()),
        ]:
            if file.is_file():
                shutil.copy(file, results / part / file.name)
        for file in list((results / part).iterdir()):
            split_file(file, int(largest * 1e6))
    return scores


def bring_home(results: Path, path: Path = QUEUE) -> list[str]:
    """Put parts of ``results`` into the growing system and their scores into the queue; which ones."""
    found, came = queue.read(path), list[str]()
    join_files(results)
    for entry in found["pieces"]:
        part = results / FOLDERS.get(entry["model"], entry["model"]).replace("/", "-")
        new = (part / "config.json").is_file() and not (part / "joined").exists()
        if not new or entry["model"] in came or entry.get("state") == "done":
            continue
        target, run = (queue.home(found) / name for name in (FOLDERS.get(entry["model"], entry["model"]), "runs"))
        target.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(run / entry["model"], ignore_errors=True)  # what was trained there is newer
        for file in part.glob("*.*"):
            states = run / entry["model"] / "states"
            states.mkdir(parents=True, exist_ok=True)
            where = states if file.suffix == ".ckpt" else states.parent if file.name == "log.jsonl" else target
            shutil.copy(file, where / f".{file.name}.part")
            (where / f".{file.name}.part").replace(where / file.name)
        entry |= queue.outcome(json.loads((part / "config.json").read_text())["card"]["scores"])
        came.append(entry["model"])
    queue.write(path, found)
    for model in came:  # joined again, they would pass for the next piece
        (results / FOLDERS.get(model, model).replace("/", "-") / "joined").touch()
    return came


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("pack")
    one.add_argument("out", type=Path)
    one.add_argument("--megabytes", type=float, default=50.0)
    one.add_argument("--layers", type=int, help="of the acoustic codes; all by default")
    one.add_argument("--hear", action="store_true", help="what tasks on audio need, too")
    actions.add_parser("listen", help="decode the codes to waveforms").add_argument("folder", type=Path)
    made = actions.add_parser("examples", help="make a task's examples")
    made.add_argument("folder", type=Path)
    made.add_argument("pieces", nargs="+")
    two = actions.add_parser("train")
    two.add_argument("folder", type=Path)
    two.add_argument("pieces", nargs="+")
    two.add_argument("--results", type=Path, required=True)
    two.add_argument("--budget", default="9m")
    two.add_argument("--largest", type=float, default=15.0, help="MB of a file that comes back")
    two.add_argument("--device", default="auto")
    for one in (two, made):
        one.add_argument("--changes", type=json.loads, default={}, help="settings in JSON, over the queue's")
        one.add_argument("--workers", type=int, default=0)
    two.add_argument("--no-states", action="store_true", help="bring back weights and logs only")
    actions.add_parser("join").add_argument("results", type=Path)
    a = parser.parse_args()
    try:
        act(a)
    except MetisError as error:
        raise SystemExit(f"trip: {error}") from None


def act(a: argparse.Namespace) -> None:
    """Do what was asked on the command line."""
    if a.action == "pack":
        print(json.dumps(pack_up(a.out, a.megabytes, layers=a.layers, hear=a.hear), indent=1))
    elif a.action == "listen":
        print(f"{listen(a.folder):.1f} hours")
    elif a.action == "examples":
        for piece in a.pieces:
            examples(a.folder, piece, a.changes, a.workers)
    elif a.action == "train":
        print(
            json.dumps(
                train_there(
                    a.folder, a.pieces, a.results, a.budget, a.largest, a.device, a.changes, a.workers, not a.no_states
                ),
                indent=1,
            )
        )
    else:
        print("brought home:", ", ".join(bring_home(a.results)) or "nothing")


if __name__ == "__main__":
    main()
