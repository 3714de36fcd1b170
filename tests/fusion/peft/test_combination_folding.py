"""A folded combination computes the same as an ordinary adapter; errors say why others cannot be folded."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import save_file
from torch import Tensor, nn

import pal_adapters as pa
from pal_adapters import fold
from pal_adapters.fusion.peft.report import transfer_rows
from tests import plain
from tests.hosts.peft import cases
from tests.hosts.peft.unchanged import rejected
from tests.processes import python

from . import sources

Paths = Mapping[str, Mapping[str, str]]
PARTS = ("attention.output.dropout", "output.dropout")
VARIANTS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, dict[str, str]] = {kind: sources.save_all(folder, kind) for kind in sources.KINDS}
    settings = ({"r": 4, "target_modules": ["query", "word_embeddings"]}, {"r": 2, "target_modules": "all-linear"})
    found["embedding"] = {
        f"s{i}": sources.save(folder / f"s{i}", LoraConfig(**arguments), seed=i)  # type: ignore[arg-type]
        for i, arguments in enumerate(settings)
    }
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**cases.inputs()).logits


def target(paths: Mapping[str, str], **changes: Any) -> Any:
    config = pa.ScaLearnPeftConfig(adapters=dict(paths), task_type="SEQ_CLS", **changes)
    model = get_peft_model(cases.bert(), config, adapter_name="rte")
    sources.randomise(model, seed=3, scale=0.2)
    return model.eval()


ABLATED = [(v, None) for v in VARIANTS] + [("scalearn", "mean"), ("scalearn", "softmax"), ("scalearn_pp", "softmax")]


@pytest.mark.parametrize(("variant", "ablation"), ABLATED)
@pytest.mark.parametrize("kind", ["lora", "houlsby", "embedding"])
def test_folding_is_exact(saved: Paths, kind: str, variant: str, ablation: str | None) -> None:
    model = target(saved[kind], variant=variant, ablation=ablation)
    expected = logits(model)
    assert (expected - logits(cases.bert())).abs().max() > 1e-2
    folded = fold(model)
    assert list(folded.peft_config) == ["rte"]
    assert isinstance(folded.peft_config["rte"], pa.HoulsbyPeftConfig if kind == "houlsby" else LoraConfig)
    torch.testing.assert_close(logits(folded), expected, atol=1e-5, rtol=1e-5)
    assert folded.truncation_errors == {}
    with folded.disable_adapter():
        assert torch.equal(logits(folded), logits(cases.bert()))
    if kind != "houlsby":
        folded = folded.double()  # these random models amplify what adding two weights rounds off
        expected = logits(folded)
        merged = folded.merge_and_unload()
        assert not [n for n, _ in merged.named_parameters() if "lora" in n]
        torch.testing.assert_close(logits(merged.eval()), expected, atol=1e-9, rtol=1e-9)


def test_fixed_combinations_fold(saved: Paths) -> None:
    for kind in ("lora", "houlsby"):
        config = pa.FixedCombinationPeftConfig(adapters=dict(saved[kind]), task_type="SEQ_CLS")
        model = get_peft_model(cases.bert(), config).eval()
        expected = logits(model)
        folded = fold(model, name="sum")
        assert list(folded.peft_config) == ["sum"]
        torch.testing.assert_close(logits(folded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("kind", ["lora", "houlsby"])
def test_other_models(name: str, kind: str, tmp_path: pathlib.Path) -> None:
    modules = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "t5": ["q", "wo"]}
    task = cases.TASK_TYPES[name]
    settings: list[Any] = [LoraConfig(r=r, target_modules=modules[name], task_type=task) for r in (2, 3)]
    if kind == "houlsby":
        settings = [pa.HoulsbyPeftConfig(hidden_size=m, task_type=task) for m in (4, 5)]
    build = cases.BUILDERS[name]
    paths = {f"s{i}": sources.save(tmp_path / f"s{i}", c, seed=i, build=build) for i, c in enumerate(settings)}
    model = get_peft_model(build(), pa.ScaLearnPeftConfig(adapters=paths, task_type=task)).eval()
    sources.randomise(model, seed=3)
    given = cases.inputs(name)
    with torch.no_grad():
        expected = model(**given).logits
        folded = fold(model)
        torch.testing.assert_close(folded(**given).logits, expected, atol=1e-5, rtol=1e-5)


def test_ranks_and_widths_add_up(saved: Paths) -> None:
    folded = fold(target(saved["lora"]))
    ranks = {
        name: layer.r["rte"] for name, layer in folded.get_base_model().named_modules() if hasattr(layer, "lora_A")
    }
    assert ranks["bert.encoder.layer.0.attention.self.query"] == 4 + 3
    assert ranks["bert.encoder.layer.1.attention.self.query"] == 4 + 3 + 3
    assert ranks["bert.encoder.layer.0.attention.self.value"] == 4
    assert ranks["bert.encoder.layer.2.output.dense"] == 2
    assert fold(target(saved["houlsby"])).peft_config["rte"].hidden_size == 4 + 7 + 3


LOAD = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pal_adapters":
            raise ImportError("blocked")
sys.meta_path.insert(0, Blocked())
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
folder = sys.argv[1]
base = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(folder + "/base"))
base.load_state_dict(load_file(folder + "/base/model.safetensors"))
model = PeftModel.from_pretrained(base, folder + "/rte").eval()
given = load_file(folder + "/given.safetensors")
out = {}
with torch.no_grad():
    out["loaded"] = model(**given).logits.tolist()
    out["merged"] = model.merge_and_unload()(**given).logits.tolist()
assert not [name for name in sys.modules if name.startswith("pal_adapters")]
print("RESULT" + json.dumps(out))
"""


