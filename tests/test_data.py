"""Manifests, corpus building blocks, simulation and the embedded test set."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile

from metis_lib import audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data import simulate, store
from metis_lib.data.simulate import Degradation, Noises, Recording, Rooms, degrade
from metis_lib.errors import MetisError
from recipes.nano import asr, corpus, human, synthesis, testsets

pytestmark = pytest.mark.data
HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"
GOOD = {
    "id": "a", "path": "a.flac", "text": "Hello there.", "language": "en", "speaker": "s", "duration": 1.5,
    "split": "train", "source": "here", "licence": "CC0", "human": True,
}  # fmt: skip


def rows_of(task: str) -> list[dict]:
    rows = [json.loads(line) for line in (HUMAN / "manifest.jsonl").read_text().splitlines()]
    return [r for r in rows if r["task"] == task]


def wav_of(name: str) -> np.ndarray:
    wav, rate = soundfile.read(HUMAN / name, dtype="float32")
    assert rate == AUDIO_RATE and wav.ndim == 1
    return wav


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(simulate.power(a) / simulate.power(b))


# ---------------------------------------------------------------- manifests


def test_manifest_comes_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    store.write_jsonl(path, [GOOD, GOOD | {"id": "b", "start": 0.5, "end": 2.0}])
    rows = store.read_manifest(path)
    assert rows[0].audio == tmp_path / "a.flac" and rows[0].start is None and rows[1].end == 2.0
    store.write_manifest(tmp_path / "again.jsonl", rows)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.jsonl", "m.jsonl"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": None}, "text must not be None"),
        ({"duration": "1.5"}, "duration must not be"),
        ({"duration": True}, "duration must not be"),
        ({"duration": 0}, "positive seconds"),
        ({"duration": float("nan")}, "positive seconds"),
        ({"human": 1}, "human must not be 1"),
        ({"split": "dev"}, "split must be one of"),
        ({"start": 2.0, "end": 1.0}, "positive seconds in order"),
        ({"id": ""}, "must not be empty"),
        ({"speakr": "x"}, "unknown keys speakr"),
    ],
)
def test_bad_row_is_named_with_its_line(tmp_path: Path, change: dict, says: str) -> None:
    path = tmp_path / "m.jsonl"
    store.write_jsonl(path, [GOOD, GOOD | {"id": "b"} | change])
    with pytest.raises(MetisError, match=says) as error:
        store.read_manifest(path)
    assert f"{path}:2" in str(error.value) and "\n" not in str(error.value)


def test_manifest_failures_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with pytest.raises(MetisError, match="no such manifest"):
        store.read_manifest(path)
    for content, says in (
        ("\n", "is empty"),
        ("{oops\n", ":1: not JSON"),
        ("[1]\n", ":1: a row must be a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "licence"}), "lacks licence"),
        ((json.dumps(GOOD) + "\n") * 2, ":2: the id 'a' occurs twice"),
        (json.dumps(GOOD | {"start": float("nan")}), ":1: duration, start and end"),
        (json.dumps(GOOD | {"end": float("inf")}), ":1: duration, start and end"),
        (json.dumps(GOOD | {"text": "M\xfcller"}, ensure_ascii=False).encode("latin-1"), "not in UTF-8"),
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(MetisError, match=says):
            store.read_manifest(path)
    path.write_text(json.dumps(GOOD))
    assert [row.id for row in store.read_manifest(path)] == ["a"]


def test_what_was_refused_before_is_listened_to_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever deletes the list gets all of it back: the manifest lacks those that it had refused."""
    folder = tmp_path / "corpora" / "nano"
    said = {"kept": "So it is.", "refused": "So it is.", "mute": ""}
    rows = [GOOD | {"id": name, "text": text} for name, text in said.items()]
    store.write_jsonl(folder / "parts" / "uqm.jsonl", rows)
    store.write_jsonl(folder / "manifest.jsonl", rows[:1])
    heard: list[str] = []
    monkeypatch.setenv("METIS_HOME", str(tmp_path))
    monkeypatch.setattr(asr, "VERDICTS", tmp_path / "human_asr.csv")
    monkeypatch.setattr(asr, "listen", lambda rows: [heard.append(row.id) or (row, 3, 2) for row in rows])
    monkeypatch.setattr("sys.argv", ["asr"])
    asr.main()
    assert heard == ["kept", "refused"] and set(asr.read_verdicts().values()) == {2 / 3}
    asr.main()
    assert heard == ["kept", "refused"], "it goes on where it stopped"


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text('{"id": 1}\n{"id": 2}\n{"id"')
    assert store.read_jsonl(path) == [{"id": 1}, {"id": 2}]


