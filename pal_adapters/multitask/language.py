"""The words of a language model: what the base itself makes them of, and bases that are none."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pal_adapters.errors import UnsupportedError

# What some models do with the logits of their output layer, and the value at which that is nothing.
_ON_LOGITS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0}


def output_layer(backbone: Any) -> nn.Module | None:
    """The output layer of a model with a head for words, such as `lm_head`; `None` for a bare model."""
    layer = getattr(backbone, "get_output_embeddings", lambda: None)()
    return layer if isinstance(layer, nn.Module) else None


def output_tensors(backbone: Any) -> dict[str, nn.Parameter]:
    """The parameters of the output layer that are not the input embeddings."""
    layer, inputs = output_layer(backbone), backbone.get_input_embeddings().weight
    return {} if layer is None else {name: p for name, p in layer.named_parameters() if p is not inputs}


def word_logits(backbone: Any, hidden: Tensor) -> Tensor:
    """Logits of the next word: of the output layer or, without one, of the input embeddings `[v, d]`."""
    layer = output_layer(backbone)
    return F.linear(hidden, backbone.get_input_embeddings().weight) if layer is None else layer(hidden)


def check_language_model(backbone: Any) -> None:
    """Warns where the loss of a language model says little about the base, see `HeadConfig`.

    Raises:
        UnsupportedError: For a model whose logits are more than what its output layer gives.
    """
    config = backbone.config
    name, kind = type(backbone).__name__, getattr(config, "model_type", "")
    if output_layer(backbone) is not None:
        for option, neutral in _ON_LOGITS.items():
            value = getattr(config, option, neutral)
            if value not in (None, neutral):
                raise UnsupportedError(
                    f"language_modeling: {name} has {option}={value} behind its output layer, which is not supported."
                )
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "tie_word_embeddings", True):
        warnings.warn(
            f"language_modeling: {name} has no output layer, and its config says that it is not the input embeddings "
            "(tie_word_embeddings=False), which stand in for it. Pass the model with its head (AutoModelForCausalLM).",
            stacklevel=4,
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        warnings.warn(
            f"language_modeling: the tokens of {name} see those behind them, so there is nothing to predict. Pass a "
            "decoder.",
            stacklevel=4,
        )
