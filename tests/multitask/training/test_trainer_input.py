"""Bad input ends with one clear error before anything is trained."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from backbones import backbone
from tiny_tasks import make_task, make_tasks, make_trainer, splits
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    EncodedTask,
    HeadConfig,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    StorageError,
    Task,
    TaskDataError,
    TaskHeads,
    last_checkpoint,
)


def texts(labels: list[Any], **changes: Any) -> Task:
    data = splits(
        {"text": ["the is"] * len(labels), "label": labels}, {"text": ["the"] * len(labels[:1]), "label": labels[:1]}
    )
    return Task("own", data, text_columns=("text",), **{"num_labels": 2, **changes})


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: texts([0, 2]), r"task 'own', training, row 2: label 2 is out of range: allowed are 0 to 1"),
        (lambda: texts([0, -1]), "label -1 is out of range"),
        (lambda: texts([0.0, 1.0]), "row 1: label 0.0 is of type float, not an integer from 0 to 1"),
        (lambda: texts(["no", "yes"], num_labels=3), "label 'no' is of type str"),
        (lambda: texts([0, None]), "row 2: label None is of type NoneType"),
        (lambda: texts(["3.8"], kind="regression", num_labels=None), "label '3.8' is not a finite number"),
        (lambda: texts([1.0, float("nan")], kind="regression", num_labels=None), "label nan is not a finite number"),
        (lambda: texts([7.0], kind="regression", num_labels=None, label_range=(0.0, 5.0)), "7.0 is out of range"),
        (lambda: texts([1], kind="multi_label", num_labels=3), "label 1 is not a list of class numbers"),
        (lambda: texts([[0, 3]], kind="multi_label", num_labels=3), "is out of range: allowed are 0 to 2"),
        (
            lambda: texts([[1], []], kind="multi_label", num_labels=1),
            r"label \[1\] is out of range: allowed are 0 to 0; no",
        ),
        (
            lambda: texts([[0, 1, 1], [2]], kind="multi_label", num_labels=3),
            r"label \[0, 1, 1\] names a class twice; not",
        ),
        (lambda: texts([]), "task 'own', training: no rows"),
        (lambda: texts([0], label_column="score"), "no column 'score'; found: text, label"),
    ],
)
def test_rows_that_do_not_fit(tiny_encoder: str, tmp_path: Path, task: Any, message: str) -> None:
    with pytest.raises(TaskDataError, match=message):
        make_trainer(tiny_encoder, tmp_path, tasks=[*make_tasks("rte"), task()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "classification"}, "kind='classification' is not allowed"),
        ({"num_labels": None}, "task 'own': num_labels=None"),
        ({"metrics": "bleu"}, "metric 'bleu' is not one of single_label: accuracy"),
        (
            {"metrics": ("accuracy", "f1"), "num_labels": 3},
            "metric 'f1' is for two classes, but the task has 3: use 'f1_m",
        ),
        ({"metrics": "exact_match"}, "metric 'exact_match' needs group_columns"),
        (
            {"kind": "regression", "metrics": "pearson"},
            "metric 'pearson' is for one number, but the task has 2: use 'mse'",
        ),
        ({"label_range": (0, 1)}, "label_range has no effect"),
        ({"text_columns": ()}, "text_columns is empty"),
    ],
)
def test_tasks_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    data = splits({"text": ["the"], "label": [0]}, {"text": ["the"], "label": [0]})
    with pytest.raises(ConfigError, match=message):
        Task("own", data, **{"text_columns": ("text",), "num_labels": 2, **changes})


@pytest.mark.parametrize("name", ["train", "training", "type", "keys", "items", "pop", "average", "a.b", "a/b", "", 3])
def test_names_that_no_task_can_have(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"name={name!r} is not allowed"):
        Task(name, texts([0]).dataset, text_columns=("text",), num_labels=2)


def trainer(folder: str, output: Path, tasks: Any, model: Any = None, **options: Any) -> MultiTaskTrainer:
    arguments = {name: options.pop(name) for name in list(options) if name in ("eval_strategy", "sampling")}
    args = MultiTaskTrainingArguments(str(output), use_cpu=True, report_to=[], **arguments)
    model = model or TaskHeads(backbone(folder, "none"))
    return MultiTaskTrainer(
        model, args, tasks, **{"processing_class": AutoTokenizer.from_pretrained(folder), **options}
    )


def test_arguments_that_do_not_go_together(tiny_encoder: str, tmp_path: Path) -> None:
    for tasks, options, message in (
        ([], {}, "tasks is empty"),
        (["rte"], {}, "tasks has a str"),
        ([*make_tasks("rte"), *make_tasks("rte")], {}, "two tasks are called 'rte'"),
        (make_tasks("rte"), {"processing_class": None}, "needs to be a tokenizer"),
        (make_tasks("rte"), {"model": torch.nn.Linear(2, 2)}, r"model is a Linear: pass TaskHeads\(model\)"),
        (make_tasks("rte"), {"compute_metrics": print}, "compute_metrics has no effect here"),
        (make_tasks("rte"), {"batch_selector": object()}, "batch_selector has no effect without"),
        (make_tasks("rte"), {"train_dataset": {"RTE": None}}, "train_dataset has 'RTE', which is not a task: rte"),
        (make_tasks("rte"), {"eval_dataset": {"nli": None}}, "eval_dataset has 'nli', which is not a task: rte"),
        (
            [texts([0]).with_data({"train": texts([0]).dataset["train"]})],
            {"eval_strategy": "epoch"},
            "task 'own' has no split 'validation' to evaluate on",
        ),
        ([texts([0]).with_data({})], {}, "task 'own' has no split 'train' to train on; it has: none"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tiny_encoder, tmp_path / "out", tasks, **options)
    assert not (tmp_path / "out").exists()


def test_validation_split_without_rows(tiny_encoder: str, tmp_path: Path) -> None:
    task = make_task("single_label", "rte", (4, 0))
    with pytest.raises(TaskDataError, match="task 'rte', evaluation set rte: no rows"):
        trainer(tiny_encoder, tmp_path, [task], eval_strategy="epoch")


def test_a_head_of_another_kind(tiny_encoder: str, tmp_path: Path) -> None:
    model = TaskHeads(backbone(tiny_encoder, "none"))
    model.add("rte", HeadConfig("single_label", 3))
    with pytest.raises(ConfigError, match="its head on the model is single_label with 3 labels, but the task is"):
        trainer(tiny_encoder, tmp_path, make_tasks("rte"), model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "annealing"}, "sampling='annealing' is not allowed"),
        ({"sampling": "temperature"}, "sampling_temperature=None is not allowed"),
        ({"sampling_temperature": 2.0}, "sampling_temperature=2.0 is not allowed for sampling='proportional'"),
        ({"eval_aggregate": "prod"}, "eval_aggregate='prod' .* 'mean', 'sum', 'min', 'max', 'median'"),
        ({"schedule": "bert"}, "schedule='bert'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"fp16": True}, "fp16=True has no effect on CPU, where accelerate trains in fp32: use bf16"),
    ],
)
def test_arguments_of_the_run(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("stsb_mse", False),
        ("eval_text_perplexity", False),
        ("eval_rte_loss", False),
        ("loss", False),
        ("own_mae", False),
        ("rte_accuracy", True),
        ("mse_pearson", True),
        ("average", True),
        (None, True),
    ],
)
def test_which_value_of_a_metric_is_best(tmp_path: Path, metric: str | None, greater: bool) -> None:
    given: dict[str, Any] = {"use_cpu": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    given |= {"load_best_model_at_end": True, "metric_for_best_model": metric}
    assert MultiTaskTrainingArguments(str(tmp_path), **given).greater_is_better is greater
    for told in (False, True):
        args = MultiTaskTrainingArguments(str(tmp_path), **given, greater_is_better=told)
        assert args.greater_is_better is told


def test_gradients_that_are_scaled_have_no_bound_each(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(MultiTaskTrainingArguments, "device", torch.device("meta"))  # fp16 is not for CPU
    with pytest.raises(ConfigError, match="max_tensor_grad_norm is not supported with fp16"):
        MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, fp16=True, max_tensor_grad_norm=1.0)


def test_fsdp_on_cpu_would_be_ddp(tiny_encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch --use_fsdp`
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        ConfigError, match="fsdp has no effect on CPU, where accelerate silently trains with DDP instead"
    ):
        trainer(tiny_encoder, tmp_path, make_tasks("rte"))


def test_checkpoint_that_cannot_be_written(tiny_encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    from pal_adapters.multitask.model import saving

    made = make_trainer(tiny_encoder, tmp_path, save_strategy="steps", save_steps=2)
    write = saving.write_tensors

    def full(tensors: Any, directory: Path, stem: str) -> None:
        if "checkpoint-4" in str(directory):
            (directory / f"{stem}.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, directory, stem)

    monkeypatch.setattr(saving, "write_tensors", full)
    with pytest.raises(StorageError, match=r"checkpoint-4 cannot be written .*No space left.*checkpoint-2; make room"):
        made.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    monkeypatch.undo()
    again = make_trainer(tiny_encoder, tmp_path, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_half_a_checkpoint_is_passed_over(tiny_encoder: str, tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    made = make_trainer(tiny_encoder, tmp_path, save_strategy="steps", save_steps=2)
    with pytest.raises(ConfigError, match="has no complete checkpoint to resume from"):
        made.train(resume_from_checkpoint=True)
    made.train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"epoch":')
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_output_that_is_no_folder(tiny_encoder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        make_trainer(tiny_encoder, tmp_path / "file")


def folder(path: Path, yaml: str, **files: str) -> Path:
    path.mkdir()
    (path / "task.yaml").write_text(yaml)
    for name, content in files.items():
        (path / name.replace("_", ".")).write_text(content)
    return path


def test_folder_of_a_task(tiny_encoder: str, tmp_path: Path) -> None:
    import pandas

    yaml = "text_columns: [a, b]\nlabel_names: [no, yes]\nlabel_column: y\nmetrics: [f1, accuracy]\nweight: 2.0\n"
    place = folder(tmp_path / "mood", yaml, train_csv="a,b,y\nthe,is,0\nall,no,1\n")
    rows = [{"a": "it", "b": "in", "y": 1}]
    (place / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pandas.DataFrame(rows).to_parquet(place / "test.parquet")
    task = Task.from_folder(place)
    assert (task.name, task.num_labels, task.metrics, task.weight) == ("mood", 2, ("f1", "accuracy"), 2.0)
    assert task.label_names == ("no", "yes")  # which YAML takes for False and True
    assert {name: len(rows) for name, rows in task.dataset.items()} == {"train": 2, "validation": 1, "test": 1}
    encoded = EncodedTask(task, task.dataset["train"], AutoTokenizer.from_pretrained(tiny_encoder), 16)
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [0, 1]
    assert Task.from_folder(place, name="other").name == "other"


@pytest.mark.parametrize(
    ("yaml", "files", "error", "message"),
    [
        ("text_column: a\n", {"train_csv": "a\n1\n"}, ConfigError, "unknown field 'text_column'; allowed: adapter"),
        ("[1, 2]", {}, TaskDataError, "not a mapping"),
        ("a: [", {}, TaskDataError, "invalid YAML"),
        ("text_columns: [a]\nnum_labels: 2\n", {}, TaskDataError, "no data; expected files"),
        ("text_columns: [a]\n", {"train_jsonl": "{"}, TaskDataError, "train.jsonl: cannot be read"),
        ("text_columns: [a]\n", {"train_jsonl": '{"a": 1}\n5\n'}, TaskDataError, "each row must be an object with"),
        (
            "text_columns: [a]\n",
            {"train_csv": "a\nx\n", "ids_json": '{"a":\n'},
            TaskDataError,
            "ids.json: cannot be read",
        ),
        (
            "text_columns: [a]\n",
            {"train_csv": "a\nx\n", "ids_json": "[0"},
            TaskDataError,
            "ids.json: cannot be read",
        ),
        ("text_columns: [a]\n", {"train_csv": "a\nx\n", "train_jsonl": '{"a": 1}\n'}, TaskDataError, "two files"),
    ],
)
def test_folders_that_make_no_task(tmp_path: Path, yaml: str, files: Any, error: Any, message: str) -> None:
    place = folder(tmp_path / "task", yaml, **files)
    with pytest.raises(error, match=message):
        Task.from_folder(place)
    with pytest.raises(TaskDataError, match=r"task\.yaml does not exist"):
        Task.from_folder(tmp_path)


def test_everything_by_name_is_a_task(tmp_path: Path) -> None:
    from pal_adapters.multitask.tasks.glue import TASKS
    from pal_adapters.multitask.tasks.task import get_task

    rows = datasets.Dataset.from_dict({"x": [1]})
    kinds = {name: Task.from_spec(get_task(name), {"train": rows}).head_config().kind for name in TASKS}
    assert kinds["super_glue/copa"] == "multiple_choice"
    assert kinds["glue/stsb"] == "regression"
    assert set(kinds.values()) == {"single_label", "multiple_choice", "regression"}
    record = [
        {
            "passage": "x @highlight\ny",
            "query": "@placeholder is",
            "entities": ["all", "some", "all"],
            "answers": ["some"],
        }
    ]
    (tmp_path / "record").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "record" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in record))
    task = Task.named("super_glue/ReCoRD", tmp_path)
    assert task.expand is not None
    expanded = task.expand(task.dataset["validation"])
    assert expanded["entity"][:] == ["all", "some"]
    assert expanded["label"][:] == [0, 1]


def test_spans_need_padding_on_the_right(tiny_encoder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left")
    args = MultiTaskTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    tasks = [make_task("span_qa", "qa")]
    with pytest.raises(ConfigError, match="task 'qa' is span_qa, which needs a tokenizer that pads on the right"):
        MultiTaskTrainer(TaskHeads(backbone(tiny_encoder, "none")), args, tasks, processing_class=tokenizer)


@pytest.mark.parametrize("column", [None, [-1, -1, -1], [None, None, None]])
def test_rows_to_predict_need_no_labels(tiny_encoder: str, tmp_path: Path, column: Any) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    labelled = made.tasks["rte"].dataset["validation"].select([2, 0, 1])
    rows = labelled.remove_columns("label")
    rows = rows if column is None else rows.add_column("label", column)
    expected = made.predict({"rte": labelled})["rte"]
    output = made.predict({"rte": rows})["rte"]
    assert output.label_ids is None
    assert not [name for name in output.metrics if name.endswith(("loss", "accuracy"))]
    assert torch.equal(torch.tensor(output.predictions), torch.tensor(expected.predictions))
    encoded = EncodedTask(made.tasks["rte"], rows, made.processing_class, 32, needs_labels=False)
    assert encoded.predictions(output.predictions).tolist() == expected.predictions.argmax(-1).tolist()
    with pytest.raises(
        ConfigError, match=r"eval_dataset\['rte'\]: the examples have no labels; they can only be pred"
    ):
        made.evaluate({"rte": encoded})
    with pytest.raises(TaskDataError, match=r"task 'rte', eval_dataset\['rte'\](: no column 'label'|, row 1: label)"):
        made.evaluate({"rte": rows})
    with pytest.raises(TaskDataError, match=r"task 'rte', training(: no column 'label'|, row 1: label)"):
        make_trainer(tiny_encoder, tmp_path, names=("rte",), train_dataset={"rte": rows})


def test_every_kind_predicts_rows_without_labels(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("stsb", "copa", "ner", "qa", "topics"))
    for name, task in made.tasks.items():
        labelled = task.dataset["validation"]
        whole, bare = (
            EncodedTask(task, rows, made.processing_class, 32, needs_labels=False)
            for rows in (labelled, labelled.remove_columns(task.label_column))
        )
        assert whole.has_labels
        expected, output = made.predict(whole), made.predict(bare)
        assert output.label_ids is None
        a, b = (e.predictions(o.predictions) for e, o in ((whole, expected), (bare, output)))
        assert torch.equal(torch.tensor(a), torch.tensor(b)) if hasattr(a, "shape") else a == b, name
        with pytest.raises(ConfigError, match="without labels there are no scores"):
            bare.score(output.predictions)


def test_half_of_the_labels_is_an_error_in_prediction_too(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    rows = made.tasks["rte"].dataset["validation"].remove_columns("label").add_column("label", [1, -1, 0, 1, 1])
    with pytest.raises(TaskDataError, match=r"task 'rte', test_dataset\['rte'\], row 2: label -1 is out of range"):
        made.predict({"rte": rows})


def test_rows_of_no_task(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("rte",))
    rows = made.tasks["rte"].dataset["validation"]
    for call, message in (
        (
            lambda: made.predict(rows),
            "test_dataset is of type Dataset, but .* pass a dict, such as test_dataset={'rte': rows}",
        ),
        (lambda: made.predict({"test": rows}), "test_dataset has 'test', which is not a task: rte"),
        (lambda: made.evaluate(rows), "eval_dataset is of type Dataset, but .* pass a dict"),
        (lambda: made.evaluate("qa"), "eval_dataset='qa' is not one of: rte"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


CONTEXT = "is are was not"


def encoded_answers(folder: str, *answers: Any) -> EncodedTask:
    rows = [
        {"question": "the", "context": CONTEXT, "answers": {"text": text, "answer_start": start}}
        for text, start in answers
    ]
    task = Task("qa", {"train": datasets.Dataset.from_list(rows)}, kind="span_qa")
    return EncodedTask(task, task.dataset["train"], AutoTokenizer.from_pretrained(folder), 32, where="train")


@pytest.mark.parametrize(
    ("text", "start", "message"),
    [
        (["zzz"], [999], "lies outside the context, which has 14 characters"),
        (["are"], [-5], "lies outside the context"),
        (["not "], [11], "lies outside the context"),
        (["all"], [3], "is not in the context at 3, which reads 'are' there"),
        (["are"], [4], "is not in the context at 4, which reads 're ' there"),
        (["are", "was"], [3, 8], "is not in the context at 8, which reads 'as ' there"),
        ([5], [3], "has the text 5, which is of type int"),
        (["are"], ["x"], "has the start 'x', which is of type str, not an integer"),
        (["are"], [None], "has the start None, which is of type NoneType"),
        (["are"], [], "has different numbers of texts and starts"),
        ("are", 3, "is not a dict with a list of texts and a list of starts"),
    ],
)
def test_answers_that_are_not_there(tiny_encoder: str, text: Any, start: Any, message: str) -> None:
    with pytest.raises(TaskDataError, match=rf"task 'qa', train, row 1: label \{{.* {message}"):
        encoded_answers(tiny_encoder, (text, start))


def test_questions_may_have_no_answer(tiny_encoder: str) -> None:
    encoded = encoded_answers(tiny_encoder, (["are was"], [3]), ([], []))
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [[4, 5], [0, 0]]  # [CLS] the [SEP] is are was not [SEP]
    labels = encoded_answers(tiny_encoder, ([""], [-1])).labels
    assert labels is not None
    assert labels.tolist() == [[0, 0]]


def test_no_answer_is_an_answer(tiny_encoder: str) -> None:
    """The score of none is the sum of the two logits of the first token, against that of the best span."""
    encoded = encoded_answers(tiny_encoder, (["are"], [3]), ([], []))
    logits = np.full((2, 8, 2), -10.0)  # [CLS] the [SEP] is are was not [SEP]
    logits[:, 4, 0], logits[:, 5, 1] = 2.0, 3.0
    logits[0, 0] = (2.0, 2.9)
    logits[1, 0] = (3.0, 2.1)
    assert encoded.predictions(logits) == ["are was", ""]
    assert encoded.score(logits) == {"f1": pytest.approx((2 / 3 + 1) / 2), "exact_match": 0.5}
    logits[0, 0] = (9.0, 9.0)
    assert encoded.predictions(logits) == ["", ""]
    answered = encoded_answers(tiny_encoder, (["are"], [3]), (["is"], [0]))
    assert answered.predictions(logits) == ["are was", "are was"]  # no question lacks an answer


def test_no_answer_is_for_all_windows_of_a_question(tiny_encoder: str) -> None:
    words = [f"w{number}" for number in range(12)]
    rows = [
        {"question": "the", "context": " ".join(words), "answers": {"text": text, "answer_start": start}}
        for text, start in ((["w0"], [0]), ([], []))
    ]
    task = Task("qa", {"train": datasets.Dataset.from_list(rows)}, kind="span_qa")
    encoded = EncodedTask(task, task.dataset["train"], AutoTokenizer.from_pretrained(tiny_encoder), 16)
    assert encoded.labels is not None
    assert (np.bincount([row for row, _ in encoded.windows]) > 1).all()
    logits = np.full((len(encoded), 16, 2), -5.0)
    for window, (first, last) in enumerate(encoded.labels):  # as a model that has learned all labels
        logits[window, first, 0] = logits[window, last, 1] = 5.0
    assert encoded.predictions(logits) == ["w0", ""]


def sets_of(folder: str, classes: int, **splits: list[Any]) -> dict[str, Any]:
    data = {
        name: datasets.Dataset.from_dict({"text": ["the"] * len(labels), "label": labels})
        for name, labels in splits.items()
    }
    task = Task("own", data, kind="multi_label", text_columns=("text",), num_labels=classes)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {
        name: EncodedTask(task, rows, tokenizer, 32, where=name, needs_labels=name != "test")
        for name, rows in data.items()
    }
    return {name: None if rows.labels is None else rows.labels.tolist() for name, rows in found.items()}


def test_label_sets_are_read_alike_in_all_splits(tiny_encoder: str) -> None:
    numbers = sets_of(tiny_encoder, 2, train=[[0], [0, 1]], validation=[[0, 1], [0, 1]])
    assert numbers == {"train": [[1, 0], [1, 1]], "validation": [[1, 1], [1, 1]]}
    flags = sets_of(tiny_encoder, 2, train=[[0, 0], [0, 1]], validation=[[0, 1]], test=[[-1, -1]])
    assert flags == {"train": [[0, 0], [0, 1]], "validation": [[0, 1]], "test": None}
    assert sets_of(tiny_encoder, 1, train=[[0], []], validation=[[0]]) == {"train": [[1], [0]], "validation": [[1]]}
    assert sets_of(tiny_encoder, 1, train=[[0], [1]], validation=[[0]]) == {"train": [[0], [1]], "validation": [[0]]}


def test_rows_beside_the_splits_are_read_as_these(tiny_encoder: str) -> None:
    task = texts([[0, 1, 1], [1, 0, 0]], kind="multi_label", num_labels=3)
    rows = datasets.Dataset.from_dict({"text": ["the"], "label": [[2]]})
    with pytest.raises(TaskDataError, match=r"row 1: label \[2\] is not a 0 or 1 for each of 3 classes, as the other"):
        EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 32)


@pytest.mark.parametrize("lines", [False, True])
def test_folder_with_files_of_to_json(tmp_path: Path, lines: bool) -> None:
    place = folder(tmp_path / "task", "text_columns: [text]\nnum_labels: 2\n")
    rows = [{"text": "the\nis", "label": 0}, {"text": "it", "label": 1}]
    for split, size in (("train", 2), ("validation", 1)):
        datasets.Dataset.from_list(rows[:size]).to_json(str(place / f"{split}.json"), lines=lines)
    (place / "test.json.gz").write_bytes(gzip.compress((place / "train.json").read_bytes()))
    (place / "ids.json").write_text('{"a": 0}')
    task = Task.from_folder(place)
    assert {name: split.to_list() for name, split in task.dataset.items()} == {
        "train": rows,
        "validation": rows[:1],
        "test": rows,
        "ids": [{"a": 0}],
    }


@pytest.mark.parametrize("make", [float, bool])
def test_label_sets_of_other_types(tiny_encoder: str, make: Any) -> None:
    labels = [[make(value) for value in row] for row in ([1, 0, 1], [0, 0, 1])]
    assert sets_of(tiny_encoder, 3, train=labels) == {"train": [[1, 0, 1], [0, 0, 1]]}
    with pytest.raises(TaskDataError, match=r"row 1: label .* is of type"):
        sets_of(tiny_encoder, 3, train=[[make(1)], [make(0)]])


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_rows_in_the_format_of_tensors(tiny_encoder: str, form: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    for task in make_tasks():
        rows = task.dataset["train"]
        formatted = task.with_data({"train": rows.with_format(form)})
        plain = EncodedTask(task, rows, tokenizer, 32)
        encoded = EncodedTask(formatted, formatted.dataset["train"], tokenizer, 32)
        assert [str(row) for row in encoded] == [str(row) for row in plain]


def test_rows_that_stream(tiny_encoder: str) -> None:
    task = texts([0, 1])
    rows = task.dataset["train"]
    with pytest.raises(ConfigError, match=r"task 'own': split 'train' is an IterableDataset, whose .* streaming=True"):
        task.with_data({"train": rows.to_iterable_dataset()})
    with pytest.raises(ConfigError, match="task 'own', training is an IterableDataset, whose"):
        EncodedTask(task, rows.to_iterable_dataset(), None, 32, where="training")  # type: ignore[arg-type]


def test_columns_are_those_after_a_transform(tiny_encoder: str) -> None:
    rows = datasets.Dataset.from_dict({"text": ["the", "is not"], "label": [0, 1]})
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    without = rows.with_transform(lambda batch: {"text": batch["text"]})
    task = Task("t", {"train": without}, text_columns="text", num_labels=2)
    with pytest.raises(TaskDataError, match="no column 'label'; found: text"):
        EncodedTask(task, without, tokenizer, 16)
    assert not EncodedTask(task, without, tokenizer, 16, needs_labels=False).has_labels
    upper = rows.with_transform(lambda batch: {**batch, "text": [text.upper() for text in batch["text"]]})
    task = Task("t", {"train": upper}, text_columns="text", num_labels=2)
    assert EncodedTask(task, upper, tokenizer, 16).labels.tolist() == [0, 1]


def test_no_room_for_the_tokenizer(tiny_encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    made = make_trainer(tiny_encoder, tmp_path, save_strategy="steps", save_steps=2)
    made.train()  # an earlier run in the same folder
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()}
    again = make_trainer(tiny_encoder, tmp_path, save_strategy="steps", save_steps=2)
    save = again.processing_class.save_pretrained

    def full(folder: Any, *args: Any, **kwargs: Any) -> Any:
        if "checkpoint-4" in str(folder):
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library does
        return save(folder, *args, **kwargs)

    monkeypatch.setattr(again.processing_class, "save_pretrained", full)
    with pytest.raises(
        StorageError, match=r"checkpoint-4 cannot be written .*os error 28.*complete checkpoint is .*6"
    ):
        again.train()
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
