"""Folding a fusion of bottlenecks into one: equal outputs, plain files, and the reasons why some have no fold."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import adapters
import pytest
import torch
from adapters import DoubleSeqBnConfig
from adapters.composition import Fuse, Stack
from torch import Tensor, nn
from transformers import BertModel

import pal_adapters
from pal_adapters import ConfigError, ScaLearnConfig, UnknownAdapterError, UnsupportedError
from tests.hosts.adapters.tiny import fresh, output, randomise

from .test_scalearn import FUSE, NAMES, VARIANTS, randomise_omegas, with_sources

CONFIGS: dict[str, Any] = {
    **{v: v for v in VARIANTS},
    "mean": ScaLearnConfig(ablation="mean"),
    "softmax": ScaLearnConfig(ablation="softmax", variant="scalearn_pp"),
    "fixed": ScaLearnConfig(fixed=[0.5, -1.0, 2.0]),
}
FOLDABLE = ["seq_bn", "widths", "double_seq_bn", "par_bn", "scaling", "post", "compacter", "leave_out", "ln_before"]


def fused(model: nn.Module, kind: str, config: Any) -> nn.Module:
    if kind == "ln_before":
        for name in NAMES:
            model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4, ln_before=True))
            randomise(model, name)
    else:
        with_sources(model, kind)
    model.add_adapter_fusion(FUSE, config=config)
    randomise_omegas(model)
    return model


def widths_of(model: nn.Module, name: str) -> dict[str, int]:
    return {n: p.shape[0] for n, p in model.named_parameters() if f"adapters.{name}.adapter_down.0.bias" in n}


@pytest.mark.parametrize("kind", FOLDABLE)
@pytest.mark.parametrize("config", ["scalearn", "mean", "fixed"])
def test_folded_equals_the_fusion(kind: str, config: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    fused(bert, kind, CONFIGS[config])
    bert.train_adapter_fusion(FUSE)
    bert.eval()
    setup, modes = bert.active_adapters, {n: m.training for n, m in bert.named_modules()}
    before = {k: v.clone() for k, v in bert.state_dict().items()}
    expected = output(bert, batch, FUSE)
    folded = pal_adapters.fold(bert, FUSE, name="folded")
    assert (folded.name, folded.errors, folded.error) == ("folded", {}, 0.0)
    torch.testing.assert_close(output(bert, batch, "folded"), expected, atol=1e-5, rtol=0)
    assert (expected - output(bert, batch, None)).abs().max() > 1e-2
    assert setup == FUSE
    assert all(bert.get_submodule(n).training is mode for n, mode in modes.items())
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items() if k in before)
    layers = len(folded.widths)
    assert layers == (6 if kind == "double_seq_bn" else 3)
    expected_width = {"widths": 6 + 3 + 8, "leave_out": 12, "compacter": 24}.get(kind, 18)
    assert set(folded.widths.values()) == {expected_width}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_variant_folds(config: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    fused(bert, "double_seq_bn", CONFIGS[config])
    expected = output(bert, batch, FUSE)
    pal_adapters.fold(bert, "a,b,c", name="folded")
    torch.testing.assert_close(output(bert, batch, "folded"), expected, atol=1e-5, rtol=0)


def test_blocks_of_different_widths(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    for name, factor in (("a", {"0": 4, "1": 8, "default": 3}), ("b", {"0": 12, "default": 24}), ("c", 2)):
        bert.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=factor, leave_out=[2]))
        randomise(bert, name)
    bert.add_adapter_fusion(FUSE, config="scalearn")
    randomise_omegas(bert)
    expected = output(bert, batch, FUSE)
    folded = pal_adapters.fold(bert, FUSE, name="folded")
    assert folded.widths == {"0.output_adapter": 6 + 2 + 12, "1.output_adapter": 3 + 1 + 12}
    torch.testing.assert_close(output(bert, batch, "folded"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hidden", [24, 48, 768])
def test_every_width_can_be_asked_for(hidden: int) -> None:
    from pal_adapters.fusion.adapters.folding import _reduction_factor

    for width in range(1, 2 * hidden):
        assert int(hidden // _reduction_factor(hidden, width)) == width


def test_folded_in_a_stack_and_trained_on(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    fused(bert, "seq_bn", "scalearn")
    bert.add_adapter("language", config=adapters.SeqBnConfig(reduction_factor=4))
    randomise(bert, "language")
    expected = output(bert, batch, Stack("language", FUSE))
    pal_adapters.fold(bert, FUSE, name="folded")
    torch.testing.assert_close(output(bert, batch, Stack("language", "folded")), expected, atol=1e-5, rtol=0)
    bert.train_adapter("folded")
    bert(**batch).last_hidden_state.sum().backward()
    assert all(p.grad is not None for n, p in bert.named_parameters() if ".adapters.folded." in n)
    for name in NAMES:
        bert.delete_adapter(name)
    bert.delete_adapter_fusion(FUSE)
    bert.eval()
    bert.set_active_adapters("folded")
    assert output(bert, batch).isfinite().all()


FILES = {"double_seq_bn": True, "compacter": False}  # with safetensors?


def test_the_file_needs_no_plugin(
    plain_bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path,
    python: Callable[[str], str],
) -> None:  # fmt: skip
    expected = {}
    for kind, safe in FILES.items():
        bert = fused(copy.deepcopy(plain_bert), kind, "scalearn")
        expected[kind] = output(bert, batch, FUSE)
        pal_adapters.fold(bert, FUSE, name="folded")
        bert.save_adapter(str(tmp_path / kind), "folded", use_safetensors=safe)
        bert.delete_adapter("folded")
        assert bert.load_adapter(str(tmp_path / kind), use_safetensors=safe) == "folded"
        torch.testing.assert_close(output(bert, batch, "folded"), expected[kind], atol=1e-5, rtol=0)
    torch.save({"batch": batch, "expected": expected}, tmp_path / "values.pt")
    done = python(
        f"""
        import sys
        sys.modules["pal_adapters"] = None  # importing it fails
        import adapters, torch
        from transformers import BertModel
        values = torch.load("values.pt")
        for kind, safe in {FILES!r}.items():
            model = BertModel.from_pretrained({str(base_path)!r}).eval()
            adapters.init(model)
            info = {{}}
            model.load_adapter(kind, set_active=True, use_safetensors=safe, loading_info=info)
            with torch.no_grad():
                output = model(**values["batch"]).last_hidden_state
            error = float((output - values["expected"][kind]).abs().max())
            print(info["missing_keys"], info["unexpected_keys"], error <= 1e-5)
        print([name for name in sys.modules if name.startswith("pal_adapters.")])
        """
    )
    assert done == "[] [] True\n[] [] True\n[]\n"


@pytest.mark.parametrize("with_data", [False, True])
def test_truncation_reports_its_error(with_data: bool, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    fused(bert, "double_seq_bn", "scalearn")
    bert.set_active_adapters(FUSE)
    expected = output(bert, batch)
    data = [batch] if with_data else None
    errors = []
    for width in (18, 12, 6, 2):
        folded = pal_adapters.fold(bert, FUSE, name=f"width{width}", truncate=width, data=data)
        assert set(folded.widths.values()) == {width}
        assert bert.active_adapters == FUSE
        assert len(folded.errors) == (0 if width == 18 else 6)
        assert folded.error == max([*folded.errors.values(), 0.0])
        errors.append((output(bert, batch, f"width{width}") - expected).abs().mean().item())
        bert.set_active_adapters(FUSE)
    assert errors[0] <= 1e-6
    assert errors == sorted(errors)


def test_the_error_of_truncation_is_that_of_the_data(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """Checked at the first place, whose input does not depend on other truncations."""
    fused(bert, "seq_bn", "scalearn")
    pal_adapters.fold(bert, FUSE, name="exact")
    folded = pal_adapters.fold(bert, FUSE, name="cut", truncate=4, data=[batch])
    real = batch["attention_mask"].bool()
    terms = {}
    for name in ("exact", "cut"):
        adapter = bert.encoder.layer[0].output.adapters[name]
        seen: list[Tensor] = []
        handle = adapter.adapter_up.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        output(bert, batch, name)
        handle.remove()
        terms[name] = seen[0][real]
    found = (terms["cut"] - terms["exact"]).square().mean().sqrt() / terms["exact"].square().mean().sqrt()
    assert found.item() == pytest.approx(folded.errors["0.output_adapter"], abs=1e-4)
    assert found > 0.01


@pytest.mark.parametrize("with_data", [False, True])
def test_peft_cuts_to_the_same(
    with_data: bool, bert: nn.Module, batch: dict[str, Tensor], base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    peft = pytest.importorskip("peft")
    paths = {}
    for name, width in (("a", 5), ("b", 7)):
        config = pal_adapters.HoulsbyPeftConfig(hidden_size=width, train_layernorm=False)
        source = peft.get_peft_model(BertModel.from_pretrained(base_path), config)
        for parameter in source.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        source.save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
        bert.add_adapter(name, config=DoubleSeqBnConfig(reduction_factor=24 / (width + 0.5), non_linearity="gelu_new"))
        for index, layer in enumerate(bert.encoder.layer):
            for place, part in ((layer.attention.output, "attention.output"), (layer.output, "output")):
                theirs = source.base_model.model.get_submodule(f"encoder.layer.{index}.{part}.dropout.houlsby")
                unit, adapter = theirs.houlsby_units["default"], place.adapters[name]
                adapter.adapter_down[0].load_state_dict(unit.down.state_dict())
                adapter.adapter_up.load_state_dict(unit.up.state_dict())
    fuse, scales = Fuse("a", "b"), {"a": 0.9, "b": -0.6}
    bert.add_adapter_fusion(fuse, config=pal_adapters.ScaLearnConfig(fixed=scales))
    combined = peft.get_peft_model(
        BertModel.from_pretrained(base_path),
        pal_adapters.FixedCombinationPeftConfig(adapters=paths, coefficients=scales),
    )
    data = [batch] if with_data else None
    with torch.no_grad():
        torch.testing.assert_close(combined.eval()(**batch)[0], output(bert, batch, fuse), atol=1e-5, rtol=1e-5)
        ours = pal_adapters.fold(bert, fuse, name="cut", truncate=4, data=data)
        theirs = pal_adapters.fold(combined, truncate=4, data=data)
        short = {"attention.output.dropout": "mh_adapter", "output.dropout": "output_adapter"}
        names = {f"{i}.{place}": f"encoder.layer.{i}.{part}" for i in range(3) for part, place in short.items()}
        assert ours.errors.keys() == names.keys()
        for place, module in names.items():
            assert theirs.truncation_errors[module] == pytest.approx(ours.errors[place], abs=1e-5)
            assert 0.001 < ours.errors[place] < 1
        torch.testing.assert_close(theirs(**batch)[0], output(bert, batch, "cut"), atol=1e-4, rtol=1e-4)


REFUSED = {
    "attention": ("seq_bn", "dynamic", "depend on the input"),
    "pal": ("pal", "scalearn", r"'a' \(pal\) is not a bottleneck"),
    "mixture": ("mixture", "scalearn", r"'a' \(pal\)"),
    "functions": ("functions", "scalearn", "non-linearity"),
    "gate": ("gate", "scalearn", "gate"),
    "norms": ("norm_of_all", "scalearn", "followed by a layer norm"),
    "placement": ("sequential_and_parallel", "scalearn", "parallel"),
}


def test_a_check_changes_nothing(bert: nn.Module) -> None:
    fused(bert, "seq_bn", "scalearn").train()
    bert.encoder.layer[0].eval()
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in bert.named_parameters()}
    modes = [module.training for module in bert.modules()]
    pal_adapters.check_fold(bert, FUSE)
    assert [module.training for module in bert.modules()] == modes
    assert before.keys() == dict(bert.named_parameters()).keys()
    for name, tensor in bert.named_parameters():
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]


@pytest.mark.parametrize("case", REFUSED)
def test_no_fold_has_a_reason(case: str, bert: nn.Module) -> None:
    kind, config, message = REFUSED[case]
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config=config)
    before = list(bert.state_dict()), dict(bert.adapters_config.adapters)
    with pytest.raises(UnsupportedError, match=f"no exact fold.*{message}"):
        pal_adapters.fold(bert, FUSE, name="folded")
    with pytest.raises(UnsupportedError, match=f"no exact fold.*{message}"):
        pal_adapters.check_fold(bert, FUSE)
    assert (list(bert.state_dict()), dict(bert.adapters_config.adapters)) == before


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fusion": "b,a", "name": "x"}, UnknownAdapterError, "no fusion 'b,a'.*'a,b,c'"),
        ({"fusion": None, "name": "x"}, ConfigError, r"fusion=None .*pass Fuse"),
        ({"fusion": ["a", "b"], "name": "x"}, ConfigError, r"fusion=\['a', 'b'\] is not allowed: pass Fuse"),
        ({"fusion": FUSE}, ConfigError, "name=None"),
        ({"fusion": FUSE, "name": "a"}, ConfigError, "name='a'"),
        ({"fusion": FUSE, "name": "a.b"}, ConfigError, r"name='a\.b'"),
        ({"fusion": FUSE, "name": "x", "truncate": 0}, ConfigError, "truncate=0"),
        ({"fusion": FUSE, "name": "x", "data": []}, ConfigError, "no effect without truncate"),
        ({"fusion": FUSE, "name": "x", "truncate": 3, "data": []}, ConfigError, "data is empty"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str, bert: nn.Module) -> None:
    fused(bert, "seq_bn", "scalearn")
    with pytest.raises(error, match=message):
        pal_adapters.fold(bert, **arguments)
    assert list(bert.adapters_config.adapters) == list(NAMES)


def test_fold_of_a_loaded_fusion(
    bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    fused(bert, "seq_bn", "scalearn_pp")
    expected = output(bert, batch, FUSE)
    bert.save_adapter_setup(str(tmp_path), FUSE, use_safetensors=True)
    other = fresh(base_path)
    other.load_adapter_setup(str(tmp_path), use_safetensors=True)
    pal_adapters.fold(other, FUSE, name="folded")
    torch.testing.assert_close(output(other, batch, "folded"), expected, atol=1e-5, rtol=0)
