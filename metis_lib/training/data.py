"""Batches for trainers: sources that make the batch of given items, and the plan of which items come when.

A source knows the length of its items in frames and makes a batch from (items, epoch, step), drawing everything
random from (seed, epoch, item) or (seed, step): the same batch on any process, in any worker, at any time.
:class:`Feed` plans batches by frame budget, items of like length together, and reads ahead in workers.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from metis_lib import audio
from metis_lib.assets import metis_home, sha256_file
from metis_lib.config import AUDIO_RATE, FRAME_RATE, SSL_RATE
from metis_lib.data.examples import Example, Pool, Simulated, Simulation, Sources
from metis_lib.data.shards import Shards, batches_of
from metis_lib.data.simulate import HOP, Noises, Rooms, degrade
from metis_lib.data.store import UNKNOWN, FlatStore, read_jsonl, read_manifest, store_waves, write_text
from metis_lib.errors import MetisError
from metis_lib.models.masked import MaskingSettings, draw_masks
from metis_lib.models.stage1 import spread, stretch
from metis_lib.tasks import like
from metis_lib.tokenizers.ssl import SHORTEST, fbank
from metis_lib.tokenizers.text import VOICES, PhoneTokenizer
from metis_lib.training.loop import TrainSettings
from metis_lib.training.teacher import Taught

Batch = dict[str, Any]


class Source(Protocol):
    """``lengths [N]`` in frames (0: never used), ``ends`` of shards where there are many, batches of items."""

    @property
    def lengths(self) -> np.ndarray: ...

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        """The batch of ``items`` in epoch ``epoch`` at optimiser step ``step``."""
        ...


def chance(*key: int) -> np.random.Generator:
    """A numpy generator of its own for a key of whole numbers."""
    return np.random.default_rng(key)


def torch_chance(*key: int) -> torch.Generator:
    """The same as a torch generator."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))


