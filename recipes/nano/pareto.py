"""Quality against passes: what step lists, guidance and temperatures cost and give on nano.

``python -m recipes.nano.pareto [SWEEP …]`` measures the points of the sweeps that are not measured yet, writes
``results/bench/pareto.json`` and ``pareto.png``, and the chosen settings into ``decode.json`` beside the weights, which
the library takes as defaults.  A pass is one run of a model over the utterance, guidance makes two of a step.  What is
chosen is chosen on voices of the validation, not on a test set.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from metis_lib.assets import metis_home
from metis_lib.checkpoints import locate
from metis_lib.evaluation import record, statistics
from metis_lib.evaluation.scoring import Verdicts, score
from metis_lib.evaluation.systems import Systems, label, load_items, produce, testset_folder
from metis_lib.pipeline import Metis
from recipes.nano import testsets

OUT = record.ROOT / "results" / "bench"
QUALITY = ("wer", "sim_prompt", "dnsmos_ovrl")
LOSS = {"wer": 0.03, "sim_prompt": 0.02}
"""By how much (mean of paired differences) a cheaper point may be worse than the one with the lowest WER: about the
standard error of such a difference on 36 utterances."""
_LOOSE = {"stage2_cfg": 1.0, "stage2_top_k": 20, "stage2_candidates": 3}
_LISTS = ((1,), (4,), (10,), (10, 4, 4), (20, 10, 4))
SWEEPS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "stage2": ("codec", "stage2", [
        *({**_LOOSE, "stage2_steps": steps} for steps in _LISTS),
        *({**_LOOSE, "stage2_steps": (10, 4, 4), **change} for change in (
            {"stage2_cfg": 0.0}, {"stage2_top_k": 6}, {"stage2_candidates": 2}, {"stage2_candidates": 4},
            {"stage2_steps": (4,), "stage2_top_k": 6, "stage2_candidates": 1},
            {"stage2_steps": (4,), "stage2_candidates": 2},
        )),
    ]),
    "tts": ("tts", "nano", [
        *({"steps": steps, "cfg": 1.0, "candidates": 1} for steps in (4, 8, 16, 25)),
        *({"steps": 16, "cfg": 1.0, "candidates": 1, **change} for change in (
            {"cfg": 0.0}, {"steps": 4, "candidates": 4}, {"steps": 8, "candidates": 4}, {"candidates": 4},
            {"steps": 4, "candidates": 8},
        )),
    ]),
    "se": ("se", "nano", [{"steps": steps} for steps in (1, 4, 10, 20)]),
    "vc": ("vc", "nano", [
        *({"steps": steps, "cfg": cfg, "candidates": 1} for steps, cfg in ((4, 0.0), (20, 0.0), (4, 1.0), (20, 1.0))),
        *({"steps": 4, "cfg": cfg, "candidates": count} for cfg, count in ((0.0, 4), (1.0, 4), (0.0, 8))),
        {"steps": 20, "cfg": 0.0, "candidates": 4},
    ]),
    "told": ("tse", "nano-omni-text", [{"candidates": count} for count in (1, 4, 8)]),
}  # fmt: skip
"""Task, system and options of each sweep."""
USED = ("ssl", "semantic_codec", "acoustic_codec", "stage2_layer1", "stage2_full")
APPLIES = {"stage2": "any", "tts": "tts", "se": "se", "vc": "vc", "told": "tse"}
"""Which tasks take what a sweep has chosen as their default."""
MODELS = {"told": "omni"}
"""Whose weights a sweep is about, where they have not its name."""
TITLES = {"stage2": "stage 2, from the recording's tokens", "tts": "text-to-speech", "se": "enhancement",
          "vc": "conversion", "told": "extraction, told the words"}  # fmt: skip


def passes(metis: Metis, sweep: str, options: dict[str, Any]) -> int:
    """Runs of a model that these options ask for, in the stages that the sweep is about."""
    chosen = metis.options(
        SWEEPS[sweep][0].replace("codec", "tts"), {"text": "told"} if sweep == "told" else None, **options
    )
    if sweep == "stage2":
        layers = chosen.stage2_steps[: metis.stage2_full.config.num_quantizers]
        return chosen.stage2_candidates * (layers[0] + sum(layers[1:]) * (2 if chosen.stage2.cfg else 1))
    return chosen.candidates * chosen.stage1.steps * (2 if chosen.stage1.cfg else 1)


def measure(
    sweep: str, model: str, testset: str, items: int, seeds: int, seen: list[dict[str, Any]], say: Any = print
) -> list[dict[str, Any]]:  # fmt: skip
    """The points of a sweep, the settings that are in ``seen`` as they are there."""
    task, system, settings = SWEEPS[sweep]
    system = model + system.removeprefix("nano") if system.startswith("nano") else system
    every = load_items(testset, task)
    chosen = every[:: max(1, len(every) // items)][:items]
    home, own = locate(model), ("stage1", f"tasks/{MODELS.get(sweep, sweep)}") * (sweep != "stage2")
    files = [file for part in (*USED, *own) for file in (home / part).glob("*.safetensors")]
    usual = {} if sweep == "stage2" else (record.read_json(home / "decode.json") or {}).get("any", {})
    about = [usual, record.code_hash(*record.MODEL_CODE)]
    hashes = record.sha256_of([record.sha256_files(files, home), record.testset_hash(testset_folder(testset)), about])
    known = {p["key"]: p for p in seen if p["sweep"] == sweep}
    folder, verdicts, points, metis = metis_home() / "cache" / "pareto", Verdicts(), [], None
    for options in settings:
        key = record.sha256_of([options, hashes, len(chosen), seeds])
        if key in known:
            points.append(known[key])
            continue
        began, rows, clips = time.perf_counter(), list[dict[str, Any]](), list[Any]()
        for seed in range(seeds):
            maker = Systems(model, options=options, seed=seed)
            maker._loaded = {model: metis} if metis else {}
            made = produce(chosen, [system], folder / key[:12] / str(seed), seeds=(seed,), maker=maker)
            metis = held = maker.metis()
            rows += [{**row, "seed": seed} for row in score(made, verdicts=verdicts)]
            clips += made
        summary = statistics.summarise(rows, task)[label(system)]
        took = sum(clip.seconds_to_make or 0 for clip in clips) / sum(row["seconds"] or 0 for row in rows)
        points.append({
            "sweep": sweep, "options": options, "passes": passes(held, sweep, options), "rtf": round(took, 4),
            "n": len(chosen), "seeds": seeds, "testset": testset, "key": key,
            **{k: {"mean": summary[k]["mean"], "ci95": summary[k]["ci95"]} for k in QUALITY if k in summary},
            "rows": [{k: row[k] for k in ("id", "seed", "speaker", "text", *QUALITY) if k in row} for row in rows],
        })  # fmt: skip
        got = ", ".join(f"{k} {points[-1][k]['mean']:.3f}" for k in QUALITY if k in points[-1])
        say(f"{sweep} {options}: {points[-1]['passes']} passes, {got} ({time.perf_counter() - began:.0f} s)")
    return points


def choose(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The point of the fewest passes that is, utterance by utterance, about as good as the one with the lowest WER."""
    best = min(points, key=lambda p: p["wer"]["mean"])

    def loss(point: dict[str, Any], key: str) -> float:
        pairs = [(a.get(key), b.get(key)) for a, b in zip(point["rows"], best["rows"], strict=True)]
        gaps = [a - b for a, b in pairs if a is not None and b is not None]
        return (1 if key == "wer" else -1) * sum(gaps) / max(len(gaps), 1)

    good = [p for p in points if all(loss(p, key) <= most for key, most in LOSS.items())]
    return min(good, key=lambda p: (p["passes"], p["wer"]["mean"]))


