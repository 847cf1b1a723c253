"""The claims laboratory: arms run, resume and compare at equal compute; verdicts, effects and probes by hand."""

import itertools
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metis_lib.checkpoints import save_part
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.models.masked import MaskingSettings
from metis_lib.models.stage2 import Stage2
from metis_lib.training import data
from recipes.claims import __main__, arms, decode, probes, queue, table
from recipes.claims.arms import Arm, Lab, first, held_out, result_of, sources, train
from recipes.claims.claims import RIVAL, TITLES, Claim, all_claims, seeded, verdict
from tests.training_jobs import DEBUG, make_corpus, make_system

pytestmark = pytest.mark.training
MANY = 0.01
"""Hours of the debug scale's large amount: all of the tiny corpus."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A laboratory on a tiny corpus and a system of random weights."""
    home = tmp_path_factory.mktemp("claims")
    before = os.environ.get("METIS_HOME")
    os.environ["METIS_HOME"] = str(home / "cache")
    manifest, system = make_corpus(home / "corpus"), make_system(home / "system")
    for name in ("stage2_layer1", "stage2_full"):
        save_part(system / name, Stage2(getattr(DEBUG, name)), getattr(DEBUG, name))
    yield Lab.of("debug", system=system, manifest=manifest, home=home / "lab")
    if before is None:
        del os.environ["METIS_HOME"]
    else:
        os.environ["METIS_HOME"] = before


# ---------------------------------------------------------------- arms


def test_an_arm_begins_from_its_pretraining_and_is_measured_by_condition(lab):
    arm = Arm("se", "pretrained", hours=MANY)
    with pytest.raises(MetisError, match="pretrained-s0, which is not trained yet"):
        train(lab, arm)
    for one in seeded([arm], 0):
        found = train(lab, one)
    assert [one.id for one in seeded([arm], 0)] == ["pretrained-s0", "se-pretrained-full-0.01h-s0"]
    scores = found["held_out"]["se"]
    assert {name: len(values) for name, values in scores.items()} == dict.fromkeys(("told", "untold", "random"), 2)
    assert all(2.0 < x < 6.0 for values in scores.values() for x in values)
    assert scores["told"] != scores["untold"]
    assert found == result_of(lab, arm) and found["tokens"] == 900 and found["hours_used"]["se"] > 0
    assert not list((lab.home / "runs").glob("*")) and (lab.home / "systems" / arm.id / "tasks" / "se").is_dir()
    assert result_of(replace(lab, tokens=1200), arm) is None  # another budget is another arm
    with pytest.raises(MetisError, match="pretrained-s0, which is not trained yet"):
        train(replace(lab, pretraining=1200), arm)  # what lies there was made otherwise


def test_what_a_result_depends_on_is_in_its_key_and_is_read_once(lab, monkeypatch):
    arm, others = Arm("se", hours=MANY), [Arm("tts"), Arm("tse"), Arm("direct"), Arm("omni")]
    before, then = arms.key_of(lab, arm), [arms.key_of(lab, other) for other in others]
    made = data.prepared(lab.manifest) / "examples-se-3-600-made-by" / "train" / "index.json"
    made.parent.mkdir(parents=True)
    made.touch()
    assert lab.passes("se") == 3 and arms.key_of(lab, arm) != before
    same = [arms.key_of(lab, other) == key for other, key in zip(others, then, strict=True)]
    assert same == [True, True, False, False]  # those that see none of it
    shutil.rmtree(made.parents[1])
    assert arms.key_of(lab, arm) == before
    arms._once.cache_clear()
    for work in queue.plan(lab):
        assert work.arm is None or arms.key_of(lab, work.arm)
    assert arms._once.cache_info().misses == 9  # seven parts, the manifest and where it is prepared
    monkeypatch.setattr(arms, "code", lambda *names: str(names))
    assert arms.key_of(lab, arm) != before


def test_an_arm_that_gets_a_signal_goes_on_to_the_same_end(lab, tmp_path, monkeypatch):
    arm, other = Arm("tts", "none", hours=MANY), replace(lab, home=tmp_path)
    undisturbed, opened = train(lab, arm), data.Feed.open
    scores = undisturbed["held_out"]["tts"]
    assert all(scores[f"{name}_clean"] == scores[name] for name in ("told", "untold", "random"))  # no human here

    def told_to_stop(self, step=0, *rest):
        for at, batch in enumerate(opened(self, step, *rest), step):
            if at == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(data.Feed, "open", told_to_stop)
        assert train(other, arm) is None
    assert result_of(other, arm) is None and list((tmp_path / "runs").rglob("states/*"))
    again = train(other, arm)
    assert again["held_out"] == undisturbed["held_out"] and again["frames_seen"] == undisturbed["frames_seen"]
    assert not list((tmp_path / "runs").glob("*"))


