"""Own recordings to a manifest and a report; public corpora in miniatures of their real layouts."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from metis_lib import audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data import importers, report, simulate, store
from metis_lib.data.importers import build_manifest
from metis_lib.data.store import Row
from metis_lib.errors import MetisError
from recipes import public

pytestmark = pytest.mark.data

HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"
ITEMS = [r for r in map(json.loads, (HUMAN / "manifest.jsonl").read_text().splitlines()) if r["task"] == "codec"]


def speech(item: int = 0, start: float = 0.0, seconds: float | None = None) -> np.ndarray:
    """Real speech [S] at 24 kHz."""
    wav, _ = soundfile.read(HUMAN / ITEMS[item]["clean"], dtype="float32")
    return wav[round(start * AUDIO_RATE) :][: None if seconds is None else round(seconds * AUDIO_RATE)]


def save(path: Path, wav: np.ndarray, rate: int = AUDIO_RATE, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wav, rate, **options)
    return path


def cut_file(path: Path, share: float = 0.5) -> Path:
    """Break a file off."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def reasons(found: importers.Imported) -> dict[str, str]:
    return {Path(line["path"]).name: line["reason"] for line in found.refused}


def noise(seed: int, seconds: float = 1.0) -> np.ndarray:
    """A sound like no other [S]."""
    wav = simulate.colour(int(seconds * AUDIO_RATE), 1.0, np.random.default_rng(seed))
    return (wav - wav.mean()) * 0.05


# ---------------------------------------------------------------- sources


def test_folder_with_texts_beside(tmp_path: Path) -> None:
    recs = tmp_path / "recs"
    save(recs / "anna" / "one.wav", speech(0))
    (recs / "anna" / "one.txt").write_text(f"\ufeff{ITEMS[0]['text']}\n")
    save(recs / "ben" / "wavs" / "two.flac", speech(1))
    (recs / "ben" / "wavs" / "two.lab").write_text(ITEMS[1]["text"])
    save(recs / "three.ogg", speech(2), format="OGG", subtype="VORBIS")
    save(recs / "anna" / "four.mp3", speech(3))
    (recs / ".hidden.wav").write_bytes(b"x")
    (recs / "anna" / "notes.pdf").write_bytes(b"x")
    found = build_manifest(recs, tmp_path / "out", language="en", licence="CC0")
    assert not found.refused
    rows = {row.id: row for row in store.read_manifest(found.manifest)}
    assert {i: r.speaker for i, r in rows.items()} == {
        "anna-one": "anna", "ben-wavs-two": "ben", "three": "recs", "anna-four": "anna"
    }  # fmt: skip
    assert rows["anna-one"].text == ITEMS[0]["text"] and rows["three"].text == ""
    assert rows["anna-one"].path == "../recs/anna/one.wav", "not copied, relative to the manifest"
    assert rows["anna-one"].duration == pytest.approx(ITEMS[0]["duration"], abs=0.001)
    assert all(r.licence == "CC0" and r.source == "recs" and r.human for r in rows.values())
    given = build_manifest(recs, tmp_path / "out", speaker="carla")
    assert {row.speaker for row in given.rows} == {"carla"}


def test_ljspeech_and_librispeech_transcript_files(tmp_path: Path) -> None:
    lj = tmp_path / "LJSpeech-1.1"
    for i in (0, 1):
        save(lj / "wavs" / f"LJ001-000{i + 1}.wav", speech(i))
    (lj / "metadata.csv").write_text(
        f'LJ001-0001|raw 1 |{ITEMS[0]["text"]}\nLJ001-0002|"{ITEMS[1]["text"]}"|\n', encoding="utf-8"
    )
    rows = build_manifest(lj, tmp_path / "a").rows
    assert [r.text for r in rows] == [ITEMS[0]["text"], f'"{ITEMS[1]["text"]}"']
    assert {r.speaker for r in rows} == {"LJSpeech-1.1"}
    libri = tmp_path / "dev-clean"
    for chapter, stem in (("84/121123", "84-121123-0000"), ("174/50561", "174-50561-0000")):
        save(libri / chapter / f"{stem}.flac", speech(0 if stem[0] == "8" else 1))
        name = stem.rsplit("-", 1)[0]
        (libri / chapter / f"{name}.trans.txt").write_text(
            f"{stem} {ITEMS[0 if stem[0] == '8' else 1]['text'].upper()}\n"
        )
    rows = build_manifest(libri, tmp_path / "b").rows
    assert {r.speaker: r.text for r in rows} == {"84": ITEMS[0]["text"].upper(), "174": ITEMS[1]["text"].upper()}


def test_csv_with_spans_defaults_and_extra_columns(tmp_path: Path) -> None:
    save(tmp_path / "audio" / "long.wav", np.concatenate([speech(0), speech(1)]))
    save(tmp_path / "audio" / "b.wav", speech(2))
    middle = ITEMS[0]["duration"]
    table = tmp_path / "list.csv"
    table.write_text(
        "path,start,end,text,speaker,mood\n"
        f'audio/long.wav,0,{middle},"{ITEMS[0]["text"]}",anna,happy\n'
        f'audio/long.wav,{middle},{middle + ITEMS[1]["duration"]},"{ITEMS[1]["text"]}",anna,\n'
        f"{tmp_path / 'audio' / 'b.wav'},,,,,\n"
    )
    found = build_manifest(table, tmp_path / "out", language="de", speaker=None)
    first, second, third = found.rows
    assert (first.start, first.end, first.duration) == (0.0, middle, pytest.approx(middle, abs=0.002))
    assert second.text == ITEMS[1]["text"] and second.speaker == "anna"
    assert (third.speaker, third.language, third.licence, third.start) == ("unknown", "de", "unknown", None)
    assert len({row.id for row in found.rows}) == 3
    assert any("mood" in note for note in found.notes)
    # what is read later is the span: half of the file each
    waves = store.store_waves(found.rows, tmp_path / "waves")
    assert np.allclose(waves[1] / 32767, speech(1), atol=1e-3)
    table.write_text("file;text\na.wav;hi\n")
    with pytest.raises(MetisError, match="path among them"):
        build_manifest(table, tmp_path / "out")


def test_films_of_a_list_lie_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine" / "a.wav", speech(0))
    (tmp_path / "mine" / "films").mkdir()
    (tmp_path / "mine" / "films" / "a.mp4").write_bytes(b"film")
    (tmp_path / "mine" / "list.csv").write_text("path,video\na.wav,films/a.mp4\n")
    monkeypatch.chdir("/")
    (row,) = build_manifest(tmp_path / "mine" / "list.csv", tmp_path / "out").rows
    assert row.video and (row.root / row.video).resolve() == tmp_path / "mine" / "films" / "a.mp4"


