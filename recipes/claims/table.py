"""From results to the table: effects with intervals, verdicts, and the files that notebooks read.

Trainings, decoded or not: a t interval over seeds of the mean difference over utterances.  What the system itself
decodes: a bootstrap over utterances (or speakers), each averaged over its seeds first
(:mod:`metis_lib.evaluation.statistics`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.evaluation import record, statistics
from recipes.claims import decode
from recipes.claims.arms import Lab, result_of
from recipes.claims.claims import RIVAL, TITLES, Claim, all_claims, seeded, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

VERDICTS = ("holds", "fails", "undecided")
FOLDER = record.ROOT / "results" / "claims"
COLOURS = {"holds": "#0173b2", "fails": "#d55e00", "undecided": "#949494"}
"""Seaborn's colour-blind palette; markers tell them apart too."""
TRAINED = {"two-stages": "se-system-", "omni-arms": "tse-system-"}
"""Studies that decode trainings, one a seed: how the id of the arm begins whose tokens are told; the longer ones'."""


class Effect(NamedTuple):
    """A mean oriented towards the claim with its 95 % interval.

    Attributes:
        seeds: how many.
        tokens: that each side was trained with.
        n: pairs that were compared: utterances times seeds (of probes, seeds).
        n_failed: pairs left out, for a judge failed on one side.
    """

    mean: float
    low: float
    high: float
    seeds: int
    tokens: int
    n: int
    n_failed: int


Results = Mapping[str, Any]
"""``arms``: results by id; ``decode``: rows by study."""


def collect(lab: Lab) -> dict[str, Any]:
    """Everything that was measured so far with this system and these settings."""
    wanted = {arm.id: arm for claim in all_claims(lab) for seed in lab.seeds
              for arm in seeded((*claim.arms, *claim.also), seed)}  # fmt: skip
    for study in decode.studies(lab).values():
        wanted |= {arm.id: arm for seed in lab.seeds for arm in seeded(study.arms, seed)}
    arms = {id: found for id, arm in wanted.items() if (found := result_of(lab, arm))}
    studies = {name: found["rows"] for name in decode.studies(lab) if (found := decode.result_of_study(lab, name))}
    return {"arms": arms, "decode": studies}


