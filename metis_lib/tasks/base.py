"""A task: what conditions stage 1, how it is decoded, how its training examples are masked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metis_lib.config import DecodeSettings
from metis_lib.models.masked import MaskingSettings


@dataclass(frozen=True)
class Task:
    """One thing that an adapted stage 1 does (Metis section 3.5).

    ``stage1`` are the fields of the stage-1 configuration that the task changes (adapter, phones);
    ``condition_dropout`` is how often a training example loses its text, so that guidance works.
    """

    name: str
    takes_prompt: bool
    takes_text: bool
    takes_features: bool
    stage1: dict[str, Any] = field(default_factory=dict)
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    masking: MaskingSettings = field(default_factory=MaskingSettings)
    condition_dropout: float = 0.0
