"""The weight files of adapters and fusions: which tensors belong in one, and whether a file has exactly these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from adapters.loading import AdapterFusionLoader, AdapterLoader, PredictionHeadLoader, WeightsLoaderHelper
from adapters.model_mixin import ModelAdaptersMixin
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules
from pal_adapters.errors import PalAdaptersError, StorageError
from pal_adapters.hosts.base_files import found_by, in_adapter_file, remove_unused, stored_once, with_base
from pal_adapters.hosts.in_place import overwrite
from pal_adapters.hosts.tensors import fault_of
from pal_adapters.hosts.unchanged import keep_values

from .base_weights import base_parameters, trains_originals
from .config import task_configs
from .fusion import combination_config
from .in_place import require_present, tensors_in_place

_CHECK_ALL: ContextVar[bool] = ContextVar("pal_adapters_check_all_files", default=False)


@contextmanager
def all_files_checked() -> Iterator[None]:
    """Also check the files of the host's own adapters, which it loads even if tensors are missing."""
    token = _CHECK_ALL.set(True)
    try:
        yield
    finally:
        _CHECK_ALL.reset(token)


class OwnTensors:
    """Tells by its name whether a tensor belongs to an adapter or fusion of this package.

    The host accepts any callable; a file that is loaded with this one is checked, see `load_weights_from_state_dict`.

    Args:
        kept: whether a tensor of the model belongs to it.
        optional: whether a tensor may be missing from either the file or the model; takes its name in the base model.
        base: names of the pretrained weights among them.
        adapter_name: the adapter, whose name is in the names of all others.
    """

    def __init__(
        self,
        kept: Callable[[str], bool],
        optional: Callable[[str], bool] = lambda key: False,
        base: Collection[str] = (),
        adapter_name: str = "",
    ) -> None:
        self.kept = kept
        self.optional = optional
        self.base = base
        self.adapter_name = adapter_name

    def __call__(self, key: str) -> bool:
        return self.kept(key)

    def among(self, keys: Iterable[str]) -> list[str]:
        """Those that belong to it, without a call for each tensor of other adapters."""
        part = f".{self.adapter_name}." if self.adapter_name else ""
        return [key for key in keys if (part in key or key in self.base) and self.kept(key)]


# What belongs to an adapter or a fusion


def _prefix(model: ModelAdaptersMixin) -> str:
    return "" if model.base_model is model else f"{model.base_model_prefix}."


def filter_func(original: Any) -> Any:
    """`AdapterLoader.filter_func`, with shared tensors and a jointly trained base."""

    def filter_func(self: AdapterLoader, adapter_name: str) -> Callable[[str], bool]:
        keep = original(self, adapter_name)
        model: Any = self.model
        configs = list(task_configs(model.adapters_config.get(adapter_name)))
        table = f"shared_parameters.{adapter_name}."
        prefix = _prefix(model)
        if not configs:
            kept_by_host = OwnTensors(lambda key: keep(key) or key.startswith(table))
            return kept_by_host if _CHECK_ALL.get() else kept_by_host.kept
        ours = tuple(f"{table}{config.method.name}_stack" for config in configs)
        trains_base = any(map(trains_originals, configs))
        base = {prefix + name for name in base_parameters(model.base_model)} if trains_base else set()

        def kept(key: str) -> bool:
            if any(start in key for start in ours):
                # An encoder-decoder has the same table three times, and safetensors rejects aliases.
                return key.startswith(prefix + table)
            return keep(key) or key.startswith(table) or key in base

        skipped = set.intersection(*(set(config.leave_out) for config in configs))
        names = {id(module): name for name, module in named_modules(model.base_model, units=False).items()}
        blocks = tuple(f"{names[id(layer)]}." for index, layer in model.iter_layers() if index in skipped)
        inner = {name for name, child in model.base_model.named_children() if _is_trunk(model, child)}

        def optional(key: str) -> bool:
            """Blocks left out on loading, and base weights that some classes of a model lack (a pooler)."""
            if keep(key) or key.startswith(table):
                return key.startswith(blocks)
            return trains_base and key.partition(".")[0] not in inner

        return OwnTensors(kept, optional, base, adapter_name)

    return filter_func


def _is_trunk(model: Any, child: nn.Module) -> bool:
    """Whether a part of the base model has blocks or embeddings, so that every class of the model has it."""
    blocks = {layer for _, layer in model.iter_layers()}
    inside = named_modules(child, units=False).values()
    return bool(blocks.intersection(inside) or [module for module in inside if isinstance(module, nn.Embedding)])


