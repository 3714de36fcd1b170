"""Hooks that carry a block's values to a task module and back.

A task module reads from calls *inside* the block (self-attention is called with the block's input and the mask) and
writes to modules inside the block. Activation checkpointing therefore repeats both when it re-runs the block, and
the recorded `hidden_states` contain the result. If a block has no module at its end, its `forward` is wrapped
instead: hooks on the block itself would run too late for the hidden states that transformers 4.57 records, and
transformers 5 does not re-run them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.layouts import from_tokens, to_tokens
from pal_adapters.blocks.norms import final_norm
from pal_adapters.blocks.sites import Block, resolve
from pal_adapters.errors import SiteError, UnsupportedError
from pal_adapters.nn.unit import UnitInputs

from .call import CallValue, run_around
from .kv_cache import TaskCache, task_cache
from .masks import CallMask, kept, packed_mask
from .presence import Presence
from .recurrent import kept_tokens

# In the order in which a block reaches them.
_ORDER = ("attention", "ffn", "residual", "output", "stack_output")


class Runner(Protocol):
    """What a host's layer offers to `Attachment`."""

    def is_active(self, site: str) -> bool:
        """Whether a unit acts at `site` in this call."""

    def keeps_inputs(self) -> bool:
        """Whether the runner fetches the inputs itself, later in this block, with `Attachment.take_inputs`."""

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """The new value at `site`."""


@dataclass
class BlockCall:
    """The inputs of one call of a block, kept from its first hook to its last.

    Attributes:
        x: what self-attention reads, `[b, n, d]`.
        given: the same in the model's own layout.
        raw: the block's input, not normalised.
        h: the feed-forward input.
        mask: the attention mask; `extra_mask` is a second one.
        is_causal: the argument of that name, if the call has one.
        cache: the generation cache.
        position: the positions of the tokens, if the host passes them.
        packed: `cu_seqlens`, if the tokens of several sequences are packed into one `[n, d]` or `[1, n, d]`.
        kept: the mask of a block without attention, including the tokens of earlier calls with the cache.
    """

    x: Tensor | None = None
    given: Tensor | None = None
    raw: Tensor | None = None
    h: Tensor | None = None
    mask: Any = None
    extra_mask: Any = None
    is_causal: Any = None
    cache: Any = None
    position: Any = None
    packed: Tensor | None = None
    kept: Tensor | None = None


class _Behind:
    """The hook behind one module: writes its sites, in order."""

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment
        self.sites: list[str] = []

    def add(self, site: str) -> None:
        self.sites = sorted([*self.sites, site], key=_ORDER.index)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        for site in self.sites:
            output = self.attachment.write(site, output)
        return output