def test_a_folded_lora_loads_without_us(saved: Paths, tmp_path: pathlib.Path) -> None:
    model = target(saved["lora"], variant="scalearn_pp")
    expected = logits(model)
    fold(model).save_pretrained(str(tmp_path))
    stored = (tmp_path / "rte" / "adapter_config.json").read_text()
    assert "pal_adapters" not in stored
    assert json.loads(stored)["peft_type"] == "LORA"
    base = cases.bert()
    base.config.save_pretrained(str(tmp_path / "base"))
    save_file(base.state_dict(), tmp_path / "base" / "model.safetensors")
    save_file(cases.inputs(), tmp_path / "given.safetensors")
    done = python("-c", LOAD, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    for name in ("loaded", "merged"):
        torch.testing.assert_close(torch.tensor(found[name]), expected, atol=1e-5, rtol=1e-5)


def test_a_folded_houlsby_adapter_is_saved_and_loaded(saved: Paths, tmp_path: pathlib.Path) -> None:
    model = target(saved["houlsby"])
    expected = logits(model)
    fold(model).save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "rte")).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_truncated_lora_is_the_best_of_its_rank(saved: Paths) -> None:
    whole, cut = fold(target(saved["lora"])), fold(target(saved["lora"]), truncate=3)
    kept = {name: layer for name, layer in cut.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    for name, layer in whole.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        product = layer.get_delta_weight("rte").detach()
        if layer.r["rte"] <= 3:
            assert name not in cut.truncation_errors
            torch.testing.assert_close(kept[name].get_delta_weight("rte").detach(), product)
            continue
        assert kept[name].r["rte"] == 3
        u, s, v = torch.linalg.svd(product)
        best = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
        torch.testing.assert_close(kept[name].get_delta_weight("rte").detach(), best, atol=1e-5, rtol=1e-4)
        error = (product - best).norm() / product.norm()
        assert abs(cut.truncation_errors[name] - error) < 1e-5
        assert error > 0.05
    # Enough is exact, and says so.
    enough = fold(target(saved["lora"]), truncate=10)
    assert enough.truncation_errors == {}
    torch.testing.assert_close(logits(enough), logits(whole), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("with_data", [False, True])
def test_truncated_houlsby_reports_its_error(saved: Paths, with_data: bool) -> None:
    given = cases.inputs()
    data = [given] if with_data else None
    whole = fold(target(saved["houlsby"]))
    places = [f"bert.encoder.layer.{i}.{p}" for i in range(3) for p in PARTS]
    errors = []
    for width in (13, 9, 5, 2):
        cut = fold(target(saved["houlsby"]), truncate=width, data=data)
        assert cut.peft_config["rte"].hidden_size == width
        assert set(cut.truncation_errors) == {p for p in places if width < 11 or ".1." in p}
        assert all(0 <= error < 1 for error in cut.truncation_errors.values())
        errors.append(cut.truncation_errors.get(places[0], 0.0))
    assert errors == sorted(errors)
    # What it reports is what it is, at a place in front of which nothing was cut.
    place = places[0]
    seen = {}
    for name, model in (("whole", whole), ("cut", cut)):
        layer = model.get_base_model().get_submodule(f"{place}.houlsby")
        module = model.get_base_model().get_submodule(place)
        x = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0))
        if with_data:
            caught: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, a, out, c=caught: c.append(a[0]))
            logits(model)
            handle.remove()
            x = caught[0][given["attention_mask"].bool()]
        w = {n: p.detach() for n, p in layer.houlsby_units["rte"].named_parameters()}
        seen[name] = plain.houlsby(x, w) - x
    rest = (seen["cut"] - seen["whole"]).square().mean().sqrt() / seen["whole"].square().mean().sqrt()
    assert rest.item() == pytest.approx(cut.truncation_errors[place], abs=1e-4)
    assert rest > 0.01
    # A source of coefficient 0 costs nothing.
    model = target(saved["houlsby"])
    sources.set_all(model, {"mnli": 0.8, "rte": -0.4})
    expected = logits(model)
    cut = fold(model, truncate=7, data=data)
    assert max(cut.truncation_errors.values()) < 1e-5
    torch.testing.assert_close(logits(cut), expected, atol=1e-5, rtol=1e-5)


