"""From the name of a model type to a tiny random model and inputs that it accepts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.zoo.host import randomise

from .inputs import Guesses, Inputs
from .sizes import OVERRIDES, SIZES, Size, small

# Classes with a head come first, because they can generate; of the others any will do.
_HEADS = (
    "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "",
    "CTC", "AUDIO_CLASSIFICATION", "IMAGE_CLASSIFICATION", "IMAGE", "TEXT_ENCODING", "VIDEO_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
)  # fmt: skip
_MOST = 40_000_000  # parameters
_LARGE = 1e5  # a model with larger outputs gets double precision: a task's term would vanish in them
_WITH_PARTS = {
    "encoder-decoder": ("from_encoder_decoder_configs", "BertConfig", "BertConfig"),
    "vision-encoder-decoder": ("from_encoder_decoder_configs", "ViTConfig", "BertConfig"),
    "speech-encoder-decoder": ("from_encoder_decoder_configs", "Wav2Vec2Config", "BertConfig"),
    "vision-text-dual-encoder": ("from_vision_text_configs", "ViTConfig", "BertConfig"),
}
# What an output has beside values that a task module can change.
_BESIDE = frozenset(
    {"past_key_values", "cache", "cache_params", "mems", "state", "loss", "attentions", "router_logits",
     "past_buckets_states", "aux_loss", "z_loss"}
)  # fmt: skip


class NotBuilt(Exception):
    """A type of which no model could be built, or none that could be called; the message says why."""


@dataclass(frozen=True)
class Built:
    """A tiny random model of one type, frozen and in eval mode, and inputs of two examples."""

    type: str
    model: Any
    inputs: Inputs


def _mappings() -> Iterator[dict[str, Any]]:
    for head in _HEADS:
        yield getattr(modeling_auto, f"MODEL_{f'FOR_{head}_' if head else ''}MAPPING_NAMES", {})


def model_types() -> list[str]:
    """The types that the auto classes of the installed transformers know."""
    return sorted(set().union(*_mappings()))


def _classes(kind: str) -> list[str]:
    found = [names for mapping in _mappings() if (names := mapping.get(kind))]
    return list(dict.fromkeys(name for names in found for name in ([names] if isinstance(names, str) else names)))


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _config(kind: str, model_class: type, size: Size) -> Any:
    config_class = CONFIG_MAPPING[kind]
    if kind in _WITH_PARTS:
        method, *parts = _WITH_PARTS[kind]
        default = getattr(config_class, method)(*(getattr(transformers, part)() for part in parts))
    else:
        default = config_class()
    values = small(default.to_dict(), size)
    _merge(values, copy.deepcopy(OVERRIDES.get(kind, {})))
    config = config_class.from_dict(values)
    wanted = getattr(model_class, "config_class", None)
    if wanted is not None and not isinstance(config, wanted):
        parts = (getattr(config, name, None) for name in ("text_config", "vision_config", "audio_config", "decoder"))
        return next((part for part in parts if isinstance(part, wanted)), config)
    return config


def tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """All floating-point tensors of an output by name, but not those of caches, losses and attention weights."""
    if isinstance(output, Tensor):
        return {name or "output": output} if output.is_floating_point() else {}
    if isinstance(output, (tuple, list)):
        parts = {str(i): part for i, part in enumerate(output)}
    elif hasattr(output, "items") and not isinstance(output, nn.Module):
        parts = {key: part for key, part in output.items() if key not in _BESIDE}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, part in parts.items():
        found |= tensors(part, f"{name}.{key}" if name else key)
    return found


def run(model: Any, inputs: Inputs, **more: Any) -> dict[str, Tensor]:
    """The outputs of a model for inputs, without gradients, always with the same random numbers."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**inputs, **more))


def _why(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _too_large(model_class: Any, config: Any) -> bool:
    with torch.device("meta"):
        try:
            model = model_class(copy.deepcopy(config))
        except Exception:  # whatever a constructor does on this device: the real one will tell
            return False
    return sum(parameter.numel() for parameter in model.parameters()) > _MOST


def _callable_with(model: Any) -> Inputs:
    """Inputs for which a model returns finite numbers that are not all zero."""
    reasons: list[str] = []
    for inputs in Guesses(model).all():
        try:
            output = run(model, inputs)
        except Exception as error:  # whatever a model says about inputs that are none of its own
            reasons.append(f"{sorted(inputs)}: {_why(error)}")
            continue
        finite = all(value.isfinite().all() for value in output.values())
        if finite and any(value.numel() and value.abs().max() > 1e-6 for value in output.values()):
            return inputs
        reasons.append(f"{sorted(inputs)}: no finite numbers")
    raise NotBuilt("; ".join(dict.fromkeys(reasons)) or "no known arguments")


def _built(kind: str, model_class: Any, size: Size) -> Built:
    config = _config(kind, model_class, size)
    if _too_large(model_class, config):
        raise NotBuilt("more than 40 million parameters")
    torch.manual_seed(1)
    model = model_class(config).eval().requires_grad_(False)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(model)
    try:
        inputs = _callable_with(model)
    except NotBuilt:
        model.load_state_dict(initial)
        inputs = _callable_with(model)
    if max(float(value.abs().max()) for value in run(model, inputs).values() if value.numel()) > _LARGE:
        model.double()
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        run(model, inputs)
    return Built(kind, model, inputs)


def build(kind: str) -> Built:
    """A model of a type.

    Raises:
        NotBuilt: with the last reason of each class of the type.
    """
    reasons: dict[str, str] = {}
    for name in _classes(kind)[:3]:
        model_class = getattr(transformers, name, None)
        for size in SIZES if inspect.isclass(model_class) else ():
            try:
                return _built(kind, model_class, size)
            except ImportError as error:
                raise NotBuilt(_why(error)) from None
            except NotBuilt as error:
                reasons[name] = str(error)
            except Exception as error:  # whatever a constructor says about the small values
                reasons[name] = _why(error)
    raise NotBuilt(" | ".join(f"{name}: {reason[-300:]}" for name, reason in reasons.items()) or "no class")
