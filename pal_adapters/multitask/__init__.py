"""Many tasks on one model: tasks and their data, heads, sampling, a `Trainer` and the recipes of the papers.

Needs the packages of the extra `train`.
"""

from .arguments import MultiTaskTrainingArguments
from .checkpoints import last_checkpoint
from .collate import MultiTaskCollator
from .data import train_dev_split
from .defaults import add_adapter, default_host, default_model
from .encoding import ConcatTasks, EncodedTask
from .heads import HeadConfig
from .metrics import TaskMetric
from .presets import PRESETS, Preset, RecipeWarning, get_preset
from .routing import Route
from .sampling import (
    STRATEGIES,
    MultiTaskBatchSampler,
    Strategy,
    Temperature,
    annealed_alpha,
    get_strategy,
    task_probabilities,
)
from .selectors import BatchSelector, Candidates, UncertaintySelector
from .storage import StorageError
from .task import Task
from .task_heads import TaskHeads, TaskHeadsOutput
from .tasks import TaskDataError
from .toy import TOY_TASKS, load_toy_task
from .trainer import DivergedError, MultiTaskTrainer

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
    "Preset",
    "RecipeWarning",
    "Route",
    "StorageError",
    "Strategy",
    "Task",
    "TaskDataError",
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
