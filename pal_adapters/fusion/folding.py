"""A learned combination of sources as one plain adapter."""

from __future__ import annotations

from typing import Any

from pal_adapters.errors import UnsupportedError
from pal_adapters.hosts.which import host_of

from .penalty import no_adapters


def fold(model: Any, fusion: Any = None, *, name: str | None = None, **options: Any) -> Any:
    r"""Make one plain adapter of a fusion whose coefficients do not depend on the input.

    $\sum_s \omega_s \odot a_s$ of bottlenecks $a_s = W_{u,s} f(W_{d,s} x + b_{d,s}) + b_{u,s}$ is itself a bottleneck:
    its down-projection is that of all sources, one below the other, and the rows of its up-projection carry $\omega$.
    So the result is exact, its width is the sum of the sources' widths, and it needs neither the sources nor this
    package.

    Args:
        model: a model of `adapters`, or a `PeftModel`.
        fusion: `adapters`: the `Fuse` block, or the name of the fusion. PEFT: the name of the combination; None is the
            active one.
        name: of the new adapter. `adapters`: an ordinary bottleneck; save it with `save_adapter`. PEFT: an ordinary
            LoRA or Houlsby adapter; None keeps the name of the combination.
        **options:
            - `truncate`: the width or rank to cut it to. Of bottlenecks the units that matter most are kept, found by
              a singular value decomposition of what the units contribute to the output or by leaving out one after
              the other, whichever is better, and the up-projection is fitted anew to give what all of them gave. LoRA
              gets the best approximation of that rank, by singular values.
            - `data`: with `truncate`, for bottlenecks, batches (dicts of model inputs) whose tokens are weighed;
              without them, inputs are taken as N(0, 1).

    Returns:
        `adapters`: a `Folded`, and the model has the new adapter. PEFT: the folded model. Its `truncation_errors`
        are what `Folded.errors` are, see `pal_adapters.fusion.peft.folding.fold`.

    Raises:
        UnsupportedError: where no exact fold exists, with the reason: attention over the sources, sources that are no
            bottlenecks, or bottlenecks that differ in their non-linearity or placement, or have gates or norms behind.
        ConfigError: for a name that is taken, or options that have no effect.
        UnknownAdapterError: for a fusion that is not on the model.
    """
    host = host_of(model)
    if host == "adapters":
        from pal_adapters.fusion.adapters.folding import fold_adapters  # the host may be missing

        return fold_adapters(model, fusion, name, **options)
    if host == "peft":
        from pal_adapters.fusion.peft.folding import fold as fold_peft  # the host may be missing

        return fold_peft(model, fusion, name=name, **options)
    raise UnsupportedError(no_adapters(model))
