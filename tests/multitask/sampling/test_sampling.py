from __future__ import annotations

import itertools
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import annealed_alpha, task_probabilities
from pal_adapters.multitask.sampling.strategies import STRATEGIES, MultiTaskBatchSampler, Temperature, get_strategy

# CoLA, MRPC, MNLI, RTE, STS-B, SST-2, QQP, QNLI, and what the paper's rule gives for them in 25 epochs.
SIZES = [8551, 3668, 392702, 2490, 5749, 67349, 363849, 108436]
EXPECTED = {
    1: [0.0090, 0.0038, 0.4122, 0.0026, 0.0060, 0.0707, 0.3819, 0.1138],
    13: [0.0330, 0.0198, 0.3276, 0.0157, 0.0260, 0.1137, 0.3129, 0.1513],
    25: [0.0910, 0.0768, 0.1956, 0.0711, 0.0840, 0.1375, 0.1927, 0.1512],
}


@pytest.mark.parametrize("epoch", EXPECTED)
def test_published_schedule(epoch: int) -> None:
    probabilities = task_probabilities(SIZES, annealed_alpha(epoch, 25))
    np.testing.assert_allclose(probabilities, EXPECTED[epoch], rtol=0, atol=1e-4)


def test_ends_of_the_schedule() -> None:
    assert annealed_alpha(1, 5) == 1.0
    assert annealed_alpha(5, 5) == pytest.approx(0.2)
    assert annealed_alpha(1, 1) == 1.0


def test_probabilities_add_up() -> None:
    assert task_probabilities([3, 1], 1.0).tolist() == [0.75, 0.25]
    assert task_probabilities([3, 1], 0.0).tolist() == [0.5, 0.5]
    assert task_probabilities([7], 0.5).tolist() == [1.0]


@pytest.mark.parametrize(("epoch", "epochs"), [(0, 5), (6, 5)])
def test_epochs_outside_of_the_run(epoch: int, epochs: int) -> None:
    with pytest.raises(
        ValueError, match=f"epoch={epoch} is not allowed: use an integer of at least 1, at most {epochs}"
    ):
        annealed_alpha(epoch, epochs)


