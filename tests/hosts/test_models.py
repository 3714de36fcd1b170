"""Every kind of model that is recognised, compared with hooks that add a method's term by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model

from pal_adapters import (
    PALPeftConfig,
)
from pal_adapters.blocks.sites import find_blocks
from tests import zoo
from tests.methods import RECORDS, makers
from tests.zoo import ALBERT, BY_NAME, HOSTS, Host

pytestmark = zoo.HOST_WARNINGS
CONFIGS = makers("peft", dropout=False)
# `houlsby` acts at modules, see its own tests.
IN_BLOCKS = [name for name in CONFIGS if not RECORDS[name].at_top and name != "houlsby"]
TOP = [name for name in CONFIGS if RECORDS[name].at_top]
TOLERANCE = 5e-5
hosts = pytest.mark.parametrize("host", [h for h in HOSTS if h.available], ids=str)


def adapt(host: Host, method: str, *, model: nn.Module | None = None, randomised: bool = True, **more: Any) -> Any:
    model = host.build() if model is None else model
    adapted = get_peft_model(model, CONFIGS[method](**more)).eval()
    if randomised:
        for name, parameter in adapted.named_parameters():
            if f".{method}." in name:
                zoo.randomise(nn.ParameterList([parameter]), seed=len(name))
    return adapted


def run(model: nn.Module, inputs: dict[str, Tensor], seed: int | None = None, **more: Any) -> Any:
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        return model(**inputs, **more)


def assert_equal(host: Host, actual: Any, expected: Any, inputs: dict[str, Tensor], tolerance: float) -> None:
    names = zoo.outputs_of(expected)
    assert names
    for name, value in names.items():
        assert not value.isnan().any()
        assert zoo.difference(actual[name], value, host.real(inputs, name)) <= tolerance, name


def differs(host: Host, actual: Any, plain: Any, inputs: dict[str, Tensor]) -> float:
    return min(zoo.difference(actual[k], v, host.real(inputs, k)) for k, v in zoo.outputs_of(plain).items())


@hosts
def test_blocks_are_found(host: Host) -> None:
    model = host.build()
    found = {block.name: block for block in find_blocks(model)}
    expected = {
        f"{stack.path}.{i}": (i, len(zoo.blocks_of(model, stack)), module)
        for stack in host.stacks
        for i, module in enumerate(zoo.blocks_of(model, stack))
    }
    assert found.keys() == expected.keys()
    for name, (index, depth, module) in expected.items():
        block = found[name]
        assert (block.index, block.depth) == (index, depth)
        assert block.module is module
        assert block.width == (36 if host.name == "clip" and "vision" in name else 24)


@hosts
@pytest.mark.parametrize("method", IN_BLOCKS)
def test_term_is_added_where_it_belongs(host: Host, method: str) -> None:
    plain, inputs = (
        host.build().requires_grad_(False),
        host.inputs(),
    )  # torch may take other kernels for frozen weights
    before = run(plain, inputs)
    adapted = adapt(host, method, randomised=False)
    fresh = run(adapted, inputs)
    for name, value in zoo.outputs_of(before).items():
        assert torch.equal(fresh[name], value), "a fresh adapter must change nothing, to the last bit"

    adapted = adapt(host, method)
    base = adapted.get_base_model()
    with zoo.by_hand(host, plain, base, method, inputs):
        expected = run(plain, inputs)
        expected_in_training = run(plain.train(), inputs, seed=5)
    actual = run(adapted, inputs)
    assert differs(host, actual, before, inputs) > 1e-2
    assert_equal(host, actual, expected, inputs, TOLERANCE)
    # The host's dropout is on and the module's is off: the same random numbers, and none of them touches the term.
    actual = run(adapted.train(), inputs, seed=5)
    assert differs(host, actual, expected, inputs) > 1e-2
    assert_equal(host, actual, expected_in_training, inputs, TOLERANCE)


@hosts
@pytest.mark.parametrize("method", ["pal", "low_rank"])
def test_raw_input(host: Host, method: str) -> None:
    if not host.stacks[0].spec.pre:
        with pytest.raises(ValueError, match="pal_input='raw' has no effect"):
            adapt(host, method, pal_input="raw")
        return
    plain, inputs = host.build(), host.inputs()
    adapted = adapt(host, method, pal_input="raw")
    with zoo.by_hand(host, plain, adapted.get_base_model(), method, inputs, pal_input="raw"):
        expected = run(plain, inputs)
    assert_equal(host, run(adapted, inputs), expected, inputs, TOLERANCE)


# OPT of this kind projects the last hidden state, so that the stack's output is not among what it returns.
@pytest.mark.parametrize(
    "host", [h for h in HOSTS if h.available and len(h.stacks) == 1 and h.name != "opt-post"], ids=str
)
@pytest.mark.parametrize("method", TOP)
def test_top_reads_the_last_hidden_state(host: Host, method: str) -> None:
    inputs, stack = host.inputs(), host.stacks[0]
    plain = adapt(host, method)
    adapted, plain = plain, _body(host.build())
    *rest, last = zoo.blocks_of(adapted.get_base_model(), stack)
    assert all(len(getattr(block, method).units) == 0 for block in rest if hasattr(block, method))
    weights = zoo.weights_of(last, method)
    y = run(plain, inputs).last_hidden_state
    keep = host.keep(stack, len(rest), inputs, y.shape[1])
    expected = RECORDS[method].make_reference().top(weights, y, keep)
    actual = run(_body(adapted.get_base_model()), inputs).last_hidden_state
    real = host.real(inputs)
    assert zoo.difference(expected, y, real) > 1e-2
    assert zoo.difference(actual, expected, real) <= TOLERANCE


def _body(model: Any) -> Any:
    """The model without a language model head."""
    if not hasattr(model, "lm_head") and not hasattr(model, "embed_out"):
        return model
    return model.model if model.base_model is model else model.base_model


@pytest.mark.parametrize("method", TOP)
def test_top_of_encoder_and_decoder(method: str) -> None:
    host = BY_NAME["t5"]
    inputs = host.inputs()
    adapted, plain = adapt(host, method), host.build()

    def top(y: Tensor, stack: zoo.Stack) -> Tensor:
        weights = zoo.weights_of(zoo.blocks_of(adapted.get_base_model(), stack)[-1], method)
        keep = host.keep(stack, 1, inputs, y.shape[1])
        return RECORDS[method].make_reference().top(weights, y, keep)

    encoder, decoder = host.stacks
    states = top(run(plain, inputs).encoder_last_hidden_state, encoder)
    y = run(plain, {**inputs, "encoder_outputs": (states,)}).last_hidden_state
    actual = run(adapted, inputs)
    assert zoo.difference(actual.encoder_last_hidden_state, states, inputs["attention_mask"].bool()) <= TOLERANCE
    assert zoo.difference(actual.last_hidden_state, top(y, decoder)) <= TOLERANCE


@pytest.mark.parametrize("host", [h for h in HOSTS if h.available and h.padded], ids=str)
@pytest.mark.parametrize("method", [name for name in CONFIGS if RECORDS[name].attends])
def test_padding_invariance(host: Host, method: str) -> None:
    """The contents of padding change nothing elsewhere."""
    adapted, inputs = adapt(host, method), host.inputs()
    other = dict(inputs)
    other["input_ids"] = torch.where(inputs["attention_mask"] == 0, inputs["input_ids"] * 0 + 17, inputs["input_ids"])
    if any(name in host.name for name in ("roberta", "camembert", "xmod", "mpnet", "esm")):
        # Their positions are counted from the padding token.
        ids = inputs["input_ids"]
        positions = torch.arange(2, ids.shape[1] + 2)[None].expand_as(ids)
        inputs, other = {**inputs, "position_ids": positions}, {**other, "position_ids": positions}
    a, b = run(adapted, inputs), run(adapted, other)
    assert_equal(host, a, b, inputs, 1e-6 if "deberta" not in host.name else 1e-5)


@contextmanager
def recorded(host: Host, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The inputs and outputs of every block, after all other hooks."""
    values: dict[str, Tensor] = {}
    handles = []
    for stack in host.stacks:
        for i, block in enumerate(zoo.blocks_of(model, stack)):
            key = f"{stack.part}.{i}"

            def before(m: nn.Module, args: Any, kwargs: Any, key: str = key) -> None:
                values[f"{key}.in"] = args[0] if args else next(iter(kwargs.values()))

            def behind(m: nn.Module, args: Any, out: Any, key: str = key) -> None:
                values[f"{key}.out"] = out[0] if isinstance(out, (tuple, list)) else out

            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(behind))
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def _states(output: Any) -> dict[str, tuple[Tensor, ...]]:
    parts = {"": output, "text": output.get("text_model_output"), "vision": output.get("vision_model_output")}
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    states = {f"{p}.{n}": o[n] for p, o in parts.items() if o is not None for n in names if o.get(n) is not None}
    ends = ("last_hidden_state", "encoder_last_hidden_state")
    states |= {f"{p}.{n}": (o[n],) for p, o in parts.items() if o is not None for n in ends if o.get(n) is not None}
    return states