def draw(points: list[dict[str, Any]], chosen: dict[str, Any]) -> Any:
    """Word error rate against passes: a panel a sweep, a colour a guidance, 95 % intervals, the choice."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker
    import seaborn

    names = list(dict.fromkeys(p["sweep"] for p in points))
    with plt.rc_context({**seaborn.axes_style("whitegrid"), "figure.constrained_layout.use": True}):
        figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = [p for p in points if p["sweep"] == name]
        scales = sorted({p["options"].get("stage2_cfg", p["options"].get("cfg")) for p in mine}, key=str)
        for colour, scale in zip(seaborn.color_palette("colorblind"), scales, strict=False):
            some = [p for p in mine if p["options"].get("stage2_cfg", p["options"].get("cfg")) == scale]
            at, wer = [p["passes"] for p in some], [100 * p["wer"]["mean"] for p in some]
            ends = [[abs(100 * p["wer"]["ci95"][i] - w) for p, w in zip(some, wer, strict=True)] for i in (0, 1)]
            axis.errorbar(
                at, wer, ends, fmt="o", color=colour, ms=5, lw=0.8,
                label="default guidance" if scale is None else f"guidance {scale:g}",
            )  # fmt: skip
        front, lowest = list[dict[str, Any]](), float("inf")
        for p in sorted(mine, key=lambda p: (p["passes"], p["wer"]["mean"])):
            if p["wer"]["mean"] < lowest:
                front, lowest = [*front, p], p["wer"]["mean"]
        axis.plot(
            [p["passes"] for p in front], [100 * p["wer"]["mean"] for p in front], "--", color="0.4", lw=1,
            label="frontier",
        )  # fmt: skip
        pick = chosen[name]
        axis.plot(
            pick["passes"], 100 * pick["wer"]["mean"], "o", ms=13, mfc="none", mec="black", label="chosen default"
        )
        axis.set(title=TITLES.get(name, name), xlabel="passes", ylabel="word error rate (%)", ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        axis.legend(fontsize=8, loc="lower right")
    plt.close(figure)
    return figure


def main(
    sweeps: list[str], *, model: str = "nano", testset: str = "tuning", items: int = 36, seeds: int = 2,
    out: Path | None = None, say: Any = print,
) -> dict[str, Any]:  # fmt: skip
    """Measure, choose, draw; write all three and ``decode.json``; return the chosen point of each sweep.

    Points of another system than nano lie in a folder of its name: each is chosen among its own.
    """
    out = out or (OUT if model == "nano" else OUT / Path(model).resolve().name)
    if testset != "human" and not (metis_home() / "testsets" / testset / "manifest.jsonl").is_file():
        testsets.build_synthetic(testset, more=True)
    file = out / "pareto.json"
    held = (record.read_json(file) or {"points": []})["points"]
    for sweep in sweeps:
        new = measure(sweep, model, testset, items, seeds, held, say)
        held = [p for p in held if p["sweep"] != sweep] + new
        chosen = {name: choose([p for p in held if p["sweep"] == name]) for name in SWEEPS if _in(name, held)}
        record.write_json(file, {"chosen": {k: _short(p) for k, p in chosen.items()}, "points": held})
        record.write_figure(out / "pareto.png", draw(held, chosen))
        defaults, found = locate(model) / "decode.json", {APPLIES[k]: p["options"] for k, p in chosen.items()}
        record.write_json(defaults, (record.read_json(defaults) or {}) | found)  # what no sweep is about stays
    return {name: _short(choose([p for p in held if p["sweep"] == name])) for name in sweeps}


def _in(name: str, points: list[dict[str, Any]]) -> bool:
    return any(p["sweep"] == name for p in points)


def _short(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != "rows"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweeps", nargs="*", choices=[*SWEEPS, []], default=[])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--items", type=int, default=36)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    print(main(given.sweeps or list(SWEEPS), model=given.model, items=given.items, seeds=given.seeds))
