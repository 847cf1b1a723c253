"""Human speech out of packages: The Ur-Quan Masters with its text, and recordings without text.

Sentences are cut by the game's subtitle times, trimmed and levelled.  What Whisper could not follow (``human_asr.csv``,
made by :mod:`recipes.nano.asr`) is left out.  Recordings without text serve the codec and the pre-training.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import re
import struct
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from metis_lib import audio
from metis_lib.audio import frame_db, level, trim
from metis_lib.config import AUDIO_RATE
from metis_lib.data.store import UNKNOWN, write_jsonl
from recipes.nano import packages

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


def row(
    id: str, path: Path, root: Path, text: str, speaker: str, samples: int, split: str, source: str,
    licence: str, human: bool,
) -> dict[str, Any]:  # fmt: skip
    """A manifest row of a 24 kHz English recording."""
    return {
        "id": id, "path": path.relative_to(root).as_posix(), "text": text, "language": "en",
        "speaker": speaker, "duration": round(samples / AUDIO_RATE, 3), "split": split, "source": source,
        "licence": licence, "human": human,
    }  # fmt: skip


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
    voices = packages.fetch_deb("uqm-voice", SUITE) / folder / "addons/uqm-0.8.0-voice.uqm"
    return voices, packages.fetch_deb("uqm-content", SUITE) / folder / "packages/uqm-0.8.0-content.uqm"


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


# ---------------------------------------------------------------- human, without text

ASTERISK = {
    "en": ("allison", "CC BY-SA 3.0"), "es": ("allison", "CC BY-SA 3.0"), "fr": ("june", "CC BY-SA 3.0"),
    "it": ("carlo", "CC BY-SA 3.0"), "ru": ("ivrvoice", "CC BY 3.0"),
}  # fmt: skip
"""Voice and licence of the telephone prompts of each language; one woman speaks two."""
FILLETS = {"cs": "Czech", "nl": "Dutch"}
QUEEN_LICENCE = "free to redistribute under conditions; see the copyright file of the package"


def decode_g722(path: Path) -> tuple[np.ndarray, int]:
    """A bare G.722 file, which libsndfile does not read: (float32 [S], 16000)."""
    import av

    with av.open(str(path), format="g722") as container:
        frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    return (np.concatenate([*frames, np.zeros(0)]) / 32768).astype(np.float32), 16_000


def queen_clips(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Speech in the data file of the talking Flight of the Amazon Queen: (name, MP3 bytes).

    The table: 15 bytes (the last two are the count), then for each file 12 bytes of name, one of bundle, offset, size.
    """
    for i in range(struct.unpack_from(">H", data, 13)[0]):
        name, _, offset, size = struct.unpack_from(">12sBII", data, 15 + 21 * i)
        name = name.split(b"\0")[0].decode()
        if re.fullmatch(r"\d\w{5}[JP]\d?\.SB", name, re.IGNORECASE):
            yield name.removesuffix(".SB").lower(), data[offset : offset + size]


def _untexted() -> Iterator[tuple[str, str, str, str, str, Path | bytes]]:
    """Every recording without text: (source, id, speaker, language, licence, file or bytes)."""
    for language, (voice, licence) in ASTERISK.items():
        package = f"asterisk-core-sounds-{language}-g722"
        for path in sorted((packages.fetch_deb(package, SUITE) / "usr/share/asterisk/sounds").glob("*/*.g722")):
            yield package, f"asterisk-{language}-{path.stem}", f"asterisk-{voice}", language, licence, path
    for language in FILLETS:
        package = f"fillets-ng-data-{language}"
        root = packages.fetch_deb(package, SUITE) / "usr/share/games/fillets-ng/sound"
        for path in sorted(root.glob(f"*/{language}/*.ogg")):
            known = path.stem.split("-")[1:2] in (["m"], ["v"])
            who = f"fillets-{language}-{path.stem.split('-')[1]}" if known else UNKNOWN
            yield package, f"fillets-{language}-{path.parts[-3]}-{path.stem}", who, language, "GPL-2+", path
    package = "flight-of-the-amazon-queen"
    data = next((packages.fetch_deb(package, SUITE) / "usr/share/scummvm").rglob("queen.1c")).read_bytes()
    for name, clip in queen_clips(data):
        yield package, f"queen-{name}", "queen-joe" if "j" in name else UNKNOWN, "en", QUEEN_LICENCE, clip


def _store_untexted(out: Path, item: tuple[str, str, str, str, str, Path | bytes]) -> dict[str, Any] | None:
    """Write one recording; its row, or None where it is too short, too long, silent or not speech that decodes."""
    package, id, speaker, language, licence, content = item
    try:
        if isinstance(content, Path) and content.suffix == ".g722":
            wav, rate = decode_g722(content)
        else:
            wav, rate = soundfile.read(io.BytesIO(content) if isinstance(content, bytes) else content, dtype="float32")
    except soundfile.LibsndfileError:
        return None
    wav = wav if wav.ndim == 1 else wav.mean(axis=1)
    if len(wav) < MIN_SECONDS * rate or np.abs(wav).max() < 1e-3:
        return None
    wav = trim(wav, rate)
    if not MIN_SECONDS * rate <= len(wav) <= MAX_SECONDS * rate:
        return None
    wav = level(to_24k(wav, rate))
    path = out / "audio" / id.split("-")[0] / speaker / f"{id.partition('-')[2]}.flac"
    audio.write(path, wav, AUDIO_RATE)
    source = f"Debian package {package}"
    return row(id, path, out, "", speaker, len(wav), "train", source, licence, True) | {"language": language}


def build_untexted(out: Path, workers: int) -> None:
    """Telephone prompts in five languages and the speech of two games, with ``parts/untexted.jsonl``."""
    with worker_pool(workers) as pool:
        rows = pool.map(_store_untexted, repeat(out), _untexted(), chunksize=20)
        write_jsonl(out / "parts" / "untexted.jsonl", [r for r in rows if r is not None])
