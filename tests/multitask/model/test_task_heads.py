"""Heads of every kind on one base: values, gradients, losses, saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from backbones import HOSTS, TASKS, backbone, randomise
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

import pal_adapters
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads
from pal_adapters.multitask.model import saving
from pal_adapters.multitask.model.heads import pool
from pal_adapters.multitask.model.saving import copy_saved
from tests.processes import python

CONFIGS = {
    "rte": HeadConfig("single_label", 2),
    "stsb": HeadConfig("regression", pooling="first"),
    "copa": HeadConfig("multiple_choice", num_choices=2, pooling="last"),
    "ner": HeadConfig("token_tagging", 5),
    "qa": HeadConfig("span_qa"),
    "topics": HeadConfig("multi_label", 3, pooling="pooler"),
}
RESERVED = ("train", "training", "type", "keys", "values", "items", "pop", "_modules", "average")
# A choice is a row of its own, next to the other.
ROWS = ["ner", "rte", "copa", "copa", "stsb", "topics", "rte", "qa", "ner", "copa", "copa", "stsb"]


def heads(folder: str, host: str, **options: Any) -> TaskHeads:
    model = TaskHeads(backbone(folder, host), **options)
    torch.manual_seed(3)
    for task in TASKS:
        model.add(task, CONFIGS[task])
    return model.eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(4, 60, (len(ROWS), 7), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(len(ROWS)):
        mask[row, 7 - row % 4 :] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


@pytest.fixture
def labels() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tags = torch.randint(0, 5, (2, 7), generator=generator)
    tags[0, :3] = -100
    return {
        "rte": torch.tensor([1, 0]),
        "stsb": torch.tensor([3.8, 0.6]),
        "copa": torch.tensor([1, 0]),
        "ner": tags,
        "qa": torch.tensor([[1, 3]]),
        "topics": torch.tensor([[1.0, 0.0, 1.0]]),
    }


def rows_of(batch: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    at = [row for row, name in enumerate(ROWS) if name == task]
    return {name: tensor[at] for name, tensor in batch.items()}


def gradients(model: TaskHeads) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


@pytest.mark.parametrize("host", HOSTS)
def test_mixed_batch_equals_one_batch_a_task(
    tiny_encoder: str, host: str, batch: dict[str, Tensor], labels: dict[str, Tensor]
) -> None:
    model = heads(tiny_encoder, host)
    trained = model.prepare_training()
    output = model(task_ids=ROWS, labels=labels, **batch)
    output.loss.backward()
    mixed = gradients(model)
    model.zero_grad()
    assert list(output.logits) == list(TASKS)
    losses = []
    for task in TASKS:
        one = model(task_ids=task, labels=labels[task], **rows_of(batch, task))
        torch.testing.assert_close(output.logits[task], one.logits[task], atol=1e-5, rtol=1e-4)
        losses.append(one.loss)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    (sum(losses) / len(losses)).backward()
    alone = gradients(model)
    assert set(mixed) == set(alone)
    assert {name.split(".")[1] for name in mixed if name.startswith("heads.")} == set(TASKS)
    assert set(mixed) <= set(trained)
    if host != "none":
        assert any("query" in name for name in mixed)
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, alone[name], atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("host", HOSTS)
def test_each_row_goes_through_its_own_adapter(tiny_encoder: str, host: str, batch: dict[str, Tensor]) -> None:
    model = heads(tiny_encoder, host)
    inner = model.backbone
    if host == "none":
        hidden = inner(**batch).last_hidden_state
    else:
        activate = inner.set_active_adapters if host == "adapters" else inner.set_adapter
        parts = []
        for row, task in enumerate(ROWS):
            activate(task)
            parts.append(inner(**{n: t[row : row + 1] for n, t in batch.items()}).last_hidden_state)
        hidden = torch.cat(parts)
    at = [row for row, name in enumerate(ROWS) if name == "rte"]
    mask = batch["attention_mask"][at].unsqueeze(-1).float()
    linear = model.head("rte").linear
    assert linear is not None
    expected = ((hidden[at] * mask).sum(1) / mask.sum(1)) @ linear.weight.T + linear.bias
    got = model(task_ids=ROWS, **batch).logits["rte"]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    if host != "none":  # the adapters differ, so rows of the wrong one would show
        activate("stsb")
        other = inner(**{n: t[at] for n, t in batch.items()}).last_hidden_state
        assert not torch.allclose(other, hidden[at], atol=1e-3)


def test_losses_of_each_kind(tiny_encoder: str, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    model = heads(tiny_encoder, "none")
    output = model(task_ids=ROWS, labels=labels, **batch)
    logits = output.logits
    spans = logits["qa"]
    expected = {
        "rte": F.cross_entropy(logits["rte"], labels["rte"]),
        "stsb": ((logits["stsb"] - labels["stsb"]) ** 2).mean(),
        "copa": F.cross_entropy(logits["copa"], labels["copa"]),
        "ner": F.cross_entropy(logits["ner"].view(-1, 5), labels["ner"].view(-1)),
        "qa": (F.cross_entropy(spans[..., 0], labels["qa"][:, 0]) + F.cross_entropy(spans[..., 1], labels["qa"][:, 1]))
        / 2,
        "topics": F.binary_cross_entropy_with_logits(logits["topics"], labels["topics"]),
    }
    assert output.task_counts.tolist() == [2, 2, 2, float((labels["ner"] != -100).sum()), 1, 1]
    torch.testing.assert_close(output.task_losses / output.task_counts, torch.stack([expected[t] for t in TASKS]))
    torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).mean())


def test_weights_and_balance(tiny_encoder: str, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    some = {n: t[[1, 4, 6]] for n, t in batch.items()}
    names, given = ["rte", "stsb", "rte"], {"rte": labels["rte"], "stsb": labels["stsb"][:1]}
    losses: dict[str, float] = {}
    for balance, weight in (("task", 1.0), ("task", 3.0), ("row", 1.0), ("row", 3.0)):
        model = TaskHeads(backbone(tiny_encoder, "none"), balance=balance)  # type: ignore[arg-type]
        torch.manual_seed(3)
        model.add("rte", CONFIGS["rte"])
        model.add("stsb", CONFIGS["stsb"], weight=weight)
        output = model.eval()(task_ids=names, labels=given, **some)
        rte, stsb = (output.task_losses / output.task_counts).tolist()
        rows = (1, 1) if balance == "task" else (2, 1)
        losses[f"{balance}{weight}"] = output.loss.item()
        assert output.loss.item() == pytest.approx((rows[0] * rte + weight * rows[1] * stsb) / sum(rows), rel=1e-5)
        # A task that is alone in a batch has its weight too.
        alone = model(task_ids="stsb", labels=given["stsb"], **{n: t[1:2] for n, t in some.items()})
        assert alone.loss.item() == pytest.approx(weight * stsb, rel=1e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == 4


def test_padding_is_in_no_span(tiny_encoder: str, batch: dict[str, Tensor]) -> None:
    model = heads(tiny_encoder, "none").eval()
    row = {name: tensor[3:4] for name, tensor in batch.items()}  # 4 of 7 tokens
    short = {name: tensor[:, :4] for name, tensor in row.items()}
    gradient = []
    for one in (row, short):
        model.zero_grad()
        output = model(task_ids="qa", labels=torch.tensor([[1, 3]]), **one)
        output.loss.backward()
        gradient.append((output.loss.detach(), *(p.grad.clone() for p in model.head("qa").parameters())))
    for padded, plain in zip(*gradient, strict=True):
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-5)
    assert (model(task_ids="qa", **row).logits["qa"].argmax(1) < 4).all()


def test_a_pooler_that_the_checkpoint_lacks_is_kept(
    tiny_encoder: str, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    saved = AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False)
    saved.save_pretrained(tmp_path / "base")
    model = TaskHeads(AutoModel.from_pretrained(tmp_path / "base"))
    model.add("topics", CONFIGS["topics"])
    model.eval().prepare_training()
    expected = model(task_ids="topics", **batch).logits["topics"]
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "checkpoint", checkpoint=True)
    copy_saved(tmp_path / "checkpoint", tmp_path / "uploaded")
    for folder in ("out", "checkpoint", "uploaded"):
        torch.testing.assert_close(
            TaskHeads.from_pretrained(tmp_path / folder)(task_ids="topics", **batch).logits["topics"], expected
        )
    other = TaskHeads(AutoModel.from_pretrained(tmp_path / "base"))
    other.add("topics", CONFIGS["topics"])
    assert not torch.allclose(other.eval()(task_ids="topics", **batch).logits["topics"], expected, atol=1e-3)
    other.restore(tmp_path / "checkpoint")
    torch.testing.assert_close(other(task_ids="topics", **batch).logits["topics"], expected)


def test_a_folder_is_written_whole_or_stays_as_it_was(
    tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = heads(tiny_encoder, HOSTS[-1])
    model.save_pretrained(tmp_path / "saved")
    before = {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)

    def full(*_: Any) -> None:
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(saving, "write_readable_json", full)
    for place in ("saved", "new/folder"):
        with pytest.raises(StorageError, match=r"cannot be written \(no space left on device\)"):
            model.save_pretrained(tmp_path / place)
    assert {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_process_that_is_killed_while_files_are_moved(
    tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pal_adapters.multitask.model import files

    model = heads(tiny_encoder, "none")
    model.save_pretrained(tmp_path)
    assert TaskHeads.from_pretrained(tmp_path).tasks == model.tasks

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="or not completely"):
        TaskHeads.from_pretrained(tmp_path)


def test_own_loss(tiny_encoder: str, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    model = TaskHeads(backbone(tiny_encoder, "none"))
    model.add("stsb", CONFIGS["stsb"], loss=lambda logits, labels: (logits - labels).abs().mean())
    output = model.eval()(task_ids="stsb", labels=labels["stsb"], **rows_of(batch, "stsb"))
    torch.testing.assert_close(output.loss, (output.logits["stsb"] - labels["stsb"]).abs().mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_with_padding_on_either_side(side: str) -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]])
    if side == "right":
        mask = mask.flip(1)
    for row in range(2):
        tokens = hidden[row, mask[row].bool()]
        assert pool(hidden, mask, "mean")[row].tolist() == pytest.approx(tokens.mean(0).tolist())
        assert pool(hidden, mask, "first")[row].tolist() == tokens[0].tolist()
        assert pool(hidden, mask, "last")[row].tolist() == tokens[-1].tolist()
    assert pool(hidden, None, "last").tolist() == hidden[:, -1].tolist()


def test_language_model_uses_the_embeddings() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    whole = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
    model = TaskHeads(whole.transformer)
    model.add("text", HeadConfig("language_modeling"))
    model.eval()
    tokens = torch.randint(0, 30, (2, 6))
    labels = tokens.clone()
    labels[0, 4:] = -100
    expected = whole(input_ids=tokens, labels=labels)
    output = model(task_ids="text", labels=labels, input_ids=tokens)
    torch.testing.assert_close(output.logits["text"], expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)
    assert sum(p.numel() for p in model.heads.parameters()) == 0


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_tasks_by_number(tiny_encoder: str, batch: dict[str, Tensor], form: Any) -> None:
    model = heads(tiny_encoder, HOSTS[-1])
    expected = model(task_ids=ROWS, **batch).logits
    got = model(task_ids=form([TASKS.index(name) for name in ROWS]), **batch).logits
    for task in TASKS:
        torch.testing.assert_close(got[task], expected[task], atol=0, rtol=0)


def test_adding_reusing_and_removing(tiny_encoder: str, batch: dict[str, Tensor]) -> None:
    model = heads(tiny_encoder, "none")
    model.add("scitail", "rte", adapter=None)
    assert model.head("scitail") is model.head("rte")
    rows = rows_of(batch, "rte")
    torch.testing.assert_close(
        model(task_ids="scitail", **rows).logits["scitail"], model(task_ids="rte", **rows).logits["rte"]
    )
    model.remove("rte")
    assert "rte" in model.heads
    assert "rte" not in model.tasks
    with pytest.raises(ConfigError, match="a head 'rte' is there already"):
        model.add("rte", HeadConfig("single_label", 4))
    model.remove("scitail")
    assert "rte" not in model.heads
    model.add("rte", HeadConfig("single_label", 4))
    assert model.eval()(task_ids="rte", **rows).logits["rte"].shape == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("rte", HeadConfig("regression")), ConfigError, "task='rte' is there already"),
        (("a.b", HeadConfig("regression")), ConfigError, "without '.', '/' and"),
        *[((name, HeadConfig("regression")), ConfigError, f"task='{name}' is not allowed") for name in RESERVED],
        (("keys", "rte"), ConfigError, "Use another name, such as 'keys_task'"),
        (("new", "nli"), ConfigError, "head='nli' is not there: rte, stsb"),
        (
            ("new", HeadConfig("regression"), {"adapter": "nli"}),
            UnknownAdapterError,
            "adapter='nli' is not on the model",
        ),
        (("new", HeadConfig("regression"), {"weight": 0.0}), ConfigError, "weight=0.0"),
        (("new", "rte", {"loss": F.mse_loss}), ConfigError, "loss has no effect"),
    ],
)
def test_tasks_that_cannot_be_added(tiny_encoder: str, arguments: Any, error: Any, message: str) -> None:
    model = heads(tiny_encoder, "none")
    before = list(model.state_dict())
    *given, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=message):
        model.add(*given, **options)
    assert list(model.state_dict()) == before
    assert model.tasks == TASKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "classification"}, "kind='classification' is not allowed: use one of 'single_label'"),
        ({"kind": "single_label"}, "num_labels=None"),
        ({"kind": "single_label", "num_labels": 1}, "num_labels=1"),
        ({"kind": "span_qa", "num_labels": 2}, "num_labels=2 has no effect"),
        ({"kind": "multiple_choice"}, "num_choices=1"),
        ({"kind": "regression", "num_choices": 2}, "num_choices=2 has no effect"),
        ({"kind": "regression", "pooling": "max"}, "pooling='max'"),
        ({"kind": "regression", "dropout": 1.0}, "dropout=1.0"),
        ({"num_labels": 3, "label_names": ("no", "yes")}, "label_names has 2 names for num_labels=3"),
        ({"label_names": "ab"}, "label_names='ab' is not allowed: use a list of strings"),
        ({"label_names": {"a": 1, "b": 2}}, "label_names={'a': 1, 'b': 2} is not allowed"),
        ({"label_names": None, "num_labels": 2}, "label_names=None is not allowed"),
        ({"num_labels": 2, "num_choices": True}, "num_choices=True has no effect"),
        ({"kind": "multiple_choice", "num_choices": 10**9}, "num_choices=1000000000 is not allowed"),
        ({"kind": "multiple_choice", "num_choices": 3, "label_names": "ab"}, "label_names='ab' is not allowed"),
        (
            {"kind": "multiple_choice", "num_choices": 3, "label_names": ("a", "b")},
            "label_names has 2 names for num_choices=3",
        ),
        ({"kind": "span_qa", "label_names": ("a",)}, "label_names=.* has no effect for kind='span_qa'"),
        ({"kind": "language_modeling", "label_names": ("a",)}, "label_names=.* has no effect"),
        *(
            (
                {"kind": kind, "num_labels": labels, "pooling": "first"},
                f"pooling='first' has no effect for kind='{kind}'",
            )
            for kind, labels in (("token_tagging", 3), ("span_qa", None), ("language_modeling", None))
        ),
    ],
)
def test_heads_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HeadConfig(**arguments)


def test_batches_that_do_not_fit(tiny_encoder: str, batch: dict[str, Tensor], labels: dict[str, Tensor]) -> None:
    model = heads(tiny_encoder, "none")
    with pytest.raises(UnknownAdapterError, match="task 'nli' is not there"):
        model(task_ids=["nli"] * 12, **batch)
    with pytest.raises(UnknownAdapterError, match="task 6 is not there"):
        model(task_ids=[6] * 12, **batch)
    with pytest.raises(ConfigError, match="task_ids has 3 entries for 12 examples"):
        model(task_ids=ROWS[:3], **batch)
    with pytest.raises(ConfigError, match="labels are for"):
        model(task_ids=ROWS, labels={"rte": labels["rte"]}, **batch)
    with pytest.raises(ConfigError, match="labels is one tensor"):
        model(task_ids=ROWS, labels=labels["rte"], **batch)


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "none"])
def test_which_adapter_a_task_gets(tiny_encoder: str, host: str) -> None:
    model = TaskHeads(backbone(tiny_encoder, host, ("rte",)))
    model.add("stsb", CONFIGS["stsb"])  # the only one
    assert model.routes["stsb"].adapter == "rte"
    model = TaskHeads(backbone(tiny_encoder, host, ("rte", "ner")))
    with pytest.raises(ConfigError, match="task 'RTE' has no adapter of its name among 'rte', 'ner': pass adapter="):
        model.add("RTE", CONFIGS["rte"])
    assert not model.tasks
    assert not model.heads
    model.add("RTE", CONFIGS["rte"], adapter="rte")
    model.add("stsb", CONFIGS["stsb"], adapter=None)
    assert [route.adapter for route in model.routes.values()] == ["rte", None]


@pytest.mark.parametrize("host", HOSTS)
def test_only_what_is_asked_for_trains(tiny_encoder: str, host: str) -> None:
    model = heads(tiny_encoder, host)
    base = {n for n, p in model.named_parameters() if not n.startswith("heads.") and "pal" not in n}
    base -= {n for n in base if "shared_parameters" in n}
    names = set(model.prepare_training(["rte", "ner"]))
    assert {n for n in names if n.startswith("heads.")} == {
        f"heads.{t}.linear.{p}" for t in ("rte", "ner") for p in ("weight", "bias")
    }
    assert not names & base
    assert (names == {n for n in names if n.startswith("heads.")}) is (host == "none")
    joint = set(model.prepare_training(base=True))
    assert base <= joint
    counts = model.count_parameters()
    assert counts["trainable"] == counts["base"] + counts["adapters"] + counts["heads"]
    assert (counts["adapters"] > 0) is (host != "none")


def test_saved_and_read_in_a_new_process(tiny_encoder: str, batch: dict[str, Tensor], tmp_path: Path) -> None:
    cases = [(host, joint) for host in HOSTS for joint in (False, True)]
    expected = []
    for number, (host, joint) in enumerate(cases):
        model = heads(tiny_encoder, host)
        model.add("again", "rte", adapter=None, weight=0.5)
        model.prepare_training(base=joint)
        if joint:
            with torch.no_grad():
                for parameter in model.backbone.parameters():
                    parameter.add_(0.01)
        expected.append(model(task_ids=ROWS, **batch).logits)
        model.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "base.model").is_dir() is joint
    torch.save({"batch": batch, "logits": expected}, tmp_path / "expected.pt")
    code = f"""
