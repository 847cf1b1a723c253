"""Nano from packages to scores, in order; it goes on where it was stopped.

``metis train recipe nano`` makes the corpus, trains the pieces of the queue that are not done, beginning with the
shipped weights, puts the parts in their place (``metis_lib/weights/nano``), makes the test sets and evaluates.  With
``--from-scratch`` it trains every piece of the queue anew, in a folder of its own.  ``make results`` does the last two
for the weights that are in place.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metis_lib.assets import metis_home
from metis_lib.checkpoints import SHIPPED
from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report, runner
from metis_lib.evaluation.systems import OMNI, TOLD
from metis_lib.training.loop import seconds_of
from metis_lib.training.recipes import BUILD, FOLDERS
from recipes.nano import bars, corpus, queue, testsets

QUEUE = Path(__file__).with_name("queue.json")
LIMIT = 40e6
"""Bytes that all weights in the repository may have."""
SETS = {"human": ("codec", "se", "tts", "vc", "tse", "l2s", "omni"),
        "unseen": ("codec", "se", "tts", "vc", "tse", "l2s", "omni"), "seen": ("tts",)}  # fmt: skip
PAGE = {"unseen": "Voices that it never heard", "seen": "Voices that it was trained on, other sentences"}
Say = Callable[[str], None]


def ship(source: Path, target: Path = SHIPPED / "nano") -> dict[str, int]:
    """Copy the parts of a system to where the library finds them, each file whole or not at all.

    Returns:
        Bytes of each part.

    Raises:
        MetisError: they would be larger than the repository allows.
    """
    parts = [FOLDERS.get(name, name) for name in BUILD]
    files = {
        part: [*(source / part).glob("*.safetensors"), source / part / "config.json"]
        for part in parts if (source / part / "config.json").is_file()
    }  # fmt: skip
    if (source / "decode.json").is_file():
        files["."] = [source / "decode.json"]
    sizes = {part: sum(file.stat().st_size for file in found) for part, found in files.items()}
    if sum(sizes.values()) > LIMIT:
        raise MetisError(f"{sum(sizes.values()) / 1e6:.1f} MB of weights; at most {LIMIT / 1e6:.0f} MB are shipped")
    for part, found in files.items() if target != source else ():
        folder = target / part
        folder.mkdir(parents=True, exist_ok=True)
        for file in found:
            shutil.copyfile(file, folder / f"{file.name}.part")
            os.replace(folder / f"{file.name}.part", folder / file.name)
    return sizes


def results(
    out: Path = record.ROOT / "results" / "nano", *, model: str = "nano", limit: int | None = None,
    sets: dict[str, tuple[str, ...]] | None = None, runs: Path = record.ROOT / "results" / "evaluation",
    say: Say = print, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate every task on every test set: ``summary.json`` and ``run.json`` in ``out``, all utterances of the human
    set in ``out/human``; a page of each set beside the audio in ``runs``.

    Returns:
        ``{test set: {task: {system: {metric: score}}}}``.
    """
    summaries, about = {}, {}
    for name in sets or SETS:  # all before the first is judged: they need the corpus, which may be missing
        if name != "human" and not (metis_home() / "testsets" / name / "manifest.jsonl").is_file():
            say(f"making the test set {name}")
            testsets.build_synthetic(name, more=True)
    for name, tasks in (sets or SETS).items():
        folder = runs / f"{Path(model).name}-{name}"
        say(f"{name}: {', '.join(tasks)}")
        found = runner.evaluate(tasks, None, name, folder, checkpoint=model, limit=limit, **options)
        summaries[name] = found | ({"omni": omni_of(folder)} if "omni" in tasks else {})
        about[name] = json.loads((folder / "run.json").read_text())
        record.write_json(out / "summary.json", summaries)
        record.write_json(out / "run.json", about)
        if name == "human":
            keep(folder, out / name)
    if sets is None and (out.parent / "README.md").is_file():
        write_page(out)
    return summaries


def write_page(out: Path = record.ROOT / "results" / "nano") -> Path:
    """What was asked of nano (:mod:`recipes.nano.bars`) and the tables of the synthetic test sets.

    They come from ``summary.json`` and ``run.json`` in ``out`` and go between the markers of the ``README.md`` above;
    the table of the human set stands in the repository's README (``metis report results/nano/human --readme``).
    """
    summaries, about = (json.loads((out / name).read_text()) for name in ("summary.json", "run.json"))
    parts = [
        f"### {title} (`{name}`)\n\n"
        + report.readme_results({k: v for k, v in summaries[name].items() if k != "omni"}, about[name])
        for name, title in PAGE.items() if name in summaries
    ]  # fmt: skip
    parts.insert(0, f"### What was asked\n\n{bars.table(summaries)}")
    return report.fill_readme(out.parent / "README.md", "\n\n".join(parts))


