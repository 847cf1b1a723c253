"""Tokenizers against the released code's own numbers, their shapes, and what they say about bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metis_lib.config import AcousticCodecConfig, SemanticCodecConfig, SSLConfig, preset
from metis_lib.errors import MetisError
from metis_lib.tokenizers.acoustic import AcousticCodec, MelEncoder
from metis_lib.tokenizers.semantic import FactorizedVQ, ResidualVQ, SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder, fbank
from metis_lib.training.losses import multi_scale_mel_losses

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"atol": 1e-4, "rtol": 0}


def golden(name: str, prefix: str) -> dict[str, torch.Tensor]:
    values = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if theirs.is_floating_point():
        torch.testing.assert_close(ours, theirs, **CLOSE)
    else:
        assert torch.equal(ours, theirs.to(ours.dtype))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# --- semantic codec


def semantic_golden() -> SemanticCodec:
    config = SemanticCodecConfig(48, 64, 8, 32, 80, 2)
    codec = SemanticCodec(config).eval()
    codec.load_state_dict(golden("semantic_codec", "sd/"), strict=True)
    return codec


@pytest.mark.golden
@torch.no_grad()
def test_semantic_codec_matches_released() -> None:
    io, codec = golden("semantic_codec", "io/"), semantic_golden()
    same(codec.encoder(io["x"].transpose(1, 2)), io["encoder_out"])
    tokens, quantised = codec.quantize(io["x"])
    same(tokens, io["indices"])
    same(quantised, io["quantized"])
    recon, _, again = codec(io["x"])
    same(recon, io["x_rec"])
    same(again[None], io["indices_full"])
    same(codec.quantizer.vq2emb(tokens[None]), io["vq2emb"])
    same(codec.decode_tokens(tokens), io["x_rec"])


@pytest.mark.golden
def test_semantic_codec_training_matches_released() -> None:
    io = golden("train", "repcodec/")
    codec = SemanticCodec(SemanticCodecConfig(24, 32, 8, 16, 32, 2))
    codec.load_state_dict(golden("train", "sd_repcodec/"), strict=True)
    recon, losses, tokens = codec.train()(io["x"])
    same(tokens[None], io["indices"])
    same(recon.detach(), io["x_rec"])
    for name in ("recon_l1", "total"):
        same(losses[name].detach(), io[name])
    same(losses["commit_loss"].detach(), io["commit_loss"][0])
    same(losses["codebook_loss"].detach(), io["codebook_loss"][0])
    losses["total"].backward()
    parameters = dict(codec.named_parameters())
    wanted = {k.removeprefix("grad/"): v for k, v in io.items() if k.startswith("grad/")}
    assert len(wanted) == 7
    for name, gradient in wanted.items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-6, rtol=1e-4)


def test_semantic_codec_losses_ignore_masked_frames() -> None:
    codec = SemanticCodec(preset("debug").semantic)
    feat = torch.randn(2, 30, 32)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 10:] = False
    _, masked, _ = codec(feat, mask)
    _, free, _ = codec(feat)
    assert not torch.isclose(masked["recon_l1"], free["recon_l1"])
    _, ones, _ = codec(feat, torch.ones_like(mask))
    for name in free:
        torch.testing.assert_close(ones[name], free[name])
    latents = feat.transpose(1, 2)
    short, long = codec.quantizer(latents[:1, :, :10]), codec.quantizer(latents[:1], mask=mask[:1])
    torch.testing.assert_close(long.commit_loss, short.commit_loss)
    torch.testing.assert_close(long.codebook_loss, short.codebook_loss)


def test_semantic_codec_refuses_wrong_width() -> None:
    with pytest.raises(MetisError, match=r"\[B, T, 32\]"):
        SemanticCodec(preset("debug").semantic).quantize(torch.zeros(1, 5, 31))


# --- quantisers


@pytest.mark.golden
def test_rvq_training_matches_released() -> None:
    io = golden("train", "rvq/")
    rvq = ResidualVQ(16, 4, 32, 8, commitment=0.25, codebook_loss_weight=1.0)
    rvq.load_state_dict(golden("train", "sd_rvq/"), strict=True)
    z = io["z"].requires_grad_()
    found = rvq.train()(z)
    same(found.codes, io["indices"])
    same(found.output.detach(), io["quantized"])
    same(found.commit_loss.detach(), io["commit_losses"])
    same(found.codebook_loss.detach(), io["codebook_losses"])
    (found.commit_loss.sum() + found.codebook_loss.sum() + found.output.square().mean()).backward()
    for ours, name in (
        (z, "grad_z"),
        (rvq.quantizers[0].codebook.weight, "grad_codebook_0"),
        (rvq.quantizers[3].codebook.weight, "grad_codebook_3"),
        (rvq.quantizers[1].in_project.weight_v, "grad_in_project_v_1"),
    ):
        torch.testing.assert_close(ours.grad, io[name], atol=1e-6, rtol=1e-4)


def test_quantiser_dropout_keeps_the_first_layers_of_each_item() -> None:
    rvq = ResidualVQ(16, 4, 32, 8, commitment=0.25, codebook_loss_weight=1.0)
    z = torch.randn(3, 16, 9)
    layers = torch.tensor([1, 4, 2])
    found = rvq(z, layers)
    assert found.codes.shape == (4, 3, 9)
    for i, count in enumerate(layers.tolist()):
        torch.testing.assert_close(found.output[i : i + 1], rvq(z[i : i + 1], count).output)
    torch.testing.assert_close(found.commit_loss[3], rvq(z[1:2]).commit_loss[3] / 3)
    codec = AcousticCodec(preset("debug").acoustic)
    drawn = codec.draw_layers(4000, torch.Generator().manual_seed(1))
    assert drawn.min() == 1 and drawn.max() == 12
    assert abs((drawn < 12).float().mean().item() - 0.5 * 11 / 12) < 0.03
    assert torch.equal(drawn, codec.draw_layers(4000, torch.Generator().manual_seed(1)))


def test_revival_replaces_only_idle_codes() -> None:
    vq = FactorizedVQ(16, 64, 8, 0.25, 1.0).train()
    z = torch.randn(2, 16, 20)
    assert vq.revive(after=0) == 0, "off by default"
    vq.track_usage = True
    before = vq.codebook.weight.detach().clone()
    for _ in range(3):
        codes = vq(z).codes
    used = codes.unique()
    assert vq.revive(after=4) == 0
    vq(z)
    assert vq.revive(after=4, generator=torch.Generator().manual_seed(0)) == 64 - len(used)
    after = vq.codebook.weight.detach()
    assert torch.equal(after[used], before[used])
    latents = vq.in_project(z).transpose(1, 2).reshape(-1, 8).detach()
    changed = (after != before).any(1).nonzero()[:, 0]
    assert len(changed) == 64 - len(used)
    distance = (after[changed][:, None] - latents[None]).abs().amax(2)
    assert distance.min(1).values.max() < 1e-5
    assert len(vq(z).codes.unique()) > len(used)


# --- acoustic codec


@pytest.mark.golden
@torch.no_grad()
def test_acoustic_codec_matches_released() -> None:
    io = golden("acoustic_codec", "io/")
    config = AcousticCodecConfig(
        encoder_dim=4,
        latent_dim=16,
        num_quantizers=4,
        codebook_size=32,
        vocos_dim=24,
        vocos_intermediate_dim=64,
        vocos_num_layers=3,
    )
    codec = AcousticCodec(config).eval()
    codec.load_state_dict(golden("acoustic_codec", "sd/"), strict=True)
    quantizer = codec.decoder.quantizer
    for case in "ab":
        wav = io[f"wav_{case}"][:, 0]
        same(codec.encoder(wav), io[f"latent_{case}"])
        codes = codec.encode(wav)
        same(codes.permute(2, 0, 1), io[f"indices_{case}"])
        same(quantizer(io[f"latent_{case}"]).output, io[f"quantized_{case}"])
        layers = codes.permute(2, 0, 1)
        same(quantizer.vq2emb(layers), io[f"vq2emb_{case}"])
        same(quantizer.vq2emb(layers[:2]), io[f"vq2emb_q2_{case}"])
        same(codec.decoder.model.backbone(io[f"vq2emb_{case}"]), io[f"backbone_{case}"])
        recon = codec.decode(codes)
        same(recon[:, None], io[f"recon_{case}"])
        assert codec(wav)["recon"].shape == wav.shape


def test_mel_encoder_frames() -> None:
    codec = AcousticCodec(preset("debug").acoustic).eval()
    assert isinstance(codec.encoder, MelEncoder)
    for samples, frames in ((1, 1), (480, 1), (481, 2), (24_000, 50)):
        codes = codec.encode(0.1 * torch.randn(2, samples))
        assert codes.shape == (2, frames, 12) and codes.dtype == torch.long
        assert codec.decode(codes).shape == (2, 480 * frames)
    assert not any("filters" in k or "encoder.window" in k for k in codec.state_dict())
    codec.to(torch.bfloat16)
    out = codec(0.1 * torch.randn(1, 960))
    assert codec.decode(out["codes"]).dtype == out["recon"].dtype == torch.float32
    # A tone shows up in the band around its frequency, in every inner frame.
    encoder = AcousticCodec(preset("nano").acoustic).encoder
    tone = torch.sin(2 * torch.pi * 3000 * torch.arange(24_000) / 24_000)[None]
    mel = encoder.log_mel(tone)
    assert mel.shape == (1, 100, 50)
    peak = encoder.filters[mel[0, :, 2:-2].argmax(0).unique().item()].argmax() * 12.5
    assert abs(peak - 3000) < 100


def test_acoustic_codec_trains_under_autocast() -> None:
    codec = AcousticCodec(preset("debug").acoustic).train()
    codec.decoder.quantizer.track_usage()
    wav = 0.1 * torch.randn(2, 4900)
    with torch.autocast("cpu", torch.bfloat16):
        out = codec(wav, codec.draw_layers(2, torch.Generator().manual_seed(0)))
    assert out["recon"].shape == wav.shape and out["codes"].shape == (2, 11, 12)
    assert all(out[k].dtype == torch.float32 for k in ("recon", "commit_loss", "codebook_loss"))
    loss = multi_scale_mel_losses(out["recon"], wav, 24_000)[0].mean() + out["commit_loss"] + out["codebook_loss"]
    loss.backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert codec.decoder.quantizer.revive(after=1, generator=torch.Generator().manual_seed(0)) > 0


def test_acoustic_codec_refuses_bad_input() -> None:
    codec = AcousticCodec(preset("debug").acoustic).eval()
    with pytest.raises(MetisError, match="S >= 1"):
        codec.encode(torch.zeros(1, 0))
    with pytest.raises(MetisError, match="Q <= 12"):
        codec.decode(torch.zeros(1, 3, 13, dtype=torch.long))
    with pytest.raises(MetisError, match=r"0\.\.31"):
        codec.decode(torch.full((1, 3, 12), 32))


def test_mel_losses() -> None:
    wav = 0.1 * torch.randn(1, 6000)
    assert multi_scale_mel_losses(wav, wav, 24_000) == (0, 0)
    # Doubling the signal moves every log magnitude above the floor by log 2, and is off by the whole norm.
    log_l1, convergence = multi_scale_mel_losses(2 * wav, wav, 24_000)
    assert abs(log_l1.item() - 0.6931) < 1e-3 and abs(convergence.item() - 1) < 1e-5


# --- SSL encoder


def ssl_golden(layer: int) -> SSLEncoder:
    config = SSLConfig(hidden_size=32, num_layers=3, output_layer=layer, num_heads=4, intermediate_size=64)
    encoder = SSLEncoder(config).eval()
    encoder.load_hub_state(golden("ssl_frontend", "sd/"))
    return encoder


@pytest.mark.golden
def test_fbank_matches_released() -> None:
    io = golden("ssl_frontend", "io/")
    for case in "ab":
        features, lengths = fbank([io[f"wav_{case}"]])
        same(features, io[f"input_features_{case}"])
        assert lengths.tolist() == [io[f"attention_mask_{case}"].sum()]
    both, lengths = fbank([io["wav_a"], io["wav_b"][:4000]])
    same(both[:1], io["input_features_a"])
    assert both.shape == (2, 24, 160) and lengths.tolist() == [24, 11]
    assert (both[1, 12:] == 1).all()


@pytest.mark.golden
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_ssl_encoder_matches_released_at_every_layer(layer: int) -> None:
    io, encoder = golden("ssl_frontend", "io/"), ssl_golden(layer)
    assert len(encoder.model.encoder.layers) == layer
    for case in "ab":
        mask = io[f"attention_mask_{case}"]
        features = io[f"input_features_{case}"]
        wanted = io[f"hidden_states_{case}"][layer][None]
        same(encoder(features, mask.sum(1)), wanted)
        if mask.all():
            same(encoder(features), wanted)


@torch.no_grad()
def test_ssl_encode_is_the_same_alone_and_in_a_batch() -> None:
    io, encoder = golden("ssl_frontend", "io/"), ssl_golden(2)
    mean, var = torch.randn(32), torch.rand(32) + 0.5
    encoder.set_stats(mean, var)
    alone, frames = encoder.encode([io["wav_b"]])
    same(alone[0], (io["hidden_states_b"][2] - mean) / var.sqrt())
    assert frames.tolist() == [24] and alone.shape == (1, 24, 32)
    longer = 0.1 * torch.randn(12_000)
    both, frames = encoder.encode([longer, io["wav_b"]])
    assert frames.tolist() == [37, 24]
    same(both[1:, :24], alone)
    same(both[:1], encoder.encode([longer])[0])
    stats = encoder.stats_state()
    assert torch.equal(stats["mean"], mean) and torch.equal(stats["var"], var)
    assert all(name.startswith("model.") for name in encoder.state_dict())


def test_ssl_masked_frames_are_replaced_before_the_encoder() -> None:
    encoder = SSLEncoder(preset("debug").ssl).train()
    features = torch.randn(2, 20, 160)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 5:9] = True
    hidden = encoder(features, torch.tensor([20, 15]), mask)
    changed = features.clone()
    changed[mask] += 1.0
    torch.testing.assert_close(encoder(changed, torch.tensor([20, 15]), mask), hidden)
    assert not torch.allclose(encoder(features, torch.tensor([20, 15])), hidden)
    hidden.square().sum().backward()
    assert encoder.model.masked_spec_embed.grad.abs().sum() > 0


def test_ssl_refuses_bad_input() -> None:
    with pytest.raises(MetisError, match="560 samples"):
        fbank([torch.zeros(559)])
    with pytest.raises(MetisError, match="no waveforms"):
        fbank([])
    encoder = SSLEncoder(preset("debug").ssl)
    with pytest.raises(MetisError, match="above zero"):
        encoder.set_stats(torch.zeros(32), torch.zeros(32))


def test_codebooks_fitted_by_k_means_leave_little_over():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 6, generator=generator) @ torch.randn(6, 16, generator=generator) + 2.0
    quantizer = ResidualVQ(16, 4, 64, 8, 0.25, 1.0, by_distance=True).eval()
    left = quantizer.fit(latents, generator)
    with torch.no_grad():
        found = quantizer(latents.t()[None])
        sums = [quantizer.vq2emb(found.codes[:k])[0].t() for k in range(1, 5)]
    error = (found.output[0].t() - latents).square().sum() / latents.square().sum()
    assert float(error) == pytest.approx(left, rel=1e-3) and left < 0.02
    torch.testing.assert_close(sums[-1], found.output[0].t())
    each = [float((made - latents).square().sum()) for made in sums]
    assert each == sorted(each, reverse=True) and each[-1] < 0.2 * each[0]  # every layer takes something off
    with pytest.raises(MetisError, match="cannot fill"):
        quantizer.fit(latents[:10])
    with pytest.raises(MetisError, match="codebook search"):
        AcousticCodec(replace(preset("debug").acoustic, codebook_search="angle"))
