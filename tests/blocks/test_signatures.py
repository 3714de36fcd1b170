"""What a call passes is recognised by what it is; what could be a cache or a mask and is not known is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, MistralConfig, StaticCache

pytest.importorskip("peft")

from peft import get_peft_model

from pal_adapters import LowRankPeftConfig, PALPeftConfig, UnsupportedError
from pal_adapters.blocks.signatures import cache_of, check_masks, check_whole, hidden_states, window_of
from pal_adapters.blocks.sites import find_blocks
from tests import zoo
from tests.zoo import BY_NAME

pytestmark = zoo.HOST_WARNINGS
X = torch.zeros(2, 1, 4)
CACHES: dict[str, Any] = {
    "growing": DynamicCache(),
    "static": StaticCache(config=MistralConfig(num_hidden_layers=1), max_cache_len=4),
    "encoder-decoder": EncoderDecoderCache(DynamicCache(), DynamicCache()),
}


class Paged:
    """No `Cache`, like the paged caches of `generate_batch`."""

    def update(self, keys: Any, values: Any, layer: int, **kwargs: Any) -> Any:
        return keys, values


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_under_any_name(kind: str) -> None:
    cache = CACHES[kind]
    assert cache_of((X, cache), {}) is cache
    assert cache_of((X,), {"some_future_name": cache, "attention_mask": None}) is cache
    assert cache_of((X,), {"past_key_values": None, "more": {"a": 1}, "flag": True}) is None


def test_what_could_be_a_cache() -> None:
    with pytest.raises(UnsupportedError, match=r"a Paged is not supported.*generate\(\) instead of generate_batch"):
        cache_of((X,), {"cache": Paged()})
    with pytest.raises(UnsupportedError, match="packed sequences are not supported"):
        cache_of((X,), {"cu_seq_lens_q": torch.tensor([0, 3, 5])})


def test_hidden_states() -> None:
    mask = torch.ones(2, 1)
    assert hidden_states({"x": 0, "mask": 1}, (X, mask), {}) is X
    assert hidden_states({"x": 0, "mask": 1}, (), {"mask": mask, "x": X}) is X
    assert hidden_states({}, (), {"flag": None, "states": X, "mask": mask}) is X


def test_masks_of_unknown_names() -> None:
    mask = torch.ones(2, 1)
    check_masks({"x": 0, "attention_mask": 1}, (X, mask), {"head_mask": mask, "new_mask": None})
    with pytest.raises(UnsupportedError, match="named 'window_mask' is not known"):
        check_masks({"x": 0}, (X,), {"window_mask": mask})
    with pytest.raises(UnsupportedError, match="named 'new_mask' is not known"):
        check_masks({"x": 0, "new_mask": 1}, (X, mask), {})


@pytest.mark.parametrize("length", [1, 2])
def test_fewer_tokens_than_are_seen(length: int) -> None:
    full = torch.ones(2, 1, length, 5, dtype=torch.bool)
    for mask in (full, torch.zeros(full.shape), full[:, 0, 0], full[:, 0]):
        with pytest.raises(UnsupportedError, match=f"gets {length} of 5 tokens, and no generation cache"):
            check_whole("block", mask, length, {}, causal=True)
    one_more = torch.zeros(2, 1, length, length + 1)
    with pytest.raises(UnsupportedError, match="no generation cache"):
        check_whole("block", one_more, length, {}, causal=True)
    one_more[..., -1] = torch.finfo(torch.float32).min  # an empty place, as old models leave it
    check_whole("block", one_more, length, {}, causal=True)
    check_whole("block", None, length, {}, causal=True)


@pytest.mark.parametrize("name", ["cache_position", "position_ids"])
def test_a_later_position(name: str) -> None:
    with pytest.raises(UnsupportedError, match="gets 1 of 7 tokens"):
        check_whole("block", None, 1, {name: torch.tensor([6])}, causal=True)
    check_whole("block", None, 1, {name: torch.tensor([0])}, causal=True)
    check_whole("block", None, 1, {name: torch.tensor([6])}, causal=False)


def test_a_model_that_passes_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation ends in an error where the model hides its cache."""
    model = get_peft_model(BY_NAME["llama"].build(), PALPeftConfig(hidden_size=12, num_heads=2)).eval()
    ids = torch.arange(3, 12).reshape(1, 9)

    for layer in model.get_base_model().model.layers:
        forward = layer.self_attn.forward

        def call(*args: Any, wrapped: Any = None, inner: Any = forward, **kwargs: Any) -> Any:
            return inner(*args, **kwargs, **{zoo.CACHE: wrapped()})

        def swap(module: nn.Module, args: Any, kwargs: Any) -> Any:
            cache = kwargs.pop(zoo.CACHE)
            return args, {**kwargs, "wrapped": lambda: cache}

        monkeypatch.setattr(layer.self_attn, "forward", call)
        layer.self_attn.register_forward_pre_hook(swap, with_kwargs=True, prepend=True)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="no generation cache that could hold the others"):
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=1, eos_token_id=None)


