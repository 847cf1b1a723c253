"""What is done faster than the released code does it gives the same; and the bench that measures it."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from metis_lib import Metis, cli
from metis_lib.checkpoints import SHIPPED
from metis_lib.config import DecodeSettings, preset
from metis_lib.errors import MetisError
from metis_lib.generation import RELEASED_STEPS
from metis_lib.models import masked, transformer
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.models.transformer import Packs
from metis_lib.stores import Random
from metis_lib.tokenizers import ssl
from metis_lib.tokenizers.acoustic import AcousticCodec, Snake1d
from metis_lib.tokenizers.semantic import WNConv1d, freeze
from metis_lib.tokenizers.ssl import Linear, SSLEncoder, product, quicken
from recipes.bench import speed
from recipes.bench.speed import as_released, count_flops
from recipes.nano import pareto

SURE = {"top_k": 1, "choice_temperature": 0.0}
"""Nothing is left to chance, so that two orders of draws can be compared."""


def lively(model):
    """Random weights that say more than one thing, in fp64."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    return model.double().eval()


@pytest.mark.parametrize(("prompt", "cfg"), [(7, 2.0), (7, 0.0), (0, 0.0)])
def test_stage1_says_the_same_as_in_the_released_order(prompt, cfg):
    sizes = replace(preset("debug").stage1, adapter="gated", use_phones=True, phone_vocab=20)
    model = lively(Stage1(sizes))
    tokens = torch.randint(0, 48, (1, prompt))
    condition = torch.randn(1, prompt + 40, sizes.cond_dim, dtype=torch.float64)
    phones = torch.randint(0, 19, (1, 9)) if prompt else None
    settings = DecodeSettings(steps=9, cfg=cfg, **SURE)
    with as_released():
        wanted = model.generate(
            tokens,
            40,
            phones=phones,
            condition=condition,
            settings=replace(settings, released=True),
            return_iterations=True,
        )
    model.diff_estimator.fuse()
    got = model.generate(tokens, 40, phones=phones, condition=condition, settings=settings, return_iterations=True)
    assert torch.equal(got.sequences, wanted.sequences) and torch.equal(got.masks, wanted.masks)
    assert len(wanted.tokens.unique()) > 5


@pytest.mark.parametrize("start", [6, 0])
def test_stage2_says_the_same_as_in_the_released_order(start):
    model = lively(Stage2(replace(preset("debug").stage2_full, num_quantizers=4)))
    semantic, prompt = torch.randint(0, 48, (1, start + 30)), torch.randint(0, 16, (1, start, 4))
    first = torch.randint(0, 16, (1, 30, 1))
    settings = DecodeSettings(cfg=2.5, temperature=1.5, **SURE)
    more = {"first_layer": first, "steps": (1, 7, 3, 1)}
    with as_released():
        wanted = model.generate(semantic, prompt, settings=replace(settings, released=True), **more)
    model.diff_estimator.fuse()
    got = model.generate(semantic, prompt, settings=settings, **more)
    assert torch.equal(got, wanted) and len(wanted.unique()) > 5


def test_fused_projections_share_their_memory_and_follow_the_weights():
    model = Stage1(preset("debug").stage1).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.diff_estimator.fuse()
    layer = model.diff_estimator.layers[0]
    assert layer.self_attn.qkv.data_ptr() == layer.self_attn.q_proj.weight.data_ptr()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.device("meta"):
        sharing = Stage1(preset("debug").stage1)
    sharing.load_state_dict(model.state_dict(), assign=True)
    sharing.diff_estimator.fuse()
    assert sharing.diff_estimator.layers[0].self_attn.qkv.data_ptr() == layer.self_attn.qkv.data_ptr()
    x = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        layer.self_attn.v_proj.weight.mul_(2)
        now = model.diff_estimator(x, torch.ones(1))
        layer.self_attn.qkv = None
        torch.testing.assert_close(model.diff_estimator(x, torch.ones(1)), now)
    moved = model.to(torch.float64)  # the views are gone: the projections work one by one
    assert moved.diff_estimator(x.double(), torch.ones(1)).dtype == torch.float64


@pytest.mark.parametrize("padded", [False, True])
def test_attention_in_bf16_is_that_of_fp32(padded):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 45, 32) for _ in range(3))
    mask = torch.ones(2, 1, 1, 45, dtype=torch.bool)
    if padded:
        mask[1, ..., 30:] = False
    with torch.no_grad():
        got = transformer.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask if padded else None)
        wanted = transformer.attend(q, k, v, mask)
    torch.testing.assert_close(got.float(), wanted, atol=0.02, rtol=0)


