"""Training: plans and batches, losses by hand, overfitting, resuming after kills, several processes, the queue."""

import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from metis_lib import Metis, cli
from metis_lib.checkpoints import load_state
from metis_lib.config import SemanticCodecConfig, Stage2Config, preset
from metis_lib.data.store import write_manifest
from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report
from metis_lib.models.stage2 import Stage2
from metis_lib.tasks import TASKS
from metis_lib.training import data, loop, recipes
from metis_lib.training import generative as gen
from metis_lib.training import tokenizers as tok
from metis_lib.training.loop import TrainSettings, learning_rate, seconds_of
from recipes.nano import queue
from tests.training_jobs import DEBUG, MODELS, make_corpus, make_job, make_system

pytestmark = pytest.mark.training
GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A corpus and a system of random weights, with the tokens of the corpus in a cache of its own."""
    home = tmp_path_factory.mktemp("training")
    before = os.environ.get("METIS_HOME")
    os.environ["METIS_HOME"] = str(home / "cache")
    manifest, system = make_corpus(home / "corpus"), make_system(home / "system")
    job = make_job("stage2_full", system, manifest)
    for split in ("train", "validation"):
        job.tokens(split)
    yield manifest, system
    if before is None:
        del os.environ["METIS_HOME"]
    else:
        os.environ["METIS_HOME"] = before


@pytest.fixture()
def job_of(workshop, tmp_path):
    """Makes jobs in a copy of the system."""
    manifest, system = workshop
    shutil.copytree(system, tmp_path / "system")

    def make(model, **settings):
        return make_job(model, tmp_path / "system", manifest, **settings)

    return make


class Repeat:
    """The same batch for ever."""

    def __init__(self, batch):
        self.batch = batch

    def open(self, step, rank, world, accumulate):
        return (dict(self.batch) for _ in itertools.count())


# ---------------------------------------------------------------- schedule, plan, batches


def test_learning_rates():
    cosine = TrainSettings(steps=100, lr=1.0, warmup=10)
    rates = [learning_rate(step, cosine) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] < 0.11
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    paper = recipes.settings_for("stage1", "paper")
    assert learning_rate(31_999, paper) == pytest.approx(1e-4)
    assert learning_rate(127_999, paper) == pytest.approx(0.5e-4)
    assert (paper.steps, paper.frames, paper.warmup) == (1_200_000, 10_000, 32_000)


def test_the_cosine_over_a_budgets_time(tmp_path, monkeypatch):
    model, clock = torch.nn.Linear(2, 1), itertools.count()
    steady = SimpleNamespace(monotonic=lambda: next(clock) / 100, process_time=time.process_time)
    monkeypatch.setattr(loop, "time", steady)

    class Small(loop.Objective):
        def __init__(self):
            super().__init__()
            self.model = model

        def counts(self, batch):
            return {"loss": 1.0}

        def forward(self, batch, part="model"):
            return {"loss": self.model(batch["x"]).square().sum()}

    settings = TrainSettings(
        steps=10**7, lr=0.01, warmup=5, schedule="budget", precision="32-true", log_every=1, save_minutes=100
    )
    feed = Repeat({"x": torch.ones(1, 2)})
    found = loop.fit(Small(), feed, settings, tmp_path / "run", budget="10s")
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert found["finished"] and 20 < found["steps"] < 10**7
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[6] > 0.005 and 0.001 <= rates[-1] < 0.0015
    with pytest.raises(MetisError, match="needs one"):
        loop.fit(Small(), feed, settings, tmp_path / "other")


class Drifting(loop.Objective):
    """Training pulls a number towards 1; held-out data likes 0.5 best; ``told`` is what it was at each validation."""

    def __init__(self):
        super().__init__()
        self.model, self.told = torch.nn.Linear(1, 1, bias=False), []
        torch.nn.init.zeros_(self.model.weight)

    def counts(self, batch):
        return {"loss": 1.0}

    def forward(self, batch, part="model"):
        return {"loss": (self.model(batch["x"]) - 1).abs().sum()}

    def validate(self):
        self.told.append(self.model.weight.item())
        return {"far": abs(self.model.weight.item() - 0.5)}


def test_the_best_weights_stay_where_that_is_asked_also_after_a_stop(tmp_path):
    feed = Repeat({"x": torch.ones(1, 1)})
    settings = TrainSettings(steps=60, lr=0.05, warmup=0, schedule="constant", weight_decay=0.0,
                             precision="32-true", validate_every=1, log_every=1, save_every=1, best="far")  # fmt: skip
    whole = Drifting()
    scores = loop.fit(whole, feed, settings, tmp_path / "whole")
    nearest = min(range(60), key=lambda k: abs(whole.told[k] - 0.5))
    assert scores["best_step"] == nearest + 1 < 30 and scores["steps"] == 60 and scores["finished"]
    assert whole.model.weight.item() == whole.told[nearest] and scores["far"] < 0.03 < abs(whole.told[-1] - 0.5)
    last = Drifting()
    scores = loop.fit(last, feed, replace(settings, best=""), tmp_path / "last")
    assert last.model.weight.item() == whole.told[-1] and "best_step" not in scores

    class Stopped(Repeat):
        def open(self, step, rank, world, accumulate):
            for n, batch in enumerate(super().open(step, rank, world, accumulate)):
                if n == 35 and step == 0:
                    raise KeyboardInterrupt
                yield batch

    with pytest.raises(KeyboardInterrupt):
        loop.fit(Drifting(), Stopped({"x": torch.ones(1, 1)}), settings, tmp_path / "stopped")
    again = Drifting()
    scores = loop.fit(again, feed, settings, tmp_path / "stopped")
    assert len(again.told) == 25 and scores["best_step"] == nearest + 1
    assert again.model.weight.item() == whole.told[nearest]
    with pytest.raises(MetisError, match="no score 'near'.*has far"):
        loop.fit(Drifting(), feed, replace(settings, best="near"), tmp_path / "other")


def test_budgets():
    assert [seconds_of(text) for text in ("90s", "100m", "1.5h")] == [90, 6000, 5400]
    for text in ("100", "m", "0m", "1d", "-3m"):
        with pytest.raises(MetisError, match="budget"):
            seconds_of(text)


def test_plan_visits_everything_once_within_the_budget_and_does_not_depend_on_the_world():
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 400, size=3000)
    lengths[::17] = 0
    ends = np.arange(100, 3001, 100)
    groups = list(data.plan(lengths, 2000, 4, seed=3, epoch=1, ends=ends, window=700))
    batches = [batch for group in groups for batch in group]
    assert all(len(group) == 4 for group in groups)
    assert all(len(batch) * lengths[batch].max() <= 2000 for batch in batches)
    seen = np.bincount(np.concatenate(batches), minlength=3000)
    assert (seen[lengths == 0] == 0).all() and (seen[lengths > 0] >= 1).all() and (seen == 1).mean() > 0.85
    assert sum(lengths[b].sum() for b in batches) / sum(len(b) * lengths[b].max() for b in batches) > 0.9

    class Plain:
        def __init__(self):
            self.lengths, self.ends = lengths, ends

    feed = data.Feed(Plain(), TrainSettings(frames=2000, seed=3))

    def steps(rank, world, accumulate, first=0):
        return list(itertools.islice(feed.positions(first, rank, world, accumulate), 12 * accumulate))

    alone = steps(0, 1, 4)
    shared = [steps(rank, 4, 1) for rank in range(4)]
    assert alone == [one for together in zip(*shared, strict=True) for one in together]
    assert steps(0, 1, 4, first=5)[:4] == alone[20:24]  # any step without those before


@pytest.mark.parametrize("model", ["ssl", "acoustic", "stage1", "stage2_full", "tts", "se", "tse", "vc", "omni", "l2s"])
def test_a_batch_depends_on_its_place_alone(job_of, model):
    job = job_of(model)
    _, source, _ = recipes.BUILD[model](job)
    items = np.flatnonzero(source.lengths)[:3].tolist()
    one, two = (source.batch(items, epoch=1, step=7) for _ in range(2))
    other = source.batch(items, epoch=2, step=7)
    same = [key for key, value in one.items() if isinstance(value, torch.Tensor)]
    assert same and all(torch.equal(one[key], two[key]) for key in same)
    drawn = {"ssl": "spans", "acoustic": "wav"}.get(model, "hidden")
    assert one[drawn].shape != other[drawn].shape or not torch.equal(one[drawn], other[drawn])


def test_workers_make_the_same_batches(job_of):
    _, source, _ = recipes.BUILD["se"](job_of("se"))
    settings = TrainSettings(frames=300)
    alone, helped = (data.Feed(source, settings, workers=n).open() for n in (0, 2))
    for _ in range(4):
        one, two = next(alone), next(helped)
        assert all(torch.equal(one[k], two[k]) for k, v in one.items() if isinstance(v, torch.Tensor))


def test_text_is_dropped_with_the_prompt(job_of):
    job = job_of("tts")
    source = data.Tokens(job.tokens("train"), text=True, dropout=0.5)
    items = np.flatnonzero(source.lengths)[:3].tolist()
    batches = [source.batch(items, epoch=0, step=step) for step in range(40)]
    told = [batch for batch in batches if "phones" in batch]
    assert 10 < len(told) < 30
    assert not any(batch["prompt"].any() for batch in batches if "phones" not in batch)
    batch = told[0]
    assert batch["hint"].shape == batch["tokens"].shape
    assert (batch["phones"][:, -1] != source.tokenizer.pad_id).all()  # padding on the left
    assert torch.equal(batch["phone_mask"], batch["phones"] != source.tokenizer.pad_id)


def test_a_text_may_follow_another_sentence_of_the_speaker(job_of):
    """The prompt is then a whole recording: its tokens and phones come first, and nothing of it is asked for."""
    job = job_of("tts")
    plain, joined = (data.Tokens(job.tokens("train"), text=True, joined=share) for share in (0.0, 1.0))
    items = np.flatnonzero(plain.lengths).tolist()
    alone, after = (source.batch(items, epoch=0, step=0) for source in (plain, joined))
    records = [joined.shards.record(i) for i in items]
    several = [r for r in records if sum(o["speaker"] == r["speaker"] for o in records) > 1]
    found = 0
    for row in range(len(items)):
        n, m, start = (int(x) for x in (alone["lengths"][row], after["lengths"][row], after["prompt"][row]))
        if m == n:
            continue
        found += 1
        assert start == m - n and not after["hidden"][row, :start].any() and after["hidden"][row, start:m].any()
        assert torch.equal(after["tokens"][row, start:m], alone["tokens"][row, :n])
        own, both = (b["phones"][row][b["phone_mask"][row]].tolist() for b in (alone, after))
        assert both[-len(own) :] == own and len(both) > len(own)
        before = [
            o for o in records
            if o["speaker"] == records[row]["speaker"] and o["frames"] == start and o["id"] != records[row]["id"]
        ]  # fmt: skip
        assert before
    assert 0 < found <= len(several)


def test_stage_two_may_follow_another_sentence_too(job_of):
    job = replace(job_of("stage2_full"), options={"joined": 1.0})
    _, source, _ = recipes.BUILD["stage2_full"](job)
    items = np.flatnonzero(source.lengths).tolist()
    batch, alone = (s.batch(items, epoch=0, step=0) for s in (source, replace(source, joined=0.0)))
    more = batch["lengths"] - alone["lengths"]
    assert (more > 0).any() and torch.equal(batch["prompt"][more > 0], more[more > 0])
    for row in torch.nonzero(more)[:, 0].tolist():
        n, start = int(alone["lengths"][row]), int(more[row])
        assert torch.equal(batch["codes"][row, start : start + n], alone["codes"][row, :n])
        assert not batch["hidden"][row, :start].any() and batch["hidden"][row, start:].any()


def test_durations_are_learned_of_one_recording_at_a_time(job_of):
    job = job_of("tts")
    shards = job.tokens("train")
    records = [shards.record(i) for i in range(len(shards.lengths()))]
    plain = data.Tokens(shards, text=True, joined=1.0)
    timed = {r["id"]: np.full(len(plain._ids(r)), 5, np.int16) for r in records}
    source = replace(plain, timed=timed)
    items = np.flatnonzero(source.lengths).tolist()
    alone, batch = (s.batch(items, epoch=0, step=0) for s in (replace(source, joined=0.0), source))
    joined = batch["lengths"] > alone["lengths"]
    assert joined.any() and (alone["durations"].sum(1) > 0).all()
    assert torch.equal(batch["durations"].sum(1) > 0, ~joined)
    assert batch["hint"].shape == batch["tokens"].shape


def test_prompts_of_the_audio_tasks_are_never_asked_for(job_of):
    for model in ("tse", "vc"):
        _, source, _ = recipes.BUILD[model](job_of(model))
        batch = source.batch(np.flatnonzero(source.lengths)[:4].tolist(), epoch=0, step=0)
        place = torch.arange(batch["hidden"].shape[1])[None]
        assert (batch["prompt"] > 0).all() and not (batch["hidden"] & (place < batch["prompt"][:, None])).any()
        assert (batch["hidden"].sum(1) > 0).all()


def test_known_tokens_are_those_of_the_audio(job_of):
    """Target tokens from shards are what the frozen tokenizers make of the target."""
    job = job_of("se")
    _, source, _ = recipes.BUILD["se"](job)
    unknown = replace(source, shards=None)
    items = np.flatnonzero(source.lengths)[:3].tolist()
    one, two = (s.batch(items, epoch=0, step=0) for s in (source, unknown))
    assert "tokens" in one and "target" in two
    made = job.frozen.tokens(two["target"], two["lengths"])
    agree = (made == one["tokens"])[one["hidden"]].float().mean()
    assert agree > 0.98


# ---------------------------------------------------------------- losses by hand


def ctc_by_hand(log_p, phones):
    """-log of the sum over all paths (Graves 2006), in numpy; class 0 is the blank."""
    labels = [0]
    for p in phones:
        labels += [p, 0]
    alpha = np.full(len(labels), -np.inf)
    alpha[:2] = log_p[0, labels[0]], log_p[0, labels[1]]
    for row in log_p[1:]:
        new = np.full_like(alpha, -np.inf)
        for s, label in enumerate(labels):
            ways = [alpha[s]] + ([alpha[s - 1]] if s else [])
            if s > 1 and label and label != labels[s - 2]:
                ways.append(alpha[s - 2])
            new[s] = np.logaddexp.reduce(ways) + row[label]
        alpha = new
    return -np.logaddexp(alpha[-1], alpha[-2])


def by_hand_ssl(job):
    objective, source, _ = recipes.BUILD["ssl"](job)
    batch = source.batch(np.flatnonzero(source.lengths)[:3].tolist(), epoch=0, step=0)
    objective.eval()
    with torch.no_grad():
        found, counts = objective(batch), objective.counts(batch)
        out = objective.encoder(batch["heard"], batch["lengths"], mask_time=batch["spans"])
        masked = 0.0
        for b, t in batch["spans"].nonzero().tolist():
            for book, head in enumerate(objective.heads.predict):
                latent = batch["clean"][b, t] @ objective.heads.projection[book]
                label = int(((latent / latent.norm()) @ objective.heads.codebook[book].T).argmax())
                masked -= float(head(out[b, t]).log_softmax(0)[label]) / 2
        logits = objective.heads.phones(out).log_softmax(-1)
    ctc = sum(
        ctc_by_hand(logits[b, : int(n)].numpy(), [p + 1 for p in phones])
        for b, (n, phones) in enumerate(zip(batch["lengths"], batch["phones"], strict=True))
    )
    assert counts["masked"] == int(batch["spans"].sum()) and counts["ctc"] == sum(map(len, batch["phones"]))
    return {k: float(v) for k, v in found.items()}, {"masked": masked, "ctc": ctc}


def by_hand_lips(job):
    objective, source, _ = recipes.BUILD["lips"](job)
    batch = source.batch(np.flatnonzero(source.lengths)[:2].tolist(), epoch=0, step=0)
    objective.eval()
    with torch.no_grad():
        found, wanted = objective(batch), 0.0
        for b, n in enumerate(batch["lengths"].tolist()):
            seen = objective.encoder(batch["video"][b : b + 1, : (n + 1) // 2])
            logits = objective.phones(tok.upsample(seen))[0, :n].log_softmax(-1)
            wanted += ctc_by_hand(logits.numpy(), [p + 1 for p in batch["said"][b]])
    assert min(map(len, batch["said"])) > 5
    return {"ctc": float(found["ctc"])}, {"ctc": wanted}


def by_hand_acoustic(job):
    objective, source, _ = recipes.BUILD["acoustic"](job)
    objective.codec.config = replace(objective.codec.config, quantizer_dropout=0.0)
    batch = source.batch([0, 1, 2], epoch=0, step=0)
    objective.now = 99
    with torch.no_grad():
        found = objective(batch)
        out = objective.codec(wav := batch["wav"])
        mel = convergence = 0.0
        for window, bands in ((2048, 160), (1024, 80), (512, 40), (256, 20), (128, 10)):
            filters = tok.multi_scale_mel_losses.__globals__["mel_filters"](bands, window, 24_000)

            def spectrum(x, window=window, filters=filters):
                taper = torch.hann_window(window)
                return filters @ torch.stft(x, window, window // 4, window=taper, return_complex=True).abs()

            for x, y in zip(out["recon"], wav, strict=True):
                a, b = spectrum(x), spectrum(y)
                mel += float((a.clamp(min=1e-5).log() - b.clamp(min=1e-5).log()).abs().mean()) / 5
                convergence += float((a - b).norm() / b.norm()) / 5
        real, fake = objective.critics(wav), objective.critics(out["recon"])
        adversarial = sum(float((1 - maps[-1]).square().flatten(1).mean(1).sum()) for maps in fake)
        features = sum(
            float((r - f).abs().flatten(1).mean(1).sum())
            for one, two in zip(real, fake, strict=True)
            for r, f in zip(one[:-1], two[:-1], strict=True)
        )
        objective.made = [out["recon"]]
        critics = objective(batch, "critics")
        judged = adversarial_of(real) + sum(float(maps[-1].square().flatten(1).mean(1).sum()) for maps in fake)
    vq = 3 * float(out["commit_loss"] + out["codebook_loss"])
    wanted = {"mel": mel, "convergence": convergence, "vq": vq, "adversarial": adversarial, "features": features}
    assert float(critics["critics"]) == pytest.approx(judged, rel=1e-4)
    return {k: float(v) for k, v in found.items()}, wanted


def adversarial_of(maps):
    return sum(float((1 - one[-1]).square().flatten(1).mean(1).sum()) for one in maps)


def by_hand_stage1(job):
    """Any use of stage 1: conditions made utterance by utterance, cross-entropy in numpy."""
    objective, source, _ = recipes.BUILD[job.model](job)
    torch.manual_seed(1)
    for key, p in objective.model.named_parameters():
        if "gate" in key and p.numel() == 1:
            torch.nn.init.ones_(p)  # else the condition tells nothing yet
    objective.eval()
    batch = source.batch(np.flatnonzero(source.lengths)[:3].tolist(), epoch=0, step=0)
    model, wanted = objective.model, 0.0
    with torch.no_grad():
        found = objective(batch)
        for b, n in enumerate(batch["lengths"].tolist()):
            single = {}
            if "condition" in batch:
                single["condition"] = job.frozen.features(batch["condition"][b : b + 1, :n], torch.tensor([n]))
            if "video" in batch:
                seen = tok.upsample(objective.frozen[1](batch["video"][b : b + 1, : (n + 1) // 2]))[:, :n].clone()
                seen[:, : int(batch["prompt"][b])] = 0
                single["condition"] = seen
            if "phones" in batch:
                single["phones"] = batch["phones"][b : b + 1, batch["phone_mask"][b]]
                single["hint"] = batch["hint"][b : b + 1, :n]
            tokens = (
                batch["tokens"][b : b + 1, :n]
                if "tokens" in batch
                else job.frozen.tokens(batch["target"][b : b + 1, :n], torch.tensor([n]))
            )
            hidden = batch["hidden"][b : b + 1, :n]
            mask = batch["exists"][b : b + 1, :n] if "exists" in batch else None
            out = model.to_logit(model(tokens, hidden, batch["t"][b : b + 1], mask=mask, **single))[0].double().numpy()
            log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
            wanted -= sum(log_p[t, int(tokens[0, t])] for t in range(n) if hidden[0, t])
    return {"loss": float(found["loss"])}, {"loss": wanted}


BY_HAND = {"ssl": by_hand_ssl, "lips": by_hand_lips, "acoustic": by_hand_acoustic}


@pytest.mark.parametrize("model", [m for m in MODELS if m not in ("semantic", "stage2_layer1", "stage2_full")])
def test_loss_by_hand(job_of, model):
    found, wanted = BY_HAND.get(model, by_hand_stage1)(job_of(model))
    assert set(found) >= set(wanted)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.golden
@pytest.mark.parametrize("case", ["l1_q0", "q1", "q2", "q3", "q1_noprompt"])
def test_stage2_loss_equals_the_released_forward(case):
    tensors = load_file(GOLDEN / "train.safetensors")
    name, count = ("s2a_1layer", 1) if case == "l1_q0" else ("s2a_full", 4)
    config = Stage2Config(count, count == 1, 32, 2, 4, 32, 40)
    objective = gen.Stage2Training(config).eval()
    prefix = f"sd_{name}/"
    objective.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    io = {k.removeprefix("s2a/"): v for k, v in tensors.items() if k.startswith("s2a/")}
    exists = io["x_mask"].bool()
    batch = {
        "codes": io["x0"].long(), "tokens": io["cond_code"].long(), "lengths": exists.sum(1), "t": io["t"],
        "hidden": io[f"{case}/final_mask"].bool().reshape(exists.shape), "layer": int(case[1]) if case[0] == "q" else 0,
        "prompt": io[f"{case}/prompt_len_used"].long().flatten().expand(len(exists)),
    }  # fmt: skip
    found = objective(batch)["loss"] / objective.counts(batch)["loss"]
    torch.testing.assert_close(found, io[f"{case}/loss_masked_mean"].reshape(()), **CLOSE)


@pytest.mark.golden
def test_semantic_loss_and_gradients_equal_the_released_forward():
    tensors = load_file(GOLDEN / "train.safetensors")
    io = {k.removeprefix("repcodec/"): v for k, v in tensors.items() if k.startswith("repcodec/")}

    class Given:
        def features(self, x, lengths):
            return x

    config = SemanticCodecConfig(24, 32, 8, 16, 32, 2)
    objective = tok.SemanticTraining(config, Given())
    prefix = "sd_repcodec/"
    objective.codec.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    batch = {"heard": io["x"], "lengths": torch.tensor([13, 13])}
    terms, counts = objective(batch), objective.counts(batch)
    torch.testing.assert_close(terms["recon_l1"] / counts["recon_l1"], io["recon_l1"].reshape(()), **CLOSE)
    vq = io["codebook_plus_commit_official"].reshape(())
    torch.testing.assert_close(terms["vq"] / counts["vq"], vq, **CLOSE)
    ((terms["recon_l1"] / counts["recon_l1"]) + terms["vq"] / counts["vq"]).backward()
    grads = {k.removeprefix("grad/"): v for k, v in io.items() if k.startswith("grad/")}
    assert len(grads) >= 6
    for key, value in grads.items():
        torch.testing.assert_close(objective.codec.get_parameter(key).grad, value, atol=2e-5, rtol=1e-3)


# ---------------------------------------------------------------- every trainer learns


@pytest.mark.parametrize("model", MODELS)
def test_overfits_one_batch(job_of, tmp_path, model):
    job = job_of(model, frames=200, steps=120, warmup=10, lr=1e-2, seed=3)
    if model == "acoustic":  # by reconstruction; the discriminators have a test of their own
        job = replace(job, options={"seconds": 0.2}, settings=replace(job.settings, frames=20))
    objective, source, _ = recipes.BUILD[model](replace(job, mode="full"))
    if hasattr(objective, "check"):
        objective.check = ()
    items = np.flatnonzero(source.lengths)[:2].tolist()
    feed = Repeat(source.batch(items, epoch=0, step=2))
    settings = replace(job.settings, log_every=10)
    loop.fit(objective, feed, settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    key = {"ssl": "ctc", "lips": "ctc", "semantic": "recon_l1", "acoustic": "mel"}.get(model, "loss")
    part = {"acoustic": 0.55, "semantic": 0.85, "lips": 0.75, "ssl": 0.6}.get(model, 0.6)
    assert lines[-1][key] < part * lines[0][key]


def test_tokens_learn_to_tell_the_sound(job_of, tmp_path):
    """With ``sound`` the filterbanks can be read off what the tokens stand for, and the codec itself learns from it."""
    job = replace(job_of("semantic", frames=200, steps=120, warmup=10, lr=1e-2, log_every=10), options={"sound": 50.0})
    objective, source, _ = recipes.BUILD["semantic"](job)
    objective.check = ()
    batch = source.batch(np.flatnonzero(source.lengths)[:2].tolist(), epoch=0, step=2)
    objective.train()(batch)["sound"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.codec.encoder.parameters())
    objective.zero_grad()
    loop.fit(objective, Repeat(batch), job.settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["sound"] < 0.7 * lines[0]["sound"]
    objective.check = [batch]
    with torch.no_grad():
        assert 0 < objective.eval().validate()["sound"] < 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_discriminators_and_codec_are_trained_in_turn(job_of, tmp_path, precision):
    job = job_of("acoustic", steps=6, log_every=1, precision=precision, accumulate=2)
    objective, source, _ = recipes.BUILD["acoustic"](job)
    before = [p.detach().clone() for p in objective.critics.parameters()]
    loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [("critics" in line) and ("adversarial" in line) for line in lines] == [False] * 3 + [True] * 3
    assert any(not torch.equal(a, b) for a, b in zip(before, objective.critics.parameters(), strict=True))


# ---------------------------------------------------------------- fine-tuning


def test_mixed_precision_leaves_the_batches_in_fp32(job_of):
    """Rounded to bf16, the noise of a waveform hides what a band-limited recording lacks: the loss would halve."""
    seen = []

    class Listener(loop.Objective):
        weights = {"loss": 1.0}

        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 4)

        def counts(self, batch):
            return {"loss": 1.0}

        def forward(self, batch, part="model"):
            out = self.net(batch["wav"])
            seen.append((batch["wav"].dtype, out.dtype))
            return {"loss": out.float().sum()}

    settings = TrainSettings(steps=1, precision="bf16-mixed")
    loop.fit(Listener(), Repeat({"wav": torch.randn(2, 4)}), settings, job_of("ssl").out / "listener")
    assert seen == [(torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("mode", ["lora", "adapter", "full"])
def test_only_what_shall_train_trains(job_of, mode):
    job = replace(job_of("se", steps=4), mode=mode)
    base = load_state(job.out / "stage1")
    recipes.train(job)
    state = load_state(job.folder)
    lora = [k for k in state if ".lora_" in k]
    assert any(k.startswith("cond_adapter.") for k in state) and bool(lora) == (mode == "lora")
    moved = [k for k in base if k in state and not torch.equal(base[k], state[k])]
    assert bool(moved) == (mode == "full")
    assert torch.equal(load_state(job.out / "stage1")["cond_emb.weight"], base["cond_emb.weight"])


def test_trainable_parameters_are_counted_as_published():
    """LoRA 4, 16, 32 of the paper's stage 1: 2.26, 9.04, 18.09 M; an adapter 15.74 M (on the meta device)."""
    from metis_lib.config import preset
    from metis_lib.models.stage1 import Stage1

    config = preset("paper").stage1
    with torch.device("meta"):
        base = Stage1(config).state_dict()
        for rank, millions in ((4, 2.26), (16, 9.04), (32, 18.09)):
            model = Stage1(replace(config, adapter="gated"))
            from metis_lib.models import adapt

            adapt.add_lora(model, rank)
            total = gen.choose_trained(model, base, "lora")
            adapter = gen.choose_trained(model, base, "adapter")
            assert (total - adapter) / 1e6 == pytest.approx(millions, abs=0.005)
            assert adapter / 1e6 == pytest.approx(15.74, abs=0.005)


