"""What a run writes besides its numbers: atomic files, content hashes and provenance."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
_VERSIONS = (
    *("torch", "transformers", "peft", "speechbrain", "faster-whisper", "ctranslate2", "onnxruntime", "pesq"),
    *("pystoi", "jiwer", "whisper-normalizer", "numpy", "scipy", "soxr", "papermill"),
)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file beside and rename it, so that nobody sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``, or None when it is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_files(paths: Iterable[Path], base: Path) -> str:
    """SHA-256 over names (relative to ``base``) and contents of several files."""
    return sha256_of([[str(path.relative_to(base)), sha256_file(path)] for path in sorted(paths)])


def code_hash(*names: str) -> str:
    """Hash of the library's own files ``names`` (files or folders of the package), for cache keys."""
    files: list[Path] = []
    for name in names:
        place = PACKAGE / name
        files += sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []
    return sha256_files(files, PACKAGE)


def checkpoint_folder(checkpoint: str) -> Path | None:
    """The folder of a system given by path or by the name of a shipped one; None if it has no weights."""
    for place in (PACKAGE / "weights" / checkpoint, Path(checkpoint).expanduser()):
        if place.is_dir() and any(place.rglob("*.safetensors")):
            return place
    return None


def checkpoint_hashes(checkpoint: str) -> dict[str, str | None]:
    """Hashes of a system's weights and configurations (None: a system without files, such as debug)."""
    folder = checkpoint_folder(checkpoint)
    if folder is None:
        return {"checkpoint_sha256": None, "config_sha256": None}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "checkpoint_sha256": sha256_files([p for p in files if p.suffix == ".safetensors"], folder),
        "config_sha256": sha256_files([p for p in files if p.suffix == ".json"], folder),
    }


def git_state() -> dict[str, Any]:
    """Commit and whether the code differs from it (results do not count); None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes, and of the accelerator if torch has used one."""
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_device_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    return peak


def relative(path: Path) -> str:
    """``path`` relative to the working directory where it lies inside, else as it is (for records)."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
