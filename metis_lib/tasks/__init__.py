"""Tasks by name: the paper's, and those of files that ``METIS_TASKS`` names (paths, divided as in ``PATH``)."""

import importlib.util
import os
import sys

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


def like(name: str) -> str:
    """The paper's task that a task is, or is like (a name that is no task, such as ``codec``, stays)."""
    return TASKS[name].like or name if name in TASKS else name


def own() -> dict[str, Task]:
    """The tasks that files have added."""
    return {name: new for name, new in TASKS.items() if new.like}


def add(new: Task) -> None:
    """Make a task of one's own known (docs/new_task.md).

    Raises:
        MetisError: a name that is taken or no identifier, no task that it is like, no simulator, or too late.
    """
    if new.name in TASKS or not new.name.isidentifier() or new.name == "base":
        raise MetisError(f"a new task needs a name of its own that is an identifier, not {new.name!r}")
    if new.like not in ("se", "vc", "tse") or new.simulate is None:
        raise MetisError(f"the task {new.name} must be like se, vc or tse and simulate its examples")
    if "metis_lib.pipeline" in sys.modules or "metis_lib.training.recipes" in sys.modules:
        raise MetisError(f"add the task {new.name} before the pipeline is imported, or name its file in METIS_TASKS")
    TASKS[new.name] = new


def load(path: str) -> None:
    """Import a file that adds tasks, as a module that worker processes find too; MetisError where there is none."""
    name = f"metis_task_{os.path.basename(path).removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path) if os.path.isfile(path) else None
    if spec is None or spec.loader is None:
        raise MetisError(f"METIS_TASKS names {path}, which is no Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


for _path in filter(None, os.environ.get("METIS_TASKS", "").split(os.pathsep)):
    load(_path)
