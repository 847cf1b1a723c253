"""What is measured by decoding: variants of one thing said or enhanced, and judges that hear them.

A study has variants; every variant makes every item of the test set with every seed, and its rows keep what was heard
of each.  Judges are those of :mod:`metis_lib.evaluation`, with its cache.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from metis_lib import Metis, audio
from metis_lib.audio import Speech
from metis_lib.checkpoints import locate, system_hash
from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record
from metis_lib.evaluation.judges import SpeakerJudge, WhisperJudge
from metis_lib.evaluation.metrics import JUDGE_RATE, MetricFailure
from metis_lib.evaluation.scoring import Verdicts
from metis_lib.evaluation.systems import OMNI, TOLD, Item, _ask, load_items, testset_folder
from metis_lib.training import recipes
from recipes.claims import probes
from recipes.claims.arms import Arm, Lab, code, once, result_of

TOGETHER = 12
"""Items that are made together."""
STEPS = (1, 10, 25, 50)
RIVALS = ("cosine", "linear", "square")
"""Schedules: the published one, a straight line, and the square (of progress, from 1), which runs near the first."""
ONE = {"candidates": 1}
"""One draw: the system's choice among several would hide what the draws are."""

Make = Callable[[Sequence[Item], int], list[Speech]]


@dataclass(frozen=True)
class Study:
    """Items of a task made in variants (name: decoding options), judged by ``metrics``."""

    task: str
    variants: dict[str, dict[str, Any]]
    metrics: tuple[str, ...] = ("wer",)
    arms: tuple[Arm, ...] = field(default=())
    """Trainings whose weights it decodes, without seed: the seed of a row is theirs."""


