"""What the papers state, number by number: whoever changes one of these constants hears of it here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metis_lib.config import DecodeSettings, preset
from metis_lib.data import examples
from metis_lib.data.simulate import Degradation, Noises, Recording, Rooms, degrade
from metis_lib.generation import Request, batches
from metis_lib.models import masked
from metis_lib.models.adapt import LORA_TARGETS, ConditionAdapter, add_lora
from metis_lib.models.stage1 import Stage1
from metis_lib.tasks import TASKS
from metis_lib.training import generative, loop
from metis_lib.training import tokenizers as tok
from metis_lib.training.loop import TrainSettings
from metis_lib.training.recipes import settings_for

# ---------------------------------------------------------------- masks


def test_times_and_prompts_are_drawn_evenly():
    """Metis section 4.1: t from (0, 1], a prompt with p = 0.8 of up to 40 % of the utterance."""
    settings, lengths = masked.MaskingSettings(), torch.full((20_000,), 1000)
    assert (settings.prompt_probability, settings.max_prompt_fraction, settings.ratio_floor) == (0.8, 0.4, 0.0)
    t, prompt, _ = masked.draw_masks(lengths, settings, torch.Generator().manual_seed(1))
    for values in (t, prompt[prompt > 0] / 400):
        shares = torch.histc(values, 4, 0, 1) / len(values)
        assert (shares - 0.25).abs().max() < 0.02


def test_no_utterance_has_fewer_masks_than_the_floor_says():
    lengths, generator = torch.full((4000,), 500), torch.Generator().manual_seed(0)
    settings = masked.MaskingSettings(prompt_probability=0.0, ratio_floor=0.2)
    t, _, hidden = masked.draw_masks(lengths, settings, generator)
    low = t < 0.08  # without a floor at most 12.5 %
    assert low.sum() > 200 and abs(hidden[low].float().mean() - 0.2) < 0.01


def test_stage_two_has_longer_prompts():
    """MaskGCT's released stage 2: with p = 0.85, of up to half of the utterance."""
    found = generative.STAGE2_MASKING
    assert (found.prompt_probability, found.max_prompt_fraction) == (0.85, 0.5)


# ---------------------------------------------------------------- tasks and what they add


def test_tasks_are_decoded_as_published():
    """Metis section 4.2 and the released code: steps and guidance of every task, shares of Omni (appendix E)."""
    decode = {name: (task.decode.steps, task.decode.cfg) for name, task in TASKS.items() if not task.like}
    assert decode == {
        "tts": (25, 2.5), "vc": (20, 1.0), "tse": (10, 0.0), "se": (10, 0.0), "l2s": (25, 0.0),
        "omni": (TASKS["omni"].decode.steps, TASKS["omni"].decode.cfg),
    }  # fmt: skip
    assert TASKS["omni"].mixture == {"tts": 0.5, "vc": 0.1, "tse": 0.2, "se": 0.2}
    assert {name for name, task in TASKS.items() if task.condition_dropout == 0.1} == {"tts", "vc", "tse", "omni"}
    assert TASKS["se"].masking.prompt_probability == 0 and TASKS["tse"].masking.prompt_probability == 0.8


def test_a_new_adapter_changes_nothing_and_lora_is_as_published():
    torch.manual_seed(0)
    assert not ConditionAdapter(6, 8)(torch.randn(2, 5, 6)).any(), "the gate begins at 0"
    model = Stage1(preset("debug").stage1).diff_estimator
    add_lora(model, 4)
    layers = [m for name, m in model.named_modules() if name.endswith(LORA_TARGETS)]
    assert layers and all(m.scaling["default"] == 2.0 and m.r["default"] == 4 for m in layers)
    assert {m.lora_dropout["default"].p for m in layers} == {0.01}


