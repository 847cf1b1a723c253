"""Trainers of the generative models: stage 1 (pre-training and fine-tuning) and stage 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

from metis_lib.checkpoints import TaskConfig
from metis_lib.config import Stage1Config, Stage2Config
from metis_lib.data.store import FlatStore, frame_batches
from metis_lib.models import adapt
from metis_lib.models.masked import MaskingSettings, draw_masks, masked_cross_entropy
from metis_lib.models.stage1 import Stage1, stretch
from metis_lib.models.stage2 import Stage2
from metis_lib.tasks.base import Task
from metis_lib.training.data import padded
from metis_lib.training.loop import TrainSettings, train


@dataclass
class Batch:
    """Padded examples: ``tokens [B, T, 1 + Q]`` (SSL token, then acoustic codes), ``lengths [B]`` and conditions."""

    tokens: Tensor
    lengths: Tensor
    phones: Tensor | None = None
    phone_mask: Tensor | None = None
    hint: Tensor | None = None
    condition: Tensor | None = None

    @property
    def exists(self) -> Tensor:
        """``[B, T]`` True where a frame is."""
        return torch.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


def collate(store: FlatStore, chosen: list[int], pad: int | None = None, features: FlatStore | None = None) -> Batch:
    """Read items of a token store.

    Args:
        pad: the padding phone; given, phones and the evenly stretched hint are read too.
        features: frame-level conditions ``[T, C]`` of the same items.
    """
    arrays = [torch.from_numpy(store[i].astype(np.int64)) for i in chosen]
    if features is not None:
        conditions = [torch.from_numpy(features[i].astype(np.float32)) for i in chosen]
        sizes = [min(len(a), len(c)) for a, c in zip(arrays, conditions, strict=True)]
        arrays = [a[:n] for a, n in zip(arrays, sizes, strict=True)]
        condition, _ = padded([c[:n] for c, n in zip(conditions, sizes, strict=True)])
        tokens, lengths = padded(arrays)
        return Batch(tokens, lengths, condition=condition)
    tokens, lengths = padded(arrays)
    if pad is None:
        return Batch(tokens, lengths)
    ids = [torch.tensor(store.items[i]["phones"]) for i in chosen]
    phones, counts = padded(ids, pad)
    hint, _ = padded([stretch(p[None], len(a))[0] for p, a in zip(ids, arrays, strict=True)], pad)
    # Phones stand right before the frames, as when generating, so padding goes to the left.
    phones = torch.stack([row.roll(phones.shape[1] - int(n)) for row, n in zip(phones, counts, strict=True)])
    return Batch(tokens, lengths, phones=phones, phone_mask=phones != pad, hint=hint)


def batches_of(
    store: FlatStore,
    usable: list[int],
    settings: TrainSettings,
    budget: int,
    *,
    pad: int | None = None,
    features: FlatStore | None = None,
) -> Iterator[Batch]:
    """Endless batches by frame budget over the ``usable`` items."""
    rng = np.random.default_rng(settings.seed)
    sizes = [store.length(i) for i in usable]
    for chosen in frame_batches(sizes, budget, rng, max(sizes)):
        yield collate(store, [usable[k] for k in chosen], pad, features)


def stage1_loss(
    model: Stage1, batch: Batch, masking: MaskingSettings, generator: torch.Generator, dropout: float = 0.0
) -> dict[str, Tensor]:
    """Cross-entropy of masked SSL tokens; a batch loses its text with probability ``dropout``."""
    t, _, hidden = draw_masks(batch.lengths, masking, generator)
    keep = float(torch.rand((), generator=generator)) >= dropout
    tokens = batch.tokens[..., 0]
    out = model(
        tokens,
        hidden,
        t,
        mask=batch.exists,
        phones=batch.phones if keep else None,
        phone_mask=batch.phone_mask if keep else None,
        hint=batch.hint if keep else None,
        condition=batch.condition,
    )
    return {"loss": masked_cross_entropy(model.to_logit(out[hidden]), tokens[hidden])}


def full_mask_entropy(model: Stage1, batches: list[Batch], with_condition: bool, prompt_share: float) -> float:
    """Held-out cross-entropy with every token after the prompt masked: how much the condition really tells."""
    total = count = 0.0
    for batch in batches:
        prompt = (batch.lengths * prompt_share).long()
        hidden = batch.exists & (torch.arange(batch.tokens.shape[1])[None] >= prompt[:, None])
        tokens = batch.tokens[..., 0]
        out = model(
            tokens,
            hidden,
            torch.ones(len(tokens)),
            mask=batch.exists,
            phones=batch.phones if with_condition else None,
            phone_mask=batch.phone_mask if with_condition else None,
            hint=batch.hint if with_condition else None,
            condition=batch.condition if with_condition else None,
        )
        total += float(masked_cross_entropy(model.to_logit(out[hidden]), tokens[hidden])) * int(hidden.sum())
        count += int(hidden.sum())
    return total / count


def usable_items(store: FlatStore, *, text: bool = False, longest: int = 600, shortest: int = 25) -> list[int]:
    """Items between ``shortest`` and ``longest`` frames, with phones where ``text`` is asked for."""
    return [
        i
        for i in range(len(store))
        if shortest <= store.length(i) <= longest and (not text or 0 < len(store.items[i]["phones"]) < 400)
    ]


def held_out_batches(
    store: FlatStore, pad: int | None, features: FlatStore | None, text: bool = False, count: int = 6
) -> list[Batch]:
    """A few fixed batches for validation."""
    usable = usable_items(store, text=text)
    rng = np.random.default_rng(1)
    chosen = frame_batches([store.length(i) for i in usable], 3000, rng, 600)
    return [collate(store, [usable[k] for k in next(chosen)], pad, features) for _ in range(count)]


def pretrain(
    config: Stage1Config,
    tokens: FlatStore,
    held_out: FlatStore,
    settings: TrainSettings,
    *,
    budget: int = 4000,
    log: Path | None = None,
) -> tuple[Stage1, dict[str, float]]:
    """Stage-1 pre-training on unlabelled SSL tokens (Metis sections 3.1 and 4.1)."""
    torch.manual_seed(settings.seed)
    model = Stage1(config)
    generator = torch.Generator().manual_seed(settings.seed)
    masking = MaskingSettings()
    check = held_out_batches(held_out, None, None)

    def validate() -> dict[str, float]:
        fixed = torch.Generator().manual_seed(1)
        losses = [float(stage1_loss(model, batch, masking, fixed)["loss"]) for batch in check for _ in range(2)]
        return {"cross_entropy": mean(losses)}

    scores = train(
        model,
        lambda batch: stage1_loss(model, batch, masking, generator),
        batches_of(tokens, usable_items(tokens), settings, budget),
        settings,
        log=log,
        validate=validate,
    )
    return model, scores


def task_model(base_config: Stage1Config, base: dict[str, Tensor], config: TaskConfig) -> Stage1:
    """A stage 1 with the task's modules on top of pre-trained weights, LoRA layers in place where asked for."""
    model = Stage1(replace(base_config, **config.stage1))
    model.load_state_dict(base, strict=False)
    if config.lora_rank:
        adapt.add_lora(model, config.lora_rank)
    return model


