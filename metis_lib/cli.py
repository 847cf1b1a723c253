"""The command ``metis``: every sub-command is a dataclass whose fields are its options and whose ``run`` works.

A command returns its answer once, as text and as JSON types; only the answer goes to stdout, whatever else
is printed meanwhile (by libraries and child processes too) goes to stderr.  Heavy imports wait until ``run``.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, dataclass_transform

import tyro

from metis_lib import __version__
from metis_lib.config import AUDIO_RATE
from metis_lib.errors import MetisError

JUDGES = ("whisper-base", "ecapa", "speechmos", "nsnet2")
"""The judges of the evaluation, and the peer of speech enhancement."""
LARGEST_UPLOAD = 100_000_000
"""Bytes of a message to JupyterLab, whose own 10 MB are less than a minute of stereo."""
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


class Answer(NamedTuple):
    """What a command found: ``text`` for readers, ``document`` (JSON types) for programs, ``code`` to exit with."""

    text: str
    document: dict[str, Any]
    code: int = 0


@dataclass_transform(frozen_default=True, kw_only_default=True)
@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of every command."""

    json: bool = False
    """Print one JSON document on stdout."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

    def run(self) -> Answer:
        """Do the work."""
        raise NotImplementedError


class Generate(Command):
    """What commands that make audio share."""

    output: Path
    """Recording to write (.wav, .flac or .ogg); of many inputs, the folder."""
    model: str = "nano"
    """nano, debug (random weights), the folder of a system, or amphion/metis."""
    variant: Literal["full", "lora"] | None = None
    """Of the published weights."""
    revision: str | None = None
    """Of the published weights."""
    seed: int = 0
    """Same seed, same samples."""
    steps: int | None = None
    """Decoding steps of stage 1; the task's own by default."""
    cfg: float | None = None
    """Scale of guidance."""
    rescale: float | None = None
    """Share of the guided result that is brought back to its deviation."""
    temperature: float | None = None
    """Of the first step; it falls to zero."""
    top_k: int | None = None
    """Tokens that may be drawn."""
    schedule: str | None = None
    """How many tokens stay masked: cosine, linear, square, cubic, sqrt (metis_lib/models/masked.py, SCHEDULES)."""
    stage2_steps: tuple[int, ...] = ()
    """Decoding steps of the acoustic layers, 1 for those that are not named."""
    candidates: int | None = None
    """Draws of the SSL tokens: of a text the one that the system understands best is kept, in conversion those are
    joined that say what the source says (nano)."""
    stage2_candidates: int | None = None
    """Draws of the acoustic codes, joined of what it understands best (nano)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the transformers' weights."""
    compat: Literal["released"] | None = None
    """The wiring of the released code."""
    compile: bool = False
    """Compile the passes of stage 1 and 2; pays for many inputs on a GPU."""
    batch_frames: int | None = None
    """Padded frames (50 a second) that are worked on together."""
    format: Literal["flac", "wav", "ogg"] = "flac"
    """Of many outputs."""
    fresh: bool = False
    """Make again what a folder holds already."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    TASK: ClassVar[str] = ""

    def item(self) -> dict[str, Any]:
        """The arguments of the task, as far as they are given."""
        from metis_lib.pipeline import SOURCES

        names = {"input": {"l2s": "video", "tts": "text"}.get(self.TASK, "source")}
        given = {names.get(key, key): value for key, value in vars(self).items() if value is not None}
        item = {key: given[key] for key in (*SOURCES[self.TASK][0], *SOURCES[self.TASK][1]) if key in given}
        return {key: str(value) if isinstance(value, Path) else value for key, value in item.items()}

    def _options(self) -> dict[str, Any]:
        names = (
            *("steps", "cfg", "rescale", "temperature", "top_k", "schedule", "batch_frames"),
            *("candidates", "stage2_candidates"),
        )
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return found | ({"stage2_steps": self.stage2_steps} if self.stage2_steps else {})

    def _metis(self) -> Any:
        from metis_lib.checkpoints import own_system
        from metis_lib.pipeline import Metis

        published = None if own_system(self.model) else self.TASK
        return Metis.from_pretrained(
            self.model, task=published, variant=self.variant, revision=self.revision, device=self.device,
            dtype=self.dtype, compat=self.compat, compile=self.compile,
        )  # fmt: skip

    def run(self) -> Answer:
        if not 0 <= self.seed < 2**63:
            raise MetisError(f"the seed is a whole number from 0 to 2**63 - 1, got {self.seed}")
        from metis_lib import audio, bulk

        many = getattr(self, "input", None)
        if many is not None and bulk.is_bulk(self.TASK, many):
            return self._many(many)
        item = self.item()
        sources = [Path(item[key]) for key in ("source", "prompt", "like") if key in item]
        _check_output(self.output, sources)
        for source in sources:  # what is wrong with them shows before a model is loaded
            audio.read(source, AUDIO_RATE)
        metis = self._metis()
        began = time.perf_counter()
        speech = metis.generate(self.TASK, [item], seed=self.seed, **self._options())[0]
        took = time.perf_counter() - began
        speech.save(self.output)
        document = {
            "output": str(self.output),
            "seconds": round(speech.seconds, 4),
            "sample_rate": speech.sample_rate,
            "model": self.model,
            "seed": self.seed,
            "device": str(metis.device),
            "seconds_to_make": round(took, 3),
        }
        return Answer(f"{self.output}: {speech.seconds:.2f} s of speech, made in {took:.2f} s", document)

    def _many(self, source: Path) -> Answer:
        """A folder or a manifest."""
        from metis_lib import bulk
        from metis_lib.evaluation.record import MODEL_CODE, checkpoint_hashes, code_hash, task_files

        given = {key: value for key, value in self.item().items() if key not in ("source", "video", "text")}
        out = self.output.expanduser()
        items = bulk.read_items(self.TASK, source, given, out)
        if out.is_file():
            raise MetisError(f"{out} is a file; of many inputs the output is a folder")
        metis, began = self._metis(), time.monotonic()
        about: dict[str, Any] = {"model": self.model, "dtype": self.dtype, "compat": self.compat}
        about["variant"] = self.variant
        about |= {"compile": "yes"} if self.compile else {}
        about |= {"revision": self.revision} if self.revision else {}
        hashes = checkpoint_hashes(self.model)  # weights, and configurations with the decoding defaults
        about |= {key: hashes[key] for key in ("checkpoint_sha256", "config_sha256") if hashes[key]}
        about |= {"task_files": own} if (own := task_files()) else {}
        about["code"] = code_hash(*MODEL_CODE)

        def show(done: int, total: int, what: str) -> None:
            took = time.monotonic() - began
            _say(f"{done}/{total} {what} ({took:.0f} s, {took / done * (total - done):.0f} s to go)")

        found = bulk.generate_all(
            metis, self.TASK, items, out, options=self._options(), seed=self.seed, suffix=f".{self.format}",
            fresh=self.fresh, about=about, progress=show,
        )  # fmt: skip
        lines = [f"{out}: {found['done']} made, {found['kept']} kept, {len(found['failed'])} failed"]
        lines += [f"  {name}: {reason}" for name, reason in found["failed"].items()]
        return Answer("\n".join(lines), {"output": str(out), **found}, 1 if found["failed"] else 0)


class SE(Generate):
    """Enhance noisy recordings."""

    TASK = "se"
    input: Path
    """A recording, a folder of them, or a manifest (.jsonl, .csv, .tsv)."""


class VC(Generate):
    """Say what a recording says in the voice of a prompt."""

    TASK = "vc"
    input: Path
    """A recording, a folder of them, or a manifest with source (and prompt)."""
    prompt: Path | None = None
    """A recording of the voice, a few seconds."""


class TSE(VC):
    """Extract the voice of a prompt from a mixture; text-guided if told what it says (Omni)."""

    TASK = "tse"
    text: str | None = None
    """What the voice says in the mixture."""
    prompt_text: str | None = None
    """What it says in the prompt."""
    language: str | None = None
    """Of both texts."""


class TTS(Generate):
    """Say texts in the voice of a prompt."""

    TASK = "tts"
    text: str | None = None
    """What to say."""
    input: Path | None = None
    """Many texts: one a line (.txt), or a manifest with text (prompt, prompt_text, seconds, language)."""
    prompt: Path | None = None
    """A recording of the voice, a few seconds."""
    prompt_text: str | None = None
    """What the prompt says."""
    seconds: float | None = None
    """Length of the speech; estimated from the prompt by default."""
    like: Path | None = None
    """A recording that the speech shall be as long as."""
    language: str = "en"
    """Of the text."""
    prompt_language: str | None = None
    """Of the prompt, if it is another."""

    def run(self) -> Answer:
        from metis_lib import bulk

        if (self.text is None) == (self.input is None):
            raise MetisError("give --text, or --input with many texts")
        if self.input is not None and not bulk.is_bulk("tts", self.input):
            raise MetisError(f"{self.input}: many texts are a .txt with one a line, or a manifest (.jsonl, .csv, .tsv)")
        return super().run()


class L2S(Generate):
    """Say what silent lips say in the voice of a prompt."""

    TASK = "l2s"
    input: Path
    """A video at 25 fps, a folder of them, or a manifest with video (and prompt)."""
    prompt: Path | None = None
    """A recording of the voice, a few seconds."""


class Judges(Command):
    """Fetch the judges of the evaluation; what is there already is checked and kept."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = JUDGES  # Which assets; all judges if none is named.

    def run(self) -> Answer:
        from metis_lib import assets

        folders = {name: str(assets.fetch(name)) for name in self.names}
        return Answer("\n".join(f"{name}: {folder}" for name, folder in folders.items()), folders)


