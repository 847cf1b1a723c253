"""Where the parts of a system come from: a folder of ours, random weights (released files: :mod:`metis_lib.released`).

A store hands out parts one by one, so that a pipeline loads no more than its tasks need.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_lib.checkpoints import TaskConfig, fill, load_config_and_card, load_state, locate
from metis_lib.config import (
    AcousticCodecConfig,
    LipConfig,
    SemanticCodecConfig,
    SSLConfig,
    Stage1Config,
    Stage2Config,
    SystemConfig,
    preset,
)
from metis_lib.errors import MetisError
from metis_lib.models.stage1 import Stage1
from metis_lib.models.stage2 import Stage2
from metis_lib.tasks import TASKS
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.lips import LipEncoder
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.tokenizers.text import PhoneTokenizer

PARTS: dict[str, tuple[Any, Any, str]] = {
    "ssl": (SSLConfig, SSLEncoder, "ssl"),
    "semantic": (SemanticCodecConfig, SemanticCodec, "semantic_codec"),
    "acoustic": (AcousticCodecConfig, AcousticCodec, "acoustic_codec"),
    "stage1": (Stage1Config, Stage1, "stage1"),
    "stage2_layer1": (Stage2Config, Stage2, "stage2_layer1"),
    "stage2_full": (Stage2Config, Stage2, "stage2_full"),
    "lips": (LipConfig, LipEncoder, "lips"),
}
"""The parts of a system: configuration, module and folder of each."""

IN_DTYPE = ("ssl", "stage1", "stage2_layer1", "stage2_full")
"""Parts whose weights take another dtype; codebook searches, waveforms and lips stay in fp32."""


def sizes(folder: Path, preset_name: str = "nano") -> SystemConfig:
    """The configuration of a system's folder, part by part; parts that it lacks, and the name, are the preset's."""
    found = {
        part: load_config_and_card(folder / at, config)[0]
        for part, (config, _, at) in PARTS.items()
        if (folder / at / "config.json").is_file()
    }
    return replace(preset(preset_name), **found)


def phone_table(folder: Path) -> PhoneTokenizer:
    """The phones of a system: the table in its folder (``vocab.json``, of converted ones), else nano's."""
    table = folder / "vocab.json"
    return PhoneTokenizer.from_vocab(table) if table.is_file() else PhoneTokenizer()


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters (not buffers) as ``dtype``, one by one, so that no second copy of the module is needed."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.eval()