def test_with_and_without_pretraining_the_compute_is_equal(lab):
    train(lab, Arm("stage1", "pretrained"))
    a, b = Arm("tts", "none", hours=MANY), Arm("tts", hours=MANY)
    models = [arms.build(lab, arm)[0] for arm in (a, b)]
    new = [{k: v for k, v in m.state_dict().items() if k.startswith(("phone_emb", "text_hint"))} for m in models]
    assert new[0] and all(torch.equal(new[0][key], new[1][key]) for key in new[0])  # what the task adds begins alike
    assert not torch.equal(models[0].to_logit.weight, models[1].to_logit.weight)
    settings = [lab.settings(arm.budget(lab), arm.seed) for arm in (a, b)]
    assert settings[0] == settings[1]
    feeds = [arms.feed_of(lab, arm, sources(lab, arm, "train"), s) for arm, s in zip((a, b), settings, strict=True)]
    for one, two in itertools.islice(zip(*(feed.open() for feed in feeds), strict=True), 5):
        assert torch.equal(one["tokens"], two["tokens"]) and torch.equal(one["hidden"], two["hidden"])
    for claim in all_claims(lab):
        budgets = {arm.budget(lab) for arm in claim.arms if arm.task != "omni"}
        assert len(budgets) <= 1 and all(arm.needs is None or arm.needs.budget(lab) == 900 for arm in claim.arms)
    assert Arm("omni").budget(lab) == 4 * lab.tokens
    big = sum(p.numel() for p in models[0].diff_estimator.parameters() if p.requires_grad)
    assert arms.direct_tokens(lab, lab.tokens) < lab.tokens < 3 * arms.direct_tokens(lab, lab.tokens) and big > 0


def test_omni_lora_and_direct_arms_run(lab):
    train(lab, Arm("stage1", "pretrained"))
    omni = train(lab, Arm("omni", hours=MANY))
    assert set(omni["held_out"]) == set(omni["hours_used"]) == {"tts", "vc", "tse", "se"}
    feed = arms.feed_of(lab, Arm("omni", hours=MANY), sources(lab, Arm("omni"), "train"), lab.settings(9000, 0))
    assert feed.shares.tolist() == [0.25] * 4  # of each task it sees as much as the single arm
    lora, full = (train(lab, Arm("se", hours=MANY, rank=rank)) for rank in (4, 0))
    assert 0 < lora["trained"] < full["trained"] and lora["held_out"] != full["held_out"]
    direct = train(lab, Arm("direct", "none", hours=MANY))
    assert direct["hours_used"]["se"] == full["hours_used"]["se"]
    assert (lab.home / "systems" / direct["id"] / "stage2_full" / "config.json").is_file()
    pairs = arms.pairs(lab, "train")
    _, tokens = pairs[0]
    assert tokens.shape == (pairs.store.length(0), 1 + DEBUG.acoustic.num_quantizers)
    assert np.array_equal(pairs.shards[pairs.at[0]][1][: len(tokens), 1:], tokens[:, 1:])  # codes of the recording


def test_hours_are_nested_and_the_same_every_time():
    rng = np.random.default_rng(0)
    lengths, ids = rng.integers(0, 500, 400), [f"utterance {i}" for i in range(400)]
    half, more, all_of_it = (first(ids, lengths, hours=h) for h in (0.1, 0.5, 100.0))
    assert np.array_equal(half, first(ids, lengths, hours=0.1)) and np.array_equal(all_of_it, lengths)
    assert ((half == 0) | (half == more)).all() and ((more == 0) | (more == lengths)).all()
    for part, hours in ((half, 0.1), (more, 0.5)):
        assert hours * 180_000 - 500 < part.sum() <= hours * 180_000
    shuffled = rng.permutation(400)  # it does not matter where an utterance stands
    assert np.array_equal(first([ids[i] for i in shuffled], lengths[shuffled], hours=0.5), more[shuffled])
    assert (first(ids, lengths, count=60) > 0).sum() == 60
    twice = first([*ids, *ids], np.concatenate([lengths, lengths]), hours=0.5)  # two examples of each recording
    assert np.array_equal(twice[:400], more) and np.array_equal(twice[400:], more)


def test_held_out_cross_entropy_is_that_of_each_utterance_alone(lab):
    arm = Arm("tts", "none", hours=MANY)
    model, source = arms.build(lab, arm)[0].eval(), sources(lab, arm, "validation")["tts"]
    for key in ("to_logit.weight", "phone_emb.weight"):
        model.state_dict()[key].mul_(20)
    found, items = held_out(model, source), np.flatnonzero(source.lengths)
    for place, item in enumerate(items):
        alone = replace(source)
        alone.lengths = np.where(np.arange(len(source.lengths)) == item, source.lengths, 0)
        one = held_out(model, alone)
        assert all(one[name][0] == pytest.approx(found[name][place], abs=2e-3) for name in found)
    batch = source.batch([int(items[0])], epoch=0, step=0)
    hidden = torch.arange(batch["tokens"].shape[1])[None] >= int(0.25 * int(batch["lengths"][0]))
    out = model(batch["tokens"], hidden, torch.ones(1), phones=batch["phones"], hint=batch["hint"])
    by_hand = -model.to_logit(out)[0].log_softmax(-1)[torch.arange(hidden.shape[1]), batch["tokens"][0]][hidden[0]]
    assert found["told"][0] == pytest.approx(by_hand.mean().item(), abs=2e-3)


