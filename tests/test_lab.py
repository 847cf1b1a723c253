"""The laboratory without a browser: its functions, and what widgets do when their values change."""

from __future__ import annotations

import contextlib
import json
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pytest
import torch

from metis_lib import Metis, audio, cli, lab
from metis_lib.assets import sha256_file
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics
from metis_lib.evaluation.systems import load_items

ROOT = Path(__file__).resolve().parents[1]
HUMAN = ROOT / "eval" / "testsets" / "human"
SHORT = HUMAN / "cmu-forward.flac"
PROMPT = HUMAN / "librivox-0870.flac"


@pytest.fixture(scope="module")
def metis() -> Metis:
    return Metis.from_pretrained("debug", device="cpu")


@pytest.fixture
def laboratory(metis: Metis, tmp_path: Path) -> lab.Laboratory:
    made = lab.Laboratory(metis, tmp_path / "out")
    made.choose("se", {"steps": 2}, {"steps": 1}, source=str(SHORT))
    return made


def press(panel: lab.Panel, text: str) -> str:
    """Click a button wherever it is; what the status line says afterwards."""

    def below(widget: Any) -> Any:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from below(child)

    next(w for w in below(panel.box) if getattr(w, "description", "") == text and hasattr(w, "click")).click()
    return panel.status.value


@pytest.mark.parametrize("task", ["se", "vc", "tse", "tts", "l2s", "base"])
def test_the_code_of_a_sound_makes_it_again(metis: Metis, task: str) -> None:
    example = load_items("human", "tts" if task == "base" else task)[0]
    item = lab.item_of(task, example) | ({"text": "Go on."} if task == "tts" else {})
    options = {"steps": 2, "cfg": 1.5, "temperature": 0.7, "seed": 3}
    sound = metis.generate(task, [item], **options)[0]
    scope: dict[str, Any] = {}
    cell = lab.as_code(metis, task, item, options)
    assert str(lab.record.ROOT) not in cell  # what is shown works in another checkout
    exec(cell, scope)
    assert torch.equal(scope["speech"].wav, sound.wav) and scope["speech"].info == sound.info
    assert {key: sound.info[key] for key in ("task", "steps", "cfg", "seed")} == {
        "task": task, "steps": 2, "cfg": 1.5, "seed": 3,
    }  # fmt: skip


def test_the_code_names_what_is_not_the_default() -> None:
    half = Metis.from_pretrained("debug", device="cpu", dtype="bfloat16")
    assert "device='cpu', dtype='bfloat16')" in lab.as_code(half, "se", {"source": "a.wav"}, {})


def test_a_task_shows_what_it_takes(laboratory: lab.Laboratory) -> None:
    def shown() -> set[str]:
        return {key for key, field in laboratory.fields.items() if field.layout.display != "none"}

    assert shown() == {"source"} and laboratory.into.options == ("source",)
    laboratory.task.value = "tts"
    assert shown() == {"text", "prompt", "prompt_text", "language"} and laboratory.options("A")["cfg"] == 2.5
    second = laboratory.example.options[1][1]
    laboratory.example.value = second
    assert laboratory.item()["text"] == second.text and laboratory.item()["prompt"] == str(second.prompt)
    laboratory.task.value = "tse"
    laboratory.fields["text"].value = ""
    assert set(laboratory.item()) == {"source", "prompt"}, "without a text, extraction is not told any words"
    laboratory.fields["text"].value = "These words."
    assert set(laboratory.item()) == {"source", "prompt", "text", "prompt_text", "language"}
    with pytest.raises(MetisError, match="no weights for the task 'dance'"):
        laboratory.choose("dance")
    with pytest.raises(MetisError, match="a setting has steps, cfg, .*not 'candidates'"):
        laboratory.choose("se", {"candidates": 1})


def test_buttons_make_sounds_beside_their_source(laboratory: lab.Laboratory) -> None:
    assert press(laboratory, "Generate A") == "" and press(laboratory, "Generate B") == ""
    page = laboratory.result.value
    assert page.count("<audio") == 3 and "output A" in page and "output B" in page and "data:image/png" in page
    laboratory.sides["A"]["seed"].value = 5
    press(laboratory, "Generate A")
    assert len(laboratory.made) == 3 and "seed=5" in laboratory.code.value
    press(laboratory, "Generate A")
    assert len(laboratory.made) == 3, "what was made is not made again"


