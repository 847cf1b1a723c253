"""A task: what conditions stage 1, how it is decoded, how its training examples are masked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from metis_lib.config import DecodeSettings, SystemConfig
from metis_lib.models.masked import MaskingSettings


@dataclass(frozen=True)
class Task:
    """One thing that an adapted stage 1 does (Metis section 3.5).

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