def studies(lab: Lab) -> dict[str, Study]:
    """Every study by name."""
    many = lab.hours[1]
    longer = lab.longer > lab.tokens
    pair = (Arm("tse", hours=many, longer=longer), Arm("omni", hours=many, longer=longer))
    return {
        "alone": Study("tts", dict.fromkeys(("continued", "said", "reversed"), {}),
                       ("sim_prompt", "sim_other", "confidence")),
        "guidance-vc": Study("vc", {f"{c:g}": {"cfg": c, "steps": 20, **ONE} for c in (0.0, 1.0, 2.0, 4.0)},
                             ("wer", "sim_prompt")),
        # by itself the text brings guidance of 2.5 with it, so both sides are told to have none
        "text-tse": Study("tse", {"untold": {"cfg": 0.0, **ONE}, "told": {"cfg": 0.0, **ONE},
                                  "told, guided": {"cfg": 2.5, **ONE}}, ("wer", "sim_prompt")),
        "steps-tts": Study("tts", {str(n): {"steps": n, **ONE} for n in STEPS}),
        "steps-se": Study("se", {str(n): {"steps": n} for n in STEPS}, ("wer", "pesq_wb")),
        "steps-stage2": Study(
            "codec", {str(n): {"stage2_steps": (n, max(1, n // 2)), "stage2_candidates": 1} for n in STEPS},
            ("wer", "pesq_wb")),
        "schedule-tts": Study("tts", {name: {"schedule": name, "steps": 10, **ONE} for name in RIVALS}),
        "schedule-se": Study("se", {name: {"schedule": name, "steps": 10} for name in RIVALS}, ("wer", "pesq_wb")),
        "ssl-layers": Study("", {}, ("phone_error", "speaker_accuracy")),
        "two-stages": Study("se", {"two stages": {}, "direct": {}}, ("wer", "pesq_wb"),
                            (Arm("se", hours=many, longer=longer), Arm("direct", hours=many, longer=longer))),
        "omni-arms": Study("tse", {"tse": {}, "omni": {}}, ("wer", "sim_prompt"), pair),
    }  # fmt: skip


def clips_of(lab: Lab, study: Study) -> int:
    """How many clips a study makes and judges."""
    if not study.task:
        return 0
    return len(items_of(lab, study.task)) * len(lab.seeds) * len(study.variants)


def items_of(lab: Lab, task: str) -> list[Item]:
    """The items of a task that are decoded; several tasks share those that have a clean recording."""
    return load_items(lab.testset, task, lab.items or None)


def key_of(lab: Lab, name: str) -> str:
    """Hash of all that a study's result depends on (besides the judges, which bear protocols)."""
    study = studies(lab)[name]
    arms = [[(result_of(lab, replace(arm, seed=seed)) or {}).get("key") for seed in lab.seeds] for arm in study.arms]
    parts = ["ssl"]
    if study.task:
        parts += ["semantic_codec", "acoustic_codec", "stage2_layer1", "stage2_full"]
    if study.task and not study.arms:
        parts += ["stage1", *{"alone": [], "text-tse": ["tasks/omni"]}.get(name, [f"tasks/{study.task}"])]
    made_by = [once(system_hash, lab.system / part) for part in parts]
    defaults = lab.system / "decode.json"
    made_by += [record.sha256_file(defaults)] if defaults.is_file() else []
    made_by += [] if study.task else [once(record.sha256_file, lab.manifest)]  # probes draw from the corpus
    made_by.append(code("models", "tokenizers", "tasks.py", "pipeline.py", "generation.py"))
    about = [name, study.task, study.variants, study.metrics, lab.seeds, lab.items, made_by, arms]
    return record.sha256_of([*about, once(_contents, testset_folder(lab.testset)) if study.task else probes.SETTINGS])


def _contents(folder: Path) -> str:
    """Hash of a test set: its rows and its audio."""
    return record.sha256_files((p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"), folder)


def result_of_study(lab: Lab, name: str) -> dict[str, Any] | None:
    """A study's rows, or None where it was not measured, or of another system."""
    found = record.read_json(lab.home / "decode" / f"{name}.json")
    return found if found and found["key"] == key_of(lab, name) else None


def measure(lab: Lab, name: str, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Make and judge all variants of a study; clips that are there are kept.

    Raises:
        MetisError: the system lacks the task, or an arm that the study decodes is not trained.
    """
    study, key = studies(lab)[name], key_of(lab, name)
    folder, rows = lab.home / "decode" / f"{name}-{key[:8]}", []
    if name == "ssl-layers":
        rows = probes.layers(lab, say)
    else:
        voices = VoiceAndWords(study.metrics)
        for variant in study.variants:
            say(f"{name}: {variant}")
            rows += voices.rows(variant, _clips(lab, name, variant, folder / variant.replace(" ", "-")))
    if name == "alone":
        _nearer(rows)
    found = {"study": name, "task": study.task, "rows": rows, "key": key}
    record.write_json(lab.home / "decode" / f"{name}.json", found)
    return found


def _clips(lab: Lab, name: str, variant: str, folder: Path) -> list[tuple[Item, int, Path]]:
    """The audio of a variant: what is missing is made."""
    made = []
    for seed in lab.seeds:
        make: Make | None = None
        for item in items_of(lab, studies(lab)[name].task):
            made.append((item, seed, folder / f"{item.id}.seed{seed}.flac"))
        missing = [(item, path) for item, of, path in made if of == seed and not path.is_file()]
        for first in range(0, len(missing), TOGETHER):
            make = make or maker(lab, name, variant, seed)
            some = missing[first : first + TOGETHER]
            for speech, (_, path) in zip(make([item for item, _ in some], seed), some, strict=True):
                speech.save(path)
    return made


def maker(lab: Lab, name: str, variant: str, seed: int) -> Make:
    """What makes the clips of a variant."""
    study = studies(lab)[name]
    options = study.variants[variant]
    system = lab.system
    if study.arms:
        arm = replace(study.arms[list(study.variants).index(variant)], seed=seed)
        system = lab.home / "systems" / arm.id
        if result_of(lab, arm) is None or not system.is_dir():
            raise MetisError(f"{name} decodes {arm.id}, which is not trained yet")
        for part in system.iterdir():  # the system's may be new since then; what the arm has trained stays
            if part.is_file():
                part.unlink()
            elif not part.name.startswith("stage2" if arm.task == "direct" else "tasks"):
                shutil.rmtree(part)
        recipes.derive(lab.system, system)
    metis = Metis.from_pretrained(locate(system))
    ending = {"untold": OMNI, "omni": OMNI, "told": TOLD, "told, guided": TOLD}.get(variant, "")
    task = "omni" if ending else study.task
    if name != "alone" and variant != "direct" and task not in ("codec", *metis.tasks):
        raise MetisError(f"{name} needs the task {task}, which {system.name} lacks")

    def one(item: Item, seed: int) -> Speech:
        prompt = None if item.prompt is None else str(item.prompt)
        if variant == "continued":
            seconds = len(audio.load(str(item.clean), AUDIO_RATE)) / AUDIO_RATE
            return metis.go_on(str(prompt), seconds=round(min(max(seconds, 1.0), 10.0), 2), seed=seed)
        if name in ("alone", "steps-stage2"):  # what was really said, by the same stage 2
            said = metis.decode_tokens(metis.tokens(str(item.clean))["ssl"], prompt, seed=seed, **options)
            return replace(said, wav=said.wav.flip(0)) if variant == "reversed" else said
        return metis.decode_tokens(metis.tokens(str(item.noisy))["ssl"], seed=seed)

    def make(items: Sequence[Item], seed: int) -> list[Speech]:
        if name in ("alone", "steps-stage2") or variant == "direct":
            return [one(item, seed) for item in items]
        found: list[Speech] = metis.generate(study.task, [_ask(item, ending) for item in items], seed=seed, **options)
        return found

    return make


# ---------------------------------------------------------------- judging


class VoiceAndWords:
    """Those judges that a study asks for; rows of JSON types, null with a reason where one failed."""

    def __init__(self, asked: Sequence[str]) -> None:
        self.asked, self.verdicts = asked, Verdicts()
        self.words, self.voice = WhisperJudge(), SpeakerJudge()

    def rows(self, variant: str, clips: Sequence[tuple[Item, int, Path]]) -> list[dict[str, Any]]:
        """One row a clip."""
        found: list[dict[str, Any]] = [
            {"variant": variant, "id": item.id, "speaker": item.speaker, "seed": seed} for item, seed, _ in clips
        ]
        paths = [path for _, _, path in clips]
        if "wer" in self.asked:
            for row, (item, _, _), heard in zip(found, clips, self.verdicts.many(self.words, paths), strict=True):
                row |= _tried("wer", _words, item.text, heard)
                row["heard"] = heard if isinstance(heard, str) else None
        for metric in (name for name in self.asked if name.startswith("sim_")):
            others = [item.reference(metric) for item, _, _ in clips]
            known = [*paths, *(other for other in others if other is not None)]
            voices = dict(zip(known, self.verdicts.many(self.voice, known), strict=True))
            for row, path, other in zip(found, paths, others, strict=True):
                nobody = MetricFailure("the test set has no such recording here")
                row |= _tried(metric, _likeness, voices[path], voices[other] if other else nobody)
        for row in found:
            if row.get("sim_prompt") is not None and row.get("sim_other") is not None:
                row["sim_gap"] = round(row["sim_prompt"] - row["sim_other"], 6)
        if "pesq_wb" in self.asked:
            for row, (item, _, path) in zip(found, clips, strict=True):
                assert item.clean is not None
                heard = self.verdicts.get(metrics.PESQ, metrics.pesq_wb, item.clean, path)
                row |= _tried("pesq_wb", _good, heard)
        if "confidence" in self.asked:
            for row, path in zip(found, paths, strict=True):
                row["confidence"], row["heard"] = self._listen(audio.load(str(path), JUDGE_RATE).numpy())
        return found

    def _listen(self, wav_16k: np.ndarray) -> tuple[float, str]:
        """Geometric mean of the probabilities of the recogniser's own tokens (0 where it hears none), and the text."""
        segments = self.words.segments(wav_16k, no_speech_threshold=None)
        count = sum(len(segment.tokens) for segment in segments)
        text = " ".join(segment.text.strip() for segment in segments).strip()
        if not count or not text:
            return 0.0, ""
        return round(math.exp(sum(s.avg_logprob * len(s.tokens) for s in segments) / count), 6), text


def _nearer(rows: Sequence[dict[str, Any]]) -> None:
    """How much nearer the recogniser's confidence in what was continued lies to that in speech played backwards, which
    nobody understands, than to that in what was really said by the same stage 2; about 0 where it cannot tell these
    two apart."""
    known = {(row["variant"], row["id"], row["seed"]): row["confidence"] for row in rows}
    for row in (row for row in rows if row["variant"] == "continued"):
        said, back = (known[variant, row["id"], row["seed"]] for variant in ("said", "reversed"))
        row["nearer_reversed"] = round(abs(said - row["confidence"]) - abs(back - row["confidence"]), 6)


def _good(verdict: Any) -> Any:
    if isinstance(verdict, MetricFailure):
        raise verdict
    return verdict


def _words(text: str, heard: Any) -> float:
    return metrics.word_errors(text, _good(heard)).rate


def _likeness(voice: Any, other: Any) -> float:
    return metrics.cosine(_good(voice), _good(other))


def _tried(metric: str, compute: Callable[..., float], *given: Any) -> dict[str, Any]:
    """A number, or null and why."""
    try:
        return {metric: round(float(compute(*given)), 6)}
    except MetricFailure as failure:
        return {metric: None, f"{metric}_error": str(failure)}
