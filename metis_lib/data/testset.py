"""The embedded test set ``eval/testsets/human``: real voices only, none of them trained on.

``build_human_testset`` makes it again from the packages (mixtures may differ by one least significant bit
between machines).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import assets, audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data import corpora
from metis_lib.data.simulate import Degradation, Noises, Recording, Rooms, degrade, level, trim
from metis_lib.data.store import write_jsonl

_RECIPE = json.loads(Path(__file__).with_name("human.json").read_text(encoding="utf-8"))
TERMS: dict[str, tuple[str, str, int]] = {key: tuple(values) for key, values in _RECIPE["terms"].items()}
"""Source, licence, bandwidth in Hz."""
TERMS["uqm"] = (corpora.UQM_SOURCE, corpora.UQM_LICENCE, 5500)
SPHINX: dict[str, tuple[str, str, str, str]] = {key: tuple(values) for key, values in _RECIPE["sphinx"].items()}
"""id: (file in the package, speaker, key of ``TERMS``, what is said)."""
CLEAN: list[str] = _RECIPE["clean"]
"""Items of the tasks codec and se."""
DEGRADED: list[tuple[float, str, bool]] = [tuple(values) for values in _RECIPE["degraded"]]
"""For each of ``CLEAN``: SNR in dB, noise, whether a room is added."""
SPOKEN: list[tuple[str, str]] = [tuple(values) for values in _RECIPE["spoken"]]
"""Items of the task tts: (target, prompt) of one speaker."""
ROOM_SEED = 10_000
"""Rooms from here on are not in the training bank."""


def _voices() -> tuple[dict[str, tuple[str, str, np.ndarray, str]], list[Recording]]:
    """Every needed utterance (id: speaker, text, [S] at 24 kHz, key of ``TERMS``) and voices for babble."""
    utterances, babble = {}, []
    root = assets.fetch_deb("pocketsphinx-testdata", corpora.SUITE) / "usr/share/pocketsphinx/test/data"
    for id, (file, speaker, terms, text) in SPHINX.items():
        raw = {"samplerate": 16000, "channels": 1, "subtype": "PCM_16"} if file.endswith(".raw") else {}
        wav, rate = soundfile.read(root / file, dtype="float32", **raw)
        utterances[id] = (speaker, text, level(corpora.to_24k(trim(wav, rate), rate)), terms)
    archive, texts = corpora.uqm_files()
    for name in corpora.UQM_TEST:
        for count, (id, text, wav) in enumerate(corpora.uqm_sentences(archive, texts, name)):
            utterances[id] = (f"uqm-{name}", text, wav, "uqm")
            if count < 12:
                babble.append(Recording(f"uqm-{name}", wav))
    return utterances, babble


def build_human_testset(out: str | os.PathLike[str]) -> Path:
    """Write audio (24 kHz FLAC, PCM 16) and ``manifest.jsonl`` of the test set into ``out``.

    Rows have id, task (codec, se, tts), speaker, text, clean, source, licence and bandwidth_hz; for se
    noisy, snr_db and done (what ``degrade`` did; ``noise_licence`` beside it); for tts prompt and
    prompt_text.

    Raises:
        MetisError: a package cannot be fetched.
    """
    out = Path(out)
    utterances, babble = _voices()
    sounds = corpora.ambient_recordings()
    terms = corpora.BLANKET_LICENCES | {"babble": corpora.UQM_LICENCE, "white": "none", "pink": "none"}
    written: dict[str, str] = {}

    def store(id: str, wav: np.ndarray) -> str:
        if id not in written:
            written[id] = f"{id}.flac"
            audio.write(out / written[id], wav, AUDIO_RATE)
        return written[id]

    def base(task: str, id: str) -> dict[str, Any]:
        speaker, text, wav, key = utterances[id]
        source, licence, bandwidth = TERMS[key]
        return {
            "id": id, "task": task, "speaker": speaker, "text": text, "clean": store(id, wav),
            "source": source, "licence": licence, "bandwidth_hz": bandwidth,
            "duration": round(len(wav) / AUDIO_RATE, 3),
        }  # fmt: skip

    rows = [base("codec", id) for id in CLEAN]
    for number, (id, (snr, noise, reverberant)) in enumerate(zip(CLEAN, DEGRADED, strict=True)):
        speaker, _, wav, _ = utterances[id]
        rir, direct, rt60 = corpora.simulate_room(ROOM_SEED + number)
        rooms = Rooms(rir[None], np.array([len(rir)]), np.array([direct]), np.array([rt60]))
        ambient = noise in corpora.NOISE_TEST
        noises = Noises([Recording(noise, sounds[noise])] if ambient else [], babble)
        noisy, clean, done = degrade(
            wav, AUDIO_RATE, noises=noises, generator=np.random.default_rng((2502, number)), rooms=rooms,
            params=Degradation(noise_p=1, snr_db=(snr, snr), reverb_p=float(reverberant), band_p=0),
            speaker=speaker, noise_kind="ambient" if ambient else noise,
        )  # fmt: skip
        row = base("se", id)
        if done["gain"] != 1:
            row["clean"] = store(f"{id}-aligned", clean)
        row |= {"noisy": store(f"{id}-noisy", noisy), "snr_db": snr, "done": done, "noise_licence": terms[noise]}
        rows.append(row)
    for id, prompt in SPOKEN:
        _, text, wav, _ = utterances[prompt]
        rows.append(base("tts", id) | {"prompt": store(prompt, wav), "prompt_text": text})
    write_jsonl(out / "manifest.jsonl", rows)
    return out
