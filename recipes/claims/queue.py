"""The order of the measurements, and the run through it: every claim has its first seed early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.training.loop import seconds_of
from recipes.claims import decode
from recipes.claims.arms import Arm, Lab, result_of, train
from recipes.claims.claims import all_claims, seeded

FRAMES_A_SECOND = 13_800
"""Stage 1 of nano on two idle CPU cores (4.7 M, batches of 4,000 frames, bf16): for plans."""
OVERHEAD = 8.0
"""Seconds of an arm that are not training: reading, measuring."""

A_CLIP = 2.5
"""Seconds to make and to judge one."""


@dataclass(frozen=True)
class Work:
    """An arm or a study, and the notebooks and claims that use it."""

    id: str
    arm: Arm | None
    tokens: int
    seconds: float
    notebooks: tuple[str, ...]
    claims: tuple[str, ...]


def plan(lab: Lab) -> list[Work]:
    """Everything in order: arms of the first seed, what the system itself decodes, other seeds, what arms decode."""
    claims, studies = all_claims(lab), decode.studies(lab)
    uses: dict[str, list[tuple[str, str]]] = {}
    for claim in claims:
        names = [*claim.study[:1]]
        decoded = studies[names[0]].arms if names else ()
        for seed in lab.seeds:
            names += [arm.id for arm in seeded((*claim.arms, *claim.also, *decoded), seed)]
        for name in names:
            uses.setdefault(name, []).append((claim.notebook, claim.id))
    order: list[Work] = []

    def add(id: str, arm: Arm | None) -> None:
        if any(work.id == id for work in order):
            return
        nets = 2 if arm and arm.task == "direct" else 1
        tokens = arm.budget(lab) if arm else 0
        seconds = tokens / FRAMES_A_SECOND + OVERHEAD if arm else decode.clips_of(lab, studies[id]) * A_CLIP + 60
        books, ids = (tuple(dict.fromkeys(use[k] for use in uses.get(id, ()))) for k in (0, 1))
        order.append(Work(id, arm, nets * tokens, seconds, books, ids))

    for number, seed in enumerate(lab.seeds):
        for claim in claims:
            decoded = studies[claim.study[0]].arms if claim.study else ()
            for arm in seeded((*claim.arms, *claim.also, *decoded), seed):
                add(arm.id, arm)
        for name, study in studies.items():
            if number == 0 and not study.arms or number == len(lab.seeds) - 1 and study.arms:
                add(name, None)
    return order


def chosen(lab: Lab, only: str = "") -> list[Work]:
    """The measurements whose id begins with ``only``, or that a notebook (its number) or a claim (the beginning of its
    id) needs; MetisError for none."""
    found = [
        work for work in plan(lab)
        if only in ("", *work.notebooks) or any(name.startswith(only) for name in (work.id, *work.claims))
    ]  # fmt: skip
    if not found:
        raise MetisError(f"no measurement or claim begins with {only!r}, and no notebook has that number")
    return found


def done(lab: Lab, work: Work) -> bool:
    """Whether it was measured with this system and these settings."""
    return (result_of(lab, work.arm) if work.arm else decode.result_of_study(lab, work.id)) is not None


def run(
    lab: Lab, *, budget: str | None = None, only: str = "", say: Callable[[str], None] = lambda line: None
) -> list[str]:  # fmt: skip
    """Measure what is not measured yet, one after the other.

    An arm that the budget or a signal cuts off keeps a state and goes on with the next run; a study keeps the clips
    that it has made.

    Returns:
        What is left.

    Raises:
        MetisError: (at the end) some could not be measured; the message names them and the first reason.
    """
    until = time.monotonic() + (seconds_of(budget) if budget else math.inf)
    failed: dict[str, str] = {}
    works = [work for work in chosen(lab, only) if not done(lab, work)]
    for number, work in enumerate(works, 1):
        left = until - time.monotonic()
        if left <= 1:
            break
        say(f"{number}/{len(works)} {work.id}")
        began = time.monotonic()
        try:
            if work.arm is None:
                decode.measure(lab, work.id, say)
            elif train(lab, work.arm, budget=f"{left:.0f}s" if budget else None, say=say) is None:
                break
            say(f"{work.id}: {time.monotonic() - began:.0f} s")
        except MetisError as error:  # of a task that the system lacks, say: the others go on
            failed[work.id] = str(error)
            say(f"{work.id}: {error}")
    if failed:
        name, why = next(iter(failed.items()))
        raise MetisError(f"could not measure {', '.join(failed)}; {name}: {why}")
    return [work.id for work in chosen(lab, only) if not done(lab, work)]


def sheet(lab: Lab, only: str = "", state: Callable[[Work], Any] | None = None) -> str:
    """The plan as lines of text: what, tokens, minutes on two idle CPU cores, the notebooks that use it."""
    works = chosen(lab, only)
    width = max(len(work.id) for work in works)
    lines = [f"{'':4} {'measurement':<{width}} {'tokens':>11} {'minutes':>7}  notebooks"]
    for work in works:
        mark = "" if state is None else "done" if state(work) else "todo"
        used = " ".join(work.notebooks)
        lines.append(f"{mark:4} {work.id:<{width}} {work.tokens:>11,} {work.seconds / 60:>7.1f}  {used}")
    arms = [work for work in works if work.arm]
    for label, some in (("arms", arms), ("studies", [work for work in works if not work.arm])):
        total = sum(work.seconds for work in some) / 3600
        lines.append(f"{len(some)} {label}: {sum(work.tokens for work in some):,} tokens, {total:.1f} h")
    return "\n".join(lines)
