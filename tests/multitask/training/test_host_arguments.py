"""Every argument of the installed `TrainingArguments` has an effect or is rejected."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import losses, make_task, make_trainer
from transformers import TrainingArguments

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import MultiTaskTrainingArguments
from pal_adapters.multitask.training.host_arguments import HONOURED, REJECTED

NAMES = sorted(field.name for field in fields(TrainingArguments))
WRONG: dict[str, Any] = {
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
    ):
        with pytest.raises(ConfigError, match=f"^{argument} has no effect here"):
            call()
