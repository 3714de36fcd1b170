"""The setup under which a block runs, also when activation checkpointing runs it again.

The host restores the `ForwardContext` of the call then, but not its `with AdapterSetup(...)`.
"""

from __future__ import annotations

from typing import Any

from adapters.composition import AdapterCompositionBlock
from adapters.context import AdapterSetup, ForwardContext

from pal_adapters.errors import UnsupportedError
from pal_adapters.hooks.call import runs_again

_SETUPS = "pal_adapters_setups"


class Setups:
    """The setups under which blocks ran in one forward context, and whether it began in a backward pass."""

    def __init__(self) -> None:
        self.began_again = runs_again()
        self.known: list[AdapterCompositionBlock | None] = []

    def note(self, setup: AdapterCompositionBlock | None) -> None:
        if not any(setup is known for known in self.known):
            self.known.append(setup)

    def only(self) -> AdapterCompositionBlock | None:
        if len(self.known) > 1:
            raise UnsupportedError(
                "a block runs again in the backward pass of a forward context that ran under "
                f"{' and '.join(map(str, self.known))}: with activation checkpointing, use one AdapterSetup per call "
                "of the model."
            )
        return self.known[0]


def setup_is_given() -> bool:
    """Whether the running call is inside an `AdapterSetup`."""
    return AdapterSetup.get_context() is not None


def check_call_known(block: str) -> None:
    """Raise `UnsupportedError` if a block runs again without its call, whose `AdapterSetup` is then not known.

    Args:
        block: name of the block.
    """
    if ForwardContext.get_context() is None and runs_again():
        raise UnsupportedError(
            f"{block} runs again in the backward pass outside of a call of the model, so the AdapterSetup of that "
            "call is not known: turn activation checkpointing on with model.gradient_checkpointing_enable(), or "
            "checkpoint the call of the whole model."
        )


def setup_in_force(active: AdapterCompositionBlock | None) -> AdapterCompositionBlock | None:
    """The setup of the running call.

    Args:
        active: the model's own, without `AdapterSetup`.
    """
    given, context = AdapterSetup.get_context(), ForwardContext.get_context()
    setup: Any = active if given is None else given.adapter_setup
    if context is None:
        return setup
    setups = context.__dict__.get(_SETUPS)
    if setups is None:
        setups = context.__dict__[_SETUPS] = Setups()
    # A whole call may run again, too, with an `AdapterSetup` of its own.
    if setups.known and runs_again() and (given is None or not setups.began_again):
        return setups.only()
    setups.note(setup)
    return setup