def keep(run: Path, out: Path) -> None:
    """A run without its audio: summary, provenance, and one line an utterance, as the notebooks read them."""
    shutil.rmtree(out, ignore_errors=True)
    for file in run.glob("*/*/utterances.jsonl"):
        place = out / file.parent.parent.name / f"{file.parent.name}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    for name in ("run.json", "summary.json"):
        shutil.copyfile(run / name, out / name)


def omni_of(folder: Path) -> dict[str, Any]:
    """Omni's scores in a run, ``{task: {metric: score}}``; extraction that is told the words is ``tse-text``."""
    tried = record.read_json(folder / "omni" / "summary.json") or {}
    return {
        task + ending.removeprefix(OMNI): rows[name]
        for task, rows in tried.items()
        for name in rows
        for ending in (OMNI, TOLD)
        if name.endswith(ending)
    }


def from_scratch(path: Path = QUEUE) -> Path:
    """A copy of a queue of which nothing is done, in the folder where its system grows (``runs/NAME-scratch``).

    No weights of that name are shipped, so its parts begin at random; the decoding defaults of the shipped system are
    copied.  A copy that is there goes on.
    """
    found = queue.read(path)
    shipped = SHIPPED / found["system"] / "decode.json"
    found["system"] += "-scratch"
    copy = queue.home(found) / "queue.json"
    if not copy.is_file():
        reached = ("state", "steps", "score", "cpu_hours", "frames", "device")
        found["pieces"] = [{k: v for k, v in entry.items() if k not in reached} for entry in found["pieces"]]
        copy.parent.mkdir(parents=True, exist_ok=True)
        if shipped.is_file():
            shutil.copyfile(shipped, copy.with_name("decode.json"))
        queue.write(copy, found)
    return copy


def build(
    path: Path = QUEUE, *, budget: str | None = None, hours: float = 20.0, workers: int = 2,
    target: Path = SHIPPED / "nano", judge: bool = True, scratch: bool = False, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """Corpus, the trainings that the queue has open, weights, scores; what is done is not done again.

    Args:
        budget: time for the trainings; where it ends before they do, the rest is left for the next call.
        hours: synthetic speech of the corpus.
        target: where the weights go.
        judge: evaluate them too.
        scratch: all trainings from random weights (:func:`from_scratch`): the parts stay in the folder where they
            grow, and ``results/`` and ``evaluation/`` lie beside them; ``target`` is not written to.

    Returns:
        ``left`` (pieces not trained yet), ``sizes`` of the parts and ``summary`` once nothing is left.
    """
    began = time.monotonic()
    speech, judged = metis_home() / "corpora" / queue.read(path)["system"], dict[str, Any]()
    if not (speech / "ALL_READY").is_file():
        corpus.prepare_nano(hours_synthetic=hours, workers=workers, say=say)
    else:
        say(f"the corpus in {speech} is taken as it is; `metis prepare nano --hours {hours:g}` would add to it")
    if scratch:
        path = from_scratch(path)
        target = path.parent
        judged = {"out": target / "results", "model": str(target), "runs": target / "evaluation"}
    while (number := queue.next_piece(queue.read(path))) is not None:
        left = None if budget is None else seconds_of(budget) - (time.monotonic() - began)
        if left is not None and left < 1:
            return {"left": sum(entry.get("state") != "done" for entry in queue.read(path)["pieces"])}
        budgeted = None if left is None else f"{left:.0f}s"
        done = queue.run_next(path, budget=budgeted, manifest=speech / "manifest.jsonl", say=say)
        say(f"piece {number}: {done['model']}, {done['steps']} steps, {done['score']}")
        if not done["finished"]:  # the budget or a signal ended it
            return {"left": sum(entry.get("state") != "done" for entry in queue.read(path)["pieces"])}
    sizes = ship(queue.home(queue.read(path)), target)
    return {"left": 0, "sizes": sizes} | ({"summary": results(say=say, **judged)} if judge else {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.build", description=__doc__)
    calls: dict[str, Callable[[], Any]] = {
        "results": results,
        "page": write_page,
        "ship": lambda: print(ship(queue.home(queue.read(QUEUE)))),
    }
    parser.add_argument("what", choices=tuple(calls))
    try:
        calls[parser.parse_args().what]()
    except MetisError as error:
        sys.exit(f"error: {error}")
