"""The golden numbers of ScaLearn that PEFT can express."""

from __future__ import annotations

import pathlib

import pytest

import pal_adapters

from . import check

if "ScaLearnPeftConfig" not in pal_adapters.__all__:
    pytest.skip("needs peft", allow_module_level=True)

from . import check_peft_fusion

DATA = pathlib.Path(__file__).parent / "data"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", [*check_peft_fusion.CASES, check_peft_fusion.SINGLE])
def test_scalearn_equals_the_authors_code(name: str, tmp_path: pathlib.Path) -> None:
    result = check_peft_fusion.compare(check.Case(DATA, name), tmp_path)
    assert result is not None
    assert max(result) <= check.TOLERANCE


def test_other_cases_are_not_claimed() -> None:
    for path in DATA.glob("scalearn_*.json"):
        case = check.Case(DATA, path.stem)
        bottleneck = case.meta.get("hyperparameters", {}).get("adapter_config_in_the_fork")
        assert (case.name in check_peft_fusion.CASES) is (bottleneck == "HoulsbyConfig")
