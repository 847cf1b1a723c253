"""A teacher for nano's SSL encoder: the encoder of Moonshine tiny (English, MIT), which transcribes clean speech well.

Its features of a whole corpus are computed once (hundreds of times real time) and kept beside the waves.  It teaches
only what a clean recording says; the student also hears it degraded.  Moonshine therefore never judges nano.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_lib import assets, audio
from metis_lib.config import AUDIO_RATE, SSL_RATE
from metis_lib.data.store import FlatStore
from metis_lib.tokenizers.ssl import count_frames

ASSET, FILE, WIDTH = "moonshine", "encoder_model.ort", 288
HOP, MIDDLE = 384, 447
"""Samples at 16 kHz between two frames of the teacher, and where the middle of its first one lies."""
SHORTEST = 2048


def align_frames(features: np.ndarray, frames: int) -> np.ndarray:
    """Teacher features ``[N, C]`` at the middles of ``frames`` SSL frames (320 samples apart), ``[frames, C]``."""
    at = (320 * np.arange(frames) + 280 - MIDDLE) / HOP
    low = np.clip(np.floor(at).astype(int), 0, len(features) - 1)
    high, share = np.minimum(low + 1, len(features) - 1), np.clip(at - low, 0, 1)[:, None]
    return features[low] * (1 - share) + features[high] * share


class Teacher:
    """Moonshine's encoder on onnxruntime: samples at 24 kHz to features at SSL frames."""

    def __init__(self) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(assets.fetch(ASSET) / FILE)

    def __call__(self, wav_24k: np.ndarray) -> np.ndarray:
        """Features ``[T, 288]`` float16 of samples ``[S]`` in [-1, 1] at 24 kHz."""
        wav = audio.resample(torch.from_numpy(np.ascontiguousarray(wav_24k)), AUDIO_RATE, SSL_RATE).numpy()
        frames = max(count_frames(len(wav)), 1)
        heard = np.pad(wav, (0, max(0, SHORTEST - len(wav))))[None]
        there = np.ones(heard.shape, np.int64)
        found = self.session.run(None, {"input_values": heard, "attention_mask": there})[0][0]
        return align_frames(found, frames).astype(np.float16)


@dataclass
class Taught:
    """Features that the teacher gave for a wave store, with mean and deviation ``[288]`` to standardise them by."""

    store: FlatStore
    mean: np.ndarray
    std: np.ndarray

    def __call__(self, i: int, first: int, frames: int) -> Tensor:
        """Standardised features ``[n, 288]`` of recording ``i`` from frame ``first`` on, at most ``frames``."""
        return torch.from_numpy((self.store[i][first : first + frames].astype(np.float32) - self.mean) / self.std)


def teach(waves: FlatStore, folder: Path, like: Taught | None = None) -> Taught:
    """The teacher's features of a wave store, made on first use in ``folder``; standardised ``like`` others (held-out
    ones as those of the training), else by themselves.

    Raises:
        MetisError: the teacher's weights cannot be had.
    """
    ids = [item["id"] for item in waves.items]

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        teacher = Teacher()
        for i, name in enumerate(ids):
            wav = waves[i].astype(np.float32) / 32767  # empty where the recording went away
            yield {"id": name}, teacher(wav) if len(wav) else np.zeros((0, WIDTH), np.float16)

    if (folder / "index.json").is_file() and [item["id"] for item in FlatStore(folder).items] == ids:
        store = FlatStore(folder)
    else:
        store = FlatStore.write(folder, pieces())
    if like is not None:
        return Taught(store, like.mean, like.std)
    some = store.data[:: max(1, len(store.data) // 100_000)].astype(np.float32)
    return Taught(store, some.mean(0), some.std(0) + 1e-3)
