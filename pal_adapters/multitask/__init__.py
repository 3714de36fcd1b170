"""Many tasks on one model: task tables, data, metrics, sampling and a small training loop.

Needs the packages of the extra `train`.
"""

from .data import load_task, train_dev_split
from .loss import multi_task_loss
from .metrics import TaskMetric, primary_metric
from .models import ADAPTER_METHODS, HOSTS, METHODS, SIZED_METHODS, MultiTaskModel, default_host, default_model
from .network import NETWORKS, SAMPLERS, NetworkModel, fit_network
from .sampling import annealed_alpha, task_probabilities
from .tasks import TASKS, TaskDataError, TaskSpec, find_tasks, get_task, task_names
from .toy import TOY_TASKS, load_toy_task
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
    "SAMPLERS",
    "SIZED_METHODS",
    "TASKS",
    "TOY_TASKS",
    "BatchMaker",
    "DivergedError",
    "EncodedSplit",
    "FitResult",
    "MultiTaskModel",
    "NetworkModel",
    "Selection",
    "TaskData",
    "TaskDataError",
    "TaskMetric",
    "TaskSpec",
    "TrainingConfig",
    "TransferModel",
    "Uncertainty",
    "UncertaintySampler",
    "annealed_alpha",
    "baseline",
    "default_host",
    "default_model",
    "encode_rows",
    "find_tasks",
    "fit",
    "fit_network",
    "get_task",
    "load_task",
    "load_toy_task",
    "multi_task_loss",
    "precompute",
    "predict",
    "primary_metric",
    "score",
    "select_uncertain",
    "task_names",
    "task_probabilities",
    "train_dev_split",
    "uncertain_epoch_length",
    "uncertainty",
]
