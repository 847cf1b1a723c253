"""What a notebook calls: ``Metis.from_pretrained("nano").enhance("noisy.wav")``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metis_lib import audio
from metis_lib.audio import Source, Speech
from metis_lib.checkpoints import TaskConfig, fill, load_config_and_card, load_state, locate
from metis_lib.config import (
    AUDIO_RATE,
    FRAME_RATE,
    SSL_RATE,
    AcousticCodecConfig,
    DecodeSettings,
    SemanticCodecConfig,
    SSLConfig,
    Stage1Config,
    Stage2Config,
    preset,
)
from metis_lib.errors import MetisError
from metis_lib.models import adapt
from metis_lib.models.masked import MaskedTrace
from metis_lib.models.stage1 import Stage1, stretch
from metis_lib.models.stage2 import Stage2
from metis_lib.tasks import TASKS, task
from metis_lib.tasks.tts import target_frames
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.tokenizers.text import PhoneTokenizer

SHORTEST_PROMPT = 0.5
SHORTEST_INPUT = 0.2
LONGEST_PROMPT = 20.0
LONGEST_INPUT = 60.0
"""Limits in seconds.  Attention is quadratic in length; longer recordings have to be cut first."""

STAGE2_STEPS = (20, 10) + (1,) * 10
"""Decoding steps of the acoustic layers (the released scripts take 40, 16, 1, 1, ...)."""
STAGE2 = DecodeSettings(cfg=2.5, temperature=1.5)
PARTS: dict[str, tuple[Any, Any, str]] = {
    "ssl": (SSLConfig, SSLEncoder, "ssl"),
    "semantic": (SemanticCodecConfig, SemanticCodec, "semantic_codec"),
    "acoustic": (AcousticCodecConfig, AcousticCodec, "acoustic_codec"),
    "stage1": (Stage1Config, Stage1, "stage1"),
    "stage2_layer1": (Stage2Config, Stage2, "stage2_layer1"),
    "stage2_full": (Stage2Config, Stage2, "stage2_full"),
}
"""The parts of a system: configuration, module and folder of each."""


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA, else Apple's MPS, else the CPU."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MetisError(f"no device {device!r} on this machine; use auto, cpu, cuda, cuda:1 or mps") from error


class Metis:
    """A whole system: tokenizers, stage 1 with its tasks, stage 2, codec.

    Attributes:
        traces: decoder iterations of the last call: ``ssl`` (a trace) and ``acoustic`` (one a layer).
    """

    ssl: SSLEncoder
    semantic: SemanticCodec
    acoustic: AcousticCodec
    stage1: Stage1
    stage2_layer1: Stage2
    stage2_full: Stage2

    def __init__(
        self,
        parts: dict[str, Any],
        tasks: dict[str, tuple[TaskConfig, dict[str, Tensor]]],
        name: str,
        device: torch.device,
    ) -> None:
        """``parts`` are modules by the names above; ``tasks`` are what fine-tuning added to stage 1."""
        self.name, self.device = name, device
        self.phones = PhoneTokenizer()
        for part, module in parts.items():
            setattr(self, part, module.to(device).eval())
        self._added = tasks
        self._task_models: dict[str, Stage1] = {}
        self.traces: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, name: str | Path = "nano", *, device: str = "auto") -> Metis:
        """Load a system.

        Args:
            name: ``nano`` (ships with the library), ``debug`` (random weights) or the folder of a system.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

        Raises:
            MetisError: unknown name, or a damaged or incomplete checkpoint.
        """
        where = pick_device(device)
        if str(name) == "debug":
            return cls._debug(where)
        folder = locate(name)
        parts, tasks = {}, {}
        for part, (config_class, module_class, at) in PARTS.items():
            parts[part] = module_class(load_config_and_card(folder / at, config_class)[0])
            fill(parts[part], load_state(folder / at), folder / at)
        parts["ssl"].set_stats(**load_state(folder / "ssl", "stats"))
        for path in sorted((folder / "tasks").glob("*/config.json")):
            config, _ = load_config_and_card(path.parent, TaskConfig)
            tasks[config.task] = (config, load_state(path.parent))
        return cls(parts, tasks, str(name), where)

    @classmethod
    def _debug(cls, device: torch.device) -> Metis:
        """Random weights of the debug preset, the same every time; all tasks are there."""
        system = preset("debug")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            parts = {part: module_class(getattr(system, part)) for part, (_, module_class, _) in PARTS.items()}
            tasks = {}
            for name, entry in TASKS.items():
                config = TaskConfig(name, entry.changes(system, phone_vocab=PhoneTokenizer().size))
                added = Stage1(replace(system.stage1, **config.stage1)).state_dict()
                base = set(parts["stage1"].state_dict())
                tasks[name] = (config, {key: value for key, value in added.items() if key not in base})
        return cls(parts, tasks, "debug", device)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that this system has weights for."""
        return tuple(self._added)

    def task_model(self, name: str) -> Stage1:
        """Stage 1 as fine-tuned for a task, LoRA folded in; built on first use."""
        if name not in self._task_models:
            if name not in self._added:
                have = ", ".join(self._added) or "none"
                raise MetisError(f"the system {self.name!r} has no weights for the task {name!r} (it has: {have})")
            config, added = self._added[name]
            model = Stage1(replace(self.stage1.config, **config.stage1))
            lora = {key: value for key, value in added.items() if ".lora_" in key}
            plain = {key: value for key, value in added.items() if ".lora_" not in key}
            fill(model, {**self.stage1.state_dict(), **plain}, f"task {name} of {self.name}")
            if config.lora_rank:
                adapt.add_lora(model, config.lora_rank)
                adapt.load_lora(model, lora)
                adapt.merge_lora(model)
            self._task_models[name] = model.to(self.device).eval()
        return self._task_models[name]

    def _hear(self, source: Source, shortest: float, longest: float) -> Tensor:
        """Any source as mono 24 kHz ``[S]``."""
        return audio.load(source, AUDIO_RATE, min_seconds=shortest, max_seconds=longest)

    @torch.no_grad()
    def features(self, wav_24k: Tensor) -> Tensor:
        """Normalised SSL features ``[1, T, C]`` of 24 kHz samples ``[S]``."""
        wav = audio.resample(wav_24k, AUDIO_RATE, SSL_RATE)
        feat, lengths = self.ssl.encode([wav.cpu()])  # filterbanks are float64, which not every device has
        return feat[:, : int(lengths[0])]

    @torch.no_grad()
    def ssl_tokens(self, features: Tensor) -> Tensor:
        """SSL tokens ``[1, T]`` of normalised features ``[1, T, C]``."""
        return self.semantic.quantize(features)[0]

    def tokens(self, source: Source) -> dict[str, Tensor]:
        """Both token streams of a recording: ``ssl [T]`` and ``acoustic [T', Q]`` (T' may be T + 1)."""
        wav = self._hear(source, SHORTEST_INPUT, LONGEST_INPUT)
        codes = self.acoustic.encode(wav[None].to(self.device))[0]
        return {"ssl": self.ssl_tokens(self.features(wav))[0], "acoustic": codes}

    def resynthesise(self, source: Source) -> Speech:
        """A recording through the acoustic codec and back, the same length: the ceiling of everything else."""
        wav = self._hear(source, SHORTEST_INPUT, LONGEST_INPUT)
        out = self.acoustic.decode(self.acoustic.encode(wav[None].to(self.device)))[0]
        return self._speech(out, len(wav), {"task": "codec"})

    def enhance(
        self, source: Source, *, seed: int = 0, steps: int | None = None, temperature: float | None = None
    ) -> Speech:
        """Speech enhancement: the same words in the same voice without noise, room and band limit.

        Args:
            source: path, :class:`Speech`, ``(array, rate)`` or a 24 kHz tensor; 0.2 to 60 s.
            seed: the same seed gives the same samples.
            steps, temperature: of stage 1 (defaults of the task).

        Returns:
            24 kHz speech as long as the input.
        """
        settings = self._settings("se", steps, None, temperature)
        generator = torch.Generator().manual_seed(seed)
        wav = self._hear(source, SHORTEST_INPUT, LONGEST_INPUT)
        feat = self.features(wav)
        none = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        trace = self.task_model("se").generate(
            none, feat.shape[1], condition=feat, settings=settings, generator=generator, return_iterations=True
        )
        empty = none[..., None].expand(1, 0, self.acoustic.config.num_quantizers)
        out = self._acoustics(trace, empty, none, generator)
        return self._speech(out, len(wav), {"task": "se", "seed": seed, "steps": settings.steps})

    def speak(
        self,
        text: str,
        *,
        prompt: Source,
        prompt_text: str,
        language: str = "en",
        seconds: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        cfg: float | None = None,
        temperature: float | None = None,
    ) -> Speech:
        """Zero-shot text-to-speech: ``text`` in the voice of ``prompt``.

        Args:
            text: what to say.
            prompt: a recording of the voice, 0.5 to 20 s.
            prompt_text: what is said in it.
            seconds: length of the result; without it, the prompt's speaking rate.
            steps, cfg, temperature: of stage 1 (defaults of the task).

        Raises:
            MetisError: nothing to say, unknown language, unusable prompt, or a length beyond a minute.
        """
        settings = self._settings("tts", steps, cfg, temperature)
        generator = torch.Generator().manual_seed(seed)
        said, wanted = (self.phones.encode(words, language) for words in (prompt_text, text))
        wav = self._hear(prompt, SHORTEST_PROMPT, LONGEST_PROMPT)
        before = self.ssl_tokens(self.features(wav))
        codes = self.acoustic.encode(wav[None].to(self.device))
        start = min(before.shape[1], codes.shape[1])  # streams of one recording may differ by a frame
        before, codes = before[:, :start], codes[:, :start]
        frames = target_frames(start, len(said), len(wanted)) if seconds is None else round(seconds * FRAME_RATE)
        if not 1 <= frames <= LONGEST_INPUT * FRAME_RATE:
            raise MetisError(
                f"cannot speak for {frames / FRAME_RATE:g} s; shorten the text or set seconds (0.02 to 60)"
            )
        said_ids, wanted_ids = (torch.tensor([ids], device=self.device) for ids in (said, wanted))
        trace = self.task_model("tts").generate(
            before,
            frames,
            phones=torch.cat([said_ids, wanted_ids], dim=1),
            hint=torch.cat([stretch(said_ids, start), stretch(wanted_ids, frames)], dim=1),
            settings=settings,
            generator=generator,
            return_iterations=True,
        )
        out = self._acoustics(trace, codes, before, generator)
        info = {"task": "tts", "seed": seed, "steps": settings.steps, "cfg": settings.cfg, "text": text}
        return self._speech(out, out.shape[-1], info)

    def _settings(self, name: str, steps: int | None, cfg: float | None, temperature: float | None) -> DecodeSettings:
        given: dict[str, Any] = {"steps": steps, "cfg": cfg, "temperature": temperature}
        if steps is not None and steps < 1:
            raise MetisError(f"steps must be at least 1, not {steps}")
        if any(value is not None and value < 0 for value in given.values()):
            raise MetisError("cfg and temperature must not be negative")
        return replace(task(name).decode, **{key: value for key, value in given.items() if value is not None})

    def _acoustics(self, trace: MaskedTrace, codes: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
        """Stage 2 and codec: samples ``[S]`` of the target after an acoustic prompt ``codes [1, P, Q]``."""
        semantic = torch.cat([before, trace.tokens], dim=1)
        traces: list[MaskedTrace] = []
        first = self.stage2_layer1.generate(
            semantic,
            codes,
            steps=STAGE2_STEPS[:1],
            settings=replace(STAGE2, cfg=0.0),
            generator=generator,
            traces=traces,
        )
        rest = self.stage2_full.generate(
            semantic, codes, first_layer=first, steps=STAGE2_STEPS, settings=STAGE2, generator=generator, traces=traces
        )
        self.traces = {"ssl": trace, "acoustic": traces}
        return self.acoustic.decode(rest)[0]

    def _speech(self, wav: Tensor, length: int, info: dict[str, Any]) -> Speech:
        """Samples cut or padded with zeros to ``length``."""
        wav = wav[:length].float().cpu()
        return Speech(torch.nn.functional.pad(wav, (0, length - len(wav))), AUDIO_RATE, {"model": self.name, **info})
