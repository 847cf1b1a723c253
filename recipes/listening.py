"""Blind listening tests: one page that plays anywhere without a network, a key that stays with you, an analysis.

Two kinds: opinion scores of one clip at a time (``mos``, 1 to 5 as in ITU-T P.800) and preferences between two
(``ab``).  The page names no system and no utterance: clips have numbers and letters, drawn anew for every utterance.
Levels are never changed.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from metis_lib import audio, notebook
from metis_lib.data.store import write_text
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.evaluation.report import read_rows

QUESTIONS = {"mos": "How natural does this recording sound?", "ab": "Which of the two recordings sounds more natural?"}
CHOICES = {
    "mos": [["1", "bad"], ["2", "poor"], ["3", "fair"], ["4", "good"], ["5", "excellent"]],
    "ab": [["1", "A"], ["0", "no preference"], ["2", "B"]],
}
FLOOR = 3
"""A listener who rates the hidden reference below this on average was not listening."""
RESAMPLES = 10_000


def make_test(
    out: str | Path, run_folder: str | Path, task: str, systems: Sequence[str], items: Sequence[str] | int,
    seed: int = 0, kind: str = "mos", *, reference: str | None = None, anchor: str | None = None, repeats: int = 0,
    question: str | None = None,
) -> Path:  # fmt: skip
    """Write ``<out>/listen.html`` for the listeners and ``<out>/key.json`` for you; return the page.

    Args:
        run_folder: a run of ``metis evaluate`` with its audio.
        systems: at least one (``mos``) or two (``ab``: every pair) of the run's systems.
        items: ids of utterances, or how many to draw.
        seed: draws utterances, letters and repeats; each listener's order is drawn by the page from the listener's id.
        reference, anchor: systems hidden among the others, such as ``recording`` and ``noisy``: who rates the reference
            below 3 was not listening; in ``ab`` the two are compared with each other, so both are needed.
        repeats: how many pages are asked a second time.

    Raises:
        MetisError: unknown kind, system or utterance, audio that is missing, or too few systems.
    """
    if kind not in QUESTIONS:
        raise MetisError(f"unknown kind of listening test {kind!r}; choose mos or ab")
    if kind == "ab" and (reference is None) != (anchor is None):
        raise MetisError("in a test of preferences the reference is compared with the anchor: name both or none")
    hidden = [name for name in (reference, anchor) if name is not None]
    names = list(dict.fromkeys([*systems, *hidden]))
    if len(set(systems)) < (2 if kind == "ab" else 1) or len(set(hidden)) < len(hidden):
        raise MetisError("name one system for mos, two for ab, each once")
    rng = np.random.default_rng(seed)
    files = {name: _files(run_folder, task, name) for name in names}
    known = [item for item in files[names[0]] if all(item in found for found in files.values())]
    chosen = sorted(rng.choice(known, min(items, len(known)), replace=False)) if isinstance(items, int) else items
    lost = [item for item in chosen if item not in known]
    if lost or not chosen:
        raise MetisError(f"no audio of every system for the utterance {lost[0] if lost else '(none)'} in {run_folder}")
    clips: dict[str, dict[str, str]] = {}
    trials: list[dict[str, Any]] = []
    for number, item in enumerate(chosen, 1):
        places = rng.permutation(len(names))
        letters = {name: f"{number:02d}{chr(ord('A') + p)}" for p, name in zip(places, names, strict=True)}
        clips |= {clip: {"item": str(item), "system": name} for name, clip in letters.items()}
        pairs = [*itertools.combinations(dict.fromkeys(systems), 2), *([hidden] if hidden else [])]
        asked = [(name,) for name in names] if kind == "mos" else sorted({tuple(sorted(pair)) for pair in pairs})
        trials += [{"clips": sorted(letters[name] for name in trial)} for trial in asked]
    again = rng.choice(len(trials), min(repeats, len(trials)), replace=False)
    trials += [dict(trials[index]) for index in again]
    trials = [{"trial": f"t{number:03d}", **trials[index]} for number, index in enumerate(rng.permutation(len(trials)))]
    clips = dict(sorted(clips.items()))
    key: dict[str, Any] = {
        "kind": kind, "task": task, "seed": seed, "systems": list(dict.fromkeys(systems)), "reference": reference,
        "anchor": anchor, "trials": trials,
        "clips": {c: about | {"sha256": record.sha256_file(_path(files, about))} for c, about in clips.items()},
    }  # fmt: skip
    key = {"test": record.sha256_of(key)[:10], **key}
    page = notebook.page(
        Path(__file__).with_name("listening.html"), test=key["test"], kind=kind, trials=trials, choices=CHOICES[kind],
        question=question or QUESTIONS[kind], clips={c: _player(_path(files, about)) for c, about in clips.items()},
    )  # fmt: skip
    write_text(Path(out) / "listen.html", page)
    record.write_json(Path(out) / "key.json", key)
    return Path(out) / "listen.html"


def _files(run_folder: str | Path, task: str, system: str) -> dict[str, Path]:
    """Utterance to its audio (of the first seed)."""
    found: dict[str, Path] = {}
    for row in read_rows(run_folder, task, system):
        path = Path(run_folder) / task / system / (row["audio"] or "none")
        if path.is_file():
            found.setdefault(row["id"], path)
    return found


def _path(files: dict[str, dict[str, Path]], about: dict[str, str]) -> Path:
    return files[about["system"]][about["item"]]


def _player(path: Path) -> str:
    rate = soundfile.info(str(path)).samplerate
    return audio.player(audio.read(path, rate), rate)


# --- analysis --------------------------------------------------------------------------------------------


def read_answers(key: str | Path | dict[str, Any], csvs: Iterable[str | Path]) -> tuple[dict[str, Any], list[dict]]:
    """The key, and one record an answer with the systems that its clips are.

    Raises:
        MetisError: answers of another test, an unknown clip or answer, or two files of one listener.
    """
    found = key if isinstance(key, dict) else json.loads(Path(key).read_text())
    allowed = {choice for choice, _ in CHOICES[found["kind"]]}
    answers, seen = [], set[str]()
    for path in map(Path, csvs):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        listeners = {row.get("listener") or "" for row in rows}
        if any(row.get("test") != found["test"] for row in rows):
            raise MetisError(f"{path.name} belongs to another test than {found['test']}")
        if listeners & seen:
            raise MetisError(f"{path.name}: the listener {sorted(listeners & seen)[0]} has answered already")
        seen |= listeners
        for row in rows:
            clips = [row["first"], *([row["second"]] if row["second"] else [])]
            if row["answer"] not in allowed or any(clip not in found["clips"] for clip in clips):
                raise MetisError(f"{path.name}: the answer {row['answer']!r} to {' '.join(clips)} is not of this test")
            about = [found["clips"][clip] for clip in clips]
            answers.append({
                "listener": row["listener"], "trial": row["trial"], "item": about[0]["item"],
                "systems": [one["system"] for one in about], "answer": int(row["answer"]),
            })  # fmt: skip
    if not answers:
        raise MetisError("there are no answers to analyse")
    return found, answers


def analyse(key: str | Path | dict[str, Any], csvs: Iterable[str | Path], *, drop: bool = False) -> dict[str, Any]:
    """What listeners said: ``{test, kind, listeners, inattentive, ...}`` with ``mos`` or ``preferences``.

    ``mos``: ``{system: {mean, ci95, n, listeners, items}}``; the interval resamples listeners and utterances
    (Owen 2007), a percentile bootstrap, seed 0.  ``preferences``: for each pair ``{a, b, prefer_a, prefer_b, none,
    share_a, ci95, p}``, an exact binomial test and Clopper-Pearson interval without the undecided; answers of one
    listener are taken as independent, which few listeners are: read p with that in mind.
    ``inattentive``: listener to reasons.  They count unless ``drop``.
    """
    found, answers = read_answers(key, csvs)
    inattentive = _inattentive(found, answers)
    kept = [one for one in answers if not drop or one["listener"] not in inattentive]
    about = {"test": found["test"], "kind": found["kind"], "listeners": len({one["listener"] for one in kept})}
    about |= {"inattentive": inattentive, "dropped": drop}
    if found["kind"] == "ab":
        return about | {"preferences": _preferences(kept)}
    return about | {"mos": {name: _opinion(kept, name) for name in sorted({one["systems"][0] for one in kept})}}


def _chosen(answer: dict[str, Any]) -> int | str | None:
    """The score (mos), or the preferred system (ab; None: undecided)."""
    if len(answer["systems"]) == 1:
        return int(answer["answer"])
    return answer["systems"][answer["answer"] - 1] if answer["answer"] else None


def _inattentive(key: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Listeners who rated the hidden reference low, preferred the anchor to it, or contradicted themselves."""
    found: dict[str, list[str]] = {}
    for listener in dict.fromkeys(one["listener"] for one in answers):
        mine, reasons = [one for one in answers if one["listener"] == listener], []
        if key["kind"] == "mos":
            scores = [one["answer"] for one in mine if one["systems"] == [key["reference"]]]
            if scores and np.mean(scores) < FLOOR:
                reasons.append(f"rated the hidden reference {np.mean(scores):.1f} on average")
        elif key["reference"]:
            catch = [_chosen(one) for one in mine if set(one["systems"]) == {key["reference"], key["anchor"]}]
            if catch and catch.count(key["anchor"]) * 2 >= len(catch):
                reasons.append(f"preferred the anchor to the reference in {catch.count(key['anchor'])} of {len(catch)}")
        pairs: dict[tuple[str, ...], list[Any]] = {}
        for one in mine:
            pairs.setdefault((one["item"], *sorted(one["systems"])), []).append(_chosen(one))
        twice = [given for given in pairs.values() if len(given) > 1]
        apart = sum(abs(a - b) > 1 if isinstance(a, int) and isinstance(b, int) else a != b for a, b, *_ in twice)
        if apart * 2 > len(twice):
            reasons.append(f"disagreed with themselves in {apart} of {len(twice)} repeats")
        if reasons:
            found[listener] = reasons
    return found


