"""The claims: what is said, by whom, what is compared, and what counts as *holds* and *fails*.

Verdict rules and margins were written down before anything was measured; what was changed later, and after what had
been seen, stands in docs/claims.md.  An effect is oriented so that a positive one speaks for
the claim: ``a - b`` of the two sides, in the unit of the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from metis_lib.config import FRAME_RATE
from metis_lib.tasks import TASKS
from recipes.claims.arms import Arm, Lab

TITLES = {
    "20": "pretraining", "21": "pretrained_alone", "22": "prompts_in_pretraining", "23": "lora_rank",
    "24": "full_or_lora", "25": "more_or_cleaner", "26": "guidance_in_vc", "27": "omni", "28": "text_guided_tse",
    "29": "two_stages", "30": "steps", "31": "mask_schedule", "32": "ssl_layers",
}  # fmt: skip
NAT = 0.02
"""Nats a token below which a difference of cross-entropies does not matter."""
RIVAL = "*"
"""In the place of ``a``: the other variant with the lowest mean, the hardest one for the claim."""


@dataclass(frozen=True)
class Claim:
    """A row of the table.

    Attributes:
        arms: two trainings ``a, b``; effect ``a - b`` of their held-out cross-entropy in the task, by ``condition``.
        study: of what is decoded: study, metric, variants ``a, b``; with ``b`` empty the metric of ``a`` itself.
        margin: the smallest effect that matters.
        no_worse: the claim is that ``b`` loses no more than the margin against ``a``.
        also: trainings that the notebook shows beside the two.
    """

    id: str
    claim: str
    source: str
    task: str
    notebook: str
    unit: str = "nats a token"
    margin: float = 0.0
    no_worse: bool = False
    arms: tuple[Arm, ...] = ()
    also: tuple[Arm, ...] = ()
    condition: str = "told"
    study: tuple[str, str, str, str] | tuple[()] = ()

    @property
    def rule(self) -> str:
        """The rule of its verdict in words."""
        if self.no_worse:
            return f"holds: interval above {-self.margin:g}; fails: below it; else undecided"
        less = f"below {self.margin:g}" if self.margin else "below 0"
        more = f", not all below {self.margin:g}" if self.margin else ""
        return f"holds: interval above 0{more}; fails: interval {less}; else undecided"


def verdict(low: float, high: float, *, margin: float = 0.0, no_worse: bool = False) -> str:
    """*holds*, *fails* or *undecided* for a 95 % interval of an effect oriented towards the claim.

    A claim of a difference holds where the interval lies above zero, and fails where all of it lies below ``margin``,
    the smallest effect that matters (so a practically equal one fails too).  A claim of ``no_worse`` holds where the
    interval lies above ``-margin`` and fails where it lies below.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "undecided"
    if no_worse:
        return "holds" if low > -margin else "fails" if high < -margin else "undecided"
    if high < margin or high < 0:
        return "fails"
    return "holds" if low > 0 else "undecided"


