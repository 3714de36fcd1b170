"""The words of a language model: what the base itself makes them of, and bases that are none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from pal_adapters.errors import UnsupportedError
from pal_adapters.hosts.which import host_of

from .routing import Router


def output_layer(backbone: Any) -> nn.Module | None:
    """The output layer of a model with a head for words, such as `lm_head`; `None` for a bare model.

    The heads of a model of `adapters` with several do not count: which of them is active changes.
    """
    if hasattr(type(backbone), "active_head"):
        return None
    layer = getattr(backbone, "get_output_embeddings", lambda: None)()
    return layer if isinstance(layer, nn.Module) else None


def output_tensors(backbone: Any) -> dict[str, nn.Parameter]:
    """The output layer's own parameters, but for those that are the input embeddings and those of adapters on it."""
    layer: Any = output_layer(backbone)
    if layer is None:
        return {}
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner  # as it was before PEFT wrapped it
    inputs = backbone.get_input_embeddings().weight
    return {name: parameter for name, parameter in layer.named_parameters() if parameter is not inputs}


def word_logits(backbone: Any, hidden: Tensor) -> Tensor:
    """Logits of the next word: of the output layer or, without one, of the input embeddings `[v, d]`."""
    layer = output_layer(backbone)
    return F.linear(hidden, backbone.get_input_embeddings().weight) if layer is None else layer(hidden)


def check_language_model(backbone: Any) -> None:
    """Warns where the loss of a language model says little about the base, see `HeadConfig`.

    Raises:
        UnsupportedError: For a model whose logits are more than its output layer makes of the last hidden states.
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
            f"language_modeling: {name} has no output layer, and its config says that it is not the input embeddings "
            "(tie_word_embeddings=False), which stand in for it. Pass the model with its head (AutoModelForCausalLM).",
            stacklevel=3,
        )
    if hasattr(type(backbone), "active_head") and backbone.heads:
        warnings.warn(
            f"language_modeling: the input embeddings of {name} make the logits, not its heads. Pass a model with one "
            "head (AutoModelForCausalLM and adapters.init) for an output layer.",
            stacklevel=3,
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        warnings.warn(
            f"language_modeling: the tokens of {name} see those behind them, so there is nothing to predict. Pass a "
            "decoder.",
            stacklevel=3,
        )


def _is_one_layer(backbone: Any) -> bool:
    """Whether the logits of a model are what its output layer makes of the hidden states that heads get."""
    layer, seen = output_layer(backbone), dict[str, Tensor]()
    assert layer is not None

    def before(_: Any, inputs: Any) -> None:
        seen["input"] = inputs[0]

    def after(_: Any, inputs: Any, output: Any) -> None:
        seen["output"] = output

    tokens = torch.arange(3, device=next(backbone.parameters()).device).unsqueeze(0)
    with torch.no_grad(), _at_rest(backbone) as model:
        hooks = [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            logits = model(input_ids=tokens, return_dict=True).logits
        finally:
            for hook in hooks:
                hook.remove()
        hidden, _ = Router().run(backbone, {"input_ids": tokens}, {})
    if not {"input", "output"} <= set(seen) or seen["input"].shape != hidden.shape:
        return False
    # A bound on the logits changes small ones by their last bits alone.
    return torch.allclose(seen["input"], hidden) and torch.equal(seen["output"].float(), logits.float())


@contextmanager
def _at_rest(backbone: Any) -> Iterator[Any]:
    """The model itself, without adapters and dropout."""
    modes = {module: module.training for module in backbone.modules()}
    trained = {parameter: parameter.requires_grad for parameter in backbone.parameters()}
    host, active = host_of(backbone), None
    if host == "adapters":
        active = backbone.active_adapters
        backbone.set_active_adapters(None)
    backbone.eval()
    try:
        with backbone.disable_adapter() if host == "peft" else nullcontext():
            yield backbone.get_base_model() if host == "peft" else backbone
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, trains in trained.items():  # PEFT makes adapters trainable that it turns on again
            parameter.requires_grad_(trains)
        if host == "adapters":
            backbone.set_active_adapters(active)
