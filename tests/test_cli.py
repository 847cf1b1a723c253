"""The command line: answers, exit codes, one line for what is wrong, and a quick start."""

import contextlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from metis_lib import cli
from metis_lib.errors import MetisError

HUMAN = Path(__file__).parents[1] / "eval" / "testsets" / "human"

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMANDS = [
    "demo",
    *(f"prepare {name}" for name in cli.PREPARE),
    "evaluate",
    "report",
    "train part",
    "train finetune",
    "train queue",
    "bench train",
    *(f"checkpoint {name}" for name in cli.CHECKPOINT),
    "doctor",
    "lab",
    "generate se",
]


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """One second that sounds a little like a vowel."""
    path = tmp_path_factory.mktemp("voice") / "voice.wav"
    seconds = np.arange(24000) / 24000
    wave = sum(np.sin(2 * np.pi * 120 * k * seconds) / k for k in range(1, 20)) * (0.6 + 0.4 * np.sin(20 * seconds))
    noise = np.random.default_rng(0).standard_normal(24000)
    soundfile.write(path, 0.1 * wave + 0.005 * noise, 24000)
    return path


def se(source, output, *more):
    return cli.main(["generate", "se", "--model=debug", f"--input={source}", f"--output={output}", "--steps=2", *more])


def tts(prompt, output, *more, text="Hello there.", said="Good morning."):
    return cli.main(
        ["generate", "tts", "--model=debug", f"--prompt={prompt}", f"--output={output}", "--steps=2"]
        + [f"--text={text}", f"--prompt-text={said}", *more]
    )


# answers


