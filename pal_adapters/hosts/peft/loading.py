"""Checks of a saved adapter's files, before any tensor reaches the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import StorageError
from pal_adapters.hosts.base_files import REFERENCE, Find, with_base
from pal_adapters.hosts.tensors import fault_of

from .in_place import tensors_in_place
from .registry import methods

BASE_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors in a file."""


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of one adapter by their names on the model, including copies of `modules_to_save`.

    Weights in place are among them, by the names that copies would have.
    """
    tensors: dict[str, Tensor] = {**tensors_in_place(model, adapter_name)}
    for name, module in named_modules(model, units=False).items():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for container in module.adapter_layer_names:
            units = getattr(module, container, None)
            if isinstance(units, nn.ModuleDict) and adapter_name in units:
                prefix = f"{name}.{container}.{adapter_name}.".removeprefix(".")
                tensors.update(units[adapter_name].state_dict(prefix=prefix))
    return tensors


def check_tensors(
    model: nn.Module, adapter_name: str, given: Mapping[str, Tensor], base: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Check the tensors of an adapter against those on the model.

    Args:
        model: the base model, or the `PeftModel` around it.
        adapter_name: the adapter, whose modules are already on the model.
        given: the tensors from the file, by their names on the model.
        base: names of pretrained tensors that the file may contain too.

    Returns:
        The tensors, with the `PeftModel`'s prefix only if `model` has it.

    Raises:
        StorageError: if a tensor is missing or unexpected, has another shape or kind, or is not finite.
    """
    tuner = model._modules.get("base_model")
    wrapped = tuner is not None and "model" in tuner._modules
    given = {name if wrapped else name.removeprefix(BASE_PREFIX): tensor for name, tensor in given.items()}
    expected = adapter_tensors(model, adapter_name)
    missing = [name for name in expected if name not in given]
    others = {**embeddings_of(model), **{name: given[name] for name in base if name in given}}
    unknown = [name for name in given if name not in expected and name not in others]
    if missing or unknown:
        parts = [f"it lacks {_some(missing)}"] if missing else []
        parts += [f"it has {_some(unknown)}, which the adapter does not have on this model"] if unknown else []
        raise StorageError(
            f"the weights do not fit adapter {adapter_name!r}: {' and '.join(parts)}. Use the model and "
            "the config that they were saved with."
        )
    check_values(adapter_name, ((name, tensor, {**others, **expected}[name]) for name, tensor in given.items()))
    _check_embeddings(model, adapter_name, {name: given[name] for name in given if name not in {*expected, *base}})
    return given


def _check_embeddings(model: nn.Module, adapter_name: str, given: Mapping[str, Tensor]) -> None:
    """Raise `StorageError` if embeddings from a file would replace those that other adapters were trained on."""
    rest = [name for name in getattr(model, "peft_config", {}) if name != adapter_name]
    own = embeddings_of(model)
    changed = [name for name, new in given.items() if not torch.equal(new.to(own[name]), own[name])]
    if rest and changed:
        raise StorageError(
            f"the weights do not fit adapter {adapter_name!r}: {changed[0]} differs from that of the model, which "
            f"{' and '.join(map(repr, rest))} also use: load it into a base model of its own."
        )


def check_values(adapter_name: str, pairs: Iterable[tuple[str, Tensor, Tensor]]) -> None:
    """Raise `StorageError` unless each new tensor can replace the old one; pairs are `(name, new, old)`."""
    for name, new, old in pairs:
        if fault := fault_of(name, new, old):
            raise StorageError(f"the weights do not fit adapter {adapter_name!r}: {fault}.")


# Fields that may differ between an adapter and a folder loaded over it: they do not change what the adapter computes,
# or, for `modules_to_save`, a difference shows in the weights.
_FREE = {"base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type",
         "modules_to_save", "adapters", "revisions", "bundle", "fingerprints"}  # fmt: skip


def check_settings(config: PeftConfig, path: str | os.PathLike[str], subfolder: str | None = None) -> None:
    """Raise `StorageError` if the adapter in a local folder has different settings from the one on the model."""
    folder = Path(path, subfolder or "")
    if not (folder / CONFIG_NAME).is_file():
        return
    mine, saved = config.to_dict(), type(config).from_pretrained(str(folder)).to_dict()
    free = _FREE | getattr(config, "storage_only", frozenset())
    # None leaves a value to the model.
    changed = [key for key in mine if key not in free and saved.get(key) not in (None, mine[key])]
    if changed:
        key = changed[0]
        raise StorageError(
            f"the adapter in {str(path)!r} has {key}={saved.get(key)!r}, the one on the model {key}={mine[key]!r}: "
            "load it under another name."
        )


def check_folder(path: Any, subfolder: str | None = None, *, weights: bool = True) -> None:
    """Check a local folder before PEFT reads it.

    Args:
        path: the folder; anything else is not checked.
        subfolder: where in it the adapter is.
        weights: whether weights will be read from it, too.

    Raises:
        StorageError: if PEFT cannot attribute the config to a method, or the weights are missing or of another method.
    """
    file = Path(path, subfolder or "", CONFIG_NAME) if isinstance(path, (str, os.PathLike)) else None
    if file is None or not file.is_file():
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{str(file)!r} is damaged: {error}.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise StorageError(
            f"{str(file)!r} has peft_type={kind!r}, which no installed package has registered with PEFT."
        )
    if weights:
        _check_weights_file(file.parent, kind)


