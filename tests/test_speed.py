"""What is done faster than the released code does it gives the same; and the bench that measures it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from metis_lib import cli
from metis_lib.config import DecodeSettings, preset
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.speed import as_released
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import WNConv1d, freeze
from metis_lib.tokenizers.ssl import SSLEncoder

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


def test_bench_of_generation(capsys):
    command = [
        "bench",
        "generate",
        "--preset=debug",
        "--tasks",
        "tts",
        "se",
        "--seconds=1",
        "--repeats=1",
        "--device=cpu",
    ]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["tasks"]) == {"tts", "se"}
    for task in found["tasks"].values():
        assert task["step_agreement"] == 1.0 and task["reference_cpu_s"] > 0 and 0 < task["matmul_share"] < 1.5
        assert min(task["bf16_ratio"], task["fp32_ratio"], task["batch_gain"], task["rtf"]) > 0
        assert set(task["parts"]["released"]) >= {"ssl", "stage1", "stage2_layer1", "stage2_full", "acoustic_decode"}
    assert cli.main(["bench", "generate", "--preset=debug", "--tasks", "sing"]) == 2
