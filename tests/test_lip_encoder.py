"""The visual encoder against the published code's own numbers, its files, and padded batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from metis_lib.config import LipConfig
from metis_lib.errors import MetisError
from metis_lib.tokenizers.lips import LipEncoder, normalise, read_released_config, sinusoids, upsample

GOLDEN = Path(__file__).parent / "golden"
CLOSE = {"atol": 1e-4, "rtol": 0}
NANO = LipConfig(16, (16, 32, 48, 64), 1, 96, 3, 288, 2, 15)
RELEASED = {
    "adim": 24, "aheads": 2, "eunits": 40, "elayers": 2, "dropout_rate": 0.1, "macaron_style": 1, "use_cnn_module": 1,
    "transformer_input_layer": "conv3d", "transformer_encoder_attn_layer_type": "rel_mha", "rel_pos_type": "latest",
    "cnn_module_kernel": 31, "zero_triu": False, "relu_type": "swish", "dlayers": 1,
}  # fmt: skip
"""As published beside the weights, with the sizes of the golden model."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "avsr_encoder.safetensors")


def part(golden: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)}


def small(state: dict[str, torch.Tensor]) -> LipEncoder:
    encoder = LipEncoder(replace(read_released_config(RELEASED), stem=4, widths=(4, 6, 8, 10))).eval()
    encoder.load_released(state)
    return encoder


def nano() -> LipEncoder:
    """A nano encoder whose running statistics are not those it starts with."""
    encoder = LipEncoder(NANO)
    for module in encoder.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return encoder.eval()


def crops(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 96, 96), dtype=torch.uint8)


# --- the published numbers


@pytest.mark.golden
@torch.no_grad()
def test_features_are_the_published_ones(golden: dict[str, torch.Tensor]) -> None:
    io, encoder = part(golden, "io/"), small(part(golden, "sd/"))
    seen: dict[str, torch.Tensor] = {}
    watched = dict(
        frontend3D=encoder.frontend.frontend3D[3], resnet=encoder.frontend, layer0=encoder.encoders[0],
        layer1=encoder.encoders[1],
    )  # fmt: skip
    for name, module in watched.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    features = encoder(io["patches"][None])
    torch.testing.assert_close(features[0], io["features"], **CLOSE)
    torch.testing.assert_close(seen["frontend3D"][0], io["frontend3D_frame0"], **CLOSE)
    torch.testing.assert_close(seen["resnet"], io["resnet_feats"], **CLOSE)
    for layer in ("layer0", "layer1"):
        torch.testing.assert_close(seen[layer], io[layer][0], **CLOSE)
    torch.testing.assert_close(sinusoids(14, io["features"]), io["pos_emb"], atol=1e-6, rtol=0)
    assert torch.equal(normalise(io["patches"][:2]), io["x"][0])
    video = normalise(io["patches"])[None]
    torch.testing.assert_close(encoder(video[:, :1])[0], io["features_T1"], **CLOSE)
    torch.testing.assert_close(encoder(video[:, :5])[0], io["features_T5"], **CLOSE)
    torch.testing.assert_close(encoder(video, torch.tensor([5]))[0, :5], io["features_T5"], **CLOSE)


@pytest.mark.golden
@pytest.mark.slow
@torch.no_grad()
def test_features_of_the_published_size(golden: dict[str, torch.Tensor]) -> None:
    """Weights from a formula, so that 728 MB need not be stored."""
    keys = json.loads((GOLDEN / "avsr_keys.json").read_text())
    state = {}
    for i, key in enumerate(sorted(keys)):
        count = int(np.prod(keys[key]))
        h = np.arange(count, dtype=np.uint32) * np.uint32(2654435761) + np.uint32((i + 1) * 40503 % 2**32)
        for shift, factor in ((15, 2246822519), (13, 3266489917), (16, 1)):
            h = (h ^ (h >> np.uint32(shift))) * np.uint32(factor)
        u = h / 2**31 - 1
        if key.endswith("num_batches_tracked"):
            u = 0 * u
        elif key.endswith("running_var"):
            u = 1 + 0.25 * u
        elif len(keys[key]) >= 2:
            u = 2 * u / np.sqrt(count / keys[key][0])
        else:
            u = 0.1 * u + key.endswith(".weight")
        state[key] = torch.from_numpy(u.astype(np.float32)).reshape(keys[key])
    encoder = LipEncoder(LipConfig()).eval()
    encoder.load_released(state)
    io = part(golden, "io/")
    encoder.frontend.register_forward_hook(
        lambda _, __, out: torch.testing.assert_close(out, io["full_resnet_feats"], **CLOSE)
    )
    features = encoder(io["patches"][None, :4])[0]
    torch.testing.assert_close(features, io["full_features"], **CLOSE)