def test_clean_data_is_synthetic_and_prompts_can_be_left_out(lab):
    everything = sources(lab, Arm("tts", hours=MANY), "train")["tts"]
    clean = sources(lab, Arm("tts", hours=MANY, data="clean"), "train")["tts"]
    assert np.array_equal(everything.lengths, clean.lengths)  # espeak-ng is no human
    without = sources(lab, Arm("stage1", "pretrained-noprompt"), "train")["stage1"]
    items = np.flatnonzero(without.lengths).tolist()
    assert not any(without.batch(items, epoch=e, step=0)["prompt"].any() for e in range(5))
    given = sources(lab, Arm("stage1", "pretrained"), "train")["stage1"]
    assert any(given.batch(items, epoch=e, step=0)["prompt"].any() for e in range(5))


def test_clean_arms_learn_from_half_as_much_and_are_judged_on_synthetic_speech(monkeypatch):
    human = [i % 3 > 0 for i in range(90)]
    spoken = SimpleNamespace(
        lengths=np.full(90, 9000), shards=SimpleNamespace(record=lambda i: {"human": human[i]}),
        masking=MaskingSettings(),
    )  # fmt: skip
    monkeypatch.setattr(arms, "whole", lambda lab, task, split: (spoken, tuple(map(str, range(90)))))
    lab = Lab.of("ablate", held_out=20)
    claim = next(c for c in all_claims(lab) if c.id == "more-or-cleaner-tts")
    assert claim.condition == "told_clean" and claim.arms[1].hours == 5.0  # of 10 h that are read
    brief = claim.also[1]
    assert brief.hours == 0.71 and brief.data == "clean" and not brief.longer  # of 1.4 h that are seen
    assert "half as much" in claim.claim and [arm.data for arm in claim.arms] == ["all", "clean"]
    shared, alone = (sources(lab, claim.arms[0], "validation", clean=c)["tts"].lengths for c in (False, True))
    assert (shared > 0).sum() == (alone > 0).sum() == 20 and not (alone[human] > 0).any() and shared[human].any()
    assert np.array_equal(sources(lab, claim.arms[1], "validation", clean=True)["tts"].lengths, alone)
    learned = [sources(lab, arm, "train")["tts"].lengths for arm in (claim.arms[0], brief)]
    assert learned[0].sum() == 90 * 9000 and not learned[1][human].any() and (learned[1] > 0).sum() == 14
    few = replace(claim.arms[1], hours=1.0)
    assert (sources(lab, claim.arms[1], "train")["tts"].lengths > 0).sum() == 30, "as much as there is"
    assert (sources(lab, few, "train")["tts"].lengths > 0).sum() == 20


# ---------------------------------------------------------------- what is decoded


def test_text_is_compared_without_guidance(lab, monkeypatch):
    asked = []
    metis = SimpleNamespace(tasks=("omni",), generate=lambda task, items, **given: asked.append((items[0], given)))
    monkeypatch.setattr(decode, "Metis", SimpleNamespace(from_pretrained=lambda folder: metis))
    item = decode.items_of(replace(lab, items=1), "tse")
    for variant in decode.studies(lab)["text-tse"].variants:
        decode.maker(lab, "text-tse", variant, 0)(item, 0)
    assert [given["cfg"] for _, given in asked] == [0.0, 0.0, 2.5]
    assert [("text" in given, given["by"]) for given, _ in asked] == [(told, "omni") for told in (False, True, True)]


def test_what_a_study_depends_on_is_in_its_key(lab, tmp_path, monkeypatch):
    shutil.copytree(record.ROOT / "eval" / "testsets" / "human", tmp_path / "heard")
    mine = replace(lab, testset=str(tmp_path / "heard"))
    before = {name: decode.key_of(mine, name) for name in decode.studies(mine)}
    assert before == {name: decode.key_of(mine, name) for name in before}

    def changed():
        return {name for name, key in before.items() if decode.key_of(mine, name) != key}

    defaults = lab.system / "decode.json"
    defaults.write_text('{"tts": {"cfg": 1.0}}')
    assert changed() == set(before)
    defaults.unlink()
    (other := tmp_path / "other.jsonl").write_text(lab.manifest.read_text() + "\n")
    probed = decode.key_of(replace(mine, manifest=other), "ssl-layers")
    assert probed != before["ssl-layers"]
    assert changed() == set()
    with monkeypatch.context() as patched:
        patched.setattr(decode, "code", lambda *names: str(names))
        assert changed() == set(before)
    weights = lab.system / "stage2_full" / "config.json"
    kept = weights.read_text()
    weights.write_text(kept + " ")
    assert changed() == set(before) - {"ssl-layers"}
    weights.write_text(kept)
    (clip,) = (tmp_path / "heard").glob("librivox-0870.flac")
    clip.write_bytes(clip.read_bytes()[:-1])
    assert changed() == set(before) - {"ssl-layers"}


