"""Requests of every kind in one call: values, order, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import REQUESTS, made, plain_logits, saved
from backbones import HOSTS
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Predictor, RequestError, TaskDescription


@pytest.mark.parametrize("host", HOSTS)
def test_values_of_every_kind_in_one_call(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, host, tmp_path)
    model, _ = made(tiny_encoder, host)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    found = predictor(REQUESTS, arrays=True)
    assert [one.task for one in found] == [request["task"] for request in REQUESTS]
    for request, one in zip(REQUESTS, found, strict=True):
        logits = plain_logits(model, tokenizer, request)
        answer: Any = one
        json.dumps(one.to_dict())
        if request["task"] == "rte":
            shares = logits.softmax(-1)
            assert answer.label == f"LABEL_{int(shares.argmax())}"
            assert answer.score == pytest.approx(float(shares.max()), abs=1e-5)
            assert list(answer.scores.values()) == pytest.approx(shares.tolist(), abs=1e-5)
        elif request["task"] == "stsb":
            assert answer.value == pytest.approx(float(logits), abs=1e-5)
        elif request["task"] == "copa":
            shares = logits.softmax(-1)
            choice = ("second", "third")[int(shares.argmax())]
            assert (answer.choice, answer.text) == (choice, request[choice])
            assert list(answer.scores.values()) == pytest.approx(shares.tolist(), abs=1e-5)
        elif request["task"] == "topics":
            shares = logits.sigmoid()
            assert answer.array.tolist() == pytest.approx(shares.tolist(), abs=1e-5)
            assert set(answer.labels) == {f"LABEL_{n}" for n, share in enumerate(shares) if share >= 0.5}
            assert list(answer.labels) == sorted(answer.labels, key=lambda label: -answer.scores[label])
        elif request["task"] == "ner":
            words = tokenizer(request["tokens"], is_split_into_words=True).word_ids()
            places = [words.index(number) for number in range(len(request["tokens"]))]
            shares = logits[places].softmax(-1)
            assert list(answer.labels) == [("O", "B-X", "I-X")[n] for n in shares.argmax(-1)]
            torch.testing.assert_close(torch.tensor(answer.array).float(), shares, atol=1e-5, rtol=0)
            for entity in answer.entities:
                assert answer.text[entity.start : entity.end] == entity.text
        else:
            encoded = tokenizer(request["question"], request["context"], return_offsets_mapping=True)
            inside = [n for n, part in enumerate(encoded.sequence_ids()) if part == 1]
            spans = {(a, b): float(logits[a, 0] + logits[b, 1]) for a in inside for b in inside if a <= b < a + 30}
            first, last = max(spans, key=lambda span: spans[span])
            offsets = encoded["offset_mapping"]
            assert (answer.start, answer.end) == (offsets[first][0], offsets[last][1])
            assert answer.answer == request["context"][answer.start : answer.end]
            starts, ends = logits.softmax(0).T
            assert answer.score == pytest.approx(float(starts[first] * ends[last]), abs=1e-5)


@pytest.mark.parametrize("host", HOSTS)
def test_mixed_calls_equal_single_ones(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, host, tmp_path)
    together = predictor(REQUESTS, arrays=True)
    small = saved(tiny_encoder, host, tmp_path / "small", max_tokens_per_batch=30)(REQUESTS, arrays=True)
    for number, request in enumerate(REQUESTS):
        alone = predictor(request, arrays=True)
        for other in (together[number], small[number]):
            torch.testing.assert_close(torch.tensor(other.array), torch.tensor(alone.array), atol=1e-5, rtol=0)


def test_forms_of_requests(tiny_encoder: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, "none", tmp_path)
    pair = {"first": "the is", "second": "not all"}
    alone: Any = predictor({"task": "rte", **pair})
    assert predictor(pair, task="rte") == alone
    twice: Any = predictor([pair, pair], task="rte")
    assert [one.score for one in twice] == pytest.approx([alone.score] * 2)
    assert [one.task for one in predictor(pair, task=["topics", "rte", "stsb"])] == ["topics", "rte", "stsb"]
    tagged: Any = predictor("the is, not", task="ner")
    assert tagged.words == ("the", "is", ",", "not")
    both: Any = predictor(["the", "is"], task="ner")
    assert [one.words for one in both] == [("the",), ("is",)]
    assert predictor([]) == []
    assert alone.array is None
    empty: Any = predictor({"task": "ner", "tokens": []})
    assert (empty.words, empty.entities) == ((), ())


@pytest.mark.parametrize(
    ("request_", "task", "match"),
    [
        ({"task": "none"}, "none", "there is no task 'none': use one of 'rte'"),
        ({"first": "a"}, None, "there is no 'task'"),
        ("a text", None, "'a text' is not a request"),
        ({"task": "rte", "first": "a"}, "rte", "there is no column 'second': the task needs 'first', 'second'"),
        ({"task": "rte", "first": "a", "second": 3}, "rte", "column 'second' holds 3, not a text"),
        ({"task": "rte", "first": "a", "second": None}, "rte", "column 'second' holds None, not a text"),
        ({"task": "rte", "first": "a", "second": "b", "label": 1}, "rte", "the column 'label' is unknown"),
        ({"task": "ner", "tokens": ["a", 3]}, "ner", "not a text or a list of words"),
        ({"task": "ner", "tokens": ["a"], "text": "a"}, "ner", "pass one of them"),
        ({"task": "qa", "question": "a " * 70, "context": "b " * 70}, "qa", "the question has 70 tokens"),
    ],
)
def test_wrong_requests(
    tiny_encoder: str, tmp_path: Path, monkeypatch: Any, request_: Any, task: Any, match: str
) -> None:
    predictor = saved(tiny_encoder, "none", tmp_path)
    monkeypatch.setattr(torch.nn.Linear, "forward", None)  # nothing runs
    for ask in (lambda: predictor.check(request_), lambda: predictor([REQUESTS[0], request_])):
        with pytest.raises(RequestError, match=match) as caught:
            ask()
        assert caught.value.task == task
    assert caught.value.index == 1
    predictor.check(REQUESTS[0])


def test_the_description_of_a_task(tiny_encoder: str, tmp_path: Path) -> None:
    predictor = saved(tiny_encoder, "none", tmp_path)
    assert list(predictor.tasks) == ["rte", "stsb", "copa", "ner", "qa", "topics"]
    stored = json.loads(json.dumps(predictor.tasks["ner"].to_dict()))
    assert stored == {
        "name": "ner",
        "kind": "token_tagging",
        "text_columns": ["tokens"],
        "label_names": ["O", "B-X", "I-X"],
        "max_length": 64,
        "template": "columns",
        "unanswerable": False,
        "thresholds": [],
        "metric": "f1",
        "score": None,
    }
    assert TaskDescription.from_dict(stored) == predictor.tasks["ner"]


def test_wrong_arguments(tiny_encoder: str) -> None:
    model, tasks = made(tiny_encoder, "none")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with pytest.raises(ConfigError, match="the model does not say how its tasks are encoded: pass tasks="):
        Predictor(model, tokenizer)
    with pytest.raises(ConfigError, match="max_tokens_per_batch=0"):
        Predictor(model, tokenizer, tasks, max_tokens_per_batch=0)
    with pytest.raises(ConfigError, match="processing_class needs to be a tokenizer"):
        Predictor(model, None, tasks)
    with pytest.raises(ConfigError, match=r"two tasks are called 'rte'"):
        Predictor(model, tokenizer, [*tasks, tasks[0]])
    model.remove("rte")
    with pytest.raises(ConfigError, match="'rte', which is not on the model: 'stsb'"):
        Predictor(model, tokenizer, tasks)
