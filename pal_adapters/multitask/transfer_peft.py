"""Two-stage transfer in PEFT: LoRA sources and the combinations of `pal_adapters`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import pal_adapters
from pal_adapters.errors import ConfigError
from pal_adapters.fusion.layer import SourceAttention
from pal_adapters.fusion.peft import combinations

_TYPE: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION"}
_FUSION_WEIGHT = 0.01


class PeftTransfer:
    """LoRA on the modules that PEFT adapts by default, of rank `width / reduction_factor`; see `TransferHost`.

    The host does not hold LoRA and a combination in one model. `combine` takes the sources off and reads them, frozen,
    from where `save` or `load` have seen them.
    """

    def __init__(self, base: Any, reduction_factor: float) -> None:
        self.model = base
        self._rank = max(1, int(base.config.hidden_size / reduction_factor))
        self._folders: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._methods: dict[str, str] = {}

    def _name(self, task: str) -> str:
        return self._names.get(task, task)

    def add(self, task: str) -> None:
        config = peft.LoraConfig(r=self._rank, lora_alpha=2 * self._rank, lora_dropout=0.0, **_TYPE)
        if isinstance(self.model, peft.PeftModel):
            self.model.add_adapter(task, config)
        else:
            self.model = peft.get_peft_model(self.model, config, adapter_name=task)

    def combine(self, task: str, sources: Sequence[str], method: str) -> None:
        configs: Any = pal_adapters
        unsaved = [name for name in sources if name not in self._folders]
        if unsaved:
            raise ConfigError(f"sources={list(sources)} is not allowed: save_task or load_task {unsaved[0]!r} first.")
        options = {"adapters": {name: self._folders[name] for name in sources}, **_TYPE}
        if method == "fusion":
            config = configs.AdapterFusionPeftConfig(**options, regularization=0.0)  # `penalty` gives it
        elif method == "average":
            config = configs.FixedCombinationPeftConfig(**options)
        else:
            config = configs.ScaLearnPeftConfig(variant=method, **options)
        name = f"to_{task}"
        self.model = peft.get_peft_model(self.model.unload(), config, adapter_name=name)
        self._names[task], self._methods[task] = name, method

    def train(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.activate(task)

    def activate(self, task: str) -> None:
        self.model.set_adapter(self._name(task))

    def penalty(self, task: str) -> Tensor | None:
        if self._methods.get(task) != "fusion":
            return None
        found = combinations(self.model, self._name(task))
        mixers = {id(m): m for _, _, unit in found for site in unit.sites for m in [unit.mixer(site)]}
        terms = [m.regularization(_FUSION_WEIGHT) for m in mixers.values() if isinstance(m, SourceAttention)]
        return torch.stack(terms).sum()

    def table(self, task: str, data: Any) -> Any:
        self.activate(task)
        data = data if self._methods[task] == "fusion" else None
        return pal_adapters.transfer_report(self.model, self._name(task), data=data)

    def fold(self, task: str, name: str) -> Any:
        self.activate(task)
        self.model = pal_adapters.fold(self.model, self._name(task), name=name)
        self._names[task] = name
        return self.model

    def save(self, task: str, directory: Path) -> None:
        name = self._name(task)
        # The host makes a folder of the adapter's name by itself.
        self.model.save_pretrained(str(directory), selected_adapters=[name])
        if name == task:
            self._folders[task] = str(directory / task)
        else:
            for file in (directory / name).iterdir():
                file.replace(directory / task / file.name)
            (directory / name).rmdir()

    def load(self, task: str, directory: Path) -> None:
        path = str(directory / task)
        if isinstance(self.model, peft.PeftModel):
            self.model.load_adapter(path, adapter_name=task)
        else:
            self.model = peft.PeftModel.from_pretrained(self.model, path, adapter_name=task)
        self._folders[task] = path