class Nano(Command):
    """Build the corpus of nano from packages, or go on where it was stopped; 60 to 90 minutes on two cores."""

    report: bool = False  # Only say what the corpus holds (--json for programs).
    hours: float = 20.0  # Synthetic speech to make, in hours.
    workers: int = 2  # Processes.

    def run(self) -> Answer:
        from metis_lib import assets
        from metis_lib.data.report import summarise
        from metis_lib.data.store import read_manifest

        folder = assets.metis_home() / "corpora" / "nano"
        if not self.report:
            _recipe("nano.corpus").prepare_nano(hours_synthetic=self.hours, workers=self.workers, say=_say)
        found = {"folder": str(folder), **summarise(read_manifest(folder / "manifest.jsonl"))}
        lines = [f"{folder}: {found['hours']} h ({found['human_hours']} h human), {found['voices']} voices"]
        for name, part in found["splits"].items():
            lines.append(
                f"  {name:<11}{part['hours']:>7} h {part['utterances']:>6} utterances {part['voices']:>4} voices"
            )
        lines += [f"  {part['hours']:>7} h  {licence}" for licence, part in found["licences"].items()]
        return Answer("\n".join(lines), found)


class Testset(Command):
    """Make a test set of your held-out recordings, of nano's corpus, or of a local copy of a public one."""

    name: Name
    """The manifest of your own recordings; or unseen (voices and sentences never trained on), seen (voices of the
    training, for TTS), tuning; or a public one: seedtts-en, seedtts-zh, seedtts-vc-en, seedtts-vc-zh, librispeech,
    vctk, vctk-same, libri2mix, emiliamix, dns2020-no-reverb, dns2020-with-reverb, dns2020-real, lrs2, lrs3."""
    root: Path | None = None  # Where the local copy of a public one lies.
    out: Path | None = None
    """Folder for its manifest.jsonl; by default where `metis evaluate --testset NAME` finds it, of your own recordings
    `testset` beside their manifest."""
    prompts: Path | None = None
    """The second corpus of those that need one: LibriSpeech test-clean (libri2mix), Seed-TTS (lrs2, lrs3)."""
    split: str = "test"  # Of your own recordings: which.
    each: int = 5  # Of your own recordings: how many a voice.
    seed: int = 2025  # Of what is drawn.
    allow_count: bool = False  # Take a copy that has not as many items as the official list.

    def run(self) -> Answer:
        options = {key: getattr(self, key) for key in ("out", "prompts", "seed", "allow_count")}
        if self.name.endswith(".jsonl"):
            if (self.root, self.prompts) != (None, None):
                raise MetisError(f"{self.name} is a manifest; --root and --prompts are for public test sets")
            own = _recipe("testsets").of_recordings(
                self.name, self.out, split=self.split, each=self.each, seed=self.seed
            )
            counts = ", ".join(f"{n} of {task}" for task, n in own["items"].items())
            short = f" ({own['left_out']} left out: below 1 or above 30 s)" if own["left_out"] else ""
            for lack in own["lacks"]:
                _say(lack)
            return Answer(f"{own['recordings']} recordings{short}, {counts}: {own['testset']}", own)
        if (self.split, self.each) != ("test", 5):
            raise MetisError(f"--split and --each are for the manifest of your own recordings, not for {self.name!r}")
        if self.name in ("unseen", "seen", "tuning"):
            if (self.root, self.out, self.prompts) != (None, None, None):
                raise MetisError(f"{self.name} is made of nano's corpus; it takes no folders")
            folder = _recipe("nano.testsets").build_synthetic(self.name, more=True)
            return Answer(f"{self.name}: {folder}", {"testset": str(folder)})
        found = _recipe("testsets").prepare(self.name, self.root, **options)
        return Answer(f"{self.name}: {found['items']} items in {found['testset']}", found)


