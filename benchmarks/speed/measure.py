"""What a bound is, and how times and memory are measured."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

Step = Callable[[], Any]

SIZES: dict[str, dict[str, int]] = {
    "BERT-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
    "MiniLM": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "tiny": dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48),
}


class NotMeasured(Exception):
    """Why a bound was not measured."""


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Attributes:
        device: "cpu" or "cuda".
        quick: tiny sizes and few rounds, which show only that everything runs.
        compiled: run models through `torch.compile`.
    """

    device: str = "cpu"
    quick: bool = False
    compiled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def size(self, name: str) -> dict[str, int]:
        """The size of a model, tiny if quick."""
        return SIZES["tiny" if self.quick else name]

    def tokens(self, tokens: int) -> int:
        """The length of an example."""
        return min(tokens, 4) if self.quick else tokens

    def count(self, count: int, quick: int = 3) -> int:
        """How many of something there are, for example 200 adapters."""
        return min(count, quick) if self.quick else count

    def place(self, model: nn.Module) -> Any:
        """The model on the device and in the dtype."""
        return model.to(device=self.device, dtype=self.dtype)

    def call(self, model: Any) -> Any:
        """What is called: the model, or its compiled form."""
        return torch.compile(model) if self.compiled else model

    def bert(self, name: str) -> BertModel:
        """A frozen BERT with random weights."""
        torch.manual_seed(0)
        model = self.place(BertModel(BertConfig(vocab_size=1000, **self.size(name))).eval())
        model.requires_grad_(False)
        return model

    def batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """Inputs without padding."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, (rows, self.tokens(tokens)), generator=generator).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Measured:
    """A value with its quartiles over the rounds, if there were several."""

    value: float
    q1: float | None = None
    q3: float | None = None
    rounds: int = 1
    note: str = ""


@dataclass(frozen=True)
class Bound:
    """One line of the table.

    Attributes:
        section: 1 mixed batches, 2 small batches and decoding, 3 large bases.
        what: what is measured.
        of: the method and the host.
        limit: the largest value allowed; None for the hosts' own methods and for values that are only reported.
        measure: measures it within about this many seconds.
        weight: its share of the time.
        unit: of the value; "x" for a ratio.
        floor: the arithmetic limit, where it is known.
    """

    section: int
    what: str
    of: str
    limit: float | None
    measure: Callable[[Setting, float], Measured]
    weight: float = 1.0
    unit: str = "x"
    floor: float | None = None

    def verdict(self, measured: Measured) -> str:
        """Whether the value keeps to the limit."""
        if self.limit is None:
            return ""
        return "reached" if measured.value <= self.limit else "not reached"


def seconds_of(step: Step, device: str) -> float:
    """The time of one step; on a GPU between two events."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def interleaved(base: Step, variant: Step, seconds: float, setting: Setting, *, most: int = 41) -> Measured:
    """The ratio of two steps: base, variant, base in each round, for as many rounds as fit the time, at least three.

    Raises:
        NotMeasured: if three rounds would take more than three times the time.
    """
    for step in (base, variant):  # warm-up, compilation
        step()
    start = time.perf_counter()
    ratios: list[float] = []
    least = 1 if setting.quick else 3
    while len(ratios) < (least if setting.quick else most):
        before, middle, after = (seconds_of(step, setting.device) for step in (base, variant, base))
        ratios.append(2 * middle / (before + after))
        spent = time.perf_counter() - start
        each = spent / len(ratios)
        if least * each > 3 * seconds and not setting.quick:
            raise NotMeasured(f"{least} rounds of {each:.0f} s do not fit the {seconds:.0f} s there are for it")
        if len(ratios) >= least and spent + each > seconds:
            break
    if len(ratios) == 1:
        return Measured(ratios[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Measured(middle, low, high, len(ratios))


def forward(model: Any, batch: dict[str, Any]) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        model(**batch)


def training(model: Any, batch: dict[str, Any]) -> None:
    """A forward and a backward pass."""
    model(**batch).last_hidden_state.float().square().mean().backward()
    for parameter in model.parameters():
        parameter.grad = None


def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the tensors that a forward pass keeps for the backward pass, without the model's own.

    Each storage counts once. The number is exact and the same on every run.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    total = sum(kept.values())
    del output
    return total


@contextlib.contextmanager
def released(setting: Setting) -> Iterator[None]:
    """Frees what a bound has used."""
    try:
        yield
    finally:
        torch._dynamo.reset()
        if setting.device == "cuda":
            torch.cuda.empty_cache()
