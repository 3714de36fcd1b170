"""Folding: a learned combination of sources becomes one plain adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pal_adapters.checks import require_int
from pal_adapters.errors import ConfigError

from .arguments import require_host


def check_fold(model: Any, fusion: Any = None) -> None:
    """Check whether `fold` can turn a fusion into one adapter, which does not depend on what the fusion learns.

    Call it before training; the model does not change.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        fusion: see `fold`.

    Raises:
        UnsupportedError: if there is no exact fold, with the reason.
        ConfigError: if `fusion` is not a fusion.
        UnknownAdapterError: if the fusion is not on the model.
    """
    if require_host(model) == "adapters":
        from pal_adapters.fusion.adapters.folding import check_fold_adapters  # the host may be missing

        return check_fold_adapters(model, fusion)
    from pal_adapters.fusion.peft.folding import check_fold as check_fold_peft  # the host may be missing

    return check_fold_peft(model, fusion)


def fold(
    model: Any,
    fusion: Any = None,
    *,
    name: str | None = None,
    truncate: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> Any:
    r"""Turn a fusion whose coefficients do not depend on the input into one plain adapter.

    $\sum_s \omega_s \odot a_s$ of bottlenecks $a_s = W_{u,s} f(W_{d,s} x + b_{d,s}) + b_{u,s}$ is itself a bottleneck:
    stack the down-projections of all sources, and scale the rows of their up-projections by $\omega$. The result is
    exact, its width is the sum of the sources' widths, and it needs neither the sources nor this package.

    Everything that can rule a fold out is checked before the model changes.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        fusion: `adapters`: the `Fuse` block or the name of the fusion. PEFT: the name of the combination, or None for
            the active one.
        name: name of the new adapter. `adapters`: an ordinary bottleneck, to be saved with `save_adapter`. PEFT: an
            ordinary LoRA or Houlsby adapter; None keeps the name of the combination.
        truncate: maximum width or rank of the result. For bottlenecks, the most important units are kept (selected by
            an SVD of their contributions or by backward elimination, whichever is better) and the up-projection is
            refitted by least squares. For LoRA, the best approximation of that rank, by SVD.
        data: with `truncate`, for bottlenecks: batches (dicts of model inputs) over whose tokens the error is
            measured. Without data, the inputs are assumed to be N(0, 1).

    Returns:
        `adapters`: a `Folded`; the model has the new adapter. PEFT: the folded model, whose `truncation_errors`
        correspond to `Folded.errors`, see `pal_adapters.fusion.peft.folding.fold`.

    Raises:
        UnsupportedError: if there is no exact fold, with the reason: attention over the sources, sources that are not
            bottlenecks, or bottlenecks that differ in non-linearity or placement, or that have gates or norms.
        ConfigError: if `fusion` is not a fusion, the name is taken, or an option has no effect.
        UnknownAdapterError: if the fusion is not on the model.
    """
    host = require_host(model)
    if truncate is not None:
        require_int("truncate", truncate, minimum=1)
    elif data is not None:
        raise ConfigError("data has no effect without truncate: leave it out.")
    if host == "adapters":
        from pal_adapters.fusion.adapters.folding import fold_adapters  # the host may be missing

        return fold_adapters(model, fusion, name, truncate, data)
    from pal_adapters.fusion.peft.folding import fold as fold_peft  # the host may be missing

    return fold_peft(model, fusion, name, truncate, data)
