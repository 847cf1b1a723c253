"""A sixth task in one file: clipped recordings in, whole ones out (docs/new_task.md).

export METIS_TASKS=$PWD/examples/declip.py
metis train finetune --task declip --data ~/.cache/metis/corpora/nano/manifest.jsonl --out runs/declip
metis generate declip --model runs/declip --input clipped.wav --output whole.wav
python examples/declip.py runs/test; metis evaluate --tasks declip --testset runs/test --model runs/declip
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np

from metis_lib import tasks
from metis_lib.errors import MetisError

LIMITS = (0.03, 0.5)
"""Of the peak: where clipping begins, drawn evenly in decibels."""


def clip(wav: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """Samples ``[S]`` cut at a random part of their peak and raised to the old one; and that part."""
    limit = float(np.exp(generator.uniform(*np.log(LIMITS))))
    peak = np.abs(wav).max()
    if not peak > 0:
        raise MetisError("silence cannot be clipped")
    return (np.clip(wav, -limit * peak, limit * peak) / limit).astype(np.float32), limit


def simulate(u, generator, sources, params):
    """A training example, as those of :mod:`metis_lib.data.examples`."""
    from metis_lib.data.examples import Example

    heard, limit = clip(u.wav, generator)
    return Example("declip", u.id, u.wav, heard, 0, None, {"limit": round(limit, 4)})


def make_testset(out: Path, source: str = "human") -> None:
    """The clean recordings of a test set, clipped."""
    from metis_lib import audio
    from metis_lib.data.store import write_jsonl
    from metis_lib.evaluation.systems import load_items

    rows = []
    for i, item in enumerate(load_items(source, "codec")):
        wav = audio.read(item.clean, 24_000).numpy()
        audio.write(out / f"{item.id}.flac", wav, 24_000)
        audio.write(out / f"{item.id}-clipped.flac", clip(wav, np.random.default_rng((7, i)))[0], 24_000)
        row = {"id": item.id, "task": "declip", "speaker": item.speaker, "text": item.text}
        rows.append(row | {"clean": f"{item.id}.flac", "noisy": f"{item.id}-clipped.flac"})
    write_jsonl(out / "manifest.jsonl", rows)


if __name__ == "__main__":
    make_testset(Path(sys.argv[1])) if len(sys.argv) == 2 else sys.exit("say where: python examples/declip.py FOLDER")
elif "declip" not in tasks.TASKS:  # METIS_TASKS may have named this file already
    declip = dataclasses.replace(tasks.TASKS["se"], name="declip", title="De-clipping", like="se", simulate=simulate)
    tasks.add(declip)
