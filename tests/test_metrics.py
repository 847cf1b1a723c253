"""Every metric against an independent implementation or a known value, and null with a reason where there is none."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from metis_lib import assets, audio
from metis_lib.errors import MetisError
from metis_lib.evaluation import judges, metrics, paper_judges, scoring, systems
from metis_lib.evaluation.metrics import PROTOCOLS, SPECS, TASKS, MetricFailure
from metis_lib.evaluation.systems import Clip, Item

pytestmark = pytest.mark.evaluation
HUMAN = Path(__file__).resolve().parents[1] / "eval" / "testsets" / "human"
NAMES = ("uqm-syreen-029-00", "uqm-utwig-044-04", "cmu-cards")


def wave(name: str) -> np.ndarray:
    """A human recording at 16 kHz."""
    return audio.read(HUMAN / f"{name}.flac", 16_000).numpy()


def same(value: Any) -> Any:
    """Equal to a reference implementation, but for rounding."""
    return pytest.approx(value, rel=1e-4, abs=1e-4)


# --- what metrics are ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", SPECS)
def test_every_metric_says_what_it_is(key: str) -> None:
    spec = SPECS[key]
    assert spec.key == key and spec.licence and spec.source and spec.unit and spec.label
    assert spec.better in ("↑", "↓", "")
    assert {spec.protocol, spec.paper or spec.protocol} <= set(PROTOCOLS)
    assert set(spec.needs) <= {"text", "clean", "prompt", "other", "interferer", "seconds_to_make", "measured"}
    assert metrics.METRICS[key] == metrics.protocol(key) == spec.protocol


@pytest.mark.parametrize("task", TASKS)
def test_tasks_name_known_metrics_and_words_come_first(task: str) -> None:
    named = TASKS[task]["metrics"] + TASKS[task]["measures"]
    assert named[0] == "wer" and len(set(named)) == len(named) and set(named) < set(SPECS)
    assert {metrics.protocol(key, judges, task) for key in named for judges in paper_judges.SETS} <= set(PROTOCOLS)


def test_the_papers_judges_have_protocols_of_their_own() -> None:
    assert metrics.protocol("wer_seedtts", "paper") == "wer/seedtts@1"
    assert metrics.protocol("sim_target", "paper", "tse") == "sim/wavlm-large-sv@1"
    assert metrics.protocol("sim_target", "paper", "se") == "sim/wavlm-base-plus-sv@1"
    assert metrics.protocol("stoi", "paper", "se") == metrics.METRICS["stoi"]
    with pytest.raises(MetisError, match="unknown judges 'best'; choose among offline, paper"):
        paper_judges.choose("best", "se", "auto")


# --- text ------------------------------------------------------------------------------------------------


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, before[j] + 1, before[j - 1] + (x != y)))
    return row[-1]


TEXTS = [item.text for item in systems.load_items(HUMAN, "codec")][:8]


@pytest.mark.parametrize("seed", range(8))
def test_errors_of_words_and_characters_equal_the_edit_distance(seed: int) -> None:
    rng, truth = np.random.default_rng(seed), metrics.normalise(TEXTS[seed % len(TEXTS)])
    words = [word for word in truth.split() if rng.random() > 0.2]
    heard = " ".join(word if rng.random() > 0.2 else f"{word[::-1]} oh" for word in words)
    found = metrics.word_errors(truth, heard)
    assert found.errors == distance(truth.split(), metrics.normalise(heard).split())
    assert found.errors == found.substitutions + found.deletions + found.insertions
    assert found.words == len(truth.split())
    assert found.words - found.deletions + found.insertions == len(metrics.normalise(heard).split())
    found = metrics.character_errors(truth, heard)
    assert found.errors == distance(*(list(metrics.normalise(text).replace(" ", "")) for text in (truth, heard)))


@pytest.mark.parametrize(
    ("reference", "heard", "language", "rate"),
    [
        ("It's fifty, sir!", "it's fifty sir", "en", 0.0),
        ("It's fifty, sir!", "its 50 sir", "en", 2 / 3),  # no numbers made equal, the apostrophe stays
        ("Wait — what “now”?", "wait what now", "en", 0.0),
        ("one-two", "onetwo", "en", 0.0),
        ("你好，世界。", "你好世戒", "zh", 0.25),
    ],
)
def test_texts_as_seed_tts_eval_compares_them(reference: str, heard: str, language: str, rate: float) -> None:
    assert metrics.word_errors_seedtts(reference, heard, language).rate == pytest.approx(rate)


def test_chinese_counts_characters_and_other_languages_keep_their_letters() -> None:
    assert metrics.word_errors("你好，世界", "你好时界", "zh").words == 4
    assert metrics.normalise("Déjà vu!", "fr") == "déjà vu"


@pytest.mark.parametrize("errors", scoring.TEXTS.values())
@pytest.mark.parametrize("reference", ["", " ... ", "?!"])
def test_a_reference_without_words_is_a_failure(errors: Any, reference: str) -> None:
    with pytest.raises(MetricFailure, match="no words"):
        errors(reference, "something")


# --- sample by sample ------------------------------------------------------------------------------------


def intelligibility(clean: np.ndarray, signal: np.ndarray, extended: bool) -> float:
    """STOI (Taal 2011) and ESTOI (Jensen 2016), written from the papers; ``[S]`` at 10 kHz."""
    window, starts = np.hanning(258)[1:-1], range(0, len(clean) - 256 + 1, 128)
    frames = [np.array([x[s : s + 256] * window for s in starts[:-1]]) for x in (clean, signal)]
    level = 20 * np.log10(np.linalg.norm(frames[0], axis=1) + 1e-16)
    loud = level > level.max() - 40
    joined = []
    for part in frames:
        whole = np.zeros(128 * (loud.sum() - 1) + 256)
        for place, frame in enumerate(part[loud]):
            whole[128 * place : 128 * place + 256] += frame
        joined.append(whole)
    hertz, bands = np.fft.rfftfreq(512, 1e-4), []
    edges = 150 * 2.0 ** ((2 * np.arange(16) - 1) / 6)
    places = [int(np.argmin(np.abs(hertz - edge))) for edge in edges]
    for whole in joined:
        spectrum = np.array([np.fft.rfft(whole[s : s + 256] * window, 512) for s in range(0, len(whole) - 256, 128)])
        power = np.abs(spectrum) ** 2
        bands.append(np.sqrt([power[:, a:b].sum(axis=1) for a, b in zip(places, places[1:], strict=False)]))
    values = []
    for end in range(30, bands[0].shape[1] + 1):
        x, y = (band[:, end - 30 : end] for band in bands)
        if extended:
            for axis in (1, 0):
                x, y = (v - v.mean(axis=axis, keepdims=True) for v in (x, y))
                x, y = (v / np.linalg.norm(v, axis=axis, keepdims=True) for v in (x, y))
            values.append(float((x * y).sum() / 30))
        else:
            y = np.minimum(
                y * (np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))[:, None], x * (1 + 10 ** (15 / 20))
            )
            x, y = (v - v.mean(axis=1, keepdims=True) for v in (x, y))
            values.append(float(np.mean((x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1))))
    return float(np.mean(values))


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_intelligibility_equals_the_papers_formulas(name: str, extended: bool) -> None:
    from pystoi.utils import resample_oct

    clean = wave(name)[:64_000]
    noisy = clean + 0.5 * clean.std() * np.random.default_rng(0).standard_normal(len(clean)).astype(np.float32)
    expected = intelligibility(resample_oct(clean, 10_000, 16_000), resample_oct(noisy, 10_000, 16_000), extended)
    assert metrics.stoi(clean, noisy, extended=extended) == pytest.approx(expected, abs=4e-3)


def test_against_torchmetrics_on_a_real_mixture() -> None:
    """Expected: torchmetrics 1.9.0 on what ``align`` gives (SI-SDR with its ``zero_mean``)."""
    clean, noisy = wave(NAMES[0]), wave(f"{NAMES[0]}-noisy")
    assert metrics.si_sdr(clean, noisy) == same(-7.161779)
    assert metrics.stoi(clean, noisy) == same(0.593276)
    assert metrics.stoi(clean, noisy, extended=True) == same(0.401316)
    assert metrics.pesq_wb(clean, noisy) == same(1.117810)
    assert metrics.pesq_wb(clean, noisy, "nb") == same(1.400835)


@pytest.mark.parametrize("name", NAMES)
def test_si_sdr_is_that_of_the_noise_that_was_added(name: str) -> None:
    clean = wave(name).astype(np.float64)
    noise = np.random.default_rng(0).standard_normal(len(clean))
    clean, noise = clean - clean.mean(), noise - noise.mean()
    noise -= clean * (noise @ clean) / (clean @ clean)
    noise *= np.sqrt((clean @ clean) / (noise @ noise) / 10**1.3)
    assert metrics.si_sdr(clean, 0.4 * (clean + noise) + 0.05) == pytest.approx(13.0, abs=1e-6)
    assert metrics.si_sdr(clean, clean) == 100.0


@pytest.mark.parametrize("name", NAMES)
def test_perfect_copies_reach_the_published_ends_of_the_scales(name: str, monkeypatch: Any) -> None:
    """P.862.2 and P.862.1 map the raw 4.5 to 4.644 and 4.549."""
    clean = wave(name)
    assert metrics.pesq_wb(clean, clean) == pytest.approx(4.644, abs=1e-3)
    assert metrics.pesq_wb(clean, clean, "nb") == pytest.approx(4.549, abs=1e-3)
    assert (metrics.stoi(clean, clean), metrics.stoi(clean, clean, extended=True)) == same((1.0, 1.0))
    loud = int(np.abs(clean).argmax())
    word = clean[max(0, loud - 2800) : loud + 2800]  # 0.35 s: too short for STOI, and not for PESQ
    with pytest.raises(MetricFailure):
        metrics.stoi(word, word)
    assert metrics.pesq_wb(word, word) == pytest.approx(4.644, abs=0.01)
    monkeypatch.setattr("pesq.pesq", lambda *_: 4.4)  # as it says of what it finds no speech in
    assert metrics.pesq_wb(word, word) == 4.4
    with pytest.raises(MetricFailure, match="not alike"):  # where STOI cannot tell, a high score needs a likeness
        metrics.pesq_wb(word, np.roll(word, 2000)[::-1].copy())


# --- pitch and duration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cents", [50, 100])
@pytest.mark.parametrize("name", NAMES[:2])
def test_a_faster_copy_is_sharper_by_a_known_interval(name: str, cents: int) -> None:
    import soxr

    clean, factor = wave(name), 2 ** (cents / 1200)
    found = metrics.prosody(clean, soxr.resample(clean, 16_000 * factor, 16_000))
    assert found["f0_rmse"] == pytest.approx(cents, abs=25)
    assert found["f0_corr"] > 0.98 and found["vuv_f1"] > 0.95
    assert metrics.duration_ratio(clean, soxr.resample(clean, 16_000 * factor, 16_000)) == pytest.approx(
        1 / factor, abs=1e-3
    )


@pytest.mark.parametrize(("name", "hertz"), [("librivox-0870", 95.155), ("cmu-cards-noisy", 98.870)])
def test_pitch_agrees_with_another_extractor(name: str, hertz: float) -> None:
    """Expected: median of the voiced frames by pyworld 0.3.5 harvest, 40 to 800 Hz (which also voices weak frames)."""
    clean = wave(name)
    pitch = metrics._pitch(clean, len(clean) // 160, *metrics.PITCH_HZ)
    assert 1200 * abs(np.log2(np.nanmedian(pitch) / hertz)) < 120


def test_a_copy_has_the_pitch_of_the_original_and_noise_none() -> None:
    clean = wave(NAMES[0])
    found = metrics.prosody(clean, clean)
    assert found == {"f0_rmse": 0.0, "f0_corr": pytest.approx(1.0), "vuv_f1": 1.0}
    noise = 0.1 * np.random.default_rng(0).standard_normal(32_000).astype(np.float32)
    with pytest.raises(MetricFailure, match="voiced in both"):
        metrics.prosody(noise, noise)
    buzz = np.sign(np.sin(2 * np.pi * 125 * np.arange(16_000) / 16_000)).astype(np.float32)
    with pytest.raises(MetricFailure, match="never moves"):
        metrics.prosody(buzz, buzz)


# --- judges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("librivox-0870", (3.605455, 3.917131, 3.239825, 3.755379)),
        ("cmu-cards-noisy", (3.492254, 2.519445, 2.435507, 2.989943)),
    ],
)
def test_dnsmos_equals_speechmos_on_human_speech(name: str, expected: tuple[float, ...]) -> None:
    """Expected: ``speechmos.dnsmos.run`` of speechmos 0.0.1.1 with librosa 0.11: SIG, BAK, OVRL and P.808."""
    assert tuple(judges.DnsmosJudge()(wave(name)).values()) == same(expected)


@pytest.fixture(scope="module")
def voice() -> judges.SpeakerJudge:
    return judges.SpeakerJudge("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_equal_speechbrains_own_way(voice: judges.SpeakerJudge, name: str) -> None:
    import torch
    from scipy.spatial.distance import cosine

    mine = voice(wave(name))
    from speechbrain.inference.classifiers import EncoderClassifier

    features, normalise, network = voice.model
    modules = {"compute_features": features, "mean_var_norm": normalise, "embedding_model": network}
    theirs = EncoderClassifier(modules=modules | {"classifier": torch.nn.Identity()}, hparams={"label_encoder": None})
    expected = theirs.encode_batch(torch.from_numpy(wave(name))[None])[0, 0].detach().numpy()
    assert 1 - cosine(mine, expected) == pytest.approx(1.0, abs=1e-5)
    assert metrics.cosine(mine, voice(wave("librivox-0870"))) == same(1 - cosine(mine, voice(wave("librivox-0870"))))


def test_whisper_hears_the_same_alone_together_and_in_a_batch() -> None:
    judge, clips = judges.WhisperJudge("cpu"), [wave(name) for name in NAMES]
    heard = judge.many([*clips, np.zeros(16_000, np.float32)])
    assert heard[:3] == [judge(clip) for clip in clips] == judge.judge_batch(clips)
    assert isinstance(heard[3], MetricFailure) and "silent" in str(heard[3])
    text = next(item.text for item in systems.load_items(HUMAN, "codec") if item.id == NAMES[0])
    assert metrics.word_errors(text, heard[0]).rate < 0.4


class Strict(judges.Judge):
    """Fails the whole batch if one clip is loud."""

    protocol, model, batch = "test/strict@1", None, 4

    def judge_many(self, wavs_16k: Any) -> list[int]:
        if any(abs(wav).max() > 0.9 for wav in wavs_16k):
            raise RuntimeError("out of memory\nand more")
        return [len(wav) for wav in wavs_16k]


def test_one_failure_does_not_take_the_batch_down(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.wav" for index in range(6)]
    for index, path in enumerate(paths):
        tone = np.sin(0.5 * np.pi * np.arange(8_000 + index))  # a constant would be silence
        soundfile.write(path, (0.95 if index == 1 else 0.1) * tone, 16_000)
    paths[2].write_bytes(b"no audio")
    verdicts, judge = scoring.Verdicts(tmp_path / "cache"), Strict()
    found = verdicts.many(judge, [*paths, paths[0]])
    assert [v for v in found if isinstance(v, int)] == [8000, 8003, 8004, 8005, 8000]
    assert [str(v) for v in found if isinstance(v, MetricFailure)][0] == f"{judges.BROKE}: out of memory"
    assert "not audio" in str(found[2])
    assert (verdicts.computed, verdicts.reused) == (6, 0)
    again = scoring.Verdicts(tmp_path / "cache")
    again.many(judge, paths)
    assert (again.computed, again.reused) == (2, 4)  # only failures are tried again


def test_cuda_in_vain_is_said_and_the_cpu_does_it(capsys: Any) -> None:
    assert judges.choose_device("cuda", False, "a judge") == "cpu"
    assert "a judge: no CUDA here, so it runs on the CPU" in capsys.readouterr().err
    assert [judges.choose_device(asked, True, "") for asked in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert judges.choose_device("auto", False, "") == "cpu" and not capsys.readouterr().err


def test_judges_run_on_the_gpu_that_the_model_was_given() -> None:
    assert judges.choose_device("cuda:1", True, "") == "cuda:1" and judges.choose_device("cuda:1", False, "") == "cpu"
    assert [judges.gpu_index(device) for device in ("cuda:1", "cuda", "cpu")] == [1, 0, 0]


# --- bad audio through everything ------------------------------------------------------------------------

KEYS = [*TASKS["tse"]["metrics"]]
ALIGNED = ("pesq_wb", "pesq_nb", "stoi", "estoi", "si_sdr")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """Rows of one recording in many states, all scored in one go."""
    folder = tmp_path_factory.mktemp("states")
    item = next(i for i in systems.load_items(HUMAN, "se") if i.id.startswith(NAMES[1]))
    voices = {"prompt": item.other, "other": item.other, "interferer": item.other}
    item = Item("x", "tse", "s", item.text, item.clean, item.noisy, **voices)  # type: ignore[arg-type]
    speech = wave(NAMES[1])
    telephone = audio.resample(audio.read(HUMAN / f"{NAMES[1]}.flac", 16_000), 16_000, 8_000).numpy()
    kinds = {
        "good": (speech, 16_000),
        "silence": (np.zeros(32_000), 16_000),
        "short": (speech[16_000:16_800], 16_000),
        "nan": (np.where(np.arange(len(speech)) == 99, np.nan, speech), 16_000),
        "longer": (np.concatenate([speech, speech[:16_000]]), 16_000),
        "stereo": (np.stack([1.5 * speech, 0.5 * speech], axis=1), 16_000),
        "telephone": (telephone, 8_000),
    }
    for kind, (samples, rate) in kinds.items():
        soundfile.write(folder / f"{kind}.wav", samples, rate, subtype="FLOAT")
    again = audio.read(folder / "telephone.wav", 16_000).numpy()
    soundfile.write(folder / "resampled.wav", again, 16_000, subtype="FLOAT")
    clips = [Clip(item, kind, None, folder / f"{kind}.wav", 0.5) for kind in [*kinds, "resampled"]]
    clips.append(Clip(replace(item, text="..."), "wordless", None, folder / "good.wav"))
    clips.append(Clip(item, "nothing", None, None, error="it was refused"))
    found = scoring.score(clips, verdicts=scoring.Verdicts(folder / "cache"), device="cpu")
    return {row["system"]: row for row in found}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("silence", "silent"), ("short", "short|at least"), ("nan", "NaN"), ("nothing", "no audio: it was refused")],
)
def test_unusable_audio_is_null_with_a_reason(rows: dict[str, Any], kind: str, reason: str, key: str) -> None:
    import re

    if kind in ("silence", "short") and key in scoring.TEXTS:  # there was audio, and in it no word
        assert rows[kind][key] == 1.0 and f"{key}_error" not in rows[kind]
        assert rows[kind]["heard"] == "" and rows[kind]["deletions"] == rows[kind]["words"] > 0
        return
    assert rows[kind][key] is None
    assert re.search(reason, rows[kind][f"{key}_error"])


@pytest.mark.parametrize("key", KEYS)
def test_good_audio_has_a_number_and_no_reason(rows: dict[str, Any], key: str) -> None:
    assert np.isfinite(rows["good"][key]) and f"{key}_error" not in rows["good"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("kind", "other"), [("stereo", "good"), ("telephone", "resampled")])
def test_channels_are_averaged_and_rates_converted(rows: dict[str, Any], kind: str, other: str, key: str) -> None:
    assert rows[kind][key] == pytest.approx(rows[other][key], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("key", ALIGNED)
def test_other_lengths_cannot_be_compared_sample_by_sample(rows: dict[str, Any], key: str) -> None:
    assert SPECS[key].intrusive
    assert rows["longer"][key] is None and "lengths differ by 1.00 s" in rows["longer"][f"{key}_error"]
    assert rows["longer"]["duration_ratio"] > 1.1 and rows["longer"]["wer"] is not None


@pytest.mark.parametrize("key", ["wer", "cer", "wer_seedtts"])
def test_an_empty_transcript_is_null_with_a_reason(rows: dict[str, Any], key: str) -> None:
    row = rows["wordless"]
    assert row[key] is None and "no words" in row[f"{key}_error"]
    assert row["heard"] and row["words"] is None and row["dnsmos_p808"] is not None


def test_rows_count_kinds_of_errors_and_hold_what_was_measured(rows: dict[str, Any], tmp_path: Path) -> None:
    good = rows["good"]
    assert good["word_errors"] == good["substitutions"] + good["deletions"] + good["insertions"]
    assert good["wer"] == pytest.approx(good["word_errors"] / good["words"], abs=1e-6)
    assert good["rtf"] == pytest.approx(0.5 / good["seconds"], abs=1e-5)
    assert "rtf" not in rows["wordless"] and "token_accuracy" not in good and "nisqa" not in good
    json.dumps(list(rows.values()), allow_nan=False)


def test_metrics_without_a_reference_are_not_asked(tmp_path: Path) -> None:
    """A test set without clean recordings (real noise) has no intrusive scores; the others stay."""
    clip = Clip(Item("x", "se", "s"), "m", 0, HUMAN / f"{NAMES[2]}.flac", measured={"codes_used": 0.4, "odd": 1.0})
    (row,) = scoring.score([clip], verdicts=scoring.Verdicts(tmp_path), device="cpu")
    assert row["dnsmos_ovrl"] > 1 and row["codes_used"] == 0.4
    assert not {"wer", "pesq_wb", "sim_target", "f0_rmse", "token_accuracy", "odd"} & set(row)


# --- the paper's judges, on tiny random weights in the right layout --------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty METIS_HOME that knows the fetched assets, and no hub."""
    judges.DnsmosJudge().model  # noqa: B018  # fetched before the hub is out of reach
    (tmp_path / "assets").symlink_to(assets.metis_home() / "assets")
    monkeypatch.setenv("METIS_HOME", str(tmp_path))
    monkeypatch.setattr(assets, "reachable", lambda *_: False)
    return tmp_path


