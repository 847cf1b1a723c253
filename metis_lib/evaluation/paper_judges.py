"""The judges of the paper, as adapters: they run where their weights are, and say in one line where they are not.

Weights are looked for in ``$METIS_HOME/judges/<name>`` and, where a hub can be reached, in the model's repository.
Clips are float32 ``[S]`` at 16 kHz; see :class:`metis_lib.evaluation.judges.Judge`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from metis_lib import assets
from metis_lib.compat import prepare_torchaudio
from metis_lib.errors import MetisError
from metis_lib.evaluation import record
from metis_lib.evaluation.judges import DnsmosJudge, Judge, SpeakerJudge, WhisperJudge, torch_device
from metis_lib.evaluation.metrics import JUDGE_RATE, Wave, protocol
from metis_lib.tasks import like

SETS = ("offline", "paper")


def weights(name: str, repository: str = "", file: str = "") -> Path:
    """The folder of a judge's weights: ``$METIS_HOME/judges/<name>``, else the hub's copy of ``repository``.

    Raises:
        MetisError: neither is there (``file``: what the folder has to hold), in one line that says where to put it.
    """
    folder = assets.metis_home() / "judges" / name
    if (folder / file).exists() and folder.is_dir():
        return folder
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if repository:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        twice = ["*.bin"] * ("whisper" in repository)  # it has the same as safetensors
        left, kept = [*twice, "*.msgpack", "*.h5", "*fp32*"], not assets.reachable(hub)
        try:  # what the hub's client keeps serves where the hub is out of reach
            return Path(snapshot_download(repository, local_files_only=kept, ignore_patterns=left))
        except LocalEntryNotFoundError:
            pass
        except (OSError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise MetisError(f"{name} is not in {folder}, and {repository} cannot be fetched ({reason})") from error
    where = f"get it from {hub}/{repository}" if repository else "its authors give it out by hand"
    raise MetisError(f"not run here: put {file or name} into {folder} ({where})")


class PaperJudge(Judge):
    """A judge whose weights its user puts there: ``place`` is what :func:`weights` takes."""

    place: tuple[str, str, str]

    @property
    def folder(self) -> Path:
        """Where its weights are; MetisError where they are not."""
        return weights(*self.place)

    def identity(self) -> str:
        """The hub's commit, or a hash of the files; empty where they are not (it says so when it is to judge)."""
        try:
            folder, (_, repository, file) = self.folder, self.place
        except MetisError:
            return ""
        if folder.parent.name == "snapshots":
            return folder.name
        files = [path for path in folder.rglob("*" if repository else file) if ".cache" not in path.parts]
        return record.sha256_named({path.relative_to(folder).as_posix(): path for path in files}) or ""


# --- words -----------------------------------------------------------------------------------------------


class WhisperLargeJudge(PaperJudge):
    """whisper-large-v3 by transformers as seed-tts-eval uses it: float32, greedy, no timestamps, first 30 s.

    Every clip is padded to 30 s anyway, so that a batch hears what single clips would.
    """

    protocol = protocol("wer", "paper")
    place = ("whisper-large-v3", "openai/whisper-large-v3", "config.json")
    batch = 8

    @functools.cached_property
    def model(self) -> Any:
        prepare_torchaudio()
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        folder = self.folder
        network = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        device = torch_device(self.device, "whisper-large-v3")
        return WhisperProcessor.from_pretrained(folder), network.eval().to(device)

    def judge_many(self, wavs_16k: Sequence[Wave]) -> list[str]:
        processor, network = self.model
        features = processor(list(wavs_16k), sampling_rate=JUDGE_RATE, return_tensors="pt").input_features
        with torch.inference_mode():
            tokens = network.generate(
                features.to(network.device), language=self.language.split("-")[0], task="transcribe", num_beams=1,
                do_sample=False,
            )  # fmt: skip
        return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


