"""Fusions and combinations of sources as the adapter of a task."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbones import HOSTS
from tiny_tasks import losses, make_tasks, without_dropout
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import pal_adapters
from pal_adapters.errors import UnknownAdapterError, UnsupportedError
from pal_adapters.multitask import HeadConfig, MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads

in_adapters = pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
in_peft = pytest.mark.skipif("peft" not in HOSTS, reason="needs peft")
KINDS = ("dynamic", "scalearn", "scalearn_pp")
SOURCES = ("a", "b", "c")


def noise(parameters: Any, scale: float = 0.2) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale + 0.1)


def config_of(kind: str, weight: float = 0.3) -> Any:
    if kind == "dynamic":
        return kind
    return pal_adapters.ScaLearnConfig(variant=kind, regularization=weight)


def fused(folder: str, kinds: dict[str, str], *, plain: bool = True) -> TaskHeads:
    """Bottleneck sources with random weights, one task per fusion, and one with a single source."""
    import adapters
    from adapters.composition import Fuse

    torch.manual_seed(1)
    base: Any = AutoModel.from_pretrained(folder)
    adapters.init(base)
    for name in SOURCES:
        base.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    for name, kind in kinds.items():
        base.add_adapter_fusion(Fuse(*SOURCES, name=f"to_{name}"), config=config_of(kind))
    noise(p for n, p in base.named_parameters() if "adapter" in n)
    model = TaskHeads(base)
    torch.manual_seed(3)
    for name in kinds:
        model.add(name, HeadConfig("single_label", 2), adapter=Fuse(*SOURCES, name=f"to_{name}"))
    if plain:
        model.add("plain", HeadConfig("regression"), adapter="a")
    return model.eval()


def rows(count: int = 4, length: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, 60, (count, length), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@in_adapters
@pytest.mark.parametrize("kind", KINDS)
def test_a_fuse_is_the_adapter_of_a_task(tiny_encoder: str, kind: str) -> None:
    from adapters.composition import Fuse

    model = fused(tiny_encoder, {"one": kind, "two": kind})
    batch, found = rows(), {}
    for name in ("one", "plain", "two", "one"):
        got = model(task_ids=name, **batch).logits[name]
        model.backbone.set_active_adapters("a" if name == "plain" else Fuse(*SOURCES, name=f"to_{name}"))
        hidden = model.backbone(**batch).last_hidden_state
        torch.testing.assert_close(got, model.head(name)(hidden.mean(1)), atol=1e-6, rtol=1e-5)
        found[name] = hidden
    # The same sources under two names: what one has must not answer for the other.
    assert not torch.allclose(found["one"], found["two"], atol=1e-3)


@in_adapters
def test_a_batch_of_fusions_and_other_adapters_is_refused(tiny_encoder: str) -> None:
    model = fused(tiny_encoder, {"one": "dynamic", "two": "dynamic"})
    for names in (["two", "one"], ["plain", "one"]):
        with pytest.raises(UnsupportedError, match=r"examples for Fuse\[to_.*: use batches of one task"):
            model(task_ids=names, **rows(2))
    # Two tasks of one fusion are one batch.
    model.add("again", HeadConfig("regression"), adapter=model.routes["one"].adapter)
    mixed = model.eval()(task_ids=["one", "again"], **rows(2)).logits["again"]
    alone = model(task_ids="again", **{n: t[1:] for n, t in rows(2).items()}).logits["again"]
    torch.testing.assert_close(mixed, alone)


@in_adapters
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_fusion_and_the_head_train(tiny_encoder: str, kind: str) -> None:
    model = fused(tiny_encoder, {"one": kind, "two": kind})
    one = {name for name, _ in model.named_parameters() if ".to_one." in name}
    two = {name for name, _ in model.named_parameters() if ".to_two." in name}
    source = {name for name, _ in model.named_parameters() if ".adapters.a." in name}
    heads = {t: {f"heads.{t}.linear.{p}" for p in ("weight", "bias")} for t in ("one", "two", "plain")}
    assert one
    assert source
    assert set(model.prepare_training(["one"])) == one | heads["one"]
    assert set(model.prepare_training(["one", "two"])) == one | two | heads["one"] | heads["two"]
    assert set(model.prepare_training(["two", "plain"])) == two | source | heads["two"] | heads["plain"]
    assert not model.training


def penalty_by_hand(model: TaskHeads, kind: str, name: str) -> Tensor:
    """From the parameters: `0.01 ||I - V||^2`, or `w/S sum_s (1 - mean omega_s)^2`, summed over the places."""
    part = f".to_{name}."
    if kind == "dynamic":
        values = [p for n, p in model.named_parameters() if part in n and n.endswith("value.weight")]
        assert len(values) == 2
        return sum(((torch.eye(24) - value) ** 2).sum() * 0.01 for value in values)  # type: ignore[return-value]
    omegas = [p for n, p in model.named_parameters() if part in n and n.endswith("omega")]
    assert len(omegas) == (1 if kind.endswith("_pp") else 2)
    return sum(0.3 * ((1 - omega.mean(1)) ** 2).mean() for omega in omegas)  # type: ignore[return-value]


@in_adapters
@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_is_in_the_loss_of_training(tiny_encoder: str, kind: str) -> None:
    model = fused(tiny_encoder, {"one": kind, "two": kind})
    model.prepare_training()
    without_dropout_in(model.train())
    batch, labels = rows(), torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(task_ids="one", labels=labels, **batch)
    expected = penalty_by_hand(model, kind, "one")
    assert expected.item() > 0.01
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits["one"], labels) + expected)
    output.loss.backward()
    names = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert any(".to_one." in name for name in names)
    assert not any(".to_two." in name for name in names)
    # Two tasks of one fusion, which counts once.
    model.add("again", "one", adapter=model.routes["one"].adapter)
    output = model(task_ids=["one", "again", "one", "one"], labels={"one": labels[:3], "again": labels[:1]}, **batch)
    means = (output.task_losses / output.task_counts.clamp(min=1)).sum() / 2
    torch.testing.assert_close(output.loss, means + expected)
    if kind == "dynamic":
        both = expected + penalty_by_hand(model, kind, "two")
        torch.testing.assert_close(both, model.backbone.get_fusion_regularization_loss())
    model.eval()
    output = model(task_ids="one", labels=labels, **batch)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits["one"], labels))
    model.prepare_training(["plain"])
    model.train()
    output = model(task_ids="one", labels=labels, **batch)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits["one"], labels))


def without_dropout_in(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0


def trainer_of(model: TaskHeads, folder: str, output: Path, **given: Any) -> MultiTaskTrainer:
    tasks = make_tasks("rte")
    arguments: dict[str, Any] = {
        "output_dir": str(output), "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "seed": 1, **given,
    }  # fmt: skip
    args = MultiTaskTrainingArguments(**arguments)
    return MultiTaskTrainer(model, args, tasks, processing_class=AutoTokenizer.from_pretrained(folder))


@in_adapters
@pytest.mark.parametrize("kind", ["dynamic", "scalearn_pp"])
def test_the_penalty_counts_once_a_step(tiny_encoder: str, kind: str, tmp_path: Path) -> None:
    found = []
    for number, (rows_, batches) in enumerate(((8, 1), (2, 4))):
        model = fused(tiny_encoder, {"rte": kind}, plain=False)
        model.prepare_training()
        trainer = without_dropout(
            trainer_of(
                model, tiny_encoder, tmp_path / str(number), per_device_train_batch_size=rows_,
                gradient_accumulation_steps=batches, optim="sgd",
            )
        )  # fmt: skip
        trainer.train()
        found.append((losses(trainer), dict(model.named_parameters())))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
        assert one["loss"] > one["loss_rte"] + 0.01
    for name, parameter in found[0][1].items():
        torch.testing.assert_close(parameter, found[1][1][name], atol=2e-4, rtol=1e-3, msg=name)


@in_adapters
@pytest.mark.parametrize("kind", KINDS)
def test_saved_restored_and_read_again(tiny_encoder: str, kind: str, tmp_path: Path) -> None:
    model = fused(tiny_encoder, {"one": kind, "two": "scalearn_pp"})
    model.prepare_training()
    batch = rows()
    expected = {name: model(task_ids=name, **batch).logits[name] for name in model.tasks}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, checkpoint=True)
    again = TaskHeads.from_pretrained(tmp_path)
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    noise(p for p in model.parameters() if p.requires_grad)
    model.restore(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, logits in expected.items():
        for copy in (model, again):
            torch.testing.assert_close(copy.eval()(task_ids=name, **batch).logits[name], logits, atol=0, rtol=0)
    # Coefficients that blocks share are one object in what was read, too.
    shared = {id(p) for n, p in again.named_parameters(remove_duplicate=False) if ".to_two." in n}
    assert len(shared) == 1
    assert str(again.routes["two"].adapter) == "Fuse[a, b, c]"
    assert again.routes["two"].adapter.name == "to_two"


@in_adapters
def test_a_fusion_named_by_its_sources_and_a_model_that_has_it_already(tiny_encoder: str, tmp_path: Path) -> None:
    from adapters.composition import Fuse

    model = fused(tiny_encoder, {"one": "scalearn"})
    model.backbone.add_adapter_fusion(Fuse("a", "b"), config="dynamic")
    model.add("two", HeadConfig("regression"), adapter=Fuse("a", "b"))
    expected = model.eval()(task_ids="two", **rows()).logits["two"]
    model.save_pretrained(tmp_path)
    for backbone in (None, model.backbone):
        again = TaskHeads.from_pretrained(tmp_path, backbone)
        torch.testing.assert_close(again(task_ids="two", **rows()).logits["two"], expected, atol=0, rtol=0)


@in_adapters
def test_the_best_model_and_a_resumed_run(tiny_encoder: str, tmp_path: Path) -> None:
    def start(folder: str, **given: Any) -> tuple[TaskHeads, MultiTaskTrainer]:
        model = fused(tiny_encoder, {"rte": "scalearn_pp"}, plain=False)
        model.prepare_training()
        options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, **given}
        return model, trainer_of(model, tiny_encoder, tmp_path / folder, **options)

    model, trainer = start("best", load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    trainer.train()
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(history), abs=1e-6)
    assert history[-1] < max(history) - 1e-4  # so the best, here the worst, is not simply the last
    whole, trainer = start("whole")
    trainer.train()
    resumed, trainer = start("again")
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    del model


@in_adapters
def test_fusions_that_cannot_be(tiny_encoder: str) -> None:
    from adapters.composition import Fuse, Stack

    model = fused(tiny_encoder, {"one": "dynamic"})
    for setup, error, message in (
        (Fuse(*SOURCES), UnknownAdapterError, "fusion 'a,b,c' is not on the model, which has: 'to_one'"),
        (Fuse("b", "a", "c", name="to_one"), UnknownAdapterError, r"has the sources \['a', 'b', 'c'\]"),
        (Fuse("a", "d", name="to_one"), UnknownAdapterError, "adapter='d' is not on the model"),
        (Fuse("a", Stack("b", "c"), name="to_one"), UnsupportedError, "or a Fuse of names"),
        (Stack(Fuse(*SOURCES, name="to_one"), "a"), UnsupportedError, "or a Fuse of names"),
    ):
        with pytest.raises(error, match=message):
            model.add("new", HeadConfig("regression"), adapter=setup)
    assert model.tasks == ("one", "plain")


@in_peft
@pytest.mark.parametrize("kind", ["scalearn_pp", "fusion"])
def test_the_penalty_of_a_combination_in_peft(tiny_encoder: str, kind: str, tmp_path: Path) -> None:
    import peft

    base = AutoModel.from_pretrained(tiny_encoder)
    for number, name in enumerate(("first", "second")):
        source = peft.get_peft_model(base, peft.LoraConfig(r=2, task_type="FEATURE_EXTRACTION"), adapter_name=name)
        torch.manual_seed(number)
        noise(p for n, p in source.named_parameters() if "lora" in n)
        source.save_pretrained(str(tmp_path), selected_adapters=[name])
        base = source.unload()
    options: dict[str, Any] = {
        "adapters": {name: str(tmp_path / name) for name in ("first", "second")},
        "regularization": 0.3,
        "task_type": "FEATURE_EXTRACTION",
    }
    configs: Any = pal_adapters
    config = (
        configs.AdapterFusionPeftConfig(**options)
        if kind == "fusion"
        else configs.ScaLearnPeftConfig(variant=kind, **options)
    )
    backbone = peft.get_peft_model(base, config, adapter_name="one")
    noise(p for p in backbone.parameters() if p.requires_grad)
    model = TaskHeads(backbone)
    model.add("one", HeadConfig("single_label", 2))
    model.prepare_training()
    without_dropout_in(model.train())
    batch, labels = rows(), torch.tensor([0, 1, 1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(task_ids="one", labels=labels, **batch)
    expected = pal_adapters.fusion_regularization(backbone)
    assert expected.item() > 1e-3
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits["one"], labels) + expected)
    output.loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", checkpoint=True)
    again = TaskHeads.from_pretrained(tmp_path / "out")
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name]), name
    noise(p for p in model.parameters() if p.requires_grad)
    model.restore(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
