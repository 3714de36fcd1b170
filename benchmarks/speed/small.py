"""Section 2: one short example, and one token at a time, where the time goes into Python rather than arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import adapters
import peft
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

import pal_adapters
from pal_adapters.nn.unit import TaskUnit

from .measure import Bound, Measured, Setting, forward, interleaved
from .mixed import lora


def adapted(config: Any, model: Any, setting: Setting) -> Any:
    """A model with one adapter: in PEFT for a function that makes a config, in `adapters` for a name.

    None only prepares the model for `adapters`.
    """
    if callable(config):
        return setting.place(peft.get_peft_model(model, config())).eval()
    adapters.init(model)
    if config is None:
        return setting.place(model).eval()
    model.add_adapter("t", config=config)
    model.set_active_adapters("t")
    return setting.place(model).eval()


def decoder_lora() -> peft.LoraConfig:
    """As `lora`, by the names of a decoder's projections."""
    return peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_alpha=16)


def unchanged(site: str, value: torch.Tensor, *_: Any) -> torch.Tensor:
    """The forward of a module that adds nothing."""
    return value


def hooks_alone(model: Any) -> Any:
    """The model with everything that calls its task modules, which do nothing."""
    for unit in model.modules():
        if isinstance(unit, TaskUnit):
            unit.forward = unchanged
    return model


def encoder(
    config: Any, setting: Setting, seconds: float, change: Callable[[Any], Any] = lambda model: model
) -> Measured:
    """One example of 16 tokens, over the plain model."""
    plain, model = setting.bert("BERT-base"), change(adapted(config, setting.bert("BERT-base"), setting))
    batch = setting.batch(1, 16)
    steps = (functools.partial(forward, setting.call(one), batch) for one in (plain, model))
    return interleaved(*steps, seconds, setting)


def decoder(setting: Setting) -> Any:
    """Eight blocks of width 512, with random weights."""
    torch.manual_seed(0)
    size = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376)
    if setting.quick:
        size = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    model = setting.place(LlamaModel(LlamaConfig(vocab_size=1000, **size)).eval())
    return model.requires_grad_(False)


def decode(model: Any, ids: torch.Tensor, tokens: int) -> None:
    """A prompt, then one token at a time with a cache."""
    with torch.no_grad():
        cache = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).past_key_values
        for _ in range(tokens):
            cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values


def decoding(
    config: Any, setting: Setting, seconds: float, change: Callable[[Any], Any] = lambda model: model
) -> Measured:
    """Sixteen tokens after a prompt of 16, over the plain model."""
    plain, model = decoder(setting), change(adapted(config, decoder(setting), setting))
    ids = setting.batch(1, 16)["input_ids"]
    tokens = setting.tokens(16)
    steps = (functools.partial(decode, setting.call(one), ids, tokens) for one in (plain, model))
    return interleaved(*steps, seconds, setting)


PEFT_CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": pal_adapters.PALPeftConfig,
    "low_rank": pal_adapters.LowRankPeftConfig,
    "houlsby": pal_adapters.HoulsbyPeftConfig,
}
ENCODER = {"pal": 1.10}
DECODER = {"pal": 1.15, "low_rank": 1.08, "houlsby": 1.08}


def bounds() -> Iterator[Bound]:
    """All bounds of this section."""
    what = "forward pass / plain model, BERT-base size, 1 x 16 tokens"
    for name, config in PEFT_CONFIGS.items():
        yield Bound(2, what, f"peft {name}", ENCODER.get(name), functools.partial(encoder, config))
    yield Bound(2, what, "adapters pal", ENCODER["pal"], functools.partial(encoder, "pal"))
    yield Bound(2, what, "peft lora (host)", None, functools.partial(encoder, lora), 0.7)
    yield Bound(2, what, "adapters seq_bn (host)", None, functools.partial(encoder, "seq_bn"), 0.7)
    what = "decoding with a cache / plain model, 8 blocks of width 512"
    for name, config in PEFT_CONFIGS.items():
        yield Bound(2, what, f"peft {name}", DECODER[name], functools.partial(decoding, config))
    yield Bound(2, what, "adapters pal", DECODER["pal"], functools.partial(decoding, "pal"))
    yield Bound(2, what, "adapters low_rank", DECODER["low_rank"], functools.partial(decoding, "low_rank"))
    yield Bound(2, what, "peft lora (host)", None, functools.partial(decoding, decoder_lora), 0.7)
    yield Bound(2, what, "adapters seq_bn (host)", None, functools.partial(decoding, "seq_bn"), 0.7)
    yield from shares()


def shares() -> Iterator[Bound]:
    """What the hooks alone cost: the rest is the arithmetic of the modules."""
    for what, measure in {
        "hooks without their modules / plain model, BERT-base size, 1 x 16 tokens": encoder,
        "hooks without their modules / plain model, decoding, 8 blocks of width 512": decoding,
    }.items():
        for name, config in PEFT_CONFIGS.items():
            yield Bound(2, what, f"peft {name}", None, functools.partial(measure, config, change=hooks_alone), 0.7)
        yield Bound(2, what, "adapters pal", None, functools.partial(measure, "pal", change=hooks_alone), 0.7)
        yield Bound(2, what, "adapters without an adapter (host)", None, functools.partial(measure, None), 0.7)
