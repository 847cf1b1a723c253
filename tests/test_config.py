"""Configurations, and the published sizes: tensor and parameter counts of the released files."""

import json
from dataclasses import replace

import pytest
import torch

from metis_lib.config import (
    AcousticCodecConfig,
    DecodeSettings,
    Stage1Config,
    SystemConfig,
    from_dict,
    preset,
    to_dict,
)
from metis_lib.errors import MetisError
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec

PAPER = preset("paper")
PHONES = {"use_phones": True}


def counts(make):
    """Parameters in millions and tensors of a model that is only described, not built."""
    with torch.device("meta"):
        module = make()
    return sum(p.numel() for p in module.parameters()) / 1e6, len(module.state_dict())


@pytest.mark.parametrize(
    ("changes", "millions", "tensors"),
    [
        ({}, 725.94, 186),
        ({"adapter": "gated"}, 741.68, 191),
        (PHONES, 746.40, 191),
        ({**PHONES, "adapter": "gated"}, 762.14, 196),
        ({"adapter": "plain", "cond_dim": 768}, 740.11, 190),
    ],
)
def test_stage1_has_the_released_size(changes, millions, tensors):
    size, names = counts(lambda: Stage1(replace(PAPER.stage1, **changes)))
    assert size == pytest.approx(millions, abs=0.005) and names == tensors


@pytest.mark.parametrize(("part", "millions", "tensors"), [("layer1", 330.35, 193), ("full", 353.44, 226)])
def test_stage2_has_the_released_size(part, millions, tensors):
    size, names = counts(lambda: Stage2(getattr(PAPER, f"stage2_{part}")))
    # The released files hold one empty tensor more (embed_tokens of shape [0, 256]).
    assert size == pytest.approx(millions, abs=0.005) and names == tensors - 1


def test_codecs_have_the_released_size():
    assert counts(lambda: SemanticCodec(PAPER.semantic)) == (pytest.approx(44.29, abs=0.005), 239)
    with torch.device("meta"):
        codec = AcousticCodec(PAPER.acoustic)
    sizes = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (codec.encoder, codec.decoder)]
    assert sizes == [pytest.approx(42.54, abs=0.005), pytest.approx(128.20, abs=0.005)]
    assert [len(part.state_dict()) for part in (codec.encoder, codec.decoder)] == [119, 363]


@pytest.mark.parametrize("name", ["debug", "nano", "paper"])
def test_presets_survive_json(name):
    system = preset(name)
    assert system.name == name and from_dict(SystemConfig, json.loads(json.dumps(to_dict(system)))) == system
    assert 2 < system.stage2_full.num_quantizers <= system.acoustic.num_quantizers == 12  # nano makes the first six
    assert system.stage1.codebook_size == system.semantic.codebook_size
    assert system.semantic.hidden_size == system.ssl.hidden_size == system.stage1.cond_dim


def test_tuples_and_fractions_come_back_exactly():
    config = AcousticCodecConfig(strides=(2, 4))
    assert from_dict(AcousticCodecConfig, to_dict(config)) == config
    assert from_dict(DecodeSettings, to_dict(DecodeSettings())).top_fraction == 1 - 0.98


def test_mistakes_are_named():
    with pytest.raises(MetisError, match="hiden"):
        from_dict(Stage1Config, {"hiden": 3})
    with pytest.raises(MetisError, match="unknown preset"):
        preset("micro")
