"""Transfer reports: how much each source of a fusion counts in each block, as a table and a heat map."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.files import replacing

from .arguments import require_host
from .types import TransferTable


def transfer_report(
    model: Any, fusion: Any = None, *, data: Iterable[Mapping[str, Any]] | None = None
) -> TransferTable:
    """How much each source of a fusion counts in each block.

    ScaLearn: the mean absolute coefficient over the channels, without dropout and after an ablation's normalisation.
    AdapterFusion: the attention that tokens pay to each source, averaged over a data set; it sums to one per block.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        fusion: the `Fuse` block, or the name of the fusion or PEFT adapter; None for the active one.
        data: AdapterFusion only: batches (dicts of the base model's inputs, on its device). Padding is ignored.

    Raises:
        ConfigError: if `fusion` is not a fusion, or `data` has no effect, is missing or is empty.
        UnknownAdapterError: if the fusion is not on the model.
        UnsupportedError: if the model has no adapters, or not exactly one active fusion.
    """
    if require_host(model) == "adapters":
        from pal_adapters.fusion.adapters.report import report_adapters  # the host may be missing

        return report_adapters(model, fusion, data)
    from pal_adapters.fusion.peft.report import start_of, transfer_rows  # the host may be missing

    rows = transfer_rows(model, fusion, data=data)
    return table_of_rows(rows, "mean |coefficient|" if data is None else "mean attention", start_of(model, fusion))


def table_of_rows(
    rows: Iterable[tuple[str, int | None, str, float]], measure: str, start: float | None = None
) -> TransferTable:
    """A table from rows `(kind of module, block, source, value)`, in their order; None if a source is missing."""
    rows = list(rows)
    kinds = {kind for kind, _, _, _ in rows}
    values: dict[tuple[int | None, str], dict[str, float]] = {}
    for kind, block, source, value in rows:
        values.setdefault((block, kind), {})[source] = value
    sources = list(dict.fromkeys(source for _, _, source, _ in rows))

    def name(block: int | None, kind: str) -> str:
        if block is None:
            return kind
        return f"{block}.{kind}" if len(kinds) > 1 else str(block)

    return TransferTable(
        sources,
        [name(*place) for place in values],
        [[row.get(s) for s in sources] for row in values.values()],
        measure,
        start,
    )


def plot_transfer(
    table: Any, path: str | os.PathLike[str] | None = None, *, title: str = "", ax: Any = None, **options: Any
) -> Any:
    """Draw a heat map of sources by blocks. Needs matplotlib.

    Colours are centred on the value before training, so that what was learned can be seen. Places where a source does
    not act are blank.

    Args:
        table: a `TransferTable`, or a model to call `transfer_report(model, **options)` on.
        path: where to save the figure, `.png` or `.svg`; None to not save it.
        title: title of the figure.
        ax: matplotlib axes to draw into, not together with `path`; None creates a figure.
        **options: arguments of `transfer_report`.

    Returns:
        The matplotlib figure.

    Raises:
        ConfigError: for another file format, or options that have no effect.
        StorageError: if the figure cannot be saved; an earlier file stays as it was.
    """
    if path is not None and Path(path).suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"path={os.fspath(path)!r} is not allowed: use a file name ending in .png or .svg.")
    if path is not None and ax is not None:
        raise ConfigError("path is not allowed together with ax: save the figure of the axes yourself.")
    if not isinstance(table, TransferTable):
        table = transfer_report(table, **options)
    elif options:
        raise ConfigError(f"{next(iter(options))} has no effect on a table: remove it.")
    try:
        from matplotlib.figure import Figure  # only here: nothing else needs it
    except ImportError as error:
        raise ImportError("plot_transfer needs matplotlib: pip install 'matplotlib>=3.9'.") from error
    places, sources = len(table.places), len(table.sources)
    if ax is None:
        figure = Figure(figsize=(2.6 + 0.62 * max(places, 3), 1.6 + 0.42 * sources), layout="constrained")
        ax = figure.add_subplot()
    else:
        figure = ax.figure
    columns = [[math.nan if (v := row[i]) is None else v for row in table.values] for i in range(sources)]
    present = [v for row in columns for v in row if not math.isnan(v)]
    start = table.start
    if start is None:
        low, high, colours = 0.0, max(present, default=0.0) or 1.0, "viridis"
    else:  # what was learned is often a small change
        span = max((abs(v - start) for v in present), default=0.0) or 1.0
        low, high, colours = start - span, start + span, "RdBu_r"
    digits = 2 if start is None else min(max(2, 1 - math.floor(math.log10(high - start))), 5)
    image = ax.imshow(columns, cmap=colours, vmin=low, vmax=high, aspect="auto")
    ax.set_xticks(range(places), table.places, rotation=45 if max(map(len, table.places)) > 3 else 0)
    ax.set_yticks(range(sources), table.sources)
    ax.set_xlabel("block")
    ax.set_ylabel("source")
    ax.set_title(title)
    if places <= 24:
        for y, row in enumerate(columns):
            for x, value in enumerate(row):
                if math.isnan(value):
                    continue
                dark = value < 0.6 * high if start is None else abs(value - start) > 0.6 * (high - start)
                colour = "white" if dark else "black"
                ax.text(x, y, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=colour)
    label = table.measure if start is None else f"{table.measure}, {start:.3g} before training"
    figure.colorbar(image, ax=ax, label=label)
    if path is not None:
        with replacing(Path(path)) as file:
            figure.savefig(file, dpi=150)
    return figure
