"""`adapter_names` in PEFT: what holds while a batch goes through the model with one adapter name a row."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.rows import RowPlan

from .layer import RowRouting, entry, tuner_layers

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values")


def check_names(names: Any, known: Sequence[str]) -> tuple[str, ...]:
    """`adapter_names` as a tuple.

    Raises:
        UnsupportedError: if it is not a list of names.
        UnknownAdapterError: for a name that the model does not have.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise UnsupportedError(f"adapter_names={names!r} is not allowed: pass a list with one adapter name a row.")
    unknown = sorted({repr(name) for name in names if name not in known and name != "__base__"})
    if unknown:
        raise UnknownAdapterError(
            f"adapter_names has {', '.join(unknown)}, which the model does not have: use "
            f"{', '.join(map(repr, sorted(known)))} or '__base__' for the model without an adapter."
        )
    return tuple(names)


def _batch_size(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    named = (kwargs.get(name) for name in (getattr(model, "main_input_name", ""), *_INPUTS))
    for value in (*named, *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


def generates(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether these arguments are for `generate`, which `PeftModel` without a task type calls past the tuner."""
    return bool(set(kwargs) - set(inspect.signature(type(model).forward).parameters))


def _select(value: Any, batch: int, index: Tensor) -> Any:
    return value.index_select(0, index) if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value


def _route(wrapper: ModulesToSaveWrapper, plan: RowPlan, *args: Any, **kwargs: Any) -> Any:
    """`ModulesToSaveWrapper.forward`, each row through its adapter's copy; the host's takes linear modules alone."""
    first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    batch = first.shape[0]
    names = plan.for_batch(batch).names
    groups: dict[nn.Module, list[int]] = {}
    for row, name in enumerate(names):
        groups.setdefault(entry(wrapper.modules_to_save, name, wrapper.original_module), []).append(row)
    if len(groups) == 1:
        return next(iter(groups))(*args, **kwargs)
    parts = []
    for module, members in groups.items():
        index = torch.tensor(members, device=first.device)
        part = module(
            *(_select(v, batch, index) for v in args), **{k: _select(v, batch, index) for k, v in kwargs.items()}
        )
        if not isinstance(part, Tensor):
            raise UnsupportedError(
                f"adapter_names is not possible with modules_to_save on {type(module).__name__}, which returns a "
                f"{type(part).__name__}: only modules that return one tensor can be mixed in a batch."
            )
        parts.append(part)
    order = torch.tensor([row for members in groups.values() for row in members], device=first.device)
    return torch.cat(parts).index_select(0, order.argsort())


class Routing:
    """A context in which every layer of ours and every module to save treats each row with its own adapter.

    Args:
        model: the base model.
        names: the user's `adapter_names`.
        known: adapters of the model.
        kwargs: the other arguments of the call.

    Attributes:
        repeated: whether generation may repeat each row (beams, several returned sequences).
    """

    def __init__(self, model: nn.Module, names: Any, known: Sequence[str], kwargs: dict[str, Any]) -> None:
        self.model = model
        self.repeated = generates(model, kwargs)
        checkpointed = model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        self.plan = RowPlan(check_names(names, known), keep=not checkpointed)
        self._layers = [layer for _, layer in tuner_layers(model) if isinstance(layer, RowRouting)]
        self._wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        self._stack = ExitStack()

    def __enter__(self) -> Routing:
        try:
            self._stack.enter_context(self._in_force())
            self._stack.callback(self.model.register_forward_pre_hook(self._check_batch, with_kwargs=True).remove)
            for module in self.model.modules():
                function = module.__dict__.get("_gradient_checkpointing_func")
                if function is not None and getattr(module, "gradient_checkpointing", False):
                    module._gradient_checkpointing_func = self._checkpoint(function)  # type: ignore[assignment]
                    self._stack.callback(setattr, module, "_gradient_checkpointing_func", function)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(setattr, layer, "plan", layer.plan)
                layer.plan = self.plan
            for wrapper in self._wrappers:
                stack.callback(_restore_forward, wrapper, wrapper.__dict__.get("forward"))
                wrapper.__dict__["forward"] = functools.partial(_route, wrapper, self.plan)
            yield

    def _checkpoint(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function whose second run, in the backward pass, has these rows again."""

        def checkpoint(block: Any, *args: Any, **kwargs: Any) -> Any:
            def again(*inner: Any, **inner_kwargs: Any) -> Any:
                with self._in_force():
                    return block(*inner, **inner_kwargs)

            return function(again, *args, **kwargs)

        return checkpoint

    def _check_batch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = _batch_size(self.model, args, kwargs)
        if not self.repeated and batch is not None and batch != len(self.plan.names):
            raise UnsupportedError(
                f"adapter_names has {len(self.plan.names)} names, but the batch has {batch} rows: pass one name a row."
            )


def _restore_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