class Manifest(Command):
    """Make the manifest of your own recordings; the bad ones are listed with a reason and left out."""

    source: Place  # A folder of recordings, a CSV, TSV or JSONL list, or Lhotse manifests.
    out: Path  # Folder for manifest.jsonl, refused.jsonl and facts.jsonl.
    language: str = "en"  # Of recordings that state none.
    speaker: str | None = None  # Of all recordings; by default as the list says, or the name of a recording's folder.
    licence: str = "unknown"  # Of recordings that state none.
    splits: tuple[float, float, float] = (0.9, 0.05, 0.05)  # Shares of training, validation and test.
    hold_out: Literal["auto", "speaker", "sentence"] = "auto"
    """What is held out; auto: whole speakers where there are enough of them."""
    keep: tuple[Literal["8-bit", "wrong text", "same sound"], ...] = ()  # Reasons that shall only warn.
    seed: int = 0  # Which are held out.
    workers: int = 2  # Threads.

    def run(self) -> Answer:
        from metis_lib.data.importers import build_manifest

        options = {key: value for key, value in vars(self).items() if key not in ("source", "out", "json")}
        return _imported(build_manifest(self.source, self.out, say=_say, **options))


class PublicCorpus(Command):
    """Prepare a local copy of a public corpus that Lhotse has no recipe for, or any folder of noise or rooms."""

    name: Annotated[Literal["dns2020", "demand", "noise", "rirs", "lrs2", "lrs3", "lrw"], tyro.conf.Positional]
    """Which one; noise and rirs are folders of recordings."""
    root: Path  # Where it lies.
    out: Path  # Folder of the corpus.

    def run(self) -> Answer:
        public = _recipe("public")
        if self.name in public.LIPS:
            return _imported(public.prepare_lips(self.name, self.root, self.out))
        makers: dict[str, Any] = {
            "dns2020": public.prepare_dns, "demand": public.prepare_demand, "noise": public.prepare_noise,
            "rirs": public.prepare_rirs,
        }  # fmt: skip
        done = makers[self.name](self.root, self.out)
        done = {key: _imported(part).document if key == "speech" else part for key, part in done.items()}
        return Answer("\n".join(f"{key}: {_short(value)}" for key, value in done.items()), done)


class CorpusReport(Command):
    """Measure a corpus: hours, voices, licences, levels, bandwidths, faults, as a page to read."""

    manifest: Place  # Its manifest.jsonl.
    out: Path | None = None  # The page (.html); its numbers go beside it.

    def run(self) -> Answer:
        from metis_lib.data.report import corpus_report

        found = corpus_report(self.manifest, self.out, say=_say)
        return Answer("\n".join(f"{key}: {_short(value)}" for key, value in found.items()), found)


class Tokens(Command):
    """Tokenise a corpus once, to WebDataset shards; goes on where it was stopped; torchrun shares the work."""

    manifest: Place  # Its manifest.jsonl.
    out: Path  # Folder of the shards.
    system: str = "nano"  # nano, debug (random weights) or the folder of a system.
    split: str | None = None  # Only this split.
    features: bool = False  # Write the SSL features too.
    acoustic: bool = True  # Write the acoustic codes.
    shard_items: int = 256  # Utterances a shard.
    device: str = "auto"  # auto, cpu, cuda or mps.

    def run(self) -> Answer:
        from metis_lib.data.shards import tokenise

        options = {key: value for key, value in vars(self).items() if key not in ("manifest", "out", "json")}
        done = tokenise(self.manifest, self.out, say=_say, **options)
        return Answer("\n".join(f"{key}: {value}" for key, value in done.items()), done)


