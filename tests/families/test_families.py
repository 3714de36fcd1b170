"""A method works on a family or rejects it, as the table of `docs/models.md` says."""

from __future__ import annotations

import pytest

pytest.importorskip("peft")

import transformers

from tests.zoo import HOST_WARNINGS, V5, Host

from .checks import METHODS, verdict
from .more import MORE
from .table import PAGE, families, recorded

pytestmark = HOST_WARNINGS
# The others are checked by writing the table.
FAST = ("PAL", "top attention", "CA-MTL")
# The page holds for the minor version of transformers that it names.
RECORDED = f"transformers {transformers.__version__.rpartition('.')[0]}." in PAGE.read_text()


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("host", families()[::2], ids=str)
def test_a_method_works_or_is_rejected(host: Host, method: str) -> None:
    works = verdict(host, method) == "works"
    if RECORDED:
        assert works is recorded()[str(host), method]


@pytest.mark.skipif(not V5, reason="the generation caches of transformers 4.57 have no place for further layers")
@pytest.mark.parametrize("method", ("PAL", "CA-MTL"))
@pytest.mark.parametrize("host", [host for host in MORE if host.available], ids=str)
def test_a_method_works_on_a_further_family_or_is_rejected(host: Host, method: str) -> None:
    if method == "PAL":
        assert (verdict(host, method) == "works") is (str(host) != "swin")
    else:
        verdict(host, method)


@pytest.mark.skipif(not RECORDED, reason="the table was made with another version of transformers")
def test_the_table_is_whole() -> None:
    assert list(recorded()) == [(str(host), method) for host in families() for method in METHODS]