def test_refusals(saved: Paths, tmp_path: pathlib.Path) -> None:
    def refuses(model: Any, match: str, error: type[Exception] = pa.UnsupportedError, **arguments: Any) -> None:
        with rejected(model, error=error, match=match):
            fold(model, **arguments)
        if not arguments:
            with rejected(model, error=error, match=match):
                pa.check_fold(model)

    lora, cls = saved["lora"], {"task_type": "SEQ_CLS"}
    fusion = get_peft_model(cases.bert(), pa.AdapterFusionPeftConfig(adapters=dict(lora), **cls))
    refuses(fusion, "depends on the input")
    refuses(target(saved["pal"]), "attend over the tokens")
    refuses(target({"a": lora["mnli"], "b": saved["houlsby"]["qqp"]}), "no single adapter has both")
    relu = sources.save(tmp_path, pa.HoulsbyPeftConfig(hidden_size=3, activation="relu"), seed=0)
    refuses(target({"a": saved["houlsby"]["qqp"], "b": relu}), "activations")
    model = target(lora).train()
    model.base_model.model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    pa.check_fold(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    refuses(model, "truncate=0", pa.ConfigError, truncate=0)
    refuses(model, "no effect without truncate", pa.ConfigError, data=[cases.inputs()])
    refuses(model, "no effect on LoRA", pa.ConfigError, truncate=2, data=[cases.inputs()])
    refuses(target(saved["houlsby"]), "data is empty", pa.ConfigError, truncate=2, data=[])
    refuses(target(saved["houlsby"]), "data contains an object of type int", pa.ConfigError, truncate=2, data=[1])
    for name in ("__base__", "a.b", "keys"):
        refuses(model, "is not allowed", pa.ConfigError, name=name)
    refuses(model, "'other' is not a combination", pa.UnknownAdapterError, fusion="other")
    model.add_adapter("second", pa.ScaLearnPeftConfig(adapters=["qqp"], **cls))
    refuses(model, "other adapters")
    refuses(
        get_peft_model(cases.bert(), LoraConfig(target_modules=["query"])),
        "one active combination",
        pa.UnknownAdapterError,
    )
    plain = cases.bert()
    with pytest.raises(pa.UnsupportedError, match="has no adapters"):
        fold(plain)
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), plain)
    with pytest.raises(pa.UnsupportedError, match="takes a PeftModel"):
        fold(plain)


@pytest.mark.parametrize("fusion", [["mnli", "qqp"], ("mnli", "qqp"), 3])
def test_what_is_not_a_fusion(saved: Paths, fusion: Any) -> None:
    model = target(saved["lora"])
    for call in (pa.fold, pa.transfer_report):
        with rejected(
            model, error=pa.ConfigError, match=r"is not allowed: pass the name of the adapter .*\(adapters=\["
        ):
            call(model, fusion)