class Evaluate(Command):
    """Run the evaluation notebooks: scores of every utterance, a summary, a page to read and listen to.

    What is done is kept: the same command goes on with a run that was interrupted.
    """

    tasks: tuple[str, ...] = ("codec", "se", "tts")
    """What to evaluate: codec, se, tts, vc, tse, l2s, omni, or tasks of your own (docs/new_task.md)."""
    systems: tuple[str, ...] = ()
    """Rows of the tables, other checkpoints among them; each task takes those that it knows, all if none is named."""
    testsets: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--testset",))] = ("human",)
    """Folders with manifest.jsonl, or names under eval/testsets or $METIS_HOME/testsets; of several, each gets a folder
    of its own in out."""
    out: Path = Path("results/evaluation")  # Folder of the run.
    seeds: tuple[int, ...] = (0,)  # The model generates once for each.
    limit: int | None = None  # Only the first items of each task.
    model: str = "nano"
    """nano, debug, the folder of a system, or amphion/metis; @lora, @full, @released (the wiring of the released code)
    or @REVISION behind the name of published weights."""
    device: str = "auto"  # auto (all GPUs, each the next notebook), cpu, cuda, or several: cuda:0,cuda:1.
    dtype: Literal["float32", "bfloat16"] = "float32"  # Of the transformers' weights.
    option: tuple[str, ...] = ()  # Decoding options, such as steps=10 or cfg=2.0.
    judges: Literal["offline", "paper"] = "offline"
    """Judges that packages carry, or the paper's own (weights from the hub or a folder)."""
    allow_missing: bool = False  # Accept utterances for which a system gave no audio.
    fresh: bool = False  # Run again what is done.

    def run(self) -> Answer:
        from metis_lib.evaluation import runner
        from metis_lib.evaluation.record import read_json
        from metis_lib.evaluation.report import text_table

        systems, options = self._systems(), dict(_option(text) for text in self.option)
        given = {key: getattr(self, key) for key in ("seeds", "limit", "device", "dtype", "judges", "fresh")}
        given |= {"allow_missing": self.allow_missing, "checkpoint": self.model, "options": options}
        names = [Path(testset).name for testset in self.testsets]
        if not names:
            raise MetisError("name at least one test set")
        if len(set(names)) < len(names):
            raise MetisError(f"two test sets of one name ({', '.join(names)}); evaluate each with an --out of its own")
        texts, documents, pages, failed = [], {}, [], None
        for testset in self.testsets:
            out = self.out / Path(testset).name if len(self.testsets) > 1 else self.out
            try:
                summary = runner.evaluate(self.tasks, systems, testset, out, **given)
                own = read_json(out / "omni" / "summary.json") if "omni" in self.tasks else None  # in its own folder
            except runner.EvaluationFailed as failure:  # what lies in Omni's folder may be of an earlier run
                failed, summary, own = failure, failure.summary, None
            for found in filter(None, (summary, own)):
                texts.append((f"{testset}\n" if len(self.testsets) > 1 else "") + text_table(found))
            documents[testset] = summary | ({"omni": own} if own else {})
            pages += [out / "index.html"] if summary or not own else []
            pages += [out / "omni" / "index.html"] if own else []
        if failed:
            _say("\n\n".join(texts))
            raise failed
        first = next(iter(documents.values()))
        document = {"out": str(self.out), "index": str(pages[0]), "summary": first}
        document |= {"testsets": documents} if len(documents) > 1 else {}
        listen = "Listen and read: " + ", ".join(map(str, pages))
        return Answer("\n\n".join([*texts, listen]), document)

    def _systems(self) -> dict[str, list[str]] | None:
        """The systems of each task, out of one list for all."""
        from metis_lib.evaluation.systems import choose_systems, known_task, label, systems_of

        tasks = [task for task in self.tasks if task != "omni"]
        if not self.systems:
            return None
        if not tasks:
            raise MetisError("systems belong to tasks; omni stands for all its own: leave --systems out, or name tasks")
        for task in tasks:
            known_task(task)
        chosen: dict[str, list[str]] = {task: [] for task in tasks}
        for name in self.systems:
            for task in tasks:
                with contextlib.suppress(MetisError):
                    chosen[task] += choose_systems(task, [name], self.model)
            if not any(label(name) in map(label, names) for names in chosen.values()):
                choice = dict.fromkeys(label(known) for task in tasks for known in systems_of(task, self.model))
                raise MetisError(f"unknown system {name!r}; choose among {', '.join(choice)}")
        bare = [task for task, names in chosen.items() if not names]
        if bare:
            known = ", ".join(map(label, systems_of(bare[0], self.model)))
            raise MetisError(f"none of the systems belongs to the task {bare[0]}: {known}")
        return chosen


class Demo(Command):
    """Fetch the judges, evaluate codec, enhancement and text to speech on the human set, print the tables."""

    out: Path = Path("results/demo")  # Folder of the run.

    def run(self) -> Answer:
        began = time.perf_counter()
        Judges().run()
        text, document, _ = Evaluate(out=self.out).run()
        took = time.perf_counter() - began
        return Answer(f"{text}\n({took:.0f} s)", document | {"wall_s": round(took, 1)})


class Report(Command):
    """Render the page of a run again from its files; with --readme, fill the table of README.md instead."""

    out: Place = Path("results/demo")  # Folder of the run.
    readme: bool = False  # Fill the results of README.md.
    testset: str = "human"  # The test set of the run.

    def run(self) -> Answer:
        from metis_lib.evaluation import record, report
        from metis_lib.evaluation.systems import testset_folder

        _, _, summary, run = record.read_run(self.out)
        if self.readme:
            target = report.fill_readme(record.ROOT / "README.md", report.readme_results(summary, run))
            return Answer(f"results written into {target}", {"readme": str(target)})
        manifest = record.sha256_file(testset_folder(self.testset) / "manifest.jsonl")
        if manifest != run["manifest_sha256"]:
            raise MetisError(f"{self.out} was measured on another test set than {self.testset}; name it by --testset")
        page = report.write_page(self.out, summary, self.testset, run["limit"])
        return Answer(str(page), {"index": str(page)})


class Training(Command):
    """Options of every training; what is not given is the preset's (metis_lib/training/settings.json)."""

    steps: int | None = None  # Optimiser steps: the horizon of the schedule.
    lr: float | None = None  # Highest learning rate.
    warmup: int | None = None  # Steps of linear warm-up.
    frames: int | None = None  # Padded frames (50 a second) of a batch on one process; lower it when memory runs out.
    accumulate: int | None = None  # Batches a step.
    precision: Literal["bf16-mixed", "32-true"] | None = None  # Of the arithmetic.
    checkpointing: bool = False  # Recompute activations: less memory, a third more work.
    compile: bool = False  # torch.compile the nets.
    validate_every: int | None = None
    """Steps between validations; 0: at the end. With --keep best by default a twentieth of them, or ten."""
    seed: int = 0  # Of everything random.
    workers: int = 0  # Processes that prepare batches.
    budget: str | None = None  # Stop, with a state to go on from, after this time: 90s, 100m, 2h.
    resume: bool = False  # Go on, bit for bit, with a run that was stopped: what happens anyway unless --fresh is said.
    fresh: bool = False  # Forget a run that was stopped or finished, and begin anew from the weights.
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps.

    def _settings(self, model: str, preset_name: str) -> Any:
        from metis_lib.training.recipes import settings_for

        if self.resume and self.fresh:
            raise MetisError("say --resume or --fresh, not both")
        if self.workers < 0:
            raise MetisError(f"workers must not be negative, got {self.workers}")
        names = ("steps", "lr", "warmup", "frames", "accumulate", "precision", "validate_every")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        switches = {"checkpointing": self.checkpointing, "compile": self.compile, "seed": self.seed}
        return settings_for(model, preset_name, **given, **switches)