def test_jsonl_keeps_what_it_says_and_lists_bad_lines(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", speech(0))
    save(tmp_path / "b.wav", speech(1))
    lines: list[Any] = [
        {"id": "x/1", "path": "a.wav", "text": ITEMS[0]["text"], "human": False, "split": "test", "source": "here"},
        {"id": "x/2", "path": "b.wav", "speaker": 7, "split": "train", "language": "English"},
        {"id": "x/3", "path": "b.wav", "start": "soon", "split": "train"},
        {"id": "x/4", "path": "b.wav", "start": 1, "end": 0.5, "split": "train"},
        {"id": "x/5", "path": "b.wav", "split": "dev"},
        {"path": ""},
    ]
    table = tmp_path / "list.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    found = build_manifest(table, tmp_path / "out")
    one, two = found.rows
    assert (one.id, one.human, one.split, one.source) == ("x/1", False, "test", "here")
    assert (two.speaker, two.language, two.split) == ("7", "en", "train")
    assert Counter(line["reason"] for line in found.refused) == {"bad row": 4, "span": 1}
    del lines[1]["split"]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(MetisError, match="give it to all or to none"):
        build_manifest(table, tmp_path / "out")


def test_lhotse_recordings_supervisions_and_cuts(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    a = save(tmp_path / "wav" / "a.wav", np.concatenate([speech(0), speech(1)]))
    b = save(tmp_path / "wav" / "b.wav", speech(2))
    many = save(tmp_path / "wav" / "many.wav", np.stack([speech(3)] * 4, axis=1))
    middle = ITEMS[0]["duration"]
    recordings = [lhotse.Recording.from_file(p) for p in (a, b, many)]
    said = [
        lhotse.SupervisionSegment("a-1", "a", 0.0, middle, text=ITEMS[0]["text"], speaker="anna", language="English"),
        lhotse.SupervisionSegment("a-2", "a", middle, ITEMS[1]["duration"], text=ITEMS[1]["text"], speaker="anna"),
        lhotse.SupervisionSegment("b-1", "b", 0.0, ITEMS[2]["duration"], text=ITEMS[2]["text"], speaker="ben"),
        lhotse.SupervisionSegment("m-1", "many", 0.0, 1.0, text="hello", channel=2),
    ]
    folder = tmp_path / "manifests"
    folder.mkdir()
    for name, some in (("train", recordings[:1]), ("test", recordings[1:])):
        ids = {r.id for r in some}
        lhotse.RecordingSet.from_recordings(some).to_file(folder / f"mini_recordings_{name}.jsonl.gz")
        lhotse.SupervisionSet.from_segments([s for s in said if s.recording_id in ids]).to_file(
            folder / f"mini_supervisions_{name}.jsonl.gz"
        )
    found = build_manifest(folder, tmp_path / "out")
    rows = {row.id: row for row in found.rows}
    assert set(rows) == {"a-1", "a-2", "b-1"} and [line["reason"] for line in found.refused] == ["bad row"]
    assert (rows["a-2"].start, rows["a-2"].text, rows["a-2"].split) == (middle, ITEMS[1]["text"], "train")
    assert (rows["b-1"].start, rows["b-1"].end, rows["b-1"].split) == (None, None, "test")
    assert (rows["a-1"].language, rows["a-1"].speaker, rows["b-1"].speaker) == ("en", "anna", "ben")
    cuts = lhotse.CutSet.from_manifests(
        recordings=lhotse.RecordingSet.from_recordings(recordings[:2]),
        supervisions=lhotse.SupervisionSet.from_segments(said[:3]),
    )
    cuts.to_file(tmp_path / "all_cuts.jsonl.gz")
    again = build_manifest(tmp_path / "all_cuts.jsonl.gz", tmp_path / "cuts")
    assert {r.id: (r.start, r.end, r.text) for r in again.rows} == {
        i: (r.start, r.end, r.text) for i, r in rows.items()
    }
    cut_file(tmp_path / "all_cuts.jsonl.gz")
    with pytest.raises(MetisError, match="no Lhotse manifest"):
        build_manifest(tmp_path / "all_cuts.jsonl.gz", tmp_path / "cuts")


# ---------------------------------------------------------------- bad recordings


def bad_folder(recs: Path) -> dict[str, str]:
    """Every kind of bad recording, and one good one; file name to the reason it must be left out for."""
    good = speech(0)
    save(recs / "good.wav", good)
    (recs / "good.txt").write_text(ITEMS[0]["text"])
    (recs / "empty.wav").write_bytes(b"")
    save(recs / "no-samples.wav", np.zeros(0, np.float32))
    save(recs / "silent.wav", np.zeros(AUDIO_RATE, np.float32))
    (recs / "text.wav").write_text("this is no sound at all")
    holes = speech(1).copy()
    holes[100] = np.nan
    save(recs / "nan.wav", holes, subtype="FLOAT")
    holes[100] = np.inf
    save(recs / "inf.wav", holes, subtype="FLOAT")
    save(recs / "eight-bit.wav", speech(2), subtype="PCM_U8")
    save(recs / "eleven.wav", np.stack([speech(3, 0, 1)] * 11, axis=1))
    cut_file(save(recs / "cut.flac", speech(4)))
    cut_file(save(recs / "cut.wav", speech(5)))
    cut_file(save(recs / "cut.mp3", speech(6)))
    save(recs / "blink.wav", speech(0, 1, 0.1))
    save(recs / "eleven-minutes.flac", np.tile(noise(1, 30), 8), 8000)
    for stem, text in (("fast", "too many words " * 20), ("slow", "a"), ("dots", "...")):
        save(recs / f"{stem}.wav", speech(7 + len(stem) % 3, 0, 2.5))
        (recs / f"{stem}.txt").write_text(text)
    save(recs / "z-copy.flac", good)
    return {
        "empty.wav": "empty", "no-samples.wav": "empty", "silent.wav": "silent", "text.wav": "not audio",
        "nan.wav": "not finite", "inf.wav": "not finite", "eight-bit.wav": "8-bit", "eleven.wav": "channels",
        "cut.flac": "damaged", "cut.wav": "damaged", "cut.mp3": "damaged", "blink.wav": "too short",
        "eleven-minutes.flac": "too long", "fast.wav": "wrong text", "slow.wav": "wrong text",
        "dots.wav": "wrong text", "z-copy.flac": "same sound",
    }  # fmt: skip


def test_bad_recordings_are_listed_with_a_reason_and_nothing_stops(tmp_path: Path) -> None:
    expected = bad_folder(tmp_path / "recs")
    found = build_manifest(tmp_path / "recs", tmp_path / "out")
    assert [row.id for row in found.rows] == ["good"]
    listed = store.read_jsonl(tmp_path / "out" / "refused.jsonl")
    assert listed == found.refused and reasons(found) == expected
    assert all(line["detail"] and "\n" not in line["detail"] and str(tmp_path) not in line["detail"] for line in listed)
    assert {line["reason"] for line in listed} <= set(report.REASONS)
    out = tmp_path / "page.html"
    summary = report.corpus_report(found.manifest, out)
    assert summary["refused"] == dict(Counter(expected.values())) and summary["utterances"] == 1
    page = out.read_text()
    assert all(f"<td>{reason}<" in page for reason in expected.values())


def test_a_list_of_missing_doubled_and_outlying_recordings(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", speech(0))
    save(tmp_path / "b.wav", speech(1))
    rows = [
        {"id": "1", "path": "a.wav", "end": 3.0}, {"id": "1", "path": "b.wav"}, {"id": "2", "path": "nowhere.wav"},
        {"id": "3", "path": "b.wav", "start": 4.0, "end": 99.0}, {"id": "4", "path": "a.wav", "end": 0.1},
        {"id": "5", "path": "a.wav", "start": 0.0, "end": 3.0}, {"id": "6", "path": "."},
    ]  # fmt: skip
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build_manifest(tmp_path / "l.jsonl", tmp_path / "out")
    assert [row.id for row in found.rows] == ["1"]
    assert [(line["id"], line["reason"]) for line in found.refused] == [
        ("1", "same id"), ("2", "missing"), ("3", "span"), ("4", "too short"), ("5", "same sound"), ("6", "missing")
    ]  # fmt: skip


def test_kept_with_a_warning_and_reasons_that_may_be_overruled(tmp_path: Path) -> None:
    recs = tmp_path / "recs"
    save(recs / "clipped.wav", np.clip(speech(3) * 4, -1, 1))
    save(recs / "low-rate.wav", speech(1)[::3], 8000)
    save(recs / "low-level.wav", speech(2) * 0.01)
    save(recs / "offset.wav", speech(0) * 0.5 + 0.1)
    save(recs / "stereo.wav", np.stack([speech(4), speech(4) * 0.5], axis=1))
    save(recs / "long.wav", np.concatenate([speech(i) for i in range(8)]))
    save(recs / "plain.wav", speech(9))
    save(recs / "bits.wav", speech(10), subtype="PCM_U8")
    found = build_manifest(recs, tmp_path / "out", language="xx")
    warned = {
        f["id"]: set(f.get("warnings", ())) - {"language"} for f in store.read_jsonl(tmp_path / "out" / "facts.jsonl")
    }
    assert warned == {
        "clipped": {"clipped"}, "low-rate": {"low rate"}, "low-level": {"low level"}, "offset": {"DC offset"},
        "stereo": {"stereo"}, "long": {"long"}, "plain": set(), "bits": set(),
    }  # fmt: skip
    assert reasons(found) == {"bits.wav": "8-bit"} and len(found.rows) == 7
    kept = build_manifest(recs, tmp_path / "out", keep=("8-bit",), language="xx")
    assert not kept.refused and len(kept.rows) == 8
    with pytest.raises(MetisError, match="keep some of"):
        build_manifest(recs, tmp_path / "out", keep=("silent",))


def test_letters_to_say() -> None:
    assert (report.letters("It's 42!"), report.letters("... ?"), report.letters("你好")) == (11, 0, 6)


def test_bandwidth_is_found(tmp_path: Path) -> None:
    for hz in (2000, 4000):
        for item in (0, 3, 5):
            narrow = simulate.band_limit(speech(item), AUDIO_RATE, hz)
            assert report.bandwidth(narrow, AUDIO_RATE) == pytest.approx(hz, rel=0.05)
    for item in range(12):
        assert report.bandwidth(speech(item), AUDIO_RATE) == pytest.approx(ITEMS[item]["bandwidth_hz"], rel=0.1)
    white = simulate.colour(AUDIO_RATE, 0.0, np.random.default_rng(0))
    assert report.bandwidth(white, AUDIO_RATE) == pytest.approx(12000, rel=0.01)


def test_nothing_to_use_is_one_line_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(MetisError, match="no such folder or list"):
        build_manifest(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "recs").mkdir()
    with pytest.raises(MetisError, match="no recordings in it"):
        build_manifest(tmp_path / "recs", tmp_path / "out")
    (tmp_path / "recs" / "a.wav").write_bytes(b"")
    with pytest.raises(MetisError, match=r"none of 1 recordings can be used \(1 empty\)"):
        build_manifest(tmp_path / "recs", tmp_path / "out")
    assert (tmp_path / "out" / "refused.jsonl").is_file() and not (tmp_path / "out" / "manifest.jsonl").exists()
    (tmp_path / "list.txt").write_text("a.wav")
    (tmp_path / "latin.csv").write_bytes("path,text\na.wav,Größe\n".encode("latin-1"))
    with pytest.raises(MetisError, match="not a table in UTF-8"):
        build_manifest(tmp_path / "latin.csv", tmp_path / "out")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MetisError, match="cannot be read and written"):
        build_manifest(tmp_path / "recs", tmp_path / "file" / "out")
    for bad, says in (({"splits": (1, 2)}, "three shares"), ({"hold_out": "moon"}, "hold out auto")):
        with pytest.raises(MetisError, match=says):
            build_manifest(tmp_path / "recs", tmp_path / "out", **bad)
    with pytest.raises(MetisError, match="give a folder"):
        build_manifest(tmp_path / "list.txt", tmp_path / "out")


# ---------------------------------------------------------------- splits


def many_speakers(folder: Path, speakers: int, each: int, common: int = 0) -> Path:
    """A folder of recordings; the first ``common`` sentences are said by everybody."""
    for s in range(speakers):
        for i in range(each):
            save(folder / f"v{s}" / f"{i}.wav", noise(100 * s + i, 1.0))
            text = f"everybody says {i}" if i < common else f"speaker {s} says {i}"
            (folder / f"v{s}" / f"{i}.txt").write_text(text)
    return folder


def test_whole_speakers_are_held_out_and_no_sentence_is_in_two_splits(tmp_path: Path) -> None:
    recs = many_speakers(tmp_path / "recs", 12, 6, common=2)
    found = build_manifest(recs, tmp_path / "out", splits=(0.7, 0.15, 0.15), seed=3)
    voices: dict[str, set[str]] = {}
    sentences: dict[str, set[str]] = {}
    for row in found.rows:
        voices.setdefault(row.speaker, set()).add(row.split)
        sentences.setdefault(importers.sentence_key(row.text), set()).add(row.split)
    assert all(len(s) == 1 for s in (*voices.values(), *sentences.values()))
    assert {row.split for row in found.rows} == {"train", "validation", "test"}
    assert set(reasons(found).values()) == {"held-out text"} and len(found.rows) > 50
    assert report.shared(found.rows) == {"speakers": 0, "sentences": 0}
    assert any("held out for validation" in note for note in found.notes)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "out")
    build_manifest(recs, tmp_path / "out", splits=(0.7, 0.15, 0.15), seed=3, workers=4)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before, "one seed, any number of workers"
    other = build_manifest(recs, tmp_path / "out", splits=(0.7, 0.15, 0.15), seed=4)
    assert {r.speaker: r.split for r in other.rows} != {r.speaker: r.split for r in found.rows}


def test_few_speakers_hold_out_sentences(tmp_path: Path) -> None:
    found = build_manifest(many_speakers(tmp_path / "recs", 2, 15, common=15), tmp_path / "out", splits=(0.6, 0.2, 0.2))
    assert not found.refused and report.shared(found.rows) == {"speakers": 2, "sentences": 0}
    share = Counter(row.split for row in found.rows)
    assert share["test"] == share["validation"] == 6 and share["train"] == 18
    assert any("sentences" in note for note in found.notes)


@pytest.mark.parametrize("seed", range(5))
def test_division_respects_the_shares(seed: int) -> None:
    weights = {str(i): float(w) for i, w in enumerate(np.random.default_rng(seed).lognormal(0, 1, 60))}
    split = importers.divide(weights, (0.8, 0.1, 0.1), seed)
    total = sum(weights.values())
    for name in ("validation", "test"):
        assert 0 < sum(w for u, w in weights.items() if split[u] == name) <= 0.1 * total
    assert importers.divide(dict(reversed(weights.items())), (0.8, 0.1, 0.1), seed) == split
    assert Counter(importers.divide({"a": 9, "b": 1, "c": 5}, (0.9, 0.05, 0.05), seed).values()) == {
        "train": 1, "validation": 1, "test": 1
    }  # fmt: skip
    assert importers.divide({"a": 1.0}, (0.9, 0.05, 0.05), seed) == {"a": "train"}


# ---------------------------------------------------------------- going on


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recs = many_speakers(tmp_path / "recs", 2, 5)
    looked: list[str] = []
    stop_at = 3

    def counting(path: Path, spans: Any) -> Any:
        if len(looked) == stop_at:
            raise KeyboardInterrupt
        looked.append(path.name)
        return measure(path, spans)

    measure = report.measure
    monkeypatch.setattr(report, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        build_manifest(recs, tmp_path / "out", workers=1)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    with open(tmp_path / "out" / "facts.jsonl.part", "a") as stream:
        stream.write('{"path": "cut short')
    stop_at = 5
    with pytest.raises(KeyboardInterrupt):
        build_manifest(recs, tmp_path / "out", workers=1)
    stop_at = 1000
    first = build_manifest(recs, tmp_path / "out", workers=1)
    assert len(looked) == 10 and len(first.rows) == 10
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["facts.jsonl", "manifest.jsonl", "refused.jsonl"]
    before = (tmp_path / "out" / "facts.jsonl").read_bytes()
    build_manifest(recs, tmp_path / "out")
    assert len(looked) == 10 and (tmp_path / "out" / "facts.jsonl").read_bytes() == before
    save(recs / "v0" / "0.wav", noise(999, 1.5))
    changed = build_manifest(recs, tmp_path / "out")
    assert len(looked) == 11 and {r.id: r.duration for r in changed.rows}["v0-0"] == 1.5
    report.corpus_report(changed.manifest)
    assert len(looked) == 11, "the report measures nothing again"


# ---------------------------------------------------------------- public corpora


def test_demand_and_a_folder_of_noise_load_as_noise(tmp_path: Path) -> None:
    for i, place in enumerate(("DKITCHEN", "NPARK", "STRAFFIC", "TMETRO")):
        for channel in (1, 2, 16):
            save(tmp_path / "DEMAND" / place / f"ch{channel:02d}.wav", noise(50 * i + channel, 2.0), 48000)
    corpus = tmp_path / "corpus"
    done = public.prepare_demand(tmp_path / "DEMAND", corpus, channels=(1, 16), test=0.25)
    assert (done["recordings"], done["test"], done["refused"]) == (8, 2, {})
    rows = store.read_jsonl(corpus / "noise.jsonl")
    assert {r["id"].split("-")[1] for r in rows if r["split"] == "test"} & {
        r["id"].split("-")[1] for r in rows if r["split"] == "train"
    } == set(), "a place is in one split"
    alike = tmp_path / "alike"
    for n, name in enumerate(("rain (1).wav", "rain [1].wav", "rain-1-.flac")):
        save(alike / name, noise(20 + n, 1 + n), 16000)
    public.prepare_noise(alike, tmp_path / "other", licence="CC0")
    rows = store.read_jsonl(tmp_path / "other" / "noise.jsonl")
    assert len({r["id"] for r in rows}) == len({r["path"] for r in rows}) == 3, "none takes another's place"
    heard = [len(audio.read(tmp_path / "other" / r["path"], AUDIO_RATE)) / AUDIO_RATE for r in rows]
    assert heard == pytest.approx([r["duration"] for r in rows], abs=0.01)
    own = tmp_path / "street noise"
    save(own / "car 1.flac", np.stack([noise(7, 2)] * 2, axis=1), 44100)
    save(own / "deep" / "er" / "dog.ogg", noise(8, 2), 16000, format="OGG", subtype="VORBIS")
    (own / "broken.wav").write_bytes(b"RIFF")
    done = public.prepare_noise(own, corpus, name="street", licence="CC0", test=0.5)
    assert done["recordings"] == 2 and list(done["refused"]) == ["broken.wav"] and done["test"] == 1
    public.prepare_noise(own, corpus, name="street", licence="CC0", test=0.0)  # once more: replaced, not doubled
    rows = store.read_jsonl(corpus / "noise.jsonl")
    assert len(rows) == 10 and {r["licence"] for r in rows if r["source"] == "street"} == {"CC0"}
    build_manifest(many_speakers(tmp_path / "recs", 1, 1), corpus)
    loaded = simulate.Noises.load(corpus)
    assert {n.name for n in loaded.ambient} == {r["id"] for r in rows if r["split"] == "train"}
    for recording in loaded.ambient:
        assert recording.wav.dtype == np.int16 and recording.wav.ndim == 1
    car = next(n for n in loaded.ambient if n.name == "street-car-1")
    assert len(car.wav) == pytest.approx(2 * AUDIO_RATE * AUDIO_RATE / 44100, abs=2)
    with pytest.raises(MetisError, match="is this DEMAND"):
        public.prepare_demand(own, corpus)


def impulse_response(direct: int, rt60: float, rate: int, seed: int) -> np.ndarray:
    """A decaying response [S] whose direct path is at sample ``direct``."""
    random = np.random.default_rng(seed)
    rir = np.zeros(direct + int(1.5 * rt60 * rate), np.float32)
    tail = np.arange(len(rir) - direct - 60)
    rir[direct + 60 :] = random.standard_normal(len(tail)) * 10 ** (-3 * tail / rate / rt60) * 0.06
    rir[direct] = 0.8
    return rir


def test_impulse_responses_load_as_rooms_with_their_direct_path(tmp_path: Path) -> None:
    slr26 = tmp_path / "SLR26" / "simulated_rirs_16k"
    times = [0.3, 0.5, 0.8]
    for i, rt60 in enumerate(times):
        path = slr26 / "mediumroom" / "Room001" / f"Room001-0000{i}.wav"
        save(path, impulse_response(200 + 300 * i, rt60, 16000, i), 16000, subtype="FLOAT")
    real = tmp_path / "SLR28" / "RIRS_NOISES" / "real_rirs_isotropic_noises"
    eight = np.stack([impulse_response(50, 0.4, 16000, 9)] * 8, axis=1)
    save(real / "RVB2014_type1_rir_largeroom1_far_angla.wav", eight, 16000)
    save(real / "RVB2014_type1_noise_largeroom1_1.wav", noise(1), 16000)
    save(real.parent / "pointsource_noises" / "free-sound-0001.wav", noise(2), 16000)
    save(slr26 / "silent.wav", np.zeros(1600, np.float32), 16000)
    done = public.prepare_rirs(tmp_path, tmp_path / "corpus")
    assert done["rooms"] == 4 and [Path(p).name for p in done["refused"]] == ["silent.wav"]
    rooms = simulate.Rooms.load(tmp_path / "corpus")
    assert rooms.rirs.dtype == np.float16
    assert rooms.rt60 == pytest.approx([*times, 0.4], rel=0.25)
    wav = speech(0)
    for room in range(4):
        assert rooms.rirs[room, rooms.direct[room]] == 1.0
        wet = rooms.apply(wav, room)
        spectrum = np.fft.rfft(wet, 2 * len(wav)) * np.conj(np.fft.rfft(wav, 2 * len(wav)))
        spectrum /= np.abs(spectrum) + 1e-9
        lag = int(np.argmax(np.fft.irfft(spectrum)))
        assert min(lag, 2 * len(wav) - lag) <= 1, "the direct path stays where the speech was"
    (slr26 / "silent.wav").unlink()
    assert public.prepare_rirs(tmp_path, tmp_path / "two", limit=2)["rooms"] == 2


def test_dns_challenge_2020(tmp_path: Path) -> None:
    data = tmp_path / "DNS-Challenge" / "datasets"
    for reader in range(11):
        save(data / "clean" / f"book_00000_chp_0009_reader_{6709 + reader:05d}_{reader}.wav", noise(reader), 16000)
    save(data / "noise" / "-2kBd0lxeZw.wav", noise(50), 16000)
    save(data / "noise" / "door_Freesound_validated_1.wav", noise(51), 16000)
    save(data / "impulse_responses" / "SLR26" / "r.wav", impulse_response(40, 0.3, 16000, 1), 16000)
    for subset in ("no_reverb", "with_reverb"):
        folder = data / "test_set" / "synthetic" / subset
        for number, name in ((268, "clnsp102_traffic_248091_3_snr0_tl-21"), (9, "clnsp1_train_69005_1_snr15_tl-21")):
            save(folder / "noisy" / f"{name}_fileid_{number}.wav", noise(number), 16000)
            save(folder / "clean" / f"clean_fileid_{number}.wav", noise(number + 1), 16000)
    save(data / "test_set" / "real_recordings" / "audioset_realrec_car_-1jJc30Ui6E.wav", noise(77), 16000)
    out = tmp_path / "corpus"
    done = public.prepare_dns(data.parent, out)
    assert {row.speaker for row in done["speech"].rows} == {f"reader_{6709 + i:05d}" for i in range(11)}
    assert {row.split for row in done["speech"].rows} == {"train", "validation", "test"}
    assert done["noise"]["recordings"] == 2 and done["rirs"]["rooms"] == 1
    assert done["test"] == {"no_reverb": 2, "with_reverb": 2, "real_recordings": 1}
    items = {item["id"]: item for item in store.read_jsonl(out / "test" / "manifest.jsonl")}
    pair = items["with_reverb-268"]
    assert Path(pair["clean"]).name == "clean_fileid_268.wav" and pair["noisy"].endswith("tl-21_fileid_268.wav")
    assert (pair["snr_db"], items["no_reverb-9"]["snr_db"]) == (0.0, 15.0)
    assert all((out / "test" / item[k]).is_file() for item in items.values() for k in ("clean", "noisy") if k in item)
    assert "clean" not in items["real-audioset_realrec_car_-1jJc30Ui6E"]
    (data / "test_set" / "synthetic" / "no_reverb" / "clean" / "clean_fileid_9.wav").unlink()
    with pytest.raises(MetisError, match=r"no clean recordings for \[9\]"):
        public.dns_testset(data.parent, out / "test")


def film(path: Path, wav: np.ndarray | None) -> Path:
    """A film of a second or more: grey pictures at 25 fps, and ``wav`` [S] at 16 kHz."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        pictures = container.add_stream("mpeg4", rate=25)
        pictures.width = pictures.height = 64
        sound = None
        if wav is not None:
            sound = container.add_stream("aac", rate=16000)
            sound.layout = "mono"
        for i in range(30):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 4 * i, np.uint8), format="rgb24")
            container.mux(pictures.encode(picture))
        container.mux(pictures.encode())
        if wav is not None and sound is not None:
            frame = av.AudioFrame.from_ndarray(wav[None].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return path


def test_lrs2_follows_its_lists(tmp_path: Path) -> None:
    root = tmp_path / "mvlrs_v1"
    for i, place in enumerate(("main/5535415699068794046/00001", "main/6330311066473698535/00011", "main/111/00002")):
        film(root / f"{place}.mp4", noise(i, 1.2)[: 16000 + 1000 * i])
        (root / f"{place}.txt").write_text("Text:  WHEN YOU'RE COOKING {LG} CHIPS\nConf:  4\n")
    film(root / "pretrain" / "222" / "00001.mp4", noise(9)[:16000])
    (root / "pretrain" / "222" / "00001.txt").write_text(
        "Text:  HALF PAST\nConf:  3\n\nWORD START END ASDSCORE\nHALF 0.1 0.3 5\n"
    )
    (root / "train.txt").write_text("5535415699068794046/00001\n")
    (root / "val.txt").write_text("\n")
    (root / "test.txt").write_text("6330311066473698535/00011 NF\n")
    found = public.prepare_lips("lrs2", root, tmp_path / "out")
    assert {(r.id, r.split) for r in found.rows} == {
        ("lrs2-main/5535415699068794046/00001", "train"), ("lrs2-main/6330311066473698535/00011", "test"),
        ("lrs2-pretrain/222/00001", "train"),
    }  # fmt: skip
    row = store.read_manifest(found.manifest)[0]
    assert row.text == "when you're cooking chips" and row.speaker == "lrs2-5535415699068794046"
    assert row.video and (row.root / row.video).resolve() == root / "main" / "5535415699068794046" / "00001.mp4"
    wav, rate = soundfile.read(row.audio)
    assert rate == 16000 and abs(len(wav) / rate - 1.0) < 0.1, "the film's own sound at its own rate"
    stamp = row.audio.stat().st_mtime_ns
    public.prepare_lips("lrs2", root, tmp_path / "out")
    assert row.audio.stat().st_mtime_ns == stamp, "taken out once"
    (root / "test.txt").unlink()
    with pytest.raises(MetisError, match="not LRS2"):
        public.prepare_lips("lrs2", root, tmp_path / "out")


def test_lrs3_holds_out_talks_and_lrw_takes_words(tmp_path: Path) -> None:
    root = tmp_path / "lrs3"
    for i in range(4):
        for part in ("trainval", "pretrain"):
            save(root / part / f"talk{i}" / "50001.wav", noise(10 * i + (part == "pretrain")), 16000)
            (root / part / f"talk{i}" / "50001.mp4").write_bytes(b"film")
            (root / part / f"talk{i}" / "50001.txt").write_text(
                f"Text:  THIS IS NUMBER {i}\nConf:  6\nRef:   talk{i}\n"
            )
    film(root / "test" / "other" / "00003.mp4", None)
    save(root / "test" / "another" / "00004.wav", noise(99), 16000)
    (root / "test" / "another" / "00004.mp4").write_bytes(b"film")
    found = public.prepare_lips("lrs3", root, tmp_path / "out3")
    split: dict[str, set[str]] = {}
    for row in found.rows:
        split.setdefault(row.speaker, set()).add(row.split)
    assert all(len(s) == 1 for s in split.values()) and split["lrs3-another"] == {"test"}
    assert Counter(row.split for row in found.rows) == {"train": 6, "validation": 2, "test": 1}
    assert [(line["reason"], Path(line["path"]).name) for line in found.refused] == [("damaged", "00003.mp4")]
    lrw = tmp_path / "lipread_mp4"
    for i, (word, part) in enumerate((("ABOUT", "train"), ("ABOUT", "val"), ("REALLY", "test"))):
        save(lrw / word / part / f"{word}_0000{i}.wav", noise(30 + i), 16000)
        (lrw / word / part / f"{word}_0000{i}.mp4").write_bytes(b"film")
        (lrw / word / part / f"{word}_0000{i}.txt").write_text("Disk reference: 1\nDuration: 0.47 seconds\n")
    rows = public.prepare_lips("lrw", lrw, tmp_path / "outw").rows
    assert [(r.text, r.split, r.speaker) for r in rows] == [
        ("about", "train", "unknown"), ("about", "validation", "unknown"), ("really", "test", "unknown")
    ]  # fmt: skip
    with pytest.raises(MetisError, match="unknown lip corpus"):
        public.prepare_lips("grid", lrw, tmp_path / "outw")


# ---------------------------------------------------------------- the report


def row(
    id: str, speaker: str, split: str, seconds: float, text: str, *, human: bool = True, licence: str = "CC0"
) -> Row:
    return Row(id, f"{id}.wav", text, "en", speaker, seconds, split, "here", licence, human)


def test_report_numbers_by_hand() -> None:
    rows = [
        row("1", "anna", "train", 1800.0, "one"), row("2", "ben", "train", 3600.0, "Two!", human=False, licence="MIT"),
        row("3", "anna", "test", 900.0, "two"), row("4", "unknown", "test", 900.0, ""),
        row("5", "ben", "seen", 1.0, "x"),
    ]  # fmt: skip
    base = {"speech": 2.0, "rate": 16000, "channels": 1, "subtype": "PCM_16", "rms_db": -23.0, "clipped": 0.0,
            "dc": 0.0, "bandwidth_hz": 8000, "seconds": 2.0}  # fmt: skip
    facts = [base, base | {"clipped": 0.01}, base | {"rate": 8000}, {"reason": "missing", "detail": "gone"}, base]
    out = report.summarise(rows, facts, [{"id": "9", "reason": "silent", "detail": ""}])
    assert (out["hours"], out["human_hours"], out["utterances"], out["voices"]) == (2.0, 1.0, 5, 2)
    assert out["splits"]["train"] == {"hours": 1.5, "human_hours": 0.5, "utterances": 2, "voices": 2}
    assert list(out["licences"]) == ["CC0", "MIT"] and out["licences"]["MIT"]["hours"] == 1.0
    assert out["shared"] == {"speakers": 1, "sentences": 1}, "anna; 'two'; ben may be in seen, nobody knows who 4 is"
    assert out["refused"] == {"silent": 1, "missing": 1} and out["sample_rates"] == {"8000": 1, "16000": 3}
    assert out["clipped"] == 1 and out["warnings"]["low rate"] == 1 and out["without_text"] == 1
    assert (out["letters_per_second"]["min"], out["letters_per_second"]["median"]) == (0.5, 1.5)
    assert out["duration_s"]["median"] == 900.0 and out["bandwidth_hz"]["max"] == 8000
    assert json.loads(json.dumps(out)) == out
    assert "rms_db" not in report.summarise(rows), "what needs the recordings is left out without them"


def test_report_page_stands_alone_and_names_no_path(tmp_path: Path) -> None:
    recs = many_speakers(tmp_path / "recs", 3, 4)
    save(recs / "v0" / "x&y<b>.wav", np.clip(noise(5) * 50, -1, 1))
    (recs / "v1" / "bad.wav").write_bytes(b"")
    found = build_manifest(recs, tmp_path / "corpus", licence="CC BY 4.0 <me>")
    out = tmp_path / "page" / "report.html"
    summary = report.corpus_report(found.manifest, out, title="Mine & yours")
    page = out.read_text()
    assert json.loads(out.with_suffix(".json").read_text()) == summary
    for text in (page, out.with_suffix(".json").read_text()):
        assert str(tmp_path) not in text and "../" not in re.sub(r"base64,[^\"]+", "", text)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4 and all(base64.b64decode(p).startswith(b"\x89PNG") for p in pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing is fetched"
    assert "Mine &amp; yours" in page and "CC BY 4.0 &lt;me&gt;" in page and "<b>.wav" not in page
    assert len(page) < 300_000 and page.count("<figcaption>") == 4
    assert summary["warnings"]["clipped"] == 1 and summary["refused"] == {"empty": 1}


def test_libritts_folders_are_readers_not_chapters(tmp_path: Path) -> None:
    for i, place in enumerate(("103/1240/103_1240_000_000", "103/1241/103_1241_000_001", "84/7/84_7_0_1")):
        save(tmp_path / "LibriTTS" / f"{place}.wav", speech(i))
        (tmp_path / "LibriTTS" / f"{place}.normalized.txt").write_text(ITEMS[i]["text"])
    rows = build_manifest(tmp_path / "LibriTTS", tmp_path / "out").rows
    assert sorted(row.speaker for row in rows) == ["103", "103", "84"]


def test_names_of_other_scripts_and_lines_with_separators(tmp_path: Path) -> None:
    names = ["\u0915\u093f", "\u0915\u0940", "ma", "m\u00e0", "ma\u0301", "m\u1ea3"]  # vowel signs, accents apart
    for i, name in enumerate(names):
        save(tmp_path / "recs" / f"{name}.wav", noise(i))
    found = build_manifest(tmp_path / "recs", tmp_path / "out")
    assert not found.refused and len({row.id for row in found.rows}) == len(names)
    text = "Hello\u2028world\x85again."
    rows = [{"path": "ma.wav", "text": text}, {"path": f"{names[0]}.wav", "text": "Nothing more."}]
    (tmp_path / "recs" / "list.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    found = build_manifest(tmp_path / "recs" / "list.jsonl", tmp_path / "listed")
    assert not found.refused and len(store.read_manifest(found.manifest)) == 2


def test_recordings_that_went_away_or_silent_spans_do_not_end_a_run(tmp_path: Path) -> None:
    save(tmp_path / "long.wav", np.concatenate([speech(0), np.zeros(48_000, np.float32), speech(1)]))
    save(tmp_path / "b.wav", speech(2))
    first, last = len(speech(0)) / AUDIO_RATE, len(speech(0)) / AUDIO_RATE + 2
    row = Row("a", "long.wav", "hi", "en", "anna", first, "train", "s", "CC0", True, root=tmp_path, end=first)
    end = last + len(speech(1)) / AUDIO_RATE
    rows = [row, replace(row, id="b", start=first, end=last), replace(row, id="c", start=last, end=end)]
    rows += [replace(row, id="d", path="b.wav", end=None), replace(row, id="e", path="gone.wav")]
    with pytest.warns(UserWarning, match="2 of 5 recordings cannot be read"):
        waves = store.store_waves(rows, tmp_path / "waves")
    lengths = [waves.length(i) for i in range(5)]
    assert lengths[1] == lengths[4] == 0 and lengths[3] == len(speech(2))
    assert np.allclose(waves[0] / 32767, speech(0), atol=1e-4) and np.allclose(waves[2] / 32767, speech(1), atol=1e-4)
    with pytest.raises(MetisError, match="none of the 1 recordings"):
        store.store_waves(rows[4:], tmp_path / "none")


def test_babble_comes_from_the_manifest_that_trains(tmp_path: Path) -> None:
    from metis_lib.training import data

    corpus = tmp_path / "mine"
    save(corpus / "hum.wav", noise(1, 3.0), subtype="PCM_16")
    store.write_jsonl(corpus / "noise.jsonl", [{"id": "hum", "path": "hum.wav", "split": "train"}])
    save(corpus / "a.wav", speech(0))
    row = Row("a", "a.wav", "", "en", "anna", 3.0, "train", "s", "CC0", True)
    rows = [row, replace(row, id="b", split="test", speaker="ben"), replace(row, id="c", path="gone.wav")]
    store.write_manifest(corpus / "list.jsonl", rows)
    sources = data.sources_of(corpus / "list.jsonl", "train")
    assert [recording.name for recording in sources.noises.speech] == ["anna"]


def test_dates_are_no_readers_and_dots_belong_to_names(tmp_path: Path) -> None:
    recs = tmp_path / "recs"
    for i, place in enumerate(("anna/2024-01-15_a", "ben/2024-01-15_b", "2024-01-15 10-22-31")):
        save(recs / f"{place}.wav", speech(i))
    save(recs / "103_1240_000001_000000.wav", speech(3))  # LibriTTS without its folders
    rows = {Path(row.path).stem: row.speaker for row in build_manifest(recs, tmp_path / "out").rows}
    assert rows == {
        "2024-01-15_a": "anna", "2024-01-15_b": "ben", "2024-01-15 10-22-31": "recs", "103_1240_000001_000000": "103",
    }  # fmt: skip
    lj = tmp_path / "lj"
    for i, name in enumerate(("anna.0001", "anna.0002")):
        save(lj / "wavs" / f"{name}.wav", speech(i))
    texts = [ITEMS[0]["text"], ITEMS[1]["text"]]
    (lj / "metadata.csv").write_text(f"anna.0001|{texts[0]}\nanna.0002.wav|{texts[1]}\n", encoding="utf-8")
    assert [row.text for row in build_manifest(lj, tmp_path / "dots").rows] == texts


def test_the_two_sides_of_a_call_are_not_averaged(tmp_path: Path) -> None:
    lhotse = pytest.importorskip("lhotse")
    n = min(len(speech(0)), len(speech(1)))
    path = save(tmp_path / "call.wav", np.stack([speech(0)[:n], speech(1)[:n]], axis=1))
    for name, channels, refused in (("call", (0, 1), 1), ("stereo", (0, 0), 0)):
        segments = [
            lhotse.SupervisionSegment(f"{name}-{i}", "call", 0.3 * i, 2.0, text="hello you", speaker=str(i), channel=c)
            for i, c in enumerate(channels)
        ]
        folder = tmp_path / name
        folder.mkdir()
        lhotse.RecordingSet.from_recordings([lhotse.Recording.from_file(path)]).to_file(folder / "recordings.jsonl.gz")
        lhotse.SupervisionSet.from_segments(segments).to_file(folder / "supervisions.jsonl.gz")
        found = list(importers.lhotse_entries(folder))
        assert sum("one channel of two" in e.get("detail", "") for e in found) == refused
        assert len([e for e in found if "reason" not in e]) == 2 * (not refused)


def test_a_sentence_stays_where_somebody_says_it() -> None:
    voices = [f"v{i}" for i in range(12)]
    own = [{"speaker": v, "text": f"{v} says line {i}", "path": f"{v}-{i}", "seconds": 3.0}
           for v in voices for i in range(5)]  # fmt: skip
    split = dict(zip(voices, importers.assign_splits(own[::5], (0.9, 0.05, 0.05), "speaker", 0, []), strict=True))
    few = [v for v in voices if split[v] != "train"]
    assert len(few) >= 2
    said = [{"speaker": v, "text": text, "path": f"{v}-{text}", "seconds": 1.0}
            for text, who in (("yes", voices), ("no", [few[0], "v1"]), ("maybe", [few[1], "v2"]), ("so", few))
            for v in who]  # fmt: skip
    given = importers.assign_splits([*own, *said], (0.9, 0.05, 0.05), "speaker", 0, [])[len(own) :]
    for text in ("yes", "no", "maybe", "so"):
        kept = {s for e, s in zip(said, given, strict=True) if e["text"] == text and s is not None}
        assert len(kept) == 1, text


# ---------------------------------------------------------------- what looked right and was not


def test_ids_with_folders_have_texts_of_their_own(tmp_path: Path) -> None:
    recs = tmp_path / "recs"
    for i, (speaker, stem) in enumerate((("anna", "001"), ("ben", "001"), ("ben", "002"))):
        save(recs / speaker / f"{stem}.wav", speech(i))
    lines = "".join(f"{s}/{n}|{ITEMS[i]['text']}\n" for i, (s, n) in enumerate((("anna", "001"), ("ben", "001"))))
    (recs / "metadata.csv").write_text(lines + f"wavs/002.wav|{ITEMS[2]['text']}\n", encoding="utf-8")
    texts = {row.id: row.text for row in build_manifest(recs, tmp_path / "out").rows}
    assert texts == {"anna-001": ITEMS[0]["text"], "ben-001": ITEMS[1]["text"], "ben-002": ITEMS[2]["text"]}


@pytest.mark.parametrize(("encoding", "good"), [("utf-8-sig", True), ("utf-16", True), ("latin-1", False)])
def test_texts_in_another_encoding_are_no_texts(tmp_path: Path, encoding: str, good: bool) -> None:
    recs, text = tmp_path / "recs", f"Die Straße ist schön. {ITEMS[0]['text']}"
    for i in range(2):
        save(recs / f"{i}.wav", speech(i))
    (recs / "0.txt").write_text(text, encoding=encoding)
    found = build_manifest(recs, tmp_path / "out", keep=("wrong text",))
    texts = {row.id: row.text for row in found.rows}
    assert texts == ({"0": text, "1": ""} if good else {"1": ""})
    assert reasons(found) == ({} if good else {"0.wav": "wrong text"})
    (recs / "metadata.csv").write_text(f"1|{text}\n", encoding=encoding)
    if not good:
        with pytest.raises(MetisError, match="metadata.csv: not a text in UTF-8"):
            build_manifest(recs, tmp_path / "again")


@pytest.mark.parametrize("speakers", [10, 12, 25])
def test_two_speakers_are_held_out_where_there_are_ten(speakers: int) -> None:
    """Conversion and extraction need a second voice to try."""
    entries = [{"speaker": f"s{i % speakers}", "text": f"text {i}", "path": f"{i}.wav", "seconds": 3.0 + i % 7}
               for i in range(speakers * 8)]  # fmt: skip
    splits = importers.assign_splits(entries, (0.9, 0.05, 0.05), "auto", 0, [])
    held = {s: {e["speaker"] for e, given in zip(entries, splits, strict=True) if given == s} for s in store.SPLITS}
    assert len(held["validation"]) >= 2 and len(held["test"]) >= 2 and len(held["train"]) >= 6


def test_recordings_that_are_not_read_are_listed(tmp_path: Path) -> None:
    recs = tmp_path / "recs"
    for i, name in enumerate(("take 1", "take-1", "take+1")):
        save(recs / f"{name}.wav", speech(i))
    save(recs / "integers.wav", speech(3) * 32768, subtype="FLOAT")
    (recs / "phone.m4a").write_bytes(b"x")
    found = build_manifest(recs, tmp_path / "out")
    assert len({row.id for row in found.rows}) == 3 and "take-1" in {row.id for row in found.rows}
    assert reasons(found) == {"integers.wav": "scale", "phone.m4a": "format"}


def test_a_name_of_an_old_archive_is_refused_and_stops_nothing(tmp_path: Path) -> None:
    import os

    save(tmp_path / "recs" / "good.wav", speech(0))
    try:
        shutil.copy(tmp_path / "recs" / "good.wav", os.fsencode(tmp_path / "recs") + b"/M\xfcller.wav")
    except OSError:
        pytest.skip("a file system of UTF-8 names only")
    found = build_manifest(tmp_path / "recs", tmp_path / "out")
    assert [row.id for row in found.rows] == ["good"] and "rename it" in found.refused[0]["detail"]


def test_odd_lines_and_files_of_a_list_are_listed_and_stop_nothing(tmp_path: Path) -> None:
    for name in ("good", "filmed"):
        save(tmp_path / f"{name}.wav", speech(0 if name == "good" else 1))
    save(tmp_path / "slow.wav", speech(2)[:100], 10)
    (tmp_path / "headerless.raw").write_bytes(bytes(4000))
    rows = [{"path": f"{name}.wav"} for name in ("good", "slow", "x" * 300, "~nobody/x", "\ud800")]
    rows += [{"path": "filmed.wav", "video": 5}, {"path": "headerless.raw"}, {"path": "good.wav", "text": "\ud800 a"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = build_manifest(tmp_path / "list.jsonl", tmp_path / "out")
    assert {row.id.rsplit("-", 1)[0] for row in found.rows} == {"good", "filmed", "slow"}
    assert len(found.rows) + len(found.refused) == len(rows) and reasons(found)["headerless.raw"] == "not audio"


def test_a_list_with_a_column_called_recording_is_a_list(tmp_path: Path) -> None:
    save(tmp_path / "a.wav", speech(0))
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": "a.wav", "recording": "3"}) + "\n")
    assert len(build_manifest(tmp_path / "list.jsonl", tmp_path / "out").rows) == 1
    (tmp_path / "out" / "facts.jsonl").write_text('{"id": "x"}\n[1]\n')  # odd lines of another version
    save(tmp_path / "a.wav", speech(1))
    assert len(build_manifest(tmp_path / "list.jsonl", tmp_path / "out").rows) == 1


def test_cuts_with_a_path_somewhere_are_cuts(tmp_path: Path) -> None:
    cut = {"id": "c", "start": 0.0, "duration": 1.0, "channel": 0, "type": "MonoCut", "custom": {"path": "x"}}
    sources = [{"type": "file", "channels": [0], "source": str(save(tmp_path / "a.wav", speech(0)))}]
    about = {"sampling_rate": 24000, "num_samples": len(speech(0)), "duration": len(speech(0)) / 24000}
    cut |= {"recording": {"id": "r", "sources": sources, **about}, "supervisions": []}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(cut) + "\n")
    assert [row.duration for row in build_manifest(tmp_path / "cuts.jsonl", tmp_path / "out").rows] == [1.0]


def test_a_report_keeps_what_the_import_wrote(tmp_path: Path) -> None:
    """One file has changed since: its line is measured anew, the others keep their ids and warnings."""
    for i in range(3):
        save(tmp_path / "recs" / f"{i}.wav", speech(i))
    found = build_manifest(tmp_path / "recs", tmp_path / "out")
    before = {row["path"]: row for row in store.read_jsonl(tmp_path / "out" / "facts.jsonl")}
    save(tmp_path / "recs" / "1.wav", speech(5))
    report.corpus_report(found.manifest)
    after = {row["path"]: row for row in store.read_jsonl(tmp_path / "out" / "facts.jsonl")}
    changed = next(path for path in before if path.endswith("1.wav"))
    assert len(store.read_jsonl(tmp_path / "out" / "facts.jsonl")) == 3
    assert {k: row for k, row in after.items() if k != changed} == {k: r for k, r in before.items() if k != changed}
    assert after[changed]["sound"] != before[changed]["sound"]


@pytest.mark.parametrize(("said", "code"), [("en-US", "en"), ("EN", "en"), ("pt_BR", "pt"), ("German", "de")])
def test_languages_have_one_name(tmp_path: Path, said: str, code: str) -> None:
    save(tmp_path / "recs" / "a.wav", speech(0))
    (row,) = build_manifest(tmp_path / "recs", tmp_path / "out", language=said).rows
    assert row.language == code


def test_babble_of_long_recordings_does_not_fill_the_memory(tmp_path: Path) -> None:
    save(tmp_path / "long.wav", noise(1, 40.0))
    save(tmp_path / "hum.flac", noise(2, 2.0))
    row = Row(id="long", path="long.wav", text="", language="en", speaker="a", duration=40.0, split="train",
              source="x", licence="CC0", human=True)  # fmt: skip
    store.write_manifest(tmp_path / "manifest.jsonl", [row])
    listed = {"id": "hum", "path": "hum.flac", "split": "train", "kind": "hum", "licence": "CC0"}
    store.write_jsonl(tmp_path / "noise.jsonl", [listed])
    assert [len(one.wav) for one in simulate.Noises.load(tmp_path).speech] == [simulate.TALK * AUDIO_RATE]
