"""Degraded speech as the paper makes it (arXiv 2502.03128 section 4.2.4), and the signal tools for it.

Waveforms here are numpy float32 ``[S]`` in [-1, 1]; chance comes from a seeded
``numpy.random.Generator``, so the same seed gives the same samples.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib.config import AUDIO_RATE, FRAME_RATE
from metis_lib.errors import MetisError

HOP = AUDIO_RATE // FRAME_RATE
"""Samples of a token at 24 kHz: prompts are whole tokens."""
TALK = 10
"""Seconds of a recording that babble is made of."""


def power(wav: np.ndarray) -> float:
    """Mean square of [S]."""
    return float(np.mean(np.square(wav, dtype=np.float64)))


def colour(length: int, slope: float, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise [S] whose power falls by f**-slope (0 white, 1 pink), RMS 1."""
    from scipy.fft import irfft, rfft  # float32 and awkward lengths: four times as fast as numpy's

    spectrum = rfft(generator.standard_normal(length).astype(np.float32))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (slope / 2)
    wav = irfft(spectrum, length)
    return (wav / np.sqrt(power(wav))).astype(np.float32)


def band_limit(wav: np.ndarray, rate: int, hz: float) -> np.ndarray:
    """Remove what lies above ``hz`` from [S] by resampling there and back; length and timing stay."""
    import soxr

    if 2 * hz >= rate:
        return wav
    narrow = soxr.resample(wav, rate, 2 * hz, quality="HQ")
    back = soxr.resample(narrow, 2 * hz, rate, quality="HQ")
    return np.pad(back, (0, max(len(wav) - len(back), 0)))[: len(wav)].astype(np.float32)


