"""Tasks by name."""

from metis_lib.errors import MetisError
from metis_lib.tasks.base import Task
from metis_lib.tasks.l2s import L2S
from metis_lib.tasks.omni import OMNI
from metis_lib.tasks.se import SE
from metis_lib.tasks.tse import TSE
from metis_lib.tasks.tts import TTS
from metis_lib.tasks.vc import VC

TASKS: dict[str, Task] = {task.name: task for task in (TTS, VC, TSE, SE, L2S, OMNI)}


def task(name: str) -> Task:
    """A task by name."""
    if name not in TASKS:
        raise MetisError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]
