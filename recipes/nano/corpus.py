"""The nano corpus, built from packages alone: human voices, synthetic voices, noise and rooms.

``prepare_nano`` writes ``$METIS_HOME/corpora/nano``::

    manifest.jsonl          one row per utterance (metis_lib.data.store)
    audio/<source>/**.flac  24 kHz mono, PCM16, about -23 dBFS RMS, trimmed
    noise.jsonl, noise/     ambient recordings with licence
    rirs.safetensors        simulated room impulse responses
    parts/                  one manifest per source: what is done is not done again

Every row carries source and licence.  Speakers and sentences are held out: no test or validation speaker is a training
speaker, and sentences are divided by a hash of their text.
"""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import assets, audio
from metis_lib.audio import level
from metis_lib.config import AUDIO_RATE
from metis_lib.data.report import sentence_key
from metis_lib.data.simulate import Rooms
from metis_lib.data.store import read_jsonl, write_jsonl
from metis_lib.errors import MetisError
from recipes.nano import asr, human, packages, synthesis
from recipes.nano.human import to_24k, worker_pool

# ---------------------------------------------------------------- noise and rooms

BLANKET_LICENCES = {
    "birds": "CC0-1.0", "boat": "CC0-1.0", "city": "CC-BY-3.0", "coffee-shop": "public domain",
    "fireplace": "public domain", "pink-noise": "CC-BY-SA-3.0", "rain": "CC-BY-4.0", "storm": "CC-BY-4.0",
    "stream": "CC0-1.0", "summer-night": "public domain", "train": "CC-BY-3.0", "waves": "CC-BY-4.0",
    "white-noise": "CC-BY-SA-3.0", "wind": "CC0-1.0",
}  # fmt: skip
NOISE_TEST = ("coffee-shop", "train", "stream")
"""Recordings never trained on: the test set's noise."""


HELD_OUT = ("train", "validation", "seen", "test")
"""Splits, from least to most held out (``seen``: voices of the training, sentences of the test)."""


