"""`train_base=True`: the pretrained weights train with the adapter and are saved with it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from pal_adapters import UnsupportedError
from pal_adapters.hosts.peft.tuner import adapters_off
from tests.processes import python

from . import cases
from .unchanged import rejected

CHILD = """
import json, pathlib, sys
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, logging
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
import pal_adapters
import tests.methods  # with a method of another package

logging.disable_progress_bar()
root = pathlib.Path(sys.argv[1])
given = torch.load(root / "given.pt")
found = {}
for case in sorted(p for p in root.iterdir() if (p / "expected.pt").exists()):
    expected = torch.load(case / "expected.pt")
    llama = "llama" in case.name
    base = (LlamaForCausalLM if llama else BertForSequenceClassification).from_pretrained
    auto = (AutoPeftModelForCausalLM if llama else AutoPeftModelForSequenceClassification).from_pretrained
    result = {}
    for low in (False, True):
        model = PeftModel.from_pretrained(base(case / "base"), case / "adapter", low_cpu_mem_usage=low)
        with torch.no_grad():
            result[f"loaded {low}"] = bool(torch.equal(model(**given).logits, expected))
        if llama:
            inner = model.get_base_model()
            result[f"tied {low}"] = inner.lm_head.weight is inner.model.embed_tokens.weight
        result[f"frozen {low}"] = not any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        result["auto"] = bool(torch.equal(auto(case / "adapter")(**given).logits, expected))
    again = PeftModel.from_pretrained(base(case / "base"), case / "adapter", is_trainable=True)
    result["trainable"] = all(p.requires_grad for n, p in again.named_parameters() if ".original_module." not in n)
    found[case.name] = result
