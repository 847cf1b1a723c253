"""Speech enhancement: SSL features of the noisy speech in, SSL tokens of the clean speech out; no prompt."""

from metis_lib.config import DecodeSettings
from metis_lib.models.masked import MaskingSettings
from metis_lib.tasks.base import Task

SE = Task(
    name="se",
    takes_prompt=False,
    takes_text=False,
    takes_features=True,
    stage1={"adapter": "gated"},
    decode=DecodeSettings(steps=10, cfg=0.0),
    masking=MaskingSettings(prompt_probability=0.0),
)
