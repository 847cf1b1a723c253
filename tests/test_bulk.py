"""Many items by one command: folders, manifests, texts; interruptions and bad items."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from metis_lib import audio, bulk, cli
from metis_lib.audio import Speech
from metis_lib.errors import MetisError
from metis_lib.pipeline import Metis

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


def test_what_cannot_be_measured_is_speech_all_the_same(sounds, tmp_path):
    def measure(name, job):
        if name == "b":
            raise MetisError("its clean recording is silent")
        return {"frames": len(job.made[0].tokens)}

    items = [{"id": name, "source": str(sounds / f"{name}.wav")} for name in ("a", "b")]
    found = bulk.generate_all(
        Metis.from_pretrained("debug"), "se", items, tmp_path / "out", options={"steps": 2, "stage2_steps": [2, 1]},
        measure=measure,
    )  # fmt: skip
    assert found["done"] == 2 and not found["failed"]
    assert {line["id"] for line in lines(tmp_path / "out") if "measured" in line} == {"a"}
    reasons = {line["id"]: line.get("not_measured") for line in lines(tmp_path / "out")}
    assert reasons == {"a": None, "b": "its clean recording is silent"}


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
        ("m.jsonl", '"x.wav"\n', "a row is an object"),
        ("m.jsonl", '{"source": 5}\n', "row 1: source is the name of a file, not 5"),
        ("m.jsonl", '{"path": "x.wav", "start": 1.0, "end": 2.0}\n', "cut it out into a file first"),
    ],
)
def test_bad_manifests_are_one_clear_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(MetisError, match=message) as caught:
        bulk.read_items("se", tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_texts_are_utf8(tmp_path):
    (tmp_path / "texts.txt").write_bytes("Grüße.".encode("latin-1"))
    with pytest.raises(MetisError, match="not in UTF-8"):
        bulk.read_items("tts", tmp_path / "texts.txt", {})


def test_no_recording_is_overwritten_and_no_output_becomes_an_input(sounds, tmp_path, capsys):
    audio.write(sounds / "e.flac", 0.1 * torch.randn(24_000), 24_000)
    before = (sounds / "e.flac").read_bytes()
    assert cli.main(["generate", "se", f"--input={sounds}", f"--output={sounds}", *RUN]) == 2
    assert "e.flac is an input and would be overwritten" in capsys.readouterr().err
    assert (sounds / "e.flac").read_bytes() == before and not (sounds / "a.flac").exists()
    for kept in (0, 5):
        assert cli.main(["generate", "se", f"--input={sounds}", f"--output={sounds / 'made'}", "--json", *RUN]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["done"], found["kept"]) == (5 - kept, kept)


def test_odd_items_are_reported_and_the_rest_done(sounds, tmp_path, capsys):
    rows = [
        {"id": "good", "text": "Hello."}, {"id": "year", "text": 2024}, {"id": "ever", "text": "Hi.", "seconds": "nan"}
    ]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["generate", "tts", f"--input={tmp_path / 'm.jsonl'}", f"--output={tmp_path / 'out'}", "--json", *RUN]
    assert cli.main([*command, f"--prompt={sounds / 'b.wav'}", "--prompt-text=Yes."]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == 1 and "text must be text, got 2024" in found["failed"]["year"]
    assert "seconds must be a number, got nan" in found["failed"]["ever"]


def test_a_long_recording_is_never_begun_in_the_middle(sounds, tmp_path, monkeypatch):
    """What failed together is tried one by one; windows, which cannot begin again, are in no group with others."""
    metis = Metis.from_pretrained("debug")
    monkeypatch.setattr(Metis, "limits", metis.limits._replace(whole=1.2, window=130))
    audio.write(sounds / "b.wav", 0.1 * torch.randn(72_000), 24_000)  # 3 s, beside 0.8 s
    items = [{"id": name, "source": str(sounds / f"{name}.wav")} for name in "ab"]
    options = {"options": {"steps": 2, "stage2_steps": (2, 1)}}
    assert bulk.generate_all(metis, "se", items, tmp_path / "good", **options)["done"] == 2
    groups, real = [], Metis.run

    def fails_together(self, jobs, settings, **more):
        groups.append(len(jobs))
        made = real(self, jobs, settings, **more)
        if len(jobs) > 1:
            raise RuntimeError("out of memory")
        return made

    monkeypatch.setattr(Metis, "run", fails_together)
    assert bulk.generate_all(metis, "se", items, tmp_path / "tried", **options)["failed"] == {}
    assert groups == [1, 1]
    for name in "ab":
        assert (tmp_path / "tried" / f"{name}.flac").read_bytes() == (tmp_path / "good" / f"{name}.flac").read_bytes()


def test_items_with_and_without_text_keep_their_own_guidance(sounds, tmp_path):
    metis, few = Metis.from_pretrained("debug"), {"steps": 2, "stage2_steps": (2, 1)}
    base = {"source": str(sounds / "b.wav"), "prompt": str(sounds / "deep" / "d.wav")}
    told = base | {"text": "Hello.", "prompt_text": "Good morning."}
    both = metis.generate("tse", [told, base], **few)
    assert [speech.info["cfg"] for speech in both] == [2.5, metis.options("tse", base).stage1.cfg] != [2.5, 2.5]
    for item, speech in zip((told, base), both, strict=True):
        torch.testing.assert_close(metis.generate("tse", [item], **few)[0].wav, speech.wav)
    bulk.generate_all(metis, "tse", [{"id": "t", **told}, {"id": "u", **base}], tmp_path / "out", options=few)
    for name, speech in zip("tu", both, strict=True):
        torch.testing.assert_close(audio.read(tmp_path / f"out/{name}.flac", 24_000), speech.wav, atol=2**-15, rtol=0)


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


@pytest.fixture
def eight(tmp_path):
    """Eight items, each a group of its own (one frame a batch); the sixth cannot be used and goes with the next."""
    torch.manual_seed(0)
    for i in range(8):
        audio.write(tmp_path / f"{i}.wav", 0.1 * torch.randn(9_000 + 300 * (i * 5 % 8)), 24_000)
    (tmp_path / "5.wav").write_bytes(b"RIFFnothing")
    items = [{"id": str(i), "source": str(tmp_path / f"{i}.wav")} for i in range(8)]
    return items, {"options": {"steps": 2, "stage2_steps": (2, 1), "batch_frames": 1}}


def test_reading_and_writing_go_on_while_the_models_work(eight, tmp_path, monkeypatch):
    """The models wait until the next item is prepared, and the last one at most until the next one is at work."""
    items, options = eight
    prepared, at_work = ({item["id"]: threading.Event() for item in items} for _ in range(2))
    threads, order = {"run": set(), "job": set(), "save": set()}, []
    job, run, save = Metis.job, Metis.run, Speech.save

    def noted_job(self, task, item, settings):
        threads["job"].add(threading.get_ident())
        try:
            return job(self, task, item, settings)
        finally:
            prepared[item["source"][-5]].set()

    def noted_run(self, jobs, settings, **more):
        threads["run"].add(threading.get_ident())
        order.append(str(len(order) + (len(order) > 4)))
        at_work[order[-1]].set()
        after = str(int(order[-1]) + 1)
        assert after not in prepared or prepared[after].wait(60), "the next item is read only when this one is done"
        return run(self, jobs, settings, **more)

    def noted_save(self, path, *args):
        threads["save"].add(threading.get_ident())
        after = {"4": "6"}.get(path.stem, str(int(path.stem) + 1))
        assert after not in at_work or at_work[after].wait(60), "the models wait until this one is written"
        return save(self, path, *args)

    for name, call in {"job": noted_job, "run": noted_run}.items():
        monkeypatch.setattr(Metis, name, call)
    monkeypatch.setattr(Speech, "save", noted_save)
    found = bulk.generate_all(Metis.from_pretrained("debug"), "se", items, tmp_path / "out", **options)
    assert (found["done"], list(found["failed"])) == (7, ["5"]) and "5.wav" in found["failed"]["5"]
    assert [line["id"] for line in lines(tmp_path / "out")] == [str(i) for i in range(8)]
    assert all(len(of) == 1 for of in threads.values()) and len(set.union(*threads.values())) == 3


def test_overlap_changes_nothing(eight, tmp_path):
    items, options = eight
    metis, good = Metis.from_pretrained("debug"), [item for item in items if item["id"] != "5"]
    bulk.generate_all(metis, "se", items, tmp_path / "out", **options)
    for i, item in enumerate(good):
        alone = metis.generate("se", [{"source": item["source"]}], **options["options"])[0]
        got = audio.read(tmp_path / "out" / f"{item['id']}.flac", 24_000)
        torch.testing.assert_close(got, alone.wav, atol=2**-15, rtol=0, msg=f"{i}: another item's speech")


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), ValueError("a mistake of ours")])
@pytest.mark.parametrize("where", ["job", "run", "save"])
def test_whatever_ends_it_keeps_what_was_made(eight, tmp_path, monkeypatch, where, error):
    """The error comes out, what was made before is written and noted, no thread is left, and it can go on."""
    items, options = eight
    kind, calls = Speech if where == "save" else Metis, []
    original = getattr(kind, where)

    def fails(*args, **more):
        calls.append(args)
        if len(calls) == 4:
            raise error
        return original(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(kind, where, fails)
        with pytest.raises(type(error)):
            bulk.generate_all(Metis.from_pretrained("debug"), "se", items, tmp_path / "out", **options)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("metis-")]
    made = [line["id"] for line in lines(tmp_path / "out")]
    assert made[:3] == ["0", "1", "2"] and len(calls) < 7 + (where == "job")
    found = bulk.generate_all(Metis.from_pretrained("debug"), "se", items, tmp_path / "out", **options)
    assert found["kept"] == len([id for id in made if id != "5"]) and found["kept"] + found["done"] == 7


def lines_safe(out):
    found = []
    for line in (out / bulk.LOG).read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def test_lines_end_where_json_and_csv_say(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"id": "a", "text": "one\u2028two\x85three"}\n{"id": "b", "text": "x"}\n')
    assert [i["text"] for i in bulk.read_items("tts", tmp_path / "m.jsonl", {})] == ["one\u2028two\x85three", "x"]
    (tmp_path / "m.csv").write_text('id,text\na,"Hello\nworld"\nb,x\n')
    assert [i["text"] for i in bulk.read_items("tts", tmp_path / "m.csv", {})] == ["Hello\nworld", "x"]
    log = '{"id": "a", "error": "\u2028"}\n{"id": "b", "error": "ü'.encode()
    (tmp_path / bulk.LOG).write_bytes(log[:-1])  # cut off within a letter
    assert list(bulk.read_log(tmp_path)) == ["a"]


def test_an_item_that_cannot_even_be_hashed_is_reported_and_the_rest_is_done(sounds, tmp_path, capsys):
    rows = [{"id": "long", "source": "in/a.wav", "prompt": "these are the words of the prompt " * 9}]
    rows += [{"id": "good", "source": "in/a.wav", "prompt": "in/b.wav"}, {"id": "bad", "source": "in/x.raw"}]
    rows[2]["prompt"] = "in/b.wav"
    (sounds / "x.raw").write_bytes(bytes(100))
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    (out / ".left.part").mkdir(parents=True)  # a folder that a killed conversion left
    assert cli.main(["generate", "vc", f"--input={tmp_path / 'm.jsonl'}", f"--output={out}", "--json", *RUN]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["done"] == 1 and set(found["failed"]) == {"long", "bad"}
