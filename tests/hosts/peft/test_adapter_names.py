"""`adapter_names`: one adapter name per example, equal to one forward pass per adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pal_adapters import UnknownAdapterError, UnsupportedError
from pal_adapters.hooks.attachment import Attachment
from pal_adapters.hosts.peft.routing import _Routed

from . import cases

ORDERS = [
    ["rte", "sst", "mrpc", "rte", "__base__", "sst"],
    ["sst", "sst", "sst", "rte", "rte", "rte"],
    ["__base__"] * 6,
    ["mrpc"] * 6,
    ["__base__", "rte", "__base__", "__base__", "__base__", "rte"],
]


def three(method: str, name: str = "bert", **changes: Any) -> Any:
    """Three adapters of one method: two alike, one of another width."""
    changes = {"task_type": cases.TASK_TYPES[name], **changes}
    model = cases.peft_model(method, name, adapters=("rte", "sst"), **changes)
    model.add_adapter("mrpc", cases.config(method, **{**changes, **cases.WIDER.get(method, {})}))
    cases.randomise(model, "mrpc", seed=5)
    return model.eval()


def left_behind(model: Any) -> list[str]:
    """The modules that still carry state of a routed forward pass, apart from wrappers that stay installed."""

    def replaced(module: nn.Module) -> bool:
        forward = vars(module).get("forward")
        return not isinstance(getattr(forward, "__self__", forward), _Routed | Attachment | None)

    modules = model.named_modules()
    return [name for name, module in modules if getattr(module, "plan", None) is not None or replaced(module)]


@torch.no_grad()
def mixed(model: Any, names: list[str], given: dict[str, Tensor], **arguments: Any) -> Tensor:
    return model(**given, adapter_names=names, **arguments).logits


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "t5"])
def test_equal_to_one_forward_for_each_adapter(method: str, name: str) -> None:
    model = three(method, name)
    given = cases.inputs(name, rows=6)
    hooks = cases.hooks(model)
    for names in ORDERS:
        expected = cases.row_by_row(model, names, given)
        for active in ("rte", "sst"):  # the active adapter does not matter
            model.set_adapter(active)
            got = mixed(model, names, given)
            # Only at real tokens: values at padding do not matter.
            torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)
    assert not left_behind(model)
    assert cases.hooks(model) == hooks


def test_other_orders_give_the_same_rows(method: str) -> None:
    model = three(method)
    given = cases.inputs(rows=6)
    names = ORDERS[0]
    expected = mixed(model, names, given)
    order = [4, 1, 5, 0, 3, 2]
    got = mixed(model, [names[i] for i in order], cases.rows_of(given, *order))
    torch.testing.assert_close(got, expected[order], atol=3e-6, rtol=1e-5)
    doubled = mixed(model, names * 2, {k: torch.cat([v, v]) for k, v in given.items()})
    torch.testing.assert_close(doubled, torch.cat([expected, expected]), atol=3e-6, rtol=1e-5)
    one = mixed(model, names[:1], cases.rows_of(given, 0))
    torch.testing.assert_close(one, expected[:1], atol=3e-6, rtol=1e-5)


def test_adapters_in_other_blocks() -> None:
    given = cases.inputs(rows=4)
    for method, choices in (
        ("pal", [{"layers_to_transform": 0}, {"layers_to_transform": [1, 2]}, {"tie_projections": False}]),
        ("lhuc", [{}, {"lhuc_site": "ffn"}, {"layers_to_transform": 1}]),
        ("low_rank", [{"activation_site": "output"}, {"use_bias": False}, {"lhuc": True, "layers_to_transform": 2}]),
        ("houlsby", [{"train_layernorm": False}, {"layers_to_transform": 1}, {"target_modules": ["output.dense"]}]),
    ):
        model = get_peft_model(cases.bert(), cases.config(method, **choices[0]), "a0").eval()
        for i, choice in enumerate(choices[1:], start=1):
            model.add_adapter(f"a{i}", cases.config(method, **choice))
        for i in range(3):
            cases.randomise(model, f"a{i}", seed=i)
        names = ["a2", "a0", "__base__", "a1"]
        expected = cases.row_by_row(model.eval(), names, given)
        torch.testing.assert_close(mixed(model, names, given), expected, atol=3e-5, rtol=1e-4, msg=method)


@pytest.mark.parametrize(("name", "head"), [("bert", "classifier"), ("roberta", "classifier"), ("llama", "lm_head")])
def test_heads(method: str, name: str, head: str) -> None:
    """Heads of all kinds: RoBERTa's is a module of several layers, which the host cannot mix."""
    changes = {"modules_to_save": [head], "task_type": None}
    model = cases.peft_model(method, name, adapters=("rte", "sst"), **changes)
    model.add_adapter("mrpc", cases.config(method, task_type=None))  # has no head of its own
    cases.randomise(model, "mrpc", seed=7)
    given = cases.inputs(name, rows=6)
    for names in (["sst", "rte", "__base__", "mrpc", "sst", "rte"], ["mrpc"] * 6, ["rte"] * 6):
        expected = cases.row_by_row(model, names, given)
        torch.testing.assert_close(mixed(model, names, given), expected, atol=3e-5, rtol=1e-4)
    assert not left_behind(model)


