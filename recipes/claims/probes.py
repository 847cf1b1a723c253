"""Which layer of the SSL encoder tells phones, and which the speaker: linear probes on every layer, no generation.

Phones: one linear layer, trained by CTC; the error is the edit distance of its best path.  Speakers: ridge
regression on mean and deviation over time.  Both train and test on other recordings of the same speakers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.errors import MetisError
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.training import data
from metis_lib.training.tokenizers import ctc_sum, phone_errors
from recipes.claims.arms import Lab

SETTINGS = {"speakers": 40, "train": 8, "test": 4, "steps": 300, "batch": 24, "longest": 400}
"""Speakers, recordings of each to train and to test on, steps and recordings a step, longest recording in frames."""


@torch.no_grad()
def hidden_states(encoder: SSLEncoder, features: Tensor, lengths: Tensor) -> list[Tensor]:
    """Hidden states ``[B, T, C]`` of filterbanks ``[B, T, 160]``: what enters the first layer, and what leaves each."""
    states: list[Tensor] = []

    def keep(_: nn.Module, given: Any, out: Any) -> None:
        states.extend([] if states else [given[0]])
        states.append(out[0] if isinstance(out, tuple) else out)

    hooks = [layer.register_forward_hook(keep) for layer in encoder.model.encoder.layers]
    encoder(features, lengths)
    for hook in hooks:
        hook.remove()
    return states


def standardised(train: Sequence[Tensor], test: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Features ``[T, C]`` of zero mean and unit deviation over all of ``train``."""
    frames = torch.cat(list(train))
    mean, std = frames.mean(0), frames.std(0) + 1e-5
    return [(x - mean) / std for x in train], [(x - mean) / std for x in test]


def phone_probe(
    train: Sequence[Tensor], phones: Sequence[Sequence[int]], test: Sequence[Tensor], said: Sequence[Sequence[int]],
    *, seed: int, steps: int, batch: int = SETTINGS["batch"],
) -> float:  # fmt: skip
    """Phone error rate on ``test`` of a linear CTC probe trained on ``train`` (features ``[T, C]``)."""
    torch.manual_seed(seed)
    train, test = standardised(train, test)
    kinds = sorted({p for some in (*phones, *said) for p in some})
    place = {p: i for i, p in enumerate(kinds)}
    net, rng = nn.Linear(train[0].shape[1], len(kinds) + 1), np.random.default_rng(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = rng.choice(len(train), min(batch, len(train)), replace=False)
        x, lengths = data.padded([train[i] for i in some])
        loss = ctc_sum(net(x), [[place[p] for p in phones[i]] for i in some], lengths)
        optimizer.zero_grad()
        (loss / sum(len(phones[i]) for i in some)).backward()
        optimizer.step()
        schedule.step()
    x, lengths = data.padded(test)
    with torch.no_grad():
        errors, total = phone_errors(net(x), [[place[p] for p in some] for some in said], lengths)
    return errors / total


def speaker_probe(
    train: Sequence[Tensor], speakers: Sequence[int], test: Sequence[Tensor], who: Sequence[int]
) -> float:  # fmt: skip
    """Share of ``test`` recordings (features ``[T, C]``) whose speaker ridge regression on the speakers names."""
    pooled = [[torch.cat([x.mean(0), x.std(0)])[None] for x in some] for some in (train, test)]
    x, y = (torch.cat(some).double() for some in standardised(*pooled))
    wanted = F.one_hot(torch.tensor(list(speakers)), max(*speakers, *who) + 1).double()
    weights = torch.linalg.solve(x.T @ x + len(x) * torch.eye(x.shape[1]).double(), x.T @ (wanted - wanted.mean(0)))
    return float(((y @ weights + wanted.mean(0)).argmax(-1) == torch.tensor(list(who))).double().mean())


def drawn(source: data.Speech, seed: int) -> tuple[list[int], list[int], dict[int, int]]:
    """Recordings to train and to test on, and the number of each one's speaker."""
    rng, by_voice = np.random.default_rng(seed), dict[str, list[int]]()
    for i in np.flatnonzero((source.lengths > 0) & (source.lengths < source.longest)):
        if source.phones[i]:
            by_voice.setdefault(source.waves.items[i]["speaker"], []).append(int(i))
    each = SETTINGS["train"] + SETTINGS["test"]
    voices = sorted(voice for voice, some in by_voice.items() if len(some) >= each)
    if len(voices) < 2:
        raise MetisError(f"the probes need two speakers with {each} recordings and texts; the corpus has {len(voices)}")
    chosen = [voices[i] for i in rng.permutation(len(voices))[: SETTINGS["speakers"]]]
    train: list[int] = []
    test: list[int] = []
    speaker: dict[int, int] = {}
    for number, voice in enumerate(chosen):
        some = rng.permutation(by_voice[voice])[:each].tolist()
        train, test = train + some[: SETTINGS["train"]], test + some[SETTINGS["train"] :]
        speaker |= dict.fromkeys(some, number)
    return train, test, speaker


def layers(lab: Lab, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Both probes on every layer with every seed: one row a layer and seed; ``chosen`` is the layer of the tokens."""
    job, rows = lab.job("se"), []
    encoder = job.frozen.encoder
    source = data.Speech(job.waves("train"), longest=SETTINGS["longest"])
    for seed in lab.seeds:
        train, test, speaker = drawn(source, seed)
        states: dict[int, list[Tensor]] = {}
        for i in train + test:
            batch = source.batch([i], epoch=0, step=0)
            states[i] = [x[0] for x in hidden_states(encoder, batch["clean"], batch["lengths"])]
            states[i] = [x[: int(batch["lengths"])] for x in states[i]]
        count = len(states[train[0]])
        for layer in range(count):
            name = "chosen" if layer == encoder.config.output_layer else str(layer)
            x, y = ([states[i][layer] for i in some] for some in (train, test))
            said, wanted = ([source.phones[i] for i in some] for some in (train, test))
            errors = phone_probe(x, said, y, wanted, seed=seed, steps=SETTINGS["steps"])
            named = speaker_probe(x, [speaker[i] for i in train], y, [speaker[i] for i in test])
            say(f"ssl-layers: seed {seed}, layer {layer}: phone error {errors:.3f}, speakers named {named:.3f}")
            rows.append({"variant": name, "layer": layer, "seed": seed, "phone_error": round(errors, 6),
                         "speaker_accuracy": round(named, 6), "speakers": len(set(speaker.values()))})  # fmt: skip
    return rows
