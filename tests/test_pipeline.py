"""The pipeline with random weights, its checkpoints, and the nano system that ships."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metis_lib import Metis, audio, generation
from metis_lib.checkpoints import SHIPPED, load_config_and_card, save_part, sha256
from metis_lib.config import AcousticCodecConfig, DecodeSettings, Stage1Config, preset
from metis_lib.errors import MetisError
from metis_lib.generation import Options, Request, Voice, run
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.tokenizers.listener import Listener, cheapest, mismatch

TESTSET = Path(__file__).parent.parent / "eval" / "testsets" / "human"


@pytest.fixture(scope="module")
def debug():
    return Metis.from_pretrained("debug", device="cpu")


@pytest.fixture(scope="module")
def nano():
    return Metis.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def voice():
    return TESTSET / "librivox-0870.flac"


def hum(seconds):
    time = torch.arange(int(24_000 * seconds)) / 24_000
    return 0.2 * torch.sin(2 * torch.pi * 200 * time) + 0.01 * torch.randn(len(time))


@pytest.mark.parametrize("seconds", [0.2, 0.777, 3.0])
def test_enhanced_speech_is_as_long_as_its_input(debug, seconds):
    wav = hum(seconds)
    out = debug.enhance(wav)
    assert len(out) == len(wav) and out.sample_rate == 24_000 and torch.isfinite(out.wav).all()
    assert len(debug.resynthesise(wav)) == len(wav)


def test_same_seed_same_samples(nano, voice):
    wav = audio.read(voice, 24_000)[:36_000]
    first, again, other = nano.enhance(wav, seed=1), nano.enhance(wav, seed=1), nano.enhance(wav, seed=2)
    assert torch.equal(first.wav, again.wav) and not torch.equal(first.wav, other.wav)
    said = [
        nano.speak("Hello there.", prompt=wav, prompt_text="Good morning.", seconds=0.6, seed=s, steps=4)
        for s in (0, 0, 1)
    ]
    assert torch.equal(said[0].wav, said[1].wav) and not torch.equal(said[0].wav, said[2].wav)


def test_length_of_speech(debug):
    asked = debug.speak("Hello there.", prompt=hum(1.0), prompt_text="Good morning.", seconds=1.5, steps=2)
    assert asked.seconds == pytest.approx(1.5)
    short = debug.speak("Hello.", prompt=hum(2.0), prompt_text="Good morning to everybody here.", steps=2)
    long = debug.speak("Hello " * 8, prompt=hum(2.0), prompt_text="Good morning to everybody here.", steps=2)
    assert long.seconds > 2 * short.seconds


def test_lengths_know_of_silence_at_both_ends(debug, monkeypatch):
    """Ends of a recording last longer, those of the prompt as those of the text: as when durations were learned."""

    def times(phones):
        out = torch.ones(len(phones))
        out[0] = out[-1] = 10.0
        return out

    said, wanted = "One long sentence that goes on for quite a while.", "Short."
    monkeypatch.setattr(debug.task_model("tts"), "times_of", times)
    units = [len(debug.phones.encode(text, "en")) + 18 for text in (said, wanted)]
    speech = debug.speak(wanted, prompt=hum(6.0), prompt_text=said, steps=2)
    assert speech.seconds == pytest.approx(round(len(debug.voice(hum(6.0)).tokens) * units[1] / units[0]) / 50)


def test_prompt_and_source_are_heard_as_the_model_learned(debug, monkeypatch):
    wav, voice = audio.resample(hum(1.5), 24_000, 16_000), debug.voice(hum(1.0))
    debug.task_model("vc")
    monkeypatch.setitem(debug._apart, "vc", True)
    condition, frames = debug._condition(wav, voice, "vc")
    own = debug.features(wav, 16_000)[0]
    assert torch.equal(condition, torch.cat([voice.features, own])) and frames == len(own)
    monkeypatch.setitem(debug._apart, "vc", False)
    together, same = debug._condition(wav, voice, "vc")
    assert torch.equal(together, debug.features(torch.cat([voice.wav_16k, wav]), 16_000)[0])
    assert len(together) - same == len(voice.tokens) and not torch.allclose(
        together[: len(voice.tokens)], voice.features
    )


def test_prompts_come_to_the_level_and_length_of_the_training(debug):
    """Loud or soft, with or without silence around it: the same voice."""
    wav = hum(1.2)
    soft = torch.cat([torch.zeros(12_000), 0.05 * wav, torch.zeros(24_000)])
    one, two = debug.voice(wav), debug.voice(soft)
    assert 0 <= len(two.tokens) - len(one.tokens) <= 9  # 80 ms at both ends
    assert two.wav_16k.abs().max() == pytest.approx(float(one.wav_16k.abs().max()), rel=0.15)


def test_hints_of_a_batch_are_those_of_its_items():
    """Convolutions over frame-level phones hear nothing of the padding between the rows of a batch."""
    torch.manual_seed(0)
    sizes = preset("debug")
    stage1 = Stage1(replace(sizes.stage1, use_phones=True, phone_vocab=20, text_hint="timed")).eval()
    nets = [Stage2(sizes.stage2_layer1).eval(), Stage2(sizes.stage2_full).eval()]
    torch.nn.init.ones_(stage1.text_hint.gate_scale)

    def request(p, t, seed):
        voice = Voice(torch.zeros(0), torch.arange(p) % 48, torch.zeros(p, 12, dtype=torch.long), torch.zeros(p, 32))
        hint, phones = (torch.arange(n) * 7 % 19 for n in (p + t, 6))
        return Request(t, torch.Generator().manual_seed(seed), voice, phones=phones, hint=hint)

    options = Options(DecodeSettings(steps=4, top_k=1, choice_temperature=0.0), stage2_steps=(1,) * 12)
    shapes = [(5, 40, 0), (30, 12, 1)]
    both = run(stage1, *nets, [request(*shape) for shape in shapes], options)
    for made, shape in zip(both, shapes, strict=True):
        assert torch.equal(made.tokens, run(stage1, *nets, [request(*shape)], options)[0].tokens)


@pytest.mark.parametrize("muted", ["hiss", "offset"])
def test_what_nobody_hears_is_refused(debug, tmp_path, muted):
    """A muted recording is not all zero: it has the dither of its converter, or an offset."""
    hiss = torch.randint(-1, 2, (24_000,), generator=torch.Generator().manual_seed(0)) / 32768
    audio.write(tmp_path / "muted.wav", hiss if muted == "hiss" else torch.full((24_000,), 0.2), 24_000)
    for ask in (debug.enhance, lambda place: debug.convert(hum(1.0), prompt=place)):
        with pytest.raises(MetisError, match=r"muted.wav: the recording is silent \(below -75 dB RMS\)"):
            ask(str(tmp_path / "muted.wav"))


def test_traces_show_every_iteration(debug):
    debug.enhance(hum(1.0), steps=5)
    trace = debug.traces["ssl"]
    assert len(trace.sequences) == 5 and not trace.masks[-1].any()
    assert (trace.masks.sum((1, 2)).diff() <= 0).all() and len(debug.traces["acoustic"]) == 12


def test_every_task_speaks(debug):
    """All flows with random weights: lengths, and the way into each."""
    wav, voice, crops = hum(1.2), hum(1.0), torch.randint(0, 255, (20, 96, 96), dtype=torch.uint8)
    few = {"steps": 2, "stage2_steps": (2, 1)}
    assert len(debug.convert(wav, prompt=voice, **few)) == len(wav)
    assert len(debug.extract(wav, prompt=voice, **few)) == len(wav)
    told = debug.extract(wav, prompt=voice, text="Hello.", prompt_text="Good morning.", **few)
    assert len(told) == len(wav) and told.info["by"] == "omni" and told.info["cfg"] == 2.5
    assert debug.voice_lips(crops, prompt=voice, **few).seconds == pytest.approx(0.8)
    assert debug.go_on(voice, seconds=0.7, **few).seconds == pytest.approx(0.7)
    speech, traces = debug.generate("se", [{"source": wav}], return_iterations=True, **few)[0]
    assert len(traces["ssl"].sequences) == 2 and len(traces["acoustic"]) == 12 and len(speech) == len(wav)


def test_options_change_the_decoding(debug):
    wav = hum(1.0)

    def decided(**options):
        trace = debug.generate("se", [{"source": wav}], steps=6, return_iterations=True, **options)[0][1]
        return trace["ssl"].sequences, trace["ssl"].masks, trace["acoustic"][0].sequences

    first = decided()
    for option in ({"schedule": "linear"}, {"top_k": 20}, {"choice_temperature": 0.0}, {"stage2_steps": (3,)}):
        same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(decided(**option), first, strict=True)]
        assert not all(same), option
    assert len(debug.speak("Hi.", prompt=wav, prompt_text="Hi there.", like=hum(0.7), steps=1)) == 24_000 * 0.7
    trace = debug.generate("se", [{"source": wav}], steps=4, schedule="linear", return_iterations=True)[0][1]["ssl"]
    frames = trace.tokens.shape[1]
    assert trace.masks.sum((1, 2)).tolist() == [int(frames * left / 4) for left in (3, 2, 1, 0)]


def test_tokens_of_a_recording(nano, voice):
    streams = nano.tokens(voice)
    seconds = audio.read(voice, 24_000).shape[0] / 24_000
    assert abs(len(streams["ssl"]) - 50 * seconds) < 3 and streams["acoustic"].shape[1] == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.enhance("nowhere.wav"), "nowhere.wav"),
        (lambda m: m.enhance(torch.zeros(24_000)), "silent"),
        (lambda m: m.enhance(torch.full((24_000,), torch.nan)), "NaN"),
        (lambda m: m.enhance(hum(0.1)), "0.2"),
        (lambda m: m.enhance((hum(1), 1)), "3600"),
        (lambda m: m.enhance(hum(1), speed=2), "unknown option 'speed'"),
        (lambda m: m.enhance(hum(1), schedule="zigzag"), "schedule"),
        (lambda m: m.enhance(hum(1), top_k=0), "top_k"),
        (lambda m: m.enhance(hum(1), cfg=-1), "cfg"),
        (lambda m: m.enhance(hum(1), seed=-1), "seed"),
        (lambda m: m.convert(hum(1), prompt=hum(21)), "20"),
        (lambda m: m.extract(hum(1), prompt=hum(1), text="Hello."), "prompt_text"),
        (lambda m: m.voice_lips(torch.zeros(5, 96, 96), prompt=hum(1)), "uint8"),
        (lambda m: m.voice_lips("nowhere.mp4", prompt=hum(1)), "nowhere.mp4"),
        (lambda m: m.go_on(hum(1), seconds=0), "seconds"),
        (lambda m: m.generate("sing", [{}]), "sing"),
        (lambda m: m.generate("vc", [{"source": hum(1)}]), "lacks 'prompt'"),
        (lambda m: m.generate("se", [{"source": hum(1), "pitch": 2}]), "unknown 'pitch'"),
        (lambda m: Metis.from_pretrained("debug", dtype="int8"), "dtype"),
        (lambda m: Metis.from_pretrained("debug", compat="2024"), "compat"),
        (lambda m: Metis.from_pretrained("debug", task="sing"), "sing"),
        (lambda m: m.enhance(hum(1), steps=0), "steps"),
        (lambda m: m.speak("", prompt=hum(1), prompt_text="Good morning."), "nothing to say"),
        (lambda m: m.speak("...", prompt=hum(1), prompt_text="Good morning."), "nothing to say"),
        (lambda m: m.speak("Hello.", prompt=hum(1), prompt_text="Hello.", language="xx"), "language"),
        (lambda m: m.speak("Hello.", prompt=hum(0.1), prompt_text="Hello."), "0.5"),
        (lambda m: m.speak("Hello.", prompt=hum(1), prompt_text="Hello.", seconds=100), "seconds"),
        (lambda m: m.task_model("singing"), "singing"),
        (lambda m: Metis.from_pretrained("nanoo"), "unknown model"),
        (lambda m: Metis.from_pretrained("debug", device="abacus"), "no device"),
        (lambda m: Metis.from_pretrained("debug", device="meta"), "no device"),
        (lambda m: Metis.from_pretrained("debug", device="cuda:99"), "no device"),
    ],
)
def test_bad_input_is_one_clear_line(debug, call, message):
    with pytest.raises(MetisError, match=message) as caught:
        call(debug)
    assert "\n" not in str(caught.value)


def test_folders_below_the_repository_are_found_from_a_notebook_too(monkeypatch):
    """Kernels start in notebooks/; other paths of a parameters cell are relative to the repository."""
    from metis_lib.checkpoints import SHIPPED, locate
    from metis_lib.evaluation.systems import testset_folder

    for place in (SHIPPED.parents[1], SHIPPED.parents[1] / "notebooks"):
        monkeypatch.chdir(place)
        assert locate("metis_lib/weights/nano").resolve() == (SHIPPED / "nano").resolve()
        assert testset_folder("eval/testsets/human").name == "human"
    assert Metis.from_pretrained("metis_lib/weights/nano").tasks
    with pytest.raises(MetisError, match="unknown model"):
        locate("metis_lib/weights/nowhere")


def test_stereo_and_other_rates_are_taken(debug, tmp_path):
    import soundfile

    stereo = np.stack([hum(1.0).numpy()] * 2, axis=1)[::3]
    soundfile.write(tmp_path / "stereo.wav", stereo, 8_000)
    assert debug.enhance(tmp_path / "stereo.wav").seconds == pytest.approx(1.0, abs=1e-3)


def test_shipped_weights_are_small_and_whole(nano):
    files = [path for path in (SHIPPED / "nano").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    for name in ("se", "tts"):
        assert not any("lora" in key for key in nano.task_model(name).state_dict())
    for folder, cls in (("acoustic_codec", AcousticCodecConfig), ("stage1", Stage1Config)):
        _, card = load_config_and_card(SHIPPED / "nano" / folder, cls)
        assert card["licence"] and card["data"] and card["scores"]["cpu_seconds"] > 60


def test_damaged_checkpoints_are_refused(tmp_path):
    copy = tmp_path / "system"
    shutil.copytree(SHIPPED / "nano", copy)
    weights = copy / "stage1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(MetisError, match="damaged"):
        Metis.from_pretrained(copy)
    shutil.copy(copy / "stage2_full" / "model.safetensors", weights)
    with pytest.raises(MetisError, match="does not fit"):
        Metis.from_pretrained(copy)
    weights.unlink()
    with pytest.raises(MetisError, match="missing"):
        Metis.from_pretrained(copy)
    (copy / "stage1" / "config.json").write_text('{"type": "Stage1Config", "config": {"tpyo": 1}}')
    with pytest.raises(MetisError, match="tpyo"):
        Metis.from_pretrained(copy)


def test_saving_is_exact_in_bf16(debug, tmp_path):
    codec = debug.acoustic.bfloat16().float()
    save_part(tmp_path / "codec", codec, codec.config, {"note": "x"})
    first = sha256(tmp_path / "codec" / "model.safetensors")
    save_part(tmp_path / "codec", codec, codec.config, {"note": "x"})
    assert sha256(tmp_path / "codec" / "model.safetensors") == first
    assert not list(tmp_path.rglob("*.part"))


def test_codec_keeps_human_speech_intelligible(nano):
    """STOI of resynthesised human recordings; the bar of the first nano system is 0.75."""
    import json

    from pystoi import stoi

    rows = [json.loads(line) for line in (TESTSET / "manifest.jsonl").read_text().splitlines()]
    scores = []
    for row in rows:
        if row["task"] == "codec":
            clean = audio.read(TESTSET / row["clean"], 24_000)
            scores.append(stoi(clean.numpy(), nano.resynthesise(clean).wav.numpy(), 24_000))
    assert len(scores) == 12 and np.mean(scores) >= 0.75


def test_more_candidates_are_other_draws(debug, voice):
    wav = audio.read(voice, 24_000)[:30_000]
    item = {"text": "Good morning to you.", "prompt": wav, "prompt_text": "Hello.", "seconds": 0.8}
    settings = {"steps": 3, "stage2_steps": (2, 2), "top_k": 50, "stage2_top_k": 50}
    seeds = [{**item, "seed": seed} for seed in range(4)]
    ones, same = (debug.generate("tts", seeds, **settings, **more) for more in ({}, {"candidates": 1}))
    more = {"candidates": 4, "stage2_candidates": 3}
    many = debug.generate("tts", [*seeds, {**item, "seconds": 0.5}], **settings, **more)
    alone = debug.generate("tts", seeds[1:2], **settings, **more)[0]
    assert all(torch.equal(a.wav, b.wav) for a, b in zip(ones, same, strict=True))
    assert torch.equal(many[1].wav, alone.wav) and [len(s) for s in many[:4]] == [len(s) for s in ones]
    assert not all(torch.equal(a.wav, b.wav) for a, b in zip(ones, many[:4], strict=True))
    spoken = debug.decode_tokens(torch.arange(40), wav, stage2_candidates=2)
    assert len(spoken) == len(debug.decode_tokens(torch.arange(40), wav))


def test_the_listener_keeps_what_says_the_phones():
    torch.manual_seed(0)
    frames, phones = 60, torch.tensor([3, 1, 4])
    said = torch.full((frames, 6), -6.0)
    said[:, 0] = 0.0
    for place, phone in zip((10, 30, 50), phones.tolist(), strict=True):
        said[place, phone + 1], said[place, 0] = 4.0, -6.0
    silent = torch.full((frames, 6), -6.0).index_fill(1, torch.tensor([0]), 0.0)

    class Known(Listener):
        def __init__(self):
            pass

        def in_tokens(self, tokens):
            return said.log_softmax(-1) if int(tokens[0]) else silent.log_softmax(-1)

        def in_codes(self, codes):
            halves = [said.clone(), said.clone()]
            halves[0][frames // 2 + 5 :], halves[1][: frames // 2 + 5] = (
                silent[: frames // 2 - 5],
                silent[: frames // 2 + 5],
            )
            return [half.roll(2, 0).log_softmax(-1) for half in halves]  # heard two frames late

    draws = [torch.zeros(frames), torch.ones(frames), torch.zeros(frames)]
    assert Known().closest(draws, phones) == 1
    codes = [torch.zeros(frames, 2, dtype=torch.long), torch.ones(frames, 2, dtype=torch.long)]
    joined = Known().best_of(torch.ones(frames), codes)[:, 0]
    assert joined[:32].eq(0).all() and joined[48:].eq(1).all(), "each half comes from the draw that says it"


def test_draws_of_a_conversion_are_joined_of_what_says_what_the_source_says():
    torch.manual_seed(0)
    frames, half = 80, 40
    source = torch.randint(1, 5, (frames // 8,)).repeat_interleave(8)

    class Known(Listener):  # features and tokens are phones, one said clearly in each frame
        def __init__(self):
            pass

        def _heard(self, features):
            return (8.0 * torch.nn.functional.one_hot(features.long(), 6)).log_softmax(-1)

        def in_tokens(self, tokens):
            return self._heard(tokens % 10)

    wrong = source % 4 + 1
    draws = [torch.cat([source[:half], wrong[half:]]), 10 + torch.cat([wrong[:half], source[half:]])]
    made = Known().likest(source, draws)
    assert made[: half - 4].lt(10).all() and made[half + 4 :].ge(10).all(), "each half of the draw that says it"
    assert ((made % 10) == source).float().mean() > 0.9


def test_conversion_listens_and_other_tasks_that_hear_do_not(debug, voice, monkeypatch):
    asked, spoken, decode = [], [], generation.decode

    def like_that(self, features, draws):
        asked.append((len(features), [len(draw) for draw in draws]))
        return torch.full_like(draws[0], 7)

    def speak(layer1, full, requests, tokens, options, **more):
        spoken.extend(tokens)
        return decode(layer1, full, requests, tokens, options, **more)

    monkeypatch.setattr(Listener, "likest", like_that)
    monkeypatch.setattr(generation, "decode", speak)
    source, prompt = hum(1.0), audio.read(voice, 24_000)[:30_000]
    settings = {"steps": 2, "stage2_steps": (1,), "candidates": 3}
    _, traces = debug.generate("vc", [{"source": source, "prompt": prompt}], return_iterations=True, **settings)[0]
    frames = len(traces["ssl"].tokens[0])
    assert asked == [(frames, [frames] * 3)], "the features of the source alone, and of each draw as many tokens"
    assert torch.equal(spoken[0], torch.full((frames,), 7)), "what was joined is what is spoken"
    debug.enhance(source, **settings)
    debug.extract(source, prompt=prompt, **settings)
    assert len(asked) == 1 and not any(one.eq(7).all() for one in spoken[1:])
    spoken.clear()
    debug.convert(hum(25.0), prompt=prompt, **settings)
    assert len(asked) > 2 and all(one.eq(7).all() for one in spoken), "each window of a long source is compared"
    assert len(spoken[1]) < asked[2][0], "without what the window before has said"


def test_changing_draws_costs():
    costs = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0, 1.0]])
    assert cheapest(costs, 0.1).tolist() == [0, 0, 1, 0, 0] and cheapest(costs, 2.0).tolist() == [0] * 5
    one = torch.randn(20, 5).log_softmax(-1)
    assert mismatch(one, one.roll(8, 0)).mean() > mismatch(one, one).mean()


def test_candidates_need_a_phone_head(tmp_path, voice):
    shutil.copytree(SHIPPED / "nano", tmp_path / "system")
    (tmp_path / "system" / "ssl" / "phones.safetensors").unlink(missing_ok=True)
    system = Metis.from_pretrained(tmp_path / "system", device="cpu")
    with pytest.raises(MetisError, match="no phone head"):
        system.enhance(hum(0.5), stage2_candidates=2)
    with pytest.raises(MetisError, match="one draw"):
        Metis.from_pretrained("debug", device="cpu", compat="released").enhance(hum(0.5), stage2_candidates=2)
    with pytest.raises(MetisError, match="candidates must be a whole number, at least 1, not 0"):
        system.enhance(hum(0.5), candidates=0)


def test_numbers_of_other_libraries(debug):
    a, b = (debug.enhance(hum(0.5), seed=seed, steps=1) for seed in (3, np.int64(3)))
    assert torch.equal(a.wav, b.wav) and type(b.info["seed"]) is int
    assert debug.go_on(hum(0.6), seconds=np.float32(0.2), steps=1).seconds == pytest.approx(0.2, abs=0.03)
    assert debug.generate("base", [{"prompt": hum(0.6), "seconds": None}], steps=1)[0].seconds > 2.9


def test_streams_that_differ_by_a_frame_are_a_voice(debug):
    source, voice = debug.tokens(hum(0.4)), debug.tokens(hum(0.6))
    longer = torch.cat([voice["acoustic"], voice["acoustic"][-1:]])[: len(voice["ssl"]) + 1]
    codes = debug.acoustic_tokens(source["ssl"], (voice["ssl"], longer))
    assert len(codes) == len(source["ssl"])
    assert torch.equal(codes, debug.acoustic_tokens(source["ssl"], (voice["ssl"], longer[:-1])))


def test_a_share_replaces_the_number_that_the_system_keeps(nano):
    assert nano.options("vc").stage2.top_k == 20
    asked = nano.options("vc", stage2_top_fraction=0.5)
    assert asked.stage2.top_k is None and asked.stage2.top_fraction == 0.5
    assert nano.options("vc", top_fraction=0.5).stage2.top_k == 20


def test_a_system_of_the_published_sizes_is_decoded_as_released(tmp_path):
    """Also as a folder of ours: converted weights are the same weights."""
    from metis_lib.config import preset, to_dict
    from metis_lib.generation import RELEASED_STEPS
    from metis_lib.stores import PARTS, Folder

    def options_of(name):
        for part, (config, _, at) in PARTS.items():
            (tmp_path / name / at).mkdir(parents=True)
            document = {"type": config.__name__, "config": to_dict(getattr(preset(name), part))}
            (tmp_path / name / at / "config.json").write_text(json.dumps(document))
        return Metis(Folder(tmp_path / name), torch.device("cpu")).options("tts")

    assert options_of("paper").stage2_steps == RELEASED_STEPS != options_of("debug").stage2_steps


def test_arrays_at_24_khz_are_heard_as_such_as_released(debug):
    """The 16 kHz that the SSL encoder hears come from the source itself there, whose rate an array does not tell."""
    released = Metis(debug.store, torch.device("cpu"), compat="released")
    wav = hum(1.0)
    for given in (wav, wav.numpy()):
        assert len(released._hear_both(given, 0.2, 10.0)[1]) == 16_000


def test_a_gpu_without_kernels_is_left_alone(monkeypatch):
    from metis_lib.pipeline import pick_device

    zeros = torch.zeros

    def old(*size, device=None, **more):
        if device == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nmore")
        return zeros(*size, device=device, **more)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", old)
    with pytest.warns(UserWarning, match="no kernel image"):
        assert pick_device("auto").type == "cpu"
