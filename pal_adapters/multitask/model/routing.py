"""How the rows of a batch reach the adapters of their tasks, in each host. Uses public names of the hosts only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.penalty import penalty_of
from pal_adapters.hooks.penalty import penalty_by_caller
from pal_adapters.hosts.which import host_of


def bare_model(backbone: Any) -> nn.Module:
    """The model of transformers that makes the hidden states: without a wrapper of the host, and without a head."""
    if host_of(backbone) == "peft":
        backbone = backbone.get_base_model()
    return getattr(backbone, "base_model", backbone)


def adapter_names(backbone: Any) -> tuple[str, ...]:
    """Names of the adapters on a model, in their order."""
    host = host_of(backbone)
    if host == "peft":
        return tuple(backbone.peft_config)
    return tuple(backbone.adapters_config.adapters) if host == "adapters" else ()


def adapter_config(backbone: Any, name: str) -> Any:
    """The configuration of an adapter."""
    return backbone.peft_config[name] if host_of(backbone) == "peft" else backbone.adapters_config.get(name)


@dataclass
class Route:
    """Where a task goes.

    Args:
        head: Name of its head.
        adapter: Its adapter: a name, a `Stack` or a `Fuse` of `adapters`, or `None` for the base alone.
        weight: Weight of its loss.
    """

    head: str
    adapter: Any = None
    weight: float = 1.0


class Router:
    """Runs a base model with the adapter of each row.

    * `adapters`: the composition `MultiTask`, with `task_ids`; a batch of one task activates its adapter alone. Rows
      of a `Fuse` go in a batch of their own. What the host cannot mix takes a pass for each adapter.
    * PEFT: `adapter_names`. Of PEFT's own methods LoRA alone takes it, and not in training: for all else a batch must
      have one task.
    * One adapter with several tasks in it (CA-MTL), in either host: `task_ids`.
    * No host, or no adapter for a task: nothing but the base.

    The host is looked up at each call: a model may get adapters at any time.
    """

    def check(self, backbone: nn.Module, adapter: Any) -> None:
        """Raises an error unless the model has the adapters of a task, and rows can be sent through them.

        Raises:
            UnknownAdapterError: for an adapter that is not on the model.
            UnsupportedError: for a composition other than `Stack` and a `Fuse` of names: it has weights or sizes of
                its own, which neither tell two routes apart nor are stored with them.
        """
        fuse = is_fuse(adapter)
        if not fuse or not all(isinstance(child, str) for child in adapter.children):
            _require_stacks(adapter)
        known = adapter_names(backbone)
        for name in adapters_in(adapter):
            if name not in known:
                there = ", ".join(map(repr, known)) or "none"
                raise UnknownAdapterError(f"adapter={name!r} is not on the model, which has: {there}.")
        if fuse:
            self._check_fusion(backbone, adapter)

    @staticmethod
    def _check_fusion(backbone: Any, fuse: Any) -> None:
        fusions = backbone.adapters_config.fusions
        if fuse.name not in fusions:
            there = ", ".join(map(repr, fusions)) or "none"
            raise UnknownAdapterError(
                f"the fusion {fuse.name!r} is not on the model, which has: {there}. Add it with "
                "add_adapter_fusion(Fuse(...))."
            )
        _, sources = backbone.adapters_config.get_fusion(fuse.name)
        if list(sources) != list(fuse.children):
            raise UnknownAdapterError(
                f"the fusion {fuse.name!r} has the sources {list(sources)}, not {list(fuse.children)}: name them in "
                "that order."
            )

    def penalty(self, backbone: Any, adapter: Any) -> Tensor | None:
        """What the coefficients of a fusion or a combination of sources add to the loss, if it is to be added."""
        if host_of(backbone) == "adapters" and is_fuse(adapter):
            return penalty_of(backbone, adapter.name)
        if host_of(backbone) == "peft" and hasattr(adapter_config(backbone, adapter), "regularization"):
            return penalty_of(backbone, adapter)
        return None

    def __call__(
        self, backbone: Any, inputs: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states `[r, n, d]`, and what the base's pooler gave `[r, d]`.

        Args:
            backbone: The model.
            inputs: Arguments of its forward, each tensor `[r, ...]`.
            adapters: For each row the adapter: a name, a composition of `adapters`, or `None`.
            tasks: For each row the name of its task.
        """
        known: dict[str, Any] = {route_key(adapter): adapter for adapter in adapters}
        more: dict[str, Any] = {}
        host = host_of(backbone)
        if host == "adapters" and len(known) > 1:
            self._refuse_mixtures(known)
            if not _runs_together(backbone, known.values()):
                return self._apart(backbone, inputs, adapters, tasks)
            if any(_norms_first(backbone, adapter) for adapter in known.values()):
                return self._sorted(backbone, inputs, adapters)
        if host is not None:
            route = self._through_adapters if host == "adapters" else self._through_peft
            more = route(backbone, known, adapters, tasks)
        return self.run(backbone, inputs, more)

    def run(self, backbone: Any, inputs: dict[str, Any], more: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The same with the adapter that is active, with `more` arguments for the host."""
        host = host_of(backbone)
        # A model of `adapters` with heads would run one of them.
        model = backbone if host == "peft" else bare_model(backbone)
        with penalty_by_caller():  # `penalty` goes to the loss of the tasks
            outputs = model(**inputs, **more, return_dict=True)
            hidden = getattr(outputs, "last_hidden_state", None)
            if hidden is None:  # a PeftModel around a model with a head
                outputs = model(**inputs, **more, return_dict=True, output_hidden_states=True)
                hidden = outputs.hidden_states[-1]
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if given is not None and hidden.shape[1] > given.shape[1]:
            hidden = _without_prompt(backbone, hidden, given.shape[1])
        return hidden, getattr(outputs, "pooler_output", None)

    def _sorted(self, backbone: Any, inputs: dict[str, Any], adapters: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """Rows side by side by adapter, in a `BatchSplit`.

        `MultiTask` of adapters 1.3 applies the layer norm in front of a bottleneck of `SeqBnConfig`'s kind twice.
        """
        from adapters.composition import BatchSplit

        places = _places(adapters)
        sizes = [len(rows) for rows in places]
        backbone.set_active_adapters(BatchSplit(*(adapters[rows[0]] for rows in places), batch_sizes=sizes))
        order = [row for rows in places for row in rows]
        return _put_back(order, [self.run(backbone, _rows(inputs, order, len(adapters)), {})])

    def _apart(
        self, backbone: Any, inputs: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
    ) -> tuple[Tensor, Tensor | None]:
        """A pass for each adapter, for what the host does not mix in a batch; see `_runs_together`."""
        if backbone.training and getattr(bare_model(backbone), "is_gradient_checkpointing", False):
            raise UnsupportedError(
                "a batch mixes adapters that the host cannot run in one pass, and with gradient checkpointing several "
                "passes would be computed again with the adapter of the last: use batches of one task "
                "(mixed_batches=False)."
            )
        places, found = _places(adapters), []
        for rows in places:
            self._activate(backbone, adapters[rows[0]])
            more = self._numbers(backbone, adapters[rows[0]], [tasks[row] for row in rows])
            found.append(self.run(backbone, _rows(inputs, rows, len(adapters)), more))
        return _put_back([row for rows in places for row in rows], found)

    def _through_adapters(
        self, backbone: Any, known: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
    ) -> dict[str, Any]:
        from adapters.composition import MultiTask

        if len(known) == 1:
            (setup,) = known.values()
            self._activate(backbone, setup)
            return self._numbers(backbone, setup, tasks)
        self._activate(backbone, MultiTask(*known.values()))
        order = {name: number for number, name in enumerate(known)}
        return {"task_ids": torch.tensor([order[route_key(adapter)] for adapter in adapters])}

    @staticmethod
    def _refuse_mixtures(known: dict[str, Any]) -> None:
        if "None" in known:
            raise UnsupportedError("a batch mixes rows with and without an adapter: give every task one, or none.")
        fused = [key for key, adapter in known.items() if is_fuse(adapter)]
        if fused:  # the host splits no batch among fusions
            raise UnsupportedError(
                f"a batch mixes rows for {fused[0]} with rows for other adapters: use batches of one task "
                "(mixed_batches=False)."
            )

    def _through_peft(
        self, backbone: Any, known: dict[str, Any], adapters: Sequence[Any], tasks: Sequence[str]
    ) -> dict[str, Any]:
        if len(known) == 1 and "None" not in known:
            (name,) = known.values()
            self._activate(backbone, name)
            return self._numbers(backbone, name, tasks)
        for name in filter(None, known.values()):
            config = adapter_config(backbone, name)
            method = type(config)
            if method.__module__.startswith("pal_adapters."):
                continue
            # Others than LoRA take the names without a word and run the active adapter for all rows.
            if backbone.training or config.peft_type != "LORA":
                which = "trains its own methods" if backbone.training else "runs its methods other than LoRA"
                raise UnsupportedError(
                    f"adapter {name!r} is a {method.__name__}; PEFT {which} on one adapter at a time: use batches of "
                    "one task (mixed_batches=False), or a method of pal_adapters."
                )
        return {"adapter_names": ["__base__" if adapter is None else adapter for adapter in adapters]}

    def _numbers(self, backbone: Any, adapter: Any, tasks: Sequence[str]) -> dict[str, Any]:
        """`task_ids`, for an adapter that serves several tasks."""
        served = getattr(adapter_config(backbone, adapter), "tasks", None) if isinstance(adapter, str) else None
        if not served:
            return {}
        unknown = sorted(set(tasks) - set(served))
        if unknown:
            raise UnknownAdapterError(
                f"adapter {adapter!r} has the tasks {list(served)}, and none called {unknown[0]!r}."
            )
        return {"task_ids": torch.tensor([served.index(task) for task in tasks])}

    def _activate(self, backbone: Any, setup: Any) -> None:
        if host_of(backbone) == "adapters":
            if route_key(setup) != route_key(backbone.active_adapters):
                backbone.set_active_adapters(setup)
        elif list(backbone.active_adapters) != [setup]:
            # PEFT freezes the adapters that it deactivates; what is trained is for the user to say.
            trained = [(parameter, parameter.requires_grad) for parameter in backbone.parameters()]
            backbone.set_adapter(setup)
            for parameter, trains in trained:
                if parameter.requires_grad is not trains:
                    parameter.requires_grad_(trains)


def _parts(backbone: Any, name: str) -> list[Any]:
    """The configuration of an adapter of `adapters`, or those that it is a union of."""
    config = adapter_config(backbone, name)
    return list(getattr(config, "configs", [config]))


def _norms_first(backbone: Any, adapter: Any) -> bool:
    """Whether an adapter has bottlenecks behind the layer norm of the base, as `SeqBnConfig` has."""
    parts = [part for name in adapters_in(adapter) for part in _parts(backbone, name)]
    return any(getattr(part, "original_ln_before", False) for part in parts)


def _runs_together(backbone: Any, adapters: Iterable[Any]) -> bool:
    """Whether adapters 1.3 gives each row of a batch its own of these adapters.

    It does for our methods. For its own it takes the place of an adapter in the block, or whether there is one, from
    the first adapter, so all have to be alike; and of some methods it runs one for all rows.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapters_in(adapter)))
    parts = [_parts(backbone, name) for name in names]
    if all(type(part).__module__.startswith("pal_adapters.") for one in parts for part in one):
        return True
    alike = all([part.to_dict() for part in one] == [part.to_dict() for part in parts[0]] for one in parts)
    alike = alike and all(isinstance(adapter, str) for adapter in adapters)
    return alike and not any(
        getattr(part, "inv_adapter", None)
        or getattr(part, "use_dora", False)
        or getattr(part, "architecture", None) in ("reft", "prompt_tuning")
        for part in parts[0]
    )