def test_fine_tune_in_one_command(workshop, tmp_path, capsys):
    manifest, system = workshop
    full = tmp_path / "base"
    shutil.copytree(system, full)
    for part in ("stage2_layer1", "stage2_full"):
        job = make_job(part, full, manifest, steps=2)
        recipes.train(job)
    out = tmp_path / "mine"
    command = ["train", "finetune", "--task", "tts", "--from", str(full), "--data", str(manifest), "--lora", "4"]
    code = cli.main([*command, "--out", str(out), "--steps", "4", "--frames", "300", "--device", "cpu", "--json"])
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert "step 4/4" in printed.err and "times; about" not in printed.err
    assert code == 0 and answer["scores"]["finished"] and "with_condition" in answer["scores"]
    metis = Metis.from_pretrained(out, device="cpu")
    said = metis.speak(
        "Go.", prompt=manifest.parent / "audio/0.wav", prompt_text="The ship is small.", seconds=0.5, steps=2
    )
    assert said.seconds == pytest.approx(0.5)
    assert (out / "runs" / "tts" / "log.jsonl").is_file()
    # the base has not changed: its files are shared, not written to
    assert not (full / "tasks").exists()


def test_own_data_without_a_held_out_part_is_refused(workshop, tmp_path, capsys):
    manifest, system = workshop
    from metis_lib.data.store import read_manifest

    rows = [replace(row, split="train", path=str(row.audio)) for row in read_manifest(manifest)]
    write_manifest(tmp_path / "mine.jsonl", rows)
    command = ["train", "finetune", "--task", "se", "--from", str(system), "--data", str(tmp_path / "mine.jsonl")]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "validation" in capsys.readouterr().err


