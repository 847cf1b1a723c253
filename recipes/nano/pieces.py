"""The nano recipe as pieces, each trained on its own and saved as a part of a system (see the README beside this file).

A piece reads what earlier pieces left in the system folder and writes its own part there; the tokenizers go on
from weights of their own that they find.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metis_lib.assets import metis_home
from metis_lib.checkpoints import SHIPPED, TaskConfig, fill, load_state, save_part
from metis_lib.config import preset
from metis_lib.data.store import FlatStore
from metis_lib.errors import MetisError
from metis_lib.tasks import TASKS
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.tokenizers.text import PhoneTokenizer
from metis_lib.training import data
from metis_lib.training import generative as gen
from metis_lib.training import tokenizers as tok
from metis_lib.training.loop import TrainSettings, card

SYSTEM = preset("nano")
DATA = "Ur-Quan Masters voices (human), Silero v3_en and RHVoice (synthetic); see docs/data.md"
LICENCE = "CC BY-NC-SA 2.5 (as the human voices it was trained on; the synthetic ones are non-commercial too)"


def _load(folder: Path, module: nn.Module) -> Any:
    fill(module, load_state(folder), folder)
    return module.eval()


def _weights_so_far(folder: Path) -> dict[str, Tensor] | None:
    return load_state(folder) if (folder / "config.json").is_file() else None


def _encoder(out: Path) -> SSLEncoder:
    encoder = _load(out / "ssl", SSLEncoder(SYSTEM.ssl))
    encoder.set_stats(**load_state(out / "ssl", "stats"))
    return encoder


def _save(folder: Path, state: Any, config: Any, scores: dict[str, float], s: TrainSettings, **facts: Any) -> None:
    save_part(folder, state, config, card(scores, s, data=DATA, licence=LICENCE, **facts))


def _runs_so_far(folder: Path) -> dict[str, Any]:
    """What a card says of the runs that a piece goes on from: their scores, oldest first."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())["card"]
    return {"earlier": [*before.get("earlier", []), before["scores"]]}


def acoustic(out: Path, steps: int) -> dict[str, float]:
    """Acoustic codec: spectrogram encoder, 12 codebooks, Vocos decoder; reconstruction losses only."""
    settings = TrainSettings(steps=steps, lr=1e-3, warmup=50, betas=(0.8, 0.99), clip=5.0)
    start, runs = _weights_so_far(out / "acoustic_codec"), _runs_so_far(out / "acoustic_codec")
    waves, held_out = data.waves_of("train"), data.waves_of("validation")
    codec, scores = tok.train_acoustic(
        SYSTEM, waves, held_out, settings, start=start, log=out / "logs" / "acoustic.jsonl"
    )
    _save(out / "acoustic_codec", codec, SYSTEM.acoustic, scores, settings, **runs)
    return scores


def ssl(out: Path, steps: int) -> dict[str, float]:
    """SSL encoder: masked prediction (BEST-RQ) and phone CTC."""
    settings = TrainSettings(steps=steps, lr=2e-3, warmup=200)
    start, runs = _weights_so_far(out / "ssl"), _runs_so_far(out / "ssl")
    features, held_out = data.filterbanks_of("train"), data.filterbanks_of("validation")
    log, vocab = out / "logs" / "ssl.jsonl", PhoneTokenizer().size
    noisy = data.degraded_of("train")
    encoder, scores = tok.train_ssl(
        SYSTEM, features, held_out, settings, phone_vocab=vocab, noisy=noisy, start=start, log=log
    )
    notes = "masked prediction (BEST-RQ) plus phone CTC, three in ten utterances degraded"
    _save(out / "ssl", encoder, SYSTEM.ssl, scores, settings, notes=notes, **runs)
    save_part(out / "ssl", encoder.stats_state(), SYSTEM.ssl, name="stats")
    return scores


def _features(out: Path, split: str, kind: str = "clean") -> FlatStore:
    folder = data.prepared() / f"features-{kind}-{split}"
    if (folder / "index.json").is_file():
        return FlatStore(folder)
    frames = data.filterbanks_of(split) if kind == "clean" else data.degraded_of(split)
    return data.features_of(frames, _encoder(out), folder)


def semantic(out: Path, steps: int) -> dict[str, float]:
    """Semantic codec over the SSL encoder's features."""
    settings = TrainSettings(steps=steps, lr=1e-3, warmup=50, betas=(0.8, 0.99), clip=5.0)
    log = out / "logs" / "semantic.jsonl"
    codec, scores = tok.train_semantic(SYSTEM, _features(out, "train"), settings, log=log)
    _save(out / "semantic_codec", codec, SYSTEM.semantic, scores, settings)
    return scores


def _tokens(out: Path, split: str) -> FlatStore:
    folder = data.prepared() / f"tokens-{split}"
    if (folder / "index.json").is_file():
        return FlatStore(folder)
    semantic_codec = _load(out / "semantic_codec", SemanticCodec(SYSTEM.semantic))
    acoustic_codec = _load(out / "acoustic_codec", AcousticCodec(SYSTEM.acoustic))
    return data.tokens_of(_features(out, split), data.waves_of(split), semantic_codec, acoustic_codec, folder)