def _places(adapters: Sequence[Any]) -> list[list[int]]:
    """The rows of each adapter, in the order in which they first occur."""
    found: dict[str, list[int]] = {}
    for row, adapter in enumerate(adapters):
        found.setdefault(route_key(adapter), []).append(row)
    return list(found.values())


def _rows(inputs: dict[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """Some of the rows of a batch. What has no dimension of `total` rows in front, such as `[1, n]`, is for all."""
    at = torch.tensor(rows)
    return {
        name: value.index_select(0, at.to(value.device))
        if isinstance(value, Tensor) and value.dim() and len(value) == total
        else value
        for name, value in inputs.items()
    }


def _put_back(order: Sequence[int], found: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Hidden states and pooled ones of rows that were taken in this order, in the order of the batch."""
    back = torch.tensor(order).argsort().to(found[0][0].device)
    hidden = torch.cat([states for states, _ in found]).index_select(0, back)
    pooled = [one for _, one in found if one is not None]
    return hidden, torch.cat(pooled).index_select(0, back) if pooled else None


def _without_prompt(backbone: Any, hidden: Tensor, length: int) -> Tensor:
    """Hidden states without those of a prompt's virtual tokens, which stand in front or behind the first token."""
    first = 0
    if host_of(backbone) == "adapters" and backbone.active_adapters is not None:
        parts = _parts(backbone, backbone.active_adapters.first())
        first = int(any(getattr(part, "combine", "") == "prefix_after_bos" for part in parts))
    return torch.cat([hidden[:, :first], hidden[:, first + hidden.shape[1] - length :]], dim=1)


def is_fuse(adapter: Any) -> bool:
    """Whether the adapter of a task is a fusion of `adapters`."""
    return type(adapter).__name__ == "Fuse"


def route_key(adapter: Any) -> str:
    """What tells the adapters of tasks apart: two fusions of the same sources differ in their names alone."""
    if adapter is None or isinstance(adapter, str):
        return str(adapter)
    name = f"{adapter.name}: " if is_fuse(adapter) else ""
    return f"{type(adapter).__name__}[{name}{', '.join(map(route_key, adapter.children))}]"


def _require_stacks(adapter: Any) -> None:
    if adapter is None or isinstance(adapter, str):
        return
    if type(adapter).__name__ != "Stack":
        raise UnsupportedError(
            f"adapter={adapter} is not allowed for a task: use a name, a Stack of names or a Fuse of names. Make "
            "one adapter of an average with average_adapter, and name that."
        )
    for child in adapter.children:
        _require_stacks(child)


def adapters_in(adapter: Any) -> list[str]:
    """Names of the adapters that the adapter of a task is made of."""
    if adapter is None:
        return []
    return [adapter] if isinstance(adapter, str) else list(adapter.flatten())
