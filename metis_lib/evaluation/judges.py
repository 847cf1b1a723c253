"""Judges: the models that listen.  Each loads once, at its first clip, and lets go by :meth:`release`.

Weights come through :func:`metis_lib.assets.fetch` (hash-checked).  Clips are float32 ``[S]`` at 16 kHz.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_lib.errors import MetisError
from metis_lib.evaluation import metrics
from metis_lib.evaluation.metrics import JUDGE_RATE, MetricFailure, Wave


def asset_file(name: str, filename: str) -> Path:
    """The file ``filename`` of the fetched asset ``name`` (which is that file or a folder that holds it)."""
    from metis_lib import assets

    place = assets.fetch(name)
    if place.is_file():
        return place
    found = sorted(place.rglob(filename), key=lambda path: (len(path.parts), str(path)))
    if not found:
        raise MetisError(f"the asset {name!r} holds no {filename}; delete it and run: metis prepare")
    return found[0]


def onnx_session(path: Path) -> Any:
    """An onnxruntime session on the CPU with as many threads as this process may use."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # kind to a busy machine
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Judge:
    """Base of the judges: ``protocol`` names what they measure, ``judge(wav)`` returns JSON types."""

    protocol: str
    model: Any
    _unavailable: str | None = None

    def judge(self, wav_16k: Wave) -> Any:
        """The verdict on one clip ``[S]``; raises :class:`MetricFailure` with a reason."""
        raise NotImplementedError

    def judge_batch(self, wavs_16k: Sequence[Wave]) -> list[Any]:
        """The verdicts on several clips; a failure is returned in its place as a :class:`MetricFailure`."""
        verdicts: list[Any] = []
        for wav in wavs_16k:
            try:
                if not len(wav) or not np.isfinite(wav).all():
                    raise MetricFailure("the audio is empty or not finite")
                self._ready()
                verdicts.append(self.judge(wav))
            except MetricFailure as failure:
                verdicts.append(failure)
        return verdicts

    def _ready(self) -> None:
        """Load once; a judge whose weights cannot be had says so for every clip without asking again."""
        if self._unavailable is None:
            try:
                _ = self.model
            except MetisError as error:
                self._unavailable = str(error)
        if self._unavailable is not None:
            raise MetricFailure(f"the judge is not available: {self._unavailable}")

    def release(self) -> None:
        """Drop the model, so that the next judge has the memory."""
        self.__dict__.pop("model", None)
        gc.collect()


class WhisperJudge(Judge):
    """Whisper base, int8, by faster-whisper: what was said, as text."""

    protocol = metrics.WER

    @functools.cached_property
    def model(self) -> Any:
        from faster_whisper import WhisperModel

        folder = asset_file("whisper-base", "model.bin").parent
        return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=0, local_files_only=True)

    def judge(self, wav_16k: Wave) -> str:
        segments, _ = self.model.transcribe(
            np.ascontiguousarray(wav_16k[: 30 * JUDGE_RATE]),
            language="en",
            beam_size=5,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=160,
        )
        return " ".join(segment.text.strip() for segment in segments).strip()


class SpeakerJudge(Judge):
    """SpeechBrain's ECAPA-TDNN trained on VoxCeleb: 80 log-mel bins, sentence mean removed, 192 numbers out.

    One clip at a time: padding in a batch moves an embedding (cosine 0.999 to its own) and is slower.
    """

    protocol = metrics.SIM

    @functools.cached_property
    def model(self) -> Any:
        import torch

        from metis_lib.compat import prepare_torchaudio

        prepare_torchaudio()
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
        from speechbrain.processing.features import InputNormalization

        network = ECAPA_TDNN(
            80,
            channels=[1024, 1024, 1024, 1024, 3072],
            kernel_sizes=[5, 3, 3, 3, 1],
            dilations=[1, 2, 3, 4, 1],
            attention_channels=128,
            lin_neurons=192,
        )
        path = asset_file("ecapa", "embedding_model.ckpt")
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        return Fbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False), network.eval()

    def judge(self, wav_16k: Wave) -> list[float]:
        import torch

        if len(wav_16k) < JUDGE_RATE // 4:
            raise MetricFailure("speaker similarity needs at least 0.25 s of audio")
        features, normalise, network = self.model
        whole = torch.ones(1)
        with torch.inference_mode():
            mel = normalise(features(torch.from_numpy(np.array(wav_16k, dtype=np.float32))[None]), whole)
            embedding = torch.nn.functional.normalize(network(mel, whole)[0, 0], dim=0)
        return [round(float(value), 7) for value in embedding]


class DnsmosJudge(Judge):
    """DNSMOS P.835, 2022 model, polyfit, not personalised, mean over windows (DNS-Challenge's recipe)."""

    protocol = metrics.DNSMOS
    WINDOW = 144_160
    POLYNOMIALS = {
        "dnsmos_sig": (-0.08397278, 1.22083953, 0.0052439),
        "dnsmos_bak": (-0.13166888, 1.60915514, -0.39604546),
        "dnsmos_ovrl": (-0.06766283, 1.11546468, 0.04602535),
    }

    @functools.cached_property
    def model(self) -> Any:
        return onnx_session(asset_file("speechmos", "sig_bak_ovr.onnx"))

    @classmethod
    def windows(cls, wav_16k: Wave) -> NDArray[np.float32]:
        """Windows ``[N, 144160]`` with a hop of 1 s; a shorter clip is doubled until it fills one."""
        while len(wav_16k) < cls.WINDOW:
            wav_16k = np.concatenate([wav_16k, wav_16k])
        count = int(len(wav_16k) // JUDGE_RATE - cls.WINDOW / JUDGE_RATE) + 1
        starts = [index * JUDGE_RATE for index in range(count)]
        return np.stack([wav_16k[s : s + cls.WINDOW] for s in starts if s + cls.WINDOW <= len(wav_16k)])

    def judge(self, wav_16k: Wave) -> dict[str, float]:
        windows = self.windows(np.clip(wav_16k, -1.0, 1.0).astype(np.float32))
        raw = np.concatenate([self.model.run(None, {"input_1": window[None]})[0] for window in windows])
        return {
            key: float(np.polyval(polynomial, raw[:, column]).mean())
            for column, (key, polynomial) in enumerate(self.POLYNOMIALS.items())
        }
