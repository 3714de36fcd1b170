"""The logits of a language model: from the base model's own output layer, or from its input embeddings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pal_adapters.errors import UnsupportedError

from .base import original_layer
from .routes import adapter_host
from .routing import run_active
from .setups import active_in_peft, under_setup

T = TypeVar("T")


def output_layer(backbone: Any) -> nn.Module | None:
    """The output layer over the vocabulary, such as `lm_head`; `None` for a model without one.

    The heads of an `AdapterModel` do not count: which of them is active changes.
    """
    if _has_flexible_heads(backbone):
        return None
    layer = getattr(backbone, "get_output_embeddings", lambda: None)()
    return layer if isinstance(layer, nn.Module) else None


def output_tensors(backbone: Any) -> dict[str, nn.Parameter]:
    """The output layer's own parameters, without those shared with the input embeddings and those of adapters."""
    layer: Any = output_layer(backbone)
    if layer is None:
        return {}
    inputs = backbone.get_input_embeddings().weight
    return {name: value for name, value in original_layer(layer).named_parameters() if value is not inputs}


def vocabulary_logits(backbone: Any, hidden: Tensor) -> Tensor:
    """Logits over the vocabulary: from the output layer or, without one, the input embeddings `[v, d]`."""
    layer = output_layer(backbone)
    return F.linear(hidden, backbone.get_input_embeddings().weight) if layer is None else layer(hidden)


def check_language_model(backbone: Any) -> None:
    """Warns if the loss of a language model would say little about the base model, see `HeadConfig`.

    Raises:
        UnsupportedError: For a model that applies more than its output layer between hidden states and logits.
    """
    config = backbone.config
    name, kind = type(backbone).__name__, getattr(config, "model_type", "")
    if output_layer(backbone) is not None:
        if not _is_one_layer(backbone):
            raise UnsupportedError(
                f"language_modeling: {name} does more than its output layer between its last hidden states and its "
                "logits, such as another layer or a bound on the logits, which is not supported."
            )
    elif kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not getattr(config, "tie_word_embeddings", True):
        warnings.warn(
            f"language_modeling: {name} has no output layer, so the input embeddings take its place, although its "
            "config says that they differ (tie_word_embeddings=False). Pass the model with its head "
            "(AutoModelForCausalLM).",
            stacklevel=3,
        )
    if _has_flexible_heads(backbone) and backbone.heads:
        warnings.warn(
            f"language_modeling: the input embeddings of {name} make the logits, not its heads. Pass a model with one "
            "head (AutoModelForCausalLM and adapters.init) to use its output layer.",
            stacklevel=3,
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        warnings.warn(
            f"language_modeling: the tokens of {name} see the tokens after them, so there is nothing to predict. Pass "
            "a decoder.",
            stacklevel=3,
        )


def _has_flexible_heads(backbone: Any) -> bool:
    heads = sys.modules.get("adapters.heads")  # always imported if there is such a model
    return heads is not None and isinstance(backbone, heads.ModelWithFlexibleHeadsAdaptersMixin)


def _is_one_layer(backbone: Any) -> bool:
    """Whether a model's logits are its output layer applied to the hidden states that heads get."""
    layer, seen = output_layer(backbone), dict[str, Tensor]()
    assert layer is not None

    def before(_: Any, inputs: Any) -> None:
        seen["input"] = inputs[0]

    def after(_: Any, inputs: Any, output: Any) -> None:
        seen["output"] = output

    tokens = torch.arange(3, device=next(backbone.parameters()).device).unsqueeze(0)

    def run(model: Any) -> tuple[Tensor, Tensor]:
        hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            logits = model(input_ids=tokens, return_dict=True).logits
        finally:
            for hook in hooks:
                hook.remove()
        return logits, run_active(backbone, {"input_ids": tokens}, {})[0]

    with torch.no_grad():
        logits, hidden = _run_bare(backbone, run)
    if not {"input", "output"} <= set(seen) or seen["input"].shape != hidden.shape:
        return False
    # A bound on the logits changes small ones in their last bits only.
    return torch.allclose(seen["input"], hidden) and torch.equal(seen["output"].float(), logits.float())


def _run_bare(backbone: Any, run: Callable[[Any], T]) -> T:
    """Runs a function of the model without adapters and dropout."""
    modes = {module: module.training for module in backbone.modules()}
    host = adapter_host(backbone)
    backbone.eval()
    try:
        if host == "adapters":
            return under_setup(None)(lambda: run(backbone))
        if host == "peft":
            return active_in_peft(backbone, None, lambda: run(backbone.get_base_model()))
        return run(backbone)
    finally:
        for module, mode in modes.items():
            module.training = mode
