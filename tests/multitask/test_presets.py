"""The recipes: what they build, what trains, and when they warn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS
from tiny_tasks import make_tasks
from transformers import AutoModel, AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    PRESETS,
    HeadConfig,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    Preset,
    RecipeWarning,
    TaskHeads,
    get_preset,
)
from pal_adapters.multitask.model.routing import run_batch
from pal_adapters.multitask.training.optim import UncorrectedAdamW, pals_schedule

CHANGES: dict[str, dict[str, Any]] = {
    "pals": {"hidden_size": 12},
    "pals_frozen": {"hidden_size": 12},
    "low_rank_frozen": {"hidden_size": 5},
    "ca_mtl": {"freeze_layers": [0]},  # of so few blocks, the rule freezes none
}
WITH_HOST = [h for h in HOSTS if h != "none"]
CASES = [
    (name, host) for name, preset in PRESETS.items() for host in (WITH_HOST if preset.adapters != "none" else [None])
]


def base_for(preset: Preset, folder: str, host: str | None, output: Path) -> tuple[Any, dict[str, Any]]:
    """A base for a recipe, and what it combines, if it does: in `adapters` on the base, in PEFT saved."""
    base = AutoModel.from_pretrained(folder)
    if preset.adapters != "combination":
        return base, {}
    model = get_preset("scalearn_sources").build(base, make_tasks("ner", "copa"), host=host)
    with torch.no_grad():  # LoRA begins as nothing, and nothing has no coefficient to learn
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if host == "adapters":
        return base, {"sources": ["ner", "copa"]}
    model.save_pretrained(output)
    return AutoModel.from_pretrained(folder), {"sources": {name: str(output / name) for name in ("ner", "copa")}}


@pytest.mark.parametrize(("name", "host"), CASES)
def test_every_recipe_trains(tiny_encoder: str, tmp_path: Path, name: str, host: str | None) -> None:
    preset = get_preset(name)
    tasks = make_tasks("rte", "stsb")
    base_model, sources = base_for(preset, tiny_encoder, host, tmp_path)
    model = preset.build(base_model, tasks, host=host, **sources, **CHANGES.get(name, {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RecipeWarning)
        args = preset.training_arguments(
            str(tmp_path), num_tasks=2, max_steps=3, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=2, dataloader_pin_memory=False, max_length=32,
            load_best_model_at_end=False, eval_strategy="no",
        )  # fmt: skip
        trainer = MultiTaskTrainer(
            model, args, tasks, processing_class=AutoTokenizer.from_pretrained(tiny_encoder), preset=preset
        )
    base = {n: t.clone() for n, t in model.base_tensors().items()}
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert any(not torch.equal(t, base[n]) for n, t in model.base_tensors().items()) is (preset.base == "trained")
    assert {n for n in moved if n.startswith("heads.")}
    added = {n for n in moved if n.startswith("backbone.")}
    assert bool(added) is (preset.base == "trained" or preset.adapters != "none")
    assert model.head("rte").config.pooling == preset.pooling
    if preset.adapters == "combination":  # the sources rest
        assert all("to_rte" in n or "to_stsb" in n for n in added)
        assert len({route.adapter if host == "peft" else route.adapter.name for route in model.routes.values()}) == 2


@pytest.mark.parametrize("name", ["pals", "ca_mtl"])
def test_a_trainer_checks_arguments_that_the_recipe_did_not_make(name: str, tiny_encoder: str, tmp_path: Path) -> None:
    tasks = make_tasks("rte", "stsb")
    model = get_preset(name).build(AutoModel.from_pretrained(tiny_encoder), tasks, **CHANGES.get(name, {}))
    args = MultiTaskTrainingArguments(str(tmp_path), sampling="uniform", use_cpu=True, report_to=[])
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with pytest.warns(RecipeWarning, match=f"sampling='uniform' with the preset '{name}'"):
        MultiTaskTrainer(model, args, tasks, processing_class=tokenizer, preset=get_preset(name))
    plain = TaskHeads(AutoModel.from_pretrained(tiny_encoder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecipeWarning)
        get_preset(name).check(plain, args)  # whatever the model


def test_other_pooling_than_the_recipes(tiny_encoder: str) -> None:
    tasks = make_tasks("rte", "stsb", "copa")
    tasks[1].pooling = "last"
    tasks[2].head = HeadConfig("multiple_choice", num_choices=2, pooling="first")
    model = get_preset("full").build(AutoModel.from_pretrained(tiny_encoder), tasks, pooling="mean")
    assert [model.head(task.name).config.pooling for task in tasks] == ["mean", "last", "first"]
    with pytest.raises(ConfigError, match="pooling='max' is not allowed"):
        get_preset("full").build(AutoModel.from_pretrained(tiny_encoder), tasks, pooling="max")  # type: ignore[arg-type]


@pytest.mark.parametrize("host", WITH_HOST)
def test_a_combination_of_saved_sources(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    model = get_preset("scalearn_sources").build(
        AutoModel.from_pretrained(tiny_encoder), make_tasks("stsb", "copa"), host=host
    )
    model.save_pretrained(tmp_path)
    folders = {name: str(tmp_path / name) for name in ("stsb", "copa")}
    tasks = make_tasks("rte")
    preset = get_preset("scalearn")
    made = preset.build(AutoModel.from_pretrained(tiny_encoder), tasks, host=host, sources=folders)
    assert made(task_ids="rte", input_ids=torch.tensor([[4, 5, 6]])).logits["rte"].shape == (1, 2)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert all(name.startswith("heads.rte") or "to_rte" in name for name in trained)
    other = "peft" if host == "adapters" else "adapters"
    with pytest.raises(ConfigError, match=f"the base has adapters of '{host}'"):
        preset.build(model.backbone, tasks, host=other, sources=folders)
    if host == "peft":
        with pytest.raises(ConfigError, match="PEFT allows one kind of adapter on a model"):
            preset.build(model.backbone, tasks, sources=["stsb"])


def test_sources_belong_to_recipes_that_combine(tiny_encoder: str) -> None:
    base, tasks = AutoModel.from_pretrained(tiny_encoder), make_tasks("rte")
    with pytest.raises(ConfigError, match="sources=None is not allowed for the preset 'scalearn', which combines"):
        get_preset("scalearn").build(base, tasks)
    with pytest.raises(ConfigError, match="combines none: leave it out"):
        get_preset("pals").build(base, tasks, sources=["a"])


@pytest.mark.parametrize("host", WITH_HOST)
def test_one_network_on_a_mixed_batch_equals_one_batch_a_task(tiny_encoder: str, host: str) -> None:
    tasks = make_tasks("rte", "stsb", "topics")
    model = get_preset("ca_mtl").build(AutoModel.from_pretrained(tiny_encoder), tasks, host=host, **CHANGES["ca_mtl"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.eval()
    names = ["stsb", "rte", "topics", "rte", "stsb"]
    tokens = torch.randint(4, 60, (len(names), 6), generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    mixed = model(task_ids=names, **batch).logits
    for task in ("rte", "stsb", "topics"):
        at = [i for i, name in enumerate(names) if name == task]
        alone = model(task_ids=task, **{n: t[at] for n, t in batch.items()}).logits[task]
        torch.testing.assert_close(mixed[task], alone, atol=1e-5, rtol=1e-4)
        other = "rte" if task != "rte" else "stsb"
        states = [run_batch(model.backbone, dict(batch), ["tasks"] * 5, [t] * 5)[0] for t in (task, other)]
        assert not torch.allclose(*states, atol=1e-4)  # so that rows of another task would show


def test_pals_follow_the_released_code(tmp_path: Path) -> None:
    args = get_preset("pals").training_arguments(str(tmp_path), num_tasks=8, use_cpu=True)
    assert (args.steps_per_epoch, args.num_train_epochs) == (2400, 25)
    assert (args.sampling, args.learning_rate, args.weight_decay, args.adam_epsilon) == ("annealed", 2e-5, 0.01, 1e-6)
    assert (args.max_grad_norm, args.max_tensor_grad_norm, args.adam_bias_correction) == (0.0, 1.0, False)
    assert args.get_warmup_steps(60000) == 6000
    factors = [pals_schedule(step, warmup_steps=10, steps=100) for step in (0, 5, 9, 10, 50, 100)]
    assert factors == pytest.approx([0.0, 0.5, 0.9, 0.9, 0.5, 0.0])


def test_optimiser_without_bias_correction() -> None:
    parameter, resting = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    optimiser = UncorrectedAdamW([parameter, resting], lr=0.1, eps=1e-6, weight_decay=0.01)
    mean = square = torch.zeros(2)
    value = parameter.detach().clone()
    for step in range(3):
        gradient = torch.tensor([0.5, -0.1]) * (step + 1)
        parameter.grad = gradient.clone()
        optimiser.step()
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        value = value - 0.1 * (mean / (square.sqrt() + 1e-6) + 0.01 * value)
        torch.testing.assert_close(parameter.detach(), value)
    assert resting.tolist() == [1.0, -2.0]


def test_warns_where_the_recipe_is_not_followed(tiny_encoder: str, tmp_path: Path) -> None:
    preset = get_preset("pals")
    with pytest.warns(RecipeWarning, match="sampling='uniform' with the preset 'pals'"):
        preset.training_arguments(str(tmp_path), num_tasks=2, sampling="uniform", use_cpu=True)
    model = preset.build(AutoModel.from_pretrained(tiny_encoder), make_tasks("rte"), hidden_size=12)
    model.prepare_training(base=False)
    with pytest.warns(RecipeWarning, match="the base is frozen with the preset 'pals'"):
        preset.check(model)


def test_what_a_preset_refuses(tiny_encoder: str) -> None:
    base = AutoModel.from_pretrained(tiny_encoder)
    with pytest.raises(ConfigError, match="preset='pal' is not allowed: use one of 'pals'"):
        get_preset("pal")
    with pytest.raises(ConfigError, match="host='peft' has no effect for the preset 'full'"):
        get_preset("full").build(base, make_tasks("rte"), host="peft")
    get_preset("pals").build(base, make_tasks("rte"), host=HOSTS[-1], hidden_size=12)
    if HOSTS[-1] == "adapters":
        with pytest.raises(ConfigError, match="base already has adapters"):
            get_preset("pals").build(base, make_tasks("rte"))
