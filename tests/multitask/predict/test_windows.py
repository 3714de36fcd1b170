"""Texts longer than `max_length`: windows for tagging and questions, truncation for the rest, and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from answers import REQUESTS, made
from tiny_tasks import text
from transformers import AutoTokenizer

from pal_adapters.multitask import EncodedTask, Predictor
from pal_adapters.multitask.predict.batching import batches


def predictor_of(encoder: str, length: int, **given: Any) -> tuple[Predictor, Any, Any]:
    model, tasks = made(encoder, "none")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    described = [task.describe(max_length=length) for task in tasks]
    return Predictor(model, tokenizer, described, **given), model, tokenizer


def test_every_word_of_a_long_text_is_tagged(tiny_encoder: str) -> None:
    """Each word gets the tag of the window, by hand, in which it stands farthest from the edges."""
    predictor, model, tokenizer = predictor_of(tiny_encoder, 12)
    words = text(3, 25).split()
    found: Any = predictor({"task": "ner", "tokens": words}, arrays=True)
    assert len(found.labels) == len(words)
    # Every word is one token: windows hold 10 of them and overlap by 3.
    starts = list(range(0, len(words), 7))
    best: dict[int, tuple[int, list[float]]] = {}
    for start in starts:
        part = words[start : start + 10]
        inputs = tokenizer(part, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            shares = model(task_ids="ner", **inputs).logits["ner"][0].softmax(-1)
        for place in range(len(part)):
            room = min(place + 1, len(part) - place) if place or not start else -1
            if start + place not in best or room > best[start + place][0]:
                best[start + place] = (room, shares[place + 1].tolist())
        if start + 10 >= len(words):
            break
    np.testing.assert_allclose(found.array, [best[n][1] for n in range(len(words))], atol=1e-5)
    short: Any = predictor({"task": "ner", "tokens": words[:5]})
    whole: Any = predictor_of(tiny_encoder, 64)[0]({"task": "ner", "tokens": words[:5]})
    assert short.labels == whole.labels


def test_answers_in_long_contexts_are_those_of_evaluation(tiny_encoder: str) -> None:
    predictor, model, tokenizer = predictor_of(tiny_encoder, 24)
    _, tasks = made(tiny_encoder, "none")
    task = next(task for task in tasks if task.name == "qa")
    rows = [{"question": text(n, 2), "context": text(n + 1, 60), "answers": {"text": [""], "answer_start": [0]}}
            for n in range(3)]  # fmt: skip
    encoded = EncodedTask(task, rows, tokenizer, 24)
    assert len(encoded) > 9
    logits = []
    for number in range(len(encoded)):
        inputs = {name: torch.tensor(value)[None] for name, value in encoded[number]["inputs"][0].items()}
        with torch.no_grad():
            logits.append(model(task_ids="qa", **{k: v.long() for k, v in inputs.items()}).logits["qa"][0].numpy())
    longest = max(map(len, logits))
    padded = np.stack([np.pad(one, ((0, longest - len(one)), (0, 0)), constant_values=-1e9) for one in logits])
    expected = encoded.predictions(padded)
    asked = [{"task": "qa", "question": row["question"], "context": row["context"]} for row in rows]
    found: Any = predictor(asked)
    assert [one.answer for one in found] == expected
    assert [row["context"][one.start : one.end] for row, one in zip(rows, found, strict=True)] == expected


def test_no_answer(tiny_encoder: str) -> None:
    model, tasks = made(tiny_encoder, "none", ("qa",))
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    (task,) = tasks
    without = task.with_data(
        {"train": [{"question": "a", "context": "b", "answers": {"text": [], "answer_start": []}}]}
    )
    request = {"task": "qa", "question": "the", "context": "is not"}
    inputs = tokenizer("the", "is not", return_tensors="pt")
    head = model.head("qa").linear
    assert head is not None
    with torch.no_grad():  # the first token scores highest, as the head is its own hidden state
        first = model.backbone(**inputs).last_hidden_state[0, 0]
        head.weight.copy_(torch.stack([first, first]))
        starts, ends = model(task_ids="qa", **inputs).logits["qa"][0].softmax(0).T
    assert (int(starts.argmax()), int(ends.argmax())) == (0, 0)
    for one, answerable in ((task, True), (without, False)):
        found: Any = Predictor(model, tokenizer, [one])(request)
        assert (found.answer is not None) is answerable
    assert found.score == pytest.approx(float(starts[0] * ends[0]), abs=1e-5)
    assert (found.start, found.end) == (None, None)


def test_long_texts_are_truncated_as_in_training(tiny_encoder: str) -> None:
    predictor, model, tokenizer = predictor_of(tiny_encoder, 16)
    pair = (text(1, 30), text(2, 40))
    inputs = tokenizer(*pair, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        shares = model(task_ids="rte", **inputs).logits["rte"][0].softmax(-1)
    found: Any = predictor({"task": "rte", "first": pair[0], "second": pair[1]}, arrays=True)
    np.testing.assert_allclose(found.array, shares, atol=1e-5)


def test_batches_hold_as_many_tokens_as_they_may(tiny_encoder: str) -> None:
    predictor, _, _ = predictor_of(tiny_encoder, 64)
    _, pieces = predictor._encoded(REQUESTS * 3, predictor._served)
    flat = [piece for some in pieces for piece in some]
    for limit in (1, 40, 100, 10_000):
        found = list(batches(flat, predictor._served, limit, "cuda"))
        assert sorted(number for batch in found for number in batch) == list(range(len(flat)))
        for batch in found:
            rows = sum(len(flat[number].inputs) for number in batch)
            assert rows * max(flat[number].length for number in batch) <= limit or len(batch) == 1
        assert (len(found) == 1) is (limit == 10_000)
    split = list(batches(flat, predictor._served, 10_000, "cpu"))
    assert sorted(number for batch in split for number in batch) == list(range(len(flat)))


def test_characters_of_words(tiny_encoder: str) -> None:
    predictor, _, _ = predictor_of(tiny_encoder, 64)
    given = "  The is, it's (all)\n not – naïve."
    found: Any = predictor(given, task="ner")
    assert found.words == ("The", "is", ",", "it", "'", "s", "(", "all", ")", "not", "–", "naïve", ".")
    assert found.text == given
    for entity in found.entities:
        assert given[entity.start : entity.end] == entity.text
    blank: Any = predictor({"task": "ner", "tokens": ["the", "", "is"]})
    assert blank.text == "the  is"
    assert blank.labels[1] == "O"