def test_an_error_in_the_middle_of_a_fold(saved: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """The combination is off the base model by then, and comes back."""
    model = target(saved["houlsby"])
    expected = logits(model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("in the middle")

    with monkeypatch.context() as patch, rejected(model, error=RuntimeError, run=lambda: logits(model)):
        patch.setattr("pal_adapters.fusion.peft.folding.set_peft_model_state_dict", fail)
        fold(model)
    assert torch.equal(logits(model), expected)
    assert (logits(fold(model)) - expected).abs().max() < 1e-5


# The table of what was learned


def test_rows_of_coefficients(saved: Paths) -> None:
    model = target(saved["lora"])
    rows = transfer_rows(model)
    found = {(row.place, row.block, row.source): row.value for row in rows}
    assert len(found) == len(rows)
    assert pa.transfer_report(model).start == pytest.approx(2 / 3)
    omega = sources.learned(model, "rte")
    for (place, block, source), value in found.items():
        expected = omega(f"bert.encoder.layer.{block}.{place}", source).abs().mean()
        assert abs(value - expected.item()) < 1e-6
    assert {row.place for row in rows} == {
        "attention.self.query", "attention.self.value", "attention.self.key", "attention.output.dense", "output.dense",
    }  # fmt: skip
    assert len([r for r in rows if r.place == "attention.self.query"]) == 2 * 3 + 1
    pal = transfer_rows(target(saved["pal"], variant="scalearn_pp"))
    assert [(r.block, r.source) for r in pal] == [(b, s) for b in range(3) for s in ("mnli", "qqp", "rte")]
    assert len({r.value for r in pal}) == 3
    houlsby = transfer_rows(target(saved["houlsby"]))
    assert ("bert.embeddings.LayerNorm", None, "mnli") in {(r.place, r.block, r.source) for r in houlsby}


def test_rows_of_attention(saved: Paths) -> None:
    """The mean over all tokens except padding, for any batches."""
    config = pa.AdapterFusionPeftConfig(adapters=dict(saved["pal"]), task_type="SEQ_CLS")
    model = get_peft_model(cases.bert(), config)
    sources.randomise(model, seed=2)
    given = cases.inputs()
    halves = [cases.rows_of(given, 0, 1, 2), cases.rows_of(given, 3)]
    whole, parts = transfer_rows(model, data=[given]), transfer_rows(model, data=halves)
    assert model.training
    kept: list[Tensor] = []
    handle = sources.units(model)["bert.encoder.layer.1"].mixer("residual").register_forward_hook(
        lambda m, a, out: kept.append(out[1])
    )  # fmt: skip
    logits(model.eval())
    handle.remove()
    mean = kept[0][given["attention_mask"].bool()].mean(0)
    for rows in (whole, parts):
        for block in range(3):
            assert abs(sum(r.value for r in rows if r.block == block) - 1) < 1e-6
        got = torch.tensor([r.value for r in rows if r.block == 1])
        torch.testing.assert_close(got, mean, atol=1e-6, rtol=1e-5)
    with pytest.raises(pa.ConfigError, match="pass data="):
        transfer_rows(model)
    with pytest.raises(pa.ConfigError, match="data is empty"):
        transfer_rows(model, data=[])
    with pytest.raises(pa.ConfigError, match="data has no effect"):
        transfer_rows(target(saved["lora"]), data=[given])
    with pytest.raises(pa.UnknownAdapterError, match="'other'"):
        transfer_rows(model, "other")
    with pytest.raises(pa.UnsupportedError, match="0 combinations are active"):
        transfer_rows(cases.bert())
    model.add_adapter("second", config)
    model.set_adapter("second")
    with pytest.raises(pa.UnsupportedError, match="'default' is not active"):
        transfer_rows(model, "default", data=[given])


def test_public_names(saved: Paths) -> None:
    """`fold`, `transfer_report` and `fusion_regularization` take a `PeftModel` as they take a model of adapters."""
    model = target(saved["lora"], regularization=0.1)
    rows = transfer_rows(model)
    table = pa.transfer_report(model)
    assert list(table.sources) == list(saved["lora"])
    for row in rows:
        place = str(row.block) + "." + row.place
        values = dict(zip(table.sources, table.values[list(table.places).index(place)], strict=True))
        assert values[row.source] == row.value
    absent = sum(v is None for line in table.values for v in line)
    assert absent == len(table.places) * len(table.sources) - len(rows) > 0
    assert pa.fusion_regularization(model) > 0
    expected = logits(model)
    folded = pa.fold(model, name="one")
    assert folded.active_adapters == ["one"]
    assert isinstance(folded.peft_config["one"], LoraConfig)
    assert (logits(folded) - expected).abs().max() < 1e-5


def test_a_block_is_one_row_where_there_is_one_kind_of_place(saved: Paths) -> None:
    table = pa.transfer_report(target(saved["pal"]))
    assert list(table.places) == ["0", "1", "2"]
