"""Token shards as one small file, for a machine that has little room or no way to reach the corpus."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib.config import FRAME_RATE
from metis_lib.data.shards import Shards, _read, _whole
from metis_lib.errors import MetisError
from metis_lib.tokenizers.text import PhoneTokenizer


class Packed:
    """Token shards as one small file (14 bytes a frame where codebooks have at most 256 entries): for a machine that
    has little room or no way to reach the corpus.  Read like :class:`Shards`; a record holds ``id``, ``speaker`` and
    ``phones``.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors.numpy import load_file

        self.path, self._data = Path(path), load_file(path)
        self._about = json.loads(zlib.decompress(self._data["about"].tobytes()))
        self.ends = np.array([len(self._data["ends"])])
        self._bounds = {key: np.concatenate([[0], self._data[key]]) for key in ("ends", "phone_ends")}
        self._symbols = {i: phone for phone, i in PhoneTokenizer().vocab.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self.path,)

    def __len__(self) -> int:
        return int(self.ends[0])

    def lengths(self) -> np.ndarray:
        """Frames of every item."""
        return np.diff(self._bounds["ends"])

    def record(self, i: int) -> dict[str, Any]:
        """``id``, ``speaker`` and ``phones``."""
        first, last = self._bounds["phone_ends"][i : i + 2]
        id, speaker = self._about[i]
        phones = [self._symbols[int(p)] for p in self._data["phones"][first:last]]
        return {"id": id, "speaker": speaker, "phones": phones}

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        first, last = self._bounds["ends"][i : i + 2]
        streams = [self._data["ssl"][first:last, None], self._data["codes"][first:last]]
        return self.record(i), np.concatenate([stream.astype(np.int16) for stream in streams], axis=1)


def pack(
    shards: Shards, path: str | Path, *, megabytes: float | None = None, layers: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Write items of ``shards`` in random order into one file of at most ``megabytes``; nano's phone table; the first
    ``layers`` of the acoustic codes (None: all).

    Returns:
        ``items``, ``hours`` and ``bytes``.
    """
    from safetensors.numpy import save_file

    vocab, columns = (
        PhoneTokenizer().vocab,
        dict[str, list[Any]](ssl=[], codes=[], phones=[], ends=[], phone_ends=[], about=[]),
    )
    about = _read(shards.folder / "settings.json") if (shards.folder / "settings.json").is_file() else {}
    codes = about.get("config", {}).get("acoustic_codec", {}).get("codebook_size", 1024)
    frames = phones = 0
    for i in np.random.default_rng(seed).permutation(len(shards)):
        record, tokens, *_ = shards[int(i)]
        ids = [vocab[p] for p in record.get("phones", ()) if p in vocab]
        narrow = tokens[:, 1 : None if layers is None else 1 + layers].astype(np.uint8 if codes <= 256 else np.int16)
        size = (
            (frames + len(tokens)) * (2 + narrow.itemsize * narrow.shape[1])
            + phones
            + len(ids)
            + 48 * (len(columns["ends"]) + 1)  # places, names
        )
        if megabytes is not None and size > megabytes * 1e6 - 2000:
            break
        frames, phones = frames + len(tokens), phones + len(ids)
        about_it = (record["id"], record.get("speaker", ""))
        values = (tokens[:, 0], narrow, np.array(ids, np.uint8), frames, phones, about_it)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    if not frames:
        raise MetisError(f"{megabytes} MB hold no item of {shards.folder}")
    arrays = {key: np.concatenate(columns[key]) for key in ("ssl", "codes", "phones")}
    arrays |= {key: np.array(columns[key], np.int32) for key in ("ends", "phone_ends")}
    arrays["about"] = np.frombuffer(zlib.compress(json.dumps(columns["about"]).encode()), np.uint8)
    with _whole(Path(path)) as stream:
        save_file(arrays, stream.name)
    return {"items": len(columns["ends"]), "hours": frames / FRAME_RATE / 3600, "bytes": Path(path).stat().st_size}
