"""Manifests: one JSON line per utterance, checked when read.

A row names a recording (path relative to the manifest's folder), what is said in it and by whom,
where it comes from and under which licence it may be used.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One utterance: ``duration``, ``start`` and ``end`` in seconds, ``path`` relative to ``root``.

    ``start``/``end`` select a span of the file (None: the whole file); ``duration`` is the span's.
    ``human`` tells recordings of people from synthetic speech.
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
    root: Path = field(default=Path("."), compare=False, repr=False)

    @property
    def audio(self) -> Path:
        """Where the recording lies."""
        return self.root / self.path

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in the file (``root`` and unused ``start``/``end`` left out)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "root"}
        return {k: v for k, v in values.items() if v is not None}


_TYPES: dict[str, type | tuple[type, ...]] = {
    "id": str, "path": str, "text": str, "language": str, "speaker": str, "duration": (int, float),
    "split": str, "source": str, "licence": str, "human": bool, "start": (int, float), "end": (int, float),
}  # fmt: skip
_OPTIONAL = {"start", "end"}


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
    if not 0 < values["duration"] < float("inf") or start < 0 or (end is not None and not start < end):
        raise MetisError(f"{where}: duration, start and end must be positive seconds in order")
    if not values["id"] or not values["path"]:
        raise MetisError(f"{where}: id and path must not be empty")
    return Row(**values, root=root)


def read_manifest(path: str | os.PathLike[str], *, check_files: bool = False) -> list[Row]:
    """Read and check a manifest.

    Args:
        path: the JSONL file.
        check_files: also look whether every recording exists.

    Raises:
        MetisError: no such file, nothing in it, a bad row, an id twice, or (asked for) a missing
            recording; the message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise MetisError(f"{path}: no such manifest; make the nano corpus by `metis prepare nano`")
    rows: list[Row] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
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
        if check_files and not row.audio.is_file():
            raise MetisError(f"{where}: the recording {row.path} is missing")
        seen.add(row.id)
        rows.append(row)
    if not rows:
        raise MetisError(f"{path}: the manifest is empty")
    return rows


def row(
    id: str, path: Path, root: Path, text: str, speaker: str, samples: int, split: str, source: str,
    licence: str, human: bool,
) -> dict[str, Any]:  # fmt: skip
    """A manifest row of a 24 kHz English recording."""
    return {
        "id": id, "path": path.relative_to(root).as_posix(), "text": text, "language": "en",
        "speaker": speaker, "duration": round(samples / AUDIO_RATE, 3), "split": split, "source": source,
        "licence": licence, "human": human,
    }  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write decoded rows, one JSON object a line, atomically."""
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Decoded lines of a JSONL file; a last line cut short by a crash is left out; [] if no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line.strip()]


def write_manifest(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write rows atomically, in the order given."""
    write_jsonl(Path(path), (r.to_json() for r in rows))
