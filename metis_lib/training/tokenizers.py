"""What the tokenizers are trained for: SSL encoder, semantic codec, acoustic codec, the lip encoder of nano."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metis_lib.compat import prepare_torchaudio
from metis_lib.config import AcousticCodecConfig, LipConfig, SemanticCodecConfig, SSLConfig
from metis_lib.errors import MetisError
from metis_lib.models.discriminators import (
    DiscriminatorConfig,
    Discriminators,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.lips import LipEncoder, upsample
from metis_lib.tokenizers.semantic import ResidualVQ, SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.training.data import Batch, torch_chance
from metis_lib.training.loop import Objective, TrainSettings
from metis_lib.training.losses import multi_scale_mel_losses


class Frozen:
    """Tokenizers that do not train, in fp32 as when generating: filterbanks ``[B, T, 160]`` to features and tokens."""

    def __init__(self, encoder: SSLEncoder, semantic: SemanticCodec | None = None) -> None:
        self.encoder, self.semantic = encoder.eval(), semantic.eval() if semantic else None

    @torch.no_grad()
    def features(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Normalised SSL features ``[B, T, C]``, zero beyond an utterance's end."""
        with torch.autocast(x.device.type, enabled=False):
            hidden = self.encoder.to(x.device).normalise(self.encoder(x.float(), lengths))
        return hidden * (torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None])[..., None]

    @torch.no_grad()
    def tokens(self, x: Tensor, lengths: Tensor) -> Tensor:
        """SSL tokens ``[B, T]``, each utterance quantised alone (convolutions would hear the padding)."""
        assert self.semantic is not None
        with torch.autocast(x.device.type, enabled=False):
            features, codec = self.features(x.float(), lengths), self.semantic.to(x.device)
            out = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
            for row, feature, n in zip(out, features, lengths.tolist(), strict=True):
                row[:n] = codec.quantize(feature[None, :n])[0][0]
        return out


# ---------------------------------------------------------------- phones by CTC


def usable_phones(phones: Sequence[Sequence[int]], lengths: Tensor) -> list[int]:
    """Which utterances have phones that fit their frames."""
    return [i for i, (p, n) in enumerate(zip(phones, lengths.tolist(), strict=True)) if 0 < len(p) < n]


def ctc_sum(logits: Tensor, phones: Sequence[Sequence[int]], lengths: Tensor) -> Tensor:
    """Sum of CTC losses of ``logits [B, T, 1 + phones]`` (class 0: blank) over the utterances that have phones."""
    keep = usable_phones(phones, lengths)
    if not keep:
        return logits.sum() * 0
    scores = logits[keep].float().log_softmax(-1).transpose(0, 1)
    targets = torch.tensor([p + 1 for i in keep for p in phones[i]], device=logits.device)
    sizes = torch.tensor([len(phones[i]) for i in keep])
    return F.ctc_loss(scores, targets, lengths[keep].cpu(), sizes, reduction="sum", zero_infinity=True)


def phone_errors(logits: Tensor, phones: Sequence[Sequence[int]], lengths: Tensor) -> tuple[int, int]:
    """Edit distance of the best CTC path to the phones, summed over the utterances that have them, and their phones."""
    prepare_torchaudio()
    from torchaudio.functional import edit_distance

    errors = total = 0
    for i in usable_phones(phones, lengths):
        best = logits[i, : int(lengths[i])].argmax(-1)
        errors += edit_distance(list(phones[i]), [int(p) - 1 for p in torch.unique_consecutive(best) if p > 0])
        total += len(phones[i])
    return errors, total


# ---------------------------------------------------------------- SSL encoder


