"""Every notebook: the conventions it keeps, a fast run of the course, and full runs that leave rendered copies.

``make test`` runs the course in its fast profile, in one kernel.  ``make notebooks-check`` runs all notebooks from top
to bottom in kernels of their own, offline, and writes ``results/notebooks/<name>.html``; what is rendered already from
the same notebook, library and weights is skipped, so a stopped check goes on.
"""

from __future__ import annotations

import ast
import base64
import copy
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from metis_lib import audio, notebook
from metis_lib.assets import sha256_file
from metis_lib.evaluation import record
from metis_lib.evaluation.runner import environment, run_notebook

ROOT = record.ROOT
RENDERED = ROOT / "results" / "notebooks"
NOTEBOOKS = sorted([*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("eval/*.ipynb")])
COURSE = [path for path in NOTEBOOKS if re.match(r"(0\d|1[0-2])_", path.name)]
MAX_LINES, MAX_CELL, MAX_DEFS = 150, 30, 1
OPENING = ("Inputs", "Outputs", "Time", "Paper")
SAFE_COLOURS = {"cividis", "viridis", "gray", "Greys", "PuOr", "RdBu", "colorblind"}
PLAIN_FIGURES = ("title", "notebook.token_grid", "notebook.spectrograms", "notebook.training_curves", "report.plot_")
"""What puts titles into a figure; any other is followed by a caption."""
Document = dict[str, Any]


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# --- conventions that can be read off ----------------------------------------------------------------------


def sources(document: Document, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in document["cells"] if cell["cell_type"] == kind]


