"""How fast the judges of an evaluation work here, against the way the released scripts use theirs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

from metis_lib import assets, audio
from metis_lib.errors import MetisError
from metis_lib.evaluation import systems
from metis_lib.evaluation.judges import CORES, DnsmosJudge, Judge, SpeakerJudge, WhisperJudge


def bench_evaluation(testset: str = "human", files: int = 12, *, device: str = "auto") -> dict[str, Any]:
    """Time the offline judges as an evaluation uses them against the way the released scripts use theirs.

    The scripts (Amphion's ``calc_metrics``, UniSpeech's ``verification``) take one metric and one file at a time and
    load the model for each: a transcript for the word errors and another for the character errors, two embeddings for
    every similarity.  Here a judge is loaded once and judges all files, each only once.  Both work on the noisy inputs
    of speech enhancement, the similarities are to the clean recording and to another speaker.  Libraries are imported
    and weights checked before the clock starts.

    Args:
        testset: with items of speech enhancement.
        files: how many of them.
        device: ``auto``, ``cpu`` or ``cuda``.

    Returns:
        ``ratio`` (the scripts' seconds by ours, all judges), ``ratio_same_work`` (one file at a time, the model loaded
        each time, but each file only once), both for every judge too, with seconds and whether the verdicts agree.
    """

    def read(path: Any) -> np.ndarray:
        return audio.read(path, 16_000).numpy()

    items = [item for item in systems.load_items(testset, "se") if item.clean and item.other][:files]
    if not items:
        raise MetisError(f"{testset} has no noisy recording with a clean one and another speaker beside it")
    noisy, clean, other = ([read(getattr(item, key)) for item in items] for key in ("noisy", "clean", "other"))
    distinct = list({wav.tobytes(): wav for wav in [*noisy, *clean, *other]}.values())
    calls: dict[type[Judge], tuple[list[list[np.ndarray]], list[np.ndarray]]] = {  # what a script's calls judge; we
        WhisperJudge: ([[wav] for wav in noisy] * 2, noisy),
        SpeakerJudge: ([[a, b] for a, b in zip(noisy * 2, clean + other, strict=True)], distinct),
        DnsmosJudge: ([[wav] for wav in noisy], noisy),
    }

    def alone(kind: type[Judge], wavs: list[np.ndarray]) -> list[Any]:
        torch.set_num_threads(CORES)  # all cores for the one clip
        judge = kind(device)
        judge.workers = 1  # type: ignore[attr-defined]
        verdicts = [judge(wav) for wav in wavs]
        judge.release()
        return verdicts

    def together(kind: type[Judge], wavs: list[np.ndarray]) -> list[Any]:
        judge = kind(device)
        verdicts = [v for at in range(0, len(wavs), judge.batch) for v in judge.many(wavs[at : at + judge.batch])]
        judge.release()
        return verdicts

    def timed(work: Callable[[], Any]) -> tuple[float, Any]:
        began = time.perf_counter()
        found = work()
        return time.perf_counter() - began, found

    found: dict[str, dict[str, Any]] = {}
    for kind, (asked, once) in calls.items():
        alone(kind, once[:1])  # imports, hashes
        with mock.patch.object(assets, "fetch", assets.asset_folder):  # the hash is no part of a script's loading
            scripts, _ = timed(lambda: [alone(kind, wavs) for wavs in asked])  # noqa: B023
            single, apart = timed(lambda: [alone(kind, [wav])[0] for wav in once])  # noqa: B023
            batch, joined = timed(lambda: together(kind, once))  # noqa: B023
        found[kind.__name__] = {
            "ratio": round(scripts / batch, 2), "ratio_same_work": round(single / batch, 2),
            "scripts_s": round(scripts, 3), "same_work_s": round(single, 3), "batch_s": round(batch, 3),
            "files": len(once), "same_verdicts": sum(a == b for a, b in zip(apart, joined, strict=True)),
        }  # fmt: skip
    total = {key: sum(each[key] for each in found.values()) for key in ("scripts_s", "same_work_s", "batch_s")}
    return {
        "ratio": round(total["scripts_s"] / total["batch_s"], 2),
        "ratio_same_work": round(total["same_work_s"] / total["batch_s"], 2),
        "judges": found, "testset": testset, "files": len(items),
        "seconds_of_audio": round(sum(map(len, noisy)) / 16_000, 1), "device": device, "cores": CORES,
        "torch": torch.__version__,
    }  # fmt: skip
