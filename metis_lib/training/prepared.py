"""Examples of the conditioned tasks made once and used for many epochs, their conditions already encoded.

To simulate and to encode an example costs several times what a small model spends on learning from it.  So a few
passes over the corpus are made beforehand (``passes``, each with other noise, voices, prompts); masks are still drawn
anew every time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metis_lib.data.store import UNKNOWN, FlatStore
from metis_lib.errors import MetisError
from metis_lib.models.masked import MaskingSettings
from metis_lib.training.data import Batch, Feed, Source, about_as_long, chance, masks_after, padded, plan, read
from metis_lib.training.loop import TrainSettings


def prepare(
    source: Source, given: Callable[[Batch], Batch], folder: Path, *, passes: float = 1, workers: int = 0
) -> FlatStore:
    """The examples of a source, encoded, in ``folder``; made on first use.

    Args:
        source: ``Adaptation`` of one task, or ``Lips``.
        given: adds ``tokens [B, T]`` and ``condition [B, T, C]`` to a batch
            (:func:`~metis_lib.training.generative.encode`).
        passes: how often each recording is used; below 1, which share of them.
        workers: processes that simulate (0: this one).

    Returns:
        An item an example: int16 ``[T, 1 + C]``, its token and the bits of its condition in float16; ``id`` of the
        recording, ``prompt`` in frames.  A folder that is there is taken as it is (its name must tell what made it).
    """
    if (folder / "index.json").is_file():
        return FlatStore(folder)

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        places: list[tuple[int, int, list[int]]] = []
        for epoch in range(math.ceil(passes)):
            batches = list(plan(source.lengths, 4000, 1, seed=0, epoch=epoch))
            for (items,) in batches[: math.ceil((passes - epoch) * len(batches))]:
                places.append((epoch, len(places), items))
        made = iter(read(source, places, workers))
        for _, _, items in places:
            try:
                batch = given(next(made))
            except MetisError as error:
                warnings.warn(f"left out {len(items)} recordings: {str(error).splitlines()[-1]}", stacklevel=2)
                continue
            tokens = batch["tokens"].cpu().numpy().astype(np.int16)
            bits = batch["condition"].to(torch.float16).cpu().numpy().view(np.int16)
            about = zip(batch["ids"], batch["lengths"].tolist(), batch["prompt"].tolist(), strict=True)
            for k, (name, n, prompt) in enumerate(about):
                yield {"id": name, "prompt": prompt}, np.concatenate([tokens[k, :n, None], bits[k, :n]], axis=1)

    return FlatStore.write(folder, pieces())


@dataclass
class Voices:
    """Clean recordings that become prompts, as in generation: another one of the speaker, encoded by itself.

    ``store`` is one of :func:`prepare` whose condition is the clean speech; ``speakers`` tells who says what (by id).
    """

    store: FlatStore
    speakers: dict[str, str]

    LONGEST: ClassVar = 200
    """Frames of a prompt; a longer one is cut."""

    def __post_init__(self) -> None:
        self.at = {item["id"]: j for j, item in enumerate(self.store.items)}
        self.of: dict[str, list[tuple[int, int]]] = {}
        for n, id, j in sorted((min(self.store.length(j), self.LONGEST), id, j) for id, j in self.at.items()):
            if n >= 25:
                self.of.setdefault(self._who(id), []).append((n, j))

    def _who(self, id: str) -> str:
        """Who speaks; of whom nobody knows that has said nothing else."""
        speaker = self.speakers.get(id, UNKNOWN)
        return id if speaker == UNKNOWN else speaker

    def before(self, id: str, frames: int, wanted: float, generator: np.random.Generator) -> tuple[np.ndarray, int]:
        """A prompt ``[P, 1 + C]`` of about ``wanted`` frames for an example of ``frames``, and how many of the latter
        it takes the place of.

        Where the speaker has said nothing else it is the beginning of the example, a fifth to a half of it.
        """
        others = [one for one in self.of.get(self._who(id), ()) if one[1] != self.at.get(id)]
        if others:
            return self.store[about_as_long(others, wanted, generator)][: self.LONGEST], 0
        own = self.at.get(id)
        same = own is not None and self.store.length(own) == frames
        cut = int(frames * generator.uniform(0.2, 0.5)) if same else 0
        return self.store[own or 0][:cut], cut


@dataclass
class Prepared:
    """Examples of :func:`prepare` as a source of batches.

    A batch: ``tokens [B, T]``, ``features [B, T, C]`` (the condition, encoded), ``lengths``, ``t``, ``prompt``,
    ``hidden`` and ``exists [B, T]``; an utterance loses its prompt with probability ``dropout`` (guidance).

    With ``voices`` every example follows a prompt of theirs; of a ``blind`` one (lip-to-speech) the condition is zero.
    A batch then has more frames than it was planned for.
    """

    store: FlatStore
    task: str
    masking: MaskingSettings = MaskingSettings()
    dropout: float = 0.0
    seed: int = 0
    voices: Voices | None = None
    blind: bool = False

    def __post_init__(self) -> None:
        self.lengths = self.store.ends - self.store.starts

    def _example(self, i: int, epoch: int, wanted: float) -> tuple[Tensor, int]:
        """Example ``i`` ``[T, 1 + C]`` after a prompt of about ``wanted`` frames, and the frames of the prompt."""
        own = np.array(self.store[i])
        if self.voices is None:
            return torch.from_numpy(own), self.store.items[i]["prompt"]
        rng = chance(self.seed, epoch, i, 4)
        before, cut = self.voices.before(self.store.items[i]["id"], len(own), wanted, rng)
        if self.blind:
            before = np.pad(before[:, :1], ((0, 0), (0, own.shape[1] - 1)))
        return torch.from_numpy(np.concatenate([before, own[cut:]])), len(before)

    def batch(self, items: Any, *, epoch: int, step: int) -> Batch:
        wanted = chance(self.seed, epoch, int(items[0]), 5).uniform(25, Voices.LONGEST)
        arrays, given = zip(*(self._example(int(i), epoch, wanted) for i in items), strict=True)
        both, lengths = padded(arrays)
        return masks_after(self, items, given, lengths, epoch, True) | {
            "task": self.task, "tokens": both[..., 0].long(), "features": both[..., 1:].view(torch.float16),
            "lengths": lengths,
        }  # fmt: skip


class Mixed:
    """A feed of several sources, each step of one of them, drawn by ``odds`` (Omni)."""

    def __init__(self, sources: dict[str, Source], odds: dict[str, float], settings: TrainSettings) -> None:
        self.feeds = {name: Feed(source, settings) for name, source in sources.items()}
        shares = np.array([odds[name] for name in sources], float)
        self.shares, self.seed = shares / shares.sum(), settings.seed

    def _drawn(self, step: int) -> str:
        return list(self.feeds)[int(chance(self.seed, step, 1).choice(len(self.shares), p=self.shares))]

    def open(self, step: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[Batch]:
        """As :meth:`Feed.open`."""
        before = [self._drawn(s) for s in range(step)]
        open_ones = {name: f.open(before.count(name), rank, world, accumulate) for name, f in self.feeds.items()}
        while True:
            name = self._drawn(step)
            for _ in range(accumulate):
                yield {"task": name, **next(open_ones[name])}
            step += 1

    def held_out(self, count: int) -> list[Batch]:
        """The first batches of each source, about ``count`` in all."""
        each = max(1, count // len(self.feeds))
        return [{"task": name, **b} for name, feed in self.feeds.items() for b in feed.held_out(each)]
