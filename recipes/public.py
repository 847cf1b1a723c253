"""Preparers for public corpora that Lhotse has no recipe for: noise, room responses, DNS-Challenge 2020, lip corpora.

DEMAND and any folder of noise go to ``noise.jsonl`` and ``noise/`` (24 kHz mono FLAC), impulse responses to
``rirs.safetensors``: what :class:`metis_lib.data.simulate.Noises` and :class:`~metis_lib.data.simulate.Rooms` load.
Speech goes to a manifest (:func:`metis_lib.data.importers.build_rows`).  The layouts are those of the archives as
they are given out; nothing is fetched here.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib import audio
from metis_lib.audio import level
from metis_lib.config import AUDIO_RATE
from metis_lib.data.importers import AUDIO, Entry, Imported, build_rows, divide, id_of, stated_path
from metis_lib.data.simulate import Rooms
from metis_lib.data.store import UNKNOWN, read_jsonl, write_jsonl
from metis_lib.errors import MetisError

PathLike = str | os.PathLike[str]
NOISE_DB = -26.0
"""RMS level in dBFS of every noise recording."""
RIR_SECONDS = 1.5
"""Room responses are cut here."""


def recordings(folder: Path, limit: int | None = None, seed: int = 0, without: str = r"/\.[^/]*$") -> list[Path]:
    """Sound files below ``folder`` in order, but those like ``without``; at most ``limit``, drawn by ``seed``."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO and not re.search(without, p.as_posix()))
    if not found:
        raise MetisError(f"{folder}: no recordings in it ({', '.join(AUDIO)})")
    if limit is not None and limit < len(found):
        found = [found[i] for i in sorted(np.random.default_rng(seed).choice(len(found), limit, replace=False))]
    return found


# ---------------------------------------------------------------- noise and rooms


