"""The nano corpus, built from packages alone: human voices, synthetic voices, noise and rooms.

``prepare_nano`` writes ``$METIS_HOME/corpora/nano``::

    manifest.jsonl          one row per utterance (metis_lib.data.store)
    audio/<source>/**.flac  24 kHz mono, PCM16, about -23 dBFS RMS, trimmed
    noise.jsonl, noise/     ambient recordings with licence
    rirs.safetensors        simulated room impulse responses
    parts/                  one manifest per source: what is done is not done again

Every row carries source and licence.  Speakers and sentences are held out: no test or validation
speaker is a training speaker, and synthetic sentences are divided by a hash of their text.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from metis_lib import assets, audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data.simulate import frame_db, level, trim
from metis_lib.data.store import read_jsonl, row, write_jsonl
from metis_lib.errors import MetisError

SUITE = "bookworm"
"""Debian release that the packages are taken from, so that everybody gets the same."""
UQM_LICENCE = "CC BY-NC-SA 2.5"
UQM_SOURCE = "The Ur-Quan Masters, 3DO voice-overs (Toys for Bob); Debian packages uqm-voice, uqm-content"
UQM_DROPPED = ("umgah", "yehat", "spathi", "kohrah")
"""Characters whose voice effects leave the words unclear (Whisper base hears most of them wrongly)."""
# the game does not say who plays whom: an actor may play a held-out and a training character
UQM_TEST = ("urquan", "syreen", "slylandro", "utwig")
UQM_VALIDATION = ("commander", "mycon")
MIN_SECONDS, MAX_SECONDS = 1.0, 12.0


def to_24k(wav: np.ndarray, rate: int) -> np.ndarray:
    """[S] at ``rate`` Hz as float32 [S] at 24 kHz."""
    return audio.resample(torch.from_numpy(wav), rate, AUDIO_RATE).numpy()


def _start_worker() -> None:
    os.nice(10)
    torch.set_num_threads(1)


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes (a fork of one that has computed may hang) that compute on one thread each."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)


# ---------------------------------------------------------------- human: The Ur-Quan Masters


def spoken_text(lines: list[str]) -> str | None:
    """Subtitle lines as plain text; None where what is said is uncertain (digits, markup, stage directions).

    Shouted words come in capitals and are written small, emphasis by asterisks is removed.
    """
    text = " ".join(lines).replace("*", "").replace("`", "'")
    text = re.sub(r"\s+", " ", re.sub(r"\.{2,}", "...", text)).strip(" -")
    if re.search(r"[^A-Za-z ,.!?;:'\"-]", text) or len(re.findall(r"[A-Za-z']+", text)) < 2:
        return None
    return re.sub(r"\b[A-Z]{2,}\b", lambda m: m[0].lower(), text)


def parse_dialogue(text: str, timing: str) -> Iterator[tuple[str, list[str], list[int]]]:
    """Pairs of the game's dialogue and subtitle files.

    Yields:
        (file name, its subtitle lines, milliseconds that each line but the last is shown)
    """
    shown = {}
    for m in re.finditer(r"^#\((\S+)\)(.*)$", timing, re.MULTILINE):
        shown[m[1]] = [int(n) for n in re.findall(r"\d+", m[2])]
    for m in re.finditer(r"^#\((\S+)\)[ \t]*(\S*)[^\n]*\n(.*?)(?=^#\(|\Z)", text, re.MULTILINE | re.DOTALL):
        lines = [line.strip() for line in m[3].splitlines() if line.strip()]
        times = shown.get(m[1], [])
        if m[2].endswith(".ogg") and lines and len(times) == len(lines) - 1:
            yield m[2], lines, times


def sentence_spans(lines: list[str], times: list[int], total: float) -> list[tuple[float, float, list[str]]]:
    """Subtitle lines as sentences (start s, end s, lines), at least 2 s where that stays below 12 s."""
    edges = [0.0, *np.cumsum(times).astype(float) / 1000, total]
    spans: list[tuple[float, float, list[str]]] = []
    first = 0
    for i in range(len(lines)):
        ended = i + 1 == len(lines) or re.search(r"[.!?]['\"]?$", lines[i]) is not None
        follows = edges[i + 2] - edges[first] if i + 2 < len(edges) else float("inf")
        if follows > MAX_SECONDS or (ended and edges[i + 1] - edges[first] >= 2.0):
            spans.append((edges[first], edges[i + 1], lines[first : i + 1]))
            first = i + 1
    return spans


def quiet_point(db: np.ndarray, seconds: float, reach: float = 0.25) -> float:
    """The quietest moment within ``reach`` seconds of ``seconds``; ``db`` has one value per 10 ms."""
    low, high = max(int((seconds - reach) * 100), 0), min(int((seconds + reach) * 100) + 1, len(db))
    if high <= low:
        return seconds
    smooth = np.convolve(np.pad(db, 2, mode="edge"), np.ones(5) / 5, "valid")[low:high]
    away = np.abs(np.arange(low, high) / 100 - seconds)
    return (low + int(np.argmin(smooth + 20 * away))) / 100 + 0.005


def uqm_files() -> tuple[Path, Path]:
    """The game's voice and content archives, fetched first if need be."""
    folder = "usr/share/games/uqm/content"
    voices = assets.fetch_deb("uqm-voice", SUITE) / folder / "addons/uqm-0.8.0-voice.uqm"
    return voices, assets.fetch_deb("uqm-content", SUITE) / folder / "packages/uqm-0.8.0-content.uqm"


