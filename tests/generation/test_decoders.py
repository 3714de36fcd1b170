"""Generation with a cache equals generation without one, in every mode: task modules cache earlier tokens too."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache

from pal_adapters import UnsupportedError
from tests import zoo
from tests.methods import makers
from tests.zoo import BY_NAME

pytestmark = zoo.HOST_WARNINGS
TOLERANCE = 1e-4
CONFIGS = makers("peft", lambda record: record.attends)
DECODERS = [host.name for host in zoo.HOSTS if host.available and host.decodes and "LM" in host.model]
SOME = ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3"]
STATIC = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox"]
SEQ2SEQ = {
    "bart": "BartForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration",
    "marian": "MarianMTModel",
    "t5": "T5ForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
}


def randomise(model: nn.Module, adapter: str = "default") -> None:
    for name, parameter in model.named_parameters():
        if f"_units.{adapter}." in name or f"_shared.{adapter}." in name:
            zoo.randomise(nn.ParameterList([parameter]), seed=len(name) + len(adapter))


@functools.cache
def _adapted(name: str, method: str, **more: Any) -> PeftModel:
    host = BY_NAME[name]
    if name in SEQ2SEQ:
        torch.manual_seed(1)
        model = getattr(transformers, SEQ2SEQ[name])(host.build_config()).eval()
        zoo.randomise(model)
    else:
        model = host.build()
    adapted = get_peft_model(model, CONFIGS[method](**more)).eval()
    randomise(adapted)
    return adapted


def adapted_model(name: str, method: str = "pal") -> PeftModel:
    """Shared between tests: none of them changes its weights."""
    return _adapted(name, method)


def prompt(name: str, *, padding: bool, batch: int = 3) -> dict[str, Tensor]:
    host = BY_NAME[name]
    inputs = host.inputs(padding=padding, batch=batch)
    inputs.pop("decoder_input_ids", None)
    return inputs


def generate(model: Any, inputs: dict[str, Tensor], tokens: int = 6, **more: Any) -> Any:
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=1, eos_token_id=None)
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        return model.generate(**copy.copy(inputs), **{**settings, **more})


def assert_same(a: Any, b: Any, *, beams: bool = False) -> None:
    assert torch.equal(a.sequences, b.sequences)
    assert len(a.logits) == len(b.logits)
    for one, other in zip(a.logits, b.logits, strict=True):
        if beams:  # those with nearly equal scores may change places: each row is one of the others
            apart = (one[:, None] - other[None]).abs().amax(-1)
            assert max(apart.amin(0).max(), apart.amin(1).max()) <= TOLERANCE
        else:
            assert zoo.difference(one, other) <= TOLERANCE


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", DECODERS)
def test_greedy(name: str, method: str) -> None:
    model = adapted_model(name, method)
    for padding in (True, False):
        inputs = prompt(name, padding=padding)
        with_cache = generate(model, inputs)
        assert_same(with_cache, generate(model, inputs, use_cache=False))
    # Without padding, one pass over the whole sequence gives every step's logits.
    sequences = with_cache.sequences
    with torch.no_grad():
        logits = model(input_ids=sequences, use_cache=False).logits[:, inputs["input_ids"].shape[1] - 1 : -1]
    assert zoo.difference(torch.stack(with_cache.logits, 1), logits) <= TOLERANCE
    with model.disable_adapter():
        assert zoo.difference(generate(model, inputs).logits[0], with_cache.logits[0]) > 1e-2


@pytest.mark.parametrize("name", DECODERS)
def test_causality(name: str) -> None:
    """A later token changes nothing before it."""
    inputs = prompt(name, padding=False)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 5:] = 17
    model = adapted_model(name)
    for mask in (True, False):
        if not mask:
            inputs, other = {"input_ids": inputs["input_ids"]}, {"input_ids": other["input_ids"]}
        with torch.no_grad():
            a, b = (model(**x).logits for x in (inputs, other))
        assert zoo.difference(a[:, :5], b[:, :5]) <= 1e-5
        assert zoo.difference(a[:, 5:], b[:, 5:]) > 1e-2


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize(
    "mode",
    [
        dict(num_beams=3, num_return_sequences=2),
        dict(num_beams=2, length_penalty=2.0),
        dict(do_sample=True, num_return_sequences=3, top_k=0),
    ],
    ids=["beams", "best beam", "samples"],
)
def test_modes_that_repeat_and_reorder_rows(name: str, method: str, mode: dict[str, Any]) -> None:
    model, inputs = adapted_model(name, method), prompt(name, padding=True)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(generate(model, inputs, tokens=7, use_cache=use_cache, output_scores=True, **mode))
    assert_same(*results, beams="num_beams" in mode)
    if "num_beams" in mode:
        assert zoo.difference(results[0].sequences_scores, results[1].sequences_scores) <= TOLERANCE


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["no config", "config"])
def test_cache_of_the_user(name: str, kind: str) -> None:
    model, inputs = adapted_model(name), prompt(name, padding=True)
    cache = DynamicCache() if kind == "no config" else DynamicCache(config=model.config)
    assert_same(generate(model, inputs, **{zoo.CACHE: cache}), generate(model, inputs, use_cache=False))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", STATIC)
def test_static_cache(name: str, method: str) -> None:
    model = adapted_model(name, method)
    for padding in (True, False):  # transformers 4.57 uses the cache of the first call again
        inputs = prompt(name, padding=padding)
        expected = generate(model, inputs, tokens=8, use_cache=False)
        assert_same(generate(model, inputs, tokens=8, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("masked", [True, False])
def test_static_cache_by_hand_and_again(name: str, masked: bool) -> None:
    """Chunk by chunk, the second time in the same memory."""
    model = adapted_model(name)
    inputs = prompt(name, padding=False)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"].flip(1)], dim=1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=24)
    for _ in range(2):
        start, parts = 0, []
        for length in (4, 1, 1, 5, 1, 6):
            end = start + length
            more: dict[str, Any] = {} if zoo.V5 else {"cache_position": torch.arange(start, end)}
            if masked:
                more["attention_mask"] = torch.ones(ids.shape[0], end, dtype=torch.long)
            with torch.no_grad():
                out = model(
                    input_ids=ids[:, start:end],
                    position_ids=torch.arange(start, end)[None],
                    use_cache=True,
                    **{zoo.CACHE: cache},
                    **more,
                )
            parts.append(out.logits)
            start = end
        assert zoo.difference(torch.cat(parts, 1), expected) <= TOLERANCE
        cache.reset()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", DECODERS)
def test_prompt_in_chunks(name: str, method: str) -> None:
    model, inputs = adapted_model(name, method), prompt(name, padding=False)
    ids = torch.cat([inputs["input_ids"], inputs["input_ids"].flip(1)], dim=1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    cache, parts, start = None, [], 0
    for length in (3, 4, 1, 6, 1, 3):
        mask = torch.ones(ids.shape[0], start + length, dtype=torch.long)
        with torch.no_grad():
            out = model(
                input_ids=ids[:, start : start + length], attention_mask=mask, use_cache=True, **{zoo.CACHE: cache}
            )
        cache, start = out[zoo.CACHE], start + length
        parts.append(out.logits)
    assert zoo.difference(torch.cat(parts, 1), expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "pal") for name in SEQ2SEQ if name != "bart"), *(("bart", m) for m in CONFIGS)]
)
@pytest.mark.parametrize("mode", [{}, dict(num_beams=3, num_return_sequences=2)], ids=["greedy", "beams"])
def test_encoder_decoder(name: str, mode: dict[str, Any], method: str) -> None:
    model, inputs = adapted_model(name, method), prompt(name, padding=True)
    a, b = (generate(model, inputs, use_cache=use_cache, **mode) for use_cache in (True, False))
    assert_same(a, b, beams=bool(mode))
    if not mode:
        start = {"decoder_input_ids": a.sequences[:, :-1]}
        with torch.no_grad():
            logits = model(**inputs, **start, use_cache=False).logits[:, -len(a.logits) :]
        assert zoo.difference(torch.stack(a.logits, 1), logits) <= TOLERANCE


def _two(name: str) -> PeftModel:
    """A model with adapters `rte`, `sst` (one width) and `qqp` (another)."""
    model = get_peft_model(BY_NAME[name].build(), CONFIGS["pal"](), adapter_name="rte")
    model.add_adapter("sst", CONFIGS["pal"]())
    model.add_adapter("qqp", CONFIGS["pal"](hidden_size=6, num_heads=3))
    for adapter in ("rte", "sst", "qqp"):
        randomise(model, adapter)
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_several_active_adapters(name: str) -> None:
    model, inputs = _two(name), prompt(name, padding=True)
    model.base_model.set_adapter(["rte", "qqp"])
    both = generate(model, inputs)
    assert_same(both, generate(model, inputs, use_cache=False))
    model.set_adapter("rte")
    assert zoo.difference(both.logits[0], generate(model, inputs).logits[0]) > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
@pytest.mark.parametrize("mode", [{}, dict(num_beams=2)], ids=["greedy", "beams"])
def test_one_adapter_a_row(name: str, mode: dict[str, Any]) -> None:
    model, inputs = _two(name), prompt(name, padding=True, batch=6)
    names = ["rte", "qqp", "__base__", "sst", "rte", "qqp"]
    mixed = generate(model, inputs, adapter_names=names, **mode)
    assert_same(mixed, generate(model, inputs, adapter_names=names, use_cache=False, **mode), beams=bool(mode))
    for row, adapter in enumerate(names):
        single = {k: v[row : row + 1] for k, v in inputs.items()}
        if adapter == "__base__":
            with model.disable_adapter():
                alone = generate(model, single, **mode)
        else:
            model.set_adapter(adapter)
            alone = generate(model, single, **mode)
        assert torch.equal(alone.sequences[0], mixed.sequences[row])


@pytest.mark.parametrize(("name", "method"), [("llama", "pal"), *(("gpt2", method) for method in CONFIGS)])
def test_assisted(name: str, method: str) -> None:
    """Rejected candidates leave no keys in the cache."""
    model, inputs = adapted_model(name, method), prompt(name, padding=False, batch=1)
    settings: dict[str, Any] = dict(tokens=12, min_new_tokens=None, eos_token_id=39)
    expected = generate(model, inputs, **settings)
    looked_up = generate(model, inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **settings)
    assert_same(looked_up, expected)
    assistant = BY_NAME[name].build()  # without the adapter, so that it is often wrong
    assisted = generate(model, inputs, assistant_model=assistant, **settings)
    assert_same(assisted, expected)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2"])
def test_another_adapter_cannot_go_on_with_a_cache(name: str) -> None:
    """It has not seen the tokens: an error, not another answer."""
    model, ids = _two(name), prompt(name, padding=False)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)[zoo.CACHE]
        model.set_adapter("sst")
        with pytest.raises(UnsupportedError, match=r"holds 9 earlier tokens, of which .*'sst'.* has seen 0"):
            model(input_ids=ids[:, :1], **{zoo.CACHE: cache})
        with model.disable_adapter():
            cache = model(input_ids=ids, use_cache=True)[zoo.CACHE]
        with pytest.raises(UnsupportedError, match="start with an empty cache"):
            model(input_ids=ids[:, :1], **{zoo.CACHE: cache})
        # One that was switched off for a while has a gap.
        cache = model(input_ids=ids, use_cache=True)[zoo.CACHE]
        with model.disable_adapter():
            model(input_ids=ids[:, :1], **{zoo.CACHE: cache})
        with pytest.raises(UnsupportedError, match=r"holds 10 earlier tokens, of which .* has seen 9"):
            model(input_ids=ids[:, :1], **{zoo.CACHE: cache})


def test_other_rows_cannot_go_on_with_a_cache() -> None:
    model, ids = _two("gpt2"), prompt("gpt2", padding=False)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, adapter_names=["rte", "sst", "qqp"])[zoo.CACHE]
        model(input_ids=ids[:, :1], adapter_names=["rte", "sst", "qqp"], **{zoo.CACHE: cache})
        with pytest.raises(UnsupportedError, match=r"holds 10 earlier tokens, of which .* has seen 0"):
            model(input_ids=ids[:, :1], adapter_names=["sst", "rte", "qqp"], **{zoo.CACHE: cache})


def test_static_cache_of_another_adapter() -> None:
    model, ids = _two("llama"), prompt("llama", padding=False)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=12)
    more: dict[str, Any] = {} if zoo.V5 else {"cache_position": torch.arange(9)}
    with torch.no_grad():
        model(input_ids=ids, **{zoo.CACHE: cache}, **more)
        model.set_adapter("sst")
        more = {} if zoo.V5 else {"cache_position": torch.arange(9, 10)}
        with pytest.raises(UnsupportedError, match="holds 9 earlier tokens"):
            model(input_ids=ids[:, :1], **{zoo.CACHE: cache}, **more)


def test_methods_without_attention_need_no_cache() -> None:
    from pal_adapters import LHUCPeftConfig, LowRankPeftConfig, ParallelHoulsbyPeftConfig

    for config in (LowRankPeftConfig(hidden_size=5), LHUCPeftConfig(), ParallelHoulsbyPeftConfig(hidden_size=5)):
        model = get_peft_model(BY_NAME["llama"].build(), config).eval()
        randomise(model)
        inputs = prompt("llama", padding=True)
        result = generate(model, inputs)
        assert_same(result, generate(model, inputs, use_cache=False))
        assert len(result.past_key_values.layers) == 2
