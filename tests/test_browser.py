"""JupyterLab in a real browser: every notebook opens; the quick start and the laboratory run, move, play (minutes).

``make browser-check``.  It needs Chromium on the PATH (or ``METIS_BROWSER``) and playwright, the extra ``browser``.
With ``METIS_SCREENSHOTS`` set, pictures are kept in that folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from metis_lib.evaluation import record

ROOT = Path(__file__).resolve().parents[1]
VOICE = ROOT / "eval" / "testsets" / "human" / "cmu-forward.flac"
NOTEBOOKS = sorted(path.name for path in ROOT.glob("notebooks/*.ipynb"))
PATIENCE = 120_000
"""Milliseconds to wait for anything but a whole notebook, which may take five times as long."""
pytestmark = [pytest.mark.browser, pytest.mark.slow]


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("METIS_BROWSER") or next(filter(None, map(shutil.which, names)), None)


@dataclass
class Lab:
    """A running JupyterLab and a browser.  Notebooks are copies: JupyterLab saves them by itself."""

    browser: Any
    address: str
    token: str
    root: Path

    def call(self, path: str, method: str = "GET") -> Any:
        headers = {"Authorization": f"token {self.token}"}
        with urllib.request.urlopen(
            urllib.request.Request(self.address + path, None, headers, method=method)
        ) as answer:
            return json.loads(answer.read() or "null")

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A page with a notebook whose kernel is ready; the kernel ends with it."""
        page = self.browser.new_page(viewport={"width": 1440, "height": 1000})
        page.set_default_timeout(PATIENCE)
        try:
            page.goto(f"{self.address}/lab/tree/notebooks/{name}?token={self.token}&reset")
            page.locator(".jp-CodeCell").first.wait_for()
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            yield page
        finally:
            page.close()
            for session in self.call("/api/sessions"):
                self.call(f"/api/sessions/{session['id']}", "DELETE")

    def run(self, page: Any, name: str) -> None:
        """Run all cells as a person does; every one ends, none with an error."""
        code = [cell for cell in self.cells(name) if cell["cell_type"] == "code"]
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')]"
        done = f"n => {prompts}.filter(p => /\\d/.test(p.textContent)).length == n"
        page.wait_for_function(done, arg=len(code), timeout=5 * PATIENCE)
        self.check(page, name)

    def check(self, page: Any, name: str) -> None:
        """Save, and look for errors in what was saved and in what is shown."""
        before = (self.root / "notebooks" / name).stat().st_mtime_ns
        page.keyboard.press("Control+s")
        wait(lambda: (self.root / "notebooks" / name).stat().st_mtime_ns > before and self.cells(name))
        outputs = [output for cell in self.cells(name) for output in cell.get("outputs", [])]
        assert [output for output in outputs if output["output_type"] == "error"] == []
        for broken in ("Error displaying widget", "Loading widget...", "Traceback (most recent call last)"):
            assert page.get_by_text(broken).count() == 0, broken

    def cells(self, name: str) -> list[dict[str, Any]]:
        """The cells as saved; [] while JupyterLab writes."""
        return (record.read_json(self.root / "notebooks" / name) or {"cells": []})["cells"]


def wait(ready: Callable[[], Any], seconds: float = 300.0) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.2)


def shot(page: Any, name: str, top: Any) -> None:
    """Keep a picture of the page with ``top`` at its upper edge and the file list folded, if pictures are wanted."""
    if folder := os.environ.get("METIS_SCREENSHOTS"):
        page.keyboard.press("Control+b")
        for _ in range(2):  # pictures above may still grow
            top.evaluate("e => e.scrollIntoView()")
            page.wait_for_timeout(1500)
        page.screenshot(path=Path(folder) / f"{name}.png")
        page.keyboard.press("Control+b")


def plays(player: Any) -> None:
    """Sound that goes on: the element's own clock advances, and it holds samples."""
    assert player.evaluate("async a => { await a.play(); return a.duration }") > 0.2
    wait(lambda: player.evaluate("a => a.currentTime") > 0.1, 20)
    assert player.evaluate("a => { a.pause(); a.currentTime = 0; return a.error }") is None


