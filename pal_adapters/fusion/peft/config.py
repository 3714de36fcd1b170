"""The configs of ScaLearn, AdapterFusion and fixed combinations in PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig, PeftType
from safetensors import safe_open
from safetensors.torch import save_file

from pal_adapters.checks import (
    Check,
    boolean,
    check_fields,
    either,
    list_of,
    mapping_of,
    number,
    one_of,
    option,
    optional,
    probability,
    shown,
    string,
)
from pal_adapters.errors import ConfigError
from pal_adapters.fusion.config import ScaLearnOptions
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.config import PEFT_CHECKS

from .sources import Source

_BUNDLE = "sources"

SCALEARN = Method(
    name="scalearn",
    build=lambda config, block: None,
    unmergeable="its sources are kept separate while it trains. fold(model) turns it into one ordinary adapter; LoRA "
    "sources become a LoRA adapter, which can be merged.",
)
ADAPTER_FUSION = Method(
    name="adapter_fusion",
    build=lambda config, block: None,
    unmergeable="its attention over the sources depends on the input, so no fixed weight is equivalent.",
)
FIXED_COMBINATION = Method(
    name="fixed_combination",
    build=lambda config, block: None,
    unmergeable="its sources are kept separate. fold(model) turns it into one ordinary adapter; LoRA sources become a "
    "LoRA adapter, which can be merged.",
)


@dataclass
class CombinationPeftConfig(PeftConfig):
    """Base of the configs that combine frozen source adapters for a new task.

    `a_s` is the term that source `s` alone adds to the output of a module (LoRA: `scaling * B A x`; a Houlsby
    bottleneck: its output without the residual; its own layer norm: `LN_s(x) - LN(x)`) or to a value in a block (PALs
    and other task modules). The sources do not see each other, and their dropout is off.

    Args:
        adapters: the sources by name: a folder, a Hub repo ID, a folder in a Hub repo (`"user/repo/folder"`), or None
            for an adapter that is on the model or that another combination has loaded. A list of names means None for
            each. At least one source is required.
        revisions: the revision of each source on the Hub; set to the commit that was read.
        modules_to_save: modules outside the blocks that are trained and saved, such as a head.
        bundle: save copies of the sources in `sources/` with the coefficients. Otherwise the saved config refers to
            their locations, revisions and fingerprints.
        check_base: reject sources whose configs name different base models.
        fingerprints: hashes of the sources' weights, set by the package; loading rejects sources that differ. None
            skips the check.
        order: the order of the sources, set by the package: PEFT sorts names when it saves, but the rows of the
            coefficients keep this order.

    Raises:
        ConfigError: if a value is not allowed.
    """

    method: ClassVar[Method]
    inherited_checks: ClassVar[Mapping[str, Check]] = PEFT_CHECKS
    # PEFT reads this field; here the sources decide which modules are adapted.
    target_modules: ClassVar[None] = None

    adapters: Any = field(default=None, metadata={"help": "Sources: {name: folder, Hub repo ID or None}, or names."})
    revisions: dict[str, str] | None = field(
        default=None, metadata=option("Revisions of sources on the Hub.", optional(mapping_of(string(), "revisions")))
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata=option("Other modules to train and save.", optional(list_of(string(), "module names"))),
    )
    bundle: bool = field(default=False, metadata=option("Save copies of the sources too.", boolean()))
    check_base: bool = field(default=True, metadata=option("Reject sources of different base models.", boolean()))
    fingerprints: dict[str, str] | None = field(
        default=None, metadata=option("Hashes of the sources.", optional(mapping_of(string(), "hashes")))
    )
    order: list[str] | None = field(
        default=None, metadata=option("The sources in the order of their rows.", optional(list_of(string(), "names")))
    )

    def __post_init__(self) -> None:
        check_fields(self)
        super().__post_init__()
        self.peft_type = PeftType(self.method.name.upper())
        # PEFT creates configs of every type without arguments, so sources are required only when a model is adapted.
        sources = {} if self.adapters is None else _sources(self.adapters)
        if sorted(self.order if self.order is not None else sources) != sorted(sources):
            raise ConfigError(f"order={self.order!r} is not allowed: name each of {list(sources)} once.")
        if sources:
            self.order = self.order or list(sources)
            self.adapters = {name: sources[name] for name in self.order}
        for argument in ("revisions", "fingerprints"):
            given = getattr(self, argument) or {}
            unknown = [name for name in given if name not in sources]
            if unknown:
                raise ConfigError(f"{argument} names {unknown[0]!r}, which is not one of the sources {list(sources)}.")
        self._origin: tuple[str, str | None] | None = None
        self._read: dict[str, Source] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """PEFT's own method; also remembers the folder of bundled sources."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        path = str(pretrained_model_name_or_path)
        config._origin = (path if subfolder is None else f"{path}/{subfolder}", kwargs.get("revision"))
        return config

    @property
    def penalty(self) -> tuple[float, str]:
        """Weight and form of the regulariser."""
        return 0.0, "mean"

    def check_adapters(self) -> None:
        """Raise `ConfigError` if there are no sources."""
        if self.adapters is None:
            _sources(None)

    def place_of(self, name: str) -> tuple[str | None, str | None]:
        """Path and revision from which a source is read."""
        if self.bundle and self._origin is not None:
            path, revision = self._origin
            return f"{path}/{_BUNDLE}/{name}", revision
        return self.adapters[name], (self.revisions or {}).get(name)

    def check_weights(self) -> None:
        """Raise `ConfigError` if the file of coefficients is damaged or missing, before the model changes."""
        if self._origin is None:
            return
        folder = self._origin[0]
        file = os.path.join(folder, "adapter_model.safetensors")
        if os.path.isfile(file):
            try:
                safe_open(file, "pt").keys()
            except Exception as error:  # safetensors has its own errors besides those of the file system
                raise ConfigError(f"{file} cannot be read: {error}. Restore it, or save the model again.") from error
        elif (
            self.inference_mode
            and os.path.isdir(folder)
            and not os.path.isfile(os.path.join(folder, "adapter_model.bin"))
        ):
            raise ConfigError(f"{file} is missing. Restore it, or save the model again.")

    def remember(self, sources: Mapping[str, Source]) -> None:
        """Store fingerprints, locations and revisions of the sources that were read."""
        self.fingerprints = {name: source.fingerprint for name, source in sources.items()}
        if not (self.bundle and self._origin):
            self.adapters = {name: source.path for name, source in sources.items()}
            revisions = {name: s.revision for name, s in sources.items() if s.revision is not None}
            self.revisions = revisions or None
        self._read = dict(sources) if self.bundle else {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's own method; `bundle=True` also saves the sources as ordinary adapters in `sources/<name>`."""
        super().save_pretrained(save_directory, **kwargs)
        for name, source in self._read.items():
            folder = os.path.join(save_directory, _BUNDLE, name)
            source.config.save_pretrained(folder)
            tensors = {f"base_model.model.{key}": value.contiguous() for key, value in source.tensors.items()}
            save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name or "/" in name:
        raise ConfigError(f"adapters has the name {shown(name)}: use a string without '.' and '/'.")


def _sources(adapters: Any) -> dict[str, str | None]:
    if isinstance(adapters, (list, tuple)):
        for name in adapters:
            _check_name(name)
        repeated = sorted({shown(name) for name in adapters if list(adapters).count(name) > 1})
        if repeated:
            raise ConfigError(f"adapters={shown(adapters)} names {repeated[0]} twice: name each source once.")
        adapters = dict.fromkeys(adapters)
    if not isinstance(adapters, Mapping) or not adapters:
        raise ConfigError(
            f"adapters={shown(adapters)} is not allowed: name at least one source, adapters={{'<name>': "
            "'<folder or Hub repo ID>'}, or ['<name>', ...] for adapters that are on the model."
        )
    found: dict[str, str | None] = {}
    for name, path in adapters.items():
        _check_name(name)
        if path is not None and not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"adapters[{name!r}]={shown(path)} is not allowed: use a folder, a Hub repo ID or None.")
        found[name] = None if path is None else os.fspath(path)
    places: dict[str, str] = {}
    for name, path in found.items():
        if path is None:
            continue
        place = os.path.realpath(path) if os.path.isdir(path) else path
        if place in places:
            raise ConfigError(f"adapters has {path!r} as {places[place]!r} and as {name!r}: name each source once.")
        places[place] = name
    return found