def padded(arrays: Sequence[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Stack tensors ``[T, ...]`` of different lengths: ``[B, T, ...]`` and lengths ``[B]``."""
    lengths = torch.tensor([len(array) for array in arrays])
    return pad_sequence(list(arrays), batch_first=True, padding_value=value), lengths


# ---------------------------------------------------------------- the plan


def plan(
    lengths: np.ndarray, frames: int, group: int, *, seed: int, epoch: int, ends: np.ndarray | None = None,
    window: int = 100_000,
) -> Iterator[list[list[int]]]:  # fmt: skip
    """The global batches of one epoch, each ``group`` batches of items of like length.

    Whole shards (``ends``) in random order fill a window of about ``window`` items, which is sorted by (jittered)
    length, cut and shuffled: memory stays flat and the disk is read shard by shard.  The last group of a window is
    filled up with batches of the same window.
    """
    rng = chance(seed, epoch)
    ends = np.array([len(lengths)]) if ends is None else np.asarray(ends)
    starts, pool, held = np.concatenate([[0], ends[:-1]]), [], 0
    for k, block in enumerate(order := rng.permutation(len(ends))):
        usable = starts[block] + np.flatnonzero(lengths[starts[block] : ends[block]])
        pool.append(usable)
        held += len(usable)
        if held < window and k + 1 < len(order):
            continue
        items, pool, held = np.concatenate(pool), [], 0
        items = items[np.argsort(lengths[items] * rng.uniform(0.9, 1.1, len(items)), kind="stable")]
        batches = batches_of(items, lengths, frames)
        while batches and len(batches) % group:
            batches.append(batches[int(rng.integers(len(batches)))])
        for g in rng.permutation(len(batches) // group):
            yield batches[g * group : (g + 1) * group]


class _Fetch(Dataset[Batch]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, which: tuple[int, int, list[int]]) -> Batch:
        epoch, step, items = which
        return self.source.batch(items, epoch=epoch, step=step)


def _begin_worker(worker: int) -> None:
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):  # sent to the whole group; it is for the trainer to end the run
        signal.signal(number, signal.SIG_IGN)


def read(source: Source, positions: Iterable[tuple[int, int, list[int]]], workers: int = 0) -> Iterable[Batch]:
    """The batches of (epoch, step, items), in order, made here or ahead by ``workers`` processes."""
    if not workers:
        return map(_Fetch(source).__getitem__, positions)  # goes on after a batch that cannot be made, as a loader does
    return DataLoader(
        _Fetch(source), batch_size=None, sampler=positions,  # type: ignore[arg-type]
        num_workers=workers, prefetch_factor=4, worker_init_fn=_begin_worker, multiprocessing_context="forkserver",
    )  # fmt: skip


class Feed:
    """The batches of a run, from any step on.

    Args:
        source: makes them.
        settings: ``frames`` a batch and the seed.
        workers: processes that make batches ahead (0: this one does, when asked).
    """

    def __init__(self, source: Source, settings: TrainSettings, *, workers: int = 0) -> None:
        if not np.any(source.lengths):
            raise MetisError("no recording can be used: all are too short, too long, or lack their text")
        self.source, self.settings, self.workers = source, settings, workers

    def positions(self, step: int, rank: int, world: int, accumulate: int) -> Iterator[tuple[int, int, list[int]]]:
        """(epoch, step, items) of every batch of one process, from ``step`` on."""
        at, s = 0, self.settings
        for epoch in itertools.count():
            ends = getattr(self.source, "ends", None)
            groups = plan(self.source.lengths, s.frames, world * accumulate, seed=s.seed, epoch=epoch, ends=ends)
            for group in groups:
                if at >= step:
                    for items in group[rank * accumulate : (rank + 1) * accumulate]:
                        yield epoch, at, items
                at += 1

    def open(self, step: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[Batch]:
        """Endless batches of process ``rank`` of ``world``, ``accumulate`` a step, from step ``step`` on."""
        positions = self.positions(step, rank, world, accumulate)
        return iter(read(self.source, positions, self.workers))

    def held_out(self, count: int) -> list[Batch]:
        """The first ``count`` batches, for validation."""
        return list(itertools.islice(self.open(), count))


# ---------------------------------------------------------------- where nano's data lies


FILES = "recordings.json"
"""Sizes and times of the recordings that a folder was prepared from."""


def prepared(manifest: Path) -> Path:
    """Folder of what is prepared from a manifest: another one whenever it changes, or a recording that it names.

    A recording is known by size and time of its file; one that is gone since does not matter.
    """
    if not manifest.is_file():
        raise MetisError(f"{manifest}: no such manifest; make the nano corpus by `metis prepare nano`")
    stat = manifest.stat()
    return _prepared(manifest.resolve(), metis_home(), stat.st_mtime_ns, stat.st_size)


@lru_cache
def _prepared(manifest: Path, home: Path, mtime_ns: int, size: int) -> Path:
    """:func:`prepared`, looked for once while the manifest stays: a process reads what it has begun with."""
    now: dict[str, list[int] | None] = {}
    for row in read_manifest(manifest):
        for name in filter(None, (row.path, row.video)):
            there = (row.root / name).stat() if (row.root / name).is_file() else None
            now[name] = [there.st_size, int(there.st_mtime)] if there else None
    first = home / "prepared" / sha256_file(manifest)[:12]
    for folder in (first, *sorted(first.parent.glob(f"{first.name}-*"))):
        stamp = folder / FILES
        if not stamp.is_file() and folder == first:  # it is new, or of a version that did not look
            write_text(stamp, json.dumps(now))
        known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
        if all(known.get(path) == facts for path, facts in now.items() if facts):
            return folder
    told = json.dumps(now)
    folder = first.with_name(f"{first.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}")
    write_text(folder / FILES, told)
    return folder


def languages_mark() -> str:
    """What is added to the name of a folder of phones where languages were added (docs/new_language.md)."""
    added = sorted(set(VOICES) - {"en"})
    return f"-{'-'.join(added)}" if added else ""


def spare(lengths: np.ndarray, seed: int, epoch: int, items: Sequence[int], count: int = 10) -> list[int]:
    """Other items, for a batch of which none turns out to be usable: one bad recording does not stop a run."""
    usable = np.flatnonzero(lengths)
    return chance(seed, epoch, items[0], 4).choice(usable, min(count, len(usable)), replace=False).tolist()


def waves_of(manifest: Path, split: str) -> FlatStore:
    """Wave store of one split of a manifest, made on first use."""
    rows = [row for row in read_manifest(manifest) if row.split == split]
    if not rows:
        raise MetisError(f"{manifest} has no recordings of the split {split!r}")
    return store_waves(rows, prepared(manifest) / f"waves-{split}{languages_mark()}")


def sources_of(manifest: Path, split: str, pool: Pool | None = None) -> Sources:
    """Other speakers, noise and rooms beside a manifest; held-out recordings hear held-out noise."""
    folder = manifest.parent
    held_out = {row.get("split", "train") for row in read_jsonl(folder / "noise.jsonl")} - {"train"}
    chosen = "test" if split != "train" and "test" in held_out else "train"
    noises = Noises.load(folder, manifest=manifest, split=chosen)
    return Sources(pool, noises, Rooms.load(folder) if (folder / "rirs.safetensors").is_file() else None)


# ---------------------------------------------------------------- sources


@dataclass
class Crops:
    """Random stretches of ``frames`` frames for the acoustic codec: ``wav [B, S]``; long recordings more often."""

    waves: FlatStore
    frames: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = self.waves.ends - self.waves.starts
        self.lengths = np.full(max(1, int(sizes.sum()) // (self.frames * HOP)), self.frames)

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        out, size = np.zeros((len(items), self.frames * HOP), np.float32), self.frames * HOP
        for row, item in zip(out, items, strict=True):
            rng = chance(self.seed, epoch, item)
            i = int(np.searchsorted(self.waves.ends, rng.integers(self.waves.ends[-1]), side="right"))
            first = int(rng.integers(max(self.waves.length(i) - size, 0) + 1))
            piece = self.waves[i][first : first + size]
            row[: len(piece)] = piece / 32767
        return {"wav": torch.from_numpy(out)}


def _heard(wav_24k: np.ndarray) -> Tensor:
    """Filterbank frames ``[T, 160]`` of 24 kHz samples, without a last half frame."""
    wav = audio.resample(torch.from_numpy(np.ascontiguousarray(wav_24k)), AUDIO_RATE, SSL_RATE)
    wav = torch.nn.functional.pad(wav, (0, max(0, SHORTEST - len(wav))))
    features, lengths = fbank([wav])
    return features[0, : int(lengths[0])]


def _phone_ids(texts: Iterable[tuple[str, str]], tokenizer: PhoneTokenizer) -> list[list[int]]:
    """Phone ids of texts and their languages; empty where a text holds nothing to say."""
    out: list[list[int]] = []
    for text, language in texts:
        try:
            out.append(tokenizer.encode(text, language) if text else [])
        except MetisError:
            out.append([])
    return out


@dataclass
class Speech:
    """Filterbanks for the SSL encoder and the semantic codec.

    A batch: ``heard [B, T, 160]`` (degraded with probability ``noisy``), ``clean [B, T, 160]``, ``lengths [B]``,
    ``spans [B, T]`` (frames to hide, about ``share`` of each utterance), ``phones`` (a list an utterance; empty where
    cut or unknown), with a teacher ``taught [B, T, C]``.  Longer recordings are cut at random to ``longest`` frames.
    """

    waves: FlatStore
    sources: Sources | None = None
    noisy: float = 0.3
    longest: int = 300
    seed: int = 0
    share: float = 0.35
    taught: Taught | None = None

    def __post_init__(self) -> None:
        frames = (self.waves.ends - self.waves.starts) // HOP
        self.lengths = np.where(frames >= 15, np.minimum(frames, self.longest), 0)
        texts = ((item["text"], item.get("language", "en")) for item in self.waves.items)
        self.phones = _phone_ids(texts, PhoneTokenizer())

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        phones: list[list[int]] = []
        clean, heard, spans, taught = (list[Tensor]() for _ in range(4))
        for i in items:
            rng, wav = chance(self.seed, epoch, i), self.waves[i]
            first = int(rng.integers(max(len(wav) - self.longest * HOP, 0) + 1))
            first -= first % HOP if self.taught else 0
            phones.append(self.phones[i] if len(wav) <= self.longest * HOP else [])
            wav = wav[first : first + self.longest * HOP].astype(np.float32) / 32767
            clean.append(_heard(wav))
            if self.sources is not None and rng.random() < self.noisy and np.abs(wav).max() > 0:
                who = self.waves.items[i]["speaker"]
                noisy, _, _ = degrade(
                    wav, AUDIO_RATE, noises=self.sources.noises, rooms=self.sources.rooms, generator=rng, speaker=who
                )
                heard.append(_heard(noisy))
            else:
                heard.append(clean[-1])
            spans.append(span_mask(len(clean[-1]), rng, self.share))
            if self.taught:
                features = self.taught(i, first // HOP, len(clean[-1]))
                taught.append(torch.nn.functional.pad(features, (0, 0, 0, len(clean[-1]) - len(features))))
        x, lengths = padded(clean)
        out = {"clean": x, "heard": padded(heard)[0], "lengths": lengths, "spans": padded(spans)[0], "phones": phones}
        return out | ({"taught": padded(taught)[0]} if taught else {})


def span_mask(frames: int, rng: np.random.Generator, share: float = 0.35, span: int = 10) -> Tensor:
    """Random spans of ``span`` frames that hide about ``share`` of an utterance: ``[T]`` bool, at least one frame."""
    starts = rng.random(frames) < 1 - (1 - share) ** (1 / span)
    starts[int(rng.integers(frames))] |= not starts.any()
    return torch.from_numpy(np.convolve(starts, np.ones(span, int))[:frames] > 0)


def timed_hint(phones: Tensor, durations: Tensor, prompt: int, frames: int, jitter: Tensor) -> Tensor:
    """Frame-level phones ``[frames]`` as generation has them: those of the prompt over its frames, the others over the
    rest, by their durations, each changed by a factor (``jitter [L]``), for predicted ones are not exact."""
    middles, weights = durations.cumsum(0) - durations / 2, (durations * jitter).clamp(min=0.1)
    count = int((middles < prompt).sum())
    before, rest = slice(max(count, 1)), slice(min(count, len(phones) - 1), None)
    return torch.cat([
        spread(phones[before], weights[before], prompt), spread(phones[rest], weights[rest], frames - prompt),
    ])  # fmt: skip


def phone_batch(ids: Sequence[Sequence[int]], frames: Sequence[int], pad: int) -> Batch:
    """``phones`` and ``phone_mask [B, L]`` (padding on the left: phones stand right before the frames) and the
    evenly stretched ``hint [B, T]``."""
    rows = [torch.tensor(list(p)) for p in ids]
    phones = pad_sequence(rows, True, pad, "left")
    hint, _ = padded([stretch(p[None], n)[0] for p, n in zip(rows, frames, strict=True)], pad)
    return {"phones": phones, "phone_mask": phones != pad, "hint": hint}


def about_as_long(known: Sequence[tuple[int, int]], wanted: float, generator: np.random.Generator) -> int:
    """A number out of ``known`` (frames, number; in rising order), one of the four nearest to ``wanted`` frames: the
    prompts of a batch are of like length, for padding costs as much as speech."""
    at = min(max(bisect.bisect(known, (int(wanted), 0)) - 2, 0), max(len(known) - 4, 0))
    some = known[at : at + 4]
    return some[int(generator.integers(len(some)))][1]


@dataclass
class Tokens:
    """Token shards for stage 1 (pre-training, text-to-speech) and stage 2.

    A batch: ``tokens [B, T]`` (SSL), ``lengths [B]``, ``t [B]``, ``prompt [B]``, ``hidden [B, T]``; with ``text`` also
    :func:`phone_batch`, which a step leaves out (and the prompts too) with probability ``dropout``; with ``timed``
    (durations by id) the hint follows them and ``durations [B, L]`` are there; with
    ``layer_weights`` (stage 2) also ``codes [B, T, Q]`` and the ``layer`` that this step masks.  With probability
    ``joined`` another recording of the speaker (of at most ``JOINED`` frames) stands before each of a step, as its
    prompt: a whole sentence, as generation has it; the batch then has more frames than it was planned for.
    """

    shards: Shards
    masking: MaskingSettings = MaskingSettings()
    text: bool = False
    dropout: float = 0.0
    layer_weights: Sequence[float] | None = None
    shortest: int = 25
    longest: int = 600
    seed: int = 0
    timed: Mapping[str, np.ndarray] | None = None
    joined: float = 0.0
    tokenizer: PhoneTokenizer = field(default_factory=PhoneTokenizer)

    JOINED: ClassVar[int] = 250

    def __post_init__(self) -> None:
        frames, self.ends = self.shards.lengths(), self.shards.ends
        self.lengths = np.where(frames >= self.shortest, np.minimum(frames, self.longest), 0)
        records = [self.shards.record(i) for i in range(len(frames))] if self.text or self.joined else []
        if self.text:  # of a cut recording nobody knows which words are left
            ids = [self._ids(record) for record in records]  # with phones that the table lacks: not a text to learn
            whole = (len(r.get("phones", ())) == len(found) for r, found in zip(records, ids, strict=True))
            worded = np.array([0 < len(found) < 400 and same for found, same in zip(ids, whole, strict=True)])
            self.lengths = np.where(worded & (frames <= self.longest), self.lengths, 0)
        self.voices: dict[str, list[tuple[int, int]]] = {}
        short = np.flatnonzero((self.lengths > 0) & (frames <= self.JOINED)) if self.joined else frames[:0]
        for i in short[np.argsort(frames[short], kind="stable")].tolist():
            if (speaker := records[i].get("speaker", UNKNOWN)) != UNKNOWN:
                self.voices.setdefault(speaker, []).append((int(frames[i]), i))

    def _after_another(self, i: int, epoch: int, frames: float) -> list[tuple[Any, ...]]:
        """Recording ``i`` after another one of its speaker of about so many frames, where there is one."""
        own = self.shards[i]
        others = [one for one in self.voices.get(own[0].get("speaker", ""), ()) if one[1] != i]
        if not others:
            return [own]
        return [self.shards[about_as_long(others, frames, chance(self.seed, epoch, i, 4))], own]

    def _ids(self, record: dict[str, Any]) -> list[int]:
        return [self.tokenizer.vocab[p] for p in record.get("phones", ()) if p in self.tokenizer.vocab]

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        told = self.text and chance(self.seed, step, 1).random() >= self.dropout
        masking = self.masking if told or not self.text else replace(self.masking, prompt_probability=0.0)
        arrays, masks = [], []
        # all of a step or none: single long rows would be paid for in padding
        share, length = chance(self.seed, step, 5).random(2)
        joined = (told or not self.text) and share < self.joined
        wanted = self.shortest + length * (self.JOINED - self.shortest)
        groups = [self._after_another(int(i), epoch, wanted) if joined else [self.shards[int(i)]] for i in items]
        for i, (*before, (_, tokens, *_)) in zip(items, groups, strict=True):
            first = int(chance(self.seed, epoch, i, 1).integers(max(len(tokens) - self.longest, 0) + 1))
            own = tokens[first : first + self.longest]
            free = replace(masking, prompt_probability=0.0) if before else masking
            t, prompt, hidden = draw_masks(torch.tensor([len(own)]), free, torch_chance(self.seed, epoch, i))
            for _, other, *_ in before:
                own = np.concatenate([other, own])
                prompt, hidden = prompt + len(own) - hidden.shape[1], F.pad(hidden, (len(own) - hidden.shape[1], 0))
            arrays.append(torch.from_numpy(own.astype(np.int64)))
            masks.append((t, prompt, hidden))
        tokens, lengths = padded(arrays)
        out = {"tokens": tokens[..., 0], "lengths": lengths} | _masks(masks)
        if told:
            records = [[record for record, *_ in group] for group in groups]
            ids = [[phone for record in row for phone in self._ids(record)] for row in records]
            out |= phone_batch(ids, lengths.tolist(), self.tokenizer.pad_id)
            if self.timed is not None:
                names = [[record["id"] for record in row] for row in records]
                out |= self._times(out, ids, items, names, epoch)
        if self.layer_weights is not None:
            odds = np.array(self.layer_weights)
            layer = int(chance(self.seed, step, 2).choice(len(odds), p=odds / odds.sum()))
            out |= {"codes": tokens[..., 1:], "layer": layer}
        return out

    def _times(
        self, batch: Batch, ids: Sequence[list[int]], items: Sequence[int], names: Sequence[list[str]], epoch: int
    ) -> Batch:
        """``durations [B, L]`` in frames (0: not to be learned) and the ``hint`` by them."""
        known, hints, nothing = [], [], np.zeros(0, np.int16)
        for row, (i, phones) in enumerate(zip(items, ids, strict=True)):
            found = np.concatenate([(self.timed or {}).get(name, nothing) for name in names[row]])
            n, prompt = int(batch["lengths"][row]), int(batch["prompt"][row])
            fits = len(found) == len(phones) > 0
            durations = torch.from_numpy(found.astype(np.float32)) if fits else torch.zeros(len(phones))
            jitter = torch.from_numpy(chance(self.seed, epoch, i, 3).lognormal(0.0, 0.25, len(phones))).float()
            # durations are learned, and asked for, of one recording at a time
            known.append(durations if len(names[row]) == 1 else torch.zeros_like(durations))
            hints.append(
                timed_hint(torch.tensor(phones), durations, prompt, n, jitter) if fits else batch["hint"][row, :n]
            )
        return {"durations": pad_sequence(known, True, 0.0, "left"), "hint": padded(hints, self.tokenizer.pad_id)[0]}


def _masks(masks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
    times, prompts, hidden = zip(*masks, strict=True)
    return {"t": torch.cat(times), "prompt": torch.cat(prompts), "hidden": padded([h[0] for h in hidden])[0]}


def masks_after(
    source: Any, items: Sequence[int], given: Sequence[int], lengths: Tensor, epoch: int, lost: bool
) -> Batch:
    """``t``, ``prompt``, ``hidden`` and ``exists`` of rows that begin with ``given`` frames, which, if ``lost``, go
    unseen with probability ``source.dropout``."""
    free, masks = replace(source.masking, prompt_probability=0.0), []
    exists = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    for row, (i, n) in enumerate(zip(map(int, items), lengths.tolist(), strict=True)):
        prompt = min(given[row], n - 1)
        t, _, hidden = draw_masks(torch.tensor([n]), free, torch_chance(source.seed, epoch, i))
        hidden[:, :prompt] = False
        hidden[0, prompt] |= ~hidden.any()
        masks.append((t, torch.tensor([prompt]), hidden))
        if lost and chance(source.seed, epoch, i, 2).random() < source.dropout:
            exists[row, :prompt] = False
    return _masks(masks) | {"exists": exists}


@dataclass
class Adaptation:
    """Simulated examples for fine-tuning a task from audio (:mod:`metis_lib.data.examples`).

    A batch is of one task, drawn by ``odds`` for each step (Omni).  It has ``target [B, T, 160]`` (filterbanks of what
    is to be said) or, where ``shards`` hold the recording whole, ``tokens [B, T]``; ``condition [B, T, 160]`` (audio
    tasks), ``lengths``, ``t``, ``prompt``, ``hidden`` and ``exists [B, T]``; :func:`phone_batch` for text.
    An utterance of ``vc`` or ``tse`` loses its prompt with probability ``dropout`` (guidance), one of ``tts`` text and
    prompt, for all of a step.
    """

    pool: Pool
    sources: Sources
    odds: dict[str, float]
    params: Simulation = Simulation()
    masking: MaskingSettings = MaskingSettings()
    shards: Shards | None = None
    dropout: float = 0.1
    longest: int = 600
    seed: int = 0
    tokenizer: PhoneTokenizer = field(default_factory=PhoneTokenizer)

    def __post_init__(self) -> None:
        seconds = self.longest / FRAME_RATE
        self.made = {
            task: Simulated(task, self.pool, self.sources, replace(self.params, dropout=0.0), seed=self.seed,
                            longest=seconds)
            for task in self.odds
        }  # fmt: skip
        usable = set.intersection(*(set(made.usable) for made in self.made.values()))
        if "tts" in self.odds:
            texts = zip(self.pool.texts, self.pool.languages, strict=True)
            usable &= {i for i, ids in enumerate(_phone_ids(texts, self.tokenizer)) if ids}
        frames = np.minimum(np.array(self.pool.samples) // HOP, self.longest)
        self.lengths = np.array([n if i in usable else 0 for i, n in enumerate(frames)])
        self.at = {} if self.shards is None else {self.shards.record(i)["id"]: i for i in range(len(self.shards))}

    def _known(self, i: int, example: Example) -> Tensor | None:
        """SSL tokens ``[T]`` of an example's target from the shards; None where it is cut or not there."""
        at = self.at.get(example.id) if len(example.target) == self.pool.samples[i] else None
        return None if at is None else torch.from_numpy(self.shards[at][1][:, 0].astype(np.int64))  # type: ignore[index]

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        names, odds = list(self.odds), np.array(list(self.odds.values()), float)
        rng = chance(self.seed, step, 1)
        task = names[int(rng.choice(len(names), p=odds / odds.sum()))]
        told = task == "tts" and rng.random() >= self.dropout
        examples: list[tuple[int, Example]] = []
        failed = ""
        for place, i in enumerate([*items, *spare(self.lengths, self.seed, epoch, items)]):
            if place >= len(items) and examples:
                break
            try:
                examples.append((i, self.made[task].make(i, chance(self.seed, epoch, i))))
            except MetisError as error:  # one bad recording does not stop a run
                failed = str(error)
        if not examples:
            raise MetisError(f"none of the recordings of a batch can be used for {task}, the last one for: {failed}")
        known = [self._known(i, example) for i, example in examples]
        whole = all(tokens is not None for tokens in known)
        said: Any = known if whole else [_heard(example.target) for _, example in examples]
        heard: list[Any] = [None if e.condition is None else _heard(e.condition) for _, e in examples]
        lengths = [len(x) if c is None else min(len(x), len(c)) for x, c in zip(said, heard, strict=True)]
        out: Batch = {"task": task, "ids": [example.id for _, example in examples], "lengths": torch.tensor(lengths)}
        out["tokens" if whole else "target"] = padded([x[:n] for x, n in zip(said, lengths, strict=True)])[0]
        if heard[0] is not None:
            out["condition"] = padded([c[:n] for c, n in zip(heard, lengths, strict=True)])[0]
        given = [example.prompt // HOP if task != "tts" or told else 0 for _, example in examples]
        lost = like(task) in ("vc", "tse")
        out |= masks_after(self, [i for i, _ in examples], given, out["lengths"], epoch, lost)
        if told:
            texts = ((example.text or "", self.pool.languages[i]) for i, example in examples)
            ids = _phone_ids(texts, self.tokenizer)
            out |= phone_batch(ids, lengths, self.tokenizer.pad_id)
        return out


@dataclass
class Lips:
    """Talking mouths, filmed or (where a row has no ``video``) drawn on the fly.

    A batch: ``video [B, N, 96, 96]`` uint8 at 25 fps, ``lengths [B]`` of it in frames at 50 Hz, ``target [B, T, 160]``
    filterbanks, ``said`` (phones, a list an utterance), masks.

    Every epoch draws another face.  Recordings with neither text nor film, or longer than ``longest`` frames, are
    left out.
    """

    waves: FlatStore
    masking: MaskingSettings = MaskingSettings()
    longest: int = 300
    seed: int = 0
    tokenizer: PhoneTokenizer = field(default_factory=PhoneTokenizer)

    def __post_init__(self) -> None:
        frames = (self.waves.ends - self.waves.starts) // HOP
        worded = np.array([bool(item["text"] or item.get("video")) for item in self.waves.items])
        self.lengths = np.where(worded & (frames >= 25) & (frames <= self.longest), frames, 0)
        long = sum(bool(self.waves.items[i].get("video")) for i in np.flatnonzero(frames > self.longest))
        if long:
            seconds = self.longest / FRAME_RATE
            warnings.warn(f"{long} films are longer than {seconds:g} s (option longest) and left out", stacklevel=2)
        self._timed: dict[int, Any] = {}

    def _first(self, i: int) -> int:
        """The picture of a film with which recording ``i`` begins."""
        return round(25 * self.waves.items[i].get("film_start", 0.0))

    def timed(self, i: int) -> Any:
        """When each phone of recording ``i`` is said; aligned on first use."""
        if i not in self._timed:
            from metis_lib.data.align import align

            self._timed[i] = align(self.waves[i].astype(np.float32) / 32767, AUDIO_RATE, self.waves.items[i]["text"])
        return self._timed[i]

    def batch(self, items: Sequence[int], *, epoch: int, step: int) -> Batch:
        from metis_lib.data.lips import CLASS_OF, FaceStyle, render
        from metis_lib.data.video import read_lips

        videos, heard, said, masks, ids = [], list[Tensor](), [], [], []
        failed = ""
        for place, i in enumerate([*items, *spare(self.lengths, self.seed, epoch, items)]):
            if place >= len(items) and heard:
                break
            rng = chance(self.seed, epoch, i)
            target, film = _heard(self.waves[i].astype(np.float32) / 32767), self.waves.items[i].get("video")
            try:
                timed = self.timed(i) if self.waves.items[i]["text"] else []
                if film:
                    video = read_lips(film)[self._first(i) :]
                else:
                    video = render(timed, len(target), FaceStyle.sample(rng), rng)
                if not len(video):
                    raise MetisError(f"{film} ends before {self._first(i) / 25:g} s, where the recording begins")
            except MetisError as error:  # a text that is not what is said, a film without a face
                failed = str(error)
                continue
            ids.append(self.waves.items[i]["id"])
            target = target[: 2 * len(video)]
            videos.append(torch.from_numpy(video[: -(-len(target) // 2)]))
            heard.append(target)
            masks.append(draw_masks(torch.tensor([len(target)]), self.masking, torch_chance(self.seed, epoch, i)))
            vocab = self.tokenizer.vocab
            said.append([vocab[p.phone] for p in timed if CLASS_OF.get(p.phone, 0) and p.phone in vocab])
        if not heard:
            raise MetisError(f"no recording of a batch could be aligned with its text, the last one for: {failed}")
        target, lengths = padded(heard)
        exists = torch.arange(target.shape[1])[None] < lengths[:, None]
        out = {"video": padded(videos)[0], "target": target, "lengths": lengths, "said": said, "exists": exists}
        out["ids"] = ids
        return out | _masks(masks)
