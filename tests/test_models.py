"""Stage 1, stage 2, masked decoding and LoRA against vectors computed by the reference implementation."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from metis_lib.config import DecodeSettings, Stage1Config, Stage2Config
from metis_lib.errors import MetisError
from metis_lib.models import adapt, masked
from metis_lib.models.stage1 import Stage1, stretch
from metis_lib.models.stage2 import Stage2
from metis_lib.models.transformer import sinusoidal_embedding

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = dict(atol=1e-4, rtol=0)
S1 = Stage1Config(hidden_size=64, num_layers=3, num_heads=4, codebook_size=50, cond_dim=24)


def vectors(name, prefix="sd/"):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    io = {k.removeprefix("io/"): v for k, v in tensors.items() if k.startswith("io/")}
    return state, io


class Recorded:
    """Noise in the order in which the reference drew it; the greedy last step draws none for sampling."""

    def __init__(self, io, prefix):
        self.io, self.prefix, self.step, self.scores = io, prefix, 0, False

    def __call__(self, shape):
        if not self.scores and len(shape) == 3:
            self.scores = True
            return self.io[f"{self.prefix}noise_sample_{self.step}"]
        noise = self.io[f"{self.prefix}noise_score_{self.step}"]
        self.scores, self.step = False, self.step + 1
        return noise


@pytest.fixture(scope="module")
def omni():
    state, io = vectors("stage1")
    model = Stage1(replace(S1, use_phones=True, adapter="gated")).eval()
    model.load_state_dict(state, strict=True)
    return model, io


@pytest.mark.golden
def test_transformer_with_and_without_phones(omni):
    model, io = omni
    estimator = model.diff_estimator
    temb = sinusoidal_embedding(io["de_t"], 64)
    torch.testing.assert_close(temb, io["de_temb"], **TOLERANCE)
    out = estimator(io["de_x"], io["de_t"], io["de_xmask"])
    torch.testing.assert_close(out, io["de_out_nophone"], **TOLERANCE)
    prefix = estimator.cond_mlp(io["de_phone_emb"])
    mask = torch.cat([io["de_phone_mask"], io["de_xmask"]], dim=1)
    out = estimator(torch.cat([prefix, io["de_x"]], dim=1), io["de_t"], mask)[:, 6:]
    torch.testing.assert_close(out, io["de_out_phone"], **TOLERANCE)
    torch.testing.assert_close(model.cond_adapter(io["ad_in"]), io["ad_out"], **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "steps", "cfg", "target", "top"),
    [
        ("tts", 6, 2.5, 21, 0.8),
        ("ttszero", 6, 2.5, 21, 0.98),
        ("vc", 5, 1.0, 21, 0.8),
        ("se", 5, 0.0, 21, 0.8),
        ("one", 1, 2.5, 21, 0.8),
        ("short", 8, 2.5, 2, 0.8),
    ],
)
def test_stage1_decodes_token_for_token(omni, case, steps, cfg, target, top):
    model, io = omni
    prompt = io["prompt"].long() if case != "se" else torch.zeros(1, 0, dtype=torch.long)
    arguments = {}
    if case in ("tts", "ttszero", "one", "short"):
        arguments["phones"] = io["phone_id"].long()
    if case == "vc":
        arguments["condition"] = io["cond_vc"]
    if case == "se":
        arguments["condition"] = io["cond_se"]
    noise = (lambda shape: torch.zeros(shape)) if case == "ttszero" else Recorded(io, f"{case}_")
    projected = []
    hook = model.to_logit.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0]))
    settings = DecodeSettings(steps=steps, cfg=cfg, top_fraction=1 - top)
    trace = model.generate(prompt, target, settings=settings, noise=noise, return_iterations=True, **arguments)
    hook.remove()
    torch.testing.assert_close(projected[0], io[f"{case}_embeds_step0"], **TOLERANCE)
    torch.testing.assert_close(projected[-1], io[f"{case}_embeds_last"], **TOLERANCE)
    assert torch.equal(trace.tokens, io[f"{case}_out"].long())
    reference = io[f"{case}_seq_trace"]
    assert len(trace.sequences) == len(reference) - 1
    for step, mask in enumerate(trace.masks):
        assert torch.equal(trace.sequences[step].masked_fill(mask, 0)[0], reference[step + 1].long())


@pytest.mark.golden
def test_stage1_training_forward(omni):
    model, io = omni
    drawn = io["tr_final_mask"][..., 0].bool()
    hidden = model(
        io["tr_x0"].long(),
        drawn,
        io["tr_t"],
        mask=io["tr_xmask"],
        phones=io["tr_phone"].long(),
        phone_mask=io["tr_phone_mask"],
        condition=io["tr_cond"],
    )
    logits = model.to_logit(hidden)[drawn]
    torch.testing.assert_close(logits, io["tr_logits"][drawn], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits, io["tr_x0"].long()[drawn])
    torch.testing.assert_close(loss, io["tr_ce_per_token"][drawn].mean(), **TOLERANCE)


def lora_model(omni):
    """A copy of the golden base, and random LoRA weights of rank 4 for it under the released names."""
    model = copy.deepcopy(omni[0])
    with_lora, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    adapt.add_lora(with_lora, rank=4)
    shapes = {key: value.shape for key, value in adapt.lora_state(with_lora).items()}
    return model, {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_lora_of_a_lower_rank_is_the_nearest_one():
    generator = torch.Generator().manual_seed(0)
    a, b = "model.x.lora_A.default.weight", "model.x.lora_B.default.weight"
    state = {
        a: torch.randn(6, 20, generator=generator),
        b: torch.randn(30, 6, generator=generator),
        "gate": torch.ones(1),
    }
    whole = state[b] @ state[a]
    errors = []
    for rank in (1, 3, 6):
        less = adapt.fit_lora(state, rank)
        assert less[a].shape == (rank, 20) and less[b].shape == (30, rank) and less["gate"] is state["gate"]
        errors.append(float((less[b] @ less[a] - whole).pow(2).sum()))
        left = torch.linalg.svdvals(whole)[rank:].pow(2).sum()
        assert errors[-1] == pytest.approx(float(left), abs=1e-2)
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[1] / 9


def test_lora_active_and_merged(omni):
    """Against the released code the whole flow of ``tse`` compares LoRA (``test_paper_system.py``)."""
    model, lora = lora_model(omni)
    io, weight = omni[1], model.diff_estimator.layers[0].self_attn.q_proj.weight.clone()
    given = io["de_x"], io["de_t"], io["de_xmask"]
    assert all(key.startswith("model.diff_estimator.layers.") for key in lora)
    with torch.no_grad():
        merged = copy.deepcopy(model)
        adapt.add_lora(model, rank=4)
        model.eval()
        torch.testing.assert_close(model.diff_estimator(*given), io["de_out_nophone"], **TOLERANCE)  # B begins at 0
        model.load_state_dict({key.removeprefix("model."): value for key, value in lora.items()}, strict=False)
        out = model.diff_estimator(*given)
        assert (out - io["de_out_nophone"]).abs().max() > 0.1
        again = adapt.lora_state(model)
        assert set(again) == set(lora) and all(torch.equal(again[k], lora[k]) for k in lora)
        assert adapt.check_lora(merged, lora) == 4
        adapt.fold_lora(merged, lora)
        torch.testing.assert_close(merged.diff_estimator(*given), out, **TOLERANCE)
        name = "model.diff_estimator.layers.0.self_attn.q_proj.lora_{}.default.weight"
        product = lora[name.format("B")] @ lora[name.format("A")]
        found = merged.diff_estimator.layers[0].self_attn.q_proj.weight
        torch.testing.assert_close(found, weight + 2 * product, **TOLERANCE)


def test_lora_keys_must_fit(omni):
    bare, lora = lora_model(omni)
    lora["model.tpyo"] = lora.pop(sorted(lora)[0])
    with pytest.raises(MetisError, match="LoRA"):
        adapt.check_lora(bare, lora)


def test_layers_of_stage_2_are_drawn_as_often_as_released():
    common = dict(hidden_size=16, num_layers=1, num_heads=2, codebook_size=4, semantic_codebook_size=4)
    joint, rest = (Stage2(Stage2Config(12, first, **common)).layer_weights() for first in (True, False))
    torch.testing.assert_close(joint, torch.arange(12, 0, -1) / 78)  # released mask_layer, predict_layer_1
    torch.testing.assert_close(rest, torch.tensor([0, *range(12, 1, -1)]) / 77)


def stage2_models():
    common = dict(hidden_size=48, num_layers=2, num_heads=4, codebook_size=32, semantic_codebook_size=50)
    one = Stage2(Stage2Config(num_quantizers=1, predict_layer_1=True, **common)).eval()
    full = Stage2(Stage2Config(num_quantizers=4, **common)).eval()
    state, io = vectors("s2a")
    one.load_state_dict({k.removeprefix("layer1/"): v for k, v in state.items() if k.startswith("layer1/")})
    full.load_state_dict({k.removeprefix("full/"): v for k, v in state.items() if k.startswith("full/")})
    return one, full, io


@pytest.mark.golden
def test_stage2_decodes_token_for_token():
    one, full, io = stage2_models()
    x = io["de_x"] + full.diff_estimator.cond_mlp(io["de_cond"])
    torch.testing.assert_close(full.diff_estimator(x, io["de_t"], io["de_xmask"]), io["de_out"], **TOLERANCE)
    semantic, prompt = io["sem"].long(), io["prompt"].long()
    settings = DecodeSettings(cfg=0.0, temperature=1.5, top_fraction=1 - 0.8)
    first = one.generate(semantic, prompt, steps=[5], settings=settings, noise=Recorded(io, "layer1_"))
    assert torch.equal(first, io["layer1_out"].long())
    empty = one.generate(semantic, prompt[:, :0], steps=[5], settings=settings, noise=Recorded(io, "noprompt_layer1_"))
    assert torch.equal(empty, io["noprompt_layer1_out"].long())
    projected = []
    for head in full.to_logits:
        head.register_forward_hook(lambda _, inputs, __: projected.append(inputs[0][0]))
    settings = DecodeSettings(cfg=2.5, temperature=1.5, top_fraction=1 - 0.8)
    out = full.generate(
        semantic,
        prompt,
        first_layer=first,
        steps=[5, 3, 1, 1],
        settings=settings,
        noise=Recorded(io, "full_"),
    )
    assert torch.equal(out, io["full_out"].long())
    torch.testing.assert_close(torch.stack(projected), io["full_embeds"], **TOLERANCE)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["l1_q0", "q1", "q2", "q3", "q1_noprompt", "q2_emptymask"])
def test_stage2_training_forward(case):
    tensors = load_file(GOLDEN / "train.safetensors")
    io = {k.removeprefix("s2a/"): v for k, v in tensors.items() if k.startswith("s2a/")}
    name = "s2a_1layer" if case == "l1_q0" else "s2a_full"
    quantizers = 1 if case == "l1_q0" else 4
    config = Stage2Config(
        num_quantizers=quantizers,
        predict_layer_1=quantizers == 1,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        codebook_size=32,
        semantic_codebook_size=40,
    )
    model = Stage2(config).eval()
    prefix = f"sd_{name}/"
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    mine = {k.removeprefix(case + "/"): v for k, v in io.items() if k.startswith(case + "/")}
    layer = int(case[1]) if case.startswith("q") else 0
    codes = io["x0"].long()[..., :quantizers]
    exists = io["x_mask"].bool()
    lengths = exists.sum(1)
    prompt = mine["prompt_len_used"].long().flatten().expand(codes.shape[0])
    is_masked = masked.confine_masks(mine["mask_drawn"].bool().reshape(exists.shape), prompt, lengths)
    assert torch.equal(is_masked, mine["final_mask"].bool().reshape(exists.shape))
    x = model.training_input(codes, layer, is_masked, prompt)
    reference = mine["xt"]
    torch.testing.assert_close(x[exists], reference[exists], **TOLERANCE)
    hidden = model(codes, io["cond_code"].long(), layer, is_masked, io["t"], prompt, exists)
    logits = model.to_logits[layer](hidden)[is_masked]
    torch.testing.assert_close(logits, mine["logits"][is_masked], **TOLERANCE)
    loss = torch.nn.functional.cross_entropy(logits, codes[..., layer][is_masked])
    torch.testing.assert_close(loss, mine["loss_masked_mean"].reshape(()), **TOLERANCE)


@pytest.mark.golden
def test_schedule_equals_reference():
    table = json.loads((GOLDEN / "schedule.json").read_text())
    assert len(table) >= 5
    for name, expected in table.items():
        length, steps = (int(number) for number in re.findall(r"\d+", name))
        got = [int(masked.still_masked(i, steps, torch.tensor([length]))) for i in range(steps)]
        assert got == expected


def debug_stage1(**changes):
    from metis_lib.config import preset

    torch.manual_seed(0)
    model = Stage1(replace(preset("debug").stage1, **changes)).eval()
    for embedding in (model.cond_emb, model.mask_emb, model.to_logit):  # a fresh model says one thing always
        torch.nn.init.normal_(embedding.weight, std=1.0)
    return model


def test_a_batch_equals_its_items():
    model = debug_stage1(adapter="gated", use_phones=True, phone_vocab=20)
    torch.nn.init.ones_(model.cond_adapter.gate_scale)
    prompt = torch.randint(0, 48, (2, 6))
    phones = torch.randint(0, 19, (2, 9))
    condition = torch.randn(2, 6 + 14, 32)
    lengths = torch.tensor([14, 9])
    settings = DecodeSettings(steps=4, cfg=1.5)
    zeros = torch.zeros
    both = model.generate(prompt, lengths, phones=phones, condition=condition, settings=settings, noise=zeros)
    for i, length in enumerate(lengths.tolist()):
        one = model.generate(
            prompt[i : i + 1],
            length,
            phones=phones[i : i + 1],
            condition=condition[i : i + 1, : 6 + length],
            settings=settings,
            noise=zeros,
        )
        assert torch.equal(one[0], both[i, :length])


def test_same_seed_same_tokens_and_another_seed_others():
    model = debug_stage1()
    prompt = torch.randint(0, 48, (1, 5))
    settings = DecodeSettings(top_fraction=0.5)
    runs = [
        model.generate(prompt, 40, settings=settings, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_guidance_without_anything_to_drop_is_skipped():
    model = debug_stage1(adapter="gated")
    prompt = torch.zeros(1, 0, dtype=torch.long)
    condition = torch.randn(1, 12, 32)
    outs = [
        model.generate(
            prompt,
            12,
            condition=condition,
            settings=DecodeSettings(steps=3, cfg=cfg),
            generator=torch.Generator().manual_seed(0),
        )
        for cfg in (0.0, 2.5)
    ]
    assert torch.equal(outs[0], outs[1])


def test_masks_follow_the_schedule_and_spare_prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (4000,), generator=generator)
    t, prompt, is_masked = masked.draw_masks(lengths, masked.MaskingSettings(), generator)
    position = torch.arange(is_masked.shape[1])[None]
    assert not (is_masked & (position < prompt[:, None])).any()
    assert not (is_masked & (position >= lengths[:, None])).any()
    assert is_masked.any(dim=1).all()
    assert abs((prompt > 0).float().mean() - 0.8) < 0.04  # a share of 0 gives an empty prompt now and then
    assert prompt.float().div(lengths).max() <= 0.4
    target = ((position >= prompt[:, None]) & (position < lengths[:, None])).sum(1)
    share = is_masked.sum(1) / target
    assert (share - torch.sin(t * torch.pi / 2)).abs().mean() < 0.05


def test_guidance_is_the_identity_at_scale_zero_and_per_utterance():
    cond, uncond = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    torch.testing.assert_close(masked.guide(cond, uncond, 0.0, 0.75), cond)
    both = masked.guide(cond, uncond, 2.0, 0.75)
    torch.testing.assert_close(both[1:2], masked.guide(cond[1:2], uncond[1:2], 2.0, 0.75))


def test_norms_start_as_plain_rms_norms():
    from metis_lib.models.transformer import AdaptiveRMSNorm

    x = torch.randn(2, 3, 8)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    norm = AdaptiveRMSNorm(8)
    scale = norm.to_weight(torch.randn(2, 8))
    torch.testing.assert_close(norm(x, scale[:, None]), expected)
    torch.testing.assert_close(norm(x, scale[0]), expected)
    fresh = debug_stage1()
    assert all(torch.all(layer.input_layernorm.to_weight.bias == 1) for layer in fresh.diff_estimator.layers)


def test_stretching_keeps_order_and_covers_every_phone():
    phones = torch.arange(7)[None]
    stretched = stretch(phones, 50)[0]
    assert torch.equal(stretched, stretched.sort().values) and set(stretched.tolist()) == set(range(7))
    assert stretch(phones, 3).shape == (1, 3)