def prepare_noise(
    folder: PathLike, out: PathLike, *, name: str | None = None, licence: str = UNKNOWN,
    files: Iterable[Path] | None = None, by_folder: bool = False, test: float = 0.1, limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Add a folder of noise recordings to ``out/noise.jsonl``; what ``name`` gave before is replaced.

    Args:
        folder: recordings of any format and rate, at any depth.
        out: the corpus; gets ``noise.jsonl`` and ``noise/NAME/*.flac`` (24 kHz mono, :data:`NOISE_DB`).
        name: begins every id; default the folder's.
        licence: of all of them.
        files: only these of the folder.
        by_folder: hold out whole folders (several recordings of one place) rather than single recordings.
        test: share of the seconds that is never trained on.
        limit: at most so many recordings (training keeps them all in memory, 48 kB a second).
        seed: which ones, and which are held out.

    Returns:
        ``recordings``, ``hours``, ``test`` (how many are held out), ``refused`` (path to reason).
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    name = name or folder.resolve().name
    rows: list[dict[str, Any]] = []
    refused, seconds, taken = dict[str, str](), defaultdict[str, float](float), set[str]()
    for path in recordings(folder, limit, seed) if files is None else files:
        place = path.relative_to(folder)
        short = id_of(place)
        stem = next(s for n in count() if (s := f"{short}-{n}" if n else short) not in taken)
        try:
            wav = level(audio.read(path, AUDIO_RATE, min_seconds=0.3).numpy(), NOISE_DB)
        except MetisError as error:
            refused[place.as_posix()] = str(error).removeprefix(str(path)).strip(" :")
            continue
        audio.write(out / "noise" / name / f"{stem}.flac", wav, AUDIO_RATE)
        taken.add(stem)
        group, duration = (place.parent.as_posix() if by_folder else stem), len(wav) / AUDIO_RATE
        seconds[group] += duration
        rows.append({
            "id": f"{name}-{stem}", "path": f"noise/{name}/{stem}.flac", "duration": round(duration, 3),
            "split": group, "source": name, "licence": licence,
        })  # fmt: skip
    if not rows:
        raise MetisError(f"{folder}: none of {len(refused)} recordings can be used ({[*refused.values(), 'none'][0]})")
    split = divide(seconds, (1 - test, 0.0, test), seed)
    rows = [row | {"split": split[row["split"]]} for row in rows]
    others = [row for row in read_jsonl(out / "noise.jsonl") if not row["path"].startswith(f"noise/{name}/")]
    write_jsonl(out / "noise.jsonl", others + rows)
    held, hours = sum(row["split"] == "test" for row in rows), round(sum(seconds.values()) / 3600, 3)
    return {"recordings": len(rows), "hours": hours, "test": held, "refused": refused}


def prepare_demand(root: PathLike, out: PathLike, *, channels: Sequence[int] = (1,), **options: Any) -> dict[str, Any]:
    """DEMAND: folders ``ENVIRONMENT/ch01.wav`` to ``ch16.wav``; whole environments are held out.

    The 16 channels hold the same five minutes, a few centimetres apart: one is enough.
    """
    root = Path(root).expanduser()
    files = [p for p in recordings(root) if p.stem.lower() in {f"ch{c:02d}" for c in channels}]
    if not files:
        raise MetisError(f"{root}: no ENVIRONMENT/ch01.wav in it; is this DEMAND, unpacked?")
    given: dict[str, Any] = {"name": "demand", "licence": "CC BY 4.0 (DEMAND, Zenodo 1227121)", "test": 0.15}
    return prepare_noise(root, out, files=files, by_folder=True, **given | options)


def read_room(path: Path) -> tuple[np.ndarray, int, float]:
    """A recorded impulse response, its first channel: ([S] at 24 kHz, direct path 1, at which sample, RT60 in s).

    The direct path is the first peak of at least half the greatest height; RT60 is Schroeder's, -5 to -25 dB times 3.
    """
    import soundfile

    data, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    if not len(data) or not np.isfinite(data).all() or len(data) > 20 * rate or not np.any(data[:, 0]):
        raise MetisError("empty, silent, not finite or too long for an impulse response")
    rir = audio.load((data[:, 0], rate), AUDIO_RATE).numpy()
    strong = int(np.flatnonzero(np.abs(rir) >= 0.5 * np.abs(rir).max())[0])
    direct = strong + int(np.argmax(np.abs(rir[strong : strong + 24])))  # within 1 ms
    rir, direct = rir[max(direct - 240, 0) :], min(direct, 240)
    left = np.cumsum(rir[::-1].astype(np.float64) ** 2)[::-1]
    db = 10 * np.log10(left / left[0] + 1e-12)
    five, twenty_five, sixty = (int(np.argmax(db <= below)) or len(db) for below in (-5, -25, -60))
    end = max(min(sixty, int(RIR_SECONDS * AUDIO_RATE)), direct + 1)
    return rir[:end] / rir[direct], direct, 3 * (twenty_five - five) / AUDIO_RATE


def prepare_rirs(folder: PathLike, out: PathLike, *, limit: int | None = 2000, seed: int = 0) -> dict[str, Any]:
    """Room impulse responses of a folder (OpenSLR 26 and 28, or any) as ``out/rirs.safetensors``.

    It holds rirs [N, S] float16 padded by zeros, length [N] and direct [N] in samples, rt60 [N] in s.  Recordings of
    noise among them (by their names) are passed over.

    Returns:
        ``rooms``, ``rt60`` (5th, 50th and 95th percentile in s), ``refused`` (path to reason).
    """
    folder, out = Path(folder).expanduser(), Path(out).expanduser()
    rooms, refused = [], dict[str, str]()
    for path in recordings(folder, limit, seed, without=r"(?i)noise[^/]*$|/pointsource_noises/|/\.[^/]*$"):
        try:
            rooms.append(read_room(path))
        except (MetisError, OSError, RuntimeError) as error:
            refused[path.relative_to(folder).as_posix()] = str(error).rsplit(": ", 1)[-1]
    if not rooms:
        raise MetisError(f"{folder}: none of {len(refused)} impulse responses can be used")
    bank = Rooms.stack(rooms)
    bank.save(out)
    rt60 = [round(float(q), 3) for q in np.percentile(bank.rt60, [5, 50, 95])]
    return {"rooms": len(rooms), "rt60": rt60, "refused": refused}


# ---------------------------------------------------------------- DNS-Challenge 2020


def dns_items(root: Path, out: Path) -> list[dict[str, Any]]:
    """Rows of the test sets of DNS-Challenge 2020, paths relative to ``out``; ``subset`` says which set.

    ``test_set/synthetic/{no_reverb,with_reverb}/{clean,noisy}`` are paired by the number behind ``fileid_``;
    ``real_recordings`` have no clean speech.  Nobody wrote down what is said: ``text`` is empty.

    Raises:
        MetisError: no such folders, or a noisy recording without its clean one.
    """
    tests = root / "datasets" / "test_set"
    if not (tests / "synthetic").is_dir():
        raise MetisError(f"{root}: no datasets/test_set/synthetic in it; check out the branch interspeech2020/master")
    common = {"task": "se", "speaker": UNKNOWN, "text": "", "source": "DNS-Challenge 2020", "licence": UNKNOWN}
    items: list[dict[str, Any]] = []
    for subset in ("no_reverb", "with_reverb"):
        ids = [
            {
                int(n[1]): p
                for p in recordings(tests / "synthetic" / subset / kind)
                if (n := re.search(r"(\d+)$", p.stem))
            }
            for kind in ("clean", "noisy")
        ]
        if ids[1].keys() - ids[0].keys():
            raise MetisError(
                f"{tests}: {subset} has no clean recordings for {sorted(ids[1].keys() - ids[0].keys())[:5]}"
            )
        for number, noisy in sorted(ids[1].items()):
            paths = {"clean": stated_path(ids[0][number], out), "noisy": stated_path(noisy, out)}
            snr = re.search(r"_snr(-?\d+)_", noisy.name)
            items.append(
                {"id": f"{subset}-{number}", "subset": subset, **paths, "snr_db": float(snr[1]) if snr else None}
            )
    for path in recordings(tests / "real_recordings") if (tests / "real_recordings").is_dir() else []:
        items.append({"id": f"real-{path.stem}", "subset": "real_recordings", "noisy": stated_path(path, out)})
    return [item | common for item in items]


def dns_testset(root: PathLike, out: PathLike) -> dict[str, int]:
    """The rows of :func:`dns_items` as one manifest, ``out/manifest.jsonl``; returns items by subset."""
    out = Path(out).expanduser()
    items = dns_items(Path(root).expanduser(), out)
    write_jsonl(out / "manifest.jsonl", items)
    return dict(Counter(item["subset"] for item in items))


def prepare_dns(root: PathLike, out: PathLike, *, limit: int | None = None, **options: Any) -> dict[str, Any]:
    """DNS-Challenge 2020: ``datasets/{clean,noise,impulse_responses}`` as a corpus, its test sets in ``out/test``.

    Who speaks is the ``reader_NNNNN`` of a clean file's name.  ``limit`` is of noise recordings, ``options`` go to
    :func:`~metis_lib.data.importers.build_rows`.  The clean speech must be there, the rest may be missing.
    """
    datasets, out = Path(root).expanduser() / "datasets", Path(out).expanduser()
    entries: list[Entry] = []
    for path in recordings(datasets / "clean"):
        reader = re.search(r"reader_\d+", path.stem)
        entries.append({"id": path.stem, "path": str(path), "speaker": reader[0] if reader else UNKNOWN})
    options = {"licence": "public domain (LibriVox)", "source": "DNS-Challenge 2020"} | options
    done: dict[str, Any] = {"speech": build_rows(entries, out, **options)}
    if (datasets / "noise").is_dir():
        done["noise"] = prepare_noise(datasets / "noise", out, name="dns", limit=limit)
    if (datasets / "impulse_responses").is_dir():
        done["rirs"] = prepare_rirs(datasets / "impulse_responses", out)
    if (datasets / "test_set").is_dir():
        done["test"] = dns_testset(root, out / "test")
    return done


# ---------------------------------------------------------------- lip corpora

LIPS = {
    "lrs2": (("main/*/*.mp4", "pretrain/*/*.mp4"), "BBC; research only, by agreement"),
    "lrs3": (("trainval/*/*.mp4", "pretrain/*/*.mp4", "test/*/*.mp4"), "CC BY-NC-ND 4.0 (TED); by agreement"),
    "lrw": (("*/train/*.mp4", "*/val/*.mp4", "*/test/*.mp4"), "BBC; research only, by agreement"),
}
"""Where the films of a corpus lie, and its licence."""
_SPLITS = {"train": "train", "val": "validation", "test": "test", "pretrain": "train", "trainval": "train"}


