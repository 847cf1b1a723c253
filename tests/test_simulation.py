"""Examples made on the fly: a thousand of each simulator, measured from their signals."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch.utils.data import DataLoader

from metis_lib import audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data import simulate
from metis_lib.data.examples import Example, Pool, Simulated, Simulation, Sources, Utterance, se, tse, tts, vc
from metis_lib.data.perturb import VoiceShift
from metis_lib.data.simulate import HOP, Degradation, Extraction, Noises, Prompt, Recording, Rooms, power
from metis_lib.data.store import FlatStore, Row
from metis_lib.errors import MetisError

pytestmark = pytest.mark.data

HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"
COUNT, LENGTH = 1000, 9600


def read(name: str) -> np.ndarray:
    return soundfile.read(HUMAN / name, dtype="float32")[0]


def speakers() -> dict[str, str]:
    """Every clean recording and who speaks in it."""
    rows = map(json.loads, (HUMAN / "manifest.jsonl").read_text().splitlines())
    return {row["clean"]: row["speaker"] for row in rows}


@pytest.fixture(scope="module")
def speech() -> list[Utterance]:
    """Real speech: a thousand stretches of 0.2 to 0.6 s at the corpus's level, each with its own id and text."""
    generator, waves = np.random.default_rng(0), {name: read(name) for name in sorted(speakers())}
    names, out = sorted(waves), []
    while len(out) < COUNT:
        name = names[len(out) % len(names)]
        length = int(generator.integers(LENGTH // 2, LENGTH * 3 // 2))
        start = int(generator.integers(len(waves[name]) - length))
        wav = waves[name][start : start + length]
        if power(wav) > 1e-4:
            out.append(Utterance(f"u{len(out)}", speakers()[name], audio.level(wav), f"words {len(out)}"))
    return out


@pytest.fixture(scope="module")
def sources() -> Sources:
    """White and pink noise and a coloured hum, and rooms whose direct path comes late and whose echoes decay."""
    generator = np.random.default_rng(1)
    hum = Recording("hum", simulate.colour(AUDIO_RATE, 2.0, generator) * 0.1)
    rirs, direct = np.zeros((8, 4000), np.float32), generator.integers(20, 400, 8)
    for rir, at in zip(rirs, direct, strict=True):
        tail = 0.03 * generator.standard_normal(4000 - at) * 10 ** (-3 * np.arange(4000 - at) / 4000)
        rir[at:] = tail
        rir[at] = 1.0
    rooms = Rooms(rirs, np.full(8, 4000), direct, np.full(8, 0.17))
    return Sources(noises=Noises([hum]), rooms=rooms)


PAPER = Simulation()


def make(task: str, speech: list[Utterance], sources: Sources, params: Simulation = PAPER) -> list[Example]:
    data = Simulated(task, Pool(speech), sources, params, seed=3, shortest=0.1)
    assert len(data) == COUNT and not data.left_out
    return [data[i] for i in range(COUNT)]


@pytest.fixture(scope="module")
def enhanced(speech: list[Utterance], sources: Sources) -> list[Example]:
    return make("se", speech, sources)


@pytest.fixture(scope="module")
def extracted(speech: list[Utterance], sources: Sources) -> list[Example]:
    return make("tse", speech, sources)


def near(hits: int, p: float, count: int = COUNT) -> bool:
    """Within four standard deviations of a binomial: wrong once in 16,000."""
    return abs(hits / count - p) <= 4 * (p * (1 - p) / count) ** 0.5


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(power(a) / power(b))


def digest(examples: list[Example]) -> list[str]:
    return [
        hashlib.sha256(
            e.target.tobytes()
            + (b"" if e.condition is None else e.condition.tobytes())
            + json.dumps([e.task, e.id, e.prompt, e.text, e.done], sort_keys=True).encode()
        ).hexdigest()
        for e in examples
    ]


# ---------------------------------------------------------------- speech enhancement


def test_se_odds_ranges_and_levels(enhanced: list[Example], speech: list[Utterance]) -> None:
    done = [e.done for e in enhanced]
    assert near(sum(d["noise"] is not None for d in done), 0.9)
    assert near(sum(d["room"] is not None for d in done), 0.35)
    assert near(sum(d["band_hz"] is not None for d in done), 0.25)
    assert all(d["clip_db"] is None for d in done)
    bands = Counter(d["band_hz"] for d in done if d["band_hz"])
    assert set(bands) == {2000, 4000, 8000}
    assert all(near(n, 1 / 3, sum(bands.values())) for n in bands.values())
    snr = np.array([d["snr_db"] for d in done if d["noise"]])
    assert snr.min() >= -5 and snr.max() <= 20 and abs(snr.mean() - 7.5) < 4 * 25 / 12**0.5 / len(snr) ** 0.5
    clean = {u.id: u.wav for u in speech}
    for e in enhanced:
        assert e.condition is not None and e.condition.shape == e.target.shape == clean[e.id].shape
        assert e.condition.dtype == e.target.dtype == np.float32 and e.prompt == 0 and e.text is None
        assert max(np.abs(e.condition).max(), np.abs(e.target).max()) <= 0.9901
        np.testing.assert_allclose(e.target, clean[e.id] * e.done["gain"], atol=1e-6)


def test_se_signals_have_the_stated_snr(enhanced: list[Example]) -> None:
    plain = [e for e in enhanced if e.done["noise"] and e.done["room"] is None and e.done["band_hz"] is None]
    assert len(plain) > 300
    for e in plain:
        assert decibels(e.target, e.condition - e.target) == pytest.approx(e.done["snr_db"], abs=0.01)
    untouched = [e for e in enhanced if not e.done["noise"] and e.done["room"] is e.done["band_hz"] is None]
    assert len(untouched) > 15 and all(np.array_equal(e.condition, e.target) for e in untouched)


def test_se_bandwidths_are_the_stated_ones(enhanced: list[Example]) -> None:
    def above(e: Example, hz: float) -> float:
        """Share of the power above ``hz``, the ends (where resampling rings) faded."""
        spectrum = np.abs(np.fft.rfft(e.condition * np.hanning(len(e.condition)))) ** 2
        return spectrum[np.fft.rfftfreq(len(e.condition), 1 / AUDIO_RATE) > hz].sum() / spectrum.sum()

    limited = [e for e in enhanced if e.done["band_hz"]]
    assert all(above(e, 1.1 * e.done["band_hz"]) < 1e-4 for e in limited)
    assert all(above(e, 0.5 * e.done["band_hz"]) > 1e-4 for e in limited if e.done["noise"] == "white")
    free = [e for e in enhanced if e.done["band_hz"] is None and e.done["noise"] == "white" and e.done["snr_db"] < 10]
    assert len(free) > 20 and all(above(e, 8800) > 1e-3 for e in free)


def test_se_target_lies_on_the_direct_path(speech: list[Utterance], sources: Sources) -> None:
    only = Simulation(se=Degradation(noise_p=0, reverb_p=1, band_p=0))
    seen = set()
    for i, u in enumerate(speech[:100]):
        e = se(u, np.random.default_rng(i), sources, only)
        seen.add(e.done["room"])
        heard, said = np.fft.rfft(e.condition, 1 << 15), np.fft.rfft(e.target, 1 << 15)
        whitened = heard * said.conj() / (np.abs(said) ** 2 + 0.1)  # the peak of speech alone is blunt
        assert np.argmax(np.fft.irfft(whitened)) == 0 and e.done["rt60"] == 0.17
        assert power(e.condition - e.target) > 1e-3 * power(e.target), "there is an echo"
    assert seen == set(range(8))


# ---------------------------------------------------------------- target speaker extraction


def test_tse_mixture_is_what_it_says_and_no_more(extracted: list[Example], speech: list[Utterance]) -> None:
    held = {u.id: u for u in speech}
    fractions, cut, late = [], 0, 0
    for e in extracted:
        u, (other,) = held[e.id], e.done["others"]
        assert other["speaker"] == held[other["id"]].speaker != u.speaker == e.done["speaker"]
        assert e.prompt == e.done["prompt"] and e.prompt % HOP == 0 and HOP <= e.prompt <= len(u.wav) - HOP
        rest = u.wav[e.prompt :].copy()  # what the prompt took is not in it
        first, at, count = other["first"], other["at"], other["samples"]
        rest[at : at + count] += held[other["id"]].wav[first : first + count]
        np.testing.assert_allclose(e.condition[e.prompt :], rest * e.done["gain"], atol=2e-6)
        assert np.array_equal(e.condition[: e.prompt], e.target[: e.prompt])
        np.testing.assert_allclose(e.target, u.wav * e.done["gain"], atol=2e-6)
        assert other["gain"] == 1 and np.abs(e.condition).max() <= 0.9901 and e.text is None
        fractions.append(e.prompt / len(u.wav))
        cut, late = cut + (first > 0), late + (at > 0)
    assert min(fractions) >= 0.2 - HOP / LENGTH and max(fractions) <= 0.5 + HOP / LENGTH
    assert abs(np.mean(fractions) - 0.35) < 0.02 and cut > 300 and late > 50


def test_tse_options(speech: list[Utterance], sources: Sources) -> None:
    params = Simulation(tse=Extraction(snr_db=(-2.0, 4.0), third_p=0.3))
    held, ratios = {u.id: u for u in speech}, []
    examples = make("tse", speech, sources, params)
    assert near(sum(len(e.done["others"]) == 2 for e in examples), 0.3)
    for e in examples:
        assert len({e.done["speaker"], *(o["speaker"] for o in e.done["others"])}) == 1 + len(e.done["others"])
        if len(e.done["others"]) == 1:
            added = e.condition[e.prompt :] - e.target[e.prompt :]
            ratios.append(decibels(e.target[e.prompt :], added))
            assert ratios[-1] == pytest.approx(e.done["others"][0]["snr_db"], abs=0.02)
        for o in e.done["others"]:
            part = held[o["id"]].wav[o["first"] : o["first"] + o["samples"]]
            rest = held[e.id].wav[e.prompt :]
            ratio = 10 * np.log10((rest**2).sum() / ((part * o["gain"]) ** 2).sum())
            assert ratio == pytest.approx(o["snr_db"], abs=0.02) and -2 <= o["snr_db"] <= 4
    assert abs(np.mean(ratios) - 1) < 4 * 6 / 12**0.5 / len(ratios) ** 0.5


def test_tse_noise_leaves_the_prompt_clean(speech: list[Utterance], sources: Sources) -> None:
    noisy = Degradation(noise_p=1, snr_db=(5.0, 5.0), reverb_p=0, band_p=0)
    params = Simulation(tse=Extraction(degradation=noisy))
    for i, u in enumerate(speech[:50]):
        with_noise = tse(u, np.random.default_rng(i), Sources(Pool(speech)), params)
        without = tse(u, np.random.default_rng(i), Sources(Pool(speech)))
        assert with_noise.done["others"] == without.done["others"] and with_noise.prompt == without.prompt > 0
        a, b = with_noise.condition / with_noise.done["gain"], without.condition / without.done["gain"]
        np.testing.assert_allclose(a[: without.prompt], u.wav[: without.prompt], atol=2e-6)
        assert decibels(b[without.prompt :], (a - b)[without.prompt :]) == pytest.approx(5, abs=0.02)
        np.testing.assert_allclose(with_noise.target, u.wav * with_noise.done["gain"], atol=2e-6)


# ---------------------------------------------------------------- voice conversion


def backwards(wav_24k: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A perturbation that can be told from its input, and draws."""
    return -wav_24k * np.float32(generator.uniform(0.5, 1))


def test_vc_keeps_the_prompt_and_perturbs_the_rest(speech: list[Utterance]) -> None:
    held, fractions = {u.id: u for u in speech}, []
    for e in make("vc", speech, Sources(perturb=backwards)):
        u, said = held[e.id], e.done["perturb"]
        assert np.array_equal(e.target, u.wav) and np.array_equal(e.condition[: e.prompt], u.wav[: e.prompt])
        again = backwards(u.wav[e.prompt :], np.random.default_rng(said["seed"]))
        assert np.array_equal(e.condition[e.prompt :], again) and said["name"] == "backwards" and e.text is None
        assert e.prompt % HOP == 0 and HOP <= e.prompt <= len(u.wav) - HOP
        fractions.append(e.prompt / len(u.wav))
    assert min(fractions) >= 0.15 and max(fractions) <= 0.55 and abs(np.mean(fractions) - 0.35) < 0.02


def median_f0(wav_24k: np.ndarray) -> float:
    import parselmouth

    f0 = parselmouth.Sound(wav_24k.astype(np.float64), AUDIO_RATE).to_pitch_ac(pitch_floor=60, pitch_ceiling=400)
    track = f0.selected_array["frequency"]
    return float(np.median(track[track > 0]))


def envelope(wav: np.ndarray) -> np.ndarray:
    """Loudness of every 10 ms: the fourth root of the power of 40 ms around it."""
    smooth = np.convolve(wav.astype(np.float64) ** 2, np.hanning(960), "same")
    return np.maximum(smooth[::240], 0) ** 0.25


@pytest.mark.parametrize("name", ["librivox-0880.flac", "uqm-syreen-021-01.flac", "cmu-cards.flac"])
def test_voice_shift_moves_the_pitch_and_keeps_the_time(name: str) -> None:
    pytest.importorskip("parselmouth", reason="there are machines without its wheel")
    wav, shift = read(name), VoiceShift(pitch=(1.3, 1.4), spread=(0.7, 1.0))
    for seed in (0, 1, 2):
        how = shift.draw(np.random.default_rng(seed))
        out = shift(wav, np.random.default_rng(seed))
        assert out.shape == wav.shape and out.dtype == np.float32 and np.abs(out).max() <= 0.9901
        wanted = float(np.clip(median_f0(wav) * how["pitch"], 60, 400))
        assert median_f0(out) == pytest.approx(wanted, rel=0.1)
        assert decibels(out, wav) == pytest.approx(0, abs=0.1)
        a, b = envelope(wav), envelope(out)
        alike = [np.corrcoef(a[20:-20], b[20 + k : len(b) - 20 + k])[0, 1] for k in range(-10, 11)]
        assert abs(int(np.argmax(alike)) - 10) <= 1, "nothing moves by more than 10 ms"
        assert max(alike) > 0.9, "the rhythm stays"


def test_voice_shift_draws_both_ways_within_its_ranges() -> None:
    drawn = [VoiceShift(mild=0.0).draw(np.random.default_rng(seed)) for seed in range(COUNT)]
    up = [d for d in drawn if d["pitch"] > 1]
    assert near(len(up), 0.5) and all((d["formants"] > 1) == (d["pitch"] > 1) for d in drawn)
    for d in drawn:
        assert 1.1995 <= max(d["formants"], 1 / d["formants"]) <= 1.4005
        assert 1.2995 <= max(d["pitch"], 1 / d["pitch"]) <= 2.0005 and 0.6 <= d["spread"] <= 1.4
    drawn = [VoiceShift().draw(np.random.default_rng(seed)) for seed in range(COUNT)]
    mild = [d for d in drawn if max(d["formants"], 1 / d["formants"]) < 1.4**0.4 + 0.001]
    assert near(len(mild), 0.3) and all(max(d["pitch"], 1 / d["pitch"]) < 2**0.4 + 0.001 for d in mild)


def test_voice_shift_takes_what_has_no_pitch() -> None:
    pytest.importorskip("parselmouth", reason="there are machines without its wheel")
    shift, generator = VoiceShift(), np.random.default_rng(0)
    noise = simulate.colour(AUDIO_RATE, 0.0, generator) * 0.05
    out = shift(noise, generator)
    assert np.isfinite(out).all() and decibels(out, noise) == pytest.approx(0, abs=0.1)
    for short in (np.zeros(AUDIO_RATE, np.float32), noise[:500], noise[:0]):
        assert np.array_equal(shift(short, generator), short)
    late = np.concatenate([np.zeros(AUDIO_RATE, np.float32), noise[:2400]])
    assert len(shift(late, generator)) == len(late)
    for bad in (np.full(AUDIO_RATE, np.nan), np.ones((2, AUDIO_RATE))):
        with pytest.raises(MetisError, match="one channel"):
            shift(bad, generator)


# ---------------------------------------------------------------- text-to-speech and the mixture


def test_tts_loses_text_and_prompt_as_often_as_stated(speech: list[Utterance], sources: Sources) -> None:
    examples, held = make("tts", speech, sources), {u.id: u for u in speech}
    told = [e for e in examples if e.text is not None]
    assert near(len(told), 0.9) and near(sum(e.prompt > 0 for e in told), 0.8, len(told))
    for e in examples:
        assert e.condition is None and np.array_equal(e.target, held[e.id].wav)
        assert e.done["told"] == (e.text is not None) and (e.text in (None, held[e.id].text))
        assert e.prompt % HOP == 0 and e.prompt <= 0.4 * len(e.target) + HOP and (e.prompt == 0 or e.text)
    assert abs(np.mean([e.prompt / len(e.target) for e in told if e.prompt]) - 0.2) < 0.03


def test_omni_shares(speech: list[Utterance], sources: Sources) -> None:
    counted = Counter(e.task for e in make("omni", speech, Sources(noises=sources.noises, perturb=backwards)))
    for task, p in (("tts", 0.5), ("vc", 0.1), ("tse", 0.2), ("se", 0.2)):
        assert near(counted[task], p), counted


# ---------------------------------------------------------------- the dataset


@pytest.fixture(scope="module")
def store(speech: list[Utterance], tmp_path_factory: pytest.TempPathFactory) -> FlatStore:
    pieces = (
        ({"id": u.id, "speaker": u.speaker, "text": u.text}, (u.wav * 32767).round().astype(np.int16))
        for u in speech[:240]
    )
    return FlatStore.write(tmp_path_factory.mktemp("waves") / "store", pieces)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_change_a_byte(store: FlatStore, sources: Sources) -> None:
    data = Simulated("omni", Pool(store), sources, seed=7, shortest=0.1)

    def run(workers: int, **options: bool) -> list[str]:
        loader = DataLoader(data, batch_size=7, num_workers=workers, collate_fn=list, **options)
        return digest([e for batch in loader for e in batch])

    alone = run(0)
    assert run(1) == alone == run(4) and len(set(alone)) == len(data) == 240
    data.set_epoch(1)
    second = run(0)
    assert not set(second) & set(alone) and run(4) == second
    other = Simulated("omni", Pool(store), sources, seed=8, shortest=0.1)
    assert not set(digest([other[i] for i in range(20)])) & set(alone)


def test_of_two_writers_of_a_store_one_writes(tmp_path: Path) -> None:
    """The second waits, and gets what the first has made; its own pieces are never asked for."""
    began, asked = threading.Event(), threading.Event()

    def slowly() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        for k in range(4):
            began.set()
            time.sleep(0.1)
            yield {"id": str(k)}, np.full(3, k, np.int16)

    def never() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        asked.set()
        yield {"id": "other"}, np.zeros(9, np.int16)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(FlatStore.write, tmp_path / "new" / "store", slowly())
        began.wait()
        second = FlatStore.write(tmp_path / "new" / "store", never())
        first.result()
    assert not asked.is_set() and [second[k].tolist() for k in range(4)] == [[k] * 3 for k in range(4)]
    third = FlatStore.write(tmp_path / "new" / "store", never())  # alone: written anew
    assert [item["id"] for item in third.items] == ["other"]


def test_workers_that_stay_alive_see_the_epoch(store: FlatStore) -> None:
    data = Simulated("tse", Pool(store), seed=7, shortest=0.1)
    loader = DataLoader(data, batch_size=40, num_workers=2, collate_fn=list, persistent_workers=True)
    ids = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        examples = [e for batch in loader for e in batch]
        assert {e.done["epoch"] for e in examples} == {epoch}
        ids.append([e.id for e in examples])
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1]) == sorted(data.pool.ids)


def test_dataset_travels_light(store: FlatStore, sources: Sources) -> None:
    data = Simulated("tse", Pool(store), sources, seed=1, shortest=0.1)
    frozen = pickle.dumps(data)
    assert len(frozen) < 400_000 < store.data.nbytes, "the waves stay on disk"
    again = pickle.loads(frozen)
    assert digest([again[i] for i in range(9)]) == digest([data[i] for i in range(9)])
    with pytest.raises(IndexError):
        data[len(data)]


def test_done_is_json(enhanced: list[Example], extracted: list[Example], speech: list[Utterance]) -> None:
    shifted = vc(speech[0], np.random.default_rng(0), Sources())
    assert {"formants", "pitch", "spread", "praat_seed", "seed", "name"} == set(shifted.done["perturb"])
    for e in (*enhanced[:200], *extracted[:200], shifted):
        assert json.loads(json.dumps(e.done)) == e.done
        assert {"id", "speaker", "samples", "prompt"} <= set(e.done)


def test_bad_recordings_give_way_and_are_named(tmp_path: Path) -> None:
    def row(name: str, speaker: str, **more: float) -> Row:
        return Row(name, f"{name}.flac", "", "en", speaker, 2.0, "train", "here", "CC0", True, root=tmp_path, **more)

    good = read("librivox-0880.flac")
    soundfile.write(tmp_path / "a.flac", good[:48000], AUDIO_RATE)
    soundfile.write(tmp_path / "b.flac", good, AUDIO_RATE)
    (tmp_path / "c.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:60])
    soundfile.write(tmp_path / "silent.flac", np.zeros(48000), AUDIO_RATE)
    rows = [row("a", "x"), row("b", "y", start=0.5, end=1.75), row("c", "y"), row("silent", "y"), row("gone", "z")]
    data = Simulated("se", Pool(rows), seed=2)
    examples = [data[i] for i in range(len(data))]
    assert {e.id for e in examples} == {"a", "b"}
    named = {id: reason for e in examples for id, reason in e.done["instead_of"].items()}
    assert set(named) == {"c", "silent", "gone"} and "silent" in named["silent"] and "no recording" in named["gone"]
    assert {e.id: len(e.target) for e in examples} == {"a": 48000, "b": 30000}
    with pytest.raises(MetisError, match="cannot be used.*silent"):
        Simulated("se", Pool([rows[3]]))[0]


def test_long_speech_is_cut_unless_its_text_must_fit() -> None:
    generator = np.random.default_rng(0)
    pool = Pool([Utterance(f"{s}", f"s{s}", simulate.colour(s * AUDIO_RATE, 1.0, generator) * 0.05, "text")
                 for s in (1, 4, 9)])  # fmt: skip
    cut = Simulated("tse", pool, seed=0, longest=3.0)
    for e in (cut[i] for i in range(3)):
        whole = pool[pool.ids.index(e.id)].wav
        first = e.done["first"]
        np.testing.assert_allclose(e.target, whole[first : first + 72000] * e.done["gain"], atol=2e-6)
    whole = Simulated("tts", pool, longest=5.0, shortest=2.0)
    assert whole.left_out == {"1": "too short", "9": "too long"} and whole[0].id == "4"


def test_requests_that_cannot_be_met(speech: list[Utterance]) -> None:
    one, generator = speech[0], np.random.default_rng(0)
    mute = Utterance("m", "s", one.wav)
    alone = Pool([u for u in speech if u.speaker == one.speaker])
    broken = Utterance("n", "s", np.full(9600, np.nan, np.float32))

    def shorter(wav: np.ndarray, _: np.random.Generator) -> np.ndarray:
        return wav[1:]

    for call, says in (
        (lambda: Simulated("l2s", Pool(speech)), "l2s.*se, tse, vc, tts, omni"),
        (lambda: Simulated("se", Pool(speech), seed=-1), "seeds from 0"),
        (lambda: Simulated("se", Pool(speech)), "too short"),
        (lambda: Simulated("tts", Pool([mute]), shortest=0.1), "no text"),
        (lambda: Pool([]), "no speech"),
        (lambda: tse(one, generator, Sources()), "others="),
        (lambda: tse(one, generator, Sources(alone)), "another speaker"),
        (lambda: Simulated("tse", alone, shortest=0.1)[0], "another speaker"),
        (lambda: tse(broken, generator, Sources(alone)), "finite"),
        (lambda: tts(mute, generator, Sources()), "needs the text"),
        (lambda: vc(Utterance("t", "s", one.wav[:900]), generator, Sources()), "too short"),
        (lambda: vc(one, generator, Sources(perturb=shorter)), "shorter must return"),
        (lambda: se(Utterance("z", "s", np.zeros(9600, np.float32)), generator, Sources()), "silent"),
        (lambda: Prompt().draw(959, generator), "too short"),
    ):
        with pytest.raises(MetisError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_wide_spread_never_takes_the_pitch_below_zero():
    pitch = np.concatenate([np.full(12_000, 75.0), np.full(36_000, 300.0)])
    wav = (0.3 * (np.cumsum(pitch) / 24_000 % 1 - 0.5)).astype(np.float32)

    class Wide(VoiceShift):
        def draw(self, generator):
            return {"formants": 0.72, "pitch": 0.55, "spread": 1.4, "praat_seed": 1}

    shifted = Wide()(wav, np.random.default_rng(0))
    assert shifted[:12_000].std() > 0.02 and shifted[12_000:].std() > 0.02, "no part falls silent, and it ends at all"


def test_who_has_nothing_to_hear_is_nobody_else(tmp_path: Path) -> None:
    """Recordings that could not be read have no samples in a wave store."""
    from metis_lib.data.store import FlatStore

    sound = (3000 * np.random.default_rng(0).standard_normal(48_000)).astype(np.int16)
    pieces = [({"id": who, "speaker": who, "text": ""}, wav)
              for who, wav in (("anna", sound), ("ben", sound[:0]), ("carla", sound))]  # fmt: skip
    pool = Pool(FlatStore.write(tmp_path / "three", iter(pieces)))
    rng = np.random.default_rng(1)
    assert {pool.other({"anna"}, rng).speaker for _ in range(50)} == {"carla"}
    alone = Pool(FlatStore.write(tmp_path / "two", iter(pieces[:2])))
    with pytest.raises(MetisError, match="another speaker"):
        alone.other({"anna"}, rng)
