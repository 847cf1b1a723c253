"""How well timbre perturbation takes the speaker and leaves the words: ``results/data/vc_perturbation.json``.

``python -m recipes.nano.perturbation`` perturbs 100 utterances of the nano corpus (40 human, 60 synthetic) by every
method below.  Two judges listen: ECAPA (cosine similarity of perturbed to original speech) and Whisper base (word
errors, macro mean; of the original as well).  Names given as arguments select methods.

WORLD is measured for comparison only and needs ``pip install pyworld-prebuilt`` (or pyworld).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metis_lib import audio
from metis_lib.assets import metis_home
from metis_lib.config import AUDIO_RATE, SSL_RATE
from metis_lib.data.perturb import Perturb, VoiceShift
from metis_lib.data.store import Row, read_manifest, write_text
from metis_lib.evaluation import metrics
from metis_lib.evaluation.judges import SpeakerJudge, WhisperJudge

SHARES = {"uqm": 0.4, "silero": 0.3, "rhvoice": 0.3}
"""Sources by the beginning of their ids: recordings of actors, then two synthesisers."""
LIMIT = 0.45
RESULTS = Path(__file__).parents[2] / "results" / "data" / "vc_perturbation.json"


@dataclass(frozen=True)
class World(VoiceShift):
    """The same shift by WORLD: F0 moved, the spectral envelope warped along frequency, noise shaped alike."""

    tracker: str = "dio"
    eq_db: float = 0.0

    def __call__(self, wav_24k: np.ndarray, generator: np.random.Generator, /) -> np.ndarray:
        import pyworld

        how, wav = self.draw(generator), wav_24k.astype(np.float64)
        track = getattr(pyworld, self.tracker)
        f0, at = track(wav, AUDIO_RATE, f0_floor=self.f0_hz[0], f0_ceil=self.f0_hz[1])
        if self.tracker == "dio":
            f0 = pyworld.stonemask(wav, f0, at, AUDIO_RATE)
        envelope = np.log(pyworld.cheaptrick(wav, f0, at, AUDIO_RATE) + 1e-16)
        noise = pyworld.d4c(wav, f0, at, AUDIO_RATE)
        voiced = f0 > 0
        if voiced.any():
            median = float(np.median(f0[voiced]))
            moved = np.clip(median * how["pitch"], *self.f0_hz) * (f0[voiced] / median) ** how["spread"]
            f0[voiced] = np.clip(moved, *self.f0_hz)
        bins = envelope.shape[1]
        source = np.clip(np.arange(bins) / how["formants"], 0, bins - 1)
        left = np.minimum(source.astype(int), bins - 2)
        share = source - left
        envelope, noise = (x[:, left] * (1 - share) + x[:, left + 1] * share for x in (envelope, noise))
        if self.eq_db:
            knots = np.log(np.geomspace(100, AUDIO_RATE / 2, 10))
            hz = np.log(np.linspace(1, AUDIO_RATE / 2, bins))
            envelope = envelope + np.interp(hz, knots, generator.normal(0, self.eq_db, 10)) / 10 * np.log(10)
        parts = (np.ascontiguousarray(x) for x in (np.exp(envelope), np.clip(noise, 0.001, 0.999)))
        out = np.resize(pyworld.synthesize(f0, *parts, AUDIO_RATE), len(wav))
        out *= np.sqrt(np.mean(wav**2) / (np.mean(out**2) + 1e-12))
        return (out * min(1.0, 0.99 / (np.abs(out).max() + 1e-12))).astype(np.float32)


METHODS: dict[str, Perturb] = {
    "praat": VoiceShift(mild=0.0),
    "praat-medium": VoiceShift(formants=(1.15, 1.3), mild=0.0),
    "praat-gentle": VoiceShift(formants=(1.1, 1.3), pitch=(1.1, 1.6), mild=0.0),
    "praat-identity": VoiceShift(formants=(1.0, 1.0), pitch=(1.0, 1.0), spread=(1.0, 1.0)),
    "world-dio": World(formants=(1.15, 1.3)),
    "world-harvest": World(formants=(1.15, 1.3), tracker="harvest"),
    "world-dio-eq": World(formants=(1.15, 1.3), eq_db=5.0),
    "world-identity": World(formants=(1.0, 1.0), pitch=(1.0, 1.0), spread=(1.0, 1.0)),
}


def choose(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` utterances of 2 to 10 s and at least 4 words, by :data:`SHARES`."""
    generator, chosen = np.random.default_rng(seed), []
    usable = sorted((r for r in rows if 2 <= r.duration <= 10 and len(r.text.split()) >= 4), key=lambda r: r.id)
    for source, share in SHARES.items():
        group = [r for r in usable if r.id.startswith(source)]
        chosen += [group[i] for i in generator.permutation(len(group))[: round(count * share)]]
    return chosen


