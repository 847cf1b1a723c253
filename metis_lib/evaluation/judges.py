"""Other people's models, run as they are: the judges that listen, and NSNet2, a peer to compare with.

Each loads at its first clip; weights come through :func:`metis_lib.assets.fetch` (hash-checked).  Clips are
float32 ``[S]`` at 16 kHz.
"""

from __future__ import annotations

import functools
import gc
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_lib import assets
from metis_lib.errors import MetisError
from metis_lib.evaluation.metrics import JUDGE_RATE, MetricFailure, Wave


def _onnx(asset: str, filename: str) -> Any:
    """An onnxruntime session of an asset's file, on the CPU with as many threads as this process may use."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # kind to a busy machine
    return onnxruntime.InferenceSession(assets.fetch(asset) / filename, options, providers=["CPUExecutionProvider"])


class Judge:
    """Base of the judges: ``judge(wav_16k)`` returns its verdict on one clip ``[S]`` as JSON types.

    Raises:
        MetricFailure: the audio is unusable, or the judge's weights cannot be had (asked for only once).
    """

    model: Any
    _unavailable = ""

    def __call__(self, wav_16k: Wave) -> Any:
        if not len(wav_16k) or not np.isfinite(wav_16k).all():
            raise MetricFailure("the audio is empty or not finite")
        if self._unavailable:
            raise MetricFailure(self._unavailable)
        try:
            _ = self.model
        except MetisError as error:
            self._unavailable = f"the judge is not available: {error}"
            raise MetricFailure(self._unavailable) from error
        return self.judge(wav_16k)

    def judge(self, wav_16k: Wave) -> Any:
        """The verdict on a clip that is not empty, by the loaded model."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop the model, so that the next judge has the memory."""
        self.__dict__.pop("model", None)
        gc.collect()


class WhisperJudge(Judge):
    """Whisper base, int8, by faster-whisper: what was said, as text."""

    @functools.cached_property
    def model(self) -> Any:
        from faster_whisper import WhisperModel

        folder = str(assets.fetch("whisper-base"))
        return WhisperModel(folder, device="cpu", compute_type="int8", cpu_threads=0, local_files_only=True)

    def judge(self, wav_16k: Wave) -> str:
        segments, _ = self.model.transcribe(
            np.ascontiguousarray(wav_16k[: 30 * JUDGE_RATE]), language="en", beam_size=5, temperature=0.0,
            condition_on_previous_text=False, without_timestamps=True, max_new_tokens=160,
        )  # fmt: skip
        return " ".join(segment.text.strip() for segment in segments).strip()


class SpeakerJudge(Judge):
    """SpeechBrain's ECAPA-TDNN trained on VoxCeleb: 80 log-mel bins, sentence mean removed, 192 numbers out.

    One clip at a time: padding in a batch moves an embedding (cosine 0.999 to its own) and is slower.
    """

    @functools.cached_property
    def model(self) -> Any:
        import torch

        from metis_lib.compat import prepare_torchaudio

        prepare_torchaudio()
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
        from speechbrain.processing.features import InputNormalization

        network = ECAPA_TDNN(80, channels=[1024, 1024, 1024, 1024, 3072])
        weights = torch.load(assets.fetch("ecapa") / "embedding_model.ckpt", weights_only=True, map_location="cpu")
        network.load_state_dict(weights)
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

    WINDOW = 144_160
    POLYNOMIALS = {
        "dnsmos_sig": (-0.08397278, 1.22083953, 0.0052439),
        "dnsmos_bak": (-0.13166888, 1.60915514, -0.39604546),
        "dnsmos_ovrl": (-0.06766283, 1.11546468, 0.04602535),
    }

    @functools.cached_property
    def model(self) -> Any:
        return _onnx("speechmos", "sig_bak_ovr.onnx")

    @classmethod
    def windows(cls, wav_16k: Wave) -> NDArray[np.float32]:
        """Windows ``[N, 144160]`` with a hop of 1 s; a shorter clip is doubled until it fills one."""
        while len(wav_16k) < cls.WINDOW:
            wav_16k = np.concatenate([wav_16k, wav_16k])
        count = int(len(wav_16k) // JUDGE_RATE - cls.WINDOW / JUDGE_RATE) + 1
        return np.lib.stride_tricks.sliding_window_view(wav_16k, cls.WINDOW)[::JUDGE_RATE][:count]

    def judge(self, wav_16k: Wave) -> dict[str, float]:
        windows = self.windows(np.clip(wav_16k, -1.0, 1.0).astype(np.float32))
        raw = np.concatenate([self.model.run(None, {"input_1": window[None]})[0] for window in windows])
        fits = zip(self.POLYNOMIALS.items(), raw.T, strict=True)
        return {key: float(np.polyval(polynomial, scores).mean()) for (key, polynomial), scores in fits}


class NSNet2:
    """NSNet2 (Braun and Tashev 2020, the DNS challenge's baseline): one gain per time-frequency bin, at 16 kHz.

    20 ms windows, 10 ms hop, square-root Hann, gains limited to -80 dB.  Its output holds nothing above 8 kHz.
    """

    WINDOW, HOP = 320, 160

    @functools.cached_property
    def model(self) -> Any:
        return _onnx("nsnet2", "nsnet2-20ms-baseline.onnx")

    def __call__(self, noisy_16k: Wave) -> Wave:
        """Enhance ``[S]`` at 16 kHz; returns ``[S]``."""
        window = np.sqrt(np.hanning(self.WINDOW))
        frames = -(-len(noisy_16k) // self.HOP)
        padded = np.zeros((frames + 1) * self.HOP)
        padded[: len(noisy_16k)] = noisy_16k
        position = np.arange(frames)[:, None] * self.HOP + np.arange(self.WINDOW)
        spectrum = np.fft.rfft(padded[position] * window, axis=1)
        log_power = np.log10(np.maximum(np.abs(spectrum) ** 2, 1e-12)).astype(np.float32)
        gain = np.clip(self.model.run(None, {"input": log_power[None]})[0][0], 1e-4, 1.0)
        pieces = np.fft.irfft(spectrum * gain, self.WINDOW, axis=1) * window
        output = np.zeros_like(padded)
        np.add.at(output, position, pieces)
        return output[: len(noisy_16k)].astype(np.float32)
