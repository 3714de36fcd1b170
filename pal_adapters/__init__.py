"""Multi-task task modules for Hugging Face models, inside the APIs of `adapters` and `peft`.

Importing the package registers its methods with every host that is installed. A host that is missing costs nothing;
using one of its names then says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .camtl.network import NetworkSize, add_task, network_size
from .errors import (
    ConfigError,
    MissingHostError,
    PalAdaptersError,
    SiteError,
    UnknownAdapterError,
    UnsupportedError,
)
from .fusion.folding import Folded, fold
from .fusion.host import fusion_regularization
from .fusion.report import TransferTable, plot_transfer, transfer_report
from .hosts.sites import BlockSites, register_block

if TYPE_CHECKING:
    from .camtl.adapters import CAMTLConfig
    from .camtl.peft import CAMTLPeftConfig
    from .fusion.adapters import ScaLearnConfig
    from .fusion.peft_config import AdapterFusionPeftConfig, FixedCombinationPeftConfig, ScaLearnPeftConfig
    from .houlsby.adapters import HoulsbyPALConfig, ParallelHoulsbyConfig
    from .houlsby.peft import HoulsbyPeftConfig
    from .houlsby.variants_peft import HoulsbyPALPeftConfig, ParallelHoulsbyPeftConfig
    from .lhuc.adapters import LHUCConfig
    from .lhuc.peft import LHUCPeftConfig
    from .low_rank.adapters import LowRankConfig
    from .low_rank.peft import LowRankPeftConfig
    from .pal.adapters import PALConfig
    from .pal.peft import PALPeftConfig
    from .top.adapters import TopAttentionConfig, TopBertLayerConfig
    from .top.peft import TopAttentionPeftConfig, TopBertLayerPeftConfig

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
    "TopAttentionConfig",
    "TopAttentionPeftConfig",
    "TopBertLayerConfig",
    "TopBertLayerPeftConfig",
    "TransferTable",
    "UnknownAdapterError",
    "UnsupportedError",
    "add_task",
    "fold",
    "fusion_regularization",
    "network_size",
    "plot_transfer",
    "register_block",
    "transfer_report",
]

_MODULES = {
    "adapters": (
        "pal.adapters",
        "low_rank.adapters",
        "top.adapters",
        "lhuc.adapters",
        "houlsby.adapters",
        "fusion.adapters",
        "camtl.adapters",
    ),
    "peft": (
        "pal.peft",
        "low_rank.peft",
        "top.peft",
        "lhuc.peft",
        "houlsby.peft",
        "houlsby.variants_peft",
        "fusion.peft",
        "fusion.peft_config",
        "camtl.peft",
    ),
}
_HOSTED = tuple(__all__)
_missing: dict[str, str] = {}


def _load(host: str) -> None:
    if host not in sys.modules and importlib.util.find_spec(host) is None:
        _missing[host] = f"{host} is not installed"
        return
    try:
        importlib.import_module(host)
        modules = [importlib.import_module(f"{__name__}.{module}") for module in _MODULES[host]]
    except ImportError as error:  # also a version that is not supported
        _missing[host] = f"{host} could not be used ({error})"
        warnings.warn(f"pal_adapters works without {host}: {_missing[host]}.", stacklevel=3)
        return
    for module in modules:
        for name in _HOSTED:
            value = getattr(module, name, None)
            if value is not None and getattr(value, "__module__", None) == module.__name__:
                globals()[name] = value


def __getattr__(name: str) -> Any:
    if name in _HOSTED:
        host = "peft" if "Peft" in name else "adapters"
        raise MissingHostError(
            f"pal_adapters.{name} needs {host}, but {_missing.get(host, 'it was not loaded')}: "
            f"pip install 'pal-adapters[{host}]'."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOSTED})


for _host in _MODULES:
    _load(_host)

# So that `from pal_adapters import *` works with one host.
__all__ = [name for name in _HOSTED if name in globals()]