def test_the_published_size_and_its_keys() -> None:
    with torch.device("meta"):
        encoder = LipEncoder(LipConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 182_028_224
    shapes = {f"encoder.{key}": list(value.shape) for key, value in encoder.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "avsr_keys.json").read_text())


# --- released files


def other_layout(state: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    renames = {
        "AA": {"encoder.frontend.": "frontend.", "encoder.embed.0.": "proj_encoder."},
        "old": {"encoder.embed.": "encoder.input_layer.", "encoder.after_norm.": "encoder.norm."},
    }[layout]
    out = {}
    for key, value in state.items():
        old = next((prefix for prefix in renames if key.startswith(prefix)), "")
        out[renames[old] + key.removeprefix(old) if old else key] = value
    return out


@pytest.mark.parametrize("layout", ["AA", "old"])
@torch.no_grad()
def test_every_published_layout_gives_the_same_features(layout: str) -> None:
    source, target, video = nano(), LipEncoder(NANO).eval(), crops(1, 4)
    state = {f"encoder.{key}": value for key, value in source.state_dict().items()}
    state |= {"decoder.embed.0.weight": torch.zeros(3), "ctc.ctc_lo.bias": torch.zeros(3)}
    target.load_released(state)
    assert torch.equal(target(video), source(video))
    target = LipEncoder(NANO).eval()
    renamed = other_layout(state, layout)
    assert renamed.keys() != state.keys()
    target.load_released(renamed)
    assert torch.equal(target(video), source(video))


def test_wrong_files_are_refused_and_the_key_named() -> None:
    encoder = LipEncoder(NANO)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = {f"encoder.{key}": value + 1 for key, value in before.items()}
    with pytest.raises(MetisError, match=r"encoder\.encoders\.2\.norm_ff\.bias is no weight"):
        encoder.load_released(state | {"encoder.encoders.2.norm_ff.bias": torch.zeros(96)})
    with pytest.raises(MetisError, match=r"^state_dict is no weight"):
        encoder.load_released({"state_dict": state})  # type: ignore[dict-item]
    with pytest.raises(MetisError, match=r"proj_encoder\.bias is no weight"):
        encoder.load_released(state | {"proj_encoder.bias": torch.zeros(96)})  # the same weight twice
    with pytest.raises(MetisError, match=r"encoder\.embed\.0\.bias has the shape \[5\].*\[96\]"):
        encoder.load_released(state | {"encoder.embed.0.bias": torch.zeros(5)})
    del state["encoder.after_norm.weight"], state["encoder.after_norm.bias"]
    with pytest.raises(MetisError, match=r"encoder\.after_norm\.weight and 1 more are missing"):
        encoder.load_released(state)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_released_configurations() -> None:
    full = RELEASED | {"adim": 768, "aheads": 12, "eunits": 3072, "elayers": 12}
    assert read_released_config(full) == read_released_config([9216, 41, full]) == LipConfig()
    assert read_released_config(RELEASED) == LipConfig(
        hidden_size=24, num_heads=2, intermediate_size=40, num_layers=2, conv_kernel=31
    )
    with pytest.raises(MetisError, match="lacks rel_pos_type"):
        read_released_config({k: v for k, v in full.items() if k != "rel_pos_type"})
    with pytest.raises(MetisError, match="relu_type = 'prelu'; only 'swish'"):
        read_released_config(full | {"relu_type": "prelu"})
    with pytest.raises(MetisError, match="macaron_style = 0"):
        read_released_config(full | {"macaron_style": 0})
    for wrong in ([1, 2], [1, 2, 3], "abc"):
        with pytest.raises(MetisError, match="must be an object"):
            read_released_config(wrong)


# --- batches, training


@torch.no_grad()
def test_a_batch_equals_singles() -> None:
    encoder, lengths = nano(), torch.tensor([9, 1, 4, 12])
    video = crops(4, 12)
    together = encoder(video, lengths)
    slow = upsample(together, lengths)
    assert together.shape == (4, 12, 96) and together.std() > 0.1
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(video[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], **CLOSE)
        assert not together[row, length:].any()
        torch.testing.assert_close(slow[row, : 2 * length], upsample(alone)[0], **CLOSE)
    padded = video.clone()
    padded[1, 1:] = 255
    assert torch.equal(encoder(padded, lengths), together)
    assert not torch.allclose(encoder(video)[2, :4], together[2, :4], **CLOSE)  # without lengths it does matter


def test_padding_enters_no_statistics_and_gradient_reaches_everything() -> None:
    encoder, other = LipEncoder(replace(NANO, dropout=0.0)).train(), LipEncoder(replace(NANO, dropout=0.0)).train()
    other.load_state_dict(encoder.state_dict())
    video, lengths = normalise(crops(2, 6)), torch.tensor([6, 3])
    longer = F.pad(video, (0, 0, 0, 0, 0, 5), value=7.0)
    a, b = encoder(video, lengths), other(longer, lengths)
    torch.testing.assert_close(a, b[:, :6], **CLOSE)
    for key, value in encoder.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, **CLOSE)
    assert (encoder.frontend.frontend3D[1].running_var != 1).all()
    (a * torch.randn_like(a)).sum().backward()
    # A bias of the keys moves all scores of a row alike, one before a BatchNorm is taken off again: no gradient.
    still = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-4]
    assert {name.split(".", 2)[2] for name in still} <= {"self_attn.linear_k.bias", "conv_module.depthwise_conv.bias"}


