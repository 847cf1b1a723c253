"""Test sets: the embedded one for vc, tse and l2s, and public ones in miniature, from their layout to items."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from metis_lib import cli
from metis_lib.config import AUDIO_RATE
from metis_lib.data.store import read_jsonl, write_jsonl
from metis_lib.data.video import read_crops
from metis_lib.errors import MetisError
from metis_lib.evaluation.metrics import TASKS
from metis_lib.evaluation.systems import Item, load_items
from recipes import testsets
from recipes.nano import human
from recipes.nano import testsets as nano
from recipes.testsets import SETS, prepare

pytestmark = pytest.mark.evaluation
HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"
ADDED = {"vc": 12, "tse": 12, "l2s": 6}


# ---------------------------------------------------------------- the embedded set


def read(path: Path) -> np.ndarray:
    wav, rate = soundfile.read(path, dtype="float64")
    assert rate == AUDIO_RATE and wav.ndim == 1
    return wav


def speaker_of(path: Path) -> str:
    """Who speaks in a recording of the embedded set."""
    return nano.SPHINX[path.stem][1] if path.stem in nano.SPHINX else "-".join(path.stem.split("-")[:2])


@pytest.mark.parametrize("task", ADDED)
def test_human_rows_are_complete(task: str) -> None:
    items, card = load_items("human", task), (HUMAN / "card.md").read_text()
    assert len(items) == ADDED[task] and len({item.speaker for item in items}) >= 6
    for item in items:
        assert item.text and item.prompt_text and item.prompt and item.extra["licence"] in card
        assert item.prompt_text != item.text and speaker_of(item.clean) == item.speaker
        assert item.speaker in {values[1] for values in nano.SPHINX.values()} | {f"uqm-{n}" for n in human.UQM_TEST}
        assert soundfile.info(item.clean).duration == pytest.approx(item.extra["duration"], abs=0.002)


def test_human_uses_all_its_files_and_stays_small() -> None:
    rows = read_jsonl(HUMAN / "manifest.jsonl")
    used = {r[k] for r in rows for k in testsets.PLACES if k in r}
    here = {p.relative_to(HUMAN).as_posix() for p in HUMAN.rglob("*") if p.suffix in (".flac", ".npz")}
    assert used == here and [r["task"] for r in rows[:36]] == ["codec"] * 12 + ["se"] * 12 + ["tts"] * 12
    assert sum((HUMAN / name).stat().st_size for name in here if "/" in name) < 3_000_000


def test_human_conversion_is_to_another_speaker() -> None:
    for item in load_items("human", "vc"):
        assert item.prompt is not None and speaker_of(item.prompt) == item.extra["target_speaker"] != item.speaker


def test_human_mixtures_are_the_sum_of_two_recordings() -> None:
    scaled = 0
    for item in load_items("human", "tse"):
        assert item.noisy and item.interferer and item.prompt
        assert speaker_of(item.prompt) == item.speaker and item.prompt.stem not in item.clean.stem
        assert speaker_of(item.interferer) == item.extra["interferer_speaker"] != item.speaker
        clean, noisy, other = read(item.clean), read(item.noisy), read(item.interferer)
        gain = item.extra["gain"]
        both = clean.copy()
        both[: len(other)] += gain * other[: len(both)]
        assert len(clean) == len(noisy) and np.abs(noisy).max() <= 0.991
        assert np.abs(noisy - both).max() < 2 / 32768, item.id
        assert 10 * np.log10(np.mean(clean**2) / np.mean((gain * other) ** 2)) == pytest.approx(0, abs=4)
        if gain < 1:
            scaled += 1
            assert np.abs(clean - gain * read(HUMAN / f"{item.id}.flac")).max() < 2 / 32768
    assert scaled >= 1


def test_human_lips_are_as_long_as_the_recording() -> None:
    for item in load_items("human", "l2s"):
        assert item.video is not None and item.prompt is not None and speaker_of(item.prompt) == item.speaker
        crops = read_crops(item.video)
        assert crops.dtype == np.uint8 and crops.shape[1:] == (96, 96)
        assert abs(len(crops) - 25 * len(read(item.clean)) / AUDIO_RATE) <= 1
        assert np.abs(np.diff(crops.astype(int), axis=0)).mean() > 0.05, "they move"


def test_human_tasks_are_made_again(tmp_path: Path) -> None:
    """The same recordings give the same rows and samples, one time as the other the same bytes."""
    ours, again = tmp_path / "ours", tmp_path / "again"
    for folder in (ours, again):
        folder.mkdir()
        for path in HUMAN.glob("*.flac"):
            shutil.copy(path, folder)
        rows = read_jsonl(HUMAN / "manifest.jsonl")
        write_jsonl(folder / "manifest.jsonl", [r for r in rows if r["task"] not in ADDED])
        nano.add_tasks(folder)
    assert (ours / "manifest.jsonl").read_bytes() == (HUMAN / "manifest.jsonl").read_bytes()
    made = sorted(p.relative_to(ours) for kind in ("tse", "lips") for p in (ours / kind).iterdir())
    for name in made:
        assert (ours / name).read_bytes() == (again / name).read_bytes()
        if name.suffix == ".flac":
            assert np.array_equal(read(ours / name), read(HUMAN / name))
        else:
            fresh, kept = (read_crops(folder / name).astype(int) for folder in (ours, HUMAN))
            assert fresh.shape == kept.shape and np.abs(fresh - kept).mean() < 1


# ---------------------------------------------------------------- public sets in miniature


def save(path: Path, seconds: float = 1.0, seed: int = 0, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = 0.3 * np.random.default_rng(seed).uniform(-1, 1, int(seconds * rate))
    soundfile.write(path, wav, rate)
    return path


def seedtts(root: Path) -> Path:
    for language, utts in (("en", ("common_voice_en_1-common_voice_en_2", "common_voice_en_3-common_voice_en_4")),
                           ("zh", ("10002287-00000094", "10002290-00000001"))):  # fmt: skip
        lines, converted = [], []
        for i, utt in enumerate(utts):
            prompt = utt.split("-")[0] if language == "en" else f"{utt.split('-')[0]}-99"
            save(root / language / f"prompt-wavs/{prompt}.wav", seed=i)
            save(root / language / f"wavs/{utt}.wav", seed=9 + i)
            lines.append(f"{utt}|The prompt, it said.|prompt-wavs/{prompt}.wav|Text number {i}.")
            converted.append(f"{lines[-1]}|wavs/{utt}.wav")
        (root / language / "meta.lst").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (root / language / "non_para_reconstruct_meta.lst").write_text("\n".join(converted), encoding="utf-8")
    return root


def librispeech(root: Path) -> Path:
    for speaker in ("4077", "5142", "61"):
        folder, lines = root / "LibriSpeech" / "test-clean" / speaker / "100", []
        for i, seconds in enumerate((5.0, 2.0, 4.5, 11.0)):
            save(folder / f"{speaker}-100-{i:04d}.flac", seconds, i)
            lines.append(f"{speaker}-100-{i:04d} READER {speaker} SAYS NUMBER {i}")
        (folder / f"{speaker}-100.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def vctk(root: Path) -> Path:
    for speaker in ("p225", "p226", "p227"):
        for i in range(1, 5):
            save(root / f"wav48_silence_trimmed/{speaker}/{speaker}_{i:03d}_mic1.flac", seed=i)
            save(root / f"wav48_silence_trimmed/{speaker}/{speaker}_{i:03d}_mic2.flac", seed=i)
            text = root / f"txt/{speaker}/{speaker}_{i:03d}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("Please call Stella.\n" if i == 1 else f"{speaker} says number {i}.\n")
    save(root / "wav48_silence_trimmed/p315/p315_001_mic1.flac")  # without a text, as in the corpus
    return root


MIXTURES = ("4077-100-0000_5142-100-0002", "5142-100-0002_61-100-0000")


def libri2mix(root: Path) -> Path:
    librispeech(root.parent / "second")
    for mixture in MIXTURES:
        for part in ("mix_clean", "s1", "s2"):
            save(root / f"Libri2Mix/wav16k/max/test/{part}/{mixture}.wav")
    return root


def emilia(root: Path, loud: float = 1.0) -> Path:
    lines = []
    for speaker in range(3):
        for i in range(3):
            id = f"EN_B00000_S{speaker:05d}_W{i:06d}"
            path = save(root / f"EN/EN_B00000/{id}.wav", 3.0 + i, 3 * speaker + i, 24_000)
            soundfile.write(path, loud * soundfile.read(path)[0], 24_000)
            lines.append({"id": id, "wav": f"EN_B00000/{id}.wav", "text": f" Words {i}.", "duration": 3.0 + i,
                          "speaker": f"S{speaker}", "language": "en"})  # fmt: skip
    write_jsonl(root / "EN" / "EN_B00000.jsonl", lines)
    return root


def dns(root: Path) -> Path:
    tests = root / "datasets" / "test_set"
    for subset in ("no_reverb", "with_reverb"):
        for number in (3, 17):
            save(tests / f"synthetic/{subset}/noisy/clnsp1_train_1_snr5_tl-21_fileid_{number}.wav", seed=number)
            save(tests / f"synthetic/{subset}/clean/clean_fileid_{number}.wav", seed=number + 1)
    save(tests / "real_recordings/audioset_realrec_car_x.wav")
    return root


def lrs2(root: Path) -> Path:
    seedtts(root.parent / "second")
    for i in range(2):
        film = root / f"main/55354150000{i}/00001.mp4"
        save(film.with_suffix(".wav"), seed=i)
        film.write_bytes(b"film")
        film.with_suffix(".txt").write_text(f"Text:  WHEN YOU'RE COOKING {{LG}} {i}\nConf:  4\n")
    for split, line in (("train", ""), ("val", ""), ("test", "553541500000/00001 NF\n553541500001/00001 MV\n")):
        (root / f"{split}.txt").write_text(line)
    return root


def lrs3(root: Path) -> Path:
    lrs2(root)
    (root / "main").rename(root / "test")
    save(root / "trainval/abc/50001.wav")
    (root / "trainval/abc/50001.mp4").write_bytes(b"film")
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "seedtts-en": (seedtts, 2), "seedtts-zh": (seedtts, 2),
    "seedtts-vc-en": (seedtts, 2), "seedtts-vc-zh": (seedtts, 2),
    "librispeech": (librispeech, 6), "vctk": (vctk, 12), "vctk-same": (vctk, 12), "libri2mix": (libri2mix, 2),
    "emiliamix": (emilia, 9), "dns2020-no-reverb": (dns, 2), "dns2020-with-reverb": (dns, 2), "dns2020-real": (dns, 1),
    "lrs2": (lrs2, 2), "lrs3": (lrs3, 2),
}  # fmt: skip
"""How a miniature of each is made, and how many items come of it."""


def make(name: str, folder: Path, **options) -> dict:
    """Prepare ``name`` out of its miniature in ``folder/copy``."""
    if not (folder / "copy").is_dir():
        LAYOUTS[name][0](folder / "copy")
    second = folder / "second"
    options = {"prompts": second if second.is_dir() else None, "allow_count": True} | options
    return prepare(name, folder / "copy", folder / "out", **options)


def prepared(name: str, folder: Path, **options) -> list[Item]:
    return load_items(make(name, folder, **options)["testset"], SETS[name].task)


def test_every_protocol_is_told_in_full() -> None:
    assert set(LAYOUTS) == set(SETS)
    for name, protocol in SETS.items():
        assert protocol.task in TASKS and protocol.reads in testsets.READERS and protocol.official > 0, name
        assert all((protocol.layout, protocol.licence, protocol.get, protocol.ours, protocol.paper))
    page = (HUMAN.parents[2] / "docs" / "testsets.md").read_text()
    for name, protocol in SETS.items():
        assert f"`{name}`" in page and f"{protocol.official:,}" in page


@pytest.mark.parametrize("name", [name for name in SETS if SETS[name].task != "se"])
def test_a_copy_becomes_items(name: str, tmp_path: Path) -> None:
    items = prepared(name, tmp_path)
    assert len(items) == LAYOUTS[name][1]
    for item in items:
        assert item.text == item.text.strip() and item.language == SETS[name].language and item.prompt_text
        assert item.extra["testset"] == name and item.extra["seed"] == 2025 and item.prompt != item.clean
    row = read_jsonl(tmp_path / "out" / "manifest.jsonl")[0]
    assert not Path(row["prompt"]).is_absolute()
    assert SETS[name].ours in (tmp_path / "out" / "card.md").read_text()


@pytest.mark.parametrize(("name", "sound"), [(n, n != "dns2020-real") for n in SETS if SETS[n].task == "se"])
def test_dns_challenge_is_three_sets(name: str, sound: bool, tmp_path: Path) -> None:
    found = make(name, tmp_path)
    rows = read_jsonl(tmp_path / "out" / "manifest.jsonl")
    assert found["items"] == len(rows) == LAYOUTS[name][1]
    assert {r["subset"] for r in rows} == {SETS[name].options["subset"]} and not any(r["text"] for r in rows)
    assert all((tmp_path / "out" / r[k]).is_file() for r in rows for k in ("noisy", *(["clean"] if sound else [])))
    assert len(load_items(tmp_path / "out", "se")) == len(rows)


def test_seed_tts_lists(tmp_path: Path) -> None:
    item = prepared("seedtts-zh", tmp_path)[0]
    assert item.clean.name == "10002287-00000094.wav" and item.prompt and item.prompt.name == "10002287-99.wav"
    assert (item.id, item.speaker, item.text) == ("10002287-00000094", "10002287", "Text number 0.")
    item = prepared("seedtts-vc-en", tmp_path)[1]
    assert item.clean.name == "common_voice_en_3-common_voice_en_4.wav"
    assert item.extra["target_speaker"] == "common_voice_en_3" != item.speaker


def test_librispeech_prompts_are_short_utterances_of_the_reader(tmp_path: Path) -> None:
    for item in prepared("librispeech", tmp_path):
        assert item.prompt and item.prompt.stem.split("-")[0] == item.speaker
        assert 4 <= soundfile.info(item.clean).duration <= 10 and soundfile.info(item.prompt).duration <= 6
        assert item.text == f"reader {item.speaker} says number {int(item.id[-4:])}"


def test_vctk_pairs(tmp_path: Path) -> None:
    other, same = (prepared(name, tmp_path) for name in ("vctk", "vctk-same"))
    assert [item.id for item in other] == [item.id for item in same]
    for a, b in zip(other, same, strict=True):
        assert a.prompt and b.prompt and "_mic1" in a.clean.name and a.prompt_text != a.text
        assert a.prompt.stem[:4] == a.extra["target_speaker"] != a.speaker
        assert b.prompt.stem[:4] == b.extra["target_speaker"] == b.speaker and b.prompt != b.clean


def test_libri2mix_takes_a_list_of_prompts_where_there_is_one(tmp_path: Path) -> None:
    items = prepared("libri2mix", tmp_path)
    assert [item.id for item in items] == list(MIXTURES)
    for item in items:
        assert item.noisy and item.interferer and item.prompt and item.extra["subset"] == "wav16k/max"
        assert [p.parent.name for p in (item.noisy, item.clean, item.interferer)] == ["mix_clean", "s1", "s2"]
        assert item.prompt.stem.split("-")[0] == item.speaker and item.prompt.stem not in item.id
    lines = f"{MIXTURES[0]} 4077-100-0000 s1/{MIXTURES[0]}\n{MIXTURES[1]} 5142-100-0002 s2/{MIXTURES[0]}\n"
    (tmp_path / "copy/Libri2Mix/wav16k/max/test/map_mixture2enrollment").write_text(lines)
    prompt = prepared("libri2mix", tmp_path)[1]
    assert prompt.prompt and prompt.prompt_text == "reader 5142 says number 2"
    assert prompt.prompt.name == "5142-100-0002.flac", "as it was read: the mixture's copy is padded"


def test_prompts_of_libri2mix_are_short_enough_to_be_used(tmp_path: Path) -> None:
    def lengthen(second: Path) -> None:
        for speaker in ("4077", "5142"):
            for i in range(3):
                save(second / f"LibriSpeech/test-clean/{speaker}/100/{speaker}-100-{i:04d}.flac", 25.0, i)

    libri2mix(tmp_path / "copy")
    lengthen(tmp_path / "second")
    listed = f"{MIXTURES[1]} 5142-100-0002 s2/{MIXTURES[0]}\n"  # SpeakerBeam's list asks for one that is too long
    (tmp_path / "copy/Libri2Mix/wav16k/max/test/map_mixture2enrollment").write_text(listed)
    copy = testsets.Copy(SETS["libri2mix"], tmp_path / "copy", tmp_path / "second", tmp_path / "out",
                         np.random.default_rng(0))  # fmt: skip
    rows, _ = testsets._libri2mix(copy)
    prompts = [soundfile.info(row["prompt"]).duration for row in rows]
    assert len(prompts) == 2 and max(prompts) <= testsets.LONGEST_PROMPT


@pytest.mark.parametrize("loud", [1.0, 3.0])
def test_emilia_is_mixed_as_it_is(loud: float, tmp_path: Path) -> None:
    emilia(tmp_path / "copy", loud)
    for item in prepared("emiliamix", tmp_path):
        assert item.noisy and item.interferer and item.prompt and item.extra["reference"] == "asr"
        clean, noisy, other = read(item.clean), read(item.noisy), read(item.interferer)
        gain = item.extra["gain"]
        assert (gain < 1) == (loud > 1) == (item.clean.name == f"{item.id}-aligned.flac")
        both = clean.copy()
        both[: len(other)] += gain * other[: len(both)]
        assert np.abs(noisy - both).max() < 3 / 32768
        assert item.extra["interferer_speaker"] != item.speaker and item.prompt.stem[:16] == item.id[:16]


def test_emilia_with_a_file_beside_each_recording(tmp_path: Path) -> None:
    emilia(tmp_path / "copy")
    listed = tmp_path / "copy" / "EN" / "EN_B00000.jsonl"
    for about in read_jsonl(listed):
        path = listed.parent / about["wav"]
        path.with_suffix(".json").write_text(json.dumps(about))
        path.rename(path.with_suffix(".mp3"))
    listed.unlink()
    assert len(list(testsets.emilia(tmp_path / "copy"))) == 9
    assert all(about["path"].is_file() for about in testsets.emilia(tmp_path / "copy"))


def test_lips_are_prompted_by_seed_tts(tmp_path: Path) -> None:
    item = prepared("lrs2", tmp_path)[0]
    assert item.video and item.video.suffix == ".mp4" and item.clean.name == "00001.wav"
    assert item.text == "when you're cooking 0" and item.speaker == "lrs2-553541500000"
    assert item.prompt and item.prompt.parent.name == "prompt-wavs"


def test_choices_are_the_seeds(tmp_path: Path) -> None:
    manifest, seen = tmp_path / "out" / "manifest.jsonl", []
    for seed in (1, 1, 2):
        make("vctk", tmp_path, seed=seed)
        seen.append(manifest.read_bytes())
    assert seen[0] == seen[1] != seen[2].replace(b'"seed": 2', b'"seed": 1')


# ---------------------------------------------------------------- what goes wrong


Spoil = Callable[[Path], object]


def lost(place: str) -> Spoil:
    """Takes away a file or a folder."""
    return lambda folder: shutil.rmtree(p) if (p := folder / place).is_dir() else p.unlink()


def changed(place: str, old: str, new: str) -> Spoil:
    def spoil(folder: Path) -> None:
        text = (folder / place).read_text()
        assert old in text
        (folder / place).write_text(text.replace(old, new))

    return spoil


def nothing(folder: Path) -> None:
    pass


META, EMILIA, MIX = "copy/en/meta.lst", "copy/EN/EN_B00000.jsonl", "copy/Libri2Mix/wav16k/max/test"
TWO = ("common_voice_en_3-common_voice_en_4|", "common_voice_en_1-common_voice_en_2|")
BROKEN: dict[str, tuple[str, Spoil, dict, str]] = {
    "count": ("seedtts-en", nothing, {"allow_count": False}, "2 items here, 1088 in the official list"),
    "utterances": ("librispeech", nothing, {"allow_count": False}, "12 utterances of test-clean here, 2620"),
    "broken line": ("seedtts-en", changed(META, "|Text number 1.", ""), {}, "meta.lst:2: not utt"),
    "empty field": ("seedtts-en", changed(META, "Text number 1.", " "), {}, "meta.lst:2: not utt"),
    "no prompt": ("seedtts-en", lost("copy/en/prompt-wavs/common_voice_en_3.wav"), {}, "no recording at"),
    "no truth": ("seedtts-zh", lost("copy/zh/wavs"), {}, r"\(2 are missing\)"),
    "same id": ("seedtts-en", changed(META, *TWO), {}, "1 ids come twice"),
    "no list": ("seedtts-en", lost(META), {}, "no en/meta.lst in it; the set has"),
    "no texts": ("vctk", lost("copy/txt"), {}, "no txt in it"),
    "few voices": ("vctk", lambda p: [lost(f"copy/txt/{s}")(p) for s in ("p226", "p227")], {}, "fewer than two"),
    "lost recording": ("librispeech", lambda p: next(p.rglob("*.flac")).unlink(), {}, "missing or damaged"),
    "another corpus": ("librispeech", lost("copy/LibriSpeech"), {}, "no LibriSpeech test-clean"),
    "no second": ("lrs2", nothing, {"prompts": None}, "needs the Seed-TTS test set .* by --prompts"),
    "second is nowhere": ("lrs2", nothing, {"prompts": "nowhere"}, "no such folder"),
    "no film list": ("lrs2", lost("copy/test.txt"), {}, "not LRS2"),
    "few texts": ("libri2mix", lost("second/LibriSpeech/test-clean/61"), {}, "no text of"),
    "no sources": ("libri2mix", lost(f"{MIX}/s2"), {}, "no recording at"),
    "bad Emilia line": ("emiliamix", changed(EMILIA, '"wav"', '"wave"'), {}, "jsonl:1: not a line"),
    "poor Emilia line": ("emiliamix", changed(EMILIA, '"speaker"', '"who"'), {}, "lacks 'speaker'"),
    "no pairs": ("dns2020-real", lost("copy/datasets/test_set/synthetic"), {}, "no datasets/test_set"),
    "empty list": ("seedtts-en", lambda p: (p / META).write_text("\n"), {}, "nothing of seedtts-en"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_in_one_line(case: str, tmp_path: Path) -> None:
    name, spoil, options, says = BROKEN[case]
    LAYOUTS[name][0](tmp_path / "copy")
    spoil(tmp_path)
    with pytest.raises(MetisError, match=says) as error:
        make(name, tmp_path, **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out" / "manifest.jsonl").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    vctk(tmp_path / "copy")
    command = ["prepare", "testset", "vctk", f"--root={tmp_path / 'copy'}"]
    assert cli.main(command) != 0
    assert "12 items here, 200 in the official list; a part of it is taken with --allow" in capsys.readouterr().err
    assert cli.main([*command, "--allow-count", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["items"], found["official"]) == (12, 200)
    assert len(load_items("vctk", "vc")) == 12, "found by its name"
    for wrong in (["vctk"], ["seen", "--root=x"], ["wsj", "--root=x"]):
        assert cli.main(["prepare", "testset", *wrong]) != 0
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


# ---------------------------------------------------------------- of held-out recordings


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """A manifest: two voices of two sentences, one of one, one without a name, one without a text, a training row."""
    wavs = [p for p in sorted(HUMAN.glob("*.flac")) if "-noisy" not in p.name and soundfile.info(p).duration > 2]
    about = ["a 1", "a 2", "b 3", "b 4", "c 5", "unknown 6", "unknown 7", "a ", "d 8"]
    rows = []
    for k, (speaker, text) in enumerate(line.split(" ") for line in about):
        rows.append({
            "id": f"{speaker}/{k}", "path": str(wavs[k]), "text": text and f"Sentence {text}.", "language": "de",
            "speaker": speaker, "duration": soundfile.info(wavs[k]).duration, "split": "train" if speaker == "d" else
            "test", "source": "mine", "licence": "mine", "human": True,
        })  # fmt: skip
    rows[2] |= {"start": 0.5, "end": 2.0, "duration": 1.5}
    rows[4] |= {"video": "c.mp4"}
    rows[3] |= {"video": "b.mp4"}
    for name in ("b", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"film")
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    return tmp_path / "manifest.jsonl"


def test_held_out_recordings_serve_every_task_that_they_can_try(held_out: Path) -> None:
    made = testsets.of_recordings(held_out)
    folder = held_out.parent / "testset"
    rows = read_jsonl(folder / "manifest.jsonl")
    ids = {task: {r["id"] for r in rows if r["task"] == task} for task in made["items"]}
    named = {"a-0", "a-1", "b-2", "b-3", "c-4"}
    assert made["recordings"] == 8 and {task: len(some) for task, some in ids.items()} == made["items"]
    assert ids["se"] == named | {"a-7", "unknown-5", "unknown-6"}  # no text is needed
    assert ids["codec"] == named | {"unknown-5", "unknown-6"} and ids["vc"] == named
    assert ids["tse"] == named - {"c-4"}  # it needs another utterance of the voice
    assert ids["tts"] == {"a-0", "a-1", "b-2", "b-3"} and ids["l2s"] == {"b-3"}  # the prompt is one with a text
    assert [r["speaker"] for r in rows if r["task"] == "se"][:4] == ["a", "b", "c", "unknown"]  # a part has all voices
    for task in ids:
        for item in load_items(folder, task):
            assert item.language == "de"
            voice = item.prompt.stem.split("-")[0] if item.prompt else None
            assert voice is None or (voice != item.speaker if task == "vc" else voice == item.speaker)
            assert item.speaker != "unknown" or not item.prompt
    spans = {r["id"]: len(read(folder / r["clean"])) for r in rows if r["task"] == "codec"}
    assert spans["b-2"] == round(1.5 * AUDIO_RATE)  # the span alone
    for row in (r for r in rows if r["task"] == "tse"):
        both, target = read(folder / row["noisy"]), read(folder / row["clean"])
        assert len(both) == len(target) and np.abs(both - target).max() > 0.01
    for row in (r for r in rows if r["task"] == "se"):
        noise = read(folder / row["noisy"]) - read(folder / row["clean"])
        assert row["done"]["noise"] and np.abs(noise).max() > 1e-3


def test_a_test_set_says_why_it_has_no_rows_of_a_task(held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert testsets.of_recordings(held_out)["lacks"] == []
    rows = read_jsonl(held_out)

    def told(**changes: str) -> tuple[dict[str, int], str]:
        write_jsonl(held_out, [row | changes for row in rows])
        made = testsets.of_recordings(held_out)
        return made["items"], "; ".join(made["lacks"])

    items, why = told(speaker="unknown")
    assert set(items) == {"codec", "se"} and "prepare manifest --speaker" in why and "tts, vc, tse" in why
    items, why = told(speaker="me")
    assert (
        set(items) == {"codec", "se", "tts", "l2s"}
        and "no rows of vc, which needs two" in why
        and "no rows of tse" in why
    )
    items, why = told(text="")
    assert set(items) == {"se"} and "no recording has a text" in why
    write_jsonl(held_out, [row | {"speaker": f"voice {k}"} for k, row in enumerate(rows)])
    made = testsets.of_recordings(held_out)
    assert "vc" in made["items"] and [why.split(",")[0] for why in made["lacks"]] == [
        "no rows of tts",
        "no rows of tse",
    ]
    write_jsonl(held_out, [row | {"speaker": "unknown"} for row in rows])
    assert cli.main(["prepare", "testset", str(held_out)]) == 0
    printed = capsys.readouterr()
    assert "no speaker is known" in printed.err and "of se" in printed.out


def test_held_out_recordings_are_drawn_by_a_seed(held_out: Path, tmp_path: Path) -> None:
    sets = {}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        testsets.of_recordings(held_out, tmp_path / name, each=1, seed=seed)
        rows = read_jsonl(tmp_path / name / "manifest.jsonl")
        sets[name] = rows, [(tmp_path / name / r["noisy"]).read_bytes() for r in rows if "noisy" in r]
    assert sets["one"] == sets["two"] and sets["one"][1] != sets["three"][1]
    assert sum(r["task"] == "se" for r in sets["one"][0]) == 4  # one a voice


def test_held_out_noise_is_used_where_there_is_some(held_out: Path) -> None:
    soundfile.write(held_out.parent / "hum.flac", np.sin(np.arange(AUDIO_RATE) / 9) * 0.3, AUDIO_RATE)
    for split, used in (("train", False), ("test", True)):
        write_jsonl(held_out.parent / "noise.jsonl", [{"id": "hum", "path": "hum.flac", "split": split}])
        testsets.of_recordings(held_out)
        rows = read_jsonl(held_out.parent / "testset" / "manifest.jsonl")
        assert any("hum" in str(r["done"]) for r in rows if r["task"] == "se") == used


def test_no_recording_is_lost_and_no_file_stands_for_two(held_out: Path, tmp_path: Path) -> None:
    wavs = [tmp_path / f"{n}.flac" for n in range(3)]
    for n, wav in enumerate(wavs):
        soundfile.write(wav, np.random.default_rng(n).standard_normal(2 * AUDIO_RATE) * 0.1, AUDIO_RATE)
    given = json.loads(held_out.read_text().splitlines()[0]) | {"duration": 2.0}
    ids = [str(wavs[0].with_suffix("")), "x", "noisy/x", "../1", "x" * 300, "a\0b", "a b", "a-b"]
    rows = [given | {"id": id, "path": str(wavs[n % 3])} for n, id in enumerate(ids)]
    write_jsonl(tmp_path / "manifest.jsonl", rows)
    before = [wav.read_bytes() for wav in wavs]
    made = testsets.of_recordings(tmp_path / "manifest.jsonl", each=9)
    assert [wav.read_bytes() for wav in wavs] == before and made["items"]["se"] == 8
    rows = [r for r in read_jsonl(tmp_path / "testset" / "manifest.jsonl") if r["task"] == "se"]
    assert len({r["id"] for r in rows}) == len({r["clean"] for r in rows}) == len({r["noisy"] for r in rows}) == 8
    for name in (tmp_path, tmp_path / "0.flac"):
        with pytest.raises(MetisError, match="something else than a test set"):
            testsets.of_recordings(tmp_path / "manifest.jsonl", name)


def test_an_older_testset_stays_where_a_new_one_fails(held_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testsets.of_recordings(held_out)
    folder = held_out.parent / "testset"
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with monkeypatch.context() as patched, pytest.raises(MetisError, match="broken"):
        degrade, done = testsets.degrade, []

        def break_later(*args, **more):
            done.append(1)
            if len(done) == 4:
                raise MetisError("broken")
            return degrade(*args, **more)

        patched.setattr(testsets, "degrade", break_later)
        testsets.of_recordings(held_out, seed=7)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert not list(held_out.parent.glob(".*part"))
    assert testsets.of_recordings(held_out, each=1)["recordings"] == 4
    assert len(list(folder.rglob("*.flac"))) < len(before) - 1  # nothing of the old one is left


def test_prompts_are_not_longer_than_what_is_heard(held_out: Path) -> None:
    rows = read_jsonl(held_out)
    long = np.random.default_rng(0).standard_normal(24 * AUDIO_RATE) * 0.1
    soundfile.write(held_out.parent / "long.flac", long, AUDIO_RATE)
    rows[1] |= {"path": "long.flac", "duration": 24.0}  # of the voice a
    soundfile.write(held_out.parent / "longer.flac", np.tile(long, 2), AUDIO_RATE)
    rows[4] |= {"path": "longer.flac", "duration": 48.0}
    write_jsonl(held_out, rows)
    made = testsets.of_recordings(held_out)
    found = read_jsonl(held_out.parent / "testset" / "manifest.jsonl")
    assert made["left_out"] == 1 and made["items"]["tts"] == 3 and "a-1" in {r["id"] for r in found}
    prompts = {r["prompt"] for r in found if "prompt" in r}
    assert prompts and not any("a-1" in name for name in prompts)


@pytest.mark.parametrize("broken", ["no split", "missing", "no json", "stereo", "rooms"])
def test_broken_noise_and_rooms_are_named(held_out: Path, broken: str) -> None:
    folder = held_out.parent
    soundfile.write(folder / "hum.flac", np.zeros((AUDIO_RATE, 2)) + 0.1, AUDIO_RATE)
    row = {"id": "hum", "path": "gone.flac" if broken == "missing" else "hum.flac", "split": "test"}
    write_jsonl(folder / "noise.jsonl", [row])
    if broken == "no json":
        (folder / "noise.jsonl").write_text('{"id": "hum"\n')
    elif broken == "no split":
        write_jsonl(folder / "noise.jsonl", [{"id": "hum", "path": "hum.flac"}])
        assert testsets.of_recordings(held_out)["recordings"] == 8  # none is held out
        return
    elif broken == "rooms":
        (folder / "noise.jsonl").unlink()
        (folder / "rirs.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MetisError, match="rirs" if broken == "rooms" else "noise.jsonl|24 kHz"):
        testsets.of_recordings(held_out)


def test_a_testset_is_no_recordings_to_train_with(held_out: Path) -> None:
    from metis_lib.data.importers import folder_entries

    folder = held_out.parent / "recordings"
    (folder / "a").mkdir(parents=True)
    shutil.copy(next(HUMAN.glob("*.flac")), folder / "a" / "one.flac")
    testsets.of_recordings(held_out, folder / "testset")
    assert [Path(entry["path"]).name for entry in folder_entries(folder)] == ["one.flac"]
    assert len(list(folder_entries(folder / "testset"))) > 1  # where that is what is asked for


def test_own_testsets_by_the_command(held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(held_out)
    assert cli.main(["prepare", "testset", manifest, "--each", "2"]) == 0
    assert "of tse" in capsys.readouterr().out
    for extra, said in (
        (["--split", "validation"], "has 0 recordings of the split 'validation'"), (["--each", "0"], "at least one"),
        (["--root", "x"], "for public test sets"), (["--out", str(held_out.parent)], "another folder"),
        (["--seed", "-1"], "not negative"),
    ):  # fmt: skip
        assert cli.main(["prepare", "testset", manifest, *extra]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["prepare", "testset", "unseen", "--each", "2"]) == 2
    assert cli.main(["prepare", "testset", "gone.jsonl"]) == 2
    assert read_jsonl(held_out)[0]["split"] == "test"  # the manifest stays as it is
