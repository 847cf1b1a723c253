"""Voice conversion: SSL features of [prompt, source] in, SSL tokens of the source's words in the prompt's voice out."""

from metis_lib.config import DecodeSettings
from metis_lib.tasks.base import Task

VC = Task(
    name="vc",
    takes_prompt=True,
    takes_text=False,
    takes_features=True,
    stage1={"adapter": "gated"},
    decode=DecodeSettings(steps=20, cfg=1.0),
    condition_dropout=0.1,
)
