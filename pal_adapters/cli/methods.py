"""The methods of `pal-adapters train`: builds a base with the modules of one method and counts its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

import pal_adapters
from pal_adapters.methods.camtl.network import network_size
from pal_adapters.multitask import TaskHeads, add_adapter

from .fitting import size

SIZED = ("pal", "low_rank", "top_attention", "houlsby", "houlsby_pal")
NETWORKS = ("ca_mtl_base", "ca_mtl_large")
HOSTED = (*SIZED, "lhuc", *NETWORKS)
CONFIGS = {
    "pal": "PAL",
    "low_rank": "LowRank",
    "top_attention": "TopAttention",
    "lhuc": "LHUC",
    "houlsby": "Houlsby",
    "houlsby_pal": "HoulsbyPAL",
}
HOULSBY_WIDTH = 64
NETWORK = "tasks"  # the name of the adapter that all tasks share


def make_config(args: Any, names: Sequence[str], base_width: int) -> Any:
    """The config of one task's adapter, or of the network for all tasks."""
    more: dict[str, Any] = {} if args.hidden_size is None else {"hidden_size": args.hidden_size}
    suffix = "Config" if args.host == "adapters" else "PeftConfig"
    if args.host == "peft":
        more["task_type"] = "FEATURE_EXTRACTION"
    if args.method in NETWORKS:
        preset = getattr(pal_adapters, f"CAMTL{suffix}").preset
        return preset(args.method, tasks=list(names), max_length=args.max_length, **more)
    if args.method == "houlsby" and args.host == "adapters":  # the host has this method already
        import adapters

        width = args.hidden_size or HOULSBY_WIDTH
        # The host rounds the bottleneck size down; half a unit more gives the size that was asked for.
        factor = base_width / width if base_width % width == 0 else base_width / (width + 0.5)
        return adapters.DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=factor)
    if args.joint:
        more["train_base"] = True
    return getattr(pal_adapters, CONFIGS[args.method] + suffix)(**more)


def build(args: Any, base: Any, tasks: Sequence[Any]) -> tuple[Any, dict[str, int]]:
    """The base with an adapter and a head per task, and the number of parameters of each task's adapter."""
    names = [task.name for task in tasks]
    model, sizes, width = None, {}, base.config.hidden_size
    if args.host == "adapters":
        import adapters  # only here: PEFT does without it

        adapters.init(base)  # before the seed is set, because it draws random numbers
    transformers.set_seed(args.seed)
    if args.method in NETWORKS:
        base = add_adapter(base, NETWORK, make_config(args, names, width))
        sizes = dict.fromkeys(names, network_size(base, NETWORK).per_task)
    for number, task in enumerate(tasks):
        if args.method not in NETWORKS:
            # The result of a task must not depend on the tasks before it; jointly trained adapters must differ.
            transformers.set_seed(args.seed + (number if args.joint else 0))
            before = size(base)
            if args.method in HOSTED:
                base = add_adapter(base, task.name, make_config(args, names, width))
            sizes[task.name] = size(base) - before
        model = model or TaskHeads(base)
        adapter = NETWORK if args.method in NETWORKS else task.name if args.method in HOSTED else None
        model.add(task.name, task.head_config(), adapter=adapter)
    return model, sizes


def count(args: Any, model: Any, base: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """Parameters of the base, and those that each task adds."""
    total = sum(p.numel() for p in base.values())
    trained = sum(p.numel() for n, p in base.items() if not n.startswith("pooler.")) if base_is_trained(args) else 0
    counts: dict[str, Any] = {"base_total": total, "base_trained": trained}
    if args.method in NETWORKS:
        network = network_size(model.backbone, NETWORK)
        counts |= {"base_trained": network.trained_base, "network": network.added}
    counts["tasks"] = {}
    for name, adapter in sizes.items():
        head = sum(p.numel() for p in model.head(name).parameters())
        # With a fine-tuned copy per task, the base also belongs to the task.
        own = adapter + head + (trained if args.method == "full" and not args.joint else 0)
        counts["tasks"][name] = {"adapter": adapter, "head": head, "trainable": own, "share_of_base": own / total}
    return counts


def base_is_trained(args: Any) -> bool:
    """Whether the base trains."""
    return args.joint or args.method == "full"


def saves_base(args: Any) -> bool:
    """Whether the trained base has to be saved separately from the adapters."""
    return args.joint and (args.method == "full" or (args.method, args.host) == ("houlsby", "adapters"))
