"""Two-stage transfer in PEFT: Houlsby bottlenecks as sources, and the combinations of `pal_adapters`."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import pal_adapters
from pal_adapters.fusion.layer import SourceAttention
from pal_adapters.fusion.peft import combinations

_KIND = "FEATURE_EXTRACTION"
_FUSION_WEIGHT = 0.01


class PeftTransfer:
    """Bottlenecks behind both branches of each block. The norms stay the base's, so that every combination folds.

    PEFT holds adapters of one type in a model. So the sources are saved and taken off when a combination comes, which
    reads them again; it is saved with copies of them.
    """

    def __init__(self, base: Any, reduction_factor: float) -> None:
        self.model: Any = base
        self._width = max(1, round(base.config.hidden_size / reduction_factor))
        self._sources: list[str] = []
        self._targets: dict[str, str] = {}
        self._methods: dict[str, str] = {}
        self._saved = Path(tempfile.mkdtemp(prefix="pal_adapters-sources-"))
        weakref.finalize(self, shutil.rmtree, self._saved, ignore_errors=True)

    def add(self, task: str) -> None:
        config = pal_adapters.HoulsbyPeftConfig(hidden_size=self._width, train_layernorm=False, task_type=_KIND)
        if self._sources:
            self.model.add_adapter(task, config)
        else:
            self.model = peft.get_peft_model(self.model, config, adapter_name=task)
        self._sources.append(task)

    def combine(self, task: str, sources: Sequence[str], method: str) -> None:
        if self._targets:
            raise pal_adapters.UnsupportedError(
                f"{task!r} would be the second target of one model in PEFT: combine for each target on its own model."
            )
        self.model.save_pretrained(str(self._saved), selected_adapters=list(sources))
        paths = {name: str(self._saved / name) for name in sources}
        options: dict[str, Any] = {"adapters": paths, "task_type": _KIND, "bundle": True}
        config: Any
        if method == "fusion":
            config = pal_adapters.AdapterFusionPeftConfig(**options, regularization=0.0)  # `penalty` gives it
        elif method == "average":
            config = pal_adapters.FixedCombinationPeftConfig(**options)
        else:
            config = pal_adapters.ScaLearnPeftConfig(**options, variant=method)
        name = f"to_{task}"
        self.model = peft.get_peft_model(self.model.unload(), config, adapter_name=name)
        self._targets[task], self._methods[task] = name, method

    def train(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.activate(task)

    def activate(self, task: str) -> None:
        self.model.set_adapter(self._targets.get(task, task))

    def penalty(self, task: str) -> Tensor | None:
        if self._methods.get(task) != "fusion":
            return None
        found = combinations(self.model, self._targets[task])
        mixers = {id(m): m for _, _, unit in found for site in unit.sites for m in [unit.mixer(site)]}
        terms = [m.regularization(_FUSION_WEIGHT) for m in mixers.values() if isinstance(m, SourceAttention)]
        return torch.stack(terms).sum()

    def table(self, task: str, data: Any) -> Any:
        data = data if self._methods[task] == "fusion" else None
        return pal_adapters.transfer_report(self.model, self._targets[task], data=data)

    def fold(self, task: str, name: str) -> Any:
        self.model = pal_adapters.fold(self.model, self._targets[task], name=name)
        self._targets[task] = name
        return self.model

    def save(self, task: str, directory: Path) -> None:
        name = self._targets.get(task, task)
        self.model.save_pretrained(str(directory), selected_adapters=[name])
        if name != task:
            shutil.rmtree(directory / task, ignore_errors=True)
            (directory / name).rename(directory / task)

    def load(self, task: str, directory: Path) -> None:
        path = str(directory / task)
        if self._sources:
            self.model.load_adapter(path, adapter_name=task)
        else:
            self.model = peft.PeftModel.from_pretrained(self.model, path, adapter_name=task)
        self._sources.append(task)
