"""What it means that a method works on a family, checked on a tiny random model.

`python -m tests.families.table` writes `docs/models.md`; `--part 2/4` prints a quarter of the verdicts instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from pal_adapters import (
    CAMTLPeftConfig,
    HoulsbyPALPeftConfig,
    HoulsbyPeftConfig,
    LHUCPeftConfig,
    LowRankPeftConfig,
    PalAdaptersError,
    PALPeftConfig,
    ParallelHoulsbyPeftConfig,
    TopAttentionPeftConfig,
)
from tests import zoo
from tests.zoo import Host

TASKS = ["a", "b"]
METHODS: dict[str, Callable[..., Any]] = {
    "PAL": lambda **more: PALPeftConfig(hidden_size=12, num_heads=2, **more),
    "low rank": lambda **more: LowRankPeftConfig(hidden_size=5, **more),
    "LHUC": lambda **more: LHUCPeftConfig(**more),
    "Houlsby": lambda **more: HoulsbyPeftConfig(hidden_size=5, **more),
    "parallel Houlsby": lambda **more: ParallelHoulsbyPeftConfig(hidden_size=5, **more),
    "Houlsby + PAL": lambda **more: HoulsbyPALPeftConfig(hidden_size=12, num_heads=2, bottleneck_size=5, **more),
    "top attention": lambda **more: TopAttentionPeftConfig(
        hidden_size=12, num_layers=1, num_heads=2, **{**more, "init_weights": False}
    ),
    "CA-MTL": lambda **more: CAMTLPeftConfig(tasks=list(TASKS), max_length=64, bottleneck="none", **more),
}


class Broken(AssertionError):
    """A method neither works on a family nor rejects it."""


def _require(condition: bool, host: object, method: str, fault: str) -> None:
    if not condition:
        raise Broken(f"{method} on {host}: {fault}")


def _run(model: Any, inputs: dict[str, Tensor], tasks: list[str] | None) -> dict[str, Tensor]:
    more = {} if tasks is None else {"task_ids": tasks}
    with torch.no_grad():
        return zoo.outputs_of(model(**inputs, **more))


def _alone(inputs: dict[str, Tensor], row: int) -> tuple[dict[str, Tensor], Tensor]:
    """One example of a batch without its padding, and the slots of its tokens."""
    one = {name: value[row : row + 1] for name, value in inputs.items()}
    kept = inputs["attention_mask"][row].bool()
    for name in ("input_ids", "attention_mask"):
        one[name] = one[name][:, kept]
    return one, kept


def check_padding(host: object, method: str, model: Any, plain: Any, inputs: Any, tasks: list[str] | None) -> None:
    """Raise `Broken` if the second example of a batch is another without its padding."""
    one, kept = _alone(inputs, 1)
    for name, value in _run(model, inputs, tasks).items():
        whole = value[1:2, kept] if value.dim() > 2 and value.shape[1] == len(kept) else value[1:2]
        alone = _run(model, one, None if tasks is None else tasks[1:2])[name]
        before = _run(plain, inputs, None)[name][1:2]
        before = before[:, kept] if whole.shape != before.shape else before
        off = zoo.difference(_run(plain, one, None)[name], before)
        allowed = 1e-4 + 20 * off  # some models themselves are not exact under padding
        _require(zoo.difference(whole, alone) <= allowed, host, method, f"padding changes {name}")


def _check_generation(host: Host, method: str, model: Any, plain: Any, inputs: Any, tasks: list[str] | None) -> None:
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    if not torch.equal(*(plain.generate(**inputs, **settings, use_cache=cache) for cache in (True, False))):
        return  # RWKV itself
    more = {} if tasks is None else {"task_ids": torch.tensor([TASKS.index(task) for task in tasks])}
    settings |= more
    cached = model.generate(**inputs, **settings, use_cache=True)
    uncached = model.generate(**inputs, **settings, use_cache=False)
    _require(torch.equal(cached, uncached), host, method, "generation with a cache differs")


def verdict(host: Host, method: str) -> str:
    """`"works"`, or the message of the error with which the method rejects the family.

    Raises:
        Broken: if a fresh adapter changes the model (where the method has such a start), a random one does not, a
            parameter gets no gradient, the base model changes, padding changes real tokens, or cached generation
            differs from uncached.
    """
    plain, inputs = host.build().requires_grad_(False), host.inputs()
    batch = next(iter(inputs.values())).shape[0]
    tasks = [TASKS[i % 2] for i in range(batch)] if method == "CA-MTL" else None
    before = _run(plain, inputs, None)
    try:
        model = get_peft_model(host.build(), METHODS[method]()).eval()
    except PalAdaptersError as error:
        return f"rejected: {error}"
    if method != "top attention":
        for name, value in _run(model, inputs, tasks).items():
            off = zoo.difference(value, before[name], host.real(inputs, name))
            _require(off <= 1e-5, host, method, f"a fresh adapter changes {name} by {off:.2g}")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    zoo.randomise(nn.ParameterList(trained), seed=11)
    after = _run(model, inputs, tasks)
    changed = max(zoo.difference(after[name], value) for name, value in before.items())
    _require(changed > 1e-3, host, method, "a random adapter changes nothing")
    if "attention_mask" in inputs:
        check_padding(host, method, model, plain, inputs, tasks)
    if host.decodes and plain.can_generate():
        _check_generation(host, method, model, plain, inputs, tasks)
    outputs = zoo.outputs_of(model(**inputs, **({} if tasks is None else {"task_ids": tasks})))
    sum(value.square().mean() for value in outputs.values()).backward()
    own = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and ".outer." not in n]
    _require(not own, host, method, f"no gradient for {own[:2]}")
    with model.disable_adapter():
        for name, value in _run(model, inputs, None).items():
            _require(torch.equal(value, before[name]), host, method, "disabled, it is not the base model")
    return "works"
