"""How the examples of a batch reach the adapters of their tasks, in each host. Uses only public names of the hosts."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.penalty import penalty_of
from pal_adapters.hooks.penalty import penalty_by_caller
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.which import is_peft_model

from .routes import (
    adapter_config,
    adapter_host,
    adapter_names,
    adapter_tasks,
    adapters_in,
    bare_model,
    is_fuse,
    route_key,
)
from .setups import active_in_peft, in_pass, under_setup

Hidden = tuple[Tensor, Tensor | None]
"""Last hidden states `[r, n, d]`, and the output of the base model's pooler `[r, d]`, if it has one."""


def fusion_penalty(backbone: Any, adapter: Any) -> Tensor | None:
    """The penalty on the coefficients of a fusion, to be added to the loss; `None` for other adapters."""
    host = adapter_host(backbone)
    if host == "adapters" and is_fuse(adapter):
        return penalty_of(backbone, adapter.name)
    if host == "peft" and isinstance(adapter, str) and _is_combination(adapter_config(backbone, adapter)):
        return penalty_of(backbone, adapter)
    return None


def run_batch(backbone: Any, inputs: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]) -> Hidden:
    """Runs the backbone, each example through the adapter of its task.

    * `adapters`: an `AdapterSetup` for one adapter, `MultiTask` with `task_ids` for several. Examples of a `Fuse` go
      in a batch of their own. What the host cannot mix takes one pass per adapter.
    * PEFT: `adapter_names` for methods of this package. Of PEFT's own methods, only LoRA takes it, and not in
      training; otherwise a batch must have a single task.
    * One adapter that serves several tasks (CA-MTL), in either host: `task_ids`.
    * No host, or no adapter for a task: the base model alone.

    The host is looked up in each call, since a model may get adapters at any time.

    Args:
        backbone: The model.
        inputs: Arguments of its forward, each tensor `[r, ...]`.
        adapters: The adapter of each example: a name, a composition of `adapters`, or `None`.
        tasks: The task of each example.
    """
    host = adapter_host(backbone)
    known: dict[str, Any] = {route_key(adapter): adapter for adapter in adapters}
    if host == "adapters":
        return _run_adapters(backbone, inputs, known, adapters, tasks)
    if host == "peft":
        return _run_peft(backbone, inputs, known, adapters, tasks)
    return run_active(backbone, inputs, {})


def batch_group(backbone: Any, adapter: Any) -> Hashable:
    """Equal for adapters whose examples `run_batch` sends through the backbone in one pass, in evaluation."""
    host, own = adapter_host(backbone), ("alone", route_key(adapter))
    if host is None:
        return "no adapters"
    if adapter_tasks(backbone, adapter) or is_fuse(adapter):
        return own
    names = adapters_in(adapter)
    if host == "adapters":
        if not names:
            return own
        if all(has_method(part) for name in names for part in _parts(backbone, name)):
            return "ours"
        if not _runs_together(backbone, [adapter]):
            return own
        return str([part.to_dict() for part in _parts(backbone, names[0])])
    if all(has_method(adapter_config(backbone, name)) for name in adapter_names(backbone)):
        return "ours"
    configs = [adapter_config(backbone, name) for name in names]
    plain = all(config.peft_type == "LORA" and not config.use_dora for config in configs)
    return "LoRA" if plain else own


def cache_argument(backbone: Any, adapter: Any) -> str | None:
    """The name of the argument for a key/value cache to continue from; `None` if a pass cannot continue from one.

    It cannot in `adapters` 1.3, whose attention ignores the cache of transformers 4.57, nor with virtual tokens, which
    PEFT would put in front of the text in each pass.
    """
    if adapter_host(backbone) == "adapters":
        return None
    if any(adapter_config(backbone, name).is_prompt_learning for name in adapters_in(adapter)):
        return None
    # Renamed in transformers 5.
    return "cache" if "cache" in inspect.signature(bare_model(backbone).forward).parameters else "past_key_values"