class Folder:
    """A system of ours: a folder a part, tasks under ``tasks/`` (see :mod:`metis_lib.checkpoints`).

    ``decode``: decoding options that are the system's defaults, by task, or for ``any``.
    """

    def __init__(self, name: str | Path, dtype: torch.dtype = torch.float32) -> None:
        self.name, self.folder, self.dtype = str(name), locate(name), dtype
        self.decode = self._read_decode()
        self._tasks = {}
        for path in sorted((self.folder / "tasks").glob("*/config.json")):
            config, _ = load_config_and_card(path.parent, TaskConfig)
            self._tasks[config.task] = (config, path.parent)

    @cached_property
    def config(self) -> SystemConfig:
        """Sizes; of parts that are not there the paper's."""
        return sizes(self.folder, "paper")

    def _read_decode(self) -> dict[str, dict[str, Any]]:
        """What ``decode.json`` says, where there is one."""
        file = self.folder / "decode.json"
        try:
            found = json.loads(file.read_text()) if file.is_file() else {}
        except ValueError as error:
            raise MetisError(f"{file} is not valid JSON ({error}); remove it for the usual defaults") from error
        if not isinstance(found, dict) or not all(isinstance(options, dict) for options in found.values()):
            raise MetisError(f"{file} must hold decoding options by task, {{task: {{option: value}}}}")
        return found

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that it has weights for."""
        return tuple(self._tasks)

    def require(self, task: str, variant: str | None = None) -> None:
        """MetisError where the system lacks the task."""
        if task != "base":
            self._find(task)

    def _find(self, task: str) -> tuple[TaskConfig, Path]:
        if task not in self._tasks:
            have = ", ".join(self._tasks) or "none"
            raise MetisError(f"the system {self.name!r} has no weights for the task {task!r} (it has: {have})")
        return self._tasks[task]

    def part(self, name: str) -> nn.Module:
        """A part, its weights checked against its configuration."""
        config_class, module_class, at = PARTS["acoustic" if name == "acoustic_decoder" else name]
        module = module_class(load_config_and_card(self.folder / at, config_class)[0])
        fill(module, load_state(self.folder / at), self.folder / at)
        if name == "ssl":
            module.set_stats(**load_state(self.folder / at, "stats"))
        return cast(module, self.dtype if name in IN_DTYPE else torch.float32)

    def task(self, name: str, variant: str | None = None) -> tuple[TaskConfig, dict[str, Tensor]]:
        """What fine-tuning added; a system of ours has one variant of a task."""
        config, folder = self._find(name)
        return config, {key: value.to(self.dtype) for key, value in load_state(folder).items()}

    def phones(self) -> PhoneTokenizer:
        """The table of the folder."""
        return phone_table(self.folder)

    def phone_head(self) -> nn.Linear:
        """The one that the SSL encoder learned by."""
        if not (self.folder / "ssl" / "phones.safetensors").is_file():
            raise MetisError(f"the system {self.name!r} has no phone head, so it cannot choose among candidates")
        return phone_head(self.folder / "ssl")


def phone_head(folder: Path) -> nn.Linear:
    """The frozen phone head in fp32 beside the SSL encoder in ``folder``."""
    state = load_state(folder, "phones")
    head = nn.Linear(state["weight"].shape[1], len(state["weight"]))
    fill(head, state, folder)
    return head.requires_grad_(False)


class Random:
    """Random weights of a preset, the same for the same seed (and kind of ``device``, where they are made): for tests,
    and to measure speed and memory."""

    decode: dict[str, dict[str, Any]] = {}

    def __init__(
        self, name: str = "debug", dtype: torch.dtype = torch.float32, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        self.name, self.dtype, self.seed, self.device = name, dtype, seed, torch.device(device)
        self.config: SystemConfig = preset(name)

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks."""
        return tuple(TASKS)

    def require(self, task: str, variant: str | None = None) -> None:
        """MetisError for an unknown task."""
        if task not in (*TASKS, "base"):
            raise MetisError(f"the system {self.name!r} has no weights for the task {task!r}")

    def _seeded(self, name: str, build: Any) -> Any:
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), self.device:
            torch.manual_seed(self.seed)
            return build()

    def part(self, name: str) -> nn.Module:
        """A part, initialised as for training."""
        name = "acoustic" if name == "acoustic_decoder" else name
        before = torch.get_default_dtype()
        try:  # made in the dtype: a large part would not fit twice
            torch.set_default_dtype(self.dtype if name in IN_DTYPE else before)
            module = self._seeded(name, lambda: PARTS[name][1](getattr(self.config, name)))
        finally:
            torch.set_default_dtype(before)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(before) if buffer.is_floating_point() else buffer.data
        return module.eval()

    def task(self, name: str, variant: str | None = None) -> tuple[TaskConfig, dict[str, Tensor]]:
        """The modules that the task adds."""
        self.require(name)
        vocab = self.phones().size
        config = TaskConfig(name, TASKS[name].changes(self.config, phone_vocab=vocab))
        # A stage 1 without layers has the same additions, and takes no time to make.
        slim = replace(self.config.stage1, num_layers=0, codebook_size=2)
        known = set(Stage1(slim).state_dict())
        whole = self._seeded(f"task {name}", lambda: Stage1(replace(slim, **config.stage1))).state_dict()
        return config, {key: value.to(self.dtype) for key, value in whole.items() if key not in known}

    def phones(self) -> PhoneTokenizer:
        """Nano's table."""
        return PhoneTokenizer()

    def phone_head(self) -> nn.Linear:
        """A random one."""
        sizes = self.config.ssl.hidden_size, 1 + self.phones().size
        return self._seeded("phone head", lambda: nn.Linear(*sizes).requires_grad_(False))
