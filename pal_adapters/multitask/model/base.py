"""The base model inside a backbone: which tensors are its own and which were added to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.hooks.in_place import in_place_ids

from .routes import adapter_host, bare_model


def base_names(backbone: nn.Module) -> list[str]:
    """Names of the base model's weights and persistent buffers without adapters, read off a skeleton of it."""
    bare = bare_model(backbone)
    with torch.device("meta"):
        return list(model_class(bare)(cast("Any", bare).config).state_dict())


def base_tensors(backbone: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """Weights and persistent buffers of the base model, under the names they have without adapters.

    Args:
        backbone: The model, with or without adapters.
        names: The result of `base_names`, if already known.
    """
    bare = bare_model(backbone)
    names = base_names(backbone) if names is None else names
    present = {
        **dict(bare.named_parameters(remove_duplicate=False)),
        **dict(bare.named_buffers(remove_duplicate=False)),
    }
    # A module that a host has wrapped lies one level deeper, in its wrapper.
    unwrapped = {name.replace(".base_layer.", "."): tensor for name, tensor in present.items()}
    unwrapped |= {name: present[name] for name in names if name in present}
    return {name: unwrapped[name] for name in names if name in unwrapped}


def without_in_place(backbone: nn.Module, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the base model's tensors that no adapter trains in place, and saves as its own."""
    taken = in_place_ids(backbone)
    return {name: tensor for name, tensor in base.items() if id(tensor) not in taken}


def added_parameters(backbone: nn.Module, base: Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Parameters of the host's adapters, fusions and heads, without the base model's; shared ones appear once."""
    known = {id(tensor) for tensor in base}
    return {name: parameter for name, parameter in backbone.named_parameters() if id(parameter) not in known}


def model_class(model: nn.Module) -> type[nn.Module]:
    """The class of transformers or adapters that a model is an instance of.

    `adapters.init` replaces it with a subclass, and users may define subclasses of their own.
    """
    for candidate in type(model).__mro__:
        if library_of(candidate) in ("transformers", "adapters") and not candidate.__name__.endswith(
            ("Mixin", "PreTrainedModel")
        ):
            return candidate
    return type(model)


def library_of(model_class: type[nn.Module]) -> str:
    """The top-level package of a class, in which a saved model looks the class up by name."""
    return model_class.__module__.partition(".")[0]


def original_layer(layer: Any) -> Any:
    """A layer as it was before PEFT wrapped it."""
    while (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)) is not None:
        layer = inner
    return layer


def embedding_tensors(backbone: Any, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The input embeddings among the base model's tensors."""
    own = {id(parameter) for parameter in original_layer(backbone.get_input_embeddings()).parameters()}
    return {name: tensor for name, tensor in base.items() if id(tensor) in own}


def has_resized_embeddings(backbone: Any) -> bool:
    """Whether the vocabulary size differs from that of the checkpoint that the base model was loaded from.

    False if that checkpoint cannot be read: the base model then has to be passed in again when the folder is loaded,
    so the folder need not contain any of it.
    """
    source = source_of(backbone)
    if not source:
        return False
    try:
        stored = type(backbone.config).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError):
        return False
    size = getattr(stored.get_text_config(), "vocab_size", None)
    embeddings = original_layer(backbone.get_input_embeddings())
    return isinstance(size, int) and isinstance(embeddings, nn.Embedding) and embeddings.num_embeddings != size


def source_of(backbone: Any) -> str:
    """The folder or Hub repo ID that the base model was loaded from, or an empty string."""
    model = backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone
    return getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "")


def is_saved_class(found: Any) -> bool:
    """Whether an attribute of transformers or adapters is a model class that a folder may name."""
    return isinstance(found, type) and issubclass(found, PreTrainedModel) and found is not PreTrainedModel


def check_backbone(backbone: Any) -> None:
    """Raises `ConfigError` if it is not a model, `UnsupportedError` if `TaskHeads` cannot use it."""
    if not isinstance(backbone, nn.Module):
        named = isinstance(backbone, (str, Path))
        fix = f"AutoModel.from_pretrained({str(backbone)!r})" if named else "a model"
        raise ConfigError(f"backbone={backbone!r:.80} is not a model: pass TaskHeads({fix}).")
    adapter_host(backbone)
    config = getattr(backbone, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError("the backbone has an encoder and a decoder: pass a model that has only one of them.")
