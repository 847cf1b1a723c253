"""Train pieces of nano on a machine that has PyTorch and nothing of ours: no corpus, no tyro, no audio libraries.

    python -m recipes.nano.trip pack OUT --megabytes 50      here: tokens and weights into one folder
    python -m recipes.nano.trip train OUT stage1 tts --budget 9m --results RESULTS --largest 15     there
    python -m recipes.nano.trip join RESULTS                 here again: the parts into the growing system

What comes back are weights (bf16), logs, and the state to go on from, cut into files of at most ``--largest`` MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from metis_lib.config import preset
from metis_lib.data.shards import pack
from metis_lib.errors import MetisError
from metis_lib.training import queue
from metis_lib.training.loop import seconds_of
from metis_lib.training.recipes import FOLDERS, Job, options_for, settings_for, train

QUEUE = Path(__file__).with_name("queue.json")
FROM_TOKENS = ("stage1", "stage2_layer1", "stage2_full", "tts")
"""Pieces that need nothing but tokens and earlier weights."""


def pack_up(out: Path, megabytes: float, path: Path = QUEUE) -> dict[str, object]:
    """Write ``train`` and ``validation`` tokens and the weights so far into ``out``; what it holds."""
    found = queue.read(path)
    manifest = queue.metis_home() / "corpora" / found["system"] / "manifest.jsonl"
    job = Job(
        "stage2_full", preset(found["preset"]), queue.home(found), settings_for("stage1", found["preset"]), manifest
    )
    out.mkdir(parents=True, exist_ok=True)
    held: dict[str, object] = {}
    for part in ("stage1", "stage2_layer1", "stage2_full", "tasks/tts"):
        if (job.out / part / "config.json").is_file():
            shutil.copytree(job.out / part, out / "system" / part, dirs_exist_ok=True)
    weights = sum(file.stat().st_size for file in (out / "system").rglob("*.*")) / 1e6
    held["validation"] = pack(job.tokens("validation"), out / "validation.safetensors", megabytes=megabytes / 20)
    held["train"] = pack(job.tokens("train"), out / "train.safetensors", megabytes=megabytes * 0.95 - weights)
    shutil.copy(path, out / "queue.json")
    return held


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
    steps: int | None = None, workers: int = 0, states: bool = True,
) -> dict[str, object]:  # fmt: skip
    """Train pieces one after the other, each for an equal part of the budget; the parts and logs go to ``results``."""
    if set(pieces) - set(FROM_TOKENS) or not pieces:
        raise MetisError(f"from tokens alone: {', '.join(FROM_TOKENS)}; not {', '.join(pieces)}")
    found, scores = queue.read(folder / "queue.json"), dict[str, object]()
    for piece in pieces:
        entry = next((e for e in found["pieces"] if e["model"] == piece and e.get("state") != "done"), None)
        if entry is None:
            raise MetisError(f"the queue has no open piece {piece}")
        changes = {**entry.get("settings", {}), **({"steps": steps} if steps else {})}
        job = Job(
            piece, preset(found["preset"]), folder / "system", settings_for(piece, found["preset"], **changes),
            shards=folder, mode=entry.get("mode", "lora"), rank=entry.get("rank", 16),
            options=options_for(piece, found["preset"]) | entry.get("options", {}), workers=workers,
            about={"data": found["data"], "licence": found["licence"]},
        )  # fmt: skip
        left = f"{seconds_of(budget) / len(pieces):.0f}s"
        scores[piece] = train(
            job, budget=left, first=entry.get("steps", 0), device=device, say=lambda line: print(line, flush=True)
        )
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
    (results / "scores.json").write_text(json.dumps(scores, indent=1))
    return scores


def bring_home(results: Path, path: Path = QUEUE) -> list[str]:
    """Put parts of ``results`` into the growing system and their scores into the queue; which ones."""
    found, came = queue.read(path), list[str]()
    join_files(results)
    for entry in found["pieces"]:
        part = results / FOLDERS.get(entry["model"], entry["model"]).replace("/", "-")
        if not (part / "config.json").is_file() or entry["model"] in came or entry.get("state") == "done":
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
    return came


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    one = actions.add_parser("pack")
    one.add_argument("out", type=Path)
    one.add_argument("--megabytes", type=float, default=50.0)
    two = actions.add_parser("train")
    two.add_argument("folder", type=Path)
    two.add_argument("pieces", nargs="+")
    two.add_argument("--results", type=Path, required=True)
    two.add_argument("--budget", default="9m")
    two.add_argument("--largest", type=float, default=15.0, help="MB of a file that comes back")
    two.add_argument("--device", default="auto")
    two.add_argument("--steps", type=int, help="horizon of the schedule; the queue's by default")
    two.add_argument("--workers", type=int, default=0)
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
        print(json.dumps(pack_up(a.out, a.megabytes), indent=1))
    elif a.action == "train":
        print(
            json.dumps(
                train_there(
                    a.folder, a.pieces, a.results, a.budget, a.largest, a.device, a.steps, a.workers, not a.no_states
                ),
                indent=1,
            )
        )
    else:
        print("brought home:", ", ".join(bring_home(a.results)) or "nothing")


if __name__ == "__main__":
    main()
