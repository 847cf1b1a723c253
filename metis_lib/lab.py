"""The laboratory of the notebooks: make sound and compare it blind, change tokens, go through an evaluation.

Whatever is heard or seen is HTML that :meth:`Panel.show` gives alone where nobody can move widgets (papermill).
"""

from __future__ import annotations

import html
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import torch
import traitlets
from torch import Tensor

from metis_lib import audio, notebook
from metis_lib.assets import sha256_file
from metis_lib.audio import Speech
from metis_lib.config import AUDIO_RATE, FRAME_RATE
from metis_lib.data.store import read_jsonl
from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics, record, report
from metis_lib.evaluation.systems import Item, load_items, testset_folder
from metis_lib.pipeline import SOURCES, Limits, Metis
from metis_lib.tasks import TASKS

CALLS = {"tts": "speak", "vc": "convert", "tse": "extract", "se": "enhance", "l2s": "voice_lips", "base": "go_on"}
"""Task to the method of :class:`Metis` that does it; its first argument is the first of ``SOURCES``."""
PLACES = ("source", "video", "prompt")
"""What a task takes from a file."""
BALLOT: dict[str, int | None] = {"the first": 0, "no preference": None, "the second": 1}
"""Answers to: which is better?"""
STYLE = (
    "<style>.metis audio {width: 16em; display: block} .metis table {margin: 0} .metis img {max-width: 100%}"
    " .metis td, .metis th {vertical-align: top; text-align: left !important}</style>"
)


def live() -> bool:
    """Whether somebody can move widgets: in JupyterLab and VS Code, not under papermill, which starts its own kernel.

    ``METIS_PLAIN_PROGRESS`` decides where it is set: 1 for plain outputs, 0 for widgets.
    """
    wish = os.environ.get("METIS_PLAIN_PROGRESS")
    return wish == "0" or (wish != "1" and not {"JPY_SESSION_NAME", "VSCODE_PID"}.isdisjoint(os.environ))


# ------------------------------------------------------------------ without widgets