def missing(claim: Claim, results: Results, seeds: Sequence[int]) -> list[str]:
    """The arms and studies that a claim lacks."""
    wanted = [arm.id for seed in seeds for arm in (replace(a, seed=seed) for a in claim.arms)]
    lacking = [id for id in wanted if id not in results["arms"]]
    return lacking + [name for name in claim.study[:1] if name not in results["decode"]]


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval; an infinite one of a single value."""
    from scipy import stats

    x = np.asarray(values, float)
    if len(x) < 2:
        return float(x.mean()), -np.inf, np.inf
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return float(x.mean()), float(x.mean()) - half, float(x.mean()) + half


def effect_of(claim: Claim, results: Results, seeds: Sequence[int]) -> Effect:
    """The effect of a claim; MetisError names what is not measured."""
    lacking = missing(claim, results, seeds)
    if lacking:
        raise MetisError(f"{claim.id} lacks {', '.join(lacking)}")
    if claim.arms:
        return _of_arms(claim, results["arms"], seeds)
    name, metric, a, b = claim.study  # type: ignore[misc]
    first = TRAINED.get(name, "none")
    tokens = max((arm["tokens"] for id, arm in results["arms"].items() if id.startswith(first)), default=0)
    return _of_rows(results["decode"][name], metric, a, b, tokens, trained=name in TRAINED)


def _of_arms(claim: Claim, arms: Mapping[str, Any], seeds: Sequence[int]) -> Effect:
    means, n = [], 0
    for seed in seeds:
        a, b = (np.array(arms[replace(arm, seed=seed).id]["held_out"][claim.task][claim.condition])
                for arm in claim.arms)  # fmt: skip
        if a.shape != b.shape or not a.size:
            raise MetisError(f"{claim.id}: its arms were not measured on the same utterances, or on none")
        means.append(float((a - b).mean()))
        n += a.size
    tokens = min(arms[replace(arm, seed=seeds[0]).id]["tokens"] for arm in claim.arms)
    return Effect(*t_interval(means), len(means), tokens, n, 0)


def _of_rows(
    rows: Sequence[dict[str, Any]], metric: str, a: str, b: str, tokens: int, *, trained: bool = False
) -> Effect:
    """The paired difference of two variants; rows without an item (probes) are paired by seed.

    Where each seed is another training (``trained``) or another draw of a probe, seeds are what varies.
    """
    values: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        if row.get(metric) is not None:
            values.setdefault(row["variant"], {})[(row.get("id", ""), row["seed"])] = row[metric]
    if a == RIVAL:
        a = min((name for name in values if name != b), key=lambda name: np.mean([*values[name].values()]))
    if a not in values or (b and b not in values):
        raise MetisError(f"no variant {a if a not in values else b!r} has {metric}")
    pairs = [key for key in values[a] if not b or key in values[b]]
    if not pairs:
        raise MetisError(f"{a} and {b} have no item in common")
    differences = [values[a][key] - (values[b][key] if b else 0.0) for key in pairs]
    by_seed: dict[int, list[float]] = {}
    for (_, seed), difference in zip(pairs, differences, strict=True):
        by_seed.setdefault(seed, []).append(difference)
    wanted = {(row.get("id", ""), row["seed"]) for row in rows if row["variant"] in (a, b)}
    about = (len(by_seed), tokens, len(pairs), len(wanted) - len(pairs))
    if trained or not any(id for id, _ in pairs):
        return Effect(*t_interval([float(np.mean(some)) for some in by_seed.values()]), *about)
    speakers = {row["id"]: row["speaker"] for row in rows}
    found = statistics.mean_interval(differences, [speakers[id] for id, _ in pairs], [id for id, _ in pairs])
    low, high = found.ci95 or (-np.inf, np.inf)
    return Effect(found.mean, low, high, *about)


def row_of(claim: Claim, effect: Effect) -> dict[str, Any]:
    """A row of the table; MetisError where an interval is not finite (a single seed or utterance)."""
    if not np.isfinite([effect.mean, effect.low, effect.high]).all():
        raise MetisError(f"{claim.id}: no interval from {effect.seeds} seed(s); measure more")
    return {
        "id": claim.id, "claim": claim.claim, "source": claim.source, "task": claim.task,
        "effect": round(effect.mean, 5), "unit": claim.unit, "ci95": [round(effect.low, 5), round(effect.high, 5)],
        "seeds": effect.seeds, "n": effect.n, "n_failed": effect.n_failed, "tokens": effect.tokens,
        "verdict": verdict(effect.low, effect.high, margin=claim.margin, no_worse=claim.no_worse),
        "notebook": f"notebooks/{claim.notebook}_{TITLES[claim.notebook]}.ipynb",
    }  # fmt: skip


def rows_of(lab: Lab, results: Results, *, only: str = "") -> list[dict[str, Any]]:
    """The rows of all claims, or of those of one notebook (its number), or whose id begins so.

    Raises:
        MetisError: rows are missing; the message lists every arm and study that they lack.
    """
    chosen = [claim for claim in all_claims(lab) if claim.notebook == only or claim.id.startswith(only)]
    if not chosen:
        raise MetisError(f"no claim begins with {only!r}, and no notebook has that number")
    lacking = list(dict.fromkeys(name for claim in chosen for name in missing(claim, results, lab.seeds)))
    if lacking:
        raise MetisError(f"{len(lacking)} measurements are missing: {', '.join(lacking)}")
    return [
        row_of(claim, effect_of(claim, results, lab.seeds)) | at_hand(claim, results, lab.seeds[0]) for claim in chosen
    ]


def at_hand(claim: Claim, results: Results, seed: int) -> dict[str, Any]:
    """Hours of recordings that the two sides really had: fewer than their name says where fewer are prepared."""
    arms = [results["arms"][replace(arm, seed=seed).id] for arm in claim.arms]
    found = [arm.get("hours_used", {}).get(claim.task) for arm in arms]
    return {"hours_at_hand": [round(hours, 2) for hours in found]} if found and None not in found else {}


def export(lab: Lab, folder: str | Path = FOLDER) -> list[dict[str, Any]]:
    """Write what notebooks read: ``claims.json``, ``claims.png``, ``arms.json``, ``decode.json``, ``run.json``.

    Raises:
        MetisError: as :func:`rows_of`; nothing is written then.
    """
    results = collect(lab)
    rows = rows_of(lab, results)
    _write(Path(folder), rows, results, _about(lab, results))
    return rows


def export_part(lab: Lab, folder: str | Path, only: str) -> list[dict[str, Any]]:
    """:func:`export` of some claims, chosen as by :func:`rows_of`; in the table that ``folder`` has they take the
    place of what was measured of them before, and ``run.json`` tells of them under ``parts``."""
    folder, results = Path(folder), collect(lab)
    rows = rows_of(lab, results, only=only)
    mine = used_by(lab, {row["id"] for row in rows})
    results = {kind: {name: x for name, x in found.items() if name in mine} for kind, found in results.items()}
    about = _about(lab, results)
    old: dict[str, Any] = {}
    for name in ("claims", "arms", "decode", "run"):
        old[name] = record.read_json(folder / f"{name}.json")
    if old["run"]:
        claims = all_claims(lab)
        wanted, known = used_by(lab, {c.id for c in claims}), {row["id"]: row for row in (*old["claims"], *rows)}
        rows = [known[claim.id] for claim in claims if claim.id in known]
        kept = {arm["id"]: arm for arm in old["arms"] if arm["id"] in wanted}
        results = {"arms": kept | results["arms"], "decode": old["decode"] | results["decode"]}
        about = old["run"] | {"parts": old["run"].get("parts", {}) | {only: about}}
    _write(folder, rows, results, about)
    return rows


def used_by(lab: Lab, ids: Collection[str]) -> set[str]:
    """Names of the arms (of all seeds) and studies that these claims compare or show."""
    claims, studies = [claim for claim in all_claims(lab) if claim.id in ids], decode.studies(lab)
    names = {name for claim in claims for name in claim.study[:1]}
    arms = [a for claim in claims for a in (*claim.arms, *claim.also)] + [a for n in names for a in studies[n].arms]
    return names | {arm.id for seed in lab.seeds for arm in seeded(arms, seed)}


def _about(lab: Lab, results: Results) -> dict[str, Any]:
    """Settings and provenance of what was measured."""
    settings = {key: getattr(lab, key) for key in ("tokens", "longer", "pretraining", "frames", "lr",
                                                   "pretraining_lr", "precision", "hours", "held_out", "seeds",
                                                   "testset", "items")}  # fmt: skip
    seconds = round(sum(arm["seconds"] for arm in results["arms"].values()))
    return {"settings": settings, "training_seconds": seconds, **record.provenance(str(lab.system), lab.manifest)}


def _write(folder: Path, rows: list[dict[str, Any]], results: Results, about: Mapping[str, Any]) -> None:
    hidden = {"key", "seconds", "skipped"}
    arms = [{k: v for k, v in arm.items() if k not in hidden} for arm in results["arms"].values()]
    lines = ",\n".join(json.dumps(arm, allow_nan=False) for arm in arms)
    write_text(folder / "arms.json", f"[\n{lines}\n]\n")  # a training a line: its scores are many numbers
    record.write_json(folder / "decode.json", results["decode"])
    record.write_json(folder / "run.json", about)
    record.write_json(folder / "claims.json", rows)
    record.write_figure(folder / "claims.png", forest(rows))


def check(rows: Sequence[dict[str, Any]], lab: Lab) -> None:
    """MetisError that lists what is wrong with a table: rows that are missing, or whose verdict is not the rule's."""
    by_id, wrong = {row["id"]: row for row in rows}, []
    for claim in all_claims(lab):
        row = by_id.get(claim.id)
        if row is None:
            wrong.append(f"{claim.id} is missing")
        elif row["verdict"] != verdict(*row["ci95"], margin=claim.margin, no_worse=claim.no_worse):
            wrong.append(f"{claim.id}: {row['verdict']} is not what the rule gives")
    if wrong:
        raise MetisError(f"{len(wrong)} rows of the table are wrong: {'; '.join(wrong)}")