def stage1(out: Path, steps: int) -> dict[str, float]:
    """Masked generative pre-training."""
    settings = TrainSettings(steps=steps, lr=2e-3, warmup=200)
    tokens, held_out = _tokens(out, "train"), _tokens(out, "validation")
    model, scores = gen.pretrain(SYSTEM.stage1, tokens, held_out, settings, log=out / "logs" / "stage1.jsonl")
    _save(out / "stage1", model, SYSTEM.stage1, scores, settings)
    return scores


def _stage2(out: Path, steps: int, part: str) -> dict[str, float]:
    settings = TrainSettings(steps=steps, lr=2e-3, warmup=200)
    tokens, held_out = _tokens(out, "train"), _tokens(out, "validation")
    config = getattr(SYSTEM, part)
    model, scores = gen.train_stage2(config, tokens, held_out, settings, log=out / "logs" / f"{part}.jsonl")
    _save(out / part, model, config, scores, settings)
    return scores


def stage2_layer1(out: Path, steps: int) -> dict[str, float]:
    """Stage 2, layer 1."""
    return _stage2(out, steps, "stage2_layer1")


def stage2_full(out: Path, steps: int) -> dict[str, float]:
    """Stage 2, layers 2 to 12."""
    return _stage2(out, steps, "stage2_full")


def _fine_tune(out: Path, steps: int, name: str, rank: int, changes: dict[str, Any], **more: Any) -> dict[str, float]:
    settings = TrainSettings(steps=steps, lr=2e-3, warmup=200)
    entry, base = TASKS[name], load_state(out / "stage1")
    config = TaskConfig(name, {**entry.stage1, **changes}, rank)
    if entry.takes_features:
        more["features"], more["held_out_features"] = (
            _features(out, split, "degraded") for split in ("train", "validation")
        )
    model, scores = gen.fine_tune(
        entry,
        config,
        SYSTEM.stage1,
        base,
        _tokens(out, "train"),
        _tokens(out, "validation"),
        settings,
        pad=PhoneTokenizer().pad_id,
        log=out / "logs" / f"{name}.jsonl",
        **more,
    )
    _save(out / "tasks" / name, gen.task_state(model, base), config, scores, settings)
    return scores


def se(out: Path, steps: int) -> dict[str, float]:
    """Speech enhancement: gated adapter and LoRA of rank 8."""
    return _fine_tune(out, steps, "se", 8, {})


def tts(out: Path, steps: int) -> dict[str, float]:
    """Zero-shot TTS: phones as prefix, the even text hint, LoRA of rank 16."""
    changes = {"phone_vocab": PhoneTokenizer().size, "text_hint": "even"}
    return _fine_tune(out, steps, "tts", 16, changes, longest=250)


PIECES: dict[str, Callable[[Path, int], dict[str, float]]] = {
    piece.__name__: piece for piece in (acoustic, ssl, semantic, stage1, stage2_layer1, stage2_full, se, tts)
}
"""In the order in which they depend on each other."""
FOLDERS = {"acoustic": "acoustic_codec", "semantic": "semantic_codec", "se": "tasks/se", "tts": "tasks/tts"}


RECIPE = Path(__file__).with_name("pieces.json")


def run(piece: str, steps: int | None = None, out: Path | None = None) -> dict[str, float]:
    """Train one piece of the nano recipe into the system folder ``out`` (``$METIS_HOME/runs/nano``).

    ``steps`` is the recipe's own number where not given.

    Raises:
        MetisError: no such piece, the corpus is not prepared, or an earlier piece is missing.
    """
    if piece not in PIECES:
        raise MetisError(f"unknown piece {piece!r}; choose one of {', '.join(PIECES)}")
    if steps is None:
        steps = next(entry["steps"] for entry in json.loads(RECIPE.read_text()) if entry["piece"] == piece)
    if steps < 1:
        raise MetisError(f"steps must be at least 1, not {steps}")
    return PIECES[piece](out or metis_home() / "runs" / "nano", steps)


def publish(out: Path | None = None, to: Path = SHIPPED / "nano") -> None:
    """Copy a trained system without its logs to where it ships, and its scores into the recipe."""
    out = out or metis_home() / "runs" / "nano"
    entries = []
    for piece in PIECES:
        folder = FOLDERS.get(piece, piece)
        target = to / folder
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted((out / folder).glob("*.*")):
            shutil.copy(path, target / (path.name + ".part"))
            os.replace(target / (path.name + ".part"), target / path.name)
        card = json.loads((target / "config.json").read_text())["card"]
        runs = [*card.get("earlier", []), card["scores"]]
        entries.append({"piece": piece, "steps": sum(score["steps"] for score in runs), "runs": runs})
    RECIPE.parent.mkdir(parents=True, exist_ok=True)
    RECIPE.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    print(run(sys.argv[1], int(sys.argv[2])))
