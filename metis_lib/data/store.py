"""A corpus on disk: its manifest, and its recordings as one array.

A manifest has one JSON line an utterance, checked when read: a recording (path relative to the manifest's
folder), what is said in it and by whom, where it comes from and under which licence it may be used.

Trainers read one memory-mapped array (:class:`FlatStore`), so that a crop costs no decoding: of all utterances of a
split one after the other, with their ids, speakers, texts and ends in ``index.json``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from torch import Tensor

from metis_lib import audio
from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError
from metis_lib.tokenizers.text import VOICES

UNKNOWN = "unknown"
"""The speaker of recordings of which nobody says who speaks."""
SPLITS = ("train", "validation", "test", "seen")
"""``test`` holds out voices and sentences; ``seen`` sentences alone, said by voices of the training."""


@dataclass(frozen=True)
class Row:
    """One utterance: ``duration``, ``start`` and ``end`` in seconds, ``path`` relative to ``root``.

    ``start``/``end`` select a span of the file (None: the whole file); ``duration`` is the span's.
    ``text`` is empty where nobody wrote down what is said.  ``human`` tells recordings of people from
    synthetic speech.  ``video`` is a film of the speaker, relative to ``root`` as well.
    """

    id: str
    path: str
    text: str
    language: str
    speaker: str
    duration: float
    split: str
    source: str
    licence: str
    human: bool
    start: float | None = None
    end: float | None = None
    video: str | None = None
    root: Path = field(default=Path("."), compare=False, repr=False)

    @property
    def audio(self) -> Path:
        """Where the recording lies."""
        return self.root / self.path


_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str, "path": str, "text": str, "language": str, "speaker": str, "duration": (int, float),
    "split": str, "source": str, "licence": str, "human": bool, "start": (int, float), "end": (int, float),
    "video": str,
}  # fmt: skip
_OPTIONAL = {"start", "end", "video"}


def parse_row(values: Any, *, root: Path, where: str) -> Row:
    """Check one decoded line and make it a row.

    Raises:
        MetisError: a key is missing, unknown or of the wrong type, or a value is out of range; the
            message begins with ``where`` (file and line).
    """
    if not isinstance(values, dict):
        raise MetisError(f"{where}: a row must be a JSON object, not {type(values).__name__}")
    missing = [k for k in _TYPES if k not in values and k not in _OPTIONAL]
    unknown = sorted(set(values) - set(_TYPES))
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"has unknown keys {', '.join(unknown)}"
        raise MetisError(f"{where}: the row {what}")
    for key, kind in _TYPES.items():
        value = values.get(key)
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong and not (value is None and key in _OPTIONAL):
            raise MetisError(f"{where}: {key} must not be {value!r}")
    if values["split"] not in SPLITS:
        raise MetisError(f"{where}: split must be one of {', '.join(SPLITS)}, not {values['split']!r}")
    start, end = values.get("start") or 0.0, values.get("end")
    most = float("inf")
    if not 0 < values["duration"] < most or not 0 <= start < most or not (end is None or start < end < most):
        raise MetisError(f"{where}: duration, start and end must be positive seconds in order")
    if not values["id"] or not values["path"]:
        raise MetisError(f"{where}: id and path must not be empty")
    return Row(**values, root=root)


def read_manifest(path: str | os.PathLike[str]) -> list[Row]:
    """Read and check a manifest.

    Args:
        path: the JSONL file.

    Raises:
        MetisError: no such file, nothing in it, a bad row, or an id twice; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise MetisError(
            f"{path}: no such manifest; `metis prepare manifest` makes one, of the nano corpus `metis prepare nano`"
        )
    rows: list[Row] = []
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise MetisError(f"{path}: not in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise MetisError(f"{where}: not JSON ({error.msg})") from None
        row = parse_row(values, root=path.parent, where=where)
        if row.id in seen:
            raise MetisError(f"{where}: the id {row.id!r} occurs twice")
        seen.add(row.id)
        rows.append(row)
    if not rows:
        raise MetisError(f"{path}: the manifest is empty")
    return rows


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write decoded rows, one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Decoded lines of a JSONL file; a last line cut short by a crash is left out; [] if no file.

    MetisError: a line that is no JSON.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line.strip()]
    except ValueError as error:
        raise MetisError(f"{path}: not lines of JSON ({error})") from error


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows atomically, in the order given (without ``root`` and what is not given)."""
    write_jsonl(Path(path), ({k: v for k, v in vars(r).items() if k != "root" and v is not None} for r in rows))


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

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatStore, (self.folder,)  # workers map the file; they do not get a copy of it

    def __len__(self) -> int:
        return len(self.items)

    def length(self, i: int) -> int:
        """Length of item ``i`` along the first axis."""
        return int(self.ends[i] - self.starts[i])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data[self.starts[i] : self.ends[i]]

    @staticmethod
    def write(folder: Path, pieces: Iterable[tuple[dict[str, Any], np.ndarray]]) -> FlatStore:
        """Write ``(record, array)`` pieces; the folder appears whole or not at all.

        Of several processes one writes; what it has made meanwhile is what the others get.
        """
        made, index = None, folder / "index.json"
        if index.is_file():
            made = index.stat().st_mtime_ns
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock")):
            if index.is_file() and index.stat().st_mtime_ns != made:
                return FlatStore(folder)
            return FlatStore._write(folder, pieces)

    @staticmethod
    def _write(folder: Path, pieces: Iterable[tuple[dict[str, Any], np.ndarray]]) -> FlatStore:
        temporary = folder.with_name(folder.name + ".part")
        temporary.mkdir(exist_ok=True)
        items, end, shape, dtype = [], 0, (), np.dtype(np.int16)
        with open(temporary / "raw", "wb") as stream:
            for record, array in pieces:
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


def read_span(row: Row, **limits: Any) -> Tensor:
    """The recording of a row ``[S]`` at 24 kHz; of a long file, only the span is decoded.

    Raises:
        MetisError: as :func:`metis_lib.audio.read`, whose ``limits`` these are.
    """
    import soundfile

    if row.start is None and row.end is None:
        return audio.read(row.audio, AUDIO_RATE, **limits)
    try:
        with soundfile.SoundFile(str(row.audio)) as file:
            first = file.seek(round((row.start or 0.0) * file.samplerate))
            count = -1 if row.end is None else round(row.end * file.samplerate) - first
            span = file.read(count, "float32", always_2d=True), file.samplerate
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:
        raise MetisError(f"{row.path}: the span cannot be read ({str(error).rsplit(': ', 1)[-1]})") from error
    return audio.load(span, AUDIO_RATE, **limits)


def store_waves(rows: Sequence[Row], folder: Path) -> FlatStore:
    """Decode recordings to 24 kHz int16 once; an existing store with the same ids is taken as it is.

    One that cannot be read has no samples there, and a warning says how many have none; MetisError where all have none.
    """
    if (folder / "index.json").is_file():
        store = FlatStore(folder)
        if [item["id"] for item in store.items] == [row.id for row in rows]:
            return store
    bad: list[str] = []

    def decode(row: Row) -> np.ndarray:
        try:
            return (read_span(row).numpy() * 32767).round().astype(np.int16)
        except MetisError as error:  # deleted since, or silent
            bad.append(str(error))
            return np.zeros(0, np.int16)

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        with ThreadPoolExecutor(2) as pool:
            for row, wav in zip(rows, pool.map(decode, rows), strict=True):
                said = row.text if row.language in VOICES else ""  # nobody here reads it
                record = {"id": row.id, "speaker": row.speaker, "text": said, "language": row.language}
                film = {"video": os.path.abspath(row.root / (row.video or "")), "film_start": row.start or 0.0}
                yield record | {"human": row.human} | (film if row.video else {}), wav
        if len(bad) == len(rows):
            raise MetisError(f"none of the {len(rows)} recordings can be read, the last one for: {bad[-1]}")

    found = FlatStore.write(folder, pieces())
    if bad:
        warnings.warn(f"{len(bad)} of {len(rows)} recordings cannot be read, the first for: {bad[0]}", stacklevel=2)
    return found