def test_embeddings_to_save() -> None:
    changes = {"modules_to_save": ["word_embeddings"], "task_type": None}
    model = cases.peft_model("low_rank", adapters=("rte", "sst"), **changes)
    given = cases.inputs(rows=4)
    names = ["sst", "rte", "__base__", "sst"]
    torch.testing.assert_close(mixed(model, names, given), cases.row_by_row(model, names, given), atol=3e-5, rtol=1e-4)


def gradients(model: Any) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients(method: str, name: str) -> None:
    """The sum of those of separate batches; an adapter without an example gets none."""
    model = three(method, name)
    model.set_adapter("rte")
    model.set_requires_grad(["rte", "sst", "mrpc"])
    cases.no_dropout(model)
    model.train()
    for module in model.modules():  # dropout that our own units apply
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    given = cases.inputs(name, rows=6)
    names = ["rte", "sst", "rte", "rte", "__base__", "sst"]
    target = torch.randn_like(mixed(model, names, given))

    def loss(logits: Tensor, rows: list[int]) -> Tensor:
        return ((logits - target[rows]) ** 2).sum()

    model.zero_grad()
    loss(model(**given, adapter_names=names).logits, list(range(6))).backward()
    got = gradients(model)
    model.zero_grad()
    for adapter in ("rte", "sst"):
        rows = [i for i, n in enumerate(names) if n == adapter]
        model.base_model.set_adapter(adapter)
        model.set_requires_grad(["rte", "sst", "mrpc"])
        loss(model(**cases.rows_of(given, *rows)).logits, rows).backward()
    expected = gradients(model)
    assert set(got) == set(expected)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for key, gradient in got.items():
        if ".mrpc." in key:
            assert gradient is None, key
        else:
            assert gradient is not None, key
            assert expected[key] is not None, key
            torch.testing.assert_close(gradient, expected[key], atol=1e-5 * largest, rtol=1e-3, msg=key)


WRONG: list[tuple[Any, type[Exception], str]] = [
    (["rte", "nothing", "sst", "rte"], UnknownAdapterError,
     "adapter_names has 'nothing', which the model does not have: use 'rte', 'sst' or"),
    (["rte", None, "sst", "rte"], UnknownAdapterError, "adapter_names has None"),
    (["rte", 0, "sst", "rte"], UnknownAdapterError, "adapter_names has 0"),
    ("rte", UnsupportedError, "adapter_names='rte' is not allowed: pass a list"),
    ([], UnsupportedError, r"adapter_names=\[\] is not allowed"),
    (7, UnsupportedError, "adapter_names=7 is not allowed"),
    (["rte"], UnsupportedError, "adapter_names has 1 names, but the batch has 4 examples: pass one name per example"),
    (["rte", "sst"], UnsupportedError, "adapter_names has 2 names, but the batch has 4 examples"),
    (["rte"] * 3, UnsupportedError, "adapter_names has 3 names"),
    (["rte"] * 5, UnsupportedError, "adapter_names has 5 names"),
    (["rte"] * 8, UnsupportedError, "adapter_names has 8 names"),
]  # fmt: skip


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_wrong_names(method: str, task_type: str | None) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"), task_type=task_type)
    given = cases.inputs()
    expected = cases.run(model, "rte", given)
    for names, error, message in WRONG:
        with pytest.raises(error, match=message) as caught:
            model(**given, adapter_names=names)
        assert isinstance(caught.value, ValueError)
        assert not left_behind(model)
        with torch.no_grad():
            assert torch.equal(model(**given).logits, expected)
            mixed(model, ["rte", "sst", "rte", "__base__"], given)