@pytest.mark.skipif(not ssl.HAS_ONEDNN, reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_packed_weights_say_the_same_until_they_change(monkeypatch):
    monkeypatch.setattr(transformer, "LARGE", 1)
    torch.manual_seed(0)
    net = Stage1(preset("debug").stage1).bfloat16().eval().requires_grad_(False).diff_estimator
    x, packs = torch.randn(2, 37, net.norm.to_weight.in_features), Packs()
    net.fuse()
    wanted = net(x, torch.ones(2))
    net.fuse(packs)
    torch.testing.assert_close(net(x, torch.ones(2)), wanted)
    assert len(packs.held) == 6 * len(net.layers)
    net.layers[0].mlp.down_proj.weight.mul_(3)
    packs.forget()
    assert not torch.equal(changed := net(x, torch.ones(2)), wanted)
    net.fuse()
    torch.testing.assert_close(net(x, torch.ones(2)), changed)
    net.float().fuse(packs)  # only bf16 is packed
    assert net.layers[0].mlp.packs is None


def test_snakes_a_few_channels_at_a_time_are_the_same():
    snake = Snake1d(10)
    torch.nn.init.uniform_(snake.alpha, 0.2, 2.0)
    x = torch.randn(2, 10, 33)
    with torch.no_grad():
        torch.testing.assert_close(snake(x), snake.plain(x))


def test_position_bias_is_gathered_to_the_same():
    torch.manual_seed(0)
    encoder = SSLEncoder(replace(preset("debug").ssl, num_layers=3, output_layer=3)).eval()
    features, lengths = torch.randn(2, 150, 160), torch.tensor([150, 97])
    with torch.no_grad():
        got = encoder(features, lengths)
        with as_released():
            wanted = encoder(features, lengths)
    torch.testing.assert_close(got[0], wanted[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(got[1, :97], wanted[1, :97], atol=1e-4, rtol=0)


def test_the_gathered_bias_learns_as_the_library_does():
    torch.manual_seed(0)
    encoder = SSLEncoder(replace(preset("debug").ssl, num_layers=3, output_layer=3)).train()
    features, lengths = torch.randn(2, 150, 160), torch.tensor([150, 97])

    def gradients():
        encoder.zero_grad()
        encoder(features, lengths)[0].square().mean().backward()
        return {key: p.grad.clone() for key, p in encoder.named_parameters() if p.grad is not None}

    got = gradients()
    with as_released():
        wanted = gradients()
    assert got.keys() == wanted.keys() and any("distance_embedding" in key for key in got)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, atol=1e-5, rtol=1e-3)


def test_frozen_weights_are_computed_once_and_are_the_same():
    torch.manual_seed(0)
    conv, x = WNConv1d(3, 4, 5), torch.randn(1, 3, 20)
    with torch.no_grad():
        wanted = conv(x)
        assert conv.weight() is not conv.weight()
        freeze(conv)
        assert torch.equal(conv(x), wanted) and conv.weight() is conv.weight()
        assert conv.double().weight().dtype == torch.float64
    conv(x.double()).sum().backward()
    assert conv.weight_g.grad is not None  # who learns computes it
    codec, wav = AcousticCodec(preset("debug").acoustic).eval(), torch.randn(1, 4800)
    with torch.no_grad():
        codes = codec.encode(wav)
        assert torch.equal(freeze(codec).encode(wav), codes)


def test_products_are_the_same_and_learn_as_before():
    torch.manual_seed(0)
    x, net = torch.randn(3, 50, 64), quicken(torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 8)))
    assert all(type(part) is Linear for part in net)
    wanted = F.linear(F.linear(x.double(), net[0].weight.double(), net[0].bias.double()), net[1].weight.double())
    with torch.no_grad():
        torch.testing.assert_close(net(x), (wanted + net[1].bias.double()).float())
        assert torch.equal(net(x)[1], net(x[1]))  # alone as in a batch
        assert torch.equal(product(x.double(), wanted.new_ones(5, 64)), F.linear(x.double(), wanted.new_ones(5, 64)))
        assert product(x[:0], net[0].weight).shape == (0, 50, 96)
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).dtype == torch.bfloat16  # as in the validation of a training
    net(x).sum().backward()
    assert net[0].weight.grad.abs().sum() > 0


def test_operations_are_counted_whoever_does_them():
    x, w = torch.randn(2, 7, 16), torch.randn(5, 16)
    q = torch.randn(2, 3, 7, 4)
    with torch.no_grad(), count_flops() as counter:
        product(x, w)
        F.linear(x.double(), w.double())
        F.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * (2 * 14 * 16 * 5) + 2 * (2 * 6 * 7 * 7 * 4)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: a number read off a tensor, a size that depends on one, a copy."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select")), name
        return func(*args, **(kwargs or {}))