def main() -> None:
    """Measure and write; a method already in the file is replaced, the others stay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", help=", ".join(METHODS))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=metis_home() / "corpora" / "nano")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    whisper, ecapa = WhisperJudge(), SpeakerJudge()
    rows = choose(read_manifest(chosen.corpus / "manifest.jsonl"), chosen.count, chosen.seed)
    wavs = [audio.read(row.audio, AUDIO_RATE).numpy() for row in rows]
    if any(row.start or row.end for row in rows):
        raise SystemExit("this measures whole recordings; choose a corpus without start and end")

    def listen(wav_24k: np.ndarray, text: str) -> tuple[np.ndarray, float]:
        wav_16k = audio.resample(torch.from_numpy(wav_24k), AUDIO_RATE, SSL_RATE).numpy()
        return np.array(ecapa.judge(wav_16k)), metrics.word_errors(text, whisper.judge(wav_16k)).rate

    originals = [listen(wav, row.text) for wav, row in zip(wavs, rows, strict=True)]
    strangers = [
        float(a[0] @ b[0])
        for (i, a), (k, b) in itertools.combinations(enumerate(originals), 2)
        if rows[i].speaker != rows[k].speaker
    ]
    report: dict[str, Any] = {
        "command": "python -m recipes.nano.perturbation",
        "utterances": [row.id for row in rows],
        "seconds": round(sum(len(w) for w in wavs) / AUDIO_RATE, 1),
        "seed": chosen.seed,
        "protocols": {"wer": metrics.WER, "similarity": metrics.SIM},
        "wer_original": round(100 * float(np.mean([w for _, w in originals])), 2),
        "similarity_of_different_speakers": round(float(np.mean(strangers)), 3),
        "methods": {},
    }
    known = json.loads(chosen.out.read_text()) if chosen.out.is_file() else {}
    if known.get("utterances") == report["utterances"]:
        report["methods"] = known["methods"]
    report |= {key: value for key, value in known.items() if key.startswith("tuning")}
    for name in chosen.methods or METHODS:
        perturb, started = METHODS[name], time.process_time()
        perturbed = [perturb(w, np.random.default_rng((chosen.seed, i))) for i, w in enumerate(wavs)]
        spent = time.process_time() - started
        heard = [listen(wav, row.text) for wav, row in zip(perturbed, rows, strict=True)]
        near = np.array([float(a[0] @ b[0]) for a, b in zip(originals, heard, strict=True)])
        rates = np.array([rate for _, rate in heard])
        report["methods"][name] = {
            "method": type(perturb).__name__,
            "parameters": asdict(perturb),  # type: ignore[call-overload]
            "similarity": round(float(near.mean()), 3),
            "share_above_0.45": round(float((near > LIMIT).mean()), 3),
            "wer": round(100 * float(rates.mean()), 2),
            "cpu_seconds_per_second": round(spent / report["seconds"], 4),
            "by_source": {
                source: {
                    "similarity": round(float(near[mine].mean()), 3),
                    "wer": round(100 * float(rates[mine].mean()), 2),
                    "wer_original": round(100 * float(np.mean([originals[i][1] for i in np.flatnonzero(mine)])), 2),
                }
                for source in SHARES
                if (mine := np.array([row.id.startswith(source) for row in rows])).any()
            },
        }
        print(name, {k: v for k, v in report["methods"][name].items() if k != "parameters"}, flush=True)
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(chosen.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