@hosts
@pytest.mark.parametrize("method", ["pal", "lhuc", "lhuc_output"])
@pytest.mark.parametrize("before", [False, True], ids=["", "requested before"])
def test_hidden_states_hold_what_blocks_return(host: Host, method: str, before: bool) -> None:
    """Each entry is the same tensor of the computation as in the plain model: a block's input, its output, or the
    end."""
    inputs = host.inputs()
    plain = host.build()
    with recorded(host, plain) as values:
        output = run(_body(plain), inputs, output_hidden_states=True)
    plan: dict[tuple[str, int], str] = {}
    states = _states(output)
    ends = {k: v[0] for k, v in states.items() if "last_hidden_state" in k}
    entries = [(k, i, t) for k, v in states.items() if k not in ends for i, t in enumerate(v)]
    assert len(entries) >= sum(len(zoo.blocks_of(plain, s)) + 1 for s in host.stacks)
    for key, i, tensor in entries:
        known = {**{k: v for k, v in values.items() if k.endswith(".out")}, **ends, **values}
        names = [k for k, v in known.items() if v.shape == tensor.shape and torch.equal(v, tensor)]
        assert names, f"{key}[{i}] of the plain model"
        plan[key, i] = names[0]

    model = host.build()
    if before:
        run(model, inputs, output_hidden_states=True)
    more = {"lhuc_site": "output"} if method == "lhuc_output" else {}
    adapted = adapt(host, method.partition("_")[0], model=model, **more)
    base = adapted.get_base_model()
    with recorded(host, base) as values:
        output = run(_body(base), inputs, output_hidden_states=True)
    states = _states(output)
    ends = {k: v[0] for k, v in states.items() if "last_hidden_state" in k}
    for (key, i), name in plan.items():
        expected = {**values, **ends}[name]
        assert torch.equal(states[key][i], expected), f"{key}[{i}] is not {name}"


