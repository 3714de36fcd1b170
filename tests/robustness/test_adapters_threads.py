"""`adapters`: a call gives in many threads what it gives alone, for every method and every way of routing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("adapters")

import adapters
from adapters import AdapterSetup, ForwardContext
from adapters.composition import Average, BatchSplit, Fuse, MultiTask, Parallel, Stack
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import pal_adapters as pa
from tests.hosts.adapters.tiny import SMALL, randomise

from .threads import CALLS, check, ids_of, loss_of, mask_of

TASKS = ["rte", "sst", "qqp"]
CONFIGS = {**SMALL, "union": adapters.ConfigUnion(pa.PALConfig(hidden_size=12), adapters.SeqBnConfig())}
GPT2 = dict(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=40, pad_token_id=0, bos_token_id=1,
            eos_token_id=None)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning")


def build(method: str, model: Any = None, **config: Any) -> Any:
    if model is None:
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32,
                       **config)
        )  # fmt: skip
    adapters.init(model)
    for name in TASKS:
        model.add_adapter(name, config=CONFIGS.get(method, method))
    torch.manual_seed(1)
    randomise(model, *TASKS)
    return model.eval().requires_grad_(False)


def sequence(model: Any, number: int, rows: int = 4, **more: Any) -> Tensor:
    ids = ids_of(number, rows)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask_of(ids), **more).last_hidden_state


def tasks_of(number: int, rows: int = 4) -> list[str]:
    return [TASKS[(number + row) % 3] for row in range(rows)]


@pytest.mark.parametrize("method", CONFIGS)
def test_one_active_adapter(method: str) -> None:
    model = build(method)
    model.set_active_adapters("rte")
    check(lambda number: sequence(model, number))


@pytest.mark.parametrize("method", CONFIGS)
def test_task_ids_of_multi_task(method: str) -> None:
    model = build(method)
    model.set_active_adapters(MultiTask(*TASKS))
    check(lambda number: sequence(model, number, task_ids=tasks_of(number)))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_setup_of_each_thread(method: str) -> None:
    """`AdapterSetup` holds for its thread: a task, a mixture of rows, none."""
    model = build(method)
    model.set_active_adapters(None)
    setups = [
        Stack("rte"), Stack("sst"), BatchSplit(*TASKS, batch_sizes=[1, 2, 1]), Average("rte", "qqp"),
        Stack("rte", "sst"), Parallel("qqp", "rte"), MultiTask(*TASKS),
    ]  # fmt: skip

    def call(number: int) -> Tensor:
        more: dict[str, Any] = {"task_ids": tasks_of(number)} if isinstance(setups[number], MultiTask) else {}
        with AdapterSetup(setups[number]):
            return sequence(model, number, **more)

    check(call, variants=len(setups))


@pytest.mark.parametrize("fusion", ["scalearn", "scalearn_uniform", "static"])
def test_fusions(fusion: str) -> None:
    model = build("pal" if fusion == "static" else "seq_bn")
    model.add_adapter_fusion(TASKS, config=fusion)
    model.eval().requires_grad_(False)

    def call(number: int) -> Tensor:
        with AdapterSetup(Fuse(*TASKS) if number % 2 else Stack("rte")):
            return sequence(model, number)

    check(call)


@pytest.mark.parametrize("network", [{}, {"train_base": False}, {"bottleneck": "stream"}, {"bottleneck": "top"}])
def test_networks(network: dict[str, Any]) -> None:
    """With `task_ids`, beside calls of the plain model."""
    torch.manual_seed(0)
    model: Any = BertModel(
        BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    )
    adapters.init(model)
    model.add_adapter("all", config=pa.CAMTLConfig(tasks=list(TASKS), max_length=16, **network))
    model.train_adapter("all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().requires_grad_(False).set_active_adapters(None)

    def call(number: int) -> Tensor:
        if number == 0:
            return sequence(model, number)
        with AdapterSetup("all"):
            return sequence(model, number, task_ids=tasks_of(number))

    check(call)


@pytest.mark.parametrize("method", ["pal", "parallel_houlsby", "top_attention"])
def test_generate(method: str) -> None:
    torch.manual_seed(0)
    model = build(method, GPT2LMHeadModel(GPT2Config(**GPT2)))
    model.set_active_adapters(None)

    def call(number: int) -> list[Tensor]:
        ids = ids_of(number)
        setup, more = (Stack(TASKS[number % 3]), {}) if number % 2 else (MultiTask(*TASKS), {"task_ids": [0, 1, 2, 0]})
        with AdapterSetup(setup):
            out = model.generate(
                input_ids=ids, attention_mask=mask_of(ids, left=True), max_new_tokens=2 + number, do_sample=False,
                return_dict_in_generate=True, output_logits=True, pad_token_id=0, **more,
            )  # fmt: skip
        return [out.sequences, out.logits[-1]]

    check(call, calls=max(2, CALLS // 2))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_backward_passes_elsewhere(checkpointed: bool) -> None:
    """Two calls of different setups, one backward pass in another thread."""
    model = build("pal", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    parameters = []
    for name in TASKS:
        parameters += [p.requires_grad_() for n, p in model.named_parameters() if f".{name}." in n]

    def gradients(*, elsewhere: bool) -> list[Tensor | None]:
        for parameter in parameters:
            parameter.grad = None
        total: Any = 0
        for number, setup in enumerate((Stack("rte"), MultiTask(*TASKS), Stack("sst", "rte"))):
            ids = ids_of(number)
            with AdapterSetup(setup):
                more = {"task_ids": tasks_of(number)} if isinstance(setup, MultiTask) else {}
                output = model(input_ids=ids, attention_mask=mask_of(ids), **more).last_hidden_state
            total = total + (1 + number) * loss_of(output)
        if elsewhere:
            worker = threading.Thread(target=total.backward)
            worker.start()
            worker.join()
        else:
            total.backward()
        return [p.grad for p in parameters]

    model.train()
    expected = gradients(elsewhere=False)
    assert max(float(g.abs().max()) for g in expected if g is not None) > 1e-3
    if checkpointed:
        model.gradient_checkpointing_enable()
    for a, b in zip(gradients(elsewhere=True), expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_setups_in_one_forward_context(method: str) -> None:
    """A hook in front of the blocks calls the model again, and a caller opens the host's context around its calls."""
    model = build(method)
    expected = {}
    for name in TASKS:
        with AdapterSetup(name):
            expected[name] = sequence(model, 1)
    assert not torch.allclose(expected["rte"], expected["sst"], atol=1e-4)
    seen: list[Tensor] = []

    def hook(*_: Any) -> None:
        handle.remove()
        with AdapterSetup("sst"):
            seen.append(sequence(model, 1))

    handle = model.embeddings.register_forward_hook(hook)
    with AdapterSetup("rte"):
        assert torch.equal(sequence(model, 1), expected["rte"])
    assert torch.equal(seen[0], expected["sst"])
    with ForwardContext(model):
        for name in TASKS:
            with AdapterSetup(name):
                assert torch.equal(sequence(model, 1), expected[name])


