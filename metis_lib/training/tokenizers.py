"""Trainers of the tokenizers: acoustic codec, SSL encoder, semantic codec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.config import SSLConfig, SystemConfig
from metis_lib.data.store import FlatStore, frame_batches, random_crops
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.training.data import padded
from metis_lib.training.loop import TrainSettings, train
from metis_lib.training.losses import multi_scale_mel_losses


def train_acoustic(
    system: SystemConfig,
    waves: FlatStore,
    held_out: FlatStore,
    settings: TrainSettings,
    *,
    batch: int = 16,
    seconds: float = 0.6,
    start: dict[str, Tensor] | None = None,
    log: Path | None = None,
) -> tuple[AcousticCodec, dict[str, float]]:
    """Acoustic codec by reconstruction alone: 10 x log-mel, 5 x spectral convergence, codebook and commitment.

    Random crops of ``seconds``; codes that nobody used for 10 steps are replaced every 10 steps.  ``start`` are
    weights to go on from.
    """
    torch.manual_seed(settings.seed)
    config = system.acoustic
    codec = AcousticCodec(config)
    if start is not None:
        codec.load_state_dict(start)
    codec.track_usage()
    rng, generator = np.random.default_rng(settings.seed), torch.Generator().manual_seed(settings.seed)
    samples = round(seconds * config.sample_rate / config.hop_size) * config.hop_size

    def batches() -> Iterator[Tensor]:
        while True:
            yield random_crops(waves, batch, samples, rng)

    def loss_of(wav: Tensor) -> dict[str, Tensor]:
        out = codec(wav, generator)
        mel, convergence = multi_scale_mel_losses(out["recon"], wav, config.sample_rate)
        loss = 10 * mel + 5 * convergence + out["commit_loss"] + out["codebook_loss"]
        return {"loss": loss, "mel": mel, "convergence": convergence, "commit": out["commit_loss"]}

    check = random_crops(held_out, 32, 4 * samples, np.random.default_rng(1))

    def validate() -> dict[str, float]:
        out = codec(check)
        used = [len(torch.unique(out["codes"][..., q])) for q in range(config.num_quantizers)]
        mel, convergence = multi_scale_mel_losses(out["recon"], check, config.sample_rate)
        return {
            "mel": float(mel),
            "convergence": float(convergence),
            "codes_used": float(np.mean(used)) / config.codebook_size,
        }

    def after(step: int) -> None:
        if step % 10 == 9 and step < settings.steps * 0.9:
            codec.revive(10, generator)

    scores = train(codec, loss_of, batches(), settings, log=log, after_step=after, validate=validate)
    return codec, scores


class MaskedPrediction(nn.Module):
    """Heads for training an SSL encoder: BEST-RQ targets (arXiv 2202.01855) and phone CTC.

    Targets are labels of a fixed random projection and codebook over the clean input; spans of the input are
    hidden.  ``phones > 0`` adds CTC over phones, which makes the units phonetic within minutes.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, config: SSLConfig, phones: int, labels: int = 512, books: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1234)
        self.register_buffer("projection", torch.randn(books, config.input_dim, 16, generator=generator))
        codebook = torch.randn(books, labels, 16, generator=generator)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))
        self.predict = nn.ModuleList(nn.Linear(config.hidden_size, labels) for _ in range(books))
        self.phones = nn.Linear(config.hidden_size, phones + 1) if phones else None

    def labels(self, features: Tensor) -> Tensor:
        """BEST-RQ labels ``[books, B, T]`` of features ``[B, T, 160]``."""
        latents = F.normalize(torch.einsum("btc,kcd->kbtd", features.float(), self.projection), dim=-1)
        return torch.einsum("kbtd,kvd->kbtv", latents, self.codebook).argmax(-1)


