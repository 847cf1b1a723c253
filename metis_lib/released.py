"""The released checkpoints of Metis: fetched where need be, compared with what they must hold, put into our modules.

The files lie on the hub (``amphion/metis``, ``amphion/MaskGCT``, ``facebook/w2v-bert-2.0``) or in a folder in the same
layout.  Nothing is taken on trust: no byte of a file is used before its keys and shapes are found to be right.  The
published loader lets unknown and missing keys pass in places.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_lib import assets
from metis_lib.checkpoints import TaskConfig, folder_of, load_config_and_card, released_layout
from metis_lib.config import SystemConfig, preset
from metis_lib.errors import MetisError
from metis_lib.released_files import (
    ASSET,
    FILES,
    INSIDE,
    TABLES,
    changes,
    compare,
    layout,
    load_pickle,
    lora_rank,
    opened,
    stage1_files,
    variants,
)
from metis_lib.stores import IN_DTYPE, PARTS
from metis_lib.tasks import TASKS
from metis_lib.tasks import task as task_named
from metis_lib.tokenizers.chinese import LEXICON, Chinese
from metis_lib.tokenizers.lips import LipEncoder, read_released_config
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.tokenizers.text import PhoneTokenizer

LICENCE = "CC BY-NC 4.0 (weights of Metis and MaskGCT, Amphion): not for commercial use; w2v-BERT 2.0 is MIT (Meta)"
TRANSIENT: dict[str, Callable[..., Tensor]] = {"idle": torch.zeros, "mean": torch.zeros, "var": torch.ones}
"""Buffers that no file holds (codes' idle counts; the SSL statistics, set afterwards) and what they begin as."""


class NoEncoder(nn.Module):
    """In the place of the encoder of a codec that was loaded to decode only."""

    def forward(self, wav: Tensor) -> Tensor:
        raise MetisError("this codec can only decode; load the part 'acoustic' to encode")


class Released:
    """The released checkpoints of one place; files are fetched when asked for, modules are loaded one by one.

    Attributes:
        name: as it was given.
        repo, revision: of the hub, or the folder.
        preferred, compat: what stands behind the name.
        config: sizes of the parts; those of the paper unless the folder's ``config.json`` is a ``SystemConfig``.
        tasks: tasks that can be asked for; in a folder those whose files are there.
        licence: to be shown to the user.
    """

    licence = LICENCE
    decode: dict[str, dict[str, Any]] = {}

    def __init__(
        self, where: str | Path = "amphion/metis", *, revision: str | None = None, dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> None:  # fmt: skip
        """Nothing is fetched or read yet.

        Args:
            where: a hub id, or a folder in the released layout.  MaskGCT's files may also lie in ``MaskGCT/`` below it
                or beside it, those of w2v-BERT lie in ``w2v-bert-2.0/`` below or beside it.  Behind the name, each
                after an ``@``: ``full`` or ``lora`` (the variant of all tasks), ``released`` (:attr:`compat`), or a
                revision; so a name tells all about a row of an evaluation: ``amphion/metis@lora``.
            revision: of ``amphion/metis`` on the hub.
            dtype: of the transformers' weights; codecs, lips and statistics stay in float32.
            local_files_only: never ask the network.

        Raises:
            MetisError: no such folder, nor the form of a hub id.
        """
        self.name, repo, marks = str(where), str(where), list[str]()
        while "@" in repo and not folder_of(repo).is_dir():
            repo, _, mark = repo.rpartition("@")
            marks.insert(0, mark)
        folder = folder_of(repo)
        self.on_hub = not folder.is_dir()
        if self.on_hub and (isinstance(where, Path) or repo.count("/") != 1 or repo[0] in "./~"):
            raise MetisError(
                f"unknown model {self.name!r}: no such folder; use 'nano', the folder of a system or of released "
                "files, or a hub id as amphion/metis"
            )
        kinds = [mark for mark in marks if mark in ("full", "lora")]
        pins = [mark for mark in marks if mark not in ("full", "lora", "released")]
        if "" in marks or len(kinds) > 1 or len(pins) > 1 or (pins and not self.on_hub):
            raise MetisError(
                f"{self.name}: behind the name may stand @full or @lora, @released, of the hub a @REVISION"
            )
        if marks and not self.on_hub and not released_layout(folder):
            raise MetisError(f"{self.name}: what stands behind the @ is for published weights; {repo} holds none")
        self.preferred, self.compat = next(iter(kinds), None), "released" if "released" in marks else None
        self.repo, self.revision = repo, revision or next(iter(pins), None)
        self.dtype, self.local_files_only = dtype, local_files_only
        self.folder = assets.metis_home() / "released" if self.on_hub else folder
        self.config = preset("paper")
        with contextlib.suppress(OSError, ValueError):  # the hub's own config.json is no configuration
            if "type" in json.loads((self.folder / "config.json").read_text()):
                self.config = load_config_and_card(self.folder, SystemConfig)[0]
        self.published = self.config == preset("paper")

    @property
    def tasks(self) -> tuple[str, ...]:
        known = [name for name in TASKS if f"{name}_full" in FILES]  # not those of METIS_TASKS
        kinds = {name: [kind for kind in variants(name) if self.preferred in (None, kind)] for name in known}
        return tuple(n for n in known if kinds[n] and (self.on_hub or any(self._whole(n, kind) for kind in kinds[n])))

    # where the files are

    def find(self, name: str) -> Path | None:
        """A released file in the folder (for a hub id: ``released/`` under METIS_HOME), or None.

        The rank in the name of a LoRA may be another than the published one; its adapter is the one that goes with it.

        Raises:
            MetisError: a folder holds LoRA weights of several ranks for the task, each with its adapter.
        """
        file, beside = FILES[name], self.folder.absolute().parent
        if file.repo == "amphion/metis" and self.on_hub and self.revision and name != "lips":  # which no hub has
            return None  # which revision lies in the folder nobody can tell
        if file.repo == "amphion/MaskGCT":
            places = [self.folder / file.path, self.folder / "MaskGCT" / file.path, beside / "MaskGCT" / file.path]
        elif file.repo == "facebook/w2v-bert-2.0":
            places = [root / "w2v-bert-2.0" / file.path for root in (self.folder, beside)]
        else:
            places = [self.folder / file.path]
            if file.fills in ("lora", "adapter"):
                ending = "_adapter" * (file.fills == "adapter")
                places = [place.with_name(f"{place.stem}{ending}.safetensors") for place in self._lora(file.task)]
            if name == "lips":
                places.append(self.folder / "vis_model.pth")
        return next((place for place in places if place.is_file()), None)

    def _lora(self, task: str) -> list[Path]:
        """Places of the LoRA weights of a task, the one to be taken first."""
        published = self.folder / FILES[f"{task}_lora"].path
        there = sorted(published.parent.glob(f"metis_{task}_lora_*[0-9].safetensors"))
        pairs = [place for place in there if place.with_name(f"{place.stem}_adapter.safetensors").is_file()]
        if len(pairs) > 1:
            names = ", ".join(place.name for place in pairs)
            raise MetisError(f"{published.parent} holds several LoRA weights ({names}); leave one there")
        return pairs or there or [published]

    def path(self, name: str) -> Path:
        """A released file or table, downloaded where need be.

        Raises:
            MetisError: it cannot be had; the line says where to get it and where to put it.
        """
        if name in TABLES:
            return self._table(name)
        file = FILES[name]
        if (found := self.find(name)) is not None:
            return found
        target = self.folder / "w2v-bert-2.0" if file.fills == "ssl" else self.folder
        how, note = f"hf download {file.repo} {file.path} --local-dir {target}", f" ({file.note})" if file.note else ""
        if name == "lips":
            raise MetisError(f"no {self.folder / file.path}{note}")
        if not self.on_hub:
            raise MetisError(f"{self.name} lacks {file.path}; get it by: {how}{note}")
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

        hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        offline = self.local_files_only or not assets.reachable(hub)  # the client tries again for minutes
        own, problem = file.repo == "amphion/metis", ""
        repo, revision = (self.repo, self.revision) if own else (file.repo, None)
        for at in dict.fromkeys([revision, revision or file.revision or None]):
            try:
                return Path(hf_hub_download(repo, file.path, revision=at, local_files_only=offline))
            except (LocalEntryNotFoundError, ConnectionError):
                problem = f"not in the cache, and the hub is out of reach (HF_ENDPOINT: a mirror); elsewhere run: {how}"
            except EntryNotFoundError:
                problem = problem or f"the hub has no such file{note}"
            except (OSError, ValueError, HTTPError) as error:
                problem = problem or str(error).strip().partition("\n")[0]
        raise MetisError(f"{file.path} of {repo}: {problem}")

    def _table(self, name: str) -> Path:
        """A table, the folder's or fetched; verified by hash where the sizes are the published ones."""
        file, place = TABLES[name], self.folder / name
        if not place.is_file():
            place = assets.asset_folder(ASSET) / name
            if not file.good(place):
                if self.local_files_only:
                    raise MetisError(f"no {self.folder / name}; get it from {file.upstream}")
                assets.fetch(ASSET)
        if self.published and not file.good(place):
            raise MetisError(f"{place} is not the published file (its hash differs); get it from {file.upstream}")
        return place

    def _whole(self, task: str, variant: str) -> bool:
        return all(self.find(name) for name in stage1_files(task, variant))

    def variant(self, task: str, variant: str | None) -> str:
        """The variant asked for here or in the name, or the published default (in a folder that lacks it, the other).

        Raises:
            MetisError: the task has no such variant; the line says which there are.
        """
        task_named(task)
        choices, variant = variants(task), variant or self.preferred
        if variant is not None and variant not in choices:
            raise MetisError(f"the released {task} has no variant {variant!r}; there is: {', '.join(choices)}")
        if variant is None and not self.on_hub:
            return next((kind for kind in choices if self._whole(task, kind)), choices[0])
        return variant or choices[0]

    def needs(self, task: str, variant: str | None = None) -> tuple[str, ...]:
        """Names of the files and tables that a task needs (``base``: going on from a prompt)."""
        entry = None if task == "base" else task_named(task)
        names = ["ssl", "wav2vec2bert_stats.pt", "acoustic_decoder", "stage2_layer1", "stage2_full"]
        if entry is None or entry.takes_prompt:
            names += ["semantic", "acoustic_encoder"]
        if entry is None:
            return ("base", *names)
        names += ["vocab.json"] * entry.takes_text + ["lips"] * entry.takes_video
        return (*stage1_files(task, self.variant(task, variant)), *names)

    def require(self, task: str, variant: str | None = None) -> None:
        """Resolve (download) every file that a task needs.

        Raises:
            MetisError: one cannot be had; the line names it and says how to get it.
        """
        for name in self.needs(task, variant):
            self.path(name)

    # what they hold

    def _read(self, name: str) -> tuple[dict[str, Tensor], int]:
        """A file's tensors under its own names (those that are needed), and the rank if it is a LoRA."""
        path = self.path(name)
        with opened(path) as file:
            rank = self._compare(name, path, file)
            wanted = layout(FILES[name].fills, self.config, FILES[name].task, rank).required
            return {key: self._cast(name, file.get_tensor(key)) for key in wanted}, rank

    def _compare(self, name: str, path: Path, file: Any) -> int:
        """Compare an opened file with its layout; the rank if it is a LoRA, else 0."""
        about = FILES[name]
        rank = lora_rank(file) if about.fills == "lora" else 0
        compare(path, file, layout(about.fills, self.config, about.task, rank))
        return rank

    def _cast(self, name: str, value: Tensor) -> Tensor:
        """A tensor of a file as the dtype asked for; those of codecs and lips as float32."""
        wanted = self.dtype if FILES[name].fills in (*IN_DTYPE, "lora", "adapter") else torch.float32
        return value.to(wanted) if value.is_floating_point() else value

    def part(self, name: str) -> nn.Module:
        """A part, filled, in evaluation mode on the CPU: ``ssl`` (with its statistics), ``semantic``, ``acoustic``,
        ``acoustic_decoder`` (a codec that can only decode), ``stage1`` (the base), ``stage2_layer1``, ``stage2_full``,
        ``lips``.

        Raises:
            MetisError: an unknown name, or a file that is missing, damaged or holds other tensors.
        """
        decode_only = name == "acoustic_decoder"
        if not decode_only and name not in PARTS:
            raise MetisError(f"unknown part {name!r}; choose one of {', '.join((*PARTS, 'acoustic_decoder'))}")
        if name == "lips":
            return _real(self._lips())
        kind = "acoustic" if decode_only else name
        with torch.device("meta"):
            module = PARTS[kind][1](getattr(self.config, kind))
        if decode_only:
            module.encoder = NoEncoder()
        files = {"acoustic": ("acoustic_encoder", "acoustic_decoder"), "stage1": ("base",)}.get(name, (name,))
        state = {f"{INSIDE.get(f, ('', ''))[1]}{key}": value for f in files for key, value in self._read(f)[0].items()}
        module.load_state_dict(state, assign=True)
        if isinstance(module := _real(module), SSLEncoder):
            self._set_stats(module)
        return module

    def _set_stats(self, encoder: SSLEncoder) -> None:
        path = self.path("wav2vec2bert_stats.pt")
        stats = load_pickle(path)
        try:
            encoder.set_stats(stats["mean"].float(), stats["var"].float())
        except (KeyError, TypeError, AttributeError, MetisError) as error:
            raise MetisError(f"{path} does not hold mean and var of {len(encoder.mean)} channels ({error})") from error

    def _lips(self) -> nn.Module:
        path = self.path("lips")
        config, beside = self.config.lips, path.with_suffix(".json")
        try:
            if beside.is_file():  # sizes of stem and ResNet do not stand there
                theirs = read_released_config(json.loads(beside.read_text()))
                config = replace(theirs, stem=config.stem, widths=config.widths, blocks=config.blocks)
        except (ValueError, MetisError) as error:
            raise MetisError(f"{beside}: {error}") from error
        with torch.device("meta"):
            module = LipEncoder(config)
        state = load_pickle(path)
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise MetisError(f"{path} is no state dict of a visual model")
        try:
            module.load_released({key: self._cast("lips", value) for key, value in state.items()})
        except MetisError as error:
            raise MetisError(f"{path}: {error}") from error
        return module

    def task(self, name: str, variant: str | None = None) -> tuple[TaskConfig, dict[str, Tensor]]:
        """What fine-tuning made of stage 1.

        Returns the task's configuration and: of a ``full`` variant all weights of its stage 1 (``lora_rank`` 0), of
        ``lora`` the adapter (``cond_adapter.*``) and LoRA named as by :func:`metis_lib.models.adapt.lora_state`, alpha
        being twice the rank.

        Raises:
            MetisError: the variant does not exist, or a file is missing, damaged or holds other tensors.
        """
        kind = self.variant(name, variant)
        state, rank = self._read(stage1_files(name, kind)[-1])
        if kind == "lora":
            adapter = self._read(f"{name}_adapter")[0]
            state |= {key.removeprefix("model."): value for key, value in adapter.items()}
        return TaskConfig(name, changes(self.config, name), rank), state

    def phones(self) -> PhoneTokenizer:
        """The released phone table, verified by its hash; Chinese by the released lexicon where the folder has it."""
        lexicon = (self.folder / LEXICON).is_file()
        return PhoneTokenizer.from_vocab(self.path("vocab.json"), Chinese.from_folder(self.folder) if lexicon else None)

    def phone_head(self) -> nn.Linear:
        """MetisError: the published SSL encoder has learned no phones."""
        raise MetisError("the published weights have no phone head, so they cannot choose among candidates")

    def check(self, name: str) -> Path | None:
        """Check a file or table that is here, without reading its tensors; None if it is absent (nothing is fetched).

        Raises:
            MetisError: it is damaged or holds something else.
        """
        if name in TABLES:
            if not (self.folder / name).is_file() and not TABLES[name].good(assets.asset_folder(ASSET) / name):
                return None
            if name == "vocab.json":
                self.phones()
            else:
                with torch.device("meta"):
                    encoder = SSLEncoder(self.config.ssl)
                self._set_stats(encoder)
            return self.path(name)
        path = self.find(name)
        if path is None and self.on_hub and self.local_files_only:
            with contextlib.suppress(MetisError):
                path = self.path(name)
        if path is not None and name == "lips":
            self._lips()
        elif path is not None:
            with opened(path) as file:
                self._compare(name, path, file)
        return path


def _real(module: nn.Module) -> nn.Module:
    """A filled module in evaluation mode, its transient buffers made; what is left without memory is a bug."""
    for name, buffer in list(module.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if buffer.is_meta and leaf in TRANSIENT:
            fresh = TRANSIENT[leaf](buffer.shape, dtype=buffer.dtype)
            module.get_submodule(owner).register_buffer(leaf, fresh, persistent=False)
    left = [name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta]
    if left:
        raise RuntimeError(f"{left[0]} and {len(left) - 1} more were never filled")
    return module.eval()
