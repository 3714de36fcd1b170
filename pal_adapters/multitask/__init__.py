"""Multi-task training of one model: tasks and their data, heads, sampling, a `Trainer` and the recipes of the papers.

Requires the `train` extra.
"""

from pal_adapters.errors import StorageError
from pal_adapters.multitask.model.heads import HeadConfig
from pal_adapters.multitask.model.output import TaskHeadsOutput
from pal_adapters.multitask.model.routes import Route
from pal_adapters.multitask.model.task_description import TaskDescription
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.multitask.predict.predictions import Prediction
from pal_adapters.multitask.predict.predictor import Predictor
from pal_adapters.multitask.predict.requests import RequestError
from pal_adapters.multitask.sampling.selectors import BatchSelector, Candidates, UncertaintySelector
from pal_adapters.multitask.sampling.strategies import (
    STRATEGIES,
    MultiTaskBatchSampler,
    Strategy,
    Temperature,
    annealed_alpha,
    get_strategy,
    task_probabilities,
)
from pal_adapters.multitask.tasks.collate import MultiTaskCollator
from pal_adapters.multitask.tasks.encoding import ConcatTasks, EncodedTask
from pal_adapters.multitask.tasks.split import train_dev_split
from pal_adapters.multitask.tasks.task import Task
from pal_adapters.multitask.tasks.task_metric import TaskMetric
from pal_adapters.multitask.tasks.toy import TOY_TASKS, load_toy_task
from pal_adapters.multitask.tasks.types import TaskDataError
from pal_adapters.multitask.training.arguments import MultiTaskTrainingArguments
from pal_adapters.multitask.training.checkpoints import last_checkpoint
from pal_adapters.multitask.training.run_checks import DivergedError
from pal_adapters.multitask.training.trainer import MultiTaskTrainer

from .defaults import add_adapter, default_host, default_model
from .presets import PRESETS, Preset, RecipeWarning, get_preset

__all__ = [
    "PRESETS",
    "STRATEGIES",
    "TOY_TASKS",
    "BatchSelector",
    "Candidates",
    "ConcatTasks",
    "DivergedError",
    "EncodedTask",
    "HeadConfig",
    "MultiTaskBatchSampler",
    "MultiTaskCollator",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "Prediction",
    "Predictor",
    "Preset",
    "RecipeWarning",
    "RequestError",
    "Route",
    "StorageError",
    "Strategy",
    "Task",
    "TaskDataError",
    "TaskDescription",
    "TaskHeads",
    "TaskHeadsOutput",
    "TaskMetric",
    "Temperature",
    "UncertaintySelector",
    "add_adapter",
    "annealed_alpha",
    "default_host",
    "default_model",
    "get_preset",
    "get_strategy",
    "last_checkpoint",
    "load_toy_task",
    "task_probabilities",
    "train_dev_split",
]