class _BehindStack(_Behind):
    """The hook behind the norm that follows the stack, which its block may leave."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return None if self.attachment.leaves() else super().__call__(module, args, output)


class Attachment:
    """The hooks of one runner on one block.

    Args:
        model: the model that holds the block.
        block: where to attach.
        runner: called at every site to compute the new value.
    """

    def __init__(self, model: nn.Module, block: Block, runner: Runner) -> None:
        self.block = block
        self.runner = runner
        self._model = (model,)
        self._presence = Presence(model, block)
        self._handles: list[Any] = []
        self._hooked: set[str] = set()
        self._behind: dict[str, _Behind] = {}
        self._inner_forward: Any = None
        self._sites: set[str] = set()
        self._needs: set[str] = set()
        self._keeps_x = False
        self._last: str | None = None
        self._held = CallValue()
        attention = self._module(block.sites.attention)
        self._attention_arguments = signatures.positions_of(attention)
        self._block_arguments = signatures.positions_of(block.module)
        self._recurrent = block.sites.mixing == "recurrent"
        self._causal = self._recurrent or signatures.is_causal(attention)
        self._triangle = signatures.keeps_triangle(attention)
        self._window = None if self._recurrent else signatures.window_of(attention, block)
        # transformers 4.57: ModernBERT's attention gets two masks and chooses.
        self._local = getattr(attention, "local_attention", (-1, -1)) != (-1, -1)
        self._index = signatures.layer_index(attention, block)
        # A pre-LN host normalises its output after the stack.
        norm = final_norm(model, block) if block.sites.norm == "pre" and block.last else None
        self._stack_norm = (norm,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copy for a copied block. A copy of a part of it, as for PEFT's `modules_to_save`, shares the hooks."""
        if id(self._model[0]) not in memo and id(self.block.module) not in memo:
            return self
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new

    @property
    def _call(self) -> BlockCall:
        held = self._held.value
        return BlockCall() if held is None else held

    @property
    def _outside(self) -> bool:
        """Whether the term is added after the block, where only the block's own arguments are available."""
        return self.block.sites.residual_path == ""

    def require(self, sites: Iterable[str], needs: Iterable[str]) -> None:
        """Install the hooks that these sites and needs require; existing ones stay."""
        self._needs |= set(needs)
        sites = {site for site in sites if site != "stack_output" or self.block.last}
        if "raw" in self._needs and self.block.sites.input_norm and not self._outside:
            self._before(self.block.sites.input_norm, self._on_input_norm)
        # `ffn` and `h` may have batch and tokens flattened into one dimension; the block's input tells them apart.
        if self._needs or "ffn" in sites:
            if self._outside:
                self._wrap_block()
            else:
                self._before(self.block.sites.attention, self._on_input)
        if "h" in self._needs:  # after `_on_input`: a block with one branch uses one module for both
            self._before(self.block.sites.ffn, self._on_ffn)
        for site in sorted(sites - self._sites, key=_ORDER.index):
            self._write_at(site)
        self._sites |= sites
        self._keeps_x = bool(self._needs & {"x", "raw", "h"}) or "ffn" in self._sites
        self._last = max(self._sites - {"stack_output"}, key=_ORDER.index, default=None)

    def remove(self) -> None:
        """Remove all hooks from the block."""
        while self._handles:
            self._handles.pop().remove()
        block = self.block.module
        if getattr(block.__dict__.get("forward"), "__self__", None) is self:
            del block.forward
            if self._inner_forward is not None:
                block.forward = self._inner_forward
        self._hooked.clear()
        for behind in self._behind.values():
            behind.sites = []  # copies of its module keep it
        self._behind.clear()
        self._sites.clear()
        self._needs.clear()
        self._held.value = None

    def leaves(self) -> bool:
        """Remove the hooks if an adapter acts behind the stack, but the block is no longer part of the model."""
        if not self.runner.is_active("stack_output") or self._presence.holds():
            return False
        self._presence.warn()
        self.remove()
        return True

    def _module(self, path: str) -> nn.Module:
        module = resolve(self.block.module, path)
        if module is None:
            raise SiteError(f"{self.block.name} has no module {path!r}.")
        return module

    def _before(self, path: str, hook: Any) -> None:
        if hook.__name__ not in self._hooked:
            self._hooked.add(hook.__name__)
            self._handles.append(self._module(path).register_forward_pre_hook(hook, with_kwargs=True))

    def _write_at(self, site: str) -> None:
        sites = self.block.sites
        if site == "residual" and sites.residual_at == "input":
            self._before(sites.residual_path, self._on_residual_input)
            return
        norm = self._stack_norm[0] if site == "stack_output" else None
        paths = {
            "attention": sites.attention_output,
            "ffn": sites.ffn_output,
            "residual": sites.residual_path,
            "output": sites.output,
            "stack_output": sites.output if norm is None else "behind the stack",
        }
        path = paths[site]
        behind = self._behind.get(path)
        if behind is None:
            behind = self._behind[path] = _Behind(self) if norm is None else _BehindStack(self)
            if path == "":
                self._wrap_block()
            else:
                module = self._module(path) if norm is None else norm
                # Before other hooks: transformers 5 records hidden states in its own hook.
                self._handles.append(module.register_forward_hook(behind, prepend=True))
        behind.add(site)

    def _wrap_block(self) -> None:
        block = self.block.module
        if "forward" not in self._hooked:
            self._hooked.add("forward")
            self._inner_forward = block.__dict__.get("forward")
            block.forward = self.forward_block

    def forward_block(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, reading before it and writing after it."""
        block: Any = self.block.module
        forward = self._inner_forward or functools.partial(type(block).forward, block)
        return run_around(block, self._inside, forward, *args, **kwargs)

    def _inside(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            self._on_input(self.block.module, args, kwargs)
            output = forward(*args, **kwargs)
            return self._behind[""](self.block.module, args, output) if "" in self._behind else output
        finally:
            if "stack_output" not in self._sites:
                self._held.value = None

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = self._block_arguments if self._outside else self._attention_arguments
        # Where the norm before attention is read, it is the entry point. Either entry point drops what an earlier call
        # left behind if it raised.
        held = self._held.value if "_on_input_norm" in self._hooked else None
        call = self._held.value = BlockCall(raw=None if held is None else held.raw)
        x = signatures.hidden_states(positions, args, kwargs)
        packed = self.block.sites.layout == "packed"
        call.packed = signatures.packed_lengths(x, positions, args, kwargs) if packed or x.dim() == 2 else None
        if self._keeps_x:
            call.given = x
            call.x = self._tokens(x) if call.packed is None else x.view(1, *x.shape[-2:])
        if "mask" not in self._needs or call.packed is not None:
            return
        signatures.check_masks(positions, args, kwargs)
        call.mask = kept(signatures.argument(signatures.MASK, positions, args, kwargs), self.block.sites.mask)
        if call.mask is None:
            tokens = signatures.argument(signatures.TOKEN_MASK, positions, args, kwargs)
            call.mask = None if tokens is None else tokens != 0
        if self._local:
            local = signatures.argument(signatures.WINDOW_MASK, positions, args, kwargs)
            call.mask = call.mask if local is None else local
        call.extra_mask = signatures.argument(signatures.CAUSAL_MASK, positions, args, kwargs)
        call.is_causal = kwargs.get("is_causal")
        call.cache = signatures.cache_of(args, kwargs)
        if call.cache is None:
            length = self._tokens(x).shape[1]
            signatures.check_whole(self.block.name, call.mask, length, kwargs, causal=self._causal)
        call.position = signatures.argument(signatures.POSITION, positions, args, kwargs)

    def _on_input_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._held.value = BlockCall(raw=self._tokens(args[0] if args else next(iter(kwargs.values()))))

    def _on_ffn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._held.value is None:
            self._held.value = BlockCall()
        self._held.value.h = self._tokens(args[0] if args else next(iter(kwargs.values())))

    def _on_residual_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (self.write("residual", args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self.write("residual", kwargs[name])}

    def _inputs(self, value: Tensor) -> UnitInputs:
        call = self._call
        x = call.x
        if x is not None and self._needs & {"x", "raw", "mask"}:
            self._check(x, value)
        raw = x if call.raw is None or x is None else call.raw.view(x.shape)
        if x is not None and self._outside and self.block.sites.input_norm and "x" in self._needs:
            x = self._tokens(self._module(self.block.sites.input_norm)(call.given))
            x = x if call.packed is None else x.view(1, *x.shape[-2:])
        h = call.h
        if h is not None and x is not None and h.dim() == 2 and x.dim() == 3:  # OPT's feed-forward
            h = h.view(*x.shape[:2], h.shape[-1])
        if "mask" not in self._needs:
            return UnitInputs(x=x, raw=raw, h=h, batch=value.shape[0])
        if call.packed is not None:
            mask = CallMask(packed_mask(call.packed, value.shape[1]), None, False, value.device)
            return UnitInputs(x=x, raw=raw, h=h, mask=mask, batch=value.shape[0])
        cache: TaskCache | None = task_cache(call.cache, self.block.name, self._index, self.block.depth, call.position)
        causal = self._causal if call.is_causal is None else bool(call.is_causal)
        if self._recurrent and call.kept is None:
            call.kept = kept_tokens(call.mask, cache, value)
        mask = CallMask(
            call.kept if self._recurrent else call.mask, call.extra_mask, causal, value.device,
            window=self._window if causal else None, triangle=self._triangle,
        )  # fmt: skip
        return UnitInputs(x=x, raw=raw, h=h, mask=mask, cache=cache, batch=value.shape[0])

    def _check(self, x: Tensor, value: Tensor) -> None:
        if x.dim() != 3:
            raise UnsupportedError(
                f"{self.block.name} got hidden states of shape {list(x.shape)}: task modules need [batch, tokens, "
                "width]. Load the model with attn_implementation='sdpa' or 'eager' (flash attention removes padding)."
            )
        if value.shape[1] != x.shape[1]:
            raise UnsupportedError(
                f"{self.block.name} runs its feed-forward part on {value.shape[1]} of {x.shape[1]} tokens at a "
                f"time: set "
                "config.chunk_size_feed_forward=0."
            )

    def _tokens(self, value: Tensor) -> Tensor:
        """What a module of the block reads or returns, with the features last."""
        return to_tokens(value, self.block.sites.layout)

    def take_inputs(self, value: Tensor) -> UnitInputs:
        """Hand over what the block was called with to a runner that `keeps_inputs`."""
        inputs = self._inputs(value)
        self._forget()
        return inputs

    def write(self, site: str, output: Any) -> Any:
        """Replace the value at `site` in a module's output."""
        if self.runner.is_active(site):
            old = signatures.first_of(output)
            value = self._tokens(old)
            x, flat = self._call.x, value.dim() == 2
            if flat and x is not None and x.dim() == 3:  # OPT's feed-forward
                new = self._run(site, value.view(*x.shape[:2], value.shape[-1])).view(value.shape)
            else:
                new = self._run(site, value)
            output = signatures.with_first(output, from_tokens(new, old, self.block.sites.layout))
        if site == "stack_output":
            self._held.value = None
        elif site == self._last and not self.runner.keeps_inputs():
            self._forget()
        return output

    def _run(self, site: str, value: Tensor) -> Tensor:
        return self.runner.run(site, value, self._inputs(value))

    def _forget(self) -> None:
        """Drop what was captured, except for the mask if the stack's output still needs it."""
        call = self._held.value
        if "stack_output" not in self._sites:
            self._held.value = None
        elif call is not None:
            call.x = call.given = call.raw = call.h = None
