"""The private or replaced parts of PEFT that the package relies on; checked on import, and each has a test."""

from __future__ import annotations

from pal_adapters.hosts.expectations import Touch

_TUNERS, _MIXIN = "peft.tuners.tuners_utils:", "transformers.integrations.peft:PeftAdapterMixin."

RELIED_ON: tuple[Touch, ...] = (
    Touch(
        "peft:PeftType", ("_member_map_", "_value2member_map_", "_member_names_"),
        "gets one member per method, as the enum is closed",
    ),
    Touch(
        "peft.utils.peft_types:register_peft_method", ("...", "name", "config_cls", "model_cls"), "registers a method"
    ),
    Touch(
        _TUNERS + "BaseTuner._prepare_adapter_config", ("...", "peft_config", "model_config"),
        "overridden: finds the blocks of the model",
    ),
    Touch(
        _TUNERS + "BaseTuner._check_target_module_exists", ("...", "peft_config", "key"),
        "overridden: PEFT's `layers_to_transform` does not match `layers.0`",
    ),
    Touch(_TUNERS + "_ExcludedModule", None, "marks a module that is excluded on purpose"),
    Touch(
        _TUNERS + "check_target_module_exists", ("...", "config", "key"), "matches module names by LoRA's rules"
    ),
    Touch(
        _TUNERS + "_maybe_include_all_linear_layers", ("...", "peft_config", "model"), "the same, for `all-linear`"
    ),
    Touch(
        _TUNERS + "BaseTuner.inject_adapter", ("...", "model", "adapter_name", "state_dict"),
        "extended: an error leaves the model unchanged",
    ),
    Touch(
        _TUNERS + "BaseTuner._create_and_replace", ("...", "peft_config", "adapter_name", "target", "current_key"),
        "overridden: the layer becomes a child of the block",
    ),
    Touch(
        _TUNERS + "BaseTuner._mark_only_adapters_as_trainable", ("...", "model"), "extended: `train_base`"
    ),
    Touch(
        _TUNERS + "BaseTunerLayer.set_adapter", ("...", "adapter_names", "inference_mode"),
        "extended: `train_base` follows the active adapters",
    ),
    Touch(_TUNERS + "BaseTunerLayer.enable_adapters", ("...", "enabled"), "the same"),
    Touch(
        _TUNERS + "BaseTunerLayer.set_requires_grad", ("...", "adapter_names", "requires_grad"),
        "the same, for weights that an adapter trains in place",
    ),
    Touch(
        _TUNERS + "BaseTunerLayer.delete_adapter", ("...", "adapter_name"), "extended: puts such weights back",
    ),
    Touch(
        _TUNERS + "BaseTunerLayer._get_base_layer_device_and_dtype", ("...", "base_layer"),
        "overridden: supports quantised weights",
    ),
    Touch(
        _TUNERS + "BaseTuner._get_adapter_state_dict",
        ("...", "model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        "extended: `train_base`, and adapters named like a module",
    ),
    Touch(
        _TUNERS + "BaseTuner._remove_adapter_name_from_key", ("...", "key", "adapter_name"),
        "overridden: several parts follow the adapter's name",
    ),
    Touch(
        _TUNERS + "BaseTuner._remap_adapter_state_dict_for_load",
        ("...", "model", "config", "adapter_name", "state_dict"),
        "extended: checks every tensor, and loads `train_base`",
    ),
    Touch(
        _TUNERS + "BaseTuner.delete_adapter", ("...", "adapter_name"),
        "extended: removes empty layers, and the same adapter is active in all",
    ),
    Touch(_TUNERS + "BaseTuner._check_merge_allowed", None, "overridden: raises before anything changes"),
    Touch(
        _TUNERS + "BaseTuner._unload_and_optionally_merge", ("...", "merge"),
        "extended: removes the package's layers",
    ),
    Touch("peft:PeftModel._enable_peft_forward_hooks", None, "provides `adapter_names`, also in training"),
    Touch(
        "peft.utils.other:ModulesToSaveWrapper.forward", None,
        "wrapped from the first `adapter_names` on, as PEFT's mixes single linear modules only",
    ),
    Touch("peft:PeftModel.forward", None, "hooked to reject or pass on `task_ids`, which PEFT drops silently"),
    Touch(
        "peft:PeftModel.__init__", None, "lists what is passed on: `task_ids` too, for tuners that route by it",
        source="special_peft_forward_args",
    ),
    Touch(
        "torch.nn.modules.module:register_module_module_registration_hook", None,
        "of torch: finds the `PeftModel` that holds a tuner",
    ),
    Touch(
        "transformers:PreTrainedModel._set_gradient_checkpointing", None,
        "sets what is wrapped from the first `adapter_names` on, so that a recomputed block uses the same adapters",
        source="_gradient_checkpointing_func",
    ),
    Touch(
        "peft.utils:load_peft_weights", ("...", "model_id", "device", "key_mapping"),
        "reads the tensors of a saved adapter, from disk or the Hub",
    ),
    Touch(
        "peft:get_peft_model_state_dict", ("...", "model", "adapter_name", "save_embedding_layers"),
        "reads the tensors of an adapter on the model",
    ),
    Touch("peft.utils.other:get_pattern_key", None, "the scaling of a LoRA adapter at a module"),
    Touch(
        "peft:LoraConfig", ("target_parameters", "layer_replication", "trainable_token_indices"),
        "tells LoRA variants from plain `scaling * B A x`",
    ),
    Touch(
        "peft:PeftModel.__init__", ("...", "model", "peft_config"),
        "wrapped: an error leaves the base model unchanged",
    ),
    Touch(
        "peft:PeftModel.add_adapter", ("...", "adapter_name", "peft_config"),
        "the same for the model and the config",
    ),
    Touch(
        "peft:PeftModel.load_adapter", ("...", "model_id", "adapter_name"),
        "the same, as PEFT adds an adapter before it reads the weights",
    ),
    Touch("peft:PeftModel.from_pretrained", ("...", "model", "model_id"), "the same"),
    Touch(
        "peft:PeftModel.save_pretrained",
        ("...", "save_directory", "safe_serialization", "selected_adapters", "is_main_process"),
        "wrapped: pretrained weights of several adapters are stored once",
    ),
    Touch("peft:PeftModel.set_adapter", None, "wrapped: an error leaves the model unchanged"),
    Touch("peft:PeftModel.delete_adapter", None, "the same"),
    Touch(
        "peft.config:PeftConfigMixin.from_pretrained", ("...", "pretrained_model_name_or_path", "subfolder"),
        "wrapped: calls the method of the config's own class, which may have to know its folder",
    ),
    Touch(
        "peft:PeftModel.disable_adapter", None, "wrapped: raises if `train_base` has changed the base weights"
    ),
    Touch(_MIXIN + "add_adapter", ("...", "adapter_config"), "wrapped: an error leaves the model unchanged"),
    Touch(
        _MIXIN + "load_adapter", ("...", "peft_model_id", "adapter_name"),
        "the same; also checks what transformers 5 has loaded",
    ),
    Touch(
        _MIXIN + "delete_adapter", ("...", "adapter_names"),
        "wrapped: puts weights back that an adapter has trained in place",
    ),
    Touch(_MIXIN + "disable_adapters", None, "wrapped, as `PeftModel.disable_adapter`"),
    Touch(
        "peft:PeftModel.create_or_update_model_card", ("...", "output_dir"),
        "extended: adds the tag and the import that loading needs",
    ),
)  # fmt: skip
