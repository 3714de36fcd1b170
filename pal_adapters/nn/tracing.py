"""Whether a call is traced into a graph, where sizes may be symbols and values are unknown."""

from __future__ import annotations

import torch


def tracing() -> bool:
    """Whether `torch.compile` or `torch.export` is tracing the call of this thread.

    `torch.compiler.is_compiling` is true in all threads while one of them compiles or exports. A call that
    `torch.export` traces runs under the dispatch modes of its own thread.
    """
    if torch.compiler.is_dynamo_compiling():  # a constant for `torch.compile`, which does not trace the line below
        return True
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def exporting() -> bool:
    """Whether `torch.export` is tracing the call of this thread."""
    return tracing() and not torch.compiler.is_dynamo_compiling()
