from __future__ import annotations

import numpy as np
import pytest

from pal_adapters.multitask import annealed_alpha, task_probabilities

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
    with pytest.raises(ValueError, match=f"between 1 and {epochs}, got {epoch}"):
        annealed_alpha(epoch, epochs)


@pytest.mark.parametrize("sizes", [[], [0, 3]])
def test_tasks_without_rows(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes must be positive"):
        task_probabilities(sizes, 1.0)
