"""Changes of a backbone by a host, undone as a whole after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pal_adapters.hosts.unchanged import all_or_nothing
from pal_adapters.hosts.which import host_of


@contextmanager
def put_back(backbone: Any) -> Iterator[None]:
    """If the body raises, the backbone is put back as it was, and `adapters.init` on it is undone."""
    classes = [(module, type(module)) for module in backbone.modules()]
    beside = [getattr(backbone, "config", None), getattr(backbone, "generation_config", None)]
    beside += [backbone.adapters_config] if host_of(backbone) == "adapters" else []
    try:
        with all_or_nothing(backbone, *beside):
            yield
    except BaseException:
        for module, kind in classes:
            if type(module) is not kind:
                module.__class__ = kind
        raise


@contextmanager
def items_kept(*changed: dict[str, Any]) -> Iterator[None]:
    """If the body raises, the dicts get their former items back, in their former order."""
    before = [dict(one) for one in changed]
    try:
        yield
    except BaseException:
        for one, items in zip(changed, before, strict=True):
            one.clear()
            one.update(items)
        raise
