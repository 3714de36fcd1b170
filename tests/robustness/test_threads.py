"""PEFT: a call gives in many threads what it gives alone, for every method and every way of routing."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

import pal_adapters as pa
from tests import zoo

from .threads import CALLS, beside, check, ids_of, loss_of, mask_of, randomise

pytestmark = zoo.HOST_WARNINGS
TASKS = ["rte", "sst", "qqp"]
CONFIGS: dict[str, Any] = {
    "pal": lambda **more: pa.PALPeftConfig(hidden_size=12, num_heads=2, **more),
    "low_rank": lambda **more: pa.LowRankPeftConfig(hidden_size=5, **more),
    "lhuc": lambda **more: pa.LHUCPeftConfig(**more),
    "parallel_houlsby": lambda **more: pa.ParallelHoulsbyPeftConfig(hidden_size=5, **more),
    "houlsby_pal": lambda **more: pa.HoulsbyPALPeftConfig(hidden_size=12, num_heads=2, bottleneck_size=4, **more),
    "houlsby": lambda **more: pa.HoulsbyPeftConfig(hidden_size=5, **more),
    "top_attention": lambda **more: pa.TopAttentionPeftConfig(hidden_size=12, num_layers=2, num_heads=2, **more),
    "top_bert_layer": lambda **more: pa.TopBertLayerPeftConfig(intermediate_size=16, num_heads=2, **more),
}
NETWORKS = {
    "copies": {}, "no copies": {"train_base": False}, "stream": {"bottleneck": "stream"},
    "top": {"bottleneck": "top"},
}  # fmt: skip
BERT = dict(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
GPT2 = dict(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=40, pad_token_id=0, bos_token_id=1,
            eos_token_id=None)  # fmt: skip


def encoder(model_class: Any = BertModel, **changes: Any) -> Any:
    torch.manual_seed(0)
    return model_class(BertConfig(**BERT, **changes))


def adapt(base: nn.Module, config: Any, names: tuple[str, ...] = TASKS[:1], **more: Any) -> PeftModel:
    model = get_peft_model(base, config(**more), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config(**more))
    for name in reversed(names):
        model.set_adapter(name)
        randomise(model)
    return model.eval().requires_grad_(False)


def sequence(model: Any, number: int, **more: Any) -> Tensor:
    ids = ids_of(number)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask_of(ids), **more).last_hidden_state


def tasks_of(number: int, *, base: bool = False) -> list[str]:
    names = [*TASKS, "__base__"] if base else TASKS
    return [names[(number + row) % len(names)] for row in range(4)]


@pytest.mark.parametrize("method", CONFIGS)
def test_one_active_adapter(method: str) -> None:
    model = adapt(encoder(), CONFIGS[method])
    check(lambda number: sequence(model, number))


@pytest.mark.parametrize("method", CONFIGS)
def test_adapter_names(method: str) -> None:
    """Rows of several tasks, other ones in each thread, beside calls without `adapter_names`."""
    model = adapt(encoder(), CONFIGS[method], tuple(TASKS))

    def call(number: int) -> Tensor:
        if number == 0:
            return sequence(model, number)
        return sequence(model, number, adapter_names=tasks_of(number, base=True))

    check(call)


@pytest.mark.parametrize("method", ["pal", "houlsby"])
def test_modules_to_save(method: str) -> None:
    """Each row through its adapter's classifier."""
    model = adapt(
        encoder(BertForSequenceClassification, num_labels=3), CONFIGS[method], tuple(TASKS), task_type="SEQ_CLS"
    )
    for name in TASKS:
        zoo.randomise(model.get_base_model().classifier.modules_to_save[name], seed=len(name))

    def call(number: int) -> Tensor:
        ids = ids_of(number)
        more = {} if number == 0 else {"adapter_names": tasks_of(number, base=True)}
        return model(input_ids=ids, attention_mask=mask_of(ids), **more).logits

    check(call)