def run_active(backbone: Any, inputs: dict[str, Any], more: dict[str, Any], *, prompt_at: int = 0) -> Hidden:
    """Runs the backbone with whatever is active on it.

    Args:
        backbone: The model.
        inputs: Arguments of its forward.
        more: Arguments for the host.
        prompt_at: Where the virtual tokens of a prompt stand in the hidden states; they are removed.
    """
    # A model of `adapters` with heads would run one of them.
    model: Any = backbone if adapter_host(backbone) == "peft" else bare_model(backbone)
    if model is backbone and is_peft_model(backbone) and bare_model(backbone) is not backbone.get_base_model():
        more = {**more, "output_hidden_states": True}  # PEFT wraps a model with a head, which leaves them out
    # It is added to the loss of the tasks, see `fusion_penalty`.
    call = partial(penalty_by_caller, model, **inputs, **more, return_dict=True)
    outputs = call()
    hidden = getattr(outputs, "last_hidden_state", None)
    if hidden is None and outputs.hidden_states is None:  # a model whose bare model is not known
        outputs = call(output_hidden_states=True)
    hidden = outputs.hidden_states[-1] if hidden is None else hidden
    given = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if given is not None and (virtual := hidden.shape[1] - given.shape[1]) > 0:
        hidden = torch.cat([hidden[:, :prompt_at], hidden[:, prompt_at + virtual :]], dim=1)
    return hidden, getattr(outputs, "pooler_output", None)


# adapters


def _run_adapters(
    backbone: Any, inputs: dict[str, Any], known: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
) -> Hidden:
    if len(known) == 1:
        return pass_of_adapters(backbone, inputs, adapters[0], _numbers(backbone, adapters[0], tasks))
    _reject_mixtures(known)
    places = _places(adapters)
    order = [row for rows in places for row in rows]
    if not _runs_together(backbone, known.values()):
        found = []
        for rows in places:
            more = _numbers(backbone, adapters[rows[0]], [tasks[row] for row in rows])
            part = _rows(inputs, rows, len(adapters))
            found.append(pass_of_adapters(backbone, part, adapters[rows[0]], more))
        return _put_back(order, found)
    if any(_norms_first(backbone, adapter) for adapter in known.values()):
        # MultiTask of adapters 1.3 applies the layer norm in front of a bottleneck of SeqBnConfig's kind twice.
        from adapters.composition import BatchSplit  # only here: PEFT and plain models do without `adapters`

        split = BatchSplit(*(adapters[rows[0]] for rows in places), batch_sizes=[len(rows) for rows in places])
        return _put_back(order, [pass_of_adapters(backbone, _rows(inputs, order, len(adapters)), split, {})])
    from adapters.composition import MultiTask  # only here, see above

    numbers = {name: number for number, name in enumerate(known)}
    more = {"task_ids": torch.tensor([numbers[route_key(adapter)] for adapter in adapters])}
    return pass_of_adapters(backbone, inputs, MultiTask(*known.values()), more)


def pass_of_adapters(backbone: Any, inputs: dict[str, Any], setup: Any, more: dict[str, Any]) -> Hidden:
    """One pass of a model of `adapters` under a setup, with further arguments for the host."""
    names = adapters_in(setup)
    behind = names and any(getattr(part, "combine", "") == "prefix_after_bos" for part in _parts(backbone, names[0]))
    run = partial(run_active, backbone, inputs, more, prompt_at=int(bool(behind)))
    return in_pass(backbone, under_setup(setup), run)


def _reject_mixtures(known: dict[str, Any]) -> None:
    if "None" in known:
        raise UnsupportedError("a batch mixes examples with and without an adapter: give every task one, or none.")
    fused = [key for key, adapter in known.items() if is_fuse(adapter)]
    if fused:  # the host cannot split a batch among fusions
        raise UnsupportedError(
            f"a batch mixes examples for {fused[0]} with examples for other adapters: use batches of one task "
            "(mixed_batches=False)."
        )


def _parts(backbone: Any, name: str) -> list[Any]:
    """The configuration of an adapter of `adapters`, or those that it is a union of."""
    config = adapter_config(backbone, name)
    return list(getattr(config, "configs", [config]))


def _norms_first(backbone: Any, adapter: Any) -> bool:
    """Whether an adapter has bottlenecks behind the base model's layer norm, as `SeqBnConfig` has."""
    parts = [part for name in adapters_in(adapter) for part in _parts(backbone, name)]
    return any(getattr(part, "original_ln_before", False) for part in parts)


