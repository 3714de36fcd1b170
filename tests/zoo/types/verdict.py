"""Whether a method works on a model, rejects it, or does neither."""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pal_adapters import CAMTLPeftConfig, LHUCPeftConfig, PalAdaptersError, PALPeftConfig
from tests.zoo.host import randomise

from .build import run
from .plain import SIDES, TASKS, Plain, difference, loss, spacing

# One method that attends, one that does not, and the network that steers whole blocks.
METHODS: dict[str, Callable[..., Any]] = {
    "PAL": lambda **more: PALPeftConfig(**more),
    "LHUC": lambda **more: LHUCPeftConfig(**more),
    "CA-MTL": lambda **more: CAMTLPeftConfig(tasks=list(TASKS), **more),
}
_PARTS = {"attention_layers=[]": {"attention_layers": []}, "norm_layers=[]": {"norm_layers": []},
          "bottleneck='none'": {"bottleneck": "none"}, "'stream' or 'none'": {"bottleneck": "none"}}  # fmt: skip
# Sums in another order differ by a few units in the last place; what changes an output changes it by more.
_ROUNDING, _EFFECT = 16, 100


@dataclass(frozen=True)
class Verdict:
    """What a method does on a model.

    Attributes:
        kind: "works"; "in part", if it works without the parts that its rejection names; "rejected"; "late", for a
            rejection of a model to which the adapter could be added; "wrong"; or "crash".
        reason: what was rejected, or what is wrong.
    """

    kind: str
    reason: str = ""


