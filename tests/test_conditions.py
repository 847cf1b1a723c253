"""Conditions made beforehand: examples encoded once, durations by CTC, a teacher's features."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from metis_lib.checkpoints import load_state
from metis_lib.config import preset
from metis_lib.models.stage1 import Durations, Stage1, spread, stretch
from metis_lib.tokenizers.semantic import FactorizedVQ
from metis_lib.training import data, recipes
from metis_lib.training import generative as gen
from metis_lib.training.data import timed_hint
from metis_lib.training.durations import ctc_durations
from metis_lib.training.prepared import Mixed, Prepared, prepare
from metis_lib.training.teacher import align_frames
from tests.test_training import job_of, workshop  # noqa: F401 (fixtures)

pytestmark = pytest.mark.training


# ---------------------------------------------------------------- examples made once


@pytest.mark.parametrize("model", ["se", "tse", "l2s"])
def test_prepared_examples_are_those_made_on_the_fly(job_of, tmp_path, model):  # noqa: F811
    job = job_of(model)
    objective, source, _ = recipes.BUILD[model](job)
    store = prepare(source, lambda batch: gen.encode(batch, *objective.frozen), tmp_path / "made", passes=2)
    assert len(store) == 2 * int((source.lengths > 0).sum())
    (items,) = next(iter(data.plan(source.lengths, 4000, 1, seed=0, epoch=0)))
    wanted = gen.encode(source.batch(items, epoch=0, step=0), *objective.frozen)
    made = Prepared(store, model)
    batch = made.batch(range(len(items)), epoch=0, step=0)
    for row, n in enumerate(wanted["lengths"].tolist()):
        assert torch.equal(batch["tokens"][row, :n], wanted["tokens"][row, :n])
        torch.testing.assert_close(
            batch["features"][row, :n].float(), wanted["condition"][row, :n], atol=2e-3, rtol=2e-3
        )
    assert torch.equal(batch["prompt"], wanted["prompt"])
    first, second = (made.batch([0, 1], epoch=e, step=0) for e in (0, 1))
    assert not torch.equal(first["hidden"], second["hidden"])  # masks are drawn anew
    assert not (batch["hidden"] & (torch.arange(batch["hidden"].shape[1])[None] < batch["prompt"][:, None])).any()


def test_prepared_examples_lose_their_prompt_as_often_as_asked(job_of, tmp_path):  # noqa: F811
    objective, source, _ = recipes.BUILD["tse"](job_of("tse"))
    store = prepare(source, lambda batch: gen.encode(batch, *objective.frozen), tmp_path / "made")
    made = Prepared(store, "tse", dropout=0.5)
    lost = [~made.batch([0], epoch=e, step=0)["exists"][0, 0] for e in range(200)]
    assert 70 < sum(lost) < 130


@pytest.mark.parametrize("model", ["vc", "tse", "l2s"])
def test_prompts_are_other_recordings_as_in_generation(job_of, model):  # noqa: F811
    """Whole ones of the same speaker, each encoded by itself, as the pipeline then does."""
    job = replace(job_of(model), options={"passes": 1})
    _, source, saved = recipes.BUILD[model](job)
    waves, alone = job.waves("train"), {}
    for i, item in enumerate(waves.items):
        heard = data._heard(waves[i].astype(np.float32) / 32767)[None]
        n = torch.tensor([heard.shape[1]])
        alone[item["id"]] = job.frozen.tokens(heard, n)[0], job.frozen.features(heard, n)[0]
    speaker = {item["id"]: item["speaker"] for item in waves.items}
    batch = source.batch(range(len(source.lengths)), epoch=0, step=0)
    for row, item in enumerate(source.store.items):
        p, n = int(batch["prompt"][row]), len(source.store[row])
        assert int(batch["lengths"][row]) == p + n
        assert torch.equal(batch["tokens"][row, p : p + n], torch.from_numpy(source.store[row][:, 0].astype(np.int64)))
        others = [id for id, who in speaker.items() if who == speaker[item["id"]] and id != item["id"]]
        prompt = [id for id in others if len(alone[id][0]) == p]
        assert prompt and (alone[prompt[0]][0] == batch["tokens"][row, :p]).float().mean() > 0.95  # random codes tie
        wanted = torch.zeros(p, batch["features"].shape[2]) if model == "l2s" else alone[prompt[0]][1]
        torch.testing.assert_close(batch["features"][row, :p].float(), wanted, atol=2e-3, rtol=2e-3)
    assert saved()["config"].apart == (model != "l2s")


def test_who_says_only_one_thing_is_prompted_by_its_beginning(job_of):  # noqa: F811
    _, source, _ = recipes.BUILD["vc"](replace(job_of("vc"), options={"passes": 1}))
    voices = replace(source.voices, speakers={})
    for row, item in enumerate(source.store.items):
        n = len(source.store[row])
        before, cut = voices.before(item["id"], n, 60.0, np.random.default_rng(row))
        assert 0.2 * n - 1 <= cut == len(before) <= 0.5 * n
        assert np.array_equal(before, voices.store[voices.at[item["id"]]][:cut])
        assert len(voices.before("nobody", n, 60.0, np.random.default_rng(0))[0]) == 0


@pytest.mark.parametrize("model", ["se", "omni"])
def test_a_task_trains_from_prepared_examples(job_of, model):  # noqa: F811
    job = replace(job_of(model, steps=4), options={"passes": 1})
    scores = recipes.train(job)
    assert scores["finished"] and np.isfinite(scores["cross_entropy"])
    if model == "omni":
        assert {"tts_with_condition", "se_with_condition", "tse_with_condition", "vc_with_condition"} <= set(scores)


def test_a_mixed_feed_goes_on_anywhere(job_of):  # noqa: F811
    job = replace(job_of("omni"), options={"passes": 1})
    _, feed, _ = recipes.BUILD["omni"](job)
    assert isinstance(feed, Mixed)
    whole = list(itertools.islice(feed.open(), 12))
    assert len({batch["task"] for batch in whole}) > 1
    for one, two in zip(whole[7:], itertools.islice(feed.open(7), 5), strict=True):
        assert one["task"] == two["task"] and torch.equal(one["tokens"], two["tokens"])


def test_only_stage_2_waits_for_acoustic_codes(job_of, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    first = job_of("stage1").tokens("validation")
    assert first[0][1].shape[1] == 1
    both = job_of("stage2_full").tokens("validation")
    assert both[0][1].shape[1] == 1 + preset("debug").acoustic.num_quantizers
    assert np.array_equal(both[0][1][:, :1], first[0][1][: len(both[0][1])])
    assert job_of("stage1").tokens("validation")[0][1].shape == both[0][1].shape  # what is there is used


# ---------------------------------------------------------------- durations


def test_durations_follow_the_peaks_of_ctc():
    phones, peaks, frames = [3, 3, 1, 4], [2, 9, 14, 21], 27
    scores = np.full((frames, 6), -8.0)
    scores[:, 0] = -0.01
    for phone, at in zip(phones, peaks, strict=True):
        scores[at] = -8.0
        scores[at, phone + 1] = -0.01
    found = ctc_durations(scores, phones)
    assert found.tolist() == [6, 6, 6, 9] and found.sum() == frames


def test_durations_of_many_phones_sum_up():
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(41), 600))
    found = ctc_durations(scores, list(range(40)) * 4)
    assert found.sum() == 600 and len(found) == 160 and found.min() > 0


def test_durations_of_what_cannot_fit_are_even():
    found = ctc_durations(np.zeros((3, 6)), [1, 1, 1, 2])
    assert found.sum() == 3 and len(found) == 4


def test_spreading_with_equal_weights_is_stretching():
    for count, frames in ((3, 10), (7, 5), (5, 100), (1, 4), (8, 8)):
        phones = torch.arange(count) + 1
        assert torch.equal(spread(phones, torch.ones(count), frames), stretch(phones[None], frames)[0])
    assert spread(torch.tensor([5, 6]), torch.tensor([3.0, 1.0]), 8).tolist() == [5] * 6 + [6] * 2


def test_a_timed_hint_times_the_prompt_and_the_rest_each_by_itself():
    phones, durations = torch.tensor([1, 2, 3, 4]), torch.tensor([2.0, 6.0, 2.0, 6.0])
    hint = timed_hint(phones, durations, 8, 16, torch.tensor([1.0, 1.0, 3.0, 1.0]))
    assert hint.tolist() == [1] * 2 + [2] * 6 + [3] * 4 + [4] * 4
    for prompt in range(17):
        assert len(timed_hint(phones, durations, prompt, 16, torch.ones(4))) == 16


def test_durations_are_learnt_and_used(job_of):  # noqa: F811
    """The phones of the corpus get durations by the SSL encoder's head, and training lowers their error."""
    ssl = job_of("ssl", steps=2)
    recipes.train(ssl)
    assert "weight" in load_state(ssl.out / "ssl", "phones")
    job = replace(job_of("tts", steps=30), options={"text_hint": "timed"})
    objective, source, _ = recipes.BUILD["tts"](job)
    told = next(b for s in range(20) if "durations" in (b := source.batch([0, 1], epoch=0, step=s)))
    n = told["lengths"][0]
    assert told["durations"].shape == told["phones"].shape and told["durations"][0].sum() == n
    assert told["hint"].shape == told["tokens"].shape
    with torch.no_grad():
        before = objective.validate()["durations"]
    scores = recipes.train(job)
    assert scores["durations"] < before


