"""What the generative models are trained for: stage 1 (pre-training and every task) and both nets of stage 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from metis_lib.checkpoints import TaskConfig
from metis_lib.config import AUDIO_RATE, DecodeSettings, Stage1Config, Stage2Config
from metis_lib.errors import MetisError
from metis_lib.models import adapt, masked
from metis_lib.models.masked import MaskingSettings
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.tokenizers.lips import LipEncoder, upsample
from metis_lib.training.data import Batch
from metis_lib.training.loop import Objective
from metis_lib.training.tokenizers import Frozen, placed

STAGE2_MASKING = MaskingSettings(prompt_probability=0.85, max_prompt_fraction=0.5)
"""Stage 2: prompts up to half of the utterance, no floor (the released code's values)."""


def exists(batch: Batch) -> Tensor:
    """``[B, T]`` True where a frame is to be seen."""
    return batch["exists"] if "exists" in batch else masked.exists(batch["lengths"], int(batch["lengths"].max()))


def encode(batch: Batch, frozen: Frozen | None, lips: LipEncoder | None = None) -> Batch:
    """The batch with ``tokens`` and ``condition [B, T, C]``, by the frozen tokenizers where it has them not yet."""
    out, lengths = dict(batch), batch["lengths"]
    if "tokens" not in out:
        assert frozen is not None
        out["tokens"] = frozen.tokens(batch["target"], lengths)
    if "features" in out:  # encoded beforehand
        out["condition"] = out["features"].float()
    elif "condition" in out:
        assert frozen is not None
        out["condition"] = frozen.features(batch["condition"], lengths)
    if "video" in out:
        assert lips is not None
        with torch.no_grad():
            pictures = (lengths + 1) // 2
            seen = upsample(lips.to(lengths.device)(batch["video"], pictures), pictures)[:, : int(lengths.max())]
        place = torch.arange(seen.shape[1], device=lengths.device)[None] >= batch["prompt"][:, None]
        out["condition"] = seen * place[..., None]  # nothing is seen of the prompt (Metis section 4.2.5)
    return out


class Stage1Training(Objective):
    """Stage 1: cross-entropy of masked SSL tokens (Metis equation 1), with whatever conditions a batch has.

    Batches: :class:`~metis_lib.training.data.Tokens`, ``Prepared``, ``Adaptation`` or ``Lips``; the last two need
    ``frozen`` tokenizers, ``Lips`` a frozen ``lips`` encoder too.  ``check`` is held-out; ``prompt`` the part of an
    utterance that is given when text-to-speech is validated; ``voice`` makes SSL tokens ``[1, T]`` audible (24 kHz
    ``[S]``).
    """

    def __init__(
        self, model: Stage1, *, frozen: Frozen | None = None, lips: LipEncoder | None = None,
        check: Sequence[Batch] = (), prompt: float = 0.25, voice: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.check, self.prompt, self.voice = model, check, prompt, voice
        self.frozen = (frozen, lips.eval() if lips else None)  # in a tuple: no part of what trains
        self.weights = {"loss": 1.0, "durations": 0.2}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Masked tokens, frames."""
        masked = float(batch["hidden"].sum())
        timed = float((batch["durations"] > 0).sum()) if "durations" in batch else 0.0
        return {"loss": masked, "accuracy": masked, "durations": timed, "frames": float(batch["lengths"].sum())}

    def _encoded(self, batch: Batch) -> Batch:
        return encode(batch, *self.frozen)

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """``loss`` summed over masked tokens, and how many of them were right."""
        terms = self._cross_entropy(self._encoded(batch), batch["hidden"], batch["t"])
        if "durations" in batch:
            terms["durations"] = self._timing(batch)
        return terms

    def _timing(self, batch: Batch) -> Tensor:
        """Absolute error of log-durations, the mean of each utterance taken off (its rate is the prompt's)."""
        durations, known = batch["durations"], batch["durations"] > 0
        errors = self.model.durations(batch["phones"], batch["phone_mask"]).float() - (durations + 0.1).log()
        mean = (errors * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        return ((errors - mean).abs() * known).sum()

    def _cross_entropy(self, batch: Batch, hidden: Tensor, t: Tensor, conditions: bool = True) -> dict[str, Tensor]:
        given = ("phones", "phone_mask", "hint", "condition")
        more = {key: batch.get(key) for key in given} if conditions else {}
        out = self.model(batch["tokens"], hidden, t, mask=exists(batch), **more)
        logits, wanted = self.model.to_logit(out[hidden]).float(), batch["tokens"][hidden]
        right = (logits.detach().argmax(-1) == wanted).sum()
        return {"loss": F.cross_entropy(logits, wanted, reduction="sum"), "accuracy": right.float()}

    def validate(self) -> dict[str, float]:
        """``cross_entropy`` under random masks; for a task with everything after the prompt masked, ``with_condition``
        and ``without``: how much the condition really tells.  Omni: of each task apart.  ``generated_accuracy``: the
        part of tokens that is right when the first batch is generated from its frame-level condition alone."""
        sums: dict[str, list[float]] = {}

        def add(name: str, found: dict[str, Tensor], count: Tensor) -> None:
            one = sums.setdefault(name, [0.0, 0.0])
            one[0], one[1] = one[0] + float(found["loss"].detach()), one[1] + float(count)

        tasks = {batch.get("task") for batch in self.check}
        for batch in self.check:
            batch = self._encoded(placed(self, batch))
            told = [key for key in ("phones", "condition") if key in batch]
            add("cross_entropy", self._cross_entropy(batch, batch["hidden"], batch["t"]), batch["hidden"].sum())
            if "durations" in batch:
                add("durations", {"loss": self._timing(batch)}, (batch["durations"] > 0).sum())
            if not told:
                continue
            # a frame-level condition was made for the batch's own prompts
            start = (batch["prompt"] if "condition" in batch else (batch["lengths"] * self.prompt).long())[:, None]
            hidden = exists(batch) & (torch.arange(batch["tokens"].shape[1], device=start.device)[None] >= start)
            name = f"{batch['task']}_" if len(tasks) > 1 else ""
            for label, conditions in (("with_condition", True), ("without", False)):
                ones = torch.ones_like(batch["t"])
                add(name + label, self._cross_entropy(batch, hidden, ones, conditions), hidden.sum())
        scores = {key: total / max(count, 1) for key, (total, count) in sums.items()}
        if self.check and {"condition", "features", "video"} & set(self.check[0]):
            batch, made = self._generated(self.check[0])
            there = torch.arange(made.shape[1], device=made.device)[None] < batch["lengths"][:, None]
            scores["generated_accuracy"] = float((made == batch["tokens"])[there].float().mean())
        return scores

    def _generated(self, batch: Batch) -> tuple[Batch, Tensor]:
        """A batch, and the tokens ``[B, T]`` that its conditions give in 10 steps without a prompt."""
        batch = self._encoded(placed(self, batch))
        nothing = batch["tokens"][:, :0]
        more = {key: batch.get(key) for key in ("condition", "hint")}
        if "phones" in batch:  # of one utterance alone: others would be heard through their padding
            more["phones"] = batch["phones"][:1, batch["phone_mask"][0]]
        more |= {"settings": DecodeSettings(steps=10), "generator": torch.Generator().manual_seed(1)}
        made = self.model.generate(nothing, batch["lengths"], **more)
        assert isinstance(made, Tensor)
        return batch, made

    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """The first held-out utterance by a ``voice``: its own tokens, and generated ones."""
        if self.voice is None or not self.check:
            return {}
        frames, others = int(self.check[0]["lengths"][0]), ("lengths", "t", "prompt", "phones", "phone_mask", "video")
        first = {key: v[:1] if isinstance(v, Tensor | list) else v for key, v in self.check[0].items()}
        first |= {k: v[:, :frames] for k, v in first.items() if isinstance(v, Tensor) and k not in others}
        batch, made = self._generated(first)
        both = {"tokens": batch["tokens"], "generated": made}
        return {name: (self.voice(tokens), AUDIO_RATE) for name, tokens in both.items()}


def task_model(base_config: Stage1Config, base: dict[str, Tensor], config: TaskConfig, dropout: float = 0.01) -> Stage1:
    """A stage 1 with the task's modules on top of pre-trained weights, LoRA layers in place where asked for.

    ``dropout`` before LoRA, as published; on a CPU it takes a third of a small model's step.
    """
    model = Stage1(replace(base_config, **config.stage1))
    unknown = sorted(set(base) - set(model.state_dict()))
    if unknown:
        raise MetisError(f"the base has {len(unknown)} weights that the task's model lacks, the first is {unknown[0]}")
    model.load_state_dict(base, strict=False)
    if config.lora_rank:
        adapt.add_lora(model, config.lora_rank, dropout=dropout)
    return model


def task_state(model: Stage1, base: dict[str, Tensor], *, full: bool = False) -> dict[str, Tensor]:
    """What the task added: LoRA under the released names, new modules under their own; ``full``: all weights."""
    state = adapt.lora_state(model)
    for key, value in model.state_dict().items():
        if ".lora_" not in key and (full or key.replace(".base_layer.", ".") not in base):
            state[key] = value
    return state


def choose_trained(model: Stage1, base: dict[str, Tensor], mode: str) -> int:
    """Let the right parameters train; returns how many there are.

    ``mode``: ``full`` (all), ``lora`` (LoRA and the task's new modules) or ``adapter`` (the new modules alone).
    """
    if mode not in ("full", "lora", "adapter"):
        raise MetisError(f"what trains is full, lora or adapter, not {mode!r}")
    for key, p in model.named_parameters():
        new = key.replace(".base_layer.", ".") not in base
        p.requires_grad_(mode == "full" or (new and (mode == "lora" or ".lora_" not in key)))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


class Stage2Training(Objective):
    """Stage 2: cross-entropy of one masked codec layer (MaskGCT section 3.2.3); the layer is drawn for each step.

    Batches: :class:`~metis_lib.training.data.Tokens` with ``layer_weights`` of :meth:`Stage2.layer_weights`.
    """

    def __init__(self, config: Stage2Config, *, check: Sequence[Batch] = ()) -> None:
        super().__init__()
        self.model, self.check = Stage2(config), check

    def counts(self, batch: Batch) -> dict[str, float]:
        """Masked codes, frames."""
        masked = float(batch["hidden"].sum())
        return {"loss": masked, "accuracy": masked, "frames": float(batch["lengths"].sum())}

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """``loss`` summed over masked codes, and how many of them were right."""
        layer, codes = batch["layer"], batch["codes"][..., : self.model.config.num_quantizers]
        hidden = batch["hidden"]
        out = self.model(codes, batch["tokens"], layer, hidden, batch["t"], batch["prompt"], exists(batch))
        logits, wanted = self.model.to_logits[layer](out[hidden]).float(), codes[..., layer][hidden]
        right = (logits.detach().argmax(-1) == wanted).sum()
        return {"loss": F.cross_entropy(logits, wanted, reduction="sum"), "accuracy": right.float()}

    def validate(self) -> dict[str, float]:
        """``cross_entropy``, the mean over layers, and that of the first layer it predicts."""
        layers, found = range(self.model.first_layer, self.model.config.num_quantizers), dict[int, float]()
        for layer in layers if self.check else ():
            pairs = [(self(b := placed(self, {**batch, "layer": layer})), b) for batch in self.check]
            count = sum(float(b["hidden"].sum()) for _, b in pairs)
            found[layer] = sum(float(terms["loss"]) for terms, _ in pairs) / count
        if not found:
            return {}
        return {"cross_entropy": sum(found.values()) / len(found), f"layer_{layers[0] + 1}": found[layers[0]]}
