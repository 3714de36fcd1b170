"""Pretrained weights that a network trains in place, instead of copies of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.unit import key_of

from .stored import Stored
from .weight_copies import Slots

PARTS = ("base", "outer")
"""The parts of a unit: copies in its block, and outside all blocks. Weights in place have the names of copies."""


class InPlace:
    """The weights that one unit of a network trains in place.

    They stay parameters of their modules and of nothing else, so that they are counted, moved, converted and
    optimised once. The unit finds them at their places whenever it needs them. Their pretrained values are in a
    temporary file.

    Args:
        inner: the places of those in the unit's block.
        outer: the places of those outside all blocks.
        lost: why the values that they have now are not the pretrained ones, a clause; empty if they are.

    Raises:
        UnsupportedError: for weights that cannot be trained: quantised, or not loaded.
        StorageError: if the pretrained values cannot be written to a file.
    """

    def __init__(self, inner: Slots, outer: Slots, lost: str = "") -> None:
        self.slots: Mapping[str, Slots] = dict(zip(PARTS, (inner, outer), strict=True))
        tensors = self.tensors()
        if not lost:
            self.require_values()
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise UnsupportedError(
                    f"{name} is packed in {tensor.dtype}, so it cannot be trained in place: load the model in "
                    "floating point."
                )
        self.originals = Stored.lost(lost) if lost else Stored(tensors)

    def places(self) -> Iterator[tuple[str, list[tuple[nn.Module, str]]]]:
        """The weights by the names that copies of them have in the unit's state dict, with their places."""
        for part, slots in self.slots.items():
            for name, places in slots.items():
                yield f"{part}.{key_of(name)}", places

    def tensors(self) -> dict[str, nn.Parameter]:
        """The weights by the same names.

        Raises:
            UnsupportedError: if a module has lost its parameter.
        """
        found: dict[str, nn.Parameter] = {}
        for key, places in self.places():
            module, name = places[0]
            parameter = module._parameters.get(name)
            if parameter is None:
                raise UnsupportedError(
                    f"{key} is no longer the parameter {name!r} of a {type(module).__name__}, so the adapter that "
                    "trains it in place cannot go on: undo what has replaced it."
                )
            found[key] = parameter
        return found

    def train(self, mode: bool) -> None:
        """Make the weights trainable, or freeze them."""
        for tensor in self.tensors().values():
            tensor.requires_grad_(mode)

    def require_present(self, block: nn.Module, model: nn.Module) -> None:
        """Check that each weight is in its place in the model, and the same at all its places.

        Args:
            block: the unit's block.
            model: the model that holds it.

        Raises:
            UnsupportedError: if one is not, or has no values here because it is offloaded.
        """
        for part, root in zip(PARTS, (block, getattr(model, "base_model", model)), strict=True):
            for name, places in self.slots[part].items():
                first, key = places[0]
                same = all(module._parameters.get(other) is first._parameters.get(key) for module, other in places)
                if not same or not _holds(root, name.rpartition(".")[0], first):
                    raise UnsupportedError(
                        f"{name}, which an adapter trains in place, has been replaced since the adapter was added "
                        "(by new embeddings, for example): change the model before you add the adapter."
                    )
        self.require_values()

    def require_values(self) -> None:
        """Raise `UnsupportedError` if a weight is on the meta device, where nothing can be read or written."""
        for name, tensor in self.tensors().items():
            if tensor.is_meta:
                raise UnsupportedError(
                    f"{name}, which is to train in place, has no values here: load the model's weights before you add "
                    "the adapter, without 'cpu' and 'disk' in a device_map."
                )


def _holds(root: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module is at a path, or inside of a wrapper there."""
    try:
        found = root.get_submodule(path)
    except AttributeError:  # its parent has a wrapper
        found = root
    return found is module or module in found.modules()


def parts_in_place(model: nn.Module) -> list[InPlace]:
    """What the networks of a model train in place, by unit."""
    found = [module.__dict__.get("in_place") for module in named_modules(model).values()]
    return [part for part in found if isinstance(part, InPlace)]


def in_place_ids(model: nn.Module) -> set[int]:
    """IDs of the weights of a model that are trained in place."""
    return {id(tensor) for part in parts_in_place(model) for tensor in part.tensors().values()}


def require_untied(model: nn.Module, parts: Iterable[InPlace]) -> None:
    """Check that weights in place are used where the network acts, and nowhere else.

    Args:
        model: the model with its head.
        parts: the parts of one network.

    Raises:
        UnsupportedError: if a weight is tied to one that a copy would leave alone.
    """
    owned: dict[int, tuple[str, list[Any]]] = {}
    for part in parts:
        tensors: Mapping[str, Tensor] = part.tensors()
        for key, places in part.places():
            if id(tensors[key]) in owned:
                _refuse(key, owned[id(tensors[key])][0])
            owned[id(tensors[key])] = (key, places)
    for path, module in named_modules(model, units=False).items():
        for name, parameter in module._parameters.items():
            key, places = owned.get(id(parameter), ("", []))
            if key and not any(module is there and name == own for there, own in places):
                _refuse(key, f"{path}.{name}".removeprefix("."))


def _refuse(key: str, other: str) -> None:
    raise UnsupportedError(
        f"{key} cannot be trained in place: it is tied to {other}, which the network does not train. Keep it frozen "
        "(embeddings: freeze_embeddings=True), untie the two, or train copies."
    )
