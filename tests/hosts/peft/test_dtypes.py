"""Half precision, autocast, the meta device and packed weights."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from pal_adapters import UnsupportedError

from . import cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_narrow_base(method: str, dtype: torch.dtype, autocast: bool) -> None:
    """Adapters are float32 unless `autocast_adapter_dtype=False`; the base model does not change."""
    given = cases.inputs()
    model = get_peft_model(
        cases.bert().to(dtype), cases.config(method, task_type="SEQ_CLS"), "rte", autocast_adapter_dtype=autocast
    ).eval()
    model.add_adapter("sst", cases.config(method, task_type="SEQ_CLS"), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast else dtype
    for name in ("rte", "sst"):
        units = {p.dtype for n, p in cases.adapter_parameters(model, name) if "modules_to_save" not in n}
        assert units == {expected}
    assert {p.dtype for n, p in model.named_parameters() if "bert" in n and ".rte." not in n and ".sst." not in n} == {
        dtype
    }
    if method in cases.WITH_IDENTITY:
        assert torch.equal(cases.run(model, "rte", given), cases.run(cases.bert().to(dtype), None, given))
    wide = cases.peft_model(method, adapters=("rte", "sst"), randomised=False)
    for seed, name in enumerate(("rte", "sst")):
        cases.randomise(model, name, seed=seed, scale=0.1)
        saved = {k: v.float() for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
        set_peft_model_state_dict(wide, saved, name)
    names = ["rte", "sst", "__base__", "sst"]
    with torch.no_grad():
        mixed = model(**given, adapter_names=names).logits
    single = cases.row_by_row(model, names, given)
    exact = cases.row_by_row(wide, names, given)
    assert mixed.dtype == single.dtype == dtype
    assert mixed.isfinite().all()
    # Half of the room that the base model itself takes.
    plain = cases.run(cases.bert().to(dtype), None, given).float()
    room = max(0.1, 4 * float((plain - cases.run(cases.bert(), None, given)).abs().max()))
    torch.testing.assert_close(single.float(), exact, atol=room, rtol=0.1)
    torch.testing.assert_close(mixed.float(), exact, atol=room, rtol=0.1)
    model.set_adapter("rte")
    model.train()(**given, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in cases.adapter_parameters(model, "rte"))


def test_autocast(method: str) -> None:
    given = cases.inputs()
    model = cases.peft_model(method, adapters=("rte", "sst"))
    names = ["rte", "sst", "__base__", "sst"]
    exact = cases.row_by_row(model, names, given)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mixed = model(**given, adapter_names=names).logits
        single = cases.row_by_row(model, names, given)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(single.float(), exact, atol=0.3, rtol=0.1)
    torch.testing.assert_close(mixed.float(), single.float(), atol=0.15, rtol=0.1)
    model.set_adapter("rte")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**given, labels=torch.tensor([0, 1, 2, 0])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in cases.adapter_parameters(model, "rte"))


def test_low_cpu_mem_usage(method: str, tmp_path: pathlib.Path) -> None:
    """Adapters without weights until they are loaded; the base model is never touched."""
    given = cases.inputs()
    model = cases.peft_model(method, adapters=("rte", "sst"))
    expected = {name: cases.run(model, name, given) for name in ("rte", "sst")}
    model.save_pretrained(tmp_path)
    base = cases.bert()
    before = cases.state(base)
    empty = get_peft_model(base, cases.config(method, task_type=None), "fresh", low_cpu_mem_usage=True)
    fresh = [p for n, p in cases.adapter_parameters(empty, "fresh") if "houlsby_norms" not in n]
    assert fresh
    assert all(p.is_meta for p in fresh)
    assert not any(p.is_meta for n, p in empty.named_parameters() if ".fresh." not in n)
    cases.assert_same_state(empty.unload(), before)
    for low in (True, False):
        loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / "rte", adapter_name="rte", low_cpu_mem_usage=low)
        loaded.load_adapter(tmp_path / "sst", "sst", low_cpu_mem_usage=low)
        assert not any(p.is_meta for p in loaded.parameters())
        for name in ("rte", "sst"):
            assert torch.equal(cases.run(loaded, name, given), expected[name])
        with torch.no_grad():
            mixed = loaded(**given, adapter_names=["rte", "sst", "rte", "sst"]).logits
        torch.testing.assert_close(mixed[::2], expected["rte"][::2], atol=3e-6, rtol=1e-5)


def test_adapters_follow_the_base_models_device(method: str) -> None:
    base = cases.bert().to("meta")
    model = get_peft_model(base, cases.config(method), "rte")
    assert all(p.is_meta for p in model.parameters())


class Packed4bit(nn.Module):
    """A linear with two 4-bit values a byte and no float weight, as bitsandbytes keeps it."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.compute_dtype = torch.float32
        self.scale = float(source.weight.detach().abs().max() / 7)
        levels = (source.weight.detach() / self.scale).round().clamp(-8, 7).to(torch.int16).flatten() + 8
        packed = (levels[::2] * 16 + levels[1::2]).to(torch.uint8)
        self.weight = nn.Parameter(packed.view(-1, 1), requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight.flatten().to(torch.int16)
        levels = torch.stack([packed // 16, packed % 16], dim=1).flatten().float() - 8
        return F.linear(x, (levels * self.scale).view(self.out_features, self.in_features).to(x.dtype), self.bias)


class Packed8bit(nn.Module):
    """A linear layer with an 8-bit weight and a scale per output."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        scale = source.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("SCB", scale)
        self.weight = nn.Parameter((source.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = source.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight.float() * self.SCB).to(x.dtype), self.bias)


def quantised(packed: type[nn.Module], name: str) -> Any:
    model = cases.BUILDERS[name]()
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child_name not in ("lm_head", "classifier"):
                setattr(module, child_name, packed(child))
    return model


@pytest.mark.parametrize("packed", [Packed4bit, Packed8bit])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_packed_weights(method: str, packed: type[nn.Module], name: str, tmp_path: pathlib.Path) -> None:
    """Nothing needs the float weight: not adding, training, mixing, saving, loading or unloading."""
    given = cases.inputs(name)
    task_type = cases.TASK_TYPES[name]
    base = prepare_model_for_kbit_training(quantised(packed, name), use_gradient_checkpointing=False)
    plain, before = cases.run(base, None, given), cases.state(base)
    model = get_peft_model(base, cases.config(method, task_type=task_type), "rte").eval()
    if method in cases.WITH_IDENTITY:
        assert torch.equal(cases.run(model, "rte", given), plain)
    model.add_adapter("sst", cases.config(method, task_type=task_type))
    for seed, adapter in enumerate(("rte", "sst")):
        cases.randomise(model, adapter, seed=seed)
        assert {p.dtype for _, p in cases.adapter_parameters(model, adapter)} == {torch.float32}
    names = ["rte", "sst", "__base__", "sst"]
    with torch.no_grad():
        mixed = model(**given, adapter_names=names).logits
    torch.testing.assert_close(mixed, cases.row_by_row(model, names, given), atol=3e-5, rtol=1e-4)
    model.set_adapter("rte")
    model.train()(**given).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in cases.adapter_parameters(model, "rte"))
    model.eval().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "sst" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    loaded = PeftModel.from_pretrained(quantised(packed, name), tmp_path / "sst")
    assert torch.equal(cases.run(loaded, "default", given), cases.run(model, "sst", given))
    unloaded = model.unload()
    kept = {k: v for k, v in unloaded.state_dict().items() if "classifier" not in k}
    assert all(torch.equal(value, before[key]) for key, value in kept.items())
    assert len(before) == len(unloaded.state_dict())


@pytest.mark.parametrize("packed", [Packed4bit, Packed8bit])
def test_packed_weights_cannot_be_trained(method: str, packed: type[nn.Module]) -> None:
    base = quantised(packed, "bert")
    before = cases.state(base)
    with pytest.raises(UnsupportedError, match=r"train_base=True is not allowed for a quantised model \(bert"):
        get_peft_model(base, cases.config(method, train_base=True))
    cases.assert_same_state(base, before)


@pytest.mark.parametrize("packed", [Packed4bit, Packed8bit])
def test_bottlenecks_behind_packed_linears(packed: type[nn.Module]) -> None:
    """On a plain model, where no norm shows the dtype."""
    torch.manual_seed(0)
    model = nn.Sequential(packed(nn.Linear(6, 8)), nn.ReLU(), packed(nn.Linear(8, 2)))
    x = torch.randn(3, 6)
    plain = model(x)
    wrapped = get_peft_model(model, cases.config("houlsby", target_modules=["0", "2"]))
    assert torch.equal(wrapped(x), plain)
    assert {p.dtype for _, p in cases.adapter_parameters(wrapped, "default")} == {torch.float32}
    narrow = nn.Sequential(packed(nn.Linear(6, 8)))
    narrow[0].compute_dtype = torch.bfloat16
    narrow[0].bias = None
    wrapped = get_peft_model(narrow, cases.config("houlsby", target_modules=["0"]), autocast_adapter_dtype=False)
    assert {p.dtype for _, p in cases.adapter_parameters(wrapped, "default")} == {torch.bfloat16}