class TrainPart(Training):
    """Train one part of a system: a tokenizer, stage 1 (pre-training), a net of stage 2, or a task."""

    model: Name  # Which one; an unknown name lists them.
    out: Path  # Folder of the system: earlier parts are read there.
    preset: Literal["debug", "nano", "paper"] = "nano"  # Sizes and settings.
    data: Path | None = None  # Manifest of recordings (metis prepare manifest).
    shards: Path | None = None
    """Token shards, with folders train and validation (metis prepare tokens); else made from the recordings."""
    mode: Literal["lora", "full", "adapter"] = "lora"  # What of a task trains.
    rank: int = 16  # Of LoRA.
    option: tuple[str, ...] = ()
    """Options of the model, such as longest=1500 or adversarial_from=20000 (docs/training.md)."""

    def run(self) -> Answer:
        from metis_lib.stores import sizes
        from metis_lib.training.recipes import Job, options_for, train

        options = options_for(self.model, self.preset) | dict(_option(text) for text in self.option)
        job = Job(
            self.model, sizes(self.out, self.preset), self.out, self._settings(self.model, self.preset), self.data,
            self.shards, self.mode, self.rank, options, self.workers,
        )  # fmt: skip
        scores = train(job, budget=self.budget, resume=not self.fresh, device=self.device, say=_say)
        return _trained(self.model, self.out, scores)


class FineTune(Training):
    """Adapt a system to a task with your own recordings; the result is a system of its own.

    Without --steps those of the preset, or fewer where they would read the recordings more than 30 times.
    """

    task: str  # What it shall learn: tts, vc, tse, se, l2s, omni, or a task of your own (docs/new_task.md).
    data: Path  # A manifest, or anything that metis prepare manifest reads.
    base: Annotated[str, tyro.conf.arg(name="from")] = "nano"  # nano, or the folder of a system.
    out: Path = Path("runs/finetuned")  # Folder of the new system.
    lora: int = 16  # Rank of LoRA.
    full: bool = False  # Train all weights of stage 1.
    adapter_only: bool = False  # Train only what the task adds: adapter, text embedding.
    keep: Literal["best", "last"] = "best"
    """Which weights stay: those with the lowest cross-entropy of held-out recordings, or the last."""
    option: tuple[str, ...] = ()
    """Options of the task, such as simulate='{"se": {"snr_db": [0, 20]}}' (docs/training.md)."""

    def run(self) -> Answer:
        from metis_lib.checkpoints import locate
        from metis_lib.stores import sizes
        from metis_lib.training.recipes import finetune, scale_of

        like = scale_of(sizes(locate(self.base)))
        if self.full and self.adapter_only:
            raise MetisError("say --full or --adapter-only, not both")
        mode = "full" if self.full else "adapter" if self.adapter_only else "lora"
        scores = finetune(
            self.task, self.data, self.out, base=self.base, mode=mode, rank=self.lora, workers=self.workers,
            settings=self._settings(self.task, like), shorten=self.steps is None, validate_every=self.validate_every,
            keep=self.keep, options=dict(_option(text) for text in self.option), budget=self.budget,
            resume=not self.fresh, device=self.device, say=_say,
        )  # fmt: skip
        return _trained(self.task, self.out, scores)


class Queue(Command):
    """Work on the queue of the nano recipe: run its next piece at low priority, list, pause or continue it."""

    action: Annotated[Literal["run", "list", "pause", "continue"], tyro.conf.Positional] = "run"  # What to do.
    budget: str | None = None  # Stop, with a state to go on from, after this time, such as 100m.
    pieces: int = 1  # How many pieces to train, one after the other.
    only: str | None = None  # Only pieces of this model.
    path: Path | None = None  # Another queue file.
    device: str = "auto"  # auto, cpu, cuda.

    def run(self) -> Answer:
        from metis_lib.evaluation.record import ROOT

        queue = _recipe("nano.queue")
        path = self.path or ROOT / "recipes" / "nano" / "queue.json"
        if self.action in ("pause", "continue"):
            numbers = queue.pause(path, self.action == "pause")
            said = f"process {', '.join(map(str, numbers))}: {self.action}"
            return Answer(said, {"processes": numbers, "action": self.action})
        done: list[dict[str, Any]] = []
        if self.action == "run":
            with contextlib.suppress(OSError, AttributeError):
                os.nice(15)
            began = time.monotonic()
            for _ in range(self.pieces):
                left = self.budget
                if self.budget:
                    from metis_lib.training.loop import seconds_of

                    rest = seconds_of(self.budget) - (time.monotonic() - began)
                    if rest < 1:
                        break
                    left = f"{rest:.0f}s"
                if done and queue.next_piece(queue.read(path), self.only) is None:
                    break
                done.append(queue.run_next(path, budget=left, only=self.only, device=self.device, say=_say))
                if not done[-1]["finished"]:
                    break
        found = queue.read(path)
        return Answer(queue.table(found), {"next": queue.next_piece(found), "trained": done, "pieces": found["pieces"]})


class Recipe(Command):
    """Nano from packages to scores; goes on where it was stopped.

    It makes the corpus, trains the pieces of the queue that are not done, beginning with the shipped weights, writes
    the parts over these (metis_lib/weights/nano) and evaluates them."""

    name: Annotated[Literal["nano"], tyro.conf.Positional] = "nano"  # Which recipe.
    budget: str | None = None  # Stop the trainings after this time, such as 100m.
    hours: float = 20.0  # Synthetic speech of the corpus.
    from_scratch: bool = False
    """All pieces anew, from random weights, in $METIS_HOME/runs/nano-scratch; the shipped weights stay as they are."""

    def run(self) -> Answer:
        done = _recipe("nano.build").build(budget=self.budget, hours=self.hours, scratch=self.from_scratch, say=_say)
        text = f"{done['left']} pieces are left to train" if done["left"] else f"nano is ready: {done['sizes']}"
        return Answer(text, done)


