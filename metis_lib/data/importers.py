"""Own recordings to a checked manifest: a folder, a CSV or JSONL list, or Lhotse manifests.

Nothing is copied: the rows refer to the recordings where they lie.  Every recording is decoded once
(:mod:`metis_lib.data.report`); what cannot be used is left out and listed with its reason.  ``build_manifest`` writes::

    manifest.jsonl   what can be used (metis_lib.data.store)
    refused.jsonl    what was left out: id, path, reason, detail
    facts.jsonl      what was measured of each; the next run looks at new or changed files alone
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_lib.data import report
from metis_lib.data.report import sentence_key
from metis_lib.data.store import SPLITS, UNKNOWN, Row, parse_row, write_jsonl, write_manifest
from metis_lib.errors import MetisError

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif")
UNREAD = (".m4a", ".aac", ".wma", ".amr", ".caf", ".sph", ".au", ".3gp")
"""Sound of phones and old corpora that libsndfile does not read, or not by this name."""
COLUMNS = (
    "id", "path", "start", "end", "text", "language", "speaker", "licence", "split", "source", "human", "video"
)  # fmt: skip
"""What a list may say of a recording; only ``path`` must be there."""
MIN_SPEAKERS = 10
"""From so many speakers on whole speakers are held out."""
_GENERIC = {"wav", "wavs", "audio", "clips", "flac", "mp3", "recordings"}
_LANGUAGES = dict(english="en", chinese="zh", mandarin="zh", german="de", french="fr", japanese="ja", korean="ko")
_SPLIT_NAMES = dict(train="train", dev="validation", valid="validation", test="test")

Entry = dict[str, Any]
"""What a source says of one recording, by :data:`COLUMNS`; ``reason`` and ``detail`` refuse it at once."""


@dataclass(frozen=True)
class Imported:
    """What an import came to: ``refused`` are the lines of ``refused.jsonl``, ``notes`` what a person should know."""

    rows: list[Row]
    refused: list[dict[str, Any]]
    notes: list[str]
    manifest: Path


# ---------------------------------------------------------------- reading lists


def _read(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 that says so; MetisError for another encoding."""
    data = path.read_bytes()
    try:
        return data.decode("utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MetisError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _transcripts(folder: Path) -> dict[tuple[Path, str], str]:
    """Texts of transcript files by (folder they hold for, stem of the recording)."""
    found: dict[tuple[Path, str], str] = {}
    for path in folder.rglob("metadata.csv"):  # LJSpeech: id|text|normalised text
        for line in _read(path).splitlines():
            id, *texts = line.split("|")
            name = Path(id.strip())
            key = name.stem if name.suffix.lower() in AUDIO else name.name
            text = next((t for t in reversed(texts) if t.strip()), "")
            found[path.parent / name.parent, key] = text  # LJSpeech's ids have no folder, others' may
            if name.parent != Path():  # by its name alone where no other has it
                found[path.parent, key] = "" if (path.parent, key) in found else text
    for path in folder.rglob("*.trans.txt"):  # LibriSpeech: id text
        for line in _read(path).splitlines():
            id, _, text = line.partition(" ")
            found[path.parent, id] = text
    return found


def id_of(place: Path) -> str:
    """An id out of a relative path: letters, digits, ``_`` and ``-``.

    Marks that stand for themselves (vowels of Devanagari, say) are kept as numbers, so that two names stay two.
    """
    name = unicodedata.normalize("NFC", place.with_suffix("").as_posix())
    name = "".join(f"{ord(c):x}" if unicodedata.category(c).startswith("M") else c for c in name)
    return re.sub(r"[^\w-]+", "-", name)


def is_testset(folder: Path) -> bool:
    """Whether a folder holds a test set: a ``manifest.jsonl`` whose rows name a task."""
    try:
        with open(folder / "manifest.jsonl", encoding="utf-8") as stream:
            return "task" in json.loads(stream.readline())
    except (OSError, ValueError, TypeError):
        return False


def folder_entries(folder: Path) -> Iterator[Entry]:
    """Recordings below ``folder`` with their transcripts; who speaks is the name of the folder they lie in."""
    texts = _transcripts(folder)
    testsets = {path.parent for path in folder.rglob("*/manifest.jsonl") if is_testset(path.parent)}
    ids = set[str]()
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or testsets.intersection(path.parents):
            continue
        if path.suffix.lower() in UNREAD:
            yield {"path": os.fsencode(path).decode("utf-8", "replace"), "reason": "format",
                   "detail": f"{path.suffix} is not read; convert it to flac or wav"}  # fmt: skip
        if path.suffix.lower() not in AUDIO:
            continue
        beside = next((p for s in (".normalized.txt", ".txt", ".lab") if (p := path.with_suffix(s)).is_file()), None)
        place = path.relative_to(folder)
        try:
            text = _read(beside) if beside else None
            place.as_posix().encode()
        except (MetisError, UnicodeEncodeError) as error:  # a name of an old archive
            bad = isinstance(error, UnicodeEncodeError)
            detail = "its name is not UTF-8; rename it" if bad else str(error)
            name = os.fsencode(path).decode("utf-8", "replace")
            yield {"path": name, "reason": "bad row" if bad else "wrong text", "detail": detail}
            continue
        above = [path.parent, *path.parent.parents][: len(place.parts)]
        text = text or next((texts[p, path.stem] for p in above if (p, path.stem) in texts), "")
        names = [p.name for p in above if p.name.lower() not in _GENERIC]
        reader = re.match(r"(\d+)([-_])\d+\2\d", path.stem)  # LibriSpeech, LibriTTS: reader, chapter, number
        dated = re.match(r"(19|20)\d\d[-_]\d\d[-_]\d\d", path.stem)
        named = reader is not None and (reader[1] in names or (path.parent == folder and not dated))
        speaker = reader[1] if reader and named else (names or [folder.name])[0]
        id = id_of(place)
        if id in ids:  # names that differ in marks alone
            id += "-" + hashlib.blake2b(place.as_posix().encode(), digest_size=4).hexdigest()
        ids.add(id)
        yield {"id": id, "path": str(path), "text": text, "speaker": speaker}


def table_entries(path: Path, notes: list[str]) -> Iterator[Entry]:
    """Lines of a CSV, TSV or JSONL list, paths relative to it; ``notes`` gets the columns that are ignored."""
    content, ignored, lines = path.read_text(encoding="utf-8-sig"), Counter[str](), list[tuple[int, Any]]()
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(content.split("\n"), 1):
            try:
                lines += [(number, json.loads(line))] if line.strip() else []
            except json.JSONDecodeError:
                lines.append((number, None))
    else:
        head = content.partition("\n")[0]
        comma = max("\t,;|", key=head.count)
        quotes: Any = {"quoting": csv.QUOTE_NONE} if comma in "\t|" else {}
        reader = csv.DictReader(io.StringIO(content, newline=""), restkey="more", delimiter=comma, **quotes)
        if "path" not in (reader.fieldnames or ()):
            raise MetisError(f"{path}: the first line must name the columns, path among them, not {head[:60]!r}")
        lines = list(enumerate(reader, 2))
    for number, values in lines:
        if not isinstance(values, dict) or not isinstance(values.get("path"), str) or not values["path"].strip():
            yield {"path": f"{path.name}:{number}", "reason": "bad row", "detail": "no JSON object or line with a path"}
            continue
        ignored.update(k for k in values if k not in (*COLUMNS, "duration"))
        row = {k: v for k, v in values.items() if k in COLUMNS and v not in (None, "")}
        for key in ("path", "video"):
            if key in row:
                row[key] = str(path.parent / os.path.expanduser(str(row[key]).strip()))
        yield row
    if ignored:
        notes.append(f"{path.name}: ignored the columns {', '.join(sorted(ignored))}")


def lhotse_entries(source: Path) -> Iterator[Entry]:
    """Supervisions of Lhotse manifests (a file of cuts or recordings, or a folder of manifests).

    Where all file names say a split (``train``, ``dev``, ``test``) the entries keep it.
    """
    try:
        import lhotse
    except ImportError:
        raise MetisError("Lhotse manifests are read by the package lhotse; run: pip install lhotse") from None
    files = [source] if source.is_file() else sorted(source.glob("*.jsonl*"))
    kinds = {kind: [p for p in files if kind in p.name] for kind in ("cuts", "recordings", "supervisions")}
    chosen = kinds["cuts"] or kinds["recordings"] or [source]
    splits = [next((s for word, s in _SPLIT_NAMES.items() if word in p.name.lower()), None) for p in chosen]
    for path, split in zip(chosen, splits, strict=True):
        try:
            found = lhotse.load_manifest(path)
            if isinstance(found, lhotse.RecordingSet):
                beside = path.with_name(path.name.replace("recordings", "supervisions"))
                said = lhotse.load_manifest(beside) if beside != path and beside.is_file() else None
                found = lhotse.CutSet.from_manifests(recordings=found, supervisions=said)
            cuts = list(found)
        except Exception as error:  # whatever a broken file makes the library raise
            raise MetisError(f"{path}: no Lhotse manifest ({str(error).splitlines()[0]})") from None
        for cut in cuts:
            recording = getattr(cut, "recording", None)
            if not recording or len(recording.sources) != 1 or recording.sources[0].type != "file" or (
                recording.num_channels > 2 or recording.transforms
            ):  # fmt: skip
                what = "not a stretch of one plain file of one or two channels"
                yield {"id": cut.id, "path": cut.id, "reason": "bad row", "detail": what}
                continue
            where = Path(recording.sources[0].source).expanduser()
            where = path.parent / where if (path.parent / where).is_file() else where
            apart = {str(said.channel) for said in cut.supervisions}  # the two sides of a call, say
            if recording.num_channels == 2 and (len(apart) > 1 or getattr(cut, "channel", None) == 1):
                what = "one channel of two is meant; cut it out into a file of its own"
                yield {"id": cut.id, "path": str(where), "reason": "bad row", "detail": what}
                continue
            for said in cut.supervisions or [None]:
                start, seconds = cut.start + (said.start if said else 0.0), (said or cut).duration
                entry: Entry = {"id": (said or cut).id, "path": str(where)}
                if abs(start) >= 0.005 or abs(seconds - recording.duration) >= 0.02:
                    entry |= {"start": round(start, 4), "end": round(start + seconds, 4)}
                about = {k: getattr(said, k, None) for k in ("text", "speaker", "language")}
                about["split"] = split if all(splits) else None
                yield entry | {k: v for k, v in about.items() if v}


def read_source(source: Path, notes: list[str]) -> list[Entry]:
    """Entries of a folder, list or Lhotse manifest, told apart by name and content."""
    if source.is_dir():
        lhotse = any(re.search("recordings|cuts", p.name) for p in source.glob("*.jsonl*"))
        return list(lhotse_entries(source) if lhotse else folder_entries(source))
    if not source.is_file():
        raise MetisError(f"{source}: no such folder or list; give a folder of recordings, a CSV, a JSONL or Lhotse")
    with open(source, "rb") as stream:
        head = stream.readline(4000)
    try:
        first = json.loads(head)
        cuts = "path" not in first and ("sources" in first or "recording" in first)
    except (ValueError, TypeError):  # no JSON, or the beginning of a long line
        cuts = b'"sources"' in head or b'"recording"' in head
    if source.name.endswith(".jsonl.gz") or cuts:
        return list(lhotse_entries(source))
    if source.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        raise MetisError(f"{source}: give a folder, a .csv, .tsv or .jsonl list, or a Lhotse .jsonl.gz")
    try:
        return list(table_entries(source, notes))
    except (UnicodeDecodeError, csv.Error) as error:
        raise MetisError(f"{source}: not a table in UTF-8 ({error})") from None


# ---------------------------------------------------------------- splits


def divide(weights: Mapping[str, float], shares: Sequence[float], seed: int, least: int = 1) -> dict[str, str]:
    """Give each unit (a speaker, a sentence) wholly to one split, in the order of a seeded hash of its name.

    ``weights`` are seconds, ``shares`` those of train, validation and test.  A held-out split stays below its
    share if it can, and has at least one unit if more than one is left, ``least`` if there are five times as many.
    """
    order = sorted(weights, key=lambda u: hashlib.blake2b(f"{seed}:{u}".encode(), digest_size=8).digest())
    split = dict.fromkeys(order, "train")
    for name, share in (("test", shares[2]), ("validation", shares[1])):
        free, left = [u for u in order if split[u] == "train"], share / sum(shares) * sum(weights.values())
        must = least if len(weights) >= 5 * least else 1
        if share > 0 and len(free) > must:
            fits = [u for u in free if weights[u] <= left]
            fits = fits if len(fits) >= must else sorted(free, key=weights.__getitem__)[:must]
            for place, unit in enumerate(fits):
                if place < must or weights[unit] <= left:
                    split[unit], left = name, left - weights[unit]
    return split


def assign_splits(
    entries: Sequence[Entry], shares: Sequence[float], hold_out: str, seed: int, notes: list[str]
) -> list[str | None]:
    """The split of every entry; None for one to be left out so that no sentence is in two splits.

    Args:
        entries: with ``speaker``, ``text``, ``path``, ``seconds`` and, all or none, ``split``.
        shares: of train, validation and test.
        hold_out: ``speaker``, ``sentence``, or ``auto``: speakers from :data:`MIN_SPEAKERS` on.
        seed: of the division.
        notes: gets a line that says what was held out.
    """
    if any("split" in e for e in entries):
        notes.append("splits as the source gives them")
        return [e.get("split") for e in entries]
    speakers, sentences, voices = Counter[str](), Counter[str](), defaultdict[str, set[str]](set)
    keys = [sentence_key(e["text"]) or f"path:{e['path']}" for e in entries]
    for entry, key in zip(entries, keys, strict=True):
        speakers[entry["speaker"]] += entry["seconds"]
        sentences[key] += entry["seconds"]
        voices[key].add(entry["speaker"])
    known = len(set(speakers) - {UNKNOWN})
    if hold_out == "sentence" or (hold_out == "auto" and known < MIN_SPEAKERS):
        notes.append(
            f"{known} known speakers: sentences (recordings where there is no text) are held out, speakers not"
        )
        given = divide(sentences, shares, seed)
        return [given[key] for key in keys]
    split = divide(speakers, shares, seed, least=2)  # extraction and conversion need a second voice
    # a sentence that speakers of several splits say stays with one of these
    said = {k: {split[speaker] for speaker in voices[k]} for k in sentences}
    drawn = divide({k: sentences[k] for k in sentences if len(said[k]) > 1}, shares, seed)
    shared = {k: s if s in said[k] else "train" if "train" in said[k] else min(said[k]) for k, s in drawn.items()}
    held = Counter(split.values())
    notes.append(f"{known} known speakers: {held['validation']} held out for validation, {held['test']} for test")
    splits = [split[e["speaker"]] for e in entries]
    return [s if shared.get(k, s) == s else None for s, k in zip(splits, keys, strict=True)]


# ---------------------------------------------------------------- building


def stated_path(path: str | Path, out: Path) -> str:
    """``path`` relative to ``out``; absolute where there is no such way (another drive)."""
    try:
        return Path(os.path.relpath(os.path.abspath(path), os.path.realpath(out))).as_posix()
    except ValueError:
        return Path(path).absolute().as_posix()


def _clean(entry: Entry, out: Path) -> Entry:
    """An entry with values of the right types and an id; with ``reason`` where that is not possible."""
    plain = {k: str(v).encode("utf-8", "replace").decode() for k, v in entry.items()}  # JSON may hold half a character
    row: Entry = {k: " ".join(v.split()) for k, v in plain.items()}
    row |= {k: stated_path(plain[k], out) for k in ("path", "video") if k in plain and "reason" not in plain}
    row["human"] = row.get("human", "true").lower() in ("true", "1", "yes")
    try:
        row |= {k: float(entry[k]) if entry.get(k) is not None else None for k in ("start", "end")}
        if not all(math.isfinite(row[k] or 0.0) for k in ("start", "end")):
            raise ValueError
    except (TypeError, ValueError):
        row |= {"start": None, "end": None, "reason": "bad row", "detail": "start and end must be seconds"}
    if row.get("split", "train") not in SPLITS:
        row |= {"reason": "bad row", "detail": f"split must be one of {', '.join(SPLITS)}, not {row['split']!r}"}
    if not row.get("id"):
        place = hashlib.blake2b(f"{row['path']} {row['start']} {row['end']}".encode(), digest_size=4).hexdigest()
        row["id"] = f"{Path(row['path']).stem}-{place}"
    return row


def build_rows(
    entries: Sequence[Entry], out: str | os.PathLike[str], *, source: str, language: str = "en",
    speaker: str | None = None, licence: str = UNKNOWN, splits: Sequence[float] = (0.9, 0.05, 0.05),
    hold_out: str = "auto", seed: int = 0, workers: int = 2, keep: Collection[str] = (),
    notes: Sequence[str] = (), say: Callable[[str], None] = lambda line: None,
) -> Imported:  # fmt: skip
    """The files of :func:`build_manifest` from entries that are there already; ``source`` names where they are from."""
    out = Path(out).expanduser()
    if len(splits) != 3 or min(splits) < 0 or splits[0] <= 0:
        raise MetisError(f"splits are three shares, of train, validation and test, not {tuple(splits)}")
    if hold_out not in ("auto", "speaker", "sentence") or set(keep) - set(report.SOFT):
        raise MetisError(f"hold out auto, speaker or sentence; keep some of {', '.join(report.SOFT)}")
    given = sum("split" in e for e in entries)
    if 0 < given < sum("reason" not in e for e in entries):
        raise MetisError(f"{given} of {len(entries)} recordings have a split; give it to all or to none")
    rows = [_clean(e, out) for e in entries]
    here = [r for r in rows if "reason" not in r]
    say(f"{len(rows)} recordings; looking at each")
    spans = [(r["path"], r["start"], r["end"]) for r in here]
    found = report.measure_all(spans, out, out / "facts.jsonl", workers, say)
    ids, sounds, good = set[str](), dict[str, str](), []
    for row, facts in zip(here, found, strict=True):
        row["text"], row["language"] = row.get("text", ""), row.get("language", language)
        code = row["language"].lower().replace("_", "-").split("-")[0]  # en-US
        row["language"] = _LANGUAGES.get(code, code)
        row["speaker"] = speaker or row.get("speaker", UNKNOWN)
        if "reason" in facts:
            row |= {k: facts[k] for k in ("reason", "detail")}
            continue
        warned = report.warnings_of(facts, row["text"], row["language"])
        if facts["sound"] in sounds:
            warned["same sound"] = f"as {sounds[facts['sound']]}"
        hard = {name: warned[name] for name in report.SOFT if name in warned and name not in keep}
        hard |= {"same id": report.REASONS["same id"]} if row["id"] in ids else {}
        if hard:
            row["reason"] = next(reason for reason in report.REASONS if reason in hard)
            row["detail"] = hard[row["reason"]]
            continue
        ids.add(row["id"])
        sounds.setdefault(facts["sound"], row["id"])
        facts["warnings"], row["seconds"] = warned, facts["seconds"]
        good.append(row)
    notes = list(notes)
    for row, split in zip(good, assign_splits(good, splits, hold_out, seed, notes), strict=True):
        row["split"] = split
        row |= {} if split else {"reason": "held-out text", "detail": report.REASONS["held-out text"]}
    refused = [{k: r[k] for k in ("id", "path", "reason", "detail")} for r in rows if "reason" in r]
    write_jsonl(out / "refused.jsonl", refused)
    write_jsonl(out / "facts.jsonl", ({"id": r["id"]} | f for r, f in zip(here, found, strict=True)))
    why = ", ".join(f"{n} {reason}" for reason, n in Counter(r["reason"] for r in refused).most_common())
    notes += [f"left out {len(refused)} of {len(rows)} recordings ({why})"] if refused else []
    kept = []
    for r in good:
        if "reason" not in r:
            values = {k: r[k] for k in COLUMNS if r.get(k) is not None} | {"duration": r["seconds"]}
            kept.append(parse_row({"source": source, "licence": licence} | values, root=out, where=r["path"]))
    if not kept:
        raise MetisError(f"none of {len(rows)} recordings can be used ({why}); see {out / 'refused.jsonl'}")
    write_manifest(out / "manifest.jsonl", kept)
    for note in notes:
        say(note)
    return Imported(kept, refused, notes, out / "manifest.jsonl")


def build_manifest(source: str | os.PathLike[str], out: str | os.PathLike[str], **options: Any) -> Imported:
    """Make the manifest of own recordings; nothing stops at a bad one.

    Args:
        source: a folder of recordings (texts beside them or in LJSpeech or LibriSpeech files), a CSV, TSV or
            JSONL list with the columns :data:`COLUMNS`, or Lhotse manifests (file or folder).
        out: folder that gets the manifest.
        options: ``language`` and ``licence`` of recordings that state none; ``speaker`` of them all; ``splits``,
            the shares of train, validation and test; ``hold_out``, see :func:`assign_splits`; ``seed``; ``workers``
            (threads); ``keep``, reasons of :data:`report.SOFT` that shall only warn; ``say``, called with lines.

    Raises:
        MetisError: no such source, no recording in it, none that can be used, or impossible options.
    """
    source, notes = Path(source).expanduser(), list[str]()
    entries = read_source(source, notes)
    if not entries:
        raise MetisError(f"{source}: no recordings in it ({', '.join(AUDIO)})")
    return build_rows(entries, out, source=source.resolve().name, notes=notes, **options)
