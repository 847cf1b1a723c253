"""Tasks by name: the paper's, and those of files that ``METIS_TASKS`` names (paths, divided as in ``PATH``)."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metis_lib.config import DecodeSettings, SystemConfig
from metis_lib.errors import MetisError
from metis_lib.models.masked import MaskingSettings


@dataclass(frozen=True)
class Task:
    """One thing that an adapted stage 1 does (Metis section 3.5): what conditions it, how it is decoded and masked.

    ``stage1`` are the fields of the stage-1 configuration that the task changes (adapter, phones); ``mixture`` the
    tasks that its training examples come from and their shares; ``condition_dropout`` how often an example loses what
    guidance varies: text and prompt, or the prompt.

    A task of your own (docs/new_task.md) has also a ``title``, the task that it is ``like`` (``se``, ``vc`` or ``tse``:
    asked for, decoded and judged in the same way) and ``simulate``, which makes a training example of an utterance as
    :mod:`metis_lib.data.examples` does.
    """

    name: str
    takes_prompt: bool
    takes_text: bool
    takes_features: bool
    stage1: dict[str, Any] = field(default_factory=dict)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    condition_dropout: float = 0.0
    takes_video: bool = False
    mixture: dict[str, float] = field(default_factory=dict)
    title: str = ""
    like: str = ""
    simulate: Callable[..., Any] | None = None

    def changes(self, system: SystemConfig, *, phone_vocab: int, **more: Any) -> dict[str, Any]:
        """The fields of ``system.stage1`` that the task changes: adapter, its input's width, phones, and ``more``."""
        width = {} if self.stage1.get("adapter", "none") == "none" else {"cond_dim": system.ssl.hidden_size}
        if self.takes_video:
            width = {"cond_dim": system.lips.hidden_size}
        return {**self.stage1, **width, **({"phone_vocab": phone_vocab} if self.takes_text else {}), **more}


_GATED = {"adapter": "gated"}
_PAPER = (
    # phones of prompt text and text in front, SSL tokens of a prompt; the rest is to be said
    Task("tts", True, True, False, {"use_phones": True}, DecodeSettings(steps=25, cfg=2.5), condition_dropout=0.1),
    # SSL features of prompt and source; the source's words in the prompt's voice
    Task("vc", True, False, True, _GATED, DecodeSettings(steps=20, cfg=1.0), condition_dropout=0.1),
    # SSL features of prompt and mixture; the prompt's speaker
    Task("tse", True, False, True, _GATED, DecodeSettings(steps=10, cfg=0.0), condition_dropout=0.1),
    # SSL features of noisy speech, no prompt; the clean speech
    Task("se", False, False, True, _GATED, DecodeSettings(steps=10, cfg=0.0), MaskingSettings(prompt_probability=0.0)),
    # features of a silent video (zeros over the prompt); speech in the prompt's voice
    Task("l2s", True, False, True, {"adapter": "plain"}, DecodeSettings(steps=25, cfg=0.0), takes_video=True),
    # one model for four of them (Metis appendix E), no task token
    Task(
        "omni", True, True, True, {**_GATED, "use_phones": True}, condition_dropout=0.1,
        mixture={"tts": 0.5, "vc": 0.1, "tse": 0.2, "se": 0.2},
    ),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _PAPER}


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
    readers = {"metis_lib.pipeline": "SOURCES", "metis_lib.training.recipes": "FOLDERS"}  # at the end of their import
    if any(hasattr(sys.modules.get(module), made) for module, made in readers.items()):
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
