"""Every method against plain torch, through `get_peft_model`, `add_adapter` and `set_adapter`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict

from tests.methods import RECORDS

from . import cases, reference

REFERENCES = {"bert": reference.bert_logits, "llama": reference.llama_logits}


def weights_of(model: Any, adapter: str) -> reference.Weights:
    prefix = "base_model.model."
    return {
        k.removeprefix(prefix): v.detach() for k, v in get_peft_model_state_dict(model, adapter_name=adapter).items()
    }


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_forward(method: str, name: str) -> None:
    model = cases.peft_model(method, name, adapters=("rte", "sst"))
    given = cases.inputs(name)
    plain = cases.run(cases.BUILDERS[name](), None, given)
    keep = given["attention_mask"].bool()
    for adapter in ("rte", "sst"):
        got = cases.run(model, adapter, given)
        with torch.no_grad():
            expected = REFERENCES[name](cases.BUILDERS[name](), method, weights_of(model, adapter), given)
        if name == "llama":  # what stands at padding is no one's business
            got, expected, base = got[keep], expected[keep], plain[keep]
        else:
            base = plain
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        assert (got - base).abs().max() > 1e-2


CLASSES = {
    "SEQ_CLS": transformers.BertForSequenceClassification,
    "TOKEN_CLS": transformers.BertForTokenClassification,
    "QUESTION_ANS": transformers.BertForQuestionAnswering,
}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None])
def test_task_types(method: str, task_type: str | None) -> None:
    built = CLASSES.get(task_type or "", transformers.BertModel)
    base = built(cases.bert_config(**({"num_labels": 2} if task_type == "QUESTION_ANS" else {}))).eval()
    given = cases.inputs()
    with torch.no_grad():
        plain = base(**given)[0]
    model = get_peft_model(base, cases.config(method, task_type=task_type), adapter_name="rte").eval()
    with torch.no_grad():
        fresh = model(**given)[0]
        cases.randomise(model, "rte", seed=0)
        changed = model(**given)[0]
        with model.disable_adapter():
            off = model(**given)[0]
    if method in cases.WITH_IDENTITY:
        assert torch.equal(fresh, plain)
    assert (changed - fresh).abs().max() > 1e-3
    assert torch.equal(off, plain)


@pytest.mark.parametrize("name", cases.BUILDERS)
def test_identity_at_start_is_exact(name: str) -> None:
    given = cases.inputs(name)
    plain = cases.run(cases.BUILDERS[name](), None, given)
    for method in cases.WITH_IDENTITY:
        model = cases.peft_model(method, name, randomised=False)
        assert torch.equal(cases.run(model, "rte", given), plain), method


def test_init_weights_false_changes_the_output(method: str) -> None:
    given = cases.inputs()
    model = cases.peft_model(method, randomised=False, init_weights=False)
    assert not torch.equal(cases.run(model, "rte", given), cases.run(cases.bert(), None, given))


def test_every_parameter_gets_a_gradient_within_three_steps(method: str) -> None:
    model = cases.peft_model(method, randomised=False)
    model.train()
    given = cases.inputs()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    seen: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(**given, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        seen |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    assert seen == {n for n, p in model.named_parameters() if p.requires_grad}
    assert seen == {n for n, _ in cases.adapter_parameters(model, "rte")}


def test_only_the_active_adapter_trains(method: str) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"))
    before = cases.state(model)
    model.set_adapter("rte")
    assert not any(p.requires_grad for _, p in cases.adapter_parameters(model, "sst"))
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**cases.inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".rte." in name for name in changed)


def test_several_adapters_at_once(method: str) -> None:
    """Active together: each acts in turn. Where a method adds a term, the terms add up."""
    changes = dict(RECORDS[method].together)
    model = cases.peft_model(method, "llama", adapters=("rte", "sst"), **changes)
    given = cases.inputs("llama")
    model.base_model.set_adapter(["rte", "sst"])
    with torch.no_grad():
        together = model(**given).logits
    assert all(p.requires_grad for a in ("rte", "sst") for _, p in cases.adapter_parameters(model, a))
    for adapter in ("rte", "sst"):
        assert (together - cases.run(model, adapter, given)).abs().max() > 1e-3
    # An adapter of zeros beside changes nothing: what the other does is untouched.
    if method in cases.WITH_IDENTITY:
        model.add_adapter("mrpc", cases.config(method, task_type="CAUSAL_LM", **changes))
        for names in (["rte", "mrpc"], ["mrpc", "rte"]):
            model.base_model.set_adapter(names)
            with torch.no_grad():
                beside = model(**given).logits
            torch.testing.assert_close(beside, cases.run(model, "rte", given), atol=0, rtol=0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_terms_of_two_active_adapters_add_up(name: str) -> None:
    """Only in the last block, so that no module sees the other's output."""
    index, place = {"bert": (2, "bert.encoder.layer.2.output.LayerNorm"), "llama": (1, "model.norm")}[name]
    model = get_peft_model(cases.BUILDERS[name](), cases.config("low_rank", layers_to_transform=index), "rte").eval()
    model.add_adapter("sst", cases.config("low_rank", layers_to_transform=index))
    for seed, adapter in enumerate(("rte", "sst")):
        cases.randomise(model, adapter, seed=seed)
    sums: list[torch.Tensor] = []
    model.get_base_model().get_submodule(place).register_forward_pre_hook(lambda m, a: sums.append(a[0]))
    given = cases.inputs(name)
    cases.run(model, None, given)
    for names in ("rte", "sst", ["rte", "sst"]):
        model.base_model.set_adapter(names)
        with torch.no_grad():
            model(**given)
    base, rte, sst, both = sums
    torch.testing.assert_close(both, rte + sst - base, atol=1e-5, rtol=1e-5)