# ---------------------------------------------------------------- long runs


def stop_at(monkeypatch, step, action):
    opened = data.Feed.open

    def feed(self, first=0, *rest):
        for at, batch in enumerate(opened(self, first, *rest), first):
            if at == step:
                action()
            yield batch

    monkeypatch.setattr(data.Feed, "open", feed)


def test_a_budget_and_sigterm_end_with_a_state(job_of, monkeypatch):
    job = job_of("stage1", steps=500)
    found = recipes.train(job, budget="0.5s")
    assert not found["finished"] and 0 < found["steps"] < 500
    assert (job.out / "runs/stage1/states" / f"step-{found['steps']:08d}.ckpt").is_file()
    with monkeypatch.context() as patch:
        stop_at(patch, found["steps"] + 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        again = recipes.train(job)
    assert not again["finished"] and again["steps"] in (found["steps"] + 6, found["steps"] + 7)
    card = json.loads((job.folder / "config.json").read_text())["card"]
    assert card["scores"]["steps"] == again["steps"]


def test_states_are_kept_and_forgotten(job_of, tmp_path):
    job = job_of("stage1", steps=12, save_every=2, keep=3)
    objective, source, _ = recipes.BUILD["stage1"](job)
    loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run/states").iterdir())
    assert names == [f"step-{n:08d}.ckpt" for n in (8, 10, 12)]


def test_a_full_disk_leaves_the_last_state_whole(job_of, tmp_path, monkeypatch):
    job = job_of("stage1", steps=12, save_every=2)
    objective, source, _ = recipes.BUILD["stage1"](job)
    saved = loop.Checkpoints.save

    def full(self, step, state, fabric, trained):
        if step > 4:

            def no_room(path, state, filter=None):
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(fabric, "save", no_room)
        saved(self, step, state, fabric, trained)

    monkeypatch.setattr(loop.Checkpoints, "save", full)
    with pytest.raises(MetisError, match=r"No space left.*step-00000004"):
        loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/states").iterdir()) == [f"step-{n:08d}.ckpt" for n in (2, 4)]
    monkeypatch.undo()
    objective, source, _ = recipes.BUILD["stage1"](job)
    assert loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")["finished"]


def test_a_damaged_state_is_named(job_of, tmp_path):
    job = job_of("stage1", steps=4, save_every=2)
    objective, source, _ = recipes.BUILD["stage1"](job)
    loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    path = tmp_path / "run/states/step-00000004.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MetisError, match=r"step-00000004.*delete it"):
        loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")


class Poisoned(loop.Objective):
    def __init__(self, bad):
        super().__init__()
        self.line, self.bad, self.calls = torch.nn.Linear(2, 1), bad, 0

    def counts(self, batch):
        return {"loss": len(batch["x"])}

    def forward(self, batch, part="model"):
        self.calls += 1
        return {"loss": self.line(batch["x"]).square().sum() * (torch.nan if self.calls in self.bad else 1.0)}


def test_updates_that_are_not_finite_are_skipped_counted_and_in_the_end_an_error(tmp_path):
    settings = TrainSettings(steps=30, warmup=1, precision="32-true", log_every=5)
    feed = Repeat({"x": torch.ones(4, 2)})
    found = loop.fit(Poisoned({3, 7, 8}), feed, settings, tmp_path / "some")
    assert found["skipped"] == 3 and found["finished"]
    objective = Poisoned(set(range(5, 100)))
    with pytest.raises(MetisError, match="ten updates in a row.*learning rate"):
        loop.fit(objective, feed, settings, tmp_path / "many")
    assert torch.isfinite(objective.line.weight).all()


def test_codebooks_take_nothing_from_a_step_that_was_not_finite(tmp_path):
    class Told(Poisoned):
        steps, spared = (), ()

        def after_step(self, step, fabric, settings):
            self.steps = (*self.steps, step)

        def spoiled(self):
            self.spared = (*self.spared, self.calls)

    objective = Told({3})
    loop.fit(objective, Repeat({"x": torch.ones(4, 2)}), TrainSettings(steps=5, precision="32-true"), tmp_path / "run")
    assert objective.steps == (0, 1, 3, 4) and objective.spared == (3,)
    codec = tok.AcousticTraining(DEBUG.acoustic)
    codec.made.append(torch.zeros(1))
    codec.latents.append(torch.full((2, 3), torch.nan))
    codec.spoiled()
    assert not codec.made and not codec.latents


def test_where_a_run_was_stopped_does_not_choose_its_weights(tmp_path, monkeypatch):
    """Stopped between two validations, it ends with the weights that it would have ended with."""
    feed = Repeat({"x": torch.ones(1, 1)})
    settings = TrainSettings(steps=40, lr=0.05, warmup=0, schedule="constant", weight_decay=0.0, precision="32-true",
                             validate_every=8, log_every=1, best="far")  # fmt: skip
    whole = Drifting()
    kept = loop.fit(whole, feed, settings, tmp_path / "whole")["best_step"]
    for stop in range(5, 23):
        asked = iter([False] * (stop - 1) + [True])
        with monkeypatch.context() as patched:
            patched.setattr(loop, "stop_asked", lambda asked=asked: contextlib.nullcontext(lambda: next(asked)))
            assert not loop.fit(Drifting(), feed, settings, tmp_path / str(stop))["finished"]
        again = Drifting()
        assert loop.fit(again, feed, settings, tmp_path / str(stop))["best_step"] == kept
        assert again.model.weight.item() == whole.model.weight.item()


def test_freed_memory_is_given_back_now_and_then(monkeypatch, tmp_path):
    times = []
    monkeypatch.setattr(loop, "_trim", lambda: times.append(1))
    for seconds, wanted in ((1e9, 0), (-1.0, 5)):
        monkeypatch.setattr(loop, "TRIM_SECONDS", seconds)
        loop.fit(Poisoned(()), Repeat({"x": torch.ones(4, 2)}), TrainSettings(steps=5), tmp_path / str(wanted))
        assert len(times) == wanted
    monkeypatch.undo()
    assert loop._trim() is None


def test_out_of_memory_says_what_to_lower(tmp_path):
    class Huge(Poisoned):
        def forward(self, batch, part="model"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with pytest.raises(MetisError, match="4000 frames a batch; lower frames .*or set checkpointing"):
        loop.fit(Huge(()), Repeat({"x": torch.ones(4, 2)}), TrainSettings(steps=2), tmp_path / "run")


def test_accumulation_and_checkpointing_change_nothing(job_of, tmp_path):
    def run(name, **changes):
        job = job_of("stage1", steps=6, log_every=1, **changes)
        torch.manual_seed(0)
        objective, source, _ = recipes.BUILD["stage1"](job)
        feed = data.Feed(source, job.settings)
        if not changes.get("accumulate"):  # the two batches of a step as one
            feed.open = lambda *_: joined(source, job.settings)
        loop.fit(objective, feed, job.settings, tmp_path / name)
        return [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    def joined(source, settings):
        positions = data.Feed(source, settings).positions(0, 0, 1, 2)
        while True:
            (epoch, step, one), (_, _, two) = next(positions), next(positions)
            yield source.batch([*one, *two], epoch=epoch, step=step)

    two = run("two", accumulate=2)
    one = run("one")
    assert two == pytest.approx(one, abs=2e-5)
    assert run("recomputed", accumulate=2, checkpointing=True) == pytest.approx(two, abs=2e-5)


def test_the_log_is_cut_where_a_run_goes_on(job_of, tmp_path):
    job = job_of("stage1", steps=10, log_every=1, save_every=4)
    objective, source, _ = recipes.BUILD["stage1"](job)
    loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    (tmp_path / "run/states/step-00000010.ckpt").unlink()
    before = (tmp_path / "run/log.jsonl").read_text().splitlines()
    objective, source, _ = recipes.BUILD["stage1"](job)
    loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / "run")
    after = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in after] == list(range(1, 11))
    assert [line["loss"] for line in after] == [json.loads(line)["loss"] for line in before]
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


# ---------------------------------------------------------------- kills and processes


class Victim:
    """A process that trains in children which die when told to (tests/training_jobs.py)."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training_jobs"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=GOLDEN.parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.errors = []
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr), daemon=True).start()

    def train(self, job, kill_at=None, in_save=False, **settings):
        order = {"model": job.model, "out": str(job.out), "manifest": str(job.manifest), "kill_at": kill_at}
        print(json.dumps(order | {"in_save": in_save, "settings": settings}), file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise AssertionError("".join(self.errors[-20:]))
        found = json.loads(line)
        assert found["code"] == 0, "".join(self.errors[-20:])
        return found["signal"]


@pytest.fixture(scope="module")
def victim():
    made = Victim()
    yield made
    made.process.kill()


def undisturbed_and_killed(workshop, tmp_path, victim, model, kills):
    """The files of a run that nobody stopped, and of one killed at random steps and in saves."""
    manifest, system = workshop
    settings = {"steps": 24, "save_every": 3, "log_every": 1, "frames": 200 if model != "acoustic" else 30}
    if model == "acoustic":
        settings |= {"validate_every": 8}
    rng = np.random.default_rng(sum(map(ord, model)))
    places = {}
    for name in ("whole", "killed"):
        shutil.copytree(system, tmp_path / name)
        if model in ("ssl", "semantic", "acoustic", "stage1", "lips"):
            for part in ("ssl", "semantic_codec", "acoustic_codec", "stage1", "lips"):
                if part.startswith(model):
                    shutil.move(tmp_path / name / part, tmp_path / f"{name}-{part}")
        places[name] = make_job(model, tmp_path / name, manifest, **settings)
    assert victim.train(places["whole"], **settings) == 0
    died = 0
    for k in range(kills):
        at = int(rng.integers(2 * k, 2 * k + 3)) if kills > 3 else int(rng.integers(8 * k + 1, 8 * k + 8))
        died += victim.train(places["killed"], at, in_save=k % 3 == 2, **settings) == signal.SIGKILL
    assert victim.train(places["killed"], **settings) == 0
    return died, *(places[name] for name in ("whole", "killed"))


def same_run(one, two):
    logs = []
    for job in (one, two):
        lines = [json.loads(line) for line in (job.out / "runs" / job.model / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in line.items() if k != "seconds"} for line in lines])
        assert [line["step"] for line in lines] == list(range(1, 25))
    files = [{p.name: p.read_bytes() for p in job.folder.glob("*.safetensors")} for job in (one, two)]
    return logs[0] == logs[1] and files[0] == files[1] and bool(files[0])


@pytest.mark.parametrize("model", ["stage1", "acoustic", "vc"])
def test_killed_three_times_and_resumed_bit_for_bit(workshop, tmp_path, victim, model):
    died, one, two = undisturbed_and_killed(workshop, tmp_path, victim, model, 3)
    assert died == 3 and same_run(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_ten_times_and_resumed_bit_for_bit(workshop, tmp_path, victim, model):
    died, one, two = undisturbed_and_killed(workshop, tmp_path, victim, model, 10)
    assert died >= 8 and same_run(one, two)


@pytest.mark.parametrize(
    "model",
    ["stage1", pytest.param("ssl", marks=pytest.mark.slow), pytest.param("stage2_full", marks=pytest.mark.slow)],
)
def test_two_processes_follow_one(workshop, tmp_path, model):
    manifest, system = workshop
    losses = []
    for name, world in (("one", 1), ("two", 2)):
        shutil.copytree(system, tmp_path / name)
        settings = {
            "steps": 50,
            "log_every": 1,
            "frames": 150,
            "accumulate": 2 // world,
            "lr": 1e-3,
            "save_minutes": 99,
        }
        order = {"model": model, "out": str(tmp_path / name), "manifest": str(manifest), "settings": settings}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = command if world > 1 else [sys.executable]
        subprocess.run(
            [*command, "-m", "tests.training_jobs", json.dumps(order)], check=True, cwd=GOLDEN.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300,
        )  # fmt: skip
        lines = (tmp_path / name / "runs" / model / "log.jsonl").read_text().splitlines()
        key = "masked" if model == "ssl" else "loss"
        losses.append([json.loads(line)[key] for line in lines])
    assert len(losses[0]) == 50 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-5, rtol=0)


# ---------------------------------------------------------------- the queue


@pytest.fixture()
def small_queue(workshop, tmp_path, monkeypatch):
    manifest, system = workshop
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    shutil.copytree(system, tmp_path / "home/runs/little")
    pieces = [{"model": "stage1", "settings": {"steps": 40}}, {"model": "se", "settings": {"steps": 3}, "rank": 4}]
    path = tmp_path / "queue.json"
    queue.write(path, {"system": "little", "preset": "debug", "data": "test", "licence": "none", "pieces": pieces})
    return path, manifest


def test_queue_takes_piece_after_piece_and_writes_down_what_came_of_it(small_queue):
    path, manifest = small_queue
    part = queue.run_next(path, manifest=manifest, budget="0.001s")  # over before the first step: it takes one
    assert part["state"] == "part" and part["steps"] == 1 and part["score"]["cross_entropy"] > 0
    shutil.rmtree(queue.home(queue.read(path)) / "runs")  # the state is lost, the weights are there
    whole = queue.run_next(path, manifest=manifest)
    assert (whole["number"], whole["state"], whole["steps"]) == (0, "done", 40)
    task = queue.run_next(path, manifest=manifest)
    assert task["model"] == "se" and {"with_condition", "without"} <= set(task["score"])
    text = queue.table(queue.read(path))
    assert text.count("done") == 2 and queue.next_piece(queue.read(path)) is None
    with pytest.raises(MetisError, match="nothing is left"):
        queue.run_next(path, manifest=manifest)


def test_queue_can_be_paused(small_queue):
    path, _ = small_queue
    with pytest.raises(MetisError, match="nobody works"):
        queue.pause(path, True)
    pid = queue.home(queue.read(path)) / "queue-ssl.pid"
    pid.write_text(str(os.getpid()))  # left by a process of this number, in another container say
    with pytest.raises(MetisError, match="nobody works"):
        queue.pause(path, True)
    hold = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; time.sleep(60)", str(queue.lock_of(pid).lock_file)]
    sleeper = subprocess.Popen(command, stdout=subprocess.PIPE)
    sleeper.stdout.readline()
    pid.write_text(str(sleeper.pid))

    def state():
        return Path(f"/proc/{sleeper.pid}/stat").read_text().split()[2]

    if Path("/proc/self/stat").exists():
        for paused, letter in ((True, "T"), (False, "S")):
            assert queue.pause(path, paused) == [sleeper.pid]
            for _ in range(50):
                if state() == letter:
                    break
                time.sleep(0.05)
            assert state() == letter
    sleeper.kill()


def test_the_queue_of_nano_is_well_formed():
    path = Path(__file__).parent.parent / "recipes/nano/queue.json"
    found = queue.read(path)
    assert {entry["model"] for entry in found["pieces"]} == set(MODELS)
    for entry in found["pieces"]:
        recipes.settings_for(entry["model"], found["preset"], **entry.get("settings", {}))


def test_every_preset_has_settings_for_every_model():
    for name in ("paper", "nano", "debug"):
        for model in MODELS:
            if (name, model) not in (("paper", "ssl"), ("paper", "lips")):
                assert recipes.settings_for(model, name).steps > 0
    with pytest.raises(MetisError, match="no training settings"):
        recipes.settings_for("ssl", "huge")
    assert DEBUG.name == "debug"


# ---------------------------------------------------------------- tokens alone, on a bare machine

BARE = """
from importlib.machinery import PathFinder

MISSING = {"soundfile", "soxr", "tyro", "phonemizer", "espeakng_loader", "inflect", "speechbrain", "parselmouth", "cv2",
           "jiwer", "av", "pyroomacoustics", "faster_whisper", "IPython", "ipywidgets", "webdataset", "lhotse"}
found = PathFinder.find_spec
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in MISSING else found(name, *more)
from recipes.nano import trip
trip.main()
"""


def test_trains_from_tokens_alone_on_a_bare_machine(workshop, tmp_path, monkeypatch):
    """Packed here, trained where nothing but PyTorch is, cut into small files, brought home."""
    from recipes.nano import trip
    from recipes.nano.packed import Packed

    manifest, system = workshop
    home = tmp_path / "home"
    monkeypatch.setenv("METIS_HOME", str(home))
    shutil.copytree(manifest.parent, home / "corpora/little")
    shutil.copytree(system, home / "runs/little")
    pieces = [{"model": m, "settings": {"steps": 5}, "rank": 4} for m in ("stage1", "stage2_layer1", "tts")]
    path = tmp_path / "queue.json"
    queue.write(path, {"system": "little", "preset": "debug", "data": "d", "licence": "l", "pieces": pieces})
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack/train.safetensors").write_bytes(bytes(2_000_000))  # of an earlier packing: it takes no room
    held = trip.pack_up(tmp_path / "pack", 1.0, path)
    assert held["train"]["items"] == 8 and held["validation"]["items"] == 2
    job = make_job("stage1", home / "runs/little", home / "corpora/little/manifest.jsonl")
    packed, shards = Packed(tmp_path / "pack/train.safetensors"), job.tokens("train")
    whole = {tuple(shards.record(i)["phones"]): shards[i][1] for i in range(8)}
    for i in range(8):
        record, tokens = packed[i]
        assert np.array_equal(whole[tuple(record["phones"])], tokens)
    command = ["train", str(tmp_path / "pack"), "stage1", "stage2_layer1", "tts", "--results", str(tmp_path / "back")]
    subprocess.run(
        [sys.executable, "-c", BARE, *command, "--budget", "60s", "--largest", "0.05", "--device", "cpu"], check=True,
        cwd=GOLDEN.parent.parent, env={**os.environ, "METIS_HOME": str(tmp_path / "elsewhere")}, timeout=300,
    )  # fmt: skip
    sizes = [file.stat().st_size for file in (tmp_path / "back").rglob("*") if file.is_file()]
    assert max(sizes) <= 50_000 and len(sizes) > 6
    weights = load_file(home / "runs/little/stage1/model.safetensors")
    more = queue.read(path)
    more["pieces"].append({"model": "stage1", "settings": {"steps": 900}})
    queue.write(path, more)
    assert trip.bring_home(tmp_path / "back", path) == ["stage1", "stage2_layer1", "tts"]
    assert trip.bring_home(tmp_path / "back", path) == []  # nor does the next stage 1 become what came already
    assert queue.read(path)["pieces"].pop().get("state") is None
    queue.write(path, {**more, "pieces": queue.read(path)["pieces"][:3]})
    entries = queue.read(path)["pieces"]
    assert [e["state"] for e in entries] == ["done"] * 3 and entries[0]["score"]["cross_entropy"] > 0
    trained = load_file(home / "runs/little/stage1/model.safetensors")
    assert not torch.equal(weights["to_logit.weight"], trained["to_logit.weight"])
    small = trip.pack(shards, tmp_path / "small.safetensors", megabytes=0.007)
    assert 0 < small["items"] < 8 and small["bytes"] <= 7_000
    with pytest.raises(MetisError, match="hold no item"):
        trip.pack(shards, tmp_path / "none.safetensors", megabytes=0.0001)
    with pytest.raises(MetisError, match="from tokens alone"):
        trip.train_there(tmp_path / "pack", ["ssl"], tmp_path / "back", "1m", 15)


def test_examples_are_prepared_where_the_training_runs(job_of, monkeypatch):
    job = replace(job_of("se", steps=1), options={"passes": 1})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but the CPU was asked for
    assert recipes.train(job, device="cpu")["finished"]


def test_tasks_on_audio_train_from_codes_on_a_bare_machine(workshop, tmp_path, monkeypatch):
    """Codes become waveforms there, and those become examples: by several processes the same as by one."""
    from metis_lib.data.simulate import Rooms
    from recipes.nano import trip

    manifest, system = workshop
    home, generator = tmp_path / "home", np.random.default_rng(0)
    monkeypatch.setenv("METIS_HOME", str(home))
    corpus = home / "corpora/little"
    shutil.copytree(manifest.parent, corpus)
    shutil.copytree(system, home / "runs/little")
    (corpus / "noise").mkdir()
    rows = []
    for split in ("train", "test"):
        soundfile.write(corpus / f"noise/{split}.flac", 0.1 * generator.standard_normal(48_000), 24_000)
        rows.append({"id": split, "path": f"noise/{split}.flac", "duration": 2.0, "split": split})
    (corpus / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    room = (np.eye(1, 300)[0].astype(np.float32), 0, 0.1)
    Rooms.stack([room, room]).save(corpus)
    entry = {"model": "se", "rank": 2, "settings": {"steps": 3}, "options": {"passes": 1}}
    path = tmp_path / "queue.json"
    queue.write(path, {"system": "little", "preset": "debug", "data": "d", "licence": "l", "pieces": [entry]})
    trip.pack_up(tmp_path / "pack", 30.0, path, layers=2, hear=True)
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "there"))
    assert trip.listen(tmp_path / "pack", device="cpu") > 0
    job, _ = trip.job_there(tmp_path / "pack", "se", {}, 0)
    waves = job.waves("train")
    packed = trip.Packed(tmp_path / "pack/train.safetensors")
    for i in range(len(packed)):
        record, tokens = packed[i]
        assert tokens.shape[1] == 3 and record["speaker"] == waves.items[i]["speaker"]
        assert record["id"] == waves.items[i]["id"] and waves.length(i) == 480 * len(tokens)
    made = {}
    for workers in (0, 2):
        trip.examples(tmp_path / "pack", "se", {}, workers)
        (folder,) = (tmp_path / "there/prepared").glob("*/examples-se-1-*/train")
        made[workers] = np.load(folder / "data.npy")
        shutil.move(folder, tmp_path / f"examples-{workers}")
    assert np.array_equal(made[0], made[2]) and made[0].shape[1] == 1 + job.system.ssl.hidden_size
    command = ["train", str(tmp_path / "pack"), "se", "--results", str(tmp_path / "back"), "--device", "cpu"]
    subprocess.run(
        [sys.executable, "-c", BARE.replace('"soundfile", "soxr", ', ""), *command, "--changes", '{"steps": 4}'],
        check=True, cwd=GOLDEN.parent.parent, env={**os.environ, "METIS_HOME": str(tmp_path / "there")}, timeout=300,
    )  # fmt: skip
    monkeypatch.setenv("METIS_HOME", str(home))
    assert trip.bring_home(tmp_path / "back", path) == ["se"]
    assert queue.read(path)["pieces"][0]["steps"] == 4


def test_many_hours_stream_in_flat_memory(tmp_path):
    """The measurement of recipes/paper/stream.py in small (results/bench/stream.json has a thousand hours)."""
    from metis_lib.data.shards import Shards
    from recipes.paper import stream

    stream.write_shards(tmp_path / "shards", 20)
    Shards(tmp_path / "shards").verify()
    found = stream.stream(tmp_path / "shards", 3.0)
    assert found["hours"] >= 20 and found["items"] % stream.ITEMS == 0
    assert found["frames_per_s"] > 0 and found["growth_mb"] < 50


def test_tasks_are_scored_and_heard_in_the_log(workshop, tmp_path):
    """Tokens generated from a condition are compared, and spoken where the system has stage 2 and codec."""
    manifest, system = workshop
    shutil.copytree(system, tmp_path / "system")
    for part in ("stage2_layer1", "stage2_full"):
        recipes.train(make_job(part, tmp_path / "system", manifest, steps=1))
    for model in ("se", "tts", "stage1"):
        job = make_job(model, tmp_path / "system", manifest, steps=2)
        objective, _, _ = recipes.BUILD[model](job)
        objective.eval()
        scores, heard = objective.validate(), objective.samples()
        assert ("generated_accuracy" in scores) == (model == "se")
        assert set(heard) == {"tokens", "generated"}
        frames = int(objective.check[0]["lengths"][0])
        assert all(len(wav) == frames * 480 and rate == 24_000 for wav, rate in heard.values())
    # a model that repeats its condition is right everywhere
    job = make_job("se", tmp_path / "system", manifest)
    objective, source, _ = recipes.BUILD["se"](job)
    batch = source.batch(np.flatnonzero(source.lengths)[:2].tolist(), epoch=0, step=0)
    objective.check = [batch]
    whole = objective._encoded(batch)["tokens"]
    objective.model.generate = lambda *_, **__: whole
    assert objective.eval().validate()["generated_accuracy"] == 1.0


# ---------------------------------------------------------------- what a second reader found


def test_a_queue_goes_on_after_its_first_run_was_killed(small_queue, monkeypatch):
    path, manifest = small_queue

    class Killed(BaseException):
        pass

    def die():
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(queue, "settings_for", lambda *a, **k: recipes.settings_for(*a, **k, save_every=4))
        stop_at(patch, 10, die)
        with pytest.raises(Killed):
            queue.run_next(path, manifest=manifest)
    home = queue.home(queue.read(path))
    assert queue.read(path)["pieces"][0]["state"] == "part"
    assert [p.name for p in sorted((home / "runs/stage1/states").iterdir())] == [
        "step-00000004.ckpt",
        "step-00000008.ckpt",
    ]
    assert queue.run_next(path, manifest=manifest)["finished"]
    steps = [json.loads(line)["step"] for line in (home / "runs/stage1/log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]
    # ended, but not written down
    entries = queue.read(path)
    entries["pieces"][0] |= {"state": "part", "steps": 8}
    queue.write(path, entries)
    assert queue.run_next(path, manifest=manifest)["steps"] == 40
    path.write_text("{}")
    with pytest.raises(MetisError, match="is no queue"):
        queue.read(path)


def test_shipped_parts_are_taken_where_the_sizes_fit(small_queue, tmp_path, monkeypatch):
    path, _ = small_queue
    found = queue.read(path)
    home, shipped = queue.home(found), tmp_path / "shipped"
    shutil.copytree(home, shipped / "little")
    shutil.copytree(Path(queue.SHIPPED) / "nano" / "tasks" / "se", shipped / "little/tasks/se")
    shutil.copytree(Path(queue.SHIPPED) / "nano" / "ssl", shipped / "other/ssl")
    monkeypatch.setattr(queue, "SHIPPED", shipped)
    shutil.rmtree(home / "ssl")
    queue.bring_shipped(found)
    assert (home / "ssl/stats.safetensors").is_file() and (home / "tasks/se").is_dir()
    shutil.copytree(shipped / "other/ssl", shipped / "little/ssl", dirs_exist_ok=True)  # of another size
    shutil.rmtree(home / "ssl")
    queue.bring_shipped(found)
    assert not (home / "ssl").exists()


CUT_OFF = {"model": "ssl", "steps": 3, "score": {}, "finished": False}


def test_the_recipe_goes_from_the_queue_to_weights_and_scores(small_queue, tmp_path, monkeypatch):
    """What is left is left by a budget, then everything is trained, shipped where it is told, and judged."""
    from recipes.nano import build

    path, manifest = small_queue
    home = queue.metis_home() / "corpora" / "little"
    shutil.copytree(manifest.parent, home)
    (home / "ALL_READY").touch()
    stopped = []
    with monkeypatch.context() as patch:
        patch.setattr(build.queue, "run_next", lambda *_, **__: stopped.append(1) or CUT_OFF)
        assert build.build(path, judge=False)["left"] == 2 and stopped == [1]  # Ctrl-C: it does not begin again
    monkeypatch.setattr(build.queue, "run_next", partial(queue.run_next, manifest=manifest))
    assert build.build(path, budget="0.001s", judge=False)["left"] == 2
    done = build.build(path, target=tmp_path / "weights", judge=False)
    assert done["left"] == 0 and {"ssl", "semantic_codec", "tasks/se", "stage1"} <= set(done["sizes"])
    assert (tmp_path / "weights/tasks/se/model.safetensors").is_file() and not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(build, "LIMIT", 1000)
    with pytest.raises(MetisError, match="at most 0 MB"):
        build.ship(queue.home(queue.read(path)), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_the_recipe_from_scratch_begins_with_nothing_and_leaves_the_shipped_weights(small_queue, tmp_path, monkeypatch):
    from recipes.nano import build

    path, manifest = small_queue
    home, shipped = queue.metis_home(), tmp_path / "shipped"
    shutil.copytree(home / "runs/little", shipped / "little")
    (shipped / "little/decode.json").write_text("{}")
    for module in (queue, build):
        monkeypatch.setattr(module, "SHIPPED", shipped)
    shutil.copytree(manifest.parent, home / "corpora/little")
    (home / "corpora/little/ALL_READY").touch()
    models = ("ssl", "acoustic", "semantic", "stage1", "se", "se")
    done = {"state": "done", "steps": 7, "frames": 7, "cpu_hours": 7, "score": {"loss": 7}, "device": "H200"}
    pieces = [{"model": model, "settings": {"steps": 1}, **done} for model in models]
    pieces[4] |= {"rank": 8}
    pieces[5] |= {"rank": 2}  # goes on from rank 8
    queue.write(path, {**queue.read(path), "pieces": pieces})
    kept = [file for folder in (shipped, home / "runs/little") for file in folder.rglob("*.*")]
    before = {file: file.read_bytes() for file in kept}
    asked = []
    monkeypatch.setattr(build, "results", lambda **options: asked.append(options))
    assert build.build(path, budget="0.001s", scratch=True)["left"] == len(pieces)
    grown = home / "runs/little-scratch"
    entries = queue.read(grown / "queue.json")["pieces"]
    assert [set(entry) for entry in entries] == [{"model", "settings"}] * 4 + [{"model", "settings", "rank"}] * 2
    assert not list(grown.rglob("*.safetensors"))
    say = []
    assert build.build(path, scratch=True, say=say.append)["left"] == 0
    assert sum(line.startswith("piece") and "from step 0 to 1" in line for line in say) == len(pieces)
    parts = {str(file.parent.relative_to(grown)) for file in grown.rglob("model.safetensors")}
    assert parts == {"ssl", "acoustic_codec", "semantic_codec", "stage1", "tasks/se"}  # no lips, which are shipped
    assert all(entry["state"] == "done" and entry["steps"] == 1 for entry in queue.read(grown / "queue.json")["pieces"])
    assert (grown / "decode.json").is_file()
    assert build.build(path, scratch=True)["left"] == 0  # nothing is done twice
    assert {file: file.read_bytes() for file in before} == before
    assert all(entry["steps"] == 7 for entry in queue.read(path)["pieces"])
    for options in asked:
        assert options["model"] == str(grown) and grown in options["out"].parents and grown in options["runs"].parents


@pytest.mark.evaluation
def test_results_of_several_test_sets_are_one_document(tmp_path, monkeypatch):
    from recipes.nano import build

    monkeypatch.setattr(build.testsets, "build_synthetic", lambda *_, **__: (_ for _ in ()).throw(MetisError("corpus")))
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    with pytest.raises(MetisError, match="corpus"):  # what is missing is said before anything is judged
        build.results(tmp_path / "out", model="debug", limit=1, runs=tmp_path / "runs")
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()
    monkeypatch.undo()
    sets = {"human": ("codec",)}
    found = build.results(tmp_path / "out", model="debug", limit=1, sets=sets, runs=tmp_path / "runs", say=print)
    assert set(found["human"]["codec"]) == {"recording", "resynthesis", "stage2"}
    assert json.loads((tmp_path / "out/summary.json").read_text()) == found
    assert json.loads((tmp_path / "out/run.json").read_text())["human"]["checkpoint"] == "debug"
    kept = record.read_run(tmp_path / "out/human")  # with every utterance, without audio
    assert [len(report.read_rows(kept.folder, "codec", system)) for system in kept.summary["codec"]] == [1, 1, 1]
    assert not list(kept.folder.rglob("*.flac"))


@pytest.mark.evaluation
def test_the_pages_show_the_committed_scores(tmp_path):
    from recipes.nano import bars, build

    results = Path(__file__).parent.parent / "results"
    shutil.copytree(results / "nano", tmp_path / "nano")
    shutil.copy(results / "README.md", tmp_path)
    assert build.write_page(tmp_path / "nano").read_text() == (results / "README.md").read_text()
    summary, about = (json.loads((results / "nano" / name).read_text()) for name in ("summary.json", "run.json"))
    human = report.readme_results(
        {task: rows for task, rows in summary["human"].items() if task != "omni"}, about["human"]
    )
    assert human in (results.parent / "README.md").read_text()
    kept = record.read_run(results / "nano" / "human")
    for task, rows in kept.summary.items():
        assert summary["human"][task] == rows
        for system in rows:
            assert len(report.read_rows(kept.folder, task, system)) == rows[system]["wer"]["n"]
    # bars are computed from the scores, and a better score meets more of them
    assert {name for name, tasks in build.SETS.items() if set(tasks) <= set(summary[name])} == {
        "human",
        "unseen",
        "seen",
    }
    better = copy.deepcopy(summary["human"])
    for task in ("tts", "vc", "se", "tse", "l2s"):
        for metric in ("wer", "wer_10db"):
            better[task]["nano"].get(metric, {})["mean"] = 0.0
    before, after = ({what: met for what, _, _, met in bars.bars(rows, True)} for rows in (summary["human"], better))
    changed = {what: (before[what], after[what]) for what in before if before[what] != after[what]}
    for what in ("SE, WER at 10 dB and more", "TSE, WER", "VC, WER", "L2S, WER"):
        assert changed[what] == (False, True)
    assert changed["Omni, WER of TSE"] == changed["Omni, WER of TSE that is told the words"] == (True, False)


def test_omnis_scores_by_task(tmp_path):
    from recipes.nano import build

    assert build.omni_of(tmp_path) == {}
    (tmp_path / "omni").mkdir()
    rows = {"tts": {"mine": 1, "mine-omni": 2}, "tse": {"mine": 3, "mine-omni": 4, "mine-omni-text": 5}}
    (tmp_path / "omni/summary.json").write_text(json.dumps(rows))
    assert build.omni_of(tmp_path) == {"tts": 2, "tse": 4, "tse-text": 5}


def test_another_rank_or_mode_never_overwrites(workshop, tmp_path):
    from metis_lib.checkpoints import TaskConfig, load_config_and_card

    manifest, system = workshop
    shutil.copytree(system, tmp_path / "system")
    for part in ("stage2_layer1", "stage2_full"):
        recipes.train(make_job(part, tmp_path / "system", manifest, steps=1))
    settings = recipes.settings_for("se", "debug", steps=2)
    out = tmp_path / "mine"
    recipes.finetune("se", manifest, out, base=tmp_path / "system", rank=4, settings=settings)
    before = (out / "tasks/se/model.safetensors").read_bytes()
    for mode, rank in (("lora", 8), ("full", 0), ("adapter", 0)):
        with pytest.raises(MetisError, match="another --out"):
            recipes.finetune("se", manifest, out, base=tmp_path / "system", mode=mode, rank=rank, settings=settings)
        with pytest.raises(MetisError, match="another --out"):  # onto itself: the only copy
            recipes.finetune("se", manifest, out, base=out, mode=mode, rank=rank, settings=settings)
    with pytest.raises(MetisError, match="is finished"):
        recipes.finetune("se", manifest, out, base=tmp_path / "system", rank=4, settings=settings)
    assert (out / "tasks/se/model.safetensors").read_bytes() == before
    with pytest.raises(MetisError, match="another mode, size or rank"):
        recipes.train(replace(make_job("se", out, manifest), mode="full", rank=0), resume=False)
    less = replace(make_job("se", tmp_path / "less", manifest, steps=1), rank=2)
    shutil.copytree(out, tmp_path / "less")
    assert recipes.train(less, resume=False)["finished"]  # the nearest of a lower rank goes on
    assert load_config_and_card(tmp_path / "less/tasks/se", TaskConfig)[0].lora_rank == 2
    # a fine-tuned system is a base like any other, and its runs stay its own
    again = recipes.finetune("se", manifest, tmp_path / "next", base=out, rank=4, settings=settings)
    assert again["finished"] and again["steps"] == 2
    card = json.loads((tmp_path / "next/tasks/se/config.json").read_text())["card"]
    assert card["mode"] == "lora" and len(card["earlier"]) == 1


def test_finetuning_goes_on_from_what_its_base_has_learned(workshop, tmp_path, monkeypatch):
    """Whatever the rank; and a task that was trained here is not lost with its logs."""
    from metis_lib.models import adapt

    manifest, system = workshop
    base = tmp_path / "base"
    shutil.copytree(system, base)
    for part in ("stage2_layer1", "stage2_full"):
        recipes.train(make_job(part, base, manifest, steps=1))
    recipes.train(replace(make_job("se", base, manifest, steps=30, lr=0.01), rank=2))
    said, found = [], {}
    still = recipes.settings_for("se", "debug", steps=1, lr=0.0)
    for rank in (1, 2, 6):
        out = tmp_path / f"rank{rank}"
        scores = recipes.finetune("se", manifest, out, base=base, rank=rank, settings=still, say=said.append)
        found[rank] = scores["with_condition"]
    assert found[6] == pytest.approx(found[2], abs=2e-3), "more of what adds nothing"
    assert any("goes on from the base's LoRA of rank 2, at rank 6" in line for line in said)
    state = load_state(base / "tasks/se")
    larger, again = adapt.fit_lora(state, 6), adapt.fit_lora(adapt.fit_lora(state, 6), 2)
    for key in (key for key in state if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        assert larger[key].shape[0] == larger[other].shape[1] == 6
        for made in (larger, again):
            torch.testing.assert_close((made[other] @ made[key]).float(), (state[other] @ state[key]).float(),
                                       atol=2e-2, rtol=2e-2)  # fmt: skip
    recipes.finetune("se", manifest, tmp_path / "all", base=base, mode="full", settings=still, say=said.append)
    assert any("begins from stage 1" in line and "mode lora, not full" in line for line in said)
    shutil.rmtree(tmp_path / "rank2" / "runs")
    own = recipes.settings_for("se", "debug", steps=2)
    recipes.finetune("se", manifest, tmp_path / "mine", base=base, rank=2, settings=own)
    shutil.rmtree(tmp_path / "mine" / "runs")
    before = (tmp_path / "mine/tasks/se/model.safetensors").read_bytes()
    for mode, rank in (("lora", 4), ("full", 0)):
        with pytest.raises(MetisError, match="another --out"):
            recipes.finetune("se", manifest, tmp_path / "mine", base=base, mode=mode, rank=rank, settings=own)
    assert (tmp_path / "mine/tasks/se/model.safetensors").read_bytes() == before


def test_few_steps_come_to_their_learning_rate():
    assert recipes.settings_for("se", "paper").warmup > 200
    assert recipes.settings_for("se", "paper", steps=1000).warmup == 200
    assert recipes.settings_for("se", "paper", steps=1000, warmup=500).warmup == 500
    usual = recipes.settings_for("se", "nano")
    assert recipes.settings_for("se", "nano", steps=usual.steps).warmup == usual.warmup


def test_only_what_can_be_read_counts_as_read(workshop, tmp_path, monkeypatch):
    manifest, system = workshop
    rows = recipes.read_manifest(manifest)
    kept = [row for row in rows if row.split == "train"][:2]
    mute = [replace(row, text="" if row.split == "train" and row not in kept else row.text, root=Path())
            for row in rows]  # fmt: skip
    shutil.copytree(manifest.parent / "audio", tmp_path / "audio")
    write_manifest(tmp_path / "manifest.jsonl", mute)
    said = []
    monkeypatch.setattr(recipes, "train", lambda job, say, **more: said.append(job.settings.steps) or {})
    times = {}
    for name in ("tts", "se"):
        settings = recipes.settings_for(name, "debug", steps=4000, frames=400)
        recipes.finetune(name, tmp_path / "manifest.jsonl", tmp_path / name, base=system, say=said.append,
                         settings=settings, shorten=True)  # fmt: skip
        times[name] = said[-1]
    part = sum(row.duration for row in kept) / sum(row.duration for row in rows if row.split == "train")
    assert times["tts"] == pytest.approx(part * times["se"], abs=1.5)


def test_extraction_says_beforehand_that_it_needs_a_second_speaker(workshop, tmp_path):
    manifest, system = workshop
    rows = [replace(row, speaker="a" if row.split == "validation" else row.speaker)
            for row in recipes.read_manifest(manifest)]  # fmt: skip
    write_manifest(tmp_path / "manifest.jsonl", rows)
    for name in ("tse", "omni"):
        with pytest.raises(MetisError, match="two known speakers in validation.*--splits"):
            recipes.finetune(name, tmp_path / "manifest.jsonl", tmp_path / "out", base=system)
    broken = tmp_path / "broken.jsonl"
    first, *rest = (tmp_path / "manifest.jsonl").read_text().splitlines()
    broken.write_text("\n".join([json.dumps(json.loads(first) | {"note": 1}), *rest]))
    with pytest.raises(MetisError, match="note"):  # and is not taken for a list in some other form
        recipes.finetune("se", broken, tmp_path / "out", base=system)


def test_prepared_data_belongs_to_the_recordings_and_not_to_their_names(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    folders = []
    for number in range(2):  # two microphones: the same names, the same lengths, byte for byte the same manifest
        folder = shutil.copytree(workshop[0].parent, tmp_path / str(number))
        for path in (folder / "audio").glob("*.wav"):
            wav, rate = soundfile.read(path)
            soundfile.write(path, wav * (0.9, 0.3)[number], rate)
            os.utime(path, (1_000_000 + number,) * 2)
        folders.append(folder / "manifest.jsonl")
    assert folders[0].read_bytes() == folders[1].read_bytes()
    loud, quiet = (data.waves_of(manifest, "train") for manifest in folders)
    assert np.abs(quiet[0]).max() < 0.5 * np.abs(loud[0]).max()
    assert data.prepared(folders[0]) != data.prepared(folders[1])
    before = data.prepared(folders[0])
    (tmp_path / "0/audio/3.wav").unlink()  # it was read; whether it is still there does not matter
    data._prepared.cache_clear()
    assert data.prepared(folders[0]) == before
    os.utime(tmp_path / "0/audio/4.wav", (5_000_000, 5_000_000))  # written anew in its place
    data._prepared.cache_clear()
    assert data.prepared(folders[0]) not in (before, data.prepared(folders[1]))


def test_a_recording_that_was_missing_is_read_when_it_is_there(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv("METIS_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(workshop[0].parent, tmp_path / "corpus")
    (folder / "audio/2.wav").rename(tmp_path / "2.wav")
    with pytest.warns(UserWarning, match="1 of 8 recordings cannot be read"):
        assert not len(data.waves_of(folder / "manifest.jsonl", "train")[2])
    (tmp_path / "2.wav").rename(folder / "audio/2.wav")
    data._prepared.cache_clear()
    assert len(data.waves_of(folder / "manifest.jsonl", "train")[2])


def test_a_run_that_goes_on_with_other_data_says_so_and_forgets_its_best(workshop, tmp_path, monkeypatch):
    manifest, system = workshop
    fewer = tmp_path / "fewer" / "manifest.jsonl"
    shutil.copytree(manifest.parent / "audio", fewer.parent / "audio")
    write_manifest(fewer, [replace(row, root=Path()) for row in recipes.read_manifest(manifest) if row.id != "0"])
    out, said = shutil.copytree(system, tmp_path / "out"), []
    job = make_job("stage1", out, manifest, steps=8, best="cross_entropy", validate_every=2)
    asked = iter([False] * 3 + [True])
    with monkeypatch.context() as patched:
        patched.setattr(loop, "stop_asked", lambda: contextlib.nullcontext(lambda: next(asked)))
        assert recipes.train(job)["steps"] == 4
    state = max((out / "runs/stage1/states").iterdir())
    asked = iter([True])
    with monkeypatch.context() as patched:
        patched.setattr(loop, "stop_asked", lambda: contextlib.nullcontext(lambda: next(asked)))
        recipes.train(replace(job, manifest=fewer), say=said.append)
    line = next(line for line in said if "goes on with others" in line)
    assert data.prepared(manifest).name in line and data.prepared(fewer).name in line and "mode" not in line
    assert state.exists()
    told = []
    recipes.train(replace(job, manifest=fewer), say=told.append)
    assert not any("goes on with others" in line for line in told)
    whole = [json.loads(line) for line in (out / "runs/stage1/log.jsonl").read_text().splitlines()]
    card = json.loads((out / "stage1/config.json").read_text())["card"]["scores"]
    later = [line["validation"]["cross_entropy"] for line in whole if line["step"] in (6, 8) and "validation" in line]
    assert card["best_step"] in (6, 8) and card["cross_entropy"] == min(later)


def test_an_added_language_is_prepared_anew(monkeypatch):
    assert data.languages_mark() == ""
    monkeypatch.setitem(data.VOICES, "es", "es")
    assert data.languages_mark() == "-es"


@pytest.mark.parametrize("kind", ["se", "lips"])
def test_one_bad_recording_does_not_stop_a_run(workshop, tmp_path, monkeypatch, kind):
    """Also where it is a batch by itself; and after a stop the same others take its place."""
    manifest, system = workshop
    job = make_job(kind, system, manifest, frames=1)
    source = recipes.BUILD[kind](job)[1]
    bad, whole = int(np.flatnonzero(source.lengths)[0]), source.batch
    if kind == "se":
        made = source.made["se"].make
        refuse = lambda i, generator: made(i, generator) if i != bad else refused()  # noqa: E731
        monkeypatch.setattr(source.made["se"], "make", refuse)
    else:
        timed = source.timed
        monkeypatch.setattr(source, "timed", lambda i: timed(i) if i != bad else refused())

    def refused():
        raise MetisError("it is silent")

    first, again = (whole([bad], epoch=0, step=3) for _ in range(2))
    assert first["ids"] == again["ids"] != [source.waves.items[bad]["id"] if kind == "lips" else source.pool.ids[bad]]
    monkeypatch.setattr(data, "spare", lambda *_: [])
    with pytest.raises(MetisError, match="the last one for: it is silent"):
        whole([bad], epoch=0, step=3)


def test_finetuning_writes_the_best_weights_or_the_last_ones(workshop, tmp_path, monkeypatch):
    from metis_lib.training import generative

    manifest, system = workshop
    shutil.copytree(system, tmp_path / "system")
    for part in ("stage2_layer1", "stage2_full"):
        recipes.train(make_job(part, tmp_path / "system", manifest, steps=1))
    held = []

    def validate(self):
        weights = {key: p.detach().clone() for key, p in self.model.named_parameters() if p.requires_grad}
        held.append(weights)
        return {"cross_entropy": [3.0, 1.0, 2.0, 4.0][len(held) - 1]}

    monkeypatch.setattr(generative.Stage1Training, "validate", validate)
    settings = recipes.settings_for("se", "debug", steps=40)  # every 10 steps, as the preset does not say how often
    for keep, number in (("best", 1), ("last", 0)):
        held.clear()
        out = tmp_path / keep
        scores = recipes.finetune("se", manifest, out, base=tmp_path / "system", rank=4, settings=settings, keep=keep)
        assert len(held) == (4 if keep == "best" else 1) and scores["finished"] and scores["steps"] == 40
        card, state = json.loads((out / "tasks/se/config.json").read_text())["card"], load_state(out / "tasks/se")
        assert card["scores"].get("best_step") == (20 if keep == "best" else None)
        assert card["scores"]["cross_entropy"] == (1.0 if keep == "best" else 3.0)
        changed = [key for key in held[number] if ".lora_B" in key]
        assert changed
        for key in changed:
            assert torch.equal(held[number][key].bfloat16(), state[f"model.{key}"].bfloat16()), key
        if keep == "best":
            assert any(not torch.equal(held[3][key].bfloat16(), state[f"model.{key}"].bfloat16()) for key in changed)
    held.clear()
    asked = replace(settings, validate_every=20)
    recipes.finetune("se", manifest, tmp_path / "asked", base=tmp_path / "system", rank=4, settings=asked)
    assert len(held) == 2
    for often, times in ((0, 1), (5, 8)):
        held.clear()
        monkeypatch.setattr(
            generative.Stage1Training, "validate", lambda self: held.append(1) or {"cross_entropy": 1.0 / len(held)}
        )
        recipes.finetune(
            "se", manifest, tmp_path / f"each{often}", base=tmp_path / "system", rank=4, settings=settings,
            validate_every=often,
        )  # fmt: skip
        assert len(held) == times, "0 is the end alone"
    with pytest.raises(MetisError, match="keep the 'best' or the 'last'"):
        recipes.finetune("se", manifest, tmp_path / "x", base=tmp_path / "system", keep="first")


def test_codebooks_are_fitted_after_the_step_that_is_asked_for(job_of, monkeypatch):
    sizes = preset("debug")
    acoustic = replace(sizes.acoustic, codebook_search="distance", codebook_dim=sizes.acoustic.latent_dim)
    job = replace(job_of("acoustic", steps=6), system=replace(sizes, acoustic=acoustic))
    shutil.rmtree(job.folder)
    fitted = []
    fit = tok.ResidualVQ.fit
    monkeypatch.setattr(
        tok.ResidualVQ, "fit", lambda self, latents, g: fitted.append((len(latents), fit(self, latents, g)))
    )
    recipes.train(replace(job, options={"fit_every": 4, "follow": 0.1}))
    frames = job.settings.frames
    assert len(fitted) == 1 and 0 < fitted[0][0] <= 4 * frames and fitted[0][1] < 0.5
    twice = replace(job, settings=replace(job.settings, accumulate=2), options={"fit_every": 4})
    shutil.rmtree(job.out / "runs")
    shutil.rmtree(job.folder)
    recipes.train(twice)
    assert len(fitted) == 2, "two batches a step change nothing about when"


def test_codebooks_that_were_just_fitted_stay(job_of):
    """What was heard before belongs to the old axes: nothing follows it, and no code is idle yet."""
    sizes = preset("debug").acoustic
    codec = tok.AcousticCodec(replace(sizes, codebook_search="distance", codebook_dim=sizes.latent_dim)).train()
    codec.decoder.quantizer.track_usage()
    codec(torch.randn(2, 9600) * 0.1)
    quantizer = codec.decoder.quantizer
    for layer in quantizer.quantizers:
        layer.idle += 100
    quantizer.fit(torch.randn(4 * sizes.codebook_size, sizes.latent_dim))
    before = [layer.codebook.weight.clone() for layer in quantizer.quantizers]
    for layer in quantizer.quantizers:
        layer.follow(0.5)
    assert quantizer.revive(50) == 0
    assert all(torch.equal(a, layer.codebook.weight) for a, layer in zip(before, quantizer.quantizers, strict=True))


def test_a_decoder_alone_hears_the_layers_that_the_codec_would(job_of, monkeypatch):
    sizes = preset("debug")
    whole = replace(sizes, acoustic=replace(sizes.acoustic, quantizer_dropout=1.0))
    objective = tok.AcousticTraining(whole.acoustic, decoder_only=True)
    heard, quantize = [], objective.codec.decoder.quantizer.forward
    monkeypatch.setattr(
        objective.codec.decoder.quantizer, "forward", lambda x, layers=None: heard.append(layers) or quantize(x, layers)
    )
    batch = {"wav": 0.1 * torch.randn(8, 9600)}
    objective.train()(batch)
    objective.eval()(batch)
    assert heard[0] is not None and len(heard[0]) == 8 and heard[1] is None


def test_a_teacher_of_recordings_that_went_away(tmp_path, monkeypatch):
    from metis_lib.data.store import FlatStore
    from metis_lib.training import teacher

    class Loud:
        def __call__(self, wav):
            return np.full((len(wav) // 480, teacher.WIDTH), np.abs(wav).mean(), np.float16)

    monkeypatch.setattr(teacher, "Teacher", Loud)
    pieces = [({"id": str(i)}, np.full(n, 3000 * (i + 1), np.int16)) for i, n in enumerate((4800, 0, 9600))]
    waves = FlatStore.write(tmp_path / "waves", iter(pieces))
    taught = teacher.teach(waves, tmp_path / "taught")
    assert [taught.store.length(i) for i in range(3)] == [10, 0, 20]
    held_out = teacher.teach(FlatStore.write(tmp_path / "more", iter(pieces[2:])), tmp_path / "held", taught)
    assert held_out.mean is taught.mean and held_out.std is taught.std


def test_a_decoder_may_learn_alone_and_the_tokens_stay(job_of):
    job = job_of("acoustic", steps=30)
    recipes.train(job)
    before = recipes.load_state(job.folder)
    learns = {"decoder_only": True, "dropout": [0.5, 3, 12]}
    again = replace(job, options=learns, settings=replace(job.settings, steps=60, lr=2e-3))
    objective, source, _ = recipes.BUILD["acoustic"](again)
    objective.eval()  # all layers are heard
    batch = data.Feed(source, again.settings).held_out(1)[0]
    errors = []
    recipes._warm(again, objective)
    errors.append(float(objective(batch)["mel"].detach()))
    codes = objective.codec.encode(batch["wav"])
    shutil.rmtree(job.out / "runs")
    recipes.train(again)
    after = recipes.load_state(job.folder)
    changed = {key for key in after if not torch.equal(before[key], after[key])}
    assert changed and all(key.startswith("decoder.model.") for key in changed)
    recipes._warm(again, objective)
    errors.append(float(objective(batch)["mel"].detach()))
    assert errors[1] < 0.97 * errors[0]
    assert torch.equal(objective.codec.encode(batch["wav"]), codes)


def test_a_task_begins_with_what_others_have_learned(job_of):
    for name, rank in (("vc", 2), ("tts", 4)):
        job = job_of(name, steps=3)
        recipes.train(replace(job, rank=rank))
    omni = job_of("omni")
    begun = {}
    for begin in ("", "vc+tts", "tts+vc"):
        torch.manual_seed(0)
        objective, _, saved = recipes.BUILD["omni"](replace(omni, rank=2, options={**omni.options, "begin": begin}))
        assert recipes._warm(replace(omni, rank=2, options={**omni.options, "begin": begin}), objective) == {}
        begun[begin] = saved()["state"]
    vc, tts = (recipes.load_state(omni.out / f"tasks/{name}") for name in ("vc", "tts"))
    alike = lambda a, b: torch.equal(a.float(), b.bfloat16().float())  # noqa: E731
    adapter, text = "cond_adapter.in_linear.0.weight", "phone_emb.weight"
    adapter = next(key for key in vc if key.startswith(adapter.rsplit(".", 2)[0]) and key.endswith("weight"))
    both = begun["vc+tts"]
    assert alike(vc[adapter], both[adapter]) and alike(tts[text], both[text])
    assert not alike(vc[adapter], begun[""][adapter]) and not alike(tts[text], begun[""][text])
    lora = next(key for key in vc if ".lora_B." in key and vc[key].abs().max() > 0)
    other = lora.replace(".lora_B.", ".lora_A.")
    assert both[lora].shape == vc[lora].shape and not alike(vc[lora], both[lora])
    assert alike(vc[lora], begun["tts+vc"][lora]), "of what several have, the last one's"
    reduced = recipes.adapt.fit_lora(tts, 2)
    torch.testing.assert_close(both[lora] @ both[other], (reduced[lora] @ reduced[other]).float(), rtol=0.05, atol=1e-4)
    with pytest.raises(MetisError, match="begin"):
        recipes.train(replace(omni, options={**omni.options, "begin": "singing"}))
    with pytest.raises(MetisError, match="begin"):
        recipes.train(replace(omni, options={**omni.options, "begin": "tse"}))
    document = json.loads((omni.out / "tasks/vc/config.json").read_text())
    document["card"]["mode"] = "full"
    (omni.out / "tasks/vc/config.json").write_text(json.dumps(document))
    with pytest.raises(MetisError, match="whose mode is full"):
        recipes.train(replace(omni, options={**omni.options, "begin": "vc"}))


def test_layers_are_dropped_as_the_option_says_and_only_in_training(monkeypatch):
    objective = tok.AcousticTraining(preset("debug").acoustic, dropout=(0.6, 2, 5))
    quantizer, seen = objective.codec.decoder.quantizer, []
    forward = quantizer.forward
    monkeypatch.setattr(
        quantizer, "forward", lambda z, layers=None, **more: seen.append(layers) or forward(z, layers, **more)
    )
    torch.manual_seed(0)  # as the loop does before each step
    batch = {"wav": 0.1 * torch.randn(60, 4800)}
    objective.train()(batch)
    objective.eval()(batch)
    heard = seen[0].bincount(minlength=13)
    assert heard[2:6].min() > 0 and 20 <= heard[2:6].sum() <= 50
    assert heard[2:6].sum() + heard[12] == 60 and seen[1] is None
    with pytest.raises(MetisError, match="1 <= fewest <= most <= 12"):
        tok.AcousticTraining(preset("debug").acoustic, dropout=(0.5, 3, 13))


def test_unknown_options_and_settings_are_named(job_of):
    with pytest.raises(MetisError, match=r"no option 'adversarial_form'; it has: .*adversarial_from"):
        recipes.train(replace(job_of("acoustic"), options={"adversarial_form": 5}))
    with pytest.raises(MetisError, match="must not be 'none'"):
        recipes.train(replace(job_of("acoustic"), options={"adversarial_from": "none"}))
    with pytest.raises(MetisError, match="unknown task 'sse'; choose one of tts"):
        recipes.finetune("sse", "nothing.jsonl", "nowhere")
    with pytest.raises(MetisError, match="unknown training settings: step"):
        recipes.settings_for("ssl", "nano", step=5)
    for bad in ({"steps": 0}, {"seed": -1}, {"lr": -1.0}):
        with pytest.raises(MetisError, match="must"):
            recipes.settings_for("ssl", "nano", **bad)


def test_checkpointing_reaches_the_conformer(job_of, tmp_path):
    losses = []
    for checkpointing in (False, True):
        job = job_of("ssl", steps=3, log_every=1, checkpointing=checkpointing)
        torch.manual_seed(0)
        objective, source, _ = recipes.BUILD["ssl"](job)
        loop.fit(objective, data.Feed(source, job.settings), job.settings, tmp_path / str(checkpointing))
        lines = (tmp_path / str(checkpointing) / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["masked"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_one_voice_alone_can_be_enhanced(workshop, tmp_path):
    """Babble of nobody is no babble; other languages are not read as English."""
    from metis_lib.data.simulate import Noises, Recording
    from metis_lib.data.store import read_manifest, store_waves

    noises = Noises(speech=[Recording("me", np.ones(100, np.int16))], weights=(0, 1, 0, 0))
    assert noises.sample(50, np.random.default_rng(0), exclude="me")[1] == "pink"
    rows = [replace(row, language="de" if i else "en") for i, row in enumerate(read_manifest(workshop[0])[:2])]
    items = store_waves(rows, tmp_path / "waves").items
    assert items[0]["text"] == rows[0].text and items[1]["text"] == ""


def test_texts_without_a_sound_are_left_out(workshop, tmp_path):
    from metis_lib.data.examples import Pool, Sources, Utterance

    rng = np.random.default_rng(0)
    said = [Utterance(str(i), "s", 0.1 * rng.standard_normal(36_000).astype(np.float32), text)
            for i, text in enumerate(("...", "Go home."))]  # fmt: skip
    source = data.Adaptation(Pool(said), Sources(), {"tts": 1.0}, dropout=0.0)
    assert source.lengths.tolist()[0] == 0 < source.lengths[1]
    assert source.batch([1], epoch=0, step=0)["phones"].shape[1] > 3


def test_a_late_warm_up_is_the_same_after_a_stop(job_of, tmp_path):
    """Weights without a state warm up anew, also where that is cut off."""
    rates = []
    for name, cuts in (("whole", ()), ("cut", (56,))):
        job = job_of("stage1", steps=70, warmup=10, log_every=1)
        for until in (*cuts, None):
            objective, source, _ = recipes.BUILD["stage1"](job)
            feed = data.Feed(source, job.settings)
            if until:
                opened = feed.open

                def stopping(first, *rest, opened=opened, until=until):
                    for at, batch in enumerate(opened(first, *rest), first):
                        if at == until:
                            os.kill(os.getpid(), signal.SIGTERM)
                        yield batch

                feed.open = stopping
            loop.fit(objective, feed, job.settings, tmp_path / name, first=50)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        rates.append([json.loads(line)["lr"] for line in lines])
    assert rates[0] == rates[1] and len(rates[0]) == 20 and rates[0][0] < 0.2 * max(rates[0])


def test_devices_that_are_not_there(job_of):
    for device in ("cuda:7", "fridge"):
        with pytest.raises(MetisError, match="fridge|cuda"):
            recipes.train(job_of("stage1"), device=device)


def test_films_are_taken_where_there_are_any(workshop, tmp_path, monkeypatch):
    from metis_lib.data import video
    from metis_lib.data.store import read_manifest, store_waves

    rows = read_manifest(workshop[0])[:2]
    rows = [replace(rows[0], video="talk.mp4", text="", start=0.2), rows[1]]
    film = np.random.default_rng(0).integers(0, 255, (200, 96, 96), dtype=np.uint8)
    monkeypatch.setattr(video, "read_lips", lambda path: film if path.endswith("talk.mp4") else None)
    source = data.Lips(store_waves(rows, tmp_path / "waves"), seed=1)
    batch = source.batch([0, 1], epoch=0, step=0)
    pictures = (int(batch["lengths"][0]) + 1) // 2
    assert np.array_equal(batch["video"][0, :pictures].numpy(), film[5 : 5 + pictures])  # 0.2 s into the film
    assert batch["said"][0] == [] and len(batch["said"][1]) > 5 and batch["video"].shape[2:] == (96, 96)


def test_resume_is_a_word_of_the_command_line(workshop, tmp_path, capsys):
    manifest, system = workshop
    shutil.copytree(system, tmp_path / "system")
    command = [
        "train",
        "part",
        "stage1",
        "--preset",
        "debug",
        "--out",
        str(tmp_path / "system"),
        "--data",
        str(manifest),
    ]
    command += ["--steps", "3000", "--device", "cpu", "--json"]
    assert cli.main([*command, "--budget", "0.5s"]) == 0
    first = json.loads(capsys.readouterr().out)["scores"]
    assert not first["finished"]
    assert cli.main([*command, "--budget", "0.5s", "--resume"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["steps"] > first["steps"]
    assert cli.main([*command, "--resume", "--fresh"]) == 2
    assert "not both" in capsys.readouterr().err
    assert cli.main([*command[:-5], "--steps", "2", "--device", "cpu", "--json", "--fresh"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"]["steps"] == 2


def test_texts_go_by_the_phone_table_of_the_system(job_of):
    """A converted system speaks by the released table, beside its parts as ``vocab.json``."""
    job = job_of("tts")
    shutil.copy(GOLDEN / "vocab.json", job.out / "vocab.json")
    objective, source, _ = recipes.BUILD["tts"](job)
    assert source.tokenizer.size == 1024 and len(objective.model.phone_emb.weight) == 1024
    released, record = source.tokenizer, source.shards.record(0)
    assert source._ids(record) == released.encode(record["text"]) != data.PhoneTokenizer().encode(record["text"])
    heard = recipes.task_source(replace(job, options={**job.options, "audio": True}), "train", 0, job.frozen, None)
    assert heard.tokenizer.size == 1024


def test_nobody_knows_who_is_no_voice(job_of):
    """Recordings of an unknown speaker are not each other's prompts."""
    from metis_lib.data.store import UNKNOWN
    from metis_lib.training.prepared import Voices

    job = job_of("tts")
    shards = job.tokens("train")
    known = data.Tokens(shards, text=True, joined=1.0)
    assert known.voices
    record = shards.record
    shards.record = lambda i: record(i) | {"speaker": UNKNOWN}
    assert not data.Tokens(shards, text=True, joined=1.0).voices

    class Store:
        items = [{"id": "a"}, {"id": "b"}]

        def length(self, i):
            return 100

        def __getitem__(self, i):
            return np.full((100, 3), i)

    same, nobody = Voices(Store(), dict.fromkeys("ab", "anna")), Voices(Store(), dict.fromkeys("ab", UNKNOWN))
    rng = np.random.default_rng(0)
    assert same.before("a", 100, 50, rng)[0][0, 0] == 1 and nobody.before("a", 100, 50, rng)[0][0, 0] == 0


def test_texts_with_sounds_that_the_table_lacks_are_not_learned(job_of):
    job = job_of("tts")
    shards = job.tokens("train")
    record = shards.record
    shards.record = lambda i: record(i) | ({"phones": [*record(i)["phones"], "q'"]} if i == 2 else {})
    source = data.Tokens(shards, text=True)
    assert source.lengths[2] == 0 and (np.delete(source.lengths, 2) > 0).any()


def test_texts_are_read_in_their_language(workshop, tmp_path, monkeypatch):
    from metis_lib.data import store
    from metis_lib.data.store import read_manifest, store_waves

    monkeypatch.setitem(store.VOICES, "de", "de")
    rows = [replace(row, text="Die schöne Sache.", language=lang)
            for row, lang in zip(read_manifest(workshop[0])[:2], ("en", "de"), strict=True)]  # fmt: skip
    asked = []

    class Table(data.PhoneTokenizer):
        def encode(self, text, language="en"):
            asked.append(language)
            return [1]

    monkeypatch.setattr(data, "PhoneTokenizer", Table)
    waves = store_waves(rows, tmp_path / "waves")
    data.Speech(waves)
    data.Adaptation(data.Pool(waves), data.Sources(), {"tts": 1.0}, tokenizer=Table())
    assert asked == ["en", "de"] * 2


def test_a_fine_tuning_that_died_early_is_run_again(workshop, tmp_path, monkeypatch):
    """Killed before it wrote its own part: what stands there is the base's, linked."""
    manifest, system = workshop
    base, out = tmp_path / "base", tmp_path / "mine"
    shutil.copytree(system, base)
    recipes.train(make_job("se", base, manifest, steps=1))  # of rank 4
    settings = recipes.settings_for("se", "debug", steps=2)

    def full(*_):
        raise MetisError("the disk is full")

    monkeypatch.setattr(recipes, "save_part", full)
    with pytest.raises(MetisError, match="disk is full"):
        recipes.finetune("se", manifest, out, base=base, rank=8, settings=settings)
    assert (out / "runs/se").is_dir()
    monkeypatch.undo()
    assert recipes.finetune("se", manifest, out, base=base, rank=8, settings=settings)["finished"]


def test_only_pieces_of_one_model(small_queue):
    path, _ = small_queue
    found = queue.read(path)
    assert queue.next_piece(found, "se") == 1 and queue.next_piece(found, "tts") is None
    found["pieces"][1]["state"] = "done"
    assert queue.next_piece(found, "se") is None and queue.next_piece(found) == 0


def test_examples_belong_to_the_noise_that_is_in_them(job_of, tmp_path):
    job = replace(job_of("se"), options={"passes": 1})
    corpus = tmp_path / "corpus"
    shutil.copytree(job.manifest.parent, corpus)
    made = []
    for noisy in (False, True):
        if noisy:
            soundfile.write(corpus / "hum.wav", 0.1 * np.random.default_rng(0).standard_normal(72_000), 24_000)
            line = {"id": "hum", "path": "hum.wav", "split": "train"}
            (corpus / "noise.jsonl").write_text(json.dumps(line) + "\n")
        _, source, _ = recipes.BUILD["se"](replace(job, manifest=corpus / "manifest.jsonl"))
        made.append(source.store.folder)
    assert made[0] != made[1] and made[1].parent.name.startswith(made[0].parent.name)


def test_a_task_like_conversion_learns_without_its_prompt_too(job_of, monkeypatch):
    from metis_lib.data import examples
    from metis_lib.tasks import TASKS

    job = job_of("vc")
    monkeypatch.setitem(TASKS, "accent", replace(TASKS["vc"], name="accent", like="vc", simulate=examples.vc))
    pool = data.Pool(job.waves("train"))
    source = data.Adaptation(pool, job.sources("train", pool), {"accent": 1.0}, dropout=0.5)
    lost = [~source.batch([0, 1, 2], epoch=e, step=0)["exists"][:, 0] for e in range(8)]
    assert 4 <= int(torch.cat(lost).sum()) <= 20


def test_a_film_that_ends_too_early_is_left_out(workshop, tmp_path, monkeypatch):
    from metis_lib.data import video
    from metis_lib.data.store import read_manifest, store_waves

    rows = read_manifest(workshop[0])[:2]
    rows = [replace(rows[0], video="talk.mp4", text="", start=0.2), rows[1]]
    monkeypatch.setattr(video, "read_lips", lambda path: np.zeros((3, 96, 96), np.uint8))
    monkeypatch.chdir(tmp_path)
    waves = store_waves(rows, tmp_path / "waves")
    assert os.path.isabs(waves.items[0]["video"])
    assert data.Lips(waves, seed=1).batch([0, 1], epoch=0, step=0)["ids"] == [rows[1].id]
    assert data.Lips(waves, seed=1).batch([0], epoch=0, step=0)["ids"] == [rows[1].id], "the other in its place"
    with pytest.raises(MetisError, match="ends before 0.2 s"):
        data.Lips(store_waves(rows[:1], tmp_path / "one"), seed=1).batch([0], epoch=0, step=0)


def test_two_systems_are_never_mixed(workshop, tmp_path):
    _, system = workshop
    copy_of, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(system, copy_of)
    shutil.copytree(system, other)
    torch.manual_seed(5)
    recipes.save_part(other / "stage1", recipes.Stage1(DEBUG.stage1), DEBUG.stage1)
    (other / "vocab.json").write_text("{}")
    out = tmp_path / "out"
    recipes.derive(system, out)
    recipes.derive(copy_of, out)  # the same bytes
    with pytest.raises(MetisError, match="stage1 of another system"):
        recipes.derive(other, out)
    assert not (out / "vocab.json").exists()
    (out / "ssl/config.json").write_text("mine now")
    assert (system / "ssl/config.json").read_text() != "mine now"  # a copy: people edit it


def test_processes_share_tensors_in_place(monkeypatch):
    """An object sent by Fabric would be opened on the first GPU by everybody."""
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: sent.append((tensor.data_ptr(), source)))
    codec = tok.AcousticCodec(preset("debug").acoustic)
    codec.decoder.quantizer.track_usage()
    fabric = SimpleNamespace(world_size=2, all_reduce=lambda x, reduce_op: x)
    tok.revive(codec.decoder.quantizer, 5, 9, fabric, TrainSettings(steps=1))
    layers = codec.decoder.quantizer.quantizers
    assert sent == [(t.data_ptr(), 0) for layer in layers for t in (layer.codebook.weight, layer.idle)]


