"""Discriminators of the acoustic codec: losses by hand, coverage of samples and frequencies, items apart."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from metis_lib.errors import MetisError
from metis_lib.models.discriminators import (
    NANO,
    BandDiscriminator,
    DiscriminatorConfig,
    Discriminators,
    PeriodDiscriminator,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def maps(*scores: list[list[float]]) -> list[list[torch.Tensor]]:
    return [[torch.tensor(score)] for score in scores]


def test_least_squares_by_hand() -> None:
    real, fake = maps([[1, 0], [2, 1]], [[0.5], [1]]), maps([[0, 2], [1, 1]], [[0.5], [0]])
    # Item 1: (0 + 1) / 2 + (0 + 4) / 2 = 2.5 and 0.25 + 0.25 = 0.5.  Item 2: (1 + 0) / 2 + 1 = 1.5 and 0.
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor([3.0, 1.5]))
    # Item 1: (1 + 1) / 2 = 1 and 0.25.  Item 2: 0 and 1.
    torch.testing.assert_close(adversarial_loss(fake), torch.tensor([1.25, 1.0]))


def test_feature_matching_by_hand() -> None:
    score = torch.full((2, 1), 9.0)
    real = [[torch.tensor([[1.0, 2], [0, 0]]), torch.tensor([[[4.0]], [[0]]]), score], [torch.ones(2, 3), score]]
    fake = [[torch.zeros(2, 2), torch.zeros(2, 1, 1), -score], [torch.zeros(2, 3), -score]]
    # Item 1: maps 1.5 and 4, discriminators 5.5 and 1.  Item 2: 0 and 1.
    torch.testing.assert_close(feature_matching_loss(real, fake), torch.tensor([6.5, 1.0]))


def test_losses_reach_zero() -> None:
    ones, zeros = maps([[1, 1]], [[1]]), maps([[0, 0]], [[0]])
    assert discriminator_loss(ones, zeros).tolist() == [0]
    assert adversarial_loss(ones).tolist() == [0]
    same = Discriminators(NANO)(torch.randn(2, 2400))
    assert feature_matching_loss(same, same).tolist() == [0, 0]


def test_a_batch_equals_its_items() -> None:
    judge = Discriminators(NANO)
    real, fake = torch.randn(3, 2401), torch.randn(3, 2401) * torch.tensor([[1.0], [10], [0.01]])

    def losses(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        r, f = judge(x), judge(y)
        return torch.stack([discriminator_loss(r, f), adversarial_loss(f), feature_matching_loss(r, f)])

    alone = [losses(real[i : i + 1], fake[i : i + 1]) for i in range(3)]
    whole = losses(real, fake)
    assert whole.shape == (3, 3) and whole.std(1).min() > 1e-6
    torch.testing.assert_close(whole, torch.cat(alone, 1), rtol=1e-4, atol=1e-6)


def test_level_and_dc_do_not_matter() -> None:
    judge, wav = Discriminators(NANO), torch.randn(1, 2400)
    for a, b in zip(judge(wav), judge(0.1 * wav + 0.3), strict=True):
        torch.testing.assert_close(a[-1], b[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [2400, 2401, 2399])
@pytest.mark.parametrize("index", range(len(NANO.periods) + len(NANO.fft_sizes)))
def test_every_sample_counts(index: int, length: int) -> None:
    wav = torch.randn(2, length, requires_grad=True)
    Discriminators(NANO).parts[index](wav)[-1].square().sum().backward()
    assert wav.grad is not None and (wav.grad != 0).all()


def test_period_pads_by_reflection() -> None:
    part, wav = PeriodDiscriminator(3, (4, 4)), torch.randn(2, 100)
    longer = torch.cat([wav, wav[:, [98, 97]]], 1)
    found = part(wav)
    assert [m.shape for m in found] == [(2, 3, 4, 12), (2, 3, 4, 12), (2, 3, 1, 12)]
    assert all(torch.equal(a, b) for a, b in zip(found, part(longer), strict=True))
    # A column sees its own samples only.
    longer[:, 1::3] = 0
    assert torch.equal(part(longer)[-1][:, [0, 2]], found[-1][:, [0, 2]])


@pytest.mark.parametrize("config", [NANO, DiscriminatorConfig()], ids=["nano", "paper"])
def test_bands_cover_every_bin_once(config: DiscriminatorConfig) -> None:
    for n_fft in config.fft_sizes:
        part = BandDiscriminator(n_fft, config.bands, 1, config.overlap)
        bins = [k for low, high in part.edges for k in range(low, high)]
        assert bins == list(range(n_fft // 2 + 1))
        spectrum = part.spectrogram(torch.randn(1, 2 * n_fft + 1))
        assert spectrum.shape == (1, 2, 2 * config.overlap + 1, len(bins))


def test_spectrogram_is_the_stft() -> None:
    part, wav = BandDiscriminator(256, NANO.bands, 1), torch.randn(2, 1000)
    padded = F.pad(wav[:, None], (96, 96 + 24), mode="reflect")[:, 0]
    wanted = torch.stft(padded, 256, 64, window=torch.hann_window(256), center=False, return_complex=True)
    found = part.spectrogram(wav)
    assert found.shape == (2, 2, 16, 129)
    torch.testing.assert_close(torch.complex(found[:, 0], found[:, 1]), wanted.mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bands", [((0.0, 0.5),), ((0.0, 0.5), (0.4, 1.0)), ((0.0, 0.001), (0.001, 1.0))])
def test_bands_with_gaps_are_refused(bands: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(MetisError, match="follow one another"):
        BandDiscriminator(256, bands, 4)


def test_bad_audio_is_refused() -> None:
    for shape in ((1, 1, 2400), (1, 1023)):
        with pytest.raises(MetisError, match="S >= 1024"):
            Discriminators(NANO)(torch.zeros(shape))


def test_training_separates_noise_from_tones() -> None:
    judge = Discriminators(NANO)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, betas=(0.8, 0.99))

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        phase = torch.arange(1200) * torch.empty(4, 1).uniform_(100, 4000) * (2 * math.pi / NANO.sample_rate)
        return torch.randn(4, 1200), phase.sin()

    for _ in range(60):
        noise, tones = draw()
        loss = discriminator_loss(judge(noise), judge(tones)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        noise, tones = draw()
        real, fake = judge(noise), judge(tones)
    for r, f in zip(real, fake, strict=True):
        assert r[-1].mean() > 0.7 and f[-1].mean() < 0.3
    assert discriminator_loss(real, fake).max() < 0.25 * len(real) < 0.5 * len(real) < adversarial_loss(fake).min()


def test_feature_matching_leaves_real_alone() -> None:
    judge = Discriminators(NANO)
    real, fake = torch.randn(1, 1200, requires_grad=True), torch.randn(1, 1200, requires_grad=True)
    feature_matching_loss(judge(real), judge(fake)).mean().backward()
    assert real.grad is None and fake.grad is not None and fake.grad.abs().max() > 0
    # Nor do the discriminators' weights hear of it through the real path.
    judge.zero_grad()
    with torch.no_grad():
        copied = judge(fake)
    assert not feature_matching_loss(judge(real), copied).requires_grad


def test_bf16_autocast_is_finite() -> None:
    judge = Discriminators(NANO)
    real, fake = torch.randn(3, 1200), torch.randn(3, 1200)
    fake[1], fake[2] = 0, 1e-6 * fake[2]
    fake.requires_grad_()
    exact = judge(fake)
    with torch.autocast("cpu", torch.bfloat16):
        r, f = judge(real), judge(fake)
    assert {m.dtype for part in f for m in part[:-1]} == {torch.bfloat16}
    assert all(part[-1].dtype == torch.float32 for part in f)
    for a, b in zip(f, exact, strict=True):
        torch.testing.assert_close(a[-1], b[-1], rtol=0.1, atol=0.02)
    losses = torch.stack([discriminator_loss(r, f), adversarial_loss(f), feature_matching_loss(r, f)])
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all()
    assert fake.grad is not None and fake.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in judge.parameters())


def test_nano_is_small() -> None:
    assert sum(p.numel() for p in Discriminators(NANO).parameters()) < 300_000