class BenchTrain(Command):
    """Measure how fast stage 1 trains here, against the matrix products of the same run."""

    preset: Literal["debug", "nano", "paper"] = "nano"  # Sizes; the weights are random.
    layers: int | None = None  # Only so many layers.
    tokens: int | None = None  # Padded frames a step.
    seconds: float = 20.0  # How long to measure.
    device: str = "auto"  # auto, cpu or cuda.
    compile: bool = False  # torch.compile the net.

    def run(self) -> Answer:
        options = {key: value for key, value in vars(self).items() if key not in ("preset", "json")}
        found = _recipe("bench.training").bench_train(self.preset, **options)
        return Answer("\n".join(f"{key}: {_short(value)}" for key, value in found.items()), found)


class BenchGenerate(Command):
    """Measure how fast speech is generated, against the released order of operations in the same run."""

    preset: Literal["debug", "nano", "paper"] = "paper"  # Sizes; the weights are random.
    tasks: tuple[str, ...] = ("tts", "se")  # Among tts, vc, tse, se; also as one word, tts,se.
    seconds: float = 5.0  # Of speech to make.
    prompt: float = 5.0  # Seconds of the prompt.
    repeats: int = 3  # Runs of each variant, in turns; the median counts.
    full: bool = False  # Run all decoding steps, not a part of them that is counted up.
    batch: int = 8  # Utterances together, for the gain of batches.
    batches: tuple[int, ...] = ()  # Utterances together, each measured as one batch; on CUDA by default 1 to 64.
    device: str = "auto"  # auto, cpu or cuda.
    compile: bool = False  # Measure compiled passes too.
    out: Path | None = None  # Folder for generate-PRESET.json and its plot.

    def run(self) -> Answer:
        speed = _recipe("bench.speed")
        left_out = ("preset", "tasks", "json", "out")
        options = {key: value for key, value in vars(self).items() if key not in left_out}
        tasks = [task for word in self.tasks for task in word.split(",") if task]
        found = speed.bench_generate(self.preset, tasks, say=_say, **options)
        if self.out:
            about = next(iter(found.values()))["about"]
            speed.keep(found, self.out, f"generate-{speed.title_of(self.preset, about)}")
        figures = {
            task: {key: value for key, value in values.items() if not isinstance(value, dict)}
            for task, values in found.items()
        }
        lines = [f"{task}: {', '.join(f'{k} {v}' for k, v in values.items())}" for task, values in figures.items()]
        return Answer("\n".join(lines), found)


class BenchTokenise(Command):
    """Measure how fast recordings become tokens, against the released order of operations in the same run."""

    preset: Literal["debug", "nano", "paper"] = "paper"  # Sizes; the weights are random.
    seconds: float = 5.0  # Of each recording.
    batch: int = 8  # Recordings.
    repeats: int = 3  # Runs of each variant, in turns; the median counts.
    device: str = "auto"  # auto, cpu or cuda.
    out: Path | None = None  # Folder for tokenise-PRESET.json and its plot.

    def run(self) -> Answer:
        speed = _recipe("bench.speed")
        options = {key: getattr(self, key) for key in ("seconds", "batch", "repeats", "device")}
        found = speed.bench_tokenise(self.preset, say=_say, **options)
        if self.out:
            speed.keep({"tokenise": found}, self.out, f"tokenise-{speed.title_of(self.preset, found['about'])}")
        keys = ("ratio", "ssl_ratio", "times_real_time", "matmul_share")
        lines = [f"{name}: {', '.join(f'{key} {found[key][name]}' for key in keys)}" for name in found["parts"]]
        return Answer("\n".join(lines), found)


class BenchEvaluate(Command):
    """Measure the judges in batch against one file at a time with the model loaded each time, as the released do."""

    testset: str = "human"  # A folder with manifest.jsonl, or a name under eval/testsets.
    files: int = 12  # How many recordings.
    device: str = "auto"  # auto, cpu or cuda.

    def run(self) -> Answer:
        found = _recipe("bench.judging").bench_evaluation(self.testset, self.files, device=self.device)
        return Answer("\n".join(f"{key}: {_short(value)}" for key, value in found.items()), found)


class Inspect(Command):
    """Show the parts of a system, or one part: sizes, hashes, cards."""

    path: Name  # nano, the folder of a system or of a part, or one model.safetensors.

    def run(self) -> Answer:
        from metis_lib.checkpoints import SHIPPED

        shipped, given = SHIPPED / self.path, Path(self.path).expanduser()
        place = shipped if shipped.is_dir() else given
        if not place.exists():
            raise MetisError(f"no checkpoint at {self.path}; give nano, a folder or a .safetensors file")
        files = sorted(place.rglob("*.safetensors")) if place.is_dir() else [place]
        if not files:
            raise MetisError(f"no weights (.safetensors) under {self.path}")
        base = place if place.is_dir() else place.parent
        parts = [_part(file, base) for file in files]
        lines = [f"{'file':<44}{'type':<22}{'parameters':>12}{'MB':>8}  {'dtype':<10}sha256"]
        for part in parts:
            size = f"{part['parameters']:>12,}{part['bytes'] / 1e6:>8.2f}"
            lines.append(
                f"{part['file']:<44}{part['type'] or '':<22}{size}  {'+'.join(part['dtypes']):<10}{part['sha256'][:16]}"
            )
            lines += [f"    {key}: {_short(value)}" for key, value in part["card"].items()]
        total = {key: sum(part[key] for part in parts) for key in ("parameters", "bytes")}
        lines.append(f"{'together':<66}{total['parameters']:>12,}{total['bytes'] / 1e6:>8.2f}")
        return Answer("\n".join(lines), {"path": str(place), **total, "parts": parts})


class Sizes(Command):
    """Parameters and exact bytes of every released file, from their description; nothing is downloaded or built."""

    preset: Literal["paper", "nano", "debug"] = "paper"  # Sizes of the parts.

    def run(self) -> Answer:
        from metis_lib.config import preset
        from metis_lib.convert import sizes

        found = sizes(preset(self.preset))
        lines = [f"{'file':<18}{'million parameters':>20}{'bytes':>16}"]
        lines += [f"{name:<18}{row['parameters'] / 1e6:>20.2f}{row['bytes']:>16,}" for name, row in found.items()]
        return Answer("\n".join(lines), found)