# ---------------------------------------------------------------- building blocks of the corpus


def test_dialogue_lines_become_sentences() -> None:
    text = "#(HELLO)\tx-000.ogg\nYou WILL wait\nfor *us*.\nNo!\nGo now, Captain.\n\n#(ask)\nWho are you?\n"
    times = "#(HELLO) 3000,1500,800\n#(ask) \n"
    ((file, lines, shown),) = human.parse_dialogue(text, times)
    assert (file, shown) == ("x-000.ogg", [3000, 1500, 800])
    spans = human.sentence_spans(lines, shown, 9.0)
    assert spans == [(0.0, 4.5, ["You WILL wait", "for *us*."]), (4.5, 9.0, ["No!", "Go now, Captain."])]
    assert human.spoken_text(spans[0][2]) == "You will wait for us."
    long = human.sentence_spans(["one", "two", "three."], [8000, 8000], 24.0)
    assert [s[2] for s in long] == [["one"], ["two"], ["three."]], "no span beyond the limit"


@pytest.mark.parametrize("text", ["Come to 400.2 now", "(later) we go", "Hello, <name>!", "No"])
def test_uncertain_text_is_left_out(text: str) -> None:
    assert human.spoken_text([text]) is None


def test_dialogue_without_matching_timings_is_left_out() -> None:
    assert not list(human.parse_dialogue("#(A)\tx.ogg\none\ntwo\n", "#(A) 10,20\n"))


def test_boundary_moves_to_the_pause() -> None:
    db = np.full(300, -20.0)
    db[140:150] = -60
    assert 1.40 <= human.quiet_point(db, 1.3) <= 1.50
    assert abs(human.quiet_point(db, 2.5) - 2.5) < 0.02, "nothing near: stays"


def test_resource_bundle_is_read() -> None:
    names, bodies = [b"rain.ogg", b"wind.ogg"], [b"first file", b"second"]
    table, place = b"", 24 + 8 + 4 + 2 * 24
    blob = b""
    for name, body in zip(names, bodies, strict=True):
        value = struct.pack("<II", len(body), 0) + body + b"\0\0(uuay)"
        key, first = place + len(blob), place + len(blob) + len(name)
        table += struct.pack("<IIIHcBII", 0, 0xFFFFFFFF, key, len(name), b"v", 0, first, first + len(value))
        blob += name + value
    root = struct.pack("<III", 0, 1, 0) + table
    data = b"GVariant" + struct.pack("<IIII", 0, 0, 24, 24 + len(root)) + root + blob
    assert list(corpus.read_gresource(data)) == [("rain.ogg", b"first file"), ("wind.ogg", b"second")]


def test_level_and_trim() -> None:
    speech = np.random.default_rng(0).standard_normal(24000).astype(np.float32) * 0.01
    wav = np.concatenate([np.zeros(12000, np.float32), speech, np.zeros(12000, np.float32)])
    cut = audio.trim(wav, 24000)
    assert abs(len(cut) - 24000 - 2 * 0.08 * 24000) < 500
    loud = audio.level(cut)
    assert abs(10 * np.log10(simulate.power(loud)) - audio.LEVEL_DB) < 0.01
    spike = np.zeros(24000, np.float32)
    spike[100] = 0.5
    assert np.abs(audio.level(spike)).max() == pytest.approx(0.97, abs=1e-4), "never clipped"


