"""One model for text-to-speech, voice conversion, extraction and enhancement (Metis appendix E), no task token."""

from metis_lib.tasks.base import Task

OMNI = Task(
    name="omni",
    takes_prompt=True,
    takes_text=True,
    takes_features=True,
    stage1={"adapter": "gated", "use_phones": True},
    condition_dropout=0.1,
    mixture={"tts": 0.5, "vc": 0.1, "tse": 0.2, "se": 0.2},
)