def test_durations_do_not_hear_padding():
    net = Durations(20)
    row = torch.tensor([[3, 5, 7]])
    padded, mask = torch.tensor([[19, 19, 3, 5, 7]]), torch.tensor([[False, False, True, True, True]])
    torch.testing.assert_close(net(padded, mask)[:, 2:], net(row))


def test_timed_text_is_generated_by_predicted_durations():
    config = replace(preset("debug").stage1, use_phones=True, phone_vocab=20, text_hint="timed")
    model = Stage1(config)
    with torch.no_grad():
        model.durations.out.weight.zero_()
        model.durations.out.bias.zero_()
    assert torch.equal(model.times_of(torch.tensor([1, 2, 3])), torch.ones(3))


# ---------------------------------------------------------------- SSL tokens that keep the phones


def test_codes_follow_the_mean_of_their_latents():
    torch.manual_seed(0)
    vq = FactorizedVQ(6, 4, 3, 0.15, 1.0)
    vq.track_usage = True
    found = vq(torch.randn(2, 6, 50))
    latents, before = vq._latents, vq.codebook.weight.detach().clone()
    vq.follow(0.25)
    for code in range(4):
        mine = latents[found.codes.reshape(-1) == code]
        wanted = before[code] if not len(mine) else 0.75 * before[code] + 0.25 * mine.mean(0)
        torch.testing.assert_close(vq.codebook.weight[code].detach(), wanted)


