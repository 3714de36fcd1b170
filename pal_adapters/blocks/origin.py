"""Which classes a module of transformers has, and the files that define them.

Blocks and attentions of transformers share no base class and have no field that says how they compute, so the tables
of this package list them by class and file. This is the only place that reads those names.
"""

from __future__ import annotations

import sys

from torch import nn

# The packages whose forward functions the tables describe.
_READ = frozenset({"transformers", "adapters"})


def files_of(module: nn.Module) -> list[str]:
    """The names of the files that define a module's classes, such as `modeling_bert`."""
    return [cls.__module__.rpartition(".")[2] for cls in type(module).__mro__]


def class_keys(module: nn.Module) -> list[str]:
    """The names of a module's classes, most derived first: `BertLayer`, `modeling_bert.BertLayer`, and so on."""
    classes = zip(type(module).__mro__, files_of(module), strict=True)
    return [name for cls, file in classes for name in (cls.__name__, f"{file}.{cls.__name__}")]


def foreign_forward(module: nn.Module) -> str | None:
    """The name of a module's `forward` if it is defined neither in transformers nor in adapters, which extends it.

    A subclass, another library or the code that a model repository brings along may compute anything.
    """
    forward = type(module).forward  # wrappers, such as those for activation checkpointing, keep its module
    return None if forward.__module__.partition(".")[0] in _READ else f"{forward.__module__}.{forward.__qualname__}"


def uses(module: nn.Module, name: str) -> bool:
    """Whether a file that defines a class of the module has a global called `name`."""
    return any(name in vars(sys.modules[c.__module__]) for c in type(module).__mro__ if c.__module__ in sys.modules)