class Verify(Command):
    """Check released files that are here against their tables of keys, sizes and hashes (exit code 1: one is wrong)."""

    where: Name = "amphion/metis"  # A folder in the released layout, or a hub id (what the cache holds of it).
    task: Literal["base", "tts", "vc", "tse", "se", "l2s", "omni"] | None = None
    """Only what this task needs, all of which must be here."""
    variant: Literal["full", "lora"] | None = None  # Of the task; the published default.

    def run(self) -> Answer:
        from metis_lib.convert import verify
        from metis_lib.released import Released

        place = Released(self.where, local_files_only=True)
        rows = verify(place, self.task, self.variant)
        if all(row["status"] == "absent" for row in rows):
            raise MetisError(f"no released files in {place.folder if place.on_hub else self.where} or the hub's cache")
        lines = [f"{'file':<23}{'status':<8}{'bytes':>14}  path or reason"]
        lines += [
            f"{row['file']:<23}{row['status']:<8}{row['bytes'] or '':>14}  {row['note'] or row['path'] or ''}"
            for row in rows
        ]
        bad = any(row["status"] == "wrong" for row in rows)
        document = {"where": self.where, "ok": not bad, "licence": place.licence, "files": rows}
        return Answer("\n".join([*lines, f"Licence: {place.licence}"]), document, int(bad))