class _Wrong(Exception):
    """A method changes something that it must not, or nothing."""


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise _Wrong(fault)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient: torch chooses the kernel of a product by that, and its rounding with it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _off(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any output, in units of the last place of the largest number in it."""
    _require(outputs.keys() == expected.keys(), f"it returns {sorted(outputs)} instead of {sorted(expected)}")
    units = [(difference(value, outputs[name]), spacing(value)) for name, value in expected.items()]
    return max(off / unit if unit else off for off, unit in units)


class _Trial:
    """One method on one model."""

    def __init__(self, plain: Plain, make: Callable[..., Any], tasks: bool) -> None:
        self.plain, self.make = plain, make
        self.tasks = tuple(TASKS[i % 2] for i in range(plain.batch)) if tasks else ()

    def add(self, **options: Any) -> Any:
        return get_peft_model(copy.deepcopy(self.plain.model), self.make(**options)).eval()

    def run(self, model: Any) -> dict[str, Tensor]:
        with _frozen(model):
            return run(model, self.plain.inputs, **({"task_ids": list(self.tasks)} if self.tasks else {}))

    def check_fresh(self, model: Any) -> None:
        off = _off(self.run(model), self.plain.outputs)
        _require(off <= _ROUNDING or not self.plain.deterministic, f"a fresh adapter is off by {off:.2g} units")

    def check_random(self, model: Any) -> None:
        """Everything that needs an adapter that does something."""
        base = [
            (parameter, parameter.detach().clone()) for parameter in model.parameters() if not parameter.requires_grad
        ]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        randomise(nn.ParameterList(trained.values()), std=0.5, seed=11)
        outputs = self.run(model)
        _require(_off(outputs, self.plain.outputs) > _EFFECT, "a random adapter changes nothing")
        for name, value in outputs.items():
            _require(bool(value.isfinite().all()), f"{name} is not finite")
        with model.disable_adapter():
            off = _off(run(model, self.plain.inputs), self.plain.outputs)
        _require(off == 0 or not self.plain.deterministic, f"disabled, it is off by {off:.2g} units")
        self._check_promises(model, self.plain.scale(outputs))
        self._check_saved(model, outputs)
        self._check_gradients(model, trained)
        torch.optim.SGD(trained.values(), lr=0.1).step()
        _require(all(torch.equal(a, b) for a, b in base), "a step changes the base model")

    def _check_promises(self, model: Any, scale: float) -> None:
        plain = self.plain
        asked = [(f"padding on the {side}", plain.padding, (side,), plain.pads[side]) for side in SIDES]
        asked += [("a later token", plain.later, (), plain.sees_later)]
        asked += [("a cache", plain.generation, (), plain.generates if plain.generates is not False else None)]
        for what, promise, args, by_itself in asked:
            if by_itself is not None:
                off = promise(model, *args, *self.tasks)
                limit = max(1e-4 * scale * (10 if what == "a cache" else 1), 20 * by_itself)
                _require(off <= limit, f"{what} changes it by {off:.2g}, the model itself by {by_itself:.2g}")

    def _check_saved(self, model: Any, outputs: dict[str, Tensor]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.plain.model), folder).eval()
        off = _off(self.run(loaded), outputs)
        _require(off == 0 or not self.plain.deterministic, f"loaded, it is off by {off:.2g} units")

    def _check_gradients(self, model: Any, trained: dict[str, nn.Parameter]) -> None:
        reached = self.plain.reached()
        modules = {name.rpartition(".")[0] for name in reached}
        loss(model.train(self.plain.training), self.plain.inputs, *self.tasks).backward()
        for name, parameter in trained.items():
            if parameter.grad is None:
                _require(not self._takes_part(name, reached, modules), f"no gradient for {name}")

    def _takes_part(self, name: str, reached: set[str], modules: set[str]) -> bool:
        """Whether the part of the model to which a trained parameter belongs has a gradient in this call."""
        place, *inside = re.split(r"\.(?:pal|lhuc|ca_mtl)\.", name.removeprefix("base_model.model."))
        norm = re.search(r"\.norms\.(\w+)\.", inside[0]) if inside else None
        if norm is not None:
            return f"{place}.{norm[1].replace('__', '.')}" in modules
        copied = re.search(r"\.(base|outer)\.(.*)", inside[0]) if inside else None
        if copied is None:
            return any(f"{module}.".startswith(f"{place}.") for module in modules)
        original = copied[2].replace("__", ".")
        return (original if copied[1] == "outer" else f"{place}.{original}") in reached


def _judged(judge: Callable[[], None]) -> Verdict:
    try:
        judge()
    except _Wrong as fault:
        return Verdict("wrong", str(fault))
    except PalAdaptersError as error:
        return Verdict("late", str(error))
    except Exception as error:  # a fault of the package, whatever it is
        return Verdict("crash", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Verdict("works")


def _acts(config: Any) -> bool:
    return bool(config.attention_layers or config.norm_layers or config.bottleneck != "none")


def _tried(plain: Plain, method: str, **options: Any) -> Verdict:
    trial = _Trial(plain, lambda **more: METHODS[method](**options, **more), method == "CA-MTL")
    unbiased = {"bottleneck": "none"} if method == "CA-MTL" and "bottleneck" not in options else {}
    try:
        fresh, random = trial.add(**unbiased), trial.add(init_weights=False)
    except PalAdaptersError as error:
        return Verdict("rejected", " ".join(str(error).split()).partition(" Name the sites: ")[0])
    except Exception as error:  # a fault of the package, whatever it is
        return Verdict("crash", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    if method == "CA-MTL" and not _acts(random.peft_config["default"]):
        return Verdict("rejected", "nothing that acts in the blocks is left")

    def judge() -> None:
        trial.check_fresh(fresh)
        trial.check_random(random)

    return _judged(judge)


def verdict(plain: Plain, method: str) -> Verdict:
    """What a method does on a model."""
    first = found = _tried(plain, method)
    options: dict[str, Any] = {}
    while found.kind == "rejected":
        named = {key: value for words, part in _PARTS.items() if words in found.reason for key, value in part.items()}
        if not named.keys() - options.keys():
            break
        options |= named
        found = _tried(plain, method, **options)
    if found.kind == "works" and options:
        return Verdict("in part", first.reason)
    return found if found.kind != "rejected" else first
