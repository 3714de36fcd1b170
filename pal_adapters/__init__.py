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

from .blocks.sites import BlockSites, register_block
from .errors import ConfigError, MissingHostError, PalAdaptersError, SiteError, UnknownAdapterError, UnsupportedError
from .fusion.folding import fold
from .fusion.penalty import fusion_regularization
from .fusion.report import plot_transfer, transfer_report
from .fusion.types import Folded, TransferTable
from .methods.camtl.network import NetworkSize, add_task, network_size

if TYPE_CHECKING:
    from .fusion.adapters.config import ScaLearnConfig
    from .fusion.peft.config import AdapterFusionPeftConfig, FixedCombinationPeftConfig, ScaLearnPeftConfig
    from .methods.camtl.adapters import CAMTLConfig
    from .methods.camtl.peft import CAMTLPeftConfig
    from .methods.houlsby.adapters import HoulsbyPALConfig, ParallelHoulsbyConfig
    from .methods.houlsby.peft import HoulsbyPeftConfig
    from .methods.houlsby.variants_peft import HoulsbyPALPeftConfig, ParallelHoulsbyPeftConfig
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
        "methods.pal.adapters",
        "methods.low_rank.adapters",
        "methods.top.adapters",
        "methods.lhuc.adapters",
        "methods.houlsby.adapters",
        "fusion.adapters.config",
        "methods.camtl.adapters",
    ),
    "peft": (
        "methods.pal.peft",
        "methods.low_rank.peft",
        "methods.top.peft",
        "methods.lhuc.peft",
        "methods.houlsby.peft",
        "methods.houlsby.variants_peft",
        "fusion.peft.tuner",
        "fusion.peft.config",
        "methods.camtl.peft",
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
