"""A system that hears what it made: of several draws it keeps what its own phone head understands best.

Masked decoding draws many tokens at once, so one draw of an utterance may be clear and the next one not.  Where the
SSL encoder has learned phones by CTC (nano; our addition, no part of the paper), its head can tell.  No judge of the
evaluation has a part in this.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib import audio
from metis_lib.config import AUDIO_RATE, SSL_RATE
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SHORTEST, SSLEncoder

REACH = 3
"""Frames by which a phone may be heard earlier or later than it was asked for: CTC places its spikes loosely."""
FLOOR = 1e-3
CHANGE = 0.5
"""Cost in nats of going over from one draw to another."""


class Listener:
    """Phones in SSL tokens and in acoustic codes, as log-probabilities ``[T, 1 + phones]`` (class 0: blank)."""

    def __init__(self, ssl: SSLEncoder, semantic: SemanticCodec, codec: AcousticCodec, head: nn.Linear) -> None:
        self.ssl, self.semantic, self.codec, self.head = ssl, semantic, codec, head.float()

    def _heard(self, features: Tensor) -> Tensor:
        """Of normalised features ``[T, C]``."""
        found: Tensor = self.head(features.float() * self.ssl.var.sqrt() + self.ssl.mean)
        return found.log_softmax(-1)

    def in_tokens(self, tokens: Tensor) -> Tensor:
        """What SSL tokens ``[T]`` stand for."""
        return self._heard(self.semantic.decode_tokens(tokens[None])[0])

    def in_codes(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """What the speech of codes ``[T, Q]`` says; a frame or two fewer than the codes."""
        waves = [self.codec.decode_long(one[None])[0].float().cpu() for one in codes]
        waves = [audio.resample(wav, AUDIO_RATE, SSL_RATE) for wav in waves]
        features, lengths = self.ssl.encode([F.pad(wav, (0, max(0, SHORTEST - len(wav)))) for wav in waves])
        return [self._heard(row[: int(n)]) for row, n in zip(features, lengths, strict=True)]

    def closest(self, draws: Sequence[Tensor], phones: Tensor) -> int:
        """Which of the draws of SSL tokens ``[T]`` most likely says the ``phones [L]`` (CTC)."""
        costs = []
        for scores in map(self.in_tokens, draws):
            sizes = torch.tensor([len(scores)]), torch.tensor([len(phones)])
            costs.append(float(F.ctc_loss(scores[:, None].cpu(), phones[None].cpu() + 1, *sizes, reduction="sum")))
        return min(range(len(costs)), key=costs.__getitem__)

    def likest(self, features: Tensor, draws: Sequence[Tensor]) -> Tensor:
        """Draws of SSL tokens ``[T]``, joined of where each says what clear speech of ``features [T, C]`` says."""
        return joined(self._heard(features), [self.in_tokens(draw) for draw in draws], draws)

    def best_of(self, tokens: Tensor, draws: Sequence[Tensor]) -> Tensor:
        """Draws of codes ``[T, Q]`` for the same SSL tokens ``[T]``, joined of where each says what the tokens say."""
        return joined(self.in_tokens(tokens), self.in_codes(draws), draws)


def joined(wanted: Tensor, heard: Sequence[Tensor], draws: Sequence[Tensor]) -> Tensor:
    """Of each frame the draw that comes nearest to what is wanted, changing seldom: ``draws [T, ...]``, as they are
    ``heard`` (in a frame or two fewer)."""
    costs = [mismatch(wanted, one) for one in heard]
    shortest = min(map(len, costs))
    path = cheapest(torch.stack([cost[:shortest] for cost in costs]).cpu(), CHANGE)  # it looks at every frame
    path = F.pad(path, (0, len(draws[0]) - shortest), value=int(path[-1]))
    return torch.stack(list(draws))[path.to(draws[0].device), torch.arange(len(path), device=draws[0].device)]


def mismatch(wanted: Tensor, heard: Tensor, reach: int = REACH) -> Tensor:
    """Nats ``[T]`` by which two log-distributions over phones differ, a phone being there when within ``reach`` frames:
    phones wanted and not heard, and phones heard and not wanted."""
    frames = min(len(wanted), len(heard))
    both = wanted[:frames].exp(), heard[:frames].exp()
    near = [F.max_pool1d(one.T[None], 2 * reach + 1, 1, reach)[0].T.clamp_min(FLOOR).log() for one in both]
    phones = [F.pad(one[:, 1:], (1, 0)) for one in both]  # without the blank
    return -(phones[0] * near[1] + phones[1] * near[0]).sum(-1)


def cheapest(costs: Tensor, change: float) -> Tensor:
    """Which of N draws to take in each frame ``[T]``: the least sum of ``costs [N, T]`` and of ``change`` for every
    frame where another draw begins (Viterbi)."""
    total, came = costs[:, 0], []
    for cost in costs.T[1:]:
        best = int(total.argmin())
        stays = total <= total[best] + change
        came.append([k if stay else best for k, stay in enumerate(stays.tolist())])
        total = torch.minimum(total, total[best] + change) + cost
    path = [int(total.argmin())]
    for back in reversed(came):
        path.append(back[path[-1]])
    return torch.tensor(path[::-1])
