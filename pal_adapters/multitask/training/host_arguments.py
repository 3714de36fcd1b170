"""How every argument of `transformers.TrainingArguments` is treated: honoured as it is there, or rejected.

`tests/multitask/training/test_host_arguments.py` fails if a version of transformers has an argument that is
neither in `HONOURED` nor in `REJECTED`.
"""

from __future__ import annotations

from typing import Any

from pal_adapters.errors import ConfigError

REJECTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "average_tokens_across_devices": ((True,), "the loss of a task is averaged over all processes: leave it out"),
    "batch_eval_metrics": ((False,), "the scores of a task are computed over all of its examples: leave it out"),
    "dataloader_drop_last": (
        (False,),
        "training batches are always full, and evaluation needs every example: leave it out",
    ),
    "ddp_find_unused_parameters": (
        (None, True),
        "the parameters of tasks that are absent from a step are unused in it: leave it out",
    ),
    "ddp_static_graph": ((None, False), "the graph depends on the tasks of a step: leave it out"),
    "eval_do_concat_batches": ((True,), "the scores of a task are computed over all of its examples: leave it out"),
    "eval_use_gather_object": ((False,), "only tensors are gathered: leave it out"),
    "include_for_metrics": ((None, [], ()), "a metric gets the predictions and labels of its task: leave it out"),
    "include_inputs_for_metrics": ((False,), "a metric gets the predictions and labels of its task: leave it out"),
    "jit_mode_eval": ((False,), "a model that routes examples to tasks cannot be traced: leave it out"),
    "label_names": ((None, ["labels"]), "labels are grouped by task: leave it out"),
    "label_smoothing_factor": ((0, 0.0), "each task has its own loss: give the Task a loss"),
    "length_column_name": (("length",), "lengths are those of the encoded examples: leave it out"),
    "liger_kernel_config": ((None,), "only a PreTrainedModel gets Liger kernels: apply them to the backbone first"),
    "parallelism_config": ((None,), "only data parallelism is supported: use DDP (torchrun) or FSDP 2"),
    "past_index": ((-1,), "no state is passed from batch to batch: leave it out"),
    "prediction_loss_only": ((False,), "the scores of a task need its predictions: leave it out"),
    "remove_unused_columns": ((True,), "a Task names the columns that it reads: leave it out"),
    "save_safetensors": ((True,), "checkpoints are always safetensors: leave it out"),
    "train_sampling_strategy": (
        ("random",),
        "examples are drawn by task: see sampling and group_by_length",
    ),
    "use_legacy_prediction_loop": ((False,), "the scores of a task need the current evaluation loop: leave it out"),
    "use_liger_kernel": ((False,), "only a PreTrainedModel gets Liger kernels: apply them to the backbone first"),
}
"""Arguments that are only accepted with one of these values, and why."""

HONOURED = frozenset(
    {
        "output_dir", "overwrite_output_dir", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
        "per_device_train_batch_size", "per_device_eval_batch_size", "per_gpu_train_batch_size",
        "per_gpu_eval_batch_size", "num_train_epochs", "max_steps", "gradient_accumulation_steps",
        "auto_find_batch_size", "learning_rate", "weight_decay", "adam_beta1",
        "adam_beta2", "adam_epsilon", "adafactor", "optim", "optim_args", "optim_target_modules", "max_grad_norm",
        "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "neftune_noise_alpha",
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "bf16_full_eval",
        "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_dir",
        "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level",
        "log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project",
        "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_tokens_per_second",
        "include_num_input_tokens_seen", "skip_memory_metrics", "save_strategy", "save_steps", "save_total_limit",
        "save_on_each_node", "save_only_model", "enable_jit_checkpoint", "restore_callback_states_from_checkpoint",
        "ignore_data_skip", "push_to_hub", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token",
        "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "no_cuda",
        "use_cpu", "use_mps_device", "seed", "data_seed", "full_determinism", "bf16", "fp16", "fp16_backend",
        "fp16_opt_level", "half_precision_backend", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs",
        "activation_checkpointing", "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend",
        "torch_compile_mode", "torchdynamo", "torch_empty_cache_steps", "use_cache", "dataloader_num_workers",
        "dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_in_order",
        "dataloader_multiprocessing_context", "group_by_length", "local_rank", "ddp_backend",
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_timeout", "fsdp", "fsdp_config", "fsdp_min_num_params",
        "fsdp_transformer_layer_cls_to_wrap", "deepspeed", "accelerator_config", "ray_scope", "mp_parameters",
        "tpu_num_cores", "tpu_metrics_debug", "debug", "_n_gpu",
    }
)  # fmt: skip
"""Arguments that behave as in `transformers.Trainer`, within the limits that other checks set."""


def check_host_arguments(args: Any) -> None:
    """Raise `ConfigError` for the first argument that would be ignored, or would fail in the middle of a run."""
    for name, (allowed, reason) in REJECTED.items():
        value = getattr(args, name, allowed[0])
        if not any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in allowed):
            raise ConfigError(f"{name}={value!r} is not supported: {reason}.")


def check_accelerator(args: Any) -> None:
    """Raise `ConfigError` for an `accelerator_config` that distributes batches differently from the sampler."""
    for name, usual in (("split_batches", (False,)), ("dispatch_batches", (None, False)), ("even_batches", (True,))):
        value = getattr(args.accelerator_config, name, usual[0])
        if value not in usual:
            raise ConfigError(
                f"accelerator_config with {name}={value!r} is not supported: the sampler makes whole batches for "
                "every process: leave it out."
            )