def test_an_arm_is_decoded_by_the_rest_of_the_system_as_it_is_now(lab, tmp_path, monkeypatch):
    mine, loaded = replace(lab, home=tmp_path), []
    arm = decode.studies(lab)["two-stages"].arms[0]
    system = tmp_path / "systems" / arm.id
    for part in ("tasks/se", "stage2_full"):
        (system / part).mkdir(parents=True)
        (system / part / "config.json").write_text("of the arm, or old")
    (system / "decode.json").write_text("old")
    monkeypatch.setattr(decode, "result_of", lambda lab, arm: {})
    monkeypatch.setattr(decode, "Metis", SimpleNamespace(
        from_pretrained=lambda folder: loaded.append(folder) or SimpleNamespace(tasks=("se",))
    ))  # fmt: skip
    decode.maker(mine, "two-stages", "two stages", 0)
    assert loaded == [system] and (system / "tasks/se/config.json").read_text() == "of the arm, or old"
    for file, same in (("model.safetensors", True), ("config.json", False)):  # what people edit is a copy
        mine, theirs = system / "stage2_full" / file, lab.system / "stage2_full" / file
        assert mine.samefile(theirs) == same and mine.read_bytes() == theirs.read_bytes()
    assert not (system / "decode.json").exists()  # the system has none


# ---------------------------------------------------------------- the queue


def test_every_claim_has_its_first_seed_early_and_all_that_it_needs(lab):
    order = [work.id for work in queue.plan(lab)]
    assert len(order) == len(set(order))
    for claim in all_claims(lab):
        for arm in (replace(a, seed=s) for a in claim.arms for s in lab.seeds):
            assert arm.needs is None or order.index(arm.needs.id) < order.index(arm.id)
        assert all(name in order for name in claim.study[:1])
    first_seed = [i for i, name in enumerate(order) if name.endswith("-s0")]
    assert max(first_seed) < min(i for i, name in enumerate(order) if name.endswith("-s1"))
    for name, study in decode.studies(lab).items():
        for arm in (replace(a, seed=s) for a in study.arms for s in lab.seeds):
            assert order.index(arm.id) < order.index(name)
    assert {work.notebooks for work in queue.plan(lab) if not work.notebooks} == set()
    assert "2 studies" in queue.sheet(lab, "schedule") and "3 studies" in queue.sheet(lab, "30")
    with pytest.raises(MetisError, match="no measurement or claim begins"):
        queue.chosen(lab, "zzz")


def test_arms_side_by_side_are_what_they_are_one_by_one(lab, tmp_path):
    found, said = {}, []
    for workers in (1, 2):
        mine = replace(lab, home=tmp_path / str(workers), seeds=(0,), longer=0)
        assert queue.run(mine, only="prompts-in-pretraining-tts", workers=workers, say=said.append) == []
        files = sorted((mine.home / "arms").glob("*.json"))
        found[workers] = {file.stem: record.read_json(file) for file in files}
    assert len(found[1]) == 4 and found[1].keys() == found[2].keys()
    for name, one in found[1].items():
        assert one["key"] == found[2][name]["key"]
        for task, scores in one["held_out"].items():
            for condition, values in scores.items():
                assert found[2][name]["held_out"][task][condition] == pytest.approx(values, rel=0.01)
    order = [line.partition(":")[0] for line in said[-4:]]
    assert set(order[:2]) == {"pretrained-s0", "pretrained-noprompt-s0"}  # what the others begin from


def test_arms_side_by_side_end_with_a_state_when_asked_to_stop(lab, tmp_path):
    mine = replace(lab, home=tmp_path, tokens=10**8, seeds=(0,))

    def stop():
        while not list((tmp_path / "runs").glob("*/log.jsonl")):
            time.sleep(0.1)
        time.sleep(3)  # it trains by now
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    left = queue.run(mine, only="se-system", workers=2)
    assert left and not list((tmp_path / "arms").glob("*")) and list((tmp_path / "runs").glob("*/states/*"))


def test_an_arm_whose_process_is_killed_is_named(lab, tmp_path):
    mine = replace(lab, home=tmp_path, tokens=10**8, seeds=(0,))

    def kill():
        while not list((tmp_path / "runs").glob("*/log.jsonl")):
            time.sleep(0.1)
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(MetisError, match="could not measure se-system.*take fewer workers"):
        queue.run(mine, only="se-system-full-0.01h-s0", workers=2)


def test_an_arm_whose_process_ends_with_an_error_is_named(lab, tmp_path):
    (tmp_path / "arms").write_text("no folder")  # nothing can be written into it
    with pytest.raises(MetisError, match="could not measure se-system.*ended with code 1; see above"):
        queue.run(replace(lab, home=tmp_path, seeds=(0,)), only="se-system-full-0.01h-s0", workers=2)


def test_the_queue_skips_what_is_done_and_tells_what_fails(lab, tmp_path):
    mine, said = replace(lab, home=tmp_path), []
    assert queue.run(mine, only="pretrained-s0", say=said.append) == []
    count = len(said)
    assert queue.run(mine, only="pretrained-s0", say=said.append) == [] and len(said) == count > 1
    with pytest.raises(MetisError, match="could not measure guidance-vc; guidance-vc: .*task vc"):
        queue.run(mine, only="guidance-vc")
    done = record.read_json(tmp_path / "arms" / "pretrained-s0.json")
    record.write_json(tmp_path / "arms" / "pretrained-s0.json", done | {"key": "of another system"})
    assert not queue.done(mine, queue.chosen(mine, "pretrained-s0")[0])


