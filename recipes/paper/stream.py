"""Do token shards of a thousand hours stream fast enough, in flat memory?  Writes ``results/bench/stream.json``.

    python -m recipes.paper.stream [--hours 1000] [--folder SCRATCH] [--seconds 60] [--out results/bench]

The shards hold random tokens (6.3 MB an hour, removed afterwards); an epoch's batches are made as stage-1 training
makes them.  Memory is the process's own (RssAnon): the pages of mapped shards are the system's to drop.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib.data.shards import Shards
from metis_lib.data.store import write_text
from metis_lib.training.data import Feed, Tokens
from metis_lib.training.loop import TrainSettings

ITEMS = 4096


def write_shards(folder: Path, hours: float, seed: int = 0) -> None:
    """``hours`` of utterances of 2 to 8 s with random tokens and phones, in shards of 4,096, in the format of ours."""
    rng, shards, left = np.random.default_rng(seed), list[dict[str, Any]](), hours * 180_000
    folder.mkdir(parents=True, exist_ok=True)
    while left > 0:
        path, buffer, members, frames = folder / f"train-{len(shards):06d}.tar", io.BytesIO(), list[Any](), 0
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for k in range(ITEMS):
                length = int(rng.integers(100, 401))
                stored = io.BytesIO()
                np.save(stored, rng.integers(0, 1024, (length, 13)).astype(np.int16))
                record = {
                    "id": f"{len(shards)}-{k}",
                    "text": "x" * 80,
                    "frames": length,
                    "phones": ["ə"] * (length // 5),
                }
                spans = []
                for kind, content in (("json", json.dumps(record).encode()), ("tokens.npy", stored.getvalue())):
                    info = tarfile.TarInfo(f"{len(shards)}-{k}.{kind}")
                    info.size, start = len(content), tar.offset + tarfile.BLOCKSIZE
                    tar.addfile(info, io.BytesIO(content))
                    spans.append([start, info.size])
                members.append([f"{len(shards)}-{k}", length, *spans])
                frames += length
                left -= length
        path.write_bytes(buffer.getbuffer())
        about = {"name": path.name, "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(), "bytes": buffer.tell()}
        about |= {"bytes": path.stat().st_size, "items": ITEMS, "frames": frames, "skipped": 0}
        write_text(path.with_suffix(".json"), json.dumps(about | {"members": members}))
        shards.append(about)
    totals = {key: sum(shard[key] for shard in shards) for key in ("items", "skipped", "frames", "bytes")}
    write_text(folder / "index.json", json.dumps(totals | {"hours": totals["frames"] / 180_000, "shards": shards}))


def own_megabytes() -> float:
    """Memory of this process that no file backs, in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1000


def stream(folder: Path, seconds: float) -> dict[str, Any]:
    """Read batches for ``seconds``: frames a second of this process, and its memory now and then."""
    began, source = time.perf_counter(), Tokens(Shards(folder))
    feed = Feed(source, TrainSettings(frames=4000)).open()
    next(feed)
    opened = time.perf_counter() - began
    memory, frames, clock, cpu = [own_megabytes()], 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter() - clock) < seconds:
        frames += int(next(feed)["lengths"].sum())
        if now > seconds * len(memory) / 10:
            memory.append(own_megabytes())
    took = {"frames_per_s": frames / now, "frames_per_cpu_s": frames / (time.process_time() - cpu)}
    index = source.shards.index
    size = {"hours": round(index["hours"], 1), "items": index["items"], "gigabytes": round(index["bytes"] / 1e9, 2)}
    grown = {"memory_mb": [round(m) for m in memory], "growth_mb": round(max(memory[1:]) - memory[1], 1)}
    return size | {"seconds_to_first_batch": round(opened, 2)} | {k: round(v) for k, v in took.items()} | grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the shards are written for a while")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    a = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=a.folder))
    try:
        write_shards(scratch / "shards", a.hours)
        found = stream(scratch / "shards", a.seconds)
    finally:
        shutil.rmtree(scratch)
    trained = a.out / "train.json"
    if trained.is_file():
        rate = json.loads(trained.read_text())["nano"]["tokens_per_s"]
        found |= {"nano_trains_at": round(rate), "times_nano_training": round(found["frames_per_s"] / rate, 1)}
    a.out.mkdir(parents=True, exist_ok=True)
    command = f"python -m recipes.paper.stream --hours {a.hours:g}"
    write_text(a.out / "stream.json", json.dumps({"command": command, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
