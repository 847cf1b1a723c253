"""Released checkpoints to our folders and back, their sizes, and whether what is there is what was released.

What a conversion leaves behind: of w2v-BERT the layers above the one that is needed, of the lip model its decoder and
CTC head.  Every other tensor survives both ways to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metis_lib import stores
from metis_lib.checkpoints import TaskConfig, load_config_and_card, load_state, locate, save_part
from metis_lib.config import LipConfig, SystemConfig, preset, to_dict
from metis_lib.errors import MetisError
from metis_lib.released import LICENCE, Released
from metis_lib.released_files import FILES, INSIDE, TABLES, changes, layout, variants
from metis_lib.stores import PARTS
from metis_lib.tasks import task as task_named


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: bool) -> int:
    """Exact size of a float32 safetensors file: names sorted, the header padded to 8 (``metadata``: format pt)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if metadata else {}
    at = 0
    for key, value in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = at + value.numel() * value.element_size()
        kind = "I64" if value.dtype == torch.int64 else "F32"
        header[key] = {"dtype": kind, "shape": [*value.shape], "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + at


def sizes(config: SystemConfig) -> dict[str, dict[str, int]]:
    """Parameters and bytes of each released file for a system of any size; only described, never built.

    The lip encoder is counted without decoder and CTC head, and as safetensors, though it is released as a pickle.
    """
    found = {}
    for name, file in FILES.items():
        held = layout(file.fills, config, file.task, file.rank)
        tensors = {**held.required, **held.optional}
        found[name] = {
            "parameters": sum(v.numel() for v in tensors.values() if file.rank or isinstance(v, nn.Parameter)),
            "bytes": safetensors_bytes(tensors, metadata=file.fills not in ("lora", "adapter")),
        }
    return found


def verify(place: Released, task: str | None = None, variant: str | None = None) -> list[dict[str, Any]]:
    """Check what is present: keys and shapes, known sizes, hashes of the tables; with ``task`` that it is complete.

    Returns:
        A row a file: ``file``, ``path``, ``bytes``, ``status`` (``ok``, ``absent``, ``wrong``) and ``note``; what is
        absent is wrong where the task needs it.
    """
    rows: list[dict[str, Any]] = []
    for name in place.needs(task, variant) if task else (*FILES, *TABLES):
        row: dict[str, Any] = {"file": name, "path": None, "bytes": 0, "status": "ok", "note": ""}
        rows.append(row)
        try:
            path = place.check(name)
        except MetisError as error:
            row |= {"status": "wrong", "note": str(error)}
            continue
        if path is None:
            row |= {"status": "wrong", "note": "missing"} if task else {"status": "absent"}
            continue
        row |= {"path": str(path), "bytes": path.stat().st_size}
        file = FILES.get(name)
        known = file.bytes if file and place.published and path.name == Path(file.path).name else 0
        if file and known not in (0, row["bytes"]):
            row["status"] = "wrong" if file.checked else "ok"
            row["note"] = f"{'the published file' if file.checked else 'a file as expected'} has {known} bytes"
    return rows


@contextmanager
def fresh(out: str | Path) -> Iterator[Path]:
    """A folder to fill, renamed to ``out`` (which must not exist) at the end, removed where that fails."""
    out = Path(out).expanduser()
    if out.exists():
        raise MetisError(f"{out} exists already; give the name of a new folder")
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def to_own(
    where: str | Path, out: str | Path, *, tasks: Sequence[str] = (), variant: str | None = None,
    dtype: torch.dtype = torch.float32, say: Callable[[str], None] = lambda line: None, **place: Any,
) -> Path:  # fmt: skip
    """Write the released files at ``where`` as a system of ours.

    Args:
        tasks, variant: only these tasks (by default all that are there), in this variant (by default the published).
        dtype: that floating point tensors are stored in.
        place: of :class:`Released` (revision, local_files_only).

    Raises:
        MetisError: ``out`` exists, or a file is missing or does not fit.
    """
    source = Released(where, **place)
    tasks = tasks or source.tasks
    say(LICENCE)
    source.require("base")
    for name in tasks:
        source.require(name, variant)
    with fresh(out) as folder:
        card = {"source": source.name, "licence": LICENCE}
        for part, (_, _, at) in PARTS.items():
            if part == "lips" and not any(task_named(name).takes_video for name in tasks):
                continue
            say(f"{part} ...")
            module = source.part(part)
            save_part(folder / at, module, module.config, card, dtype=dtype)
            if part == "ssl":
                save_part(folder / at, module.stats_state(), None, name="stats", dtype=torch.float32)
        for name in tasks:
            say(f"task {name} ...")
            config, state = source.task(name, variant)
            about = {**card, "mode": "lora" if config.lora_rank else "full"}
            save_part(folder / "tasks" / name, state, config, about, dtype=dtype)
        for name in TABLES:
            if source.check(name) is not None:
                shutil.copyfile(source.path(name), folder / name)
    return Path(out)


def _write(path: Path, tensors: dict[str, Tensor], metadata: bool = True) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, path.with_name(f"{path.name}.part"), metadata={"format": "pt"} if metadata else None)
    os.replace(path.with_name(f"{path.name}.part"), path)


def _split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoRA weights of a task's state, and all others under the names of an adapter file."""
    lora = {key: value for key, value in state.items() if ".lora_" in key}
    return lora, {f"model.{key}": value for key, value in state.items() if key not in lora}