def press(page: Any, text: str) -> None:
    """Press a button of the widgets and wait until its work is done."""
    page.get_by_role("button", name=text, exact=True).click()
    page.get_by_text("working …").first.wait_for(state="hidden")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium: install it (apt install chromium) or set METIS_BROWSER")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[browser]'")
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    for name in NOTEBOOKS:
        book = json.loads((ROOT / "notebooks" / name).read_text())
        for cell in book["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                cell["source"] = [*cell["source"], f"\nout = {str(root / 'out' / name[:2])!r}"]
        (root / "notebooks" / name).write_text(json.dumps(book))
    quiet = root / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER_{name}_DIR": str(root / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {"JUPYTER_TOKEN": token, "JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    command = [sys.executable, "-m", "metis_lib", "lab", "13", "--folder", str(root), f"--port={port}", "--no-browser"]
    surroundings = {key: value for key, value in os.environ.items() if key != "METIS_PLAIN_PROGRESS"} | own
    with open(root / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=log, stderr=log, start_new_session=True)
    try:
        here = Lab(None, f"http://127.0.0.1:{port}", token, root)

        def answers() -> bool:
            assert server.poll() is None, (root / "server.log").read_text()
            with contextlib.suppress(OSError):
                return bool(here.call("/api"))
            return False

        wait(answers)
        heard = root / "voice.wav"
        subprocess.run([sys.executable, "-c", TO_WAV, str(VOICE), str(heard)], check=True)
        flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
        flags += [f"--use-file-for-fake-audio-capture={heard}", "--autoplay-policy=no-user-gesture-required"]
        with playwright.sync_playwright() as driver:
            here.browser = driver.chromium.launch(executable_path=program, args=flags)
            yield here
            here.browser.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # metis and JupyterLab, which ends its kernels
        server.wait(30)
        with contextlib.suppress(OSError):
            wait(lambda: here.call("/api") is None, 30)


TO_WAV = "import sys; from metis_lib import audio; audio.write(sys.argv[2], audio.read(sys.argv[1], 48_000), 48_000)"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_opens(lab: Lab, name: str) -> None:
    with lab.open(name) as page:
        title = "".join(lab.cells(name)[0]["source"]).splitlines()[0].removeprefix("# ")
        assert page.locator(".jp-RenderedMarkdown h1").first.inner_text().rstrip("¶") == title.replace("`", "")
        assert page.locator(".jp-Dialog").count() == 0 and page.get_by_text("not trusted").count() == 0


def test_the_quick_start_runs_and_plays(lab: Lab) -> None:
    name = "00_quickstart.ipynb"
    with lab.open(name) as page:
        lab.run(page, name)
        players = page.locator(".jp-OutputArea-output audio")
        assert players.count() >= 4
        for number in range(players.count()):
            plays(players.nth(number))
        shot(page, "quickstart", page.locator(".jp-RenderedMarkdown h2").first)


def test_the_laboratory_moves_records_and_compares(lab: Lab) -> None:
    name, out = "13_laboratory.ipynb", lab.root / "out" / "13"
    with lab.open(name) as page:
        lab.run(page, name)
        panel = page.locator(".jp-OutputArea-output .widget-vbox").first
        page.wait_for_function("document.querySelectorAll('.metis audio').length == 3")
        shot(page, "laboratory", panel)
        plays(panel.locator("audio").nth(1))

        panel.get_by_label("example").select_option(index=3)
        before = panel.locator("audio").nth(1).get_attribute("src")
        steps = panel.locator(".widget-hslider", has_text="steps").first.locator(".noUi-handle")
        steps.focus()
        for _ in range(2):
            steps.press("ArrowRight")
        panel.get_by_label("seed").first.fill("7")
        panel.get_by_label("seed").first.press("Tab")
        press(page, "Generate A")
        wait(lambda: panel.locator("audio").nth(1).get_attribute("src") != before)
        assert "seed=7" in panel.locator("pre").inner_text() and "steps=12," in panel.locator("pre").inner_text()
        plays(panel.locator("audio").nth(1))

        panel.get_by_role("button", name="Record", exact=True).click()
        panel.get_by_text("recording, 2.").wait_for()
        panel.get_by_role("button", name="Stop", exact=True).click()
        wait(lambda: (out / "recordings" / "recorded-001.wav").is_file())
        wait(lambda: "recorded-001.wav" in panel.get_by_label("source").input_value())
        press(page, "Generate A")
        page.wait_for_function("document.querySelector('.metis pre')?.textContent.includes('recorded-001.wav')")

        large = lab.root / "large.wav"  # more than JupyterLab takes by itself
        soundfile.write(large, np.tile(soundfile.read(VOICE)[0], 200)[:6_000_000], 16_000)
        for file in (large, VOICE):
            with page.expect_file_chooser() as chooser:
                panel.get_by_role("button", name="Upload").click()
            chooser.value.set_files(file)
            kept = out / "recordings" / file.name
            wait(lambda kept=kept, file=file: kept.is_file() and kept.read_bytes() == file.read_bytes())
        press(page, "Compare blind")
        page.wait_for_function("document.querySelectorAll('.metis audio').length == 2")
        shot(page, "blind", panel)
        press(page, "the first")
        panel.get_by_text("Votes so far on these two settings").wait_for()
        vote = json.loads((out / "votes.jsonl").read_text())
        assert vote["vote"] == vote["order"][0] and vote["A"]["seed"] == 7 and vote["B"]["steps"] == 1
        press(page, "Save as a cell")
        wait(lambda: "recordings" in (out / "saved.ipynb").read_text())

        panel.get_by_label("task").select_option(label="Zero-shot text to speech")
        panel.get_by_label("prompt_text").wait_for()
        panel.get_by_label("text", exact=True).fill("Good morning.")
        panel.get_by_label("text", exact=True).press("Tab")
        press(page, "Generate A")
        page.wait_for_function("document.querySelector('.metis pre')?.textContent.includes('Good morning.')")
        lab.check(page, name)


def test_the_token_explorer_is_clicked(lab: Lab) -> None:
    name = "14_token_explorer.ipynb"
    with lab.open(name) as page:
        lab.run(page, name)
        panel = page.locator(".jp-OutputArea-output .widget-vbox").first
        panel.scroll_into_view_if_needed()
        canvas = panel.locator("canvas")
        size = canvas.bounding_box()
        canvas.click(position={"x": size["width"] / 2, "y": 16 * 1.5})
        middle = int(canvas.get_attribute("width")) // 2
        panel.get_by_text(f"Tokens of frame {middle},").wait_for()
        wait(lambda: panel.get_by_label("layer", exact=True).input_value() == "1")
        page.get_by_text("working …").first.wait_for(state="hidden")
        before = panel.locator("audio").nth(2).get_attribute("src")
        press(page, "Random")
        panel.get_by_text("(was").first.wait_for()
        wait(lambda: panel.locator("audio").nth(2).get_attribute("src") != before)
        plays(panel.locator("audio").nth(0))
        canvas.locator("..").press("ArrowRight")
        panel.get_by_text(f"Tokens of frame {middle + 1},").wait_for()
        press(page, "Decode")
        panel.get_by_text("as they are now").first.wait_for()
        plays(panel.locator("audio").last)
        shot(page, "tokens", panel)
        lab.check(page, name)


def test_the_evaluation_browser_sorts_and_plays(lab: Lab) -> None:
    name = "15_evaluation_browser.ipynb"
    with lab.open(name) as page:
        lab.run(page, name)
        panel = page.locator(".jp-OutputArea-output .widget-hbox", has=page.locator("select[size]")).first
        panel.scroll_into_view_if_needed()
        plays(panel.locator("audio").first)
        shot(page, "evaluation", panel)
        entries, head = panel.locator("select[size]"), panel.locator(".metis b").first
        assert entries.locator("option").first.get_attribute("value").endswith(head.inner_text())
        entries.select_option(index=1)
        wait(lambda: entries.input_value().endswith(head.inner_text()))
        assert entries.input_value() == entries.locator("option").nth(1).get_attribute("value")
        panel.get_by_label("order").select_option(label="best first")
        ends = [lambda n=n: float(entries.locator("option").nth(n).get_attribute("value").split()[0]) for n in (0, -1)]
        wait(lambda: ends[0]() < ends[1]())
        wait(lambda: entries.input_value().endswith(head.inner_text()))
        lab.check(page, name)
