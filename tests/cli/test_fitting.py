"""One training run: its best epoch, its scores, and the shortcut for a head alone."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pal_adapters.cli import fitting, main, methods
from pal_adapters.multitask import DivergedError, EncodedTask, Task, TaskHeads, load_toy_task

INSTALLED = [host for host in ("adapters", "peft") if host in sys.modules or find_spec(host)]


class Setup:
    """A tiny model with a head for each of some made-up tasks."""

    def __init__(self, folder: str, *names: str, size: int = 80) -> None:
        torch.manual_seed(3)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.base = AutoModel.from_pretrained(folder)
        self.model = TaskHeads(self.base)
        self.data = []
        for name in names:
            task = Task.from_spec(*load_toy_task(name, train_size=size, test_size=15))
            self.data.append(fitting.encode(task, self.tokenizer, 48, seed=42))
            self.model.add(name, task.head_config())
        self.model.prepare_training()

    def train(self, output: Path, **options: Any) -> Any:
        options = {"learning_rate": 1e-2, "epochs": 2, "use_cpu": True, **options}
        return fitting.train(self.model, self.data, self.tokenizer, output, **options)


def test_a_tenth_of_the_rows_chooses_and_the_rest_trains(tiny_encoder: str, tmp_path: Path) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    (one,) = setup.data
    assert (len(one.train), len(one.dev), len(one.test["validation"])) == (72, 8, 15)
    seen: dict[int, int] = {}
    get = EncodedTask.__getitem__

    def spy(self: EncodedTask, row: int) -> Any:
        if self is one.train:
            seen[row] = seen.get(row, 0) + 1
        return get(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodedTask, "__getitem__", spy)
        trainer = setup.train(tmp_path, batch_size=8, group_by_length=True)
    assert seen == dict.fromkeys(range(72), 2)
    assert trainer.state.global_step == 18
    assert trainer.draws() == {"sentiment": 18}
    assert list(tmp_path.iterdir()) == []  # no checkpoint is left


@pytest.mark.parametrize(("epochs", "bound", "steps", "evaluations"), [(3, 7, 7, 2), (1, 100, 5, 1)])
def test_max_steps_is_an_upper_bound(
    tiny_encoder: str, tmp_path: Path, epochs: int, bound: int, steps: int, evaluations: int
) -> None:
    setup = Setup(tiny_encoder, "sentiment")
    trainer = setup.train(tmp_path, epochs=epochs, max_steps=bound)
    assert trainer.state.global_step == steps
    assert len(fitting.summary(trainer, setup.data[0])["dev_history"]) == evaluations


def test_the_best_epoch_is_what_stays(tiny_encoder: str, tmp_path: Path) -> None:
    setup = Setup(tiny_encoder, "similarity")
    trainer = setup.train(tmp_path, epochs=6, learning_rate=0.3)
    found = fitting.summary(trainer, setup.data[0])
    scores = found["dev_history"]
    assert found["primary_metric"] == "pearson"
    assert found["best_epoch"] == scores.index(max(scores)) + 1
    assert trainer.evaluate()["eval_similarity_pearson"] == pytest.approx(max(scores), abs=1e-6)


def test_the_best_epoch_by_loss_and_patience(tiny_encoder: str, tmp_path: Path) -> None:
    """Epochs whose losses are made up; the metric would choose another one."""
    setup = Setup(tiny_encoder, "sentiment")
    states: list[dict[str, torch.Tensor]] = []
    losses = iter([0.9, 0.4, 0.6, 0.5, 0.1])
    trainer_class = fitting.MultiTaskTrainer
    evaluate = trainer_class.evaluate

    def made_up(self: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        states.append({name: value.clone() for name, value in setup.model.heads.state_dict().items()})
        return {**evaluate(self, *args, **kwargs), "eval_loss": next(losses)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_class, "evaluate", made_up)
        trainer = setup.train(tmp_path, epochs=5, select="loss", patience=2)
    found = fitting.summary(trainer, setup.data[0])
    assert (found["best_epoch"], len(found["dev_history"])) == (2, 4)  # two epochs without a better one
    assert trainer.state.global_step == 4 * 5
    kept = setup.model.heads.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in kept.items())
    assert not all(torch.equal(value, states[3][name]) for name, value in kept.items())


def test_a_loss_that_is_no_number_stops_the_run(tiny_encoder: str, tmp_path: Path) -> None:
    setup = Setup(tiny_encoder, "similarity")
    setup.data[0].train.labels[:] = np.inf
    setup.model.head("similarity").linear.bias.data.fill_(1.0)  # type: ignore[union-attr]
    with pytest.raises(
        DivergedError, match=r"task 'similarity': the loss is (inf|nan) in step 1: lower learning_rate"
    ):
        setup.train(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_joint_training_moves_the_base_and_all_tasks(tiny_encoder: str, tmp_path: Path) -> None:
    setup = Setup(tiny_encoder, "sentiment", "similarity")
    setup.model.prepare_training(base=True)
    before = {name: value.clone() for name, value in setup.model.state_dict().items()}
    trainer = setup.train(tmp_path, epochs=3, learning_rate=1e-3, sampling="annealed")
    assert trainer.state.global_step == sum(trainer.draws().values()) == 3 * 10
    assert min(trainer.draws().values()) > 5
    moved = {name for name, value in setup.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in before.items() if "pooler" not in name and value.is_floating_point()}


def test_the_same_seed_gives_the_same_weights(tiny_encoder: str, tmp_path: Path) -> None:
    states = []
    for seed in (1, 1, 2):
        setup = Setup(tiny_encoder, "sentiment")
        setup.train(tmp_path, seed=seed, max_steps=3)
        states.append(setup.model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_a_head_on_a_base_that_runs_once_a_row(
    tiny_encoder: str, tmp_path: Path, pooling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tiny_encoder, "entailment")
    setup.model.remove("entailment")
    setup.data[0].task.pooling = pooling
    setup.model.add("entailment", setup.data[0].task.head_config())
    setup.model.prepare_training()
    rows: list[int] = []
    forward = type(setup.base).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch, fitting.frozen(setup.base, pooling):
        patch.setattr(type(setup.base), "forward", spy)
        trainer = setup.train(tmp_path, epochs=3)
        stored = fitting.predict(trainer, setup.data[0])["validation"]
    assert sum(rows) <= 72 + 8 + 15  # templates repeat some
    np.testing.assert_allclose(stored, fitting.predict(trainer, setup.data[0])["validation"], atol=1e-5)


def test_scores_and_what_needs_no_input(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder, "sentiment", "similarity")
    first, second = setup.data
    truth = first.test["validation"].labels
    common = int(np.bincount(first.train.labels).argmax())
    assert fitting.trivial(first)["validation"]["accuracy"] == pytest.approx(float((truth == common).mean()))
    assert fitting.trivial(second)["validation"] == {"pearson": 0.0, "spearman": 0.0}
    right = {"validation": np.eye(2)[truth]}
    assert fitting.score(first, right) == {"validation": {"accuracy": 1.0}}


def test_heads_in_files(tiny_encoder: str, tmp_path: Path) -> None:
    one, two = Setup(tiny_encoder, "sentiment").model, Setup(tiny_encoder, "sentiment").model
    torch.nn.init.normal_(one.head("sentiment").linear.weight)  # type: ignore[union-attr]
    fitting.save_head(one, "sentiment", tmp_path / "sentiment")
    fitting.load_head(two, "sentiment", tmp_path / "sentiment")
    for name, value in one.heads.state_dict().items():
        assert torch.equal(value, two.heads.state_dict()[name])


@pytest.mark.skipif("adapters" not in INSTALLED, reason="needs adapters")
@pytest.mark.parametrize("size", [1, 5, 7, 10, 12, 24])
def test_houlsby_has_the_width_that_was_asked_for(tiny_encoder: str, size: int) -> None:
    given = {"method": "houlsby", "host": "adapters", "hidden_size": size, "joint": False, "seed": 0}
    task = Task.from_spec(*load_toy_task("sentiment", train_size=8, test_size=4))
    _, sizes = methods.build(argparse.Namespace(**given), AutoModel.from_pretrained(tiny_encoder), [task])
    # Two layers with two bottlenecks each: d -> size -> d, with biases.
    assert sizes == {"sentiment": 2 * 2 * (2 * 24 * size + size + 24)}


def test_what_was_saved_is_a_model_of_its_own(tiny_encoder: str, tmp_path: Path) -> None:
    """The folder of a joint run gives the logits of its scores again."""
    _, splits = load_toy_task("entailment", train_size=40, test_size=15)
    folder = tmp_path / "data" / "rte"
    folder.mkdir(parents=True)
    names = {"premise": "sentence1", "hypothesis": "sentence2"}
    for split, rows in splits.items():
        lines = [json.dumps(row) + "\n" for row in rows.rename_columns(names).to_list()]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    given = ["--data_dir", str(tmp_path / "data"), "--tasks", "rte", "--model", tiny_encoder, "--joint"]
    given += ["--method", "pal", "--hidden_size", "12", "--output_dir", str(tmp_path / "out"), "--max_steps", "3"]
    assert main(["train", *given, "--learning_rate", "0.01"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    model = TaskHeads.from_pretrained(tmp_path / "out" / "adapters")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    data = fitting.encode(Task.named("rte", tmp_path / "data"), tokenizer, 128, seed=42)
    trainer = fitting.make_trainer(model, [data], tokenizer, str(tmp_path / "unused"), use_cpu=True)
    assert fitting.score(data, fitting.predict(trainer, data)) == results["tasks"]["rte"]["metrics"]
