"""What a notebook calls: ``Metis.from_pretrained("nano").enhance("noisy.wav")``."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metis_lib import audio
from metis_lib.audio import Source, Speech
from metis_lib.checkpoints import fill, own_system
from metis_lib.config import AUDIO_RATE, FRAME_RATE, SSL_RATE, preset
from metis_lib.errors import MetisError
from metis_lib.generation import RELEASED_STEPS, Made, Options, Request, Voice, batches, decode, run
from metis_lib.models import adapt
from metis_lib.models.masked import Noise
from metis_lib.models.stage1 import Stage1, spread
from metis_lib.models.stage2 import Stage2
from metis_lib.models.transformer import Packs
from metis_lib.stores import PARTS, Folder, Random
from metis_lib.tasks import TASKS, like, own
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.lips import LipEncoder, upsample
from metis_lib.tokenizers.listener import Listener
from metis_lib.tokenizers.semantic import SemanticCodec, freeze
from metis_lib.tokenizers.ssl import SSLEncoder, count_frames, quicken
from metis_lib.tokenizers.text import PhoneTokenizer, sentences

if TYPE_CHECKING:
    from metis_lib.released import Released

SHORTEST_PROMPT = 0.5
SHORTEST_INPUT = 0.2
LONGEST_PROMPT = 20.0
LONGEST_SPOKEN = 60.0
LONGEST_INPUT = 3600.0
"""Limits in seconds."""


class Limits(NamedTuple):
    """Beyond which lengths work is divided: attention is quadratic, and small models are trained on short speech.

    Attributes:
        whole: seconds of a source; a longer one is worked on in windows.
        window: frames of a window.
        said: seconds of a text; a longer one is said sentence by sentence.
    """

    whole: float = 30.0
    window: int = 1000
    said: float = 15.0


SMALL = Limits(12.0, 600, 6.0)
"""Of systems whose SSL encoder is narrower than 512: they are ours."""
OVERLAP, CARRY = 100, 150
"""Frames that a window shares with the next one, and that stage 2 goes on from."""
PAUSE = 0.15
"""Seconds of silence between parts of a long text."""
HOP = SSL_RATE // FRAME_RATE
REACH = 240
"""A token is heard from 560 samples at 16 kHz: those of its frame, and ``REACH`` of the next."""
LARGE = 100_000_000
"""Of a stage 1 of so many parameters there is one copy in memory, which the tasks' LoRA weights take turns in."""

SOURCES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "tts": (("text", "prompt", "prompt_text"), ("language", "prompt_language", "seconds", "like")),
    "vc": (("source", "prompt"), ()),
    "tse": (("source", "prompt"), ("text", "prompt_text", "language")),
    "se": (("source",), ()),
    "l2s": (("video", "prompt"), ()),
    "base": (("prompt",), ("seconds",)),
}
SOURCES |= {name: SOURCES[new.like] for name, new in own().items()}
"""What an item of a task holds: what it must and what it may (and ``by``: ``omni``, to let Omni do it)."""

NEEDS = {
    "se": ("ssl", "acoustic_decoder"),
    "l2s": ("ssl", "semantic", "acoustic", "lips"),
    "base": ("ssl", "semantic", "acoustic", "stage1"),
}
"""What a task needs besides its own weights and stage 2; what is not listed here takes a prompt and no video."""


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where it works (a warning where it is there and does not), else Apple's MPS, else the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            try:
                torch.zeros(1, device="cuda").item()
                return torch.device("cuda")
            except RuntimeError as error:  # no kernels for an old one, say
                why = str(error).splitlines()[0]
                warnings.warn(f"the GPU cannot be used, so the CPU is ({why}); see docs/install.md", stacklevel=2)
                return torch.device("cpu")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MetisError(f"no device {device!r} on this machine; use auto, cpu, cuda, cuda:1 or mps") from error


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``float32`` or ``bfloat16``, by name or as torch has it; float64 for exact comparisons."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    found = dtype if isinstance(dtype, torch.dtype) else names.get(dtype)
    if found not in names.values():
        raise MetisError(f"unknown dtype {dtype!r}; choose float32 or bfloat16")
    return found


@dataclass
class Job:
    """One item of the user's: requests that make it, in their order, or (``windows``) that come one by one.

    Attributes:
        samples: length of the result at 24 kHz; None where the frames say it.
        windows: from what was made of a long source so far (tokens, codes) to its next request and the frames of it
            that count; None at the end.
    """

    requests: list[Request]
    samples: int | None
    info: dict[str, Any]
    windows: Generator[tuple[Request, int], Made | None, None] | None = None
    made: list[Made] = field(default_factory=list)