def test_room_has_its_direct_path_where_it_says() -> None:
    rir, direct, rt60 = corpus.simulate_room(3)
    again, *_ = corpus.simulate_room(3)
    assert np.array_equal(rir, again) and 0.2 <= rt60 <= 0.9
    assert rir[direct] == pytest.approx(1) and np.abs(rir[: direct - 45]).max() < 0.05
    tail = simulate.power(rir[direct + int(rt60 * AUDIO_RATE) // 2 :])
    assert tail < 0.05 * simulate.power(rir[direct : direct + 1200]), "the room decays"


# ---------------------------------------------------------------- planning of synthetic speech


def _pool(count: int) -> list[str]:
    words = ["river", "stone", "garden", "window", "letter", "winter", "paper", "morning", "silver", "candle"]
    return [
        f"The {words[i % 10]} and a {words[i // 10 % 10]} met the {words[i // 100 % 10]} of {words[i // 1000 % 10]}."
        for i in range(count)
    ]


def test_sentences_are_plain() -> None:
    text = (
        "A bird in the hand is worth two.\n\t\t-- Cervantes\n%\nIt costs $5, said he.\n%\n"
        "Use TCP now, please.\n%\n"
        "Good night, Mrs.\n%\nHe left.  She stayed at home,\nalone.\n%\nA bird in the hand is worth two.\n"
    )
    assert synthesis.sentences([text]) == ["A bird in the hand is worth two.", "She stayed at home, alone."]


def test_examples_of_a_dictionary_become_sentences(tmp_path: Path) -> None:
    line = (
        '003 00 v x | to speak; "he sat out the game"; "Who are you?"; "at 5 o\'clock"; "no"; "met secretly, they did"'
    )
    (tmp_path / "data.verb").write_text(line + "\n")
    assert synthesis.examples([tmp_path / "data.verb"]) == ["He sat out the game.", "Met secretly, they did."]


def test_plan_holds_out_voices_and_sentences() -> None:
    jobs = synthesis.plan(_pool(9000), 0.3, 0)
    assert jobs == synthesis.plan(_pool(9000), 0.3, 0) != synthesis.plan(_pool(9000), 0.3, 1)
    said: dict[str, set[str]] = {}
    voices: dict[str, set[str]] = {}
    for job in jobs:
        said.setdefault(job["split"], set()).add(job["text"])
        voices.setdefault(job["split"], set()).add(f"{job['engine']}-{job['voice']}")
    assert set(said) == {"train", "validation", "test", "seen"}
    for held in ("validation", "test"):
        assert not said["train"] & said[held] and not voices["train"] & voices[held]
    assert not said["validation"] & said["test"] and len(voices["test"]) == 22
    assert voices["seen"] <= {f"{e}-{v}" for e in synthesis.SHARES for v in synthesis.voices(e, "train")}
    assert not said["seen"] & (said["train"] | said["test"])
    assert len({job["id"] for job in jobs}) == len(jobs)
    length = [0.8 * (len(j["text"]) / 14 + 0.3) / j["rate"] for j in jobs if j["split"] == "train"]
    assert sum(length) / 3600 == pytest.approx(0.3, rel=0.05)


def test_no_blend_uses_a_held_out_voice() -> None:
    assert not set(synthesis.KOKORO_BASE) & set(synthesis.KOKORO_TEST)
    assert len({*synthesis.KOKORO_BASE, *synthesis.KOKORO_TEST}) == 28


def test_corpus_leaves_out_what_was_heard_otherwise_and_shared_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    def line(id: str, text: str, split: str, human: bool = True) -> dict:
        return GOOD | {"id": id, "text": text, "split": split, "human": human}

    monkeypatch.setattr(asr, "read_verdicts", lambda: {asr.key("bad", "So it is."): 0.8, asr.key("ok", "It is."): 0.4})
    rows = [
        line("bad", "So it is.", "train"), line("ok", "It is.", "train"), line("a", "Who are you?", "train"),
        line("b", "who are YOU", "test"), line("c", "Who, are you!", "validation"), line("none", "", "train"),
        line("d", "So it is.", "train", human=False),
        line("e", "It was.", "train", human=False) | {"speaker": "silero-en_115"},
    ]  # fmt: skip
    assert [r["id"] for r in corpus.usable(rows)] == ["ok", "b", "none", "d"]


def test_errors_are_given_back_to_the_utterances_they_fall_on() -> None:
    said = [["how", "are", "you"], ["i", "am", "fine"]]
    assert asr.share_errors(said, "how are you i am fine") == [0, 0]
    assert asr.share_errors(said, "how were you i am very fine") == [1, 1]
    assert asr.share_errors(said, "i am fine thanks") == [3, 1]
    assert asr.share_errors(said, "") == [3, 3]


def test_verdicts_are_listed_for_the_human_speech() -> None:
    verdicts = asr.read_verdicts()
    assert len(verdicts) > 5000 and all(0 <= rate < 100 for rate in verdicts.values())
    assert 0.5 < sum(rate <= asr.BAD for rate in verdicts.values()) / len(verdicts) < 1


def test_windows_hold_one_speaker_and_half_a_minute() -> None:
    rows = [store.parse_row(GOOD | {"id": str(i), "speaker": "ab"[i > 6], "duration": 9.0}, root=Path(), where="")
            for i in range(9)]  # fmt: skip
    assert [[r.id for r in w] for w in asr.windows(rows)] == [["0", "1"], ["2", "3"], ["4", "5"], ["6"], ["7", "8"]]


def test_speech_of_the_game_is_found_by_its_table() -> None:
    files = [(b"020001P2.SB", b"first"), (b"030C01J1.SB", b"second"), (b"MUSIC.RL", b"other")]
    at, table = 15 + 21 * len(files), b"QTBLCEM10" + b"\0" * 3 + b"\1" + struct.pack(">H", len(files))
    for name, body in files:
        table += struct.pack(">12sBII", name, 1, at, len(body))
        at += len(body)
    clips = list(human.queen_clips(table + b"".join(body for _, body in files)))
    assert clips == [("020001p2", b"first"), ("030c01j1", b"second")]


def test_plan_says_when_sentences_run_out() -> None:
    with pytest.raises(MetisError, match="do not suffice"):
        synthesis.plan(_pool(50), 1.0, 0)


# ---------------------------------------------------------------- simulation


def _speech(seed: int, length: int = 4800) -> np.ndarray:
    return audio.level(np.random.default_rng(seed).standard_normal(length).astype(np.float32))


def _tone(hz: float, length: int = 24000) -> np.ndarray:
    return (0.1 * np.sin(2 * np.pi * hz * np.arange(length) / AUDIO_RATE)).astype(np.float32)


ROOMS = Rooms(
    np.stack([np.eye(1, 900, 37, dtype=np.float32)[0] + 0.3 * np.eye(1, 900, 700, dtype=np.float32)[0]] * 2),
    np.array([900, 900]), np.array([37, 37]), np.array([0.4, 0.4]),
)  # fmt: skip


def test_thousand_examples_keep_the_stated_odds() -> None:
    noises, odds = (
        Noises([Recording("hum", _tone(100))]),
        {"noise": 0.9, "room": 0.35, "band_hz": 0.25, "clip_db": 0},
    )
    wav, count, did, snrs, bands = _speech(1, 1200), 1000, dict.fromkeys(odds, 0), [], []
    for seed in range(count):
        *_, done = degrade(wav, AUDIO_RATE, noises=noises, generator=np.random.default_rng(seed), rooms=ROOMS)
        for key in odds:
            did[key] += done[key] is not None
        snrs += [done["snr_db"]] if done["noise"] else []
        bands += [done["band_hz"]] if done["band_hz"] else []
    for key, p in odds.items():
        assert abs(did[key] / count - p) <= 4 * (p * (1 - p) / count) ** 0.5, (key, did[key])
    assert min(snrs) >= -5 and max(snrs) <= 20 and abs(np.mean(snrs) - 7.5) < 1
    assert set(bands) == {2000, 4000, 8000}


@pytest.mark.parametrize("kind", ["ambient", "babble", "pink", "white"])
def test_one_seed_gives_the_same_bytes(kind: str) -> None:
    talk = [Recording(f"s{i}", _speech(i + 9)) for i in range(8)]
    noises, wav = Noises([Recording("hum", _tone(100, 7000))], talk), _speech(2)

    def run(seed: int) -> tuple[bytes, bytes, dict]:
        sure = Degradation(noise_p=1, reverb_p=1, band_p=1, clip_p=1)
        a, b, done = degrade(
            wav, AUDIO_RATE, noises=noises, generator=np.random.default_rng(seed), rooms=ROOMS, params=sure,
            noise_kind=kind,
        )  # fmt: skip
        assert a.dtype == b.dtype == np.float32 and len(a) == len(b) == len(wav) and np.abs(a).max() <= 0.99
        return a.tobytes(), b.tobytes(), done

    assert run(5) == run(5)
    assert run(5)[0] != run(6)[0]
    assert run(5)[2]["noise"].startswith(kind) and run(5)[2]["clip_db"] >= 3


def test_snr_is_what_was_asked_on_real_speech() -> None:
    noises = Noises(speech=[Recording("other", wav_of("librivox-0880.flac"))], talkers=(1, 1))
    for row in rows_of("codec")[::3]:
        for snr in (-5.0, 0.0, 12.5, 20.0):
            params = Degradation(noise_p=1, snr_db=(snr, snr), reverb_p=0, band_p=0)
            noisy, clean, done = degrade(
                wav_of(row["clean"]),
                AUDIO_RATE,
                noises=noises,
                generator=np.random.default_rng(3),
                params=params,
            )
            assert done["snr_db"] == snr
            assert decibels(clean, noisy - clean) == pytest.approx(snr, abs=0.05)


def test_room_keeps_the_target_on_the_direct_path() -> None:
    params = Degradation(noise_p=0, reverb_p=1, band_p=0)
    wav = _speech(4)
    noisy, clean, done = degrade(
        wav, AUDIO_RATE, noises=Noises(), generator=np.random.default_rng(0), rooms=ROOMS, params=params
    )
    lags = [float(np.dot(noisy[50:4000], clean[50 + k : 4000 + k])) for k in range(-40, 41)]
    assert np.argmax(lags) == 40 and done["rt60"] == 0.4 and done["noise"] is None
    np.testing.assert_allclose(clean, wav * done["gain"], atol=1e-6)
    np.testing.assert_allclose((noisy - clean)[663:], 0.3 * clean[:-663], atol=1e-5)  # the echo at 700 - 37


@pytest.mark.parametrize("hz", [2000, 4000, 8000])
def test_band_limit(hz: int) -> None:
    wav = _speech(6, 24000)
    out = simulate.band_limit(wav, AUDIO_RATE, hz)
    spectrum, axis = np.abs(np.fft.rfft(out)) ** 2, np.fft.rfftfreq(24000, 1 / AUDIO_RATE)
    inside, outside = spectrum[axis < 0.85 * hz].mean(), spectrum[axis > 1.1 * hz].mean()
    assert 10 * np.log10(inside / outside) > 40
    tone = _tone(500)
    np.testing.assert_allclose(simulate.band_limit(tone, AUDIO_RATE, hz)[500:-500], tone[500:-500], atol=2e-3)


def test_babble_is_of_others() -> None:
    talk = [Recording("me", _tone(3000)), *(Recording(f"s{i}", _tone(200 + 50 * i)) for i in range(4))]
    for seed in range(20):
        wav, name = Noises(speech=talk).sample(24000, np.random.default_rng(seed), kind="babble", exclude="me")
        assert np.abs(np.fft.rfft(wav))[3000] < 1 and name.startswith("babble:")


def test_colours_have_their_slope() -> None:
    for slope, wanted in ((0.0, 0.0), (1.0, 3.01)):
        power = np.abs(np.fft.rfft(simulate.colour(1 << 16, slope, np.random.default_rng(0)))) ** 2
        low, high = power[1000:2000].mean(), power[2000:4000].mean()
        assert 10 * np.log10(low / high) == pytest.approx(wanted, abs=0.5)


def test_silence_cannot_be_degraded() -> None:
    for wav in (np.zeros(100, np.float32), np.zeros(0, np.float32), np.ones((2, 50), np.float32)):
        with pytest.raises(MetisError, match="not silent"):
            degrade(wav, AUDIO_RATE, noises=Noises(), generator=np.random.default_rng(0))


def test_missing_corpus_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(MetisError, match="metis prepare nano"):
        Noises.load(tmp_path)
    with pytest.raises(MetisError, match="metis prepare nano"):
        Rooms.load(tmp_path)


# ---------------------------------------------------------------- the embedded test set


def test_testset_has_twelve_items_a_task_of_known_terms() -> None:
    card = (HUMAN / "card.md").read_text()
    for task in ("codec", "se", "tts"):
        rows = rows_of(task)
        assert len(rows) == 12 and len({r["id"] for r in rows}) == 12
        assert len({r["speaker"] for r in rows}) >= 6
        for row in rows:
            assert row["text"] and row["source"] and row["licence"] and row["bandwidth_hz"] in (5500, 8000)
            assert row["licence"] in card
            info = soundfile.info(HUMAN / row["clean"])
            assert (info.samplerate, info.channels, info.subtype) == (AUDIO_RATE, 1, "PCM_16")
            assert 2.0 <= info.duration <= 7.2 and info.duration == pytest.approx(row["duration"], abs=0.002)


def test_testset_files_are_all_there_and_all_used() -> None:
    rows = [r for task in ("codec", "se", "tts") for r in rows_of(task)]
    used = {r[k] for r in rows for k in ("clean", "noisy", "prompt") if k in r}
    assert used == {p.name for p in HUMAN.glob("*.flac")}
    assert sum(p.stat().st_size for p in HUMAN.iterdir()) < 5_000_000


def test_synthetic_testsets_are_made_from_the_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "corpora" / "nano"
    lines = []
    (folder / "audio").mkdir(parents=True)
    for k, path in enumerate([p for p in sorted(HUMAN.glob("*.flac")) if "-noisy" not in p.name][:4]):
        (folder / "audio" / path.name).write_bytes(path.read_bytes())
        seconds = soundfile.info(path).duration
        lines.append(GOOD | {"id": path.stem, "path": f"audio/{path.name}", "speaker": "ab"[k % 2], "human": False,
                             "duration": seconds, "split": "test", "text": f"Sentence {k}."})  # fmt: skip
    store.write_jsonl(folder / "manifest.jsonl", lines)
    noise = np.random.default_rng(0).standard_normal(AUDIO_RATE).astype(np.float32) * 0.1
    soundfile.write(folder / "hum.flac", noise, AUDIO_RATE)
    store.write_jsonl(folder / "noise.jsonl", [{"id": "hum", "path": "hum.flac", "split": "test"}])
    out = testsets.build_synthetic("unseen", tmp_path, each=1)
    rows = store.read_jsonl(out / "manifest.jsonl")
    assert [r["task"] for r in rows] == [t for t in ("codec", "l2s", "se", "tse", "tts", "vc") for _ in "ab"]
    by = {(r["task"], r["speaker"]): r for r in rows}
    speaker_of = {line["id"]: line["speaker"] for line in lines}
    for voice in "ab":
        assert by["tts", voice]["prompt"] != by["tts", voice]["clean"]
        assert speaker_of[by["tts", voice]["prompt"].removesuffix(".flac")] == voice
        assert speaker_of[by["vc", voice]["prompt"].removesuffix(".flac")] != voice
        assert speaker_of[by["tse", voice]["interferer"].removesuffix(".flac")] != voice
        assert by["se", voice]["done"]["noise"] and (out / by["l2s", voice]["video"]).is_file()
        target, mixture = (soundfile.read(out / by["tse", voice][key])[0] for key in ("clean", "noisy"))
        assert len(target) == len(mixture) and not np.array_equal(target, mixture)
        stranger = soundfile.read(out / by["tse", voice]["interferer"])[0][: len(target)]  # then silence
        added = np.pad(by["tse", voice]["gain"] * stranger, (0, len(target) - len(stranger)))
        np.testing.assert_allclose(mixture - target, added, atol=1e-3)
        assert by["se", voice]["snr_db"] == by["se", voice]["done"]["snr_db"]
    assert {r[key] for r in rows for key in ("clean", "noisy", "prompt", "interferer") if key in r} == {
        p.name for p in out.glob("*.flac")
    }
    again = testsets.build_synthetic("unseen", tmp_path, each=1)
    assert store.read_jsonl(again / "manifest.jsonl") == rows
    with pytest.raises(MetisError, match="no voices for the test set"):
        testsets.build_synthetic("seen", tmp_path)
    store.write_jsonl(folder / "manifest.jsonl", [line | {"split": "validation"} for line in lines])
    store.write_jsonl(folder / "noise.jsonl", [{"id": "hum", "path": "hum.flac", "split": "train"}])
    tuning = store.read_jsonl(testsets.build_synthetic("tuning", tmp_path, each=1) / "manifest.jsonl")
    assert {r["task"] for r in tuning} == {"codec", "se", "tse", "tts", "vc"}


def test_testset_speakers_are_never_trained_on() -> None:
    for row in (r for task in ("codec", "se", "tts") for r in rows_of(task)):
        source, _, name = row["speaker"].partition("-")
        assert source in ("librivox", "cmu") or (source == "uqm" and name in human.UQM_TEST)
        if row["task"] == "se":
            noise = (row["done"]["noise"] or "").partition(":")
            assert noise[0] != "ambient" or noise[2] in corpus.NOISE_TEST
    assert not set(human.UQM_TEST) & (set(human.UQM_VALIDATION) | set(human.UQM_DROPPED))
    assert len(testsets.CLEAN) == len(testsets.DEGRADED) == len(testsets.SPOKEN) == 12


def test_noisy_items_are_aligned_and_as_noisy_as_stated() -> None:
    rows = rows_of("se")
    assert {r["snr_db"] for r in rows} >= {0.0, 15.0} and sum(r["done"]["room"] is not None for r in rows) == 4
    for row in rows:
        clean, noisy = wav_of(row["clean"]), wav_of(row["noisy"])
        assert len(clean) == len(noisy) and np.abs(noisy).max() < 1 and row["noise_licence"]
        assert len(wav_of(row["clean"])) == len(wav_of(row["id"] + ".flac"))
        if row["done"]["room"] is None:
            assert decibels(clean, noisy - clean) == pytest.approx(row["snr_db"], abs=0.1)
        a, b = np.fft.rfft(clean, 1 << 18), np.fft.rfft(noisy, 1 << 18)
        response = np.abs(np.fft.irfft(b * np.conj(a) / (np.abs(a) ** 2 + 0.1)))
        at, dry = int(np.argmax(response)), row["done"]["room"] is None
        assert at == 0 or (not dry and at <= 0.015 * AUDIO_RATE), "only an early reflection may be louder"
        assert response[0] > 5 * response[-400:-50].max(), "nothing comes before the direct path"


def test_prompts_are_other_sentences_of_the_same_speaker() -> None:
    owner = {id: values[1] for id, values in testsets.SPHINX.items()}
    for row in rows_of("tts"):
        prompt = row["prompt"].removesuffix(".flac")
        speaker = owner.get(prompt, "-".join(prompt.split("-")[:2]))
        assert speaker == row["speaker"] and row["prompt_text"] and row["prompt_text"] != row["text"]
        assert 2.0 <= soundfile.info(HUMAN / row["prompt"]).duration <= 4.1
