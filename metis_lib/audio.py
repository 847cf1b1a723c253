"""The only door for waveforms: read, check, resample, write, play.

Waveforms are float32 tensors ``[S]``, mono, in [-1, 1]; the sample rate is in Hz and always named.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from metis_lib.errors import MetisError

LEVEL_DB = -23.0
"""RMS level in dBFS that every utterance of the corpus is brought to."""
SILENT_DB = -75.0
"""RMS level in dBFS below which there is nothing to hear: a muted recording still has its dither, or an offset."""
LOUDEST = 100.0
"""Peak above which samples cannot be meant to lie in [-1, 1]: integers stored as floats."""
FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS")}


@dataclass
class Speech:
    """A waveform with its rate: ``wav`` float32 ``[S]`` in [-1, 1], ``info`` how it came about.

    In a notebook it shows a player; the level is never normalised.
    """

    wav: Tensor
    sample_rate: int
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.wav.shape[-1] / self.sample_rate

    def save(self, path: str | Path) -> Path:
        """Write to ``path`` (wav, flac or ogg by suffix)."""
        write(path, self.wav, self.sample_rate)
        return Path(path)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.wav.detach().cpu().numpy()
        return array.astype(dtype) if dtype is not None else (array.copy() if copy else array)

    def __len__(self) -> int:
        return int(self.wav.shape[-1])

    def __repr__(self) -> str:
        return f"Speech({self.seconds:.2f} s at {self.sample_rate} Hz)"

    def _repr_html_(self) -> str:
        return player(self.wav, self.sample_rate)


Source: TypeAlias = "str | Path | Speech | Tensor | tuple[Any, int]"


def _resample_array(data: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    import soxr

    return data if from_rate == to_rate else soxr.resample(data, from_rate, to_rate, quality="HQ")


def _finish(
    data: np.ndarray, rate: int, sample_rate: int, name: str, min_seconds: float, max_seconds: float | None,
    silence: bool,
) -> Tensor:  # fmt: skip
    """``[S]`` or ``[S, channels]`` at ``rate``, checked, as float32 ``[S]`` at ``sample_rate``."""
    if data.ndim == 2:
        data = data.mean(axis=1)
    if data.ndim != 1:
        raise MetisError(f"{name}: expected one waveform, got an array of shape {tuple(data.shape)}")
    data = np.ascontiguousarray(data, dtype=np.float32)
    if data.size == 0:
        raise MetisError(f"{name}: the recording is empty")
    if not np.isfinite(data).all():
        raise MetisError(f"{name}: the recording holds NaN or infinite samples")
    if not silence and not np.any(data):
        raise MetisError(f"{name}: the recording is silent (every sample is zero)")
    if (peak := float(np.abs(data).max())) > LOUDEST:
        raise MetisError(f"{name}: samples lie in -1..1, not at {peak:.3g}; divide 16-bit numbers by 32768")
    seconds = data.size / rate
    if seconds < min_seconds:
        raise MetisError(f"{name}: {seconds:.2f} s is too short; at least {min_seconds:g} s are needed")
    if max_seconds is not None and seconds > max_seconds:
        raise MetisError(f"{name}: {seconds:.1f} s is too long; at most {max_seconds:g} s, cut it first")
    return torch.from_numpy(np.clip(_resample_array(data, rate, sample_rate), -1.0, 1.0).astype(np.float32))


def read(
    path: str | Path, sample_rate: int, *, min_seconds: float = 0.0, max_seconds: float | None = None,
    silence: bool = False,
) -> Tensor:  # fmt: skip
    """Read an audio file as ``[S]`` at ``sample_rate`` Hz: channels averaged, soxr HQ resampling.

    Raises:
        MetisError: missing, empty, unreadable, NaN, all zero (unless ``silence`` is welcome), too short or too long (in
            one line).
    """
    import soundfile

    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise MetisError(f"{path} is a folder, not a recording")
        if not path.is_file():
            raise MetisError(f"no recording at {path}")
        if path.stat().st_size == 0:
            raise MetisError(f"{path}: the file is empty")
        data, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError) as error:  # a name too long; headerless audio
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0].rsplit(": ", 1)[-1]
        raise MetisError(f"{path} is not audio that can be read ({reason})") from error
    return _finish(data, rate, sample_rate, str(path), min_seconds, max_seconds, silence)


def load(
    source: Source, sample_rate: int, *, min_seconds: float = 0.0, max_seconds: float | None = None,
    silence: bool = False,
) -> Tensor:  # fmt: skip
    """Any source of speech as ``[S]`` at ``sample_rate`` Hz, with the checks of :func:`read`.

    ``source`` is a path, a :class:`Speech`, ``(array, rate)`` or a tensor already at ``sample_rate``;
    arrays are ``[S]``, ``[1, S]`` or, from numpy readers, ``[S, channels]``, of floats in [-1, 1] or of uint8, int16 or
    int32.
    """
    if isinstance(source, (str, Path)):
        return read(source, sample_rate, min_seconds=min_seconds, max_seconds=max_seconds, silence=silence)
    if isinstance(source, Speech):
        values, rate = source.wav, source.sample_rate
    elif isinstance(source, tuple) and len(source) == 2:
        values, rate = source
        if not isinstance(rate, Real) or not math.isfinite(rate):
            raise MetisError("give (samples, rate), the sample rate a number of Hz")
        rate = int(float(rate))
    elif isinstance(source, (Tensor, np.ndarray)):
        values, rate = source, sample_rate
    else:
        raise MetisError(f"cannot read speech from a {type(source).__name__}; give a path or (samples, rate)")
    if rate <= 0:
        raise MetisError(f"the sample rate is a positive number of Hz, got {rate}")
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    data = np.asarray(values)
    if data.dtype == np.uint8:  # 8-bit WAV lies around 128
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype in (np.int16, np.int32):
        data = data.astype(np.float32) / float(np.iinfo(data.dtype).max)
    elif data.dtype.kind != "f":
        raise MetisError(f"samples are floats in -1..1, uint8, int16 or int32, not {data.dtype}")
    if data.ndim == 2 and data.shape[0] <= 2 < data.shape[1]:
        data = data.T
    return _finish(data, rate, sample_rate, "recording", min_seconds, max_seconds, silence)


def resample(wav: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Resample ``[..., S]`` from ``from_rate`` to ``to_rate`` Hz (soxr HQ); device and dtype are kept."""
    if from_rate == to_rate:
        return wav
    flat = wav.detach().reshape(-1, wav.shape[-1]).to("cpu", torch.float32).numpy()
    rows = [torch.from_numpy(_resample_array(row, from_rate, to_rate)) for row in flat]
    return torch.stack(rows).reshape(*wav.shape[:-1], -1).to(wav.device, wav.dtype)