def test_little_speech_is_not_read_a_thousand_times_in_silence(workshop, tmp_path, monkeypatch):
    manifest, system = workshop
    said = []
    monkeypatch.setattr(recipes, "train", lambda job, say, **more: said.append(job.settings.steps) or {})
    rows = [row for row in recipes.read_manifest(manifest) if row.split == "train" and row.duration >= 1]
    seconds = sum(row.duration for row in rows)
    steps = round(60 * seconds * 50 / 400)
    settings = recipes.settings_for("se", "debug", steps=steps, frames=400)
    recipes.finetune("se", manifest, tmp_path / "out", base=system, rank=4, settings=settings, say=said.append)
    assert said[-1] == steps and f"{steps} steps read" in said[-2] and "60 times" in said[-2]
    few = round(steps / 2)  # sixty times are twice thirty
    assert f"about {few} read them 30 times" in said[-2]
    data = ["--task", "se", "--data", str(manifest), "--from", str(system), "--lora", "4", "--frames", "400"]
    for asked, least, most in (([], few - 1, few + 1), (["--steps", str(steps)], steps, steps)):
        assert cli.main(["train", "finetune", *data, *asked, "--out", str(tmp_path / f"cli{len(asked)}")]) == 0
        assert least <= said[-1] <= most, "fewer steps by itself, and what is asked for as it is"
    recipes.finetune("se", manifest, tmp_path / "whole", base=system, rank=4, say=said.append)
    assert said[-1] < recipes.settings_for("se", "nano").steps and "30 times (another number: --steps)" in said[-2]
    run = tmp_path / "stopped/runs/se"
    (run / "states").mkdir(parents=True)
    (run / "states/step-00000050.ckpt").touch()
    (run / "settings.json").write_text(json.dumps({"steps": 4321, "warmup": 7}))
    for more, steps in (({}, 4321), ({"resume": False}, said[-1])):
        recipes.finetune("se", manifest, tmp_path / "stopped", base=system, rank=4, say=said.append, **more)
        assert said[-1] == steps, "what was stopped goes on as it began"