def test_guidance_knows_neither_prompt_nor_words_but_the_frame_level_condition(monkeypatch):
    """As released: the free pass sees the target alone, with what the adapter makes of its frames."""
    torch.manual_seed(0)
    sizes = replace(preset("debug").stage1, use_phones=True, phone_vocab=12, text_hint="even", adapter="plain")
    model = Stage1(replace(sizes, cond_dim=6)).eval()
    for weight in model.parameters():  # hints and gates begin at zero
        torch.nn.init.normal_(weight, std=0.2)
    once = DecodeSettings(steps=1, cfg=2.0)
    passes, guide = [], masked.guide
    monkeypatch.setattr(masked, "guide", lambda cond, free, *a: passes.append((cond, free)) or guide(cond, free, *a))
    own = {
        "prompt": torch.randint(sizes.codebook_size, (1, 7)), "phones": torch.randint(11, (1, 5)),
        "hint": torch.randint(11, (1, 20)), "condition": torch.randn(1, 20, 6),
    }  # fmt: skip
    others = {name: value.roll(1, dims=1) for name, value in own.items()}
    for changed in (None, "prompt", "phones", "hint", "condition"):
        asked = own | ({changed: others[changed]} if changed else {})
        model.generate(**asked, target_len=13, settings=once, generator=torch.Generator().manual_seed(0))
    cond, free = zip(*passes, strict=True)
    assert len(cond) == 5 and not any(torch.allclose(cond[0], other) for other in cond[1:])
    assert all(torch.equal(free[0], other) for other in free[1:4]) and not torch.allclose(free[0], free[4])


def test_guidance_by_the_hint_alone_is_not_skipped(monkeypatch):
    torch.manual_seed(0)
    model = Stage1(replace(preset("debug").stage1, use_phones=True, phone_vocab=12, text_hint="even")).eval()
    guided = []
    monkeypatch.setattr(masked, "guide", lambda cond, *_: guided.append(1) or cond)
    given = {"target_len": 9, "settings": DecodeSettings(steps=1, cfg=2.0)}
    model.generate(torch.zeros(1, 0, dtype=torch.long), hint=torch.ones(1, 9, dtype=torch.long), **given)
    assert guided == [1]
    model.generate(torch.zeros(1, 0, dtype=torch.long), **given)
    assert guided == [1], "nothing to leave out: the identity"


def test_batches_hold_no_more_than_they_may_and_alike_things():
    def request(frames, phones=None):
        return Request(frames, torch.Generator(), phones=phones)

    requests = [request(n) for n in (40, 100, 10, 95, 60)] + [request(50, torch.zeros(3, dtype=torch.long))]
    found = batches(requests, 200)
    assert sorted(i for batch in found for i in batch) == list(range(6)) and [5] in found
    assert [1, 3] in found and all(len(b) * max(requests[i].size for i in b) <= 200 for b in found)
    assert len(batches(requests, 10_000)) == 2 and len(batches(requests, 1)) == 6


# ---------------------------------------------------------------- what is learned by


def test_codecs_weigh_their_losses_as_published():
    """MaskGCT appendix A.4 (mel 10, adversarial 2, features 2); 32 for the L1 of features is the released trainer's."""
    sizes = preset("debug")
    acoustic = tok.AcousticTraining(sizes.acoustic)
    wanted = {"mel": 10.0, "vq": 1.0, "adversarial": 2.0, "features": 2.0}
    assert {name: acoustic.weights[name] for name in wanted} == wanted
    frozen = SimpleNamespace(encoder=SimpleNamespace(config=sizes.ssl))
    assert tok.SemanticTraining(sizes.semantic, frozen).weights == {"recon_l1": 32.0, "vq": 1.0}  # type: ignore[arg-type]


def test_statistics_make_features_of_mean_zero_and_variance_one():
    class Encoder(torch.nn.Module):
        def forward(self, x, lengths):
            return x

        def set_stats(self, mean, var):
            self.mean, self.var = mean, var

    encoder, generator = Encoder(), torch.Generator().manual_seed(0)
    batches = [
        {"clean": 3 * torch.randn(4, 50, 6, generator=generator) + 2, "lengths": torch.tensor([50, 40, 30, 20])}
        for _ in range(8)
    ]
    batches[0]["clean"][1, 40:] = 1e6  # padding is no speech
    tok.set_statistics(encoder, batches)  # type: ignore[arg-type]
    assert (encoder.mean - 2).abs().max() < 0.5 and (encoder.var - 9).abs().max() < 2


