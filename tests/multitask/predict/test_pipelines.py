"""One task of a `TaskHeads` in transformers' pipelines, and the hosts' own models in a `Predictor`."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from answers import REQUESTS, made, plain_logits
from backbones import HOSTS
from tiny_tasks import make_tasks
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask import HeadConfig, Predictor, Task

TRANSFORMERS_4 = transformers.__version__.startswith("4.")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers.pipelines.base"), "error", lambda text, *_: found.append(text))
    return found


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers 4 with numpy 2
@pytest.mark.parametrize("host", HOSTS)
def test_pipelines(tiny_encoder: str, host: str, logged: list[str]) -> None:
    model, tasks = made(tiny_encoder, host)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    pair = {"text": REQUESTS[0]["first"], "text_pair": REQUESTS[0]["second"]}
    for task, request in (("rte", REQUESTS[0]), ("topics", {**REQUESTS[0], "task": "topics"})):
        pipe: Any = pipeline("text-classification", model=model.for_task(task), tokenizer=tokenizer, top_k=None)
        logits = plain_logits(model, tokenizer, request)
        shares = logits.softmax(-1) if task == "rte" else logits.sigmoid()
        found = {one["label"]: one["score"] for one in pipe(pair)}
        assert found == pytest.approx({f"LABEL_{n}": float(share) for n, share in enumerate(shares)}, abs=1e-5)
    pipe = pipeline("text-classification", model=model.for_task("stsb"), tokenizer=tokenizer)
    value = plain_logits(model, tokenizer, {**REQUESTS[0], "task": "stsb"})
    assert pipe(pair)["score"] == pytest.approx(float(value), abs=1e-5)
    words = REQUESTS[1]["tokens"]
    pipe = pipeline("token-classification", model=model.for_task("ner"), tokenizer=tokenizer, ignore_labels=[])
    shares = plain_logits(model, tokenizer, REQUESTS[1]).softmax(-1)
    tagged = pipe(" ".join(words))
    assert [one["entity"] for one in tagged] == [("O", "B-X", "I-X")[n] for n in shares[1:-1].argmax(-1)]
    if TRANSFORMERS_4:  # 5 has no such pipeline
        predictor = Predictor(model, tokenizer, tasks)
        request = REQUESTS[4]
        pipe = pipeline("question-answering", model=model.for_task("qa"), tokenizer=tokenizer, max_answer_len=30)
        answer: Any = predictor(request)
        shown = pipe(question=request["question"], context=request["context"])
        assert (shown["start"], shown["end"]) == (answer.start, answer.end)
    assert logged == []


def test_a_task_as_a_model(tiny_encoder: str) -> None:
    model, _ = made(tiny_encoder, "none", ("rte", "copa"))
    model.described["rte"] = Task("rte", {}, text_columns=("first", "second"), label_names=("no", "yes")).describe(
        max_length=20
    )
    one = model.for_task("rte")
    assert one.config.id2label == {0: "no", 1: "yes"}
    assert one.config.num_labels == 2
    assert "no" not in model.config.id2label.values()
    assert {id(p) for p in one.parameters()} == {id(p) for p in model.parameters()}
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    texts = REQUESTS[3]
    inputs = tokenizer([texts["first"]] * 2, [texts["second"], texts["third"]], return_tensors="pt", padding=True)
    shaped = {name: value.unsqueeze(0) for name, value in inputs.items()}
    with torch.no_grad():
        found = model.for_task("copa")(**shaped).logits
    torch.testing.assert_close(found[0], plain_logits(model, tokenizer, texts))
    with pytest.warns(UserWarning, match="there is nothing to predict"):
        model.add("lm", HeadConfig("language_modeling"), adapter=None)
    with pytest.raises(UnsupportedError, match="use a Predictor, which generates text"):
        model.for_task("lm")


def classifier(encoder: str) -> Any:
    torch.manual_seed(5)
    return AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)


@pytest.mark.skipif("peft" not in HOSTS, reason="needs peft")
def test_adapters_and_heads_of_peft(tiny_encoder: str) -> None:
    import peft

    config = {"task_type": "SEQ_CLS", "init_lora_weights": False, "target_modules": ["query"]}
    model = peft.get_peft_model(classifier(tiny_encoder), peft.LoraConfig(**config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(**config))
    torch.nn.init.normal_(model.base_model.model.classifier.modules_to_save["two"].weight)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tasks = [Task(name, {}, text_columns=("text",), label_names=("no", "yes")) for name in ("one", "two")]
    predictor = Predictor(model, tokenizer, tasks)
    texts = ["the is", "not all some", "it"]
    found = predictor([{"task": task, "text": text} for text in texts for task in ("two", "one")])
    assert list(model.active_adapters) == ["one"]
    for number, text in enumerate(texts):
        for place, task in enumerate(("two", "one")):
            model.set_adapter(task)
            with torch.no_grad():
                shares = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            answer: Any = found[2 * number + place]
            assert list(answer.scores.values()) == pytest.approx(shares.tolist(), abs=1e-5)
    with pytest.raises(UnsupportedError, match="the tasks of a host's own model are fixed"):
        predictor.add_task("three", ".")
    with pytest.raises(ConfigError, match="task 'three' has no adapter of its name, the model has: 'one', 'two'"):
        Predictor(model, tokenizer, [Task("three", {}, text_columns=("text",), num_labels=2)])
    with pytest.raises(ConfigError, match="task 'one' has 3 labels, but its head has 2 outputs"):
        Predictor(model, tokenizer, [Task("one", {}, text_columns=("text",), num_labels=3)])


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
def test_adapters_and_heads_of_adapters(tiny_encoder: str) -> None:
    import adapters

    torch.manual_seed(5)
    model = adapters.AutoAdapterModel.from_pretrained(tiny_encoder)
    for name in ("rte", "ner", "qa", "copa"):
        model.add_adapter(name, config="seq_bn")
    model.add_classification_head("rte", num_labels=2)
    model.add_tagging_head("ner", num_labels=3)
    model.add_qa_head("qa")
    model.add_multiple_choice_head("copa", num_choices=2)
    model.set_active_adapters("ner")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    predictor = Predictor(model, tokenizer, make_tasks("rte", "ner", "qa", "copa"))
    asked = [request for request in REQUESTS if request["task"] in predictor.tasks]
    found = predictor(asked, arrays=True)
    assert model.active_adapters == adapters.composition.Stack("ner")
    model.eval()
    for request, one in zip(asked, found, strict=True):
        model.active_head = request["task"]
        model.set_active_adapters(request["task"])
        texts = [value for key, value in request.items() if key != "task"]
        answer: Any = one
        with torch.no_grad():
            if request["task"] == "rte":
                shares = model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)
                assert list(answer.scores.values()) == pytest.approx(shares.tolist(), abs=1e-5)
            elif request["task"] == "ner":
                inputs = tokenizer(texts[0], is_split_into_words=True, return_tensors="pt")
                places = [inputs.word_ids().index(number) for number in range(len(texts[0]))]
                shares = model(**inputs).logits[0][places].softmax(-1)
                torch.testing.assert_close(torch.tensor(answer.array).float(), shares, atol=1e-5, rtol=0)
            elif request["task"] == "copa":
                inputs = tokenizer([texts[0]] * 2, texts[1:], return_tensors="pt", padding=True)
                shares = model(**{k: v.unsqueeze(0) for k, v in inputs.items()}).logits[0].softmax(-1)
                assert list(answer.scores.values()) == pytest.approx(shares.tolist(), abs=1e-5)
            else:
                output = model(**tokenizer(*texts, return_tensors="pt"))
                logits = torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)
                torch.testing.assert_close(torch.tensor(answer.array).float(), logits, atol=1e-5, rtol=0)


def test_a_model_without_a_host(tiny_encoder: str) -> None:
    with pytest.raises(UnsupportedError, match="a BertForSequenceClassification without adapters has no tasks"):
        Predictor(classifier(tiny_encoder), AutoTokenizer.from_pretrained(tiny_encoder), [])