def test_stage_two_trains_its_first_layers_most(job_of):
    """As released: layer j in proportion to N - j + 1 (of those that the net makes), one a step."""
    job = job_of("stage2_full")
    _, source, _ = recipes.BUILD["stage2_full"](job)
    assert source.masking == gen.STAGE2_MASKING
    weights = np.array(Stage2(job.system.stage2_full).layer_weights())
    drawn = [source.batch([0], epoch=0, step=step)["layer"] for step in range(1500)]
    shares = np.bincount(drawn, minlength=len(weights)) / len(drawn)
    assert abs(shares - weights).max() < 0.04 and shares[0] == 0 and weights[1] > weights[-1] > 0
    assert weights[1] / weights[-1] == pytest.approx(len(weights) / 2)


@pytest.mark.parametrize("model", ["tts", "vc", "tse", "se", "omni"])
def test_what_guidance_varies_is_dropped_in_training_alone(job_of, model):
    """One in ten (Metis section 4.2); nothing of enhancement, and nothing in what is held out."""
    job = job_of(model)
    for passes in (0, 1):
        told = replace(job, options=job.chosen | {"passes": passes})
        for split, wanted in (("train", TASKS[model].condition_dropout), ("validation", 0.0)):
            source = recipes.task_source(told, split, 0, None if model == "tts" else told.frozen, None)
            parts = [feed.source for feed in source.feeds.values()] if hasattr(source, "feeds") else [source]
            names = list(source.feeds) if hasattr(source, "feeds") else [model]
            for name, part in zip(names, parts, strict=True):
                assert part.dropout == (0.0 if name == "se" and passes else wanted), (name, passes, split)
            if model == "omni":
                odds = dict(zip(names, source.shares.tolist(), strict=True)) if passes else source.odds
                assert odds == TASKS["omni"].mixture


