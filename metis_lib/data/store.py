"""A corpus as one array: what trainers read, memory-mapped, so that a crop costs no decoding.

``waves.npy`` holds int16 samples of all utterances of one split one after the other, ``index.json`` their ids,
speakers, texts and ends.  :class:`FrameStore` does the same for frame-level data (features, tokens).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_lib import audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data.manifest import Row
from metis_lib.errors import MetisError


class FlatStore:
    """Items of varying length along the first axis of one flat array, with one JSON record an item."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "index.json").is_file():
            raise MetisError(f"no prepared data in {folder}; run `metis prepare nano` first")
        self.folder = folder
        self.items: list[dict[str, Any]] = json.loads((folder / "index.json").read_text())
        self.data: np.ndarray = np.load(folder / "data.npy", mmap_mode="r")
        self.ends = np.array([item["end"] for item in self.items], dtype=np.int64)
        self.starts = np.concatenate([[0], self.ends[:-1]])

    def __len__(self) -> int:
        return len(self.items)

    def length(self, i: int) -> int:
        """Length of item ``i`` along the first axis."""
        return int(self.ends[i] - self.starts[i])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data[self.starts[i] : self.ends[i]]

    @staticmethod
    def write(folder: Path, pieces: Iterable[tuple[dict[str, Any], np.ndarray]]) -> FlatStore:
        """Write ``(record, array)`` pieces; the folder appears whole or not at all."""
        temporary = folder.with_name(folder.name + ".part")
        temporary.mkdir(parents=True, exist_ok=True)
        items, end, shape, dtype = [], 0, (), np.dtype(np.int16)
        with open(temporary / "raw", "wb") as stream:
            for record, array in pieces:
                array = np.ascontiguousarray(array)
                shape, dtype = array.shape[1:], array.dtype
                stream.write(array.tobytes())
                end += len(array)
                items.append({**record, "end": end})
        if not items:
            raise MetisError(f"nothing to store in {folder}; is the corpus empty?")
        raw = np.memmap(temporary / "raw", dtype=dtype, mode="r", shape=(end, *shape))
        np.save(temporary / "data.npy", raw)
        (temporary / "raw").unlink()
        (temporary / "index.json").write_text(json.dumps(items))
        if folder.exists():
            os.replace(temporary / "data.npy", folder / "data.npy")
            os.replace(temporary / "index.json", folder / "index.json")
        else:
            os.replace(temporary, folder)
        return FlatStore(folder)


def store_waves(rows: Sequence[Row], folder: Path) -> FlatStore:
    """Decode recordings to 24 kHz int16 once; an existing store with the same ids is taken as it is."""
    if (folder / "index.json").is_file():
        store = FlatStore(folder)
        if [item["id"] for item in store.items] == [row.id for row in rows]:
            return store

    def decode(row: Row) -> np.ndarray:
        return (audio.read(row.audio, AUDIO_RATE).numpy() * 32767).round().astype(np.int16)

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        with ThreadPoolExecutor(2) as pool:
            for row, wav in zip(rows, pool.map(decode, rows), strict=True):
                record = {"id": row.id, "speaker": row.speaker, "text": row.text, "human": row.human}
                yield record, wav

    return FlatStore.write(folder, pieces())


def wave(store: FlatStore, i: int) -> Tensor:
    """Recording ``i`` of a wave store as float32 ``[S]`` in [-1, 1]."""
    return torch.from_numpy(store[i].astype(np.float32) / 32767)


def random_crops(store: FlatStore, batch: int, samples: int, rng: np.random.Generator) -> Tensor:
    """``[batch, samples]`` float32: recordings drawn by their duration, cut at random; shorter ones end in zeros."""
    weights = store.ends - store.starts
    chosen = rng.choice(len(store), size=batch, p=weights / weights.sum())
    out = np.zeros((batch, samples), dtype=np.float32)
    for row, i in enumerate(chosen):
        length = store.length(int(i))
        start = int(rng.integers(0, max(length - samples, 0) + 1))
        piece = store[int(i)][start : start + samples]
        out[row, : len(piece)] = piece / 32767
    return torch.from_numpy(out)


def frame_batches(lengths: Sequence[int], budget: int, rng: np.random.Generator, longest: int) -> Iterator[list[int]]:
    """Endless batches of item indices with at most ``budget`` padded frames, items of like length together.

    Items longer than ``longest`` frames count as ``longest`` (their crop is the reader's business).
    """
    size = np.minimum(np.asarray(lengths), longest)
    while True:
        order = np.argsort(size * rng.uniform(0.9, 1.1, len(size)), kind="stable")
        batches: list[list[int]] = []
        batch: list[int] = []
        widest = 0
        for i in order:
            widest = max(widest, int(size[i]))
            if batch and widest * (len(batch) + 1) > budget:
                batches.append(batch)
                batch, widest = [], int(size[i])
            batch.append(int(i))
        batches.append(batch)
        for k in rng.permutation(len(batches)):
            yield batches[k]
