"""What works on this machine, and what to do about what does not.  ``metis doctor`` prints it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from metis_lib import assets, compat
from metis_lib.errors import MetisError

SETUP = "run: make setup   (or: pip install -c constraints.txt -e '.[all]')"
PREPARE = "run: metis prepare judges"


@dataclass(frozen=True)
class Check:
    """One line of the doctor: ``status`` is ``ok``, ``warn`` (a part is missing) or ``fail``."""

    name: str
    status: str
    detail: str
    fix: str = ""


Result = str | tuple[str, str, str]
"""What is right, or the status, what was found and what to do."""


def _python() -> Result:
    version = platform.python_version()
    return version if version.startswith("3.11.") else f"{version} (tested with 3.11)"


def _device() -> Result:
    import torch

    from metis_lib.pipeline import pick_device

    device = pick_device("auto").type
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    return f"{device}: nano runs here; train and run paper-sized models on a GPU"


def _torch() -> Result:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__} ({build}), {torch.get_num_threads()} threads"


def _bf16() -> Result:
    import torch

    from metis_lib.pipeline import pick_device

    device = pick_device("auto").type
    size = 512 if device == "cpu" else 4096

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(size, size, device=device, dtype=dtype)
        return min(timeit.repeat(lambda: (x @ x)[0, 0].item(), number=1, repeat=5)[1:])  # item() waits for the device

    ratio = seconds(torch.float32) / seconds(torch.bfloat16)
    speed = f"{ratio:.1f} times as fast as float32 on {device} (one matrix product of {size})"
    return speed if ratio >= 1 else f"works, but only {speed}: use float32 here"


def _torchaudio() -> Result:
    module = compat.import_torchaudio()
    how = "without its native library (not needed)" if compat.is_stubbed() else "with its native library"
    return f"{module.__version__} {how}"


def _lora() -> Result:
    compat.prepare_torchaudio()
    return f"peft {importlib.import_module('peft').__version__}"


def _phones() -> Result:
    from metis_lib.tokenizers.text import PhoneTokenizer

    return "hello → " + " ".join(PhoneTokenizer().phones("hello"))


def _asset(name: str, kind: str) -> Result:
    """Whether the asset ``name`` is there and class ``kind`` of :mod:`metis_lib.evaluation.judges` opens it."""
    state, asset = assets.status(name), assets.ASSETS[name]
    if state == "missing":
        return "warn", f"not fetched yet ({asset.size / 1e6:.0f} MB; {asset.purpose})", PREPARE
    if state == "corrupt":
        return "warn", f"a hash differs under {assets.asset_folder(name)}", PREPARE
    judges = importlib.import_module("metis_lib.evaluation.judges")
    seconds = timeit.timeit(lambda: getattr(judges, kind)().model, number=1)
    return f"{asset.purpose}; hash right, opens in {seconds:.1f} s"


def _intrusive() -> Result:
    import numpy as np
    import pesq
    import pystoi

    wave = np.random.default_rng(0).standard_normal(48000) * 0.1
    wave[8000:16000] = 0  # speech has pauses
    same = pesq.pesq(16000, wave, wave, "wb"), pystoi.stoi(wave, wave, 16000)
    return f"a signal against itself: PESQ {same[0]:.2f}, STOI {same[1]:.2f}"


def _nano() -> Result:
    from metis_lib.checkpoints import locate
    from metis_lib.pipeline import Metis

    sizes = [path.stat().st_size for path in locate("nano").rglob("*.safetensors")]
    took = timeit.timeit(lambda: Metis.from_pretrained("nano", device="cpu"), number=1)
    return f"{len(sizes)} parts, {sum(sizes) / 1e6:.1f} MB, load in {took:.1f} s"


def _disk() -> Result:
    home = assets.metis_home()
    existing = next(path for path in (home, *home.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return "fail", f"{home} cannot be written", "set METIS_HOME to a folder of yours"
    free = shutil.disk_usage(existing).free / 1e9
    detail = f"{free:.0f} GB free at {home}"
    if free < 1:
        return "fail", detail, "free 2 GB, or set METIS_HOME to another disk"
    detail += "" if free >= 17 else "; nano's corpus and what its training prepares take 17 GB"
    return detail if free >= 5 else ("warn", detail, "")


def _notebooks() -> Result:
    import jupyterlab
    import papermill
    from jupyter_client.kernelspec import KernelSpecManager

    if "python3" not in KernelSpecManager().find_kernel_specs():
        return "warn", "no kernel named python3", "run: python -m ipykernel install --sys-prefix"
    return f"JupyterLab {jupyterlab.__version__}, papermill {papermill.__version__}, kernel python3"


def _downloads() -> Result:
    if assets.reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        return "the model hub answers"
    return "the model hub does not answer; judges come from package registries instead"


CHECKS: dict[str, tuple[Callable[[], Result], str, str]] = {
    # name: (what is asked, status if it raises, what to do then)
    "python": (_python, "fail", SETUP),
    "torch": (_torch, "fail", SETUP),
    "device": (_device, "fail", SETUP),
    "bf16": (_bf16, "warn", "use float32 on this machine"),
    "torchaudio": (_torchaudio, "warn", SETUP),
    "lora": (_lora, "fail", SETUP),
    "phones": (_phones, "fail", "pip install espeakng-loader phonemizer"),
    "nano": (_nano, "fail", "clone the repository again; the weights are part of it"),
    "judge whisper-base": (partial(_asset, "whisper-base", "WhisperJudge"), "warn", SETUP),
    "judge ecapa": (partial(_asset, "ecapa", "SpeakerJudge"), "warn", SETUP),
    "judge speechmos": (partial(_asset, "speechmos", "DnsmosJudge"), "warn", SETUP),
    "judges pesq stoi": (_intrusive, "warn", SETUP),
    "peer nsnet2": (partial(_asset, "nsnet2", "NSNet2"), "warn", SETUP),
    "notebooks": (_notebooks, "warn", SETUP),
    "disk": (_disk, "warn", "set METIS_HOME to a disk with room"),
    "downloads": (_downloads, "warn", "check the network"),
}


def checks() -> list[Check]:
    """Everything that is asked of this machine, in seconds; never raises, every failure is a line."""
    found = []
    for name, (ask, status, fix) in CHECKS.items():
        try:
            answer = ask()
            found.append(Check(name, *(("ok", answer) if isinstance(answer, str) else answer)))
        except Exception as error:  # the doctor's purpose: whatever a library throws becomes a line
            first = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]
            found.append(Check(name, status, str(error) if isinstance(error, MetisError) else first, fix))
    return found


def table(found: list[Check]) -> str:
    """The checks as text, one line each and what to do below those that are not ok."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.fix and check.status != "ok":
            lines.append(f"{'':<4}  {'':<{width}}  → {check.fix}")
    return "\n".join(lines)
