"""A network's side stream over the outputs of all blocks.

It spans all blocks, so it runs outside of what activation checkpointing repeats, and reads the blocks' inputs, which
the model passes on anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pal_adapters.blocks import signatures
from pal_adapters.blocks.norms import required_final_norm
from pal_adapters.blocks.sites import Block
from pal_adapters.errors import SiteError

from .call import CallValue
from .network_unit import NetworkRunner, NetworkUnit


class SideStream:
    """The hooks that record the blocks' outputs and replace the model's final hidden states by the end of the stream.

    Args:
        model: the model that holds the blocks.
        block: the last of them.
        runner: knows the tasks of a batch.
        network: says which network is active.

    Raises:
        SiteError: if the model has no place for the end of the stream.
    """

    def __init__(
        self, model: nn.Module, block: Block, runner: NetworkRunner, network: Callable[[], NetworkUnit | None]
    ) -> None:
        self._runner, self._network = runner, network
        self._pre = block.sites.norm == "pre"
        self._rms = False
        self._recorded = CallValue()
        self._handles: list[Any] = []
        stack_name = block.name.rpartition(".")[0]
        parent = model.get_submodule(stack_name.rpartition(".")[0])
        if self._pre:
            norm, form = required_final_norm(model, block, "bottleneck='stream'")
            self._rms = not form.centred
            self._handles.append(norm.register_forward_hook(self._behind_norm, prepend=True))
        elif getattr(parent, "pooler", None) is not None:
            raise SiteError(
                f"bottleneck='stream' needs a module that runs the blocks and nothing else; {type(parent).__name__} "
                "also pools. Use bottleneck='top' or 'none'."
            )
        else:
            self._handles.append(parent.register_forward_hook(self._behind_stack, prepend=True))
        for number, module in enumerate(model.get_submodule(stack_name).children()):
            hook = self._record if number else self._start
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        unit = self._network()
        self._recorded.value = [] if unit is not None and unit.acts_in_stream else None

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outputs = self._recorded.value
        if outputs is not None:
            outputs.append(signatures.hidden_states({}, args, kwargs))

    def _end(self, last: Tensor) -> Tensor | None:
        unit, outputs = self._network(), self._recorded.value
        self._recorded.value = None
        if unit is None or outputs is None:
            return None
        outputs = [*outputs, last]
        if self._pre:  # a residual stream is not normalised
            outputs = [_plain_norm(output, rms=self._rms) for output in outputs]
        return unit.stream(outputs, self._runner.batch_tasks(last.shape[0], last.device))

    def _behind_norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._end(args[0])

    def _behind_stack(self, module: nn.Module, args: Any, output: Any) -> Any:
        value = self._end(signatures.first_of(output) if isinstance(output, (tuple, list)) else output[0])
        if value is None:
            return None
        if isinstance(output, (tuple, list)):
            return signatures.with_first(output, value)
        states = output.get("hidden_states")
        if states:
            output["hidden_states"] = (*states[:-1], value)
        output["last_hidden_state"] = value
        return output


def _plain_norm(x: Tensor, *, rms: bool) -> Tensor:
    return (F.rms_norm if rms else F.layer_norm)(x, x.shape[-1:], eps=1e-6)