def test_updates_are_those_of_adamw_on_clipped_gradients(tmp_path):
    """Step by step the weights of PyTorch's own AdamW, with these betas, this decay and this largest norm."""
    generator = torch.Generator().manual_seed(0)
    batches = [{"x": scale * torch.randn(5, 3, generator=generator)} for scale in (30.0, 0.1, 5.0, 0.02)]

    class Line(loop.Objective):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(3, 2)
            with torch.no_grad():
                self.model.weight.copy_(torch.arange(6.0).view(2, 3) / 5)
                self.model.bias.zero_()

        def counts(self, batch):
            return {"loss": float(len(batch["x"]))}

        def forward(self, batch, part="model"):
            return {"loss": self.model(batch["x"]).square().sum()}

    class Feed:
        def open(self, step, rank, world, accumulate):
            return iter(batches[step:])

    given = dict(lr=0.05, betas=(0.5, 0.7), weight_decay=0.3)
    ours, plain = Line(), Line()
    settings = TrainSettings(steps=4, warmup=0, schedule="constant", clip=0.5, precision="32-true", **given)
    loop.fit(ours, Feed(), settings, tmp_path / "run")
    optimizer = torch.optim.AdamW(plain.parameters(), **given)
    for batch in batches:
        (plain(batch)["loss"] / len(batch["x"])).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.model.weight, plain.model.weight)
    torch.testing.assert_close(ours.model.bias, plain.model.bias)


def test_terms_weigh_what_they_are_told(tmp_path):
    class Tug(loop.Objective):
        """Two terms that pull a number towards 1 and -1; a third is only logged."""

        weights = {"up": 1.0, "down": 3.0}

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(1, 1, bias=False)

        def counts(self, batch):
            return {"up": 2.0, "down": 2.0, "told": 2.0}

        def forward(self, batch, part="model"):
            w = self.model(batch["x"])
            return {"up": (w - 1).square().sum(), "down": (w + 1).square().sum(), "told": 100 * (w - 9).square().sum()}

    class Feed:
        def open(self, step, rank, world, accumulate):
            return iter([{"x": torch.ones(2, 1)}] * 400)

    objective = Tug()
    settings = TrainSettings(steps=400, lr=0.05, weight_decay=0.0, precision="32-true", log_every=400)
    loop.fit(objective, Feed(), settings, tmp_path / "run")
    assert objective.model.weight.item() == pytest.approx(-0.5, abs=0.01)


def test_trainings_are_as_long_and_fast_as_published():
    """Metis sections 4.1 and 4.2 where they say (pre-training, text-to-speech, conversion); all AdamW at 1e-4 after a
    warm-up, then by the inverse square root (MaskGCT section 4.1)."""
    found = {name: settings_for(name, "paper") for name in ("stage1", "tts", "vc", "tse", "se", "omni")}
    assert {name: one.steps for name, one in found.items()} == {
        "stage1": 1_200_000, "tts": 200_000, "vc": 10_000, "tse": 100_000, "se": 100_000, "omni": 200_000
    }  # fmt: skip
    assert {(one.lr, one.schedule, one.frames, one.clip) for one in found.values()} == {
        (1e-4, "inverse_sqrt", 10_000, found["stage1"].clip)
    }
    assert found["stage1"].warmup == 32_000 and found["stage1"].clip == 1.0


def test_weights_begin_small():
    torch.manual_seed(0)
    model = Stage1(replace(preset("debug").stage1, hidden_size=64, codebook_size=512))
    for name in ("cond_emb.weight", "to_logit.weight", "diff_estimator.layers.0.self_attn.q_proj.weight"):
        assert dict(model.named_parameters())[name].std().item() == pytest.approx(0.02, rel=0.15), name


# ---------------------------------------------------------------- what degraded speech is


class Told(Noises):
    """Noise that is known, and that remembers what it was asked for."""

    wav = np.sin(np.arange(24_000) * 0.7).astype(np.float32)

    def sample(self, length, generator, **asked):
        object.__setattr__(self, "asked", asked)
        return self.wav[:length], "told"


