"""Restores what `AdapterTrainer` omits of this package's fusions when it loads a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapters.heads import ModelWithFlexibleHeadsAdaptersMixin

from .fusion import combination_config
from .penalty import fusions_in


def load_adapter_fusions(original: Any) -> Any:
    """`AdapterTrainer._load_adapter_fusions`; the host loads only fusions whose folder name contains a comma."""

    def wrapper(self: Any, resume_from_checkpoint: str) -> None:
        original(self, resume_from_checkpoint)
        for name in _ours(self.model):
            folder = Path(resume_from_checkpoint, name)
            if "," not in name and (folder / "adapter_fusion_config.json").is_file():
                self.model.load_adapter_fusion(str(folder))

    return wrapper


def load_best_model(original: Any) -> Any:
    """`AdapterTrainer._load_best_model`; the host restores only heads that are named like an adapter."""

    def wrapper(self: Any) -> None:
        original(self)
        active = {fuse.name for fuse in fusions_in(self.model.active_adapters)}
        if active & set(_ours(self.model)) and isinstance(self.model, ModelWithFlexibleHeadsAdaptersMixin):
            self._load_heads(self.state.best_model_checkpoint)

    return wrapper


def _ours(model: Any) -> list[str]:
    known = model.adapters_config
    return [name for name in known.fusions if combination_config(known.get_fusion(name)[0]) is not None]
