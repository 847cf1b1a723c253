"""What a run writes besides its numbers: JSON, content hashes and provenance."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from metis_lib.assets import sha256_file
from metis_lib.errors import MetisError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
_VERSIONS = (
    *("torch", "transformers", "peft", "speechbrain", "faster-whisper", "ctranslate2", "onnxruntime", "pesq"),
    *("pystoi", "jiwer", "whisper-normalizer", "praat-parselmouth", "zhon", "numpy", "scipy", "soxr", "papermill"),
)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused."""
    from metis_lib.data.store import write_text  # and torch with it, which `metis lab` need not wait for

    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``, or None when it is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sha256_of(value: Any) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def sha256_files(paths: Iterable[Path], base: Path) -> str:
    """SHA-256 over names (relative to ``base``) and contents of several files."""
    return sha256_of([[str(path.relative_to(base)), sha256_file(path)] for path in sorted(paths)])


def testset_hash(folder: Path) -> str:
    """Hash of a test set for cache keys: its manifest, and the names and sizes of all its files."""
    files = [[str(file.relative_to(folder)), file.stat().st_size] for file in sorted(folder.rglob("*.*"))]
    return sha256_of([sha256_file(folder / "manifest.jsonl"), files])


def code_hash(*names: str) -> str:
    """Hash of the library's own code and tables ``names`` (files or folders of the package), for cache keys."""
    places = [PACKAGE / name for name in names]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*.[pj]*"))]
    return sha256_files((file for file in files if file.suffix in (".py", ".json")), PACKAGE)


def checkpoint_hashes(checkpoint: str) -> dict[str, str | None]:
    """Hashes of a system's weights and configurations (None: a system without files, such as debug)."""
    from metis_lib.checkpoints import locate

    kinds = {"checkpoint_sha256": "*.safetensors", "config_sha256": "*.json"}
    try:
        folder = locate(checkpoint)
    except MetisError:
        return dict.fromkeys(kinds)
    return {key: sha256_files(folder.rglob(pattern), folder) for key, pattern in kinds.items()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance(checkpoint: str, manifest: Path) -> dict[str, Any]:
    """What numbers depend on: commit and whether the code differs from it (results do not count; None outside a
    checkout), hashes of system and test set, versions of Python and of packages."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":!results")
    return {
        "commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes),
        **checkpoint_hashes(checkpoint), "manifest_sha256": sha256_file(manifest),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}},
    }  # fmt: skip


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes, and of the accelerator if torch has used one."""
    import resource  # not on Windows

    import torch

    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        peak["peak_device_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    return peak


def relative(path: Path) -> str:
    """``path`` relative to the working directory where it lies inside, else as it is (for records)."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