def _opinion(answers: Sequence[dict[str, Any]], system: str) -> dict[str, Any]:
    """Mean opinion with the interval over both listeners and utterances (what one listener said twice is averaged)."""
    from scipy.stats import bootstrap

    mine = [one for one in answers if one["systems"] == [system]]
    listeners, items = (sorted({one[key] for one in mine}) for key in ("listener", "item"))
    total, count = np.zeros((2, len(listeners), len(items)))
    for one in mine:
        place = listeners.index(one["listener"]), items.index(one["item"])
        total[place] += one["answer"]
        count[place] += 1
    weight = (count > 0).astype(float)
    score = np.divide(total, count, out=np.zeros_like(total), where=count > 0)
    found = {"mean": round(float(score.sum() / weight.sum()), 4), "ci95": None, "n": len(mine)}
    found |= {"listeners": len(listeners), "items": len(items)}
    sides = [np.arange(size) for size in score.shape]
    free = [axis for axis, side in enumerate(sides) if len(side) > 1]
    if not free:
        return found

    def mean(*drawn: np.ndarray, axis: int) -> np.ndarray:
        full = dict(zip(free, drawn, strict=True))
        rows, columns = (np.asarray(full.get(place, sides[place]), int) for place in (0, 1))
        where = rows[..., :, None], columns[..., None, :]
        return score[where].sum((-2, -1)) / np.maximum(weight[where].sum((-2, -1)), 1e-9)

    interval = bootstrap(
        [sides[axis] for axis in free], mean, vectorized=True, n_resamples=RESAMPLES, batch=500, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found | {"ci95": [round(float(interval.low), 4), round(float(interval.high), 4)]}


def _preferences(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from scipy.stats import binomtest

    table = []
    for a, b in sorted({tuple(sorted(one["systems"])) for one in answers}):
        said = Counter(_chosen(one) for one in answers if set(one["systems"]) == {a, b})
        entry = {"a": a, "b": b, "prefer_a": said[a], "prefer_b": said[b], "none": said[None]}
        entry |= {"share_a": None, "ci95": None, "p": None}
        if decided := said[a] + said[b]:
            test = binomtest(said[a], decided)
            interval = test.proportion_ci()
            entry |= {"share_a": round(said[a] / decided, 4), "p": round(float(test.pvalue), 6)}
            entry["ci95"] = [round(float(interval.low), 4), round(float(interval.high), 4)]
        table.append(entry)
    return table