def test_bad_laboratories_are_refused():
    for wrong in ({"scale": "huge"}, {"tokens": 10}, {"seeds": ()}, {"hours": (2.0, 1.0)}, {"held_out": 0}):
        with pytest.raises(MetisError):
            Lab.of(**wrong)


def test_what_a_notebook_measures_otherwise_is_kept_apart(tmp_path):
    usual, root = Lab.of("ablate"), record.ROOT
    mine = Lab.for_notebook("ablate", "results/runs/x", seeds=[0, 1, 2])
    assert mine == usual == Lab.for_notebook("ablate", tmp_path)
    for given in ({"tokens": 5000}, {"system": "metis_lib/weights/nano"}, {"seeds": [0, 1]}, {"manifest": "m.jsonl"}):
        other = Lab.for_notebook("ablate", "results/runs/x", **given)
        assert other.home == root / "results" / "runs" / "x" / "measured"
        assert Lab.for_notebook("ablate", "x", home="here", **given) == replace(other, home=root / "here")
    other = Lab.for_notebook("paper", tmp_path, system="metis_lib/weights/nano", manifest=str(tmp_path / "m.jsonl"))
    assert other.system == root / "metis_lib" / "weights" / "nano" and other.manifest == tmp_path / "m.jsonl"
    assert other.home == tmp_path / "measured" and other.frames == Lab.of("paper").frames


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("low", "high", "more", "wanted"),
    [
        (0.01, 0.2, {}, "holds"), (-0.2, -0.01, {}, "fails"), (-0.1, 0.1, {}, "undecided"),
        (0.01, 0.2, {"margin": 0.05}, "holds"), (-0.01, 0.04, {"margin": 0.05}, "fails"),
        (0.01, 0.04, {"margin": 0.05}, "fails"), (-0.01, 0.06, {"margin": 0.05}, "undecided"),
        (-0.04, 0.3, {"margin": 0.05, "no_worse": True}, "holds"),
        (-0.3, -0.06, {"margin": 0.05, "no_worse": True}, "fails"),
        (-0.06, 0.1, {"margin": 0.05, "no_worse": True}, "undecided"), (-np.inf, np.inf, {}, "undecided"),
    ],
)  # fmt: skip
def test_the_verdict_by_hand(low, high, more, wanted):
    assert verdict(low, high, **more) == wanted


def measured(lab, gap):
    """Made-up results of all arms: what is oriented as claimed is better by ``gap`` on average, by seed."""
    found = {}
    for claim in all_claims(lab):
        for seed in lab.seeds:
            for arm in seeded(claim.arms, seed):
                found.setdefault(arm.id, {"id": arm.id, "tokens": 900, "seconds": 1.0, "held_out": {}})
    claim = next(c for c in all_claims(lab) if c.id.startswith("pretraining-se-0.01"))
    for seed in lab.seeds:
        for side, arm in enumerate(claim.arms):
            values = [4.0 + 0.5 * u - side * gap[seed] for u in range(4)]
            found[replace(arm, seed=seed).id]["held_out"] = {"se": {"told": values}}
    return claim, {"arms": found, "decode": {}}


def test_effects_of_trainings_are_paired_by_utterance_and_their_interval_is_students(lab):
    claim, results = measured(lab, (0.10, 0.14, 0.12))
    effect = table.effect_of(claim, results, lab.seeds)
    assert effect.mean == pytest.approx(0.12) and effect.seeds == 3 and effect.tokens == 900
    assert effect.high - effect.mean == pytest.approx(4.30265 * 0.02 / 3**0.5, rel=1e-4)
    row = table.row_of(claim, effect)
    assert row["verdict"] == "holds" and row["task"] == "se" and row["notebook"] == "notebooks/20_pretraining.ipynb"
    keys = ("id", "claim", "source", "task", "effect", "unit", "ci95", "seeds", "n", "n_failed", "tokens", "verdict",
            "notebook")  # fmt: skip
    assert tuple(row) == keys and (row["n"], row["n_failed"]) == (12, 0)
    assert table.row_of(claim, table.effect_of(claim, measured(lab, (-0.2, -0.21, -0.2))[1], lab.seeds))[
        "verdict"
    ] == "fails"  # fmt: skip
    with pytest.raises(MetisError, match="no interval from 1 seed"):
        table.row_of(claim, table.effect_of(claim, results, (0,)))