@pytest.mark.parametrize("sizes", [[], [0, 3]])
def test_tasks_without_rows(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sizes=\[.*\] is not allowed: use a list of positive numbers"):
        task_probabilities(sizes, 1.0)


ROOTS = [0.0441, 0.0289, 0.2988, 0.0238, 0.0361, 0.1237, 0.2876, 0.1570]


@pytest.mark.parametrize("epoch", EXPECTED)
def test_published_probabilities_of_the_sampler(epoch: int) -> None:
    sampler = MultiTaskBatchSampler(SIZES, 32, strategy="annealed", epochs=25, steps_per_epoch=2400)
    np.testing.assert_allclose(sampler.probabilities(epoch - 1), EXPECTED[epoch], rtol=0, atol=1e-4)
    root = MultiTaskBatchSampler(SIZES, 32, strategy="sqrt", epochs=25)
    np.testing.assert_allclose(root.probabilities(epoch - 1), ROOTS, rtol=0, atol=1e-4)
    even = MultiTaskBatchSampler(SIZES, 32, strategy="proportional", epochs=25)
    np.testing.assert_allclose(even.probabilities(epoch - 1), EXPECTED[1], rtol=0, atol=1e-4)


# Sizes and what the released code of ScaLearn gives for them, by temperature.
TEMPERED = {
    1: [0.009009009009009009, 0.09009009009009009, 0.9009009009009009],
    2: [0.07061011116965424, 0.22328877713380338, 0.7061011116965424],
    5: [0.19620232259933199, 0.31095972543274053, 0.4928379519679275],
    10: [0.26015795825873644, 0.3275194647324095, 0.41232257700885394],
}


@pytest.mark.parametrize("temperature", TEMPERED)
def test_temperatures_of_the_released_code(temperature: int) -> None:
    sampler = MultiTaskBatchSampler([10, 100, 1000], 32, strategy=Temperature(temperature))
    np.testing.assert_allclose(sampler.probabilities(), TEMPERED[temperature], rtol=0, atol=1e-12)
    assert len(sampler) == 35
    assert get_strategy("temperature", temperature=temperature) == Temperature(temperature)


SETTINGS = st.fixed_dictionaries(
    {
        "sizes": st.lists(st.integers(1, 20), min_size=1, max_size=4),
        "batch_size": st.integers(1, 9),
        "strategy": st.sampled_from([*STRATEGIES, Temperature(3.0)]),
        "epochs": st.integers(1, 4),
        "steps_per_epoch": st.none() | st.integers(1, 6),
        "group_size": st.integers(1, 4),
        "seed": st.integers(0, 2**40),
        "by_length": st.booleans(),
    }
)
MIXED = st.booleans()


def make(settings: dict[str, Any], mixed: bool) -> MultiTaskBatchSampler:
    given = {name: value for name, value in settings.items() if name != "by_length"}
    mixed = mixed and settings["strategy"] != "uncertainty"
    if settings["by_length"] and not mixed and settings["strategy"] != "uncertainty":
        given["lengths"] = [np.arange(size) % 7 for size in settings["sizes"]]
    return MultiTaskBatchSampler(**given, mixed=mixed)


def run(sampler: MultiTaskBatchSampler, epochs: int) -> list[list[list[int]]]:
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        batches.append(list(sampler))
    return batches


@given(settings=SETTINGS, mixed=MIXED)
@hypothesis.settings(max_examples=40, deadline=None)
def test_batches_are_full_and_a_step_has_one_task(settings: dict[str, Any], mixed: bool) -> None:
    sampler = make(settings, mixed)
    rows = settings["batch_size"] * (len(sampler.sizes) if settings["strategy"] == "uncertainty" else 1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {len(batch) for batch in batches} == {rows}
        assert all(0 <= row < sum(sampler.sizes) for batch in batches for row in batch)
        if settings["strategy"] == "uncertainty":
            counts = [np.bincount([sampler.task_of(row) for row in batch]).tolist() for batch in batches]
            assert all(count == [settings["batch_size"]] * len(sampler.sizes) for count in counts)
        elif not sampler.mixed:
            groups = np.reshape(batches, (sampler.steps_per_epoch, -1))
            tasks = [{sampler.task_of(row) for row in group} for group in groups.tolist()]
            assert all(len(group) == 1 for group in tasks)
            assert [group.pop() for group in tasks] == sampler.draws().tolist()


@given(settings=SETTINGS, mixed=MIXED)
@hypothesis.settings(max_examples=40, deadline=None)
def test_every_row_has_its_turn_before_any_has_it_again(settings: dict[str, Any], mixed: bool) -> None:
    sampler = make(settings, mixed)
    seen: list[list[int]] = [[] for _ in sampler.sizes]
    for batch in itertools.chain(*run(sampler, 3)):
        for row in batch:
            seen[sampler.task_of(row)].append(row)
    for size, rows in zip(sampler.sizes, seen, strict=True):
        for start in range(0, len(rows), size):
            turn = rows[start : start + size]
            assert len(set(turn)) == len(turn)


@given(settings=SETTINGS, mixed=MIXED, epoch=st.integers(0, 3), data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_goes_on_anywhere(settings: dict[str, Any], mixed: bool, epoch: int, data: st.DataObject) -> None:
    whole = run(make(settings, mixed), epoch + 1)[epoch]
    jumped = make(settings, mixed)
    jumped.set_epoch(epoch)  # without the epochs before
    assert list(jumped) == whole
    stop = data.draw(st.integers(0, len(whole)))
    stopped = make(settings, mixed)
    stopped.set_epoch(epoch)
    begun = list(itertools.islice(stopped, stop))
    resumed = make(settings, mixed)
    resumed.load_state_dict(stopped.state_dict())
    assert begun + list(resumed) == whole
    assert list(resumed) == whole  # the next pass begins at the beginning


@given(settings=SETTINGS, mixed=MIXED, world=st.integers(2, 3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_processes_share_the_rows_of_one_large_step(settings: dict[str, Any], mixed: bool, world: int) -> None:
    from accelerate.data_loader import BatchSamplerShard

    settings = {**settings, "steps_per_epoch": settings["steps_per_epoch"] or 5}
    many = make({**settings, "group_size": settings["group_size"] * world}, mixed)
    shards = [list(BatchSamplerShard(many, world, rank)) for rank in range(world)]
    one = list(make({**settings, "batch_size": settings["batch_size"] * world}, mixed))
    steps = settings["steps_per_epoch"]
    ours = np.concatenate([np.reshape(shard, (steps, -1)) for shard in shards], axis=1)
    theirs = np.reshape(one, (steps, -1))
    if settings["strategy"] != "uncertainty" or len(set(map(len, one))) == 1:
        assert np.sort(ours, axis=1).tolist() == np.sort(theirs, axis=1).tolist()


@given(rows=st.integers(1, 9), groups=st.integers(1, 3), sizes=st.lists(st.integers(1, 150), min_size=1, max_size=3))
@hypothesis.settings(max_examples=40, deadline=None)
def test_rows_of_a_step_are_of_like_length(rows: int, groups: int, sizes: list[int]) -> None:
    """The shortest examples of 16 steps come together, then the next: checked on the first pass over each task."""
    lengths = [np.random.default_rng(size).integers(3, 90, size) for size in sizes]
    options: dict[str, Any] = {"group_size": groups, "seed": 3, "strategy": "round_robin", "steps_per_epoch": 450}
    plain = list(MultiTaskBatchSampler(sizes, rows, **options))
    sampler = MultiTaskBatchSampler(sizes, rows, **options, lengths=lengths)
    offsets = np.cumsum([0, *sizes])
    step = rows * groups
    for task, size in enumerate(sizes):
        ours, theirs = (
            [row - int(offsets[task]) for batch in batches for row in batch if sampler.task_of(row) == task]
            for batches in (sampler, plain)
        )
        whole = min(size, len(ours)) // step * step
        found = {tuple(ours[i : i + step]) for i in range(0, whole, step)}
        expected = []
        for start in range(0, size // step * step, 16 * step):
            stretch = theirs[start : min(start + 16 * step, size // step * step)]
            ordered = sorted(stretch, key=lambda row: lengths[task][row])
            expected += [tuple(ordered[i : i + step]) for i in range(0, len(ordered), step)]
        assert found == set(expected)


def test_lengths_have_to_fit() -> None:
    with pytest.raises(ConfigError, match=r"lengths has \[2, 1\] entries for tasks of \[2, 3\] examples"):
        MultiTaskBatchSampler({"a": 2, "b": 3}, 2, lengths={"a": [4, 5], "b": [1]})
    with pytest.raises(ConfigError, match="lengths has no effect on batches that mix tasks"):
        MultiTaskBatchSampler([2], 2, lengths=[[4, 5]], mixed=True)


@given(seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_draws_follow_the_probabilities(seed: int) -> None:
    sampler = MultiTaskBatchSampler([900, 100], 4, strategy="annealed", epochs=3, steps_per_epoch=4000, seed=seed)
    for epoch in range(3):
        share = np.bincount(sampler.draws(epoch), minlength=2) / 4000
        np.testing.assert_allclose(share, sampler.probabilities(epoch), atol=0.05)


def test_other_seeds_and_epochs_give_other_sequences() -> None:
    sampler = MultiTaskBatchSampler([50, 50], 4, seed=1)
    other = MultiTaskBatchSampler([50, 50], 4, seed=2)
    first, second = run(sampler, 2)
    assert first != second
    assert first != list(other)


def test_round_robin_visits_every_task_and_goes_on() -> None:
    sampler = MultiTaskBatchSampler([5, 50, 500], 2, strategy="round_robin", steps_per_epoch=4)
    assert sampler.draws(0).tolist() == [0, 1, 2, 0]
    assert sampler.draws(1).tolist() == [1, 2, 0, 1]


def test_own_strategy() -> None:
    asked = []

    def only_last(sizes: Any, epoch: int, epochs: int) -> list[float]:
        asked.append((tuple(sizes), epoch, epochs))
        return [0.0] * (len(sizes) - 1) + [3.0]

    sampler = MultiTaskBatchSampler({"a": 4, "b": 6}, 3, strategy=only_last, epochs=2, steps_per_epoch=5)
    sampler.set_epoch(1)
    assert {sampler.task_of(row) for batch in sampler for row in batch} == {1}
    assert ((4, 6), 2, 2) in asked


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")], [[1.0, 1.0]]])
def test_weights_that_make_no_sense(weights: Any) -> None:
    sampler = MultiTaskBatchSampler([4, 6], 3, strategy=lambda *_: weights)
    with pytest.raises(ConfigError, match="strategy <lambda> returned"):
        list(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": {"rte": 0}}, r"sizes\[rte\]=0 is not allowed"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"strategy": "squareroot"}, "strategy='squareroot' is not allowed: use one of 'uniform'"),
        ({"strategy": "temperature"}, r"needs temperature="),
        ({"strategy": "uncertainty", "mixed": True}, "mixed=True has no effect"),
        ({"epochs": 0}, "epochs=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"seed": -1}, "seed=-1"),
        ({"mixed": 1}, "mixed=1"),
    ],
)
def test_arguments_that_are_not_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiTaskBatchSampler(**{"sizes": [3, 4], "batch_size": 2, **arguments})


def test_temperatures_that_are_not_allowed() -> None:
    for value in (0, -1.0, float("inf"), True):
        with pytest.raises(ConfigError, match="temperature="):
            Temperature(value)
    with pytest.raises(ConfigError, match="temperature=2 has no effect for strategy='sqrt'"):
        get_strategy("sqrt", temperature=2)


def test_a_task_with_one_row_and_huge_tasks() -> None:
    sampler = MultiTaskBatchSampler([1, 10**6], 4, strategy="round_robin", steps_per_epoch=2)
    small, large = sampler
    assert small == [0, 0, 0, 0]
    assert len(set(large)) == 4
    assert np.isfinite(task_probabilities([1, 10**9], 40.0)).all()
