"""From requests to acoustic codes: utterances of different lengths in one batch through stage 1 and stage 2.

A request says what conditions one utterance (Metis figure 2 and section 3.5), whatever its task; how it is made of
recordings, text or video is the pipeline's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metis_lib.config import DecodeSettings
from metis_lib.errors import MetisError
from metis_lib.models.masked import SCHEDULES, MaskedTrace, Noise
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.tokenizers.listener import Listener

RELEASED_STEPS = (40, 16, *(1,) * 10)
"""Decoding steps of the twelve acoustic layers in the released scripts."""


@dataclass(frozen=True)
class Voice:
    """A prompt, encoded.

    Attributes:
        wav_16k: ``[S]`` what a frame-level condition begins with.
        tokens: ``[P]`` SSL tokens.
        codes: ``[P, Q]`` acoustic codes (as released there is one frame more than tokens).
        features: ``[P, C]`` SSL features, of the prompt alone.
    """

    wav_16k: Tensor
    tokens: Tensor
    codes: Tensor
    features: Tensor


@dataclass(frozen=True)
class Request:
    """One utterance to generate.

    Attributes:
        frames: how many.
        generator: of all its noise.
        voice: the prompt.
        condition: ``[P+T, C]`` frame-level, the prompt's rows first.
        phones: ``[L]``, the prompt's first.
        said: phones that are the prompt's.
        clear: the condition is clear speech of what is to be said (conversion): draws are compared with it.
        hint: ``[P+T]`` frame-level phones.
        carry: tokens ``[K]`` and codes ``[K, Q]`` that stage 2 goes on from: the end of the window before.
        skip: frames at the beginning that stage 2 leaves out, being made already.
    """

    frames: int
    generator: torch.Generator
    voice: Voice | None = None
    condition: Tensor | None = None
    phones: Tensor | None = None
    hint: Tensor | None = None
    carry: tuple[Tensor, Tensor] | None = None
    skip: int = 0
    said: int = 0
    clear: bool = False

    @property
    def compared(self) -> bool:
        """Whether draws of its SSL tokens can be compared with something that is to be said."""
        return self.phones is not None or self.clear

    @property
    def prompt_frames(self) -> int:
        """P."""
        return 0 if self.voice is None else len(self.voice.tokens)

    @property
    def size(self) -> int:
        """Frames that attention runs over, the phones too."""
        return self.prompt_frames + self.frames + (0 if self.phones is None else len(self.phones))


@dataclass(frozen=True)
class Options:
    """How a request is decoded.

    Attributes:
        stage1: steps, guidance, temperatures of stage 1; by default the task's.
        stage2: of the acoustic layers above the first; the first is decoded without guidance, as released.
        stage2_steps: decoding steps of each acoustic layer.
        released: the wiring of the released code (docs/paper_system.md lists the differences).
        batch_frames: padded frames of a batch.
        candidates: draws of the SSL tokens; of a text the system keeps the one that it understands best, in conversion
            it joins those that say what the source says.
        stage2_candidates: draws of the acoustic codes, which it joins of what it understands best.
    """

    stage1: DecodeSettings
    stage2: DecodeSettings = DecodeSettings(cfg=2.5, temperature=1.5)
    stage2_steps: tuple[int, ...] = (20, 10, *(1,) * 10)
    released: bool = False
    batch_frames: int = 4000
    candidates: int = 1
    stage2_candidates: int = 1

    def draws(self, requests: Iterable[Request]) -> int:
        """The most draws that are made of a request; several are compared (:mod:`metis_lib.tokenizers.listener`)."""
        return max(self.stage2_candidates, self.candidates if any(r.compared for r in requests) else 1)

    @classmethod
    def of(cls, stage1: DecodeSettings, released: bool, steps2: tuple[int, ...], given: dict[str, Any]) -> Options:
        """Defaults changed by what is given (None: not given).

        ``steps``, ``cfg``, ``rescale``, ``temperature``, ``choice_temperature``, ``top_fraction``, ``top_k``,
        ``schedule`` are of stage 1; with ``stage2_`` before them, of stage 2 (``stage2_steps``: a list).

        Raises:
            MetisError: unknown option, or a value out of range.
        """
        of_decoder = {f.name for f in fields(DecodeSettings)} - {"released"}
        given = {key: value for key, value in given.items() if value is not None}
        first = {key: value for key, value in given.items() if key in of_decoder}
        second = {key[7:]: v for key, v in given.items() if key.startswith("stage2_") and key[7:] in of_decoder}
        counts = {"batch_frames": cls.batch_frames, "candidates": 1, "stage2_candidates": 1}
        rest = set(given) - set(first) - {f"stage2_{key}" for key in second} - set(counts)
        if rest:
            more = ", ".join(sorted(of_decoder))
            raise MetisError(
                f"unknown option {min(rest)!r}; options are {more}, candidates, each also as stage2_..., batch_frames"
            )
        layers = second.pop("steps", steps2)
        layers = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
        layers += (1,) * (len(steps2) - len(layers))
        for settings in (first, second, *({"steps": count} for count in layers)):
            check(settings)
        always: dict[str, Any] = {"released": True} if released else {}
        counts = {name: given.get(name, default) for name, default in counts.items()}
        for name, count in counts.items():
            if not isinstance(count, Integral) or count < 1:
                raise MetisError(f"{name} must be a whole number, at least 1, not {count!r}")
        if released and max(counts["candidates"], counts["stage2_candidates"]) > 1:
            raise MetisError("the released code makes one draw; leave candidates out, or compat")
        return cls(
            replace(stage1, **first, **always), replace(cls.stage2, **second, **always), layers, released, **counts
        )  # fmt: skip


def check(settings: dict[str, Any]) -> None:
    """MetisError for a decoding option out of range."""
    for name in ("steps", "top_k"):
        if not isinstance(count := settings.get(name, 1), Integral) or count < 1:
            raise MetisError(f"{name} must be a whole number, at least 1, not {count!r}")
    for name in ("cfg", "temperature", "choice_temperature", "rescale", "top_fraction"):
        if not isinstance(settings.get(name, 1.0), Real):
            raise MetisError(f"{name} must be a number, not {settings[name]!r}")
    for name in ("cfg", "temperature", "choice_temperature"):
        if not settings.get(name, 0) >= 0:
            raise MetisError(f"{name} must not be negative, got {settings[name]}")
    if not 0 <= settings.get("rescale", 0) <= 1 or not 0 < settings.get("top_fraction", 1) <= 1:
        raise MetisError("rescale lies in 0..1, top_fraction above 0 and at most 1")
    if settings.get("schedule", "cosine") not in SCHEDULES:
        raise MetisError(f"unknown schedule {settings['schedule']!r}; choose one of {', '.join(SCHEDULES)}")


@dataclass
class Made:
    """What came of a request: ``tokens [T]``, ``codes [T', Q]`` and how they were decided."""

    tokens: Tensor
    codes: Tensor
    traces: dict[str, Any] = field(default_factory=dict)


def batches(requests: Sequence[Request], frames: int) -> list[list[int]]:
    """Requests by number, such that those of a batch are alike and hold at most ``frames`` frames with padding."""
    kinds: dict[Any, list[int]] = {}
    for i, r in enumerate(requests):
        kind = (r.phones is None, r.hint is None, r.condition is None, r.voice is None, r.clear)
        kinds.setdefault(kind, []).append(i)
    found = []
    for members in kinds.values():
        batch: list[int] = []
        for i in sorted(members, key=lambda i: -requests[i].size):  # the first of a batch is its longest
            if batch and (len(batch) + 1) * requests[batch[0]].size > frames:
                found.append(batch)
                batch = []
            batch.append(i)
        found.append(batch)
    return found


def _sides(rows: Sequence[Tensor], cuts: Sequence[int]) -> Tensor:
    """Rows ``[P+T, ...]``, each cut at its own P, as one batch with all prompts padded and all targets padded."""
    sides = ([row[:cut] for row, cut in zip(rows, cuts, strict=True)], [r[c:] for r, c in zip(rows, cuts, strict=True)])
    return torch.cat([pad_sequence(side, batch_first=True) for side in sides], dim=1)


def _draws(request: Request, count: int) -> list[Request]:
    """The request, and again with other generators, derived from its own: as many as draws are made."""
    seeds = [(request.generator.initial_seed() + 7_368_787 * draw) % 2**63 for draw in range(1, count)]
    return [request, *(replace(request, generator=torch.Generator().manual_seed(seed)) for seed in seeds)]


def run(
    stage1: Stage1, layer1: Stage2, full: Stage2, requests: Sequence[Request], options: Options, *,
    noise: Noise | None = None, listener: Listener | None = None,
) -> list[Made]:  # fmt: skip
    """Generate one batch of requests that are alike; each result is what the request would give alone.

    Args:
        stage1: as fine-tuned for the task.
        layer1, full: the nets of stage 2.
        noise: replaces the requests' generators (of a single request: recorded noise).
        listener: chooses among several draws, where the options ask for them.
    """
    device = layer1.cond_emb.weight.device
    with_hint = requests[0].hint is not None and stage1.config.text_hint != "none"
    count = options.candidates if requests[0].compared else 1
    draws = [draw for r in requests for draw in _draws(r, count)]  # those of a request one after the other
    cuts = [r.prompt_frames for r in draws]
    lengths = torch.tensor([r.frames for r in draws], device=device)
    empty = torch.zeros(0, dtype=torch.long, device=device)
    more: dict[str, Any] = {}
    if requests[0].phones is not None:
        phones = [r.phones for r in draws if r.phones is not None]
        more["phones"] = pad_sequence(phones, batch_first=True, padding_value=stage1.config.phone_vocab - 1)
        more["phone_lengths"] = torch.tensor([len(p) for p in phones], device=device)
    if requests[0].condition is not None:
        rows = [r.condition for r in draws if r.condition is not None]
        more["condition"] = _sides(rows, cuts).to(stage1.mask_emb.weight.dtype)
    if with_hint:  # embedded one by one: its convolutions would hear what lies between the rows of a batch
        hints = [stage1.text_hint.alone(r.hint, stage1.config.phone_vocab - 1) for r in requests if r.hint is not None]
        more["hint"] = _sides([hint for hint in hints for _ in range(count)], cuts)
    prompts = [empty if r.voice is None else r.voice.tokens for r in draws]
    trace = stage1.generate(
        pad_sequence(prompts, batch_first=True), lengths, prompt_lengths=torch.tensor(cuts, device=device),
        settings=options.stage1, generator=_noise_of(draws, options), noise=noise, return_iterations=True, **more,
    )  # fmt: skip
    assert isinstance(trace, MaskedTrace)
    kept = [count * i for i in range(len(requests))]  # the draw that each request keeps, or that others are joined to
    tokens = []
    for i, r in enumerate(requests):
        found = [trace.tokens[count * i + draw, : r.frames] for draw in range(count)]
        best = found[0]
        if count > 1 and listener is not None and r.phones is not None:
            kept[i] += (nearest := listener.closest(found, r.phones[r.said :]))
            best = found[nearest]
        elif count > 1 and listener is not None and r.condition is not None:
            best = listener.likest(r.condition[r.prompt_frames :], found)
        tokens.append(best[r.skip :])
    spoken = decode(layer1, full, requests, tokens, options, noise=noise, listener=listener)
    return [
        Made(said, codes, {"ssl": trace.item(k, r.frames), "acoustic": traces})
        for k, r, said, (codes, traces) in zip(kept, requests, tokens, spoken, strict=True)
    ]


def _noise_of(draws: Sequence[Request], options: Options) -> Any:
    """As released one stream of noise runs through all; a batch needs one an utterance."""
    return draws[0].generator if options.released else [r.generator for r in draws]


def decode(
    layer1: Stage2, full: Stage2, requests: Sequence[Request], tokens: Sequence[Tensor], options: Options, *,
    noise: Noise | None = None, listener: Listener | None = None,
) -> list[tuple[Tensor, list[Any]]]:  # fmt: skip
    """Stage 2 of one batch: codes ``[T, Q]`` for the SSL tokens ``[T]`` of each request, and how they were decided (of
    several draws: the first)."""
    device, layers, count = layer1.cond_emb.weight.device, full.config.num_quantizers, options.stage2_candidates
    empty = torch.zeros(0, dtype=torch.long, device=device)
    draws, said, given = [], [], []
    for r, own in zip(requests, tokens, strict=True):
        before = [pair for pair in (r.voice and (r.voice.tokens, r.voice.codes), r.carry) if pair]
        draws += _draws(r, count)
        said += [torch.cat([*(pair[0] for pair in before), own])] * count
        given += [torch.cat([empty.new_zeros(0, layers), *(pair[1][:, :layers] for pair in before)])] * count
    cuts = [len(codes) for codes in given]
    lengths = torch.tensor([len(s) - cut for s, cut in zip(said, cuts, strict=True)], device=device)
    if int(lengths.min()) < 1:
        raise MetisError("the prompt leaves nothing to generate; give a longer source or a shorter prompt")
    traces: list[MaskedTrace] = []
    shared: dict[str, Any] = {
        "prompt_lengths": torch.tensor(cuts, device=device), "lengths": lengths, "noise": noise, "traces": traces,
        "steps": options.stage2_steps, "generator": _noise_of(draws, options),
    }  # fmt: skip
    semantic, prompt = _sides(said, cuts), pad_sequence(given, batch_first=True)
    first = layer1.generate(semantic, prompt, settings=replace(options.stage2, cfg=0.0), **shared)
    codes = full.generate(semantic, prompt, first_layer=first, settings=options.stage2, **shared)
    made = []
    for i, own in enumerate(tokens):
        some = [codes[count * i + draw, : len(own)] for draw in range(count)]
        best = some[0] if listener is None or count == 1 else listener.best_of(own, some)
        made.append((best, [trace.item(count * i, len(own)) for trace in traces]))
    return made
