"""Every argument of the installed `TrainingArguments` has an effect or is rejected."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import losses, make_task, make_trainer
from transformers import TrainingArguments

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads
from pal_adapters.multitask.training.host_arguments import HONOURED, REJECTED

NAMES = sorted(field.name for field in fields(TrainingArguments))
WRONG: dict[str, Any] = {
    "average_tokens_across_devices": False,
    "batch_eval_metrics": True,
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
    "ddp_static_graph": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "include_for_metrics": ["inputs"],
    "include_inputs_for_metrics": True,
    "jit_mode_eval": True,
    "label_names": ["label"],
    "label_smoothing_factor": 0.1,
    "length_column_name": "size",
    "liger_kernel_config": {"rope": True},
    "parallelism_config": object(),
    "past_index": 0,
    "prediction_loss_only": True,
    "remove_unused_columns": False,
    "save_safetensors": False,
    "train_sampling_strategy": "group_by_length",
    "use_legacy_prediction_loop": True,
    "use_liger_kernel": True,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_decided_on(name: str) -> None:
    assert (name in HONOURED) is not (name in REJECTED), "decide what a new argument does, see host_arguments.py"


def test_defaults_are_accepted(tmp_path: Path) -> None:
    assert set(WRONG) == set(REJECTED)
    given = {name: getattr(TrainingArguments(str(tmp_path), use_cpu=True), name) for name in REJECTED if name in NAMES}
    MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, **given)


@pytest.mark.parametrize("name", sorted(set(WRONG) & set(NAMES)))
def test_what_would_be_ignored_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=.* is not supported: .+"):
        MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, **{name: WRONG[name]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config with split_batches=True"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config with even_batches=False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config with dispatch_batches=True"),
        ({"adam_bias_correction": False, "optim": "sgd"}, "adam_bias_correction=False has no effect for optim='sgd'"),
        ({"adam_bias_correction": False, "optim_args": "a=1"}, "optim_args has no effect with adam_bias_corr"),
        ({"schedule": "pals", "lr_scheduler_type": "cosine"}, "have no effect with schedule='pals'"),
        ({"max_tensor_grad_norm": 1.0, "max_grad_norm": 2.0}, "max_grad_norm=2.0 has no effect with max_tensor"),
        ({"max_tensor_grad_norm": -1.0}, "max_tensor_grad_norm=-1.0 is not allowed"),
        ({"attention_learning_rate": float("nan")}, "attention_learning_rate=nan is not allowed"),
        ({"max_length": 0}, "max_length=0 is not allowed"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 is not allowed"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size=0 is not allowed"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not allowed"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0 is not allowed"),
        (
            {"load_best_model_at_end": True, "save_strategy": "no"},
            "load_best_model_at_end=True has no effect with save_strategy='no'",
        ),
        ({"mixed_batches": "yes"}, "mixed_batches='yes' is not allowed"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules has no effect for optim='adamw_torch"),
        ({"weight_decay": float("nan")}, "weight_decay=nan is not allowed: use a finite number"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan is not allowed"),
        ({"learning_rate": float("inf")}, "learning_rate=inf is not allowed"),
        ({"max_steps": 0}, "max_steps=0 is not allowed"),
        ({"max_steps": 2.5}, "max_steps=2.5 is not allowed"),
        ({"num_train_epochs": -1}, "num_train_epochs=-1 is not allowed"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs=nan is not allowed"),
        ({"save_steps": 0}, "save_steps=0 is not allowed for save_strategy='steps'"),
        ({"eval_steps": -1, "eval_strategy": "steps"}, "eval_steps=-1 is not allowed for eval_strategy='steps'"),
        ({"save_total_limit": 0}, "save_total_limit=0 is not allowed"),
    ],
)
def test_arguments_that_would_override_each_other(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, **given)


def test_given_optimizers_are_not_overridden(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    task = made.tasks["rte"]
    optimizer = made.create_optimizer()
    for given, message in (
        ({"attention_learning_rate": 1e-3}, "attention_learning_rate has no effect on a given optimizer"),
        ({"adam_bias_correction": False}, "adam_bias_correction=False has no effect on a given optimizer"),
        ({"schedule": "pals"}, "schedule='pals' has no effect with a given scheduler"),
    ):
        arguments = MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **given)
        scheduler = object() if "schedule" in given else None
        with pytest.raises(ConfigError, match=message):
            type(made)(
                made.model, arguments, [task], processing_class=made.processing_class,
                optimizers=(optimizer, scheduler),
            )  # fmt: skip


@pytest.mark.parametrize(
    ("optim", "given", "fault"),
    [
        ("adamw_torch", "momentum=1", "momentum=1"),
        ("adafactor", "momentum=1", "momentum=1"),
        ("sgd", "nonsense=1", "nonsense=1"),
        ("rmsprop", "nonsense=1, more=2", "nonsense=1"),
    ],
)
def test_arguments_that_no_optimizer_gets(
    tiny_encoder: str, tmp_path: Path, optim: str, given: str, fault: str
) -> None:
    with pytest.raises(ConfigError, match=f"optim_args with '{fault}' has no effect for optim='{optim}'"):
        make_trainer(tiny_encoder, tmp_path, names=("rte",), optim=optim, optim_args=given)


def test_given_optimizers_train_the_heads_that_are_added(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"))
    arguments, tasks = made.args, list(made.tasks.values())
    model = TaskHeads(made.model.backbone)
    model.add("rte", tasks[0].head_config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"processing_class": made.processing_class, "optimizers": (optimizer, None)}
    with pytest.raises(ConfigError, match="the given optimizer does not train the head of task 'stsb'"):
        MultiTaskTrainer(model, arguments, tasks, **options)
    model = TaskHeads(made.model.backbone)
    for task in tasks:
        model.add(task.name, task.head_config())
    options["optimizers"] = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    MultiTaskTrainer(model, arguments, tasks, **options).train()
    arguments.optim_args = "momentum=1"
    with pytest.raises(ConfigError, match="optim_args has no effect on a given optimizer"):
        MultiTaskTrainer(model, arguments, tasks, **options)


@pytest.mark.parametrize("half", ["bf16_full_eval", "fp16_full_eval"])
def test_evaluation_in_half_precision_rounds_no_weight(tiny_encoder: str, tmp_path: Path, half: str) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"), **{half: True})
    whole = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"))
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    loss, exact = made.evaluate()["eval_loss"], whole.evaluate()["eval_loss"]
    assert loss != exact
    assert loss == pytest.approx(exact, rel=0.02)
    made.predict(made.eval_dataset["rte"])
    for name, value in made.model.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name


def test_half_precision_and_compilation_end_with_their_run(tiny_encoder: str, tmp_path: Path) -> None:
    def run(**given: Any) -> tuple[Any, Any]:
        made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"), max_steps=2, **given)
        accelerator = made.accelerator
        made.train()
        return losses(made), (accelerator.mixed_precision, accelerator.state.dynamo_plugin.backend.value)

    before = dict(os.environ)
    first = run()
    assert first[1] == ("no", "NO")
    half = run(bf16=True)
    assert half[1] == ("bf16", "NO")
    assert half[0] != first[0]
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",), torch_compile_backend="eager")
    assert made.accelerator.state.dynamo_plugin.backend.value == "EAGER"
    assert dict(os.environ) == before
    assert run() == first


def test_half_precision_of_the_launcher_stays(tiny_encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    assert made.accelerator.mixed_precision == "bf16"
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"


def test_memory_of_an_evaluation(tiny_encoder: str, tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",), skip_memory_metrics=False)
    assert "eval_mem_cpu_alloc_delta" in made.evaluate()


@pytest.mark.parametrize("given", [{"eval_steps": 7}, {"eval_steps": 2, "eval_delay": 7}], ids=str)
def test_a_best_model_needs_an_evaluation(tiny_encoder: str, tmp_path: Path, given: dict[str, Any]) -> None:
    common: dict[str, Any] = {"save_strategy": "best", "eval_strategy": "steps", "load_best_model_at_end": True}
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",), **common, **given)
    with pytest.raises(ConfigError, match=r"first evaluation is in step [78], but the run has 6 steps"):
        made.train()


def test_the_best_checkpoint_is_loaded_if_only_best_ones_are_saved(tiny_encoder: str, tmp_path: Path) -> None:
    common: dict[str, Any] = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
    common |= {"metric_for_best_model": "rte_loss", "learning_rate": 0.3, "names": ("rte", "stsb")}
    made = make_trainer(tiny_encoder, tmp_path, load_best_model_at_end=True, **common)
    made.train()
    evaluated = {entry["step"]: entry["eval_rte_loss"] for entry in made.state.log_history if "eval_rte_loss" in entry}
    best = min(evaluated, key=evaluated.__getitem__)
    assert best < 6
    assert made.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert made.evaluate()["eval_rte_loss"] == pytest.approx(evaluated[best], rel=1e-6)


def test_searches_and_trials_are_rejected(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    for call in (made.hyperparameter_search, lambda: made.train(trial={"learning_rate": 1.0})):
        with pytest.raises(ConfigError, match="hyperparameter_search is not supported"):
            call()


@pytest.mark.parametrize("given", [None, "mnli", [{"text": "a"}]], ids=str)
def test_batches_of_an_evaluation_have_one_task(tiny_encoder: str, tmp_path: Path, given: Any) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"))
    with pytest.raises(ConfigError, match=r"eval_dataset=.* is not allowed: .* evaluation set \(rte, stsb\)"):
        made.get_eval_dataloader(given)
    (batch, *_) = made.get_eval_dataloader("rte")
    assert list(batch["labels"]) == ["rte"]


def test_noise_of_neftune_is_added_in_training_alone(tiny_encoder: str, tmp_path: Path) -> None:
    found = []
    for alpha in (None, 5.0):
        made = make_trainer(tiny_encoder, tmp_path, names=("rte",), max_steps=2, neftune_noise_alpha=alpha)
        before = made.evaluate()["eval_rte_loss"]
        made.train()
        found.append((before, [entry["loss"] for entry in losses(made)]))
        assert not made.model.get_input_embeddings()._forward_hooks
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("best", ["rte_f1", "rte", "mnli_accuracy", "eval_rte_acuracy", "accuracy"])
def test_an_unknown_best_metric_is_rejected_at_the_start(tiny_encoder: str, tmp_path: Path, best: str) -> None:
    with pytest.raises(ConfigError, match=f"metric_for_best_model='{best}' is not returned .* rte_accuracy"):
        make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"), metric_for_best_model=best)


@pytest.mark.parametrize(
    "best", ["average", "eval_loss", "rte_loss", "eval_rte_accuracy", "stsb_spearman", "ner_inner_a", "own_own"]
)
def test_known_best_metrics(tiny_encoder: str, tmp_path: Path, best: str) -> None:
    def own(predictions: Any, references: Any) -> float:
        raise AssertionError("its name says enough")

    def nested(predictions: Any, references: Any) -> dict[str, Any]:
        assert predictions == references
        return {"inner": {"a": 1.0}}

    tasks = [
        make_task("single_label", "rte"),
        make_task("regression", "stsb"),
        make_task("token_tagging", "ner", metrics=nested),
        make_task("single_label", "own", metrics=own),
    ]
    if best == "ner_inner_a":
        tasks.pop()
    make_trainer(tiny_encoder, tmp_path, tasks=tasks, metric_for_best_model=best)


def test_scores_of_one_name_are_found_at_the_start(tiny_encoder: str, tmp_path: Path) -> None:
    def own(predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": 0.5}

    for kind, metrics in (("single_label", ["accuracy", own]), ("token_tagging", [own, "accuracy"])):
        with pytest.raises(ConfigError, match="task 'own': two metrics give a score called 'accuracy'"):
            make_trainer(tiny_encoder, tmp_path, tasks=[make_task(kind, "own", metrics=metrics)])

    def loss(predictions: Any, references: Any) -> float:
        return 0.5

    with pytest.raises(ConfigError, match="a metric returns a score called 'loss'"):
        make_trainer(tiny_encoder, tmp_path, tasks=[make_task("single_label", "own", metrics=[loss, "accuracy"])])


def test_data_for_one_task_say_what_to_write(tiny_encoder: str, tmp_path: Path) -> None:
    rows = make_task("single_label", "rte").dataset["train"]
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(
            ConfigError, match=rf"{name} is of type Dataset, .* pass a dict, such as {name}={{'rte': rows}}"
        ):
            make_trainer(tiny_encoder, tmp_path, names=("rte",), **{name: rows})


def test_keys_to_ignore_are_rejected(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    for call, argument in (
        (lambda: trainer.evaluate(ignore_keys=["logits"]), "ignore_keys"),
        (lambda: trainer.predict(trainer.eval_dataset["rte"], ["logits"]), "ignore_keys"),
        (lambda: trainer.train(ignore_keys_for_eval=["logits"]), "ignore_keys_for_eval"),
        (lambda: trainer.train(None, None, ["logits"]), "ignore_keys_for_eval"),
    ):
        with pytest.raises(ConfigError, match=f"^{argument} has no effect here"):
            call()
