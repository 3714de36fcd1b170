"""Keys and values of task modules inside the host's cache: the same tokens as the host's own layer, row by row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, MistralConfig, StaticCache, cache_utils

from pal_adapters import UnsupportedError
from pal_adapters.hooks.kv_cache import TaskCache, task_cache
from pal_adapters.nn.unit import UnitInputs
from tests import zoo

DEPTH = 2
FULL = LlamaConfig(num_hidden_layers=DEPTH)
SLIDING = MistralConfig(num_hidden_layers=DEPTH, sliding_window=4)
CACHES = {
    "growing": lambda: DynamicCache(),
    "growing, config": lambda: DynamicCache(config=FULL),
    "sliding": lambda: DynamicCache(config=SLIDING),
    "static": lambda: StaticCache(config=FULL, max_cache_len=16),
    "static sliding": lambda: StaticCache(config=SLIDING, max_cache_len=16),
}
caches = pytest.mark.parametrize("kind", CACHES)


class Feed:
    """Feeds a host's cache and a slot with the same tokens, so that what they return can be compared."""

    def __init__(self, cache: Any, index: int = 0, slot: object = "rte") -> None:
        self.cache, self.index, self.slot, self.seen = cache, index, slot, 0

    def step(self, keys: Tensor, rows: Tensor | None = None, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """What the host's layer and our slot return for `keys` `[b, h, n, k]`; the values are minus the keys."""
        position = torch.arange(self.seen, self.seen + keys.shape[2])
        self.seen += keys.shape[2]
        host, _ = self.cache.update(keys, -keys, self.index, {"cache_position": position})
        task = task_cache(self.cache, f"block {self.index}", self.index, DEPTH, None if zoo.V5 else position)
        assert task is not None
        part = keys if rows is None else keys[rows]
        ours, values = task.update(self.slot, part, -part, rows=rows, batch=keys.shape[0])
        assert torch.equal(values, -ours)
        return host, ours


def draw(n: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, n, 4)


@caches
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5).filter(lambda x: sum(x) <= 16))
@settings(max_examples=25, deadline=None)
def test_holds_what_the_host_holds(kind: str, lengths: list[int]) -> None:
    feed, seen = Feed(CACHES[kind]()), 0
    for number, length in enumerate(lengths):
        host, ours = feed.step(draw(length))
        seen += length
        if number == 0:  # only tokens, where a static cache also returns empty places
            host = host[:, :, :length]
        assert torch.equal(ours, host)


@caches
def test_rows_that_a_slot_never_sees(kind: str) -> None:
    cache = CACHES[kind]()
    feed, rows = Feed(cache), torch.tensor([2, 0])
    for length in (3, 1, 2):
        host, ours = feed.step(draw(length), rows=rows)
        assert torch.equal(ours, host[rows][:, :, : ours.shape[2]])
    held = cache.layers[-1].keys
    assert held.shape[0] == 3
    assert not held[1].any()


@caches
@pytest.mark.parametrize("what", ["reorder", "repeat", "select"])
def test_what_is_done_to_the_cache_is_done_to_the_slots(kind: str, what: str) -> None:
    cache = CACHES[kind]()
    feed = Feed(cache)
    feed.step(draw(3))
    feed.step(draw(1))
    if what == "reorder":
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        batch = 3
    elif "static" in kind:
        return  # transformers does neither with a static cache
    elif what == "repeat":
        cache.batch_repeat_interleave(2)
        batch = 6
    else:
        cache.batch_select_indices(torch.tensor([1]))
        batch = 1
    host, ours = feed.step(draw(1, batch))
    assert torch.equal(ours, host)


@pytest.mark.parametrize("kind", ["growing", "growing, config"])
def test_crop(kind: str) -> None:
    cache = CACHES[kind]()
    feed = Feed(cache)
    feed.step(draw(6))
    cache.crop(-2 if zoo.V5 else 4)
    host, ours = feed.step(draw(2))
    assert ours.shape[2] == 6
    assert torch.equal(ours, host)


# transformers 4.57 fills growing and sliding layers with zeros, and goes on behind them.
@pytest.mark.parametrize("kind", ["static", "static sliding", *(["sliding", "growing, config"] if zoo.V5 else [])])
def test_reset(kind: str) -> None:
    """The same cache for a second prompt (transformers 4.57 keeps static caches)."""
    cache = CACHES[kind]()
    for _ in range(2):
        feed = Feed(cache)
        for length in (5, 1, 1, 2):
            host, ours = feed.step(draw(length))
            assert torch.equal(ours, host[:, :, : ours.shape[2]])
        cache.reset()


