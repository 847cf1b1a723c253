"""Target speaker extraction: SSL features of [prompt, mixture] in, SSL tokens of the prompt's speaker out."""

from metis_lib.config import DecodeSettings
from metis_lib.tasks.base import Task

TSE = Task(
    name="tse",
    takes_prompt=True,
    takes_text=False,
    takes_features=True,
    stage1={"adapter": "gated"},
    decode=DecodeSettings(steps=10, cfg=0.0),
    condition_dropout=0.1,
)