def _task_files(folder: Path, name: str, out: Path) -> tuple[TaskConfig, dict[str, Any]]:
    """Write a task of a system under ``out`` in the released naming; its configuration and card."""
    config, card = load_config_and_card(folder / "tasks" / name, TaskConfig)
    state, stem = load_state(folder / "tasks" / name), f"metis_{name}/metis_{name}"
    if config.lora_rank:
        lora, adapter = _split(state)
        _write(out / f"{stem}_lora_{config.lora_rank}.safetensors", lora, metadata=False)
        _write(out / f"{stem}_lora_{config.lora_rank}_adapter.safetensors", adapter, metadata=False)
    elif "to_logit.weight" in state:
        file = FILES.get(f"{name}_full")
        _write(out / (file.path if file else f"{stem}.safetensors"), state)
    else:  # what was trained is the adapter alone
        _write(out / f"{stem}_adapter.safetensors", _split(state)[1], metadata=False)
    return config, card


def to_released(
    system: str | Path, out: str | Path, *, tasks: Sequence[str] = (), say: Callable[[str], None] = lambda line: None
) -> Path:
    """Write a system of ours in the released layout, in float32, with all its tasks or only ``tasks``.

    Raises:
        MetisError: ``out`` exists, a part is missing, or something has no released form (nano's mel encoder and text
            hint, a task of which only the adapter was trained, LoRA of a task that was released in full only).
    """
    source = locate(system)
    config = stores.sizes(source, "paper")
    tasks = tasks or [path.parent.name for path in sorted((source / "tasks").glob("*/config.json"))]
    if config.acoustic.encoder != "waveform":
        raise MetisError(f"{system} has a codec with a {config.acoustic.encoder} encoder, which has no released form")
    for name in tasks:
        about, card = load_config_and_card(source / "tasks" / name, TaskConfig)
        same = replace(config.stage1, **about.stage1) == replace(config.stage1, **changes(config, name))
        kind = "lora" if about.lora_rank else card.get("mode", "full")
        if not same or kind not in variants(name):
            raise MetisError(f"the task {name} of {system} ({kind}) has no released form; use metis checkpoint export")
    with fresh(out) as folder:
        for name, file in FILES.items():
            if file.task or name == "lips":
                continue
            say(f"{name} ...")
            part, prefix = INSIDE.get(file.fills, (file.fills, ""))
            state = load_state(source / PARTS[part][2])
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            state |= {k: torch.empty(0, 256) for k, v in layout(file.fills, config).optional.items() if not v.numel()}
            _write(folder / ("w2v-bert-2.0" if name == "ssl" else "") / file.path, state)
        for name in tasks:
            _task_files(source, name, folder)
        if (source / "lips" / "config.json").is_file():
            _lips(source / "lips", config.lips, folder / FILES["lips"].path)
        for name, table in TABLES.items():
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
            elif table.name.endswith(".pt"):
                torch.save(load_state(source / "ssl", "stats"), folder / name)
        if config != preset("paper") or not TABLES["wav2vec2bert_stats.pt"].good(folder / "wav2vec2bert_stats.pt"):
            document = {"type": "SystemConfig", "config": to_dict(replace(config, name=Path(out).name))}
            (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n")
    return Path(out)


def _lips(at: Path, config: LipConfig, path: Path) -> None:
    """Write the lip encoder as ``vis_model.pth`` and ``vis_model.json`` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"encoder.{key}": value for key, value in load_state(at).items()}, path)
    document = dict(
        adim=config.hidden_size, aheads=config.num_heads, eunits=config.intermediate_size, elayers=config.num_layers,
        cnn_module_kernel=config.conv_kernel, dropout_rate=config.dropout, transformer_input_layer="conv3d",
        transformer_encoder_attn_layer_type="rel_mha", rel_pos_type="latest", macaron_style=1, use_cnn_module=1,
        zero_triu=False, relu_type="swish",
    )  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")


def export(system: str | Path, out: str | Path, task: str) -> list[Path]:
    """Write what fine-tuning made of a task in the released naming, with a model card; the files written.

    Raises:
        MetisError: ``out`` exists, or the system has no weights for the task.
    """
    source = locate(system)
    with fresh(out) as folder:
        config, card = _task_files(source, task, folder)
        (folder / "README.md").write_text(_readme(config, card, sorted(folder.rglob("*.safetensors")), folder))
        names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [Path(out) / name for name in names]


def _readme(config: TaskConfig, card: dict[str, Any], files: list[Path], folder: Path) -> str:
    """The model card of an exported task: data, licence, training, scores."""
    title = config.task.upper()
    kind = f"LoRA of rank {config.lora_rank} (alpha {2 * config.lora_rank})" if config.lora_rank else "weights"
    lines = [
        f"# {title}: stage 1 of Metis, fine-tuned",
        "",
        f"{kind}, in the file format of Metis (arXiv 2502.03128). What it changes in the configuration of stage 1: "
        f"`{json.dumps(config.stage1)}`.",
        "",
        *(f"- `{path.relative_to(folder)}`: {path.stat().st_size:,} bytes" for path in files),
        "",
        f"- Data: {card.get('data', 'not recorded')}",
        f"- Licence: {card.get('licence', 'not recorded')}",
    ]
    settings, scores = card.get("settings", {}), card.get("scores", {})
    lines += [f"- Steps: {scores.get('steps', settings.get('steps', 'not recorded'))}"]
    if settings:
        lines += [f"- Settings: `{json.dumps(settings)}`"]
    rows = [(key, value) for key, value in scores.items() if isinstance(value, int | float)]
    if rows:
        lines += ["", "| score | value |", "|---|---|", *(f"| {key} | {value:.6g} |" for key, value in rows)]
    return "\n".join(lines) + "\n"