(root / "found.json").write_text(json.dumps(found))
"""


def train(model: Any, given: dict[str, torch.Tensor]) -> None:
    """One step that moves every weight."""
    generator = torch.Generator().manual_seed(11)
    model.train()(**given).logits.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bool]]:
    root = tmp_path_factory.mktemp("joint")
    given = cases.inputs()
    torch.save(given, root / "given.pt")
    for name in ("bert", "llama"):
        for method in cases.METHODS:
            base = cases.bert() if name == "bert" else cases.llama(tie_word_embeddings=True)
            folder = root / f"{name}-{method}"
            base.save_pretrained(folder / "base")
            before = load_file(folder / "base" / "model.safetensors")
            model = get_peft_model(
                type(base).from_pretrained(folder / "base"),
                cases.config(method, train_base=True, task_type=cases.TASK_TYPES[name]),
            )
            train(model, given)
            model.save_pretrained(folder / "adapter")
            torch.save(cases.run(model, "default", given), folder / "expected.pt")
            after = load_file(folder / "base" / "model.safetensors")  # on disk nothing has changed
            assert all(torch.equal(after[key], value) for key, value in before.items())
    script = root / "child.py"
    script.write_text(CHILD)
    done = python(script, root)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_a_new_process(found: dict[str, dict[str, bool]], method: str, name: str) -> None:
    result = found[f"{name}-{method}"]
    assert len(result) > 5
    assert all(value is True for value in result.values()), result


def test_base_and_adapter_train_together(method: str) -> None:
    model = cases.peft_model(method, randomised=False, train_base=True)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".original_module." in n}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    reached: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(**cases.inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        reached |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    # Where an adapter has its own norms, the base model's play no part.
    idle = {n for n, _ in model.named_parameters() if ".original_module." in n or "LayerNorm.base_layer" in n}
    assert {n for n, _ in model.named_parameters()} - reached == idle


def test_the_base_trains_with_joint_adapters_only(method: str) -> None:
    model = cases.peft_model(method, adapters=("joint",), train_base=True)
    base = {n for n, _ in model.named_parameters() if ".joint." not in n and ".original_module." not in n}

    def trained() -> set[str]:
        return {n for n, p in model.named_parameters() if p.requires_grad}

    assert trained() >= base
    model.add_adapter("frozen", cases.config(method, task_type="SEQ_CLS"))
    assert trained() >= base
    assert not any(".frozen." in n for n in trained())
    model.set_adapter("frozen")
    assert trained() == {n for n, _ in cases.adapter_parameters(model, "frozen")}
    model.set_adapter("joint")
    assert trained() >= base
    model.set_adapter("joint", inference_mode=True)
    assert not trained()
    model.set_adapter("joint")
    for active in ("joint", "frozen"):  # which compute with the same weights
        model.set_adapter(active, inference_mode=True)
        with rejected(model, error=UnsupportedError, match=r"'joint' trains the pretrained weights in place"):
            with model.disable_adapter():
                pass
    model.set_adapter("joint")
    with adapters_off(model):
        assert not trained()
    assert trained() >= base
    model.delete_adapter("joint")
    assert trained() == {n for n, _ in cases.adapter_parameters(model, "frozen")}


def test_users_own_unfreezing_is_left_alone_without_joint_adapters() -> None:
    model = cases.peft_model("pal", adapters=("rte", "sst"))
    pooler = model.get_base_model().bert.pooler.dense.weight
    pooler.requires_grad = True
    model.set_adapter("sst")
    assert pooler.requires_grad


def test_several_joint_adapters_on_one_base(method: str, tmp_path: pathlib.Path) -> None:
    """Trained together and saved together, each file holds the base model; they load together again."""
    given = cases.inputs()
    model = cases.peft_model(method, adapters=("rte", "sst"), train_base=True)
    for name in ("rte", "sst"):
        model.set_adapter(name)
        train(model, given)
    expected = {name: cases.run(model, name, given) for name in ("rte", "sst")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / "rte", adapter_name="rte")
    loaded.load_adapter(tmp_path / "sst", "sst")
    for name in ("rte", "sst"):
        assert torch.equal(cases.run(loaded, name, given), expected[name])
    # A checkpoint of both comes back over both, one after the other, as Trainer loads it.
    for name in ("rte", "sst"):
        model.set_adapter(name)
        train(model, given)
    with pytest.warns(UserWarning, match="from now on all adapters use the loaded ones"):
        model.load_adapter(tmp_path / "rte", "rte", is_trainable=True)
    model.load_adapter(tmp_path / "sst", "sst", is_trainable=True)
    for name in ("rte", "sst"):
        assert torch.equal(cases.run(model, name, given), expected[name])


def test_another_base_is_refused(method: str, tmp_path: pathlib.Path) -> None:
    given = cases.inputs()
    for folder, adapter in (("one", "rte"), ("two", "sst")):
        model = cases.peft_model(method, adapters=(adapter,), train_base=True)
        for _ in range(1 + (folder == "two")):
            train(model, given)
        model.save_pretrained(tmp_path / folder)
    loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / "one" / "rte", adapter_name="rte")
    expected, before = cases.run(loaded, "rte", given), cases.state(loaded)
    hooks = cases.hooks(loaded)
    with pytest.raises(
        UnsupportedError, match=r"'sst' comes with its own pretrained weights .* from those that 'rte'"
    ):
        loaded.load_adapter(tmp_path / "two" / "sst", "sst")
    cases.assert_same_state(loaded, before)
    assert cases.hooks(loaded) == hooks
    assert list(loaded.peft_config) == ["rte"]
    assert loaded.active_adapters == ["rte"]
    assert torch.equal(cases.run(loaded, "rte", given), expected)
    # The same for an adapter that was trained on the base model as it came.
    plain = cases.peft_model(method, adapters=("mrpc",))
    expected = cases.run(plain, "mrpc", given)
    with pytest.raises(UnsupportedError, match="'mrpc' use"):
        plain.load_adapter(tmp_path / "two" / "sst", "sst")
    assert torch.equal(cases.run(plain, "mrpc", given), expected)
    plain.save_pretrained(tmp_path / "three")
    with pytest.warns(
        UserWarning, match="'mrpc' comes without pretrained weights, and those of the model belong to 'rte'"
    ):
        loaded.load_adapter(tmp_path / "three" / "mrpc", "mrpc")


def test_what_is_stored(tmp_path: pathlib.Path) -> None:
    model = cases.peft_model("pal", train_base=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "rte" / "adapter_model.safetensors")
    prefix = "base_model.model."
    base = {n for n, _ in cases.bert().named_parameters() if "classifier" not in n}
    assert {k.removeprefix(prefix) for k in saved if ".pal." not in k and "classifier" not in k} == base
    assert json.loads((tmp_path / "rte" / "adapter_config.json").read_text())["train_base"] is True


def test_names_of_blocks_as_names_of_adapters(tmp_path: pathlib.Path) -> None:
    """The host drops the keys with another adapter's name in them, and with them pretrained weights."""
    model = cases.peft_model("lhuc", adapters=("0", "1"), train_base=True, task_type=None)
    given = cases.inputs()
    train(model, given)
    expected = {name: cases.run(model, name, given) for name in ("0", "1")}
    model.save_pretrained(tmp_path)
    for name in ("0", "1"):
        loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / name)
        assert torch.equal(cases.run(loaded, "default", given), expected[name])


def test_a_base_model_without_weights(tmp_path: pathlib.Path) -> None:
    """On the meta device the file holds all that is needed."""
    model = cases.peft_model("low_rank", adapters=("default",), train_base=True, modules_to_save=["classifier"])
    given = cases.inputs()
    expected = cases.run(model, "default", given)
    model.save_pretrained(tmp_path)
    empty = cases.bert()
    buffers = {name: buffer.clone() for name, buffer in empty.named_buffers()}
    empty = empty.to("meta")
    loaded = PeftModel.from_pretrained(empty, tmp_path, low_cpu_mem_usage=True)
    for name, buffer in buffers.items():
        parent, _, last = name.rpartition(".")
        loaded.get_base_model().get_submodule(parent).register_buffer(last, buffer, persistent=False)
    wrapper = loaded.get_base_model().classifier
    wrapper.original_module.to_empty(device="cpu")
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(cases.run(loaded, "default", given), expected)