@pytest.mark.parametrize("method", ["pal", "parallel_houlsby", "top_attention"])
@pytest.mark.parametrize("routed", [False, True], ids=["active adapter", "adapter_names"])
def test_generate(method: str, routed: bool) -> None:
    """Greedy and with beams, each thread with its own cache and length."""
    torch.manual_seed(0)
    model = adapt(GPT2LMHeadModel(GPT2Config(**GPT2)), CONFIGS[method], tuple(TASKS), task_type="CAUSAL_LM")

    def call(number: int) -> list[Tensor]:
        ids = ids_of(number)
        more: dict[str, Any] = {"adapter_names": tasks_of(number)} if routed else {}
        out = model.generate(
            input_ids=ids, attention_mask=mask_of(ids, left=True), max_new_tokens=2 + number, do_sample=False,
            num_beams=1 + number % 2, return_dict_in_generate=True, output_logits=True, pad_token_id=0, **more,
        )  # fmt: skip
        return [out.sequences, out.logits[-1]] if number % 2 == 0 else [out.sequences]

    check(call, calls=max(2, CALLS // 2))


@pytest.mark.parametrize("network", NETWORKS)
def test_task_ids(network: str) -> None:
    config = pa.CAMTLPeftConfig(tasks=list(TASKS), max_length=16, **NETWORKS[network])
    model = get_peft_model(encoder(), config).eval()
    randomise(model)
    check(lambda number: sequence(model, number, task_ids=tasks_of(number)))


@pytest.mark.parametrize("method", [*CONFIGS, "ca_mtl"])
def test_other_adapters_come_and_go_beside_calls(method: str) -> None:
    """They are added by reading the model while calls use it."""
    network = method == "ca_mtl"
    config = functools.partial(pa.CAMTLPeftConfig, tasks=TASKS, max_length=16) if network else CONFIGS[method]
    model = adapt(encoder(), config)

    def change() -> None:
        model.add_adapter("other", config())
        model.delete_adapter("other")

    with beside(change):
        check(lambda number: sequence(model, number, **({"task_ids": tasks_of(number)} if network else {})))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Saved adapters of three methods."""
    folder = tmp_path_factory.mktemp("sources")
    saved: dict[str, dict[str, str]] = {}
    for method in ("pal", "houlsby", "lora"):
        more = {"train_layernorm": False} if method == "houlsby" else {}
        make = CONFIGS.get(method, lambda **_: LoraConfig(target_modules=["query"], r=4))
        for name in TASKS[:2]:
            path = folder / method / name
            model = get_peft_model(encoder(), make(**more))
            randomise(model)
            model.save_pretrained(str(path))
            saved.setdefault(method, {})[name] = str(path)
    return saved


@pytest.mark.parametrize("fusion", ["scalearn", "adapter_fusion", "fixed"])
@pytest.mark.parametrize("source", ["pal", "houlsby", "lora"])
def test_fusions(fusion: str, source: str, sources: dict[str, dict[str, str]]) -> None:
    config: Any = {
        "scalearn": pa.ScaLearnPeftConfig, "adapter_fusion": pa.AdapterFusionPeftConfig,
        "fixed": pa.FixedCombinationPeftConfig,
    }[fusion]  # fmt: skip
    model = get_peft_model(encoder(), config(adapters=sources[source])).eval()
    check(lambda number: sequence(model, number))


def test_backward_passes_in_threads() -> None:
    """Gradients by thread, without sharing `.grad`."""
    model = adapt(encoder(), CONFIGS["pal"], tuple(TASKS))
    parameters = [p.requires_grad_() for name, p in model.named_parameters() if ".rte." in name]

    def call(number: int) -> tuple[Tensor, ...]:
        ids = ids_of(number)
        names = tasks_of(number)
        value = model(input_ids=ids, attention_mask=mask_of(ids), adapter_names=names).last_hidden_state
        return torch.autograd.grad(loss_of(value), parameters)

    check(call)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["adapter_names", "task_ids", "active adapter"])
def test_checkpointed_blocks_run_again_in_another_thread(kind: str, reentrant: bool) -> None:
    """The backward pass in a thread that never saw the call; two calls of different tasks before it."""
    base = encoder(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if kind == "task_ids":
        model = get_peft_model(base, pa.CAMTLPeftConfig(tasks=list(TASKS), max_length=16))
        randomise(model)
    else:
        model = adapt(base, CONFIGS["pal"], tuple(TASKS), dropout=0.0)
    model.train()
    trained = [p.requires_grad_() for n, p in model.named_parameters() if "_units" in n or "_shared" in n]
    model.enable_input_require_grads()

    def values(number: int) -> Tensor:
        ids = ids_of(number)
        more = {} if kind == "active adapter" else {kind: tasks_of(number)}
        return loss_of(model(input_ids=ids, attention_mask=mask_of(ids), **more).last_hidden_state)

    def gradients(*, elsewhere: bool) -> list[Tensor | None]:
        for parameter in trained:
            parameter.grad = None
        loss = values(1) + 2 * values(2)
        if elsewhere:
            worker = threading.Thread(target=loss.backward)
            worker.start()
            worker.join()
        else:
            loss.backward()
        return [p.grad for p in trained]

    expected = gradients(elsewhere=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for elsewhere in (False, True):
        found = gradients(elsewhere=elsewhere)
        assert max(float(g.abs().max()) for g in found if g is not None) > 1e-3
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_what_is_taken_of_a_network_during_a_call(how: str) -> None:
    """Copies of pretrained weights take their place only for the call that is running."""
    model = get_peft_model(encoder(), pa.CAMTLPeftConfig(tasks=list(TASKS), max_length=16)).eval()
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = sequence(model, 1, task_ids=tasks_of(1))
    with model.disable_adapter():
        plain = sequence(model, 1)
    take: Any = {
        "state_dict": lambda: model.state_dict(),
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
    }[how]
    taken: list[Any] = []
    inside = model.get_base_model().encoder.layer[1].output.dense

    def hook(*_: Any) -> None:
        handle.remove()  # copies are made without it
        taken.append(take())

    handle = inside.register_forward_hook(hook)
    sequence(model, 1, task_ids=tasks_of(1))
    other = taken[0]
    found = other if how == "state_dict" else other.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())
    if how == "state_dict":
        return
    with other.disable_adapter():
        assert torch.equal(sequence(other, 1), plain)
    assert torch.equal(sequence(other, 1, task_ids=tasks_of(1)), expected)


class Stop(BaseException):
    """Like KeyboardInterrupt: no `Exception`."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("method", [*CONFIGS, "ca_mtl"])
def test_a_call_after_one_that_was_cut_off(method: str, error: type[BaseException]) -> None:
    """At every module: the next call is right, nothing of the cut one is left in it, a copy too."""
    if method == "ca_mtl":
        model = get_peft_model(encoder(), pa.CAMTLPeftConfig(tasks=list(TASKS), max_length=16)).eval()
        randomise(model)
        more = [{"task_ids": tasks_of(number)} for number in range(2)]
    else:
        model = adapt(encoder(), CONFIGS[method], tuple(TASKS))
        more = [{"adapter_names": tasks_of(0)}, {}]
    expected = [sequence(model, number, **more[number]) for number in range(2)]
    before = {name: id(p) for name, p in model.named_parameters()}
    block = model.get_base_model().encoder.layer[1]
    for place in ("attention.output.dense", "intermediate", "output", "output.LayerNorm"):

        def fail(*_: Any) -> None:
            raise error("stopped")

        handle = block.get_submodule(place).register_forward_hook(fail)
        with pytest.raises(error, match="stopped"):
            sequence(model, 0, **more[0])
        handle.remove()
        copied = copy.deepcopy(model)
        for one in (model, copied):
            assert torch.equal(sequence(one, 1, **more[1]), expected[1])
            assert torch.equal(sequence(one, 0, **more[0]), expected[0])
        assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_call_inside_a_call() -> None:
    """Another model inside a block is apart; the same model inside its own block is right or refused."""
    model, other = (adapt(encoder(), CONFIGS["pal"]) for _ in range(2))
    for parameter in other.parameters():
        parameter.data *= 1.5
    expected, apart = sequence(model, 0), sequence(other, 1)
    seen: list[Tensor] = []
    block = model.get_base_model().encoder.layer[1]
    handle = block.intermediate.register_forward_hook(lambda *_: seen.append(sequence(other, 1)))
    assert torch.equal(sequence(model, 0), expected)
    assert torch.equal(seen[0], apart)
    handle.remove()
    inside: list[bool] = []

    def again(*_: Any) -> None:
        if not inside:
            inside.append(True)
            sequence(model, 1)

    block.intermediate.register_forward_hook(again)
    with pytest.raises(pa.UnsupportedError, match="called from within itself"):
        sequence(model, 0)
    assert torch.equal(sequence(model, 0), expected)


@pytest.mark.parametrize("outer", [None, ["sst"] * 4])
@pytest.mark.parametrize("inner", [None, ["qqp"] * 4])
@pytest.mark.parametrize("method", ["pal", "houlsby"])
def test_a_call_in_front_of_the_blocks_of_a_call(
    method: str, inner: list[str] | None, outer: list[str] | None
) -> None:
    """A hook on the embeddings calls the model with its own `adapter_names`, or with none."""
    model = adapt(encoder(), CONFIGS[method], tuple(TASKS))
    given = [{} if names is None else {"adapter_names": names} for names in (inner, outer)]
    expected = [sequence(model, number, **more) for number, more in enumerate(given)]
    seen: list[Tensor] = []

    def hook(*_: Any) -> None:
        handle.remove()
        seen.append(sequence(model, 0, **given[0]))

    handle = model.get_base_model().embeddings.register_forward_hook(hook)
    assert torch.equal(sequence(model, 1, **given[1]), expected[1])
    assert torch.equal(seen[0], expected[0])


def test_copies_made_in_the_middle_of_a_call() -> None:
    model = adapt(encoder(), CONFIGS["pal"], tuple(TASKS))
    expected = [sequence(model, 0, adapter_names=tasks_of(0)), sequence(model, 1)]
    copies: list[Any] = []
    block = model.get_base_model().encoder.layer[1]
    handle = block.intermediate.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    assert torch.equal(sequence(model, 0, adapter_names=tasks_of(0)), expected[0])
    handle.remove()
    copied = copies[0]
    copied.get_base_model().encoder.layer[1].intermediate._forward_hooks.clear()
    assert torch.equal(sequence(copied, 1), expected[1])  # without the routing that was in force then
    assert torch.equal(sequence(copied, 0, adapter_names=tasks_of(0)), expected[0])
