"""What notebooks show: players, spectrograms, token grids, progress, and the files that a notebook made.

Colours are safe for colour-blind readers (seaborn "colorblind", matplotlib "cividis"); figures are returned,
so that the last line of a cell shows them.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from metis_lib import audio
from metis_lib.assets import sha256_file
from metis_lib.config import AUDIO_RATE, FRAME_RATE
from metis_lib.errors import MetisError
from metis_lib.tokenizers.acoustic import mel_filters

if TYPE_CHECKING:
    from IPython.display import HTML
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from metis_lib.models.masked import MaskedTrace

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "recipes").is_dir() and str(ROOT) not in sys.path:  # kernels start in the folder of their notebook
    sys.path.append(str(ROOT))

COLOURS = "cividis"
MAX_PLAYER_SECONDS = 30.0
T = TypeVar("T")


def style() -> None:
    """Seaborn's white grid with the colour-blind palette, for every figure of the notebook."""
    import matplotlib
    import seaborn

    if "matplotlib.pyplot" not in sys.modules and not os.environ.get("MPLBACKEND") and "ipykernel" not in sys.modules:
        matplotlib.use("agg")
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", font_scale=0.8)
    matplotlib.rcParams.update({"figure.constrained_layout.use": True, "figure.dpi": 80, "axes.titlesize": 9})
    warnings.filterwarnings("ignore", "The figure layout has changed to tight")  # seaborn's grids lay themselves out


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate with progress: a bar on a terminal or in a notebook, else one line on stderr at every quarter.

    ``METIS_PLAIN_PROGRESS=1`` forces lines (papermill runs: widget bars are dead in an executed copy).
    """
    watched = "ipykernel" in sys.modules or sys.stderr.isatty()
    if watched and os.environ.get("METIS_PLAIN_PROGRESS") != "1":
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=label, leave=False)
        return
    quarter = 0
    for done, item in enumerate(items, 1):
        yield item
        if done * 4 // len(items) > quarter:
            quarter = done * 4 // len(items)
            print(f"{label}: {done}/{len(items)}", file=sys.stderr, flush=True)


def player_html(source: audio.Source, label: str = "") -> str:
    """HTML of a player that holds the clip itself as Opus, at its own level; the first 30 s of long ones."""
    wav = audio.load(source, AUDIO_RATE, silence=True)
    limit = int(MAX_PLAYER_SECONDS * AUDIO_RATE)
    if len(wav) > limit:
        label = f"{label} (first {MAX_PLAYER_SECONDS:.0f} s of {len(wav) / AUDIO_RATE:.0f} s)".strip()
    return audio.player(wav[:limit], AUDIO_RATE, label)


def fresh(folder: Path) -> None:
    """Make or empty the folder of a notebook, below ``results/runs`` or one that it made itself.

    Raises:
        MetisError: there are files in it of which nobody knows whether they may go.
    """
    mark = folder / ".made-by-notebook"
    if ROOT / "results" / "runs" not in folder.resolve().parents and not mark.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise MetisError(f"{folder} holds files that this notebook did not make; choose another out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def png(figure: Figure) -> str:
    """The address of a figure as PNG that holds the picture itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def page(template: Path, **values: Any) -> str:
    """HTML of a jinja template, in which ``png(figure)`` and (if no other is among the values) ``player(clip)`` hold
    pictures and sound: no network."""
    import jinja2

    text = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(template.read_text(encoding="utf-8"))
    return text.render({"png": png, "player": player_html} | values)


