"""The published system with small sizes: every flow of the released code token for token, batches, long input."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from metis_lib import Metis
from metis_lib.config import (
    AcousticCodecConfig,
    LipConfig,
    SemanticCodecConfig,
    SSLConfig,
    Stage1Config,
    Stage2Config,
    SystemConfig,
)
from metis_lib.generation import batches
from metis_lib.pipeline import LONGEST_INPUT
from metis_lib.released import Released
from metis_lib.tokenizers.lips import upsample

pytestmark = pytest.mark.paper

GOLDEN = Path(__file__).parent / "golden"
SYSTEM = SystemConfig(
    name="tiny",
    ssl=SSLConfig(hidden_size=16, num_layers=17, num_heads=2, intermediate_size=32),
    semantic=SemanticCodecConfig(
        hidden_size=16, codebook_size=256, vocos_dim=16, vocos_intermediate_dim=32, vocos_num_layers=1
    ),
    acoustic=AcousticCodecConfig(
        encoder_dim=4, latent_dim=16, codebook_size=128, vocos_dim=16, vocos_intermediate_dim=32, vocos_num_layers=1
    ),
    stage1=Stage1Config(hidden_size=32, num_layers=2, num_heads=4, codebook_size=256, cond_dim=16),
    stage2_layer1=Stage2Config(1, True, 32, 2, 4, 128, 256),
    stage2_full=Stage2Config(12, False, 32, 2, 4, 128, 256),
    lips=LipConfig(hidden_size=12, num_heads=2, intermediate_size=16, num_layers=1, widths=(4, 4, 4, 4), stem=4),
)
FILES = {
    "metis_base/model.safetensors": "stage1_base/",
    "metis_se/metis_se.safetensors": "stage1_ft/",
    "metis_vc/metis_vc.safetensors": "stage1_ft/",
    "metis_tse/metis_tse_lora_32.safetensors": "tse_lora/",
    "metis_tse/metis_tse_lora_32_adapter.safetensors": "tse_adapter/",
    "metis_l2s/metis_l2s.safetensors": "stage1_l2s/",
    "metis_omni/metis_omni.safetensors": "stage1_omni/",
    "t2s_model/model.safetensors": "stage1_tts/",
    "s2a_model/s2a_model_1layer/model.safetensors": "s2a_1layer/",
    "s2a_model/s2a_model_full/model.safetensors": "s2a_full/",
    "semantic_codec/model.safetensors": "semantic_codec/",
    "acoustic_codec/model.safetensors": "acoustic_encoder/",
    "acoustic_codec/model_1.safetensors": "acoustic_decoder/",
    "w2v-bert-2.0/model.safetensors": "w2v/",
}
FLOWS = {
    "se": ("se", "full", dict(steps=5, cfg=0.0)),
    "vc": ("vc", "full", dict(steps=6, cfg=1.0)),
    "tse": ("tse", "lora", dict(steps=5, cfg=0.0)),
    "tts": ("tts", "full", dict(steps=6, cfg=2.5)),
    "tts_seconds": ("tts", "full", dict(steps=4, cfg=2.5)),
    "l2s": ("l2s", "full", dict(steps=4, cfg=2.5)),
    "omni_tts": ("tts", "omni", dict(steps=4, cfg=2.5)),
    "omni_tse": ("tse", "omni", dict(steps=4, cfg=1.0)),
    "text_tse": ("tse", "omni", dict(steps=5, cfg=2.5)),
}


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "flows.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, io):
    """The golden weights as a folder in the released layout."""
    root = tmp_path_factory.mktemp("released")
    tensors = {
        k: v for name in ("stage1", "other") for k, v in load_file(GOLDEN / f"flows_weights_{name}.safetensors").items()
    }
    for path, prefix in FILES.items():
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if prefix.startswith("s2a"):
            state["diff_estimator.embed_tokens.weight"] = torch.zeros(0, 256)
        assert state, prefix
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        save_file(state, root / path, metadata={"format": "pt"})
    torch.save({"mean": io["in/ssl_mean"], "var": io["in/ssl_var"]}, root / "wav2vec2bert_stats.pt")
    (root / "vocab.json").write_bytes((GOLDEN / "vocab.json").read_bytes())
    (root / "config.json").write_text(json.dumps({"type": "SystemConfig", "config": asdict(SYSTEM)}))
    return root


class Recorded:
    """The recorded noise of a flow, in call order."""

    def __init__(self, io, flow):
        self.draws = [io[key].float() for key in sorted(k for k in io if k.startswith(f"{flow}/noise_"))]
        self.used = 0

    def __call__(self, shape):
        draw = self.draws[self.used].reshape(shape)
        self.used += 1
        return draw


def system(folder, io, monkeypatch, compat="released", dtype=torch.float32, **variants):
    """The system on the recorded sounds, texts and lips."""
    metis = Metis(Released(folder, dtype=dtype), torch.device("cpu"), compat=compat)
    metis._asked |= variants
    sounds = {
        "prompt": (io["in/prompt_wav24"], io["in/prompt_wav16"]),
        "source": (torch.zeros(6000), io["in/source_wav16"]),
    }
    said = {"Good evening": "in/phones_prompt_text", "Grüße, ça va?": "in/phones_text"}
    monkeypatch.setattr(metis, "_hear_both", lambda source, *_: sounds[source])
    monkeypatch.setattr(metis, "_phones", lambda text, language: io[said[text]].long())
    monkeypatch.setattr(metis, "lip_features", lambda video: upsample(io["in/video_features"][None])[0])
    return metis


ITEMS = {
    "se": {"source": "source"},
    "vc": {"source": "source", "prompt": "prompt"},
    "tse": {"source": "source", "prompt": "prompt"},
    "tts": {"text": "Grüße, ça va?", "prompt": "prompt", "prompt_text": "Good evening"},
    "l2s": {"video": "video", "prompt": "prompt"},
}


@pytest.mark.golden
@pytest.mark.parametrize("flow", FLOWS)
def test_released_flow_token_for_token(folder, io, monkeypatch, flow):
    task, by, settings = FLOWS[flow]
    metis = system(folder, io, monkeypatch, **({"omni": None} if by == "omni" else {task: by}))
    item = dict(ITEMS[task])
    item |= {"seconds": 0.31} if flow == "tts_seconds" else {}
    item |= {"text": "Grüße, ça va?", "prompt_text": "Good evening"} if flow == "text_tse" else {}
    options = metis.options(task, item, **settings)
    job = metis.job(task, item, options)
    (request,), noise = job.requests, Recorded(io, flow)
    assert request.frames == int(io[f"{flow}/stage1_target_len"])
    if task != "se":
        assert torch.equal(request.voice.tokens, io[f"{flow}/stage1_prompt"][0].long())
        assert torch.equal(request.voice.codes, io[f"{flow}/s2a_prompt"][0].long())
    if f"{flow}/stage1_cond" in io:
        torch.testing.assert_close(request.condition, io[f"{flow}/stage1_cond"][0], atol=1e-4, rtol=1e-4)
    if f"{flow}/stage1_phone_id" in io:
        assert torch.equal(request.phones, io[f"{flow}/stage1_phone_id"][0].long())
    metis.run([job], options, noise=noise)
    assert noise.used == len(noise.draws)
    assert torch.equal(job.made[0].tokens, io[f"{flow}/stage1_out"][0].long())
    assert torch.equal(job.made[0].codes, io[f"{flow}/acoustic_out"][0].long())
    speech, _ = metis._finish(job)
    torch.testing.assert_close(speech.wav, io[f"{flow}/wav"], atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ what differs by default


@pytest.fixture
def ours(folder, io, monkeypatch):
    """The same system as it works by default."""
    return system(folder, io, monkeypatch, compat=None, se="full", vc="full", tts="full")


def calls(metis, task, **settings):
    """How often the transformers of stage 1 and of stage 2 ran for an item."""
    counted = {"stage1": 0, "stage2": 0}

    def count(name):
        def hook(*_):
            counted[name] += 1

        return hook

    nets = {"stage1": [metis.task_model(metis._model_for(task))], "stage2": [metis.stage2_layer1, metis.stage2_full]}
    hooks = [n.diff_estimator.layers[0].register_forward_hook(count(name)) for name, some in nets.items() for n in some]
    options = metis.options(task, **settings)
    metis.run([metis.job(task, ITEMS[task], options)], options)
    for hook in hooks:
        hook.remove()
    return counted


def test_prompts_are_aligned_and_the_target_is_whole(ours, folder, io, monkeypatch):
    """Difference 1: as released the acoustic prompt is a frame longer, so that the speech lacks its first frame."""
    voice = ours.voice("prompt")
    assert len(voice.tokens) == len(voice.codes) == len(voice.wav_16k) // 320 == 11
    options = ours.options("vc", steps=3)
    job = ours.job("vc", ITEMS["vc"], options)
    ours.run([job], options)
    assert len(job.made[0].tokens) == len(job.made[0].codes) == job.requests[0].frames
    released = system(folder, io, monkeypatch, vc="full")
    theirs = released.job("vc", ITEMS["vc"], released.options("vc", steps=3))
    released.run([theirs], released.options("vc", steps=3))
    assert len(theirs.made[0].codes) == len(theirs.made[0].tokens) - 1


def test_source_begins_where_the_prompt_ends(ours, io, monkeypatch):
    """Difference 2: row P of the condition is the source's first frame, whatever the prompt's length."""
    sounds = {"prompt": torch.randn(10_100), "source": torch.randn(9_000)}
    both = {name: (torch.randn(len(x) * 3 // 2), x) for name, x in sounds.items()}
    monkeypatch.setattr(ours, "_hear_both", lambda source, *_: both[source])
    heard = []
    monkeypatch.setattr(ours, "features", lambda wav, rate=0: heard.append(wav) or type(ours).features(ours, wav, rate))
    job = ours.job("vc", ITEMS["vc"], ours.options("vc"))
    start = len(job.requests[0].voice.tokens)
    assert start == (10_100 - 240) // 320
    assert torch.equal(heard[-1][start * 320 :], sounds["source"])


def test_passes_without_effect_are_skipped(ours, folder, io, monkeypatch):
    """Difference 3: without a prompt the guided pass equals the other one."""
    released = system(folder, io, monkeypatch, se="full")
    few, many = (calls(m, "se", steps=4, cfg=2.0, stage2_steps=(5, 3)) for m in (ours, released))
    assert few == {"stage1": 4, "stage2": 5 + 3 + 10}
    assert many == {"stage1": 8, "stage2": 5 + 2 * (3 + 10)}


def test_a_batch_equals_its_items(ours, monkeypatch):
    """Difference 4: guidance is rescaled per utterance, padding is masked: different lengths in one batch."""
    torch.manual_seed(3)
    sounds = {str(n): torch.randn(n) * 0.1 for n in (9_000, 12_345, 20_000, 16_000, 30_000)}
    both = {name: (torch.randn(len(x) * 3 // 2) * 0.1, x) for name, x in sounds.items()}
    monkeypatch.setattr(ours, "_hear_both", lambda source, *_: both[source])
    monkeypatch.setattr(ours, "_phones", lambda text, language: torch.arange(len(text)) % 300)
    kinds = {
        "se": [{"source": s} for s in ("9000", "30000", "16000")],
        "vc": [{"source": "9000", "prompt": "12345"}, {"source": "20000", "prompt": "9000"}],
        "tts": [
            {"text": "one two three", "prompt": "9000", "prompt_text": "hello", "seconds": 0.5},
            {"text": "four", "prompt": "20000", "prompt_text": "hello there", "seconds": 0.9},
        ],
    }
    for task, items in kinds.items():
        items = [{**item, "seed": i} for i, item in enumerate(items)]
        together = ours.generate(task, items, steps=5, cfg=1.5, stage2_steps=(4, 3), return_iterations=True)
        assert len(batches([ours.job(task, i, ours.options(task)).requests[0] for i in items], 4000)) == 1
        for item, (speech, traces) in zip(items, together, strict=True):
            ((alone, own),) = ours.generate(task, [item], steps=5, cfg=1.5, stage2_steps=(4, 3), return_iterations=True)
            assert torch.equal(own["ssl"].tokens, traces["ssl"].tokens)
            assert all(
                torch.equal(a.tokens, b.tokens) for a, b in zip(own["acoustic"], traces["acoustic"], strict=True)
            )
            torch.testing.assert_close(alone.wav, speech.wav, atol=1e-4, rtol=0)


def test_hidden_states_of_a_batch_equal_those_of_its_items(ours):
    """The same to 1e-4 before any choice is made: what is projected to logits."""
    model, projected = ours.task_model("vc"), []
    hook = model.to_logit.register_forward_hook(lambda _, given, __: projected.append(given[0]))
    torch.manual_seed(0)
    starts, lengths = torch.tensor([7, 3]), torch.tensor([6, 11])
    prompt, condition = torch.randint(0, 256, (2, 7)), torch.randn(2, 7 + 11, 16)
    settings = ours.options("vc", steps=1, cfg=2.0).stage1
    more = {"settings": settings, "noise": torch.zeros}
    model.generate(prompt, lengths, prompt_lengths=starts, condition=condition, **more)
    both = projected.pop()
    for i, (p, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = torch.cat([condition[i : i + 1, :p], condition[i : i + 1, 7 : 7 + n]], dim=1)
        model.generate(prompt[i : i + 1, :p], n, condition=rows, **more)
        torch.testing.assert_close(projected.pop()[0], both[i, :n], atol=1e-4, rtol=1e-4)
    hook.remove()


def test_enhanced_speech_is_as_long_as_its_source(ours):
    """Difference 5: the released code returns whole frames, 20 ms short."""
    assert len(ours.enhance("source", steps=2)) == 6000


def test_both_rates_come_from_one_reading(folder, tmp_path):
    """Difference 6: as released the file is resampled twice, here its 24 kHz copy is."""
    from metis_lib import audio

    sound = tmp_path / "sound.wav"
    torch.manual_seed(0)
    audio.write(sound, 0.1 * torch.randn(22_050), 44_100)
    (wav, ours), (same, theirs) = (
        Metis(Released(folder), torch.device("cpu"), compat=compat)._hear_both(sound, 0.1, 10)
        for compat in (None, "released")
    )
    assert torch.equal(wav, same) and torch.equal(theirs, audio.read(sound, 16_000))
    assert torch.equal(ours, audio.resample(wav, 24_000, 16_000)) and not torch.equal(ours, theirs)


# ------------------------------------------------------------------ tasks share a base


def test_released_prompts_may_be_long(folder, io, monkeypatch):
    """The released code knows no limit; ours is that of a prompt in memory and in training."""
    heard = []
    for compat in ("released", None):
        metis = system(folder, io, monkeypatch, compat=compat)
        monkeypatch.setattr(metis, "_hear_both", lambda source, shortest, longest: heard.append(longest) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            metis.voice("prompt.wav")
        monkeypatch.setattr(metis, "_phones", lambda *_: torch.zeros(1))
        monkeypatch.setattr(metis, "voice", lambda _: None)
        told = SimpleNamespace(config=SimpleNamespace(use_phones=True))
        monkeypatch.setattr(metis, "_held", lambda _, told=told: told)
        with pytest.raises(ZeroDivisionError):
            metis._tse("mixture.wav", "prompt.wav", "words", "more words", info={"task": "tse", "by": "omni"})
    assert heard == [LONGEST_INPUT, LONGEST_INPUT, 20.0, 30.0]


def test_lips_are_guided_as_the_released_call_does(folder, io, monkeypatch):
    asked = [system(folder, io, monkeypatch, compat=compat).options("l2s").stage1.cfg for compat in ("released", None)]
    assert asked == [2.5, 0.0]


def test_lora_takes_turns_in_one_base(folder, io, monkeypatch):
    import metis_lib.pipeline as pipeline
    from metis_lib.errors import MetisError

    apart = system(folder, io, monkeypatch, tse="lora").task_model("tse").state_dict()
    monkeypatch.setattr(pipeline, "LARGE", 0)
    metis = system(folder, io, monkeypatch, tse="lora")
    before = {key: value.clone() for key, value in metis.task_model("base").state_dict().items()}
    tse = metis.task_model("tse")
    for key, value in tse.state_dict().items():
        torch.testing.assert_close(value, apart[key])
    key = "diff_estimator.layers.0.mlp.up_proj.weight"
    assert tse.get_parameter(key).data_ptr() == metis.stage1.get_parameter(key).data_ptr()  # one copy
    assert not torch.equal(tse.state_dict()[key], before[key])
    tokens = torch.zeros(1, 0, dtype=torch.long)
    tse.generate(tokens, 3, condition=torch.zeros(1, 3, 16))
    base = metis.task_model("base")
    assert all(torch.equal(base.state_dict()[key], value) for key, value in before.items())  # to the last bit
    with pytest.raises(MetisError, match="task_model"):
        tse.generate(tokens, 3, condition=torch.zeros(1, 3, 16))
    metis.task_model("tse").generate(tokens, 3, condition=torch.zeros(1, 3, 16))
    config, added = metis.store.task("tse", metis._asked.get("tse"))
    only = replace(config, lora_rank=0), {k: v for k, v in added.items() if ".lora_" not in k}
    monkeypatch.setattr(metis.store, "task", lambda *_: only)
    adapted = metis.task_model("vc")  # trained as an adapter alone: it shares the base too
    assert torch.equal(adapted.state_dict()[key], before[key])


def test_only_what_a_task_needs_is_loaded(folder):
    metis = Metis.from_pretrained(folder, task="se", variant="full", device="cpu")
    assert {"ssl", "acoustic_decoder", "stage2_full"} <= set(vars(metis))
    assert not {"semantic", "acoustic", "stage1", "lips", "phones"} & set(vars(metis))
    shared = metis.stage2_full
    metis.load_task("tse")
    assert metis.stage2_full is shared and {"semantic", "acoustic"} <= set(vars(metis))


def test_bfloat16_speaks_too(folder, io, monkeypatch):
    metis = system(folder, io, monkeypatch, compat=None, dtype=torch.bfloat16, vc="full")
    speech = metis.convert("source", prompt="prompt", steps=4)
    assert torch.isfinite(speech.wav).all() and metis.task_model("vc").to_logit.weight.dtype == torch.bfloat16


# ------------------------------------------------------------------ long input


@pytest.mark.parametrize(("task", "start"), [("se", 0), ("vc", 11)])
def test_long_sources_are_worked_on_in_windows(ours, monkeypatch, task, start):
    """Every frame of the source is heard once, at its place; stage 2 goes on from what was made."""
    import metis_lib.pipeline as pipeline

    for name, value in {"SMALL": pipeline.Limits(0.5, 20, 15.0), "OVERLAP": 6, "CARRY": 5}.items():
        monkeypatch.setattr(pipeline, name, value)
    wav = torch.randn(320 * 71 + 250) * 0.1
    both = {"prompt": ours._hear_both("prompt"), "source": (torch.randn(len(wav) * 3 // 2), wav)}
    monkeypatch.setattr(ours, "_hear_both", lambda source, *_: both[source])
    options = ours.options(task, steps=2, stage2_steps=(2, 1))
    job = ours.job(task, ITEMS[task], options)
    heard, prompts = [], []
    condition = ours._condition
    stage2 = ours.stage2_layer1.generate
    with monkeypatch.context() as patch:
        patch.setattr(ours, "_condition", lambda piece, *more: heard.append(piece) or condition(piece, *more))
        patch.setattr(ours.stage2_layer1, "generate", lambda s, p, **k: prompts.append(p.shape[1]) or stage2(s, p, **k))
        ours.run([job], options)
    assert sum(len(made.codes) for made in job.made) == 71 == sum(len(made.tokens) for made in job.made)
    assert [len(piece) for piece in heard[:-1]] == [320 * 20 + 240] * (len(heard) - 1)
    assert torch.equal(heard[1], wav[320 * 14 :][: len(heard[1])]) and len(heard) == 5
    assert prompts == [start] + [start + 5] * 4
    speech, _ = ours._finish(job)
    assert len(speech) == len(wav) * 3 // 2


def test_codes_of_any_length_decode_to_the_same_samples(ours):
    codes = torch.randint(0, 128, (1, 100, 12))
    torch.testing.assert_close(ours.acoustic.decode_long(codes, 17), ours.acoustic.decode(codes), atol=1e-5, rtol=0)


def test_long_texts_are_said_by_sentence(ours, monkeypatch):
    monkeypatch.setattr(ours, "_phones", lambda text, language: torch.arange(len(text)) % 300)
    text = "One sentence is here. Another follows it! Is this the third? " * 30
    item = {"text": text, "prompt": "prompt", "prompt_text": "Hello."}
    job = ours.job("tts", item, ours.options("tts"))
    frames = [request.frames for request in job.requests]
    assert len(frames) > 3 and max(frames) <= 15 * 50 and sum(frames) > 30 * 50
    said = sum(len(request.phones) - len("Hello.") for request in job.requests)
    assert said == pytest.approx(len(text), rel=0.02)