def _runs_together(backbone: Any, adapters: Iterable[Any]) -> bool:
    """Whether adapters 1.3 computes each example of a batch with its own of these adapters.

    It does for methods of this package. For its own methods the first adapter decides where the block applies
    adapters, if at all, so all must be configured alike; and some methods run one adapter for the whole batch.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapters_in(adapter)))
    parts = [_parts(backbone, name) for name in names]
    if all(has_method(part) for one in parts for part in one):
        return True
    alike = all([part.to_dict() for part in one] == [part.to_dict() for part in parts[0]] for one in parts)
    alike = alike and all(isinstance(adapter, str) for adapter in adapters)
    return alike and not any(
        getattr(part, "inv_adapter", None)
        or getattr(part, "use_dora", False)
        or getattr(part, "architecture", None) in ("reft", "prompt_tuning")
        for part in parts[0]
    )


# PEFT


def _run_peft(
    backbone: Any, inputs: dict[str, Any], known: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
) -> Hidden:
    names = [name for name in known.values() if name is not None]
    present = adapter_names(backbone)
    ours = all(has_method(adapter_config(backbone, name)) for name in present)
    networks = any(adapter_tasks(backbone, name) for name in present)
    if len(known) == 1:
        more = _numbers(backbone, adapters[0], tasks)
        if not ours or networks:
            under = partial(active_in_peft, backbone, adapters[0])
            return in_pass(backbone, under, lambda: run_active(backbone, inputs, more))
    if ours:
        only_one = len(known) == len(present) == 1 and list(backbone.active_adapters) == names
        # The only adapter is always active, so naming it would only cost time.
        return run_active(backbone, inputs, {} if only_one else _by_name(adapters))
    for name in names:
        config = adapter_config(backbone, name)
        # Methods other than LoRA take the names silently and run the active adapter for all examples.
        if backbone.training or config.peft_type != "LORA":
            which = "trains its own methods" if backbone.training else "runs its methods other than LoRA"
            raise UnsupportedError(
                f"adapter {name!r} is a {type(config).__name__}; PEFT {which} on one adapter at a time: use batches "
                "of one task (mixed_batches=False), or a method of pal_adapters."
            )
    # PEFT hooks these names into the model for the duration of the call, so no other pass may run meanwhile.
    under = partial(active_in_peft, backbone, names[0], key=object())
    return in_pass(backbone, under, lambda: run_active(backbone, inputs, _by_name(adapters)))


def _by_name(adapters: Sequence[Any]) -> dict[str, Any]:
    return {"adapter_names": ["__base__" if adapter is None else adapter for adapter in adapters]}


def _numbers(backbone: Any, adapter: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """`task_ids`, for an adapter that serves several tasks."""
    served = adapter_tasks(backbone, adapter)
    if not served:
        return {}
    unknown = sorted(set(tasks) - set(served))
    if unknown:
        raise UnknownAdapterError(f"adapter {adapter!r} has the tasks {served}, and none called {unknown[0]!r}.")
    return {"task_ids": torch.tensor([served.index(task) for task in tasks])}


def has_method(config: Any) -> bool:
    """Whether an adapter's configuration is of a method of this package."""
    return isinstance(getattr(config, "method", None), Method)


def _is_combination(config: Any) -> bool:
    """Whether an adapter of PEFT combines source adapters."""
    from pal_adapters.fusion.peft.config import CombinationPeftConfig  # only here: other hosts do without PEFT

    return isinstance(config, CombinationPeftConfig)


# Rows of a batch


def _places(adapters: Sequence[Any]) -> list[list[int]]:
    """The rows of each adapter, in the order in which the adapters first occur."""
    found: dict[str, list[int]] = {}
    for row, adapter in enumerate(adapters):
        found.setdefault(route_key(adapter), []).append(row)
    return list(found.values())


def _rows(inputs: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """Some rows of a batch. A value without a first dimension of `total`, such as `[1, n]`, is shared by all rows."""
    at = torch.tensor(rows)
    return {
        name: value.index_select(0, at.to(value.device))
        if isinstance(value, Tensor) and value.dim() and len(value) == total
        else value
        for name, value in inputs.items()
    }


def _put_back(order: Sequence[int], found: Sequence[Hidden]) -> Hidden:
    """Puts the hidden states and pooled outputs of rows taken in this order back into the order of the batch."""
    back = torch.tensor(order).argsort().to(found[0][0].device)
    hidden = torch.cat([states for states, _ in found]).index_select(0, back)
    pooled = [one for _, one in found if one is not None]
    return hidden, torch.cat(pooled).index_select(0, back) if pooled else None