def test_the_floor_of_pre_training_is_an_option(job_of):
    job = job_of("stage1")
    for floor, options in ((0.0, {}), (0.2, {"floor": 0.2})):
        _, source, _ = recipes.BUILD["stage1"](replace(job, options=options))
        assert source.masking.ratio_floor == floor and source.masking.prompt_probability == 0.8


def test_nothing_is_seen_of_the_prompt_of_a_film():
    """Metis section 4.2.5: zeros over the prompt, in every row as many as it has."""

    class Lips(torch.nn.Module):
        def forward(self, video, lengths):
            return torch.ones(*video.shape[:2], 3)

    batch = {"tokens": torch.zeros(2, 9, dtype=torch.long), "lengths": torch.tensor([9, 6]),
             "prompt": torch.tensor([4, 0]), "video": torch.zeros(2, 5, 96, 96)}  # fmt: skip
    seen = gen.encode(batch, None, Lips())["condition"]
    assert seen.shape == (2, 9, 3) and not seen[0, :4].any() and (seen[0, 4:] == 1).all() and (seen[1, :6] == 1).all()


def test_options_of_pre_training_set_its_prompts(job_of):
    """The released code has 0.85 where the paper says 0.8."""
    given = {"floor": 0.2, "prompt": 0.85, "prompt_longest": 0.3}
    _, source, _ = recipes.BUILD["stage1"](replace(job_of("stage1"), options=given))
    assert source.masking == gen.MaskingSettings(0.85, 0.3, 0.2)


