"""The PEFT tuners of ScaLearn, AdapterFusion and fixed combinations of source adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.config import VARIANTS
from pal_adapters.fusion.layer import Scales, SourceAttention
from pal_adapters.fusion.units import (
    CombinedUnit,
    FixedScales,
    HeldWeights,
    NormCopies,
    SourceGroup,
    StackedSources,
    UnitSources,
)
from pal_adapters.hooks.penalty import unwatch, watch
from pal_adapters.hosts.peft.tuner import TaskTuner, register

from .config import (
    ADAPTER_FUSION,
    FIXED_COMBINATION,
    SCALEARN,
    AdapterFusionPeftConfig,
    CombinationPeftConfig,
    FixedCombinationPeftConfig,
    ScaLearnPeftConfig,
)
from .layers import FusionBlockLayer, FusionLayer, FusionModuleLayer, FusionNormLayer, combinations
from .parts import UnitPart
from .penalty import add_regularization, regularization_loss
from .places import Place, places_of
from .sources import Source, check_bases, check_model, innermost, read_source

__all__ = [
    "AdapterFusionPeftConfig",
    "FixedCombinationPeftConfig",
    "ScaLearnPeftConfig",
    "combinations",
    "regularization_loss",
]


class CombinationTuner(TaskTuner):
    """Base of the tuners that combine sources."""

    tuner_layer_cls = BaseTunerLayer  # layers of other adapters on the model are disabled too

    def _prepare_adapter_config(  # type: ignore[override]
        self, peft_config: CombinationPeftConfig, model_config: dict[str, Any]
    ) -> CombinationPeftConfig:
        check_model(self.model)
        peft_config.check_adapters()
        peft_config.check_weights()
        sources = {name: self._source(peft_config, name) for name in peft_config.adapters}
        for name, fingerprint in (peft_config.fingerprints or {}).items():
            if sources[name].fingerprint != fingerprint:
                raise ConfigError(
                    f"source {name!r} from {sources[name].path!r} is not the one that was combined: its weights have "
                    f"the fingerprint {sources[name].fingerprint}, not {fingerprint}. Restore it, or load with "
                    "fingerprints=None in the config to use it as it is."
                )
        if peft_config.check_base:
            check_bases(sources.values(), self.model)
        # As elsewhere in PEFT, modules that are trained and saved as a whole get no adapter.
        trained = peft_config.modules_to_save or ()
        places = places_of(sources)
        self._plan = {p: v for p, v in places.items() if not any(f".{name}." in f".{p}." for name in trained)}
        self._check_plan(peft_config)
        peft_config.remember(sources)
        self._mixers: dict[str, nn.Module] = {}
        self._held: dict[tuple[str, int], HeldWeights] = {}
        self._excluded = set()
        return peft_config

    def _source(self, config: CombinationPeftConfig, name: str) -> Source:
        path, revision = config.place_of(name)
        if path is None and name not in self._adapters_on_model():
            for other in self.peft_config.values():  # loaded by another combination
                if isinstance(other, CombinationPeftConfig) and other is not config and name in other.adapters:
                    path, revision = other.place_of(name)
                    break
        if path is None and name not in self._adapters_on_model():
            raise UnknownAdapterError(
                f"source {name!r} is not on the model, which has {self._adapters_on_model()}: pass the path or Hub "
                f"repo ID of a saved adapter, adapters={{{name!r}: '<path>'}}, or add the adapter to the model first."
            )
        return read_source(self.model, name, path, revision)

    def _adapters_on_model(self) -> list[str]:
        return sorted(n for n, c in self.peft_config.items() if not isinstance(c, CombinationPeftConfig))

    def _check_plan(self, config: Any) -> None:
        """Reject places at which the method cannot combine sources."""

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        return key in self._plan

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._plan, self._mixers, self._held = {}, {}, {}  # the sources are on the model now
        watch(model, add_regularization)

    def _put(self, config: Any, adapter_name: str, target: nn.Module, name: str, parent: nn.Module, path: str) -> None:
        place = self._plan[path]
        mixers, owned, rows, shared = {}, [], {}, None
        for site in place.sites:
            key, names, width = self._mixer_key(config, place, site)
            if key not in self._mixers:
                self._mixers[key] = self._make_mixer(config, names, width)
                if self._shares(config):
                    shared = self._mixers[key]
            if not self._shares(config):
                owned.append(site)
            mixers[site] = self._mixers[key]
            here = place.names(site)
            rows[site] = None if here == names else [names.index(source) for source in here]
        unit = CombinedUnit(
            place.sites,
            mixers,
            owned,
            rows,
            {site: place.names(site) for site in place.sites},
            needs=self._needs(place),
            regularization=config.penalty,
        )
        layer = self._layer(place, target, parent, name)
        layer.add(adapter_name, unit, self._groups(place, target), shared, inference_mode=config.inference_mode)
        self._freeze_inactive(layer, adapter_name)

    # Coefficients

    def _shares(self, config: Any) -> bool:
        """Whether places share their coefficients."""
        return False

    def _mixer_key(self, config: Any, place: Place, site: str) -> tuple[str, list[str], int]:
        """The key of a place's coefficients, the sources they are for, and their width."""
        return f"{place.path} {site}", place.names(site), place.width

    def _make_mixer(self, config: Any, names: Sequence[str], width: int) -> nn.Module:
        raise NotImplementedError

    def _needs(self, place: Place) -> tuple[str, ...]:
        if place.kind != "block":
            return ()
        return tuple({need for part in place.parts.values() for need in part.unit.needs})

    # Layers and sources

    def _layer(self, place: Place, target: nn.Module, parent: nn.Module, name: str) -> FusionLayer:
        layer: Any = target if isinstance(target, FusionNormLayer) else target._modules.get(self.method.name)
        if layer is not None:
            return layer
        if place.kind == "norm":
            layer = FusionNormLayer(self.model, target, parent, name, self.method)
            setattr(parent, name, layer)
        else:
            if place.kind == "block":
                assert place.block is not None
                layer = FusionBlockLayer(self.model, place.block, self.method)
            else:
                layer = FusionModuleLayer(self.model, target, self.method, place.width)
            target.add_module(self.method.name, layer)
        layer.train(self.model.training)
        return layer

    def _groups(self, place: Place, target: nn.Module) -> list[SourceGroup]:
        parts = list(place.parts.values())
        if place.kind == "norm":
            base = dict(innermost(target).named_parameters(recurse=False))
            return [NormCopies(range(len(parts)), [part.weights for part in parts], base)]
        if place.kind == "block":
            return [self._units(place, parts)]
        groups: list[SourceGroup] = []
        for lora in (True, False):
            pairs = {row: part for row, part in enumerate(parts) if part.is_lora is lora}
            if pairs:
                groups.append(StackedSources(pairs, list(pairs.values())))
        return groups

    def _units(self, place: Place, parts: Sequence[UnitPart]) -> UnitSources:
        shared, first = [], False
        for name, part in place.parts.items():
            key = (name, id(part.shared))
            if key not in self._held:
                self._held[key] = HeldWeights(part.shared)
                first = True
            shared.append(self._held[key])
        return UnitSources(range(len(parts)), [p.unit for p in parts], [p.own for p in parts], shared, registers=first)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not any(isinstance(config, CombinationPeftConfig) for config in self.peft_config.values()):
            unwatch(self.model, add_regularization)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        unwatch(model, add_regularization)
        return model


