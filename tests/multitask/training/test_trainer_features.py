"""What users of `Trainer` expect: precision, checkpointing, early stopping, cards, other hosts' methods."""

from __future__ import annotations

import inspect
import re
import shutil
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from accelerate.utils import AutocastKwargs
from backbones import HOSTS, backbone
from tiny_tasks import NAMES, losses, make_task, make_tasks, make_trainer, without_dropout
from transformers import AutoModel, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from pal_adapters.errors import ConfigError, PalAdaptersError, UnsupportedError
from pal_adapters.multitask import (
    Candidates,
    ConcatTasks,
    EncodedTask,
    MultiTaskBatchSampler,
    MultiTaskCollator,
    TaskHeads,
    UncertaintySelector,
    last_checkpoint,
)
from pal_adapters.multitask.metrics import builtin as scoring
from pal_adapters.multitask.training import checkpoints


@pytest.mark.parametrize("host", HOSTS)
def test_activation_checkpointing_changes_nothing(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    runs = []
    name = "gradient_checkpointing"  # transformers 5 has another name for it
    name = "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else name
    for on in (False, True):
        made = make_trainer(
            tiny_encoder, tmp_path, host=host, mixed_batches=True, base=host != "peft", optim="sgd", **{name: on}
        )
        made.train()
        runs.append((losses(made), [p.detach().clone() for p in made.model.parameters()]))
    # Up to the order in which gradients of what the blocks share are added.
    for left, right in zip(runs[0][0], runs[1][0], strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    for left, right in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_bf16_follows_fp32(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    runs, scored = [], []
    for half in (False, True):  # not the other way round: the environment keeps it in transformers 4
        made = make_trainer(tiny_encoder, tmp_path, host=host, names=tuple(NAMES), mixed_batches=True, bf16=half)
        without_dropout(made).train()
        assert {p.dtype for p in made.model.parameters()} == {torch.float32}
        runs.append(losses(made))
        scored.append({name: value for name, value in made.evaluate().items() if name.endswith("_loss")})
        assert made.predict({"rte": made.tasks["rte"].dataset["validation"]})["rte"].predictions.dtype == np.float32
    assert runs[0] != runs[1]
    for left, right in zip(*runs, strict=True):
        assert left == pytest.approx(right, rel=0.05)
    assert scored[0] != scored[1]
    assert scored[0] == pytest.approx(scored[1], rel=0.05)


@pytest.mark.parametrize("half", [False, True])
def test_scaled_gradients(tiny_encoder: str, tmp_path: Path, half: bool) -> None:
    common: dict[str, Any] = {"host": HOSTS[-1], "mixed_batches": True, "base": True, "gradient_accumulation_steps": 2}
    made = [make_trainer(tiny_encoder, tmp_path, **common, max_grad_norm=0.5) for _ in range(2)]
    without_dropout(made[0]).train()
    # Accelerate makes no scaler on CPU.
    accelerator = without_dropout(made[1]).accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast_handler = AutocastKwargs(enabled=half)
    made[1].train()
    assert accelerator.scaler.get_scale() == 2.0**10
    for left, right in zip(losses(made[0]), losses(made[1]), strict=True):
        assert left == (pytest.approx(right, rel=0.05) if half else right)
    if not half:  # a power of two rounds nothing
        for (name, value), other in zip(made[0].model.named_parameters(), made[1].model.parameters(), strict=True):
            assert torch.equal(value, other), name


def test_deepspeed_rounds_no_labels(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, names=("stsb",))
    made.is_deepspeed_enabled = True  # the host would make floats those of its config
    inputs = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    assert inputs["labels"]["stsb"].dtype == torch.float32
    assert {round(value % 1, 6) for value in inputs["labels"]["stsb"].tolist()} == {0.8}


def test_early_stopping(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(
        tiny_encoder, tmp_path, learning_rate=1e-9, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 3


def test_model_card(tiny_encoder: str, tmp_path: Path) -> None:
    host = HOSTS[-1]
    made = make_trainer(tiny_encoder, tmp_path, host=host, sampling="sqrt", eval_strategy="epoch")
    made.train()
    made.create_model_card(model_name="me/three-tasks", license="mit", tags="glue")
    card = (tmp_path / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    data = yaml.safe_load(head)
    method = {"peft": "pal", "adapters": "pal", "none": None}[host]
    assert {"glue", "pal_adapters", "multi-task", "rte", "stsb", "copa", *filter(None, [method])} == set(data["tags"])
    assert data["license"] == "mit"
    (index,) = data["model-index"]
    entries = {
        (result["dataset"]["name"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert "| copa | multiple_choice | 16 |" in body
    assert "sampling: square_root, one task per batch" in body
    counts = made.model.count_parameters()
    assert f"{counts['trainable']:,} trained" in body
    if host != "none":
        assert "PAL" in body.split("method: ")[1].split("\n")[0]
    scored = next(e for e in reversed(made.state.log_history) if "eval_average" in e)
    assert f"| rte | accuracy | {scored['eval_rte_accuracy']:.4f} |" in body
    assert entries["rte", "accuracy"] == scored["eval_rte_accuracy"]
    assert {name for name, _ in entries} == {"rte", "stsb", "copa"}
    assert "| rte | first, second | columns | 128 tokens | LABEL_0, LABEL_1 | accuracy | " in body
    assert f"| accuracy | {scored['eval_rte_accuracy']:.4f} |\n| stsb |" in body
    assert "- versions: " in body
    assert f"| all | mean of the primary metrics | {scored['eval_average']:.4f} |" in body


@pytest.mark.parametrize("kind", ["single_label", "multiple_choice", "token_tagging"])
def test_usage_in_the_model_card(tiny_encoder: str, tmp_path: Path, kind: str) -> None:
    made = make_trainer(tiny_encoder, tmp_path / "many", host=HOSTS[-1], tasks=[make_task(kind, "rte")])
    made.save_model()
    for name, given in (("many", {}), ("me/given", {"model_name": "me/given"}), ("me/resolved", {"model_name": "x"})):
        made.hub_model_id = "me/resolved" if name == "me/resolved" else None
        made.create_model_card(**given)
        code = (tmp_path / "many" / "README.md").read_text().split("```python\n")[1].split("```")[0]
        assert code.count(f'place = "{name}"\n') == 1
    space: dict[str, Any] = {}
    exec(code.replace("me/resolved", str(tmp_path / "many")), space)
    texts = {
        "single_label": ("...", "..."),
        "multiple_choice": (["...", "..."], ["...", "..."]),
        "token_tagging": (["..."],),
    }[kind]
    words = {"is_split_into_words": True} if kind == "token_tagging" else {}
    inputs = AutoTokenizer.from_pretrained(tiny_encoder)(*texts, return_tensors="pt", **words)
    with torch.no_grad():
        shares = made.model.eval()(task_ids="rte", **inputs).logits["rte"].softmax(-1)
    found = space["prediction"].to_dict()
    if kind == "token_tagging":
        assert found["labels"] == (("O", "B-X", "I-X")[int(shares[0, 1].argmax())],)
    else:
        assert list(found["scores"].values()) == pytest.approx(shares[0].tolist(), abs=1e-5)


class Hub:
    """Stands in for the Hub and keeps uploads in folders."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.uploads: list[Path] = []
        self.error: Exception | None = None
        repository = types.SimpleNamespace(repo_id="me/many-tasks")
        for owner in (huggingface_hub.HfApi, transformers.trainer):
            if hasattr(owner, "upload_folder"):
                monkeypatch.setattr(owner, "upload_folder", lambda *_, **given: self.upload(**given))
                monkeypatch.setattr(owner, "create_repo", lambda *_, **__: repository)

    def upload(self, folder_path: str, ignore_patterns: Any = None, **_: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.uploads.append(self.folder / str(len(self.uploads)))
        shutil.copytree(folder_path, self.uploads[-1], ignore=shutil.ignore_patterns(*ignore_patterns or ()))
        return types.SimpleNamespace(done=lambda: True, result=lambda: None)


@pytest.mark.parametrize("host", HOSTS)
def test_each_checkpoint_is_uploaded(tiny_encoder: str, tmp_path: Path, monkeypatch: Any, host: str) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    names = ("default", "rte")  # PEFT stores the first in the folder itself
    made = make_trainer(
        tiny_encoder,
        tmp_path / "many",
        host=host,
        base=True,
        tasks=[make_task("single_label", name) for name in names],
        save_strategy="steps",
        save_steps=2,
        max_steps=4,
        push_to_hub=True,
        hub_model_id="many-tasks",
    )
    made.train()
    assert len(hub.uploads) == 2
    for step, uploaded in zip((2, 4), hub.uploads, strict=True):
        left, right = (TaskHeads.from_pretrained(p) for p in (tmp_path / "many" / f"checkpoint-{step}", uploaded))
        for (name, value), other in zip(left.named_parameters(), right.parameters(), strict=True):
            assert torch.equal(value, other), name
        assert not (uploaded / "added.safetensors").exists()
        assert not (uploaded / "optimizer.pt").exists()
    for (name, value), other in zip(made.model.named_parameters(), right.parameters(), strict=True):
        assert torch.equal(value, other), name
    made.push_to_hub()
    assert 'place = "me/many-tasks"' in (hub.uploads[-1] / "README.md").read_text()


def test_an_upload_that_fails_or_still_runs(tiny_encoder: str, tmp_path: Path, monkeypatch: Any) -> None:
    hub = Hub(tmp_path / "hub", monkeypatch)
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "push_to_hub": True}
    hub.error = ConnectionError("no route")
    made = make_trainer(tiny_encoder, tmp_path / "many", **given)
    with pytest.raises(PalAdaptersError, match=r"checkpoint-2 cannot be uploaded \(no route\). It is complete"):
        made.train()
    checkpoint = str(tmp_path / "many" / "checkpoint-2")
    assert last_checkpoint(tmp_path / "many") == checkpoint
    hub.error = None
    description = tmp_path / "many" / "task_heads.json"
    for done, always, strategy, copied in (
        (False, False, "every_save", False),
        (False, True, "every_save", True),
        (True, False, "every_save", True),
        (True, False, "end", False),
    ):
        description.unlink(missing_ok=True)
        made.push_in_progress = types.SimpleNamespace(is_done=lambda done=done: done, jobs=[])
        made.args.hub_always_push, made.args.hub_strategy = always, HubStrategy(strategy)
        before = len(hub.uploads)
        made._push_from_checkpoint(checkpoint)
        assert description.exists() is copied
        assert len(hub.uploads) == before + copied


def test_upstream_of_checkpoints() -> None:
    """One per row of the table in `multitask/training/checkpoints.py`."""
    expected = {
        "_save": ["output_dir", "state_dict"],
        "_save_checkpoint": ["model", "trial"],
        "_save_optimizer_and_scheduler": ["output_dir"],
        "_load_optimizer_and_scheduler": ["checkpoint"],
        "_load_rng_state": ["checkpoint"],
        "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
        "_load_best_model": [],
        "_push_from_checkpoint": ["checkpoint_folder"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == parameters, name
    source = inspect.getsource(Trainer._push_from_checkpoint)
    assert "push_in_progress.is_done()" in source
    assert "heads" not in source
    assert "copytree" not in source  # it would do our work
    table = re.findall(r"^\| `Trainer\.(\w+)`", str(checkpoints.__doc__), re.MULTILINE)
    assert table == [*expected, "push_in_progress"]


@pytest.mark.skipif("peft" not in HOSTS, reason="needs PEFT")
def test_methods_of_peft_train_one_task_a_batch(tiny_encoder: str, tmp_path: Path) -> None:
    import peft

    base = AutoModel.from_pretrained(tiny_encoder)
    config = {"task_type": "FEATURE_EXTRACTION", "r": 2, "target_modules": ["query"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name="rte")
    model.add_adapter("stsb", peft.LoraConfig(**config))
    before = {name: value.clone() for name, value in model.named_parameters()}
    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"))
    heads = TaskHeads(model)
    tasks = make_tasks("rte", "stsb")
    for task in tasks:
        heads.add(task.name, task.head_config())
    heads.prepare_training()
    made.args.sampling = "round_robin"
    trainer = type(made)(heads, made.args, tasks, processing_class=AutoTokenizer.from_pretrained(tiny_encoder))
    trainer.train()
    tokens = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="PEFT trains its own methods on one adapter at a time"):
        heads.train()(task_ids=["rte", "stsb"], input_ids=tokens)
    assert set(heads.eval()(task_ids=["rte", "stsb"], input_ids=tokens).logits) == {"rte", "stsb"}
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[-2] for name in moved} == {"rte", "stsb"}
    assert all("lora" in name for name in moved)


class Last:
    """Keeps the last candidates of the first task."""

    def __init__(self) -> None:
        self.seen: list[Candidates] = []

    def select(self, candidates: Candidates) -> list[int]:
        self.seen.append(candidates)
        return candidates.rows["rte"][-candidates.num_select :]


def test_selector_chooses_the_rows_to_train_on(tiny_encoder: str, tmp_path: Path) -> None:
    selector = Last()
    made = make_trainer(
        tiny_encoder, tmp_path, sampling="uncertainty", batch_selector=selector, per_device_train_batch_size=2
    )
    made.train()
    assert len(selector.seen) == 6
    for candidates in selector.seen:
        assert candidates.task_ids == [0, 0, 1, 1, 2, 2]
        assert {task: len(rows) for task, rows in candidates.logits.items()} == {"rte": 2, "stsb": 2, "copa": 2}
        assert candidates.logits["copa"].shape == (2, 2)
        assert not candidates.logits["rte"].requires_grad
    assert all({"step", "loss", "loss_rte"} == set(entry) for entry in losses(made))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_candidates_are_scored_with_dropout_or_without(tiny_encoder: str, tmp_path: Path, mode: Any) -> None:
    made = make_trainer(
        tiny_encoder,
        tmp_path,
        sampling="uncertainty",
        batch_selector=UncertaintySelector(mode=mode),
        per_device_train_batch_size=2,
        max_steps=2,
    )
    seen: list[tuple[bool, bool]] = []
    made.model.register_forward_pre_hook(lambda model, _: seen.append((torch.is_grad_enabled(), model.training)))
    made.train()
    assert seen == [(False, mode == "train"), (True, True)] * 2
    with pytest.raises(ConfigError, match="mode='test' is not allowed"):
        UncertaintySelector(mode="test")  # type: ignore[arg-type]


def test_rows_taken_out_of_a_batch(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tasks = make_tasks()
    encoded = ConcatTasks([EncodedTask(t, t.dataset["train"], tokenizer, 32) for t in tasks])
    collate = MultiTaskCollator(tokenizer, {t.name: t.head_config() for t in tasks})
    rows = next(iter(MultiTaskBatchSampler([len(t) for t in encoded.tasks], 24, mixed=True, seed=3)))
    whole = collate([encoded[row] for row in rows])
    chosen = [11, 3, 17, 0, 20]
    taken = collate.take(whole, chosen)
    expected = collate([encoded[rows[number]] for number in chosen])
    assert taken["task_ids"] == expected["task_ids"]
    length = expected["input_ids"].shape[1]
    assert torch.equal(taken["input_ids"][:, :length], expected["input_ids"])
    assert not taken["attention_mask"][:, length:].any()
    for task, labels in expected["labels"].items():
        got = taken["labels"][task]
        assert torch.equal(got[:, :length] if task == "ner" else got, labels)


def test_padding_on_the_left(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side="left")
    task = make_task("token_tagging", "ner")
    encoded = EncodedTask(task, task.dataset["train"], tokenizer, 32)
    batch = MultiTaskCollator(tokenizer, {"ner": task.head_config()}, pad_to_multiple_of=8)([encoded[0], encoded[1]])
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert torch.equal(
        batch["labels"]["ner"] != -100, (batch["labels"]["ner"] != -100) & batch["attention_mask"].bool()
    )


def test_tags_stand_at_the_first_piece_of_a_word(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    task = make_task("token_tagging", "ner")
    data = task.dataset["train"].select([0]).to_list()
    data[0] |= {"tokens": ["the", "xyz"], "tags": [1, 2]}
    import datasets

    encoded = EncodedTask(task, datasets.Dataset.from_list(data), tokenizer, 32)
    pieces = tokenizer.convert_ids_to_tokens(encoded[0]["inputs"][0]["input_ids"].tolist())
    assert pieces == ["[CLS]", "the", "x", "##y", "##z", "[SEP]"]
    assert encoded[0]["label"].tolist() == [-100, 1, 2, -100, -100, -100]


def test_long_contexts_make_windows_and_answers_come_back(tiny_encoder: str) -> None:
    import datasets

    words = [f"w{i}" for i in range(40)]
    context = " ".join(words)
    rows = datasets.Dataset.from_list(
        [
            {
                "question": "the",
                "context": context,
                "answers": {"text": ["w30 w31"], "answer_start": [context.index("w30")]},
            },
            {"question": "the", "context": "it is", "answers": {"text": [], "answer_start": []}},
        ]
    )
    task = make_task("span_qa", "qa")
    encoded = EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 32)
    assert len(encoded) > len(rows)
    assert encoded.labels is not None
    longest = int(encoded.lengths().max())
    logits = np.full((len(encoded), longest, 2), -5.0)
    for window, (first, last) in enumerate(encoded.labels):
        if first:  # a window that has the answer
            logits[window, first, 0] = logits[window, last, 1] = 5.0
    assert (encoded.labels[:, 0] > 0).any()
    assert encoded.predictions(logits)[0] == "w30 w31"
    assert encoded.score(logits)["exact_match"] >= 0.5


def test_scores_of_tags_and_answers() -> None:
    labels = ("O", "B-PER", "I-PER", "B-LOC")
    found = scoring.score_tags(("f1", "accuracy"), [[1, 2, 0, 3], [0]], [[1, 2, 0, 0], [3]], labels)
    assert found == {"f1": pytest.approx(2 * 1 / (2 + 2)), "accuracy": pytest.approx(3 / 5)}
    assert scoring.entities(["I-PER", "I-PER", "B-PER", "O", "I-LOC"]) == [("PER", 0, 2), ("PER", 2, 3), ("LOC", 4, 5)]
    found = scoring.score_answers(("f1", "exact_match"), ["The cat!", "a dog ran"], [["cat"], ["dog", "the fox"]])
    assert found == {"f1": pytest.approx((1 + 2 / 3) / 2), "exact_match": 0.5}
    sets = scoring.score_label_sets(("f1_micro", "accuracy"), np.array([[1, 0], [1, 1]]), np.array([[1, 0], [0, 1]]))
    assert sets == {"f1_micro": pytest.approx(0.8), "accuracy": 0.5}


@pytest.mark.parametrize("flags", [False, True])
def test_both_forms_of_label_sets(tiny_encoder: str, flags: bool) -> None:
    import datasets

    labels = [[0, 1, 1], [1, 0, 0]] if flags else [[2, 1], [0]]
    rows = datasets.Dataset.from_dict({"first": ["the", "is"], "second": ["it", "in"], "label": labels})
    task = make_task("multi_label", "topics").with_data({"train": rows} if flags else {})
    encoded = EncodedTask(task, rows, AutoTokenizer.from_pretrained(tiny_encoder), 32)
    assert encoded.labels is not None
    assert encoded.labels.tolist() == [[0, 1, 1], [1, 0, 0]]


def test_own_metrics_and_aggregate(tiny_encoder: str, tmp_path: Path) -> None:
    def always_third(predictions: Any, references: Any) -> float:
        return 0.3

    tasks = [
        make_task("single_label", "rte", metrics=(always_third, "accuracy")),
        make_task("regression", "stsb", metrics="mse"),
    ]
    made = make_trainer(tiny_encoder, tmp_path, tasks=tasks, eval_aggregate="sum")
    found = made.evaluate()
    assert found["eval_rte_always_third"] == 0.3
    assert found["eval_average"] == pytest.approx(0.3 - found["eval_stsb_mse"])


def test_aggregates_of_primary_scores(tiny_encoder: str, tmp_path: Path) -> None:
    def fixed(value: float) -> Any:
        return lambda predictions, references: {"score": value}

    def own_mse(predictions: Any, references: Any) -> float:
        return 0.4

    metrics = [fixed(0.1), fixed(0.7), own_mse]
    tasks = [make_task("single_label", f"t{n}", metrics=metric) for n, metric in enumerate(metrics)]
    made = make_trainer(tiny_encoder, tmp_path, tasks=tasks)
    for aggregate, expected in (("mean", 0.4 / 3), ("sum", 0.4), ("min", -0.4), ("max", 0.7), ("median", 0.1)):
        made.args.eval_aggregate = aggregate
        assert made.evaluate()["eval_average"] == pytest.approx(expected)


def test_an_aggregate_of_ones_own(tiny_encoder: str, tmp_path: Path) -> None:
    def mostly_rte(scores: Mapping[str, float]) -> float:
        assert set(scores) == {"rte", "stsb"}
        return 0.9 * scores["rte"] + 0.1 * scores["stsb"]

    made = make_trainer(tiny_encoder, tmp_path, names=("rte", "stsb"), aggregate=mostly_rte)
    found = made.evaluate()
    assert found["eval_average"] == pytest.approx(0.9 * found["eval_rte_accuracy"] + 0.1 * found["eval_stsb_pearson"])
    made.create_model_card()
    assert (
        f"| all | mostly_rte of the primary metrics | {found['eval_average']:.4f} |"
        in (tmp_path / "README.md").read_text()
    )
    with pytest.raises(ConfigError, match="eval_aggregate='min' and aggregate are both given"):
        make_trainer(tiny_encoder, tmp_path, aggregate=mostly_rte, eval_aggregate="min")


def test_best_model_by_a_metric_of_which_less_is_better(tiny_encoder: str, tmp_path: Path) -> None:
    values = iter([0.5, 0.2, 0.9])

    def mse(predictions: Any, references: Any) -> float:
        return next(values)

    made = make_trainer(
        tiny_encoder,
        tmp_path,
        tasks=[make_task("regression", "stsb", metrics=mse)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="stsb_mse",
    )
    made.train()
    assert made.state.best_metric == 0.2
    assert str(made.state.best_model_checkpoint).endswith("checkpoint-4")


def test_predictions_by_task(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path)
    output = made.predict({"rte": made.tasks["rte"].dataset["validation"]})["rte"]
    assert output.predictions.shape == (5, 2)
    share = float((output.predictions.argmax(-1) == output.label_ids).mean())
    assert output.metrics["test_rte_accuracy"] == pytest.approx(share)


def test_language_model_beside_other_tasks(tmp_path: Path, tiny_encoder: str) -> None:
    from transformers import GPT2Config, GPT2Model

    from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    torch.manual_seed(0)
    base = GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32))
    tasks = [make_task("language_modeling", "text"), make_task("single_label", "rte", pooling="last")]
    args = MultiTaskTrainingArguments(
        str(tmp_path),
        max_steps=3,
        mixed_batches=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    made = MultiTaskTrainer(TaskHeads(base), args, tasks, processing_class=tokenizer)
    made.train()
    found = made.evaluate()
    assert found["eval_text_perplexity"] == pytest.approx(np.exp(found["eval_text_loss"]))
    assert found["eval_average"] == pytest.approx((found["eval_rte_accuracy"] - found["eval_text_perplexity"]) / 2)


def test_callbacks_see_the_run(tiny_encoder: str, tmp_path: Path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            seen.append(set(metrics))

    made = make_trainer(tiny_encoder, tmp_path, eval_strategy="steps", eval_steps=6, callbacks=[Watch()])
    made.train()
    assert len(seen) == 1  # not once for each task
    assert {"eval_average", "eval_loss", "eval_rte_accuracy", "eval_copa_loss"} <= seen[0]


def test_weights_saved_by_hand_have_no_second_copy(tiny_encoder: str, tmp_path: Path) -> None:
    made = make_trainer(tiny_encoder, tmp_path, host=HOSTS[-1])
    made.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"task_heads.json", "heads.safetensors", "tokenizer.json"} <= names
    assert "added.safetensors" not in names
    read = TaskHeads.from_pretrained(tmp_path / "final", backbone(tiny_encoder, "none"))
    assert read.tasks == ("rte", "stsb", "copa")
