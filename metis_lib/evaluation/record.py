"""What a run writes besides its numbers, and how it is read again: JSON, content hashes and provenance."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from metis_lib.assets import sha256_file
from metis_lib.errors import MetisError

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
_VERSIONS = (
    *("torch", "transformers", "peft", "speechbrain", "faster-whisper", "ctranslate2", "onnxruntime", "pesq"),
    *("pystoi", "jiwer", "whisper-normalizer", "praat-parselmouth", "zhon", "numpy", "scipy", "soxr", "papermill"),
)
_OPTIONAL = ("torchmetrics", "librosa", "funasr", "zhconv")
"""Packages of the paper's judges: told of where they are."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, what is short or flat on one line; NaN and infinity are refused."""
    from metis_lib.data.store import write_text  # and torch with it, which `metis lab` need not wait for

    write_text(path, _lines(value) + "\n")


def write_figure(path: Path, figure: Any) -> Any:
    """Save a plot as a PNG of 128 colours, a third of the bytes, and nobody sees a difference; return it."""
    import io

    from PIL import Image  # what matplotlib writes pictures with

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=110, bbox_inches="tight")
    flat = Image.open(full).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    flat.save(small, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(small.getvalue())
    part.replace(path)
    return figure


def _lines(value: Any, depth: int = 0) -> str:
    """A JSON value at a depth of nesting; half the size of an indent for every number, and as easy to compare."""
    flat = json.dumps(value, ensure_ascii=False, allow_nan=False)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if depth + len(flat) <= 240 or not any(part and isinstance(part, dict | list | tuple) for part in parts):
        return flat
    ends, inner = ("{}", "[]")[not isinstance(value, dict)], "\n" + " " * (depth + 1)
    names = [json.dumps({key: 0}, ensure_ascii=False)[1:-2] for key in value] if isinstance(value, dict) else []
    lines = (name + _lines(part, depth + 1) for name, part in zip(names or [""] * len(value), parts, strict=True))
    return f"{ends[0]}{inner}{f',{inner}'.join(lines)}\n{' ' * depth}{ends[1]}"


def read_json(path: Path) -> Any | None:
    """The JSON in ``path``, or None when it is missing or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


class Run(NamedTuple):
    """A run's folder, its summary ``{task: {system: {metric: entry}}}`` and its ``run.json``."""

    name: str
    folder: Path
    summary: dict[str, dict[str, dict[str, dict[str, Any]]]]
    about: dict[str, Any]


def read_run(folder: str | Path) -> Run:
    """A finished run.

    Raises:
        MetisError: there is none in ``folder``, or those of several test sets.
    """
    place = Path(folder)
    summary, about = read_json(place / "summary.json"), read_json(place / "run.json")
    if not summary or not about:
        raise MetisError(f"no finished run in {place} (summary.json or run.json); run: metis evaluate")
    if "manifest_sha256" not in about:
        raise MetisError(f"{place} has scores of test sets ({', '.join(summary)}); name the folder of one run")
    return Run(place.resolve().name, place, summary, about)


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


MODEL_CODE = (
    *("audio.py", "config.py", "pipeline.py", "generation.py", "bulk.py", "stores.py", "checkpoints.py", "released.py"),
    *("models", "tokenizers", "tasks.py"),
)
"""What the audio of a model depends on."""


def code_hash(*names: str) -> str:
    """Hash of the library's own code and tables ``names`` (files or folders of the package), for cache keys."""
    places = [PACKAGE / name for name in names]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*.[pj]*"))]
    return sha256_files((file for file in files if file.suffix in (".py", ".json")), PACKAGE)


def task_files() -> dict[str, str]:
    """Hashes of the files that ``METIS_TASKS`` names: code that lies outside the package."""
    paths = filter(None, os.environ.get("METIS_TASKS", "").split(os.pathsep))
    return {path: sha256_file(path) for path in paths}


def checkpoint_hashes(checkpoint: str) -> dict[str, Any]:
    """Hashes of a system's weights and configurations (None: a system without files, such as debug).

    Of published weights also the ``variants`` that tasks take by default and, under a hub's name, the ``revisions``.
    """
    from metis_lib.checkpoints import locate, own_system

    kinds = {"checkpoint_sha256": "*.safetensors", "config_sha256": "*.json"}
    try:
        if not own_system(checkpoint):
            return _released_hashes(checkpoint)
        folder = locate(checkpoint)
    except MetisError:
        return dict.fromkeys(kinds)
    return {key: sha256_files(folder.rglob(pattern), folder) for key, pattern in kinds.items()}


def _released_hashes(where: str) -> dict[str, Any]:
    """The files that are here and would be used, hashed under their names of :data:`metis_lib.released_files.FILES`.

    Nothing is fetched.  What the hub's client keeps is told by its revisions, known once it was fetched.
    """
    from huggingface_hub import try_to_load_from_cache

    from metis_lib.released import Released
    from metis_lib.released_files import FILES, TABLES
    from metis_lib.tokenizers.chinese import LEXICON

    place = Released(where, local_files_only=True)
    weights = {name: path for name in FILES if (path := place.find(name))}
    configs = {name: place.folder / name for name in ("config.json", LEXICON, *TABLES)}
    if "lips" in weights:
        configs["lips"] = weights["lips"].with_suffix(".json")
    found: dict[str, Any] = {"checkpoint_sha256": sha256_named(weights), "config_sha256": sha256_named(configs)}
    found["variants"] = dict[str, str]()
    for task in dict.fromkeys(file.task for file in FILES.values() if file.task):
        with contextlib.suppress(MetisError):  # the variant that the name tells is not one of this task
            found["variants"][task] = place.variant(task, None)
    if place.on_hub:
        revisions = set()
        for file in FILES.values():
            own = file.repo == "amphion/metis"
            repo, pinned = (place.repo, place.revision) if own else (file.repo, None)
            for revision in {pinned, pinned or file.revision or None}:
                with contextlib.suppress(ValueError):  # no name that a hub could have
                    kept = try_to_load_from_cache(repo, file.path, revision=revision)
                    if isinstance(kept, str):
                        revisions.add(f"{repo}@{Path(kept).parents[file.path.count('/')].name}")
        found["revisions"] = sorted(revisions)
    return found


def sha256_named(paths: dict[str, Path]) -> str | None:
    """SHA-256 over names and contents of the files that are there; None where there is none."""
    stats = {name: path.stat() for name, path in paths.items() if path.is_file()}
    hashes = {name: _sha256_unchanged(paths[name], s.st_size, s.st_mtime_ns) for name, s in stats.items()}
    return sha256_of(hashes) if hashes else None


@functools.lru_cache
def _sha256_unchanged(path: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file, read once while size and time stay: published weights have gigabytes, tasks ask in turn."""
    return sha256_file(path)


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
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS},
                     **{name: found for name in _OPTIONAL if (found := _version(name))}},
    }  # fmt: skip


def peak_memory() -> dict[str, int]:
    """Peak memory of this process in bytes, and of the accelerator if torch has used one."""
    import resource  # not on Windows

    import torch

    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        used = map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
        peak["peak_device_memory_bytes"] = int(max(used))
    return peak


def relative(path: Path, base: Path | None = None) -> str:
    """``path`` relative to a folder (default: the working directory) where it lies inside, else whole."""
    path, base = path.resolve(), (base or Path.cwd()).resolve()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)