class ScaLearnModel(CombinationTuner):
    """The tuner of ScaLearn."""

    method = SCALEARN

    def _shares(self, config: ScaLearnPeftConfig) -> bool:
        return not VARIANTS[config.variant][1]

    def _mixer_key(self, config: ScaLearnPeftConfig, place: Place, site: str) -> tuple[str, list[str], int]:
        by_channel = VARIANTS[config.variant][0]
        key, names, width = super()._mixer_key(config, place, site)
        width = place.width if by_channel else 1
        if not self._shares(config):
            return key, names, width
        if not by_channel:
            return "all", list(config.adapters), 1
        alike = [p for p in self._plan.values() if p.label == place.label and p.width == place.width]
        names = [name for name in config.adapters if any(name in other.parts for other in alike)]
        return f"{place.label} {place.width}", names, width

    def _make_mixer(self, config: ScaLearnPeftConfig, names: Sequence[str], width: int) -> nn.Module:
        total = len(config.adapters)
        return Scales(
            len(names),
            width,
            init_scale=config.init_scale * len(names) / total,
            init_std=config.init_std,
            dropout=config.omega_dropout or 0.0,
            ablation=config.ablation,  # type: ignore[arg-type]
        )


class AdapterFusionModel(CombinationTuner):
    """The tuner of AdapterFusion."""

    method = ADAPTER_FUSION

    def _check_plan(self, config: AdapterFusionPeftConfig) -> None:
        modules = dict(self.model.named_modules())
        for path in [path for path, place in self._plan.items() if place.kind == "norm"]:
            base = dict(innermost(modules[path]).named_parameters(recurse=False))
            for name, part in self._plan[path].parts.items():
                if any(not torch.equal(part.weights[k].cpu(), w.detach().float().cpu()) for k, w in base.items()):
                    raise UnsupportedError(
                        f"source {name!r} has its own layer norms ({path!r}), over which attention is not defined: "
                        "train the sources with train_layernorm=False, or use ScaLearnPeftConfig, which combines "
                        "norms."
                    )
            del self._plan[path]

    def _make_mixer(self, config: AdapterFusionPeftConfig, names: Sequence[str], width: int) -> nn.Module:
        return SourceAttention(
            width,
            dropout=config.score_dropout,
            value=config.value,
            value_init_noise=config.value_init_noise,  # type: ignore[arg-type]
            temperature=config.temperature,
            score_scale=config.score_scale,
        )

    def _needs(self, place: Place) -> tuple[str, ...]:
        return (*super()._needs(place), "x") if place.kind == "block" else ()


class FixedCombinationModel(CombinationTuner):
    """The tuner of fixed combinations."""

    method = FIXED_COMBINATION

    def _make_mixer(self, config: FixedCombinationPeftConfig, names: Sequence[str], width: int) -> nn.Module:
        return FixedScales([config.coefficient(name) for name in names])


register(SCALEARN, ScaLearnPeftConfig, ScaLearnModel)
register(ADAPTER_FUSION, AdapterFusionPeftConfig, AdapterFusionModel)
register(FIXED_COMBINATION, FixedCombinationPeftConfig, FixedCombinationModel)