class MaskedPrediction(nn.Module):
    """Heads for training an SSL encoder: BEST-RQ targets (arXiv 2202.01855) and phone CTC.

    Targets are labels of a fixed random projection and codebook over the clean input; spans of the input are
    hidden.  ``phones > 0`` adds CTC over phones, which makes the units phonetic within minutes; ``taught > 0`` a
    prediction of a teacher's features of that width.
    """

    projection: Tensor
    codebook: Tensor

    def __init__(self, config: SSLConfig, phones: int, labels: int = 512, books: int = 2, taught: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1234)
        self.register_buffer("projection", torch.randn(books, config.input_dim, 16, generator=generator))
        codebook = torch.randn(books, labels, 16, generator=generator)
        self.register_buffer("codebook", F.normalize(codebook, dim=-1))
        self.predict = nn.ModuleList(nn.Linear(config.hidden_size, labels) for _ in range(books))
        self.phones = nn.Linear(config.hidden_size, phones + 1) if phones else None
        self.taught = nn.Linear(config.hidden_size, taught) if taught else None

    def labels(self, features: Tensor) -> Tensor:
        """BEST-RQ labels ``[books, N]`` of features ``[N, 160]``."""
        latents = F.normalize(torch.einsum("nc,kcd->knd", features.float(), self.projection), dim=-1)
        return torch.einsum("knd,kvd->knv", latents, self.codebook).argmax(-1)


class SSLTraining(Objective):
    """SSL encoder by masked prediction in the manner of w2v-BERT and BEST-RQ, and phone CTC where phones are known.

    With a teacher, its standardised features of the clean speech take the place of the BEST-RQ labels, in all frames:
    masked prediction, denoising and distillation in one squared error.

    A part of the utterances is heard degraded while the targets stay those of the clean ones, so that the units hold
    on to the words (as WavLM does).  Batches: :class:`~metis_lib.training.data.Speech`.
    """

    def __init__(
        self, config: SSLConfig, *, phones: int, ctc: float = 1.0, taught: int = 0, check: Sequence[Batch] = ()
    ) -> None:
        super().__init__()
        self.encoder, self.heads = SSLEncoder(config), MaskedPrediction(config, phones, taught=taught)
        first = {"taught": 5.0} if taught else {"masked": 1.0}
        self.weights, self.check = first | {"ctc": ctc if phones else 0.0}, check

    def counts(self, batch: Batch) -> dict[str, float]:
        """Hidden frames, phones, frames."""
        phones = sum(len(batch["phones"][i]) for i in usable_phones(batch["phones"], batch["lengths"]))
        frames = float(batch["lengths"].sum())
        return {"masked": float(batch["spans"].sum()), "taught": frames, "ctc": phones, "frames": frames}

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """Cross-entropy of hidden frames (mean over the codebooks), or the squared error, and CTC, summed."""
        out = self.encoder(batch["heard"], batch["lengths"], mask_time=batch["spans"])
        if self.heads.taught is not None:
            exists = torch.arange(out.shape[1], device=out.device)[None] < batch["lengths"][:, None]
            error = (self.heads.taught(out).float() - batch["taught"]).square().mean(-1)
            terms = {"taught": (error * exists).sum()}
        else:
            with torch.no_grad():
                targets = self.heads.labels(batch["clean"][batch["spans"]])
            at = out[batch["spans"]]
            found = [
                F.cross_entropy(head(at).float(), t, reduction="sum")
                for head, t in zip(self.heads.predict, targets, strict=True)
            ]
            terms = {"masked": torch.stack(found).sum() / len(found)}
        if self.heads.phones is not None:
            terms["ctc"] = ctc_sum(self.heads.phones(out), batch["phones"], batch["lengths"])
        return terms

    def validate(self) -> dict[str, float]:
        """``masked`` or ``taught`` (as in training) and ``phone_error`` of the greedy CTC path, on held-out speech."""
        errors = total = 0
        loss = count = 0.0
        name = "taught" if self.heads.taught is not None else "masked"
        for batch in self.check:
            batch = placed(self, batch)
            loss += float(self(batch)[name])
            count += self.counts(batch)[name]
            if self.heads.phones is not None:
                out = self.heads.phones(self.encoder(batch["clean"], batch["lengths"]))
                wrong, said = phone_errors(out, batch["phones"], batch["lengths"])
                errors, total = errors + wrong, total + said
        return {name: loss / max(count, 1)} | ({"phone_error": errors / total} if total else {})