@caches
def test_slots_are_apart(kind: str) -> None:
    """Adapters, blocks and widths have slots of their own, behind all layers of the host."""
    cache = CACHES[kind]()
    first, second = Feed(cache, 0), Feed(cache, 1)
    a, b = draw(3), draw(3)
    assert torch.equal(first.step(a)[1], a)
    assert torch.equal(second.step(b)[1], b)
    task = TaskCache(cache, "block 0", 0, DEPTH, torch.arange(3))
    for slot, keys in (("sst", draw(3)), ("rte", draw(3)[:, :1]), (("rte", 1), draw(3))):
        assert torch.equal(task.update(slot, keys, keys, rows=None, batch=3)[0], keys)
    assert len(cache.layers) == DEPTH + 5
    assert type(cache.layers[0]) is type(cache.layers[1])
    assert cache.get_seq_length() == 3
    assert cache.is_sliding[:DEPTH] == cache.is_sliding[DEPTH : 2 * DEPTH]
    assert cache.is_compileable == kind.startswith("static")


@caches
def test_a_slot_that_missed_tokens(kind: str) -> None:
    cache = CACHES[kind]()
    feed = Feed(cache)
    feed.step(draw(3))
    late = Feed(cache, slot="sst")
    late.seen = 3
    with pytest.raises(
        UnsupportedError, match=r"holds 3 earlier tokens, of which the active adapter .*sst.* has seen 0"
    ):
        late.step(draw(1))


def test_a_host_that_does_not_cache() -> None:
    """Activation checkpointing takes the cache away from attention, but not from the block's own arguments."""
    cache = DynamicCache()
    keys = draw(3)
    task = task_cache(cache, "block", 0, DEPTH)
    assert task is not None
    for _ in range(2):
        ours, values = task.update("rte", keys, -keys, rows=None, batch=3)
        assert ours is keys
        assert torch.equal(values, -keys)
    assert len(cache.layers) == DEPTH


class Tokens:
    """Feeds a host's cache and a slot for tokens; `seen` are all tokens so far, kept here."""

    def __init__(self, cache: Any, batch: int = 3) -> None:
        self.cache, self.seen = cache, torch.zeros(batch, 0, 5)

    def step(self, tokens: Tensor, last: int | None, rows: Tensor | None = None) -> tuple[Tensor, Any]:
        start, keys = self.seen.shape[1], draw(tokens.shape[1], tokens.shape[0])
        position = torch.arange(start, start + tokens.shape[1])
        self.cache.update(keys, keys, 0, {"cache_position": position})
        self.seen = torch.cat([self.seen, tokens], 1)
        task = task_cache(self.cache, "block", 0, DEPTH, None if zoo.V5 else position)
        assert task is not None
        part = tokens if rows is None else tokens[rows]
        return task.extend("conv", part, rows=rows, batch=tokens.shape[0], last=last)

    def expected(self, length: int, last: int | None) -> Tensor:
        if last is None:
            return self.seen
        return torch.cat([torch.zeros(self.seen.shape[0], last, 5), self.seen], 1)[:, -(last + length) :]


@caches
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda x: sum(x) <= 16),
    last=st.one_of(st.none(), st.integers(0, 6)),
)
@settings(max_examples=25, deadline=None)
def test_earlier_tokens(kind: str, lengths: list[int], last: int | None) -> None:
    """All of them, or the last ones, whatever the host's own layer keeps of its keys."""
    feed, start = Tokens(CACHES[kind]()), 0
    for length in lengths:
        tokens = torch.randn(3, length, 5).relu()  # some are all zero, which transformers 4.57 does not count
        tokens[:, 0] = 0
        if kind == "static sliding" and start >= 4 and (last is None or last > 3):  # the window is 4
            with pytest.raises(UnsupportedError, match="keeps 3 earlier tokens"):
                feed.step(tokens, last)
            return
        held, earlier = feed.step(tokens, last)
        assert earlier == start
        assert torch.equal(held, feed.expected(length, last))
        start += length


@caches
def test_earlier_tokens_of_some_rows_follow_the_beams(kind: str) -> None:
    cache = CACHES[kind]()
    feed, rows = Tokens(cache), torch.tensor([2, 1])  # the first row stays zero
    feed.step(torch.randn(3, 3, 5), 2, rows)
    order = torch.tensor([0, 2, 2])
    cache.reorder_cache(order)
    feed.seen = feed.seen[order]
    held, earlier = feed.step(torch.randn(3, 1, 5), 2, rows)
    assert earlier == 3
    assert torch.equal(held, feed.expected(1, 2)[rows])