def test_effects_of_decoding_are_paired_and_bootstrapped():
    rows = [
        {"variant": v, "id": f"u{u}", "speaker": f"s{u % 2}", "seed": s, "wer": 0.1 * u + bad + 0.01 * s}
        for v, bad in (("cosine", 0.0), ("linear", 0.3), ("square", 0.1)) for u in range(8) for s in range(3)
    ]  # fmt: skip
    rows[0]["wer"] = None  # a judge that failed
    effect = table._of_rows(rows, "wer", RIVAL, "cosine", 0)
    assert effect.mean == pytest.approx(0.1) and effect.low == pytest.approx(0.1) and effect.seeds == 3
    assert (effect.n, effect.n_failed) == (23, 1)
    assert table._of_rows(rows, "wer", "linear", "cosine", 0).mean == pytest.approx(0.3)
    probes_rows = [
        {"variant": v, "seed": s, "e": e + 0.01 * s} for v, e in (("chosen", 0.2), ("1", 0.5)) for s in (0, 1, 2)
    ]
    effect = table._of_rows(probes_rows, "e", RIVAL, "chosen", 0)
    assert effect.mean == pytest.approx(0.3) and effect.high == pytest.approx(0.3)
    assert (effect.n, effect.n_failed) == (3, 0)
    with pytest.raises(MetisError, match="no variant"):
        table._of_rows(rows, "wer", "sqrt", "cosine", 0)


def test_where_trainings_are_decoded_the_interval_is_over_trainings(lab):
    """Nine items that agree about each training, and three trainings that do not agree."""
    gap = (0.1, 0.2, 0.3)
    rows = [
        {"variant": v, "id": f"u{u}", "speaker": f"s{u}", "seed": s, "wer": 0.2 + (v == "direct") * gap[s]}
        for v in ("two stages", "direct") for u in range(9) for s in range(3)
    ]  # fmt: skip
    rows[0]["wer"] = None
    claim = next(c for c in all_claims(lab) if c.id == "two-stages-words")
    trained = {"se-system-full": {"tokens": 90}, "se-system-full-longer": {"tokens": 900}}
    results = {"arms": trained, "decode": {"two-stages": rows, "guidance-vc": rows}}
    effect = table.effect_of(claim, results, lab.seeds)
    assert effect.mean == pytest.approx(0.2) and effect.high - 0.2 == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-4)
    assert (effect.seeds, effect.tokens, effect.n, effect.n_failed) == (3, 900, 26, 1)
    same = replace(claim, study=("guidance-vc", "wer", "direct", "two stages"))
    assert table.effect_of(same, results, lab.seeds).high < 0.25  # one system: its seeds are averaged
    assert set(table.TRAINED) == {name for name, study in decode.studies(lab).items() if study.arms}