def clips_16k() -> list[np.ndarray]:
    return [wave(NAMES[0])[:16_000], wave(NAMES[1])[:24_000]]


def test_the_papers_set_says_in_one_line_what_is_missing(home: Path) -> None:
    item = next(i for i in systems.load_items(HUMAN, "se") if i.id.startswith(NAMES[1]))
    clips = [Clip(item, "m", 0, item.noisy)]
    (row,) = scoring.score(clips, verdicts=scoring.Verdicts(home / "cache"), judges="paper", device="cpu")
    wanted = {"wer": "put whisper-large-v3 into|put config.json into", "sim_target": "wavlm-base-plus-sv"}
    for key, reason in (wanted | {"cer": "whisper-large-v3", "nisqa": "not run here"}).items():
        assert row[key] is None and "\n" not in row[f"{key}_error"]
        assert "the judge is not available: not run here" in row[f"{key}_error"]
        assert any(part in row[f"{key}_error"] for part in reason.split("|"))
    assert row["dnsmos_p808"] is not None and row["stoi"] is not None


def test_whisper_base_is_asked_as_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beam 5, temperature 0, no timestamps, nothing of the text before: wer/whisper-base-int8-norm@1."""
    asked: list[dict[str, Any]] = []
    judge = judges.WhisperJudge()
    monkeypatch.setattr(
        type(judge), "model", SimpleNamespace(transcribe=lambda wav, **k: asked.append(k) or ([], None))
    )
    judge.judge(np.zeros(16_000, np.float32))
    wanted = {"language": "en", "beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False}
    assert wanted.items() <= asked[0].items() and asked[0]["without_timestamps"] is True


def test_whisper_by_transformers_in_a_batch(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from metis_lib.compat import prepare_torchaudio

    prepare_torchaudio()
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    torch.manual_seed(0)
    heads = {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("layers", 1))
    }
    config = WhisperConfig(
        vocab_size=51_865, num_mel_bins=80, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **heads
    )
    network = WhisperForConditionalGeneration(config)
    about = {"lang_to_id": {"<|en|>": 50259}, "task_to_id": {"transcribe": 50359}, "no_timestamps_token_id": 50363}
    vars(network.generation_config).update(about, is_multilingual=True, max_length=12, _from_model_config=False)
    folder = home / "judges" / "whisper-large-v3"
    network.save_pretrained(folder)
    tokenizer = WhisperTokenizer.from_pretrained(str(assets.fetch("whisper-base")))
    WhisperProcessor(WhisperFeatureExtractor(80), tokenizer).save_pretrained(folder)
    judge = paper_judges.WhisperLargeJudge("cpu")
    asked = []
    network = judge.model[1]
    monkeypatch.setattr(network, "generate", lambda *a, made=network.generate, **k: asked.append(k) or made(*a, **k))
    heard = judge.many([*clips_16k(), np.full(9, np.nan, np.float32)])
    assert asked[0] == {"language": "en", "task": "transcribe", "num_beams": 1, "do_sample": False}
    assert heard[:2] == [judge(clip) for clip in clips_16k()] and heard[0]
    assert isinstance(heard[2], MetricFailure)


def old_names(name: str) -> str:
    """WavLM's own name of a weight of transformers' WavLMModel, written down by hand."""
    if name.startswith("feature_extractor"):
        return name.replace(".conv.", ".0.").replace(".layer_norm.", ".2.1.")
    table = {
        "feature_projection.layer_norm": "layer_norm", "feature_projection.projection": "post_extract_proj",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0": "encoder.pos_conv.0.weight_g",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1": "encoder.pos_conv.0.weight_v",
        "encoder.pos_conv_embed.conv.bias": "encoder.pos_conv.0.bias", "masked_spec_embed": "mask_emb",
    }  # fmt: skip
    for new, old in table.items():
        if name.startswith(new):
            return name.replace(new, old)
    if ".layers." not in name:
        return name
    name = name.replace("attention.gru_rel_pos_linear", "self_attn.grep_linear")
    name = name.replace("attention.gru_rel_pos_const", "self_attn.grep_a")
    name = name.replace("attention.rel_attn_embed", "self_attn.relative_attention_bias")
    name = name.replace("feed_forward.intermediate_dense", "fc1").replace("feed_forward.output_dense", "fc2")
    for part in ("q", "k", "v", "out"):
        name = name.replace(f".attention.{part}_proj", f".self_attn.{part}_proj")
    layer, _, rest = name.rpartition(".layer_norm.")
    return f"{layer}.self_attn_layer_norm.{rest}" if layer and not layer.endswith("final") else name


def tiny_wavlm(**more: Any) -> Any:
    from metis_lib.compat import prepare_torchaudio

    prepare_torchaudio()
    from transformers import WavLMConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return WavLMConfig(
        conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, num_buckets=20, **sizes, **more
    )


def test_wavlm_with_ecapa_from_a_checkpoint_in_the_published_layout(home: Path) -> None:
    """The same trunk by other names gives the same hidden states; a missing or a strange weight is refused."""
    import torch

    torch.manual_seed(0)
    config = tiny_wavlm(feat_extract_norm="layer", do_stable_layer_norm=True, apply_spec_augment=False)
    from transformers import WavLMModel  # once torchaudio is out of its way

    trunk = WavLMModel(config).eval()
    network = paper_judges.WavlmEcapa(trunk, channels=32, wide=48, size=12).eval()
    torch.nn.init.normal_(network.feature_weight)
    state = {name: v for name, v in network.state_dict().items() if not name.startswith("trunk.")}
    state |= {f"feature_extract.model.{old_names(name)}": v for name, v in trunk.state_dict().items()}
    some = ("encoder.layers.0.self_attn.grep_a", "feature_extractor.conv_layers.0.2.1.weight", "post_extract_proj.bias")
    assert {f"feature_extract.model.{name}" for name in some} | {"layer2.Res2Conv1dReluBn.convs.6.weight"} <= set(state)
    path = home / "judges" / "wavlm-large-sv" / "wavlm_large_finetune.pth"
    path.parent.mkdir(parents=True)
    torch.save({"model": state | {"loss_calculator.projection.weight": torch.zeros(2, 12)}}, path)
    judge = paper_judges.WavlmSpeakerJudge("cpu")
    for clip in clips_16k():
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(network(torch.from_numpy(clip)[None])[0], dim=0)
        assert judge(clip) == pytest.approx(expected.tolist(), abs=1e-5)
    with pytest.raises(MetricFailure, match="at least 0.25 s"):
        judge(clips_16k()[0][:3000])
    for broken in (
        {name: v for name, v in state.items() if name != "linear.bias"}, state | {"strange": torch.zeros(1)}
    ):  # fmt: skip
        torch.save({"model": broken}, path)
        with pytest.raises(MetricFailure, match="is not UniSpeech's WavLM"):
            paper_judges.WavlmSpeakerJudge("cpu")(clips_16k()[0])


def test_ecapa_over_wavlm_is_that_of_unispeech() -> None:
    """Step by step from the weights: instance norm, blocks of dilation 2, 3, 4 whose groups hear the one before,
    gains of channels, attentive statistics (UniSpeech, downstreams/speaker_verification/models/ecapa_tdnn.py)."""
    import torch
    import torch.nn.functional as F

    torch.manual_seed(0)
    hidden = tuple(3 * torch.randn(1, 40, 10) + 1 for _ in range(3))
    trunk = torch.nn.Module()
    trunk.config = SimpleNamespace(hidden_size=10, num_hidden_layers=2)
    trunk.forward = lambda wav, output_hidden_states: SimpleNamespace(hidden_states=hidden)
    network = paper_judges.WavlmEcapa(trunk, channels=32, wide=24, size=6).eval()
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if name.endswith("running_var") else 0.4 * torch.randn_like(value))
    w = network.state_dict()

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.batch_norm(x, w[f"{at}.running_mean"], w[f"{at}.running_var"], w[f"{at}.weight"], w[f"{at}.bias"])

    def conv(x: torch.Tensor, at: str, **more: Any) -> torch.Tensor:
        return F.conv1d(x, w[f"{at}.weight"], w[f"{at}.bias"], **more)

    def linear(x: torch.Tensor, at: str) -> torch.Tensor:
        return F.linear(x, w[f"{at}.weight"], w[f"{at}.bias"])

    def block(x: torch.Tensor, at: str, dilation: int) -> torch.Tensor:
        y = norm(conv(x, f"{at}.Conv1dReluBn1.conv").relu(), f"{at}.Conv1dReluBn1.bn")
        said, before = [], torch.zeros(1, 4, 40)
        for i in range(7):
            group = y[:, 4 * i : 4 * i + 4] + before
            heard = conv(group, f"{at}.Res2Conv1dReluBn.convs.{i}", padding=dilation, dilation=dilation)
            before = norm(heard.relu(), f"{at}.Res2Conv1dReluBn.bns.{i}")
            said.append(before)
        y = torch.cat([*said, y[:, 28:]], dim=1)
        y = norm(conv(y, f"{at}.Conv1dReluBn2.conv").relu(), f"{at}.Conv1dReluBn2.bn")
        gain = linear(linear(y.mean(2), f"{at}.SE_Connect.linear1").relu(), f"{at}.SE_Connect.linear2").sigmoid()
        return x + y * gain[..., None]

    x = sum(share * state for share, state in zip(w["feature_weight"].softmax(0), hidden, strict=True))
    x = F.instance_norm(x.transpose(1, 2))
    x = norm(conv(x, "layer1.conv", padding=2).relu(), "layer1.bn")
    second = block(x, "layer2", 2)
    third = block(second, "layer3", 3)
    x = conv(torch.cat([second, third, block(third, "layer4", 4)], dim=1), "conv").relu()
    share = conv(conv(x, "pooling.linear1").tanh(), "pooling.linear2").softmax(2)
    mean = (share * x).sum(2)
    deviation = ((share * x**2).sum(2) - mean**2).clamp(min=1e-9).sqrt()
    wanted = linear(norm(torch.cat([mean, deviation], dim=1), "bn"), "linear")
    torch.testing.assert_close(network(torch.randn(1, 4000)), wanted, atol=1e-4, rtol=1e-4)


def test_verdicts_belong_to_the_weights_of_their_judge(home: Path, tmp_path: Path) -> None:
    """Weights that were put right are asked again, and a record tells which were asked."""

    class Weighed(paper_judges.WavlmSpeakerJudge):
        @property
        def model(self) -> Any:
            return float((self.folder / self.place[2]).read_text())

        def judge(self, wav_16k: Any) -> Any:
            return self.model

    audio.write(tmp_path / "a.flac", wave(NAMES[0]), 16_000)
    place = home / "judges" / "wavlm-large-sv" / "wavlm_large_finetune.pth"
    place.parent.mkdir(parents=True)
    found, told = [], []
    for value in ("1", "22"):
        place.write_text(value)
        verdicts = scoring.Verdicts(tmp_path / "cache")
        found += verdicts.many(Weighed("cpu"), [tmp_path / "a.flac"])
        told.append(verdicts.weights[Weighed.protocol])
    assert found == [1.0, 22.0] and len(set(told)) == 2
    place.unlink()
    assert Weighed("cpu").identity() == ""


def test_judges_come_from_the_hubs_cache_where_the_hub_is_out_of_reach(monkeypatch: Any, home: Path) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[Any] = []

    def snapshot_download(repository: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append(local_files_only)
        if not kept:
            raise LocalEntryNotFoundError("nothing here")
        return f"{HF_HUB_CACHE}/models--x/snapshots/{'a' * 40}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(paper_judges.assets, "reachable", lambda where: where == "https://mirror")
    kept = True
    judge = paper_judges.WavlmXVectorJudge("cpu")
    assert judge.identity() == "a" * 40 and asked == [True]
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror")
    assert judge.folder.parent.name == "snapshots" and asked == [True, False]
    monkeypatch.delenv("HF_ENDPOINT")
    kept = False
    with pytest.raises(MetisError, match="not run here: put config.json into .*wavlm-base-plus-sv"):
        _ = judge.folder


def test_a_task_of_ones_own_has_the_judges_of_the_task_that_it_is_like(monkeypatch: Any) -> None:
    monkeypatch.setattr(paper_judges, "like", lambda task: "se" if task == "declip" else task)
    voices = [type(paper_judges.choose("paper", task, "cpu")["voice"]).__name__ for task in ("declip", "se", "vc")]
    assert voices == ["WavlmXVectorJudge", "WavlmXVectorJudge", "WavlmSpeakerJudge"]


def test_the_ecapa_head_by_hand(home: Path) -> None:
    """Attentive pooling with equal weights is mean and deviation; a block without weights passes its input."""
    import torch

    pooling, x = paper_judges._Pooling(6, 4), torch.randn(1, 6, 50)
    torch.nn.init.zeros_(pooling.linear2.weight)
    expected = torch.cat([x.mean(dim=2), x.std(dim=2, unbiased=False)], dim=1)
    assert torch.allclose(pooling(x), expected, atol=1e-5)
    block = paper_judges._Block(16, 2).eval()
    torch.nn.init.zeros_(block.Conv1dReluBn2.bn.weight)
    x = torch.randn(1, 16, 50)
    assert torch.equal(block(x), x)


def test_x_vectors_of_wavlm_base_plus(home: Path) -> None:
    import torch

    config = tiny_wavlm(tdnn_dim=(16,) * 5, xvector_output_dim=8)
    from transformers import WavLMForXVector

    WavLMForXVector(config).save_pretrained(home / "judges" / "wavlm-base-plus-sv")
    judge = paper_judges.WavlmXVectorJudge("cpu")
    first, second = judge.many(clips_16k())
    assert len(first) == 8 and np.linalg.norm(second) == pytest.approx(1.0, abs=1e-5)
    with torch.inference_mode():
        found = judge.model(torch.from_numpy(clips_16k()[0])[None]).embeddings[0].numpy()
    assert metrics.cosine(first, found) == pytest.approx(1.0, abs=1e-5)


def test_optional_packages_are_used_where_they_are_and_named_where_not(home: Path, monkeypatch: Any) -> None:
    paraformer, nisqa = paper_judges.ParaformerJudge("cpu", "zh"), paper_judges.NisqaJudge("cpu")
    for name in ("funasr", "zhconv", "torchmetrics", "torchmetrics.functional", "torchmetrics.functional.audio"):
        monkeypatch.setitem(sys.modules, name, None)
    for judge, named in ((paraformer, "funasr and zhconv"), (nisqa, "torchmetrics, librosa and requests")):
        with pytest.raises(MetricFailure, match=f"not run here: .*{named}"):
            judge(clips_16k()[0])
    for name, file in (("paraformer-zh", "config.yaml"), ("nisqa", "nisqa.tar")):
        (home / "judges" / name).mkdir(parents=True)
        (home / "judges" / name / file).touch()

    def auto_model(model: str, **_: Any) -> Any:
        return SimpleNamespace(generate=lambda input, **_: [{"text": f"{Path(model).name} {len(input)}"}])

    measured = SimpleNamespace(NISQA_DIR="elsewhere")
    measured.non_intrusive_speech_quality_assessment = lambda wav, rate: np.array(
        [3.5 if Path(measured.NISQA_DIR).name == "nisqa" and rate == 16_000 else 0.0] + [1.0] * 4
    )
    monkeypatch.setitem(sys.modules, "funasr", SimpleNamespace(AutoModel=auto_model))
    monkeypatch.setitem(sys.modules, "zhconv", SimpleNamespace(convert=lambda text, to: f"{text} {to}"))
    for name in ("torchmetrics", "torchmetrics.functional", "librosa", "requests"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.audio", SimpleNamespace(nisqa=measured))
    assert paper_judges.ParaformerJudge("cpu", "zh")(clips_16k()[0]) == "paraformer-zh 16000 zh-cn"
    assert paper_judges.NisqaJudge("cpu")(clips_16k()[0]) == {"nisqa": 3.5}
    assert measured.NISQA_DIR == "elsewhere"
    chosen = paper_judges.choose("paper", "tts", "cpu", ["en", "zh"])
    kinds = [type(judge).__name__ for judge in chosen.values()]
    assert kinds == ["WhisperLargeJudge", "ParaformerJudge", "WavlmSpeakerJudge", "DnsmosJudge", "NisqaJudge"]