@torch.no_grad()
def set_statistics(encoder: SSLEncoder, batches: Iterable[Batch]) -> None:
    """Mean and variance of the hidden state over some batches, for normalisation (MaskGCT section 3.2.1)."""
    states = []
    for batch in batches:
        exists = torch.arange(batch["clean"].shape[1])[None] < batch["lengths"][:, None]
        states.append(encoder(batch["clean"], batch["lengths"])[exists].float())
    joined = torch.cat(states)
    encoder.set_stats(joined.mean(0), joined.var(0).clamp(min=1e-4))


def placed(objective: nn.Module, batch: Batch) -> Batch:
    """A batch where the objective's weights are."""
    where = next(objective.parameters()).device
    return {key: value.to(where) if isinstance(value, Tensor) else value for key, value in batch.items()}


# ---------------------------------------------------------------- codecs


def revive(quantizer: ResidualVQ, after: int, step: int, fabric: Any, settings: TrainSettings) -> None:
    """Replace codes that no process used for ``after`` steps by latents of this step, those of the first process."""
    if fabric.world_size > 1:
        for layer in quantizer.quantizers:
            layer.idle.copy_(fabric.all_reduce(layer.idle.double(), reduce_op="min"))
    quantizer.revive(after * settings.accumulate, torch_chance(settings.seed, step, 3))
    for layer in quantizer.quantizers:
        from_first(fabric, layer.codebook.weight.data)
        from_first(fabric, layer.idle)


def from_first(fabric: Any, tensor: Tensor) -> None:
    """Make a tensor that of the first process, in place (Fabric's own broadcast would pass it on as an object)."""
    if fabric.world_size > 1:
        torch.distributed.broadcast(tensor, 0)


