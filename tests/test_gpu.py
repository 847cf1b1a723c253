"""What a GPU makes is what a CPU makes: ``pytest -m gpu``.  Without one some are skipped, some run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from metis_lib import Metis, cli
from metis_lib.config import DecodeSettings, preset
from metis_lib.models import masked
from metis_lib.models.stage1 import Stage1
from metis_lib.training.data import Feed, Tokens
from metis_lib.training.generative import Stage1Training
from metis_lib.training.loop import TrainSettings, fit, make_fabric
from tests.test_speed import lively

pytestmark = pytest.mark.gpu
WHERE = "cuda" if torch.cuda.is_available() else "cpu"


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


@pytest.mark.parametrize("sizes", [[5], [7, 2, 0, 40]])
def test_noise_is_that_of_the_cpu(sizes):
    made = masked.Draws(generators(len(sizes)), torch.device(WHERE))
    first, second = made(sizes, 3), made(sizes)
    for i, n in enumerate(sizes):
        alone = masked.Draws([generators(len(sizes))[i]], torch.device("cpu"))
        torch.testing.assert_close(first[i, :n].cpu(), alone([n], 3)[0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(second[i, :n].cpu(), alone([n])[0], atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(WHERE == "cpu", reason="no GPU here")
def test_nothing_waits_for_the_gpu_while_it_decodes():
    def predict(tokens, is_masked, step, rows):
        torch.cuda.set_sync_debug_mode("error")
        return torch.randn(*rows.shape, 30, device="cuda")

    try:
        masked.decode(predict, torch.tensor([20, 13], device="cuda"), DecodeSettings(steps=6))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_draw_the_same_noise():
    sizes = [7, 2, 0, 40]
    with torch.inference_mode():
        drawn = masked._uniform(sizes, (3,), generators(4), pinned=False)
    for row, n, generator in zip(drawn, sizes, generators(4), strict=True):
        assert torch.equal(row[:n], torch.rand(n, 3, generator=generator)) and not row[n:].any()


def said(model, device, lengths, cfg, which=None):
    """Tokens of utterances with prompts, all or ``which`` of them alone, in fp64."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 48, (len(lengths), 9), generator=random)
    own = range(len(lengths)) if which is None else [which]
    trace = model.to(device).generate(
        prompts[list(own)].to(device),
        torch.tensor([lengths[i] for i in own], device=device),
        prompt_lengths=torch.tensor([9 - i for i in own], device=device),
        settings=DecodeSettings(steps=6, cfg=cfg),
        generator=[generators(len(lengths))[i] for i in own],
        return_iterations=True,
    )
    return [trace.tokens[k, : lengths[i]].cpu() for k, i in enumerate(own)]


@pytest.mark.parametrize("cfg", [0.0, 2.0])
def test_the_same_tokens_in_fp64_alone_and_in_a_batch(cfg):
    model, lengths = lively(Stage1(preset("debug").stage1)), [60, 31, 44]
    wanted = said(model, "cpu", lengths, cfg)
    assert any(len(tokens.unique()) > 5 for tokens in wanted)
    for i, tokens in enumerate(said(model, WHERE, lengths, cfg)):
        assert torch.equal(tokens, wanted[i]) and torch.equal(said(model, WHERE, lengths, cfg, i)[0], wanted[i])


@pytest.mark.skipif(WHERE == "cpu", reason="minutes on a CPU (test_speed compiles there)")
def test_recorded_passes_say_the_same():
    model, lengths = lively(Stage1(preset("debug").stage1)).to(WHERE), [60, 31, 100]
    model.diff_estimator.fuse()
    wanted = said(model, WHERE, lengths, 2.0)
    model.diff_estimator.compile_passes()
    for _ in range(2):  # recorded, then replayed
        assert all(torch.equal(a, b) for a, b in zip(said(model, WHERE, lengths, 2.0), wanted, strict=True))


@pytest.mark.skipif(WHERE == "cpu", reason="a CPU is equal to itself")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nano_speaks_and_enhances(dtype):
    ours, cpu = (Metis.from_pretrained("nano", device=where, dtype=dtype) for where in (WHERE, "cpu"))
    noise = torch.Generator().manual_seed(0)
    wav = 0.2 * torch.sin(torch.arange(36_000) / 30) + 0.01 * torch.randn(36_000, generator=noise)
    for make in (
        lambda m: m.enhance(wav, seed=1),
        lambda m: m.speak("Good morning.", prompt=wav, prompt_text="A long tone.", seconds=1.0, seed=1),
    ):
        made, wanted = make(ours), make(cpu)
        assert made.wav.device.type == "cpu" and len(made) == len(wanted) and torch.isfinite(made.wav).all()
        assert 0.5 < made.wav.square().mean().sqrt() / wanted.wav.square().mean().sqrt() < 2


class Shards:
    """A hundred utterances of tokens that a model can learn: each is the one before plus one."""

    ends = (100,)

    def lengths(self):
        return np.full(100, 40)

    def __getitem__(self, i):
        return {}, ((torch.arange(40)[:, None] + i) % 48).numpy()


@pytest.mark.skipif(WHERE == "cpu", reason="a CPU is equal to itself")
@pytest.mark.parametrize(("precision", "near"), [("32-true", 0.01), ("bf16-mixed", 0.1)])
def test_training_goes_as_on_a_cpu(precision, near, tmp_path):
    losses = {}
    for name, device in (("ours", WHERE), ("cpu", "cpu")):
        torch.manual_seed(0)
        settings = TrainSettings(steps=12, lr=3e-3, warmup=1, frames=400, precision=precision, log_every=1, seed=3)
        objective = Stage1Training(Stage1(replace(preset("debug").stage1, codebook_size=48)))
        fit(objective, Feed(Tokens(Shards()), settings), settings, tmp_path / name,
            fabric=make_fabric(settings, device=device))  # fmt: skip
        assert next(objective.parameters()).device.type == "cpu"
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        losses[name] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses["ours"]) == 12 and losses["ours"][-1] < losses["ours"][0]
    assert losses["ours"] == pytest.approx(losses["cpu"], rel=near)


def test_bench_of_batches(capsys, tmp_path):
    command = ["bench", "generate", "--preset=debug", "--tasks=se", "--seconds=0.5", "--repeats=1", "--batch=2"]
    command += [f"--device={WHERE}", "--batches", "1", "3", f"--out={tmp_path}", "--json"]
    assert cli.main(command) == 0
    se = json.loads(capsys.readouterr().out)["se"]
    assert set(se["batches"]) == {"1", "3"}
    for n, found in se["batches"].items():
        assert found["utterances_per_s"] == pytest.approx(int(n) / found["wall_s"], rel=0.01)
        assert found["seconds"] == pytest.approx(sum(found["parts"].values()), abs=0.001)
        assert found["peak_mb"] > 0 and found["matmul_share"] > 0
    assert [p.suffix for p in sorted(tmp_path.glob("generate-debug*"))] == [".json", ".png"]
    assert cli.main(["bench", "generate", "--preset=debug", "--batches", "0"]) == 2
    if WHERE == "cuda":
        assert not (tmp_path / "generate-debug.json").exists()  # a GPU's figures carry its name