def all_claims(lab: Lab) -> list[Claim]:
    """Every claim of the table, in its order."""
    few, many = lab.hours
    more = {"hours": many}
    tuned = {task: Arm(task, **more) for task in ("tts", "vc", "tse", "se")}  # type: ignore[arg-type]
    longer = lab.longer > lab.tokens  # the shorter arms are shown beside
    at_length = {task: replace(arm, longer=longer) for task, arm in tuned.items()}
    names = {"tts": "text-to-speech", "vc": "voice conversion", "tse": "target speaker extraction",
             "se": "speech enhancement", "l2s": "lip-to-speech"}  # fmt: skip
    seen = lab.tokens / FRAME_RATE / 3600  # at most, for frames are padded
    found = []
    for task, hours in ((task, hours) for task in names for hours in (few, many)):
        sides = (Arm(task, "none", hours=hours), Arm(task, hours=hours))
        told = "" if longer or seen >= hours else f", at most {seen:.2g} h of it seen,"
        found.append(
            Claim(f"pretraining-{task}-{hours:g}",
                  f"With {hours:g} h of labelled data{told} pre-training helps {names[task]}.",
                  "Metis section 1; table 1 (TTS alone, 4.91 against 2.28 % WER)", task, "20", margin=NAT,
                  arms=tuple(replace(arm, longer=longer) for arm in sides), also=sides * longer)
        )  # fmt: skip
    alone = "Metis section 3.4"
    found += [
        Claim("pretrained-alone-voice", "The pre-trained model alone goes on in the prompt's voice.", alone, "tts",
              "21", "cosine", 0.02, study=("alone", "sim_gap", "continued", "")),
        Claim("pretrained-alone-words", "The pre-trained model alone says nothing intelligible.", alone, "tts",
              "21", "confidence of the recogniser", 0.02, study=("alone", "nearer_reversed", "continued", "")),
    ]  # fmt: skip
    for task in ("tts", "vc", "tse"):
        sides = (Arm(task, "pretrained-noprompt", hours=many), Arm(task, "pretrained", hours=many))
        found.append(
            Claim(f"prompts-in-pretraining-{task}", f"Prompts in pre-training help {names[task]}.",
                  "Metis section 4.1 (p = 0.8), never compared", task, "22", margin=NAT,
                  arms=tuple(replace(arm, longer=longer) for arm in sides), also=sides * longer)
        )  # fmt: skip
    found += [
        Claim(f"lora-rank-{task}", f"In {names[task]} LoRA of rank 32 is better than of rank 4.",
              f"Metis table {table}", task, "23", margin=NAT,
              arms=tuple(replace(at_length[task], rank=rank) for rank in (4, 32)),
              also=(at_length[task], *[replace(tuned[task], rank=rank) for rank in (4, 32, 0)] * longer))
        for task, table in (("tse", 3), ("se", 4))
    ]  # fmt: skip
    for task, table, rank in (("tts", 1, 32), ("tse", 3, 32), ("vc", 2, 16), ("se", 4, 32)):
        lora, full = replace(at_length[task], rank=rank), at_length[task]
        if task in ("tts", "tse"):
            text, sides = f"In {names[task]} full fine-tuning is better than LoRA of rank {rank}.", (lora, full)
        elif task == "vc":
            text, sides = f"In {names[task]} LoRA of rank {rank} is better than full fine-tuning.", (full, lora)
        else:
            text, sides = f"In {names[task]} LoRA of rank {rank} is as good as full fine-tuning.", (full, lora)
        equal = task == "se"
        found.append(Claim(f"full-or-lora-{task}", text, f"Metis table {table}", task, "24",
                           margin=0.05 if equal else NAT, no_worse=equal, arms=sides,
                           also=tuple(replace(arm, longer=False) for arm in sides if arm.longer)))  # fmt: skip
    # half of what the other side reads, at most: about the shares of the paper
    half, briefly = (
        float(f"{min(many, n / FRAME_RATE / 3600) / 2:.2g}") for n in (lab.longer or lab.tokens, lab.tokens)
    )
    found.append(
        Claim("more-or-cleaner-tts", "For text-to-speech half as much but cleaner data is better than more data.",
              "Metis table 1 (0.58K h LibriTTS 3.04, 1K h Emilia 3.86 % WER)", "tts", "25", margin=NAT,
              arms=(at_length["tts"], replace(at_length["tts"], data="clean", hours=half)), condition="told_clean",
              also=(tuned["tts"], replace(tuned["tts"], data="clean", hours=briefly)) * longer)
    )  # fmt: skip
    vc = ("Metis table 2 (CFG 0 and 2)", "vc", "26")
    found += [
        Claim("guidance-vc-words", "In voice conversion guidance costs words.", *vc, "word error rate", 0.02,
              study=("guidance-vc", "wer", "2", "0")),
        Claim("guidance-vc-voice", "In voice conversion guidance brings the voice nearer to the prompt's.", *vc,
              "cosine", 0.01, study=("guidance-vc", "sim_prompt", "2", "0")),
    ]  # fmt: skip
    short = Arm("omni", **more)  # type: ignore[arg-type]
    omni = replace(short, longer=longer)
    for task in TASKS["omni"].mixture:
        worse, alone_too = task == "tts", at_length[task]
        how = "is worse than" if worse else "is as good as"
        found.append(Claim(f"omni-{task}", f"Omni {how} a model for {names[task]} alone.", "Metis table 11", task,
                           "27", margin=NAT if worse else 0.05, no_worse=not worse,
                           arms=(omni, alone_too) if worse else (alone_too, omni),
                           also=(short, tuned[task]) * longer))  # fmt: skip
    found.append(
        Claim("omni-tse-words", "Omni extracts as many words right as a model for extraction alone.",
              "Metis table 6 (5.90 against 6.31 % WER)", "omni", "27", "word error rate", 0.05, no_worse=True,
              study=("omni-arms", "wer", "tse", "omni"))
    )  # fmt: skip
    found.append(
        Claim("text-guided-tse", "The words help Omni to extract a speaker.",
              "Metis table 6 (5.90 against 2.70 % WER)", "tse", "28", "word error rate", 0.02,
              study=("text-tse", "wer", "untold", "told"))
    )  # fmt: skip
    stages = "Metis section 3.2 (two stages; never compared)"
    found += [
        Claim("two-stages-words", "Two stages keep more words than acoustic tokens predicted at once.", stages,
              "stage2", "29", "word error rate", 0.02, study=("two-stages", "wer", "direct", "two stages")),
        Claim("two-stages-sound", "Two stages sound nearer to the clean speech than acoustic tokens at once.", stages,
              "stage2", "29", "PESQ", 0.05, study=("two-stages", "pesq_wb", "two stages", "direct")),
    ]  # fmt: skip
    for task, released in (("tts", "25"), ("se", "10"), ("stage2", "25")):
        study, code = f"steps-{task}", "released code"
        code = "released code (40 steps of layer 1)" if task == "stage2" else code
        found += [
            Claim(f"{study}-one", f"One step is worse than {released} ({task}).", code, task, "30", "word error rate",
                  0.02, study=(study, "wer", "1", released)),
            Claim(f"{study}-fifty", f"{released} steps are as good as 50 ({task}).", code, task, "30",
                  "word error rate", 0.05, no_worse=True, study=(study, "wer", "50", released)),
        ]  # fmt: skip
    found += [
        Claim(f"schedule-{task}", f"No schedule is better than the published cosine ({task}).",
              "MaskGIT section 4.4; Metis section 3.1, never compared", task, "31", "word error rate", 0.05,
              no_worse=True, study=(f"schedule-{task}", "wer", RIVAL, "cosine"))
        for task in ("tts", "se")
    ]  # fmt: skip
    found.append(
        Claim("mask-floor-tts", "Training needs no floor under the share of masked tokens.",
              "Metis section 3.1 (none) against its released code (0.2)", "tts", "31", margin=NAT, no_worse=True,
              arms=(replace(at_length["tts"], floor=0.2), at_length["tts"]),
              also=(replace(tuned["tts"], floor=0.2), tuned["tts"]) * longer)
    )  # fmt: skip
    layer = "Metis appendix A (layer 17 of 24), never compared"
    found += [
        Claim("ssl-layer-phones", "No earlier layer tells phones better than the one that tokens are made of.", layer,
              "tts", "32", "phone error rate", 0.01, no_worse=True,
              study=("ssl-layers", "phone_error", RIVAL, "chosen")),
        Claim("ssl-layer-speakers", "Every earlier layer tells more of the speaker than the one of the tokens.", layer,
              "vc", "32", "share of speakers named", 0.01,
              study=("ssl-layers", "speaker_accuracy", RIVAL, "chosen")),
    ]  # fmt: skip
    return found


def seeded(arms: Sequence[Arm], seed: int) -> list[Arm]:
    """Arms of one seed, each after the pre-training that it needs, each once."""
    out: list[Arm] = []
    for arm in (replace(a, seed=seed) for a in arms):
        out += [one for one in (arm.needs, arm) if one is not None and one not in out]
    return out