def span_mask(lengths: Tensor, generator: torch.Generator, share: float = 0.35, span: int = 10) -> Tensor:
    """Hide random spans of ``span`` frames so that about ``share`` of each utterance is hidden: ``[B, T]`` bool."""
    horizon = int(lengths.max())
    starts = torch.rand(len(lengths), horizon, generator=generator) < 1 - (1 - share) ** (1 / span)
    hidden = F.max_pool1d(F.pad(starts.float(), (span - 1, 0))[:, None], span, stride=1)[:, 0] > 0
    return hidden & (torch.arange(horizon)[None] < lengths[:, None])


def train_ssl(
    system: SystemConfig,
    features: FlatStore,
    held_out: FlatStore,
    settings: TrainSettings,
    *,
    phone_vocab: int,
    budget: int = 3000,
    longest: int = 300,
    ctc_weight: float = 1.0,
    noisy: FlatStore | None = None,
    start: dict[str, Tensor] | None = None,
    log: Path | None = None,
) -> tuple[SSLEncoder, dict[str, float]]:
    """SSL encoder by masked prediction plus phone CTC where a row has phones.

    ``features`` holds stacked filterbank frames ``[T, 160]`` (float16) with ``phones`` in its records.
    ``noisy`` holds the same items degraded: three in ten are heard so, while the targets stay those of the clean ones,
    so that the units hold on to the words (as WavLM does).
    Items longer than ``longest`` frames are left out of CTC batches and cropped for masked prediction.
    ``start`` are weights of an encoder to go on from (the heads begin anew).
    """
    torch.manual_seed(settings.seed)
    encoder = SSLEncoder(system.ssl)
    if start is not None:
        encoder.load_state_dict(start)
    heads = MaskedPrediction(system.ssl, phone_vocab)
    both = nn.ModuleDict({"encoder": encoder, "heads": heads})
    rng, generator = np.random.default_rng(settings.seed), torch.Generator().manual_seed(settings.seed)

    def collate(store: FlatStore, chosen: list[int]) -> dict[str, Any]:
        arrays: list[Tensor] = []
        heard: list[Tensor] = []
        phones: list[list[int]] = []
        for i in chosen:
            whole = store.length(i) <= longest
            start = 0 if whole else int(rng.integers(0, store.length(i) - longest))
            degraded = noisy is not None and store is features and rng.random() < 0.3
            for listed, source in ((arrays, store), (heard, noisy if degraded and noisy is not None else store)):
                listed.append(torch.from_numpy(source[i][start : start + longest].astype(np.float32)))
            phones.append(store.items[i]["phones"] if whole else [])
        x, lengths = padded(arrays)
        return {"x": padded(heard)[0], "clean": x, "lengths": lengths, "phones": phones}

    def batches() -> Iterator[dict[str, Any]]:
        sizes = [features.length(i) for i in range(len(features))]
        for chosen in frame_batches(sizes, budget, rng, longest):
            yield collate(features, chosen)

    def loss_of(batch: dict[str, Any]) -> dict[str, Tensor]:
        hidden_frames = span_mask(batch["lengths"], generator)
        with torch.no_grad():
            targets = heads.labels(batch["clean"])[:, hidden_frames]
        out = encoder(batch["x"], batch["lengths"], mask_time=hidden_frames)
        at = out[hidden_frames]
        scores = [head(at).float() for head in heads.predict]
        masked = sum(F.cross_entropy(s, t) for s, t in zip(scores, targets, strict=True)) / len(scores)
        ctc = ctc_loss(out, batch)
        return {"loss": masked + ctc_weight * ctc, "masked": masked, "ctc": ctc}

    def ctc_loss(out: Tensor, batch: dict[str, Any]) -> Tensor:
        keep = [i for i, p in enumerate(batch["phones"]) if p and len(p) < int(batch["lengths"][i])]
        if heads.phones is None or not keep:
            return out.sum() * 0
        logits = heads.phones(out[keep]).float().log_softmax(-1).transpose(0, 1)
        targets = torch.tensor([p + 1 for i in keep for p in batch["phones"][i]])
        sizes = torch.tensor([len(batch["phones"][i]) for i in keep])
        return F.ctc_loss(logits, targets, batch["lengths"][keep], sizes, zero_infinity=True)

    check_rng = np.random.default_rng(1)
    check = [
        collate(held_out, chosen)
        for chosen, _ in zip(
            frame_batches([held_out.length(i) for i in range(len(held_out))], budget, check_rng, longest),
            range(6),
            strict=False,
        )
    ]

    def validate() -> dict[str, float]:
        from torchaudio.functional import edit_distance

        errors = total = 0
        losses = []
        for batch in check:
            out = encoder(batch["x"], batch["lengths"])
            losses.append(float(ctc_loss(out, batch)))
            if heads.phones is None:
                continue
            best = heads.phones(out).argmax(-1)
            for row, length, phones in zip(best, batch["lengths"], batch["phones"], strict=True):
                if phones:
                    said = [int(p) - 1 for p in torch.unique_consecutive(row[:length]) if p > 0]
                    errors += edit_distance(phones, said)
                    total += len(phones)
        return {"ctc": float(np.mean(losses)), "phone_error": errors / max(total, 1)}

    scores = train(both, loss_of, batches(), settings, log=log, validate=validate)
    set_statistics(encoder, features, longest)
    return encoder, scores


