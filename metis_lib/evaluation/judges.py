"""Other people's models, run as they are: the offline judges that listen, and NSNet2, a peer to compare with.

Each loads at its first clip; weights come through :func:`metis_lib.assets.fetch` (hash-checked).  Clips are float32
``[S]`` at 16 kHz, many at a time: a judge takes them in parallel or in a batch where that leaves its verdicts as they
are and saves time (``results/bench/evaluation.json``), else one after the other.
The judges of the paper are in :mod:`metis_lib.evaluation.paper_judges`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metis_lib import assets
from metis_lib.evaluation.metrics import JUDGE_RATE, METRICS, MetricFailure, Wave, check

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ABSENT = "the judge is not available"
"""How the reason begins why a judge, or the package that it is in, could not say anything of any clip."""
BROKE = "the judge broke off"
"""How the reason begins why a judge that was there said nothing of a clip which it did not refuse (no memory, say)."""


def choose_device(asked: str, has_cuda: bool, who: str) -> str:
    """``cuda`` (``cuda:1`` where that is asked for) or ``cpu``; a note on stderr where CUDA is asked for in vain."""
    if asked.startswith("cuda") and not has_cuda:
        assets.say(f"{who}: no CUDA here, so it runs on the CPU")
    if not has_cuda or asked == "cpu":
        return "cpu"
    return asked if asked.startswith("cuda") else "cuda"


def gpu_index(device: str) -> int:
    """The number of the GPU of :func:`choose_device`, for libraries that want it by itself."""
    return int(device.partition(":")[2] or 0)


def has_cublas() -> bool:
    """Whether the library that CTranslate2 calls on a GPU can be opened: of CUDA 12, whatever PyTorch is built with."""
    with contextlib.suppress(OSError):
        return ctypes.CDLL("libcublas.so.12") is not None
    return os.name == "nt"


def torch_device(asked: str, who: str) -> str:
    """:func:`choose_device` for a judge that runs in torch."""
    import torch

    return choose_device(asked, torch.cuda.is_available(), who)


def _onnx(asset: str, filename: str, device: str = "cpu") -> Any:
    """An onnxruntime session of an asset's file; on the CPU with as many threads as this process may use."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # kind to a busy machine
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    place = choose_device(device, has_cuda, filename)
    cuda = [("CUDAExecutionProvider", {"device_id": gpu_index(place)})] * (place != "cpu")
    providers = [*cuda, "CPUExecutionProvider"]
    return onnxruntime.InferenceSession(assets.fetch(asset) / filename, options, providers=providers)


