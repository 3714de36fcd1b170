"""Export of models as graphs, by `torch.export` or to ONNX, with a batch and a length of any size."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pal_adapters.checks import MODEL, shown
from pal_adapters.errors import ConfigError, UnsupportedError, how_to_install
from pal_adapters.files import replacing


class _Named(nn.Module):
    """A model whose inputs are named tensors and whose output is a dictionary of tensors.

    Args:
        model: the model.
        names: its inputs in the graph.
        fixed: further arguments of the model, which are not inputs of the graph.
    """

    def __init__(self, model: nn.Module, names: list[str], fixed: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model

        def forward(**inputs: Tensor) -> dict[str, Tensor]:
            return dict(_tensors(model(**inputs, **fixed)))

        # `torch.export` names the graph's inputs after the parameters of `forward`. Every function may have a
        # `__signature__`, which `inspect` reads and type checkers do not know.
        named = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__signature__ = inspect.Signature(named)  # type: ignore[attr-defined]
        self.forward = forward


def _tensors(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output by name; those of a tuple get numbers."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for field, value in output.items():
            yield from _tensors(value, field)
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from _tensors(value, f"{name}.{number}")
    elif output is not None:
        raise UnsupportedError(
            f"the model returns {name} of type {type(output).__name__}, which no graph has: pass use_cache=False to "
            "export a decoder."
        )


def export_program(model: nn.Module, inputs: Mapping[str, Tensor], **fixed: Any) -> torch.export.ExportedProgram:
    """Export a model with its active adapters by `torch.export`, in eval mode.

    The first dimension of each input is the batch, the second (if any) the length; both have any size in the graph.
    `task_ids` is an input like any other: an integer tensor `[b]`.

    Args:
        model: a model of `adapters` or of `transformers`, a `PeftModel`, or a `TaskHeads`.
        inputs: example inputs by name, as a tokenizer returns them, with at least two examples of two tokens: a size
            of 1 would become a constant.
        **fixed: further arguments of the model, which become constants of the graph, such as `task_ids="rte"` for one
            task of a `TaskHeads`, or `use_cache=False` for a decoder.

    Returns:
        The program. Its inputs have the names in `inputs`. Its output is a dictionary of tensors: the fields of the
        model's output, and for a `TaskHeads` the logits of each task, `[b, ...]`, of which only the entries of
        that task's examples are meaningful.

    Raises:
        ConfigError: if `inputs` has no tensors or a size of 1.
        UnsupportedError: for anything a graph cannot express; the message says what to do instead.

    Example:
        ```python
        inputs = tokenizer(["a fine film", "a dull one"], return_tensors="pt")
        program = export_program(model, inputs)
        logits = program.module()(**inputs)["logits"]
        ```
    """
    MODEL("model", model)
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"inputs={shown(inputs)} is not allowed: pass a mapping of tensors, as a tokenizer returns.")
    inputs = dict(inputs)
    _check(inputs, fixed)
    any_size = torch.export.Dim.DYNAMIC
    sizes = {name: dict.fromkeys(range(min(value.dim(), 2)), any_size) for name, value in inputs.items()}
    modes = {module: module.training for module in model.modules()}
    try:
        # With gradients, attention over a mask that trains would be traced as another kernel.
        with torch.no_grad():
            graph = _Named(model, list(inputs), fixed).eval()
            return torch.export.export(graph, (), inputs, dynamic_shapes=sizes, strict=False)
    finally:
        for module, training in modes.items():
            module.training = training


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], inputs: Mapping[str, Tensor], **fixed: Any
) -> torch.onnx.ONNXProgram:
    """Export a model with its active adapters to an ONNX file; see `export_program`.

    Needs the packages of the extra `export`.

    Args:
        model: see `export_program`.
        path: the file, ending in `.onnx`.
        inputs: see `export_program`. The file's inputs have these names.
        **fixed: see `export_program`.

    Returns:
        What `torch.onnx.export` returns. The file's outputs have the names of the program's.

    Raises:
        ConfigError: see `export_program`; if `path` does not end in `.onnx`; if a package is not installed.
        UnsupportedError: see `export_program`.
        StorageError: if the file cannot be written; it is then as it was before.
    """
    if not os.fspath(path).endswith(".onnx"):
        raise ConfigError(f"path={os.fspath(path)!r} is not allowed: use a file name ending in .onnx.")
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"ONNX files need {' and '.join(missing)}; {how_to_install('export')}")
    program = export_program(model, inputs, **fixed)
    names = list(program.call_spec.out_spec.context)
    with torch.no_grad():
        done = torch.onnx.export(program, output_names=names, dynamo=True, verbose=False)
    assert done is not None
    with replacing(Path(path)) as file:
        done.save(file, external_data=True)
    return done


def _check(inputs: dict[str, Any], fixed: Mapping[str, Any]) -> None:
    if not inputs:
        raise ConfigError("inputs is empty: pass the model's inputs by name, such as those that a tokenizer returns.")
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            raise ConfigError(
                f"inputs has {name}={value!r:.60}: pass a tensor with the examples in its first dimension."
            )
        if 1 in value.shape[:2]:
            raise ConfigError(
                f"inputs has {name} of shape {list(value.shape)}: use at least two examples of two tokens, since a "
                "size of 1 would become a constant of the graph."
            )
    if fixed.get("adapter_names") is not None:
        raise UnsupportedError(
            "adapter_names cannot be exported, as the graph would be for these examples only: export a TaskHeads, "
            "whose task_ids are an input of the graph, or call set_adapter and export one adapter."
        )