def test_reconstructed_features_shall_sound_the_same_to_the_phone_head(job_of):  # noqa: F811
    recipes.train(job_of("ssl", steps=2))
    job = replace(job_of("semantic", steps=3), options={"phones": 5.0, "follow": 0.1})
    objective, source, _ = recipes.BUILD["semantic"](job)
    batch = source.batch([0, 1], epoch=0, step=0)
    with torch.no_grad():
        terms = objective(batch)
        features = objective.frozen[0].features(batch["heard"], batch["lengths"])
        recon = objective.codec(features, torch.ones(features.shape[:2], dtype=torch.bool))[0]
        encoder, head = objective.frozen[0].encoder, objective.frozen[1]
        said = [head(x * encoder.var.sqrt() + encoder.mean).softmax(-1) for x in (features, recon)]
        by_hand = (said[0] * (said[0] / said[1]).log()).sum(-1)
    exists = torch.arange(features.shape[1])[None] < batch["lengths"][:, None]
    assert terms["phones"] == pytest.approx(float(by_hand[exists].sum()), rel=0.05)
    assert "phone_error" in recipes.train(job)


# ---------------------------------------------------------------- a teacher


def test_teacher_frames_are_put_where_the_student_hears_them():
    """A ramp of the teacher's (a frame every 384 samples, the first at 447) read at the student's middles."""
    ramp = (447 + 384 * np.arange(50, dtype=np.float32))[:, None]
    found = align_frames(ramp, 50)[:, 0]
    middles = 280 + 320 * np.arange(50)
    inside = (middles >= 447) & (middles <= ramp[-1, 0])
    np.testing.assert_allclose(found[inside], middles[inside])
    assert (found[~inside] >= 447).all()


def test_prompts_of_a_batch_are_of_like_length():
    known = [(n, i) for i, n in enumerate(range(30, 250, 4))]
    found = [data.about_as_long(known, 120.0, np.random.default_rng(seed)) for seed in range(30)]
    assert {known[i][0] for i in found} == {114, 118, 122, 126}
    for wanted, ends in ((0.0, known[:4]), (999.0, known[-4:])):
        assert data.about_as_long(known, wanted, np.random.default_rng(0)) in {i for _, i in ends}
    assert data.about_as_long(known[:1], 120.0, np.random.default_rng(0)) == 0
