"""Many tasks on one model: task tables, data, metrics, sampling and a small training loop.

Needs the packages of the extra `train`.
"""

from .arguments import MultiTaskTrainingArguments
from .checkpoints import last_checkpoint
from .collate import MultiTaskCollator
from .data import load_task, train_dev_split
from .encoding import ConcatTasks, EncodedTask
from .heads import HeadConfig
from .loss import multi_task_loss
from .metrics import TaskMetric, primary_metric
from .models import ADAPTER_METHODS, HOSTS, METHODS, SIZED_METHODS, MultiTaskModel, default_host, default_model
from .network import NETWORKS, SAMPLERS, NetworkModel, fit_network
from .presets import PRESETS, Preset, RecipeWarning, get_preset, scalearn_arguments
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
from .task_heads import Route, TaskHeads, TaskHeadsOutput
from .tasks import TASKS, TaskDataError, TaskSpec, find_tasks, get_task, task_names
from .toy import TOY_TASKS, load_toy_task
from .trainer import MultiTaskTrainer
from .training import (
    BatchMaker,
    DivergedError,
    EncodedSplit,
    FitResult,
    TaskData,
    TrainingConfig,
    baseline,
    encode_rows,
    fit,
    precompute,
    predict,
    score,
)
from .transfer import COMBINATIONS, TransferModel
from .uncertainty import (
    Selection,
    Uncertainty,
    UncertaintySampler,
    select_uncertain,
    uncertain_epoch_length,
    uncertainty,
)

__all__ = [
    "ADAPTER_METHODS",
    "COMBINATIONS",
    "HOSTS",
    "METHODS",
    "NETWORKS",
    "PRESETS",
    "SAMPLERS",
    "SIZED_METHODS",
    "STRATEGIES",
    "TASKS",
    "TOY_TASKS",
    "BatchMaker",
    "BatchSelector",
    "Candidates",
    "ConcatTasks",
    "DivergedError",
    "EncodedSplit",
    "EncodedTask",
    "FitResult",
    "HeadConfig",
    "MultiTaskBatchSampler",
    "MultiTaskCollator",
    "MultiTaskModel",
    "MultiTaskTrainer",
    "MultiTaskTrainingArguments",
    "NetworkModel",
    "Preset",
    "RecipeWarning",
    "Route",
    "Selection",
    "StorageError",
    "Strategy",
    "Task",
    "TaskData",
    "TaskDataError",
    "TaskHeads",
    "TaskHeadsOutput",
    "TaskMetric",
    "TaskSpec",
    "Temperature",
    "TrainingConfig",
    "TransferModel",
    "Uncertainty",
    "UncertaintySampler",
    "UncertaintySelector",
    "annealed_alpha",
    "baseline",
    "default_host",
    "default_model",
    "encode_rows",
    "find_tasks",
    "fit",
    "fit_network",
    "get_preset",
    "get_strategy",
    "get_task",
    "last_checkpoint",
    "load_task",
    "load_toy_task",
    "multi_task_loss",
    "precompute",
    "predict",
    "primary_metric",
    "scalearn_arguments",
    "score",
    "select_uncertain",
    "task_names",
    "task_probabilities",
    "train_dev_split",
    "uncertain_epoch_length",
    "uncertainty",
]
