"""What the simulators do to 1,000 utterances each, and how fast: ``results/data/simulation.json``.

``python -m recipes.nano.simulation`` draws from the nano corpus by a loader with two workers and looks at the
signals as well as at what the examples say of themselves.  Speed is seconds of audio made on two cores: by the
clock, and (for busy machines) by half of the workers' CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset

from metis_lib.assets import metis_home
from metis_lib.config import AUDIO_RATE
from metis_lib.data.examples import SIMULATORS, Example, Pool, Simulated, Sources
from metis_lib.data.simulate import Noises, Rooms, power
from metis_lib.data.store import write_text
from metis_lib.training.data import waves_of

RESULTS = Path(__file__).parents[2] / "results" / "data" / "simulation.json"
WORKERS = 2


def decibels(ratio: float) -> float:
    """A power ratio in dB."""
    return 10 * float(np.log10(ratio + 1e-12))


def facts(task: str, examples: list[Example]) -> dict[str, Any]:
    """Shares and ranges of what was done, and how far the signals are from what is said of them."""
    done = [e.done for e in examples]
    prompts = [e.prompt / len(e.target) for e in examples if e.prompt]
    out: dict[str, Any] = {"prompt_share": len(prompts) / len(done)}
    if prompts:
        out["prompt_fraction"] = [round(float(f(prompts)), 3) for f in (min, np.mean, max)]
    if task == "se":
        for key in ("noise", "room", "band_hz", "clip_db"):
            out[f"{key}_share"] = sum(d[key] is not None for d in done) / len(done)
        snr = [d["snr_db"] for d in done if d["noise"]]
        out["snr_db"] = [round(float(f(snr)), 2) for f in (min, np.mean, max)]
        out["bands"] = dict(sorted(Counter(d["band_hz"] for d in done if d["band_hz"]).items()))
        out["noises"] = dict(sorted(Counter(d["noise"].partition(":")[0] for d in done if d["noise"]).items()))
        heard = [e for e in examples if e.done["noise"] and e.done["room"] is None and e.done["band_hz"] is None]
        error = [decibels(power(e.target) / power(e.condition - e.target)) - e.done["snr_db"] for e in heard]
        out["snr_error_db_max"] = round(float(np.abs(error).max()), 4)
    if task == "tse":
        out["same_speaker"] = sum(o["speaker"] == d["speaker"] for d in done for o in d["others"])
        snr = [o["snr_db"] for d in done for o in d["others"]]
        out["snr_db"] = [round(float(f(snr)), 2) for f in (min, np.mean, max)]
        pairs = [(e, e.condition) for e in examples if e.condition is not None]
        out["prompt_differs"] = sum(not np.array_equal(c[: e.prompt], e.target[: e.prompt]) for e, c in pairs)
    if task == "omni":
        out["shares"] = {name: sum(e.task == name for e in examples) / len(done) for name in ("tts", "vc", "tse", "se")}
    if task == "tts":
        out["told_share"] = sum(e.text is not None for e in examples) / len(done)
    peaks = [float(np.abs(x).max()) for e in examples for x in (e.target, e.condition) if x is not None]
    return out | {"peak_max": round(max(peaks), 4)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    corpus = metis_home() / "corpora/nano"
    store = waves_of(corpus / "manifest.jsonl", "train")
    sources = Sources(noises=Noises.load(corpus), rooms=Rooms.load(corpus))
    report: dict[str, Any] = {"command": "python -m recipes.nano.simulation", "seed": chosen.seed, "tasks": {}}
    for task in SIMULATORS:
        data = Simulated(task, Pool(store), sources, seed=chosen.seed)
        part = Subset(data, range(min(chosen.count, len(data))))
        before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        loader = DataLoader(part, batch_size=8, num_workers=WORKERS, collate_fn=list)
        examples = [example for batch in loader for example in batch]
        wall, after = time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds = sum(len(e.target) for e in examples) / AUDIO_RATE
        report["tasks"][task] = {
            "examples": len(examples),
            "audio_seconds": round(seconds, 1),
            "times_real_time_two_cores_clock": round(seconds / wall, 1),
            "times_real_time_two_cores_cpu": round(seconds / (spent / WORKERS), 1),
            **facts(task, examples),
        }
        print(task, report["tasks"][task], flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(chosen.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