def task_state(model: Stage1, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the task added: LoRA under the released names, new modules under their own."""
    state = adapt.lora_state(model)
    for key, value in model.state_dict().items():
        if ".lora_" not in key and key.replace(".base_layer.", ".") not in base:
            state[key] = value
    return state


def fine_tune(
    task: Task,
    config: TaskConfig,
    base_config: Stage1Config,
    base: dict[str, Tensor],
    tokens: FlatStore,
    held_out: FlatStore,
    settings: TrainSettings,
    *,
    pad: int,
    features: FlatStore | None = None,
    held_out_features: FlatStore | None = None,
    budget: int = 4000,
    longest: int = 600,
    log: Path | None = None,
) -> tuple[Stage1, dict[str, float]]:
    """Fine-tune stage 1 for a task: LoRA and the task's new modules train, the base is frozen."""
    torch.manual_seed(settings.seed)
    model = task_model(base_config, base, config)
    trained = set(task_state(model, base))
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in trained or f"model.{key}" in trained)
    generator = torch.Generator().manual_seed(settings.seed)
    text = pad if task.takes_text else None
    check = held_out_batches(held_out, text, held_out_features, task.takes_text)
    share = 0.25 if task.takes_prompt else 0.0

    def validate() -> dict[str, float]:
        given = full_mask_entropy(model, check, True, share)
        return {"with_condition": given, "without": full_mask_entropy(model, check, False, share)}

    usable = usable_items(tokens, text=task.takes_text, longest=longest)
    scores = train(
        model,
        lambda batch: stage1_loss(model, batch, task.masking, generator, task.condition_dropout),
        batches_of(tokens, usable, settings, budget, pad=text, features=features),
        settings,
        log=log,
        validate=validate,
    )
    return model, scores


def stage2_loss(model: Stage2, batch: Batch, layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Cross-entropy of one masked codec layer (MaskGCT section 3.2.3); prompts up to half of the utterance."""
    masking = MaskingSettings(prompt_probability=0.85, max_prompt_fraction=0.5)
    t, prompt, hidden = draw_masks(batch.lengths, masking, generator)
    codes = batch.tokens[..., 1 : 1 + model.config.num_quantizers]
    out = model(codes, batch.tokens[..., 0], layer, hidden, t, prompt, batch.exists)
    loss = masked_cross_entropy(model.to_logits[layer](out[hidden]), codes[..., layer][hidden])
    return {"loss": loss}


def train_stage2(
    config: Stage2Config,
    tokens: FlatStore,
    held_out: FlatStore,
    settings: TrainSettings,
    *,
    budget: int = 4000,
    log: Path | None = None,
) -> tuple[Stage2, dict[str, float]]:
    """Either of the two stage-2 models; a layer is drawn for each batch, low layers more often."""
    torch.manual_seed(settings.seed)
    model = Stage2(config)
    generator = torch.Generator().manual_seed(settings.seed)
    check = held_out_batches(held_out, None, None)
    layers = range(model.first_layer, config.num_quantizers)

    def loss_of(batch: Batch) -> dict[str, Tensor]:
        layer = int(torch.multinomial(model.layer_weights(), 1, generator=generator))
        return stage2_loss(model, batch, layer, generator)

    def validate() -> dict[str, float]:
        fixed = torch.Generator().manual_seed(1)
        losses = {q: mean([float(stage2_loss(model, b, q, fixed)["loss"]) for b in check[:3]]) for q in layers}
        return {
            "cross_entropy": mean(losses.values()),
            f"layer_{layers[0] + 1}": losses[layers[0]],
        }

    batches = batches_of(tokens, usable_items(tokens), settings, budget)
    scores = train(model, loss_of, batches, settings, log=log, validate=validate)
    return model, scores


def trainable(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
