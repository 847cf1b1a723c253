"""Many items by one command: folders, manifests, texts; interruptions and bad items."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from metis_lib import audio, bulk, cli
from metis_lib.errors import MetisError

pytestmark = pytest.mark.paper

RUN = ["--model=debug", "--steps=2", "--stage2-steps", "2", "1"]


@pytest.fixture
def sounds(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "in"
    for name, seconds in {"a": 0.8, "b": 1.4, "deep/c": 0.6, "deep/d": 1.1}.items():
        audio.write(folder / f"{name}.wav", 0.1 * torch.randn(int(24_000 * seconds)), 24_000)
    return folder


def lines(out):
    return [json.loads(line) for line in (out / bulk.LOG).read_text().splitlines()]


def test_folder_with_a_bad_recording(sounds, tmp_path, capsys):
    (sounds / "broken.wav").write_bytes(b"RIFFnothing")
    out = tmp_path / "out"
    assert cli.main(["generate", "se", f"--input={sounds}", f"--output={out}", "--json", *RUN]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["done"] == 4 and list(document["failed"]) == ["broken"] and "broken" in document["failed"]["broken"]
    for name in ("a", "b", "deep/c", "deep/d"):
        made, source = audio.read(out / f"{name}.flac", 24_000), audio.read(sounds / f"{name}.wav", 24_000)
        assert len(made) == len(source)
    alone = tmp_path / "alone.flac"
    assert cli.main(["generate", "se", f"--input={sounds / 'b.wav'}", f"--output={alone}", *RUN]) == 0
    assert alone.read_bytes() == (out / "b.flac").read_bytes()  # the same alone as in a batch


def test_what_is_there_is_kept_and_what_changed_is_made_again(sounds, tmp_path, capsys):
    out, command = tmp_path / "out", ["generate", "se", f"--input={sounds}", "--json", *RUN]

    def run(*more):
        assert cli.main([*command, f"--output={out}", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["done"], found["kept"]

    assert run() == (4, 0) and run() == (0, 4)
    (out / "a.flac").unlink()
    (out / "b.flac").write_bytes(b"half")
    audio.write(sounds / "deep/c.wav", 0.1 * torch.randn(20_000), 24_000)
    assert run() == (3, 1)
    assert run("--seed=5") == (4, 0) and run("--seed=5", "--fresh") == (4, 0)


def test_manifests_for_every_task(sounds, tmp_path):
    np.savez_compressed(tmp_path / "lips.npz", crops=np.random.default_rng(0).integers(0, 255, (10, 96, 96), np.uint8))
    rows = {
        "l2s": [{"id": "x", "video": "lips.npz"}],
        "vc": [{"id": "x", "source": "in/a.wav", "prompt": "in/b.wav"}, {"id": "y", "path": "in/b.wav"}],
        "tse": [{"id": "x", "audio": "in/a.wav"}, {"id": "t", "source": "in/b.wav", "text": "hi", "prompt_text": "oh"}],
        "tts": [
            {"id": "x", "text": "Hello.", "prompt_text": "Hi there.", "seconds": 0.4},
            {"text": "Bye.", "like": "in/a.wav"},
        ],
    }
    for task, items in rows.items():
        manifest = tmp_path / f"{task}.jsonl"
        manifest.write_text("\n".join(json.dumps(row) for row in items) + "\n")
        out = tmp_path / f"out-{task}"
        more = ["--prompt-text=Good morning."] if task == "tts" else []
        prompt = f"--prompt={sounds / 'b.wav'}"
        assert cli.main(["generate", task, f"--input={manifest}", f"--output={out}", prompt, *more, *RUN]) == 0, task
        assert len(list(out.glob("*.flac"))) == len(items)
    made = {line["id"]: line["seconds"] for line in lines(tmp_path / "out-tts")}
    assert made == {"x": 0.4, "0002": 0.8}
    assert {line["id"]: line["by"] for line in lines(tmp_path / "out-tse")} == {"x": "tse", "t": "omni"}
    table = tmp_path / "texts.csv"
    table.write_text("id,text,seconds\nfirst,One.,0.5\nsecond,Two.,0.6\n")
    (tmp_path / "texts.txt").write_text("One.\n\nTwo.\n")
    for name, ids in (("texts.csv", ["first", "second"]), ("texts.txt", ["0001", "0002"])):
        out = tmp_path / f"out-{name}"
        command = ["generate", "tts", f"--input={tmp_path / name}", f"--output={out}", "--format=wav", "--seconds=0.5"]
        assert cli.main([*command, f"--prompt={sounds / 'b.wav'}", "--prompt-text=Good morning.", *RUN]) == 0
        assert sorted(p.stem for p in out.glob("*.wav")) == ids
    assert [line["seconds"] for line in lines(tmp_path / "out-l2s")] == [0.4]  # ten pictures, 25 a second


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.jsonl", "{not json}\n", "no manifest"),
        ("m.jsonl", '{"id": "a", "source": "x.wav"}\n{"id": "a", "source": "y.wav"}\n', "twice"),
        ("m.jsonl", '{"id": "../../a", "source": "x.wav"}\n', "out of the folder"),
        ("m.jsonl", "\n", "nothing to work on"),
        ("m.csv", "id,source,seed\na,x.wav,abc\n", "seed is a number"),
    ],
)
def test_bad_manifests_are_one_clear_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(MetisError, match=message) as caught:
        bulk.read_items("se", tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_a_row_without_a_prompt_is_reported_and_the_rest_done(sounds, tmp_path, capsys):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text('{"id": "x", "source": "in/a.wav"}\n{"id": "y", "source": "in/b.wav", "prompt": "in/b.wav"}\n')
    out = tmp_path / "out"
    assert cli.main(["generate", "vc", f"--input={manifest}", f"--output={out}", "--json", *RUN]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["done"] == 1 and "prompt" in document["failed"]["x"]


def test_goes_on_after_a_kill(sounds, tmp_path):
    """Killed while it works: nothing half-written, and what was made is not made again."""
    for i in range(40):
        audio.write(sounds / f"more-{i:02d}.wav", 0.1 * torch.randn(30_000), 24_000)
    out = tmp_path / "out"
    command = ["generate", "se", f"--input={sounds}", f"--output={out}", "--batch-frames=70", *RUN]
    started = subprocess.Popen([sys.executable, "-m", "metis_lib", *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not (out / bulk.LOG).is_file() or len(lines_safe(out)) < 5):
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.flac")}
    noted = {line["id"] for line in lines_safe(out)}
    assert 5 <= len(noted) < 44
    (out / ".more-99.flac.1.part").write_bytes(b"half")  # as when it is killed in the middle of a file
    assert cli.main(command) == 0
    assert len(list(out.rglob("*.flac"))) == 44 and not list(out.rglob("*.part"))
    same = [name for name, at in before.items() if (out / name).stat().st_mtime_ns == at]
    assert len(same) >= len([name for name in noted if "/" not in name])


def lines_safe(out):
    found = []
    for line in (out / bulk.LOG).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
