"""Loading weights into the places where a network of PEFT trains them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pal_adapters.errors import StorageError
from pal_adapters.hosts.in_place import overwrite

from .in_place import IN_PLACE, tensors_in_place
from .joint import check_others
from .layer import remove_adapter_name
from .loading import BASE_PREFIX, check_values


def named_as_on_model(
    model: nn.Module, adapter_name: str, prefix: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A file's tensors, those of weights in place by the names of `tensors_in_place`.

    Args:
        model: the base model, or the `PeftModel` around it.
        adapter_name: the adapter.
        prefix: what the names of the method's tensors begin with.
        state_dict: the tensors by their names in the file.
    """
    names: dict[str, str] = {}
    for name in tensors_in_place(model, adapter_name):
        stored = remove_adapter_name(name, prefix, adapter_name)
        names.update({stored: name, f"{BASE_PREFIX}{stored}": name})
    return {names.get(key, key): tensor for key, tensor in state_dict.items()}


def put_in_place(model: nn.Module, adapter_name: str, given: Mapping[str, Tensor]) -> None:
    """Give the weights that an adapter trains in place their values from a file, whose other tensors were checked.

    Args:
        model: the base model, or the `PeftModel` around it.
        adapter_name: the adapter.
        given: the values, by the names of `tensors_in_place`.

    Raises:
        UnsupportedError: if other adapters on the model use different pretrained weights.
    """
    own = tensors_in_place(model, adapter_name)
    if not own:
        return
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    check_others(
        adapter_name,
        IN_PLACE,
        [name for name in configs if name != adapter_name],
        ((own[name], given[name]) for name in own),
        trains=not configs[adapter_name].inference_mode,
    )
    overwrite(own, given)


def load_left_out(model: nn.Module, adapter_name: str, config: Any, given: Mapping[str, Tensor]) -> None:
    """The same for transformers 5, which loads an adapter itself, from what it was not given.

    Args:
        model: the base model.
        adapter_name: the adapter, whose modules are on the model.
        config: its config.
        given: the tensors by their names in the file.

    Raises:
        StorageError: if they are not exactly those of the adapter, or one does not fit.
        UnsupportedError: if other adapters on the model use different pretrained weights.
    """
    own = tensors_in_place(model, adapter_name)
    if not own and not given:
        return
    given = named_as_on_model(model, adapter_name, f"{config.method.name}_", given)
    if wrong := sorted(own.keys() ^ given.keys()):
        what = "lacks" if wrong[0] in own else "has, beyond what the adapter trains on this model,"
        raise StorageError(f"the weights do not fit adapter {adapter_name!r}: the file {what} {wrong[0]}.")
    check_values(adapter_name, ((name, tensor, own[name]) for name, tensor in given.items()))
    put_in_place(model, adapter_name, given)
