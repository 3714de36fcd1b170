"""The arguments of `MultiTaskTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from pal_adapters.checks import require_one_of
from pal_adapters.errors import ConfigError
from pal_adapters.multitask.metrics.scores import lower_is_better
from pal_adapters.multitask.sampling.strategies import STRATEGIES

SCHEDULES = ("own", "pals")
AGGREGATES = ("mean", "sum", "min", "max", "median")


@dataclass
class MultiTaskTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with what many tasks need. Everything else means what it does there.

    With `load_best_model_at_end=True` the model is chosen by `metric_for_best_model="average"` unless told otherwise:
    the `eval_aggregate` over the primary scores of all tasks. Unless `greater_is_better` says otherwise, a small value
    is good of metrics whose name ends in perplexity, mse, rmse, mae or loss.
    """

    sampling: str = field(
        default="proportional",
        metadata={"help": "How tasks are drawn: uniform, proportional, sqrt, temperature, annealed, round_robin, "
                  "uncertainty."},
    )  # fmt: skip
    sampling_temperature: float | None = field(default=None, metadata={"help": "Temperature of that strategy."})
    mixed_batches: bool = field(default=False, metadata={"help": "Whether each row of a batch draws its task."})
    group_by_length: bool = field(
        default=False, metadata={"help": "Whether the rows of a batch are of like length; not with mixed batches."}
    )
    steps_per_epoch: int | None = field(
        default=None, metadata={"help": "Optimizer steps of an epoch; by default as many as all rows take."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens after which a text is cut."})
    eval_aggregate: str = field(
        default="mean", metadata={"help": "What eval_average is of the primary scores: mean, sum, min, max, median."}
    )
    attention_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of queries, keys and values in task modules (PALs offer 3e-4 for them)."},
    )
    adam_bias_correction: bool = field(
        default=True,
        metadata={"help": "Whether AdamW corrects the bias of its moments; PALs do not."},
    )
    max_tensor_grad_norm: float | None = field(
        default=None, metadata={"help": "Bound of the gradient of each tensor, as in PALs, instead of max_grad_norm."}
    )
    schedule: str = field(
        default="own",
        metadata={"help": "own: lr_scheduler_type; pals: warm-up, then 1 - step / steps, as in the code of PALs."},
    )

    def __post_init__(self) -> None:
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "average"
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            self.greater_is_better = not lower_is_better(self.metric_for_best_model)
        super().__post_init__()
        require_one_of("sampling", self.sampling, (*STRATEGIES, "temperature"))
        require_one_of("eval_aggregate", self.eval_aggregate, AGGREGATES)
        require_one_of("schedule", self.schedule, SCHEDULES)
        # transformers 5 has this for what a batch is made of; 4.57 does not.
        strategy = getattr(self, "train_sampling_strategy", "random")
        if strategy != "random":
            raise ConfigError(
                f"train_sampling_strategy={strategy!r} has no effect here, where rows are drawn by task: leave it "
                "out, and see sampling and group_by_length."
            )
        if self.group_by_length and (self.mixed_batches or self.sampling == "uncertainty"):
            raise ConfigError("group_by_length=True has no effect on batches that mix tasks: leave it out.")
        if (self.sampling == "temperature") is not (self.sampling_temperature is not None):
            raise ConfigError(
                f"sampling_temperature={self.sampling_temperature!r} is not allowed for sampling={self.sampling!r}: "
                "give it for 'temperature', and leave it out otherwise."
            )
        if self.fp16 and not self.deepspeed and self.device.type == "cpu":
            raise ConfigError(
                "fp16=True has no effect on CPU, where accelerate trains in fp32: use bf16 or leave it out."
            )
        if self.max_tensor_grad_norm is not None:
            self.max_grad_norm = 0.0
            if self.fp16:
                raise ConfigError(
                    "max_tensor_grad_norm is not possible with fp16, whose gradients are scaled: use bf16."
                )
        if self.label_smoothing_factor:
            raise ConfigError("label_smoothing_factor has no effect here: give the Task a loss of its own.")