@pytest.mark.parametrize(
    ("source", "reason"), [("", "give source first"), ("no/such.wav", "no recording at no/such.wav")]
)
def test_a_refusal_is_a_line(laboratory: lab.Laboratory, source: str, reason: str) -> None:
    laboratory.fields["source"].value = source
    assert reason in press(laboratory, "Generate A") and "role='alert'" in laboratory.status.value
    assert laboratory.result.value == "" and not laboratory.working


def test_settings_are_compared_blind(laboratory: lab.Laboratory) -> None:
    orders, letters = [], []
    for answer in ["the first", "the second", "no preference", "the first", "the first", "the first"]:
        press(laboratory, "Compare blind")
        orders.append(laboratory.order)
        page = laboratory.ballot.value
        assert page.count("<audio") == 2 and "output" not in page + laboratory.result.value + laboratory.code.value
        assert press(laboratory, answer) == ""
        letters.append({"the first": orders[-1][0], "the second": orders[-1][1]}.get(answer, "none"))
    assert {"AB", "BA"} == set(orders), "the order is drawn"
    votes = laboratory.read_votes()
    assert [vote["vote"] for vote in votes] == letters and [vote["order"] for vote in votes] == orders
    assert votes[0]["A"]["steps"] == 2 and votes[0]["item"]["source"] == str(SHORT)
    count, p = lab.tally(votes, {side: laboratory.options(side) for side in "AB"})
    assert count["A"] + count["B"] == 5 and count["none"] == 1 and f"p = {p:.2f}" in laboratory.ballot.value
    again = lab.Laboratory(laboratory.metis, laboratory.out.parent / "again", seed=laboratory.seed)
    again.choose("se", {"steps": 2}, {"steps": 1}, source=str(SHORT))
    again.compare()
    assert again.order == orders[0], "by the seed"
    with pytest.raises(MetisError, match="nothing to vote on"):
        laboratory.vote("the first")
    laboratory.sides["B"]["steps"].value = 2
    assert "same setting" in press(laboratory, "Compare blind")


def test_a_vote_is_about_what_was_heard(laboratory: lab.Laboratory) -> None:
    laboratory.compare()
    heard = {side: laboratory.options(side) for side in "AB"}
    laboratory.sides["B"]["seed"].value = 33
    laboratory.fields["source"].value = str(PROMPT)
    laboratory.vote("the first")
    (vote,) = laboratory.read_votes()
    assert {side: vote[side] for side in "AB"} == heard and vote["item"]["source"] == str(SHORT)


def test_a_tally_is_of_its_pair_of_settings() -> None:
    votes = [{"A": 1, "B": 2, "vote": vote} for vote in ("A", "A", "A", "A", "A", "none")] + [
        {"A": 1, "B": 3, "vote": "B"}
    ]
    count, p = lab.tally(votes, {"A": 1, "B": 2})
    assert count == {"A": 5, "none": 1} and p == pytest.approx(2 / 32)
    assert lab.tally([], {"A": 1, "B": 2})[1] == 1.0


def test_the_microphone_keeps_its_level(laboratory: lab.Laboratory) -> None:
    wave = (0.1 * np.sin(np.arange(48_000) / 20)).astype("<f4")
    for number in (1, 2):
        laboratory.recorder._handle_custom_msg({"rate": 48_000}, [memoryview(wave.tobytes())])
        path = laboratory.out / "recordings" / f"recorded-00{number}.wav"
        assert laboratory.fields["source"].value == str(path)
    np.testing.assert_allclose(audio.read(path, 48_000).numpy(), wave, atol=1e-4)
    path.with_name("recorded-001.wav").unlink()
    laboratory.recorder._handle_custom_msg({"rate": 48_000}, [memoryview((0.5 * wave).tobytes())])
    assert laboratory.fields["source"].value.endswith("recorded-003.wav")  # none takes the place of another
    np.testing.assert_allclose(audio.read(path, 48_000).numpy(), wave, atol=1e-4)
    path = path.with_name("recorded-003.wav")
    laboratory.recorder._handle_custom_msg({"rate": 48_000}, [b""])
    assert "empty" in laboratory.status.value and laboratory.fields["source"].value == str(path)