def test_checkpointed_setups_in_one_forward_context() -> None:
    """The host restores the context for a block that runs again, but not which of the setups was the block's."""
    model = build("pal").train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()

    def loss(*names: str) -> Tensor:
        total = torch.zeros(())
        with ForwardContext(model):
            for name in names:
                with AdapterSetup(name):
                    total = total + loss_of(model(input_ids=ids_of(1)).last_hidden_state)
        return total

    loss("rte").backward()
    with pytest.raises(pa.UnsupportedError, match="use one AdapterSetup per call"):
        loss("rte", "sst").backward()


class Stop(BaseException):
    """Like KeyboardInterrupt: no `Exception`."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_call_after_one_that_was_cut_off(method: str, error: type[BaseException]) -> None:
    model = build(method)
    model.set_active_adapters(MultiTask(*TASKS))
    expected = [sequence(model, number, task_ids=tasks_of(number)) for number in range(2)]
    block: nn.Module = model.encoder.layer[1]
    for place in ("attention.output.dense", "intermediate", "output.LayerNorm"):

        def fail(*_: Any) -> None:
            raise error("stopped")

        handle = block.get_submodule(place).register_forward_hook(fail)
        with pytest.raises(error, match="stopped"):
            sequence(model, 0, task_ids=tasks_of(0))
        handle.remove()
        for number in range(2):
            assert torch.equal(sequence(model, number, task_ids=tasks_of(number)), expected[number])