def test_help_needs_no_heavy_library_and_under_a_second_of_cpu():
    heavy = ["torch", "numpy", "transformers", "soundfile", "papermill", "matplotlib", "pandas"]
    program = (
        "import sys; from metis_lib.cli import main; code = main(['--help'])\n"
        f"print([name for name in {heavy} if name in sys.modules], code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    assert "generate" in done.stdout and done.stderr == ""
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert cli.main([*command.split(), "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "metis_lib", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout) and done.returncode == 0
    done = subprocess.run([sys.executable, "-m", "metis_lib", "sing"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == "" and "sing" in done.stderr


def test_enhancing_writes_speech_as_long_as_its_input_and_the_seed_decides(voice, tmp_path, capsys):
    files = [tmp_path / "new" / name for name in ("a.wav", "b.wav", "c.wav")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert se(voice, file, f"--seed={seed}") == 0
        out = capsys.readouterr().out
        assert out.startswith(str(file)) and out.count("\n") == 1
    first, same, other = (soundfile.read(file)[0] for file in files)
    assert soundfile.info(files[0]).samplerate == 24000 and len(first) == 24000
    assert np.array_equal(first, same) and not np.array_equal(first, other)


def test_speaking_answers_one_json_document(voice, tmp_path):
    """In a process of its own, so that whatever libraries print counts."""
    file = tmp_path / "said.flac"
    command = [sys.executable, "-m", "metis_lib", "generate", "tts", "--model", "debug", "--text", "Hello there."]
    command += ["--prompt", str(voice), "--prompt-text", "Good morning.", "--output", str(file)]
    done = subprocess.run([*command, "--seconds", "0.5", "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["output"] == str(file) and document["seed"] == 0 and document["model"] == "debug"
    assert document["seconds"] == soundfile.info(file).duration == 0.5


def test_chatter_of_children_and_c_libraries_goes_to_stderr(capfd, monkeypatch):
    def fetch(name):
        print("from python")
        os.write(1, b"from a library\n")
        subprocess.run(["echo", "from a child"], check=True)
        return Path("folder")

    monkeypatch.setattr("metis_lib.assets.fetch", fetch)
    assert cli.main(["prepare", "judges", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == dict.fromkeys(cli.JUDGES, "folder")
    for line in ("from python", "from a library", "from a child"):
        assert line in captured.err


# what is wrong


def write(path, samples, rate=24000):
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, subtype="FLOAT")
    return path


def missing(folder, voice):
    return se(folder / "none.wav", folder / "out.wav")


def empty_file(folder, voice):
    (folder / "empty.wav").touch()
    return se(folder / "empty.wav", folder / "out.wav")


def empty_recording(folder, voice):
    return se(write(folder / "zero.wav", []), folder / "out.wav")


def nan(folder, voice):
    return se(write(folder / "nan.wav", [0.1, float("nan")] * 12000), folder / "out.wav")


def not_audio(folder, voice):
    (folder / "text.wav").write_text("this is no audio" * 100)
    return se(folder / "text.wav", folder / "out.wav")


def a_folder_as_input(folder, voice):
    return se(folder, folder / "out.wav")


def nothing_to_say(folder, voice):
    return tts(voice, folder / "out.wav", text="...")


def no_text(folder, voice):
    return tts(voice, folder / "out.wav", text="")


def prompt_says_nothing(folder, voice):
    return tts(voice, folder / "out.wav", said="?!")


def short_prompt(folder, voice):
    wave, rate = soundfile.read(voice)
    return tts(write(folder / "short.wav", wave[: rate // 10], rate), folder / "out.wav")


def missing_prompt(folder, voice):
    return tts(folder / "none.wav", folder / "out.wav")


def unknown_language(folder, voice):
    return tts(voice, folder / "out.wav", "--language=xx")


def endless(folder, voice):
    return tts(voice, folder / "out.wav", "--seconds=100000")


def unknown_model(folder, voice):
    return se(voice, folder / "out.wav", "--model=giant")


def unknown_device(folder, voice):
    return se(voice, folder / "out.wav", "--device=abacus")


def bad_steps(folder, voice):
    return se(voice, folder / "out.wav", "--steps=0")


def bad_seed(folder, voice):
    return se(voice, folder / "out.wav", f"--seed={2**64}")


def unknown_suffix(folder, voice):
    return se(voice, folder / "out.mp7")


def unwritable(folder, voice):
    (folder / "file").touch()
    return se(voice, folder / "file" / "out.wav")


def output_is_a_folder(folder, voice):
    (folder / "folder.wav").mkdir()
    return se(voice, folder / "folder.wav")


def unknown_asset(folder, voice):
    return cli.main(["prepare", "judges", "wisdom"])


def unknown_piece(folder, voice):
    return cli.main(["train", "part", "philosophy", "--out", str(folder / "system"), "--steps=1"])


def unknown_testset(folder, voice):
    return cli.main(["evaluate", "--testset=martian", f"--out={folder / 'out.wav'}"])


def unknown_system(folder, voice):
    return cli.main(["evaluate", "--systems=oracle", f"--out={folder / 'out.wav'}"])


def no_run(folder, voice):
    return cli.main(["report", str(folder)])


def no_checkpoint(folder, voice):
    return cli.main(["checkpoint", "inspect", str(folder)])


def damaged_checkpoint(folder, voice):
    (folder / "model.safetensors").write_bytes(b"not tensors")
    return cli.main(["checkpoint", "inspect", str(folder)])


def option_twice(folder, voice):
    return cli.main(["evaluate", "--tasks=se", "--option", "steps=10", "--option", "cfg=2.0", f"--out={folder}"])


def a_set_by_two_names(folder, voice):
    return cli.main(["evaluate", "--testset", "human", "--testsets=unseen", f"--out={folder}"])


def two_sets_of_one_name(folder, voice):
    return cli.main(["evaluate", "--testset", "human", "eval/testsets/human", f"--out={folder}"])


def unknown_task(folder, voice):
    return cli.main(["evaluate", "--tasks=sse", "--systems=nano", f"--out={folder / 'out.wav'}"])


def a_page_of_several_runs(folder, voice):
    return cli.main(["report", str(ROOT / "results" / "nano")])


CASES = [missing, empty_file, empty_recording, nan, not_audio, a_folder_as_input, nothing_to_say, no_text]
CASES += [prompt_says_nothing, short_prompt, missing_prompt, unknown_language, endless, unknown_model]
CASES += [unknown_device, bad_steps, bad_seed, unknown_suffix, unwritable, output_is_a_folder, unknown_asset]
CASES += [unknown_piece, unknown_testset, unknown_system, no_run, no_checkpoint, damaged_checkpoint, option_twice]
CASES += [a_set_by_two_names, two_sets_of_one_name, unknown_task, a_page_of_several_runs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_and_code_2(case, tmp_path, voice, capfd):
    assert case(tmp_path, voice) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("metis: ") and captured.err.count("\n") == 1, captured.err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.rglob("*.part"))


def test_bad_input_in_a_process_of_its_own(tmp_path):
    """Nothing that a library says at import stands beside the line; with --json the error is the document."""
    for more in ([], ["--json"]):
        command = [sys.executable, "-m", "metis_lib", "generate", "se", "--model=debug", "--input=none.wav"]
        done = subprocess.run(
            [*command, f"--output={tmp_path / 'out.wav'}", *more], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 2 and done.stderr == "metis: no recording at none.wav\n"
        assert (json.loads(done.stdout) if more else done.stdout) == (
            {"error": "no recording at none.wav"} if more else ""
        )
    assert not (tmp_path / "out.wav").exists()


def test_an_input_is_never_overwritten(voice, tmp_path, capsys):
    before = voice.read_bytes()
    assert se(voice, voice) == 2 and tts(voice, voice) == 2
    assert voice.read_bytes() == before and capsys.readouterr().err.count("also an input") == 2


def test_an_output_that_exists_survives_bad_input(tmp_path):
    old = tmp_path / "out.wav"
    old.write_bytes(b"precious")
    assert se(tmp_path / "none.wav", old) == 2
    assert old.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "arguments", ["generate", "generate se", "generate sing", "train", "evaluate --tasks sing", "prepare a b"]
)
def test_wrong_usage_is_code_2_and_nothing_on_stdout(arguments, capsys):
    assert cli.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


def test_an_interrupt_is_130_and_a_bug_is_not_hidden(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("metis_lib.assets.fetch", interrupted)
    assert cli.main(["prepare", "judges"]) == 130

    def broken(name):
        raise OSError("a socket")

    monkeypatch.setattr("metis_lib.assets.fetch", broken)
    with pytest.raises(OSError, match="a socket"):
        cli.main(["prepare", "judges"])


# the other commands


def test_inspecting_a_system_counts_parameters_and_shows_cards(tmp_path, capsys):
    import torch

    from metis_lib.checkpoints import save_part
    from metis_lib.config import SSLConfig, Stage1Config

    save_part(tmp_path / "ssl", {"a": torch.zeros(3, 4), "b": torch.zeros(5)}, SSLConfig(), {"licence": "free"})
    save_part(tmp_path / "stage1", {"c": torch.zeros(2, 2)}, Stage1Config(), dtype=torch.float32)
    assert cli.main(["checkpoint", "inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["parameters"] == 21
    first, second = document["parts"]
    assert (first["file"], first["type"], first["parameters"], first["tensors"]) == (
        "ssl/model.safetensors",
        "SSLConfig",
        17,
        2,
    )
    assert first["card"] == {"licence": "free"} and first["dtypes"] == ["BF16"] and second["dtypes"] == ["F32"]
    assert cli.main(["checkpoint", "inspect", str(tmp_path / "ssl")]) == 0
    assert "licence: free" in capsys.readouterr().out


def test_systems_go_to_the_tasks_that_know_them():
    command = cli.Evaluate(tasks=("se", "tts"), systems=("nano", "noisy"))
    assert command._systems() == {"se": ["nano", "noisy"], "tts": ["nano"]}
    assert cli.Evaluate()._systems() is None
    with pytest.raises(MetisError, match="none of the systems belongs to the task codec"):
        cli.Evaluate(systems=("noisy",))._systems()
    with pytest.raises(MetisError, match="leave --systems out"):
        cli.Evaluate(tasks=("omni",), systems=("nano",))._systems()


def test_the_demo_prepares_judges_and_evaluates_everything(monkeypatch, tmp_path, capsys):
    fetched, asked = [], {}

    def evaluate(tasks, systems, testset, out, **settings):
        asked.update(settings, tasks=tasks, systems=systems, testset=testset)
        return SUMMARY

    monkeypatch.setattr("metis_lib.assets.fetch", lambda name: fetched.append(name) or Path(name))
    monkeypatch.setattr("metis_lib.evaluation.runner.evaluate", evaluate)
    assert cli.main(["demo", f"--out={tmp_path}"]) == 0
    assert fetched == list(cli.JUDGES)
    assert asked["tasks"] == ("codec", "se", "tts") and asked["systems"] is None and asked["testset"] == "human"
    out = capsys.readouterr().out
    assert "Speech enhancement" in out and str(tmp_path / "index.html") in out
    assert cli.main(["demo", f"--out={tmp_path}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"] == SUMMARY


def test_a_failed_evaluation_shows_what_was_done_and_is_code_2(monkeypatch, capsys):
    from metis_lib.evaluation import runner

    def evaluate(*arguments, **settings):
        raise runner.EvaluationFailed("tts failed; tts: no voice", SUMMARY)

    monkeypatch.setattr(runner, "evaluate", evaluate)
    assert cli.main(["evaluate"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Speech enhancement" in captured.err
    assert captured.err.splitlines()[-1] == "metis: tts failed; tts: no voice"


def test_omni_shows_the_tables_of_its_own_folder(monkeypatch, tmp_path, capsys):
    from metis_lib.evaluation import runner

    def evaluate(tasks, systems, testset, out, **settings):
        (out / "omni").mkdir(exist_ok=True)
        (out / "omni" / "summary.json").write_text(json.dumps(SUMMARY))
        return {}

    monkeypatch.setattr(runner, "evaluate", evaluate)
    assert cli.main(["evaluate", "--tasks", "omni", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "Speech enhancement" in said and said.endswith(f"Listen and read: {tmp_path / 'omni' / 'index.html'}\n")
    assert cli.main(["evaluate", "--tasks", "omni", f"--out={tmp_path}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["summary"] == {"omni": SUMMARY} and document["index"].endswith("omni/index.html")

    def fails(*arguments, **settings):
        raise runner.EvaluationFailed("omni failed; omni: no voice", {})

    monkeypatch.setattr(runner, "evaluate", fails)  # tables of an earlier run are not those of this one
    assert cli.main(["evaluate", "--tasks", "omni", f"--out={tmp_path}"]) == 2
    assert "Speech enhancement" not in capsys.readouterr().err


def test_the_doctor_exits_with_1_only_if_a_needed_part_fails(monkeypatch, capsys):
    from metis_lib import doctor

    for status, code in (("ok", 0), ("warn", 0), ("fail", 1)):
        monkeypatch.setattr(doctor, "CHECKS", {"part": (lambda s=status: (s, "detail", "mend it"), "fail", "")})
        assert cli.main(["doctor", "--json"]) == code
        document = json.loads(capsys.readouterr().out)
        assert document["ok"] is (code == 0) and document["checks"][0]["status"] == status


def test_lab_ends_its_server_when_it_is_told_to_end(tmp_path):
    """Python itself stands for JupyterLab here: it says where it is, and waits."""
    server, note = tmp_path / "server", tmp_path / "pid"
    server.write_text(f"#!/bin/sh\necho $$ > {note}.part && mv {note}.part {note}\nexec sleep 60\n")
    server.chmod(0o755)
    code = f"import sys; sys.executable = {str(server)!r}; from metis_lib import cli; sys.exit(cli.main(['lab']))"
    lab = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    for _ in range(600):
        if note.is_file():
            break
        time.sleep(0.1)
    lab.terminate()
    assert lab.wait(timeout=20) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_lab_serves_the_notebooks(monkeypatch):
    calls = []

    def served(command, cwd):
        calls.append((command, cwd))
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: 0))

    monkeypatch.setattr(subprocess, "Popen", served)
    assert cli.main(["lab", "--port=9999"]) == 0
    command, folder = calls[0]
    assert command[1:3] == ["-m", "jupyterlab"] and "--port=9999" in command and folder == ROOT
    target = next(word for word in command if "default_url" in word).split("/lab/tree/")[1]
    assert (ROOT / target).is_file()


# README


def entry(mean, protocol):
    return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "n": 12, "n_failed": 0, "protocol": protocol}


def summary_of_two_systems():
    from metis_lib.evaluation.metrics import METRICS

    return {
        "se": {
            "noisy": {"wer": entry(0.25, METRICS["wer"]), "stoi": entry(0.75, METRICS["stoi"])},
            "nano": {
                "wer": entry(0.5, METRICS["wer"]) | {"n": 10, "n_failed": 2},
                "stoi": entry(0, METRICS["stoi"]) | {"mean": None, "ci95": None, "n": 0, "n_failed": 12},
            },
        }
    }


SUMMARY = summary_of_two_systems()
RUN = {"commit": "c" * 40, "dirty": False, "checkpoint_sha256": "d" * 64, "manifest_sha256": "e" * 64, "limit": None}


def test_readme_results_are_filled_between_the_markers_and_nowhere_else(tmp_path):
    from metis_lib.evaluation import report

    file = tmp_path / "README.md"
    file.write_text("before\n\n<!-- results -->\nold\n<!-- /results -->\n\nafter\n")
    report.fill_readme(file, report.readme_results(SUMMARY, RUN))
    text = file.read_text()
    assert text.startswith("before\n\n<!-- results -->\n") and text.endswith("<!-- /results -->\n\nafter\n")
    assert "old" not in text and "0.25<br><sub>0.15 to 0.35</sub>" in text
    assert "2 failed" in text and "failed (12)" in text and "WER (mean) ↓" in text and "STOI ↑" in text
    assert "c" * 12 in text and "d" * 12 in text and "e" * 12 in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    again = report.fill_readme(file, report.readme_results(SUMMARY, RUN)).read_text()
    assert again == text


def test_readme_results_refuse_mixed_protocols_and_missing_markers(tmp_path):
    from metis_lib.evaluation import report

    mixed = summary_of_two_systems()
    mixed["tts"] = {"nano": {"wer": entry(0.1, "wer/another")}}
    with pytest.raises(MetisError, match="was measured by"):
        report.readme_results(mixed, RUN)
    (tmp_path / "README.md").write_text("nothing here")
    with pytest.raises(MetisError, match="markers"):
        report.fill_readme(tmp_path / "README.md", "x")
    with pytest.raises(MetisError, match="clone"):
        report.fill_readme(tmp_path / "none.md", "x")


def test_readme_holds_the_markers_once_and_its_links_lead_somewhere():
    text = README.read_text()
    assert text.count("<!-- results -->") == text.count("<!-- /results -->") == 1
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
        dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
        assert dead == [], page.name


def test_every_command_in_the_documentation_parses():
    lines = []
    for page in (README, *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), flags=re.S):
            lines += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("metis ")]
    assert len(lines) >= 5
    for line in lines:
        assert isinstance(cli.parse(shlex.split(line, comments=True)[1:]), cli.Command), line


@pytest.mark.data
def test_own_recordings_become_tokens_in_three_commands(tmp_path, capsys):
    """What docs/own_data.md promises: folder to manifest to report to tokens, the bad recording named."""
    said = tmp_path / "mine" / "anna"
    said.mkdir(parents=True)
    recordings = [path for path in sorted(HUMAN.glob("*.flac")) if "noisy" not in path.name][:2]
    for path in recordings:
        (said / path.name).write_bytes(path.read_bytes())
    (said / "broken.wav").write_bytes(b"RIFF")
    corpus = tmp_path / "corpus"
    assert cli.main(["prepare", "manifest", str(tmp_path / "mine"), f"--out={corpus}", "--licence=CC0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["utterances"] == 2 and sum(found["refused"].values()) == 1
    manifest = str(corpus / "manifest.jsonl")
    assert cli.main(["prepare", "report", manifest, f"--out={tmp_path / 'report.html'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["utterances"] == 2 and (tmp_path / "report.html").is_file()
    assert cli.main(["prepare", "tokens", manifest, f"--out={tmp_path / 'shards'}", "--system=debug", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 2


def test_a_reader_may_stop_reading():
    command = f"{sys.executable} -m metis_lib checkpoint inspect nano | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("file") and done.stderr == ""
