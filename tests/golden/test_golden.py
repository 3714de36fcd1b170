"""The golden numbers as tests, and the command that checks them."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest
from safetensors.torch import load_file, save_file

import pal_adapters

from . import check, fusion_cases

DATA = pathlib.Path(__file__).parent / "data"
NAMES = sorted(p.stem for p in DATA.glob("*.json"))
FUSION = [n for n in NAMES if n.startswith(("scalearn_", "adapters_", "adapterfusion_"))]
ENCODERS = [n for n in NAMES if n.endswith("_encoder") and n not in FUSION]
HOSTS = [h for h, c in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if c in pal_adapters.__all__]


@pytest.mark.parametrize("host", [*HOSTS, "layer"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_equals_the_authors_code(name: str, host: str) -> None:
    case = check.Case(DATA, name)
    result = check.compare(case, host)
    if name == "plain_encoder" and host == "layer":
        assert result is None  # there is no module to call
        return
    assert result is not None
    assert max(result) <= check.TOLERANCE


@pytest.mark.parametrize("name", ["pal_module", "pal_module_odd_head"])
def test_module_equals_the_authors_code(name: str) -> None:
    assert max(check.compare_module(check.Case(DATA, name))) <= check.TOLERANCE


FUSION_ENCODERS = [n for n in FUSION if n not in ("scalearn_module", "scalearn_sampling")]


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
@pytest.mark.parametrize("name", FUSION_ENCODERS)
def test_fusion_equals_the_authors_code(name: str) -> None:
    result = check.compare(check.Case(DATA, name), "adapters")
    assert result is not None
    assert max(result) <= check.TOLERANCE


@pytest.mark.parametrize("name", ["scalearn_module", *[n for n in FUSION if n.endswith("regularized")]])
def test_fusion_module_equals_the_authors_code(name: str) -> None:
    result = check.compare(check.Case(DATA, name), "layer")
    assert result is not None
    assert max(result) <= check.TOLERANCE


def test_temperature_sampling_equals_the_authors_code() -> None:
    assert max(fusion_cases.compare_sampling(check.Case(DATA, "scalearn_sampling"))) <= 1e-12


@pytest.mark.parametrize("name", sorted(p.stem for p in DATA.glob("camtl_*.json") if "encoder" not in p.stem))
def test_ca_mtl_modules_equal_the_authors_code(name: str) -> None:
    case = check.Case(DATA, name)
    results = [result for host in [*HOSTS, "layer"] if (result := check.compare(case, host)) is not None]
    assert results
    assert max(max(result) for result in results) <= check.TOLERANCE


@pytest.mark.parametrize("name", sorted(p.stem for p in DATA.glob("mt_uncertainty*.json")))
def test_uncertainty_equals_the_authors_code(name: str) -> None:
    result = check.compare(check.Case(DATA, name), "layer")
    assert result is not None
    assert max(result) <= 1e-6


def test_sizes_that_the_reference_fails_on_are_refused() -> None:
    assert check.compare_limits(check.Case(DATA, "pal_limits")) == (0.0, 0.0)


def test_sampling_probabilities_equal_the_authors_code() -> None:
    assert max(check.compare_sampling(check.Case(DATA, "pal_sampling"))) <= 1e-12


def test_command_reports_each_case_and_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = check.main(["--golden", str(DATA), "--host", "layer", "--case", "pal_module"])
    lines = capsys.readouterr().out.splitlines()
    assert status == 0
    assert lines[0].startswith("pal_module layer ok ")
    assert json.loads(lines[-1])["ran"] == 1


def test_command_fails_when_a_number_differs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(DATA / "pal_module.json", tmp_path)
    tensors = load_file(DATA / "pal_module.safetensors")
    tensors["output"] += 1e-3
    save_file(tensors, tmp_path / "pal_module.safetensors")
    assert check.main(["--golden", str(tmp_path)]) == 1
    assert "pal_module layer FAILED" in capsys.readouterr().out


def test_cases_of_methods_not_built_are_never_passed(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"reference": {"repository": "some/other"}}))
    assert check.main(["--golden", str(tmp_path)]) == 1  # nothing ran
    assert capsys.readouterr().out.startswith("other not yet")