def listening_table(rows: Sequence[Mapping[str, Any]]) -> HTML:
    """One row per utterance; recordings (paths, Speech, tuples) become players, texts stay."""
    from IPython.display import HTML

    def cell(value: Any) -> str:
        if isinstance(value, (Path, audio.Speech, tuple)):
            return player_html(value)
        return "&mdash;" if value is None else html.escape(str(value))

    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th scope='col'>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell(row.get(key))}</td>" for key in columns) + "</tr>" for row in rows)
    return HTML(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def log_mel(source: audio.Source, *, bands: int = 80) -> np.ndarray:
    """Log-mel spectrogram ``[bands, frames]`` in dB below its maximum (down to -80), 10 ms hop."""
    wav, size = audio.load(source, AUDIO_RATE, silence=True).numpy(), 1024
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wav, (size // 2, size)), size)[:: AUDIO_RATE // 100]
    power = np.abs(np.fft.rfft(frames[: -(-len(wav) * 100 // AUDIO_RATE)] * np.hanning(size), axis=1)) ** 2
    decibels = 10 * np.log10(np.maximum(mel_filters(bands, size, AUDIO_RATE).numpy() @ power.T, 1e-12))
    return np.clip(decibels - (decibels.max() if wav.any() else 0.0), -80, 0)


def spectrograms(sources: Mapping[str, audio.Source]) -> Figure:
    """Log-mel spectrograms one above the other, on one time axis and one scale (dB below each maximum)."""
    import matplotlib.pyplot as plt

    mels = {label: log_mel(source) for label, source in sources.items()}
    size = (8, 1.5 * len(mels) + 0.5)
    figure, axes = plt.subplots(len(mels), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (label, mel) in zip(axes[:, 0], mels.items(), strict=True):
        extent = (0.0, mel.shape[1] / 100, 0.0, float(len(mel)))
        image = axis.imshow(mel, origin="lower", aspect="auto", cmap=COLOURS, vmin=-80, vmax=0, extent=extent)
        axis.set(title=label, ylabel="mel band")
        axis.grid(False)
    axes[-1, 0].set(xlabel="seconds", xlim=(0.0, max(mel.shape[1] for mel in mels.values()) / 100))
    figure.colorbar(image, ax=axes[:, 0].tolist(), label="dB", shrink=0.8)
    plt.close(figure)
    return figure


def token_grid(trace: MaskedTrace, *, title: str = "when each token was decided") -> Figure:
    """Masked decoding (of the first of a batch): steps down, frames across, colour = the step that decided a token."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    known = ~trace.masks[:, 0].cpu().numpy()
    decided = np.where(known.any(axis=0), known.argmax(axis=0) + 1, len(known))
    shown = np.where(known, decided, np.nan)
    figure, axis = plt.subplots(figsize=(8, 0.16 * len(known) + 1.4), layout="constrained")
    extent = (0.0, known.shape[1] / FRAME_RATE, len(known) + 0.5, 0.5)
    image = axis.imshow(shown, aspect="auto", cmap=COLOURS, interpolation="nearest", extent=extent)
    axis.set(title=title, xlabel="seconds", ylabel="step")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="decided at", ticks=MaxNLocator(integer=True))
    plt.close(figure)
    return figure


def training_curves(folder: str | Path) -> Figure:
    """What a run has logged so far (``log.jsonl``): every term of the loss, and the scores of its validations."""
    import matplotlib.pyplot as plt
    import pandas
    import seaborn

    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    quiet = {"step", "lr", "seconds", "frames", "skipped", "validation"}
    rows = [(x["step"], "training", k, v) for x in lines for k, v in x.items() if k not in quiet]
    rows += [(x["step"], "held out", k, v) for x in lines for k, v in x.get("validation", {}).items()]
    table = pandas.DataFrame(rows, columns=["step", "of", "score", "value"])
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    for axis, (label, part) in zip(axes, table.groupby("of", sort=False), strict=False):
        seaborn.lineplot(part, x="step", y="value", hue="score", style="score", markers=label != "training", ax=axis)
        axis.set(title=label)
    if table["of"].nunique() < 2:
        axes[1].set_axis_off()
    plt.close(figure)
    return figure


def live_curves(folder: str | Path) -> Callable[[str], None]:
    """For ``say=`` of a training: in a notebook every line draws the curves anew, elsewhere lines are printed."""
    from IPython.display import display

    handle: Any = None

    def say(line: str) -> None:
        nonlocal handle
        if "ipykernel" not in sys.modules or os.environ.get("METIS_PLAIN_PROGRESS") == "1":
            print(line, flush=True)
        elif (Path(folder) / "log.jsonl").is_file():
            figure = training_curves(folder)
            if handle is None:
                handle = display(figure, display_id=True)
            else:
                handle.update(figure)

    return say


def produced(folder: str | Path, *, pattern: str = "**/*") -> DataFrame:
    """The files below ``folder`` with size and SHA-256: the last cell of every notebook."""
    import pandas

    base = Path(folder)
    files = [path for path in sorted(base.glob(pattern)) if path.is_file() and not path.name.startswith(".")]
    rows = [(str(p.relative_to(base)), round(p.stat().st_size / 1000, 1), sha256_file(p)[:16]) for p in files]
    return pandas.DataFrame(rows, columns=["file", "kB", "sha256"])
