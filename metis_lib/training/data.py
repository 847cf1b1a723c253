"""From a corpus to what trainers read: wave, feature and token stores under ``$METIS_HOME/prepared``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metis_lib import audio
from metis_lib.assets import metis_home, sha256_file
from metis_lib.config import AUDIO_RATE, SSL_RATE
from metis_lib.data.simulate import Noises, Rooms, degrade
from metis_lib.data.store import FlatStore, Row, read_manifest, store_waves, wave
from metis_lib.errors import MetisError
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder, fbank
from metis_lib.tokenizers.text import PhoneTokenizer


def corpus(name: str = "nano") -> Path:
    """Folder of a prepared corpus."""
    return metis_home() / "corpora" / name


def prepared(name: str = "nano") -> Path:
    """Folder of what is prepared from a corpus: another one whenever its manifest changes."""
    manifest = corpus(name) / "manifest.jsonl"
    label = sha256_file(manifest)[:8] if manifest.is_file() else "none"
    return metis_home() / "prepared" / f"{name}-{label}"


def rows_of(split: str, name: str = "nano") -> list[Row]:
    """Rows of one split of a corpus."""
    return [row for row in read_manifest(corpus(name) / "manifest.jsonl") if row.split == split]


def waves_of(split: str, name: str = "nano") -> FlatStore:
    """Wave store of one split, made on first use."""
    return store_waves(rows_of(split, name), prepared(name) / f"waves-{split}")


def padded(arrays: Sequence[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stack tensors ``[T, ...]`` of different lengths: ``[B, T, ...]`` and lengths ``[B]``."""
    lengths = torch.tensor([len(array) for array in arrays])
    return torch.nn.utils.rnn.pad_sequence(list(arrays), batch_first=True, padding_value=value), lengths


def filterbanks_of(split: str, name: str = "nano") -> FlatStore:
    """Filterbank frames ``[T, 160]`` float16 of one split, with ``phones`` (ids) in each record."""
    folder = prepared(name) / f"filterbanks-{split}"
    waves = waves_of(split, name)
    if (folder / "index.json").is_file():
        return FlatStore(folder)
    phones = phones_of(waves)

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for i, item in enumerate(waves.items):
            wav = audio.resample(wave(waves, i), AUDIO_RATE, SSL_RATE)
            if len(wav) < SSL_RATE // 4:
                continue
            features, lengths = fbank([wav])
            rows = features[0, : int(lengths[0])].numpy().astype(np.float16)
            yield {**item, "wave": i, "phones": phones[i]}, rows

    return FlatStore.write(folder, pieces())


def phones_of(waves: FlatStore) -> list[list[int]]:
    """Phone ids of every recording of a store; empty where the text holds nothing to say."""
    tokenizer = PhoneTokenizer()
    out = []
    for item in waves.items:
        try:
            out.append(tokenizer.encode(item["text"]))
        except MetisError:
            out.append([])
    return out


def degraded_of(split: str, name: str = "nano", seed: int = 0) -> FlatStore:
    """Filterbank frames of every recording of a split, degraded once (``done`` says how), for enhancement.

    Training noise is heard in ``train``, the held-out recordings otherwise.
    """
    folder = prepared(name) / f"degraded-{split}-{seed}"
    if (folder / "index.json").is_file():
        return FlatStore(folder)
    clean, waves = filterbanks_of(split, name), waves_of(split, name)
    noises = Noises.load(corpus(name), split="train" if split == "train" else "test")
    rooms = Rooms.load(corpus(name))

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for k, item in enumerate(clean.items):
            rng = np.random.default_rng([seed, k])
            wav = wave(waves, item["wave"]).numpy()
            noisy, _, done = degrade(
                wav, AUDIO_RATE, noises=noises, rooms=rooms, generator=rng, speaker=item["speaker"]
            )
            features, lengths = fbank([audio.resample(torch.from_numpy(noisy), AUDIO_RATE, SSL_RATE)])
            rows = features[0, : int(lengths[0])].numpy().astype(np.float16)
            yield {**item, "done": done}, rows

    return FlatStore.write(folder, pieces())


@torch.no_grad()
def features_of(frames: FlatStore, encoder: SSLEncoder, folder: Path) -> FlatStore:
    """Normalised SSL features ``[T, C]`` float16 of a store of filterbank frames."""

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for i, item in enumerate(frames.items):
            x = torch.from_numpy(frames[i].astype(np.float32))[None]
            yield item, encoder.normalise(encoder(x))[0].numpy().astype(np.float16)

    return FlatStore.write(folder, pieces())


@torch.no_grad()
def tokens_of(
    features: FlatStore, waves: FlatStore, semantic: SemanticCodec, acoustic: AcousticCodec, folder: Path
) -> FlatStore:
    """Both token streams ``[T, 1 + Q]`` int16 (SSL token first) of the recordings behind a feature store."""

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for i, item in enumerate(features.items):
            ssl = semantic.quantize(torch.from_numpy(features[i].astype(np.float32))[None])[0][0]
            codes = acoustic.encode(wave(waves, item["wave"])[None])[0]
            frames = min(len(ssl), len(codes))
            yield item, torch.cat([ssl[:frames, None], codes[:frames]], dim=1).numpy().astype(np.int16)

    return FlatStore.write(folder, pieces())
