"""The same question in `adapters`: what a method does on each model class of that host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import adapters
import torch
from adapters import AdapterModelInterface
from torch import Tensor, nn

from pal_adapters import (
    CAMTLConfig,
    HoulsbyPALConfig,
    LHUCConfig,
    LowRankConfig,
    PalAdaptersError,
    PALConfig,
    ParallelHoulsbyConfig,
    TopAttentionConfig,
)
from tests import zoo
from tests.hosts.adapters import model_classes

from .checks import TASKS, Broken, check_padding

# The host's own bottlenecks are its Houlsby adapters.
METHODS: dict[str, Callable[[], Any]] = {
    "PAL": lambda: PALConfig(hidden_size=12, num_heads=2),
    "low rank": lambda: LowRankConfig(hidden_size=5),
    "LHUC": LHUCConfig,
    "parallel Houlsby": lambda: ParallelHoulsbyConfig(hidden_size=5),
    "Houlsby + PAL": lambda: HoulsbyPALConfig(hidden_size=12, num_heads=2, bottleneck_size=5),
    "top attention": lambda: TopAttentionConfig(hidden_size=12, num_layers=1, num_heads=2),
    "CA-MTL": lambda: CAMTLConfig(tasks=list(TASKS), max_length=64, bottleneck="none"),
}
_MPNET = AdapterModelInterface(
    adapter_methods=["bottleneck"], model_embeddings="embeddings", model_layers="encoder.layer",
    layer_self_attn="attention", layer_cross_attn=None, attn_q_proj="attn.q", attn_k_proj="attn.k",
    attn_v_proj="attn.v", attn_o_proj="attn.o", layer_intermediate_proj="intermediate.dense",
    layer_output_proj="output.dense", layer_pre_self_attn="attention.attn", layer_pre_ffn="intermediate.dense",
    layer_ln_1="attention.LayerNorm", layer_ln_2="output.LayerNorm",
)  # fmt: skip
THROUGH_INTERFACE = "mpnet, through AdapterModelInterface"
NAMES = (*sorted(["bert", *model_classes.NAMES]), THROUGH_INTERFACE)


def _model(name: str) -> tuple[Any, dict[str, Tensor]]:
    if name == THROUGH_INTERFACE:
        host = zoo.BY_NAME["mpnet"]
        model = host.build()
        adapters.init(model, interface=_MPNET)
        return model.eval(), host.inputs()
    model = model_classes.plain(name)
    model_classes.init(model)
    return model.eval(), model_classes.inputs(name)


def _run(model: Any, inputs: dict[str, Tensor], tasks: list[str] | None) -> dict[str, Tensor]:
    with torch.no_grad():
        return zoo.outputs_of(model(**inputs, **({} if tasks is None else {"task_ids": tasks})))


def _real(inputs: dict[str, Tensor], key: str, value: Tensor) -> Tensor | None:
    """Which tokens of an output are not padding, None for all."""
    mask = inputs.get("attention_mask")
    if mask is None or value.dim() < 3 or ("decoder_input_ids" in inputs and key != "encoder_last_hidden_state"):
        return None
    return mask.bool()


def verdict(name: str, method: str) -> str:
    """As `checks.verdict`, without generation, which `adapters` itself breaks for some classes.

    Raises:
        Broken: as there.
    """
    model, inputs = _model(name)
    plain = copy.deepcopy(model)
    batch = next(iter(inputs.values())).shape[0]
    tasks = [TASKS[i % 2] for i in range(batch)] if method == "CA-MTL" else None
    before = _run(plain, inputs, None)

    def require(condition: bool, fault: str) -> None:
        if not condition:
            raise Broken(f"{method} on {name} in adapters: {fault}")

    try:
        model.add_adapter("x", config=METHODS[method]())
    except PalAdaptersError as error:
        return f"rejected: {error}"
    model.train_adapter("x")
    model.eval()
    if method != "top attention":
        fresh = _run(model, inputs, tasks)
        off = max(zoo.difference(value, before[key], _real(inputs, key, value)) for key, value in fresh.items())
        require(off <= 1e-5, f"a fresh adapter changes the output by {off:.2g}")
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    zoo.randomise(nn.ParameterList(trained.values()), seed=11)
    after = _run(model, inputs, tasks)
    require(max(zoo.difference(after[key], value) for key, value in before.items()) > 1e-3, "it changes nothing")
    if "attention_mask" in inputs and "decoder_input_ids" not in inputs:
        check_padding(name, method, model, plain, inputs, tasks)
    outputs = zoo.outputs_of(model(**inputs, **({} if tasks is None else {"task_ids": tasks})))
    sum(value.square().mean() for value in outputs.values()).backward()
    missing = [key for key, p in trained.items() if p.grad is None and ".outer." not in key]
    require(not missing, f"no gradient for {missing[:2]}")
    model.set_active_adapters(None)
    for key, value in _run(model, inputs, None).items():
        require(torch.equal(value, before[key]), "inactive, it is not the base model")
    return "works"
