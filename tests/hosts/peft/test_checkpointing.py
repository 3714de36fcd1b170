"""Activation checkpointing runs blocks again when the forward pass, and `adapter_names` with it, is over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pal_adapters.hooks.call import Rerun

from . import cases

NAMES = [["rte", "sst", "rte", "__base__", "sst", "sst"], ["__base__", "sst", "sst", "sst", "sst", "rte"]]


def checkpointed(method: str, name: str, use_reentrant: bool | None) -> Any:
    changes = {"dropout": 0.0} if method in cases.WITH_DROPOUT else {}
    base = cases.BUILDERS[name]()
    if use_reentrant is not None:
        enable = base.activation_checkpointing_enable if cases.TRANSFORMERS_5 else base.gradient_checkpointing_enable
        enable({"use_reentrant": use_reentrant})
    from peft import get_peft_model

    fresh = lambda: cases.config(method, task_type=cases.TASK_TYPES[name], **changes)  # noqa: E731
    model = get_peft_model(base, fresh(), "rte")
    model.add_adapter("sst", fresh())
    for seed, adapter in enumerate(("rte", "sst")):
        cases.randomise(model, adapter, seed=seed)
    cases.no_dropout(model)
    model.set_requires_grad("sst")
    return model.train()


def gradients(model: Any, name: str, mixed: bool) -> dict[str, Tensor]:
    """Gradients of two forward passes, with different adapters per example, before one backward pass."""
    given = cases.inputs(name, rows=6)
    model.zero_grad()
    loss: Any = 0.0
    for power, names in enumerate(NAMES, start=2):
        arguments = {"adapter_names": names} if mixed else {}
        loss = loss + (model(**given, **arguments).logits ** power).sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # the encoder's first block
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_gradients_are_those_without_checkpointing(method: str, name: str) -> None:
    for mixed in (True, False):
        expected = gradients(checkpointed(method, name, None), name, mixed)
        largest = max(float(g.abs().max()) for g in expected.values())
        assert any(".sst." in n for n in expected) is mixed
        for use_reentrant in (False, True):
            if use_reentrant and name == "bart" and not cases.TRANSFORMERS_5:
                continue  # fails with LoRA too: nothing that goes into BART's blocks needs a gradient there
            model = checkpointed(method, name, use_reentrant)
            got = gradients(model, name, mixed)
            assert set(got) == set(expected)
            for key, gradient in got.items():
                torch.testing.assert_close(gradient, expected[key], atol=1e-6 * largest, rtol=2e-3, msg=key)
            assert not [n for n, m in model.named_modules() if getattr(m, "plan", None) is not None]


def test_the_checkpoint_function_is_wrapped_once() -> None:
    """The wrapper stays for all calls, and does nothing without routing."""
    model = checkpointed("pal", "llama", False)
    before = {n: vars(m).get("_gradient_checkpointing_func") for n, m in model.named_modules()}
    assert any(before.values())
    given = cases.inputs("llama", rows=6)
    model(**given, adapter_names=NAMES[0])
    with pytest.raises(ValueError, match="pass one name per example"):
        model(**given, adapter_names=NAMES[0][:4])
    for name, module in model.named_modules():
        after = vars(module).get("_gradient_checkpointing_func")
        assert after is before[name] or (isinstance(after, Rerun) and after.function is before[name])
        assert not isinstance(before[name], Rerun)


def test_heads_under_checkpointing() -> None:
    """A module to save inside a block runs again too."""
    results = []
    for use_reentrant in (None, False, True):
        base = cases.llama()
        if use_reentrant is not None:
            enable = (
                base.activation_checkpointing_enable if cases.TRANSFORMERS_5 else base.gradient_checkpointing_enable
            )
            enable({"use_reentrant": use_reentrant})
        from peft import get_peft_model

        changes = {"task_type": "CAUSAL_LM", "modules_to_save": ["mlp.down_proj"]}
        model = get_peft_model(base, cases.config("low_rank", **changes), "rte")
        model.add_adapter("sst", cases.config("low_rank", task_type="CAUSAL_LM", modules_to_save=["mlp.down_proj"]))
        for seed, adapter in enumerate(("rte", "sst")):
            cases.randomise(model, adapter, seed=seed)
        model.set_requires_grad("sst")
        results.append(gradients(model.train(), "llama", True))
    assert any("down_proj.modules_to_save.sst" in n for n in results[0])
    for got in results[1:]:
        assert set(got) == set(results[0])
        for key, gradient in got.items():
            torch.testing.assert_close(gradient, results[0][key], atol=1e-4, rtol=2e-3, msg=key)