class Judge:
    """Base of the judges: ``judge(wav_16k)`` returns its verdict on one clip ``[S]`` as JSON types.

    Attributes:
        protocol: the protocol id that its verdicts are kept under.
        batch: how many clips :meth:`many` is best given at a time.
        shortest: seconds of audio that it needs.
        device: ``auto``, ``cpu`` or ``cuda``.
        language: what is spoken in the clips, for judges that hear words.

    Raises:
        MetricFailure: the audio is unusable, or the judge's weights cannot be had (asked for only once).
    """

    protocol = ""
    batch = 16
    shortest = 0.1
    model: Any
    _unavailable = ""

    def __init__(self, device: str = "auto", language: str = "en") -> None:
        self.device, self.language = device, language

    def identity(self) -> str:
        """What tells its weights from others of the same layout; empty for those that come by their hash."""
        return ""

    def __call__(self, wav_16k: Wave) -> Any:
        verdict = self.many([wav_16k])[0]
        if isinstance(verdict, MetricFailure):
            raise verdict
        return verdict

    def many(self, wavs_16k: Sequence[Wave]) -> list[Any]:
        """Verdicts on clips, in order; a clip that cannot be judged gives its MetricFailure and spoils no other."""
        verdicts: list[Any] = [self._refuse(wav) for wav in wavs_16k]
        good = [place for place, failure in enumerate(verdicts) if failure is None]
        if not good:
            return verdicts
        try:
            self._load()
            found = self.judge_many([wavs_16k[place] for place in good])
        except MetricFailure as failure:
            found = [failure] * len(good) if self._unavailable or len(good) == 1 else self._singly(wavs_16k, good)
        except Exception as error:  # of somebody else's library: whatever it is, it is this clip's alone
            found = [reason_of(error, BROKE)] if len(good) == 1 else self._singly(wavs_16k, good)
        for place, verdict in zip(good, found, strict=True):
            verdicts[place] = verdict
        return verdicts

    def _singly(self, wavs_16k: Sequence[Wave], places: Sequence[int]) -> list[Any]:
        return [self.many([wavs_16k[place]])[0] for place in places]

    def _refuse(self, wav_16k: Wave) -> MetricFailure | None:
        try:
            check(wav_16k, self.shortest)
        except MetricFailure as failure:
            return failure
        return MetricFailure(self._unavailable) if self._unavailable else None

    def _load(self) -> None:
        try:
            _ = self.model
        except Exception as error:  # no network, no package, weights of another layout
            self._unavailable = f"{ABSENT}: {reason_of(error)}"
            raise MetricFailure(self._unavailable) from error

    def judge_many(self, wavs_16k: Sequence[Wave]) -> list[Any]:
        """The verdicts on clips that are good, by the loaded model."""
        return [self.judge(wav) for wav in wavs_16k]

    def judge(self, wav_16k: Wave) -> Any:
        """The verdict on one such clip."""
        raise NotImplementedError

    def release(self) -> None:
        """Drop the model, so that the next judge has the memory, the accelerator's too."""
        self.__dict__.pop("model", None)
        gc.collect()
        torch = sys.modules.get("torch")
        if torch and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def reason_of(error: Exception, beginning: str = "") -> MetricFailure:
    """Somebody else's exception as the reason of a missing number, in one line."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return MetricFailure(f"{beginning}: {reason}" if beginning else reason)


class WhisperJudge(Judge):
    """Whisper base, int8, by faster-whisper: what was said, as text.

    On a CPU every core hears a clip of its own, which is faster than many cores on one clip or batches (the encoder
    computes 30 s whatever the clip's length); on a GPU clips go in batches.  The transcripts are the same.

    Its mel filters are a product by numpy, whose last bit depends on the number of BLAS threads, and on that bit eight
    of twelve transcripts of unclear speech.  So there is one thread.
    """

    protocol = METRICS["wer"]
    workers = min(CORES, 8)
    """Clips heard at a time on a CPU."""

    @functools.cached_property
    def model(self) -> Any:
        import ctranslate2
        from faster_whisper import WhisperModel

        has_cuda = ctranslate2.get_cuda_device_count() > 0
        if has_cuda and self.device != "cpu" and not (has_cuda := has_cublas()):
            assets.say("whisper-base: no libcublas.so.12, so it runs on the CPU (docs/install.md)")
        device = choose_device(self.device, has_cuda, "whisper-base")
        self.batched = device != "cpu"
        return WhisperModel(
            str(assets.fetch("whisper-base")), device=device.partition(":")[0], device_index=gpu_index(device),
            compute_type="int8", local_files_only=True,
            cpu_threads=max(1, CORES // self.workers), num_workers=1 if self.batched else self.workers,
        )  # fmt: skip

    @property
    def _options(self) -> dict[str, Any]:
        language = self.language.split("-")[0]
        return {
            "language": language, "beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False,
            "without_timestamps": True, "max_new_tokens": 160,
        }  # fmt: skip

    def segments(self, wav_16k: Wave, **changes: Any) -> list[Any]:
        """faster-whisper's segments of one clip, of all its length; ``changes`` to the options of the protocol."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            return list(self.model.transcribe(np.ascontiguousarray(wav_16k), **self._options | changes)[0])

    def judge(self, wav_16k: Wave) -> str:
        return " ".join(segment.text.strip() for segment in self.segments(wav_16k[: 30 * JUDGE_RATE])).strip()

    def judge_many(self, wavs_16k: Sequence[Wave]) -> list[str]:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            if self.batched:
                return self.judge_batch(wavs_16k)
            with ThreadPoolExecutor(self.workers) as pool:
                return list(pool.map(self.judge, wavs_16k))

    def judge_batch(self, wavs_16k: Sequence[Wave]) -> list[str]:
        """One batch: the clips in a row, cut where each ends; what is likely no speech is left out as in ``judge``."""
        from faster_whisper import BatchedInferencePipeline

        wavs = [wav[: 30 * JUDGE_RATE] for wav in wavs_16k]
        ends = np.cumsum([len(wav) for wav in wavs]) / JUDGE_RATE
        starts = np.concatenate([[0.0], ends[:-1]])
        clips = [{"start": float(a), "end": float(b)} for a, b in zip(starts, ends, strict=True)]
        segments, _ = BatchedInferencePipeline(self.model).transcribe(
            np.concatenate(wavs), clip_timestamps=clips, batch_size=len(wavs), **self._options
        )
        heard: list[list[str]] = [[] for _ in wavs]
        for segment in segments:
            if segment.no_speech_prob <= 0.6 or segment.avg_logprob > -1.0:  # faster-whisper's own thresholds
                heard[int(np.searchsorted(starts, segment.start + 0.01)) - 1].append(segment.text.strip())
        return [" ".join(parts).strip() for parts in heard]


class SpeakerJudge(Judge):
    """SpeechBrain's ECAPA-TDNN trained on VoxCeleb: 80 log-mel bins, sentence mean removed, 192 numbers out.

    Every clip by itself: padding in a batch moves an embedding (cosine 0.999 to its own) and is slower.  Cores that
    torch leaves idle on a CPU take clips of their own.
    """

    protocol = METRICS["sim_other"]
    shortest = 0.25

    @functools.cached_property
    def model(self) -> Any:
        import torch

        from metis_lib.compat import prepare_torchaudio

        prepare_torchaudio()
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
        from speechbrain.processing.features import InputNormalization

        device = torch_device(self.device, "ECAPA-TDNN")
        network = ECAPA_TDNN(80, channels=[1024, 1024, 1024, 1024, 3072])
        weights = torch.load(assets.fetch("ecapa") / "embedding_model.ckpt", weights_only=True, map_location="cpu")
        network.load_state_dict(weights)
        features, normalise = Fbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False)
        self.workers = max(1, CORES // torch.get_num_threads()) if device == "cpu" else 1
        return features.to(device), normalise.to(device), network.eval().to(device)

    def judge_many(self, wavs_16k: Sequence[Wave]) -> list[list[float]]:
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.judge, wavs_16k))

    def judge(self, wav_16k: Wave) -> list[float]:
        import torch

        features, normalise, network = self.model
        device = next(network.parameters()).device
        whole = torch.ones(1, device=device)
        with torch.inference_mode():
            wav = torch.from_numpy(np.array(wav_16k, dtype=np.float32))[None].to(device)
            mel = normalise(features(wav), whole)
            embedding = torch.nn.functional.normalize(network(mel, whole)[0, 0], dim=0)
        return [round(float(value), 7) for value in embedding]