def decoding(stack, between=lambda logits: None):
    """A decoding of which all but the first logits are made where nothing can be read off a tensor."""
    calls, lengths = [], torch.tensor([20, 13])

    def predict(tokens, is_masked, step, rows):
        if not calls:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(NoWaiting())
        calls.append(step)
        logits = torch.randn(*rows.shape, 30)
        between(logits)
        return logits

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    masked.decode(predict, lengths, DecodeSettings(steps=6), generator=generators)
    return calls


@pytest.mark.parametrize("read", [torch.Tensor.tolist, lambda x: bool(x.any()), lambda x: torch.tensor([3])])
def test_nothing_waits_for_the_device_while_it_decodes(read):
    with ExitStack() as stack:
        assert decoding(stack) == list(range(6))
    with ExitStack() as stack, pytest.raises((AssertionError, DataDependentOutputException, RuntimeError)):
        decoding(stack, read)  # the check sees it


def spoken(model, batch, prompt, frames, cfg):
    """What a model says of random input, utterances of different lengths."""
    noise = torch.Generator().manual_seed(batch + prompt + frames)
    lengths = torch.tensor([frames - 3 * i for i in range(batch)])
    return model.generate(
        torch.randint(0, 48, (batch, prompt), generator=noise),
        lengths,
        prompt_lengths=torch.tensor([prompt - (prompt > 0) * i for i in range(batch)]),
        settings=DecodeSettings(steps=5, cfg=cfg),
        generator=[torch.Generator().manual_seed(i) for i in range(batch)],
        return_iterations=True,
    )


def test_passes_in_buckets_say_the_same(monkeypatch):
    """What is compiled is always given rows by the bucket; here nothing is compiled, only padded."""
    shapes = set()

    def plain(call, **_):
        def noted(x, scales, plan, keep):
            shapes.add((x.shape[1] % 64, plan[1].shape[-1] - x.shape[1], 0 if keep is None else keep.shape[1] % 64))
            return call(x, scales, plan, keep)

        return noted

    monkeypatch.setattr(torch, "compile", plain)
    cases = [(1, 7, 40, 2.0), (1, 0, 64, 0.0), (3, 7, 70, 2.0), (2, 9, 133, 0.0)]
    model = lively(Stage1(preset("debug").stage1))
    model.diff_estimator.fuse()
    wanted = [spoken(model, *case) for case in cases]
    model.diff_estimator.compile_passes()
    for case, trace in zip(cases, wanted, strict=True):
        got = spoken(model, *case)
        assert torch.equal(got.sequences, trace.sequences) and torch.equal(got.masks, trace.masks), case
    assert shapes == {(0, 0, 0)}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_passes_say_the_same():
    model = lively(Stage1(replace(preset("debug").stage1, num_layers=1)))
    model.diff_estimator.fuse()
    cases = [(2, 7, 40, 0.0), (2, 7, 100, 0.0)]
    wanted = [spoken(model, *case) for case in cases]
    model.diff_estimator.compile_passes()
    for case, trace in zip(cases, wanted, strict=True):
        assert torch.equal(spoken(model, *case).sequences, trace.sequences), case


def test_few_steps_stand_for_those_of_the_layers_that_there_are():
    """Nano makes six of twelve layers: 10 steps of the second and one of each other, of which 4 and 4 were run."""
    metis = Metis(Random("nano"), torch.device("cpu"))
    item = speed.item_of("se", 1.0, 1.0)
    clock, more = speed.once(metis, "se", item, False)
    layers = metis.stage2_full.config.num_quantizers
    wanted = sum(RELEASED_STEPS[1:layers]) / (speed.SHARE["stage2_full"] + layers - 2)
    assert layers == 6 and more["stage2_full"] == wanted and clock.took["stage2_full"] > 0


