"""Configs and tensors of PEFT adapters, saved or on a model, and the scaling of LoRA."""

from __future__ import annotations

import dataclasses
import math
import os

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn


def read_adapter(
    model: nn.Module, path: str, *, subfolder: str | None = None, revision: str | None = None
) -> tuple[PeftConfig, dict[str, torch.Tensor], str | None]:
    """Config and tensors of a saved adapter, by their names in the file, and the commit if it is on the Hub.

    Args:
        model: the base model, whose renaming rules for old checkpoints apply.
        path: a folder or a Hub repo ID.
        subfolder: a subfolder of either.
        revision: revision of the Hub repo.
    """
    commit = None
    if not os.path.isdir(path):
        # Without a network, PEFT's own download looks for the subfolder inside itself.
        file = hf_hub_download(path, "adapter_config.json", subfolder=subfolder, revision=revision)
        commit = file.rpartition("/snapshots/")[2].partition("/")[0]
        try:
            hf_hub_download(path, "adapter_model.safetensors", subfolder=subfolder, revision=commit)
        except EntryNotFoundError:
            hf_hub_download(path, "adapter_model.bin", subfolder=subfolder, revision=commit)
        path, subfolder = os.path.dirname(file), None
    folder = path if subfolder is None else os.path.join(path, subfolder)
    mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    return PeftConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu", key_mapping=mapping), commit


def adapter_on(model: nn.Module, adapter_name: str) -> tuple[PeftConfig, dict[str, torch.Tensor]] | None:
    """Config and tensors of an adapter on a model, as if it had been saved; None if there is no such adapter."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        return None
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return config, {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def lora_scaling(config: LoraConfig, module: str, rank: int) -> float:
    """The factor by which LoRA scales `B A x` at a module."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
    return alpha / math.sqrt(rank) if config.use_rslora else alpha / rank


def lora_extras(config: LoraConfig) -> list[str]:
    """Settings that make a LoRA adapter more than `scaling * B A x` on an unchanged base model."""
    found = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    ]
    others = ("target_parameters", "layer_replication", "trainable_token_indices")
    found += [name for name in others if getattr(config, name, None)]
    if config.bias != "none":
        found.append("bias")
    init = config.init_lora_weights
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        found.append("init_lora_weights")  # these are initialised from the base weights and change them
    return [f"{name}={getattr(config, name)!r}" for name in dict.fromkeys(found)]