@pytest.mark.parametrize("kind", ["growing", *(["static"] if zoo.V5 else [])])
def test_earlier_tokens_are_cropped(kind: str) -> None:
    cache = CACHES[kind]()
    feed = Tokens(cache)
    feed.step(torch.randn(3, 6, 5), None)
    cache.crop(-2 if zoo.V5 else 4)
    feed.seen = feed.seen[:, :4]
    held, earlier = feed.step(torch.randn(3, 1, 5), None)
    assert earlier == 4
    assert torch.equal(held, feed.seen)


@caches
def test_earlier_tokens_in_a_compiled_graph(kind: str) -> None:
    torch._dynamo.reset()
    cache = CACHES[kind]()
    feed = Tokens(cache)
    feed.step(torch.randn(3, 2, 5), 2)

    def step(tokens: Tensor, position: Tensor) -> Tensor:
        keys = tokens[:, None].repeat(1, 2, 1, 1)[..., :4]
        cache.update(keys, keys, 0, {"cache_position": position})
        task = task_cache(cache, "block", 0, DEPTH, None if zoo.V5 else position)
        assert task is not None
        return task.extend("conv", tokens, rows=None, batch=3, last=2)[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for number in range(3):
        tokens = torch.randn(3, 1, 5)
        feed.seen = torch.cat([feed.seen, tokens], 1)
        assert torch.equal(compiled(tokens, torch.arange(2 + number, 3 + number)), feed.expected(1, 2))


class States:
    """A running sum over tokens beside a host's layer: `s_t = s_(t-1) / 2 + u_t`, exact in binary."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.seen = torch.empty(3, 0, 5)

    def step(self, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
        length, start = tokens.shape[1], self.seen.shape[1]
        self.seen = torch.cat([self.seen, tokens], 1)
        keys, position = draw(length, tokens.shape[0]), torch.arange(start, start + length)
        self.cache.update(keys, keys, 0, {"cache_position": position})
        task = task_cache(self.cache, "block", 0, DEPTH, None if zoo.V5 else position)
        assert task is not None
        part = tokens if rows is None else tokens[rows]
        initial = torch.ones_like(part[:, 0])
        return task.carry("state", lambda state: scan(state, part), initial, rows=rows, batch=tokens.shape[0])

    def expected(self, length: int) -> Tensor:
        return scan(torch.ones(3, 5), self.seen)[:, -length:]


def scan(state: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack([state := state / 2 + token for token in tokens.unbind(1)], 1)


@caches
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6).filter(lambda x: sum(x) <= 16))
@settings(max_examples=25, deadline=None)
def test_a_running_state(kind: str, lengths: list[int]) -> None:
    """The state before a call, whatever the host's own layer keeps of its keys."""
    feed = States(CACHES[kind]())
    for length in lengths:
        tokens = torch.randint(-8, 8, (3, length, 5)).float()
        assert torch.equal(feed.step(tokens), feed.expected(length))


@caches
def test_a_running_state_of_some_rows_follows_the_beams(kind: str) -> None:
    cache = CACHES[kind]()
    feed, rows = States(cache), torch.tensor([2, 1])
    feed.step(torch.ones(3, 3, 5).cumsum(0), rows)
    order = torch.tensor([0, 2, 2])
    cache.reorder_cache(order)
    feed.seen = feed.seen[order]
    assert torch.equal(feed.step(torch.ones(3, 1, 5), rows), feed.expected(1)[rows])


@pytest.mark.parametrize("kind", ["growing", *(["static"] if zoo.V5 else [])])
def test_a_running_state_is_cropped(kind: str) -> None:
    cache = CACHES[kind]()
    feed = States(cache)
    feed.step(torch.ones(3, 6, 5))
    cache.crop(-2 if zoo.V5 else 4)
    feed.seen = feed.seen[:, :4]
    assert torch.equal(feed.step(torch.full((3, 1, 5), 3.0)), feed.expected(1))


@caches
def test_a_running_state_in_a_compiled_graph(kind: str) -> None:
    torch._dynamo.reset()
    feed = States(CACHES[kind]())
    feed.step(torch.ones(3, 2, 5))
    cache = feed.cache

    def step(tokens: Tensor, position: Tensor) -> Tensor:
        keys = tokens.unsqueeze(1).expand(3, 2, 1, 5)[..., :4]
        cache.update(keys, keys, 0, {"cache_position": position})
        task = task_cache(cache, "block", 0, DEPTH, None if zoo.V5 else position)
        assert task is not None
        return task.carry("state", lambda state: scan(state, tokens), tokens[:, 0], rows=None, batch=3)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for number in range(3):
        tokens = torch.full((3, 1, 5), float(number))
        feed.seen = torch.cat([feed.seen, tokens], 1)
        assert torch.equal(compiled(tokens, torch.arange(2 + number, 3 + number)), feed.expected(1))


def test_a_running_state_without_a_cache() -> None:
    tokens = torch.randn(2, 3, 5)
    states = UnitInputs().carry(lambda state: scan(state, tokens), torch.ones(2, 5))
    assert torch.equal(states, scan(torch.ones(2, 5), tokens))


def test_earlier_tokens_without_a_cache() -> None:
    tokens = torch.randn(2, 3, 5)
    padded, earlier = UnitInputs().extend(tokens, last=2)
    assert earlier == 0
    assert torch.equal(padded[:, 2:], tokens)
    assert not padded[:, :2].any()
    assert torch.equal(UnitInputs().extend(tokens)[0], tokens)


def test_gradients_flow_through_a_fresh_slot() -> None:
    cache = DynamicCache()
    keys = draw(3).requires_grad_()
    cache.update(keys.detach(), keys.detach(), 0)
    task = task_cache(cache, "block", 0, DEPTH)
    assert task is not None
    rows = torch.tensor([1, 2])
    for part in (None, rows):
        chosen = keys if part is None else keys[part]
        ours, _ = task.update(("rte", part is None), chosen, chosen, rows=part, batch=3)
        (gradient,) = torch.autograd.grad(ours.sum(), keys)
        assert gradient.sum() == ours.numel()


def test_kinds_of_cache() -> None:
    assert task_cache(None, "block", 0, DEPTH) is None
    assert task_cache(((draw(1), draw(1)),), "block", 0, DEPTH) is None  # a legacy tuple
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    keys = draw(2)
    both.self_attention_cache.update(keys, keys, 0)
    task = task_cache(both, "block", 0, DEPTH)
    assert task is not None
    task.update("rte", keys, keys, rows=None, batch=3)
    assert len(both.self_attention_cache.layers) == DEPTH + 1
    assert len(both.cross_attention_cache.layers) == 0


def test_a_copy_goes_on_by_itself() -> None:
    cache = CACHES["sliding"]()
    feed = Feed(cache)
    feed.step(draw(3))
    other = copy.deepcopy(feed)
    keys = draw(1)
    for one in (feed, other):
        host, ours = one.step(keys)
        assert torch.equal(ours, host)
    feed.step(draw(2))
    assert other.cache.get_seq_length() == 4
    assert other.cache.layers[-1].get_seq_length() == 4


@pytest.mark.skipif(not zoo.V5, reason="transformers 5")
def test_a_cache_that_keeps_the_prompt_and_slides_over_the_rest() -> None:
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr as unlimited  # of transformers 5 alone

    cache = DynamicCache()
    kind = unlimited.UnlimitedOcrDynamicReferenceSlidingWindowLayer
    cache.layers = [kind(sliding_window=3) for _ in range(DEPTH)]
    feed = Feed(cache)
    for length in (5, 1, 1, 1, 1, 2):
        host, ours = feed.step(draw(length))
        assert torch.equal(host, ours)
    assert host.shape[2] == 5 + 2 + 2
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    host, ours = feed.step(draw(1))
    assert torch.equal(host, ours)
    # The kind of layer that transformers makes for new caches is still the model's own.
    assert cache_utils.DYNAMIC_LAYER_TYPE_MAPPING["reference_sliding_attention"] is kind


@pytest.mark.skipif(not zoo.V5, reason="transformers 5")
def test_a_static_cache_that_keeps_the_prompt_is_rejected() -> None:
    from transformers.models.unlimited_ocr import modeling_unlimited_ocr as unlimited  # of transformers 5 alone

    cache = DynamicCache()
    kind = unlimited.UnlimitedOcrStaticReferenceSlidingWindowLayer
    cache.layers = [kind(max_cache_len=16, sliding_window=3) for _ in range(DEPTH)]
    with pytest.raises(UnsupportedError, match="generate with a cache that grows"):
        Feed(cache).step(draw(5))
