"""Many heads on one backbone, with each example of a batch sent through the adapter and the head of its task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pal_adapters.checks import path, require_bool, require_one_of, shown
from pal_adapters.errors import ConfigError
from pal_adapters.hosts.unchanged import all_or_nothing
from pal_adapters.nn.tracing import exporting

from .adding import new_route
from .base import added_parameters, base_names, base_tensors, check_backbone, without_in_place
from .contents import Contents, width_of
from .exporting import logits_of_graph
from .heads import Head, HeadConfig, Loss
from .hub import fetch
from .language import check_language_model, output_tensors
from .loading import load, restore
from .loss import batch_penalty, labels_by_task, summed_losses, weighted_loss
from .output import TaskHeadsOutput
from .parts import reshard
from .putting_back import items_kept, put_back
from .readout import require_task, task_logits, tasks_of_inputs
from .routes import Route, adapter_host
from .routing import run_batch
from .saving import save
from .task_description import TaskDescription
from .task_model import TaskModel
from .tasks_file import described_tasks
from .trainable import check_base, train_base, train_routes

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on


class TaskHeads(nn.Module):
    r"""A backbone that many tasks share, with a head for each task and the adapters that are on the backbone.

    The loss of a batch is the weighted mean of the mean losses of its tasks,

    $$L = \sum_t \frac{v_t}{\sum_s v_s} \frac{1}{n_t} \sum_{i \in t} L_i$$

    with `n_t` the number of examples of task `t` in the batch (tokens, for heads that read tokens) and `v_t` its
    weight, or, with `balance="row"`, its weight times `n_t`, which is the plain mean over examples. The first is the
    rule of CA-MTL. In training, the penalty on the coefficients of a fusion or combination that tasks of the batch use
    is added once. If the batch is only part of a step, the penalty is scaled by its share of the step's examples for
    that fusion.

    Calls from several threads do not affect each other: the adapter of a task belongs to the call. Only PEFT's own
    methods (LoRA, IA3 and the like) keep the active adapter in the model, so calls with different adapters wait for
    each other, and the last one used stays active.

    Args:
        backbone: A model of `transformers` or `adapters`, or a `PeftModel`. Which parameters train is left as it is;
            see `prepare_training`.
        balance: `"task"` or `"row"`, see above.

    Raises:
        ConfigError: If `backbone` is not a model.
        UnsupportedError: For a model with an encoder and a decoder, or with an adapter that transformers' own
            `add_adapter` added.

    Examples:
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

    def __init__(self, backbone: Any, *, balance: str = "task") -> None:
        super().__init__()
        require_one_of("balance", balance, ("task", "row"))
        check_backbone(backbone)
        self.backbone: Any = backbone
        self.balance = balance
        self.heads = nn.ModuleDict()
        self.routes: dict[str, Route] = {}
        self.described: dict[str, TaskDescription] = {}
        self.width = width_of(backbone)
        self._base_trained = self._output_trained = False
        self._base_names: list[str] | None = None

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(self.backbone.parameters()).device

    @property
    def base_trained(self) -> bool:
        """Whether the base model has been trained, so that folders hold it."""
        return self._base_trained

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks in the order of their indices in `task_ids`."""
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
        """Adds a task, with a new head or with the head of another task.

        Args:
            task: Name of the task, see `Task`.
            head: Configuration of its head, or the name of an existing head to share.
            adapter: Name of its adapter, a `Stack` or `Fuse` of names in `adapters`, or `None` for the base model
                alone. `"auto"` is the adapter with the name of the task, or else the only adapter; without any
                adapters it is `None`. With several adapters of other names, it is an error. A fusion must have been
                added to the model with `add_adapter_fusion`.
            weight: Factor of its loss.
            loss: A custom loss for a new head, see `heads.Loss`.

        Raises:
            ConfigError: If no task can have that name, the task or a head of its name exists, or there is no head of
                the given name.
            UnknownAdapterError: If the adapter or the fusion is not on the model, or is one network for other tasks.
            UnsupportedError: For any other composition.
        """
        route = new_route(
            self.backbone, self.heads, self.routes, task, head, adapter=adapter, weight=weight, loss=loss
        )
        if isinstance(head, HeadConfig):
            if head.kind == "language_modeling":
                check_language_model(self.backbone)
            # Heads may be in full precision on a backbone in half precision, but not on another device.
            self.heads[task] = Head(head, self.width, loss=loss).to(self.device)
        self.routes[task] = route

    def remove(self, task: str) -> None:
        """Removes a task, and its head unless another task uses it. Later tasks move up by one in `task_ids`."""
        self._route(task)
        with items_kept(self.routes, self.described), all_or_nothing(self):
            head = self.routes.pop(task).head
            self.described.pop(task, None)
            if all(route.head != head for route in self.routes.values()):
                del self.heads[head]

    def head(self, task: str) -> Head:
        """The head of a task."""
        head = self.heads[self._route(task).head]
        assert isinstance(head, Head)
        return head

    def for_task(self, task: str) -> TaskModel:
        """One task as a model of its own, which shares all weights with this one.

        It has the interface of transformers' models for such tasks, with the label names in its config:

            pipeline("text-classification", model=model.for_task("rte"), tokenizer=tokenizer)

        Raises:
            UnsupportedError: For a task of `language_modeling`.
        """
        config = self.head(task).config
        described = self.described.get(task)
        return TaskModel(self, task, config, described.label_names if described else ())

    def _route(self, task: str) -> Route:
        require_task(task, self.tasks)
        return self.routes[task]

    def forward(
        self,
        task_ids: Sequence[str] | Sequence[int] | Tensor | str,
        labels: Mapping[str, Tensor] | Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> TaskHeadsOutput:
        """Logits of a batch, and its loss if labels are passed.

        Args:
            task_ids: The task of each of the `r` encoder inputs: a name, or its index in `tasks`. A single name is for
                all. A list is faster than a tensor on an accelerator, which forces a synchronization.
            labels: By task, the labels of its examples in their order. For a batch of one task, the labels alone.
            num_items_in_batch: What to divide the summed loss of each task by, `[t]`; 0 for absent tasks. By default
                the counts of this batch; `MultiTaskTrainer` passes those of the whole step.
            **inputs: Arguments of the backbone, such as `input_ids` and `attention_mask`, each `[r, n]`.
        """
        if exporting():
            return TaskHeadsOutput(logits=logits_of_graph(self, task_ids, labels, inputs))
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        rows = len(given) if given is not None else len(next(iter(inputs.values())))
        names = tasks_of_inputs(task_ids, rows, self.tasks)
        if self.training and not self._base_trained:
            self._base_trained = self.base_trains()
        if self.training and not self._output_trained:
            self._output_trained = any(tensor.requires_grad for tensor in output_tensors(self.backbone).values())
        adapters = [self.routes[name].adapter for name in names]
        states = run_batch(self.backbone, inputs, adapters, names)
        present = {task: self.head(task) for task in self.routes if task in set(names)}
        logits = task_logits(self.backbone, present, names, states, inputs.get("attention_mask"))
        if labels is None:
            return TaskHeadsOutput(logits=logits)
        labels = labels_by_task(logits, labels)
        losses, own = summed_losses(logits, labels, {task: self.head(task) for task in self.routes})
        whole = own if num_items_in_batch is None else num_items_in_batch.to(own.device, own.dtype)
        loss = weighted_loss(losses, whole, self.routes, self.balance)
        if self.training and torch.is_grad_enabled():
            loss = loss + batch_penalty(self.backbone, logits, self.routes, own.detach(), whole)
        return TaskHeadsOutput(loss=loss, logits=logits, task_losses=losses.detach(), task_counts=own.detach())

    def prepare_training(
        self, tasks: Iterable[str] | None = None, *, base: bool = False, shared: bool = False
    ) -> list[str]:
        """Makes the adapters and heads of tasks trainable and freezes everything else, except the base if asked for.

        For a task with a `Fuse`, the fusion trains and its sources stay frozen, unless another of the tasks has one of
        them as its own adapter. In one network for several tasks (CA-MTL) that other tasks use as well, only the
        vectors of `tasks` train, so the others keep their outputs to the last bit; see `pal_adapters.train_tasks`.

        Args:
            tasks: The tasks; by default all.
            shared: Whether such a network trains as a whole, although that changes the other tasks.
            base: Whether the base model trains too, with its output layer for a language model. A pooler that no head
                reads stays frozen.

        Returns:
            Names of the trainable parameters.

        Raises:
            ConfigError: For `base=False` with an adapter that trains the base model, and for `base=True` with one that
                trains part of it in place.
        """
        adapter_host(self.backbone)
        require_bool("base", base)
        require_bool("shared", shared)
        if isinstance(tasks, (str, bytes)) or not isinstance(tasks, (Iterable, type(None))):
            raise ConfigError(f"tasks={shown(tasks)} is not allowed: pass a list of names.")
        tasks = self.tasks if tasks is None else tuple(tasks)
        routes = [self._route(task) for task in tasks]
        check_base(self.backbone, routes, base=base)
        others = () if shared else [route for task, route in self.routes.items() if task not in tasks]
        with put_back(self.backbone), all_or_nothing(self):
            train_routes(self, self.backbone, dict(zip(tasks, routes, strict=True)), others)
            for route in routes:
                self.heads[route.head].requires_grad_(True)
            if base:
                train_base(self.backbone, self.base_tensors(), map(self.head, tasks))
            return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    def base_tensors(self) -> dict[str, Tensor]:
        """Weights and persistent buffers of the base model, under the names they have without adapters."""
        # The names stay, the tensors do not: moving a model replaces them, and so does FSDP, some at a time.
        if self._base_names is None:
            self._base_names = base_names(self.backbone)
        return base_tensors(self.backbone, self._base_names)

    def base_trains(self) -> bool:
        """Whether weights of the base model are trainable, beside those that an adapter trains in place and saves."""
        own = without_in_place(self.backbone, self.base_tensors())
        return any(tensor.requires_grad for tensor in own.values())

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of adapters, fusions and heads that the host added to the base model; shared ones once."""
        return added_parameters(self.backbone, self.base_tensors().values())

    def count_parameters(self) -> dict[str, int]:
        """Parameters of the base model, the adapters and the heads, and how many train. Shared ones count once."""
        base = [*self.base_tensors().values(), *output_tensors(self.backbone).values()]
        counted = {id(tensor): tensor.numel() for tensor in base if isinstance(tensor, nn.Parameter)}
        added = (parameter.numel() for parameter in self.added_parameters().values() if id(parameter) not in counted)
        return {
            "base": sum(counted.values()),
            "adapters": sum(added),
            "heads": sum(parameter.numel() for parameter in self.heads.parameters()),
            "trainable": sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad),
        }

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        processing_class: Any = None,
        tasks: Iterable[Any] | None = None,
        checkpoint: bool = False,
    ) -> None:
        """Writes adapters, heads and, if it was trained, the base model to a folder that `from_pretrained` reads.

        Adapters and fusions are in the format of their host, each in `directory/<name>`, so the host can load them
        alone. A trained base model is an ordinary checkpoint in `directory/base.model`, without a head; the output
        layer of a language model is in a file beside it. Resized input embeddings are saved even if the base model is
        frozen.

        All files are written first and then moved into place: after an error, the folder is as it was.

        Args:
            directory: The folder; it is created.
            processing_class: The tokenizer, so that a `Predictor` needs nothing but the folder.
            tasks: The tasks, for the same purpose: for each, a `Task` or a `TaskDescription`, which `Task.describe`
                returns. By default those that were passed before or came with the loaded folder.
            checkpoint: Whether `restore` can read it as well, for which the adapters are written a second time.

        Raises:
            ConfigError: For a task that the model lacks, or that does not fit its head.
            StorageError: If each process holds only parts of the parameters.
        """
        path()("directory", directory)
        contents = self._contents()
        if tasks is not None:
            contents.described = self.described | described_tasks(tasks, processing_class, contents.task_heads())
        save(contents, Path(directory), checkpoint=checkpoint, tokenizer=processing_class)
        self.described = contents.described

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        backbone: nn.Module | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """Reads what `save_pretrained` wrote; the model is in evaluation mode. Custom losses have to be set again.

        No code from the folder is run and no file outside it is read. A backbone that was passed in is left as it was
        if the folder is rejected.

        Args:
            directory: The folder, or a Hub repo ID, `"owner/name"`.
            backbone: The base model, if it cannot be loaded from its original source. It is modified. Adapters that it
                already has are not loaded.
            revision: Branch, tag or commit of a repository.
            token: Token for the Hub; by default that of the login.

        Raises:
            StorageError: If there is neither a folder nor a repository of that name, or it is incomplete, damaged, or
                does not fit the model.
            ConfigError: If `revision` or `token` is given for a folder.
        """
        if backbone is not None:
            check_backbone(backbone)
        folder = fetch(directory, revision=revision, token=token)
        with nullcontext() if backbone is None else put_back(backbone):
            contents = load(folder, backbone)
            model = cls(contents.backbone, balance=contents.balance)
            model.heads, model.routes, model.described = contents.heads, contents.routes, contents.described
            model._base_trained, model._output_trained = contents.base_trained, contents.output_trained
            return model.eval()

    def restore(self, directory: str | Path) -> None:
        """Goes back to the weights of a folder written with `checkpoint=True`; all tensors stay the same objects.

        Raises:
            StorageError: If the folder is incomplete, damaged, or of another model; then nothing has changed.
        """
        path()("directory", directory)
        reshard(self)
        with all_or_nothing(self, modules=[self]):
            description = restore(self._contents(), Path(directory))
            self._base_trained |= description.base_trained
            self._output_trained |= description.output_layer

    def _contents(self) -> Contents:
        return Contents(
            self.backbone,
            self.heads,
            self.routes,
            self.balance,
            self.base_tensors(),
            self._base_trained,
            self._output_trained,
            self.described,
        )

    def get_input_embeddings(self) -> nn.Module:
        """The input embeddings of the base model, to which the `Trainer` adds the noise of NEFTune."""
        return self.backbone.get_input_embeddings()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Turns activation checkpointing on in the backbone, by default with `use_reentrant=False`."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if options["use_reentrant"]:
            self.backbone.enable_input_require_grads()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The same, under the name that transformers 5 gives it."""
        options = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Turns it off."""
        self.backbone.gradient_checkpointing_disable()
