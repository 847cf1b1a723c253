"""Checkpoints: a folder a part, ``config.json`` (configuration and card) beside ``model.safetensors``.

A system is a folder of parts::

    ssl/ semantic_codec/ acoustic_codec/ stage1/ stage2_layer1/ stage2_full/ lips/ tasks/<name>/

A task is what fine-tuning added to stage 1: adapter, LoRA, phone embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metis_lib.assets import sha256_file as sha256
from metis_lib.config import from_dict, to_dict
from metis_lib.errors import MetisError, must_match

SHIPPED = Path(__file__).parent / "weights"
C = TypeVar("C")


@dataclass(frozen=True)
class TaskConfig:
    """What a task adds to stage 1: the changed fields of its configuration, and the rank of its LoRA (0: none).

    ``apart``: the SSL encoder heard prompt and source each by itself (ours), not one after the other (as released).
    """

    task: str = ""
    stage1: dict[str, Any] = field(default_factory=dict)
    lora_rank: int = 0
    apart: bool = False


def save_part(
    folder: str | Path, state: dict[str, Tensor] | nn.Module, config: Any, card: dict[str, Any] | None = None, *,
    dtype: torch.dtype = torch.bfloat16, name: str = "model",
) -> Path:  # fmt: skip
    """Write one part; each file is written beside and renamed, the weights last.

    Args:
        state: a module or its state dict; floating point tensors are stored as ``dtype``.
        config: its frozen dataclass.
        card: what it was trained on, how long, its score and licence.
        name: of the weight file; what is not the ``model`` (such as ``stats``) goes without configuration.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(state, nn.Module):
        state = state.state_dict()
    tensors = {
        key: (value.detach().to(dtype) if value.is_floating_point() else value.detach()).contiguous().cpu()
        for key, value in state.items()
    }
    save_file(tensors, folder / f"{name}.safetensors.part", metadata={"format": "pt"})
    if name == "model":
        document = {"type": type(config).__name__, "config": to_dict(config), "card": card or {}}
        (folder / "config.json.part").write_text(json.dumps(document, indent=1) + "\n")
        os.replace(folder / "config.json.part", folder / "config.json")
    os.replace(folder / f"{name}.safetensors.part", folder / f"{name}.safetensors")
    return folder


def load_config_and_card(folder: str | Path, cls: type[C]) -> tuple[C, dict[str, Any]]:
    """Configuration and card of a part."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise MetisError(f"no checkpoint in {folder} (config.json is missing)")
    try:
        document = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MetisError(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("config"), dict):
        raise MetisError(f"{path} is damaged: it holds no config")
    if document.get("type") != cls.__name__:
        raise MetisError(f"{path} describes a {document.get('type')}, not a {cls.__name__}")
    return from_dict(cls, document["config"]), document.get("card") or {}


def load_state(folder: str | Path, name: str = "model") -> dict[str, Tensor]:
    """Weights of a part (``name.safetensors``), floating point ones as float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder) / f"{name}.safetensors"
    if not path.is_file():
        raise MetisError(f"no weights in {folder} ({path.name} is missing)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MetisError(f"{path} is damaged ({error}); fetch or train it again") from error
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def fill(module: nn.Module, state: dict[str, Tensor], where: str | Path, *, assign: bool = False) -> None:
    """Load ``state`` strictly; keys or shapes that do not fit are an error that names the first of them.

    ``assign`` takes the tensors themselves, for modules on the meta device.
    """
    have = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    must_match(have, {key: tuple(value.shape) for key, value in state.items()}, str(where))
    module.load_state_dict(state, assign=assign)


def system_hash(folder: str | Path) -> str:
    """One hash over all files of a system, for provenance."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.suffix in {".json", ".safetensors"}:
            digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def folder_of(name: str | Path) -> Path:
    """``name`` as a folder: where it says, else below the repository, for notebooks start in a folder of their own."""
    given = Path(name).expanduser()
    below = SHIPPED.parents[1] / given
    return below if below.is_dir() and not given.is_dir() else given


def own_system(name: str | Path) -> bool:
    """Whether ``name`` is meant to be a system of ours; if not, it is in the released layout or on a hub."""
    given = folder_of(name)
    if "@" in str(name) and not given.is_dir():
        return False
    if (SHIPPED / str(name)).is_dir() or "/" not in str(name):
        return not (given.is_dir() and released_layout(given))
    return given.is_dir() and not released_layout(given)


def released_layout(folder: Path) -> bool:
    """Whether a folder looks like the published one."""
    names = ("metis_*", "MaskGCT", "s2a_model", "t2s_model")
    return not (folder / "acoustic_codec" / "config.json").is_file() and any(
        next(folder.glob(name), None) for name in names
    )


def locate(name: str | Path) -> Path:
    """Folder of a system by name (``nano`` ships with the library) or path."""
    for folder in (SHIPPED / str(name), folder_of(name)):
        if (folder / "acoustic_codec" / "config.json").is_file():
            return folder
    raise MetisError(f"unknown model {str(name)!r}; use 'nano' or the folder of a system")