def test_a_table_with_missing_rows_is_refused(lab, tmp_path):
    empty = {"arms": {}, "decode": {}}
    with pytest.raises(MetisError) as caught:
        table.rows_of(lab, empty)
    assert "tts-none-full-0.01h-longer-s2" in str(caught.value) and "two-stages" in str(caught.value)
    with pytest.raises(MetisError, match="measurements are missing"):
        table.export(replace(lab, home=tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    rows = [
        {"id": c.id, "ci95": [0.1, 0.2], "verdict": verdict(0.1, 0.2, margin=c.margin, no_worse=c.no_worse)}
        for c in all_claims(lab)
    ]
    table.check(rows, lab)
    with pytest.raises(MetisError, match=f"{rows[3]['id']} is missing"):
        table.check(rows[:3] + rows[4:], lab)
    with pytest.raises(MetisError, match="is not what the rule gives"):
        table.check([rows[0] | {"verdict": "fails"}, *rows[1:]], lab)


def test_the_claims_are_those_that_were_asked_for():
    claims = all_claims(Lab.of("ablate"))
    ids = [claim.id for claim in claims]
    assert len(ids) == len(set(ids))
    wanted = {f"pretraining-{task}-{h}" for task in ("tts", "vc", "tse", "se", "l2s") for h in ("0.5", "10")}
    assert wanted <= set(ids) and {claim.notebook for claim in claims} == set(TITLES)
    assert {claim.task for claim in claims} <= {"tts", "vc", "tse", "se", "l2s", "omni", "stage2"}
    assert all(bool(claim.arms) != bool(claim.study) and claim.source for claim in claims)
    assert isinstance(claims[0], Claim)
    texts = {claim.id: claim.claim for claim in claims}
    same = {claim.id: claim.claim for claim in all_claims(Lab.of("ablate", tokens=256_000))}
    assert "at most 1.4 h of it seen" in same["pretraining-se-10"] and "seen" not in same["pretraining-se-0.5"]
    assert "seen" not in texts["pretraining-tts-10"]
    assert all("earlier layer" in texts[f"ssl-layer-{what}"] for what in ("phones", "speakers"))


def test_some_claims_compare_longer_arms_and_show_the_shorter_ones_beside():
    lab = Lab.of("ablate")
    claim = next(claim for claim in all_claims(lab) if claim.id == "pretraining-tts-10")
    assert {arm.budget(lab) for arm in claim.arms} == {3_000_000} and {a.budget(lab) for a in claim.also} == {256_000}
    assert claim.arms[0].id == "tts-none-full-10h-longer-s0"
    plain = Lab.of("ablate", tokens=20_000)  # asked for: the length of all arms
    compared = [arm for one in (*all_claims(lab), *decode.studies(lab).values()) for arm in one.arms]
    assert len(compared) > 50 and all(arm.longer for arm in compared)  # the 3 M that were asked for
    budgets = {a.budget(plain) for c in all_claims(plain) for a in c.arms if a.task == "tts" and a.base == "system"}
    assert budgets == {20_000}


def test_a_part_takes_its_place_in_a_table_that_is_there(lab, tmp_path, monkeypatch):
    """What only a claim outside the part needs stays as it was, and what nobody needs any more goes."""
    claims = {claim.id: claim for claim in all_claims(lab)}
    mine, other = claims["pretraining-se-0.001"], claims["lora-rank-se"]
    monkeypatch.setattr(table.record, "provenance", lambda *_: {"commit": "new"})

    def results(claim, gap):
        made = {}
        for seed in lab.seeds:
            for arm, far in zip(claim.arms, (gap, 0.0), strict=True):
                told = {"se": {"told": [4.0 + far + 0.001 * seed] * 4}}
                id = replace(arm, seed=seed).id
                made[id] = {"id": id, "tokens": 900, "key": "k", "seconds": 1.0, "skipped": 0, "held_out": told}
        return {"arms": made, "decode": {}}

    before, now = results(other, 0.2), results(mine, 0.5)
    rows = [table.row_of(other, table.effect_of(other, before, lab.seeds)), {"id": mine.id, "effect": 9.0}]
    gone = [{"id": "a-claim-of-the-past"}]
    for name, value in (
        ("claims", rows + gone), ("arms", [*before["arms"].values(), {"id": "an-arm-of-the-past"}]),
        ("decode", {"alone": []}), ("run", {"commit": "old", "parts": {"28": {}}}),
    ):  # fmt: skip
        record.write_json(tmp_path / f"{name}.json", value)
    more = {"arms": now["arms"] | {"stray": {"seconds": 1.0}}, "decode": {"stray": []}}
    monkeypatch.setattr(table, "collect", lambda _: more)
    out = table.export_part(lab, tmp_path, "pretraining-se-0.001")
    assert [row["id"] for row in out] == [mine.id, other.id] and out[0]["effect"] == 0.5
    assert record.read_json(tmp_path / "claims.json") == out
    kept = {arm["id"] for arm in record.read_json(tmp_path / "arms.json")}
    assert kept == set(before["arms"]) | set(now["arms"])
    assert record.read_json(tmp_path / "decode.json") == {"alone": []}
    run = record.read_json(tmp_path / "run.json")
    assert run["commit"] == "old" and set(run["parts"]) == {"28", "pretraining-se-0.001"}
    assert run["parts"]["pretraining-se-0.001"]["training_seconds"] == 6
    alone = table.export_part(lab, tmp_path / "alone", "pretraining-se-0.001")
    assert [row["id"] for row in alone] == [mine.id]
    assert record.read_json(tmp_path / "alone" / "run.json")["commit"] == "new"
    with pytest.raises(MetisError, match="no claim begins with 'nothing'"):
        table.export_part(lab, tmp_path, "nothing")


def test_the_page_shows_the_committed_table_where_it_is_whole(tmp_path, monkeypatch):
    rows = [dict.fromkeys(("verdict", "ci95", "claim"), "") | {"id": c.id, "effect": 0.0} for c in all_claims(Lab.of())]
    made, pages = {"rows": rows}, []
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    monkeypatch.setattr(table, "export_part", lambda *_: made["rows"])
    monkeypatch.setattr(table, "markdown", lambda rows: rows)
    monkeypatch.setattr(__main__.report, "fill_readme", lambda page, rows: pages.append((page.name, rows)))

    def called(*more):
        monkeypatch.setattr("sys.argv", ["claims", "table", "--only", "23", *more])
        return __main__.main()

    assert called() == 0 and pages == [("claims.md", rows)]
    assert called("--out", str(tmp_path / "elsewhere")) == 0
    made["rows"] = rows[:-1]
    assert called() == 0 and len(pages) == 1


def test_other_seeds_have_a_table_too(lab, monkeypatch):
    other = replace(lab, seeds=(1, 2, 3))
    claim, results = measured(other, {1: 0.10, 2: 0.14, 3: 0.12})
    for arm in results["arms"].values():
        arm["hours_used"] = {"se": 0.01}
    assert table.rows_of(other, results, only=claim.id)[0]["hours_at_hand"] == [0.01, 0.01]


def test_other_settings_do_not_take_the_place_of_the_usual_measurements(monkeypatch, tmp_path):
    labs = []
    monkeypatch.setattr(__main__.queue, "sheet", lambda lab, *_: labs.append(lab) or "")
    for more in ((), ("--tokens", "5000"), ("--lr", "0.1"), ("--tokens", "5000", "--home", str(tmp_path))):
        monkeypatch.setattr("sys.argv", ["claims", "list", *more])
        assert __main__.main() == 0
    homes = [lab.home for lab in labs]
    assert homes[0] == Lab.of().home and homes[3] == tmp_path and len(set(homes)) == 4
    assert homes[1].parent == homes[0].parent and homes[1].name.startswith("claims-")


def test_hours_are_those_of_recordings(lab):
    from recipes.claims.arms import first, hours_of

    ids, lengths = ["a", "a", "b", "b", "c"], np.array([90_000, 90_000, 180_000, 180_000, 0])
    assert hours_of(ids, lengths) == pytest.approx(1.5) and hours_of(ids, first(ids, lengths, hours=1.2)) <= 1.2


def test_the_figure_and_what_notebooks_show(lab, tmp_path):
    claim, results = measured(lab, (0.10, 0.14, 0.12))
    row = table.row_of(claim, table.effect_of(claim, results, lab.seeds))
    figure = table.forest([row, row | {"id": "other", "unit": "cosine", "verdict": "undecided"}])
    assert len(figure.axes) == 2 and "as claimed" in figure.axes[0].get_title("left")
    shown = table.show("20", tmp_path, lab=lab)
    assert len(shown.claims) == len(shown.missing) == 10 and shown.arms.empty and shown.decode.empty
    record.write_json(tmp_path / "claims.json", [row])
    for arm in results["arms"].values():
        arm |= {"base": "none", "hours": 0.01, "seed": 0, "task": "se"}
    record.write_json(tmp_path / "arms.json", list(results["arms"].values()))
    record.write_json(tmp_path / "decode.json", {})
    shown = table.show("20", tmp_path, lab=lab)
    assert len(shown.missing) == 9 and set(shown.arms["condition"]) == {"told"}
    assert shown.arms["nats"].max() == pytest.approx(4.75)
    assert len(table.design("20", lab)) == 10
    alone, schedules = table.design("21", lab), table.design("31", lab)
    assert set(alone["minus b"]) == {"0 (already a difference)"}
    assert "*" not in "".join(schedules["a"]) and "of the lowest other" in schedules["a"][0]
    page = table.markdown([row, row | {"verdict": "fails"}])
    assert page.startswith("Claims that hold: 1; that fail: 1; undecided: 0.") and page.count("| holds |") == 1
    many = row | {"claim": "With 10 h of data.", "hours_at_hand": [6.0005, 2.11]}
    assert "| With 10 h of data. At hand: 2.1 h. |" in table.markdown([many])
    assert f"| {row['claim']} | +0.120 nats (+0.070 to +0.170) |" in page and f"](../{row['notebook']})" in page


def test_the_committed_table_is_whole_and_its_page_shows_it():
    rows = record.read_json(table.FOLDER / "claims.json")
    table.check(rows, Lab.of())
    assert table.markdown(rows) in (record.ROOT / "docs" / "claims.md").read_text()
    assert {row["seeds"] for row in rows} == {3}
    run = record.read_json(table.FOLDER / "run.json")
    assert run["settings"]["tokens"] == Lab.of().tokens and not run["dirty"]


# ---------------------------------------------------------------- probes


def test_probes_find_the_layer_that_was_planted():
    """Of three layers of noise, one tells the phone of each frame and another the speaker."""
    rng = np.random.default_rng(0)
    phones = [rng.permutation(6)[:4].tolist() for _ in range(60)]
    speakers = [i % 5 for i in range(60)]

    def layer(plant):
        out = []
        for i, said in enumerate(phones):
            x = rng.normal(size=(40, 16)).astype(np.float32)
            for k, phone in enumerate(said):
                if plant == "phones":
                    x[10 * k : 10 * k + 7, phone] += 6
            if plant == "speakers":
                x[:, 8 + speakers[i]] += 3
            out.append(torch.from_numpy(x))
        return out

    errors, named = {}, {}
    for plant in ("nothing", "phones", "speakers"):
        states = layer(plant)
        errors[plant] = probes.phone_probe(states[:45], phones[:45], states[45:], phones[45:], seed=0, steps=100)
        named[plant] = probes.speaker_probe(states[:45], speakers[:45], states[45:], speakers[45:])
    assert min(errors, key=errors.__getitem__) == "phones" and errors["phones"] < 0.4 < 0.6 < min(
        errors["nothing"], errors["speakers"]
    )  # fmt: skip
    assert max(named, key=named.__getitem__) == "speakers" and named["speakers"] > 0.9 > 1.8 * named["nothing"]


def test_hidden_states_are_those_of_the_encoder(lab):
    encoder = lab.job("se").frozen.encoder
    x, lengths = torch.randn(2, 12, 160), torch.tensor([12, 9])
    states = probes.hidden_states(encoder, x, lengths)
    assert len(states) == 1 + encoder.config.output_layer
    torch.testing.assert_close(states[-1], encoder(x, lengths))


def test_the_layers_of_a_system_are_probed_with_every_seed(lab, monkeypatch):
    monkeypatch.setattr(probes, "SETTINGS", {**probes.SETTINGS, "train": 1, "test": 1, "steps": 5})
    rows = probes.layers(replace(lab, seeds=(0, 1)))
    assert [(row["seed"], row["variant"]) for row in rows] == [(s, v) for s in (0, 1) for v in ("0", "1", "chosen")]
    assert all(0 <= row["speaker_accuracy"] <= 1 < 10 * (1 + row["phone_error"]) for row in rows)
    two = replace(lab, seeds=(0, 1))
    assert decode.measure(two, "ssl-layers")["rows"] == rows
    assert decode.result_of_study(two, "ssl-layers") and decode.result_of_study(lab, "ssl-layers") is None