def test_bench_of_generation(capsys, tmp_path):
    command = ["bench", "generate", "--preset=debug", "--seconds=1", "--repeats=1", "--device=cpu", "--batch=2"]
    assert cli.main([*command, "--tasks", "tts,se", f"--out={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"tts", "se"} and json.loads((tmp_path / "generate-debug.json").read_text()) == found
    assert (tmp_path / "generate-debug.png").stat().st_size > 1000
    for task in found.values():
        assert task["step_agreement"] == 1.0 and min(task["reference_cpu_s"], task["matmul_share"]) > 0
        assert min(task["bf16_ratio"], task["fp32_ratio"], task["batch_gain"], task["rtf"]) > 0
        parts = {"ssl", "stage1", "stage2_layer1", "stage2_full", "acoustic_decode"}
        for key in ("parts", "gflop", "share", "work_mb"):
            assert set(task[key]) == {"released", "fp32", "bf16"}
            assert all(set(values) >= parts for values in task[key].values())
        assert all(n > 0 for values in task["gflop"].values() for n in values.values())
        # in bf16 attention sees whole vectors of keys
        assert task["gflop"]["fp32"]["stage1"] == pytest.approx(task["gflop"]["bf16"]["stage1"], rel=0.1)
        assert task["gflop"]["released"]["ssl"] >= task["gflop"]["fp32"]["ssl"]
        assert task["weights_mb"]["fp32"] > task["weights_mb"]["bf16"] > 0
    assert cli.main(["bench", "generate", "--preset=debug", "--tasks", "sing"]) == 2


def test_bench_of_tokenising(capsys, tmp_path):
    command = ["bench", "tokenise", "--preset=debug", "--seconds=1", "--batch=2", "--repeats=1", "--device=cpu"]
    assert cli.main([*command, f"--out={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "tokenise-debug.json").read_text())["tokenise"] == found
    assert (tmp_path / "tokenise-debug.png").stat().st_size > 1000
    variants = {"released", *(f"{d} {how}" for d in ("float32", "bfloat16") for how in ("one by one", "batch"))}
    parts = {"read", "ssl", "semantic_codec", "acoustic_codec"}
    for key in ("parts", "gflop", "share", "work_mb"):
        assert set(found[key]) == variants and all(set(values) == parts for values in found[key].values())
    for key in ("ratio", "ssl_ratio", "times_real_time", "matmul_share", "weights_mb"):
        assert set(found[key]) == variants and min(found[key].values()) > 0
    assert found["ratio"]["released"] == 1.0 and found["ssl_difference"] < 1e-4
    layers = preset("debug").ssl
    assert layers.output_layer < layers.num_layers
    assert found["gflop"]["float32 one by one"]["ssl"] < found["gflop"]["released"]["ssl"]
    assert cli.main([*command, "--seconds=0.1"]) == 2


def test_a_system_brings_its_own_defaults(tmp_path):
    system = tmp_path / "system"
    shutil.copytree(SHIPPED / "nano", system)
    (system / "decode.json").write_text('{"any": {"stage2_cfg": 1.0, "stage2_steps": [7, 3]}, "tts": {"steps": 11}}')
    metis = Metis.from_pretrained(system, device="cpu")
    se, tts = metis.options("se"), metis.options("tts", stage2_cfg=0.5)
    assert (se.stage2.cfg, se.stage2_steps[:3]) == (1.0, (7, 3, 1)) and tts.stage1.steps == 11
    assert tts.stage2.cfg == 0.5  # what is asked for comes first
    released = Metis(metis.store, metis.device, compat="released")
    assert released.options("tts").stage2_steps == RELEASED_STEPS and released.options("tts").stage1.steps == 25
    (system / "decode.json").write_text("{")
    with pytest.raises(MetisError, match=r"decode.json is not valid JSON"):
        Metis.from_pretrained(system)


def test_the_cheapest_of_the_good_is_chosen():
    def point(passes, errors, voices):
        rows = [{"wer": w, "sim_prompt": s} for w, s in zip(errors, voices, strict=True)]
        return {"passes": passes, "wer": {"mean": sum(errors) / len(errors)}, "rows": rows}

    best = point(40, [0.10, 0.20], [0.60, 0.60])
    near = point(12, [0.10, 0.22], [0.60, 0.59])
    other_voice = point(6, [0.10, 0.21], [0.40, 0.40])
    wrong = point(2, [0.30, 0.30], [0.60, 0.60])
    assert pareto.choose([best, near, other_voice, wrong]) is near


def test_points_of_a_sweep_are_measured_once(monkeypatch, tmp_path):
    system = tmp_path / "nano"
    shutil.copytree(SHIPPED / "nano", system)
    monkeypatch.setitem(pareto.SWEEPS, "se", ("se", "nano", [{"steps": 1}, {"steps": 3}]))
    lines = []
    for _ in range(2):
        found = pareto.main(["se"], model=str(system), testset="human", items=2, out=tmp_path, say=lines.append)
    assert len(lines) == 2 and found["se"]["passes"] in (1, 3)
    stored = json.loads((tmp_path / "pareto.json").read_text())
    assert [p["passes"] for p in stored["points"]] == [1, 3] and stored["points"][0]["n"] == 2
    before = json.loads((SHIPPED / "nano/decode.json").read_text())
    after = json.loads((system / "decode.json").read_text())
    assert set(before) > {"se"} and after == before | {"se": found["se"]["options"]}, "the other defaults stay"
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    monkeypatch.setattr(pareto, "OUT", tmp_path / "bench")  # nano's points and another system's do not mix
    pareto.main(["se"], model=str(system), testset="human", items=2, say=lines.append)
    assert (tmp_path / "bench/nano/pareto.json").is_file() and not (tmp_path / "bench/pareto.json").exists()
    assert Metis.from_pretrained(system).options("se").stage1.steps == found["se"]["options"]["steps"]