@torch.no_grad()
def set_statistics(encoder: SSLEncoder, features: FlatStore, longest: int, items: int = 400) -> None:
    """Mean and variance of the hidden state over ``items`` utterances, for normalisation (MaskGCT section 3.2.1)."""
    picked = np.random.default_rng(0).permutation(len(features))[:items]
    states = []
    for i in picked:
        x = torch.from_numpy(features[int(i)][:longest].astype(np.float32))[None]
        states.append(encoder(x)[0].float())
    joined = torch.cat(states)
    encoder.set_stats(joined.mean(0), joined.var(0).clamp(min=1e-4))


def train_semantic(
    system: SystemConfig,
    features: FlatStore,
    settings: TrainSettings,
    *,
    batch: int = 24,
    frames: int = 100,
    log: Path | None = None,
) -> tuple[SemanticCodec, dict[str, float]]:
    """Semantic codec over normalised SSL features ``[T, C]`` (float16): 32 x L1 plus VQ losses.

    The weight 32 is that of the closest published trainer of this codec (Vevo); the paper gives none.
    """
    torch.manual_seed(settings.seed)
    codec = SemanticCodec(system.semantic)
    codec.track_usage()
    rng, generator = np.random.default_rng(settings.seed), torch.Generator().manual_seed(settings.seed)
    long_enough = [i for i in range(len(features)) if features.length(i) >= frames]

    def draw() -> Tensor:
        rows = []
        for i in rng.choice(long_enough, batch):
            start = int(rng.integers(0, features.length(i) - frames + 1))
            rows.append(features[i][start : start + frames].astype(np.float32))
        return torch.from_numpy(np.stack(rows))

    def batches() -> Iterator[Tensor]:
        while True:
            yield draw()

    def loss_of(x: Tensor) -> dict[str, Tensor]:
        _, losses, _ = codec(x)
        loss = 32 * losses["recon_l1"] + losses["commit_loss"] + losses["codebook_loss"]
        return {"loss": loss, "recon_l1": losses["recon_l1"]}

    check = torch.cat([draw() for _ in range(4)])

    def validate() -> dict[str, float]:
        _, losses, tokens = codec(check)
        share = torch.bincount(tokens.flatten(), minlength=system.semantic.codebook_size).float()
        share = share / share.sum()
        perplexity = torch.exp(-(share * share.clamp(min=1e-9).log()).sum())
        return {"recon_l1": float(losses["recon_l1"]), "perplexity": float(perplexity)}

    def after(step: int) -> None:
        if step % 10 == 9 and step < settings.steps * 0.8:
            codec.revive(20, generator)

    scores = train(codec, loss_of, batches(), settings, log=log, after_step=after, validate=validate)
    return codec, scores
