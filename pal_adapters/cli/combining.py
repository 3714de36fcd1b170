"""The two stages of `pal-adapters transfer` in each host, through its public interface."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import pal_adapters
from pal_adapters.errors import ConfigError
from pal_adapters.multitask import add_adapter

from .shared import first_line


class InAdapters:
    """Bottlenecks of `adapters`, one after the feed-forward network of each block, and the host's fusions.

    A *setup* is what is active: the name of an adapter, or a `Fuse`.
    """

    def __init__(self, base: Any, reduction_factor: float, sources: Path) -> None:
        import adapters  # only here: the other host does without it

        adapters.init(base)
        self.model = base
        self._config = adapters.SeqBnConfig(reduction_factor=reduction_factor)

    def add(self, name: str) -> Any:
        self.model.add_adapter(name, config=self._config)
        return name

    def combine(self, name: str, sources: Sequence[str], method: str) -> Any:
        from adapters.composition import Fuse  # only here, see above

        average = pal_adapters.ScaLearnConfig(fixed=[1 / len(sources)] * len(sources))
        config: Any = {"fusion": "dynamic", "average": average}.get(method, method)
        fuse = Fuse(*sources, name=f"to_{name}")
        self.model.add_adapter_fusion(fuse, config=config)
        return fuse

    def fold(self, setup: Any, name: str) -> Any:
        return pal_adapters.fold(self.model, setup, name=name)

    def save(self, setup: Any, folder: Path) -> None:
        if isinstance(setup, str):
            self.model.save_adapter(str(folder), setup, use_safetensors=True)
        else:
            self.model.save_adapter_fusion(str(folder), setup, use_safetensors=True)

    def load(self, name: str, folder: Path) -> Any:
        self.model.load_adapter(str(folder), load_as=name, use_safetensors=True)
        return name


class InPeft:
    """LoRA of rank `width / reduction_factor` on the modules that PEFT adapts by default, and combinations of it.

    For a model that PEFT has no default for, LoRA is on all linear layers.

    PEFT cannot have LoRA and a combination on one model: `combine` unloads the sources and reads them, frozen, from
    where they were saved.
    """

    def __init__(self, base: Any, reduction_factor: float, sources: Path) -> None:
        self.model = base
        self._rank = max(1, int(base.config.hidden_size / reduction_factor))
        self._sources = sources

    def add(self, name: str) -> Any:
        import peft  # only here, and below: the other host does without it

        known = self.model.config.model_type in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        config = peft.LoraConfig(
            r=self._rank,
            lora_alpha=2 * self._rank,
            lora_dropout=0.0,
            target_modules=None if known else "all-linear",
            task_type="FEATURE_EXTRACTION",
        )
        self.model = add_adapter(self.model, name, config)
        return name

    def combine(self, name: str, sources: Sequence[str], method: str) -> Any:
        import peft  # only here, see above

        options: dict[str, Any] = {
            "adapters": {source: str(self._sources / source) for source in sources},
            "task_type": "FEATURE_EXTRACTION",
        }
        if method == "fusion":
            config: Any = pal_adapters.AdapterFusionPeftConfig(**options)
        elif method == "average":
            config = pal_adapters.FixedCombinationPeftConfig(**options)
        else:
            config = pal_adapters.ScaLearnPeftConfig(variant=method, **options)
        self.model = peft.get_peft_model(self.model.unload(), config, adapter_name=f"to_{name}")
        return f"to_{name}"

    def fold(self, setup: Any, name: str) -> Any:
        self.model = pal_adapters.fold(self.model, setup, name=name)
        return self.model

    def save(self, setup: Any, folder: Path) -> None:
        # PEFT creates a folder with the adapter's name.
        self.model.save_pretrained(str(folder.parent), selected_adapters=[setup])
        if setup != folder.name:
            folder.mkdir(exist_ok=True)
            for file in (folder.parent / setup).iterdir():
                file.replace(folder / file.name)
            (folder.parent / setup).rmdir()

    def load(self, name: str, folder: Path) -> Any:
        import peft  # only here, see above

        if isinstance(self.model, peft.PeftModel):
            self.model.load_adapter(str(folder), adapter_name=name)
        else:
            self.model = peft.PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
        return name


HOSTS = {"adapters": InAdapters, "peft": InPeft}


def draw(model: Any, setup: Any, batches: Iterable[Any] | None, path: Path, title: str) -> dict[str, Any]:
    """Prints and plots the weight of each source; for attention over the sources, this needs batches of inputs."""
    inputs = batches and [{n: t for n, t in batch.items() if isinstance(t, Tensor)} for batch in batches]
    table = pal_adapters.transfer_report(model, setup, data=inputs)
    for kind in ("png", "svg"):
        pal_adapters.plot_transfer(table, path.with_suffix(f".{kind}"), title=title)
    print(f"\n{table}\n")
    values: dict[str, Any] = table.to_dict()
    return values


def read_record(record: Path, made: dict[str, Any]) -> dict[str, Any]:
    """The saved result of a trained source, if it was trained with the given settings."""
    try:
        known = json.loads(record.read_text(encoding="utf-8"))
        result = dict(known.pop("result"))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{record}: cannot be read as the record of a source ({first_line(error)})") from error
    for key, value in made.items():
        if known.get(key) != value:
            raise ConfigError(f"{record}: the source was trained with {key}={known.get(key)}, not {value}")
    return result
