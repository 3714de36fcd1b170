"""Multi-task task modules for Hugging Face models, inside the APIs of `adapters` and `peft`.

Importing the package registers its methods with each host that is installed. If a host is missing, using one of its
names raises an error that says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .blocks.sites import BlockSites, register_block
from .errors import (
    ConfigError,
    MissingHostError,
    PalAdaptersError,
    SiteError,
    StorageError,
    UnknownAdapterError,
    UnsupportedError,
    UntestedVersionWarning,
    how_to_install,
)
from .export import export_onnx, export_program
from .fusion.folding import check_fold, fold
from .fusion.penalty import fusion_regularization
from .fusion.report import plot_transfer, transfer_report
from .fusion.types import Folded, TransferTable
from .methods import load, register_method
from .methods.camtl.network import NetworkSize, add_task, network_size, train_tasks
from .methods.description import SitesTable, StackSites, describe_sites

if TYPE_CHECKING:
    from .fusion.adapters.config import ScaLearnConfig
    from .fusion.peft.config import AdapterFusionPeftConfig, FixedCombinationPeftConfig, ScaLearnPeftConfig
    from .methods.camtl.adapters import CAMTLConfig
    from .methods.camtl.peft import CAMTLPeftConfig
    from .methods.houlsby.adapters import HoulsbyPALConfig, ParallelHoulsbyConfig
    from .methods.houlsby.peft import HoulsbyPALPeftConfig, HoulsbyPeftConfig, ParallelHoulsbyPeftConfig
    from .methods.lhuc.adapters import LHUCConfig
    from .methods.lhuc.peft import LHUCPeftConfig
    from .methods.low_rank.adapters import LowRankConfig
    from .methods.low_rank.peft import LowRankPeftConfig
    from .methods.pal.adapters import PALConfig
    from .methods.pal.peft import PALPeftConfig
    from .methods.top.adapters import TopAttentionConfig, TopBertLayerConfig
    from .methods.top.peft import TopAttentionPeftConfig, TopBertLayerPeftConfig

__version__ = "0.1.0"

__all__ = [
    "AdapterFusionPeftConfig",
    "BlockSites",
    "CAMTLConfig",
    "CAMTLPeftConfig",
    "ConfigError",
    "FixedCombinationPeftConfig",
    "Folded",
    "HoulsbyPALConfig",
    "HoulsbyPALPeftConfig",
    "HoulsbyPeftConfig",
    "LHUCConfig",
    "LHUCPeftConfig",
    "LowRankConfig",
    "LowRankPeftConfig",
    "MissingHostError",
    "NetworkSize",
    "PALConfig",
    "PALPeftConfig",
    "PalAdaptersError",
    "ParallelHoulsbyConfig",
    "ParallelHoulsbyPeftConfig",
    "ScaLearnConfig",
    "ScaLearnPeftConfig",
    "SiteError",
    "SitesTable",
    "StackSites",
    "StorageError",
    "TopAttentionConfig",
    "TopAttentionPeftConfig",
    "TopBertLayerConfig",
    "TopBertLayerPeftConfig",
    "TransferTable",
    "UnknownAdapterError",
    "UnsupportedError",
    "UntestedVersionWarning",
    "add_task",
    "check_fold",
    "describe_sites",
    "export_onnx",
    "export_program",
    "fold",
    "fusion_regularization",
    "network_size",
    "plot_transfer",
    "register_block",
    "register_method",
    "train_tasks",
    "transfer_report",
]

_PUBLIC = tuple(__all__)
_FUSION = {"adapters": ("config",), "peft": ("tuner", "config")}
_missing: dict[str, str] = {}


def _load(host: str) -> None:
    if host not in sys.modules and importlib.util.find_spec(host) is None:
        _missing[host] = f"{host} is not installed"
        return
    try:
        importlib.import_module(host)
        globals().update(load(host))
        for name in _FUSION[host]:
            module = importlib.import_module(f"{__name__}.fusion.{host}.{name}")
            globals().update({key: value for key, value in vars(module).items() if key in _PUBLIC})
    except ImportError as error:  # the host, or a version of it that is not supported
        if (error.name or "").partition(".")[0] == __name__:
            raise
        _missing[host] = f"{host} could not be used ({error})"
        warnings.warn(f"pal_adapters works without {host}: {_missing[host]}.", stacklevel=3)


def __getattr__(name: str) -> Any:
    host = "peft" if "Peft" in name else "adapters"
    if name in _PUBLIC and host in _missing:
        raise MissingHostError(f"pal_adapters.{name} needs {host}, but {_missing[host]}; {how_to_install(host)}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


for _host in _FUSION:
    _load(_host)

# So that `from pal_adapters import *` works with one host.
__all__ = [name for name in _PUBLIC if name in globals()]
