"""The embedded test set ``eval/testsets/human``: real voices only, none of them trained on.

``build_human_testset`` makes it again from the packages, the same bytes every time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib import assets
from metis_lib.config import AUDIO_RATE
from metis_lib.data import corpora, manifest
from metis_lib.data.simulate import Degradation, Noises, Recording, Rooms, degrade, level, trim

LIBRIVOX = (
    "LibriVox reading of Sense and Sensibility, chapter 1; Debian package pocketsphinx-testdata",
    "public domain (LibriVox)",
    8000,
)
CMU = (
    "CMU PocketSphinx test recording; Debian package pocketsphinx-testdata",
    "BSD-2-Clause (CMU Sphinx)",
    8000,
)
UQM = (corpora.UQM_SOURCE, corpora.UQM_LICENCE, 5500)

SPHINX: dict[str, tuple[str, str, tuple[str, str, int], str]] = {
    "librivox-0870": (
        "librivox/sense_and_sensibility_01_austen_64kb-0870.wav", "librivox-sense", LIBRIVOX,
        "And Mister John Dashwood had then leisure to consider how much there might be prudently in his "
        "power to do for them.",
    ),
    "librivox-0880": (
        "librivox/sense_and_sensibility_01_austen_64kb-0880.wav", "librivox-sense", LIBRIVOX,
        "He was not an ill-disposed young man,",
    ),
    "librivox-0890": (
        "librivox/sense_and_sensibility_01_austen_64kb-0890.wav", "librivox-sense", LIBRIVOX,
        "unless to be rather cold hearted and rather selfish is to be ill-disposed.",
    ),
    "librivox-0920": (
        "librivox/sense_and_sensibility_01_austen_64kb-0920.wav", "librivox-sense", LIBRIVOX,
        "Had he married a more amiable woman, he might have been made still more respectable than he was.",
    ),
    "librivox-0930": (
        "librivox/sense_and_sensibility_01_austen_64kb-0930.wav", "librivox-sense", LIBRIVOX,
        "He might even have been made amiable himself.",
    ),
    "cmu-forward": ("goforward.raw", "cmu-speaker", CMU, "Go forward ten meters."),
    "cmu-something": ("something.raw", "cmu-speaker", CMU, "Go somewhere and do something."),
    "cmu-cards": ("cards/005.wav", "cmu-cards", CMU, "Eight of spades, four of clubs, seven of hearts."),
}  # fmt: skip
"""id: (file in the package, speaker, (source, licence, bandwidth in Hz), what is said)."""

CLEAN = (
    "librivox-0870", "librivox-0890", "librivox-0920", "cmu-something", "cmu-cards", "uqm-urquan-041-05",
    "uqm-urquan-016-01", "uqm-syreen-052-00", "uqm-syreen-029-00", "uqm-slylandro-004-04",
    "uqm-slylandro-013-00", "uqm-utwig-044-04",
)  # fmt: skip
"""Items of the tasks codec and se."""

DEGRADED: tuple[tuple[float, str, bool], ...] = (
    (5.0, "coffee-shop", False), (10.0, "babble", False), (0.0, "train", False), (7.5, "coffee-shop", True),
    (12.5, "white", False), (2.5, "stream", False), (15.0, "babble", True), (5.0, "babble", False),
    (10.0, "train", True), (0.0, "coffee-shop", False), (7.5, "pink", False), (12.5, "stream", True),
)  # fmt: skip
"""For each of ``CLEAN``: SNR in dB, noise, whether a room is added."""

SPOKEN = (
    ("librivox-0870", "librivox-0880"), ("librivox-0890", "librivox-0930"),
    ("librivox-0920", "librivox-0930"), ("cmu-something", "cmu-forward"),
    ("uqm-urquan-041-05", "uqm-urquan-005-01"),
    ("uqm-urquan-016-01", "uqm-urquan-028-02"), ("uqm-syreen-052-00", "uqm-syreen-021-01"),
    ("uqm-syreen-029-00", "uqm-syreen-004-00"), ("uqm-slylandro-004-04", "uqm-slylandro-039-00"),
    ("uqm-slylandro-013-00", "uqm-slylandro-041-00"), ("uqm-utwig-044-04", "uqm-utwig-032-14"),
    ("uqm-utwig-051-07", "uqm-utwig-041-09"),
)  # fmt: skip
"""Items of the task tts: (target, prompt) of one speaker."""

ROOM_SEED = 10_000
"""Rooms from here on are not in the training bank."""


def _voices() -> tuple[dict[str, tuple[str, str, np.ndarray, tuple[str, str, int]]], list[Recording]]:
    """Every needed utterance (id: speaker, text, [S] at 24 kHz, terms) and voices for babble."""
    import soundfile
    import torch

    from metis_lib import audio

    utterances = {}
    root = assets.fetch_deb("pocketsphinx-testdata", corpora.SUITE) / "usr/share/pocketsphinx/test/data"
    for id, (file, speaker, terms, text) in SPHINX.items():
        raw = {"samplerate": 16000, "channels": 1, "subtype": "PCM_16"} if file.endswith(".raw") else {}
        wav, rate = soundfile.read(root / file, dtype="float32", **raw)
        wav = audio.resample(torch.from_numpy(trim(wav, rate)), rate, AUDIO_RATE).numpy()
        utterances[id] = (speaker, text, level(wav), terms)
    archive, texts = corpora.uqm_files()
    babble = []
    for name in corpora.UQM_TEST:
        for count, (id, text, wav) in enumerate(corpora.uqm_sentences(archive, texts, name)):
            utterances[id] = (f"uqm-{name}", text, wav, UQM)
            if count < 12:
                babble.append(Recording(f"uqm-{name}", wav))
    return utterances, babble


def _ambient() -> dict[str, Recording]:
    """Held-out ambient recordings at 24 kHz by name."""
    wavs = corpora.ambient_recordings()
    return {name: Recording(name, wavs[name]) for name in corpora.NOISE_TEST}


def build_human_testset(out: str | os.PathLike[str]) -> Path:
    """Write audio (24 kHz FLAC, PCM 16) and ``manifest.jsonl`` of the test set into ``out``.

    Rows have id, task (codec, se, tts), speaker, text, clean, source, licence and bandwidth_hz; for se
    noisy, snr_db and done (what ``degrade`` did; ``noise_licence`` beside it); for tts prompt and
    prompt_text.

    Raises:
        MetisError: a package cannot be fetched.
    """
    from metis_lib import audio

    out = Path(out)
    utterances, babble = _voices()
    ambient = _ambient()
    written: dict[str, str] = {}

    def store(id: str, wav: np.ndarray) -> str:
        if id not in written:
            written[id] = f"{id}.flac"
            audio.write(out / written[id], wav, AUDIO_RATE)
        return written[id]

    def base(task: str, id: str) -> dict[str, Any]:
        speaker, text, wav, (source, licence, bandwidth) = utterances[id]
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
        noises = Noises([ambient[noise]] if noise in ambient else [], babble)
        noisy, clean, done = degrade(
            wav, AUDIO_RATE, noises=noises, generator=np.random.default_rng((2502, number)), rooms=rooms,
            params=Degradation(noise_p=1, snr_db=(snr, snr), reverb_p=float(reverberant), band_p=0),
            speaker=speaker, noise_kind="ambient" if noise in ambient else noise,
        )  # fmt: skip
        row = base("se", id)
        if done["gain"] != 1:
            row["clean"] = store(f"{id}-aligned", clean)
        terms = corpora.BLANKET_LICENCES | {"babble": corpora.UQM_LICENCE, "white": "none", "pink": "none"}
        row |= {
            "noisy": store(f"{id}-noisy", noisy),
            "snr_db": snr,
            "done": done,
            "noise_licence": terms[noise],
        }
        rows.append(row)
    for id, prompt in SPOKEN:
        _, text, wav, _ = utterances[prompt]
        rows.append(base("tts", id) | {"prompt": store(prompt, wav), "prompt_text": text})
    manifest.write_jsonl(out / "manifest.jsonl", rows)
    return out