class SemanticTraining(Objective):
    """Semantic codec over features of a frozen SSL encoder: L1 of the reconstruction and the VQ losses.

    The weight 32 of the reconstruction is that of the closest published trainer of this codec (Vevo); the paper gives
    none.  With a ``head`` (the encoder's for phones, frozen) the reconstruction shall also sound the same to it: the
    divergence of its distributions, weight ``phones`` (our addition, for few codes).  ``sound`` is the weight of the
    squared error of the clean speech's filterbanks (normalised by utterance, which leaves little of the voice) that a
    linear layer reads off the reconstruction (ours): stage 2 has to make sound of what the tokens say.  ``follow`` is
    the share of the way to the mean of their latents that codes move after a step (ours; in one process alone).
    Batches: :class:`~metis_lib.training.data.Speech`.
    """

    def __init__(
        self, config: SemanticCodecConfig, frozen: Frozen, *, head: nn.Linear | None = None, phones: float = 0.0,
        sound: float = 0.0, follow: float = 0.0, check: Sequence[Batch] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.follow = follow
        self.heard = nn.Linear(config.hidden_size, frozen.encoder.config.input_dim) if sound else None
        self.codec, self.frozen, self.check = SemanticCodec(config), (frozen, head), check
        self.weights = {"recon_l1": 32.0, "vq": 1.0} | ({"phones": phones} if head is not None else {})
        self.weights |= {"sound": sound} if sound else {}
        self.codec.quantizer.track_usage()

    def _said(self, features: Tensor) -> Tensor:
        """What the phone head makes of normalised features ``[B, T, C]``: log-probabilities ``[B, T, 1 + V]``."""
        frozen, head = self.frozen
        assert head is not None
        with torch.autocast(features.device.type, enabled=False):
            hidden = features.float() * frozen.encoder.var.sqrt() + frozen.encoder.mean
            weight, bias = (p.detach().to(hidden.device) for p in (head.weight, head.bias))  # no part of the module
            return F.linear(hidden, weight, bias).log_softmax(-1)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Frames."""
        return dict.fromkeys((*self.weights, "frames"), float(batch["lengths"].sum()))

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """``recon_l1`` and ``vq`` (codebook and commitment with their weights), summed over frames."""
        features = self.frozen[0].features(batch["heard"], batch["lengths"])
        exists = torch.arange(features.shape[1], device=features.device)[None] < batch["lengths"][:, None]
        recon, losses, _ = self.codec(features, exists)
        frames = exists.sum()
        vq = losses["commit_loss"] + losses["codebook_loss"]
        terms = {"recon_l1": losses["recon_l1"] * frames, "vq": vq * frames}
        if "phones" in self.weights:
            wanted, found = self._said(features), self._said(recon)
            terms["phones"] = ((wanted.exp() * (wanted - found)).sum(-1) * exists).sum()
        if self.heard is not None:
            error = (self.heard(recon).float() - batch["clean"]).square().mean(-1)
            terms["sound"] = (error * exists).sum()
        return terms

    def after_step(self, step: int, fabric: Any, settings: TrainSettings) -> None:
        """Codes follow their latents; idle ones are revived every 10 steps, not in the last fifth of the run."""
        if self.follow and fabric.world_size == 1:
            self.codec.quantizer.quantizers[0].follow(self.follow)
        if step % 10 == 9 and step < settings.steps * 0.8:
            revive(self.codec.quantizer, 20, step, fabric, settings)

    def validate(self) -> dict[str, float]:
        """``recon_l1``, the perplexity of the tokens (how many are in use), ``sound`` where it counts, and with a head
        the ``phone_error`` of what is reconstructed."""
        loss = frames = sound = 0.0
        errors = total = 0
        used = torch.zeros(self.codec.config.codebook_size)
        for batch in self.check:
            batch = placed(self, batch)
            features = self.frozen[0].features(batch["clean"], batch["lengths"])
            exists = torch.arange(features.shape[1], device=features.device)[None] < batch["lengths"][:, None]
            recon, losses, tokens = self.codec(features, exists)
            if "phones" in self.weights:
                wrong, said = phone_errors(self._said(recon), batch["phones"], batch["lengths"])
                errors, total = errors + wrong, total + said
            if self.heard is not None:
                sound += float(((self.heard(recon).float() - batch["clean"]).square().mean(-1) * exists).sum())
            loss += float(losses["recon_l1"] * exists.sum())
            frames += float(exists.sum())
            used += torch.bincount(tokens[exists].cpu(), minlength=len(used))
        scores = {"recon_l1": loss / max(frames, 1), "perplexity": perplexity(used)}
        scores |= {"sound": sound / max(frames, 1)} if self.heard is not None else {}
        return scores | ({"phone_error": errors / total} if total else {})


def perplexity(counts: Tensor) -> float:
    """Of codes used ``counts [V]`` times: as many codes in even use have as much entropy."""
    share = counts.float() / counts.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-9).log()).sum()))


class AcousticTraining(Objective):
    """Acoustic codec: reconstruction, and after ``adversarial_from`` steps the discriminators (MaskGCT appendix A.4).

    The weights are the paper's: rec 10, adv 2, feat 2, codebook 1, commit 0.25 (the last two inside the codec).
    ``convergence`` (spectral convergence) is ours; 0 leaves it out.  ``decoder_only``: encoder and quantiser stay, and
    with them all tokens; only their decoder learns.  ``dropout``: quantiser dropout as (share, fewest, most) instead of
    the configuration's; heard from few layers, the encoder puts what matters into the first ones.  Every ``fit_every``
    steps, not in the last fifth of the run, the quantiser is fitted to what the encoder gave in the last ``FITTED``
    steps (by gradients alone it hardly finds good codes); codes move by ``follow`` of the way to the mean of their
    latents (in one process alone).  A run that is resumed within those steps passes over that fit.
    Batches: :class:`~metis_lib.training.data.Crops`.
    """

    FITTED, IDLE = 60, 50

    def __init__(
        self, config: AcousticCodecConfig, *, discriminators: DiscriminatorConfig | None = None,
        adversarial_from: int = 0, convergence: float = 0.0, decoder_only: bool = False, fit_every: int | None = None,
        follow: float = 0.0, dropout: Sequence[float] | None = None, check: Sequence[Batch] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        count = config.num_quantizers
        if dropout is not None and not (len(dropout) == 3 and 1 <= dropout[1] <= dropout[2] <= count):
            raise MetisError(f"dropout is (share, fewest, most) with 1 <= fewest <= most <= {count}, not {dropout}")
        self.fit_every, self.follow, self.dropout = fit_every, follow, dropout
        self.latents = deque[Tensor](maxlen=min(self.FITTED, fit_every or self.FITTED))
        self.codec, self.check, self.begin = AcousticCodec(config), check, adversarial_from
        self.decoder_only = decoder_only
        if decoder_only:
            self.codec.requires_grad_(False).decoder.model.requires_grad_(True)
        self.critics = Discriminators(discriminators) if discriminators else None
        self.codec.decoder.quantizer.track_usage(not decoder_only)
        self.weights = {
            "mel": 10.0, "convergence": convergence, "vq": 1.0, "adversarial": 2.0, "features": 2.0, "critics": 1.0,
        }  # fmt: skip
        self.now, self.made = 0, list[Tensor]()  # step at hand; what the codec made in it, for the critics' turn

    def parts(self, step: int) -> tuple[str, ...]:
        """The codec, and the discriminators once their time has come."""
        self.now = step
        return ("codec", "critics") if self.critics is not None and step >= self.begin else ("codec",)

    def trained(self, part: str) -> list[nn.Parameter]:
        """Parameters of ``codec`` or ``critics``."""
        return list(
            (self.codec.decoder.model if self.decoder_only and part == "codec" else getattr(self, part)).parameters()
        )

    def counts(self, batch: Batch) -> dict[str, float]:
        """Crops."""
        n = len(batch["wav"])
        return dict.fromkeys(self.weights, n) | {"frames": n * batch["wav"].shape[1] / self.codec.config.hop_size}

    def forward(self, batch: Batch, part: str = "codec") -> dict[str, Tensor]:
        """Sums over crops.  The discriminators' turn comes second and judges what the codec made in its own."""
        wav = batch["wav"]
        if part == "critics":
            assert self.critics is not None
            return {"critics": discriminator_loss(self.critics(wav), self.critics(self.made.pop(0))).sum()}
        layers = None
        if self.dropout is not None and self.training:
            share, fewest, most = self.dropout
            layers = self.codec.draw_layers(len(wav), share=share, fewest=int(fewest), most=int(most))
        elif self.training:
            layers = self.codec.draw_layers(len(wav))
        if self.decoder_only:
            with torch.no_grad():
                found = self.codec.decoder.quantizer(self.codec.encoder(wav), layers)
            made = self.codec.decoder.model(found.output.detach())
            out = {"recon": F.pad(made, (0, max(0, wav.shape[1] - made.shape[1])))[:, : wav.shape[1]]}
        else:
            out = self.codec(wav, layers=layers)
            if self.fit_every and self.training and self.now % self.fit_every >= self.fit_every - self.FITTED:
                with torch.no_grad():
                    self.latents.append(self.codec.encoder(wav).transpose(1, 2).flatten(0, 1).float())
        mel, convergence = multi_scale_mel_losses(out["recon"], wav, self.codec.config.sample_rate)
        terms = {"mel": mel.sum(), "convergence": convergence.sum()}
        if not self.decoder_only:
            terms["vq"] = (out["commit_loss"] + out["codebook_loss"]) * len(wav)
        if self.critics is not None and self.training and self.now >= self.begin:
            self.made.append(out["recon"].detach())
            fake = self.critics(out["recon"])
            with torch.no_grad():
                real = self.critics(wav)
            terms |= {"adversarial": adversarial_loss(fake).sum(), "features": feature_matching_loss(real, fake).sum()}
        return terms

    def spoiled(self) -> None:
        """What the codec made and heard in a step that was not finite is of no use."""
        self.made.clear()
        self.latents.clear()

    def after_step(self, step: int, fabric: Any, settings: TrainSettings) -> None:
        """Fit the codebooks when it is time; let codes follow; revive idle ones, not in the last tenth of the run."""
        self.made.clear()
        if self.decoder_only:
            return
        quantizer, alone = self.codec.decoder.quantizer, fabric.world_size == 1
        every = self.fit_every or 0
        due = every and (step + 1) % every == 0 and step < settings.steps * 0.8
        if due and len(self.latents) == self.latents.maxlen:  # fewer: the run was resumed meanwhile
            quantizer.fit(torch.cat([*self.latents]), torch_chance(settings.seed, step, 4))
            for p in quantizer.parameters():
                from_first(fabric, p.data)
            self.latents.clear()
        if self.follow and alone:
            for layer in quantizer.quantizers:
                layer.follow(self.follow)
        if step % 10 == 9 and step < settings.steps * 0.9:
            revive(quantizer, self.IDLE, step, fabric, settings)

    def validate(self) -> dict[str, float]:
        """``mel`` and ``convergence`` of held-out crops, and the part of the codes in use."""
        sums, used = np.zeros(3), [set[int]() for _ in range(self.codec.config.num_quantizers)]
        for batch in self.check:
            wav = placed(self, batch)["wav"]
            out = self.codec(wav)
            mel, convergence = multi_scale_mel_losses(out["recon"], wav, self.codec.config.sample_rate)
            sums += [float(mel.sum()), float(convergence.sum()), len(wav)]
            for q, codes in enumerate(used):
                codes.update(out["codes"][..., q].unique().tolist())
        share = sum(map(len, used)) / len(used) / self.codec.config.codebook_size
        return {"mel": sums[0] / sums[2], "convergence": sums[1] / sums[2], "codes_used": share} if sums[2] else {}

    def samples(self) -> dict[str, tuple[Tensor, int]]:
        """Two held-out crops, as they were and as they came back."""
        out: dict[str, tuple[Tensor, int]] = {}
        for i, wav in enumerate(placed(self, self.check[0])["wav"][:2] if self.check else ()):
            rate = self.codec.config.sample_rate
            out |= {f"recorded {i}": (wav, rate), f"resynthesised {i}": (self.codec(wav[None])["recon"][0], rate)}
        return out


# ---------------------------------------------------------------- lips


class LipTraining(Objective):
    """A small lip encoder by phone CTC at 50 Hz; frozen afterwards (nano's own; the paper takes Auto-AVSR's).

    Batches: :class:`~metis_lib.training.data.Lips`.
    """

    weights = {"ctc": 1.0}

    def __init__(self, config: LipConfig, *, phones: int, check: Sequence[Batch] = ()) -> None:
        super().__init__()
        self.encoder, self.check = LipEncoder(config), check
        self.phones = nn.Linear(config.hidden_size, phones + 1)

    def counts(self, batch: Batch) -> dict[str, float]:
        """Phones, frames."""
        phones = sum(len(batch["said"][i]) for i in usable_phones(batch["said"], batch["lengths"]))
        return {"ctc": phones, "frames": float(batch["lengths"].sum())}

    def _logits(self, batch: Batch) -> Tensor:
        pictures = (batch["lengths"] + 1) // 2
        return self.phones(upsample(self.encoder(batch["video"], pictures), pictures))[:, : int(batch["lengths"].max())]

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """CTC, summed over utterances."""
        return {"ctc": ctc_sum(self._logits(batch), batch["said"], batch["lengths"])}

    def validate(self) -> dict[str, float]:
        """``phone_error`` of the greedy path; a perfect reader of the visemes has the oracle's (docs/lips.md)."""
        errors = total = 0
        for batch in self.check:
            batch = placed(self, batch)
            wrong, said = phone_errors(self._logits(batch), batch["said"], batch["lengths"])
            errors, total = errors + wrong, total + said
        return {"phone_error": errors / total} if total else {}
