from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import (
    BatchMaker,
    DivergedError,
    EncodedSplit,
    MultiTaskModel,
    TaskData,
    TrainingConfig,
    baseline,
    default_host,
    encode_rows,
    fit,
    get_task,
    load_toy_task,
    precompute,
    predict,
    score,
    train_dev_split,
    training,
)

QUIET = {"progress": False, "batch_size": 8}


class Setup:
    """A tiny model with a head for each of some made-up tasks."""

    def __init__(self, folder: str, *names: str, method: str = "full", joint: bool = False, size: int = 40) -> None:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        options = {"host": default_host(), "hidden_size": 12} if method == "pal" else {}
        self.model = MultiTaskModel(AutoModel.from_pretrained(folder), method=method, joint=joint, **options)
        self.batches = BatchMaker(tokenizer, self.model.device)
        self.tasks = []
        for name in names:
            spec, splits = load_toy_task(name, train_size=size, test_size=10)
            train, dev = train_dev_split(splits["train"])
            encoded = [encode_rows(spec, rows, tokenizer, 48) for rows in (train, dev, splits["validation"])]
            self.tasks.append(TaskData(spec, encoded[0], encoded[1], {"validation": encoded[2]}))
            self.model.add_task(spec)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def test_rows_become_tokens_in_order(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = datasets.Dataset.from_dict(
        {"sentence1": ["the cat", "a"], "sentence2": ["not a", "in the house"], "label": [3.5, 1.0]}
    )
    split = encode_rows(get_task("stsb"), rows, tokenizer, 128)
    assert [row[0]["input_ids"] for row in split.inputs] == [
        tokenizer("the cat", "not a")["input_ids"],
        tokenizer("a", "in the house")["input_ids"],
    ]
    expected = tokenizer("the cat", "not a")
    assert split.inputs[0][0].get("token_type_ids") == expected.get("token_type_ids")  # transformers 5 leaves them out
    assert split.labels == [3.5, 1.0]
    assert split.lengths() == [len(row[0]["input_ids"]) for row in split.inputs]


def test_long_rows_are_cut(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    rows = datasets.Dataset.from_dict({"premise": ["the " * 50], "hypothesis": ["is not"], "label": [0]})
    (row,) = encode_rows(get_task("super_glue/rte"), rows, tokenizer, 12).inputs
    assert len(row[0]["input_ids"]) == 12
    assert tokenizer.decode(row[0]["input_ids"]).endswith("is not [SEP]")


def test_choices_and_groups(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    copa = {"premise": ["a"], "choice1": ["b"], "choice2": ["c d"], "question": ["cause"], "label": [1]}
    split = encode_rows(get_task("copa"), datasets.Dataset.from_dict(copa), tokenizer, 64)
    assert [choice["input_ids"] for choice in split.inputs[0]] == [
        tokenizer("a What was the cause of this?", choice)["input_ids"] for choice in ("b", "c d")
    ]
    assert split.groups is None
    multirc = {"paragraph": ["p", "p"], "question": ["q", "r"], "answer": ["x", "y"], "label": [0, 1]}
    assert encode_rows(get_task("multirc"), datasets.Dataset.from_dict(multirc), tokenizer, 64).groups == [
        ("p", "q"),
        ("p", "r"),
    ]


def test_batches_are_padded_and_labels_keep_their_type(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "similarity", "sentiment")
    for task, dtype in zip(setup.tasks, (torch.float32, torch.int64), strict=True):
        inputs, labels = setup.batches(task.spec, task.train, [3, 0])
        lengths = [task.train.lengths()[row] for row in (3, 0)]
        assert inputs["input_ids"].shape == (2, max(lengths))
        assert inputs["attention_mask"].sum(1).tolist() == lengths
        assert labels.dtype == dtype
        assert labels.tolist() == [task.train.labels[row] for row in (3, 0)]


def test_predictions_are_in_the_order_of_the_rows(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    task = setup.tasks[0]
    together = predict(setup.model, task.spec, task.train, setup.batches, batch_size=7)
    setup.model.eval()
    for row in range(0, len(task.train), 5):
        inputs, _ = setup.batches(task.spec, task.train, [row])
        with torch.no_grad():
            alone = setup.model(task.spec.name, inputs)[0].numpy()
        np.testing.assert_allclose(together[row], alone, atol=1e-5)


def test_scores_and_baselines() -> None:
    rte = get_task("rte")
    train, test = EncodedSplit([], [1, 1, 0]), EncodedSplit([], [0, 1, 1, 0, 0])
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [1.0, 0.0], [0.0, 5.0]])
    assert score(rte, test, logits) == {"accuracy": 3 / 5}
    assert baseline(rte, train, test) == {"accuracy": 2 / 5}
    similar = EncodedSplit([], [1.0, 2.0, 4.0])
    assert score(get_task("stsb"), similar, np.array([[2.0], [4.0], [8.0]]))["pearson"] == pytest.approx(1.0)
    assert baseline(get_task("stsb"), similar, similar) == {"pearson": 0.0, "spearman": 0.0}


def test_training_fits_the_rows(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    task = setup.tasks[0]
    task.dev = task.train  # can it fit what it sees?
    result = fit(setup.model, [task], TrainingConfig(epochs=25, learning_rate=1e-2, **QUIET), setup.batches)
    assert max(scores["sentiment"] for scores in result.history) > 0.9
    assert result.steps == 25 * 5
    assert result.draws == {"sentiment": 125}
    assert len(result.history) == 25


def test_the_best_epoch_is_what_stays(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "similarity")
    task = setup.tasks[0]
    result = fit(setup.model, [task], TrainingConfig(epochs=6, learning_rate=3e-2, **QUIET), setup.batches)
    scores = [entry["similarity"] for entry in result.history]
    assert result.best_epoch == scores.index(max(scores)) + 1
    kept = score(task.spec, task.dev, predict(setup.model, task.spec, task.dev, setup.batches))
    assert kept["pearson"] == pytest.approx(max(scores))


def test_the_best_epoch_by_loss_and_patience(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four epochs whose losses are made up; the metric would choose another one."""
    states: list[dict[str, torch.Tensor]] = []
    losses = iter([0.9, 0.4, 0.6, 0.5, 0.1])
    setup = Setup(tiny_encoder, "sentiment")

    def made_up(task: TaskData, logits: np.ndarray) -> float:
        states.append(setup.state())
        return next(losses)

    monkeypatch.setattr(training, "_dev_loss", made_up)
    config = TrainingConfig(epochs=5, select="loss", patience=2, **QUIET)
    result = fit(setup.model, setup.tasks, config, setup.batches)
    assert (result.best_epoch, len(result.history)) == (2, 4)  # two epochs without a better one
    assert result.steps == sum(result.draws.values()) == 4 * 5
    assert all(torch.equal(value, states[1][name]) for name, value in setup.state().items())
    assert not all(torch.equal(value, states[3][name]) for name, value in setup.state().items())


def test_the_dev_loss_is_the_loss(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment", "similarity")
    for task in setup.tasks:
        logits = predict(setup.model, task.spec, task.dev, setup.batches)
        labels = torch.tensor(task.dev.labels)
        if task.spec.is_regression:
            expected = ((torch.from_numpy(logits)[:, 0] - labels) ** 2).mean()
        else:
            expected = -torch.from_numpy(logits).log_softmax(-1)[range(len(labels)), labels].mean()
        assert training._dev_loss(task, logits) == pytest.approx(expected.item(), rel=1e-5)


def test_a_penalty_counts_in_training(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    head = setup.model.heads["sentiment"]
    monkeypatch.setattr(setup.model, "penalty", lambda task: 1e6 * head.weight.square().sum())
    before = head.weight.detach().norm()
    fit(setup.model, setup.tasks, TrainingConfig(epochs=1, learning_rate=1e-2, **QUIET), setup.batches)
    assert head.weight.detach().norm() < before


def test_a_regression_starts_at_the_mean(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "similarity", method="head")
    fit(setup.model, setup.tasks, TrainingConfig(learning_rate=1e-12, max_steps=1, **QUIET), setup.batches)
    bias = setup.model.heads["similarity"].bias.item()
    assert bias == pytest.approx(np.mean(setup.tasks[0].train.labels), abs=1e-6)


def test_the_same_seed_gives_the_same_weights(tiny_encoder: str) -> None:
    states = []
    for seed in (1, 1, 2):
        setup = Setup(tiny_encoder, "sentiment")
        fit(setup.model, setup.tasks, TrainingConfig(max_steps=3, seed=seed, **QUIET), setup.batches)
        states.append(setup.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_max_steps_is_an_upper_bound(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    for epochs, bound, steps, evaluations in ((3, 7, 7, 2), (1, 100, 5, 1)):
        config = TrainingConfig(epochs=epochs, max_steps=bound, **QUIET)
        result = fit(setup.model, setup.tasks, config, setup.batches)
        assert (result.steps, sum(result.draws.values()), len(result.history)) == (steps, steps, evaluations)


def test_one_epoch_sees_every_row_once(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    seen: Counter[int] = Counter()
    original = BatchMaker.__call__

    def spy(self: Any, spec: Any, split: Any, rows: Any) -> Any:
        if split is setup.tasks[0].train:
            seen.update(rows)
        return original(self, spec, split, rows)

    monkeypatch.setattr(BatchMaker, "__call__", spy)
    fit(setup.model, setup.tasks, TrainingConfig(epochs=2, **QUIET), setup.batches)
    assert seen == dict.fromkeys(range(len(setup.tasks[0].train)), 2)


def test_joint_training_moves_the_base_and_all_tasks(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment", "similarity", joint=True)
    before = setup.state()
    config = TrainingConfig(epochs=6, learning_rate=1e-3, **QUIET)
    result = fit(setup.model, setup.tasks, config, setup.batches)
    assert result.steps == 6 * 10
    assert min(result.draws.values()) > 10
    assert set(result.history[0]) == {"sentiment", "similarity"}
    moved = {name for name, tensor in setup.state().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "pooler" not in name} == moved


def test_joint_draws_follow_the_sizes_in_a_single_epoch(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment", "similarity", joint=True, size=120)
    small = setup.tasks[1].train
    setup.tasks[1].train = EncodedSplit(small.inputs[:9], small.labels[:9])
    result = fit(setup.model, setup.tasks, TrainingConfig(epochs=1, progress=False, batch_size=1), setup.batches)
    assert result.steps == 108 + 9
    assert 1 <= result.draws["similarity"] <= 20  # 9 expected


def test_heads_on_stored_vectors_are_heads_on_the_model(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment", method="head")
    task = setup.tasks[0]
    stored = precompute(setup.model, task, setup.batches, batch_size=7)
    assert stored.train.labels == task.train.labels
    fit(setup.model, [stored], TrainingConfig(epochs=2, learning_rate=1e-2, **QUIET), setup.batches)
    np.testing.assert_allclose(
        predict(setup.model, task.spec, stored.test["validation"], setup.batches),
        predict(setup.model, task.spec, task.test["validation"], setup.batches),
        atol=1e-5,
    )


def test_a_loss_that_is_no_number_stops_the_run(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "similarity")
    setup.tasks[0].train.labels[:] = [float("inf")] * len(setup.tasks[0].train)
    with pytest.raises(DivergedError, match=r"task 'similarity': the loss is (inf|nan); lower learning_rate"):
        fit(setup.model, setup.tasks, TrainingConfig(**QUIET), setup.batches)


def test_attention_of_a_pal_learns_faster(tiny_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {}
    original = torch.optim.AdamW

    def spy(groups: Any, **options: Any) -> Any:
        made["groups"] = [dict(group) for group in groups]
        return original(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    setup = Setup(tiny_encoder, "sentiment", method="pal", joint=True)
    config = TrainingConfig(max_steps=1, learning_rate=1e-3, attention_factor=5.0, weight_decay=0.1, **QUIET)
    fit(setup.model, setup.tasks, config, setup.batches)
    names = {id(p): name for name, p in setup.model.named_parameters()}
    for group in made["groups"]:
        for parameter in group["params"]:
            name = names[id(parameter)]
            attends = "self" not in name and any(word in name for word in (".query.", ".key.", ".value."))
            assert group["lr"] == pytest.approx(5e-3 if attends else 1e-3), name
            assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0), name
    fast = [p for group in made["groups"] if group["lr"] > 2e-3 for p in group["params"]]
    assert len(fast) == 2 * 3 * 2  # layers, linears, weight and bias


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"batch_size": 1.5}, {"max_steps": 0}, {"patience": 0}, {"select": "f1"},
        {"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"attention_factor": -1.0},
    ],
)  # fmt: skip
def test_values_that_are_not_allowed(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TrainingConfig(**options)
