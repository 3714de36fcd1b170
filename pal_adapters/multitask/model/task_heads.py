"""Many heads on one base model, each row of a batch through the adapter and the head of its task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.hosts.which import host_of, is_peft_model
from pal_adapters.multitask.tasks.names import require_task_name

from . import storage
from .heads import Head, HeadConfig, Loss, pool
from .language import check_language_model, output_tensors, word_logits
from .routing import Route, Router, adapter_config, adapter_names, adapters_in, is_fuse, route_key
from .saved import SavedHeads


@dataclass
class TaskHeadsOutput(ModelOutput):
    """What `TaskHeads` gives.

    Args:
        loss: The loss of the batch, if there were labels.
        logits: For each task of the batch its logits, in the order of its rows; see `HeadConfig`.
        task_losses: Sum of the losses of each task `[t]`, 0 for a task that is absent.
        task_counts: Over how much each sum goes `[t]`: rows, or tokens that count.
    """

    loss: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    task_losses: Tensor | None = None
    task_counts: Tensor | None = None


class TaskHeads(SavedHeads):
    r"""A base model that many tasks share, with a head for each, and the adapters that it has.

    The loss of a batch is the weighted mean of the mean losses of the tasks in it,

    $$L = \sum_t \frac{v_t}{\sum_s v_s} \frac{1}{n_t} \sum_{i \in t} L_i$$

    with `n_t` the rows of task `t` in the batch (tokens for heads that read tokens) and `v_t` its weight, or with
    `balance="row"` its weight times `n_t`, which is the plain mean over rows. The first is the rule of CA-MTL. In
    training the penalty on the coefficients of a fusion or combination that tasks of the batch use is added, once: a
    batch that is a part of a step adds the part of it that its rows are of the step's rows for that fusion.

    Args:
        backbone: A model of `transformers` or `adapters`, or a `PeftModel`. It is used as it is: which parameters
            train is up to the user, or see `prepare_training`.
        balance: `"task"` or `"row"`, see above.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> base = BertModel(BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30))
        >>> model = TaskHeads(base)
        >>> model.add("rte", HeadConfig("single_label", 2))
        >>> model.add("stsb", HeadConfig("regression"))
        >>> tokens = torch.ones(3, 5, dtype=torch.long)
        >>> logits = model(task_ids=["rte", "stsb", "rte"], input_ids=tokens).logits
        >>> {task: tuple(rows.shape) for task, rows in logits.items()}
        {'rte': (2, 2), 'stsb': (1,)}
    """

    # The loss is normalised over a whole step where `num_items_in_batch` is given.
    accepts_loss_kwargs = True

    def __init__(self, backbone: nn.Module, *, balance: Literal["task", "row"] = "task") -> None:
        super().__init__()
        require_one_of("balance", balance, ("task", "row"))
        if host_of(backbone) == "peft" and not is_peft_model(backbone):
            raise UnsupportedError(
                "the backbone has an adapter from transformers' own add_adapter, which TaskHeads cannot route or "
                "save: pass get_peft_model(model, config, adapter_name=...)."
            )
        config = getattr(backbone, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedError("the backbone has an encoder and a decoder: pass a model with one of them.")
        self.backbone: Any = backbone
        self.balance = balance
        self.heads = nn.ModuleDict()
        self.routes: dict[str, Route] = {}
        self.width = int(
            getattr(config, "hidden_size", 0) or cast("Any", backbone).get_input_embeddings().weight.shape[1]
        )
        self._router = Router()
        self._base_trained = self._output_trained = False
        self._base: tuple[Tensor, dict[str, Tensor]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order of their numbers in `task_ids`."""
        return tuple(self.routes)

    def add(
        self,
        task: str,
        head: HeadConfig | str,
        *,
        adapter: Any = "auto",
        weight: float = 1.0,
        loss: Loss | None = None,
    ) -> None:
        """Adds a task, with a head of its own or with the head of another task.

        Args:
            task: Name of the task, see `Task`.
            head: What its head is, or the name of a head that is there, to use that one.
            adapter: Name of its adapter, a `Stack` or `Fuse` of names in `adapters`, or `None` for the base alone.
                `"auto"` is the adapter with the name of the task, or the only one; none if there are none. With
                several of other names it is an error.
                A fusion is added to the model before, with `add_adapter_fusion`.
            weight: What its loss is multiplied with.
            loss: A loss of one's own for a new head, see `heads.Loss`.

        Raises:
            ConfigError: If no task can have that name, there is a task or a head of it, or no head of the given name.
            UnknownAdapterError: If the adapter or the fusion is not on the model.
            UnsupportedError: For another composition.
        """
        require_task_name("task", task)
        if task in self.routes:
            raise ConfigError(f"task={task!r} is there already: {', '.join(self.routes)}. Use another name.")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise ConfigError(f"weight={weight!r} is not allowed: use a number above 0.")
        if isinstance(head, str):
            if head not in self.heads:
                raise ConfigError(f"head={head!r} is not there: {', '.join(self.heads) or 'there is none'}.")
            if loss is not None:
                raise ConfigError(f"loss has no effect for the head {head!r}, which is there already: leave it out.")
        elif task in self.heads:  # of a task that was removed, used by another
            raise ConfigError(f"a head {task!r} is there already: pass head={task!r} to use it.")
        if isinstance(adapter, str) and adapter == "auto":
            names = adapter_names(self.backbone)
            if len(names) > 1 and task not in names:
                raise ConfigError(
                    f"task {task!r} has no adapter of its name among {', '.join(map(repr, names))}: pass adapter=, "
                    "one of them, or None for the base alone."
                )
            adapter = task if task in names else names[0] if names else None
        self._router.check(self.backbone, adapter)
        if isinstance(head, HeadConfig) and head.kind == "language_modeling":
            check_language_model(self.backbone)
        if isinstance(head, str):
            name = head
        else:
            name = task
            reference = next(self.backbone.parameters())
            made = Head(head, self.width, loss=loss)
            # A base in half precision may have heads in full precision; a base on another device may not.
            self.heads[task] = made.to(reference.device)
        self.routes[task] = Route(name, adapter, float(weight))

    def remove(self, task: str) -> None:
        """Removes a task, and its head unless another task uses it. The numbers of the tasks behind it move up."""
        self._route(task)
        head = self.routes.pop(task).head
        if all(route.head != head for route in self.routes.values()):
            del self.heads[head]

    def head(self, task: str) -> Head:
        """The head of a task."""
        head = self.heads[self._route(task).head]
        assert isinstance(head, Head)
        return head

    def _route(self, task: str) -> Route:
        if task not in self.routes:
            raise UnknownAdapterError(f"task {task!r} is not there: {', '.join(self.routes) or 'there is none'}.")
        return self.routes[task]

    def forward(
        self,
        task_ids: Sequence[str] | Sequence[int] | Tensor | str,
        labels: Mapping[str, Tensor] | Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> TaskHeadsOutput:
        """Logits of a batch, and its loss if there are labels.

        Args:
            task_ids: For each of the `r` encoder inputs its task: a name, or a number in the order of `tasks`. One
                name stands for all. A list spares a wait for the device that a tensor there costs.
            labels: For each task of the batch the labels of its rows, in their order. For one task the labels alone.
            num_items_in_batch: What to divide the sum of losses of each task by, `[t]`; 0 for tasks that are absent.
                By default the counts of this batch; `MultiTaskTrainer` gives those of the whole step.
            **inputs: Arguments of the base model, such as `input_ids` and `attention_mask`, each `[r, n]`.
        """
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        rows = len(given) if given is not None else len(next(iter(inputs.values())))
        names = self._names(task_ids, rows)
        if self.training and not self._base_trained:
            self._base_trained = any(tensor.requires_grad for tensor in self._base_tensors().values())
        if self.training and not self._output_trained:
            self._output_trained = any(tensor.requires_grad for tensor in output_tensors(self.backbone).values())
        adapters = [self.routes[name].adapter for name in names]
        hidden, pooled = self._router(self.backbone, inputs, adapters, names)
        present = [task for task in self.routes if task in set(names)]
        logits: dict[str, Tensor] = {}
        pools: dict[str, Tensor] = {}
        for task in present:
            head = self.head(task)
            if head.config.reads_tokens:
                source = hidden
            else:
                kind = head.config.pooling
                if kind not in pools:
                    pools[kind] = pool(hidden, inputs.get("attention_mask"), kind, pooled)
                source = pools[kind]
            if len(present) > 1:
                at = torch.tensor([row for row, name in enumerate(names) if name == task])
                source = source.index_select(0, at.to(source.device, non_blocking=True))
            if not torch.is_autocast_enabled(source.device.type) and head.linear is not None:
                source = source.to(head.linear.weight.dtype)
            logits[task] = head(source, partial(word_logits, self.backbone) if head.linear is None else None)
            if head.config.kind == "span_qa" and inputs.get("attention_mask") is not None:
                # A span may not be in the padding, of which other rows of the batch decide how much there is.
                padding = inputs["attention_mask"] == 0
                if len(present) > 1:
                    padding = padding.index_select(0, at.to(padding.device, non_blocking=True))
                rows_of = logits[task]
                logits[task] = rows_of.masked_fill(padding.unsqueeze(-1), torch.finfo(rows_of.dtype).min)
        if labels is None:
            return TaskHeadsOutput(logits=logits)
        loss, losses, counts = self._loss(logits, labels, num_items_in_batch)
        return TaskHeadsOutput(loss=loss, logits=logits, task_losses=losses, task_counts=counts)

    def _loss(
        self, logits: dict[str, Tensor], labels: Mapping[str, Tensor] | Tensor, num_items: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and for each task the sum of its losses and over how much it goes `[t]`."""
        if isinstance(labels, Tensor):
            if len(logits) > 1:
                raise ConfigError(f"labels is one tensor, but the batch has {len(logits)} tasks: pass a dict by task.")
            labels = dict.fromkeys(logits, labels)
        if set(labels) != set(logits):
            raise ConfigError(f"labels are of {sorted(labels)}, but the rows are of {sorted(logits)}.")
        zero = torch.zeros((), device=hidden_device(logits))
        sums, counts = dict.fromkeys(self.routes, zero), dict.fromkeys(self.routes, zero)
        for task, rows in logits.items():
            sums[task], counts[task] = self.head(task).loss(rows, labels[task].to(rows.device))
        losses, own = torch.stack(list(sums.values())), torch.stack(list(counts.values()))
        whole = own if num_items is None else num_items.to(own.device, own.dtype)
        weights = torch.tensor([route.weight for route in self.routes.values()]).to(own.device, non_blocking=True)
        shares = whole if self.balance == "row" else (whole > 0).to(own.dtype)
        # The weights are not in the sum below, or the weight of a task that is alone in a step would have no effect.
        shares = weights * shares / shares.sum().clamp(min=1)
        loss = (shares * losses / whole.clamp(min=1)).sum()
        if self.training and torch.is_grad_enabled():
            loss = loss + self._penalty(logits, own.detach(), whole)
        return loss, losses.detach(), own.detach()

    def _penalty(self, present: Iterable[str], own: Tensor, whole: Tensor) -> Tensor:
        """Penalties of the fusions of a batch; over the batches of a step each counts once."""
        total = own.new_zeros(())
        keys = [route_key(route.adapter) for route in self.routes.values()]
        for key, adapter in {route_key(a): a for a in (self.routes[task].adapter for task in present)}.items():
            penalty = self._router.penalty(self.backbone, adapter)
            if penalty is not None:
                at = torch.tensor([key == other for other in keys]).to(own.device, non_blocking=True)
                total = total + penalty.to(own.device) * (own * at).sum() / (whole * at).sum().clamp(min=1)
        return total

    def _names(self, task_ids: Any, rows: int) -> list[str]:
        if isinstance(task_ids, str):
            task_ids = [task_ids] * rows
        values = task_ids.flatten().tolist() if isinstance(task_ids, Tensor) else list(task_ids)
        if len(values) != rows:
            raise ConfigError(f"task_ids has {len(values)} entries for {rows} rows: pass one a row.")
        tasks = self.tasks
        names = []
        for value in values:
            if isinstance(value, str):
                self._route(value)
                names.append(value)
            elif isinstance(value, bool) or not 0 <= value < len(tasks) or value != int(value):
                raise UnknownAdapterError(
                    f"task {value!r} is not there: use a name or a number from 0 to {len(tasks) - 1}."
                )
            else:
                names.append(tasks[int(value)])
        return names

    def prepare_training(self, tasks: Iterable[str] | None = None, *, base: bool = False) -> list[str]:
        """Makes the adapters and heads of tasks trainable and nothing else, except the base if asked for.

        Of a task with a `Fuse` the fusion trains and its sources rest, unless another of the tasks has one of them.

        Args:
            tasks: The tasks; by default all.
            base: Whether the base trains too, with its output layer for a language model. An unused pooler rests.

        Returns:
            Names of the parameters that train.

        Raises:
            ConfigError: For `base=False` with an adapter that trains the base.
        """
        tasks = self.tasks if tasks is None else tuple(tasks)
        routes = [self._route(task) for task in tasks]
        fusions = {route.adapter.name: route.adapter for route in routes if is_fuse(route.adapter)}
        names = {name for route in routes if not is_fuse(route.adapter) for name in adapters_in(route.adapter)}
        configs = {name: adapter_config(self.backbone, name) for name in sorted(names)}
        # A network that serves several tasks (CA-MTL) trains copies of its own and leaves the base as it is.
        joint = [n for n, c in configs.items() if getattr(c, "train_base", False) and not getattr(c, "tasks", None)]
        if joint and not base:
            raise ConfigError(
                f"base=False is not allowed with adapter {joint[0]!r}, whose config has train_base=True: pass "
                "base=True."
            )
        self.requires_grad_(False)
        if host_of(self.backbone) == "peft":
            for name in sorted(names):
                if configs[name].is_prompt_learning:  # which PEFT keeps apart from its layers
                    self.backbone.prompt_encoder[name].requires_grad_(True)
                else:
                    self.backbone.set_requires_grad(name)
        elif names or fusions:
            self._train_in_adapters(sorted(names), list(fusions.values()))
        for route in routes:
            self.heads[route.head].requires_grad_(True)
        if base:
            poolers = any(self.head(task).config.pooling == "pooler" for task in tasks)
            for name, tensor in self._base_tensors().items():
                if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(poolers or not name.startswith("pooler."))
            if any(self.head(task).config.kind == "language_modeling" for task in tasks):
                for tensor in output_tensors(self.backbone).values():
                    tensor.requires_grad_(True)
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def _train_in_adapters(self, names: Sequence[str], fusions: Sequence[Any]) -> None:
        from adapters.composition import Parallel

        training, chosen = self.training, []
        if names:
            self.backbone.train_adapter(Parallel(*names) if len(names) > 1 else names[0])
            chosen += [p for p in self.backbone.parameters() if p.requires_grad]
        for fuse in fusions:  # each call freezes what the ones before it have chosen
            self.backbone.train_adapter_fusion(fuse)
            chosen += [p for p in self.backbone.parameters() if p.requires_grad]
        for parameter in chosen:
            parameter.requires_grad_(True)
        self.train(training)

    def count_parameters(self) -> dict[str, int]:
        """Parameters of the base, of the adapters, of the heads, and how many of all train. Shared ones count once."""
        base = [*self._base_tensors().values(), *output_tensors(self.backbone).values()]
        kept = {id(t): t.numel() for t in base if isinstance(t, nn.Parameter)}
        added = storage.added_parameters(self.backbone, base)
        return {
            "base": sum(kept.values()),
            "adapters": sum(parameter.numel() for parameter in added.values()),
            "heads": sum(parameter.numel() for parameter in self.heads.parameters()),
            "trainable": sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        }

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Turns activation checkpointing on in the base; without re-entrance unless asked for."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if options["use_reentrant"]:
            self.backbone.enable_input_require_grads()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same under the name that transformers 5 has for it."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Turns it off again."""
        self.backbone.gradient_checkpointing_disable()


def hidden_device(logits: Mapping[str, Tensor]) -> torch.device:
    """Where the logits lie."""
    return next(iter(logits.values())).device
