"""The benchmark of the training step: what it reports, and its operations counted by hand."""

import pytest
import torch

from metis_lib.config import Stage1Config
from metis_lib.models.stage1 import Stage1
from metis_lib.models.transformer import attend
from recipes.bench.training import PARTS, bench_train, count_parameters, step_flops


def test_operations_by_hand():
    config = Stage1Config(hidden_size=8, num_layers=2, num_heads=2, codebook_size=5)
    parameters = count_parameters(Stage1(config))
    projections = 2 * (4 * 8 * 8 + 3 * 8 * 32)  # q, k, v, o; gate, up, down
    logits = 8 * 5 + 5
    others = 5 * (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8)  # two norms a layer and the last; the network of the time
    everything = projections + logits + others
    assert parameters == {"frame": projections, "masked": logits, "utterance": others, "all": everything}
    found = step_flops(config, parameters, torch.tensor([3, 5]), masked=4)
    attention = 2 * 3 * sum(2 * (2 * t * t * 8) for t in (3, 5))  # layers, forward and backward, two products
    assert found["frames"] == 8
    assert found["nominal"] == 6 * everything * 8 + attention
    assert found["done"] == 6 * (projections * 8 + logits * 4 + others * 2) + attention


@pytest.mark.parametrize("layers", [None, 1])
def test_figures_of_a_small_model(layers):
    found = bench_train("debug", layers=layers, tokens=400, seconds=0.1, device="cpu")
    assert found["layers"] == (layers or 2) and found["steps"] >= 3
    assert set(found["parts"]) == set(PARTS)
    assert found["matmul_share"] == pytest.approx(found["flops_per_s"] / found["matmul_flops_per_s"], abs=1e-3)
    assert 0 < found["matmul_share_done"] < found["matmul_share"]
    assert 0 < found["tokens_a_step"] <= found["padded_tokens_at_most"] == 400
    assert found["parameters"]["all"] == sum(found["parameters"][key] for key in ("frame", "masked", "utterance"))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_for_training_is_the_fused_one(masked):
    q, k, v = (torch.randn(2, 3, 7, 4, requires_grad=True) for _ in range(3))
    mask = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None] if masked else None
    weight = torch.randn(2, 3, 7, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    wanted = torch.autograd.grad((fused * weight).sum(), (q, k, v))
    written = attend(q, k, v, mask)
    torch.testing.assert_close(written, fused, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad((written * weight).sum(), (q, k, v)), wanted, atol=1e-5, rtol=0)
