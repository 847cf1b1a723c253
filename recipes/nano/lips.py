"""Measure the synthetic lips and draw their picture: writes ``results/data/lips.json`` and ``lips.png``.

    python -m recipes.nano.lips [--manifest PATH] [--out results/data]

Alignment is measured where the truth is known: espeak-ng in another voice, rate and pitch, and MBROLA (recorded
diphones of two people; Debian packages), which says phones of durations that are changed at random first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import assets
from metis_lib.data.align import Timed, align, speak
from metis_lib.data.lips import CLASS_OF, NAMES, VISEMES, FaceStyle, render, visemes
from metis_lib.data.store import read_jsonl, write_text
from metis_lib.evaluation import record
from metis_lib.tokenizers.text import PhoneTokenizer
from recipes.nano import packages

MBROLA = {
    "ɪ": "I", "ɛ": "E", "æ": "{", "ʌ": "V", "ɑː": "A", "ɔː": "O", "ɔ": "O", "ʊ": "U", "uː": "u", "u": "u", "iː": "i",
    "i": "i", "ə": "@", "ɚ": "r=", "ɜː": "r=", "eɪ": "EI", "aɪ": "AI", "oʊ": "@U", "aʊ": "aU", "ɔɪ": "OI",
    "ɑːɹ": "A r", "ɔːɹ": "O r", "oːɹ": "O r", "ɛɹ": "E r", "ɪɹ": "I r", "ʊɹ": "U r", "iə": "i @", "aɪɚ": "AI r=",
    "aɪə": "AI @", "p": "p", "t": "t", "k": "k", "b": "b", "d": "d", "ɡ": "g", "f": "f", "v": "v", "θ": "T",
    "ð": "D", "s": "s", "z": "z", "ʃ": "S", "ʒ": "Z", "tʃ": "tS", "dʒ": "dZ", "h": "h", "m": "m", "n": "n", "ŋ": "N",
    "l": "l", "ɹ": "r", "w": "w", "j": "j", "ɾ": "4", "tɹ": "t r", "dɹ": "d r", "ts": "t s", "dz": "d z", "r": "r",
}  # fmt: skip
"""Phones as MBROLA's American voices call them."""