def rename_func(original: Any) -> Any:
    """`AdapterLoader.rename_func`, with shared tensors."""

    def rename_func(self: AdapterLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        rename = original(self, old_name, new_name)
        start = f"shared_parameters.{old_name}."

        def renamed(key: str) -> str:
            if key.startswith(start):
                return f"shared_parameters.{new_name}.{key.removeprefix(start)}"
            return rename(key)

        return renamed

    return rename_func


def fusion_filter_func(original: Any) -> Any:
    """`AdapterFusionLoader.filter_func`, with whole names."""

    def filter_func(self: AdapterFusionLoader, adapter_fusion_name: str) -> Callable[[str], bool]:
        part = f"adapter_fusion_layer.{adapter_fusion_name}."
        config, _ = self.model.adapters_config.get_fusion(adapter_fusion_name)
        if combination_config(config) is None:
            return lambda key: part in key
        return OwnTensors(lambda key: part in key)

    return filter_func


def fusion_rename_func(original: Any) -> Any:
    """`AdapterFusionLoader.rename_func`, with whole names."""

    def rename_func(self: AdapterFusionLoader, old_name: str, new_name: str) -> Callable[[str], str]:
        return lambda key: key.replace(f"adapter_fusion_layer.{old_name}.", f"adapter_fusion_layer.{new_name}.")

    return rename_func


def head_filter_func(original: Any) -> Any:
    """`PredictionHeadLoader.filter_func`, whose files are checked. Tensors that are tied to others may be missing."""

    def filter_func(self: PredictionHeadLoader, head_name: str | None) -> Callable[[str], bool]:
        keep, model = original(self, head_name), self.model

        @functools.cache
        def tensors() -> dict[str, Tensor]:  # once the head is there, and only for a file that does not fit it
            return dict(model.state_dict(keep_vars=True))

        def optional(key: str) -> bool:
            own = tensors().get(key)
            return own is None or sum(tensor is own for tensor in tensors().values()) > 1

        return OwnTensors(keep, optional)

    return filter_func


# Writing


def state_dict(original: Any) -> Any:
    """`WeightsLoaderHelper.state_dict`, where pretrained weights may be in files of their own."""

    def wrapper(self: WeightsLoaderHelper, filter_func: Callable[[str], bool]) -> dict[str, Tensor]:
        if not isinstance(filter_func, OwnTensors):
            return dict(original(self, filter_func))
        tensors: dict[str, Tensor] = original(self, set(filter_func.among(_tensors(self.model))).__contains__)
        in_place = tensors_in_place(self.model)
        for name in filter_func.among(in_place):
            tensors[name] = in_place[name].detach()
        if in_place and filter_func.adapter_name:
            require_present(self.model, filter_func.adapter_name)
        base = {name: tensors.pop(name) for name in list(tensors) if name in filter_func.base}
        return {**tensors, **in_adapter_file(base, filter_func.adapter_name)}

    return wrapper


def save_adapters(original: Any) -> Any:
    """A method that saves adapters into folders inside the given one. What they have in common is stored once."""

    def wrapper(self: ModelAdaptersMixin, save_directory: str, *args: Any, **kwargs: Any) -> None:
        joint = {
            name
            for name in self.adapters_config
            if any(map(trains_originals, task_configs(self.adapters_config.get(name))))
        }
        with stored_once(Path(save_directory).joinpath, len(joint)):
            original(self, save_directory, *args, **kwargs)

    return wrapper


def save(original: Any) -> Any:
    """`AdapterLoader.save`, which leaves no pretrained weights of earlier saves behind."""

    def wrapper(self: AdapterLoader, save_directory: str, name: str, *args: Any, **kwargs: Any) -> None:
        with stored_once(lambda adapter_name: Path(save_directory), 1):
            original(self, save_directory, name, *args, **kwargs)
            remove_unused(Path(save_directory))

    return wrapper


# Reading


def load_weights(original: Any) -> Any:
    """`WeightsLoaderHelper.load_weights`, whose errors name the folder and the cause."""

    def wrapper(self: WeightsLoaderHelper, save_directory: str, *args: Any, **kwargs: Any) -> Any:
        try:
            with found_by(Path(save_directory).joinpath):
                return original(self, save_directory, *args, **kwargs)
        except PalAdaptersError as error:
            raise type(error)(f"the weights in {save_directory} cannot be loaded: {error}") from error
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            first = next(line for line in str(error).splitlines() if "size mismatch" in line)
            raise StorageError(
                f"the weights in {save_directory} do not fit this {type(self.model).__name__}, they were saved from a "
                f"model or an adapter of another size: {first.strip()}"
            ) from error
        except OSError as error:
            raise StorageError(
                f"the weights in {save_directory} cannot be read ({error.__context__ or error}): the file is missing "
                "or damaged, save it again."
            ) from error

    return wrapper


def load_weights_from_state_dict(original: Any) -> Any:
    """`WeightsLoaderHelper.load_weights_from_state_dict`, which first checks the tensors of this package's methods."""

    def wrapper(
        self: WeightsLoaderHelper,
        state_dict: dict[str, Tensor],
        filter_func: Callable[[str], bool],
        rename_func: Any = None,
        loading_info: Any = None,
        in_base_model: bool = False,
        start_prefix: str = "",
    ) -> Any:
        if not isinstance(state_dict, Mapping):
            raise StorageError(f"the file holds a {type(state_dict).__name__}, not a dictionary of tensors.")
        state_dict = with_base(state_dict)
        renames = (
            [] if rename_func is None else rename_func if isinstance(rename_func, (list, tuple)) else [rename_func]
        )
        given: Mapping[str, Any] = self.rename_state_dict(state_dict, *renames)
        on_model, in_file = _prefixes(self.model, given, in_base_model, start_prefix)
        in_place = tensors_in_place(self.model)
        tensors = {**_tensors(self.model), **in_place}
        keep = filter_func
        if isinstance(filter_func, OwnTensors):
            own = [name for name in filter_func.among(tensors) if name.startswith(on_model)]
            wanted = {in_file + name.removeprefix(on_model): tensors[name] for name in own}
            _check(self.model, wanted, given, filter_func)
            keep = wanted.__contains__
        names = [on_model + key.removeprefix(in_file) for key in given if str(key).startswith(in_file)]
        keep_values([tensors[name] for name in names if name in tensors and name not in in_place])
        in_place = {name: in_place[name] for name in names if name in in_place}
        loaded = {name: given[in_file + name.removeprefix(on_model)] for name in in_place}
        if in_place:  # the host would not find them, as they have no name of their own on the model
            new = {key: next(iter(self.rename_state_dict({key: 0}, *renames))) for key in state_dict}
            state_dict = {k: v for k, v in state_dict.items() if on_model + new[k].removeprefix(in_file) not in loaded}
        result = original(self, state_dict, keep, rename_func, loading_info, in_base_model, start_prefix)
        overwrite(in_place, loaded)
        return result

    return wrapper


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `model.state_dict()` themselves."""
    found: dict[str, Tensor] = {}
    for path, module in named_modules(model, once=False).items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = tensor
    return found


def _prefixes(model: Any, given: Mapping[str, Any], in_base_model: bool, start_prefix: str) -> tuple[str, str]:
    """What names of tensors start with on a model and in a file, each of which may be with or without a head."""
    prefix = model.base_model_prefix
    has_base = hasattr(model, prefix)
    prefixed = any(key.startswith(prefix) for key in given)
    if in_base_model and has_base and not prefixed:
        return f"{prefix}.", ""
    if not start_prefix and not has_base and prefixed:
        start_prefix = f"{prefix}."
    return "", start_prefix


def _check(model: Any, wanted: Mapping[str, Tensor], given: Mapping[str, Any], own: OwnTensors) -> None:
    """Raise `StorageError` unless a file has exactly the tensors of an adapter, in a form that fits the model.

    Args:
        model: the model.
        wanted: the adapter's tensors on the model, by their names in the file.
        given: the tensors of the file.
        own: what may be missing.
    """
    prefix = f"{model.base_model_prefix}."

    def optional(key: Any) -> bool:
        return own.optional(str(key).removeprefix(prefix))

    missing = sorted(str(key) for key in wanted.keys() - given.keys() if not optional(key))
    if missing:
        raise StorageError(f"{_some(missing)} missing: the file is incomplete, or was saved from another model.")
    unknown = sorted(key for key in given.keys() - wanted.keys() if not optional(key))
    if unknown:
        raise StorageError(
            f"{_some(unknown)} not expected by this {type(model).__name__}: the file belongs to another method, or to "
            "a model with other blocks."
        )
    for key, target in wanted.items():
        if key in given and (fault := fault_of(str(key), given[str(key)], target)):
            raise StorageError(f"{fault}.")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 1} more are" if len(keys) > 1 else " is"
    return f"{keys[0]}{more}"
