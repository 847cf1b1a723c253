"""The released files: names, places, sizes, and the tensors that each must hold.

The tables of keys and shapes come from our own modules on the meta device, whose names are the released ones.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metis_lib import assets
from metis_lib.config import SystemConfig
from metis_lib.errors import MetisError
from metis_lib.models.adapt import LORA_TARGETS
from metis_lib.models.stage1 import Stage1
from metis_lib.stores import PARTS
from metis_lib.tasks import task as task_named

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class ReleasedFile:
    """One released file.  ``bytes`` is its size, known from elsewhere if ``checked``; ``note``: how else to get it.

    ``fills`` names what it holds (see :func:`layout`), ``rank`` the LoRA rank in its name; a file that the main branch
    may lack is looked for at ``revision`` too.
    """

    path: str
    fills: str
    repo: str = "amphion/metis"
    task: str = ""
    rank: int = 0
    bytes: int = 0
    checked: bool = False
    revision: str = ""
    note: str = ""


FILES = {
    name: ReleasedFile(**values)
    for name, values in json.loads(Path(__file__).with_name("released.json").read_text(encoding="utf-8")).items()
}
"""Every released file by name."""
ASSET = "metis-tables"
TABLES = {file.name: file for file in assets.ASSETS[ASSET].files}
"""The two small tables, ``vocab.json`` and ``wav2vec2bert_stats.pt``, which come from Amphion's source."""
INSIDE = {
    "ssl": ("ssl", "model."),
    "acoustic_encoder": ("acoustic", "encoder."),
    "acoustic_decoder": ("acoustic", "decoder."),
}
"""Files that hold a module within a part: the part, and what our names have in front of the file's."""


class Layout(NamedTuple):
    """What a file must hold and what it may hold besides: tensors on the meta device under the file's names."""

    required: dict[str, Tensor]
    optional: dict[str, Tensor]


@lru_cache(maxsize=64)
def layout(fills: str, config: SystemConfig, task: str = "", rank: int = 32) -> Layout:
    """The tensors of a file that ``fills`` a part, or is the ``lora`` or ``adapter`` of a task.

    May be there besides: the empty ``embed_tokens`` of stage 2, and w2v-BERT's layers above the one that is needed.
    """
    part, prefix = INSIDE.get(fills, (fills, ""))
    with torch.device("meta"):
        if fills in ("stage1", "lora", "adapter"):
            module: nn.Module = Stage1(replace(config.stage1, **changes(config, task)))
        else:
            module = PARTS[part][1](getattr(config, part))
        required = {
            key.removeprefix(prefix): value
            for key, value in module.state_dict(keep_vars=True).items()
            if key.startswith(prefix)
        }
        optional: dict[str, Tensor] = {}
        if fills == "adapter":
            required = {f"model.{key}": value for key, value in required.items() if key.startswith("cond_adapter.")}
        elif fills == "lora":
            base, required = required, {}
            for key, value in base.items():
                layer = key.removesuffix(".weight")
                if layer.rpartition(".")[2] in LORA_TARGETS:
                    required[f"model.{layer}.lora_A.default.weight"] = torch.empty(rank, value.shape[1])
                    required[f"model.{layer}.lora_B.default.weight"] = torch.empty(value.shape[0], rank)
        elif fills.startswith("stage2"):
            optional = {"diff_estimator.embed_tokens.weight": torch.empty(0, 256)}
        elif fills == "ssl":
            last = f"encoder.layers.{config.ssl.output_layer - 1}."
            for number in range(config.ssl.output_layer, config.ssl.num_layers):
                for key, value in required.items():
                    if key.startswith(last):
                        optional[f"encoder.layers.{number}.{key.removeprefix(last)}"] = value
    return Layout(required, optional)


def changes(config: SystemConfig, task: str) -> dict[str, Any]:
    """The fields of the stage-1 configuration that a task changes in its released form."""
    return task_named(task).changes(config, phone_vocab=config.stage1.phone_vocab) if task else {}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, memory-mapped; MetisError names one that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise MetisError(f"{path} is damaged or not whole ({' '.join(str(error).split())}); fetch it again") from error


def compare(path: Path, file: Any, wanted: Layout) -> None:
    """Compare the header of an opened file with its layout.

    Raises:
        MetisError: tensors that are missing, unknown, of another shape or of no floating type; the first is named.
    """
    found: dict[str, Any] = {}
    for key in file.keys():  # noqa: SIM118 (not a mapping)
        tensor = file.get_slice(key)
        kind = "" if tensor.get_dtype() in FLOATS else f" {tensor.get_dtype()}"
        found[key] = f"{[*tensor.get_shape()]}{kind}"
    known = {key: f"{[*value.shape]}" for key, value in {**wanted.required, **wanted.optional}.items()}
    wrong = [key for key in found if found[key] != known.get(key)]
    wrong += [key for key in wanted.required if key not in found]
    if wrong:
        key, count = min(wrong), len(set(wrong))
        hint = "; is it the file of something else?" if 2 * count > len(known) else ""
        raise MetisError(
            f"{path} does not fit: {count} tensors are wrong, the first is {key} "
            f"(wanted {known.get(key, 'no such tensor')}, the file has {found.get(key, 'none')}){hint}"
        )


def lora_rank(file: Any) -> int:
    """The rank of an opened LoRA file, read off its first factor (1 where there is none)."""
    shapes = (file.get_slice(key).get_shape() for key in sorted(file.keys()) if ".lora_A." in key)
    shape = next(shapes, None)
    return max(1, shape[0]) if shape else 1


def load_pickle(path: Path) -> Any:
    """A file of ``torch.save``, memory-mapped where its form allows, tensors and plain types alone.

    Raises:
        MetisError: it holds code or other objects, or is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise MetisError(f"{path} was not opened: it holds code instead of plain tensors, or it is damaged") from error


def variants(task: str) -> tuple[str, ...]:
    """The variants in which a task is released, the default first."""
    if f"{task}_lora" not in FILES:
        return ("full",)
    return ("full", "lora") if task == "vc" else ("lora", "full")


def stage1_files(task: str, variant: str) -> tuple[str, ...]:
    """Names of the files that make stage 1 of a task; the last holds what is particular to it."""
    return (f"{task}_full",) if variant == "full" else ("base", f"{task}_adapter", f"{task}_lora")


def name_of(path: Path) -> str | None:
    """What a path looks like among released files, such as ``released se_lora``; None if like none of them."""
    named = (name for name, file in FILES.items() if path.as_posix().endswith(f"/{file.path}") and name != "ssl")
    is_ssl = path.parent.name == "w2v-bert-2.0"
    name = "ssl" if is_ssl else next(named, None)
    return name and f"released {name}"
