"""What the binding expects of `adapters`, without replacing it; `patches.REPLACED` lists what is replaced.

Both were read from adapters 1.3.
"""

from __future__ import annotations

from pal_adapters.hosts.expectations import Touch

_MODELING = "adapters.methods.modeling:"
_LAYER = "adapters.methods.adapter_layer_base:AdapterLayerBase."
_COMPOSABLE = "adapters.methods.adapter_layer_base:ComposableAdapterLayerBase."
_BOTTLENECK = "adapters.methods.bottleneck:BottleneckLayer."
_SETUP = ("self", "adapter_setup", "state", "lvl")

RELIED_ON: tuple[Touch, ...] = (
    Touch("adapters:AdapterConfig.load", ("config", "..."), "configs are read from names, strings and dicts"),
    Touch("adapters:AdapterConfig.from_dict", ("config",), "overridden to reject unknown options"),
    Touch("adapters:AdapterConfig.to_dict", ("self",), "what a file holds of a config"),
    Touch(
        "adapters:AdapterFusionConfig",
        ("key", "query", "value", "query_before_ln", "regularization", "residual_before", "temperature",
         "value_before_softmax", "value_initialized", "dropout_prob"),
        "a fusion config has these fields, and they are left out of files so that a bare host raises",
    ),
    Touch(
        "adapters.utils:resolve_adapter_config", ("config", "local_map", "kwargs"), "what a fusion config refers to"
    ),
    Touch("adapters:ModelAdaptersConfig.get", ("self", "adapter_name"), "an adapter's config"),
    Touch(
        "adapters:ModelAdaptersConfig.match", ("self", "adapter_name", "config_type", "..."), "a bottleneck's config"
    ),
    Touch(
        "adapters:ModelAdaptersConfig.common_config_value", ("self", "adapter_names", "attribute"),
        "at which places the sources of a fusion act",
    ),
    Touch("adapters.methods.adapter_layer_base:AdapterLayerBase", ("layer_idx",), "the block that a layer belongs to"),
    Touch(_LAYER + "add_adapter", ("self", "adapter_name", "layer_idx"), "overridden by TaskLayer"),
    Touch(
        _LAYER + "average_adapter", ("self", "adapter_name", "input_adapters", "combine_strategy", "kwargs"),
        "overridden by TaskLayer for shared tensors",
    ),
    Touch(
        _LAYER + "enable_adapters", ("self", "adapter_setup", "unfreeze_adapters", "unfreeze_fusion"),
        "overridden by TaskLayer for shared tensors and a trained base",
    ),
    Touch(_LAYER + "freeze_adapter", ("self", "adapter_name", "freeze"), "overridden by TaskLayer"),
    Touch(_LAYER + "delete_adapter", ("self", "adapter_name"), "overridden by TaskLayer"),
    Touch(_LAYER + "get_active_setup", ("self",), "overridden by TaskLayer"),
    *(
        Touch(_COMPOSABLE + f"compose_{block}", _SETUP, "overridden for values")
        for block in ("single", "stack", "fuse", "split", "batch_split", "multi_task", "parallel", "average")
    ),
    Touch(_COMPOSABLE + "compose", ("self", "adapter_setup", "state"), "runs the active setup"),
    Touch(_COMPOSABLE + "vslice", ("self", "state", "slice_obj"), "overridden for values"),
    Touch(_COMPOSABLE + "repeat", ("self", "state", "channels"), "overridden for values"),
    Touch(_COMPOSABLE + "pad_and_concat", ("self", "states"), "overridden for values"),
    Touch(_COMPOSABLE + "mean", ("self", "states", "weights"), "overridden for values"),
    Touch(
        _COMPOSABLE + "check_composition_valid", ("self", "parent", "child", "lvl"), "called for nested compositions"
    ),
    Touch(_COMPOSABLE + "_get_compose_func", ("self", "composition_type"), "called for nested compositions"),
    Touch("adapters.composition:ALLOWED_NESTINGS", None, "the compositions that exist"),
    Touch("adapters.context:AdapterSetup.get_context", None, "the setup of the running call"),
    Touch("adapters.context:ForwardContext.get_context", None, "the state of the running call"),
    Touch("adapters.context:ForwardContext", ("context_args",), "which arguments of a model reach that state"),
    Touch(
        "adapters.methods.bottleneck:BottleneckState",
        ("hidden_states", "input_tensor", "adapter_residual", "layer_norm", "bottleneck_up", "last"),
        "the state of this package's fusions",
    ),
    Touch(
        "adapters.methods.lora:LoRAState", ("layer_input", "hidden_states", "layer_output", "last"),
        "examples without LoRA",
    ),
    Touch(_BOTTLENECK + "_store_fusion_attentions", ("self", "fusion_name", "attentions"), "reports of attention"),
    Touch(_BOTTLENECK + "_store_gating_score", ("self", "adapter_name", "gating_score"), "gated sources"),
    Touch(_BOTTLENECK + "get_adapter_fusion", ("self", "adapter_names"), "the host's own fusions in mixtures"),
    *(
        Touch(
            _MODELING + f"{owner}.pre_forward",
            ("self", "hidden_states", "input_tensor", "layer_norm", "fusion_config"),
            "the input and residual of a source",
        )
        for owner in ("Adapter", "ParallelAdapter")
    ),
    Touch(_MODELING + "Adapter.post_forward", ("self", "hidden_states", "..."), "closes a block in mixtures"),
    Touch(_MODELING + "Adapter.forward", ("self", "x", "residual_input", "output_gating"), "what a source adds"),
    Touch(
        _MODELING + "BertFusion.forward", ("self", "query", "key", "value", "residual", "output_attentions"),
        "the host's own fusions in mixtures",
    ),
    Touch(_MODELING + "Activation_Function_Class", None, "whether sources have the same non-linearity"),
    Touch(_MODELING + "PHMLayer", None, "Compacter as a linear map"),
    Touch("adapters:ModelAdaptersMixin", ("iter_layers", "active_adapters"), "blocks and setups"),
    Touch("adapters.model_mixin:ModelUsingSubmodelsAdaptersMixin", None, "models of an encoder and a decoder"),
    Touch("adapters.utils:get_adapter_config_hash", ("config", "..."), "the key of a config in a model"),
    Touch(
        "adapters.utils:resolve_adapter_path",
        ("adapter_name_or_path", "model_name", "adapter_config", "version", "..."),
        "where an adapter's files are",
    ),
    Touch(
        "adapters.loading:WeightsLoaderHelper.rename_state_dict", ("self", "state_dict", "rename_funcs"),
        "the names under which a file's tensors are loaded",
    ),
)  # fmt: skip