@pytest.fixture(scope="module")
def speech():
    return (np.random.default_rng(3).normal(size=24_000) * np.hanning(24_000) * 0.05).astype(np.float32)


@pytest.fixture(scope="module")
def rooms():
    decay = (np.random.default_rng(5).normal(size=4000) * np.exp(-np.arange(4000) / 600)).astype(np.float32)
    decay[0] = 3.0
    return Rooms(decay[None].astype(np.float16), np.array([4000]), np.array([0]), np.array([0.4]))


def test_noise_comes_after_the_room_at_the_ratio_to_what_is_heard(speech, rooms):
    """Metis section 4.2.4: the direct path is the target; noise is added dry, against reverberant speech."""
    noises, params = Told(), Degradation(noise_p=1, reverb_p=1, band_p=0, snr_db=(7.0, 7.0))
    out, _, done = degrade(
        speech, 24_000, noises=noises, generator=np.random.default_rng(0), params=params, rooms=rooms, speaker="me"
    )
    heard = rooms.apply(speech, 0)
    added = out / done["gain"] - heard
    assert np.corrcoef(added, noises.wav)[0, 1] > 0.9999, "the noise itself, not its echo"
    assert 10 * np.log10(np.mean(heard**2) / np.mean(added**2)) == pytest.approx(7.0, abs=0.01)
    assert abs(np.mean(heard**2) / np.mean(speech**2) - 1) > 0.5, "else the two ratios could not be told apart"
    assert noises.asked["exclude"] == "me", "babble is of others"
    examples.se(examples.Utterance("u", "she", speech), np.random.default_rng(0), examples.Sources(noises=noises),
                examples.Simulation(se=params))  # fmt: skip
    assert noises.asked["exclude"] == "she"


def test_clipping_is_so_many_decibels_below_the_peak(speech):
    params = Degradation(noise_p=0, reverb_p=0, band_p=0, clip_p=1, clip_db=(6.0, 6.0))
    out, clean, _ = degrade(speech, 24_000, noises=Noises(), generator=np.random.default_rng(0), params=params)
    assert np.abs(out).max() / np.abs(clean).max() == pytest.approx(10 ** (-6 / 20), rel=1e-4)


def test_babble_is_of_three_to_six_who_speak_equally_loud():
    time = np.arange(24_000) / 24_000
    tones = {f: np.sin(2 * np.pi * f * time) * f / 5000 for f in range(500, 4500, 500)}
    noises = Noises((), [Recording(str(f), (wav * 32767).astype(np.int16)) for f, wav in tones.items()])
    generator, counts = np.random.default_rng(0), set()
    for _ in range(30):
        wav, name = noises.sample(24_000, generator, kind="babble")
        heard = np.abs(np.fft.rfft(wav))[list(tones)]
        loud = heard[heard > heard.max() / 100]
        counts.add(len(loud))
        assert name == f"babble:{len(loud)}" and loud.min() / loud.max() > 0.97
    assert counts == {3, 4, 5, 6}


def test_kinds_of_noise_come_as_often_as_the_documentation_says():
    """Ambient 50 %, babble 25 %, pink and white noise 12.5 % each; babble without the speaker; the paper's odds."""
    recordings = [Recording(name, np.full(24_000, 9000, np.int16)) for name in ("a", "b", "c", "d")]
    noises, generator = Noises(recordings[:1], recordings), np.random.default_rng(0)
    names = [noises.sample(100, generator)[1].partition(":")[0] for _ in range(2000)]
    shares = {name: names.count(name) / 2000 for name in set(names)}
    assert shares == pytest.approx({"ambient": 0.5, "babble": 0.25, "pink": 0.125, "white": 0.125}, abs=0.03)
    alone = Noises((), recordings[:1])
    assert all(alone.sample(100, generator, exclude="a", kind="babble")[1] == "pink" for _ in range(3))
    assert Degradation() == Degradation(0.9, (-5.0, 20.0), 0.35, 0.25, (2000, 4000, 8000), 0.0)
