"""A tiny corpus and a system of random weights, on which every trainer runs in seconds; used by the training tests.

As a program it is the victim of the kill tests: it imports everything once and trains in forked children, which kill
themselves with SIGKILL where they are told to.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from metis_lib import audio
from metis_lib.checkpoints import save_part
from metis_lib.config import preset
from metis_lib.data.align import speak
from metis_lib.data.store import Row, write_manifest
from metis_lib.models.stage1 import Stage1
from metis_lib.tokenizers.acoustic import AcousticCodec
from metis_lib.tokenizers.lips import LipEncoder
from metis_lib.tokenizers.semantic import SemanticCodec
from metis_lib.tokenizers.ssl import SSLEncoder
from metis_lib.training import recipes
from metis_lib.training.recipes import BUILD, Job, settings_for

DEBUG = preset("debug")
MODELS = tuple(BUILD)
SENTENCES = (
    "The ship is small.", "We go home now.", "A cat sat here.", "Rain falls on me.", "You may keep it.",
    "Nobody was late.", "Open the blue door.", "Birds sing at dawn.", "This road is long.", "He lost his key.",
)  # fmt: skip
VOICES = ("en-us", "en-us+f3", "en-us+m3")


def make_corpus(folder: Path) -> Path:
    """Ten sentences by three voices of espeak-ng, eight for training, two to validate; the manifest's path."""
    rows = []
    for i, text in enumerate(SENTENCES):
        wav, _ = speak(text, voice=VOICES[i % 3], rate=150)
        path = folder / "audio" / f"{i}.wav"
        audio.write(path, audio.resample(torch.from_numpy(0.5 * wav), 16_000, 24_000), 24_000)
        rows.append(Row(
            id=str(i), path=f"audio/{i}.wav", text=text, language="en", speaker=VOICES[i % 3],
            duration=len(wav) / 16_000, split="train" if i < 8 else "validation", source="espeak-ng", licence="GPLv3",
            human=False,
        ))  # fmt: skip
    write_manifest(folder / "manifest.jsonl", rows)
    return folder / "manifest.jsonl"


def make_system(folder: Path) -> Path:
    """Random weights of the debug preset, as a growing system has them."""
    torch.manual_seed(0)
    ssl = SSLEncoder(DEBUG.ssl)
    save_part(folder / "ssl", ssl, DEBUG.ssl)
    save_part(folder / "ssl", ssl.stats_state(), DEBUG.ssl, name="stats")
    save_part(folder / "semantic_codec", SemanticCodec(DEBUG.semantic), DEBUG.semantic)
    save_part(folder / "acoustic_codec", AcousticCodec(DEBUG.acoustic), DEBUG.acoustic)
    save_part(folder / "stage1", Stage1(DEBUG.stage1), DEBUG.stage1)
    save_part(folder / "lips", LipEncoder(DEBUG.lips), DEBUG.lips)
    return folder


def make_job(model: str, out: Path, manifest: Path, **settings: object) -> Job:
    """A job of the debug preset; the acoustic codec with its discriminators from step 3 on."""
    options = {"acoustic": {"adversarial_from": 3, "seconds": 0.2}, "tts": {"text_hint": "even"}}
    chosen = settings_for(model, "debug", **settings)
    return Job(model, DEBUG, out, chosen, manifest, rank=4, options=options.get(model, {}), check=2)


def run_job(job: Job, kill_at: int | None = None, in_save: bool = False) -> None:
    """Train; with ``kill_at`` the process dies at the batch of that step, or in the first save after it."""
    if kill_at is not None:
        from metis_lib.training import data, loop

        opened = data.Feed.open

        def deadly(self, step=0, *rest):
            for at, batch in enumerate(opened(self, step, *rest), step):
                if at == kill_at and in_save:
                    loop.os = replace_killer()
                elif at == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

        data.Feed.open = deadly
    recipes.train(job)


class replace_killer:
    """``os`` whose ``replace`` kills: the state is written, but has not its name."""

    def __getattr__(self, name):
        return getattr(os, name)

    def replace(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Train what the argument says (a JSON object: model, out, manifest, settings), under torchrun perhaps; without an
    argument serve lines of stdin, each such an object with kill_at and in_save."""
    if len(sys.argv) > 1:
        order = json.loads(sys.argv[1])
        torch.set_num_threads(1)
        run_job(make_job(order["model"], Path(order["out"]), Path(order["manifest"]), **order["settings"]))
        return
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            job = make_job(order["model"], Path(order["out"]), Path(order["manifest"]), **order["settings"])
            try:
                run_job(job, order["kill_at"], order["in_save"])
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"signal": status & 127, "code": status >> 8}), flush=True)


if __name__ == "__main__":
    main()
