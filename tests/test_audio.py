"""The door for waveforms: values, rates, levels, and one clear line for every kind of bad input."""

import base64
import io
import math
import re

import numpy as np
import pytest
import soundfile
import torch

from metis_lib import audio
from metis_lib.audio import Speech
from metis_lib.errors import MetisError


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0, level: float = 0.5) -> torch.Tensor:
    return level * torch.sin(2 * math.pi * hz * torch.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("suffix, tolerance", [(".wav", 1e-4), (".flac", 1e-4), (".ogg", 0.05)])
def test_write_then_read_gives_the_same_samples(tmp_path, suffix, tolerance):
    wav = tone(24000)
    audio.write(tmp_path / f"a{suffix}", wav, 24000)
    back = audio.read(tmp_path / f"a{suffix}", 24000)
    assert back.dtype == torch.float32 and back.shape == wav.shape
    assert (back - wav).abs().max() < tolerance
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


def test_read_averages_channels_and_resamples(tmp_path):
    left, right = tone(48000), torch.zeros(24000)
    soundfile.write(tmp_path / "two.wav", torch.stack([left, right], 1).numpy(), 48000, subtype="FLOAT")
    wav = audio.read(tmp_path / "two.wav", 16000)
    assert wav.shape == (8000,)
    assert (wav - tone(16000, level=0.25))[200:-200].abs().max() < 1e-3


def test_write_clips_and_never_normalises(tmp_path):
    audio.write(tmp_path / "a.wav", torch.tensor([0.1, 2.0, -3.0, 0.0]), 16000)
    assert audio.read(tmp_path / "a.wav", 16000).tolist() == pytest.approx([0.1, 1.0, -1.0, 0.0], abs=1e-4)
    audio.write(tmp_path / "one.wav", torch.tensor([0.5]), 16000)
    assert audio.read(tmp_path / "one.wav", 16000).tolist() == pytest.approx([0.5], abs=1e-4)


def _bad_files(folder):
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio at all\n")
    soundfile.write(folder / "none.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "zero.wav", np.zeros(1600, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan], np.float32), 16000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", tone(16000, 0.1).numpy(), 16000)
    soundfile.write(folder / "long.wav", tone(16000, 2.0).numpy(), 16000)


@pytest.mark.parametrize(
    "name, says",
    [
        ("missing.wav", "no recording at"),
        ("", "is a folder"),
        ("empty.wav", "the file is empty"),
        ("text.wav", "not audio"),
        ("none.wav", "the recording is empty"),
        ("zero.wav", "silent"),
        ("nan.wav", "NaN"),
        ("short.wav", "0.10 s is too short; at least 0.5 s"),
        ("long.wav", "2.0 s is too long; at most 1 s"),
    ],
)
def test_bad_recordings_give_one_line(tmp_path, name, says):
    _bad_files(tmp_path)
    with pytest.raises(MetisError, match=says) as caught:
        audio.read(tmp_path / name, 16000, min_seconds=0.5, max_seconds=1.0)
    assert "\n" not in str(caught.value)


def test_long_recordings_can_be_written_as_ogg(tmp_path):
    audio.write(tmp_path / "a.ogg", tone(8000, 600.0), 8000)
    assert soundfile.info(tmp_path / "a.ogg").duration == pytest.approx(600.0, abs=0.1)


@pytest.mark.parametrize("name", ["a.mp3", "a", "file.wav/a.wav"])
def test_bad_targets_give_one_line_and_no_file(tmp_path, name):
    (tmp_path / "file.wav").write_text("x")
    with pytest.raises(MetisError):
        audio.write(tmp_path / name, tone(16000), 16000)
    assert [path.name for path in tmp_path.iterdir()] == ["file.wav"]


def test_write_refuses_nan_and_keeps_the_old_file(tmp_path):
    audio.write(tmp_path / "a.wav", tone(16000), 16000)
    before = (tmp_path / "a.wav").read_bytes()
    with pytest.raises(MetisError, match="NaN"):
        audio.write(tmp_path / "a.wav", torch.tensor([0.0, float("nan")]), 16000)
    assert (tmp_path / "a.wav").read_bytes() == before


@pytest.mark.parametrize("to_rate", [8000, 16000, 44100])
def test_resample_keeps_a_tone(to_rate):
    out = audio.resample(tone(24000).expand(2, 1, -1), 24000, to_rate)
    assert out.shape == (2, 1, to_rate // 2)
    assert (out[1, 0] - tone(to_rate))[300:-300].abs().max() < 1e-3


def test_load_takes_every_source(tmp_path):
    wav = tone(16000)
    audio.write(tmp_path / "a.wav", wav, 16000)
    integers = (wav * 32767).round().to(torch.int16).numpy()
    stereo = np.stack([wav.numpy()] * 2, axis=1)
    for source in (tmp_path / "a.wav", str(tmp_path / "a.wav"), Speech(wav, 16000), (wav, 16000)):
        assert (audio.load(source, 16000) - wav).abs().max() < 1e-4
    for array in (integers, stereo, stereo.T, wav[None], wav.double()):
        assert (audio.load((array, 16000), 16000) - wav).abs().max() < 1e-4
    eight_bit = (wav.numpy() * 127 + 128).round().astype(np.uint8)
    for array in (eight_bit, wav.bfloat16(), wav.half()):
        assert (audio.load((array, 16000), 16000) - wav).abs().max() < 0.01
    assert torch.equal(audio.load(wav, 16000), wav)
    assert audio.load(Speech(wav, 16000), 24000).shape == (12000,)


@pytest.mark.parametrize("source", [None, 3, (torch.ones(9), 0), (torch.ones(9),), torch.ones(4, 9, 9)])
def test_load_refuses_what_is_not_speech(source):
    with pytest.raises(MetisError):
        audio.load(source, 16000)


def test_load_says_what_is_wrong_with_numbers():
    wav = tone(16000).numpy()
    for source, says in (
        ((16000, wav), "samples, rate"), ((wav, None), "samples, rate"), ((wav, float("nan")), "samples, rate"),
        (((wav * 32767).astype(np.int64), 16000), "not int64"),
        ((wav * 32767, 16000), "divide 16-bit numbers by 32768"),
    ):  # fmt: skip
        with pytest.raises(MetisError, match=says):
            audio.load(source, 16000)


def test_speech_shows_a_player_at_its_own_level(tmp_path):
    quiet = Speech(tone(24000, 1.0, level=0.01), 24000)
    page = quiet._repr_html_()
    data = base64.b64decode(re.search(r"base64,([^\"]+)\"", page)[1])
    heard, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 24000 and heard.std() == pytest.approx(quiet.wav.std().item(), rel=0.02)
    assert len(page) < 20_000
    assert quiet.seconds == 1.0 and len(quiet) == 24000
    assert np.asarray(quiet).shape == (24000,)
    assert quiet.save(tmp_path / "q.flac").is_file()


def test_players_exist_for_other_rates_and_escape_labels():
    assert "&lt;b&gt;" in audio.player(tone(22050), 22050, "<b>")


def test_what_cannot_be_told_or_opened_is_one_line(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(200))  # headerless: soundfile asks for a rate
    for path in (tmp_path / "x.raw", "a prompt, not a file. " * 20):
        with pytest.raises(MetisError, match="not audio that can be read") as caught:
            audio.read(path, 24_000)
        assert "\n" not in str(caught.value)


def test_silence_can_be_shown(tmp_path):
    from metis_lib import notebook

    audio.write(tmp_path / "silent.flac", np.zeros(24_000, np.float32), 24_000)
    with pytest.raises(MetisError, match="silent"):
        audio.read(tmp_path / "silent.flac", 24_000)
    assert "<audio" in notebook.player_html(tmp_path / "silent.flac")
    assert (notebook.log_mel(tmp_path / "silent.flac") == -80).all()