class DnsmosJudge(Judge):
    """DNSMOS P.835 (2022 model, polyfit, not personalised) and P.808, means over windows (DNS-Challenge's recipe).

    Windows go through the networks one at a time on a CPU, where a batch of them is slower, 16 at a time on a GPU.
    """

    protocol = f"{METRICS['dnsmos_sig']}+p808"
    WINDOW = 144_160
    POLYNOMIALS = {
        "dnsmos_sig": (-0.08397278, 1.22083953, 0.0052439),
        "dnsmos_bak": (-0.13166888, 1.60915514, -0.39604546),
        "dnsmos_ovrl": (-0.06766283, 1.11546468, 0.04602535),
    }
    KEYS = (*POLYNOMIALS, "dnsmos_p808")

    @functools.cached_property
    def model(self) -> Any:
        return tuple(_onnx("speechmos", name, self.device) for name in ("sig_bak_ovr.onnx", "model_v8.onnx"))

    @classmethod
    def windows(cls, wav_16k: Wave) -> NDArray[np.float32]:
        """Windows ``[N, 144160]`` with a hop of 1 s; a shorter clip is doubled until it fills one."""
        while len(wav_16k) < cls.WINDOW:
            wav_16k = np.concatenate([wav_16k, wav_16k])
        count = int(len(wav_16k) // JUDGE_RATE - cls.WINDOW / JUDGE_RATE) + 1
        return np.lib.stride_tricks.sliding_window_view(wav_16k, cls.WINDOW)[::JUDGE_RATE][:count]

    def judge_many(self, wavs_16k: Sequence[Wave]) -> list[dict[str, float]]:
        parts = [self.windows(np.clip(wav, -1.0, 1.0).astype(np.float32)) for wav in wavs_16k]
        scores = self._scores([window for windows in parts for window in windows])
        cuts = np.cumsum([len(windows) for windows in parts])[:-1]
        return [dict(zip(self.KEYS, part.mean(axis=0).tolist(), strict=True)) for part in np.split(scores, cuts)]

    def _scores(self, windows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
        """``[N, 4]`` of windows, in the order of ``KEYS``."""
        p835, p808 = self.model
        size, rows = 16 if p835.get_providers()[0] == "CUDAExecutionProvider" else 1, []
        for start in range(0, len(windows), size):
            batch = np.stack(windows[start : start + size])
            raw = p835.run(None, {"input_1": batch})[0].astype(np.float64)
            fits = [np.polyval(fit, column) for fit, column in zip(self.POLYNOMIALS.values(), raw.T, strict=True)]
            rows.append(np.stack([*fits, p808.run(None, {"input_1": log_mel(batch)})[0][:, 0]], axis=1))
        return np.concatenate(rows)


@functools.cache
def _mel_filters() -> Any:
    """Slaney's 120 mel filters from 0 to 8 kHz, each of area 1, over the 161 bins of a transform of 321: [161, 120]."""
    import torch

    knee, step = 15.0, np.log(6.4) / 27  # 15 mel are 1 kHz: below them linear, above logarithmic
    mel = np.linspace(0, knee + np.log(8) / step, 122)
    hertz = np.where(mel < knee, mel * 200 / 3, 1000 * np.exp((mel - knee) * step))
    slopes, widths = hertz[:, None] - np.fft.rfftfreq(321, 1 / JUDGE_RATE), np.diff(hertz)[:, None]
    triangles = np.maximum(0, np.minimum(-slopes[:-2] / widths[:-1], slopes[2:] / widths[1:]))
    return torch.from_numpy((triangles * 2 / (hertz[2:] - hertz[:-2])[:, None]).T.astype(np.float32))


def log_mel(windows_16k: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mel spectrograms ``[N, 900, 120]`` of windows ``[N, 144160]`` as P.808's network expects them (librosa's)."""
    import torch

    wav = torch.from_numpy(windows_16k[:, :-160])
    spectrum = torch.stft(wav, 321, 160, window=torch.hann_window(321), pad_mode="constant", return_complex=True)
    decibels = 10 * torch.log10((spectrum.abs() ** 2).transpose(1, 2).matmul(_mel_filters()).clamp(min=1e-10))
    top = decibels.amax(dim=(1, 2), keepdim=True)
    return (((decibels - top).clamp(min=-80.0) + 40) / 40).numpy()


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