@pytest.mark.skipif(not zoo.V5, reason="continuous batching of transformers 4.57 needs a GPU")
@pytest.mark.filterwarnings("ignore")
def test_generate_batch() -> None:
    """Methods without attention may serve packed requests; one that attends refuses each of them."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    memory = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=1)
    for config in (LowRankPeftConfig(hidden_size=8), PALPeftConfig(hidden_size=12, num_heads=2)):
        model = get_peft_model(BY_NAME["llama"].build(), config).eval()
        zoo.randomise(model)
        alone = [
            model.generate(input_ids=torch.tensor([p]), generation_config=settings)[0, len(p) :].tolist()
            for p in prompts
        ]
        if isinstance(config, PALPeftConfig):
            with pytest.raises(UnsupportedError, match=r"'default' \(pal\) attends, which generate_batch does not"):
                model.generate_batch(prompts, settings, memory, warmup=False)
            # Past the tuner, each request ends in the error.
            found = model.get_base_model().generate_batch(prompts, settings, memory, warmup=False)
            results = [found[key] for key in sorted(found)]
            assert all("generate() instead of generate_batch()" in str(result.error) for result in results)
            assert not any(result.generated_tokens for result in results)
        else:
            found = model.generate_batch(prompts, settings, memory, warmup=False)
            assert [found[key].generated_tokens for key in sorted(found)] == alone


@pytest.mark.parametrize("name", [h.name for h in zoo.HOSTS if h.available and h.decodes and "LM" in h.model])
def test_windows(name: str) -> None:
    """As the table says, block by block."""
    host = BY_NAME[name]
    blocks = find_blocks(host.build())
    windows = host.stacks[-1].windows
    for block in blocks:
        attention = block.module.get_submodule(block.sites.attention)
        expected = windows[block.index % len(windows)]
        assert window_of(attention, block) == expected


@pytest.mark.skipif(not hasattr(transformers, "Exaone4Config"), reason="this transformers has no EXAONE 4")
def test_full_attention_beside_windows() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Exaone4Config(
        vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, layer_types=kinds, max_position_embeddings=64,
    )  # fmt: skip
    blocks = find_blocks(transformers.Exaone4ForCausalLM(config))
    assert [window_of(b.module.get_submodule(b.sites.attention), b) for b in blocks] == [4, None]


@pytest.mark.skipif(not hasattr(transformers, "MoshiConfig"), reason="this transformers has no Moshi")
def test_a_window_that_the_model_does_not_apply() -> None:
    config = transformers.MoshiConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, ffn_dim=36, sliding_window=4,
    )  # fmt: skip
    blocks = find_blocks(transformers.MoshiModel(config))
    assert [window_of(b.module.get_submodule(b.sites.attention), b) for b in blocks] == [None, None]