def film_sound(film: Path, to: Path) -> Path:
    """The sound of a film: the ``.wav`` beside it, else taken out of it to ``to`` (its own rate, one channel)."""
    if film.with_suffix(".wav").is_file() or to.is_file():
        return to if to.is_file() else film.with_suffix(".wav")
    try:
        import av
    except ImportError:
        raise MetisError("the sound of films is read by PyAV; run: pip install av") from None
    try:
        with av.open(str(film)) as container:
            rate = container.streams.audio[0].rate
            mono = av.AudioResampler(format="flt", layout="mono", rate=rate)
            pieces = [f.to_ndarray()[0] for frame in container.decode(audio=0) for f in mono.resample(frame)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise MetisError(f"{film}: no sound that can be read ({error})") from None
    audio.write(to, np.concatenate([np.zeros(0, np.float32), *pieces]), rate)
    return to


def lip_entries(corpus: str, root: Path, seed: int = 0) -> list[Entry]:
    """Films of ``lrs2``, ``lrs3`` or ``lrw`` as entries without ``path``.

    LRS2: ``main|pretrain/ID/00001.mp4`` with ``.txt``; the splits of ``main`` are listed in ``train.txt``, ``val.txt``
    and ``test.txt``, lines that begin with ``ID/00001``.  LRS3: ``trainval|pretrain|test/ID/00001.mp4`` with ``.txt``;
    it has no validation split: 3 % of the talks (ID) are held out for it.  LRW: ``WORD/train|val|test/WORD_00001.mp4``.
    """
    films = [p for pattern in LIPS[corpus][0] for p in sorted(root.glob(pattern))]
    lists = {s: root / f"{s}.txt" for s in ("train", "val", "test") if corpus == "lrs2"}
    if not films or not all(p.is_file() for p in lists.values()):
        raise MetisError(
            f"{root}: not {corpus.upper()}; it has {', '.join([*LIPS[corpus][0], *(p.name for p in lists.values())])}"
        )
    listed = {ln.split()[0]: s for s, p in lists.items() for ln in p.read_text().splitlines() if ln.strip()}
    entries = []
    for film in films:
        part, id, _ = film.relative_to(root).parts
        word, part = (part, id) if corpus == "lrw" else ("", part)
        said = film.with_suffix(".txt")
        line = said.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if said.is_file() else ""
        text = word or re.sub(r"\{[^}]*\}", " ", line.partition(":")[2])  # {LG} is laughter
        split = _SPLITS.get(listed.get(f"{id}/{film.stem}", "") if part == "main" else part)
        speaker = UNKNOWN if word else f"{corpus}-{id}"
        entry = {"id": f"{corpus}-{film.relative_to(root).with_suffix('').as_posix()}", "video": str(film)}
        entries += [entry | {"text": text.lower(), "speaker": speaker, "split": split}] if split else []
    if corpus == "lrs3":
        talks = Counter(e["speaker"] for e in entries if e["split"] == "train")
        held = divide(talks, (0.97, 0.03, 0.0), seed)
        entries = [e | {"split": held[e["speaker"]] if e["split"] == "train" else "test"} for e in entries]
    return entries


def prepare_lips(corpus: str, root: PathLike, out: PathLike, *, workers: int = 2, **options: Any) -> Imported:
    """LRS2, LRS3 or LRW (``corpus`` is a key of :data:`LIPS`) as a manifest whose rows have ``video``.

    The sound is taken out of the films once, to ``out/audio``.  ``options`` go to
    :func:`~metis_lib.data.importers.build_rows`.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    if corpus not in LIPS:
        raise MetisError(f"unknown lip corpus {corpus!r}; choose one of {', '.join(LIPS)}")

    def with_sound(entry: Entry) -> Entry:
        film = Path(entry["video"])
        try:
            return entry | {
                "path": str(film_sound(film, (out / "audio" / film.relative_to(root)).with_suffix(".flac")))
            }
        except MetisError as error:
            return entry | {"path": str(film), "reason": "damaged", "detail": str(error)}

    with ThreadPoolExecutor(workers) as pool:
        entries = list(pool.map(with_sound, lip_entries(corpus, root)))
    options = {"source": corpus.upper(), "licence": LIPS[corpus][1]} | options
    return build_rows(entries, out, workers=workers, **options)
