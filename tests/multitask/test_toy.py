from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields

import datasets
import pytest

from pal_adapters.multitask import TOY_TASKS, TaskDataError, load_toy_task
from pal_adapters.multitask.toy import WORDS

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


def test_agreement_decides_acceptability() -> None:
    seen = Counter()
    for row in rows("acceptability"):
        words = str(row["sentence"]).lower().rstrip(".").split()
        plural = words[1].endswith("s")
        if words[-2] in ("is", "are"):
            right, kind = (words[-2] == "are") is plural, "be"
        elif words[0] in ("this", "these"):
            right, kind = (words[0] == "these") is plural, "determiner"
        elif words[2] == "near":
            right, kind = words[5].endswith("s") is not plural, "verb"
        elif "not" in words:
            right, kind = not words[4].endswith("ed"), "do"
        elif words[2] in ("has", "have"):
            right, kind = words[3].endswith("ed") and (words[2] == "have") is plural, "have"
        else:
            right, kind = words[1] in WORDS["train"].sizes, "order"
        seen[kind] += 1
        assert row["label"] == right, row
    assert min(seen.values()) > 20
    assert len(seen) == 6


def test_quantifiers_numbers_and_roles_decide_entailment() -> None:
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
    stronger = {"all": {"all", "most", "some"}, "most": {"most", "some"}, "some": {"some"}}
    stronger |= {"no": {"no", "not all"}, "not all": {"not all"}}
    seen = Counter()
    for row in rows("entailment"):
        premise, hypothesis = (text.lower().rstrip(".") for text in texts(row))
        first = re.match(r"(all|most|some|not all|no)\b", premise)
        if premise.split()[0] in numbers:
            relation, _, bound = hypothesis.split()[:3]
            count = numbers[premise.split()[0]]
            follows = count > numbers[bound] if relation == "more" else count < numbers[bound]
            kind = "number"
        elif first:
            second = re.match(r"(all|most|some|not all|no)\b", hypothesis)
            assert second is not None
            follows, kind = second[0] in stronger[first[0]], "quantifier"
        elif hypothesis.startswith("it is"):
            follows, kind = ("did not" in premise) is ("false" in hypothesis), "negation"
        else:
            agent, patient = re.match(r"the (\w+) \w+ed the (\w+)", premise).groups()  # type: ignore[union-attr]
            follows, kind = re.match(rf"the {patient} was \w+ by the {agent}\b", hypothesis) is not None, "role"
        seen[kind] += 1
        assert row["label"] == (0 if follows else 1), row
    assert len(seen) == 4
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
    with pytest.raises(TaskDataError, match="'sentiment': no 100000 different rows"):
        load_toy_task("sentiment", train_size=100000, test_size=1)
