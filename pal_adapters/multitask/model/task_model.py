"""One task of a `TaskHeads` as a model of its own, with the interface that transformers' pipelines expect."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import ModelOutput

from pal_adapters.errors import UnsupportedError

from .heads import HeadConfig
from .task_description import output_names

_PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


class TaskModelConfig(PretrainedConfig):
    """Makes `TaskModel` known to transformers' pipelines, which look models up by the class of their config."""

    model_type = "pal_adapters_task"


class TaskModel(nn.Module):
    """One task of a `TaskHeads`, see `TaskHeads.for_task`. Its weights are those of the whole model.

    Args:
        model: The `TaskHeads`.
        task: Name of the task.
        head: The configuration of its head.
        label_names: Names of its labels.

    Raises:
        UnsupportedError: For a language model, which has the whole model's own output layer.
    """

    config_class = TaskModelConfig

    def __init__(self, model: Any, task: str, head: HeadConfig, label_names: tuple[str, ...]) -> None:
        super().__init__()
        if head.kind == "language_modeling":
            raise UnsupportedError(f"task {task!r} is language_modeling: use a Predictor, which generates text.")
        self.model = model
        self.task = task
        self.head_config = head
        self.config = copy.deepcopy(model.config)
        names = label_names or output_names(head)
        if names:
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}
        self.config.problem_type = _PROBLEMS.get(head.kind)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base model's weights."""
        return next(p.dtype for p in self.model.backbone.parameters() if p.is_floating_point())

    def can_generate(self) -> bool:
        """False: such a task has no language model."""
        return False

    def forward(self, **inputs: Any) -> ModelOutput:
        """Logits in the output class that transformers has for the kind of the task.

        Args:
            **inputs: Arguments of the backbone, such as `input_ids` and `attention_mask`: `[b, n]`, or
                `[b, choices, n]` for `multiple_choice`.
        """
        inputs = {name: value for name, value in inputs.items() if value is not None}
        if self.head_config.kind == "multiple_choice":
            inputs = {name: value.flatten(0, 1) if value.dim() == 3 else value for name, value in inputs.items()}
        logits = self.model(task_ids=self.task, **inputs).logits[self.task]
        if self.head_config.kind == "token_tagging":
            return TokenClassifierOutput(logits=logits)
        if self.head_config.kind == "multiple_choice":
            return MultipleChoiceModelOutput(logits=logits)
        if self.head_config.kind == "span_qa":
            return QuestionAnsweringModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return SequenceClassifierOutput(logits=logits if logits.dim() == 2 else logits.unsqueeze(-1))


for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
    auto.register(TaskModelConfig, TaskModel, exist_ok=True)
