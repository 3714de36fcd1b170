"""Pretrained weights that an adapter trains as its own copies.

The model's own weights stay unchanged. While the adapter is active, its copies replace them for the duration of each
module's call, so that other adapters see their own copies, or the pretrained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from pal_adapters.blocks.sites import Block
from pal_adapters.blocks.walk import named_modules, parameters
from pal_adapters.nn.tracing import tracing
from pal_adapters.nn.unit import key_of

Slots = dict[str, list[tuple[nn.Module, str]]]

# Parameters that select experts or keys: the gradient of a loss does not reach them.
_CHOOSES = frozenset({"e_score_correction_bias", "expert_bias", "indexer"})


def _slots(root: nn.Module, added: set[int]) -> Slots:
    """The locations of the parameters below `root`, by name; tied ones share a name."""
    slots: Slots = {}
    names: dict[int, str] = {}
    for path, module in named_modules(root, units=False).items():
        for name, parameter in module._parameters.items():
            full = f"{path}.{name}" if path else name
            if parameter is None or id(parameter) in added or not _CHOOSES.isdisjoint(full.split(".")):
                continue
            slots.setdefault(names.setdefault(id(parameter), full), []).append((module, name))
    return slots


def block_slots(block: Block, added: set[int]) -> Slots:
    """The pretrained parameters of one block."""
    return _slots(block.module, added)


def embedding_names(model: nn.Module) -> list[str]:
    """Names of the modules with weights between the input and the first block."""
    tables = [name for name, module in named_modules(model, units=False).items() if isinstance(module, nn.Embedding)]
    named = [name for name, _ in model.named_children() if name.startswith(("embed", "word_embed"))]
    return [*named, *tables]


def outer_slots(
    model: nn.Module, blocks: Iterable[Block], added: set[int], *, left_out: Iterable[str], embeddings: bool
) -> Slots:
    """The pretrained parameters outside the blocks (pooler, final norm), or those of the embeddings.

    Args:
        model: the model without its head.
        blocks: all blocks.
        added: what adapters added.
        left_out: names of modules that are trained separately.
        embeddings: whether to return those of the embeddings.
    """
    inside = {id(p) for block in blocks for p in parameters(block.module, units=False)}
    first = tuple(name + "." for name in embedding_names(model))
    slots: Slots = {}
    for name, places in _slots(model, added | inside).items():
        if any(f".{part}." in f".{name}." for part in left_out):
            continue
        if name.startswith(first) is embeddings:
            slots[name] = places
    return slots


def readers(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The modules whose weights another module's `forward` reads, and that one.

    DeBERTa's encoder reads its `rel_embeddings`, and the attention of torch its `out_proj`.
    """
    found: dict[nn.Module, nn.Module] = {}
    for module in named_modules(model, units=False).values():
        read = module.out_proj if isinstance(module, nn.MultiheadAttention) else module._modules.get("rel_embeddings")
        if read is not None:
            found[read] = module
    return found


class BaseCopies:
    """One adapter's copies in one place.

    Args:
        slots: the locations of the originals.
        copies: the trained values, with the same names.
    """

    def __init__(self, slots: Slots, copies: nn.ParameterDict) -> None:
        self.slots = slots
        self.copies = copies

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function while modules read the copies instead of the originals.

        An attribute hides the parameter of its name without replacing it, so `state_dict` and `parameters`, which
        other threads may call meanwhile, still give the originals. Tracing only follows parameters.
        """
        traced = tracing()
        kept: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for key, places in self.slots.items():
                copy = self.copies[key_of(key)]
                for module, name in places:
                    original: Any = module._parameters[name]
                    read: dict[str, Any] = module._parameters if traced else module.__dict__
                    kept.append((read, name, read.get(name)))
                    read[name] = copy if copy.dtype == original.dtype else copy.to(original.dtype)
            return function()
        finally:
            for read, name, before in reversed(kept):
                if before is None:
                    read.pop(name, None)  # an interrupt may come before the copy is there
                else:
                    read[name] = before


def uncover(places: Iterable[tuple[nn.Module, str]]) -> None:
    """Remove the attributes that hide parameters in a model that was copied during a call."""
    for module, name in places:
        module.__dict__.pop(name, None)


def fill(into: nn.ParameterDict, slots: Slots) -> None:
    """Start the copies from the pretrained values."""
    for key, places in slots.items():
        module, name = places[0]
        original = module._parameters[name]
        assert original is not None
        into[key_of(key)] = nn.Parameter(original.detach().clone())


def match_dtypes(copies: nn.ParameterDict, slots: Slots) -> None:
    """Bring copies back to the precision of the pretrained weights, so that no call has to convert them."""
    for key, places in slots.items():
        module, name = places[0]
        original, copy = module._parameters[name], copies[key_of(key)]
        assert original is not None
        copy.data = copy.data.to(original.dtype)


class WrappedForward:
    """Wraps a module's `forward`, or another of its methods.

    Args:
        module: the module.
        around: called with the module's own method and the arguments.
        name: the name of the method.
    """

    def __init__(self, module: nn.Module, around: Callable[..., Any], name: str = "forward") -> None:
        self._module = (module,)
        self._name = name
        self._around: Callable[..., Any] | None = around
        self._inner = module.__dict__.get(name)
        setattr(module, name, self.run)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own method."""
        if self._inner is not None:
            return self._inner(*args, **kwargs)
        module = self._module[0]
        return getattr(type(module), self._name)(module, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The replacement of the method."""
        if self._around is None:
            return self.original(*args, **kwargs)
        return self._around(self.original, *args, **kwargs)

    def remove(self) -> None:
        """Restore the module's own method, or step aside if something else has wrapped it since."""
        module = self._module[0]
        self._around = None
        if getattr(module.__dict__.get(self._name), "__self__", None) is self:
            delattr(module, self._name)
            if self._inner is not None:
                setattr(module, self._name, self._inner)
