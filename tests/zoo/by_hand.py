"""What a method does, by hooks on a plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tests.methods import RECORDS
from tests.record import Reference, Values

from .host import Host, Stack, resolve


class BlockByHand:
    """Hooks that do by hand, in one block of a plain model, what a method does."""

    def __init__(self, host: Host, stack: Stack, index: int, block: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.host, self.stack, self.index, self.block, self.inputs = host, stack, index, block, inputs
        self.x: Tensor | None = None
        self.h: Tensor | None = None

    def at(self, path: str) -> nn.Module:
        return resolve(self.block, path)

    def keep(self, x: Tensor) -> Tensor:
        return self.host.keep(self.stack, self.index, self.inputs, x.shape[1])

    def read(self, raw: bool) -> Tensor:
        assert self.x is not None
        spec = self.stack.spec
        return self.x if raw or not spec.pre or not spec.norm else self.at(spec.norm)(self.x)

    def catch(self, path: str, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            setattr(self, name, args[0] if args else next(iter(kwargs.values())))

        return self.at(path).register_forward_pre_hook(hook, with_kwargs=True)

    def add(self, term: Callable[[], Any]) -> Any:
        """Adds to the residual sum: in front of the last norm, or to the block's output."""
        if not self.stack.spec.pre:
            return self.at(self.stack.spec.norm).register_forward_pre_hook(lambda m, args: (args[0] + term(),))
        return self.block.register_forward_hook(
            lambda m, a, out: (out[0] + term(), *out[1:]) if isinstance(out, tuple) else out + term()
        )

    def change(self, path: str, function: Callable[[Tensor], Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> Any:
            return type(out)([function(out[0]), *out[1:]]) if isinstance(out, (tuple, list)) else function(out)

        return self.at(path).register_forward_hook(hook)

    def hooks(self, reference: Reference, w: dict[str, Tensor]) -> list[Any]:
        spec = self.stack.spec
        handles = [self.catch("", "x"), self.catch(spec.ffn, "h")]
        if reference.changes("attention"):
            handles.append(self.change(spec.o1, lambda o1: reference.attention(w, o1)))
        if reference.changes("ffn"):
            handles.append(self.change(spec.o2, lambda o2: reference.ffn(w, o2, self.values())))
        if reference.changes("term"):
            handles.append(self.add(lambda: reference.term(w, self.values())))
        if reference.changes("output"):
            place = "" if spec.pre else spec.norm
            handles.append(self.change(place, lambda y: reference.output(w, y, self.values())))
        return handles

    def values(self) -> Values:
        x, raw = self.read(False), self.read(True)
        return Values(x, raw, self.shaped_h(), self.keep(raw), not self.stack.spec.pre)

    def shaped_h(self) -> Tensor:
        assert self.h is not None
        assert self.x is not None
        return self.h.view(self.x.shape)


def weights_of(block: nn.Module, method: str, adapter: str = "default") -> dict[str, Tensor]:
    """Copies of the tensors of one adapter in one block."""
    return {k: v.detach().clone() for k, v in getattr(block, method).units[adapter].weights().items()}


def blocks_of(model: nn.Module, stack: Stack) -> list[nn.Module]:
    return list(resolve(model, stack.path))  # type: ignore[call-overload]


@contextmanager
def by_hand(
    host: Host, plain: nn.Module, adapted: nn.Module, method: str, inputs: dict[str, Tensor], **options: Any
) -> Iterator[None]:
    """Within it, `plain` computes what `adapted` should, with hooks that this file adds.

    Args:
        options: of the method, where they are not those of its record.
    """
    reference = RECORDS[method].make_reference(**options)
    handles: list[Any] = []
    try:
        for stack in host.stacks:
            pairs = zip(blocks_of(plain, stack), blocks_of(adapted, stack), strict=True)
            for index, (block, source) in enumerate(pairs):
                hooks = BlockByHand(host, stack, index, block, inputs).hooks(reference, weights_of(source, method))
                handles += hooks
        yield
    finally:
        for handle in handles:
            handle.remove()
