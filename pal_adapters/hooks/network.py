"""Hooks through which one network acts on a whole model.

A task module adds a term to a block (`attachment.py`). A network also changes the input of the first block, the
attention scores, the norms and the output of the stack, and brings its own copies of pretrained weights. Each block
has its own `NetworkHooks`. Everything that acts in a block happens inside a wrapper around the block's `forward`, so
that activation checkpointing repeats it, and reads only parameters and the tasks of the batch: a tensor computed
before the block would not receive its gradient from a reentrant checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.norms import NormForm, full_norms, norm_form, required_final_norm
from pal_adapters.blocks.sites import Block, resolve
from pal_adapters.errors import SiteError, UnsupportedError
from pal_adapters.nn.tracing import tracing
from pal_adapters.nn.unit import BatchTasks

from .attention_bias import add_to_scores, mask_argument, past_length, position_scores, refusal, with_bias
from .call import CallLock, CallValue, run_around
from .masks import CallMask
from .network_unit import NetworkRunner, NetworkUnit
from .positions import CountedPositions, token_positions
from .presence import Presence
from .side_stream import SideStream
from .weight_copies import BaseCopies, Slots, WrappedForward, readers, uncover


@dataclass
class Steer:
    """What acts in one call of a block.

    Attributes:
        unit: the network's part in the block.
        batch: the task of each example.
        h: the feed-forward input, where a bottleneck at the top reads it.
        bias: the term in the attention scores, if it is not added through the mask.
    """

    unit: NetworkUnit
    batch: BatchTasks
    h: Tensor | None = None
    bias: Tensor | None = None


class NetworkHooks:
    """The hooks of one runner on one block.

    Args:
        model: the model that holds the block.
        block: the block.
        runner: says which network is active.
    """

    def __init__(self, model: nn.Module, block: Block, runner: NetworkRunner) -> None:
        self.block = block
        self.runner = runner
        self._model = (model,)
        self._presence = Presence(model, block)
        self._handles: list[Any] = []
        self._wrapped: list[WrappedForward] = []
        self._installed: set[str] = set()
        self._closing_eps = 0.0
        self._outer: dict[nn.Module, Slots] = {}
        self._stream: SideStream | None = None
        self._running = CallValue()
        # While a module runs, copies replace its pretrained weights for all threads. Threads therefore take turns
        # there, including those that run without the copies.
        self._locks: dict[nn.Module, CallLock] = {}
        self._covered: set[nn.Module] | None = set()
        self._block_arguments = signatures.positions_of(block.module)

    # Installing

    def require(self, unit: NetworkUnit) -> None:
        """Install the hooks that a unit requires; existing ones stay.

        Raises:
            SiteError: if the model has no such place.
        """
        once = self._once
        if unit.has_attention:
            once("attention", self._install_attention)
        for path in unit.norm_paths:
            once(f"norm {path}", functools.partial(self._install_norm, path))
        if unit.acts_at_top:
            once("top", self._install_top)
        if unit.has_final_norm:
            once("final norm", self._install_final_norm)
        if unit.acts_in_stream:
            once("stream", self._install_stream)
        reader = readers(self._model[0]) if unit.slots[1] else {}
        for name, places in unit.slots[1].items():
            for place in places:
                module = reader.get(place[0], place[0])
                if module not in self._outer:
                    self._locks[module] = CallLock()
                    self._wrapped.append(WrappedForward(module, functools.partial(self._run_outer, module)))
                    self._outer[module] = {}
                known = self._outer[module].setdefault(name, [])
                if place not in known:
                    known.append(place)
        if unit.slots[0]:
            self._locks.setdefault(self.block.module, CallLock())
        once("forward", self._install_forward)

    def _once(self, name: str, install: Any) -> None:
        if name not in self._installed:
            install()
            self._installed.add(name)

    def remove(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()
        while self._wrapped:
            self._wrapped.pop().remove()
        if self._stream is not None:
            self._stream.remove()
            self._stream = None
        self._installed.clear()
        self._outer.clear()
        self._locks.clear()

    def _module(self, path: str) -> nn.Module:
        module = resolve(self.block.module, path)
        if module is None:
            raise SiteError(f"{self.block.name} has no module {path!r}.")
        return module

    def _implementation(self) -> str | None:
        return getattr(getattr(self._model[0], "config", None), "_attn_implementation", None)

    def _install_attention(self) -> None:
        attention = self._module(self.block.sites.attention)
        positions = signatures.positions_of(attention)
        reason = refusal(attention, self.block.sites, positions, self._implementation())
        if reason is not None:
            raise SiteError(
                f"the conditional attention cannot be added to {self.block.name}: {reason}; or pass "
                "attention_layers=[] to do without."
            )
        scores = position_scores(attention)
        if scores is not None:
            self._wrapped.append(WrappedForward(scores[0], self._run_scores, scores[1]))
        self._attention_arguments = positions
        self._mask = mask_argument(attention, positions)
        self._adds_to_scores = scores is not None
        self._causal = signatures.is_causal(attention)
        self._window = signatures.window_of(attention, self.block)
        self._layer = signatures.layer_index(attention, self.block)
        self._handles.append(attention.register_forward_pre_hook(self._on_attention, with_kwargs=True))
        self._counted = CountedPositions(self._model[0], self.block) if self._window is not None else None
        if self._counted is not None:
            self._handles.append(self._counted)

    def _install_norm(self, path: str) -> None:
        norm = self._module(path)
        hook = functools.partial(self._behind_norm, path, self._form(norm))
        self._handles.append(norm.register_forward_hook(hook, prepend=True))

    def _form(self, norm: nn.Module) -> NormForm:
        form = norm_form(norm, self.block.width)
        if form is None:
            raise SiteError(
                f"{type(norm).__name__} of {self.block.name} cannot become conditional: pass norm_layers=[]."
            )
        return form

    def _install_top(self) -> None:
        sites = self.block.sites
        norms = full_norms(self.block, "bottleneck='none'")
        if sites.norm == "post":
            self._closing_eps = self._form(list(norms.values())[-1]).eps
        at = sites.ffn if sites.norm == "post" or sites.ffn_norm == "" else sites.ffn_norm
        if at is None:
            # Parallel branches both read the block's input.
            behind = [path for path in norms if path != sites.input_norm] or list(norms)
            if len(behind) != 1:
                raise SiteError(
                    f"{self.block.name} has {len(behind)} norms behind its attention: bottleneck='top' needs one, in "
                    "front of the feed-forward part. Use bottleneck='stream' or 'none'."
                )
            at = behind[0]
        self._handles.append(self._module(at).register_forward_pre_hook(self._on_h, with_kwargs=True))

    def _install_final_norm(self) -> None:
        norm, form = required_final_norm(self._model[0], self.block, "bottleneck='top'")
        hook = functools.partial(self._behind_final_norm, norm, form)
        self._handles.append(norm.register_forward_hook(hook, prepend=True))

    def _install_stream(self) -> None:
        self._stream = SideStream(self._model[0], self.block, self.runner, self._outside)

    def _install_forward(self) -> None:
        self._wrapped.append(WrappedForward(self.block.module, self._run_block))

    # Acting

    @property
    def _steer(self) -> Steer | None:
        return self._running.value

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._covered = None  # a copied or unpickled model, whose original may have been in a call

    def _with_copies(self, module: nn.Module, slots: Slots, copies: Any, forward: Callable[..., Any]) -> Any:
        """Call a function while copies replace pretrained weights of a module, one thread at a time.

        Args:
            module: the module.
            slots: the locations of the originals; empty for a call without the network.
            copies: the copies.
            forward: the function.
        """
        lock = self._locks.get(module)
        if lock is None:
            return forward()
        if tracing():  # a graph reads the parameters directly and swaps nothing
            return BaseCopies(slots, copies).run(forward)
        nested = lock.mine()
        with lock.lock:
            if self._covered is None:
                self._covered = {self.block.module, *self._outer}
            if module in self._covered and not nested:  # what an interrupted call has left
                self._uncover(module)
            if not slots:
                return forward()
            self._covered.add(module)
            output = BaseCopies(slots, copies).run(forward)
            if not nested:
                self._covered.discard(module)
            return output

    def _uncover(self, module: nn.Module) -> None:
        assert self._covered is not None
        if module is self.block.module:
            uncover((part, name) for part in module.modules() for name in part._parameters)
        else:
            uncover(place for places in self._outer[module].values() for place in places)
        self._covered.discard(module)

    def _outside(self) -> NetworkUnit | None:
        """The active network for what acts outside the blocks, as long as the block is part of the model."""
        unit = self.runner.network()
        if unit is None or self._presence.holds():
            return unit
        self._presence.warn()
        self.remove()
        return None

    def _run_outer(self, module: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
        unit = self._outside()
        call = functools.partial(forward, *args, **kwargs)
        if unit is None:
            return self._with_copies(module, {}, None, call)
        slots = {name: places for name, places in self._outer[module].items() if name in unit.slots[1]}
        return self._with_copies(module, slots, unit.outer, call)

    def _run_block(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return run_around(self.block.module, self._inside, forward, *args, **kwargs)

    def _inside(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        unit = self.runner.network()
        if unit is None:
            call = functools.partial(forward, *args, **kwargs)
            return self._running.run(None, self._with_copies, self.block.module, {}, None, call)
        x = signatures.hidden_states(self._block_arguments, args, kwargs)
        if x.dim() != 3:
            raise UnsupportedError(
                f"{self.block.name} got hidden states of shape {list(x.shape)}: [batch, tokens, width] is needed. "
                "Load the model with attn_implementation='sdpa' or 'eager' (flash attention removes padding)."
            )
        if unit.in_place is not None and torch.is_grad_enabled() and not tracing():
            unit.in_place.require_present(self.block.module, self._model[0])
        batch = self.runner.batch_tasks(x.shape[0], x.device)
        if self.block.index == 0:
            aligned = unit.align(x, batch)
            args = tuple(aligned if value is x else value for value in args)
            kwargs = {name: aligned if value is x else value for name, value in kwargs.items()}
        steer = Steer(unit, batch)
        call = functools.partial(forward, *args, **kwargs)
        output = self._running.run(steer, self._with_copies, self.block.module, unit.slots[0], unit.base, call)
        if unit.acts_at_top:
            output = signatures.with_first(output, self._top(steer, signatures.first_of(output)))
        return output

    def _top(self, steer: Steer, y: Tensor) -> Tensor:
        unit, batch, h = steer.unit, steer.batch, steer.h
        if h is not None and h.dim() == 2 and h.numel() == y.numel():  # OPT, see `_behind_norm`
            h = h.view(y.shape)
        if h is None or h.shape != y.shape:
            raise UnsupportedError(
                f"{self.block.name} runs its feed-forward part on parts of the sequence: set "
                "config.chunk_size_feed_forward=0."
            )
        return unit.top(y, h, self._closing_eps, batch)

    def _on_h(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        steer = self._steer
        if steer is not None:
            steer.h = args[0] if args else next(iter(kwargs.values()))

    def _run_scores(self, forward: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        scores = forward(query, key, *args, **kwargs)
        steer = self._steer
        bias = None if steer is None else steer.bias
        return scores if bias is None else add_to_scores(scores, bias, query)

    def _on_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        steer = self._steer
        if steer is None or not steer.unit.has_attention:
            return None
        unit, batch = steer.unit, steer.batch
        reason = refusal(module, self.block.sites, self._attention_arguments, self._implementation())
        if reason is None and self._mask == "mask" and kwargs.get("output_attentions"):
            reason = "output_attentions=True makes it use its eager attention, which takes a mask of zeros and ones"
        if reason is not None:
            raise UnsupportedError(f"the conditional attention of {self.block.name} cannot act: {reason}.")
        x = signatures.hidden_states(self._attention_arguments, args, kwargs)
        cache = signatures.cache_of(args, kwargs)
        total = past_length(cache, self._layer) + x.shape[1]
        assert self._mask is not None
        mask = signatures.argument((self._mask,), self._attention_arguments, args, kwargs)
        if cache is None:
            signatures.check_whole(self.block.name, mask, x.shape[1], kwargs, causal=self._causal)
        if self._mask == "head_mask" and mask is not None:
            raise UnsupportedError("head_mask cannot be used together with the conditional attention of this model.")
        causal = self._causal if kwargs.get("is_causal") is None else bool(kwargs["is_causal"])
        window = self._window if causal else None
        ids = None if self._counted is None else self._counted.of_call(kwargs.get("position_ids"), x.shape[1], total)
        queries, keys = token_positions(
            CallMask(mask, None, causal, x.device, window=window),
            queries=x.shape[1], total=total, ids=ids, what=self.block.name,
        )  # fmt: skip
        bias = unit.attention_bias(batch, queries, keys, total)
        if self._adds_to_scores:
            steer.bias = bias
            return None
        mask = with_bias(mask, bias, causal=causal, window=window, dtype=x.dtype)
        position = self._attention_arguments[self._mask]
        if self._mask not in kwargs and position < len(args):
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        return args, {**kwargs, self._mask: mask}

    def _behind_norm(self, path: str, form: NormForm, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        steer = self._steer
        if steer is None or path not in steer.unit.norm_paths:
            return None
        unit, batch = steer.unit, steer.batch
        # OPT normalises the tokens of all examples in one dimension.
        x, y = (v.view(batch.member.shape[0], -1, v.shape[-1]) if v.dim() == 2 else v for v in (args[0], output))
        scale = form.scale(module, x)
        return unit.norm(path, y, form.standardise(x), scale, getattr(module, "bias", None), batch).view(output.shape)

    def _behind_final_norm(
        self, norm: nn.Module, form: NormForm, module: Any, args: tuple[Any, ...], output: Any
    ) -> Any:
        # `module` is `norm`, or its stand-in while tracing.
        unit = self._outside()
        if unit is None or not unit.has_final_norm:
            return None
        x = args[0]
        batch = self.runner.batch_tasks(x.shape[0], x.device)
        slots = {name: places for name, places in self._outer.get(norm, {}).items() if name in unit.slots[1]}

        def standardised() -> Any:
            scale = form.scale(norm, x)
            return unit.final_norm(output, form.standardise(x), scale, getattr(norm, "bias", None), batch)

        return self._with_copies(norm, slots, unit.outer, standardised)
