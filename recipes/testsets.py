"""Test sets: of one's own held-out recordings, and the paper's.

A local copy of a public one becomes a manifest that the evaluation reads.

``testsets.json`` says of each what it is for, how many items its official list has, how it lies on disk, its licence,
where to get it and what we chose where the paper (arXiv 2502.03128, section 4.2) is silent.  Rows refer to the
recordings where they lie; only mixtures that nobody gives out and the sound of films are written.  Nothing is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from metis_lib import assets, audio
from metis_lib.config import AUDIO_RATE
from metis_lib.data.importers import id_of, is_testset, stated_path
from metis_lib.data.simulate import Degradation, Noises, Recording, Rooms, degrade
from metis_lib.data.store import UNKNOWN, Row, read_jsonl, read_manifest, read_span, write_jsonl, write_text
from metis_lib.errors import MetisError
from metis_lib.pipeline import LONGEST_PROMPT
from recipes import public

SEED = 2025
"""Of the choices that are ours."""
PLACES = ("clean", "noisy", "prompt", "interferer", "video")
"""What a row says by a path."""
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Protocol:
    """One test set, as ``testsets.json`` has it.

    Attributes:
        official: items of the official list; ``counts`` says of what, where the rows are fewer.
        paper: how many the paper names.
        reads, options: which of :data:`READERS` makes the rows, and how.
        second: what else is needed (``prompts`` of :func:`prepare`).
        ours: choices that the paper leaves open.
    """

    task: str
    language: str
    official: int
    paper: str
    reads: str
    layout: str
    licence: str
    get: str
    ours: str
    counts: str = "items"
    second: str = ""
    options: dict[str, Any] = field(default_factory=dict)


SETS = {
    name: Protocol(**values)
    for name, values in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}


@dataclass(frozen=True)
class Copy:
    """A local copy: ``root``, the ``second`` corpus, the folder of the manifest and the source of chance."""

    protocol: Protocol
    root: Path
    second: Path
    out: Path
    generator: np.random.Generator

    def find(self, *ways: str, root: Path | None = None) -> Path:
        """The first of ``ways`` that exists below the root; MetisError says how the set lies on disk."""
        root = root or self.root
        for place in (root / way for way in ways):
            if place.exists():
                return place
        raise MetisError(f"{root}: no {ways[0]} in it; the set has {self.protocol.layout}")

    def draw(self, among: Sequence[Any]) -> Any:
        """One of them."""
        return among[int(self.generator.integers(len(among)))]


def add_voice(target: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, float]:
    """Both voices [S] added as they are (the paper's section 4.2.3), the other cut or followed by silence to fit.

    Returns:
        (gain times the sum [S], gain); the gain is below 1 only where the sum would pass 0.99.
    """
    both = target.copy()
    both[: len(other)] += other[: len(target)]
    gain = min(1.0, 0.99 / float(np.abs(both).max()))
    return (gain * both).astype(np.float32), gain


# ---------------------------------------------------------------- of held-out recordings


def storage(out: Path) -> Callable[[str, np.ndarray], str]:
    """A function that writes [S] at 24 kHz under a name into ``out``, each name once, and returns the file's name."""
    written: dict[str, str] = {}

    def store(name: str, wav: np.ndarray) -> str:
        if name not in written:
            written[name] = f"{name}.flac"
            audio.write(out / written[name], wav, AUDIO_RATE)
        return written[name]

    return store


def simulated(
    voices: Mapping[str, Sequence[Row]], out: Path, *, each: int, generator: np.random.Generator,
    about: Callable[[Row], dict[str, Any]], speakers: Sequence[str], others: Sequence[str] = (),
    noises: Noises | None = None, rooms: Rooms | None = None,
    name: Callable[[str, str], str] = lambda id, kind: f"{id}-{kind}" if kind else id,
) -> Iterator[tuple[int, int, Row, Rows]]:  # fmt: skip
    """Rows for every task that an utterance can try, utterance by utterance; their recordings are written to ``out``.

    codec; se (the paper's degradation, but always with noise: noisy, snr_db, done); tts (prompt of the same voice); vc
    (``clean`` is the source, the prompt another voice's); tse (``noisy`` is the target and another voice,
    ``interferer``, added as they are; ``gain`` below 1 only against clipping).  What has no text serves se alone; a
    speaker who is not known is given neither prompt nor company.

    Args:
        voices: utterances of each speaker.
        out: folder of the test set.
        each: utterances of a voice.
        generator: source of chance.
        about: further columns of an utterance.
        speakers: whose utterances are items.
        others: who may be heard besides, each after the one before in a circle.
        noises, rooms: of se; without noises there are rows for tts alone.
        name: of the file of an utterance's id and what was made of it (``""``: the recording).

    Yields:
        Number of the speaker, of the utterance, the utterance, its rows.
    """
    store = storage(out)

    def recording(r: Row) -> tuple[np.ndarray, str]:
        wav = read_span(r).numpy()
        return wav, store(name(r.id, ""), wav)

    def prompts(speaker: str) -> list[Row]:
        return [r for r in voices[speaker] if r.duration <= LONGEST_PROMPT]

    for k, speaker in enumerate(speakers):
        said, alone = voices[speaker], speaker == UNKNOWN
        other = [] if alone or len(others) < 2 else prompts(others[(others.index(speaker) + 1) % len(others)])
        for i, r in enumerate(said[:each]):
            rows = Rows()
            wav, clean = recording(r)
            base = {
                "id": r.id, "speaker": speaker, "text": r.text, "clean": clean, "source": r.source,
                "licence": r.licence, **about(r), "duration": r.duration,
            }  # fmt: skip
            given: dict[str, Any] = {}
            later = [] if alone else [x for x in [*said[i + 1 :], *said[:i]] if x.duration <= LONGEST_PROMPT]
            if later:
                prompt = next((x for x in later if x.text), later[0])
                given = {"prompt": recording(prompt)[1], "prompt_text": prompt.text}
                rows += [{"task": "tts", **base, **given}] if r.text and prompt.text else []
            if noises is not None:
                noisy, scaled, done = degrade(
                    wav, AUDIO_RATE, noises=noises, generator=generator, rooms=rooms, speaker=speaker,
                    params=Degradation(noise_p=1.0),
                )  # fmt: skip
                rows += [{"task": "codec", **base}] if r.text else []
                kept = store(name(r.id, "clean"), scaled) if done["gain"] != 1 else clean
                made = {"clean": kept, "noisy": store(name(r.id, "noisy"), noisy), "snr_db": done["snr_db"]}
                rows.append({"task": "se", **base, **made, "done": done})
            if noises is not None and other and r.text:
                stranger = other[i % len(other)]
                stranger_wav, place = recording(stranger)
                rows.append({"task": "vc", **base, "prompt": place, "prompt_text": stranger.text,
                             "target_speaker": stranger.speaker})  # fmt: skip
                if given:
                    both, gain = add_voice(wav, stranger_wav)
                    mixture = store(name(r.id, "mixture"), both)
                    kept = store(name(r.id, "aligned"), gain * wav) if gain < 1 else clean
                    rows.append({"task": "tse", **base, **given, "noisy": mixture, "clean": kept, "interferer": place,
                                 "interferer_speaker": stranger.speaker, "gain": round(gain, 6)})  # fmt: skip
            yield k, i, r, rows


SECONDS = (1.0, 30.0)
"""Of a recording that is judged: the recogniser hears thirty."""
TALKERS = 4
"""Voices that babble is made of, at least: of two it would be one, and whom to keep nobody could tell."""


def of_recordings(
    manifest: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, *, split: str = "test", each: int = 5,
    seed: int = SEED,
) -> dict[str, Any]:  # fmt: skip
    """A test set of one's own held-out recordings, for every task that they can try (:func:`simulated`).

    Noise and rooms are those beside the manifest (``noise.jsonl``: its split ``test``; ``rirs.safetensors``); where no
    noise is held out, it is coloured or babble.  Recordings with a film serve lip-to-speech too.  The ids are made of
    letters, digits, ``_`` and ``-``.  The first rows of a task are one of each voice.

    Args:
        manifest: made by ``metis prepare manifest``.
        out: the folder, which takes the place of an older test set there; default ``testset`` beside the manifest.
        split: which recordings.
        each: of a voice, drawn; all that nobody knows the speaker of are one voice.
        seed: of all that is drawn.

    Returns:
        ``testset`` (folder), ``items`` (task: rows), ``recordings``, ``left_out``: how many are shorter or longer
        than :data:`SECONDS`; ``lacks``: why tasks have no rows.

    Raises:
        MetisError: no manifest, no recording of the split that can be judged, one that cannot be read, noise or rooms
            that cannot be, or a folder that holds something else.
    """
    manifest = Path(manifest).expanduser()
    folder, out = manifest.parent, (Path(out).expanduser() if out else manifest.parent / "testset").absolute()
    if each < 1 or seed < 0:
        raise MetisError(f"a test set has at least one recording a voice ({each}), and a seed is not negative ({seed})")
    if out.exists() and not (out.is_dir() and (is_testset(out) or not any(out.iterdir()))):
        raise MetisError(f"{out} holds something else than a test set; name another folder by --out")
    generator = np.random.default_rng(seed)
    held_out = [r for r in read_manifest(manifest) if r.split == split]
    fit = [r for r in held_out if SECONDS[0] <= r.duration <= SECONDS[1]]
    if not fit:
        what = f"{len(held_out)} recordings of the split {split!r}, none"
        raise MetisError(f"{manifest} has {what} of {SECONDS[0]:g} to {SECONDS[1]:g} s to make a test set of")
    voices, taken = defaultdict[str, list[Row]](list), set[str]()
    for r in fit:
        for place in (r.audio, *([r.root / r.video] if r.video else [])):
            if not place.is_file():
                raise MetisError(f"{manifest}: {place} of {r.id} is missing")
        short = id_of(Path(f"{r.id}.flac")).strip("-")[:80] or "recording"
        id = next(id for n in count() if (id := f"{short}-{n}" if n else short) not in taken)
        taken.add(id)
        voices[r.speaker].append(replace(r, id=id))
    drawn = {s: [voices[s][int(i)] for i in generator.permutation(len(voices[s]))] for s in sorted(voices)}
    named = [s for s in drawn if s != UNKNOWN]
    if any(row.get("split") == "test" for row in read_jsonl(folder / "noise.jsonl")):
        noises = Noises.load(folder, manifest=manifest, split="test", speech=60)
    else:
        talk = [drawn[s][0] for s in named[:60]] if len(named) >= TALKERS else []
        noises = Noises(speech=[Recording(r.speaker, read_span(r).numpy()) for r in talk])
    rooms = Rooms.load(folder) if (folder / "rirs.safetensors").is_file() else None
    order = {task: n for n, task in enumerate(("codec", "se", "tts", "vc", "tse", "l2s"))}
    rows: list[tuple[tuple[int, int, int], dict[str, Any]]] = []
    part, recordings = out.with_name(f".{out.name}.{os.getpid()}.part"), 0
    try:
        for k, i, r, found in simulated(
            drawn, part, each=each, generator=generator, about=lambda r: {"language": r.language}, speakers=list(drawn),
            others=named, noises=noises, rooms=rooms, name=lambda id, kind: f"{kind or 'recording'}/{id}",
        ):  # fmt: skip
            spoken = [row for row in found if row["task"] == "tts"]
            if r.video and r.start is None and r.end is None and spoken:
                found.append(spoken[0] | {"task": "l2s", "video": stated_path((r.root / r.video).resolve(), out)})
            rows += [((order[row["task"]], i, k), row) for row in found]
            recordings += 1
        write_jsonl(part / "manifest.jsonl", (row for _, row in sorted(rows, key=lambda pair: pair[0])))
        if out.exists():
            shutil.rmtree(out)
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    items = dict(Counter(sorted((row["task"] for _, row in rows), key=order.__getitem__)))
    return {
        "testset": str(out), "items": items, "recordings": recordings, "left_out": len(held_out) - len(fit),
        "lacks": lacks(fit, items),
    }  # fmt: skip


def lacks(rows: Sequence[Row], items: Mapping[str, int]) -> list[str]:
    """Why a test set of these recordings has no rows of some tasks, and what to do."""
    named = {r.speaker for r in rows} - {UNKNOWN}
    if not any(r.text for r in rows):
        return ["no recording has a text: rows of enhancement alone"]
    if not named:
        return [
            "no speaker is known, so nothing can be a prompt: no rows of tts, vc, tse; name them in the list, or all "
            "by metis prepare manifest --speaker NAME"
        ]
    why = {
        "tts": f"needs a second recording of the voice, of at most {LONGEST_PROMPT:g} s and with text as well",
        "vc": f"needs two voices that are named, the other with a recording of at most {LONGEST_PROMPT:g} s",
        "tse": "needs a second recording of the voice, and another voice",
    }
    return [f"no rows of {task}, which {reason}" for task, reason in why.items() if task not in items]


# ---------------------------------------------------------------- Seed-TTS


class Line(NamedTuple):
    """A line of Seed-TTS's lists; ``wav`` is the truth (tts) or the source (vc)."""

    utt: str
    prompt_text: str
    prompt: Path
    text: str
    wav: Path


def read_list(path: Path) -> list[Line]:
    """Lines ``utt|prompt text|prompt wav|text[|wav]``; MetisError names a broken one."""
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (4, 5) or not all(parts):
            if line.strip():
                raise MetisError(f"{path}:{number}: not utt|prompt text|prompt wav|text[|wav]: {line[:60]!r}")
            continue
        utt, prompt_text, prompt, text, *wav = parts
        place = path.parent / (wav[0] if wav else f"wavs/{utt}.wav")
        lines.append(Line(utt, prompt_text, path.parent / prompt, text, place))
    return lines


def _seedtts(copy: Copy) -> tuple[Rows, int]:
    listed = copy.protocol.options["list"]
    rows: Rows = []
    for line in read_list(copy.find(listed, f"seedtts_testset/{listed}")):
        voice = line.prompt.stem.split("-")[0]
        who = {"speaker": voice}
        if copy.protocol.task == "vc":
            who = {"speaker": line.wav.stem, "target_speaker": voice}
        rows.append({
            "id": line.utt, **who, "text": line.text, "clean": line.wav, "prompt": line.prompt,
            "prompt_text": line.prompt_text,
        })  # fmt: skip
    return rows, len(rows)


# ---------------------------------------------------------------- LibriSpeech, VCTK


class Said(NamedTuple):
    """An utterance of a corpus."""

    id: str
    path: Path
    speaker: str
    text: str


def _test_clean(copy: Copy, root: Path) -> dict[str, Said]:
    """Utterances of LibriSpeech test-clean by id, in order; texts in small letters."""
    found: dict[str, Said] = {}
    base = copy.find("LibriSpeech/test-clean", "test-clean", ".", root=root)
    for path in sorted(base.glob("*/*/*.trans.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            id, _, text = line.partition(" ")
            found[id] = Said(id, path.parent / f"{id}.flac", id.split("-")[0], text.lower())
    if not found:
        raise MetisError(f"{root}: no LibriSpeech test-clean; it has SPEAKER/CHAPTER/*.trans.txt")
    return found


def _prompted(said: Said, prompt: Said) -> dict[str, Any]:
    return {
        "id": said.id, "speaker": said.speaker, "text": said.text, "clean": said.path, "prompt": prompt.path,
        "prompt_text": prompt.text,
    }  # fmt: skip


def _by_speaker(said: Sequence[Said]) -> dict[str, list[Said]]:
    voices = defaultdict[str, list[Said]](list)
    for one in said:
        voices[one.speaker].append(one)
    return voices


def _librispeech(copy: Copy) -> tuple[Rows, int]:
    said, rows = _test_clean(copy, copy.root), Rows()
    try:
        seconds = {id: soundfile.info(one.path).duration for id, one in said.items()}
    except soundfile.LibsndfileError as error:
        raise MetisError(f"{copy.root}: a recording is missing or damaged ({str(error).splitlines()[0]})") from None
    low, high = copy.protocol.options["seconds"]
    short, long = copy.protocol.options["prompt_seconds"]
    voices = _by_speaker(list(said.values()))
    for one in said.values():
        prompts = [x for x in voices[one.speaker] if x.id != one.id and short <= seconds[x.id] <= long]
        if low <= seconds[one.id] <= high and prompts:
            rows.append(_prompted(one, copy.draw(prompts)))
    return rows, len(said)


def _vctk(copy: Copy) -> tuple[Rows, int]:
    base = copy.find("txt", "VCTK-Corpus/txt", "VCTK-Corpus-0.92/txt").parent
    texts = {path.stem: path for path in base.glob("txt/*/*.txt")}
    said = []
    for path in sorted([*base.glob("wav48_silence_trimmed/*/*_mic1.flac"), *base.glob("wav48/*/*.wav")]):
        id = path.stem.removesuffix("_mic1")
        if id in texts:
            said.append(Said(id, path, id.split("_")[0], texts[id].read_text(encoding="utf-8").strip()))
    voices, rows = _by_speaker(said), Rows()
    if len(voices) < 2:
        raise MetisError(f"{base}: fewer than two speakers with text and sound; the set has {copy.protocol.layout}")
    count = min(copy.protocol.official, len(said))
    for one in (said[i] for i in sorted(copy.generator.choice(len(said), count, replace=False))):
        same = copy.protocol.options["prompt"] == "same"
        who = one.speaker if same else copy.draw([name for name in voices if name != one.speaker])
        prompts = [x for x in voices[who] if x.id != one.id and x.text != one.text]
        if prompts:
            rows.append(_prompted(one, copy.draw(prompts)) | {"target_speaker": who})
    return rows, len(rows)


# ---------------------------------------------------------------- mixtures


def _libri2mix(copy: Copy) -> tuple[Rows, int]:
    rates = copy.protocol.options["rates"]
    base = copy.find(*(f"{above}{rate}/test/mix_clean" for rate in rates for above in ("", "Libri2Mix/"))).parent
    said = _test_clean(copy, copy.second)
    voices, fixed, rows = _by_speaker(list(said.values())), dict[tuple[str, str], str](), Rows()
    seconds = {id: soundfile.info(one.path).duration for id, one in said.items()}
    listed = base / "map_mixture2enrollment"  # lines: mixture, target, s1/MIXTURE or s2/MIXTURE
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []:
        mixture, who, where = line.split()
        fixed[mixture, who] = where
    for path in sorted((base / "mix_clean").glob("*.wav")):
        target, _, other = path.stem.partition("_")
        if target not in said or other not in said:
            raise MetisError(f"{copy.second}: no text of {path.stem}; is it the whole LibriSpeech test-clean?")
        prompts = [x for x in voices[said[target].speaker] if x.id != target and seconds[x.id] <= LONGEST_PROMPT]
        part, _, name = fixed.get((path.stem, target), "").partition("/")
        enrolled = said[name.split("_")[int(part[1]) - 1]] if part else None  # as it was read: in max it is padded
        if enrolled and seconds[enrolled.id] <= LONGEST_PROMPT:
            prompt = enrolled
        elif prompts:
            prompt = copy.draw(prompts)
        else:
            raise MetisError(f"{copy.second}: no other short utterance of the reader of {target} for a prompt")
        rows.append(_prompted(said[target], prompt) | {
            "id": path.stem, "noisy": path, "clean": base / "s1" / path.name, "interferer": base / "s2" / path.name,
            "interferer_speaker": said[other].speaker, "subset": base.parent.relative_to(base.parents[2]).as_posix(),
        })  # fmt: skip
    return rows, len(rows)


def emilia(root: Path) -> Iterator[dict[str, Any]]:
    """What Emilia says of each utterance below ``root``, its ``path`` added: lines of lists, or files beside them."""
    for listed in sorted(root.rglob("*.jsonl")):
        for number, line in enumerate(listed.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                about = json.loads(line)
                yield about | {"path": listed.parent / about["wav"]}
            except (ValueError, KeyError, TypeError):
                raise MetisError(f"{listed}:{number}: not a line of Emilia's list: {line[:60]!r}") from None
    for beside in sorted(root.rglob("*.json")):
        try:
            yield json.loads(beside.read_text(encoding="utf-8")) | {"path": beside.with_suffix(".mp3")}
        except (ValueError, TypeError):
            raise MetisError(f"{beside}: not what Emilia says of a recording") from None


def _emiliamix(copy: Copy) -> tuple[Rows, int]:
    low, high = copy.protocol.options["seconds"]
    said, rows = [], Rows()
    for about in emilia(copy.root):
        try:
            if about["language"] == copy.protocol.language and low <= float(about["duration"]) <= high:
                said.append(Said(about["id"], about["path"], about["speaker"], about["text"].strip()))
        except (KeyError, TypeError, ValueError) as error:
            raise MetisError(f"{about['path']}: Emilia's entry lacks {error}") from None
    voices = _by_speaker(sorted(said))
    targets = [one for ones in voices.values() if len(ones) > 1 for one in ones]
    if len(voices) < 2 or not targets:
        raise MetisError(f"{copy.root}: no two speakers and two utterances of one; the set has {copy.protocol.layout}")
    count = min(copy.protocol.official, len(targets))
    for target in (targets[i] for i in sorted(copy.generator.choice(len(targets), count, replace=False))):
        prompt = copy.draw([x for x in voices[target.speaker] if x != target])
        other = copy.draw(voices[copy.draw([name for name in voices if name != target.speaker])])
        clean, wav = (audio.read(one.path, AUDIO_RATE).numpy() for one in (target, other))
        mixture, gain = add_voice(clean, wav)
        row = _prompted(target, prompt) | {
            "noisy": copy.out / "mixtures" / f"{target.id}.flac", "interferer": other.path,
            "interferer_speaker": other.speaker, "gain": round(gain, 6), "reference": "asr",
        }  # fmt: skip
        audio.write(row["noisy"], mixture, AUDIO_RATE)
        if gain < 1:
            row["clean"] = copy.out / "mixtures" / f"{target.id}-aligned.flac"
            audio.write(row["clean"], gain * clean, AUDIO_RATE)
        rows.append(row)
    return rows, len(rows)


# ---------------------------------------------------------------- DNS-Challenge 2020, LRS


def _dns2020(copy: Copy) -> tuple[Rows, int]:
    rows = [r for r in public.dns_items(copy.root, copy.out) if r["subset"] == copy.protocol.options["subset"]]
    here = os.path.realpath(copy.out)  # what their paths are relative to
    places = [{k: Path(os.path.normpath(os.path.join(here, r[k]))) for k in PLACES if k in r} for r in rows]
    return [row | place for row, place in zip(rows, places, strict=True)], len(rows)


def _lrs(copy: Copy) -> tuple[Rows, int]:
    listed, rows = SETS["seedtts-en"].options["list"], Rows()
    prompts = read_list(copy.find(listed, f"seedtts_testset/{listed}", root=copy.second))
    for entry in public.lip_entries(copy.protocol.options["corpus"], copy.root):
        if entry["split"] != "test":
            continue
        film, prompt = Path(entry["video"]), copy.draw(prompts)
        sound = copy.out / "audio" / film.relative_to(copy.root).with_suffix(".flac")
        rows.append({
            "id": entry["id"], "speaker": entry["speaker"], "text": " ".join(entry["text"].split()), "video": film,
            "clean": public.film_sound(film, sound), "prompt": prompt.prompt, "prompt_text": prompt.prompt_text,
        })  # fmt: skip
    return rows, len(rows)


READERS: dict[str, Callable[[Copy], tuple[Rows, int]]] = {
    "seedtts": _seedtts, "librispeech": _librispeech, "vctk": _vctk, "libri2mix": _libri2mix,
    "emiliamix": _emiliamix, "dns2020": _dns2020, "lrs": _lrs,
}  # fmt: skip
"""Each makes rows (paths absolute) of a copy, and counts what the official list counts."""


# ---------------------------------------------------------------- preparing


def write_card(name: str, protocol: Protocol, out: Path, rows: Rows, found: int, seed: int) -> None:
    """``card.md`` beside the manifest: what the set is, how many items, what was chosen and by which seed."""
    lines = [f"# Test set `{name}`", ""]
    lines += [f"{len(rows)} items for {protocol.task} ({protocol.language}); {protocol.counts} found: {found}."]
    lines += [f"Official list: {protocol.official}. The paper says: {protocol.paper}. Seed: {seed}.", ""]
    lines += [f"Ours: {protocol.ours}", "", f"Licence: {protocol.licence}. From: {protocol.get}.", ""]
    write_text(out / "card.md", "\n".join(lines))


def prepare(
    name: str, root: str | os.PathLike[str] | None, out: str | os.PathLike[str] | None = None, *,
    prompts: str | os.PathLike[str] | None = None, seed: int = SEED, allow_count: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write ``manifest.jsonl`` and ``card.md`` of a public test set.

    Args:
        name: a key of :data:`SETS`.
        root: the local copy.
        out: the folder; default ``$METIS_HOME/testsets/NAME``, where ``metis evaluate --testset NAME`` finds it.
        prompts: the second corpus of sets that need one (:attr:`Protocol.second`).
        seed: of the choices that are ours.
        allow_count: take a copy that has not as many items as the official list.

    Returns:
        ``testset`` (folder), ``items``, ``found`` and ``official``.

    Raises:
        MetisError: unknown set, a folder that is no copy of it, a broken list, missing files, another count.
    """
    if name not in SETS:
        raise MetisError(f"unknown test set {name!r}; choose one of unseen, seen, {', '.join(SETS)}")
    protocol = SETS[name]
    if root is None:
        raise MetisError(f"{name} is made of a local copy; name its folder by --root (from {protocol.get})")
    root = Path(root).expanduser().absolute()
    out = Path(out).expanduser() if out else assets.metis_home() / "testsets" / name
    if protocol.second and prompts is None:
        raise MetisError(f"{name} needs {protocol.second} too; name the folder by --prompts")
    second = Path(prompts).expanduser().absolute() if prompts else root
    for folder in (root, second):
        if not folder.is_dir():
            raise MetisError(f"{folder}: no such folder; {name} is given out at {protocol.get}")
    copy = Copy(protocol, root, second, out.absolute(), np.random.default_rng(seed))
    rows, found = READERS[protocol.reads](copy)
    if found != protocol.official and not allow_count:
        what = f"{name}: {found} {protocol.counts} here, {protocol.official} in the official list"
        raise MetisError(f"{what}; a part of it is taken with --allow-count")
    if not rows:
        raise MetisError(f"{root}: nothing of {name} in it; the set has {protocol.layout}")
    twice = [id for id, n in Counter(row["id"] for row in rows).items() if n > 1]
    missing = [row[key] for row in rows for key in PLACES if key in row and not row[key].is_file()]
    if twice or missing:
        what = f"{len(twice)} ids come twice, first {[*twice, ''][0]}" if twice else f"no recording at {missing[0]}"
        raise MetisError(f"{name}: {what}{f' ({len(missing)} are missing)' if missing else ''}")
    common = {"task": protocol.task, "testset": name, "seed": seed, "licence": protocol.licence, "source": protocol.get}
    for row in rows:
        row |= {key: stated_path(row[key], out) for key in PLACES if key in row}
        row |= common | {"language": protocol.language}
    write_jsonl(out / "manifest.jsonl", rows)
    write_card(name, protocol, out, rows, found, seed)
    return {"testset": str(out), "items": len(rows), "found": found, "official": protocol.official}
