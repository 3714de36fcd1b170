"""One CA-MTL network for several tasks: model, mixed batches, and training with or without MT-uncertainty."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from ..camtl.network import network_size
from ..errors import ConfigError, require_one_of
from .loss import multi_task_loss
from .metrics import primary_metric
from .models import HOSTS, Pooling
from .tasks import TaskSpec
from .training import BatchMaker, DivergedError, FitResult, TaskData, TrainingConfig, predict, score
from .uncertainty import UncertaintySampler

NETWORKS = ("ca_mtl_base", "ca_mtl_large")
"""Networks for all tasks by name."""

SAMPLERS = ("proportional", "mt_uncertainty")
"""How the rows of a mixed batch are chosen."""

_NAME = "tasks"


class NetworkModel(nn.Module):
    """A base model with one CA-MTL network for all tasks and a linear head for each.

    Args:
        base: A model of `transformers.AutoModel`. It is changed: frozen, and given the network.
        specs: The tasks.
        network: One of `NETWORKS`.
        host: One of `HOSTS`.
        max_length: The longest input in tokens.
        pooling: `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
        dropout: Dropout on the input of the heads.

    Raises:
        ConfigError: If the arguments do not go together.
    """

    def __init__(
        self,
        base: Any,
        specs: Sequence[TaskSpec],
        *,
        network: str = "ca_mtl_base",
        host: str,
        max_length: int = 128,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_one_of("network", network, NETWORKS)
        require_one_of("host", host, HOSTS)
        require_one_of("pooling", pooling, ("mean", "cls"))
        import pal_adapters

        self.specs = {spec.name: spec for spec in specs}
        if len(self.specs) != len(specs):
            raise ConfigError(f"specs={[spec.name for spec in specs]} is not allowed: each task once.")
        self.host_name, self.pooling = host, pooling
        device = next(base.parameters()).device
        settings: dict[str, Any] = {"tasks": list(self.specs), "max_length": max_length}
        if host == "adapters":
            import adapters

            adapters.init(base)
            base.add_adapter(_NAME, config=pal_adapters.CAMTLConfig.preset(network, **settings))
            base.train_adapter(_NAME)
            self.encoder: Any = base
        else:
            import peft

            config = pal_adapters.CAMTLPeftConfig.preset(network, task_type="FEATURE_EXTRACTION", **settings)
            self.encoder = peft.get_peft_model(base, config, adapter_name=_NAME)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict()
        for spec in specs:
            head = nn.Linear(base.config.hidden_size, spec.head_size)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.heads[spec.name] = head
        self.size = network_size(self.encoder, _NAME)
        self.to(device)

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.encoder.parameters()).device

    def forward(self, task: str, inputs: Mapping[str, Tensor], *, choices: int = 1) -> Tensor:
        """Logits `[b, c]` of a batch of one task; with several choices `[b, choices]`."""
        rows = next(iter(inputs.values())).shape[0]
        logits = self.mixed([task] * rows, inputs)[task]
        return logits.view(-1, choices) if choices > 1 else logits

    def mixed(self, tasks: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Head outputs of encoder inputs that belong to several tasks, by task and in order.

        Args:
            tasks: The task of each input.
            inputs: What the tokenizer gave, each `[b, n]`.
        """
        numbers = {name: number for number, name in enumerate(self.specs)}
        ids = torch.tensor([numbers[task] for task in tasks], device=self.device)
        hidden = self.encoder(**inputs, task_ids=ids).last_hidden_state  # [b, n, d]
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        pooled = self.dropout(pooled)
        return {task: self.heads[task](pooled[ids == numbers[task]]) for task in dict.fromkeys(tasks)}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What trains: the network, its half of the base, and the heads."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def save(self, directory: str | Path) -> None:
        """Writes the network in the format of its host, and `heads.safetensors`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.host_name == "adapters":
            self.encoder.save_adapter(str(folder / _NAME), _NAME, use_safetensors=True)
        else:
            self.encoder.save_pretrained(str(folder), selected_adapters=[_NAME])
        heads = {name: p.detach().cpu().contiguous() for name, p in self.heads.named_parameters()}
        save_file(heads, folder / "heads.safetensors", metadata={"pooling": self.pooling})


class _Row(NamedTuple):
    task: TaskData
    number: int


def _shuffled(tasks: Sequence[TaskData], generator: torch.Generator) -> Iterator[_Row]:
    """The rows of these tasks together, pass after pass, each in a new order."""
    rows = [_Row(task, number) for task in tasks for number in range(len(task.train))]
    while True:
        for position in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[position]


def _logits(
    model: NetworkModel, rows: Sequence[_Row], batches: BatchMaker
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Logits and labels of rows of several tasks, by task and in order, from one forward pass."""
    features = [choice for row in rows for choice in row.task.train.inputs[row.number]]
    names = [row.task.spec.name for row in rows for _ in range(row.task.spec.num_choices)]
    outputs = model.mixed(names, batches.pad(features))
    logits, labels = {}, {}
    for name, values in outputs.items():
        spec = model.specs[name]
        logits[name] = values.view(-1, spec.num_choices) if spec.num_choices > 1 else values
        own = [row.task.train.labels[row.number] for row in rows if row.task.spec.name == name]
        kind = torch.float32 if spec.is_regression else torch.long
        labels[name] = torch.tensor(own, dtype=kind, device=model.device)
    return logits, labels


def fit_network(
    model: NetworkModel,
    tasks: Sequence[TaskData],
    config: TrainingConfig,
    batches: BatchMaker,
    *,
    sampling: Literal["proportional", "mt_uncertainty"] = "proportional",
    sampler: UncertaintySampler | None = None,
) -> FitResult:
    """Trains a network on batches that mix the tasks, and leaves the best epoch in it.

    AdamW with linear warm-up and decay, as in `fit`; the loss is the mean over the tasks present. An epoch has as many
    updates as one pass over all rows takes. `"proportional"` shuffles the rows of all tasks together;
    `"mt_uncertainty"` lets each task offer a batch of candidates for every update and trains on the most uncertain.
    `draws` counts the rows that were trained on.

    Raises:
        ConfigError: If the arguments do not go together.
        DivergedError: If the loss becomes infinite or NaN.
    """
    require_one_of("sampling", sampling, SAMPLERS)
    if sampler is not None and sampling != "mt_uncertainty":
        raise ConfigError(f"sampler={sampler!r} has no effect with sampling={sampling!r}: leave it out.")
    if sampling == "mt_uncertainty":
        sampler = sampler or UncertaintySampler()
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    for task in tasks:
        if task.spec.is_regression:
            head = cast("nn.Linear", model.heads[task.spec.name])
            nn.init.constant_(head.bias, float(np.mean(task.train.labels)))
    parameters = model.trained_parameters()
    matrices = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
    )
    steps_per_epoch = math.ceil(sum(len(task.train) for task in tasks) / config.batch_size)
    steps = min(config.epochs * steps_per_epoch, config.max_steps or 10**12)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(config.warmup * steps), steps)
    streams = [_shuffled([task], generator) for task in tasks]
    everything = _shuffled(tasks, generator)

    def next_rows() -> list[_Row]:
        if sampler is None:
            return [next(everything) for _ in range(config.batch_size)]
        offered = {
            task.spec.name: [next(stream) for _ in range(min(config.batch_size, len(task.train)))]
            for task, stream in zip(tasks, streams, strict=True)
        }
        chosen = sampler.choose(
            model, lambda name, rows: _logits(model, rows, batches)[0][name], offered, config.batch_size
        )
        return [offered[name][number] for name, numbers in chosen.rows.items() for number in numbers]

    result = FitResult(steps=steps, seconds=0.0, best_epoch=0, draws={task.spec.name: 0 for task in tasks})
    best: dict[str, Tensor] = {}
    best_score = -math.inf
    model.train()
    with tqdm(total=steps, desc=" + ".join(result.draws), disable=not config.progress, unit="step") as bar:
        for epoch in range(1, math.ceil(steps / steps_per_epoch) + 1):
            for _ in range(min(steps_per_epoch, steps - (epoch - 1) * steps_per_epoch)):
                rows = next_rows()
                loss = multi_task_loss(*_logits(model, rows, batches))
                if not math.isfinite(loss.item()):
                    raise DivergedError(f"the loss is {loss.item()}; lower learning_rate (now {config.learning_rate})")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                for row in rows:
                    result.draws[row.task.spec.name] += 1
                bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
            scores = {}
            for task in tasks:
                metrics = score(task.spec, task.dev, predict(cast("Any", model), task.spec, task.dev, batches))
                scores[task.spec.name] = metrics[primary_metric(task.spec)]
            result.history.append(scores)
            if sum(scores.values()) > best_score:
                best_score, result.best_epoch = sum(scores.values()), epoch
                best = {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    model.eval()
    result.seconds = time.perf_counter() - start
    return result
