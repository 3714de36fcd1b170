"""A method works on a class of `adapters` or rejects it, as the second table of `docs/models.md` says."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters")
pytest.importorskip("peft")  # the first table is about PEFT

from tests.zoo import HOST_WARNINGS

from .in_adapters import METHODS, NAMES, verdict
from .table import recorded

pytestmark = [
    *HOST_WARNINGS,
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),  # of the host, T5
]


@pytest.mark.parametrize("method", ["PAL", "CA-MTL"])
@pytest.mark.parametrize("name", [*NAMES[::3], NAMES[-1]])
def test_a_method_works_or_is_rejected(name: str, method: str) -> None:
    assert (verdict(name, method) == "works") is recorded("adapters")[name, method]


def test_the_table_is_whole() -> None:
    assert list(recorded("adapters")) == [(name, method) for name in NAMES for method in METHODS]