class Metis:
    """A whole system: tokenizers, stage 1 with its tasks, stage 2, codec; parts load at their first use.

    Attributes:
        traces: decoder iterations of the last utterance: ``ssl`` (a trace) and ``acoustic`` (one a layer).
        compat: ``"released"`` for the wiring of the released code, token for token (docs/paper_system.md).
    """

    ssl: SSLEncoder
    semantic: SemanticCodec
    acoustic: AcousticCodec
    stage1: Stage1
    stage2_layer1: Stage2
    stage2_full: Stage2
    lips: LipEncoder
    phones: PhoneTokenizer
    listener: Listener

    def __init__(
        self, store: Folder | Random | Released, device: torch.device, *, compat: str | None = None,
        compile: bool = False,
    ) -> None:  # fmt: skip
        if compat not in (None, "released"):
            raise MetisError(f"unknown compat {compat!r}; leave it out, or say 'released'")
        self.store, self.name, self.device, self.compat = store, store.name, device, compat
        self.compile = compile
        self.traces: dict[str, Any] = {}
        self._apart: dict[str, bool] = {}
        self._whole: set[str] = set()
        self._asked: dict[str, str | None] = {}
        self._task_models: dict[str, Stage1] = {}
        self._merged: str | None = None
        self._packs = Packs()
        self._voices: dict[str, Voice] = {}

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "nano", *, task: str | Sequence[str] | None = None, variant: str | None = None,
        revision: str | None = None, device: str = "auto", dtype: str | torch.dtype = "float32",
        compat: str | None = None, compile: bool = False, local_files_only: bool = False,
    ) -> Metis:  # fmt: skip
        """Load a system.

        Args:
            name: ``nano`` (ships with the library), ``debug`` (random weights), the folder of a system, or the
                published weights: ``amphion/metis`` or a folder in the released layout, with ``@lora``, ``@full``,
                ``@released`` or ``@REVISION`` behind it for what the arguments below say.
            task: load what these need (tts, vc, tse, se, l2s, omni, base); by default everything of a system of
                ours, and of the published weights what is used, when it is used.
            variant: of published tasks, ``full`` or ``lora``; by default what was published for them.
            revision: of the published weights.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
            dtype: ``float32`` or ``bfloat16`` (transformers only; codecs stay in fp32).
            compat: ``released`` for the wiring of the released code.
            compile: compile the passes of stage 1 and 2 at their first use (minutes); on CUDA they become graphs.
            local_files_only: never ask the hub.

        Raises:
            MetisError: unknown name, or a damaged or incomplete checkpoint.
        """
        where, kind = pick_device(device), pick_dtype(dtype)
        store: Folder | Random | Released
        if str(name) in ("debug", "random-nano", "random-paper"):
            store = Random(str(name).removeprefix("random-"), kind)
        elif own_system(name):
            store = Folder(name, kind)
        else:
            from metis_lib.released import Released

            store = Released(name, revision=revision, dtype=kind, local_files_only=local_files_only)
            compat = compat or store.compat
        self = cls(store, where, compat=compat, compile=compile)
        if variant is not None and task is None and not isinstance(store, Folder):
            raise MetisError("say which task the variant is of: task=...")
        if task is not None:
            for one in [task] if isinstance(task, str) else task:
                self.load_task(one, variant)
        elif isinstance(store, Folder):
            for part in PARTS:
                if part != "lips":
                    getattr(self, part)
        return self

    def load_task(self, task: str, variant: str | None = None) -> None:
        """Load a task and all that it needs, sharing what is there; MetisError before anything is loaded."""
        self.store.require(task, variant)
        self._asked[task] = variant
        self._task_models.pop(task, None)
        self.load_all(task)

    def load_all(self, task: str) -> None:
        """Load what a task needs, as :meth:`load_task` does, if it is not there yet."""
        for part in (*NEEDS.get(task, ("ssl", "semantic", "acoustic")), "stage2_layer1", "stage2_full"):
            getattr(self, part)
        if (model := self._model_for(task)) not in self._task_models:
            self.task_model(model)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that this system has weights for."""
        return self.store.tasks

    @property
    def limits(self) -> Limits:
        """Where long work is divided."""
        return SMALL if self._small else Limits()

    @property
    def _small(self) -> bool:
        return not self.compat and self.ssl.config.hidden_size < 512

    def __getattr__(self, name: str) -> Any:
        """Parts, at their first use."""
        if name == "phones":
            self.phones = self.store.phones()
        elif name == "listener":
            head = self.store.phone_head().to(self.device)
            self.listener = Listener(self.ssl, self.semantic, getattr(self, "acoustic_decoder"), head)  # noqa: B009
        elif name == "acoustic_decoder" and "acoustic" in self.__dict__:
            return self.acoustic
        elif name in PARTS or name == "acoustic_decoder":
            part = self._ready(freeze(self.store.part(name).to(self.device)))
            setattr(self, name, part)
            if name == "acoustic":
                self.acoustic_decoder = self.acoustic
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    def task_model(self, name: str) -> Stage1:
        """Stage 1 as fine-tuned for a task, LoRA folded in; ``base`` is the pre-trained one.

        Of a large stage 1 (the published one) there is one copy, which the LoRA weights of the tasks take turns in: a
        model got earlier then refuses to run until it is asked for again.
        """
        model = self._held(name)
        self._take_turn(name)
        return model

    def _held(self, name: str) -> Stage1:
        """A task's model for what LoRA leaves alone: nobody loses a turn, so that a thread may prepare while another
        generates."""
        if name not in self._task_models:
            self._task_models[name] = self._build(name)
        return self._task_models[name]

    def _build(self, name: str) -> Stage1:
        if name == "base":
            return self.stage1
        config, added = self.store.task(name, self._asked.get(name))
        self._apart[name] = config.apart
        plain = {key: value for key, value in added.items() if ".lora_" not in key}
        whole = "to_logit.weight" in plain and not config.lora_rank  # everything was trained
        self._whole |= {name} if whole else set()
        sizes = self.store.config.stage1 if whole else self.stage1.config
        with torch.device("meta"):
            model = Stage1(replace(sizes, **config.stage1))
        state = plain if whole else {**self.stage1.state_dict(), **plain}
        fill(model, state, f"task {name} of {self.name}", assign=True)
        if config.lora_rank:
            lora = {key: value for key, value in added.items() if ".lora_" in key}
            adapt.check_lora(model, lora)
            if sum(p.numel() for p in self.stage1.parameters()) < LARGE:
                adapt.fold_lora(model, lora, copy=True)
            else:
                model._lora = lora  # type: ignore[assignment]
                model.diff_estimator.layers[0].register_forward_pre_hook(self._guard(name))
        return self._ready(model.to(self.device).eval().requires_grad_(False))

    def _ready(self, part: Any) -> Any:
        """A part prepared for inference."""
        quicken(part)
        if isinstance(part, (Stage1, Stage2)):
            part.diff_estimator.fuse(None if self.compile else self._packs)
            if self.compile:
                part.diff_estimator.compile_passes()
        return part

    def _guard(self, name: str) -> Callable[..., None]:
        def check(*_: Any) -> None:
            if self._merged != name:
                raise MetisError(f"another task's weights are folded in now; ask for task_model({name!r}) again")

        return check

    def _take_turn(self, name: str) -> None:
        """Fold the LoRA weights of a large task model into the shared base, those of another one out of it."""
        lora = getattr(self._task_models[name], "_lora", None)
        shares = name not in self._whole
        if not shares or self._merged == (name if lora else None):
            return
        if self._merged is not None:  # read again: taking a product off leaves rounding errors
            fresh = dict(self.store.part("stage1").named_parameters())
            for key, parameter in self.stage1.named_parameters():
                if key.rpartition(".")[0].endswith(adapt.LORA_TARGETS):
                    parameter.data.copy_(fresh[key])
        self._merged = None
        self._packs.forget()
        if lora:
            adapt.fold_lora(self._task_models[name], lora)
            self._merged = name

    def _model_for(self, task: str) -> str:
        """Whose weights do a task: its own, else Omni's (those that were asked for come first)."""
        can_omni = task in TASKS["omni"].mixture
        if task in self._asked or (not self._asked and task in self.tasks) or not can_omni:
            return task
        return "omni" if "omni" in self._asked or (not self._asked and "omni" in self.tasks) else task

    # ------------------------------------------------------------------ tokenizers

    def _hear(self, source: Source, shortest: float, longest: float) -> Tensor:
        """Any source as mono 24 kHz ``[S]`` with something to hear in it."""
        wav = audio.load(source, AUDIO_RATE, min_seconds=shortest, max_seconds=longest)
        if wav.double().std() < 10 ** (audio.SILENT_DB / 20):  # a voice would be made of the hiss
            name = source if isinstance(source, str | Path) else "recording"
            raise MetisError(f"{name}: the recording is silent (below {audio.SILENT_DB:g} dB RMS)")
        return wav

    def _hear_both(self, source: Source, shortest: float, longest: float) -> tuple[Tensor, Tensor]:
        """Any source at 24 kHz and at 16 kHz.  As released, the latter comes from the source itself."""
        wav = self._hear(source, shortest, longest)
        if self.compat and not isinstance(source, Tensor | np.ndarray):  # these are at 24 kHz
            return wav, audio.load(source, SSL_RATE)
        return wav, audio.resample(wav, AUDIO_RATE, SSL_RATE)

    @torch.no_grad()
    def features(self, wav: Tensor, sample_rate: int = AUDIO_RATE) -> Tensor:
        """Normalised SSL features ``[1, T, C]`` fp32 of samples ``[S]``."""
        wav = audio.resample(wav, sample_rate, SSL_RATE)
        feat, lengths = self.ssl.encode([wav.cpu()])  # filterbanks are float64, which not every device has
        return feat[:, : int(lengths[0])].float()

    @torch.no_grad()
    def ssl_tokens(self, features: Tensor) -> Tensor:
        """SSL tokens ``[1, T]`` of normalised features ``[1, T, C]``."""
        return self.semantic.quantize(features)[0]

    def tokens(self, source: Source) -> dict[str, Tensor]:
        """Both token streams of a recording: ``ssl [T]`` and ``acoustic [T', Q]`` (T' may be T + 1)."""
        wav = self._hear(source, SHORTEST_INPUT, LONGEST_SPOKEN)
        codes = self.acoustic.encode(wav[None].to(self.device))[0]
        return {"ssl": self.ssl_tokens(self.features(wav))[0], "acoustic": codes}

    def resynthesise(self, source: Source) -> Speech:
        """A recording through the acoustic codec and back, the same length: the ceiling of everything else."""
        wav = self._hear(source, SHORTEST_INPUT, LONGEST_SPOKEN)
        codes = self.acoustic.encode(wav[None].to(self.device))
        return self._speech(self.acoustic.decode(codes)[0], len(wav), {"task": "codec"})

    @torch.no_grad()
    def acoustic_tokens(
        self, tokens: Tensor, voice: tuple[Tensor, Tensor] | None = None, *, seed: int = 0, **options: Any
    ) -> Tensor:  # fmt: skip
        """SSL tokens ``[T]`` to codes ``[T, Q]`` by stage 2, after the tokens ``[P]`` and codes ``[P, Q]`` of a
        voice.  ``options``: those of stage 2 (see :meth:`generate`)."""
        chosen, tokens = self.options("tts", **options), tokens.to(self.device)
        nothing, prompt = torch.zeros(0), None
        if voice is not None:  # the streams of :meth:`tokens` may differ by a frame
            frames = min(map(len, voice))
            said, codes = (stream[:frames].to(self.device) for stream in voice)
            prompt = Voice(nothing, said, codes, nothing)
        request = Request(len(tokens), torch.Generator().manual_seed(seed), prompt)
        nets, listener = (self.stage2_layer1, self.stage2_full), self.listener if chosen.stage2_candidates > 1 else None
        return decode(*nets, [request], [tokens], chosen, listener=listener)[0][0]

    @torch.no_grad()
    def decode_tokens(self, tokens: Tensor, prompt: Source | None = None, *, seed: int = 0, **options: Any) -> Speech:
        """SSL tokens ``[T]`` to speech by stage 2 and codec, in the voice of a prompt: what every task ends with.

        ``options``: those of stage 2 (see :meth:`generate`).
        """
        voice = None if prompt is None else self.voice(prompt)
        codes = self.acoustic_tokens(tokens, voice and (voice.tokens, voice.codes), seed=seed, **options)
        wav = self.acoustic_decoder.decode_long(codes[None])[0]
        return self._speech(wav, len(wav), {"task": "stage2", "seed": seed})

    def voice(self, prompt: Source) -> Voice:
        """A prompt of 0.5 to 20 s (as released: of any length), encoded; one that was encoded lately is remembered.

        Its streams are cut to the frames that both have.  As released they are not: there is one acoustic frame more.
        """
        wav, wav_16k = self._hear_both(prompt, SHORTEST_PROMPT, LONGEST_INPUT if self.compat else LONGEST_PROMPT)
        if self._small:  # as the speech that it was trained on: stage 2 follows the level
            wav = torch.from_numpy(audio.level(audio.trim(wav.numpy(), AUDIO_RATE)))
            wav_16k = audio.resample(wav, AUDIO_RATE, SSL_RATE)
        data = torch.cat([wav, wav_16k]).numpy().tobytes()
        key = hashlib.sha256(data + str((self.compat, id(self.semantic))).encode()).hexdigest()
        if key not in self._voices:
            features = self.features(wav_16k, SSL_RATE)
            tokens, codes = self.ssl_tokens(features)[0], self.acoustic.encode(wav[None].to(self.device))[0]
            if not self.compat:
                frames = min(len(tokens), len(codes), (len(wav_16k) - REACH) // HOP)
                tokens, codes, wav_16k = tokens[:frames], codes[:frames], wav_16k[: frames * HOP]
            while len(self._voices) >= 8:
                del self._voices[next(iter(self._voices))]
            self._voices[key] = Voice(wav_16k, tokens, codes, features[0, : len(tokens)])
        return self._voices[key]

    # ------------------------------------------------------------------ tasks

    def enhance(self, source: Source, **options: Any) -> Speech:
        """Speech enhancement: the same words in the same voice without noise, room and band limit.

        Args:
            source: path, :class:`Speech`, ``(array, rate)`` or a 24 kHz tensor; from 0.2 s.
            options: see :meth:`generate`.

        Returns:
            24 kHz speech as long as the input.
        """
        return self.generate("se", [{"source": source}], **options)[0]

    def speak(self, text: str, *, prompt: Source, prompt_text: str, language: str = "en", **options: Any) -> Speech:
        """Zero-shot text-to-speech: ``text`` in the voice of ``prompt``.

        Args:
            text: what to say; more than a quarter of a minute is said sentence by sentence.
            prompt: a recording of the voice, 0.5 to 20 s.
            prompt_text: what is said in it.
            language: of both (``prompt_language`` for the prompt, if it is another).
            options: ``seconds`` (length of the result), ``like`` (a recording as long as the result shall be); by
                default the prompt's speaking rate.  More in :meth:`generate`.

        Raises:
            MetisError: nothing to say, unknown language, unusable prompt, or a length beyond a minute.
        """
        about = {key: options.pop(key) for key in ("seconds", "like", "prompt_language") if key in options}
        item = {"text": text, "prompt": prompt, "prompt_text": prompt_text, "language": language}
        return self.generate("tts", [item | about], **options)[0]

    def convert(self, source: Source, *, prompt: Source, **options: Any) -> Speech:
        """Voice conversion: the words of ``source`` in the voice of ``prompt``, as long as the source."""
        return self.generate("vc", [{"source": source, "prompt": prompt}], **options)[0]

    def extract(
        self, source: Source, *, prompt: Source, text: str | None = None, prompt_text: str | None = None,
        language: str = "en", **options: Any,
    ) -> Speech:  # fmt: skip
        """Target speaker extraction: of several voices in ``source``, that of ``prompt``.

        Text-guided (Omni only): ``text`` is what that voice says, ``prompt_text`` what it says in the prompt.
        """
        item = {"source": source, "prompt": prompt}
        if text is not None or prompt_text is not None:
            item |= {"text": text or "", "prompt_text": prompt_text or "", "language": language}
        return self.generate("tse", [item], **options)[0]

    def voice_lips(self, video: Any, *, prompt: Source, **options: Any) -> Speech:
        """Lip-to-speech: what silent lips say, in the voice of ``prompt``.

        ``video``: a file at 25 fps with a face, or mouth crops uint8 ``[N, 96, 96]``.
        """
        return self.generate("l2s", [{"video": video, "prompt": prompt}], **options)[0]

    def go_on(self, prompt: Source, *, seconds: float = 3.0, **options: Any) -> Speech:
        """The pre-trained model alone: go on speaking after ``prompt``, with no condition (Metis section 3.2)."""
        return self.generate("base", [{"prompt": prompt, "seconds": seconds}], **options)[0]

    def generate(
        self, task: str, items: Sequence[Mapping[str, Any]], *, seed: int = 0, return_iterations: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Do a task for many items, those of like kind and length together.

        Args:
            task: tts, vc, tse, se, l2s or base.
            items: arguments of the task's own method, by name; ``seed`` of its own if an item has one.
            seed: the same seed gives an item the same samples, alone or in any batch.
            return_iterations: return pairs of the speech and how it was decided, ``{"ssl": trace, "acoustic":
                [a trace a layer]}``; where draws were joined, how the first was.
            options: ``steps``, ``cfg``, ``rescale``, ``temperature``, ``choice_temperature``, ``top_fraction`` or
                ``top_k``, ``schedule`` of stage 1; the same with ``stage2_`` in front (``stage2_steps``: one number a
                layer, 1 for the rest); ``candidates`` (draws of the SSL tokens of a text, and of conversion) and
                ``stage2_candidates`` (draws of the acoustic codes), of which the system keeps what it understands
                best; ``batch_frames``.

        Returns:
            A list of 24 kHz :class:`Speech`.

        Raises:
            MetisError: of the first item that cannot be used; see the methods of the tasks.
        """
        chosen = [self.options(task, item, **options) for item in items or ({},)]  # a text brings guidance with it
        jobs = [self.job(task, {"seed": seed, **item}, one) for item, one in zip(items, chosen, strict=False)]
        for settings in dict.fromkeys(chosen):
            self.run([job for job, one in zip(jobs, chosen, strict=False) if one == settings], settings)
        spoken = [self._finish(job) for job in jobs]
        return spoken if return_iterations else [speech for speech, _ in spoken]

    def options(self, task: str, item: Mapping[str, Any] | None = None, **given: Any) -> Options:
        """The decoding options of a task, with what is ``given`` (see :meth:`generate`) instead of the defaults."""
        if task not in SOURCES:
            raise MetisError(f"unknown task {task!r}; choose one of {', '.join(SOURCES)}")
        by_text = task == "tse" and bool((item or {}).get("text"))
        decode = replace(TASKS[task].decode, cfg=2.5) if by_text else TASKS["tts" if task == "base" else task].decode
        if task == "l2s" and self.compat:  # its script is missing; the call's own default hides the 0 of the function
            decode = replace(decode, cfg=2.5)
        paper = self.compat or self.store.config == preset("paper")
        if not self.compat:
            asked = {key: value for key, value in given.items() if value is not None}
            usual = {**self.store.decode.get("any", {}), **self.store.decode.get(task, {})}
            for stage in ("", "stage2_"):  # the two say the same thing
                if f"{stage}top_fraction" in asked:
                    usual.pop(f"{stage}top_k", None)
            given = usual | asked
        return Options.of(decode, bool(self.compat), RELEASED_STEPS if paper else Options.stage2_steps, given)

    def job(self, task: str, item: Mapping[str, Any], options: Options) -> Job:
        """What has to be generated for one item of :meth:`generate`; MetisError where it cannot be used."""
        item = dict(item)
        seed = item.pop("seed", 0)
        if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
            raise MetisError(f"the seed is a whole number from 0 to 2**63 - 1, got {seed!r}")
        seed = int(seed)
        needed, optional = SOURCES[task]
        missing = [key for key in needed if item.get(key) is None]
        model = item.pop("by", None) or self._model_for(task)
        unknown = sorted(set(item) - {*needed, *optional})
        if missing or unknown:
            what = f"lacks {missing[0]!r}" if missing else f"has an unknown {unknown[0]!r}"
            raise MetisError(f"an item of the task {task} {what}; it takes {', '.join((*needed, *optional))}")
        for key in ("text", "prompt_text", "language", "prompt_language"):
            if not isinstance(item.get(key), str | None):
                raise MetisError(f"{key} must be text, got {item[key]!r:.40}")
        if not isinstance(item.get("seconds"), Real | None) or not math.isfinite(item.get("seconds") or 0):
            raise MetisError(f"seconds must be a number, got {item['seconds']!r}")
        if item.get("text") is not None and task == "tse":
            model = "omni"
        info = {"task": task, "by": model, "seed": seed, "steps": options.stage1.steps, "cfg": options.stage1.cfg}
        generator = torch.Generator().manual_seed(seed)
        make: Callable[..., Job] = getattr(self, f"_{like(task)}")
        with torch.no_grad():
            return make(generator=generator, info=info, **item)

    def _se(self, source: Source, **more: Any) -> Job:
        wav, wav_16k = self._hear_both(source, SHORTEST_INPUT, LONGEST_INPUT)
        return self._heard(wav, wav_16k, None, **more)

    def _vc(self, source: Source, prompt: Source, **more: Any) -> Job:
        voice = self.voice(prompt)
        wav, wav_16k = self._hear_both(source, SHORTEST_INPUT, LONGEST_INPUT)
        return self._heard(wav, wav_16k, voice, **more)

    def _tse(
        self, source: Source, prompt: Source, text: str | None = None, prompt_text: str | None = None,
        language: str = "en", **more: Any,
    ) -> Job:  # fmt: skip
        if text is None and prompt_text is None:
            return self._vc(source, prompt, **more)
        if not text or not prompt_text:
            raise MetisError("text-guided extraction needs both text and prompt_text")
        if not self._held(more["info"]["by"]).config.use_phones:  # a task of one's own
            raise MetisError(f"the task {more['info']['task']} takes no text")
        said, wanted = (self._phones(words, language) for words in (prompt_text, text))
        voice = self.voice(prompt)
        wav, wav_16k = self._hear_both(source, SHORTEST_INPUT, LONGEST_INPUT if self.compat else Limits().whole)
        return self._heard(wav, wav_16k, voice, texts=(said, wanted), **more)

    def _heard(
        self, wav: Tensor, wav_16k: Tensor, voice: Voice | None, generator: torch.Generator, info: dict[str, Any],
        texts: tuple[Tensor, Tensor] | None = None,
    ) -> Job:  # fmt: skip
        """A task whose condition is heard: features of prompt and source."""
        self._held(info["by"])
        if len(wav) > self.limits.whole * AUDIO_RATE and not self.compat and texts is None:
            return Job([], len(wav), info, self._windows(wav_16k, voice, generator, info))
        condition, frames = self._condition(wav_16k, voice, info["by"])
        start = 0 if voice is None else len(voice.tokens)
        more = {} if texts is None else self._texts(*texts, start, frames, info["by"])
        request = Request(frames, generator, voice, condition, clear=info["task"] == "vc", **more)
        return Job([request], None if self.compat else len(wav), info)

    def _condition(self, wav_16k: Tensor, voice: Voice | None, model: str) -> tuple[Tensor, int]:
        """Features ``[P+T, C]`` of prompt and source, and T; encoded apart or in one pass, as the model learned."""
        if voice is not None and self._apart[model]:
            own = self.features(wav_16k, SSL_RATE)[0]
            return torch.cat([voice.features, own]), len(own)
        before, start = (wav_16k[:0], 0) if voice is None else (voice.wav_16k, len(voice.tokens))
        condition = self.features(torch.cat([before, wav_16k]), SSL_RATE)[0]
        return condition, len(condition) - start

    def _windows(
        self, wav_16k: Tensor, voice: Voice | None, generator: torch.Generator, info: dict[str, Any]
    ) -> Generator[tuple[Request, int], Made | None, None]:
        """Requests for windows of a long source; what was made of the last one is sent in.

        Stage 1 hears windows that overlap, each cut in the middle of what it shares; stage 2 goes on from the end of
        the window before, so that voice and phase run through.
        """
        total, first, cut, window = count_frames(len(wav_16k)), 0, 0, self.limits.window
        done: Made | None = None
        while True:
            last = min(first + window, total)
            piece = wav_16k[HOP * first : HOP * last + REACH]
            condition, frames = self._condition(piece, voice, info["by"])
            request = Request(
                frames, generator, voice, condition, skip=cut - first, clear=info["task"] == "vc",
                carry=None if done is None else (done.tokens[-CARRY:], done.codes[-CARRY:]),
            )  # fmt: skip
            after = first + window - OVERLAP
            end = last if last == total else after + OVERLAP // 2
            done = yield request, end - cut
            if last == total:
                return
            first, cut = after, end

    def _phones(self, text: str, language: str) -> Tensor:
        return torch.tensor(self.phones.encode(text, language), device=self.device)

    def _texts(self, said: Tensor, wanted: Tensor, start: int, frames: int, model: str) -> dict[str, Any]:
        """Phones of prompt and text, and spread over the frames as the model times them, each by itself: silence at
        the ends of a recording belongs to its end phones."""
        times = self._held(model).times_of
        hints = [spread(words, times(words), n) for words, n in ((said, start), (wanted, frames)) if len(words)]
        return {"phones": torch.cat([said, wanted]), "hint": torch.cat(hints), "said": len(said)}

    def _tts(
        self, text: str, prompt: Source, prompt_text: str, generator: torch.Generator, info: dict[str, Any],
        language: str = "en", prompt_language: str | None = None, seconds: float | None = None,
        like: Source | None = None,
    ) -> Job:  # fmt: skip
        said, wanted = self._phones(prompt_text, prompt_language or language), self._phones(text, language)
        voice = self.voice(prompt)
        start = len(voice.tokens)
        if like is not None:
            seconds = len(self._hear(like, 0.02, LONGEST_SPOKEN)) / AUDIO_RATE

        def length(words: str, phones: Tensor) -> int:
            if seconds is not None:
                return int(seconds * FRAME_RATE) if self.compat else round(seconds * FRAME_RATE)
            if self.compat or self.phones.size > 512:  # the released table: by bytes, as released
                return start * len(words.encode()) // max(len(prompt_text.encode()), 1)
            before, after = (float(self._held(info["by"]).times_of(one).sum()) for one in (said, phones))
            return max(25, round(start * after / max(before, 1e-6)))  # at the rate of the prompt

        parts = [(text, wanted)]
        if seconds is None and not self.compat and length(text, wanted) > self.limits.said * FRAME_RATE:
            parts = [(words, self._phones(words, language)) for words in self._gather(text, language, length)]
        requests = []
        for words, phones in parts:
            frames = length(words, phones)
            if not 1 <= frames <= LONGEST_SPOKEN * FRAME_RATE:
                raise MetisError(
                    f"cannot speak for {frames / FRAME_RATE:g} s; shorten the text or set seconds (0.02 to 60)"
                )
            hint = self._texts(said, phones, start, frames, info["by"])
            requests.append(Request(frames, generator, voice, **hint))
            generator = torch.Generator().manual_seed(generator.initial_seed() + 1)
        return Job(requests, None, info | {"text": text})

    def _gather(self, text: str, language: str, length: Callable[[str, Tensor], int]) -> list[str]:
        """Sentences of a text, as many together as are said at once."""
        groups: list[str] = []
        for sentence in sentences(text, language):
            if not any(character.isalnum() for character in sentence):
                continue
            both = f"{groups[-1]} {sentence}" if groups else sentence
            if groups and length(both, self._phones(both, language)) <= self.limits.said * FRAME_RATE:
                groups[-1] = both
            else:
                groups.append(sentence)
        return groups

    def _l2s(self, video: Any, prompt: Source, generator: torch.Generator, info: dict[str, Any]) -> Job:
        voice = self.voice(prompt)
        seen = self.lip_features(video)
        nothing = seen.new_zeros(len(voice.tokens), seen.shape[1])  # nothing is seen of the prompt
        return Job([Request(len(seen), generator, voice, torch.cat([nothing, seen]))], None, info)

    def lip_features(self, video: Any) -> Tensor:
        """Features ``[2N, C]`` at 50 Hz of N pictures: a film, or mouth crops uint8 ``[N, 96, 96]`` (also as .npz)."""
        if isinstance(video, (str, Path)):
            from metis_lib.data.video import read_lips

            video = read_lips(video, longest=LONGEST_SPOKEN)
        crops = torch.as_tensor(video)
        if crops.dim() != 3 or crops.dtype != torch.uint8:
            raise MetisError(f"mouth crops must be uint8 [N, 96, 96], got {crops.dtype} {tuple(crops.shape)}")
        if 2 * len(crops) > LONGEST_SPOKEN * FRAME_RATE:
            seconds = 2 * len(crops) / FRAME_RATE
            raise MetisError(f"the video has {seconds:g} s; at most {LONGEST_SPOKEN:g} s, cut it first")
        return upsample(self.lips(crops[None].to(self.device)))[0]

    def _base(
        self, prompt: Source, generator: torch.Generator, info: dict[str, Any], seconds: float | None = None
    ) -> Job:
        seconds = 3.0 if seconds is None else seconds
        if not 0.02 <= seconds <= LONGEST_SPOKEN:
            raise MetisError(f"cannot go on for {seconds:g} s; seconds lie in 0.02..{LONGEST_SPOKEN:g}")
        return Job([Request(round(seconds * FRAME_RATE), generator, self.voice(prompt))], None, info)

    # ------------------------------------------------------------------ generation

    @torch.no_grad()
    def run(self, jobs: Sequence[Job], options: Options, *, noise: Noise | None = None) -> Sequence[Job]:
        """Generate what jobs ask for, in batches; sources in windows one after the other."""
        for model in dict.fromkeys(job.info["by"] for job in jobs):
            mine = [job for job in jobs if job.info["by"] == model]
            stage1 = self.task_model(model)

            def make(requests: list[Request], stage1: Stage1 = stage1) -> list[Made]:
                listener = self.listener if options.draws(requests) > 1 else None
                nets = stage1, self.stage2_layer1, self.stage2_full
                return run(*nets, requests, options, noise=noise, listener=listener)

            short = [(job, request) for job in mine for request in job.requests]
            results: dict[int, Made] = {}
            draws = options.draws(request for _, request in short)
            limit = 1 if options.released else options.batch_frames // draws  # as released: one by one
            for batch in batches([request for _, request in short], limit):
                results |= dict(zip(batch, make([short[i][1] for i in batch]), strict=True))
            for i, (job, _) in enumerate(short):
                job.made.append(results[i])
            for job in mine:
                done: Made | None = None
                while job.windows is not None:
                    try:
                        request, count = job.windows.send(done)
                    except StopIteration:
                        break
                    found = make([request])[0]
                    done = Made(found.tokens[:count], found.codes[:count], found.traces)
                    if job.made:
                        job.made[-1].traces = {}
                    job.made.append(done)
        return jobs

    @torch.no_grad()
    def _finish(self, job: Job) -> tuple[Speech, dict[str, Any]]:
        """The speech of a job that was run, and how it was decided."""
        if job.windows is not None:
            codes = [torch.cat([made.codes for made in job.made])]
        else:
            codes = [made.codes for made in job.made]
        waves = [self.acoustic_decoder.decode_long(part)[0].float().cpu() for part in (c[None] for c in codes)]
        pause = torch.zeros(round(PAUSE * AUDIO_RATE))
        wav = torch.cat([piece for part in waves for piece in (part, pause)][:-1])
        self.traces = job.made[-1].traces
        length = len(wav) if job.samples is None else job.samples
        return self._speech(wav, length, job.info), self.traces

    def _speech(self, wav: Tensor, length: int, info: dict[str, Any]) -> Speech:
        """Samples cut or padded with zeros to ``length``."""
        wav = wav[:length].float().cpu()
        return Speech(torch.nn.functional.pad(wav, (0, length - len(wav))), AUDIO_RATE, {"model": self.name, **info})