def folder_of(path: Any, subfolder: str | None, download: Mapping[str, Any]) -> Path | None:
    """The folder that holds an adapter: a local one, or the cached snapshot of an adapter of this package on the Hub.

    Args:
        path: a folder or a Hub repo ID.
        subfolder: where in it the adapter is.
        download: options of `hf_hub_download`.

    Returns:
        None for anything else, and for a repo that cannot be read: the host reports why.
    """
    if not isinstance(path, (str, os.PathLike)):
        return None
    if os.path.isdir(path):
        return Path(path, subfolder or "")
    try:
        config = hf_hub_download(str(path), CONFIG_NAME, subfolder=subfolder, **download)
        if json.loads(Path(config).read_text(encoding="utf-8"))["peft_type"] not in methods():
            return None
        hf_hub_download(str(path), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Path(config).parent


def finder(path: Any, subfolder: str | None, download: Mapping[str, Any]) -> Find:
    """How to find another file of an adapter; the arguments are those of `folder_of`."""

    def find(name: str) -> Path:
        if os.path.isdir(path):
            return Path(path, subfolder or "", name)
        return Path(hf_hub_download(str(path), name, subfolder=subfolder, **download))

    return find


def download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a loader's arguments that say how to download from the Hub."""
    return {key: given[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in given}


def whole_tensors(folder: Path) -> dict[str, Tensor] | None:
    """The tensors of a saved adapter and its base files, or None if its own file has all of them."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        if BASE_PREFIX + REFERENCE not in tensors.keys():  # noqa: SIM118
            return None
    return with_base(load_file(file))


def _check_weights_file(folder: Path, kind: str) -> None:
    """PEFT looks for missing weights on the Hub, and loads nothing from a file whose names it does not know."""
    ours = kind in methods()
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    if ours and not any(file.is_file() for file in files):
        raise StorageError(f"{str(files[0])!r} is missing: the folder is incomplete.")
    if ours or not files[0].is_file():
        return
    prefixes = tuple(f".{method.name}_{part}." for method in methods().values() for part in ("units", "shared"))
    with safe_open(files[0], framework="pt") as tensors:
        found = [name for name in tensors.keys() if any(prefix in name for prefix in prefixes)]  # noqa: SIM118
    if found:
        raise StorageError(
            f"{str(folder / CONFIG_NAME)!r} has peft_type={kind!r}, but the weights beside it are of another method "
            f"({found[0]}, ...): the files do not belong together."
        )


def reads_pickle(path: Any) -> bool:
    """Whether a local folder has its weights in a pickle file only."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    return Path(path, WEIGHTS_NAME).is_file() and not Path(path, SAFETENSORS_WEIGHTS_NAME).is_file()


def check_loaded(model: nn.Module, adapter_name: str, info: Any, kinds: Iterable[str]) -> None:
    """Check weights that transformers 5 has loaded itself, past `check_tensors`.

    Args:
        model: the base model.
        adapter_name: the adapter.
        info: transformers' report of the load.
        kinds: the dtypes in the file, as transformers converts integers silently.
    """
    tensors = adapter_tensors(model, adapter_name)
    other = [kind for kind in kinds if not kind.startswith(("F", "BF"))]
    if other and all(tensor.is_floating_point() for tensor in tensors.values()):
        raise StorageError(
            f"the weights do not fit adapter {adapter_name!r}: the file has tensors of kind {other[0]}."
        )
    missing = sorted(set(info.missing_keys) & set(tensors))
    faults = [*map(str, info.unexpected_keys), *map(str, info.mismatched_keys), *map(str, info.error_msgs)]
    if missing or faults:
        what = f"it lacks {_some(missing)}" if missing else f"{_some(faults)} cannot be loaded"
        raise StorageError(f"the weights do not fit adapter {adapter_name!r}: {what}.")
    check_values(adapter_name, ((name, tensor, tensor) for name, tensor in tensors.items()))


def kinds_in(path: str | os.PathLike[str] | None) -> list[str]:
    """The dtypes of the tensors in a local folder, as safetensors calls them; none for anything but a local folder."""
    file = Path(path or "", SAFETENSORS_WEIGHTS_NAME)
    if path is None or not file.is_file():
        return []
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if name != BASE_PREFIX + REFERENCE]  # noqa: SIM118
        return [tensors.get_slice(name).get_dtype() for name in names]


def embeddings_of(model: nn.Module) -> dict[str, Tensor]:
    """Embeddings and language-model head, which PEFT also saves if they were resized."""
    found: dict[str, Tensor] = {}
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, get)()
        except (AttributeError, NotImplementedError):  # not a language model
            continue
        if module is not None:
            ids = {id(parameter) for parameter in module.parameters()}
            for name, inside in named_modules(model, units=False, once=False).items():
                for key, parameter in inside._parameters.items():
                    if parameter is not None and id(parameter) in ids:
                        found[f"{name}.{key}".removeprefix(".")] = parameter
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