def test_a_system_of_the_published_size_is_given_no_hint(workshop, tmp_path, monkeypatch):
    _, system = workshop
    for width, wanted in ((512, {"text_hint": "even"}), (1536, {})):
        sized = replace(preset("paper"), stage1=replace(preset("paper").stage1, hidden_size=width))
        monkeypatch.setattr(recipes, "sizes", lambda _, sized=sized: sized)
        assert recipes.match_task(tmp_path / "out", "tts", "lora", 4, system) == wanted
        assert recipes.match_task(tmp_path / "out", "se", "lora", 4, system) == {}


def test_longer_films_are_an_option_and_told_of(job_of):
    job = job_of("l2s")
    for longest in (300, 600):
        told = replace(job, options=job.chosen | {"longest": longest})
        assert recipes.task_source(told, "train", 0, told.frozen, None).longest == longest
    assert recipes.options_for("l2s", "paper")["longest"] == recipes.options_for("lips", "paper")["longest"] == 1500
    assert {recipes.OPTIONS[name]["longest"] for name in ("l2s", "lips")} == {300}
    items = [{"text": "", "video": "talk.mp4", "id": str(i)} for i in range(2)]
    waves = SimpleNamespace(items=items, starts=np.array([0, 0]), ends=np.array([480 * 100, 480 * 400]))
    with pytest.warns(UserWarning, match=r"1 films are longer than 6 s \(option longest\)"):
        assert data.Lips(waves).lengths.tolist() == [100, 0]


