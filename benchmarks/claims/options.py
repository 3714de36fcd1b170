"""The options of `claims.py`. Those that change what a piece trains are part of its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pal_adapters.cli.options import PositiveFloat, PositiveInt, option
from pal_adapters.errors import ConfigError

CLAIMS = ("houlsby", "pals", "scalearn", "ca_mtl")
SETTINGS = (
    "pooling", "max_length", "batch_size", "evaluate_every", "max_evaluations", "patience", "train_rows", "dev_rows",
    "test_rows", "bf16",
)  # fmt: skip


@dataclass
class ClaimsOptions:
    output_dir: str = option("folder for pieces, table and pictures", aliases=["--output"])
    claim: list[str] = option("which claims", list(CLAIMS), choices=CLAIMS)
    model: str | None = option("name or folder of the base model (the MiniLM encoder that pip installs)", None)
    data_dir: str | None = option("folder with the data of named tasks (default: from the Hub)", None)
    seeds: PositiveInt = option("number of seeds", 3)
    budget: PositiveFloat = option("hours after which no further piece is started", 6.0)
    device: Literal["cpu", "cuda"] = option("where to train", "cpu")
    host: Literal["adapters", "peft"] | None = option("library of all adapters (adapters; Houlsby's in PEFT)", None)
    tries: PositiveInt = option("number of learning rates tried for each recipe, at most 4", 3)
    houlsby_tasks: list[str] = option("tasks of the claim houlsby", ["mrpc", "stsb", "cola"])
    joint_tasks: list[str] = option("tasks of the claims pals and ca_mtl", ["rte", "mrpc", "stsb", "cola"])
    sources: list[str] = option("sources of the claim scalearn", ["mrpc", "stsb", "qnli", "sst2", "rte"])
    targets: list[str] = option("targets of the claim scalearn", ["mrpc", "copa", "rte"])
    shots: list[int] = option("few-shot sizes of the claim scalearn, in examples per class", [16, 4, 32, 100])
    few_shot_only: bool = option("leave out the targets with all their training examples", False)
    whole_only: bool = option("leave out the targets with few training examples", False)
    pooling: Literal["mean", "first", "last", "pooler"] = option("what heads read", "mean")
    max_length: PositiveInt = option("maximum number of tokens", 128)
    batch_size: PositiveInt = option("batch size", 32)
    evaluate_every: PositiveInt = option("steps between two evaluations on the held-out training examples", 50)
    max_evaluations: PositiveInt = option("number of evaluations at which training ends", 20)
    patience: PositiveInt = option("evaluations without a better held-out score after which training ends", 4)
    train_rows: PositiveInt | None = option("maximum number of training examples per task (all)", None)
    dev_rows: PositiveInt = option("maximum number of held-out training examples per task", 500)
    test_rows: PositiveInt | None = option("maximum number of validation examples per task (all)", None)
    bf16: bool = option("use bfloat16 autocast", False)

    def __post_init__(self) -> None:
        if self.tries > 4:
            raise ConfigError(f"--tries {self.tries}: allowed: 1 to 4")
        if self.few_shot_only and self.whole_only:
            raise ConfigError("--few_shot_only --whole_only: allowed: one of them")
        for shots in self.shots:
            if shots < 1:
                raise ConfigError(f"--shots {shots}: allowed: integers of at least 1")

    def settings(self) -> dict[str, Any]:
        """What every piece depends on."""
        return {name: getattr(self, name) for name in SETTINGS}