class ParaformerJudge(PaperJudge):
    """FunASR's paraformer-zh and zhconv to zh-cn, as seed-tts-eval: what was said in Chinese.

    Both are optional packages (``pip install funasr zhconv`` in an environment of their own).
    """

    protocol = f"{protocol('wer', 'paper')}:zh"
    place = ("paraformer-zh", "funasr/paraformer-zh", "config.yaml")
    batch = 1

    @functools.cached_property
    def model(self) -> Any:
        try:
            from funasr import AutoModel
            from zhconv import convert
        except ImportError as error:
            raise MetisError(f"not run here: paraformer-zh needs funasr and zhconv ({error})") from error
        device = torch_device(self.device, "paraformer-zh")
        return AutoModel(model=str(self.folder), device=device, disable_update=True), convert

    def judge(self, wav_16k: Wave) -> str:
        network, convert = self.model
        return convert(network.generate(input=np.asarray(wav_16k), fs=JUDGE_RATE, batch_size_s=300)[0]["text"], "zh-cn")


# --- voices ----------------------------------------------------------------------------------------------


class _ConvBn(nn.Module):
    """Convolution, ReLU, batch norm: ``[B, C, T] -> [B, C', T]``."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu())


class _Res2(nn.Module):
    """Res2Net: groups of channels, each convolved with the one before added; the last passes. ``[B, C, T]``."""

    def __init__(self, channels: int, dilation: int, scale: int = 8) -> None:
        super().__init__()
        self.width = channels // scale
        convolution = functools.partial(nn.Conv1d, self.width, self.width, 3, padding=dilation, dilation=dilation)
        self.convs = nn.ModuleList(convolution() for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        *groups, last = x.split(self.width, dim=1)
        done: list[Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=True):
            done.append(bn(conv(group + done[-1] if done else group).relu()))
        return torch.cat([*done, last], dim=1)


class _Squeeze(nn.Module):
    """Squeeze and excitation: one gain per channel from the mean over time. ``[B, C, T]``."""

    def __init__(self, channels: int, middle: int = 128) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, middle), nn.Linear(middle, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.linear2(self.linear1(x.mean(dim=2)).relu()).sigmoid()[..., None]


class _Block(nn.Module):
    """SE-Res2Net block with a residual. ``[B, C, T]``.  Names are those of the checkpoint."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.Conv1dReluBn1, self.Conv1dReluBn2 = _ConvBn(channels, channels), _ConvBn(channels, channels)
        self.Res2Conv1dReluBn, self.SE_Connect = _Res2(channels, dilation), _Squeeze(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class _Pooling(nn.Module):
    """Attentive statistics: ``[B, C, T]`` to weighted means and deviations ``[B, 2 C]``."""

    def __init__(self, channels: int, middle: int = 128) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Conv1d(channels, middle, 1), nn.Conv1d(middle, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        share = self.linear2(self.linear1(x).tanh()).softmax(dim=2)
        mean = (share * x).sum(dim=2)
        variance = (share * x**2).sum(dim=2) - mean**2
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)


class WavlmEcapa(nn.Module):
    """UniSpeech's speaker verification: weighted hidden states of WavLM, ECAPA-TDNN (512 channels), 256 numbers.

    Args:
        trunk: transformers' WavLMModel with ``hidden_size`` C.
        channels, wide, size: widths of the blocks, of the pooling, of the embedding.
    """

    def __init__(self, trunk: nn.Module, channels: int = 512, wide: int = 1536, size: int = 256) -> None:
        super().__init__()
        self.trunk: Any = trunk
        width, layers = self.trunk.config.hidden_size, self.trunk.config.num_hidden_layers
        self.feature_weight = nn.Parameter(torch.zeros(layers + 1))
        self.instance_norm = nn.InstanceNorm1d(width)
        self.layer1 = _ConvBn(width, channels, kernel=5)
        self.layer2, self.layer3, self.layer4 = (_Block(channels, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * channels, wide, 1)
        self.pooling, self.bn = _Pooling(wide), nn.BatchNorm1d(2 * wide)
        self.linear = nn.Linear(2 * wide, size)

    def forward(self, wav_16k: Tensor) -> Tensor:
        """``[1, S]`` at 16 kHz to ``[1, size]``."""
        wav = nn.functional.layer_norm(wav_16k, wav_16k.shape[-1:])
        states = torch.stack(self.trunk(wav, output_hidden_states=True).hidden_states)  # [L + 1, 1, T, C]
        mixed = (self.feature_weight.softmax(dim=0)[:, None, None, None] * states).sum(dim=0)
        first = self.layer1(self.instance_norm(mixed.transpose(1, 2) + 1e-6))
        second = self.layer2(first)
        third = self.layer3(second)
        joined = self.conv(torch.cat([second, third, self.layer4(third)], dim=1)).relu()
        return self.linear(self.bn(self.pooling(joined)))


_TRUNK = "feature_extract.model."
_NAMES = {
    "post_extract_proj": "feature_projection.projection", "encoder.pos_conv.0": "encoder.pos_conv_embed.conv",
    "weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1",
    "self_attn_layer_norm": "layer_norm", "self_attn.grep_linear": "attention.gru_rel_pos_linear",
    "self_attn.relative_attention_bias": "attention.rel_attn_embed", "self_attn.grep_a": "attention.gru_rel_pos_const",
    "self_attn": "attention", "fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense",
    "mask_emb": "masked_spec_embed",
}  # fmt: skip
"""Names of WavLM's own code and what transformers calls them; the order counts."""


def trunk_name(name: str) -> str:
    """Transformers' name of a weight of WavLM's own code."""
    if name.startswith("layer_norm"):
        return f"feature_projection.{name}"
    if name.startswith("feature_extractor."):  # conv_layers.N.0 is the convolution, .2.1 its norm
        _, _, number, *rest, last = name.split(".")
        return f"feature_extractor.conv_layers.{number}.{'conv' if rest == ['0'] else 'layer_norm'}.{last}"
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


def trunk_config(state: dict[str, Tensor]) -> Any:
    """The WavLMConfig of weights by WavLM's own names, read from their shapes (the strides are always the same)."""
    from transformers import WavLMConfig

    convolutions = [w for name, w in state.items() if name.startswith("feature_extractor") and w.ndim == 3]
    buckets, heads = state["encoder.layers.0.self_attn.relative_attention_bias.weight"].shape
    position = state["encoder.pos_conv.0.weight_v"]
    return WavLMConfig(
        hidden_size=position.shape[0], num_attention_heads=heads, num_buckets=buckets,
        num_hidden_layers=len([name for name in state if name.endswith("fc1.weight")]),
        intermediate_size=state["encoder.layers.0.fc1.weight"].shape[0],
        conv_dim=tuple(w.shape[0] for w in convolutions), conv_kernel=tuple(w.shape[2] for w in convolutions),
        num_conv_pos_embeddings=position.shape[2], num_conv_pos_embedding_groups=position.shape[0] // position.shape[1],
        feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=False, apply_spec_augment=False,
    )  # fmt: skip


def load_wavlm_ecapa(path: Path) -> WavlmEcapa:
    """The network in a checkpoint such as ``wavlm_large_finetune.pth``: every weight finds its place, none is left.

    Raises:
        MetisError: another layout.
    """
    prepare_torchaudio()
    from transformers import WavLMModel

    state = torch.load(path, map_location="cpu", weights_only=True)
    state = {name: value for name, value in state.get("model", state).items() if not name.startswith("loss_calculator")}
    trunk = {name.removeprefix(_TRUNK): value for name, value in state.items() if name.startswith(_TRUNK)}
    head = {name: value for name, value in state.items() if not name.startswith(_TRUNK)}
    try:
        sizes = (head["layer1.conv.weight"].shape[0], head["conv.weight"].shape[0], head["linear.weight"].shape[0])
        network = WavlmEcapa(WavLMModel(trunk_config(trunk)), *sizes)
        network.load_state_dict(head | {f"trunk.{trunk_name(name)}": value for name, value in trunk.items()})
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MetisError(f"{path.name} is not UniSpeech's WavLM with ECAPA-TDNN ({reason})") from error
    return network.eval()


class WavlmSpeakerJudge(PaperJudge):
    """The paper's SIM: WavLM-large, fine-tuned, and ECAPA-TDNN; 256 numbers of one whole clip at a time."""

    protocol = protocol("sim_prompt", "paper")
    place = ("wavlm-large-sv", "", "wavlm_large_finetune.pth")
    shortest = 0.25

    @functools.cached_property
    def model(self) -> Any:
        return load_wavlm_ecapa(self.folder / self.place[2]).to(torch_device(self.device, "WavLM"))

    def judge(self, wav_16k: Wave) -> list[float]:
        return _embedding(self.model, wav_16k, lambda found: found)


class WavlmXVectorJudge(PaperJudge):
    """The paper's SIM of speech enhancement: microsoft/wavlm-base-plus-sv, x-vector of one whole clip at a time."""

    protocol = protocol("sim_target", "paper", "se")
    place = ("wavlm-base-plus-sv", "microsoft/wavlm-base-plus-sv", "config.json")
    shortest = 0.25

    @functools.cached_property
    def model(self) -> Any:
        prepare_torchaudio()
        from transformers import WavLMForXVector

        network = WavLMForXVector.from_pretrained(self.folder).eval()
        return network.to(torch_device(self.device, "wavlm-base-plus-sv"))

    def judge(self, wav_16k: Wave) -> list[float]:
        return _embedding(self.model, wav_16k, lambda found: found.embeddings)


def _embedding(network: nn.Module, wav_16k: Wave, pick: Callable[[Any], Tensor]) -> list[float]:
    """What ``pick`` takes of the network's answer to one clip, at length 1."""
    wav = torch.from_numpy(np.array(wav_16k, dtype=np.float32))[None].to(next(network.parameters()).device)
    with torch.inference_mode():
        vector = nn.functional.normalize(pick(network(wav))[0].float(), dim=0)
    return [round(float(value), 7) for value in vector]


# --- quality ---------------------------------------------------------------------------------------------


class NisqaJudge(PaperJudge):
    """NISQA v2.0's overall opinion score by torchmetrics (optional, with librosa), of the clip at 16 kHz."""

    protocol = protocol("nisqa", "paper")
    place = ("nisqa", "", "nisqa.tar")
    batch = 1

    @functools.cached_property
    def model(self) -> Any:
        try:
            import librosa  # noqa: F401 (torchmetrics asks for both at its first clip)
            import requests  # noqa: F401
            from torchmetrics.functional.audio import nisqa
        except ImportError as error:
            raise MetisError(f"not run here: NISQA needs torchmetrics, librosa and requests ({error})") from error
        return nisqa, str(self.folder)

    def judge(self, wav_16k: Wave) -> dict[str, float]:
        nisqa, folder = self.model
        with mock.patch.object(nisqa, "NISQA_DIR", folder):  # where it looks before it would download
            scores = nisqa.non_intrusive_speech_quality_assessment(torch.from_numpy(np.array(wav_16k)), JUDGE_RATE)
        return {"nisqa": float(scores[0])}


# --- sets ------------------------------------------------------------------------------------------------


def choose(judges: str, task: str, device: str, languages: Sequence[str] = ("en",)) -> dict[str, Judge]:
    """The judges of a set for a task: ``words:<language>``, ``voice``, ``opinion`` and, of the paper's, ``quality``.

    Raises:
        MetisError: no such set.
    """
    if judges not in SETS:
        raise MetisError(f"unknown judges {judges!r}; choose among {', '.join(SETS)}")
    if judges == "offline":
        whisper: type[Judge] = WhisperJudge
        return {
            **{f"words:{language}": whisper(device, language) for language in languages},
            "voice": SpeakerJudge(device), "opinion": DnsmosJudge(device),
        }  # fmt: skip
    hears = {language: ParaformerJudge if language == "zh" else WhisperLargeJudge for language in languages}
    voice = WavlmXVectorJudge if like(task) == "se" else WavlmSpeakerJudge
    return {
        **{f"words:{language}": hears[language](device, language) for language in languages},
        "voice": voice(device), "opinion": DnsmosJudge(device), "quality": NisqaJudge(device),
    }  # fmt: skip
