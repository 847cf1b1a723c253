"""The installation: one list of dependencies, every one pinned, and the imports that CPU torch breaks."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EVERYWHERE = [
    "python",
    "torch",
    "device",
    "bf16",
    "torchaudio",
    "lora",
    "phones",
    "nano",
    "disk",
    "notebooks",
]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if re.match(r"\w.*==", line))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name)[0]).lower()


APART = {"browser"}
"""Extras that ``all`` does not bring: too large for what few need."""


def requirements() -> set[str]:
    extras = {name: found for name, found in PROJECT["optional-dependencies"].items() if name not in APART}
    lists = [PROJECT["dependencies"], *extras.values()]
    return {canonical(entry) for entries in lists for entry in entries} - {canonical(PROJECT["name"])}


def closure(roots: set[str]) -> set[str]:
    """What is installed because of ``roots``, by the metadata of this environment."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    queue = list(roots)
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            for line in importlib.metadata.requires(name) or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    queue.append(canonical(requirement.name))
    return found


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_environment_yml_holds_python_pip_and_this_package_under_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "metis"
    *conda, pip = environment["dependencies"]
    assert conda == ["python=3.11", "pip"]
    assert pip == {"pip": ["--constraint constraints.txt", "-e .[all]"]}


def test_extra_all_holds_every_extra():
    extras = PROJECT["optional-dependencies"]
    named = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", extras["all"][0])[1].split(",")
    assert sorted(named) == sorted(set(extras) - {"all"} - APART)
    assert all(canonical(entry) in map(canonical, PINS) for name in APART for entry in extras[name])


def test_every_dependency_is_pinned_to_what_is_installed():
    wanted = closure(requirements()) - {"pip"}
    pins = {canonical(name): version for name, version in PINS.items()}
    assert wanted - set(pins) == set()
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in requirements()}
    differ = {name: (pins[name], version) for name, version in installed.items() if pins[name] != version}
    assert differ == {}


def test_importing_the_library_loads_nothing_heavy():
    heavy = ["transformers", "peft", "speechbrain", "torchaudio", "onnxruntime", "matplotlib", "papermill"]
    program = f"""
import json, sys, metis_lib, metis_lib.cli
print(json.dumps([name for name in {heavy} if name in sys.modules]))
"""
    assert json.loads(run(program)) == []


def test_public_names_come_at_first_use():
    assert run(
        "import sys, metis_lib; assert 'torch' not in sys.modules\n"
        "from metis_lib import Metis, Speech, MetisError; print(Metis.__name__, Speech.__name__)"
    ).split() == ["Metis", "Speech"]
    assert run("import metis_lib; print(hasattr(metis_lib, 'nope'))").strip() == "False"


def test_torchaudio_works_beside_this_torch():
    out = run(
        "from metis_lib.compat import import_torchaudio\n"
        "import torch\n"
        "audio = import_torchaudio()\n"
        "assert import_torchaudio() is audio\n"
        "print(audio.functional.resample(torch.ones(1, 16000), 16000, 8000).shape[1],"
        " audio.transforms.MelSpectrogram(16000, n_fft=400, n_mels=8)(torch.ones(1, 16000)).shape[1])"
    )
    assert out.split() == ["8000", "8"]


def test_peft_adds_lora_after_the_preparation():
    run(
        "from metis_lib.compat import prepare_torchaudio; prepare_torchaudio()\n"
        "import torch; from peft import LoraConfig, get_peft_model\n"
        "config = LoraConfig(r=2, target_modules=['0'])\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)\n"
        "assert model(torch.ones(1, 4)).shape == (1, 4)"
    )


def test_speechbrain_ecapa_runs_after_the_preparation():
    out = run(
        "from metis_lib.compat import prepare_torchaudio; prepare_torchaudio()\n"
        "import torch\n"
        "from speechbrain.lobes.features import Fbank\n"
        "from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN\n"
        "torch.manual_seed(0)\n"
        "net = ECAPA_TDNN(80, channels=[16, 16, 16, 16, 48], kernel_sizes=[5, 3, 3, 3, 1],"
        " dilations=[1, 2, 3, 4, 1], attention_channels=8, lin_neurons=12).eval()\n"
        "print(tuple(net(Fbank(n_mels=80)(torch.randn(1, 16000))).shape))"
    )
    assert out.strip() == "(1, 1, 12)"


def test_the_stub_serves_only_where_the_native_library_does_not_load():
    out = run(
        "import ctypes, importlib.util, pathlib, torch\n"
        "from metis_lib import compat\n"
        "home = pathlib.Path(importlib.util.find_spec('torchaudio').origin).parent\n"
        "try:\n    ctypes.CDLL(str(next(home.glob('lib/_torchaudio.*')))); loads = True\n"
        "except OSError:\n    loads = False\n"
        "compat.import_torchaudio(); print(loads, compat.is_stubbed())"
    )
    loads, stubbed = out.split()
    assert loads != stubbed


def test_the_doctor_names_every_part_and_never_raises(tmp_path):
    program = "from metis_lib import cli; cli.main(['doctor', '--json'])"
    report = json.loads(run(program, METIS_HOME=str(tmp_path), HF_HUB_OFFLINE="1"))
    lines = {check["name"]: check for check in report["checks"]}
    for name in (
        "python",
        "torch",
        "device",
        "bf16",
        "torchaudio",
        "lora",
        "phones",
        "nano",
        "disk",
        "notebooks",
    ):
        assert lines[name]["status"] == "ok", lines[name]
    for name in ("judge whisper-base", "judge ecapa", "judge speechmos", "peer nsnet2"):
        assert lines[name]["status"] == "warn" and "metis prepare" in lines[name]["fix"]
    assert report["ok"]


def test_the_doctor_turns_a_broken_part_into_a_line(monkeypatch):
    from metis_lib import doctor

    def broken():
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(doctor, "CHECKS", {"part": (broken, "fail", "mend it")})
    found = doctor.checks()
    assert found == [doctor.Check("part", "fail", "RuntimeError: out of luck", "mend it")]
    assert "mend it" in doctor.table(found)


@pytest.mark.setup
@pytest.mark.slow
def test_the_package_carries_weights_and_types(tmp_path):
    """A wheel built from a copy of this tree holds py.typed and every shipped weight."""
    import shutil
    import zipfile

    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "metis_lib", tree / "metis_lib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, timeout=600)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    carried = {path for path in (tree / "metis_lib").rglob("*") if path.is_file()}
    assert "metis_lib/py.typed" in names
    assert {str(path.relative_to(tree)) for path in carried} <= names
