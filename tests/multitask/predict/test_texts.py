"""Language models: what they generate, and how they score a given continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import HOSTS, randomise
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pal_adapters
from pal_adapters.multitask import Predictor, RequestError, Task, TaskHeads

PROMPTS = ["the is", "not all some no", "it was", "the"]


def made(encoder: str, host: str, **changes: Any) -> tuple[TaskHeads, Any, Predictor]:
    """A decoder with two language models and a classifier."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)
    names = ("one", "two", "mood")
    if host == "adapters":
        import adapters

        adapters.init(base)
        for name in names:
            base.add_adapter(name, config=pal_adapters.PALConfig(hidden_size=8, num_heads=2))
    if host == "peft":
        import peft

        config = {"task_type": "CAUSAL_LM", "hidden_size": 8, "num_heads": 2}
        base = peft.get_peft_model(base, pal_adapters.PALPeftConfig(**config), adapter_name="one")
        for name in names[1:]:
            base.add_adapter(name, pal_adapters.PALPeftConfig(**config))
    randomise(base)
    model = TaskHeads(base)
    tasks = [Task(name, {}, kind="language_modeling") for name in names[:2]]
    tasks.append(Task("mood", {}, text_columns=("text",), label_names=("good", "bad")))
    for task in tasks:
        model.add(task.name, task.head_config())
    model.eval()
    return model, tokenizer, Predictor(model, tokenizer, [task.describe(max_length=40) for task in tasks], **changes)


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text)["input_ids"][:-1]  # without [SEP]


def next_logits(model: TaskHeads, task: str, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(task_ids=task, input_ids=torch.tensor([ids])).logits[task][0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("host", HOSTS)
def test_continuations(tiny_encoder: str, host: str, side: str) -> None:
    model, tokenizer, _ = made(tiny_encoder, host)
    tokenizer.padding_side = side
    described = [Task(name, {}, kind="language_modeling").describe(max_length=40) for name in ("one", "two")]
    predictor = Predictor(model, tokenizer, described)
    asked = [
        {"task": task, "text": text, "continuation": more}
        for text in PROMPTS
        for task, more in (("one", "not has"), ("two", "it"))
    ]
    for request, one in zip(asked, predictor(asked, arrays=True), strict=True):
        prompt = prompt_ids(tokenizer, request["text"])
        more = tokenizer(request["continuation"], add_special_tokens=False)["input_ids"]
        logits = next_logits(model, request["task"], [*prompt, *more])
        scores = [float(logits[len(prompt) - 1 + n].log_softmax(-1)[token]) for n, token in enumerate(more)]
        best = [int(logits[len(prompt) - 1 + n].argmax()) for n in range(len(more))]
        answer: Any = one
        assert answer.array.tolist() == pytest.approx(scores, abs=1e-4)
        assert answer.log_probability == pytest.approx(sum(scores), abs=1e-4)
        assert (answer.tokens, answer.generated, answer.greedy) == (len(more), False, best == more)


@pytest.mark.parametrize("host", HOSTS)
def test_generated_texts(tiny_encoder: str, host: str) -> None:
    model, tokenizer, predictor = made(tiny_encoder, host)
    asked = [{"task": task, "text": text, "max_new_tokens": 6} for text in PROMPTS for task in ("one", "two")]
    mixed = predictor([*asked, {"task": "mood", "text": "the is"}])
    assert mixed[-1].task == "mood"
    for request, one in zip(asked, mixed, strict=False):
        ids = prompt_ids(tokenizer, str(request["text"]))
        start, total = len(ids), 0.0
        for _ in range(6):
            scores = next_logits(model, str(request["task"]), ids)[-1].log_softmax(-1)
            total += float(scores.max())
            ids.append(int(scores.argmax()))
        answer: Any = one
        assert answer.text == tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert (answer.tokens, answer.generated) == (6, True)
        assert answer.log_probability == pytest.approx(total, abs=1e-3)
    assert len({one.to_dict()["text"] for one in mixed[:-1]}) > 2
    again: Any = predictor({"task": "one", "text": mixed[0].to_dict()["text"], "continuation": "the"})
    assert not again.generated


def test_the_end_of_a_text(tiny_encoder: str) -> None:
    model, tokenizer, predictor = made(tiny_encoder, "none")
    whole: Any = predictor({"task": "one", "text": "the is", "max_new_tokens": 6}, arrays=True)
    ids = prompt_ids(tokenizer, "the is")
    for _ in range(3):
        ids.append(int(next_logits(model, "one", ids)[-1].argmax()))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[-1])
    ended = Predictor(model, tokenizer, [predictor.tasks["one"]])
    short: Any = ended({"task": "one", "text": "the is", "max_new_tokens": 6}, arrays=True)
    first = ids[-3:].index(ids[-1]) + 1
    assert short.tokens == first
    assert short.array.tolist() == pytest.approx(whole.array[:first].tolist(), abs=1e-5)


def test_prompts_that_are_too_long(tiny_encoder: str, tmp_path: Path) -> None:
    model, tokenizer, predictor = made(tiny_encoder, "none")
    long = "the is not all " * 15
    found: Any = predictor({"task": "one", "text": long, "continuation": "it"})
    ids = [*prompt_ids(tokenizer, long)[-39:], *tokenizer("it", add_special_tokens=False)["input_ids"]]
    assert found.log_probability == pytest.approx(
        float(next_logits(model, "one", ids)[-2].log_softmax(-1)[ids[-1]]), abs=1e-4
    )
    for more, match in [
        ({"continuation": long}, r"the continuation has 60 tokens, but max_length is 40"),
        ({"continuation": ""}, "no token of the continuation"),
        ({"max_new_tokens": 40}, "'max_new_tokens' is too large, but max_length is 40"),
        ({"max_new_tokens": 0}, "'max_new_tokens' is 0: use an integer from 1"),
        ({"max_new_tokens": True}, "'max_new_tokens' is True"),
        ({"continuation": 3}, "'continuation' holds 3, not a text"),
        ({"continuation": "a", "max_new_tokens": 3}, "a given continuation is scored, not generated"),
    ]:
        with pytest.raises(RequestError, match=match):
            predictor.check({"task": "one", "text": "the", **more})
    model.save_pretrained(tmp_path, processing_class=tokenizer, tasks=predictor.tasks.values())
    again: Any = Predictor.from_pretrained(tmp_path, backbone=model.backbone)
    assert again({"task": "one", "text": "the"}) == predictor({"task": "one", "text": "the"})
    assert again.tasks["one"].metric == "perplexity"
