"""How long each phone of a recording lasts, by CTC: the best path through the SSL encoder's phone head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metis_lib.data.store import FlatStore
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.training.data import Speech


def ctc_durations(log_probs: np.ndarray, phones: Sequence[int]) -> np.ndarray:
    """Frames of each phone, int16 ``[L]``, summing to T, on the best CTC path of ``log_probs [T, 1 + V]``.

    Class 0 is the blank.  CTC marks a phone by a peak; between two peaks the boundary lies in the middle.  Where the
    phones do not fit into the frames all are of even length.
    """
    frames, count = len(log_probs), len(phones)
    states = np.zeros(2 * count + 1, np.int64)
    states[1::2] = np.asarray(phones) + 1
    jump = np.zeros(len(states), bool)  # over the blank between two different phones
    jump[3::2] = states[3::2] != states[1:-2:2]
    best = np.full(len(states), -np.inf)
    best[:2] = log_probs[0, states[:2]]
    steps = np.zeros((frames, len(states)), np.int8)
    for t in range(1, frames):
        ways = np.stack([best, np.append(-np.inf, best[:-1]), np.append([-np.inf, -np.inf], best[:-2])])
        ways[2, ~jump] = -np.inf
        steps[t] = ways.argmax(0)
        best = ways.max(0) + log_probs[t, states]
    state = len(states) - 1 if best[-1] >= best[-2] else len(states) - 2
    if not np.isfinite(best[state]):
        return np.diff(np.round(np.linspace(0, frames, count + 1))).astype(np.int16)
    path = np.empty(frames, np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = state
        state -= int(steps[t, state])
    first = np.searchsorted(path, 2 * np.arange(count) + 1)
    last = np.searchsorted(path, 2 * np.arange(count) + 1, side="right")
    edges = (last[:-1] + first[1:] + 1) // 2
    return np.diff(np.concatenate([[0], edges, [frames]])).astype(np.int16)


@torch.no_grad()
def time_phones(waves: FlatStore, encoder: SSLEncoder, head: torch.nn.Linear, folder: Path) -> dict[str, np.ndarray]:
    """Durations by recording's id, of the phones of its text; made on first use in ``folder``."""

    def pieces() -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        source, device = Speech(waves, longest=1500), next(encoder.parameters()).device
        told = head.to(device)
        order = [i for i in np.argsort(source.lengths, kind="stable") if source.lengths[i] and source.phones[i]]
        for at in range(0, len(order), 16):
            some = order[at : at + 16]
            batch = source.batch([int(i) for i in some], epoch=0, step=0)
            heard = encoder(batch["clean"].to(device), batch["lengths"].to(device))
            scores = told(heard).float().log_softmax(-1).cpu().numpy()
            for i, row, n in zip(some, scores, batch["lengths"].tolist(), strict=True):
                yield {"id": waves.items[i]["id"]}, ctc_durations(row[:n], source.phones[i])

    store = FlatStore(folder) if (folder / "index.json").is_file() else FlatStore.write(folder, pieces())
    return {item["id"]: store[i] for i, item in enumerate(store.items)}