def mbrola(phones: list[Timed], voice: str, random: np.random.Generator) -> tuple[np.ndarray, int, list[Timed]]:
    """Recorded diphones in a row: (wav [S], its rate, the phones with the times that were asked for)."""
    pace, pitch = random.uniform(0.8, 1.3), {"us1": 190, "us2": 110}[voice]
    lines, at, truth = ["_ 150"], 0.150, []
    for phone, before in zip(phones, [phones[0], *phones], strict=False):
        if phone.start - before.end > 0.05:
            pause = round(1000 * (phone.start - before.end) * random.uniform(0.5, 1.5))
            lines, at = [*lines, f"_ {pause}"], at + pause / 1000
        parts, start = MBROLA[phone.phone].split(), at
        length = max(25.0, 1000 * (phone.end - phone.start) * pace * np.exp(random.normal(0, 0.25)))
        for part in parts:
            lines.append(f"{part} {round(length / len(parts))} 50 {pitch * random.uniform(0.9, 1.1):.0f}")
            at += round(length / len(parts)) / 1000
        truth.append(Timed(phone.phone, start, at))
    program, data = (packages.fetch_deb(name, "bookworm") for name in ("mbrola", f"mbrola-{voice}"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.pho").write_text("\n".join([*lines, "_ 150", ""]))
        command = [f"{program}/usr/bin/mbrola", "-e", f"{data}/usr/share/mbrola/{voice}/{voice}", "a.pho", "a.wav"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        wav, rate = soundfile.read(Path(folder) / "a.wav", dtype="float32")
    return wav, rate, truth


def boundary_errors(found: list[Timed], truth: list[Timed]) -> np.ndarray:
    """Signed differences in ms of where phones begin."""
    assert [p.phone for p in found] == [p.phone for p in truth]
    return 1000 * np.array([a.start - b.start for a, b in zip(found, truth, strict=True)])


def summary(errors: list[np.ndarray]) -> dict[str, Any]:
    """Figures of signed errors in ms."""
    all_ = np.concatenate(errors)
    return {
        "sentences": len(errors), "phones": len(all_), "median_ms": round(float(np.median(abs(all_))), 1),
        "p90_ms": round(float(np.quantile(abs(all_), 0.9)), 1), "bias_ms": round(float(np.median(all_)), 1),
        "within_40_ms": round(float(np.mean(abs(all_) <= 40)), 3),
    }  # fmt: skip


def measure_alignment(texts: list[str]) -> dict[str, Any]:
    """Errors of where phones begin: two kinds of speech, warped and (to compare) stretched evenly."""
    random = np.random.default_rng(1)
    errors: dict[str, list[np.ndarray]] = {"espeak": [], "mbrola": [], "mbrola_stretched_evenly": []}
    seconds = spent = 0.0
    for number, text in enumerate(texts):
        _, phones = speak(text)
        other, truth = speak(text, voice="en-us+f3", rate=140, pitch=70)
        if [p.phone for p in truth] == [p.phone for p in phones]:
            errors["espeak"].append(boundary_errors(align(other, 16000, text), truth))
        wav, rate, truth = mbrola(phones, ("us1", "us2")[number % 2], random)
        began = time.perf_counter()
        found = align(wav, rate, text)
        seconds, spent = seconds + len(wav) / rate, spent + time.perf_counter() - began
        errors["mbrola"].append(boundary_errors(found, truth))
        ends = [np.array([p[0].start, p[-1].end]) for p in (phones, truth)]
        even = [Timed(p.phone, float(np.interp(p.start, ends[0], ends[1])), 0) for p in phones]
        errors["mbrola_stretched_evenly"].append(boundary_errors(even, truth))
    return {k: summary(v) for k, v in errors.items()} | {"real_time_factor": round(spent / seconds, 3)}


def oracle_phone_error(
    train_phones: Sequence[Sequence[str]], test_phones: Sequence[Sequence[str]], order: int = 2
) -> float:
    """How many phones of ``test_phones`` the best guess from their true classes gets wrong, as a part of all (0..1).

    One class a phone is given, so nothing is inserted or left out: more than any reader of the pictures has.  Word
    boundaries and punctuation are left out.  ``order`` 2 is a phone bigram model counted in ``train_phones``
    (Viterbi), 1 the commonest phone of each class.
    """
    spoken = [[[p for p in s if CLASS_OF.get(p) != 0] for s in part] for part in (train_phones, test_phones)]
    pairs = Counter((a, b) for s in spoken[0] for a, b in zip(["", *s], s, strict=False))
    single = Counter(p for s in spoken[0] for p in s)
    before = Counter(p for s in spoken[0] for p in ["", *s[:-1]])
    members = [phones.split() for phones in VISEMES.values()]
    total = sum(single.values()) + len(CLASS_OF)

    def score(a: str, b: str) -> float:
        alone = (single[b] + 1) / total
        return float(np.log(alone if order == 1 else (pairs[a, b] + 5 * alone) / (before[a] + 5)))

    wrong = count = 0
    for sentence in spoken[1]:
        best: dict[str, tuple[float, list[str]]] = {"": (0.0, [])}
        for number in visemes(sentence):
            best = {b: max((v + score(a, b), [*path, b]) for a, (v, path) in best.items()) for b in members[number]}
        guess = max(best.values())[1]
        wrong, count = wrong + sum(a != b for a, b in zip(guess, sentence, strict=True)), count + len(sentence)
    return wrong / max(count, 1)


def measure_oracle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Phone errors of the viseme oracle on sentences that training does not hold."""
    tokenizer = PhoneTokenizer()
    texts = {
        split: {r["text"] for r in rows if r["split"] == split and r["text"].strip()} for split in ("train", "test")
    }
    texts["test"] -= texts["train"]
    said = {split: [tokenizer.phones(text) for text in sorted(found)] for split, found in texts.items()}
    return {
        "phone_error_bigram": round(oracle_phone_error(said["train"], said["test"]), 4),
        "phone_error_unigram": round(oracle_phone_error(said["train"], said["test"], order=1), 4),
        "train_sentences": len(said["train"]), "test_sentences": len(said["test"]),
        "test_phones": sum(CLASS_OF.get(p) != 0 for s in said["test"] for p in s),
    }  # fmt: skip


def measure_speed(phones: list[Timed]) -> float:
    """Frames a second on one core: the best of five utterances, each with a new face."""
    import cv2

    cv2.setNumThreads(1)
    best = 0.0
    for seed in range(5):
        random = np.random.default_rng(seed)
        style, began = FaceStyle.sample(random), time.perf_counter()
        best = max(best, len(render(phones, 400, style, random)) / (time.perf_counter() - began))
    return round(best)


def draw(path: Path) -> None:
    """The contact sheet: the 14 classes, and several faces over time with the phones said."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = "My farm boats show how."
    _, phones = speak(text)
    frames = round(phones[-1].end * 25)
    shown = np.linspace(0, frames - 1, 14).astype(int)
    styles = [FaceStyle.sample(np.random.default_rng(seed)) for seed in (1, 29, 9, 12, 14)]
    figure, axes = plt.subplots(len(styles) + 1, 14, figsize=(14, 7.2), layout="constrained")
    for column, name in enumerate(NAMES):
        first = VISEMES[name].split()[0]
        video = render([Timed(first, 0.1, 0.7)] if column else [], 40, FaceStyle(), np.random.default_rng(0))
        axes[0, column].imshow(video[10], cmap="gray", vmin=0, vmax=255)
        axes[0, column].set_title(name, fontsize=8)
        axes[0, column].set_xlabel(textwrap.fill(VISEMES[name], 15), fontsize=6.5)
    for line, style in zip(axes[1:], styles, strict=True):
        video = render(phones, 2 * frames, style, np.random.default_rng(0))
        for axis, n in zip(line, shown, strict=True):
            axis.imshow(video[n], cmap="gray", vmin=0, vmax=255)
            now = (n + 0.5) / 25
            said = next((p.phone for p in phones if p.start <= now < p.end), "–")
            axis.set_xlabel(f"{said}   {now:.2f} s", fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        f"Synthetic lips: drawn faces, no person. Above: the 14 viseme classes. Below: “{text}”", fontsize=11
    )
    record.write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manifest", type=Path, default=assets.metis_home() / "corpora" / "nano" / "manifest.jsonl")
    parser.add_argument("--out", type=Path, default=Path("results/data"))
    parser.add_argument("--sentences", type=int, default=100, help="for the alignment")
    arguments = parser.parse_args()
    rows = read_jsonl(arguments.manifest)
    texts = sorted({r["text"] for r in rows if r["split"] == "test" and 20 <= len(r["text"]) <= 120})
    chosen = np.random.default_rng(1).permutation(len(texts))[: arguments.sentences]
    arguments.out.mkdir(parents=True, exist_ok=True)
    draw(arguments.out / "lips.png")
    result = {
        "command": "python -m recipes.nano.lips",
        "what": "synthetic lips: drawn from phone timings, no video of people",
        "viseme_classes": {name: phones.split() for name, phones in VISEMES.items()},
        "oracle": measure_oracle(rows),
        "alignment": measure_alignment([texts[i] for i in chosen]),
        "render_frames_per_second_per_core": measure_speed(speak("We were away a year ago, were we not?")[1]),
    }
    write_text(arguments.out / "lips.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
