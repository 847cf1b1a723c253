"""Do the recordings say their texts?  Whisper's verdict on a corpus, utterance by utterance.

Whisper hears 30 seconds for the price of one word, so consecutive utterances of one speaker are heard together and
the errors are given back to the utterances whose words they fall on; what looks bad is heard again alone.

``python -m recipes.nano.asr`` listens to all human recordings of the nano corpus and writes ``human_asr.csv`` beside
this file, which :mod:`recipes.nano.corpus` reads; it goes on where it stopped.  ``python -m recipes.nano.asr voices``
listens to 3 % of what each synthetic voice says and writes ``synthetic_asr.json`` beside the corpus' manifest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from metis_lib import audio
from metis_lib.config import SSL_RATE
from metis_lib.data.store import Row, parse_row, read_jsonl, read_manifest, write_text

VERDICTS = Path(__file__).with_name("human_asr.csv")
BAD = 0.4
"""Word error rate above which an utterance is left out of the corpus."""
WINDOW, PAUSE = 27.0, 0.4
"""Seconds heard at once; seconds of silence between utterances."""


def key(id: str, text: str) -> str:
    """Twelve hexadecimal digits that name an utterance and its text."""
    return hashlib.sha256(f"{id}\t{text}".encode()).hexdigest()[:12]


def windows(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Consecutive utterances of one speaker, together at most ``WINDOW`` seconds (a longer one is alone)."""
    window: list[Row] = []
    for row in rows:
        length = sum(r.duration + PAUSE for r in window) + row.duration
        if window and (row.speaker != window[0].speaker or length > WINDOW):
            yield window
            window = []
        window.append(row)
    if window:
        yield window


def share_errors(references: Sequence[Sequence[str]], heard: str) -> list[int]:
    """Errors of ``heard`` against the references said one after the other, counted where they fall.

    Words that were added count for the utterance before which they stand (the last one at the end).
    """
    import jiwer

    ends = np.cumsum([len(words) for words in references])
    errors = [0] * len(references)
    if not heard:
        return [len(words) for words in references]
    for chunk in jiwer.process_words(" ".join(w for words in references for w in words), heard).alignments[0]:
        if chunk.type == "insert":
            at = min(int(np.searchsorted(ends, chunk.ref_start_idx, side="right")), len(errors) - 1)
            errors[at] += chunk.hyp_end_idx - chunk.hyp_start_idx
        elif chunk.type != "equal":
            for word in range(chunk.ref_start_idx, chunk.ref_end_idx):
                errors[int(np.searchsorted(ends, word, side="right"))] += 1
    return errors


def listen(rows: Sequence[Row]) -> Iterator[tuple[Row, int, int]]:
    """Whisper base's verdict on every utterance that has a text: (row, words, errors)."""
    from whisper_normalizer.english import EnglishTextNormalizer

    from metis_lib.evaluation.judges import WhisperJudge

    judge, normal = WhisperJudge(), EnglishTextNormalizer()

    def hear(window: Iterable[Row]) -> list[int]:
        silence = np.zeros(round(PAUSE * SSL_RATE), np.float32)
        wavs = [part for row in window for part in (audio.read(row.audio, SSL_RATE).numpy(), silence)]
        return share_errors([normal(row.text).split() for row in window], normal(judge.judge(np.concatenate(wavs))))

    for window in windows([row for row in rows if normal(row.text).split()]):
        for row, errors in zip(window, hear(window), strict=True):
            words = len(normal(row.text).split())
            if errors > BAD * words and len(window) > 1:
                errors = min(errors, *hear([row]))
            yield row, words, errors


def read_verdicts() -> dict[str, float]:
    """Word error rate of every human utterance that was listened to, by :func:`key`."""
    lines = VERDICTS.read_text().splitlines()[1:] if VERDICTS.is_file() else []
    return {name: int(errors) / int(words) for name, words, errors in (line.split(",") for line in lines)}


def sample_of_voices(rows: Sequence[Row], share: float = 0.03) -> list[Row]:
    """``share`` of each voice's utterances, at least two; which ones is decided by the hash of their ids."""
    voices: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: key(row.id, "")):
        voices[row.speaker].append(row)
    return [row for said in voices.values() for row in said[: max(2, math.ceil(share * len(said)))]]


def word_error_rates(verdicts: Iterable[tuple[Row, int, int]], of: Callable[[Row], str]) -> dict[str, dict[str, float]]:
    """For each group that ``of`` names: utterances heard, words and word error rate."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row, words, errors in verdicts:
        sums[of(row)] = [a + b for a, b in zip(sums[of(row)], (1, words, errors), strict=True)]
    return {group: {"heard": n, "words": w, "wer": round(e / w, 4)} for group, (n, w, e) in sorted(sums.items())}


def main() -> None:
    """Listen to what has no verdict yet; with the argument ``voices`` to a sample of every synthetic voice."""
    from metis_lib.assets import metis_home

    parser = argparse.ArgumentParser(prog="python -m recipes.nano.asr", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("voices",))
    folder = metis_home() / "corpora" / "nano"
    rows = read_manifest(folder / "manifest.jsonl")
    if parser.parse_args().what:
        verdicts = list(listen(sample_of_voices([row for row in rows if not row.human])))
        found = {
            "command": "python -m recipes.nano.asr voices",
            "protocol": "Whisper base int8, Whisper's English normaliser, 3 % of each voice's utterances, "
            "several heard together",
            "engines": word_error_rates(verdicts, lambda row: row.speaker.split("-")[0]),
            "voices": word_error_rates(verdicts, lambda row: row.speaker),
        }
        write_text(folder / "synthetic_asr.json", json.dumps(found, indent=1) + "\n")
        return
    known, part = read_verdicts(), folder / "parts" / "uqm.jsonl"  # the manifest lacks what was refused before
    said = [parse_row(values, root=folder, where=str(part)) for values in read_jsonl(part)]
    spoken = sorted((row for row in said if row.text), key=lambda row: row.id)
    if not VERDICTS.is_file():
        VERDICTS.write_text("utterance,words,errors\n")
    with VERDICTS.open("a") as out:
        for row, words, errors in listen([row for row in spoken if key(row.id, row.text) not in known]):
            print(key(row.id, row.text), words, errors, sep=",", file=out, flush=True)


if __name__ == "__main__":
    main()
