"""The Trainer: batches, losses, checkpoints, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import HOSTS, backbone
from tiny_tasks import NAMES, losses, make_task, make_trainer, without_dropout
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    DivergedError,
    EncodedTask,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    TaskHeads,
    UncertaintySelector,
)


@pytest.mark.parametrize("host", HOSTS)
def test_trains_tasks_of_every_kind_and_scores_them(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    trainer = make_trainer(
        tiny_encoder, tmp_path, host=host, names=tuple(NAMES), mixed_batches=True, eval_strategy="steps", eval_steps=3
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in moved if name.startswith("heads.")} == set(NAMES)
    assert any(name.startswith("backbone.") for name in moved) is (host != "none")
    found = [entry for entry in trainer.state.log_history if "eval_average" in entry]
    assert [entry["step"] for entry in found] == [3, 6]
    for name in ("eval_rte_accuracy", "eval_stsb_pearson", "eval_copa_accuracy", "eval_ner_f1", "eval_qa_exact_match"):
        assert -1 <= found[-1][name] <= 1
    primary = ["rte_accuracy", "stsb_pearson", "copa_accuracy", "ner_f1", "qa_f1", "topics_f1_micro"]
    assert found[-1]["eval_average"] == pytest.approx(sum(found[-1][f"eval_{name}"] for name in primary) / 6)
    logged = losses(trainer)
    assert set().union(*logged) == {"step", "loss", *(f"loss_{name}" for name in NAMES)}


def test_loss_of_each_task_is_logged(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_encoder, tmp_path, sampling="round_robin")
    trainer.train()
    logged = losses(trainer)
    assert [[name for name in entry if name.startswith("loss_")] for entry in logged] == [
        ["loss_rte"], ["loss_stsb"], ["loss_copa"], ["loss_rte"], ["loss_stsb"], ["loss_copa"]
    ]  # fmt: skip
    for entry in logged:
        (own,) = (value for name, value in entry.items() if name.startswith("loss_"))
        assert entry["loss"] == pytest.approx(own, abs=1e-4)  # the host rounds


def test_probabilities_are_logged_once_an_epoch(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_encoder, tmp_path, sampling="annealed", max_steps=8)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sampling_epoch" in entry]
    assert [(entry["step"], entry["sampling_epoch"]) for entry in logged] == [(1, 1), (5, 2)]
    for entry, alpha in zip(logged, (1.0, 0.2), strict=True):
        weights = [size**alpha for size in (10, 13, 16)]
        assert entry["sampling_rte"] == pytest.approx(weights[0] / sum(weights))


def test_new_heads_of_regressions_start_at_the_mean(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_encoder, tmp_path)
    labels = trainer.tasks["stsb"].dataset["train"]["label"]
    bias = trainer.model.head("stsb").linear.bias
    assert bias.item() == pytest.approx(sum(labels) / len(labels), rel=1e-6)
    assert not trainer.model.head("rte").linear.bias.any()
    with torch.no_grad():
        bias.fill_(0.25)  # a head that has learned something
    MultiTaskTrainer(trainer.model, trainer.args, trainer.tasks.values(), processing_class=trainer.processing_class)
    assert bias.item() == 0.25


def test_rows_of_like_length_come_together(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_encoder, tmp_path, group_by_length=True, per_device_train_batch_size=2)
    batches = list(trainer.get_train_dataloader().batch_sampler)
    rows = {task.task.name: task.lengths() for task in trainer.train_dataset.tasks}
    offsets = {"rte": 0, "stsb": 10, "copa": 23}
    own = [batch for batch in batches if max(batch) < 10]
    spread = [abs(int(rows["rte"][a - offsets["rte"]]) - int(rows["rte"][b - offsets["rte"]])) for a, b in own]
    order = sorted(int(length) for length in rows["rte"])
    assert sorted(spread)[: len(spread)] == sorted(order[i + 1] - order[i] for i in range(0, 2 * len(spread), 2))
    for arguments in ({"mixed_batches": True}, {"sampling": "uncertainty"}):
        with pytest.raises(ConfigError, match="group_by_length=True has no effect"):
            make_trainer(tiny_encoder, tmp_path, group_by_length=True, **arguments)


@pytest.mark.parametrize("mixed", [False, True])
def test_accumulated_batches_equal_one_large_batch(tiny_encoder: str, tmp_path: Path, mixed: bool) -> None:
    names = ("rte", "ner", "stsb", "copa")
    common = {"names": names, "mixed_batches": mixed, "max_steps": 4, "base": True, "max_grad_norm": 0.0}
    common |= {"optim": "sgd", "learning_rate": 0.1}
    one = make_trainer(tiny_encoder, tmp_path / "one", per_device_train_batch_size=8, **common)
    many = make_trainer(
        tiny_encoder, tmp_path / "many", per_device_train_batch_size=2, gradient_accumulation_steps=4, **common
    )
    for trainer in (one, many):
        without_dropout(trainer).train()
    for left, right in zip(losses(one), losses(many), strict=True):
        assert left == pytest.approx(right, abs=2e-4)
    for (name, value), other in zip(one.model.named_parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(value, other, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resumed_run_equals_an_uninterrupted_one(tiny_encoder: str, tmp_path: Path, host: str, stop: int) -> None:
    if host == "none" and stop != 2:
        pytest.skip("one case is enough")
    common: dict[str, Any] = {"host": host, "sampling": "annealed", "max_steps": 7, "base": host != "peft"}
    common |= {
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": stop,
        "save_total_limit": None,
    }
    common |= {"eval_strategy": "steps", "eval_steps": 3, "mixed_batches": stop == 5}
    whole = make_trainer(tiny_encoder, tmp_path, **common)
    whole.train()
    checkpoint = tmp_path / f"checkpoint-{stop}"
    resumed = make_trainer(tiny_encoder, tmp_path / "again", **common)
    torch.manual_seed(99)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    keep = lambda log: [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in log]  # noqa: E731
    assert keep(resumed.state.log_history)[:-1] == keep(whole.state.log_history)[:-1]
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize(("mode", "accumulation"), [("train", 1), ("train", 2), ("eval", 1)])
def test_resumed_run_with_uncertainty_equals_an_uninterrupted_one(
    tiny_encoder: str, tmp_path: Path, mode: Any, accumulation: int
) -> None:
    # Step 3 is within an epoch.
    common: dict[str, Any] = {"sampling": "uncertainty", "max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    common |= {"gradient_accumulation_steps": accumulation, "names": ("rte", "stsb", "copa"), "base": True}
    whole, again = (
        make_trainer(tiny_encoder, tmp_path / n, batch_selector=UncertaintySelector(mode=mode), **common) for n in "ab"
    )
    whole.train()
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_what_a_task_says_of_a_head_that_is_there(tiny_encoder: str, tmp_path: Path) -> None:
    def trainer(model: TaskHeads, **given: Any) -> Any:
        task = make_task("regression", "stsb", **given)
        args = MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
        return MultiTaskTrainer(model, args, [task], processing_class=AutoTokenizer.from_pretrained(tiny_encoder))

    def with_head(**given: Any) -> TaskHeads:
        model = TaskHeads(backbone(tiny_encoder, "none"))
        model.add("stsb", make_task("regression", "stsb").head_config(), **given)
        return model

    def distance(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits - labels).abs().mean()

    made = trainer(with_head(), weight=0.25, loss=distance).model
    assert made.routes["stsb"].weight == 0.25
    assert made.head("stsb").own_loss is distance
    assert trainer(with_head(weight=3.0)).model.routes["stsb"].weight == 3.0
    assert trainer(with_head(weight=3.0), weight=3.0).model.routes["stsb"].weight == 3.0
    for head, task, message in (
        ({"weight": 2.0}, {"weight": 3.0}, "weight=3, but on the model it has 2"),
        ({"loss": torch.nn.functional.l1_loss}, {"loss": distance}, "its head on the model has another"),
        ({}, {"pooling": "first"}, "pooling='first', but its head on the model has 'mean'"),
        ({}, {"dropout": 0.3}, "dropout=0.3, but its head on the model has 0.1"),
        ({}, {"head": "other"}, "head='other', but on the model it has 'stsb'"),
        ({}, {"adapter": "other"}, "adapter='other', but on the model it has None"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(with_head(**head), **task)  # type: ignore[arg-type]
    shared = with_head()
    shared.add("other", "stsb")
    with pytest.raises(ConfigError, match="'other' has the same head"):
        trainer(shared, loss=distance)


def test_uncertainty_of_rows_without_one_class_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    for name in ("ner", "qa", "topics"):
        with pytest.raises(ConfigError, match=f"task '{name}' is .*UncertaintySelector takes single_label"):
            make_trainer(tiny_encoder, tmp_path, names=("rte", name), sampling="uncertainty")


@pytest.mark.parametrize("side", ["right", "left"])
def test_tags_are_scored_on_either_side_of_padding(tiny_encoder: str, tmp_path: Path, side: str) -> None:
    model = TaskHeads(backbone(tiny_encoder, "none"))
    args = MultiTaskTrainingArguments(str(tmp_path), per_device_eval_batch_size=16, use_cpu=True, report_to=[])
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side=side)
    task = make_task("token_tagging", "ner", (6, 9), metrics=("accuracy",))
    trainer: Any = MultiTaskTrainer(model, args, [task], processing_class=tokenizer)
    rows = trainer.eval_dataset["ner"]
    batch = trainer.collator([rows[i] for i in range(len(rows))])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        logits = model.eval()(**batch).logits["ner"]
    expected = [one[mask > 0].numpy() for one, mask in zip(logits, batch["attention_mask"], strict=True)]
    output = trainer.predict(rows)
    for got, one in zip(output.predictions, expected, strict=True):
        np.testing.assert_allclose(got[: len(one)], one, atol=1e-5)
    words = task.dataset["validation"].remove_columns("tags")
    bare = trainer.predict(EncodedTask(task, words, tokenizer, 128, needs_labels=False))
    np.testing.assert_array_equal(bare.predictions, output.predictions)
    tags = batch["labels"]["ner"]
    right = (logits.argmax(-1) == tags)[tags != -100].float().mean().item()
    assert output.metrics["test_accuracy"] == pytest.approx(right)


def test_best_model_is_restored(tiny_encoder: str, tmp_path: Path) -> None:
    host = HOSTS[-1]
    trainer = make_trainer(
        tiny_encoder, tmp_path, host=host, base=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, learning_rate=0.05, max_steps=5,
    )  # fmt: skip
    trainer.train()
    scored = {e["step"]: e["eval_average"] for e in trainer.state.log_history if "eval_average" in e}
    best = max(scored, key=lambda step: scored[step])
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best < 5, "the test needs a run whose last step is not the best"
    assert trainer.evaluate()["eval_average"] == pytest.approx(scored[best])
    from pal_adapters.multitask import TaskHeads

    read = TaskHeads.from_pretrained(tmp_path / f"checkpoint-{best}")
    for (name, value), (other_name, other) in zip(
        sorted(trainer.model.named_parameters()), sorted(read.named_parameters()), strict=True
    ):
        assert name == other_name
        assert torch.equal(value, other), name


def test_one_row_and_one_task(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_encoder, tmp_path, tasks=[make_task("single_label", "rte", (1, 1))], eval_strategy="epoch"
    )
    trainer.train()
    assert 0 <= trainer.evaluate()["eval_rte_accuracy"] <= 1


def test_labels_keep_their_types_in_mixed_batches(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_encoder, tmp_path, names=tuple(NAMES), mixed_batches=True, per_device_train_batch_size=24
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    assert labels["stsb"].dtype == torch.float32
    assert {round(value % 1, 3) for value in labels["stsb"].tolist()} == {0.8}
    assert labels["rte"].dtype == torch.int64
    assert len(batch["task_ids"]) == len(batch["input_ids"])
    assert batch["task_ids"].count(2) == 2 * len(labels["copa"])


def test_predictions_are_in_the_order_of_the_rows(tiny_encoder: str, tmp_path: Path) -> None:
    """Though they are computed in batches of like length."""
    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "copa", "ner"), per_device_eval_batch_size=2)
    for name, task in made.tasks.items():
        rows = made.eval_dataset[name]
        assert len(set(rows.lengths().tolist())) > 1
        output = made.predict(rows)
        for number in range(len(rows)):
            batch = made.collator([rows[number]])
            labels = batch.pop("labels")[name]
            with torch.no_grad():
                alone = made.model.eval()(**batch).logits[name][0].numpy()
            got = output.predictions[number][: len(alone)]
            assert np.allclose(got, alone, atol=1e-5), (task.name, number)
            assert np.array_equal(output.label_ids[number].ravel()[: labels.numel()], labels.numpy().ravel())


@pytest.mark.parametrize("mixed", [False, True])
def test_draws_of_each_task_are_counted(tiny_encoder: str, tmp_path: Path, mixed: bool) -> None:
    made = make_trainer(tiny_encoder, tmp_path, mixed_batches=mixed, gradient_accumulation_steps=2)
    assert made.draws() == {"rte": 0, "stsb": 0, "copa": 0}
    seen = dict.fromkeys(made.tasks, 0)
    step = made.training_step

    def spy(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        for task, labels in inputs["labels"].items():
            seen[task] += len(labels) if mixed else 1
        return step(model, inputs, *args, **kwargs)

    made.training_step = spy  # type: ignore[method-assign]
    made.train()
    # Two batches are one step of a task.
    assert made.draws() == {task: count if mixed else count // 2 for task, count in seen.items()}


def test_a_loss_that_is_no_number_ends_the_run(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    made.model.head("rte").linear.weight.data.fill_(float("nan"))
    with pytest.raises(
        DivergedError, match=r"task 'rte': the loss is nan in step 1: lower learning_rate \(now 0.001\)"
    ):
        made.train()
