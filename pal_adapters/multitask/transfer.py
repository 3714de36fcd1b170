"""Two-stage transfer: source adapters, one a task, and a learned combination of them for a new task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from pal_adapters.errors import ConfigError, require_one_of

from .models import MultiTaskModel, _installed
from .tasks import TaskSpec

COMBINATIONS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp", "fusion", "average")
"""Ways to combine sources. `fusion` is AdapterFusion, `average` weighs all sources alike and trains only a head."""

_FOLDED = "{}_folded"


class TransferHost(Protocol):
    """What the two stages need from a host; each is a few calls of its public interface.

    A *task* is a source's adapter or a combination; after `combine` the name of a source that is also the target means
    the combination.
    """

    model: nn.Module

    def add(self, task: str) -> None: ...

    def combine(self, task: str, sources: Sequence[str], method: str) -> None: ...

    def train(self, tasks: Iterable[str]) -> None: ...

    def activate(self, task: str) -> None: ...

    def penalty(self, task: str) -> Tensor | None: ...

    def table(self, task: str, data: Any) -> Any: ...

    def fold(self, task: str, name: str) -> Any: ...

    def save(self, task: str, directory: Path) -> None: ...

    def load(self, task: str, directory: Path) -> None: ...


class _AdaptersTransfer:
    """Bottlenecks of `adapters`, one behind the feed-forward part of each block, and the host's fusions."""

    def __init__(self, base: Any, reduction_factor: float) -> None:
        import adapters

        adapters.init(base)
        self.model = base
        self._config = adapters.SeqBnConfig(reduction_factor=reduction_factor)
        self._fusions: dict[str, Any] = {}
        self._methods: dict[str, str] = {}

    def add(self, task: str) -> None:
        self.model.add_adapter(task, config=self._config)

    def combine(self, task: str, sources: Sequence[str], method: str) -> None:
        from adapters.composition import Fuse

        from pal_adapters import ScaLearnConfig

        config: Any = {"fusion": "dynamic", "average": ScaLearnConfig(fixed=[1 / len(sources)] * len(sources))}
        fuse = Fuse(*sources, name=f"to_{task}")
        self.model.add_adapter_fusion(fuse, config=config.get(method, method))
        self._fusions[task], self._methods[task] = fuse, method

    def train(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            if task in self._fusions:
                self.model.train_adapter_fusion(self._fusions[task])
            else:
                self.model.train_adapter(task)

    def activate(self, task: str) -> None:
        self.model.set_active_adapters(self._fusions.get(task, task))

    def penalty(self, task: str) -> Tensor | None:
        # The host's trainer adds this one behind the optimizer's step, where loss scaling misses it.
        return self.model.get_fusion_regularization_loss() if self._methods.get(task) == "fusion" else None

    def table(self, task: str, data: Any) -> Any:
        from pal_adapters import transfer_report

        return transfer_report(self.model, self._fusions[task], data=data if self._methods[task] == "fusion" else None)

    def fold(self, task: str, name: str) -> Any:
        from pal_adapters import fold

        folded = fold(self.model, self._fusions[task], name=name)
        self._fusions[task] = name
        return folded

    def save(self, task: str, directory: Path) -> None:
        what = self._fusions.get(task, task)
        folder = str(directory / task)
        if isinstance(what, str):
            self.model.save_adapter(folder, what, use_safetensors=True)
        else:
            self.model.save_adapter_fusion(folder, what, use_safetensors=True)

    def load(self, task: str, directory: Path) -> None:
        self.model.load_adapter(str(directory / task), load_as=task, use_safetensors=True)


def _make_host(name: str, base: Any, reduction_factor: float) -> TransferHost:
    if name == "adapters":
        return _AdaptersTransfer(base, reduction_factor)
    if not _installed("peft"):
        raise ConfigError("host='peft' is not available here: pip install 'pal-adapters[peft]'.")
    from .transfer_peft import PeftTransfer

    return PeftTransfer(base, reduction_factor)


class TransferModel(MultiTaskModel):
    """A frozen base, source adapters on it, and combinations of them, each with a linear head.

    `add_task` adds a source to train, `load_task` one that was saved, `combine` a target. `fit`, `predict` and `score`
    treat a target as any other task.

    Args:
        base: A model of `transformers.AutoModel`. It is changed: frozen, and given the adapters.
        host: `"adapters"` or `"peft"`.
        reduction_factor: Width of the base over the width of a source's bottleneck.
        pooling: `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
        dropout: Dropout on the input of the heads.

    Raises:
        ConfigError: If the arguments do not go together.
    """

    def __init__(
        self,
        base: Any,
        *,
        host: Literal["adapters", "peft"] = "adapters",
        reduction_factor: float = 16,
        pooling: Literal["mean", "cls"] = "mean",
        dropout: float = 0.1,
    ) -> None:
        nn.Module.__init__(self)
        require_one_of("host", host, ("adapters", "peft"))
        require_one_of("pooling", pooling, ("mean", "cls"))
        parameters, width = dict(base.named_parameters()), base.config.hidden_size
        if not 0 < reduction_factor <= width:
            raise ConfigError(f"reduction_factor={reduction_factor} is not allowed: use a number from 1 to {width}.")
        self.method, self.joint = "transfer", False
        self.host_name, self.trains_base, self.pooling = host, False, pooling
        self._transfer = _make_host(host, base, reduction_factor)
        self._begin(self._transfer, parameters, width, dropout)

    def combine(self, spec: TaskSpec, sources: Sequence[str], method: str) -> None:
        """Adds a combination of sources, and a new head, for a task.

        A source's own head is not used; if the task is one of the sources, its head is replaced.

        Args:
            spec: The target.
            sources: Names of tasks that were added or loaded.
            method: One of `COMBINATIONS`.
        """
        require_one_of("method", method, COMBINATIONS)
        missing = [name for name in sources if name not in self.heads]
        if not sources or missing:
            raise ConfigError(f"sources={list(sources)} is not allowed: use names among {list(self.heads)}.")
        self._grow(spec, lambda: self._transfer.combine(spec.name, sources, method))

    def penalty(self, task: str) -> Tensor | None:
        return self._transfer.penalty(task)

    def table(self, task: str, data: Any = None) -> Any:
        """The `TransferTable` of a target; `data` are batches of inputs, which AdapterFusion needs."""
        self._active = None
        return self._transfer.table(task, data)

    def fold(self, task: str) -> Any:
        """Folds a target's combination into one plain adapter, which then takes its place.

        Raises:
            UnsupportedError: For a combination that has no exact fold.
        """
        folded = self._transfer.fold(task, _FOLDED.format(task))
        self._active = None
        self.encoder = self._transfer.model
        return folded
