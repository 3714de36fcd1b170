"""What the package relies on in PEFT and replaces there. Checked when PEFT is bound to; each entry has a test."""

from __future__ import annotations

import inspect

import peft
import torch
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import peft_types
from peft.utils.other import ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin

from pal_adapters.hosts.expectations import Touch, check_touches, has, takes, warn_untested

TOUCHES = [
    Touch(
        "PeftType",
        "gets a member for each method, as the enum is closed",
        has(peft.PeftType, "_member_map_", "_value2member_map_", "_member_names_"),
    ),
    Touch(
        "register_peft_method",
        "the host's own registration",
        takes(peft_types, "register_peft_method", "name", "config_cls", "model_cls"),
    ),
    Touch(
        "BaseTuner._prepare_adapter_config",
        "overridden: blocks are found from the model",
        takes(BaseTuner, "_prepare_adapter_config", "peft_config", "model_config"),
    ),
    Touch(
        "BaseTuner._check_target_module_exists",
        "overridden: the host's `layers_to_transform` misses `layers.0`",
        takes(BaseTuner, "_check_target_module_exists", "peft_config", "key"),
    ),
    Touch(
        "_ExcludedModule",
        "the host's sign for a module that is left out on purpose",
        has(tuners_utils, "_ExcludedModule"),
    ),
    Touch(
        "check_target_module_exists",
        "the host's matching, for module names as LoRA takes them",
        takes(tuners_utils, "check_target_module_exists", "config", "key"),
    ),
    Touch(
        "_maybe_include_all_linear_layers",
        "the same, for `all-linear`",
        takes(tuners_utils, "_maybe_include_all_linear_layers", "peft_config", "model"),
    ),
    Touch(
        "BaseTuner.inject_adapter",
        "extended: an error leaves the model as it was",
        takes(BaseTuner, "inject_adapter", "model", "adapter_name", "state_dict"),
    ),
    Touch(
        "BaseTuner._create_and_replace",
        "overridden: the layer becomes a child of the block",
        takes(BaseTuner, "_create_and_replace", "peft_config", "adapter_name", "target", "current_key"),
    ),
    Touch(
        "BaseTuner._mark_only_adapters_as_trainable",
        "extended: `train_base`",
        takes(BaseTuner, "_mark_only_adapters_as_trainable", "model"),
    ),
    Touch(
        "BaseTunerLayer.set_adapter",
        "extended: `train_base` follows the active adapters",
        takes(BaseTunerLayer, "set_adapter", "adapter_names", "inference_mode"),
    ),
    Touch("BaseTunerLayer.enable_adapters", "the same", takes(BaseTunerLayer, "enable_adapters", "enabled")),
    Touch(
        "BaseTunerLayer._get_base_layer_device_and_dtype",
        "overridden: packed weights",
        takes(BaseTunerLayer, "_get_base_layer_device_and_dtype", "base_layer"),
    ),
    Touch(
        "BaseTuner._get_adapter_state_dict",
        "extended: `train_base`, and adapters named like a module",
        takes(
            BaseTuner,
            "_get_adapter_state_dict",
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
        takes(BaseTuner, "_remove_adapter_name_from_key", "key", "adapter_name"),
    ),
    Touch(
        "BaseTuner._remap_adapter_state_dict_for_load",
        "extended: checks every tensor, and loads `train_base`",
        takes(BaseTuner, "_remap_adapter_state_dict_for_load", "model", "config", "adapter_name", "state_dict"),
    ),
    Touch(
        "BaseTuner.delete_adapter",
        "extended: no empty layer stays, one adapter is active in all layers",
        takes(BaseTuner, "delete_adapter", "adapter_name"),
    ),
    Touch(
        "BaseTuner._check_merge_allowed",
        "overridden: raises before anything changes",
        has(BaseTuner, "_check_merge_allowed"),
    ),
    Touch(
        "BaseTuner._unload_and_optionally_merge",
        "extended: takes our layers out",
        takes(BaseTuner, "_unload_and_optionally_merge", "merge"),
    ),
    Touch(
        "BaseTuner._enable_peft_forward_hooks",
        "provided: `adapter_names`, in training too",
        has(peft.PeftModel, "_enable_peft_forward_hooks"),
    ),
    Touch(
        "ModulesToSaveWrapper.forward",
        "replaced while `adapter_names` is in force: the host's mixes single linear modules only",
        has(ModulesToSaveWrapper, "forward"),
    ),
    Touch(
        "PeftModel.forward",
        "hooked, to reject `task_ids` or to let them pass: the host drops them silently",
        has(peft.PeftModel, "forward"),
    ),
    Touch(
        "PeftModel.special_peft_forward_args",
        "gets `task_ids` for tuners that route examples by it",
        lambda: "special_peft_forward_args" in inspect.getsource(peft.PeftModel.__init__),
    ),
    Touch(
        "register_module_module_registration_hook",
        "of torch: shows the `PeftModel` that holds a tuner",
        has(torch.nn.modules.module, "register_module_module_registration_hook"),
    ),
    Touch(
        "PreTrainedModel._gradient_checkpointing_func",
        "wrapped while `adapter_names` is in force, so that a block that runs again sees the same examples",
        lambda: "_gradient_checkpointing_func" in inspect.getsource(PreTrainedModel._set_gradient_checkpointing),
    ),
    Touch(
        "load_peft_weights",
        "reads the tensors of a saved adapter, from disk or the Hub",
        takes(peft.utils, "load_peft_weights", "model_id", "device", "key_mapping"),
    ),
    Touch(
        "get_peft_model_state_dict",
        "reads those of an adapter that is on the model",
        takes(peft, "get_peft_model_state_dict", "model", "adapter_name", "save_embedding_layers"),
    ),
    Touch("get_pattern_key", "the scaling of a LoRA adapter at a module", has(peft.utils.other, "get_pattern_key")),
    Touch(
        "LoraConfig",
        "which LoRA adapters are more than `scaling * B A x`",
        has(peft.LoraConfig, "target_parameters", "layer_replication", "trainable_token_indices"),
    ),
    Touch(
        "PeftModel.__init__",
        "wrapped: an error leaves the base model as it was",
        takes(peft.PeftModel, "__init__", "model", "peft_config"),
    ),
    Touch(
        "PeftModel.add_adapter",
        "the same for the model and the config",
        takes(peft.PeftModel, "add_adapter", "adapter_name", "peft_config"),
    ),
    Touch(
        "PeftModel.load_adapter",
        "the same; the host adds an adapter before it reads its weights",
        takes(peft.PeftModel, "load_adapter", "model_id", "adapter_name"),
    ),
    Touch("PeftModel.from_pretrained", "the same", takes(peft.PeftModel, "from_pretrained", "model", "model_id")),
    Touch(
        "PeftModel.disable_adapter",
        "wrapped: raises where `train_base` has changed the base",
        has(peft.PeftModel, "disable_adapter"),
    ),
    Touch(
        "PeftAdapterMixin.add_adapter",
        "wrapped: an error leaves the model as it was",
        takes(PeftAdapterMixin, "add_adapter", "adapter_config"),
    ),
    Touch(
        "PeftAdapterMixin.load_adapter",
        "the same; checks what transformers 5 has loaded",
        takes(PeftAdapterMixin, "load_adapter", "peft_model_id", "adapter_name"),
    ),
    Touch(
        "PeftAdapterMixin.disable_adapters",
        "wrapped, as `PeftModel.disable_adapter`",
        has(PeftAdapterMixin, "disable_adapters"),
    ),
    Touch(
        "PeftModel.create_or_update_model_card",
        "extended: the tag and the import that an adapter of this package needs",
        takes(peft.PeftModel, "create_or_update_model_card", "output_dir"),
    ),
]


def check() -> None:
    """Raise `MissingHostError` if the installed PEFT is not as expected; warn if it is untested."""
    check_touches("peft", TOUCHES)
    warn_untested("peft", "transformers")