def test_one_block_at_every_depth() -> None:
    """ALBERT runs one block several times: every time with the task's term."""
    inputs, plain = ALBERT.inputs(), ALBERT.build()
    for method in IN_BLOCKS:
        adapted = adapt(ALBERT, method)
        base = adapted.get_base_model()
        assert [len(zoo.blocks_of(base, s)) for s in ALBERT.stacks] == [1]
        with zoo.by_hand(ALBERT, plain, base, method, inputs):
            expected = run(plain, inputs)
        assert_equal(ALBERT, run(adapted, inputs), expected, inputs, TOLERANCE)
    for method in TOP:
        with pytest.raises(ValueError, match="ALBERT"):
            adapt(ALBERT, method)


def test_bert_for_sequence_classification_and_as_a_decoder() -> None:
    host = BY_NAME["bert"]
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = host.build_config(is_decoder=True)
    stack = zoo.Stack("bert.encoder.layer", host.stacks[0].spec, causal=True)
    decoder = Host("bert-decoder", "BertLMHeadModel", {**host.config, "is_decoder": True}, (stack,))
    plain = transformers.BertLMHeadModel(config).eval()
    zoo.randomise(plain)
    adapted = adapt(decoder, "pal")
    inputs = decoder.inputs()
    with zoo.by_hand(decoder, plain, adapted.get_base_model(), "pal", inputs):
        expected = run(plain, inputs)
    assert_equal(decoder, run(adapted, inputs), expected, inputs, TOLERANCE)

    head = transformers.BertForSequenceClassification(host.build_config(num_labels=3)).eval()
    zoo.randomise(head)
    tuned = get_peft_model(head, PALPeftConfig(task_type="SEQ_CLS", hidden_size=12, num_heads=2))
    assert tuned(**BY_NAME["bert"].inputs()).logits.shape == (3, 3)


def test_multimodal_wrapper() -> None:
    """Gemma 3 with its vision tower: text and vision blocks are found, and the text path equals the text model's."""
    transformers = pytest.importorskip("transformers")
    text = BY_NAME["gemma3"]
    vision = dict(zoo.CLIP_VISION.items()) | {"vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config={**text.config, "vocab_size": 40},
        vision_config={**vision, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=1,
        image_token_index=39,
        boi_token_index=37,
        eoi_token_index=38,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    stacks = {b.stack: b for b in find_blocks(model)}
    assert sorted(b.width for b in stacks.values()) == [24, 36]
    plain_text = text.build()
    language = model.model.language_model
    language.load_state_dict(plain_text.model.state_dict())
    model.lm_head.load_state_dict(plain_text.lm_head.state_dict())
    adapted = get_peft_model(model, PALPeftConfig(hidden_size=12, num_heads=2, dropout=0.0)).eval()
    for name, parameter in adapted.named_parameters():
        if ".pal." in name:
            zoo.randomise(nn.ParameterList([parameter]))
    inputs = text.inputs()
    source = adapted.get_base_model().model.language_model
    blocks = zoo.Stack("layers", text.stacks[0].spec, causal=True, windows=text.stacks[0].windows)
    inner = Host("gemma3-text", "Gemma3TextModel", text.config, (blocks,))
    with zoo.by_hand(inner, plain_text.model, source, "pal", inputs, num_heads=2):
        expected = run(plain_text, inputs)
    actual = run(adapted, inputs)
    assert zoo.difference(actual.logits, expected.logits, inputs["attention_mask"].bool()) <= TOLERANCE