# ---------------------------------------------------------------- for people


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for a page: claim, effect with its interval, verdict, notebook; and how many hold."""
    units = {"nats a token": "nats", "word error rate": "WER", "share of speakers named": "share named",
             "confidence of the recogniser": "confidence", "phone error rate": "PER"}  # fmt: skip
    lines = ["| claim | effect (positive: as claimed) | verdict | |", "|---|---|---|---|"]
    for row in rows:
        low, high = (f"{x:+.3f}" for x in row["ci95"])
        effect = f"{row['effect']:+.3f} {units.get(row['unit'], row['unit'])} ({low} to {high})"
        book, hours = Path(row["notebook"]), row.get("hours_at_hand", [])
        less = f" At hand: {min(hours):.1f} h." if "10 h" in row["claim"] and min(hours, default=10) < 9.5 else ""
        lines.append(f"| {row['claim']}{less} | {effect} | {row['verdict']} | [{book.stem[:2]}](../{book}) |")
    holds, fails, rest = (sum(row["verdict"] == v for row in rows) for v in VERDICTS)
    return "\n".join([f"Claims that hold: {holds}; that fail: {fails}; undecided: {rest}.", "", *lines])


def forest(rows: Sequence[dict[str, Any]]) -> Figure:
    """All effects with their intervals: one panel a unit, positive speaks for the claim."""
    import matplotlib.pyplot as plt

    units = list(dict.fromkeys(row["unit"] for row in rows))
    counts = [sum(row["unit"] == unit for row in rows) for unit in units]
    size = (8.5, 0.27 * sum(counts) + 0.75 * len(units) + 0.4)
    figure, axes = plt.subplots(
        len(units), figsize=size, squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": [count + 0.8 for count in counts]},
    )  # fmt: skip
    markers = dict(zip(VERDICTS, "oXs", strict=True))
    for axis, unit in zip(axes[:, 0], units, strict=True):
        some = [row for row in rows if row["unit"] == unit][::-1]
        for place, row in enumerate(some):
            colour = COLOURS[row["verdict"]]
            axis.hlines(place, *row["ci95"], color=colour, linewidth=2)
            axis.plot(row["effect"], place, markers[row["verdict"]], color=colour, markersize=5)
        axis.axvline(0, color="black", linewidth=0.8)
        reach = sorted(max(map(abs, row["ci95"])) for row in some)
        if len(some) > 2 and reach[-1] > 3 * reach[-2]:  # one that would press the others together lies outside
            edge = 1.1 * reach[-2]
            axis.set_xlim(-edge, edge)
            place = max(range(len(some)), key=lambda i: max(map(abs, some[i]["ci95"])))
            effect = some[place]["effect"]
            text, side = f"{effect:+.2f}", "right" if effect > 0 else "left"
            axis.text(edge if effect > 0 else -edge, place, f"{text} \u2192" if effect > 0 else f"\u2190 {text}",
                      ha=side, va="center", fontsize=8, color=COLOURS[some[place]["verdict"]])  # fmt: skip
        axis.set_yticks(range(len(some)), [row["id"] for row in some], fontsize=8)
        axis.set(ylim=(-0.6, len(some) - 0.4))
        axis.set_title(f"{unit} (positive: as claimed)", fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=8)
    handles = [plt.Line2D([], [], color=COLOURS[v], marker=markers[v], label=v) for v in VERDICTS]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    plt.close(figure)
    return figure


class Shown(NamedTuple):
    """What a notebook shows: its rows of the table, what was measured in long form, and what is missing.

    Attributes:
        claims: rows of ``claims.json``; before they exist, the claims and the rules of their verdicts.
        arms: one row an arm, task and condition, with ``nats`` (mean over utterances) and the arm's fields.
        decode: one row a clip (or probe) of every study.
        missing: arms and studies that the table lacks.
    """

    claims: DataFrame
    arms: DataFrame
    decode: DataFrame
    missing: list[str]


def show(notebook: str, folder: str | Path = FOLDER, *, lab: Lab | None = None) -> Shown:
    """The results of a notebook (its number); says in one line what is missing and how to make it."""
    import pandas

    lab, folder = lab or Lab.of(), Path(folder)
    mine = [claim for claim in all_claims(lab) if claim.notebook == notebook]
    known = {row["id"]: row for row in record.read_json(folder / "claims.json") or []}
    arms = record.read_json(folder / "arms.json") or []
    studies = record.read_json(folder / "decode.json") or {}
    wanted = {a.id for c in mine for seed in lab.seeds for a in seeded((*c.arms, *c.also), seed)}
    extra = list(dict.fromkeys(claim.study[0] for claim in mine if claim.study))
    used = {a.id for name in extra for s in lab.seeds for a in seeded(decode.studies(lab)[name].arms, s)}
    long = [
        {"longer": False, **{k: v for k, v in arm.items() if k not in ("held_out", "hours_used")}, "task": task,
         "arm": arm["task"], "condition": name, "nats": float(np.mean(values))}
        for arm in arms if arm["id"] in wanted | used
        for task, conditions in arm["held_out"].items() for name, values in conditions.items() if values
    ]  # fmt: skip
    rows = [{"study": name, **row} for name in extra for row in studies.get(name, [])]
    lacking = [claim.id for claim in mine if claim.id not in known]
    table = pandas.DataFrame([known[c.id] for c in mine if c.id in known])
    if lacking:
        print(f"not measured yet: {', '.join(lacking)}. Run: python -m recipes.claims run --only {notebook}; "
              f"python -m recipes.claims table --only {notebook} --out FOLDER")  # fmt: skip
        table = pandas.DataFrame([{"id": c.id, "claim": c.claim, "verdict rule": c.rule} for c in mine])
    return Shown(table, pandas.DataFrame(long), pandas.DataFrame(rows), lacking)


def design(notebook: str, lab: Lab | None = None) -> DataFrame:
    """What a notebook's claims compare: the two sides of each, and how much compute they get."""
    import pandas

    lab, rows = lab or Lab.of(), []
    for claim in (c for c in all_claims(lab) if c.notebook == notebook):
        if claim.arms:
            a, b = (replace(arm, seed=0).id.removesuffix("-s0") for arm in claim.arms)
            tokens = " / ".join(f"{arm.budget(lab):,}" for arm in claim.arms)
        else:
            name, metric, a, b = claim.study  # type: ignore[misc]
            a = "the lowest other" if a == RIVAL else a
            a, b, tokens = f"{name}: {metric} of {a}", b or "0 (already a difference)", "decoded only"
        rows.append({"id": claim.id, "a": a, "minus b": b, "tokens": tokens, "smallest effect": claim.margin,
                     "rule": claim.rule})  # fmt: skip
    return pandas.DataFrame(rows)