def form(document: Document) -> Iterator[str]:
    """The file: kernel, ids of cells, nothing stored."""
    if document["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    ids = [cell.get("id") for cell in document["cells"]]
    if None in ids or len(set(ids)) < len(ids) or (document["nbformat"], document["nbformat_minor"]) < (4, 5):
        yield "cells without ids of their own"
    if any(cell.get("outputs") or cell.get("execution_count") for cell in document["cells"]):
        yield "stored output"


def code(document: Document) -> Iterator[str]:
    """Thin cells over the library, its players and progress, colours that everybody can tell apart."""
    cells = sources(document, "code")
    lengths = [len(source.splitlines()) for source in cells]
    if sum(lengths) > MAX_LINES:
        yield f"more than {MAX_LINES} lines of code ({sum(lengths)})"
    if max(lengths) > MAX_CELL:
        yield f"a cell of more than {MAX_CELL} lines ({max(lengths)})"
    lines = [line for source in cells for line in source.splitlines()]
    if any(line.startswith(("!", "%")) for line in lines):
        yield "shell commands and magics"
    tree = ast.parse("\n".join(line for line in lines if not line.startswith(("!", "%"))))
    nodes = list(ast.walk(tree))
    defs = sum(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in nodes)
    if defs > MAX_DEFS:
        yield f"functions belong into the library ({defs})"
    for node in nodes:
        if isinstance(node, ast.ImportFrom | ast.Import):
            roots = {(alias.name if isinstance(node, ast.Import) else node.module or "") for alias in node.names}
            if roots & {"tqdm", "tqdm.auto", "tqdm.notebook"}:
                yield "progress is notebook.progress"
            if any(alias.name == "Audio" for alias in node.names):
                yield "players are notebook.listening_table: IPython's Audio changes the level"
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            value = node.value.value
            if node.arg in ("cmap", "palette") and value.removesuffix("_r") not in SAFE_COLOURS:
                yield f"colours that not everybody can tell apart: {value}"
            if node.arg in ("c", "color") and value in ("r", "g", "red", "green"):
                yield f"red and green look alike to many: {value}"


def parameters(document: Document) -> Iterator[str]:
    """One cell of literals, each with its type and what it is."""
    tagged = ["".join(cell["source"]) for cell in document["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        yield "there is not exactly one parameters cell"
    for line in (line for source in tagged for line in source.splitlines()):
        try:
            statement = ast.parse(line).body[0]
            plain = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            ast.literal_eval(statement.value)  # type: ignore[attr-defined]
        except (SyntaxError, ValueError, AttributeError, IndexError):
            plain = False
        if not plain:
            yield f"parameters cell: {line!r} is not one name and a literal"
        elif not re.search(r"# type: (str|int|float|bool|list|dict) \S", line):
            yield f"parameters cell: {line!r} does not tell type and meaning"


def text(document: Document) -> Iterator[str]:
    """Opening, end, links, and nothing of somebody's machine."""
    words = sources(document, "markdown")
    first = "".join(document["cells"][0]["source"])
    if not re.match(r"# .+\n\n\S", first):
        yield "it does not begin with a title and its purpose"
    yield from (f"the first cell lacks **{word}**" for word in OPENING if f"**{word}**" not in first)
    when = re.search(r"\*\*Time\*\*(.*)", first)
    if when and not (re.search(r"second|minute", when[1]) and "CPU" in when[1] and "GPU" in when[1]):
        yield "the time says not how long on a CPU, or nothing of a GPU"
    what = re.search(r"\*\*Paper\*\*(.*)", first)
    if what and not re.search(r"section|table|appendix|dataset", what[1]):
        yield "it names no section of the paper"
    if "What this produced" not in "".join("".join(cell["source"]) for cell in document["cells"][-2:]):
        yield "it does not end with 'What this produced'"
    everything = "\n".join(words + sources(document, "code"))
    if re.search(r"(?<![\w.])/(?:home|root|tmp|work|Users)/", everything):
        yield "it names a path of somebody's machine"
    prose = re.sub(r"```.*?```|`[^`]*`|<code>.*?</code>", "", "\n".join(words), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
        if not (ROOT / "notebooks" / link).exists() and not (ROOT / "eval" / link).exists():
            yield f"a link to nowhere: {link}"


def course(document: Document) -> Iterator[str]:
    """What every lesson has: a fast profile, exercises with hidden solutions, references."""
    words = "\n".join(sources(document, "markdown"))
    if not re.search(r"^profile = \"full\"", "\n".join(sources(document, "code")), re.MULTILINE):
        yield 'it lacks the parameter profile = "full"'
    exercises = re.search(r"^#+ Exercises\n(.*?)(?=^#+ |\Z)", words, re.MULTILINE | re.DOTALL)
    opened, summaries, closed = (words.count(tag) for tag in ("<details>", "<summary>", "</details>"))
    if not exercises or exercises[1].count("<details>") < 2 or not opened == summaries == closed:
        yield "it lacks two exercises with hidden solutions"
    references = re.search(r"^#+ References\n(.*?)(?=^#+ |\Z)", words, re.MULTILINE | re.DOTALL)
    if not references or "](http" not in references[1]:
        yield "it lacks references with links"


def problems(document: Document, *, lesson: bool = False) -> list[str]:
    """What a notebook does against the conventions of this repository."""
    rules = (form, code, parameters, text, *((course,) if lesson else ()))
    return [problem for rule in rules for problem in rule(document)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_conventions(path: Path) -> None:
    assert problems(json.loads(path.read_text()), lesson=path in COURSE) == []


def test_the_notebooks_are_there() -> None:
    assert [path.name[:2] for path in COURSE] == [f"{number:02d}" for number in range(13)]
    assert {"codec", "se", "tts", "vc", "tse", "l2s", "omni", "report"} <= {path.stem for path in NOTEBOOKS}


def cell(kind: str, source: str, *tags: str) -> dict[str, Any]:
    made: dict[str, Any] = {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)}}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


KERNEL = {"name": "python3", "display_name": "Python 3"}


def lesson() -> Document:
    """A lesson that keeps every convention."""
    fields = "- **Inputs**: x\n- **Outputs**: y\n- **Time**: a minute on a CPU, less on a GPU\n- **Paper**: section 3"
    solution = "<details><summary>Solution</summary>Because.</details>"
    cells = [
        cell("markdown", f"# Title\n\nWhat for.\n\n{fields}"),
        cell("code", 'profile = "full"  # type: str full or fast\nsteps = 3  # type: int how many', "parameters"),
        cell("code", "import seaborn\nfor n in range(steps):\n    print(n)"),
        cell(
            "markdown", f"## Exercises\n\n1. Why? {solution}\n2. How? {solution}\n\n## References\n\n- [A](https://a.b)"
        ),
        cell("markdown", "## What this produced"),
        cell("code", "1"),
    ]
    cells = [{**one, "id": f"cell-{number}"} for number, one in enumerate(cells)]
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": KERNEL}, "cells": cells}


BAD: list[tuple[int, str, str, str]] = [
    (2, "import seaborn", "x = 1\n" * 31, "a cell of more than 30 lines"),
    (2, "import seaborn", "def f(): pass\ndef g(): pass", "belong into the library"),
    (2, "import seaborn", "%matplotlib inline", "magics"),
    (2, "import seaborn", "!ls", "shell commands"),
    (2, "import seaborn", "from tqdm.auto import tqdm", "progress is"),
    (2, "import seaborn", "from IPython.display import Audio", "changes the level"),
    (2, "import seaborn", "plot(x, cmap='jet')", "not everybody can tell apart: jet"),
    (2, "import seaborn", "plot(x, color='red')", "red and green"),
    (2, "import seaborn", "open('/home/me/x.wav')", "somebody's machine"),
    (1, "steps = 3", "steps = 3 * 2", "is not one name and a literal"),
    (1, "steps = 3", "a, b = 1, 2", "is not one name and a literal"),
    (1, "steps = 3", "import os", "is not one name and a literal"),
    (1, "  # type: int how many", "", "does not tell type and meaning"),
    (1, 'profile = "full"', 'profile = "fast"', "lacks the parameter profile"),
    (0, "# Title", "Title", "title and its purpose"),
    (0, "**Outputs**", "Outputs", r"lacks \*\*Outputs"),
    (0, "less on a GPU", "", "nothing of a GPU"),
    (0, "a minute", "not long", "says not how long"),
    (0, "section 3", "somewhere", "no section of the paper"),
    (0, "What for.", "[here](../docs/nowhere.md)", "a link to nowhere: ../docs/nowhere.md"),
    (3, "</details>\n2.", "\n2.", "hidden solutions"),
    (3, "## Exercises", "## Questions", "hidden solutions"),
    (3, "(https://a.b)", "", "references"),
    (4, "What this produced", "The end", "does not end with"),
]


@pytest.mark.parametrize(("where", "old", "new", "problem"), BAD, ids=[problem for *_, problem in BAD])
def test_the_checker_finds_what_is_wrong(where: int, old: str, new: str, problem: str) -> None:
    document = lesson()
    assert problems(document, lesson=True) == []
    assert old in document["cells"][where]["source"]
    document["cells"][where]["source"] = document["cells"][where]["source"].replace(old, new)
    found = problems(document, lesson=True)
    assert found and all(re.search(problem, one) for one in found), found


def test_the_checker_looks_at_the_file() -> None:
    changes: dict[str, Any] = {
        "the kernel is not python3": lambda x: x["metadata"].update(kernelspec={"name": "conda-me"}),
        "cells without ids of their own": lambda x: x["cells"][2].update(id="cell-0"),
        "stored output": lambda x: x["cells"][2].update(outputs=[{"output_type": "stream"}]),
        "more than 150 lines of code (190)": lambda x: x["cells"].extend(
            {**cell("code", "x = 1\n" * 23), "id": f"more {number}"} for number in range(8)
        ),
        "there is not exactly one parameters cell": lambda x: x["cells"][1]["metadata"].update(tags=[]),
    }
    for problem, change in changes.items():
        document = lesson()
        change(document)
        assert problem in problems(document, lesson=True)


# --- conventions of what a run shows -----------------------------------------------------------------------


def shown_problems(executed: Document, private: tuple[str, ...] = ()) -> list[str]:
    """What an executed notebook does against the conventions: captions, players, few lines, nothing ``private``."""
    found, cells = [], executed["cells"]
    for number, one in enumerate(cells):
        outputs, source = one.get("outputs", []), "".join(one["source"])
        bundles = [output.get("data", {}) for output in outputs]
        follows = number + 1 < len(cells) and cells[number + 1]["cell_type"] == "markdown"
        if any("image/png" in data for data in bundles) and not follows and not any(x in source for x in PLAIN_FIGURES):
            found.append(f"cell {number}: a figure without title and caption")
        page = "".join("".join(data.get("text/html", "")) for data in bundles)
        for address in re.findall(r"<(?:audio|source)[^>]*?src=[\"']([^\"']+)", page):
            head, _, data = address.partition("base64,")
            if not head.startswith("data:audio/ogg") or not base64.b64decode(data[:400]).startswith(b"OggS"):
                found.append(f"cell {number}: a player that does not hold Ogg")
        said = "".join("".join(output.get("text", "")) for output in outputs)
        if "\r" in said or len(said.splitlines()) > 80:
            found.append(f"cell {number}: progress that does not become a few lines")
        shown = said + page + "".join("".join(data.get("text/plain", "")) for data in bundles)
        found += [f"cell {number}: shows {path}" for path in private if path in shown]
    if len(json.dumps(executed)) > 8_000_000:
        found.append("more than 8 MB")
    return found


def test_shown_problems_are_found() -> None:
    document = lesson()
    assert shown_problems(document) == []
    picture = {"output_type": "display_data", "data": {"image/png": "x"}}
    document["cells"][2]["outputs"] = [picture]
    assert shown_problems(document) == []  # the next cell is its caption
    document["cells"][1]["outputs"] = [picture, {"output_type": "stream", "text": "1 %\r2 %\nsaved /home/me/x"}]
    html = notebook.player_html(torch.full((2400,), 0.1))
    document["cells"][5]["outputs"] = [{"output_type": "display_data", "data": {"text/html": html}}]
    wanted = ["cell 1: a figure without title and caption", "cell 1: progress that does not become a few lines"]
    assert shown_problems(document, ("/home/me",)) == [*wanted, "cell 1: shows /home/me"]
    document["cells"][5]["outputs"][0]["data"]["text/html"] = html.replace("data:audio/ogg", "data:audio/wav")
    assert "cell 5: a player that does not hold Ogg" in shown_problems(document)


# --- the fast profile, in one kernel -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A kernel that runs notebooks one after the other, with what is imported once; offline, with an empty home."""
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync
    from nbclient import NotebookClient

    alone = {"HF_HUB_OFFLINE": "1", "METIS_HOME": str(tmp_path_factory.mktemp("home"))}
    manager = AsyncKernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (environment() | alone).items():
            patch.setenv(key, value)
        run_sync(manager.start_kernel)(cwd=str(ROOT))
    yield lambda document: NotebookClient(document, km=manager, timeout=600, kernel_name="python3").execute()
    run_sync(manager.shutdown_kernel)(now=True)


def run_fast(path: Path, kernel: Any, out: Path, **given: Any) -> Document:
    """The executed notebook in its fast profile."""
    import nbformat
    from papermill.inspection import inspect_notebook
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    known = inspect_notebook(str(path))
    wanted = {"profile": "fast", "out": str(out), "device": "cpu", **given}
    given = {key: value for key, value in wanted.items() if key in known}
    document = parameterize_notebook(load_notebook_node(str(path)), given)
    document.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    executed = kernel(document)
    del executed.cells[0]
    return json.loads(nbformat.writes(executed))


SAYS = {
    "00_quickstart": "same seed, same samples: True",
    "11_published_checkpoints": r"(\d+) tensors came back, \1 equal to the bit",
}
"""What a lesson claims and its run must show."""


@pytest.mark.parametrize("path", COURSE, ids=name)
def test_fast(path: Path, kernel: Any, tmp_path: Path) -> None:
    executed = run_fast(path, kernel, tmp_path / "out")
    said = "".join("".join(output.get("text", "")) for one in executed["cells"] for output in one.get("outputs", []))
    assert re.search(SAYS.get(path.stem, ""), said)
    assert shown_problems(executed, (str(ROOT), str(Path.home()), str(tmp_path))) == []
    assert any(file.is_file() for file in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize("number", ["01", "03", "05", "06"])
def test_a_folder_of_other_recordings_serves_too(number: str, kernel: Any, tmp_path: Path) -> None:
    """Of any format and of lengths that differ much."""
    wav = audio.load(str(ROOT / "eval/testsets/human/librivox-0890.flac"), 24_000).repeat(2)
    for name, seconds in (("a.wav", 2.3), ("deep/b.ogg", 7.5), ("c.flac", 2.3), ("d.WAV", 3.0)):
        audio.write(tmp_path / "own" / name, wav[: round(seconds * 24_000)], 24_000)
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    run_fast(path, kernel, tmp_path / "out", corpus=str(tmp_path / "own"))


def test_where_a_run_lacks_the_task_the_next_is_opened(kernel: Any, tmp_path: Path) -> None:
    few = tmp_path / "demo"
    shutil.copytree(ROOT / "results/nano/human", few)
    summary = json.loads((few / "summary.json").read_text())
    (few / "summary.json").write_text(json.dumps({"se": summary["se"]}))
    path, runs = ROOT / "notebooks/15_evaluation_browser.ipynb", [str(few), "results/nano/human"]
    run_fast(path, kernel, tmp_path / "out", task="vc", runs=runs)


def test_the_codec_can_be_read_as_the_tasks_are(kernel: Any, tmp_path: Path) -> None:
    run_fast(ROOT / "notebooks/12_reading_an_evaluation.ipynb", kernel, tmp_path / "out", task="codec")


@pytest.mark.parametrize("task", ["tts", "vc", "tse"])
def test_other_tasks_can_be_fine_tuned(task: str, kernel: Any, tmp_path: Path) -> None:
    path = ROOT / "notebooks" / "08_finetune.ipynb"
    run_fast(path, kernel, tmp_path / "out", task=task, modes=["lora"])
    lines = [json.loads(x) for x in (tmp_path / f"out/lora/runs/{task}/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and lines[-1]["validation"]["with_condition"] > 0
    assert (tmp_path / "out" / "lora.flac").is_file()


# --- top to bottom: make notebooks-check ---------------------------------------------------------------------


def key_of(path: Path) -> str:
    """Hash of all that a rendered copy depends on."""
    return record.sha256_of([sha256_file(path), record.code_hash("."), record.checkpoint_hashes("nano")])


def render(executed: Path, page: Path, key: str) -> None:
    """An executed notebook as one HTML file that holds pictures and sound; captions become alternative texts."""
    import nbformat
    from nbconvert import HTMLExporter
    from pygments.formatters import HtmlFormatter

    document = nbformat.read(executed, as_version=4)
    injected = "injected-parameters"  # paths of this machine
    document.cells = [one for one in document.cells if injected not in one.metadata.get("tags", [])]
    for one, after in zip(document.cells, [*document.cells[1:], {"source": ""}], strict=True):
        caption = re.match(r"\*([^*].*?)\*(?:\n|$)", after["source"])
        for output in one.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = caption[1] if caption else one.source.splitlines()[-1]
                output.metadata["image/png"] = {**output.metadata.get("image/png", {}), "alt": alt}
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(document)
    style = f"body{{max-width:60em;margin:auto;font-family:sans-serif}}{HtmlFormatter().get_style_defs('.highlight')}"
    mathjax = f"<script src='{HTMLExporter().mathjax_url}'></script>"
    head = f"<!doctype html><meta charset='utf-8'><title>{page.stem}</title><style>{style}</style>{mathjax}"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{head}\n{body}\n<!-- {key} -->\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_full(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from papermill.inspection import inspect_notebook

    page, key = RENDERED / f"{path.parent.name}-{path.stem}.html", key_of(path)
    if page.is_file() and page.read_text(encoding="utf-8").endswith(f"<!-- {key} -->\n"):
        pytest.skip("rendered already from the same notebook, library and weights")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(ROOT)
    given: dict[str, Any] = {"out": str(tmp_path / "out"), "device": "cpu"}
    if path.parent.name == "eval":
        given |= {"checkpoint": "debug", "limit": 2}
    if path.stem == "report":
        shutil.copytree(ROOT / "results" / "nano" / "human", tmp_path / "out")
    known, executed = inspect_notebook(str(path)), tmp_path / "executed.ipynb"
    given = {name: value for name, value in given.items() if name in known}
    assert run_notebook(path, executed, given, tmp_path / "log") is None
    private = (str(ROOT), str(Path.home()), str(tmp_path))
    assert shown_problems(json.loads(executed.read_text()), private) == []
    render(executed, page, key)


def test_a_copy_is_rendered_with_alternative_texts(tmp_path: Path) -> None:
    document = copy.deepcopy(lesson())
    picture = {"output_type": "display_data", "data": {"image/png": "eA=="}, "metadata": {}}
    document["cells"][2]["outputs"] = [picture]
    document["cells"][3]["source"] = "*A loss that falls.*\n\nMore."
    document["cells"].append({**cell("code", "out = 'secret'", "injected-parameters"), "id": "injected"})
    (tmp_path / "x.ipynb").write_text(json.dumps(document))
    render(tmp_path / "x.ipynb", tmp_path / "new" / "x.html", "0123")
    page = (tmp_path / "new" / "x.html").read_text()
    assert 'alt="A loss that falls."' in page and page.endswith("<!-- 0123 -->\n") and "secret" not in page