def test_steps_of_training_lower_the_loss() -> None:
    encoder, video, target = LipEncoder(replace(NANO, dropout=0.0)).train(), crops(2, 5), torch.randn(2, 5, 96)
    optimiser, losses = torch.optim.AdamW(encoder.parameters(), 1e-3), []
    for _ in range(8):
        loss = F.mse_loss(encoder(video), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bf16() -> None:
    encoder, video, lengths = nano(), crops(2, 8), torch.tensor([8, 5])
    with torch.no_grad():
        exact = encoder(video, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            close = encoder(video, lengths)
        assert close.dtype == torch.float32
        assert (close - exact).abs().mean() < 0.05 * exact.abs().mean()
    encoder.train()
    with torch.autocast("cpu", torch.bfloat16):
        encoder(video, lengths).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert nano().bfloat16()(video, lengths).dtype == torch.bfloat16


@pytest.mark.parametrize("lengths", [None, [3]])
def test_upsample_by_hand(lengths: list[int] | None) -> None:
    features = torch.tensor([0.0, 4.0, 8.0, 100.0]).reshape(1, 4, 1).expand(1, 4, 2)
    out = upsample(features, None if lengths is None else torch.tensor(lengths))
    assert out.shape == (1, 8, 2)
    # Place 2n lies a quarter before frame n, place 2n + 1 a quarter after it; the ends are copied.
    end = [8, 8, 8] if lengths else [31, 77, 100]
    assert out[0, :, 1].tolist() == [0, 1, 3, 5, 7, *end]


@pytest.mark.parametrize(
    ("video", "lengths", "says"),
    [
        (torch.zeros(2, 96, 96), None, r"\[B, N, H, W\]"),
        (torch.zeros(1, 0, 88, 88), None, "N > 0"),
        (torch.zeros(1, 2, 88, 88, dtype=torch.uint8), None, r"uint8 \[..., 96, 96\]"),
        (torch.zeros(1, 2, 96, 96, dtype=torch.int64), None, "int64"),
        (torch.zeros(1, 2, 88, 88), [3], r"1 numbers in 1\.\.2, got \[3\]"),
        (torch.zeros(1, 2, 88, 88), [0], r"got \[0\]"),
        (torch.zeros(1, 2, 88, 88), [1, 2], r"got \[1, 2\]"),
    ],
)
def test_what_is_no_video_is_refused(video: torch.Tensor, lengths: list[int] | None, says: str) -> None:
    with pytest.raises(MetisError, match=says):
        LipEncoder(NANO)(video, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("wrong", [{"num_heads": 5}, {"conv_kernel": 16}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(MetisError, match="multiple of num_heads, conv_kernel odd"):
        LipEncoder(replace(NANO, **wrong))