def turned(wav, generator):
    """A change of the voice that is easily seen."""
    return -wav


def test_simulated_examples_can_be_made_otherwise(job_of):
    job = job_of("se")
    plain = recipes.task_source(job, "train", 0, job.frozen, None)
    worse = {"snr_db": [0, 5], "degradation": {"clip_p": 1}}
    asked = {"se": {"noise_p": 1.0, "snr_db": [30, 30], "band_p": 0}, "tse": worse}
    source = recipes.task_source(replace(job, options={"simulate": asked}), "train", 0, job.frozen, None)
    assert source.params.se.snr_db == (30, 30) and source.params.se.noise_p == 1 and source.params.se.reverb_p == 0.35
    assert source.params.tse.degradation.clip_p == 1 and plain.params == type(source.params)()
    assert {e.done["snr_db"] for e in (source.made["se"].make(i, np.random.default_rng(i)) for i in range(4))} == {30.0}
    vc = replace(job_of("vc"), options={"perturb": "tests.test_training:turned"})
    example = recipes.task_source(vc, "train", 0, vc.frozen, None).made["vc"].make(0, np.random.default_rng(0))
    cut = example.prompt
    assert np.array_equal(example.condition[:cut], example.target[:cut])
    assert np.array_equal(example.condition[cut:], -example.target[cut:]) and example.target[cut:].any()
    for options, says in (
        ({"simulate": {"se": {"snr": 1}}}, "unknown keys in a Degradation: snr"),
        ({"simulate": {"se": {"snr_db": 3}}}, "simulate is not as"),
        ({"perturb": "nowhere:at_all"}, "perturb is package.module:callable"),
        ({"perturb": "os:nothing"}, "and 'os:nothing' is none"),
    ):  # fmt: skip
        with pytest.raises(MetisError, match=says):
            recipes.task_source(replace(vc, options=options), "train", 0, vc.frozen, None)


def test_prepared_examples_made_otherwise_are_others(job_of):
    job = job_of("se")
    stores = {}
    for clip in (None, 1.0, 0.5):
        options = {"passes": 1} | ({"simulate": {"se": {"clip_p": clip}}} if clip else {})
        stores[clip] = recipes.task_source(replace(job, options=options), "train", 0, job.frozen, None).store
    assert len({str(store.folder) for store in stores.values()}) == 3


def test_options_reach_fine_tuning_by_the_command_line(workshop, tmp_path, capsys):
    manifest, system = workshop
    command = ["train", "finetune", "--task", "se", "--data", str(manifest), "--from", str(system)]
    wrong = {'simulate={"se": {"snr": 1}}': "unknown keys in a Degradation", "loudest=9": "se has no option 'loudest'"}
    for option, says in wrong.items():
        assert cli.main([*command, "--out", str(tmp_path / "out"), "--steps", "1", "--option", option]) == 2
        assert says in capsys.readouterr().err