@dataclass
class ScaLearnPeftConfig(ScaLearnOptions, CombinationPeftConfig):
    """ScaLearn: `get_peft_model(model, ScaLearnPeftConfig(adapters={"mnli": path, "qqp": path}))`.

    Its options are those of `pal_adapters.fusion.config.ScaLearnOptions` and of `CombinationPeftConfig`. A *place* is
    a module that sources adapt (LoRA, Houlsby, layer norms) or a block (PALs). At a module that only some sources
    adapt, only those have coefficients. With LoRA sources, `"scalearn_pp"` shares its coefficients by the kind of the
    module. Differences from the paper: LoRA sources and layer norms are supported, and the regulariser is part of the
    loss.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = SCALEARN

    def __post_init__(self) -> None:
        super().__post_init__()
        self.complete()

    @property
    def penalty(self) -> tuple[float, str]:
        return self.regularization, self.regularization_form


@dataclass
class AdapterFusionPeftConfig(CombinationPeftConfig):
    r"""AdapterFusion: `get_peft_model(model, AdapterFusionPeftConfig(adapters={...}, task_type="SEQ_CLS"))`.

    $$c = \sum_s \mathrm{softmax}_s(D(q \cdot k_s)) \, V a_s, \qquad v' = v + c$$

    with `q = Q u + b`, `k_s = K a_s + b` at each place, see `pal_adapters.fusion.layer.SourceAttention`. The query
    reads the value that the sources add to, `u = v`: the input of a Houlsby bottleneck, or the output `W x + b` of the
    module that LoRA adapts, which has the width of `a_s`. For PALs and other task modules, `u` is the block's input.
    With LoRA sources, attention therefore has `3 d^2` parameters per adapted module of output width `d`. If only one
    source acts at a place, its attention is 1 and only `V` learns. Sources with their own layer norms are rejected.
    Source: Pfeiffer et al., EACL 2021. Differences from the paper: LoRA sources are supported, and the regulariser is
    part of the loss.

    Args:
        score_dropout: dropout probability of `D`.
        value: whether there is a `V`.
        value_init_noise: initial off-diagonal entries of `V`: `"constant"` 1e-6, or `"random"`.
        temperature: whether to divide the scores by a temperature that falls from 50 to 1.
        score_scale: factor on the scores.
        regularization: weight of `||I - V||_F^2`, summed over the places, in the loss.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = ADAPTER_FUSION

    score_dropout: float = field(default=0.1, metadata=option("Dropout on the scores.", probability()))
    value: bool = field(default=True, metadata=option("Whether the outputs are projected.", boolean()))
    value_init_noise: str = field(
        default="constant", metadata=option("Initial off-diagonal entries of V.", one_of("constant", "random"))
    )
    temperature: bool = field(default=False, metadata=option("Whether a temperature falls from 50 to 1.", boolean()))
    score_scale: float = field(default=1.0, metadata=option("Factor on the scores.", number(above=True)))
    regularization: float | None = field(
        default=None, metadata=option("Weight of the regulariser; by default 0.01 with V.", optional(number()))
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regularization is None:
            self.regularization = 0.01 if self.value else 0.0
        if self.regularization > 0 and not self.value:
            raise ConfigError(
                f"regularization={self.regularization!r} is not allowed with value=False: it applies to V, use 0."
            )
        if not self.value and self.value_init_noise != "constant":
            raise ConfigError(f"value_init_noise={self.value_init_noise!r} has no effect with value=False.")

    @property
    def penalty(self) -> tuple[float, str]:
        return self.regularization or 0.0, "mean"


@dataclass
class FixedCombinationPeftConfig(CombinationPeftConfig):
    r"""Sources with fixed coefficients: `get_peft_model(model, FixedCombinationPeftConfig(adapters={...}))`.

    $$v' = v + \sum_s c_s \, a_s$$

    The average of the sources' outputs or a weighted sum of them, as a baseline for learned combinations. Only a head
    is trained. For LoRA this equals PEFT's `add_weighted_adapter(..., combination_type="cat")`.

    Args:
        coefficients: `"mean"` for `1/S` each, or one number per source by name.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    method: ClassVar[Method] = FIXED_COMBINATION

    coefficients: Any = field(
        default="mean",
        metadata=option(
            "'mean', or one number per source.", either(one_of("mean"), mapping_of(number(-1e6), "numbers"))
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients == "mean":
            return
        given = self.coefficients
        if set(given) != set(self.adapters or ()):
            raise ConfigError(
                f"coefficients={given!r} is not allowed: use 'mean', or one number for each of "
                f"{list(self.adapters or ())}."
            )
        self.coefficients = dict(given)

    def coefficient(self, name: str) -> float:
        """The coefficient of one source."""
        return 1 / len(self.adapters) if self.coefficients == "mean" else float(self.coefficients[name])
