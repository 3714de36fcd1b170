"""The rows of a transfer report for a combination in PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.fusion.layer import Scales, SourceAttention
from pal_adapters.fusion.measuring import Kept, record_calls
from pal_adapters.fusion.units import CombinedUnit

from .layers import active_combinations, combinations, require_combination_name


class TransferRow(NamedTuple):
    """One number of a report.

    Attributes:
        place: the kind of module, the same in every block, such as `"attention.self.query"`.
        block: the index of the block; None outside the blocks.
        source: name of the source.
        value: its mean absolute coefficient at this place, or the mean attention it receives.
    """

    place: str
    block: int | None
    source: str
    value: float


def transfer_rows(
    model: nn.Module, adapter: str | None = None, *, data: Iterable[Any] | None = None
) -> list[TransferRow]:
    """Mean absolute coefficient, or mean attention, of each source at each place.

    Coefficients are those of inference, after an ablation. Shared ones are listed once per block.

    Args:
        model: a `PeftModel` with a combination.
        adapter: name of the combination; the active one by default. AdapterFusion: only the active one.
        data: AdapterFusion: batches (mappings of model inputs) over which attention is averaged. Padding is ignored.

    Raises:
        UnknownAdapterError: if there is no such combination.
        UnsupportedError: if no name is given and not exactly one combination is active.
        ConfigError: if AdapterFusion gets no `data`, or `data` is empty, has no mappings or has no effect.
    """
    require_combination_name("fusion", adapter)
    if adapter is None:
        active = active_combinations(model)
        if len(active) != 1:
            raise UnsupportedError(f"{len(active)} combinations are active, {active}: pass the name of one.")
        adapter = active[0]
    found = list(combinations(model, adapter))
    if not found:
        raise UnknownAdapterError(f"adapter={adapter!r} is not a combination on this model.")
    attentive = [
        (place, unit, site) for place, _, unit in found for site in unit.sites
        if isinstance(unit.mixer(site), SourceAttention)
    ]  # fmt: skip
    if not attentive:
        if data is not None:
            raise ConfigError("data has no effect: coefficients do not depend on the input.")
        return [row for place, _, unit in found for site in unit.sites for row in _coefficients(place, unit, site)]
    if data is None:
        raise ConfigError("the attention of AdapterFusion depends on the input: pass data=, batches of model inputs.")
    if adapter not in active_combinations(model):
        raise UnsupportedError(f"{adapter!r} is not active, so it computes no attention: call set_adapter first.")
    return _attention(model, attentive, data)


def start_of(model: nn.Module, adapter: str | None = None) -> float | None:
    """What each number of `transfer_rows` is before training; None for fixed coefficients."""
    name = active_combinations(model)[0] if adapter is None else adapter
    unit = next(unit for _, _, unit in combinations(model, name))
    mixer = unit.mixer(unit.sites[0])
    if isinstance(mixer, SourceAttention):  # attention starts nearly even
        return 1 / max(len(names) for names in unit.names.values())
    return mixer.start if isinstance(mixer, Scales) else None


def _named(place: str, unit: CombinedUnit, site: str) -> tuple[str, int | None]:
    """Kind of module and index of the block, from a module's name."""
    place = place.removeprefix("base_model.model.")
    number = re.search(r"\.(\d+)(?:\.|$)", place)
    kind = place if number is None else place[number.end() :]
    if site != "value":
        kind = f"{kind}.{site}" if kind else site
    return kind, None if number is None else int(number[1])


def _coefficients(place: str, unit: CombinedUnit, site: str) -> list[TransferRow]:
    values = unit.learned(site).float().abs().mean(1).tolist()
    return [TransferRow(*_named(place, unit, site), s, v) for s, v in zip(unit.names[site], values, strict=True)]


def _attention(
    model: nn.Module, attentive: list[tuple[str, CombinedUnit, str]], data: Iterable[Any]
) -> list[TransferRow]:
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}

    def record(key: int, args: Any, output: tuple[Tensor, Tensor], kept: Kept) -> None:
        weights = kept(output[1].double())
        sums[key] = sums.get(key, 0) + weights.sum(0)
        counts[key] = counts.get(key, 0) + len(weights)

    modules = {number: unit.mixer(site) for number, (_, unit, site) in enumerate(attentive)}
    record_calls(model, modules, record, data)
    return [
        TransferRow(*_named(place, unit, site), source, value)
        for number, (place, unit, site) in enumerate(attentive)
        for source, value in zip(unit.names[site], (sums[number] / counts[number]).tolist(), strict=True)
    ]
