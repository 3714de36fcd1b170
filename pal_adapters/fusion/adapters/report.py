"""The transfer table of a fusion in `adapters`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from adapters.composition import Fuse
from adapters.methods.bottleneck import BottleneckLayer

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.fusion.measuring import batches_of, evaluating
from pal_adapters.fusion.types import TransferTable
from pal_adapters.hosts.adapters.fusion import combination_config, fusion_name, place_names, places
from pal_adapters.hosts.adapters.penalty import fusions_in

_SHORT = {"mh_adapter": "attention", "output_adapter": "output", "cross_adapter": "cross"}


def report_adapters(
    model: Any, fusion: Fuse | str | None, data: Iterable[Mapping[str, Any]] | None = None
) -> TransferTable:
    """See `pal_adapters.transfer_report`."""
    key = _key(model, fusion)
    config, names = model.adapters_config.get_fusion(key)
    if combination_config(config) is None:  # attention starts nearly even
        return _attention(model, key, names, data)
    if data is not None:
        raise ConfigError("data has no effect: the coefficients do not depend on the input. Leave it out.")
    layers = list(places(model, key))
    rows: list[list[float | None]] = []
    for _, layer in layers:
        place = layer.adapter_fusion_layer[key]
        with evaluating(place):
            values = place().abs().float().mean(1).tolist()
        rows.append([value if _acts(layer, name) else None for name, value in zip(names, values, strict=True)])
    labels = _labels(layers)
    if layers[0][1].adapter_fusion_layer[key].shared:
        columns = [[v for row in rows if (v := row[i]) is not None] for i in range(len(names))]
        labels, rows = ["all"], [[next(iter(column), None) for column in columns]]
    return TransferTable(list(names), labels, rows, start=layers[0][1].adapter_fusion_layer[key].start)


def _key(model: Any, fusion: Fuse | str | None) -> str:
    known = model.adapters_config.fusions
    if fusion is None:
        active = [fuse.name for fuse in fusions_in(model.active_adapters)]
        if len(active) != 1:
            raise UnsupportedError(
                f"{len(active)} fusions are active: pass the Fuse(...) of one of "
                f"{', '.join(map(repr, known)) or '(none)'}."
            )
        fusion = active[0]
    return fusion_name(model, fusion)


def _labels(layers: list[tuple[int, BottleneckLayer]]) -> list[str]:
    """`0`, `1`, ..., or `0 attention`, `0 output`, ... if a block has more than one place."""
    several = len({layer.location_key for _, layer in layers}) > 1
    labels = []
    for name in place_names(layers):
        *front, location = name.split(".")
        labels.append(" ".join([*front, _SHORT[location]] if several else front))
    return labels


def _attention(model: Any, key: str, names: list[str], data: Iterable[Mapping[str, Any]] | None) -> TransferTable:
    if data is None:
        raise ConfigError(
            "data=None is not allowed for AdapterFusion, whose weights depend on the input: pass batches."
        )
    base = model.base_model
    layers = list(places(model, key))
    if len({(i, layer.location_key) for i, layer in layers}) < len(layers):
        raise UnsupportedError(
            "the attention of AdapterFusion cannot be reported for an encoder-decoder: adapters keeps only the "
            "decoder's."
        )
    sums = {(i, layer.location_key): torch.zeros(len(names), dtype=torch.float64) for i, layer in layers}
    tokens = 0
    setup = model.active_adapters
    try:
        model.set_active_adapters(Fuse(*names, name=key))
        with evaluating(model):
            for batch, mask in batches_of(data):
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                found = base(**inputs, output_adapter_fusion_attentions=True).adapter_fusion_attentions[key]
                for index, layer in layers:
                    probabilities = torch.from_numpy(found[index][layer.location_key]).double()
                    keep = torch.ones(probabilities.shape[:2], dtype=torch.bool)
                    if mask is not None and mask.shape == keep.shape:
                        keep = mask.cpu()
                    present = torch.tensor([_acts(layer, name) for name in names])
                    sums[index, layer.location_key][present] += probabilities[keep].sum(0)
                tokens += int(keep.sum())
    finally:
        model.adapters_config.active_setup = setup
    if not tokens:
        raise ConfigError("data is empty: pass at least one batch of model inputs.")
    rows = []
    for (_, layer), total in zip(layers, sums.values(), strict=True):
        shares = (total / total.sum()).tolist()
        rows.append([share if _acts(layer, name) else None for name, share in zip(names, shares, strict=True)])
    return TransferTable(list(names), _labels(layers), rows, "mean attention", 1 / len(names))


def _acts(layer: BottleneckLayer, name: str) -> bool:
    task_layer = getattr(layer, "pal_adapters_task_layer", (None,))[0]
    return name in layer.adapters or (task_layer is not None and name in task_layer.pal_adapters)