def test_uploads_are_kept_as_they_are(laboratory: lab.Laboratory) -> None:
    def upload(name: str, content: bytes) -> None:
        about = {"name": name, "type": "", "size": len(content), "last_modified": datetime(2026, 1, 1)}
        laboratory.upload.value = ({**about, "content": memoryview(content)},)

    laboratory.task.value = "vc"
    laboratory.into.value = "prompt"
    upload("../../voice.flac", SHORT.read_bytes())
    path = laboratory.out / "recordings" / "voice.flac"
    assert path.read_bytes() == SHORT.read_bytes() and laboratory.fields["prompt"].value == str(path)
    upload("../../voice.flac", SHORT.read_bytes())
    assert laboratory.fields["prompt"].value == str(path)
    upload("voice.flac", PROMPT.read_bytes())  # another voice under the same name
    second = path.with_stem("voice-2")
    assert second.read_bytes() == PROMPT.read_bytes() and path.read_bytes() == SHORT.read_bytes()
    assert laboratory.fields["prompt"].value == str(second)
    laboratory.fields["prompt"].value = str(path)
    upload("words.txt", b"not a sound")
    assert "not audio" in laboratory.status.value and laboratory.fields["prompt"].value == str(path)


def test_settings_are_saved_as_cells(laboratory: lab.Laboratory) -> None:
    assert "generate something first" in press(laboratory, "Save as a cell")
    for side in "AB":
        laboratory.generate(side)
        press(laboratory, "Save as a cell")
    book = nbformat.read(laboratory.out / "saved.ipynb", 4)
    nbformat.validate(book)
    assert [cell.source for cell in book.cells] == [laboratory.code_of("A"), laboratory.code_of("B")]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"JPY_SESSION_NAME": "a.ipynb"}, True),
        ({"VSCODE_PID": "1"}, True),
        ({"JPY_SESSION_NAME": "a.ipynb", "METIS_PLAIN_PROGRESS": "1"}, False),
        ({"METIS_PLAIN_PROGRESS": "0"}, True),
    ],
)
def test_widgets_are_shown_where_they_live(
    environment: dict[str, str], expected: bool, laboratory: lab.Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("JPY_SESSION_NAME", "VSCODE_PID", "METIS_PLAIN_PROGRESS"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    laboratory.generate()
    shown = laboratory.show()
    assert (shown is laboratory.box) is expected is lab.live()
    assert expected or shown.data.count("<audio") == 2


# ---------------------------------------------------------------- tokens


@pytest.fixture
def explorer(metis: Metis) -> lab.TokenExplorer:
    return lab.TokenExplorer(metis, SHORT, seed=1)


def test_tokens_are_chosen_changed_and_taken_back(metis: Metis, explorer: lab.TokenExplorer) -> None:
    found = metis.tokens(SHORT)
    frames = explorer.original.shape[1]
    assert torch.equal(explorer.original[0], found["ssl"][:frames])
    assert torch.equal(explorer.original[1:], found["acoustic"][:frames].T)
    explorer.grid.frame, explorer.grid.row, explorer.grid.span = 10, 2, 4  # as a click does
    assert (explorer.frame.value, explorer.row.value, explorer.span.value) == (10, "2", 4)
    assert "Tokens of frame 10, at 0.20 s" in explorer.heard.value and explorer.heard.value.count("<audio") == 3
    assert explorer.token.value == int(explorer.original[2, 10])
    explorer.frame.value = 20  # as the slider does
    assert explorer.grid.frame == 20
    explorer.token.value = (int(explorer.original[2, 20]) + 1) % explorer.grid.sizes[2]
    press(explorer, "Set")
    assert set(explorer.tokens[2, 20:24].tolist()) == {explorer.token.value} and "(was " in explorer.heard.value
    places = (explorer.tokens != explorer.original).nonzero().tolist()
    assert [2, 20] in places and all(row == 2 and 20 <= frame < 24 for row, frame in places)
    assert np.argwhere(explorer.grid.changed).tolist() == places
    explorer.layers.value = 6  # as stage 2 leaves it
    press(explorer, "Undo all")
    assert torch.equal(explorer.tokens, explorer.original) and not np.any(explorer.grid.changed)
    assert explorer.layers.value == 12
    explorer.token.value = explorer.grid.sizes[2]
    assert "tokens of this layer lie in 0.." in press(explorer, "Set")


def test_drawn_tokens_follow_the_seed(metis: Metis, explorer: lab.TokenExplorer) -> None:
    same = lab.TokenExplorer(metis, SHORT, seed=1)
    for one in (explorer, same):
        one.choose(5, layer=1, frames=20)
        one.change()
    assert torch.equal(explorer.tokens, same.tokens) and not torch.equal(explorer.tokens, explorer.original)


def test_a_changed_frame_is_heard_where_it_is(explorer: lab.TokenExplorer) -> None:
    before = explorer.decode().wav
    assert explorer.result.value.count("<audio") == 3
    explorer.choose(60, layer=1, frames=5)
    explorer.change()
    after = explorer.decode().wav
    moved = (before != after).nonzero()[:, 0]
    assert 30 * 480 < int(moved.min()) <= 60 * 480 <= int(moved.max()) < 100 * 480
    explorer.layers.value = 1
    assert not torch.equal(explorer.decode().wav, after)
    assert torch.equal(explorer.decode().wav, explorer.speech(explorer.tokens[:2]).wav)


def test_the_last_frame_is_a_frame(explorer: lab.TokenExplorer) -> None:
    last = explorer.original.shape[1] - 1
    explorer.choose(last, layer=12, frames=50)
    explorer.change(0)
    assert explorer.tokens[12, last] == 0 and "<audio" in explorer.heard.value


def test_stage_2_gives_ssl_tokens_a_sound() -> None:
    nano = Metis.from_pretrained("nano", device="cpu")  # random weights say the same whatever the seed
    explorer = lab.TokenExplorer(nano, SHORT, seed=1)
    explorer.choose(0, layer=0, frames=30)
    explorer.change()
    kept = explorer.tokens[0].clone()
    press(explorer, "Sound by stage 2")
    assert torch.equal(explorer.tokens[0], kept) and not torch.equal(explorer.tokens[1:], explorer.original[1:])
    voice = (explorer.original[0], explorer.original[1:].T)
    made = explorer.tokens[1 : 1 + nano.stage2_full.config.num_quantizers]  # nano makes the first layers only
    assert explorer.layers.value == len(made) and torch.equal(
        explorer.tokens[1 + len(made) :], explorer.original[1 + len(made) :]
    )
    assert torch.equal(nano.acoustic_tokens(kept, voice, seed=1).T, made)
    assert not torch.equal(nano.acoustic_tokens(kept, voice, seed=2).T, made)


def test_another_recording_is_loaded(explorer: lab.TokenExplorer) -> None:
    frames = explorer.original.shape[1]
    explorer.choose(frames - 1)
    explorer.source.value = str(HUMAN / "uqm-syreen-021-01.flac")
    assert explorer.original.shape[1] != frames and explorer.frame.max == explorer.original.shape[1] - 1
    assert len(explorer.grid.tokens[0]) == explorer.original.shape[1] and explorer.grid.frame == 0
    explorer.source.value = "no/such.wav"
    assert "no recording" in explorer.status.value


# ---------------------------------------------------------------- evaluation


def test_ranks_by_the_better_side_with_failures_in_front() -> None:
    rows = [
        {"id": id, "wer": wer, "stoi": stoi} for id, wer, stoi in (("a", 0.1, 0.9), ("b", None, 0.2), ("c", 0.5, None))
    ]
    order = {key: "".join(r["id"] for r in lab.ranked(rows, key)) for key in ("wer", "stoi")}
    assert order == {"wer": "bca", "stoi": "cba"}
    assert "".join(r["id"] for r in lab.ranked(rows, "wer", best_first=True)) == "acb"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder, clip = tmp_path / "run", HUMAN / "cmu-forward.flac"
    entry = {"mean": 0.5, "ci95": None, "n": 2, "n_failed": 0, "protocol": "p"}
    (folder / "se").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"se": {name: {"wer": entry} for name in ("noisy", "nano")}}))
    (folder / "run.json").write_text('{"manifest_sha256": "x"}')
    for system, words, seed in (("noisy", "go forward", None), ("nano", "go <b> backward", 0)):
        place = folder / "se" / system
        (place / "audio").mkdir(parents=True)
        rows = []
        for number, wer in enumerate((0.25, 0.75)):
            row = {
                "id": f"u{number}",
                "system": system,
                "seed": seed,
                "text": "Go forward.",
                "heard": words,
                "wer": wer,
            }
            row |= {"audio": f"audio/u{number}.flac", "sha256": sha256_file(clip), "seconds": 2.0, "error": None}
            (place / row["audio"]).write_bytes(clip.read_bytes())
            rows.append(row | {"stoi": 0.5 + wer / 10})
        (place / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_browser_shows_the_worst_first(run: Path) -> None:
    browser = lab.EvaluationBrowser(run)
    assert browser.system.value == "nano", "the model, not a fixed row"
    assert [name for name, _ in browser.list.options] == ["0.75   u1, seed 0", "0.25   u0, seed 0"]
    page = browser.page.value
    assert (
        page.count("<audio") == 2 and "<mark" in page and "<b>go" not in page and "Spectrograms of nano, noisy" in page
    )
    browser.list.value = 1
    assert "<b>u0, seed 0</b>" in browser.page.value
    browser.score.value = "stoi"
    assert browser.list.options[0][0] == "0.53   u0, seed 0", "a low STOI is the bad one"
    browser.best.value = True
    assert browser.list.options[0][0] == "0.57   u1, seed 0" and "<b>u1, seed 0</b>" in browser.page.value
    browser.system.value = "noisy"
    assert browser.list.options[0][0].endswith("u1") and "Spectrograms of noisy, nano" in browser.page.value


def test_the_browser_says_what_was_made_anew_or_is_missing(run: Path) -> None:
    (run / "se/nano/audio/u1.flac").write_bytes((HUMAN / "cmu-cards.flac").read_bytes())
    (run / "se/noisy/audio/u1.flac").unlink()
    page = lab.EvaluationBrowser(run).page.value
    assert "not the very file that was judged: nano." in page and "no audio" in page
    with pytest.raises(MetisError, match="no finished run in"):
        lab.EvaluationBrowser(run / "se")


def test_the_browser_opens_the_committed_runs() -> None:
    found = [path for way in ("*", "nano/*") for path in ROOT.glob(f"results/{way}/summary.json")]
    folders = [path.parent for path in found if (path.parent / "run.json").is_file()]
    runs = [
        folder for folder in folders if set(json.loads((folder / "summary.json").read_text())) <= set(metrics.TASKS)
    ]
    assert runs
    for folder in set(folders) - set(runs):  # by test set: what the runs of make results say together
        with pytest.raises(MetisError, match="name the folder of one run"):
            lab.EvaluationBrowser(folder)
    for folder in runs:
        browser = lab.EvaluationBrowser(folder)
        for _, task in browser.task.options:
            browser.task.value = task
            assert browser.status.value == "" and len(browser.list.options) >= 6 and "scores" in browser.page.value


# ---------------------------------------------------------------- metis lab


def test_metis_lab_opens_a_notebook_by_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    calls: list[list[str]] = []

    def served(command: list[str], cwd: Path) -> Any:
        calls.append(command)
        return contextlib.nullcontext(SimpleNamespace(wait=lambda: 0))

    monkeypatch.setattr(subprocess, "Popen", served)
    for words, name in ([], "13_laboratory"), (["14"], "14_token_explorer"), (["00"], "00_quickstart"):
        assert cli.main(["lab", *words]) == 0
        assert f"--LabApp.default_url=/lab/tree/notebooks/{name}.ipynb" in calls[-1]
    assert cli.main(["lab", "77"]) == 2 and cli.main(["lab", "--folder", str(tmp_path)]) == 2
    assert "no notebooks/77*.ipynb" in capsys.readouterr().err and len(calls) == 3


# ---------------------------------------------------------------- the notebooks without a browser


@pytest.mark.notebooks
@pytest.mark.parametrize(
    ("name", "parameters", "players", "files"),
    [
        ("13_laboratory", {"model": "debug"}, 3, {"output.flac", "saved.ipynb"}),
        ("14_token_explorer", {"model": "debug"}, 11, {"tokens.flac", "changed.flac", "resounded.flac"}),
        ("15_evaluation_browser", {"runs": ["results/nano/human"], "many": 1}, 5, {"cmu-something.flac"}),
    ],
)
def test_papermill_gives_plain_outputs(
    name: str, parameters: dict[str, Any], players: int, files: set[str], tmp_path: Path
) -> None:
    from metis_lib.evaluation.runner import run_notebook

    executed, given = tmp_path / "executed.ipynb", parameters | {"out": str(tmp_path / "out")}
    assert run_notebook(ROOT / "notebooks" / f"{name}.ipynb", executed, given, tmp_path / "log") is None
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "text/html" in kinds and "application/vnd.jupyter.widget-view+json" not in kinds
    assert sum(output.get("data", {}).get("text/html", "").count("<audio") for output in outputs) == players
    assert files <= {path.name for path in (tmp_path / "out").rglob("*.*")}
