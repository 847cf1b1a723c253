"""What fine-tuning adds to a pre-trained stage 1: a condition adapter and LoRA (Metis sections 3.5 and 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metis_lib.errors import must_match
from metis_lib.models.transformer import initialise_mlp

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ConditionAdapter(nn.Module):
    """``gate * Linear(SiLU(Linear(x)))`` from ``[B, T, C]`` to ``[B, T, H]``; the scalar gate starts at 0."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.in_linear = nn.Linear(width_in, 4 * width)
        self.out_linear = nn.Linear(4 * width, width)
        self.gate_scale = nn.Parameter(torch.zeros(1))
        initialise_mlp(self)

    def forward(self, condition: Tensor) -> Tensor:
        return self.out_linear(nn.functional.silu(self.in_linear(condition))) * self.gate_scale


def add_lora(model: nn.Module, rank: int, dropout: float = 0.01) -> None:
    """Put LoRA layers of ``rank`` into every attention and MLP projection of ``model``, in place.

    Alpha is twice the rank, as published.  Base weights are frozen, LoRA weights train.
    """
    from metis_lib.compat import prepare_torchaudio

    prepare_torchaudio()
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=list(LORA_TARGETS))
    peft.inject_adapter_in_model(config, model, adapter_name="default")


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """LoRA weights under the released names (``model.<layer>.lora_A.default.weight``)."""
    return {f"model.{key}": value for key, value in model.state_dict().items() if ".lora_" in key}


def check_lora(model: nn.Module, state: dict[str, Tensor]) -> int:
    """The rank of LoRA weights named as by :func:`lora_state`; MetisError where they do not fit ``model``."""
    linear = {f"model.{name}": m for name, m in model.named_modules() if name.endswith(LORA_TARGETS)}
    shapes: dict[str, tuple[int, ...]] = {}
    rank = next((len(value) for key, value in state.items() if ".lora_A." in key), 0)
    for name, layer in linear.items():
        shapes[f"{name}.lora_A.default.weight"] = (rank, layer.in_features)
        shapes[f"{name}.lora_B.default.weight"] = (layer.out_features, rank)
    must_match(shapes, {key: tuple(value.shape) for key, value in state.items()}, "LoRA")
    return rank


def fit_lora(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """``state`` with every LoRA pair at another rank: the nearest of a lower one (singular values), or made larger by
    what adds nothing to the product: rows of A as they begin (random, seed 0), columns of B of zeros."""
    out, generator = dict(state), torch.Generator().manual_seed(0)
    for key in (key for key in state if ".lora_A." in key and len(state[key]) != rank):
        other, missing = key.replace(".lora_A.", ".lora_B."), rank - len(state[key])
        down, up = state[key], state[other]
        if missing < 0:
            left, values, right = torch.linalg.svd(up.double() @ down.double(), full_matrices=False)
            root = values[:rank].sqrt()
            out[key], out[other] = (root[:, None] * right[:rank]).to(down.dtype), (left[:, :rank] * root).to(up.dtype)
        else:
            more = torch.randn(missing, down.shape[1], generator=generator) / down.shape[1] ** 0.5
            out[key] = torch.cat([down, more.to(down.dtype)])
            out[other] = torch.cat([up, up.new_zeros(len(up), missing)], dim=1)
    return out


def fold_lora(model: nn.Module, state: dict[str, Tensor], *, copy: bool = False) -> None:
    """Add ``2 B A`` (alpha is twice the rank) to the weights of ``model``, in place or to copies of them.

    ``state`` is named as by :func:`lora_state`; the product is computed in fp32.
    """
    for key in (key for key in state if ".lora_A." in key):
        layer = model.get_submodule(key.removeprefix("model.").partition(".lora_A.")[0])
        weight = layer.weight.data
        down, up = (state[k].to(weight.device).float() for k in (key, key.replace(".lora_A.", ".lora_B.")))
        folded = (weight.to(torch.promote_types(weight.dtype, torch.float32)) + 2.0 * (up @ down)).to(weight.dtype)
        if copy:
            layer.weight = nn.Parameter(folded, requires_grad=False)
        else:
            weight.copy_(folded)