@dataclass(frozen=True)
class Recording:
    """A recording in memory: ``wav`` int16 or float32 [S]; ``name`` says what it is or who speaks."""

    name: str
    wav: np.ndarray

    def cut(self, length: int, generator: np.random.Generator) -> np.ndarray:
        """A random stretch of ``length`` samples, repeated where the recording is shorter."""
        wav = self.wav
        if len(wav) < length:
            wav = np.tile(wav, -(-length // len(wav)))
        start = int(generator.integers(len(wav) - length + 1))
        part = wav[start : start + length].astype(np.float32)
        return part / 32768 if self.wav.dtype == np.int16 else part


@dataclass(frozen=True)
class Noises:
    """What can be added to speech: ambient recordings, babble of other speakers, pink and white noise.

    ``weights`` are the odds of ambient, babble, pink, white; a kind without recordings is left out.
    """

    ambient: Sequence[Recording] = ()
    speech: Sequence[Recording] = ()
    weights: tuple[float, float, float, float] = (0.5, 0.25, 0.125, 0.125)
    talkers: tuple[int, int] = (3, 6)

    def sample(
        self, length: int, generator: np.random.Generator, *, kind: str | None = None, exclude: str | None = None
    ) -> tuple[np.ndarray, str]:
        """Noise [S] of any level and its name.

        Args:
            length: samples.
            generator: source of chance.
            kind: ``ambient``, ``babble``, ``pink`` or ``white``; None draws by ``weights``.
            exclude: a speaker who must not be heard in the babble.
        """
        odds = np.array(self.weights) * [bool(self.ambient), bool(self.speech), True, True]
        drawn = ("ambient", "babble", "pink", "white")[int(generator.choice(4, p=odds / odds.sum()))]
        kind = kind or drawn
        if kind == "ambient":
            chosen = self.ambient[int(generator.integers(len(self.ambient)))]
            return chosen.cut(length, generator), f"ambient:{chosen.name}"
        if kind == "babble":
            others = [s for s in self.speech if s.name != exclude]
            if not others:  # nobody else is there
                return colour(length, 1.0, generator), "pink"
            count = min(int(generator.integers(self.talkers[0], self.talkers[1] + 1)), len(others))
            who = generator.choice(len(others), count, replace=False)
            parts = [others[int(i)].cut(length, generator) for i in who]
            wav = np.stack([p / np.sqrt(power(p) + 1e-9) for p in parts]).sum(axis=0)
            return wav.astype(np.float32), f"babble:{count}"
        return colour(length, 1.0 if kind == "pink" else 0.0, generator), kind

    @classmethod
    def load(
        cls, corpus: str | os.PathLike[str], *, manifest: Path | None = None, split: str = "train", speech: int = 160,
        seed: int = 0,
    ) -> Noises:  # fmt: skip
        """The corpus's noise: ambient recordings of ``split`` and ``speech`` utterances for babble.

        Args:
            corpus: folder made by ``metis prepare nano``.
            manifest: of the utterances, if it is not the folder's ``manifest.jsonl``.
            split: recordings for training or those held out (``test``).
            speech: how many utterances of that split are kept in memory (about 0.25 MB each).
            seed: which ones.

        Raises:
            MetisError: the corpus is not there, or its noise is not as ``metis prepare corpus noise`` makes it.
        """
        from metis_lib.data.store import read_jsonl, read_manifest, read_span

        corpus = Path(corpus)
        listed = [r for r in read_jsonl(corpus / "noise.jsonl") if r.get("split") == split]
        if not listed:
            raise MetisError(f"{corpus}: no noise for {split!r}; run `metis prepare nano` first")
        ambient = [_noise(corpus, r) for r in listed]
        rows = [r for r in read_manifest(manifest or corpus / "manifest.jsonl") if r.split == split and r.duration >= 2]
        talk: list[Recording] = []
        for row in (rows[i] for i in np.random.default_rng(seed).permutation(len(rows))):
            if len(talk) == speech:
                break
            with suppress(MetisError):  # gone since, or silent
                wav = read_span(row).numpy()
                first = np.random.default_rng([seed, len(talk)]).integers(max(1, len(wav) - TALK * AUDIO_RATE))
                wav = wav[first : first + TALK * AUDIO_RATE]  # long ones, whole, would fill the memory
                talk.append(Recording(row.speaker, (wav * 32767).round().astype(np.int16)))
        return cls(ambient, talk)


def _noise(corpus: Path, row: dict[str, Any]) -> Recording:
    import soundfile

    try:
        wav, rate = soundfile.read(corpus / row["path"], dtype="int16")
        id = row["id"]
    except (KeyError, TypeError, OSError, RuntimeError) as error:
        raise MetisError(f"{corpus / 'noise.jsonl'}: {row.get('path') or row} cannot be used ({error})") from error
    if wav.ndim != 1 or rate != AUDIO_RATE or not len(wav):
        raise MetisError(f"{corpus / row['path']}: noise is one channel at 24 kHz; metis prepare corpus noise makes it")
    return Recording(id, wav)


@dataclass(frozen=True)
class Rooms:
    """A bank of room impulse responses: ``rirs`` [N, S], direct path of height 1 at sample ``direct`` [N]."""

    rirs: np.ndarray
    length: np.ndarray
    direct: np.ndarray
    rt60: np.ndarray

    @classmethod
    def load(cls, corpus: str | os.PathLike[str]) -> Rooms:
        """``rirs.safetensors`` of the corpus (24 kHz).

        Raises:
            MetisError: the file is not there, or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = Path(corpus) / "rirs.safetensors"
        if not path.is_file():
            raise MetisError(f"{path}: no room impulse responses; run `metis prepare nano` first")
        try:
            return cls(**load_file(path))
        except (SafetensorError, OSError, TypeError) as error:
            raise MetisError(f"{path} is damaged or holds no rooms ({error}); metis prepare corpus rirs") from error

    @classmethod
    def stack(cls, rooms: Sequence[tuple[np.ndarray, int, float]]) -> Rooms:
        """A bank of (impulse response [S], sample of the direct path, RT60 in s); float16, padded by zeros."""
        bank = np.zeros((len(rooms), max(len(rir) for rir, _, _ in rooms)), dtype=np.float16)
        for line, (rir, _, _) in zip(bank, rooms, strict=True):
            line[: len(rir)] = rir
        lengths, direct = (
            np.array(n, dtype=np.int32) for n in ([len(r) for r, _, _ in rooms], [d for _, d, _ in rooms])
        )
        return cls(bank, lengths, direct, np.array([t for _, _, t in rooms], dtype=np.float32))

    def save(self, corpus: Path) -> None:
        """Write ``rirs.safetensors``: rirs [N, S], length [N], direct [N] in samples, rt60 [N] in s."""
        from safetensors.numpy import save_file

        corpus.mkdir(parents=True, exist_ok=True)
        beside = corpus / f".rirs.{os.getpid()}"
        save_file(vars(self), beside)
        os.replace(beside, corpus / "rirs.safetensors")

    def apply(self, wav: np.ndarray, room: int) -> np.ndarray:
        """[S] as heard in room number ``room``, the direct path where it was; same length."""
        from scipy.signal import fftconvolve

        rir = self.rirs[room, : self.length[room]].astype(np.float32)
        start = int(self.direct[room])
        return fftconvolve(wav, rir)[start : start + len(wav)].astype(np.float32)


@dataclass(frozen=True)
class Degradation:
    """Odds and ranges of :func:`degrade`; the defaults are the paper's (section 4.2.4).

    Attributes:
        noise_p, snr_db: probability of noise; range of the signal-to-noise ratio in dB.
        reverb_p: probability of a room.
        band_p, band_hz: probability of a band limit; the bandwidths in Hz (the paper does not say
            whether bandwidth or sample rate is meant: here bandwidth).
        clip_p, clip_db: probability of clipping (not in the paper); range of dB below the peak.
    """

    noise_p: float = 0.9
    snr_db: tuple[float, float] = (-5.0, 20.0)
    reverb_p: float = 0.35
    band_p: float = 0.25
    band_hz: tuple[int, ...] = (2000, 4000, 8000)
    clip_p: float = 0.0
    clip_db: tuple[float, float] = (3.0, 15.0)


@dataclass(frozen=True)
class Prompt:
    """A random prefix: its probability, and the fraction of the utterance that it takes (uniform; range ours)."""

    p: float = 1.0
    fraction: tuple[float, float] = (0.2, 0.5)

    def draw(self, samples: int, generator: np.random.Generator) -> int:
        """Samples: whole tokens, at least one, and one is left to be said; or 0."""
        kept, share = generator.random() < self.p, generator.uniform(*self.fraction)
        if samples < 2 * HOP:
            raise MetisError(f"{samples} samples are too short for a prompt; {2 * HOP} are needed")
        return HOP * int(np.clip(round(share * samples / HOP), 1, samples // HOP - 1)) if kept else 0


@dataclass(frozen=True)
class Extraction:
    """Target speaker extraction as published (section 4.2.3): one other speaker, waveforms added as they are.

    Options: ``snr_db``, a range in dB of target to each other speaker over the mixed part; ``third_p``, the
    probability of a third speaker; ``degradation``, noise, rooms and band limits on the mixture.
    """

    prompt: Prompt = Prompt()
    snr_db: tuple[float, float] | None = None
    third_p: float = 0.0
    degradation: Degradation | None = None


def degrade(
    wav: np.ndarray, rate: int, *, noises: Noises, generator: np.random.Generator, params: Degradation = Degradation(),
    rooms: Rooms | None = None, speaker: str | None = None, noise_kind: str | None = None,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:  # fmt: skip
    """Degrade clean speech: room, then noise, then clipping, then band limit.

    Args:
        wav: clean speech [S] (array or CPU tensor), float.
        rate: its sample rate in Hz (rooms: the rate of the bank).
        noises: what noise there is.
        generator: source of chance.
        params: odds and ranges.
        rooms: impulse responses; None: never a room.
        speaker: who speaks, so that babble is of others.
        noise_kind: one kind of noise instead of a drawn one.

    Returns:
        (degraded [S], target [S], what was done).  The target is the clean speech at the time and level of
        the direct path; both share one gain, below 1 only where the sum would pass 0.99.  ``what was
        done`` has ``room`` (number or None), ``rt60`` (s), ``noise`` (name or None), ``snr_db`` (over the
        whole utterance, reverberant speech against noise, before clipping and band limit), ``clip_db``,
        ``band_hz`` and ``gain``.

    Raises:
        MetisError: empty or silent speech.
    """
    clean: np.ndarray = np.asarray(wav, dtype=np.float32)
    if clean.ndim != 1 or not len(clean) or not np.abs(clean).max() > 0:
        raise MetisError("only one channel of speech that is not silent can be degraded")
    # every draw is made, used or not, so that one choice does not shift the next
    noisy_u, reverb_u, band_u, clip_u = generator.random(4)
    snr = float(generator.uniform(*params.snr_db))
    room = int(generator.integers(len(rooms.length))) if rooms is not None else 0
    band = int(generator.choice(params.band_hz))
    below = float(generator.uniform(*params.clip_db))
    done: dict[str, Any] = dict.fromkeys(("room", "rt60", "noise", "snr_db", "clip_db", "band_hz"))
    out: np.ndarray = clean
    if rooms is not None and reverb_u < params.reverb_p:
        out = rooms.apply(clean, room)
        done.update(room=room, rt60=round(float(rooms.rt60[room]), 3))
    if noisy_u < params.noise_p:
        noise, name = noises.sample(len(clean), generator, kind=noise_kind, exclude=speaker)
        if power(noise) < 1e-9:  # a pause in the recording
            noise, name = colour(len(clean), 1.0, generator), "pink"
        out = out + (noise * np.sqrt(power(out) / power(noise) / 10 ** (snr / 10))).astype(np.float32)
        done.update(noise=name, snr_db=round(snr, 3))
    if clip_u < params.clip_p:
        limit = np.abs(out).max() * 10 ** (-below / 20)
        out = np.clip(out, -limit, limit)
        done["clip_db"] = round(below, 3)
    if band_u < params.band_p:
        out = band_limit(out, rate, band)
        done["band_hz"] = band
    gain = min(1.0, 0.99 / max(float(np.abs(out).max()), float(np.abs(clean).max())))
    done["gain"] = round(gain, 6)
    return (out * gain).astype(np.float32), (clean * gain).astype(np.float32), done
