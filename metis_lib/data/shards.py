"""Tokenise once: a manifest to WebDataset shards of SSL and acoustic tokens, and readers for them.

A folder holds ``settings.json`` (what made it), ``NAME-000000.tar`` (an utterance is ``KEY.json``,
``KEY.tokens.npy`` and, where asked for, ``KEY.features.npy``), beside every tar a JSON file with its hash, its
members' offsets and the recordings left out, and ``index.json`` once every shard is there.  A shard's bytes
depend on rows, recordings, weights and settings alone: not on ranks, threads, kills or the hour.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metis_lib import audio, config
from metis_lib.checkpoints import load_config_and_card, locate, sha256, system_hash
from metis_lib.config import AUDIO_RATE, FRAME_RATE, SSL_RATE
from metis_lib.data.store import Row, read_manifest, read_span
from metis_lib.errors import MetisError
from metis_lib.tokenizers.semantic import freeze
from metis_lib.tokenizers.ssl import fbank
from metis_lib.tokenizers.text import PhoneTokenizer

LIMITS = {"min_seconds": 0.2, "max_seconds": 60.0}
"""Durations taken, as in the pipeline."""
AGAIN = "is missing or damaged; delete what is left of it and run `metis prepare tokens` again"
_PARTS = {
    "ssl": config.SSLConfig, "semantic_codec": config.SemanticCodecConfig, "acoustic_codec": config.AcousticCodecConfig
}  # fmt: skip
_HOST = re.sub(r"\W", "-", platform.node())


def key_of(id: str) -> str:
    """A row's key in a shard: ``urllib.parse.unquote`` gives the id back; ids too long for a tar are hashed."""
    key = quote(id, safe="").replace(".", "%2E")
    return key if len(key) <= 80 else hashlib.sha256(id.encode()).hexdigest()


def _given(row: Row) -> dict[str, Any]:
    """A row as its manifest has it."""
    return {key: value for key, value in vars(row).items() if key != "root" and value is not None}