class Convert(Command):
    """Released files to a system of ours, or back; the new folder appears when it is whole."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FROM")]
    """A folder or hub id of released files, or a system of ours."""
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TO")]  # The new folder.
    to: Literal["own", "released"]  # Which layout to write.
    task: tuple[Literal["tts", "vc", "tse", "se", "l2s", "omni"], ...] = ()
    """Only these tasks; by default all that are there."""
    variant: Literal["full", "lora"] | None = None  # Of released tasks; the published default.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # In which a system of ours is stored.

    def run(self) -> Answer:
        import torch

        from metis_lib import convert

        if self.to == "own":
            kind = getattr(torch, self.dtype)
            made = convert.to_own(self.source, self.target, tasks=self.task, variant=self.variant, dtype=kind, say=_say)
        else:
            made = convert.to_released(self.source, self.target, tasks=self.task, say=_say)
        return Answer(f"{made}: written in the layout '{self.to}'", {"folder": str(made), "layout": self.to})


class Export(Command):
    """Write what you fine-tuned as LoRA and adapter files in the released naming, with a model card."""

    system: Name  # nano, or the folder of a system.
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # The new folder.
    task: str  # Which task of it.

    def run(self) -> Answer:
        from metis_lib.convert import export

        files = [str(path) for path in export(self.system, self.out, self.task)]
        return Answer("\n".join(files), {"files": files})


class Doctor(Command):
    """Say what works on this machine, and what to do about what does not (exit code 1: a needed part fails)."""

    def run(self) -> Answer:
        from metis_lib import doctor

        found = doctor.checks()
        ok = all(check.status != "fail" for check in found)
        return Answer(doctor.table(found), {"ok": ok, "checks": [vars(check) for check in found]}, 0 if ok else 1)


class Lab(Command):
    """Open the notebooks in JupyterLab, with the laboratory in front."""

    notebook: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NOTEBOOK")] = "13"
    """Which notebook: the beginning of its name, such as 00 (quick start), 14 (tokens) or 15 (evaluation)."""
    folder: Path | None = None  # What to serve, with notebooks/ in it (default: the clone).
    port: int = 8888  # Where to serve.
    no_browser: bool = False  # Only print the address.

    def run(self) -> Answer:
        from metis_lib.evaluation.record import ROOT

        if importlib.util.find_spec("jupyterlab") is None:
            raise MetisError("JupyterLab is not installed: pip install 'metis-workbench[notebooks]'")
        root = (self.folder or ROOT).resolve()
        found = sorted(root.glob(f"notebooks/{glob.escape(self.notebook)}*.ipynb"))
        if not found:
            raise MetisError(f"no notebooks/{self.notebook}*.ipynb in {root}; metis lab runs from a clone")
        command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={root}", f"--port={self.port}"]
        command += [f"--LabApp.default_url=/lab/tree/notebooks/{found[0].name}"]
        command += [f"--ServerApp.tornado_settings={{'websocket_max_message_size': {LARGEST_UPLOAD}}}"]
        command += ["--no-browser"] if self.no_browser else []
        command += ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
        with subprocess.Popen(command, cwd=root) as server:  # told to end, it ends its server too
            before = signal.signal(signal.SIGTERM, lambda *_: server.terminate())
            try:
                code = server.wait()
            except KeyboardInterrupt:  # JupyterLab has got it as well, and may ask whether it is meant
                code = server.wait()
            finally:
                signal.signal(signal.SIGTERM, before)
        return Answer("", {"code": code}, max(code, 0))


PREPARE: dict[str, type[Command]] = {
    "judges": Judges, "nano": Nano, "testset": Testset, "manifest": Manifest, "corpus": PublicCorpus,
    "report": CorpusReport, "tokens": Tokens,
}  # fmt: skip


CHECKPOINT: dict[str, type[Command]] = {
    "inspect": Inspect, "convert": Convert, "verify": Verify, "export": Export, "sizes": Sizes,
}  # fmt: skip


def _recipe(module: str) -> Any:
    """A module of ``recipes``, which stands beside the library in a clone."""
    from metis_lib.evaluation.record import ROOT

    if not (ROOT / "recipes" / f"{module.replace('.', '/')}.py").is_file():
        raise MetisError("no folder recipes/ here; this needs a clone of the repository")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(f"recipes.{module}")


def _option(text: str) -> tuple[str, Any]:
    """``name=value`` with a JSON value (or a plain word)."""
    name, found, value = text.partition("=")
    if not found:
        raise MetisError(f"an option is name=value, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _trained(model: str, out: Path, scores: dict[str, Any]) -> Answer:
    lines = [f"{model} in {out}:", *(f"{key}: {value:.4g}" for key, value in scores.items())]
    return Answer("\n".join(lines), {"model": model, "out": str(out), "scores": scores})


def _imported(done: Any) -> Answer:
    """What came of an import, as text and JSON types."""
    reasons = Counter(line["reason"] for line in done.refused)
    hours = round(sum(row.duration for row in done.rows) / 3600, 3)
    lines = [f"{done.manifest}: {len(done.rows)} utterances, {hours} h", *done.notes]
    if reasons:
        lines.append(f"left out (see refused.jsonl): {', '.join(f'{n} {reason}' for reason, n in reasons.items())}")
    document = {"manifest": str(done.manifest), "utterances": len(done.rows), "hours": hours, "notes": done.notes}
    return Answer("\n".join(lines), document | {"refused": dict(reasons)})


def _part(file: Path, base: Path) -> dict[str, Any]:
    """Size, hash, type and card of one weight file."""
    from metis_lib.checkpoints import sha256
    from metis_lib.evaluation.record import read_json
    from metis_lib.released_files import name_of, opened

    with opened(file) as tensors:
        slices = [tensors.get_slice(key) for key in tensors.keys()]  # noqa: SIM118 (not a mapping)
    about = read_json(file.parent / "config.json") or {} if file.stem == "model" else {}
    if "type" not in about or about["type"] == "SystemConfig":
        about = {"type": name_of(file)}
    return {
        "file": str(file.relative_to(base)),
        "type": about.get("type"),
        "tensors": len(slices),
        "parameters": sum(math.prod(tensor.get_shape()) for tensor in slices),
        "bytes": file.stat().st_size,
        "dtypes": sorted({tensor.get_dtype() for tensor in slices}),
        "sha256": sha256(file),
        "config": about.get("config", {}),
        "card": about.get("card", {}),
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_output(path: Path, sources: Sequence[Path]) -> None:
    """Refuse what cannot be written before any work is done."""
    from metis_lib.audio import FORMATS

    path = path.expanduser()
    if path.suffix.lower() not in FORMATS:
        raise MetisError(f"cannot write {path.name!r}: the name must end in {', '.join(FORMATS)}")
    folder = next(place for place in path.absolute().parents if place.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or path.is_dir():
        raise MetisError(f"cannot write {path}: {path if path.is_dir() else folder} is not a folder to write into")
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise MetisError(f"the output {path} is also an input; choose another name")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _app() -> tyro.extras.SubcommandApp:
    app, generate, checkpoint, prepare, train, bench = (tyro.extras.SubcommandApp() for _ in range(6))
    for name, command in {"tts": TTS, "vc": VC, "tse": TSE, "se": SE, "l2s": L2S}.items():
        generate.command(command, name=name)
    if os.environ.get("METIS_TASKS"):
        from metis_lib.tasks import own

        for name, new in own().items():
            about = {"TASK": name, "__doc__": new.title or name, "__module__": __name__}
            generate.command(type(name, ({"se": SE, "vc": VC, "tse": TSE}[new.like],), about), name=name)
    for name, command in CHECKPOINT.items():
        checkpoint.command(command, name=name)
    app.command(generate, name="generate", help="Make speech: tts, vc, tse, se or l2s, of one or many inputs.")
    app.command(Demo, name="demo")
    for name, command in PREPARE.items():
        prepare.command(command, name=name)
    app.command(prepare, name="prepare", help="Fetch judges; make corpora, test sets, manifests, reports and tokens.")
    app.command(Evaluate, name="evaluate")
    app.command(Report, name="report")
    for name, command in {"part": TrainPart, "finetune": FineTune, "queue": Queue, "recipe": Recipe}.items():
        train.command(command, name=name)
    app.command(train, name="train", help="Train a part, fine-tune a task, work on the queue of nano.")
    bench.command(BenchTrain, name="train")
    bench.command(BenchGenerate, name="generate")
    bench.command(BenchTokenise, name="tokenise")
    bench.command(BenchEvaluate, name="evaluate")
    app.command(bench, name="bench", help="Measure speed: train, generate, tokenise, evaluate.")
    app.command(checkpoint, name="checkpoint", help="Look into checkpoints, convert and check released ones.")
    app.command(Doctor, name="doctor")
    app.command(Lab, name="lab")
    return app


@contextlib.contextmanager
def _chatter_on_stderr() -> Iterator[None]:
    """Send what anybody prints, child processes and C libraries included, to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments describe; SystemExit 2 (usage on stderr) or 0 (help on stdout)."""
    return _app().cli(
        prog="metis",
        description="Masked generative speech: one pre-trained backbone, several tasks.",
        args=arguments or ["--help"],
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _refuse_twice(command: Command, arguments: Sequence[str]) -> None:
    """MetisError for an option of several values that is given more than once: the parser keeps those of the last."""
    several = {key for key, value in vars(command).items() if isinstance(value, tuple)}
    names = [word.partition("=")[0][2:].replace("-", "_") for word in arguments if word.startswith("--")]
    names = [f"{name}s" if f"{name}s" in several else name for name in names]  # --testset is --testsets
    for name in several:
        if names.count(name) > 1:
            raise MetisError(f"--{name.replace('_', '-')} is there twice; give all its values after one")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``metis`` with ``argv`` (default: the process's) and return its exit code.

    0 done, 1 the doctor found a needed part broken, 2 bad input (one line on stderr) or usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(__version__)
        return 0
    try:
        command = parse(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except MetisError as error:  # of a file that METIS_TASKS names
        _say(f"metis: {error}")
        return 2
    try:
        _refuse_twice(command, arguments)
        with _chatter_on_stderr():
            answer = command.run()
    except KeyboardInterrupt:
        return 130
    except (MetisError, OSError) as error:
        if not isinstance(error, MetisError) and error.errno not in _UNUSABLE:
            raise
        message = " ".join(str(error).split())
        _say(f"metis: {message}")
        if command.json:
            print(json.dumps({"error": message}, ensure_ascii=False))
        return 2
    try:
        if command.json:
            print(json.dumps(answer.document, indent=1, ensure_ascii=False), flush=True)
        elif answer.text:
            print(answer.text, flush=True)
    except BrokenPipeError:  # the reader has seen enough (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return answer.code
