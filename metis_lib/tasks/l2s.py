"""Lip-to-speech: features of a silent video (zeros over the prompt) in, SSL tokens in the prompt's voice out."""

from metis_lib.config import DecodeSettings
from metis_lib.tasks.base import Task

L2S = Task(
    name="l2s",
    takes_prompt=True,
    takes_text=False,
    takes_features=True,
    takes_video=True,
    stage1={"adapter": "plain"},
    decode=DecodeSettings(steps=25, cfg=0.0),
)