@contextmanager
def _whole(path: Path, *, once: bool = False) -> Iterator[io.BufferedRandom]:
    """A file written beside and named when complete; ``once``: a file of that name that is there stays."""
    part = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.part")
    try:
        with open(part, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        try:
            (os.link if once else os.replace)(part, path)
        except OSError:  # of two equal writers the first wins; or this disk knows no hard links
            if not (once and path.exists()):
                os.replace(part, path)
    except OSError as error:
        raise MetisError(f"cannot write {path} ({error.strerror}); make room or take another folder") from error
    finally:
        part.unlink(missing_ok=True)


def _sweep(out: Path) -> None:
    """Remove the open files of killed processes of this host; those of living ones stay."""
    for part in out.glob(f".*.{_HOST}.*.part") if os.name != "nt" else ():  # Windows: to ask a process is to kill it
        try:
            os.kill(int(part.name.split(".")[-2]), 0)
        except ProcessLookupError:
            part.unlink(missing_ok=True)
        except PermissionError:
            continue


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MetisError(f"{path} {AGAIN}") from error


def _settle(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a new folder, or refuse settings that are not the folder's."""
    if not path.exists():
        with _whole(path, once=True) as stream:
            stream.write((json.dumps(settings, indent=1) + "\n").encode())
    old = _read(path)
    said = [f"{k} {old.get(k)!s:.24} (now {settings.get(k)!s:.24})" for k in settings if old.get(k) != settings[k]]
    if said:
        raise MetisError(f"{path.parent} was made with other settings: {', '.join(said[:3])}; take another folder")


def _hear(row: Row) -> tuple[Tensor, Tensor, Tensor] | str:
    """Samples ``[S]`` at 24 kHz, filterbank ``[T, 160]`` and frames ``[1]`` that are attended to, or a reason."""
    try:
        wav = read_span(row, **LIMITS)
    except MetisError as error:
        return str(error).replace(str(row.audio), row.path)  # the same on every machine
    seconds = len(wav) / AUDIO_RATE
    if abs(seconds - row.duration) > 0.1 + 0.01 * row.duration:
        return f"{row.path}: lasts {seconds:.2f} s, {row.duration:.2f} s by the manifest (cut short?)"
    features, attended = fbank([audio.resample(wav, AUDIO_RATE, SSL_RATE)])
    return wav, features[0], attended


def batches_of(items: np.ndarray, lengths: Sequence[float] | np.ndarray, most: float) -> list[list[int]]:
    """Cut a sequence of items into batches of at most ``most`` with their padding (or one item)."""
    out: list[list[int]] = []
    batch: list[int] = []
    widest: Any = 0
    for i in items.tolist():
        wider = max(widest, lengths[i])
        if batch and wider * (len(batch) + 1) > most:
            out.append(batch)
            batch, wider = [], lengths[i]
        batch.append(i)
        widest = wider
    return [*out, batch] if batch else out


@torch.no_grad()
def _encode(models: dict[str, Any], heard: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens int16 ``[T, 1 + Q]`` and SSL features float16 ``[T, C]`` of each recording of a batch.

    The SSL encoder masks padding, so it takes the batch.  The codecs' convolutions would hear it (5 % of
    nano's acoustic frames would change), so they take one recording at a time.
    """
    wavs, frames, attended = zip(*heard, strict=True)
    ssl, where = models["ssl"], models["ssl"].mean
    padded = pad_sequence(frames, batch_first=True, padding_value=1.0).to(where)
    hidden = ssl.normalise(ssl(padded, torch.cat(attended).to(where.device)))
    for wav, own, features in zip(wavs, frames, hidden, strict=True):
        features = features[: len(own)]
        streams = [models["semantic_codec"].quantize(features[None])[0][0, :, None]]
        if "acoustic_codec" in models:
            streams.append(models["acoustic_codec"].encode(wav[None].to(where.device))[0])
        length = min(map(len, streams))  # they may differ by a frame
        tokens = torch.cat([stream[:length] for stream in streams], dim=1)
        yield tokens.cpu().numpy().astype(np.int16), features[:length].cpu().to(torch.float16).numpy()


def _add(tar: tarfile.TarFile, name: str, content: bytes | np.ndarray) -> list[int]:
    """Append a member that tells nothing of machine or hour; returns where its bytes lie: [offset, size]."""
    if isinstance(content, np.ndarray):
        buffer = io.BytesIO()
        np.save(buffer, content)
        content = buffer.getvalue()
    info, start = tarfile.TarInfo(name), tar.offset + tarfile.BLOCKSIZE
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
    return [start, info.size]


def _shard(path: Path, rows: Sequence[Row], models: dict[str, Any], settings: dict[str, Any], pool: Any) -> int:
    """Write the shard of some rows, and before it is named the JSON file beside it; returns its frames."""
    done: dict[int, Any] = {}
    lengths, phones = [row.duration for row in rows], PhoneTokenizer()
    batches = batches_of(np.argsort(lengths, kind="stable"), lengths, settings["batch_seconds"])
    waiting = {i: pool.submit(_hear, rows[i]) for batch in batches for i in batch}
    for batch in batches:
        done |= {i: waiting.pop(i).result() for i in batch}
        good = [i for i in batch if not isinstance(done[i], str)]
        done |= zip(good, _encode(models, [done[i] for i in good]) if good else (), strict=True)
    members: list[Any] = []
    with _whole(path, once=True) as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, row in enumerate(rows):
                if isinstance(done[i], str):
                    continue
                tokens, features = done[i]
                record = _given(row) | {"frames": len(tokens)}
                with suppress(MetisError):  # nothing said, or in a language without a voice
                    record["phones"] = phones.phones(row.text, row.language)
                files = {"json": json.dumps(record, ensure_ascii=False).encode(), "tokens.npy": tokens}
                files |= {"features.npy": features} if settings["features"] else {}
                spans = [_add(tar, f"{key_of(row.id)}.{kind}", content) for kind, content in files.items()]
                members.append([key_of(row.id), len(tokens), *spans])
        stream.seek(0)
        about = {
            "name": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": stream.tell(),
            "items": len(members), "frames": sum(member[1] for member in members), "members": members,
            "skipped": [{"id": row.id, "reason": done[i]} for i, row in enumerate(rows) if isinstance(done[i], str)],
        }  # fmt: skip
        with _whole(path.with_suffix(".json")) as beside:
            beside.write(json.dumps(about, ensure_ascii=False).encode())
    return about["frames"]


def _finish(out: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Write ``index.json`` if every shard is there, whoever made it; returns its totals."""
    if not all(path.exists() for path in paths):
        return {}
    shards = [_read(path.with_suffix(".json")) for path in paths]
    for path, about in zip(paths, shards, strict=True):
        if path.stat().st_size != about["bytes"]:
            raise MetisError(f"{path} {AGAIN}")
        about["skipped"] = len(about["skipped"])
        del about["members"]
    for part in out.glob(".*.tar.*.part"):  # of other hosts, or of a second process of this rank, which may go on
        with suppress(OSError):
            part.unlink()
    totals = {key: sum(about[key] for about in shards) for key in ("items", "skipped", "frames", "bytes")}
    totals["hours"] = round(totals["frames"] / FRAME_RATE / 3600, 4)
    with _whole(out / "index.json") as stream:
        stream.write((json.dumps({**totals, "shards": shards}, indent=1) + "\n").encode())
    return totals


def tokenise(
    manifest: str | Path, out: str | Path, *, system: str | Path = "nano", split: str | None = None,
    shard_items: int = 256, features: bool = False, acoustic: bool = True, device: str = "auto",
    dtype: str = "float32", batch_seconds: float = 60.0, rank: int | None = None, world: int | None = None,
    workers: int = 2, say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the tokens of a manifest's recordings as shards into ``out``; goes on where a call was killed.

    Args:
        system: ``nano``, ``debug`` (random weights) or the folder of a system.
        split: of the rows, and the name of the shards; without it all rows, and ``tokens``.
        features, acoustic: whether to write the SSL features, the acoustic codes.
        device: ``auto`` is the GPU numbered ``LOCAL_RANK`` where there is one.
        batch_seconds: how much the SSL encoder hears at once, padding included.
        rank, world: rank r makes the shards r, r + world, ...; from torchrun's environment if not given.
            Ranks need not talk: whichever finds that all shards are there writes the index.
        workers: threads that read recordings ahead, at most a shard.

    Returns:
        ``shards``, ``written``, ``seconds`` (of audio) and ``wall_seconds`` of this call; and once the folder
        is complete, ``items``, ``skipped``, ``frames``, ``bytes`` and ``hours`` of all of it.

    Raises:
        MetisError: no rows, a folder of other settings, a damaged shard, a full disk.
    """
    from metis_lib.pipeline import pick_device
    from metis_lib.stores import Folder, Random

    out, system, begun = Path(out), str(system), time.perf_counter()
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", 1)) if world is None else world
    if not 0 <= rank < world or min(shard_items, workers) < 1 or dtype not in ("float32", "bfloat16", "float16"):
        raise MetisError("give 0 <= rank < world, shard_items and workers above 0, dtype float32, bfloat16 or float16")
    rows = [row for row in read_manifest(manifest) if split in (None, row.split)]
    if not rows:
        raise MetisError(f"{manifest} has no rows of the split {split!r}")
    if not any(row.audio.is_file() for row in rows):  # a disk that is not mounted is no list of bad recordings
        raise MetisError(f"none of the recordings of {manifest} is there; look for {rows[0].audio}")
    where = pick_device(device)
    if device == "auto" and where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    parts = list(_PARTS)[: 3 if acoustic else 2]
    if system == "debug":
        configs = {part: getattr(config.preset(system), part.removesuffix("_codec")) for part in parts}
        weights = {"debug": "random"}
    else:
        configs = {part: load_config_and_card(locate(system) / part, _PARTS[part])[0] for part in parts}
        weights = {part: system_hash(locate(system) / part) for part in parts}
    store: Any = Random(system) if system == "debug" else Folder(system)
    lines = [json.dumps(_given(row), sort_keys=True) for row in rows]
    settings = {
        "split": split, "shard_items": shard_items, "features": features, "acoustic": acoustic, "dtype": dtype,
        "device": where.type, "batch_seconds": batch_seconds, "rows": len(rows),
        "manifest_sha256": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "weights_sha256": weights,
        "config": {part: config.to_dict(values) for part, values in configs.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    _settle(out / "settings.json", settings)
    paths = [out / f"{split or 'tokens'}-{i:06d}.tar" for i in range(-(-len(rows) // shard_items))]
    models, written, seconds = None, 0, 0.0
    with ThreadPoolExecutor(workers) as pool:
        for i in range(rank, len(paths), world):
            if paths[i].exists() and paths[i].with_suffix(".json").exists():
                continue
            models = models or {
                part: freeze(store.part(part.removesuffix("_codec")).to(where, getattr(torch, dtype))) for part in parts
            }
            some = rows[i * shard_items : (i + 1) * shard_items]
            seconds += _shard(paths[i], some, models, settings, pool) / FRAME_RATE
            written += 1
            say(f"{paths[i].name}: {seconds / (time.perf_counter() - begun):.0f} times real time so far")
    took = {"seconds": round(seconds, 2), "wall_seconds": round(time.perf_counter() - begun, 2)}
    return {"shards": len(paths), "written": written, **took, **_finish(out, paths)}


class Shards:
    """A complete folder at random: ``shards[i]`` is (record, tokens), or (record, tokens, features).

    ``record`` is the manifest's row with ``frames`` and, where the text can be read, ``phones`` (symbols, for
    any phone table); tokens int16 ``[T, 1 + Q]``, SSL first; features float16 ``[T, C]``.  Memory maps are
    opened on demand and few at a time.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read(self.folder / "index.json")
        self.ends = np.cumsum([about["items"] for about in self.index["shards"]])
        self._open = lru_cache(maxsize=512)(self._map)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.folder,)

    def __len__(self) -> int:
        return self.index["items"]

    def _map(self, shard: int) -> tuple[Path, mmap.mmap, list[Any]]:
        about = self.index["shards"][shard]
        path = self.folder / about["name"]
        if not path.is_file() or path.stat().st_size != about["bytes"]:
            raise MetisError(f"{path} {AGAIN}")
        with open(path, "rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return path, data, _read(path.with_suffix(".json"))["members"]

    def _item(self, i: int, parts: int | None = None) -> tuple[Any, ...]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        shard = int(np.searchsorted(self.ends, i % len(self), side="right"))
        path, data, members = self._open(shard)
        spans = members[i % len(self) - self.ends[shard]][2:][:parts]  # counted from the shard's end
        record, *arrays = (data[start : start + size] for start, size in spans)
        try:
            return json.loads(record), *(np.load(io.BytesIO(array)) for array in arrays)
        except (ValueError, EOFError) as error:
            raise MetisError(f"{path} {AGAIN}") from error

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return self._item(i)

    def record(self, i: int) -> dict[str, Any]:
        """What is known of item ``i``, without its tokens."""
        return self._item(i, 1)[0]

    def lengths(self) -> np.ndarray:
        """Frames of every item, to plan batches by."""
        full = (shard for shard, about in enumerate(self.index["shards"]) if about["items"])
        return np.array([member[1] for shard in full for member in self._open(shard)[2]])

    def verify(self) -> None:
        """Read every shard and compare its hash; the error names those that are damaged."""
        paths = {self.folder / about["name"]: about["sha256"] for about in self.index["shards"]}
        bad = [str(path) for path, wanted in paths.items() if not path.is_file() or sha256(path) != wanted]
        if bad:
            raise MetisError(f"{', '.join(bad)} {AGAIN}")