def uqm_sentences(archive: Path, texts: Path, name: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """One character's sentences: (id, text, float32 [S] at 24 kHz, trimmed and levelled)."""
    with zipfile.ZipFile(archive) as voices, zipfile.ZipFile(texts) as content:
        inside, here = f"3dovoice/{name}/", set(voices.namelist())
        own = f"{inside}{name}.txt"
        raw = voices.read(own) if own in here else content.read(f"base/comm/{name}/{name}.txt")
        timing = voices.read(f"{inside}{name}.ts").decode("utf-8")
        for file, lines, times in parse_dialogue(raw.decode("utf-8"), timing):
            if inside + file not in here:
                continue
            here.discard(inside + file)  # a recording may be named twice
            with voices.open(inside + file) as stream:
                wav, rate = soundfile.read(stream, dtype="float32", always_2d=True)
            wav = wav.mean(axis=1)
            total, db = len(wav) / rate, frame_db(wav, rate)
            if db.max() < -60:
                continue
            for k, (start, end, said) in enumerate(sentence_spans(lines, times, total)):
                text = spoken_text(said)
                start, end = (quiet_point(db, t) if 0 < t < total else t for t in (start, end))
                if text is None or not MIN_SECONDS <= end - start <= MAX_SECONDS + 0.5:
                    continue
                part = trim(wav[int(start * rate) : int(end * rate)], rate)
                if len(part) >= MIN_SECONDS * rate and np.abs(part).max() > 1e-3:
                    yield f"uqm-{Path(file).stem}-{k:02d}", text, level(to_24k(part, rate))


def _uqm_character(archive: Path, texts: Path, out: Path, name: str) -> list[dict[str, Any]]:
    """Write one character's sentences; rows of the manifest."""
    split = "test" if name in UQM_TEST else "validation" if name in UQM_VALIDATION else "train"
    rows = []
    for id, text, wav in uqm_sentences(archive, texts, name):
        path = out / "audio" / "uqm" / name / f"{id.removeprefix('uqm-')}.flac"
        audio.write(path, wav, AUDIO_RATE)
        rows.append(row(id, path, out, text, f"uqm-{name}", len(wav), split, UQM_SOURCE, UQM_LICENCE, True))
    return rows


def build_uqm(out: Path, workers: int) -> None:
    """All usable characters of the game as sentences, with ``parts/uqm.jsonl``."""
    archive, texts = uqm_files()
    with zipfile.ZipFile(archive) as z:
        names = sorted({n.split("/")[1] for n in z.namelist() if n.endswith(".ts")} - set(UQM_DROPPED))
    with worker_pool(workers) as pool:
        parts = pool.map(_uqm_character, *zip(*((archive, texts, out, n) for n in names), strict=True))
        write_jsonl(out / "parts" / "uqm.jsonl", [r for part in parts for r in part])


# ---------------------------------------------------------------- noise and rooms

BLANKET_LICENCES = {
    "birds": "CC0-1.0", "boat": "CC0-1.0", "city": "CC-BY-3.0", "coffee-shop": "public domain",
    "fireplace": "public domain", "pink-noise": "CC-BY-SA-3.0", "rain": "CC-BY-4.0", "storm": "CC-BY-4.0",
    "stream": "CC0-1.0", "summer-night": "public domain", "train": "CC-BY-3.0", "waves": "CC-BY-4.0",
    "white-noise": "CC-BY-SA-3.0", "wind": "CC0-1.0",
}  # fmt: skip
NOISE_TEST = ("coffee-shop", "train", "stream")
"""Recordings never trained on: the test set's noise."""


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
    bundle = assets.fetch_deb("blanket", "trixie") / "usr/share/blanket/blanket.gresource"
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
    """Simulate rooms (pyroomacoustics, image sources) and write ``rirs.safetensors``.

    It holds rirs [N, S] float16 padded by zeros, length [N] and direct [N] in samples, rt60 [N] in s.
    """
    from safetensors.numpy import save_file

    with worker_pool(workers) as pool:
        rooms = list(pool.map(simulate_room, range(count), chunksize=10))
    bank = np.zeros((count, max(len(r) for r, _, _ in rooms)), dtype=np.float16)
    for i, (rir, _, _) in enumerate(rooms):
        bank[i, : len(rir)] = rir
    tensors: dict[str, np.ndarray] = {
        "rirs": bank,
        "length": np.array([len(r) for r, _, _ in rooms], dtype=np.int32),
        "direct": np.array([d for _, d, _ in rooms], dtype=np.int32),
        "rt60": np.array([t for _, _, t in rooms], dtype=np.float32),
    }
    beside = out / f".rirs.{os.getpid()}"
    save_file(tensors, beside)
    os.replace(beside, out / "rirs.safetensors")


# ---------------------------------------------------------------- all of it


def prepare_nano(
    home: str | os.PathLike[str] | None = None, *, hours_synthetic: float = 3.0, seed: int = 0,
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
    from metis_lib.data import synthesis

    out = (Path(home) if home is not None else assets.metis_home()) / "corpora" / "nano"
    for folder in ("audio", "noise", "parts"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()

    def tell(line: str) -> None:
        say(f"[{time.monotonic() - began:6.0f} s] {line}")

    def tally() -> str:
        rows = [r for part in sorted((out / "parts").glob("*.jsonl")) for r in read_jsonl(part)]
        write_jsonl(out / "manifest.jsonl", rows)
        return f"{len(rows)} utterances, {sum(r['duration'] for r in rows) / 3600:.2f} h"

    steps: list[tuple[str, Path, Callable[[], object]]] = [
        ("human recordings", out / "parts" / "uqm.jsonl", lambda: build_uqm(out, workers)),
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
