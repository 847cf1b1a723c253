"""Training examples of the audio tasks, made on the fly from clean speech (Metis sections 3.5, 4.2, appendix E).

A simulator is a pure function of an utterance, a seeded numpy Generator, what else may be heard (:class:`Sources`)
and frozen parameters; the defaults are the paper's numbers, what the paper leaves open is said to be ours.
:class:`Simulated` makes a torch dataset of them: one seed gives the same bytes with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from metis_lib.config import AUDIO_RATE
from metis_lib.data.perturb import Perturb, VoiceShift
from metis_lib.data.simulate import HOP, Degradation, Extraction, Noises, Prompt, Rooms, degrade, power
from metis_lib.data.store import FlatStore, Row, read_span
from metis_lib.errors import MetisError
from metis_lib.tasks import TASKS


@dataclass(frozen=True)
class Utterance:
    """Clean speech: ``wav`` float32 [S] at 24 kHz; ``text`` is empty where nobody wrote it down."""

    id: str
    speaker: str
    wav: np.ndarray
    text: str = ""


@dataclass(frozen=True)
class Example:
    """What a task (``se``, ``tse``, ``vc``, ``tts``) is trained on, made from the utterance ``id``.

    Attributes:
        target: float32 [S] at 24 kHz, what must be said, with the prompt as its beginning.
        condition: float32 [S], what the SSL encoder hears at the same time (None: nothing).
        prompt: samples at the beginning that are given, whole tokens (0: none).
        text: what is said (None: not told).
        done: everything that was done, in JSON types.
    """

    task: str
    id: str
    target: np.ndarray
    condition: np.ndarray | None
    prompt: int
    text: str | None
    done: dict[str, Any]


@dataclass(frozen=True)
class Simulation:
    """The parameters of all simulators.

    Attributes:
        se, tse, vc: odds and ranges; of voice conversion only the prompt.
        tts: the prompt, as in pre-training (section 4.1).
        dropout: how often TTS is not told the text, and has no prompt either: so is the other branch of guidance.
        omni: the shares of TTS, VC, TSE and SE (appendix E).
    """

    se: Degradation = Degradation()
    tse: Extraction = Extraction()
    vc: Prompt = Prompt()
    tts: Prompt = Prompt(0.8, (0.0, 0.4))
    dropout: float = 0.1
    omni: tuple[float, float, float, float] = (0.5, 0.1, 0.2, 0.2)


class Pool:
    """Utterances by number, held by a wave store (fastest), rows of a manifest or a list; MetisError for none."""

    def __init__(self, source: FlatStore | Sequence[Row | Utterance]) -> None:
        self.source: Any = source
        if isinstance(source, FlatStore):
            about = [
                (x["id"], x["speaker"], x.get("text", ""), source.length(i), x.get("language", "en"))
                for i, x in enumerate(source.items)
            ]
        else:
            lengths = [round(u.duration * AUDIO_RATE) if isinstance(u, Row) else len(u.wav) for u in source]
            about = [
                (u.id, u.speaker, u.text, n, getattr(u, "language", "en")) for u, n in zip(source, lengths, strict=True)
            ]
        if not about:
            raise MetisError("there is no speech to make examples of; is the manifest or the split empty?")
        self.ids, self.speakers, self.texts, self.samples, self.languages = map(list, zip(*about, strict=True))
        self.names = frozenset(name for name, n in zip(self.speakers, self.samples, strict=True) if n)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Utterance:
        if isinstance(self.source, FlatStore):
            return Utterance(self.ids[i], self.speakers[i], self.source[i].astype(np.float32) / 32767, self.texts[i])
        if isinstance(held := self.source[i], Utterance):
            return held
        return Utterance(held.id, held.speaker, read_span(held).numpy(), held.text)

    def other(self, known: set[str], generator: np.random.Generator) -> Utterance:
        """An utterance of a speaker who is not in ``known``; MetisError where there is none."""
        if self.names <= known:
            raise MetisError(f"a mixture needs another speaker than {', '.join(sorted(known))}; the corpus has none")
        while self.speakers[i := int(generator.integers(len(self)))] in known or not self.samples[i]:
            pass
        return self[i]


@dataclass(frozen=True)
class Sources:
    """What may be heard besides the utterance: other speakers, noise, rooms; and what changes a voice."""

    others: Pool | None = None
    noises: Noises = Noises()
    rooms: Rooms | None = None
    perturb: Perturb = VoiceShift()


def _about(u: Utterance, prompt: int = 0) -> dict[str, Any]:
    if u.wav.ndim != 1 or not np.isfinite(u.wav).all():
        raise MetisError(f"{u.id}: speech is one channel of finite samples")
    return {"id": u.id, "speaker": u.speaker, "samples": len(u.wav), "prompt": prompt}


def se(u: Utterance, generator: np.random.Generator, sources: Sources, params: Simulation = Simulation()) -> Example:
    """Speech enhancement (section 4.2.4): degraded speech in, clean speech on its direct path out; no prompt."""
    noisy, clean, done = degrade(
        u.wav, AUDIO_RATE, noises=sources.noises, generator=generator, params=params.se, rooms=sources.rooms,
        speaker=u.speaker,
    )  # fmt: skip
    return Example("se", u.id, clean, noisy, 0, None, _about(u) | done)


def tse(u: Utterance, generator: np.random.Generator, sources: Sources, params: Simulation = Simulation()) -> Example:
    """Target speaker extraction: [clean prompt, the rest with somebody else] in, the utterance out.

    A longer utterance of the other speaker is cut at random, a shorter one begins at random.  All is scaled by
    one ``gain``, below 1 where the sum would pass 0.99.  MetisError without another speaker, or for too short speech.
    """
    prompt, how = params.tse.prompt.draw(len(u.wav), generator), params.tse
    if sources.others is None:
        raise MetisError("target speaker extraction needs other speakers: give Sources(others=...)")
    rest, known, heard = u.wav[prompt:], {u.speaker}, []
    mixture = rest.copy()
    for _ in range(1 + int(generator.random() < how.third_p)):
        other = sources.others.other(known, generator)
        shift = int(generator.integers(abs(len(other.wav) - len(rest)) + 1))
        first, at = (shift, 0) if len(other.wav) > len(rest) else (0, shift)
        part = other.wav[first : first + len(rest)]
        ratio = 10 * np.log10((power(rest) + 1e-12) / (power(part) * len(part) / len(rest) + 1e-12))
        snr = ratio if how.snr_db is None else generator.uniform(*how.snr_db)
        gain = float(10 ** ((ratio - snr) / 20))
        mixture[at : at + len(part)] += part * np.float32(gain)
        known.add(other.speaker)
        about = {"id": other.id, "speaker": other.speaker, "first": first, "at": at, "samples": len(part)}
        heard.append(about | {"gain": round(gain, 6), "snr_db": round(float(snr), 3)})
    done = _about(u, prompt) | {"others": heard}
    if how.degradation is not None:
        worse: Any = se(replace(u, wav=mixture), generator, sources, Simulation(se=how.degradation))
        mixture, done["degradation"] = worse.condition / np.float32(worse.done["gain"]), worse.done
    gain = min(1.0, 0.99 / (float(np.abs(mixture).max()) + 1e-9))
    condition = np.concatenate([u.wav[:prompt], mixture]) * np.float32(gain)
    return Example("tse", u.id, u.wav * np.float32(gain), condition, prompt, None, done | {"gain": round(gain, 6)})


def vc(u: Utterance, generator: np.random.Generator, sources: Sources, params: Simulation = Simulation()) -> Example:
    """Voice conversion (section 4.2.2): [clean prompt, the rest in another voice] in, the utterance out.

    ``done["perturb"]`` has the callable's name, the seed of the Generator that it got and, where it can
    ``draw(generator)`` as :class:`VoiceShift` does, what it drew.  MetisError where it changes the length or gives NaN.
    """
    prompt, seed, call = params.vc.draw(len(u.wav), generator), int(generator.integers(2**32)), sources.perturb
    rest, name = u.wav[prompt:], getattr(call, "__qualname__", type(call).__qualname__)
    changed = np.asarray(call(rest.copy(), np.random.default_rng(seed)), dtype=np.float32)
    if changed.shape != rest.shape or not np.isfinite(changed).all():
        raise MetisError(f"{name} must return {len(rest)} finite samples in time with its input, not {changed.shape}")
    drawn = call.draw(np.random.default_rng(seed)) if hasattr(call, "draw") else {}
    done = _about(u, prompt) | {"perturb": {"name": name, "seed": seed, **drawn}}
    return Example("vc", u.id, u.wav, np.concatenate([u.wav[:prompt], changed]), prompt, None, done)


def tts(u: Utterance, generator: np.random.Generator, sources: Sources, params: Simulation = Simulation()) -> Example:
    """Text-to-speech: text and a prompt in, the utterance out; MetisError without a text."""
    if not u.text.strip():
        raise MetisError(f"{u.id}: text-to-speech needs the text")
    told, prompt = bool(generator.random() >= params.dropout), params.tts.draw(len(u.wav), generator)
    prompt, text = (prompt, u.text) if told else (0, None)
    return Example("tts", u.id, u.wav, None, prompt, text, _about(u, prompt) | {"told": told})


def omni(u: Utterance, generator: np.random.Generator, sources: Sources, params: Simulation = Simulation()) -> Example:
    """One of the four tasks by the shares of ``params.omni``."""
    odds = np.array(params.omni) / sum(params.omni)
    return (tts, vc, tse, se)[int(generator.choice(4, p=odds))](u, generator, sources, params)


SIMULATORS: dict[str, Callable[..., Example]] = {"se": se, "tse": tse, "vc": vc, "tts": tts, "omni": omni}


def simulator(name: str) -> Callable[..., Example]:
    """The function that makes examples of a task; MetisError for an unknown one."""
    known = SIMULATORS | {task.name: task.simulate for task in TASKS.values() if task.simulate}
    if name not in known:
        raise MetisError(f"no examples of {name!r}; choose one of {', '.join(known)}")
    return known[name]


class Simulated(Dataset[Example]):
    """Examples of one task, map-style: item ``i`` of an epoch depends on ``(seed, epoch, i)`` and on nothing else.

    Every epoch goes once through all utterances in an order of its own.  ``left_out`` (id: reason) is what can never
    be used.  A recording that turns out unusable gives its place to the next one; ``done`` names it (``instead_of``).

    Args:
        task, seed: a key of :data:`SIMULATORS`; not negative.
        pool: the utterances; the other speakers too, where ``sources`` has none.
        shortest, longest: seconds; longer speech is cut at random or, where text goes with it, never used.

    Raises:
        MetisError: unknown task, negative seed, nothing that can be used; at access: ten in turn that cannot.
    """

    def __init__(
        self, task: str, pool: Pool, sources: Sources = Sources(), params: Simulation = Simulation(), *,
        seed: int = 0, shortest: float = 1.0, longest: float = 30.0,
    ) -> None:  # fmt: skip
        if seed < 0:
            raise MetisError(f"examples are drawn by seeds from 0, got {seed}")
        self._make = simulator(task)
        self.task, self.pool, self.params, self.seed = task, pool, params, seed
        self.longest, worded = round(longest * AUDIO_RATE), task in ("tts", "omni")
        self.sources = replace(sources, others=sources.others or pool)
        why = [
            "too short" if n < max(shortest * AUDIO_RATE, 2 * HOP) else "no text" if worded and not text.strip()
            else "too long" if worded and n > self.longest else ""
            for text, n in zip(pool.texts, pool.samples, strict=True)
        ]  # fmt: skip
        self.left_out = {id: reason for id, reason in zip(pool.ids, why, strict=True) if reason}
        self.usable = [i for i, reason in enumerate(why) if not reason]
        if not self.usable:
            raise MetisError(f"no utterance of {len(pool)} can be used for {task}: {why[0]}")
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # seen by workers that stay alive
        self._order: tuple[int, np.ndarray] = (-1, np.array([]))

    def set_epoch(self, epoch: int) -> None:
        """Begin epoch ``epoch`` (from 0): between iterations of a loader, not within."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.usable)

    def make(self, which: int, generator: np.random.Generator) -> Example:
        """The example of utterance ``which`` of the pool; MetisError where it cannot be used."""
        u = self.pool[which]
        first = int(generator.integers(max(len(u.wav) - self.longest, 0) + 1))
        u = replace(u, wav=u.wav[first : first + self.longest])
        example = self._make(u, generator, self.sources, self.params)
        return replace(example, done={"first": first} | example.done)

    def __getitem__(self, i: int) -> Example:
        i, epoch, failed = range(len(self))[i], int(self._epoch), dict[str, str]()
        if self._order[0] != epoch:  # four numbers: no item's key
            self._order = epoch, np.random.default_rng((self.seed, epoch, 0, 1)).permutation(self.usable)
        for which in (int(self._order[1][(i + k) % len(self)]) for k in range(min(len(self), 10))):
            try:
                example = self.make(which, np.random.default_rng((self.seed, epoch, i)))
            except MetisError as error:
                failed[self.pool.ids[which]] = str(error)
                continue
            return replace(example, done={"epoch": epoch, "item": i, "instead_of": failed} | example.done)
        raise MetisError(f"the utterances cannot be used, the last one for: {[*failed.values()][-1]}")
