"""What the binding expects of `adapters`, and the check that the installed version holds to it.

`RELIED_ON` lists what is called or subclassed; `patches.REPLACED` lists what is replaced. Both were read from adapters
1.3. Each entry names the arguments of a function, the fields of a `NamedTuple`, or the attributes of a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import adapters
from adapters import composition, context, loading, model_mixin, utils
from adapters.configuration import AdapterConfig, AdapterFusionConfig, ModelAdaptersConfig
from adapters.methods import adapter_layer_base, bottleneck, lora, modeling

TESTED = ("1.3.0",)
"""The versions of adapters that the test suite has passed with, oldest first."""


class Expected(NamedTuple):
    """One expectation.

    Attributes:
        owner: the class or module that has the symbol.
        name: the symbol; empty for the owner itself.
        names: the names that it must have: arguments (all of them, or the first ones before `"..."`), fields of a
            `NamedTuple`, or attributes of a class; None if it only has to exist.
        reason: what the binding needs it for.
    """

    owner: Any
    name: str
    names: tuple[str, ...] | None
    reason: str

    @property
    def symbol(self) -> str:
        return ".".join(filter(None, (self.owner.__name__, self.name)))

    def fault(self) -> str | None:
        """How the installed host differs, or None."""
        found = getattr(self.owner, self.name, None) if self.name else self.owner
        if found is None:
            return f"{self.symbol} does not exist"
        if self.names is None:
            return None
        if inspect.isclass(found):
            have = (*getattr(found, "_fields", ()), *getattr(found, "__dataclass_fields__", ()), *dir(found))
            lost = [name for name in self.names if name not in have]
            return f"{self.symbol} has no {', '.join(lost)}" if lost else None
        given = tuple(inspect.signature(getattr(found, "_pal_adapters_original", found)).parameters)
        *front, last = self.names
        same = given[: len(front)] == tuple(front) if last == "..." else given == self.names
        return None if same else f"{self.symbol} takes ({', '.join(given)}), not ({', '.join(self.names)})"


_LAYER = adapter_layer_base.AdapterLayerBase
_COMPOSABLE = adapter_layer_base.ComposableAdapterLayerBase
_BOTTLENECK = bottleneck.BottleneckLayer
_SETUP = ("self", "adapter_setup", "state", "lvl")

RELIED_ON: tuple[Expected, ...] = (
    Expected(AdapterConfig, "load", ("config", "..."), "configs are read from names, strings and dicts"),
    Expected(AdapterConfig, "from_dict", ("config",), "overridden to reject unknown options"),
    Expected(AdapterConfig, "to_dict", ("self",), "what a file holds of a config"),
    Expected(
        AdapterFusionConfig, "",
        ("key", "query", "value", "query_before_ln", "regularization", "residual_before", "temperature",
         "value_before_softmax", "value_initialized", "dropout_prob"),
        "a fusion config has these fields, and they are left out of files so that a bare host raises",
    ),
    Expected(ModelAdaptersConfig, "get", ("self", "adapter_name"), "an adapter's config"),
    Expected(ModelAdaptersConfig, "match", ("self", "adapter_name", "config_type", "..."), "a bottleneck's config"),
    Expected(ModelAdaptersConfig, "get_fusion", ("self", "fusion_name"), "a fusion's config and sources"),
    Expected(
        ModelAdaptersConfig, "common_config_value", ("self", "adapter_names", "attribute"),
        "at which places the sources of a fusion act",
    ),
    Expected(_LAYER, "", ("layer_idx",), "the block that a layer belongs to"),
    Expected(_LAYER, "add_adapter", ("self", "adapter_name", "layer_idx"), "overridden by TaskLayer"),
    Expected(
        _LAYER, "average_adapter", ("self", "adapter_name", "input_adapters", "combine_strategy", "kwargs"),
        "overridden by TaskLayer for shared tensors",
    ),
    Expected(
        _LAYER, "enable_adapters", ("self", "adapter_setup", "unfreeze_adapters", "unfreeze_fusion"),
        "overridden by TaskLayer for shared tensors and a trained base",
    ),
    Expected(_LAYER, "freeze_adapter", ("self", "adapter_name", "freeze"), "overridden by TaskLayer"),
    Expected(_LAYER, "delete_adapter", ("self", "adapter_name"), "overridden by TaskLayer"),
    Expected(_LAYER, "get_active_setup", ("self",), "overridden by TaskLayer"),
    *(
        Expected(_COMPOSABLE, f"compose_{block}", _SETUP, "overridden for values")
        for block in ("single", "stack", "fuse", "split", "batch_split", "multi_task", "parallel", "average")
    ),
    Expected(_COMPOSABLE, "compose", ("self", "adapter_setup", "state"), "runs the active setup"),
    Expected(_COMPOSABLE, "vslice", ("self", "state", "slice_obj"), "overridden for values"),
    Expected(_COMPOSABLE, "repeat", ("self", "state", "channels"), "overridden for values"),
    Expected(_COMPOSABLE, "pad_and_concat", ("self", "states"), "overridden for values"),
    Expected(_COMPOSABLE, "mean", ("self", "states", "weights"), "overridden for values"),
    Expected(
        _COMPOSABLE, "check_composition_valid", ("self", "parent", "child", "lvl"), "called for nested compositions"
    ),
    Expected(_COMPOSABLE, "_get_compose_func", ("self", "composition_type"), "called for nested compositions"),
    Expected(composition, "ALLOWED_NESTINGS", None, "the compositions that exist"),
    Expected(context.AdapterSetup, "get_context", None, "the setup of the running call"),
    Expected(context.ForwardContext, "get_context", None, "the state of the running call"),
    Expected(context.ForwardContext, "", ("context_args",), "which arguments of a model reach that state"),
    Expected(
        bottleneck, "BottleneckState",
        ("hidden_states", "input_tensor", "adapter_residual", "layer_norm", "bottleneck_up", "last"),
        "the state of our fusions",
    ),
    Expected(lora, "LoRAState", ("layer_input", "hidden_states", "layer_output", "last"), "rows without LoRA"),
    Expected(_BOTTLENECK, "_store_fusion_attentions", ("self", "fusion_name", "attentions"), "reports of attention"),
    Expected(_BOTTLENECK, "_store_gating_score", ("self", "adapter_name", "gating_score"), "gated sources"),
    Expected(_BOTTLENECK, "get_adapter_fusion", ("self", "adapter_names"), "the host's own fusions in mixtures"),
    *(
        Expected(
            owner, "pre_forward", ("self", "hidden_states", "input_tensor", "layer_norm", "fusion_config"),
            "the input and residual of a source",
        )
        for owner in (modeling.Adapter, modeling.ParallelAdapter)
    ),
    Expected(modeling.Adapter, "post_forward", ("self", "hidden_states", "..."), "closes a block in mixtures"),
    Expected(modeling.Adapter, "forward", ("self", "x", "residual_input", "output_gating"), "what a source adds"),
    Expected(
        modeling.BertFusion, "forward", ("self", "query", "key", "value", "residual", "output_attentions"),
        "the host's own fusions in mixtures",
    ),
    Expected(modeling, "Activation_Function_Class", None, "whether sources have the same non-linearity"),
    Expected(modeling, "PHMLayer", None, "Compacter as a linear map"),
    Expected(model_mixin.ModelAdaptersMixin, "", ("iter_layers", "active_adapters"), "blocks and setups"),
    Expected(model_mixin, "ModelUsingSubmodelsAdaptersMixin", None, "models of an encoder and a decoder"),
    Expected(utils, "get_adapter_config_hash", ("config", "..."), "the key of a config in a model"),
    Expected(
        utils, "resolve_adapter_path", ("adapter_name_or_path", "model_name", "adapter_config", "version", "..."),
        "where an adapter's files are",
    ),
    Expected(
        loading.WeightsLoaderHelper, "rename_state_dict", ("self", "state_dict", "rename_funcs"),
        "the names under which a file's tensors are loaded",
    ),
)  # fmt: skip


def faults(expected: Iterable[Expected]) -> list[str]:
    """How the installed host differs from what is expected; empty if it does not."""
    return [f"{fault} (needed: {one.reason})" for one in expected if (fault := one.fault()) is not None]


def installed_version() -> str:
    """The version of adapters."""
    return str(adapters.__version__)
