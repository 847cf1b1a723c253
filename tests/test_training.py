"""Trainers and the stores that they read, on a corpus of a few synthetic tones."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metis_lib import audio
from metis_lib.checkpoints import TaskConfig
from metis_lib.config import preset
from metis_lib.data.store import FlatStore, Row, frame_batches, random_crops, store_waves, wave
from metis_lib.errors import MetisError
from metis_lib.models import adapt
from metis_lib.tasks import SE, TTS
from metis_lib.training import generative as gen
from metis_lib.training import tokenizers as tok
from metis_lib.training.loop import TrainSettings, learning_rate, train

DEBUG = preset("debug")


def quick(steps, **changes):
    return TrainSettings(steps=steps, **{"lr": 3e-3, "warmup": 5, "bf16": False, "log_every": 5, **changes})


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    rng = np.random.default_rng(0)
    time = np.arange(24_000) / 24_000
    pieces = []
    for i in range(8):
        wav = 0.3 * np.sin(2 * np.pi * (120 + 60 * i) * time) + 0.01 * rng.standard_normal(len(time))
        pieces.append(({"id": str(i), "speaker": "s", "text": "", "human": False}, (wav * 32767).astype(np.int16)))
    return FlatStore.write(tmp_path_factory.mktemp("store") / "waves", pieces)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """SSL tokens that follow from phones, acoustic codes that follow from SSL tokens."""
    rng = np.random.default_rng(0)
    pieces = []
    for i in range(24):
        phones = rng.integers(1, 20, size=6)
        ssl = np.repeat(phones * 2, 8)
        codes = np.stack([(ssl + q) % 32 for q in range(12)], axis=1)
        pieces.append(({"id": str(i), "phones": phones.tolist()}, np.c_[ssl, codes].astype(np.int16)))
    return FlatStore.write(tmp_path_factory.mktemp("store") / "tokens", pieces)


@pytest.fixture(scope="module")
def features(tokens, tmp_path_factory):
    """Frame-level conditions from which the SSL tokens can be read."""
    table = np.random.default_rng(1).standard_normal((48, 32)).astype(np.float16)
    pieces = [(dict(tokens.items[i]), table[tokens[i][:, 0]]) for i in range(len(tokens))]
    return FlatStore.write(tmp_path_factory.mktemp("store") / "features", pieces)


def test_store_gives_back_what_was_written(tones, tmp_path):
    again = FlatStore(tones.folder)
    assert len(again) == 8 and again.items[3]["id"] == "3"
    torch.testing.assert_close(wave(again, 2), wave(tones, 2))
    assert wave(again, 0).abs().max() <= 1
    with pytest.raises(MetisError, match="metis prepare"):
        FlatStore(tmp_path / "nowhere")
    with pytest.raises(MetisError, match="nothing to store"):
        FlatStore.write(tmp_path / "empty", [])
    assert not (tmp_path / "empty").exists()


def test_wave_store_takes_the_span_that_a_row_names(tmp_path):
    ramp = torch.linspace(-0.5, 0.5, 24_000)
    audio.write(tmp_path / "ramp.wav", ramp, 24_000)
    common = dict(path="ramp.wav", text="", language="en", speaker="s", split="train", source="", licence="")
    rows = [
        Row(id="all", duration=1.0, human=False, root=tmp_path, **common),
        Row(id="part", duration=0.5, human=False, root=tmp_path, start=0.25, end=0.75, **common),
    ]
    store = store_waves(rows, tmp_path / "waves")
    assert store.length(0) == 24_000 and store.length(1) == 12_000
    torch.testing.assert_close(wave(store, 1), ramp[6_000:18_000], atol=1e-4, rtol=0)
    assert store_waves(rows, tmp_path / "waves").items == store.items


def test_crops_come_from_the_store_and_repeat_by_seed(tones):
    one, two = (random_crops(tones, 4, 4800, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (4, 4800) and one.abs().max() > 0.1


def test_frame_batches_respect_the_budget_and_visit_everything():
    lengths = np.random.default_rng(0).integers(20, 400, size=300).tolist()
    batches = frame_batches(lengths, 2000, np.random.default_rng(1), 300)
    seen = set()
    while len(seen) < 300:
        chosen = next(batches)
        assert len(chosen) * min(max(lengths[i] for i in chosen), 300) <= 2000
        seen |= set(chosen)


def test_learning_rate_warms_up_and_falls():
    settings = TrainSettings(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.11
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_losses_that_are_not_finite_stop_the_run():
    model = torch.nn.Linear(2, 1)
    before = model.weight.clone()
    with pytest.raises(MetisError, match="not finite"):
        train(model, lambda x: {"loss": model(x).sum() * torch.nan}, itertools.repeat(torch.ones(1, 2)), quick(50))
    assert torch.equal(before, model.weight)


def test_log_and_scores(tmp_path):
    model = torch.nn.Linear(2, 1)
    scores = train(
        model,
        lambda x: {"loss": model(x).square().mean()},
        itertools.repeat(torch.ones(4, 2)),
        quick(20),
        log=tmp_path / "logs" / "x.jsonl",
        validate=lambda: {"score": 1.5},
    )
    lines = [json.loads(line) for line in (tmp_path / "logs" / "x.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 20 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["validation"] == {"score": 1.5} and scores["score"] == 1.5 and scores["cpu_seconds"] > 0


def test_acoustic_trainer_learns_and_uses_its_codes(tones):
    before = tok.train_acoustic(DEBUG, tones, tones, quick(1), batch=4, seconds=0.2)[1]
    codec, after = tok.train_acoustic(DEBUG, tones, tones, quick(60), batch=4, seconds=0.2)
    assert after["mel"] < 0.8 * before["mel"]
    assert codec.encode(wave(tones, 0)[None]).shape == (1, 50, 12)


def test_ssl_trainer_learns_phones(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((10, 160))
    pieces = []
    for i in range(12):
        phones = rng.permutation(9)[:4] + 1
        frames = np.repeat(table[phones], 10, axis=0) + 0.05 * rng.standard_normal((40, 160))
        pieces.append(({"id": str(i), "phones": phones.tolist()}, frames.astype(np.float16)))
    store = FlatStore.write(tmp_path / "frames", pieces)
    encoder, scores = tok.train_ssl(DEBUG, store, store, quick(150, lr=5e-3), phone_vocab=12, budget=480)
    assert scores["phone_error"] < 0.3
    hidden = encoder.normalise(encoder(torch.from_numpy(store[0].astype(np.float32))[None]))
    assert abs(float(hidden.detach().std()) - 1) < 0.3

    # whoever has heard the noise in training hears through it
    noise = rng.standard_normal(160)
    noisy = FlatStore.write(tmp_path / "noisy", [(item, store[i] + noise) for i, item in enumerate(store.items)])
    used, _ = tok.train_ssl(DEBUG, store, store, quick(150, lr=5e-3), phone_vocab=12, budget=480, noisy=noisy)

    @torch.no_grad()
    def distance(model):
        both = [torch.from_numpy(np.stack([s[i] for i in range(12)]).astype(np.float32)) for s in (store, noisy)]
        clean, dirty = (model.normalise(model(x)) for x in both)
        return float((clean - dirty).square().mean())

    assert distance(used) < 0.7 * distance(encoder)


def test_span_masks_hide_about_their_share():
    lengths = torch.tensor([400, 300])
    hidden = tok.span_mask(lengths, torch.Generator().manual_seed(0))
    assert not hidden[1, 300:].any() and 0.2 < hidden[0].float().mean() < 0.5


def test_semantic_trainer_learns(features):
    _, before = tok.train_semantic(DEBUG, features, quick(1), batch=8, frames=40)
    _, after = tok.train_semantic(DEBUG, features, quick(80), batch=8, frames=40)
    assert after["recon_l1"] < 0.9 * before["recon_l1"] and after["perplexity"] > 4


def test_pretraining_learns(tokens):
    _, before = gen.pretrain(DEBUG.stage1, tokens, tokens, quick(1), budget=480)
    model, after = gen.pretrain(DEBUG.stage1, tokens, tokens, quick(120), budget=480)
    assert after["cross_entropy"] < before["cross_entropy"] - 0.5
    assert model.generate(torch.zeros(1, 0, dtype=torch.long), 10).shape == (1, 10)


@pytest.fixture(scope="module")
def base(tokens):
    model, _ = gen.pretrain(DEBUG.stage1, tokens, tokens, quick(40), budget=480)
    return model.state_dict()


def test_enhancement_reads_its_condition_and_leaves_the_base_alone(tokens, features, base):
    config = TaskConfig("se", SE.stage1, lora_rank=4)
    model, scores = gen.fine_tune(
        SE, config, DEBUG.stage1, base, tokens, tokens, quick(150, lr=1e-2), pad=127,
        features=features, held_out_features=features, budget=480,
    )  # fmt: skip
    assert scores["with_condition"] < scores["without"] - 0.5
    for key, value in model.state_dict().items():
        plain = key.replace(".base_layer.", ".")
        if plain in base:
            assert torch.equal(value, base[plain]), key
    added = gen.task_state(model, base)
    assert set(added) == set(adapt.lora_state(model)) | {k for k in added if k.startswith("cond_adapter.")}


def test_text_to_speech_reads_its_text(tokens, base):
    changes = {**TTS.stage1, "phone_vocab": 32, "text_hint": "even"}
    config = TaskConfig("tts", changes, lora_rank=4)
    _, scores = gen.fine_tune(TTS, config, DEBUG.stage1, base, tokens, tokens, quick(150, lr=1e-2), pad=31, budget=480)
    assert scores["with_condition"] < scores["without"] - 0.3


def test_phones_are_padded_on_the_left(tokens):
    record = dict(tokens.items[0])
    batch = gen.collate(tokens, [0, 1], pad=31)
    assert batch.phones[0, -1] == record["phones"][-1] and batch.hint.shape == batch.tokens.shape[:2]
    assert torch.equal(batch.phone_mask, batch.phones != 31)


@pytest.mark.parametrize("part", ["stage2_layer1", "stage2_full"])
def test_stage2_trainer_learns(tokens, part):
    config = replace(getattr(DEBUG, part), num_quantizers=1 if part == "stage2_layer1" else 4)
    _, before = gen.train_stage2(config, tokens, tokens, quick(1), budget=480)
    _, after = gen.train_stage2(config, tokens, tokens, quick(80), budget=480)
    assert after["cross_entropy"] < before["cross_entropy"] - 0.5