import torch, pal_adapters
from pal_adapters.multitask import TaskHeads
stored = torch.load({str(tmp_path / "expected.pt")!r})
for number, expected in enumerate(stored["logits"]):
    model = TaskHeads.from_pretrained({str(tmp_path)!r} + f"/{{number}}")
    logits = model(task_ids={ROWS!r}, **stored["batch"]).logits
    print(max(float((logits[t] - expected[t]).abs().max()) for t in logits), len(logits), *model.tasks, model.routes)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split(" ", 8) for line in done.stdout.strip().splitlines() if line[0].isdigit()]
    assert len(lines) == len(cases)
    for (host, _), (difference, count, *tasks, routes) in zip(cases, lines, strict=True):
        assert (difference, count) == ("0.0", "6")
        assert tasks[:6] == list(TASKS)
        adapter = repr(None if host == "none" else "rte")
        assert f"'rte': Route(head='rte', adapter={adapter}, weight=1.0)" in routes
        assert "'again': Route(head='rte', adapter=None, weight=0.5)" in routes


@pytest.mark.parametrize("host", HOSTS[1:])
def test_other_tensor_files_beside_an_adapter(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    heads(tiny_encoder, host).save_pretrained(tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "rte" / "mine.safetensors")  # without metadata, which is valid
    assert TaskHeads.from_pretrained(tmp_path).tasks == tuple(TASKS)


@pytest.mark.parametrize("host", HOSTS)
def test_goes_back_to_a_checkpoint(tiny_encoder: str, host: str, batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = heads(tiny_encoder, host)
    model.prepare_training(base=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objects = {name: id(value) for name, value in model.named_parameters()}
    model.save_pretrained(tmp_path, checkpoint=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.1)
    model.restore(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert objects == {name: id(value) for name, value in model.named_parameters()}


def test_a_checkpoint_of_another_model_changes_nothing(tiny_encoder: str, tmp_path: Path) -> None:
    saved = heads(tiny_encoder, "none")
    saved.prepare_training()
    saved.save_pretrained(tmp_path / "a", checkpoint=True)
    other = TaskHeads(backbone(tiny_encoder, "none"))
    other.add("rte", HeadConfig("single_label", 3))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(StorageError, match="it is of another model"):
        other.restore(tmp_path / "a")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(StorageError, match=r"task_heads\.json is not there"):
        other.restore(tmp_path)
    description = json.loads((tmp_path / "a" / "task_heads.json").read_text())
    description["base"]["name_or_path"] = ""
    (tmp_path / "a" / "task_heads.json").write_text(json.dumps(description))
    with pytest.raises(StorageError, match="pass backbone="):
        TaskHeads.from_pretrained(tmp_path / "a")
    assert TaskHeads.from_pretrained(tmp_path / "a", backbone(tiny_encoder, "none")).tasks == TASKS


def test_read_from_the_hub(tiny_encoder: str, batch: dict[str, Tensor], tmp_path: Path, monkeypatch: Any) -> None:
    model = heads(tiny_encoder, HOSTS[-1])
    model.save_pretrained(tmp_path / "saved")
    asked = []

    def download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options["revision"], options["token"]))
        if repo_id != "me/many-tasks":
            raise huggingface_hub.errors.LocalEntryNotFoundError("cannot be\nreached")
        return str(tmp_path / "saved")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    read = TaskHeads.from_pretrained("me/many-tasks", revision="v1", token="secret")
    expected, found = (made(task_ids=ROWS, **batch).logits for made in (model, read))
    assert all(torch.equal(found[task], expected[task]) for task in TASKS)
    for name in ("me/another", Path("me/another")):
        with pytest.raises(
            StorageError, match=r"me/another is neither a folder nor a repository .*\(cannot be reached\)"
        ):
            TaskHeads.from_pretrained(name)
    assert asked == [("me/many-tasks", "v1", "secret"), *[("me/another", None, None)] * 2]
    TaskHeads.from_pretrained("saved")
    for argument in ("revision", "token"):
        with pytest.raises(ConfigError, match=f"{argument} has no effect for the folder saved"):
            TaskHeads.from_pretrained("saved", **{argument: "main"})
    assert len(asked) == 3


def test_a_name_that_no_repository_can_have(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is neither a folder nor a repository"):
        TaskHeads.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("host", [h for h in HOSTS if h != "none"])
def test_a_task_without_an_adapter_is_the_base_alone(tiny_encoder: str, batch: dict[str, Tensor], host: str) -> None:
    """Regardless of what was active before."""
    model = heads(tiny_encoder, host)
    model.add("plain", HeadConfig("single_label", 2), adapter=None)
    model.eval()
    rows = rows_of(batch, "rte")
    plain = heads(tiny_encoder, "none")
    plain.add("plain", HeadConfig("single_label", 2))
    plain.eval()
    plain.head("plain").load_state_dict(model.head("plain").state_dict())
    expected = plain(task_ids="plain", **rows).logits["plain"]
    for task in ("rte", "stsb"):
        model(task_ids=task, **rows)
        torch.testing.assert_close(model(task_ids="plain", **rows).logits["plain"], expected)
    adapted = model(task_ids="rte", **rows).logits["rte"]
    model(task_ids="plain", **rows)
    torch.testing.assert_close(model(task_ids="rte", **rows).logits["rte"], adapted, atol=0, rtol=0)


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
def test_a_stack_is_the_adapter_of_a_task(tiny_encoder: str, batch: dict[str, Tensor], tmp_path: Path) -> None:
    from adapters.composition import Stack

    model = heads(tiny_encoder, "adapters")
    for name, setup in (("up", Stack("rte", "stsb")), ("down", Stack("stsb", "rte"))):
        model.add(name, HeadConfig("regression"), adapter=setup)
    model.eval()
    rows = rows_of(batch, "rte")
    mask = rows["attention_mask"].unsqueeze(-1).float()
    found = {}
    for name in ("up", "down"):
        found[name] = model(task_ids=name, **rows).logits[name]
        model.backbone.set_active_adapters(model.routes[name].adapter)
        hidden = model.backbone(**rows).last_hidden_state
        expected = model.head(name)((hidden * mask).sum(1) / mask.sum(1))
        torch.testing.assert_close(found[name].flatten(), expected.flatten())
    model.save_pretrained(tmp_path)
    again = TaskHeads.from_pretrained(tmp_path).eval()
    for name, logits in found.items():
        torch.testing.assert_close(again(task_ids=name, **rows).logits[name], logits, atol=0, rtol=0)


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
def test_compositions_with_arguments_are_refused(tiny_encoder: str) -> None:
    from adapters.composition import Average, Fuse, Split, Stack

    model = heads(tiny_encoder, "adapters")
    names = ("rte", "stsb")
    refused = (
        Stack(Fuse(*names, name="f"), "ner"), Average(*names, weights=[0.9, 0.1]), Split(*names, splits=[3, 4]),
        Stack(Fuse(*names)),
    )  # fmt: skip
    for setup in refused:
        with pytest.raises(UnsupportedError, match="use a name, a Stack of names or a Fuse of names"):
            model.add("new", HeadConfig("regression"), adapter=setup)
    assert model.tasks == TASKS


@pytest.mark.parametrize("host", [h for h in HOSTS if h != "none"])
def test_an_adapter_that_trains_the_base(tiny_encoder: str, host: str) -> None:
    """The base trains in both hosts, or nothing has changed."""
    base = AutoModel.from_pretrained(tiny_encoder)
    if host == "adapters":
        import adapters

        adapters.init(base)
        base.add_adapter("rte", config=pal_adapters.PALConfig(hidden_size=12, train_base=True))
    else:
        import peft

        config = pal_adapters.PALPeftConfig(hidden_size=12, train_base=True)
        base = peft.get_peft_model(base, config, adapter_name="rte")
    model = TaskHeads(base)
    model.add("rte", HeadConfig("regression"))
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="base=False is not allowed with adapter 'rte'"):
        model.prepare_training()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    trained = model.prepare_training(base=True)
    assert any(name.endswith("word_embeddings.weight") for name in trained)
    assert any("pal" in name for name in trained)


@pytest.mark.parametrize("host", HOSTS)
def test_an_adapter_called_base(tiny_encoder: str, batch: dict[str, Tensor], host: str, tmp_path: Path) -> None:
    model = TaskHeads(backbone(tiny_encoder, host, ("first", "base")))
    for task in ("first", "base"):
        model.add(task, CONFIGS["rte"])
    model.prepare_training(base=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = model.eval()(task_ids="base", **batch).logits["base"]
    model.save_pretrained(tmp_path)
    read = TaskHeads.from_pretrained(tmp_path)
    assert torch.equal(read(task_ids="base", **batch).logits["base"], expected)
    if host == "none":  # the layout of folders whose base was called as an adapter may be
        (tmp_path / "base.model").rename(tmp_path / "base")
        read = TaskHeads.from_pretrained(tmp_path)
        assert torch.equal(read(task_ids="base", **batch).logits["base"], expected)


@pytest.mark.parametrize("host", [h for h in HOSTS if h != "none"])
def test_a_host_that_comes_later(tiny_encoder: str, batch: dict[str, Tensor], host: str) -> None:
    import pal_adapters

    model = TaskHeads(AutoModel.from_pretrained(tiny_encoder))
    if host == "adapters":
        import adapters

        adapters.init(model.backbone)
        model.backbone.add_adapter("rte", config=pal_adapters.PALConfig(hidden_size=12))
    else:
        import peft

        config = pal_adapters.PALPeftConfig(task_type="FEATURE_EXTRACTION", hidden_size=12)
        model.backbone = peft.get_peft_model(model.backbone, config, adapter_name="rte")
    randomise(model.backbone)
    torch.manual_seed(3)
    model.add("rte", CONFIGS["rte"])
    before = TaskHeads(model.backbone)
    torch.manual_seed(3)
    before.add("rte", CONFIGS["rte"])
    bare = TaskHeads(AutoModel.from_pretrained(tiny_encoder))
    torch.manual_seed(3)
    bare.add("rte", CONFIGS["rte"])
    found, expected, without = (m.eval()(task_ids="rte", **batch).logits["rte"] for m in (model, before, bare))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, without)


@pytest.mark.parametrize("host", [h for h in HOSTS if h != "none"])
def test_a_task_that_is_added_to_a_trained_network(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    """Only the new task trains, and the others keep their logits, bit for bit."""
    base: Any = AutoModel.from_pretrained(tiny_encoder)
    if host == "adapters":
        import adapters

        adapters.init(base)
        base.add_adapter("net", config=pal_adapters.CAMTLConfig(tasks=["rte", "stsb"], init_weights="bert"))
    else:
        import peft

        config = pal_adapters.CAMTLPeftConfig(tasks=["rte", "stsb"], init_weights=False)
        base = peft.get_peft_model(base, config, adapter_name="net")
    model = TaskHeads(base)
    for task in ("rte", "stsb"):
        model.add(task, CONFIGS[task])
    whole = set(model.prepare_training())
    with pytest.raises(UnknownAdapterError, match=r"call pal_adapters.add_task\(model, 'new', 'net'\) first"):
        model.add("new", CONFIGS["rte"])
    pal_adapters.add_task(model.backbone, "new", "net")
    model.add("new", CONFIGS["rte"])
    inputs: dict[str, Any] = {"input_ids": torch.arange(4, 24).view(4, 5)}
    labels = torch.tensor([0, 1, 1, 0])
    before = {task: model.eval()(task_ids=task, **inputs).logits[task] for task in model.tasks}
    trained = model.prepare_training(["new"])
    assert [name for name in trained if name.startswith("heads.")] == [
        "heads.new.linear.weight",
        "heads.new.linear.bias",
    ]
    (vector,) = [name for name in trained if not name.startswith("heads.")]
    assert model.get_parameter(vector).shape == (model.width,)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(task_ids="new", labels=labels, **inputs).loss.backward()
        optimizer.step()
    after = {task: model.eval()(task_ids=task, **inputs).logits[task] for task in model.tasks}
    assert torch.equal(after["rte"], before["rte"])
    assert torch.equal(after["stsb"], before["stsb"])
    assert not torch.allclose(after["new"], before["new"], atol=1e-3)
    model.save_pretrained(tmp_path, checkpoint=True)
    again = TaskHeads.from_pretrained(tmp_path)
    for task, expected in after.items():
        torch.testing.assert_close(again(task_ids=task, **inputs).logits[task], expected)
    with torch.no_grad():
        model.get_parameter(vector).zero_()
    model.restore(tmp_path)
    assert torch.equal(model(task_ids="new", **inputs).logits["new"], after["new"])
    assert whole < set(model.prepare_training())
    assert whole < set(model.prepare_training(["new"], shared=True)) | {
        f"heads.{t}.linear.{p}" for t in before for p in ("weight", "bias")
    }
    torch.testing.assert_close(model(task_ids="new", **inputs).logits["new"], after["new"])
