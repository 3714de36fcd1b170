"""MT-uncertainty: scores, choice, regression rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import Candidates, MultiTaskBatchSampler, UncertaintySelector
from pal_adapters.multitask.sampling.uncertainty import select_uncertain, uncertainty


def pool() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(n, c, generator=generator) for name, n, c in (("mnli", 5, 3), ("rte", 4, 2), ("qa", 3, 7))
    }


def by_hand(logits: Tensor) -> list[float]:
    rows = []
    for row in logits.tolist():
        weights = [math.exp(v) for v in row]
        rows.append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
    return rows


@pytest.mark.parametrize("score", ["code", "paper"])
def test_scores_against_plain_python(score: str) -> None:
    logits = pool()
    entropies = {t: by_hand(v) for t, v in logits.items()}
    normal = {t: [h / (math.log(v.shape[1]) + 1e-5) for h in entropies[t]] for t, v in logits.items()}
    means = {t: sum(v) / len(v) for t, v in normal.items()}
    largest = max(sum(v) / len(v) for v in entropies.values())
    for task, found in uncertainty(logits, score=score).items():  # type: ignore[arg-type]
        factor = means[task] / max(means.values()) if score == "code" else 1 / largest
        assert found.score.tolist() == pytest.approx([u * factor for u in normal[task]], rel=1e-5)
        assert found.entropy.tolist() == pytest.approx(entropies[task], rel=1e-5)


def test_uniform_logits_are_as_uncertain_as_can_be() -> None:
    for classes in (2, 3, 10):
        found = uncertainty({"a": torch.zeros(2, classes)})["a"]
        expected = math.log(classes) / (math.log(classes) + 1e-5)
        assert found.normalised.tolist() == pytest.approx([expected] * 2)


def test_the_two_scores_choose_differently_between_a_certain_and_an_uncertain_task() -> None:
    sure = torch.tensor([[9.0, 0.0]] * 5 + [[0.5, 0.0]])  # one doubtful row of a certain task
    doubtful = torch.tensor([[1.0, 0.0]] * 6)
    logits = {"sure": sure, "doubtful": doubtful}
    assert select_uncertain(logits, 1, score="paper").rows == {"sure": [5]}
    assert set(select_uncertain(logits, 1, score="code").rows) == {"doubtful"}


def test_indices_count_over_all_candidates() -> None:
    logits = pool()
    chosen = select_uncertain(logits, 6)
    starts = {"mnli": 0, "rte": 5, "qa": 9}
    again = [starts[t] + r for t, rows in chosen.rows.items() for r in rows]
    assert sorted(again) == sorted(chosen.indices.tolist())
    assert len(set(again)) == 6
    scores = torch.cat([u.score for u in uncertainty(logits).values()])
    assert chosen.scores.tolist() == sorted(scores.tolist(), reverse=True)[:6]
    assert len(select_uncertain(logits, 100).indices) == 12


def test_regression_takes_a_proxy_or_a_number_or_stays_at_zero() -> None:
    logits = {**pool(), "STS-B": torch.randn(6, 1), "MRPC": torch.randn(4, 2)}
    found = uncertainty(logits)
    assert torch.equal(found["STS-B"].score[:4], found["MRPC"].score)
    assert not found["STS-B"].score[4:].any()
    assert not found["STS-B"].normalised.any()
    alone = uncertainty({"stsb": torch.randn(2, 1), "rte": torch.zeros(1, 2)})["stsb"]
    assert not alone.score.any()
    assert uncertainty(logits, regression={"STS-B": 0.5})["STS-B"].score.tolist() == [0.5] * 6
    assert torch.equal(uncertainty(logits, regression={"STS-B": "rte"})["STS-B"].score[:4], found["rte"].score)
    for rule, message in (
        ({"rte": 1.0}, "'rte' has 2 classes"),
        ({"STS-B": "none"}, "'none' is not a classification"),
    ):
        with pytest.raises(ConfigError, match=message):
            uncertainty(logits, regression=rule)


def test_selector_takes_the_rows_of_the_batch() -> None:
    """Indices of examples in the batch, where tasks are mixed; regression takes the given number."""
    generator = torch.Generator().manual_seed(3)
    rows = {"rte": [0, 2, 5], "stsb": [1, 3], "qa": [4, 6, 7]}
    logits = {"rte": torch.randn(3, 2, generator=generator), "stsb": torch.randn(2, generator=generator)}
    logits["qa"] = torch.randn(3, 5, generator=generator)
    candidates = Candidates(("rte", "stsb", "qa"), [0, 1, 0, 1, 2, 0, 2, 2], logits, rows, 4, {})
    given = {**logits, "stsb": logits["stsb"].unsqueeze(-1)}
    for selector, options in (
        (UncertaintySelector(), {}),
        (UncertaintySelector(regression={"stsb": 5.0}), {"regression": {"stsb": 5.0}}),
        (UncertaintySelector(score="paper"), {"score": "paper"}),
    ):
        expected = select_uncertain(given, 4, **options)  # type: ignore[arg-type]
        chosen = selector.select(candidates)
        assert sorted(chosen) == sorted(rows[task][i] for task, own in expected.rows.items() for i in own)
        assert ({1, 3} <= set(chosen)) is (selector.regression is not None)


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="score='mean'"):
        uncertainty(pool(), score="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="size=0"):
        select_uncertain(pool(), 0)
    with pytest.raises(ConfigError, match="score='mean'"):
        UncertaintySelector(score="mean")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"\[4\]"):
        uncertainty({"a": torch.zeros(4)})


def test_steps_of_an_epoch() -> None:
    """As often as the largest task has batches, times the number of tasks."""
    sampler = MultiTaskBatchSampler([100, 33], 8, strategy="uncertainty")
    assert (sampler.steps_per_epoch, len(sampler)) == (26, 26)
