"""Phone timings, synthetic lips, and real video to mouth crops."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from safetensors.numpy import load_file

from metis_lib.config import SSL_RATE
from metis_lib.data import lips, video
from metis_lib.data.align import HOP, Timed, align, speak
from metis_lib.data.lips import CLASS_OF, NAMES, VISEMES, FaceStyle, articulate, render
from metis_lib.errors import MetisError
from metis_lib.tokenizers.text import PUNCTUATION, PhoneTokenizer, nano_table
from recipes.nano.lips import oracle_phone_error

pytestmark = pytest.mark.data

TESTS = Path(__file__).parent
HUMAN = TESTS.parent / "eval" / "testsets" / "human"
TEXT = "Put my best boat by the farm, said the old man."
STILL = FaceStyle(motion=0.0, noise=0.0)
"""A face that neither moves nor flickers."""


def said(*phones: str, each: float = 0.12) -> list[Timed]:
    return [Timed(p, 0.2 + i * each, 0.2 + (i + 1) * each) for i, p in enumerate(phones)]


def still(phones: list[Timed], frames: int = 60) -> np.ndarray:
    return render(phones, frames, STILL, np.random.default_rng(0))


def dark(frame: np.ndarray) -> int:
    """Pixels of the open mouth: much darker than lips, in the middle of the picture."""
    return int((frame[36:72, 20:76] < 0.38 * STILL.skin).sum())


# ---------------------------------------------------------------- classes and drawing


def test_every_phone_of_the_table_has_one_of_at_most_14_classes() -> None:
    phones = [phone for part in VISEMES.values() for phone in part.split()]
    assert len(phones) == len(set(phones)) and set(phones) == set(nano_table()[0])
    assert len(NAMES) <= 14
    with pytest.raises(MetisError, match="no viseme for the phones ʘ"):
        lips.visemes(["p", "ʘ"])


@pytest.mark.parametrize("name", NAMES[1:])
def test_phones_of_one_class_give_the_same_bytes(name: str) -> None:
    style = FaceStyle.sample(np.random.default_rng(3))

    def drawn(phone: str) -> bytes:
        return render(said("ɛ", phone, "ɑː"), 40, style, np.random.default_rng(4)).tobytes()

    first, *others = VISEMES[name].split()
    assert all(drawn(other) == drawn(first) for other in others)
    away = next(p for p in ("m", "ɑː") if CLASS_OF[p] != CLASS_OF[first])
    assert drawn(away) != drawn(first)


def test_voicing_and_the_number_of_like_phones_are_invisible() -> None:
    voiceless = ["p", "t", "k", "f", "θ", "s", "ʃ", "tʃ", "ts", "tɹ"]
    voiced = ["b", "d", "ɡ", "v", "ð", "z", "ʒ", "dʒ", "dz", "dɹ"]
    assert [CLASS_OF[p] for p in voiceless] == [CLASS_OF[p] for p in voiced]
    assert np.array_equal(still(said("ɛ", *voiceless)), still(said("ɛ", *voiced)))
    once = [Timed("m", 0.2, 0.44), Timed("ɑː", 0.44, 0.6)]
    assert np.array_equal(still(once), still([Timed("m", 0.2, 0.3), Timed("b", 0.3, 0.44), Timed("ɑː", 0.44, 0.6)]))


def test_classes_can_be_told_apart() -> None:
    shown = np.stack([still([Timed(VISEMES[n].split()[0], 0.2, 0.6)] if n != "silence" else [])[9] for n in NAMES])
    mouths = shown[:, 30:80, 16:80].astype(float)
    apart = np.abs(mouths[:, None] - mouths[None]).mean(axis=(2, 3))
    assert (apart + 99 * np.eye(len(NAMES))).min() > 0.25  # grey levels, over a region much larger than the change
    assert (apart > 2).mean() > 0.6


@pytest.mark.parametrize(("frames", "expected"), [(1, 1), (2, 1), (3, 2), (99, 50), (100, 50)])
def test_one_picture_for_two_token_frames(frames: int, expected: int) -> None:
    out = render(said("m"), frames, FaceStyle(), np.random.default_rng(0))
    assert out.shape == (expected, 96, 96) and out.dtype == np.uint8


def test_same_seed_same_bytes_other_seed_or_face_others() -> None:
    def make(face: int, camera: int) -> bytes:
        style = FaceStyle.sample(np.random.default_rng(face))
        return render(said("h", "ə", "l", "oʊ"), 50, style, np.random.default_rng(camera)).tobytes()

    assert make(1, 2) == make(1, 2)
    assert len({make(1, 2), make(1, 3), make(2, 2)}) == 3


def test_light_blur_noise_and_motion_do_what_they_say() -> None:
    base = still([])[0].astype(float)
    noisy = render([], 100, replace(STILL, noise=4.0), np.random.default_rng(0)).astype(float)
    assert noisy.std(axis=0).mean() == pytest.approx(4.0, rel=0.1)
    lit = render([], 2, replace(STILL, gradient=0.3), np.random.default_rng(0))[0] / base
    assert lit[:, -8:].mean() == pytest.approx(1.27, abs=0.04) and lit[:, :8].mean() == pytest.approx(0.73, abs=0.04)
    sharp, soft = (render([], 2, replace(STILL, blur=b), np.random.default_rng(0))[0].astype(float) for b in (0.2, 2))
    assert np.abs(np.diff(soft, axis=0)).mean() < 0.9 * np.abs(np.diff(sharp, axis=0)).mean()
    moving = render([], 100, replace(STILL, motion=2.0), np.random.default_rng(0)).astype(float)
    steps = np.abs(np.diff(moving, axis=0)).mean(axis=(1, 2))
    assert moving.std(axis=0).mean() > 1 and steps.max() < 4


def test_lips_move_smoothly_and_anticipate() -> None:
    phones = said("h", "ə", "l", "oʊ", "m", "aɪ", "f", "ɹ", "ɛ", "n", "d", each=0.08)
    still_frames = still(phones, 120).astype(float)
    steps = np.abs(np.diff(still_frames, axis=0)).mean(axis=(1, 2))
    extremes = np.abs(still(said("ɑː", each=0.4))[9].astype(float) - still([])[9]).mean()
    assert 0 < steps.max() < 0.8 * extremes
    assert np.abs(np.diff(articulate(phones, 60), axis=0))[:, :3].max() < 0.45  # jaw, width, pout
    # s before a rounded vowel is rounder than before a spread one, though the class is the same
    width, pout = (articulate(said("s", vowel), 30)[6, 1:3] for vowel in ("uː", "iː"))
    assert width[0] < pout[0] - 0.02 and width[1] > pout[1] + 0.02


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.06, 0.12])
def test_bilabials_close_the_mouth(seconds: float) -> None:
    for shift in (0.0, 0.013, 0.027, 0.035):  # wherever the closure falls between two pictures
        start = 0.4 + shift
        phones = [Timed("ɑː", 0.1, start), Timed("b", start, start + seconds), Timed("ɑː", start + seconds, 0.9)]
        areas = [dark(frame) for frame in still(phones, 50)]
        closed = int((start + seconds / 2) * 25)
        assert min(areas[closed - 1 : closed + 2]) == 0
        assert min(areas[6:8]) > 100 and min(areas[17:20]) > 100  # in the vowels it is open
        unclosed = [Timed("ɑː", 0.1, start), Timed("k", start, start + seconds), Timed("ɑː", start + seconds, 0.9)]
        assert min(dark(frame) for frame in still(unclosed, 50)[6:20]) > 50  # other consonants leave it open


@pytest.mark.parametrize(
    "phones",
    [
        [Timed("m", 0.3, 0.2)],
        [Timed("m", 0.2, 0.2)],
        [Timed("m", float("nan"), 0.2)],
        [Timed("m", 0.2, 0.4), Timed("ɑː", 0.3, 0.5)],
    ],
)
def test_phones_out_of_order_are_refused(phones: list[Timed]) -> None:
    with pytest.raises(MetisError, match="follow each other in time"):
        render(phones, 30, FaceStyle(), np.random.default_rng(0))


def test_no_frames_are_refused() -> None:
    with pytest.raises(MetisError, match="at least one frame"):
        render([], 0, FaceStyle(), np.random.default_rng(0))


def test_oracle_uses_context_and_nothing_else() -> None:
    train = [["p", "iː"], ["b", "ɑː"]] * 50 + [["p", "iː"]]
    test = [["p", "_", "iː", "."], ["b", "ɑː"]]
    assert oracle_phone_error(train, test, order=1) == 0.25  # b looks like the commoner p
    assert oracle_phone_error(train, test) == 0.0  # but before ɑː it is a b
    assert oracle_phone_error(train, [["m", "iː"]]) == 0.5  # a class is all that is seen


# ---------------------------------------------------------------- phone timings


def test_espeak_repeats_itself_beside_the_text_front_end() -> None:
    tokenizer = PhoneTokenizer()
    before = tokenizer.phones(TEXT)
    wav, phones = speak(TEXT)
    speak("Something else, in another voice.", voice="en-us+f3", rate=300)
    assert tokenizer.phones(TEXT) == before == PhoneTokenizer().phones(TEXT)
    again, phones_again = speak(TEXT)
    assert np.array_equal(wav, again) and phones == phones_again
    spoken = [p for p in before if p not in PUNCTUATION and p != "_"]
    assert [p.phone for p in phones] == spoken
    assert len(wav) / SSL_RATE == pytest.approx(phones[-1].end, abs=0.1)


def test_alignment_finds_another_voice() -> None:
    wav, truth = speak(TEXT, voice="en-us+f3", rate=140, pitch=70)
    found = align(wav, SSL_RATE, TEXT)
    assert [p.phone for p in found] == [p.phone for p in truth]
    errors = np.abs([a.start - b.start for a, b in zip(found, truth, strict=True)])
    assert np.median(errors) < 0.012 and np.quantile(errors, 0.9) < 0.045


def test_alignment_leaves_pauses_out() -> None:
    wav, truth = speak("The old man said the boat was by the farm.", voice="en-us+f3")
    cut = int(truth[8].end * SSL_RATE)
    with_pause = np.concatenate([wav[:cut], np.zeros(SSL_RATE, np.float32), wav[cut:]])
    found = align(with_pause, SSL_RATE, "The old man said the boat was by the farm.")
    inside = [p for p in found if p.start < cut / SSL_RATE + 0.7 and p.end > cut / SSL_RATE + 0.3]
    assert not inside
    gap, last = max((b.start - a.end, n) for n, (a, b) in enumerate(zip(found, found[1:], strict=False)))
    assert gap == pytest.approx(1, abs=0.15) and last in (7, 8, 9)


def test_alignment_of_people_is_in_order_and_covers_the_speech() -> None:
    rows = [json.loads(line) for line in (HUMAN / "manifest.jsonl").read_text().splitlines()]
    row = next(r for r in rows if r["id"] == "librivox-0870")
    wav, rate = soundfile.read(HUMAN / row["clean"], dtype="float32")
    found = align(wav, rate, row["text"])
    assert len(found) > 60 and all(p.phone in CLASS_OF for p in found)
    assert all(a.end <= b.start + 1e-9 for a, b in zip(found, found[1:], strict=False))
    assert min(p.end - p.start for p in found) >= HOP - 1e-9
    assert found[0].start < 0.3 and found[-1].end > len(wav) / rate - 0.4
    assert sum(p.end - p.start for p in found) > 0.8 * len(wav) / rate
    # sibilants are where the sound is high: above 3 kHz against below
    frames = np.abs(np.fft.rfft(wav[: len(wav) // 240 * 240].reshape(-1, 240) * np.hanning(240))) ** 2
    ratio = np.log(frames[:, 30:80].sum(1) + 1e-6) - np.log(frames[:, 2:20].sum(1) + 1e-6)
    middle = {kind: np.median([ratio[int((p.start + p.end) * 50)] for p in found if p.phone in kind])
              for kind in ("sʃtʃ", "ɑːɪəmnæ")}  # fmt: skip
    assert middle["sʃtʃ"] > middle["ɑːɪəmnæ"] + 1.5


@pytest.mark.parametrize(
    ("wav", "text", "says"),
    [
        (np.zeros(32000, np.float32), TEXT, "silent|zero"),
        (np.full(32000, np.nan, np.float32), TEXT, "NaN"),
        (np.zeros(0, np.float32), TEXT, "empty|no samples"),
        (np.random.default_rng(0).standard_normal(4000).astype(np.float32) / 9, TEXT, "phones in 0.25 s"),
        (np.resize(np.float32([0.1, -0.1]), 61 * 16000), TEXT, "long"),
        (np.resize(np.float32([0.1, -0.1]), 16000), "?!", "nothing to say"),
    ],
)
def test_what_cannot_be_aligned_is_named(wav: np.ndarray, text: str, says: str) -> None:
    with pytest.raises(MetisError, match=says):
        align(wav, SSL_RATE, text)


def test_unknown_voice_is_named() -> None:
    with pytest.raises(MetisError, match="no voice 'xx-none'"):
        speak(TEXT, voice="xx-none")


# ---------------------------------------------------------------- real video


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return {k.removeprefix("io/"): v for k, v in load_file(TESTS / "golden" / "avsr_video.safetensors").items()}


@pytest.mark.golden
def test_points_and_crops_agree_with_the_published_code(golden: dict[str, np.ndarray]) -> None:
    points = [None if i in golden["missing_frames"] else p for i, p in enumerate(golden["landmarks"])]
    filled = video.fill(points)
    np.testing.assert_allclose(filled, golden["landmarks_filled"], atol=1e-9)
    smoothed = video.smooth(filled)
    np.testing.assert_allclose(smoothed, golden["landmarks_smoothed"], atol=1e-9)
    np.testing.assert_allclose(video.REFERENCE, golden["stable_reference"], atol=1e-9)
    assert np.array_equal(video.grey(golden["video"]), golden["gray"][:2])
    for number, picture, patch in zip(golden["frames"], golden["gray"], golden["patches"], strict=True):
        crop = video.crop_mouth(picture, smoothed[number]).astype(int)
        assert np.abs(crop - patch).max() <= 1  # releases of OpenCV differ by one grey level


FACE = np.array([[110.0, 80], [170, 80], [140, 120], [140, 145]])


def scene(count: int, lost: tuple[int, ...] = ()) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """A face that drifts, sways and grows, its mouth a bright dot: frames, and its points."""
    import cv2

    frames, points = [], []
    for n in range(count):
        turn = cv2.getRotationMatrix2D((140, 110), 6 * np.sin(n / 9), 1 + 0.2 * n / count)
        turn[:, 2] += [n, 6 * np.sin(n / 7)]
        here = FACE @ turn[:, :2].T + turn[:, 2]
        picture = np.full((240, 320, 3), 60, np.uint8)
        cv2.circle(picture, tuple(int(v) for v in here.mean(axis=0)), 70, (130, 120, 110), -1, cv2.LINE_AA)
        cv2.circle(picture, tuple(int(round(v)) for v in here[3]), 6, (250, 250, 250), -1, cv2.LINE_AA)
        frames.append(picture)
        points.append(None if n in lost else here)
    return frames, points


def write_video(path: Path, frames: list[np.ndarray], rate: float = 25.0) -> Path:
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def test_a_moving_face_gives_centred_crops(tmp_path: Path) -> None:
    frames, points = scene(40, lost=(0, 1, 17, 18, 39))
    path = write_video(tmp_path / "face.avi", frames)
    crops = video.read_lips(path, detect=lambda seen: [p for _, p in zip(seen, points, strict=True)])
    assert crops.shape == (40, 96, 96) and crops.dtype == np.uint8
    for crop in crops:
        y, x = np.nonzero(crop > 200)
        assert len(y) > 30
        assert abs(y.mean() - 47.5) < 4 and abs(x.mean() - 47.5) < 4


def test_a_face_smaller_or_elsewhere_gives_the_same_crop() -> None:
    import cv2

    picture = np.random.default_rng(0).integers(0, 255, (12, 16), dtype=np.uint8)
    picture = cv2.resize(picture, (320, 240), interpolation=cv2.INTER_CUBIC)
    matrix = cv2.getRotationMatrix2D((160, 120), 12, 0.9)
    turned = cv2.warpAffine(picture, matrix, (320, 240))
    a = video.crop_mouth(picture, FACE).astype(float)
    b = video.crop_mouth(turned, FACE @ matrix[:, :2].T + matrix[:, 2]).astype(float)
    assert np.abs(a - b).mean() < 2 and a.std() > 20


def test_missing_points_are_filled_and_smoothed() -> None:
    points: list[np.ndarray | None] = [None] * 5 + [FACE] + [None] * 3 + [FACE + 8] + [None]
    filled = video.fill(points)
    assert np.array_equal(filled[0], FACE) and np.array_equal(filled[-1], FACE + 8)
    np.testing.assert_allclose(filled[6], FACE + 2)
    jitter = FACE + np.random.default_rng(0).normal(0, 2, (30, 4, 2))
    calm = video.smooth(jitter)
    np.testing.assert_allclose(calm.mean(axis=1), jitter.mean(axis=1))
    shapes = [p - p.mean(axis=1, keepdims=True) for p in (calm, jitter)]
    assert shapes[0][6:-6].std(axis=0).mean() < 0.5 * shapes[1][6:-6].std(axis=0).mean()
    assert np.array_equal(calm[0], jitter[0])


def test_other_frame_rates_are_refused_or_resampled(tmp_path: Path) -> None:
    frames = [np.full((64, 64, 3), 8 * n, np.uint8) for n in range(30)]
    fast, slow = write_video(tmp_path / "50.avi", frames, 50), write_video(tmp_path / "12.avi", frames[:10], 12.5)
    with pytest.raises(MetisError, match="50 frames a second, not 25"):
        list(video.Video(fast))
    shown = [round(float(f.mean()) / 8) for f in video.Video(fast, resample=True)]
    assert shown == list(range(0, 30, 2))
    assert len(list(video.Video(slow, resample=True))) == pytest.approx(20, abs=1)


@pytest.mark.parametrize("broken", ["missing", "empty", "noise", "text", "cut"])
def test_files_that_are_no_video_are_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / f"{broken}.avi"
    if broken == "cut":
        whole = write_video(tmp_path / "whole.avi", scene(30)[0]).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif broken != "missing":
        noise = np.random.default_rng(0).bytes(50_000)
        path.write_bytes({"empty": b"", "noise": noise, "text": b"not a video\n" * 99}[broken])
    says = {"missing": "no such video", "empty": "is empty", "cut": "breaks off|cannot? be read"}
    with pytest.raises(MetisError, match=says.get(broken, "not video")) as caught:
        video.read_lips(path, detect=lambda seen: [FACE for _ in seen])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_faces_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", scene(5)[0])
    for points, says in ((None, "no frame of the video shows a face"), (np.ones((4, 2)), "one spot")):
        with pytest.raises(MetisError, match=says) as caught:
            video.read_lips(path, detect=lambda seen, p=points: [p for _ in seen])
        assert str(path) in str(caught.value)
    wrong = FACE + np.array([[0, 0], [0, 0], [0, 0], [400, 0]])
    with pytest.raises(MetisError, match="too far from the middle"):
        video.crop_mouth(np.zeros((240, 320), np.uint8), wrong)


def test_without_mediapipe_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(MetisError) as caught:
        video.mouth_crops(scene(2)[0])
    assert video.INSTALL in str(caught.value) and "\n" not in str(caught.value)


def test_the_largest_of_several_faces_is_taken() -> None:
    def face(width: float, at: float) -> SimpleNamespace:
        keys = [SimpleNamespace(x=at + 0.01 * k, y=0.5) for k in range(6)]
        box = SimpleNamespace(width=width, height=width)
        return SimpleNamespace(location_data=SimpleNamespace(relative_bounding_box=box, relative_keypoints=keys))

    found = video._largest([face(0.1, 0.1), face(0.4, 0.555), face(0.2, 0.8)], 100, 200)
    assert found is not None and found.tolist() == [[111, 50], [113, 50], [115, 50], [117, 50]]
    assert video._largest(None, 100, 200) is None
