"""How often each task is drawn when many tasks train one base."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def annealed_alpha(epoch: int, epochs: int) -> float:
    r"""Exponent of annealed sampling: from 1 in the first epoch down to 0.2 in the last.

    $$\alpha = 1 - 0.8 \frac{e - 1}{E - 1}$$

    From Stickland and Murray, "BERT and PALs", ICML 2019. A run of a single epoch stays at 1.

    Args:
        epoch: `e`, counted from 1.
        epochs: `E`.

    Example:
        >>> annealed_alpha(13, 25)
        0.6
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch must lie between 1 and {epochs}, got {epoch}")
    return 1.0 if epochs == 1 else 1.0 - 0.8 * (epoch - 1) / (epochs - 1)


def task_probabilities(sizes: Sequence[int], alpha: float) -> np.ndarray:
    r"""Probability of each task, $p_i \propto N_i^\alpha$.

    Args:
        sizes: `N_i`, the training rows of each task.
        alpha: 1 is proportional, 0 is uniform.

    Returns:
        Probabilities `[t]`.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes must be positive and not empty, got {list(sizes)}")
    weights = np.asarray(sizes, dtype=np.float64) ** alpha
    return weights / weights.sum()
