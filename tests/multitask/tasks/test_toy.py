from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields

import datasets
import pytest

from pal_adapters.multitask import TOY_TASKS, TaskDataError, load_toy_task
from pal_adapters.multitask.tasks.toy import WORDS

NAMES = sorted(TOY_TASKS)
FUNCTION_WORDS = {"in", "on", "at", "the", "near", "last"}


def rows(name: str, split: str = "train", size: int = 300) -> list[dict[str, object]]:
    return load_toy_task(name, train_size=size, test_size=size)[1][split].to_list()


def content(split: str) -> set[str]:
    phrases = [phrase for field in fields(WORDS[split]) for phrase in getattr(WORDS[split], field.name)]
    return {word.lower() for phrase in phrases for word in phrase.split()} - FUNCTION_WORDS


def texts(row: dict[str, object]) -> list[str]:
    return [str(value) for column, value in row.items() if column != "label"]


def test_names() -> None:
    assert NAMES == ["acceptability", "entailment", "sentiment", "similarity"]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_columns_and_label_types(name: str) -> None:
    spec, splits = load_toy_task(name, train_size=10, test_size=6)
    assert {split: len(data) for split, data in splits.items()} == {"train": 10, "validation": 6}
    assert splits["train"].column_names == [*spec.text_columns, "label"]
    assert splits["train"].features["label"] == datasets.Value("float64" if name == "similarity" else "int64")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_arguments_give_the_same_rows(name: str) -> None:
    assert rows(name) == rows(name)
    other = load_toy_task(name, train_size=300, test_size=300, seed=1)[1]
    assert other["train"].to_list() != rows(name)
    assert load_toy_task(name, train_size=50, test_size=300)[1]["validation"].to_list() == rows(name, "validation")


@pytest.mark.parametrize("name", NAMES)
def test_test_sentences_use_other_words(name: str) -> None:
    assert not content("train") & content("test")
    for split, foreign in (("train", "test"), ("validation", "train")):
        forms = {form for word in content(foreign) for form in (word, f"{word}s", f"{word}ed")}
        for row in rows(name, split):
            used = set(re.findall(r"[a-z]+", " ".join(texts(row)).lower()))
            assert not used & forms, row


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_are_different_sentences_with_balanced_labels(name: str, split: str) -> None:
    made = rows(name, split)
    assert len({tuple(texts(row)) for row in made}) == len(made)
    for row in made:
        for text in texts(row):
            assert re.fullmatch(r"[A-Z][A-Za-z ,]+\.", text), text
    counts = Counter(row["label"] for row in made)
    assert max(counts.values()) - min(counts.values()) <= (1 if name != "similarity" else 10)
    assert set(counts) == ({0.0, 1.0, 2.0, 3.0, 4.0, 5.0} if name == "similarity" else {0, 1})


def test_sentiment_follows_what_the_negation_applies_to() -> None:
    good = set(WORDS["train"].good)
    for row in rows("sentiment"):
        words = str(row["sentence"]).lower().rstrip(".").split()
        clause = " ".join(words).split(", ")[-1]
        turned = any(cue in clause for cue in ("not find", "was not", "nobody said", "was far from", "anything but"))
        assert row["label"] == ((words[-1] in good) is not turned), row


def test_the_word_before_decides_acceptability() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    stems = "|".join(WORDS["train"].actions)
    for row in rows("acceptability"):
        match = re.fullmatch(rf"The \w+?(s?) (.+) ({stems})(ed|ing|) .+\.", str(row["sentence"]))
        assert match is not None, row
        plural, helper, _, ending = match.groups()
        if helper in ("did not", "will", "wanted to"):
            right = ending == ""
        elif helper in ("has", "have", "had"):
            right = ending == "ed"
        else:
            right = ending == "ing"
        assert row["label"] == right, row
        if helper in ("has", "is", "was", "have", "are", "were"):
            assert (helper in ("have", "are", "were")) is bool(plural), row
        seen[helper, ending] += 1
    # Every ending is right behind one word and wrong behind another.
    assert {ending for _, ending in seen} == {"", "ed", "ing"}
    assert len(seen) == 30


def test_quantifiers_negation_and_details_decide_entailment() -> None:
    follows_from = {"all": {"all", "most", "some"}, "most": {"most", "some"}, "some": {"some"}}
    follows_from |= {"no": {"no", "not all"}, "not all": {"not all"}}
    quantifier = re.compile(r"(all|most|some|not all|no)\b")
    seen: Counter[str] = Counter()
    for row in rows("entailment"):
        premise, hypothesis = (text.lower().rstrip(".") for text in texts(row))
        first, second = quantifier.match(premise), quantifier.match(hypothesis)
        if first and second:
            follows, kind = second[0] in follows_from[first[0]], "quantifier"
        elif len(premise.split()) == len(hypothesis.split()) or "did not" in premise + hypothesis:
            follows, kind = premise == hypothesis, "negation"
        else:
            follows, kind = premise.startswith(f"{hypothesis} "), "detail"
        seen[kind] += 1
        assert row["label"] == (0 if follows else 1), row
    assert len(seen) == 3
    assert min(seen.values()) > 30


def test_similarity_counts_shared_roles() -> None:
    def roles(text: str) -> tuple[str, ...]:
        text = text[0].lower() + text[1:].rstrip(".")
        words = WORDS["train"]
        when = next(time for time in words.times if time.lower() in text.lower())
        where = next(place for place in words.places if place in text)
        active = re.search(r"the (\w+) (\w+)ed the (\w+)", text)
        passive = re.search(r"the (\w+) was (\w+)ed by the (\w+)", text)
        assert (active is None) is not (passive is None)
        who, did, whom = active.groups() if active else passive.groups()[::-1]  # type: ignore[union-attr]
        return who, did, whom, where, when

    turned = 0
    for row in rows("similarity"):
        one, two = (roles(text) for text in texts(row))
        assert row["label"] == sum(a == b for a, b in zip(one, two, strict=True)), row
        turned += one[0] == two[2] and one[2] == two[0]
    assert turned > 10


def test_unknown_task() -> None:
    with pytest.raises(TaskDataError, match="unknown toy task 'rte'; allowed: acceptability, entailment, sentiment"):
        load_toy_task("rte")


def test_more_rows_than_sentences() -> None:
    with pytest.raises(TaskDataError, match="'sentiment': the templates cannot produce 100000 different examples"):
        load_toy_task("sentiment", train_size=100000, test_size=1)
