"""`train_base` in PEFT: the pretrained weights are trained, saved and loaded together with an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn

from pal_adapters.blocks.walk import named_modules, parameters
from pal_adapters.errors import StorageError, UnsupportedError

from .config import TaskPeftConfig
from .in_place import IN_PLACE
from .loading import BASE_PREFIX, check_values, embeddings_of


def task_parameter_ids(model: nn.Module) -> set[int]:
    """IDs of the parameters that PEFT has added, including its copies of saved modules."""
    ids: set[int] = set()
    for module in named_modules(model, units=False).values():
        if isinstance(module, AuxiliaryTrainingWrapper):
            ids.update(map(id, parameters(module)))
        elif isinstance(module, BaseTunerLayer):
            names = (*module.adapter_layer_names, *module.other_param_names)
            containers = [getattr(module, name, None) for name in names]
            for container in containers:
                if isinstance(container, nn.Module):
                    ids.update(map(id, parameters(container)))
    return ids


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside of task units, tied ones under each name."""
    return {
        f"{path}.{name}".removeprefix("."): parameter
        for path, module in named_modules(model, units=False, once=False).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def pretrained_tensors(model: nn.Module, *, tied: Literal["once", "each"] = "once") -> dict[str, Tensor]:
    """The pretrained weights and floating-point buffers of a model by name; tied ones once or under each name."""
    added = task_parameter_ids(model)
    once = named_modules(model, units=False)
    inside = tuple(f"{name}." for name, module in once.items() if isinstance(module, AuxiliaryTrainingWrapper))
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters(model).items():
        if id(parameter) not in added:
            tensors[name] = parameter.data
            if tied == "once":
                added.add(id(parameter))
    for name, module in once.items():
        for key, buffer in module._buffers.items():
            full = f"{name}.{key}".removeprefix(".")
            if buffer is None or key in module._non_persistent_buffers_set or full.startswith(inside):
                continue
            if buffer.is_floating_point():
                tensors[full] = buffer
    return tensors


def plain_name(name: str) -> str:
    """The name of a pretrained tensor without any wrappers around its module."""
    return name.replace(".base_layer.", ".")


def name_alone(model: nn.Module, name: str, adapter_name: str) -> str:
    """The name of a pretrained tensor on a model with this adapter only, without the wrappers of other adapters."""
    path, wrapped, _ = name.rpartition(".base_layer.")
    if not wrapped:
        return name
    wrapper: Any = model.get_submodule(path)
    containers = [getattr(wrapper, part, {}) for part in getattr(wrapper, "adapter_layer_names", ())]
    return name if any(adapter_name in container for container in containers) else plain_name(name)


def is_joint(config: Any) -> bool:
    """Whether an adapter trains all of the model's own pretrained weights."""
    return bool(joint_names({"": config}))


def joint_names(configs: Mapping[str, Any]) -> list[str]:
    """The adapters that train all of the model's own pretrained weights."""
    return [
        name
        for name, config in configs.items()
        if isinstance(config, TaskPeftConfig) and config.train_base and config.base_weights == "all"
    ]


def changing_base(configs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The adapters that change the model's own pretrained weights, with the setting that makes them do so."""
    return [
        (name, "train_base=True" if config.base_weights == "all" else IN_PLACE)
        for name, config in configs.items()
        if isinstance(config, TaskPeftConfig) and config.train_base and config.base_weights != "copies"
    ]


def mark_base(model: nn.Module, active: Iterable[str], configs: Mapping[str, Any] | None = None) -> None:
    """Make the pretrained weights trainable while an adapter with `train_base` is active, and freeze them otherwise.

    Without such an adapter, nothing changes: users may have unfrozen weights themselves.

    Args:
        model: the base model.
        active: names of the active adapters.
        configs: the adapters' configs; by default those on the model.
    """
    if configs is None:
        configs = getattr(model, "peft_config", {})
    joint = joint_names(configs)
    if not joint:
        return
    trainable = not set(joint).isdisjoint(active)
    added = task_parameter_ids(model)
    for parameter in parameters(model, units=False):
        if id(parameter) not in added:
            parameter.requires_grad = trainable


def check_trainable(model: nn.Module) -> None:
    """Raise `UnsupportedError` if the pretrained weights are quantised and cannot be trained."""
    packed = [n for n, p in named_parameters(model).items() if not (p.is_floating_point() or p.is_complex())]
    if packed or getattr(model, "is_quantized", False):
        raise UnsupportedError(
            "train_base=True is not allowed for a quantised model"
            + (f" ({packed[0]} is packed)" if packed else "")
            + ": load the model in floating point, or leave train_base=False."
        )


def check_restorable(configs: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` if a model without its adapters would not be the pretrained one."""
    for name, how in changing_base(configs):
        raise UnsupportedError(
            f"the adapters cannot be disabled: {name!r} trains the pretrained weights in place ({how}), so what is "
            "left is not the pretrained model. Where you need it, load the base model a second time (for DPO: as "
            "ref_model)."
        )


def check_transformers_loading(model: nn.Module, adapter_name: str, others: list[str], *, loads: bool) -> None:
    """Check a model into which transformers 5 loads pretrained weights itself, without `match_base`.

    Args:
        model: the base model.
        adapter_name: the adapter with `train_base`.
        others: the other adapters on the model.
        loads: whether weights are about to be loaded.

    Raises:
        UnsupportedError: if weights are tied, as only one of them would be loaded.
    """
    added = task_parameter_ids(model)
    names: dict[int, str] = {}
    for name, parameter in named_parameters(model).items():
        first = names.setdefault(id(parameter), name)
        if first != name and id(parameter) not in added:
            raise UnsupportedError(
                f"train_base=True is not allowed here: {first} and {name} are tied, and transformers' own load_adapter"
                " would load only one of them. Use get_peft_model, and load with PeftModel.from_pretrained."
            )
    if loads and others:
        warnings.warn(
            f"Adapter {adapter_name!r} comes with its own pretrained weights (train_base=True), and transformers' "
            f"load_adapter does not compare them with those of {', '.join(map(repr, others))}, whose outputs will "
            "change if they differ. PeftModel.load_adapter compares them.",
            stacklevel=2,
        )


def _stored_names(folder: Path, whole: Mapping[str, Tensor] | None) -> set[str] | None:
    """Names of the tensors in a local folder, as the base model has them; None for anything but a local folder."""
    if whole is not None:
        return {plain_name(name.removeprefix(BASE_PREFIX)) for name in whole}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return {plain_name(name.removeprefix(BASE_PREFIX)) for name in tensors.keys()}  # noqa: SIM118


def check_base_untouched(
    model: nn.Module, folder: Path, config: PeftConfig | None, whole: Mapping[str, Tensor] | None = None
) -> None:
    """Raise `StorageError` if a local folder holds weights of the base model, which its config does not train.

    transformers 5 loads every tensor whose name it finds in the model, whether or not it belongs to the adapter.

    Args:
        model: the base model, before the adapter is added.
        folder: only a local folder is checked.
        config: the adapter's, or None for the one in the folder.
        whole: the folder's tensors, if they are in several files.
    """
    names = _stored_names(folder, whole)
    if config is None and (folder / CONFIG_NAME).is_file():
        config = PeftConfig.from_pretrained(str(folder))
    if names is None or not isinstance(config, TaskPeftConfig) or is_joint(config):
        return
    kept = config.modules_to_save or ()
    base = {name for name in model.state_dict() if not any(f".{part}." in f".{name}" for part in kept)}
    base -= set(embeddings_of(model))  # PEFT saves resized ones with the adapter
    if found := sorted(names & base):
        raise StorageError(
            f"{str(folder)!r} has weights of the base model ({found[0]!r}, ...), which its config does not train "
            "(train_base=False): the file is not of this adapter."
        )


def _plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {plain_name(name): tensor for name, tensor in pretrained_tensors(model, tied="each").items()}


def _check_complete(model: nn.Module, own: Iterable[str], given: Iterable[str], adapter_name: str) -> None:
    """Raise `StorageError` unless each pretrained weight, or one tied to it, is among the given names."""
    added = task_parameter_ids(model)
    tied = {plain_name(n): id(p) for n, p in named_parameters(model).items() if id(p) not in added}
    there = {tied.get(name, name) for name in given}
    if missing := [name for name in own if tied.get(name, name) not in there]:
        raise StorageError(
            f"adapter {adapter_name!r} comes with its own pretrained weights (train_base=True), and {missing[0]} is "
            "not among them: load it into the model that it was saved with."
        )


def check_base_complete(
    model: nn.Module, folder: Path, adapter_name: str, whole: Mapping[str, Tensor] | None = None
) -> None:
    """Raise `StorageError` unless a local folder has all pretrained weights that its adapter on the model trains.

    Each has to fit as well: transformers 5 converts integers and takes values that are not finite. `whole` has the
    folder's tensors if they are in several files.
    """
    names = _stored_names(folder, whole)
    if names is None:
        return
    own = _plain_tensors(model)
    _check_complete(model, own, names, adapter_name)

    def check(keys: Iterable[str], get: Callable[[str], Tensor]) -> None:
        stored = ((key, plain_name(key.removeprefix(BASE_PREFIX))) for key in keys)
        check_values(adapter_name, ((name, get(key), own[name]) for key, name in stored if name in own))

    if whole is not None:
        check(whole, whole.__getitem__)
        return
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as tensors:
        check(tensors.keys(), tensors.get_tensor)


def match_base(
    model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Split a checkpoint into pretrained weights, each paired with the tensor on the model it replaces, and the rest.

    Raises:
        StorageError: if pretrained weights are missing or do not fit the model.
        UnsupportedError: if other adapters on the model use different pretrained weights.
    """
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    others = [name for name in configs if name != adapter_name]
    if not is_joint(config):
        owners = changing_base({name: configs[name] for name in others})
        if owners and config.inference_mode:
            warnings.warn(
                f"Adapter {adapter_name!r} comes without pretrained weights, and those of the model belong to "
                f"{', '.join(repr(name) for name, _ in owners)} ({owners[0][1]}): it uses them, whatever it was "
                "trained on.",
                stacklevel=2,
            )
        return [], state_dict
    # Which modules are wrapped depends on the other adapters, when saving and when loading.
    own = _plain_tensors(model)
    plain = {key: plain_name(key) for key in state_dict}
    names = {key: name if name in own else name.removeprefix(BASE_PREFIX) for key, name in plain.items()}
    found = {name: state_dict[key] for key, name in names.items() if name in own}
    _check_complete(model, own, found, adapter_name)
    check_values(adapter_name, ((name, value, own[name]) for name, value in found.items()))
    loaded = {name: value for name, value in found.items() if not own[name].is_meta}
    pairs = ((own[name], value) for name, value in loaded.items())
    check_others(adapter_name, "train_base=True", others, pairs, trains=not config.inference_mode)
    rest = {key: value for key, value in state_dict.items() if names[key] not in loaded}
    return [(own[name], value) for name, value in loaded.items()], rest


def check_others(
    adapter_name: str, how: str, others: Iterable[str], pairs: Iterable[tuple[Tensor, Tensor]], *, trains: bool
) -> None:
    """Check an adapter whose pretrained weights are about to replace those of the model.

    Args:
        adapter_name: the adapter.
        how: the setting that makes it train them.
        others: the other adapters on the model, which use the same weights.
        pairs: the weights on the model and those from the file.
        trains: whether the adapter is loaded to be trained, which changes the weights anyway.

    Raises:
        UnsupportedError: if the weights differ and the adapter is not to be trained.
    """
    if not others or all(torch.equal(own, new.to(own)) for own, new in pairs):
        return
    message = (
        f"adapter {adapter_name!r} comes with its own pretrained weights ({how}), which differ from those that "
        f"{', '.join(map(repr, others))} use on this model"
    )
    if not trains:
        raise UnsupportedError(f"{message}: load each into its own copy of the base model.")
    warnings.warn(f"{message}: from now on all adapters use the loaded ones.", stacklevel=3)
