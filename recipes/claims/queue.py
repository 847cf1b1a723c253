"""The order of the measurements, and the run through it: every claim has its first seed early."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metis_lib.errors import MetisError
from metis_lib.training.loop import seconds_of, stop_asked
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
    lab: Lab, *, budget: str | None = None, only: str = "", workers: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:  # fmt: skip
    """Measure what is not measured yet, one after the other, or ``workers`` arms side by side.

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
    if workers > 1:
        if not _side_by_side(lab, [work.arm for work in works if work.arm], workers, until, failed, say):
            works = []  # it was asked to stop
        works = [work for work in works if work.id not in failed and not done(lab, work)]
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


KILLED = "its process was killed; take fewer workers if memory was short"


def _train(lab: Lab, arm: Arm, budget: str | None, threads: int, tell: Any) -> None:
    """Train an arm in a process of its own and tell what it took, or what is wrong.

    Ctrl-C reaches all processes, and is the first one's business; SIGTERM ends a training with a state.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    began = time.monotonic()
    try:
        tell.send(time.monotonic() - began if train(lab, arm, budget=budget) else 0.0)
    except MetisError as error:
        tell.send(str(error))


def _side_by_side(
    lab: Lab, arms: list[Arm], workers: int, until: float, failed: dict[str, str], say: Callable[[str], None]
) -> bool:
    """Train arms in ``workers`` processes, those that others begin from first; whether nobody asked to stop.

    Every process has its part of the cores.  On a GPU they share it: nets of this size do not fill one.
    """
    context, threads = multiprocessing.get_context("spawn"), max(1, (os.cpu_count() or 1) // workers)
    waiting = sorted(arms, key=lambda arm: arm.task != "stage1")
    running: dict[Any, tuple[Arm, Any]] = {}
    with stop_asked() as asked:
        while running or (waiting and not asked() and until - time.monotonic() > 1):
            first = waiting and (waiting[0].task == "stage1" or all(a.task != "stage1" for a, _ in running.values()))
            if first and len(running) < workers and not asked() and (left := until - time.monotonic()) > 1:
                arm, (heard, tell) = waiting.pop(0), context.Pipe(duplex=False)
                budget = None if left == math.inf else f"{left:.0f}s"
                process = context.Process(target=_train, args=(lab, arm, budget, threads, tell))
                process.start()
                tell.close()
                running[process] = arm, heard
                continue
            time.sleep(0.2)
            for process in [p for p in running if not p.is_alive()]:
                arm, heard = running.pop(process)
                try:
                    found = heard.recv()
                except EOFError:
                    killed = (process.exitcode or 0) < 0
                    found = KILLED if killed else f"its process ended with code {process.exitcode}; see above"
                    found = "" if killed and asked() else found
                if isinstance(found, str) and found:
                    failed[arm.id] = found
                if found:
                    say(f"{arm.id}: {found if isinstance(found, str) else f'{found:.0f} s'}")
            if asked():  # again and again: what is not training yet does not hear it
                for process in running:
                    process.terminate()
        return not asked()


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
