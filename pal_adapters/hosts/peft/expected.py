"""The private or replaced parts of PEFT that the package relies on; checked on import, and each has a test."""

from __future__ import annotations

import inspect
from pkgutil import resolve_name

from pal_adapters.hosts.expectations import Touch, check_touches, has, takes, warn_untested

TOUCHES = [
    Touch(
        "PeftType",
        "gets one member per method, as the enum is closed",
        has("peft:PeftType", "_member_map_", "_value2member_map_", "_member_names_"),
    ),
    Touch(
        "register_peft_method",
        "registers a method",
        takes("peft.utils.peft_types:register_peft_method", "name", "config_cls", "model_cls"),
    ),
    Touch(
        "BaseTuner._prepare_adapter_config",
        "overridden: finds the blocks of the model",
        takes("peft.tuners.tuners_utils:BaseTuner._prepare_adapter_config", "peft_config", "model_config"),
    ),
    Touch(
        "BaseTuner._check_target_module_exists",
        "overridden: PEFT's `layers_to_transform` does not match `layers.0`",
        takes("peft.tuners.tuners_utils:BaseTuner._check_target_module_exists", "peft_config", "key"),
    ),
    Touch(
        "_ExcludedModule",
        "marks a module that is excluded on purpose",
        has("peft.tuners.tuners_utils:_ExcludedModule"),
    ),
    Touch(
        "check_target_module_exists",
        "matches module names by LoRA's rules",
        takes("peft.tuners.tuners_utils:check_target_module_exists", "config", "key"),
    ),
    Touch(
        "_maybe_include_all_linear_layers",
        "the same, for `all-linear`",
        takes("peft.tuners.tuners_utils:_maybe_include_all_linear_layers", "peft_config", "model"),
    ),
    Touch(
        "BaseTuner.inject_adapter",
        "extended: an error leaves the model unchanged",
        takes("peft.tuners.tuners_utils:BaseTuner.inject_adapter", "model", "adapter_name", "state_dict"),
    ),
    Touch(
        "BaseTuner._create_and_replace",
        "overridden: the layer becomes a child of the block",
        takes(
            "peft.tuners.tuners_utils:BaseTuner._create_and_replace",
            "peft_config",
            "adapter_name",
            "target",
            "current_key",
        ),
    ),
    Touch(
        "BaseTuner._mark_only_adapters_as_trainable",
        "extended: `train_base`",
        takes("peft.tuners.tuners_utils:BaseTuner._mark_only_adapters_as_trainable", "model"),
    ),
    Touch(
        "BaseTunerLayer.set_adapter",
        "extended: `train_base` follows the active adapters",
        takes("peft.tuners.tuners_utils:BaseTunerLayer.set_adapter", "adapter_names", "inference_mode"),
    ),
    Touch(
        "BaseTunerLayer.enable_adapters",
        "the same",
        takes("peft.tuners.tuners_utils:BaseTunerLayer.enable_adapters", "enabled"),
    ),
    Touch(
        "BaseTunerLayer._get_base_layer_device_and_dtype",
        "overridden: supports quantised weights",
        takes("peft.tuners.tuners_utils:BaseTunerLayer._get_base_layer_device_and_dtype", "base_layer"),
    ),
    Touch(
        "BaseTuner._get_adapter_state_dict",
        "extended: `train_base`, and adapters named like a module",
        takes(
            "peft.tuners.tuners_utils:BaseTuner._get_adapter_state_dict",
            "model",
            "config",
            "adapter_name",
            "state_dict",
            "unwanted_adapter_names",
        ),
    ),
    Touch(
        "BaseTuner._remove_adapter_name_from_key",
        "overridden: several parts follow the adapter's name",
        takes("peft.tuners.tuners_utils:BaseTuner._remove_adapter_name_from_key", "key", "adapter_name"),
    ),
    Touch(
        "BaseTuner._remap_adapter_state_dict_for_load",
        "extended: checks every tensor, and loads `train_base`",
        takes(
            "peft.tuners.tuners_utils:BaseTuner._remap_adapter_state_dict_for_load",
            "model",
            "config",
            "adapter_name",
            "state_dict",
        ),
    ),
    Touch(
        "BaseTuner.delete_adapter",
        "extended: removes empty layers, and the same adapter is active in all",
        takes("peft.tuners.tuners_utils:BaseTuner.delete_adapter", "adapter_name"),
    ),
    Touch(
        "BaseTuner._check_merge_allowed",
        "overridden: raises before anything changes",
        has("peft.tuners.tuners_utils:BaseTuner", "_check_merge_allowed"),
    ),
    Touch(
        "BaseTuner._unload_and_optionally_merge",
        "extended: removes the package's layers",
        takes("peft.tuners.tuners_utils:BaseTuner._unload_and_optionally_merge", "merge"),
    ),
    Touch(
        "BaseTuner._enable_peft_forward_hooks",
        "provides `adapter_names`, also in training",
        has("peft:PeftModel", "_enable_peft_forward_hooks"),
    ),
    Touch(
        "ModulesToSaveWrapper.forward",
        "wrapped from the first `adapter_names` on, as PEFT's mixes single linear modules only",
        has("peft.utils.other:ModulesToSaveWrapper", "forward"),
    ),
    Touch(
        "PeftModel.forward",
        "hooked to reject or pass on `task_ids`, which PEFT drops silently",
        has("peft:PeftModel", "forward"),
    ),
    Touch(
        "PeftModel.special_peft_forward_args",
        "gets `task_ids` for tuners that route examples by it",
        lambda: "special_peft_forward_args" in inspect.getsource(resolve_name("peft:PeftModel.__init__")),
    ),
    Touch(
        "register_module_module_registration_hook",
        "of torch: finds the `PeftModel` that holds a tuner",
        has("torch.nn.modules.module:register_module_module_registration_hook"),
    ),
    Touch(
        "PreTrainedModel._gradient_checkpointing_func",
        "wrapped from the first `adapter_names` on, so that a recomputed block uses the same adapters",
        lambda: (
            "_gradient_checkpointing_func"
            in inspect.getsource(resolve_name("transformers:PreTrainedModel._set_gradient_checkpointing"))
        ),
    ),
    Touch(
        "load_peft_weights",
        "reads the tensors of a saved adapter, from disk or the Hub",
        takes("peft.utils:load_peft_weights", "model_id", "device", "key_mapping"),
    ),
    Touch(
        "get_peft_model_state_dict",
        "reads the tensors of an adapter on the model",
        takes("peft:get_peft_model_state_dict", "model", "adapter_name", "save_embedding_layers"),
    ),
    Touch("get_pattern_key", "the scaling of a LoRA adapter at a module", has("peft.utils.other:get_pattern_key")),
    Touch(
        "LoraConfig",
        "tells LoRA variants from plain `scaling * B A x`",
        has("peft:LoraConfig", "target_parameters", "layer_replication", "trainable_token_indices"),
    ),
    Touch(
        "PeftModel.__init__",
        "wrapped: an error leaves the base model unchanged",
        takes("peft:PeftModel.__init__", "model", "peft_config"),
    ),
    Touch(
        "PeftModel.add_adapter",
        "the same for the model and the config",
        takes("peft:PeftModel.add_adapter", "adapter_name", "peft_config"),
    ),
    Touch(
        "PeftModel.load_adapter",
        "the same, as PEFT adds an adapter before it reads the weights",
        takes("peft:PeftModel.load_adapter", "model_id", "adapter_name"),
    ),
    Touch("PeftModel.from_pretrained", "the same", takes("peft:PeftModel.from_pretrained", "model", "model_id")),
    Touch(
        "PeftModel.disable_adapter",
        "wrapped: raises if `train_base` has changed the base weights",
        has("peft:PeftModel", "disable_adapter"),
    ),
    Touch(
        "PeftAdapterMixin.add_adapter",
        "wrapped: an error leaves the model unchanged",
        takes("transformers.integrations.peft:PeftAdapterMixin.add_adapter", "adapter_config"),
    ),
    Touch(
        "PeftAdapterMixin.load_adapter",
        "the same; also checks what transformers 5 has loaded",
        takes("transformers.integrations.peft:PeftAdapterMixin.load_adapter", "peft_model_id", "adapter_name"),
    ),
    Touch(
        "PeftAdapterMixin.disable_adapters",
        "wrapped, as `PeftModel.disable_adapter`",
        has("transformers.integrations.peft:PeftAdapterMixin", "disable_adapters"),
    ),
    Touch(
        "PeftModel.create_or_update_model_card",
        "extended: adds the tag and the import that loading needs",
        takes("peft:PeftModel.create_or_update_model_card", "output_dir"),
    ),
]


def check() -> None:
    """Raise `MissingHostError` if the installed PEFT is not as expected; warn if it is untested."""
    check_touches("peft", TOUCHES)
    warn_untested("peft", "transformers")