def test_inputs_as_embeddings_and_as_positional_arguments() -> None:
    model = three("pal", task_type=None)
    given = cases.inputs(rows=4)
    names = ["sst", "rte", "__base__", "mrpc"]
    expected = mixed(model, names, given)
    embeds = model.get_base_model().bert.embeddings.word_embeddings(given["input_ids"])
    with torch.no_grad():
        got = model(inputs_embeds=embeds, attention_mask=given["attention_mask"], adapter_names=names).logits
        torch.testing.assert_close(got, expected)
        got = model(given["input_ids"], given["attention_mask"], adapter_names=names).logits
        torch.testing.assert_close(got, expected)
        with pytest.raises(UnsupportedError, match="has 2 names, but the batch has 4 examples"):
            model(given["input_ids"], adapter_names=names[:2])


def test_an_error_inside_leaves_nothing_behind(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"), modules_to_save=["classifier"], task_type=None)
    given = cases.inputs()
    expected, hooks = cases.run(model, "rte", given), cases.hooks(model)
    block = model.get_base_model().bert.encoder.layer[1].intermediate

    def fail(*args: Any) -> None:
        raise RuntimeError("inside")

    handle = block.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        model(**given, adapter_names=["rte", "sst", "rte", "sst"])
    handle.remove()
    assert not left_behind(model)
    assert cases.hooks(model) == hooks
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


def test_a_disabled_model_ignores_the_names(method: str) -> None:
    """The host decides so before the tuner is asked."""
    model = cases.peft_model(method, adapters=("rte", "sst"))
    given = cases.inputs()
    with model.disable_adapter(), torch.no_grad():
        got = model(**given, adapter_names=["rte", "sst", "rte", "sst"]).logits
    assert torch.equal(got, cases.run(model, None, given))


def test_names_as_a_tuple_and_untouched() -> None:
    model = three("lhuc")
    given = cases.inputs(rows=4)
    names = ["rte", "sst", "mrpc", "rte"]
    kept = list(names)
    got = mixed(model, names, given)
    assert names == kept
    with torch.no_grad():
        assert torch.equal(model(**given, adapter_names=tuple(names)).logits, got)


@pytest.mark.parametrize(
    "task_type", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None]
)
def test_task_ids_are_refused(method: str, task_type: str | None) -> None:
    """`PeftModelFor*.forward` takes them for POLY and drops them for everyone else."""
    name = {"CAUSAL_LM": "llama", "SEQ_2_SEQ_LM": "t5"}.get(task_type or "", "bert")
    model = cases.peft_model(method, name, adapters=("rte", "sst"), task_type=task_type, modules_to_save=[])
    given = cases.inputs(name)
    for value in (torch.tensor([0, 1, 0, 1]), [0, 1, 0, 1]):
        with pytest.raises(UnsupportedError, match="adapter_names"):
            model(**given, task_ids=value)
    with torch.no_grad():
        model(**given)
    if name != "bert":
        with pytest.raises(UnsupportedError, match="adapter_names"):
            model.generate(input_ids=given["input_ids"], task_ids=torch.tensor([0, 1, 0, 1]), max_new_tokens=2)
        model.generate(input_ids=given["input_ids"], max_new_tokens=2)


def test_task_ids_of_other_methods_are_none_of_our_business() -> None:
    model = get_peft_model(cases.bert(), LoraConfig(task_type="SEQ_CLS"))
    model(**cases.inputs(), task_ids=torch.tensor([0, 1, 0, 1]))
    import torch.nn.modules.module as module

    model = cases.peft_model("pal")
    assert not module._global_module_registration_hooks  # ours have done their work
