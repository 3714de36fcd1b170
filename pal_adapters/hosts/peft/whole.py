"""Makes adding and loading adapters in PEFT all-or-nothing.

PEFT adds an adapter before it reads the weights, so that an error in the second step leaves an adapter with random
weights. PEFT's own methods therefore run inside `all_or_nothing`.
"""

from __future__ import annotations

import functools
import inspect
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from pal_adapters.errors import PalAdaptersError, StorageError
from pal_adapters.hosts.base_files import found_by, remove_unused, stored_once
from pal_adapters.hosts.in_place import check_originals

from .change import changing, switching
from .in_place import is_in_place, parts_of, split
from .joint import check_base_complete, check_base_untouched, check_restorable, is_joint, joint_names
from .loading import (
    check_folder,
    check_loaded,
    check_settings,
    download_options,
    finder,
    folder_of,
    kinds_in,
    reads_pickle,
    whole_tensors,
)
from .loading_in_place import load_left_out
from .registry import method_of
from .tuner import TRANSFORMERS_5, TaskTuner

_DAMAGE = (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, EOFError, pickle.UnpicklingError)


@contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Turn the errors that PEFT raises for a damaged file into one that names the folder."""
    try:
        yield
    except PalAdaptersError:
        raise
    except _DAMAGE as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise StorageError(f"the adapter in {str(path)!r} cannot be loaded: {what}.") from error
    except (AttributeError, TypeError) as error:
        if not reads_pickle(path):
            raise
        raise StorageError(f"{WEIGHTS_NAME} in {str(path)!r} is not a dictionary of tensors ({error}).") from error


def _add(original: Callable[..., None]) -> Callable[..., None]:
    """`PeftModel.__init__`, its `add_adapter`, and the `add_adapter` of transformers."""

    @functools.wraps(original)
    def add(self: Any, *args: Any, **kwargs: Any) -> None:
        given = (*args, *kwargs.values())
        config = next((value for value in given if isinstance(value, PeftConfig)), None)
        if config is None or method_of(config) is None:
            return original(self, *args, **kwargs)
        model = next((value for value in given if isinstance(value, nn.Module)), self)
        with changing(model, config, getattr(self, "peft_config", None), units=False):
            return original(self, *args, **kwargs)

    return add


def _within(change: Callable[[PeftModel], AbstractContextManager[None]]) -> Callable[..., Callable[..., None]]:
    """A method that runs inside `change` if the model's tuner is one of this package."""

    def replacement(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def method(self: PeftModel, *args: Any, **kwargs: Any) -> None:
            if not isinstance(self.base_model, TaskTuner):
                return original(self, *args, **kwargs)
            with change(self):
                return original(self, *args, **kwargs)

        return method

    return replacement


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        subfolder = kwargs.get("subfolder")
        check_folder(model_id, subfolder)
        if not isinstance(self.base_model, TaskTuner):
            return original(self, model_id, adapter_name, *args, **kwargs)
        exists = adapter_name in self.peft_config
        if exists:  # PEFT keeps its config, whatever the folder says
            check_settings(self.peft_config[adapter_name], model_id, subfolder)
        find = finder(model_id, subfolder, download_options(kwargs))
        with changing(self, self.peft_config, units=exists), _reading(model_id), found_by(find):
            return original(self, model_id, adapter_name, *args, **kwargs)

    return load_adapter


def _from_pretrained(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type[PeftModel], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        configs = [value for value in (*args, *kwargs.values()) if isinstance(value, PeftConfig)]
        path = args[0] if args else kwargs.get("model_id")
        check_folder(path, kwargs.get("subfolder"))
        with changing(model, *configs, units=False):
            return original(cls, model, *args, **kwargs)

    return classmethod(from_pretrained)


def _read_config(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type[PeftConfig], path: Any, *args: Any, **kwargs: Any) -> PeftConfig:
        config = original(cls, path, *args, **kwargs)
        # `PeftConfig.from_pretrained` makes a config of another class, which may have to know its folder.
        other = type(config) is not cls and method_of(config) is not None
        return type(config).from_pretrained(path, *args, **kwargs) if other else config

    return classmethod(from_pretrained)


def _load_by_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind_partial(self, *args, **kwargs)
        options = bound.arguments
        path, name = options.get("peft_model_id"), options.get("adapter_name") or "default"
        given = {**options, **options.get("kwargs", {}), **(options.get("adapter_kwargs") or {})}
        where = (path, given.get("subfolder"), download_options(given))
        folder, find = folder_of(*where), finder(*where)
        reads = options.get("adapter_state_dict") is None
        check_folder(folder, weights=reads)
        config = options.get("peft_config")
        whole, left_out = None, {}
        with changing(self, config, getattr(self, "peft_config", None)), _reading(path), found_by(find):
            if folder is not None:
                # transformers 5 reads the adapter's own file only.
                if TRANSFORMERS_5 and reads and (whole := whole_tensors(folder)):
                    options["adapter_state_dict"] = whole
                check_base_untouched(self, folder, config, whole)
            if TRANSFORMERS_5:
                left_out = _leave_out(options, folder)
            try:
                info = original(*bound.args, **bound.kwargs)
            except RuntimeError as error:
                added = getattr(self, "peft_config", {}).get(name)
                if type(error) is not RuntimeError or added is None or method_of(added) is None:
                    raise
                # transformers 5 reports shapes that do not fit in its log.
                raise StorageError(f"the weights in {str(path)!r} do not fit adapter {name!r}: {error}") from error
            config = self.peft_config[name]
            if info is not None and method_of(config) is not None:  # transformers 5 has loaded the weights itself
                check_loaded(self, name, info, kinds_in(folder))
                load_left_out(self, name, config, left_out)
                if folder is not None and is_joint(config):
                    check_base_complete(self, folder, name, whole)
            return info

    return load_adapter


def _leave_out(options: dict[str, Any], folder: Path | None) -> dict[str, Tensor]:
    """Take weights in place from what transformers 5 loads itself: it knows only names that are on the model."""
    config = options.get("peft_config")
    if config is None and folder is not None and (folder / CONFIG_NAME).is_file():
        config = PeftConfig.from_pretrained(str(folder))
    if not is_in_place(config):
        return {}
    given = options.get("adapter_state_dict")
    if given is None and folder is not None and (file := folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        given = load_file(file)
    if given is None:
        return {}
    left_out, options["adapter_state_dict"] = split(given)
    return left_out


def _delete_by_transformers(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def delete_adapter(self: Any, adapter_names: Any) -> None:
        configs = getattr(self, "peft_config", {})
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if not any(is_in_place(configs.get(name)) for name in names):
            return original(self, adapter_names)
        with changing(self, configs):
            check_originals(part for name in names for _, part in parts_of(self, name))
            return original(self, adapter_names)

    return delete_adapter


def _save(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        options = given.arguments
        if not (isinstance(self.base_model, TaskTuner) and options["is_main_process"]):
            return original(self, *args, **kwargs)
        names = [n for n in options["selected_adapters"] or self.peft_config if n in self.peft_config]
        joint = joint_names({name: self.peft_config[name] for name in names}) if options["safe_serialization"] else []

        def folder_of(name: str) -> Path:
            return Path(options["save_directory"], "" if name == "default" else name)

        with stored_once(folder_of, len(joint)):
            original(self, *args, **kwargs)
            for name in names:
                remove_unused(folder_of(name))

    return save_pretrained


def _disable(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def disable(self: Any) -> Any:
        # Before PEFT's own method, which on an error enables the adapters and makes them trainable.
        if not isinstance(self, PeftModel) or isinstance(self.base_model, TaskTuner):
            check_restorable(getattr(self, "peft_config", {}))
        return original(self)

    return disable


def install() -> None:
    """Wrap the host's methods."""
    classes: set[Any] = {PeftModel, *MODEL_TYPE_TO_PEFT_MODEL_MAPPING.values()}
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        *((cls, "__init__", _add) for cls in classes),
        *((cls, "add_adapter", _add) for cls in classes),
        (PeftModel, "set_adapter", _within(switching)),
        (PeftModel, "delete_adapter", _within(lambda model: changing(model, model.peft_config, units=False))),
        (PeftModel, "load_adapter", _load),
        (PeftModel, "save_pretrained", _save),
        (PeftModel, "disable_adapter", _disable),
        (PeftAdapterMixin, "add_adapter", _add),
        (PeftAdapterMixin, "load_adapter", _load_by_transformers),
        (PeftAdapterMixin, "delete_adapter", _delete_by_transformers),
        (PeftAdapterMixin, "disable_adapters", _disable),
    ]
    for cls, name, replacement in replaced:
        if name in vars(cls):
            setattr(cls, name, replacement(vars(cls)[name]))
    PeftConfigMixin.from_pretrained = _read_config(  # type: ignore[method-assign]
        vars(PeftConfigMixin)["from_pretrained"].__func__
    )
    PeftModel.from_pretrained = _from_pretrained(vars(PeftModel)["from_pretrained"].__func__)  # type: ignore[method-assign]