def _samples(wav: Tensor | np.ndarray) -> np.ndarray:
    data = wav.detach().cpu().float().numpy() if isinstance(wav, Tensor) else np.asarray(wav, dtype=np.float32)
    data = np.atleast_1d(data.squeeze())
    if data.ndim != 1:
        raise MetisError(f"a waveform has the shape [S], got {tuple(data.shape)}")
    if not np.isfinite(data).all():
        raise MetisError("the waveform holds NaN or infinite samples; nothing was written")
    return np.clip(data, -1.0, 1.0)


def write(path: str | Path, wav: Tensor | np.ndarray, sample_rate: int) -> None:
    """Write ``[S]`` as wav, flac (16 bit) or ogg (Vorbis) by suffix, clipped to [-1, 1].

    The file is written beside and renamed; it is never seen half done.

    Raises:
        MetisError: unknown suffix, a folder that cannot be written, wrong shape or NaN samples.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise MetisError(f"cannot write {path.name!r}: the name must end in {', '.join(FORMATS)}")
    kind, subtype = FORMATS[path.suffix.lower()]
    data = _samples(wav)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_blocks(str(temporary), data, sample_rate, kind, subtype)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise MetisError(f"cannot write {path} ({str(error).splitlines()[0]})") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def _write_blocks(target: Any, data: np.ndarray, sample_rate: int, kind: str, subtype: str) -> None:
    """Write second by second: libsndfile's Vorbis encoder crashes on blocks of minutes."""
    import soundfile

    with soundfile.SoundFile(target, "w", sample_rate, 1, subtype, format=kind) as file:
        for start in range(0, len(data), sample_rate):
            file.write(data[start : start + sample_rate])


def player(wav: Tensor | np.ndarray, sample_rate: int, label: str = "") -> str:
    """HTML with an ``<audio>`` element that holds ``[S]`` itself, at its own level (never normalised).

    Opus in Ogg, about 5 kB a second of speech; of another rate than Opus knows it becomes 24 kHz.
    """
    buffer, data = io.BytesIO(), _samples(wav)
    if sample_rate not in (8000, 12_000, 16_000, 24_000, 48_000):
        data, sample_rate = np.clip(_resample_array(data, sample_rate, 24_000), -1, 1), 24_000
    _write_blocks(buffer, data, sample_rate, "OGG", "OPUS")
    held = base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = f"<span>{html.escape(label)}</span> " if label else ""
    return f'{caption}<audio controls preload="metadata" src="data:audio/ogg;base64,{held}"></audio>'


# ---------------------------------------------------------------- level and silence


def level(wav: np.ndarray, level_db: float = LEVEL_DB, peak: float = 0.97) -> np.ndarray:
    """Scale [S] to an RMS of ``level_db`` dBFS, or less where the peak would pass ``peak``."""
    rms = float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)))) + 1e-12
    top = float(np.max(np.abs(wav))) + 1e-12
    return (wav * min(10 ** (level_db / 20) / rms, peak / top)).astype(np.float32)


def frame_db(wav: np.ndarray, rate: int, seconds: float = 0.01) -> np.ndarray:
    """Level in dB of every ``seconds`` long frame of an array [S]."""
    n = max(int(rate * seconds), 1)
    frames = np.pad(wav, (0, -len(wav) % n)).reshape(-1, n).astype(np.float64)
    return 10 * np.log10(np.mean(frames**2, axis=1) + 1e-10)


def trim(wav: np.ndarray, rate: int, *, below_db: float = 38.0, keep: float = 0.08) -> np.ndarray:
    """Cut silence at both ends of [S], all frames ``below_db`` under the loudest, but ``keep`` seconds."""
    db = frame_db(wav, rate)
    loud = np.flatnonzero(db > db.max() - below_db)
    first, last = loud[0] / 100 - keep, (loud[-1] + 1) / 100 + keep
    out = wav[max(int(first * rate), 0) : int(last * rate)].copy()
    fade = min(int(0.005 * rate), len(out) // 2)
    ramp = np.linspace(0, 1, fade, dtype=out.dtype)
    out[:fade] *= ramp
    out[len(out) - fade :] *= ramp[::-1]
    return out
