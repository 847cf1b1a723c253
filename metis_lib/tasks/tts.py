"""Zero-shot text-to-speech: phones of prompt text and text in front, SSL tokens of a prompt, the rest to be said."""

from metis_lib.config import DecodeSettings
from metis_lib.tasks.base import Task

TTS = Task(
    name="tts",
    takes_prompt=True,
    takes_text=True,
    takes_features=False,
    stage1={"use_phones": True},
    decode=DecodeSettings(steps=25, cfg=2.5),
    condition_dropout=0.1,
)


def target_frames(prompt_frames: int, prompt_units: float, units: float, *, shortest: int = 25) -> int:
    """Length of the target at the prompt's speaking rate: frames scaled by units (phones, or their durations)."""
    return max(shortest, round(prompt_frames * units / max(prompt_units, 1e-6)))


def byte_rule(prompt_frames: int, prompt_text: str, text: str) -> int:
    """Length of the target by the released code: frames scaled by the number of UTF-8 bytes, rounded down."""
    return prompt_frames * len(text.encode()) // max(len(prompt_text.encode()), 1)
