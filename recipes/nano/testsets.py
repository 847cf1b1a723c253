"""The test sets of nano.

``human``, embedded in ``eval/testsets``: real voices only, none of them trained on (:func:`build_human`; noisy mixtures
may differ by one least significant bit between machines).  ``unseen``: 22 synthetic voices never trained on saying
sentences never trained on, with rows for every task.  ``seen``: voices of the training, sentences never trained on,
for tts.  ``tuning``: what ``unseen`` is, of the voices of the validation, for choosing settings.  All but the first are
made from the corpus into ``$METIS_HOME/testsets`` (:func:`build_synthetic`).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import assets, audio
from metis_lib.audio import level, trim
from metis_lib.config import AUDIO_RATE
from metis_lib.data.align import align
from metis_lib.data.lips import FaceStyle, render
from metis_lib.data.simulate import HOP, Degradation, Noises, Recording, Rooms, degrade
from metis_lib.data.store import Row, read_jsonl, read_manifest, write_jsonl
from metis_lib.errors import MetisError
from recipes.nano import corpus, human, packages, synthesis
from recipes.testsets import add_voice, simulated, storage

_RECIPE = json.loads(Path(__file__).with_name("human.json").read_text(encoding="utf-8"))
TERMS: dict[str, tuple[str, str, int]] = {key: tuple(values) for key, values in _RECIPE["terms"].items()}
"""Source, licence, bandwidth in Hz."""
TERMS["uqm"] = (human.UQM_SOURCE, human.UQM_LICENCE, 5500)
SPHINX: dict[str, tuple[str, str, str, str]] = {key: tuple(values) for key, values in _RECIPE["sphinx"].items()}
"""id: (file in the package, speaker, key of ``TERMS``, what is said)."""
CLEAN: list[str] = _RECIPE["clean"]
"""Items of the tasks codec and se."""
DEGRADED: list[tuple[float, str, bool]] = [tuple(values) for values in _RECIPE["degraded"]]
"""For each of ``CLEAN``: SNR in dB, noise, whether a room is added."""
SPOKEN: list[tuple[str, str]] = [tuple(values) for values in _RECIPE["spoken"]]
"""Items of the task tts, and targets of tse: (target, prompt) of one speaker."""
CONVERTED: list[tuple[str, str]] = [tuple(values) for values in _RECIPE["converted"]]
"""Items of the task vc: (source, prompt) of two speakers."""
MIXED: list[str] = _RECIPE["mixed"]
"""For each of ``SPOKEN``: who is heard besides, in the task tse."""
DRAWN: list[tuple[str, str, int]] = [tuple(values) for values in _RECIPE["drawn"]]
"""Items of the task l2s: (target, prompt) of one speaker, seed of face and camera."""
ROOM_SEED = 10_000
"""Rooms from here on are not in the training bank."""


def _voices() -> tuple[dict[str, tuple[str, str, np.ndarray, str]], list[Recording]]:
    """Every needed utterance (id: speaker, text, [S] at 24 kHz, key of ``TERMS``) and voices for babble."""
    utterances, babble = {}, []
    root = packages.fetch_deb("pocketsphinx-testdata", human.SUITE) / "usr/share/pocketsphinx/test/data"
    for id, (file, speaker, terms, text) in SPHINX.items():
        raw = {"samplerate": 16000, "channels": 1, "subtype": "PCM_16"} if file.endswith(".raw") else {}
        wav, rate = soundfile.read(root / file, dtype="float32", **raw)
        utterances[id] = (speaker, text, level(human.to_24k(trim(wav, rate), rate)), terms)
    archive, texts = human.uqm_files()
    for name in human.UQM_TEST:
        for count, (id, text, wav) in enumerate(human.uqm_sentences(archive, texts, name)):
            utterances[id] = (f"uqm-{name}", text, wav, "uqm")
            if count < 12:
                babble.append(Recording(f"uqm-{name}", wav))
    return utterances, babble


def build_human(out: str | os.PathLike[str]) -> Path:
    """Write audio (24 kHz FLAC, PCM 16) and ``manifest.jsonl`` of the test set into ``out``.

    Rows have id, task, speaker, text, clean, source, licence and bandwidth_hz; for se noisy, snr_db and done (what
    ``degrade`` did; ``noise_licence`` beside it); for tts prompt and prompt_text; for vc, tse and l2s see
    :func:`add_tasks`.

    Raises:
        MetisError: a package cannot be fetched.
    """
    out = Path(out)
    utterances, babble = _voices()
    sounds = corpus.ambient_recordings()
    terms = corpus.BLANKET_LICENCES | {"babble": human.UQM_LICENCE, "white": "none", "pink": "none"}
    store = storage(out)

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
        rir, direct, rt60 = corpus.simulate_room(ROOM_SEED + number)
        rooms = Rooms(rir[None], np.array([len(rir)]), np.array([direct]), np.array([rt60]))
        ambient = noise in corpus.NOISE_TEST
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
    return add_tasks(out)


def draw_lips(path: Path, wav: np.ndarray, text: str, generator: np.random.Generator, **style: Any) -> str:
    """Draw lips that say ``text`` in time with [S] at 24 kHz, as examples for training are drawn; the file's name.

    The .npz has ``crops``, uint8 [N, 96, 96] at 25 fps, one for two tokens.  ``style`` replaces what is drawn by lot.
    MetisError: the text is not what is said.
    """
    face = replace(FaceStyle.sample(generator), **style)
    crops = render(align(wav, AUDIO_RATE, text), -(-len(wav) // HOP), face, generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, crops=crops)
    return path.name


def add_tasks(out: Path) -> Path:
    """Rows for vc, tse and l2s behind the others in ``out/manifest.jsonl``, from its recordings alone.

    vc: prompt and prompt_text of another speaker, target_speaker.  tse: noisy (``tse/ID-mixture.flac``, the target
    with another speaker's recording added as it is), prompt of the target's speaker, interferer (the other's
    recording), interferer_speaker, interferer_licence, gain (below 1 only against clipping; then clean is
    ``tse/ID-aligned.flac``).  l2s: video (``lips/ID.npz``, drawn without camera noise), prompt of the same speaker.
    The same samples on every machine, but lips may differ by a grey level.
    """
    old = [row for row in read_jsonl(out / "manifest.jsonl") if row["task"] in ("codec", "se", "tts")]
    keys = ("speaker", "text", "clean", "source", "licence", "bandwidth_hz", "duration")
    said = {row["id"]: {key: row[key] for key in keys} for row in old if row["task"] != "se"}
    for row in old:
        if row["task"] == "tts":
            seconds = round(soundfile.info(out / row["prompt"]).duration, 3)
            other = {"text": row["prompt_text"], "clean": row["prompt"], "duration": seconds}
            said.setdefault(Path(row["prompt"]).stem, said[row["id"]] | other)

    def base(task: str, id: str, prompt: str) -> dict[str, Any]:
        given = {"prompt": said[prompt]["clean"], "prompt_text": said[prompt]["text"]}
        return {"id": id, "task": task, **said[id], **given}

    def wav(id: str) -> np.ndarray:
        return audio.read(out / said[id]["clean"], AUDIO_RATE).numpy()

    rows = [base("vc", id, prompt) | {"target_speaker": said[prompt]["speaker"]} for id, prompt in CONVERTED]
    for (id, prompt), besides in zip(SPOKEN, MIXED, strict=True):
        mixture, gain = add_voice(wav(id), wav(besides))
        row = base("tse", id, prompt) | {"noisy": f"tse/{id}-mixture.flac", "interferer": said[besides]["clean"]}
        row |= {f"interferer_{key}": said[besides][key] for key in ("speaker", "licence")} | {"gain": round(gain, 6)}
        audio.write(out / row["noisy"], mixture, AUDIO_RATE)
        if gain < 1:
            row["clean"] = f"tse/{id}-aligned.flac"
            audio.write(out / row["clean"], gain * wav(id), AUDIO_RATE)
        rows.append(row)
    for id, prompt, seed in DRAWN:
        generator = np.random.default_rng((2502, seed))
        name = draw_lips(out / "lips" / f"{id}.npz", wav(id), said[id]["text"], generator, noise=0.0)
        rows.append(base("l2s", id, prompt) | {"video": f"lips/{name}"})
    write_jsonl(out / "manifest.jsonl", old + rows)
    return out


def add_rooms(count: int, start: int = 100) -> Rooms:
    """``count`` simulated rooms that are not in the training bank."""
    return Rooms.stack([corpus.simulate_room(ROOM_SEED + start + i) for i in range(count)])


def build_synthetic(name: str, home: Path | None = None, *, each: int = 0, more: bool = False) -> Path:
    """Make ``unseen``, ``seen`` or ``tuning`` from the prepared corpus: ``each`` items a voice and task (0: 5, or 6).

    Where the corpus holds fewer of a voice, it says further held-out sentences (``more``; they lie in ``spoken``).

    Rows of ``unseen``: those of :func:`recipes.testsets.simulated`, with held-out noises and rooms; l2s (``video``:
    lips drawn in time with the recording).  ``tuning`` has the same of other voices, noises and rooms, and no l2s;
    ``seen`` has tts.

    Raises:
        MetisError: the corpus is not prepared, or holds no such voices.
    """
    home = home or assets.metis_home()
    folder, out = home / "corpora" / "nano", home / "testsets" / name
    split = {"unseen": "test", "seen": "seen", "tuning": "validation"}[name]
    voices, final = defaultdict[str, list[Row]](list), name == "unseen"
    each = each or (6 if name == "tuning" else 5)
    for r in read_manifest(folder / "manifest.jsonl"):
        if not r.human and r.split == split:
            voices[r.speaker].append(r)
    if more:
        wanted = {speaker: each + 1 - len(rows) for speaker, rows in voices.items()}
        known = {r.id for rows in voices.values() for r in rows}
        for r in synthesis.held_out(out / "spoken", split, wanted, known):
            voices[r.speaker].append(r)
    speakers = sorted(s for s, rows in voices.items() if len(rows) > each or (name == "seen" and len(rows) > 1))
    if not speakers:
        raise MetisError(f"the corpus in {folder} has no voices for the test set {name!r}; run `metis prepare nano`")
    others = speakers if len(speakers) > 1 else sorted(voices)  # of a small corpus, voices with few utterances too
    if name != "seen" and len(others) < 2:
        raise MetisError(f"the corpus in {folder} has one voice for the test set {name}; mixtures need another")
    rows: list[dict[str, Any]] = []
    for k, i, r, found in simulated(
        {s: sorted(said, key=lambda r: r.id) for s, said in voices.items()}, out, each=each, speakers=speakers,
        others=others, generator=np.random.default_rng(2025), about=lambda r: {"bandwidth_hz": AUDIO_RATE // 2},
        noises=None if name == "seen" else Noises.load(folder, split="test" if final else "train", speech=60),
        rooms=None if name == "seen" else add_rooms(24, 100 if final else 200),
    ):  # fmt: skip
        if final:
            wav = audio.read(r.audio, AUDIO_RATE).numpy()
            video = draw_lips(out / f"{r.id}.npz", wav, r.text, np.random.default_rng((2502, k, i)))
            found.append(found[0] | {"task": "l2s", "video": video})
        rows += found
    write_jsonl(out / "manifest.jsonl", sorted(rows, key=lambda r: r["task"]))
    return out