def read_gresource(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Files in a GResource bundle (a GVDB table of ``(uuay)``: size, flags, bytes): (name, content)."""
    start, end = struct.unpack_from("<II", data, 16)
    bloom, buckets = struct.unpack_from("<II", data, start)
    items = start + 8 + 4 * (bloom & 0x07FFFFFF) + 4 * buckets
    for at in range(items, end, 24):
        key, length, kind, first, last = struct.unpack_from("<IHcxII", data, at + 8)
        if kind == b"v":
            size, flags = struct.unpack_from("<II", data, first)
            body = data[first + 8 : last]
            yield data[key : key + length].decode(), zlib.decompress(body) if flags & 1 else body[:size]


def ambient_recordings() -> dict[str, np.ndarray]:
    """The package's ambient recordings by name: float32 [S] at 24 kHz, -26 dBFS RMS.

    Raises:
        MetisError: the package cannot be fetched or is not what was expected.
    """
    bundle = packages.fetch_deb("blanket", "trixie") / "usr/share/blanket/blanket.gresource"
    found = {}
    for name, data in read_gresource(bundle.read_bytes()):
        stem = name.removesuffix(".ogg")
        if stem in BLANKET_LICENCES:
            wav, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
            found[stem] = level(to_24k(wav.mean(axis=1), rate), -26.0)
    if len(found) != len(BLANKET_LICENCES):
        raise MetisError(f"package blanket: {len(found)} of {len(BLANKET_LICENCES)} recordings found")
    return dict(sorted(found.items()))


def build_noise(out: Path) -> None:
    """Ambient recordings as 24 kHz mono FLAC with ``noise.jsonl``."""
    rows = []
    for stem, wav in ambient_recordings().items():
        audio.write(out / "noise" / f"{stem}.flac", wav, AUDIO_RATE)
        rows.append({
            "id": f"blanket-{stem}", "path": f"noise/{stem}.flac",
            "duration": round(len(wav) / AUDIO_RATE, 3), "split": "test" if stem in NOISE_TEST else "train",
            "source": f"Debian package blanket, {stem}.ogg", "licence": BLANKET_LICENCES[stem],
        })  # fmt: skip
    write_jsonl(out / "noise.jsonl", rows)


def simulate_room(seed: int) -> tuple[np.ndarray, int, float]:
    """One random shoebox room: (impulse response [S] with direct path 1, its sample index, RT60 in s)."""
    import pyroomacoustics as pra

    random = np.random.default_rng((seed, 77))
    while True:
        size = random.uniform([3.0, 3.0, 2.4], [9.0, 7.0, 3.6])
        wanted = random.uniform(0.2, 0.9)
        try:
            absorption, order = pra.inverse_sabine(wanted, size)
        except ValueError:
            continue
        room = pra.ShoeBox(size, fs=AUDIO_RATE, materials=pra.Material(absorption), max_order=min(order, 24))
        source, microphone = random.uniform(0.4, size - 0.4), random.uniform(0.4, size - 0.4)
        distance = float(np.linalg.norm(source - microphone))
        if 0.4 <= distance <= 3.5:
            break
    room.add_source(source)
    room.add_microphone(microphone)
    room.compute_rir()
    rir = np.asarray(room.rir[0][0], dtype=np.float32)
    # the library delays everything by half of its fractional-delay filter
    direct = round(distance / room.c * AUDIO_RATE) + pra.constants.get("frac_delay_length") // 2
    direct = direct - 8 + int(np.argmax(np.abs(rir[direct - 8 : direct + 9])))
    rir = rir[: int((wanted + 0.05) * AUDIO_RATE) + direct]
    return rir / rir[direct], direct, wanted


def build_rirs(out: Path, workers: int, count: int = 200) -> None:
    """Simulate rooms (pyroomacoustics, image sources) and write ``rirs.safetensors``."""
    with worker_pool(workers) as pool:
        Rooms.stack(list(pool.map(simulate_room, range(count), chunksize=10))).save(out)


# ---------------------------------------------------------------- all of it


def usable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that Whisper heard otherwise and without sentences of a split that is held out more.

    Of people that is decided for each utterance, of synthetic voices for a whole voice.  No sentence of the test is
    among the validation's or the training's, none of the validation among the training's.
    """
    verdicts = asr.read_verdicts()
    held_out: dict[str, int] = {}
    for r in rows:
        words = sentence_key(r["text"])
        held_out[words] = max(held_out.get(words, 0), HELD_OUT.index(r["split"]))

    def good(r: dict[str, Any]) -> bool:
        words = sentence_key(r["text"])
        heard = not r["human"] or verdicts.get(asr.key(r["id"], r["text"]), 0.0) <= asr.BAD
        clear = heard and r["speaker"] != synthesis.SILERO_SPOILT
        return clear and (not words or held_out[words] == HELD_OUT.index(r["split"]))

    return [r for r in rows if good(r)]


def prepare_nano(
    home: str | os.PathLike[str] | None = None, *, hours_synthetic: float = 20.0, seed: int = 0,
    workers: int = 2, say: Callable[[str], None] = lambda line: None,
) -> Path:  # fmt: skip
    """Build (or finish, or find ready) the nano corpus.

    Args:
        home: cache folder; default ``metis_home()``.
        hours_synthetic: speech to synthesise, in hours.
        seed: which sentences which voice says.
        workers: processes; each computes on one thread.
        say: called with a line about every step.

    Returns:
        The folder of the corpus; ``ALL_READY`` in it marks that everything is complete.

    Raises:
        MetisError: a package cannot be fetched or is not what was expected.
    """
    out = (Path(home) if home is not None else assets.metis_home()) / "corpora" / "nano"
    for folder in ("audio", "noise", "parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - began:6.0f} s] {line}")

    def tally() -> str:
        rows = usable([r for part in sorted((out / "parts").glob("*.jsonl")) for r in read_jsonl(part)])
        write_jsonl(out / "manifest.jsonl", rows)
        return f"{len(rows)} utterances, {sum(r['duration'] for r in rows) / 3600:.2f} h"

    steps: list[tuple[str, Path, Callable[[], object]]] = [
        ("human speech", out / "parts" / "uqm.jsonl", lambda: human.build_uqm(out, workers)),
        ("human speech without text", out / "parts" / "untexted.jsonl", lambda: human.build_untexted(out, workers)),
        ("noise", out / "noise.jsonl", lambda: build_noise(out)),
        ("room impulse responses", out / "rirs.safetensors", lambda: build_rirs(out, workers)),
    ]
    for name, result, build in steps:
        if not result.is_file():
            tell(name)
            build()
    tell("synthetic speech")
    for left in synthesis.synthesise(out, hours_synthetic, seed, workers):
        if left % 250 == 0:
            tell(f"{tally()}, {left} to go")
    total = tally()
    (out / "ALL_READY").touch()
    tell(f"ready: {total} in {out}")
    return out