def as_code(metis: Metis, task: str, item: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """The cell that makes a sound again: :meth:`Metis.generate` of one ``item`` with ``options``, as Python.

    Files of the repository are named from its ``ROOT``, so that the cell works in another checkout.
    """
    first, dtype = SOURCES[task][0][0], str(getattr(metis.store, "dtype", torch.float32)).removeprefix("torch.")
    shown = {key: repr(value) for key, value in {**item, **options}.items()}
    for key in [key for key in PLACES if key in item and Path(item[key]).is_relative_to(record.ROOT)]:
        shown[key] = f"ROOT / {Path(item[key]).relative_to(record.ROOT).as_posix()!r}"
    root = "from metis_lib.evaluation.record import ROOT\n" * any(x.startswith("ROOT") for x in shown.values())
    given = [shown[first], *(f"{key}={value}" for key, value in shown.items() if key != first)]
    system = {"device": str(metis.device), "dtype": dtype, "compat": metis.compat}
    loaded = "".join(f", {key}={value!r}" for key, value in system.items() if value not in (None, "float32"))
    call = "".join(f"    {line},\n" for line in given)
    return (
        f"from metis_lib import Metis\n{root}\n"
        f"metis = Metis.from_pretrained({metis.name!r}{loaded})\nspeech = metis.{CALLS[task]}(\n{call})\nspeech"
    )


def item_of(task: str, example: Item) -> dict[str, str]:
    """What a task takes, from a row of a test set."""
    places = {"source": example.noisy or example.clean, "prompt": example.prompt or example.clean}
    found = {"video": example.video, "text": example.text, "prompt_text": example.prompt_text, **places}
    return {key: str(found[key]) for key in SOURCES[task][0] if found[key]}


def tally(votes: Sequence[Mapping[str, Any]], pair: Mapping[str, Any]) -> tuple[Counter[str], float]:
    """Votes (``A``, ``B``, ``none``) on one pair of settings ``{A, B}``, and p of a two-sided binomial test."""
    from scipy.stats import binomtest

    count = Counter(vote["vote"] for vote in votes if all(vote[side] == pair[side] for side in "AB"))
    clear = count["A"] + count["B"]
    return count, float(binomtest(count["A"], clear).pvalue) if clear else 1.0


def ranked(rows: Sequence[dict[str, Any]], score: str, best_first: bool = False) -> list[dict[str, Any]]:
    """Rows by a score, worst first (high is bad unless ``BETTER`` says ↑); a row without it failed: worst of all."""
    sign = -1 if metrics.BETTER.get(score) == "↑" else 1
    value = {id(row): sign * row[score] if row.get(score) is not None else np.inf for row in rows}
    return sorted(rows, key=lambda row: value[id(row)], reverse=not best_first)


# ------------------------------------------------------------------ widgets


class Recorder(anywidget.AnyWidget):
    """A button for the microphone; sends ``{rate}`` and float32 samples."""

    _esm = Path(__file__).with_name("lab.js").read_text(encoding="utf-8")
    kind = traitlets.Unicode("recorder").tag(sync=True)
    longest = traitlets.Float(Limits().whole).tag(sync=True)


class Grid(anywidget.AnyWidget):
    """``tokens[row][frame]`` below ``sizes[row]`` to click on, with ``names`` of rows; ``changed`` marks some."""

    _esm = Recorder._esm
    kind = traitlets.Unicode("grid").tag(sync=True)
    tokens: Any = traitlets.List().tag(sync=True)
    changed: Any = traitlets.List().tag(sync=True)
    sizes: Any = traitlets.List().tag(sync=True)
    names: Any = traitlets.List().tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    row = traitlets.Int(0).tag(sync=True)
    span = traitlets.Int(1).tag(sync=True)


class Panel:
    """Widgets, and areas of HTML that they fill; a refusal is a line in ``status``, not a traceback."""

    def __init__(self) -> None:
        self.status, self.box, self.areas = widgets.HTML(), widgets.VBox(), list[widgets.HTML]()
        self.working = False

    def area(self) -> Any:
        """A place for HTML."""
        self.areas.append(_field(widgets.HTML))
        return self.areas[-1]

    def button(self, text: str, work: Callable[[], Any], style: str = "") -> Any:
        """A button that does ``work``."""
        made = widgets.Button(description=text, button_style=style)
        made.on_click(lambda pressed: self.do(work, pressed))
        return made

    def do(self, work: Callable[[], Any], pressed: Any = None) -> None:
        """Work, and say so; what the work itself sets off is passed over."""
        if self.working:
            return
        self.working, self.status.value, said = True, "<span role='status'>working &hellip;</span>", ""
        if pressed:
            pressed.disabled = True
        try:
            work()
        except MetisError as error:
            said = f"<b role='alert'>{html.escape(str(error))}</b>"
        finally:
            self.working, self.status.value = False, said
            if pressed:
                pressed.disabled = False

    def show(self) -> Any:
        """The widgets, or what they show as plain HTML; see :func:`live`."""
        from IPython.display import HTML

        return self.box if live() else HTML("".join(area.value for area in self.areas))


def _field(kind: Any, description: str = "", **more: Any) -> Any:
    style = {"description_width": "6.5em"} if description else {}
    return kind(description=description, layout=widgets.Layout(width="auto"), style=style, **more)


def _offer(field: Any, options: Sequence[Any]) -> None:
    field.options = options
    field.index = 0 if options else None


def _put(area: Any, *parts: str) -> None:
    area.value = f"{STYLE}<div class='metis jp-RenderedHTMLCommon'>{''.join(parts)}</div>"


def _table(row: Mapping[str, Any]) -> str:
    return notebook.listening_table([row]).data


def _pictures(sources: Mapping[str, audio.Source]) -> str:
    names, picture = html.escape(", ".join(sources)), notebook.png(notebook.spectrograms(sources))
    return f"<img alt='Spectrograms of {names}' src='{picture}'>"


class Laboratory(Panel):
    """Any task on any recording, with two settings A and B, heard beside the input or blind.

    Args:
        metis: the system.
        out: folder for recordings, votes (``votes.jsonl``) and saved cells (``saved.ipynb``).
        testset: where the examples come from.
        seed: of the order in which clips are heard blind.
    """

    def __init__(self, metis: Metis, out: str | Path, *, testset: str | Path = "human", seed: int = 0) -> None:
        super().__init__()
        self.metis, self.out, self.testset, self.seed = metis, Path(out), testset, seed
        self.made: dict[str, Speech] = {}  # code to its sound
        self.last, self.order = "", ""  # the code of the last sound; the sides of the two clips to vote on
        omni = TASKS["omni"].mixture if "omni" in metis.tasks else {}
        titles = {task: metrics.TASKS[task]["title"] for task in CALLS if task in metis.tasks or task in omni}
        tasks = [*((title, task) for task, title in titles.items()), ("Going on (pre-trained model)", "base")]
        self.task, self.example = _field(widgets.Dropdown, "task", options=tasks), _field(widgets.Dropdown, "example")
        known = [str(path) for path in sorted(testset_folder(testset).rglob("*.flac"))]
        self.fields = {key: _field(widgets.Combobox, key, options=known) for key in PLACES}
        self.fields |= {key: _field(widgets.Textarea, key, rows=2) for key in ("prompt_text", "text")}
        self.fields["language"] = _field(widgets.Text, "language", value="en")
        self.sides = {side: _setting() for side in "AB"}
        self.into = _field(widgets.Dropdown, "new one is")
        self.recorder, self.upload = Recorder(), widgets.FileUpload(accept="audio/*,video/*,.npz")
        self.result, self.ballot, self.code = self.area(), self.area(), self.area()
        self.votes = [self.button(answer, partial(self.vote, answer)) for answer in BALLOT]
        self.recorder.on_msg(lambda _, about, data: self.do(lambda: self.record(about["rate"], data[0])))
        self.upload.observe(lambda change: self.do(lambda: self.keep(change["new"])), "value")
        self._task_chosen()
        self._ask("")
        self.task.observe(lambda _: self.do(self._task_chosen), "value")
        self.example.observe(lambda _: self.do(self._example_chosen), "value")
        half, sides = widgets.Layout(width="50%"), []
        for side, fields in self.sides.items():
            make = self.button(f"Generate {side}", partial(self.generate, side), "primary")
            sides.append(widgets.VBox([widgets.HTML(f"<b>Setting {side}</b>"), *fields.values(), make], layout=half))
        inputs = [self.task, self.example, *self.fields.values(), self.into, widgets.HBox([self.recorder, self.upload])]
        actions = [self.button("Compare blind", self.compare), self.button("Save as a cell", self.save), self.status]
        self.box.children = [
            widgets.HBox([widgets.VBox(inputs, layout=half), widgets.HBox(sides, layout=half)]),
            widgets.HBox(actions), self.result, self.ballot, widgets.HBox(self.votes), self.code,
        ]  # fmt: skip

    def choose(self, task: str, a: Mapping[str, Any] = {}, b: Mapping[str, Any] = {}, **item: str) -> None:
        """Choose a task, options of the settings A and B, and what the task takes, as by hand."""
        if task not in [key for _, key in self.task.options]:
            raise MetisError(f"the system {self.metis.name!r} has no weights for the task {task!r}")
        self.task.value = task
        for side, options in (("A", a), ("B", b)):
            for key, value in options.items():
                if key not in self.sides[side]:
                    raise MetisError(f"a setting has {', '.join(self.sides[side])}, not {key!r}")
                self.sides[side][key].value = value
        for key, text in item.items():
            self.fields[key].value = str(text)

    def item(self) -> dict[str, str]:
        """What the task is asked to work on."""
        given = {k: f.value.strip() for k, f in self.fields.items() if f.layout.display != "none" and f.value.strip()}
        told = self.task.value != "tse" or "text" in given
        return {key: value for key, value in given.items() if told or key in SOURCES["tse"][0]}

    def options(self, side: str) -> dict[str, Any]:
        """The decoding options of setting A or B."""
        return {key: round(field.value, 4) for key, field in self.sides[side].items()}

    def code_of(self, side: str) -> str:
        """The Python of setting A or B; MetisError where the task lacks something."""
        item = self.item()
        if missing := [key for key in SOURCES[self.task.value][0] if key not in item]:
            raise MetisError(f"give {' and '.join(missing)} first")
        return as_code(self.metis, self.task.value, item, self.options(side))

    def make(self, side: str) -> Speech:
        """The sound of setting A or B; one that was made before is taken again."""
        code = self.code_of(side)
        if code not in self.made:
            self.made[code] = self.metis.generate(self.task.value, [self.item()], **self.options(side))[0]
        self.last = code
        return self.made[code]

    def generate(self, side: str = "A") -> None:
        """Make the sound of a setting and show it beside what it was made from."""
        self.make(side)
        self._ask("")
        item, codes = self.item(), {side: self.code_of(side) for side in "AB"}
        heard: dict[str, Any] = {key: Path(item[key]) for key in ("source", "prompt") if key in item}
        heard |= {f"output {side}": self.made[code] for side, code in codes.items() if code in self.made}
        self.ballot.value = ""
        _put(self.result, _table(heard), _pictures(heard))
        _put(self.code, f"This cell makes the last sound again:<pre>{html.escape(self.last)}</pre>")

    def compare(self) -> None:
        """Make both sounds and show them without their names, in an order that is drawn."""
        if self.options("A") == self.options("B"):
            raise MetisError("A and B are the same setting; change one of them")
        sounds = {side: self.make(side) for side in "AB"}
        self.compared = {"task": self.task.value, "item": self.item(), **{side: self.options(side) for side in "AB"}}
        turn = random.Random(f"{self.seed} {len(self.read_votes())}").random() < 0.5
        self._ask("AB" if turn else "BA")
        self.result.value = self.code.value = ""
        clips = zip(BALLOT, (sounds[self.order[0]], None, sounds[self.order[1]]), strict=True)
        _put(self.ballot, _table({name: clip for name, clip in clips if clip}), "<p>Which is better?</p>")

    def vote(self, answer: str) -> None:
        """Answer (one of ``BALLOT``), see which was which, and the votes so far on these two settings."""
        if not self.order:
            raise MetisError("there is nothing to vote on; compare blind first")
        pair, place = self.compared, BALLOT[answer]  # what was heard; the sliders may have moved since
        vote = {**pair, "order": self.order}
        vote["vote"] = "none" if place is None else self.order[place]
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "votes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(vote, ensure_ascii=False) + "\n")
        order = self.order
        self._ask("")  # an answer counts once
        self.generate("A")
        count, p = tally(self.read_votes(), pair)
        so_far = f"A {count['A']}, B {count['B']}, no preference {count['none']} (binomial test: p = {p:.2f})"
        told = f"The first was {order[0]}, the second {order[1]}; you chose {answer}."
        _put(self.ballot, f"<p>{told} Votes so far on these two settings: {so_far}.</p>")

    def read_votes(self) -> list[dict[str, Any]]:
        """All votes so far."""
        return read_jsonl(self.out / "votes.jsonl")

    def save(self) -> Path:
        """Append the cell of the last sound to the notebook ``saved.ipynb``."""
        import nbformat

        if not self.last:
            raise MetisError("generate something first")
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "saved.ipynb"
        book = nbformat.read(path, 4) if path.is_file() else nbformat.v4.new_notebook()
        book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        book.cells.append(nbformat.v4.new_code_cell(self.last))
        nbformat.write(book, path)
        _put(self.code, f"The last cell of {html.escape(str(path))}:<pre>{html.escape(self.last)}</pre>")
        return path

    def record(self, rate: int, samples: bytes) -> None:
        """Keep what the microphone heard (float32 at ``rate`` Hz) and make it the source or the prompt."""
        taken = [int(p.stem[9:]) for p in self.out.glob("recordings/recorded-*.wav") if p.stem[9:].isdecimal()]
        path = self.out / "recordings" / f"recorded-{max(taken, default=0) + 1:03d}.wav"
        audio.write(path, audio.load((np.frombuffer(samples, "<f4"), rate), rate), rate)
        self.fields[self.into.value].value = str(path)

    def keep(self, files: Sequence[Mapping[str, Any]]) -> None:
        """Keep uploaded files as they are; the last becomes the source, the prompt or the video."""
        for file in files:
            first = path = self.out / "recordings" / Path(file["name"]).name
            count = 1
            while path.exists() and path.read_bytes() != bytes(file["content"]):  # the same name, another recording
                count += 1
                path = first.with_stem(f"{first.stem}-{count}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file["content"])
            if self.into.value != "video":
                audio.read(path, AUDIO_RATE)
            self.fields[self.into.value].value = str(path)

    def _ask(self, order: str) -> None:
        self.order = order
        for button in self.votes:
            button.layout.display = "" if order else "none"

    def _task_chosen(self) -> None:
        task, (needed, more) = self.task.value, SOURCES[self.task.value]
        shown = {*needed, *(more if task == "tts" or "omni" in self.metis.tasks else ())}
        for key, field in self.fields.items():
            field.layout.display = "" if key in shown else "none"
        _offer(self.into, [key for key in PLACES if key in shown])
        for side, fields in self.sides.items():
            for key in ("steps", "cfg", "temperature"):
                fields[key].value = getattr(self.metis.options(task).stage1, key)
            fields["steps"].value = 4 if side == "B" else fields["steps"].value
        try:
            examples = load_items(self.testset, "tts" if task == "base" else task)
        except MetisError:
            examples = []
        _offer(self.example, [(item.id, item) for item in examples])
        self._example_chosen()

    def _example_chosen(self) -> None:
        for key, value in (item_of(self.task.value, self.example.value) if self.example.value else {}).items():
            self.fields[key].value = value


def _setting() -> dict[str, Any]:
    """Widgets of a setting, by the name of the option."""
    return {
        "steps": _field(widgets.IntSlider, "steps", min=1, max=64),
        "cfg": _field(widgets.FloatSlider, "CFG", max=6.0, step=0.1),
        "temperature": _field(widgets.FloatSlider, "temperature", max=2.0, step=0.05),
        "seed": _field(widgets.BoundedIntText, "seed", max=2**31 - 1),
    }


class TokenExplorer(Panel):
    """The tokens of a recording: choose frames, hear what their tokens are, change them, decode.

    Row 0 are SSL tokens (stage 2 gives them a sound), rows 1 to Q the layers of the codec.
    """

    def __init__(self, metis: Metis, source: str | Path, *, seed: int = 0) -> None:
        super().__init__()
        self.metis, self.generator, self.seed = metis, torch.Generator().manual_seed(seed), seed
        count = metis.acoustic.config.num_quantizers
        sizes = [metis.semantic.config.codebook_size, *[metis.acoustic.config.codebook_size] * count]
        self.rows = ["SSL", *map(str, range(1, count + 1))]
        self.grid = Grid(sizes=sizes, names=self.rows)
        self.source = _field(widgets.Combobox, "recording", continuous_update=False)
        self.frame, self.span = (_field(widgets.IntSlider, k, continuous_update=False) for k in ("frame", "frames"))
        self.span.min, self.span.max = 1, 50
        self.row, self.token = _field(widgets.Dropdown, "layer", options=self.rows), _field(widgets.IntText, "token")
        self.layers = _field(widgets.IntSlider, "layers", min=1, max=count, value=count)
        self.heard, self.result = self.area(), self.area()
        self.load(source)
        widgets.link((self.grid, "frame"), (self.frame, "value"))
        widgets.link((self.grid, "span"), (self.span, "value"))
        widgets.link((self.grid, "row"), (self.row, "index"))
        self.source.observe(lambda change: self.do(lambda: self.load(change["new"])), "value")
        self.grid.observe(lambda _: self.do(self.listen), ["frame", "row", "span"])
        buttons = [
            self.button("Set", lambda: self.change(self.token.value)), self.button("Random", self.change),
            self.button("Undo all", self.undo), self.button("Decode", self.decode, "primary"),
            self.button("Sound by stage 2", self.sound, "primary"), self.status,
        ]  # fmt: skip
        lines = [[self.source, self.layers], [self.frame, self.span, self.row, self.token], buttons]
        for field in lines[0] + lines[1]:
            field.layout.flex = "1 1 0"
        self.box.children = [self.grid, *map(widgets.HBox, lines), *self.areas]

    def load(self, source: str | Path) -> None:
        """Take the tokens of a recording of at most a minute."""
        found = self.metis.tokens(source)
        frames = min(len(found["ssl"]), len(found["acoustic"]))
        self.original = torch.cat([found["ssl"][None, :frames], found["acoustic"][:frames].T]).cpu()
        self.recording, self.source.value, self.result.value = Path(source), str(source), ""
        self.frame.value, self.frame.max = 0, frames - 1
        self.undo()

    def choose(self, frame: int, layer: int = 1, frames: int = 1) -> None:
        """Choose ``frames`` from ``frame`` on in a layer (0: SSL), as by a click."""
        self.grid.frame, self.grid.row, self.grid.span = frame, layer, frames

    def change(self, token: int | None = None) -> None:
        """Give the chosen frames of the chosen layer a token, or (None) tokens that are drawn."""
        row, size = self.tokens[self.grid.row], self.grid.sizes[self.grid.row]
        if token is not None and not 0 <= token < size:
            raise MetisError(f"tokens of this layer lie in 0..{size - 1}, not {token}")
        drawn = torch.randint(size, row[self._chosen].shape, generator=self.generator)
        row[self._chosen] = drawn if token is None else token
        self._refresh()

    def undo(self) -> None:
        """Take the tokens of the recording again, and hear all layers."""
        self.tokens, self.layers.value = self.original.clone(), self.layers.max
        self._refresh()

    def speech(self, tokens: Tensor, layers: int | None = None) -> Speech:
        """Rows ``[1+Q, T]`` through the codec, the first ``layers`` of them."""
        codes = tokens[1 : 1 + (layers or len(tokens))].T[None].to(self.metis.device)
        with torch.no_grad():
            return Speech(self.metis.acoustic.decode_long(codes)[0].float().cpu(), AUDIO_RATE)

    def listen(self) -> None:
        """Show the tokens of the chosen frames, and play them: alone for half a second, and with what is around."""
        chosen, half = self._chosen, FRAME_RATE // 2
        alone = self.tokens[:, chosen].repeat(1, half)[:, : max(half, chosen.stop - chosen.start)]
        first = max(0, (chosen.start + chosen.stop - half) // 2)
        near = slice(max(0, first - half), first + 2 * half)  # enough for the codec
        cut = (first - near.start) * AUDIO_RATE // FRAME_RATE
        clips: dict[str, Any] = {"these tokens alone, repeated": self.speech(alone)}
        for name, tokens in (("half a second around, as it was", self.original), ("and as it is", self.tokens)):
            clips[name] = (self.speech(tokens[:, near]).wav[cut : cut + AUDIO_RATE // 2], AUDIO_RATE)
        now, before = (tokens[:, chosen.start].tolist() for tokens in (self.tokens, self.original))
        values = {n: str(a) if a == b else f"{a} (was {b})" for n, a, b in zip(self.rows, now, before, strict=True)}
        self.token.value = now[self.grid.row]
        where = f"<p>Tokens of frame {chosen.start}, at {chosen.start / FRAME_RATE:.2f} s, by layer:</p>"
        _put(self.heard, where, _table(values), _table(clips))

    def decode(self) -> Speech:
        """Play the recording, its tokens, and the tokens as they are now (of the first ``layers``)."""
        now = self.speech(self.tokens, self.layers.value)
        clips = {"its tokens": self.speech(self.original), f"as they are now, {self.layers.value} layers": now}
        _put(self.result, _table({"recording": self.recording, **clips}), _pictures(clips))
        return now

    def sound(self) -> Speech:
        """Let stage 2 decide all acoustic tokens from the SSL tokens, in the voice of the recording."""
        tokens, said, codes = (x.to(self.metis.device) for x in (self.tokens[0], self.original[0], self.original[1:].T))
        made = self.metis.acoustic_tokens(tokens, (said, codes), seed=self.seed).T.cpu()
        self.tokens[1 : 1 + len(made)] = made
        self.layers.value = len(made)  # a small system makes the first layers only; the others are the recording's
        self._refresh()
        return self.decode()

    @property
    def _chosen(self) -> slice:
        return slice(self.grid.frame, min(self.grid.frame + self.grid.span, self.tokens.shape[1]))

    def _refresh(self) -> None:
        with self.grid.hold_sync():
            self.grid.tokens, self.grid.changed = self.tokens.tolist(), (self.tokens != self.original).tolist()
        self.listen()


class EvaluationBrowser(Panel):
    """The utterances of a run of ``metis evaluate`` by any score: sound, words, scores and spectrograms.

    ``sounds`` is where ``<task>/<system>/audio`` lies: in the run, unless it is told otherwise.
    """

    def __init__(self, run: str | Path) -> None:
        super().__init__()
        self.run, self.sounds, self.rows = Path(run), Path(run), dict[str, list[dict[str, Any]]]()
        self.summary = record.read_run(run).summary
        if unknown := sorted(set(self.summary) - set(metrics.TASKS)):
            raise MetisError(f"the run has the task {unknown[0]}; name its file in METIS_TASKS (docs/new_task.md)")
        tasks = [(metrics.TASKS[task]["title"], task) for task in self.summary]
        self.task = _field(widgets.Dropdown, "task", options=tasks)
        self.system, self.score = _field(widgets.Dropdown, "system"), _field(widgets.Dropdown, "by")
        self.best = _field(widgets.Dropdown, "order", options=[("worst first", False), ("best first", True)])
        self.list, self.page = _field(widgets.Select, rows=14), self.area()
        self._task_chosen()
        self.task.observe(lambda _: self.do(self._task_chosen), "value")
        for field in (self.system, self.score, self.best):
            field.observe(lambda _: self.do(self.sort), "value")
        self.list.observe(lambda _: self.do(self.open), "value")
        choices = [self.task, self.system, self.score, self.best, self.list, self.status]
        left = widgets.VBox(choices, layout=widgets.Layout(min_width="22em"))
        self.box.children = [widgets.HBox([left, self.page])]

    def _task_chosen(self) -> None:
        systems = self.summary[self.task.value]
        self.rows = {system: report.read_rows(self.run, self.task.value, system) for system in systems}
        _offer(self.system, sorted(systems, key=lambda name: name not in report.models(systems)))
        known = [key for key in metrics.SPECS if any(key in row for row in self.rows[self.system.value])]
        scores = [(f"{metrics.LABELS[key]} {metrics.BETTER[key]}".strip(), key) for key in known]
        _offer(self.score, [*scores, ("seconds", "seconds")])
        self.sort()

    def sort(self) -> None:
        """List the utterances of the chosen system in the order of the chosen score."""
        score, rows = self.score.value, self.rows[self.system.value]
        self.ranked = ranked(rows, score, self.best.value)
        said = ["failed" if row.get(score) is None else f"{row[score]:.2f}" for row in self.ranked]
        names = [f"{value}   {_name(row)}" for value, row in zip(said, self.ranked, strict=True)]
        _offer(self.list, [(name, number) for number, name in enumerate(names)])
        self.open()

    def open(self) -> None:
        """Show the chosen utterance as every system made it, the chosen one first."""
        chosen, task = self.ranked[self.list.value], self.task.value
        names = sorted(self.rows, key=lambda name: name != chosen["system"])
        rows = [row for name in names for row in self.rows[name] if row["id"] == chosen["id"]]
        seeds = [row["seed"] for row in (chosen, *rows) if row["seed"] is not None]
        rows = [row for row in rows if row["seed"] in (*seeds[:1], None)]
        files = {row["system"]: self.sounds / task / row["system"] / (row["audio"] or "none") for row in rows}
        there = {system: path for system, path in files.items() if path.is_file()}
        judged = {row["system"]: row["sha256"] for row in rows}
        other = [system for system, path in there.items() if sha256_file(path) != judged[system]]
        note = f"<p>Made anew, not the very file that was judged: {html.escape(', '.join(other))}.</p>" if other else ""
        table = report.failures_html(self.sounds, task, [row | {"id": row["system"], "seed": None} for row in rows])
        table = table.replace("utterance", "system", 1)  # the head of its first column
        _put(self.page, f"<b>{html.escape(_name(chosen))}</b>", note, table, _pictures(there) if there else "")


def _name(row: Mapping[str, Any]) -> str:
    return row["id"] if row["seed"] is None else f"{row['id']}, seed {row['seed']}"
