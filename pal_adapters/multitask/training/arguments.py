"""The arguments of `MultiTaskTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from pal_adapters.checks import require_bool, require_int, require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.builtin import lower_is_better
from pal_adapters.multitask.sampling.strategies import STRATEGIES

from .environment import collected_environment
from .host_arguments import check_accelerator, check_host_arguments

SCHEDULES = ("own", "pals")
AGGREGATES = ("mean", "sum", "min", "max", "median")
_ADAMW = ("adamw_torch", "adamw_torch_fused")


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, extended for multi-task training.

    All other arguments behave as they do there or are rejected; see `training/host_arguments.py`.

    By default, `load_best_model_at_end=True` selects the best checkpoint by `metric_for_best_model="average"`, the
    `eval_aggregate` of the primary scores of all tasks. Unless `greater_is_better` is given, lower is better for
    metrics whose names end in perplexity, mse, rmse, mae, mape, smape, mase, wer, cer or loss.
    """

    sampling: str = field(
        default="proportional",
        metadata={"help": "How tasks are drawn: uniform, proportional, sqrt, temperature, annealed, round_robin, "
                  "uncertainty."},
    )  # fmt: skip
    sampling_temperature: float | None = field(default=None, metadata={"help": "Temperature of sampling=temperature."})
    mixed_batches: bool = field(default=False, metadata={"help": "Whether each example in a batch draws its task."})
    group_by_length: bool = field(
        default=False,
        metadata={"help": "Whether batches group examples of similar length; not with mixed batches."},
    )
    steps_per_epoch: int | None = field(
        default=None, metadata={"help": "Optimizer steps per epoch; by default enough for all examples."}
    )
    max_length: int = field(default=128, metadata={"help": "Maximum number of tokens of an input."})
    eval_aggregate: str = field(
        default="mean",
        metadata={"help": "How eval_average aggregates the primary scores: mean, sum, min, max, median."},
    )
    attention_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of queries, keys and values in task modules (the PALs code offers 3e-4)."},
    )
    adam_bias_correction: bool = field(
        default=True,
        metadata={"help": "Whether AdamW applies bias correction; the PALs code does not."},
    )
    max_tensor_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Clips each tensor's gradient to this norm, as in the PALs code, instead of max_grad_norm."},
    )
    schedule: str = field(
        default="own",
        metadata={"help": "own: lr_scheduler_type; pals: warm-up, then 1 - step / steps, as in the PALs code."},
    )

    def __post_init__(self) -> None:
        self._check_own()
        check_host_arguments(self)
        if self.load_best_model_at_end and getattr(self.save_strategy, "value", self.save_strategy) == "no":
            raise ConfigError(
                "load_best_model_at_end=True has no effect with save_strategy='no', which leaves nothing to load: use "
                "'steps' or 'epoch', as in eval_strategy."
            )
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "average"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not lower_is_better(self.metric_for_best_model)
        self._environment: dict[str, str] = {}
        with collected_environment(self._environment):
            super().__post_init__()
        check_accelerator(self)
        if self.fp16 and not self.deepspeed and self.device.type == "cpu":
            raise ConfigError(
                "fp16=True has no effect on CPU, where accelerate trains in fp32: use bf16 or leave it out."
            )
        if self.max_tensor_grad_norm is not None:
            self.max_grad_norm = 0.0
            if self.fp16:
                raise ConfigError(
                    "max_tensor_grad_norm is not supported with fp16, whose gradients are scaled: use bf16."
                )

    def _check_own(self) -> None:
        require_one_of("sampling", self.sampling, (*STRATEGIES, "temperature"))
        require_one_of("eval_aggregate", self.eval_aggregate, AGGREGATES)
        require_one_of("schedule", self.schedule, SCHEDULES)
        for name in ("mixed_batches", "group_by_length", "adam_bias_correction"):
            require_bool(name, getattr(self, name))
        for name in ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size",
                     "gradient_accumulation_steps"):  # fmt: skip
            require_int(name, getattr(self, name), minimum=1)
        if self.steps_per_epoch is not None:
            require_int("steps_per_epoch", self.steps_per_epoch, minimum=1)
        for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}={value!r} is not allowed: use a finite number.")
        for name in ("save", "eval"):
            strategy, every = getattr(self, f"{name}_strategy"), getattr(self, f"{name}_steps")
            if getattr(strategy, "value", strategy) == "steps" and every is not None and not every > 0:
                raise ConfigError(
                    f"{name}_steps={every!r} is not allowed for {name}_strategy='steps': use a number above 0."
                )
        if self.save_total_limit is not None:
            require_int("save_total_limit", self.save_total_limit, minimum=1)
        if self.max_steps == -1 and not 0 <= self.num_train_epochs < float("inf"):
            raise ConfigError(
                f"num_train_epochs={self.num_train_epochs!r} is not allowed: use a number of at least 0."
            )
        if self.max_steps != -1:
            require_int("max_steps", self.max_steps, minimum=1)
        for name in ("attention_learning_rate", "max_tensor_grad_norm"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < float("inf")):
                raise ConfigError(f"{name}={value!r} is not allowed: use a number above 0.")
        if self.group_by_length and (self.mixed_batches or self.sampling == "uncertainty"):
            raise ConfigError("group_by_length=True has no effect on batches that mix tasks: leave it out.")
        if (self.sampling == "temperature") is not (self.sampling_temperature is not None):
            raise ConfigError(
                f"sampling_temperature={self.sampling_temperature!r} is not allowed for sampling={self.sampling!r}: "
                "set it for 'temperature' and leave it out otherwise."
            )
        optim = getattr(self.optim, "value", self.optim)
        if not self.adam_bias_correction and (optim not in _ADAMW or getattr(self, "adafactor", False)):
            raise ConfigError(f"adam_bias_correction=False has no effect for optim={optim!r}: leave one of them out.")
        if self.optim_target_modules is not None and not {"galore", "apollo"} & set(str(optim).split("_")):
            raise ConfigError(f"optim_target_modules has no effect for optim={optim!r}: leave it out.")
        if not self.adam_bias_correction and self.optim_args:
            raise ConfigError("optim_args has no effect with adam_bias_correction=False: leave one of them out.")
        kind = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if self.schedule == "pals" and (kind != "linear" or self.lr_scheduler_kwargs):
            raise ConfigError("lr_scheduler_type and lr_scheduler_kwargs have no effect with schedule='pals'.")
        if self.max_tensor_grad_norm is not None and self.max_grad_norm not in (0.0, 1.0):
            raise ConfigError(
                f"max_grad_norm={self.max_grad_norm!r} has no effect with max_tensor_grad_norm: leave one of them out."
            )
