"""Saving here, loading in a new process."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file

import pal_adapters
from tests.processes import python

from . import cases

# A process of its own reads this folder and writes what it found.
CHILD = """
import json, pathlib, sys, warnings
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForFeatureExtraction
from peft import AutoPeftModelForSequenceClassification, PeftModel
from peft.mapping import get_peft_config

try:  # what a process that forgot the import sees: PEFT can only name the method
    get_peft_config({"peft_type": "PAL"})
except KeyError as error:
    assert str(error) == "'PAL'"
else:
    raise AssertionError
import pal_adapters
import tests.methods  # with a method of another package

warnings.filterwarnings("error", message=".*missing adapter keys.*")
transformers.logging.disable_progress_bar()
root = pathlib.Path(sys.argv[1])
given = torch.load(root / "given.pt")
found = {}
for case in sorted(p for p in root.iterdir() if (p / "expected.pt").exists()):
    expected = torch.load(case / "expected.pt")
    name = case.name.rpartition("-")[2]
    task = json.loads((case / "rte" / "adapter_config.json").read_text())["task_type"]
    base = lambda: (
        transformers.AutoModelForCausalLM if name == "llama" else transformers.BertForSequenceClassification
    ).from_pretrained(root / f"base-{name}").eval()

    def same(model, adapter, which):
        model.set_adapter(adapter)
        with torch.no_grad():
            return bool(torch.equal(model.eval()(**given).logits, expected[which]))

    result = {}
    for low in (False, True):
        model = PeftModel.from_pretrained(base(), case / "rte", low_cpu_mem_usage=low)
        result[f"frozen {low}"] = not any(p.requires_grad for p in model.parameters())
        result[f"from_pretrained {low}"] = same(model, "default", "rte")
        result[f"no meta {low}"] = not any(p.is_meta for p in model.parameters())
        report = model.load_adapter(case / "sst", "other", low_cpu_mem_usage=low)
        result[f"keys {low}"] = not report.missing_keys and not report.unexpected_keys
        result[f"load_adapter {low}"] = same(model, "other", "sst") and same(model, "default", "rte")
    model = PeftModel.from_pretrained(base(), case / "rte", adapter_name="mine", is_trainable=True)
    result["trainable"] = all(p.requires_grad for n, p in model.named_parameters() if ".mine." in n)
    model.load_adapter(case / "sst", "more", is_trainable=True)
    result["more"] = same(model, "more", "sst")
    auto = {"SEQ_CLS": AutoPeftModelForSequenceClassification, "CAUSAL_LM": AutoPeftModelForCausalLM,
            "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction, None: AutoPeftModel}[task]
    result["auto"] = same(auto.from_pretrained(case / "rte", adapter_name="mine"), "mine", "rte")
    pickled = PeftModel.from_pretrained(base(), case / "pickled" / "rte")
    result["pickled"] = same(pickled, "default", "rte")
    result["class"] = type(pickled.peft_config["default"]).__name__
    found[case.name] = result
(root / "found.json").write_text(json.dumps(found))
"""

CASES = [
    (method, name, task) for method in cases.METHODS for name, task in (("bert", "SEQ_CLS"), ("llama", "CAUSAL_LM"))
]
CASES += [("pal", "bert", None), ("houlsby", "llama", None)]


def label(method: str, name: str, task: str | None) -> str:
    return f"{method}{'' if task else '_untyped'}-{name}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every method saved here and loaded in a new process."""
    root = tmp_path_factory.mktemp("saved")
    given = cases.inputs()
    torch.save(given, root / "given.pt")
    for name in ("bert", "llama"):
        cases.BUILDERS[name]().save_pretrained(root / f"base-{name}")
    for method, name, task in CASES:
        base = type(cases.BUILDERS[name]()).from_pretrained(root / f"base-{name}").eval()
        from peft import get_peft_model

        fresh = lambda: cases.config(method, task_type=task, init_weights=False)  # noqa: B023, E731
        model = get_peft_model(base, fresh(), "rte")
        model.add_adapter("sst", fresh())
        for seed, adapter in enumerate(("rte", "sst")):
            cases.randomise(model, adapter, seed=seed)
        folder = root / label(method, name, task)
        model.save_pretrained(folder)
        model.save_pretrained(folder / "pickled", safe_serialization=False)
        assert (folder / "rte" / "adapter_model.safetensors").exists()
        assert (folder / "pickled" / "sst" / "adapter_model.bin").exists()
        torch.save({a: cases.run(model.eval(), a, given) for a in ("rte", "sst")}, folder / "expected.pt")
    script = root / "child.py"
    script.write_text(CHILD)
    done = python(script, root)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / "found.json").read_text())


@pytest.mark.parametrize(("method", "name", "task"), CASES)
def test_in_a_new_process(found: dict[str, dict[str, Any]], method: str, name: str, task: str | None) -> None:
    result = dict(found[label(method, name, task)])
    assert result.pop("class") == cases.METHODS[method][0].__name__
    assert len(result) > 10
    assert all(value is True for value in result.values()), result


@pytest.mark.parametrize("names", [("rte", "rte_large", "large"), ("0", "1", "2"), ("encoder", "layer", "attention")])
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained:UserWarning")
def test_names_that_contain_each_other_or_parts_of_the_model(
    method: str, names: tuple[str, ...], tmp_path: pathlib.Path
) -> None:
    """The host drops every key that holds another adapter's name: half of block 0 with adapters "0" and "1"."""
    given = cases.inputs()
    names = (*names, method)
    model = cases.peft_model(method, adapters=names[:3])
    if method not in names[:3]:
        model.add_adapter(method, cases.config(method, task_type="SEQ_CLS"))
        cases.randomise(model, method, seed=9)
    expected = {name: cases.run(model, name, given) for name in names}
    model.save_pretrained(tmp_path)
    loaded = None
    for name, other in zip(names, reversed(names), strict=True):  # loaded under another one's name
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert len(saved) == len(list(cases.adapter_parameters(model, name)))
        if loaded is None:
            loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / name, adapter_name=other)
        else:
            loaded.load_adapter(tmp_path / name, other)
    assert loaded is not None
    for name, other in zip(names, reversed(names), strict=True):
        assert torch.equal(cases.run(loaded, other, given), expected[name]), name


def test_shared_projections_are_stored_once(tmp_path: pathlib.Path) -> None:
    model = cases.peft_model("pal", task_type=None)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "rte" / "adapter_model.safetensors")
    shared = [name for name in saved if ".encoder.weight" in name or ".decoder.weight" in name]
    assert shared == [
        f"base_model.model.bert.encoder.layer.0.pal.pal_shared.{m}.weight" for m in ("decoder", "encoder")
    ]
    assert sum(v.numel() for v in saved.values()) == model.get_nb_trainable_parameters()[0]
    loaded = PeftModel.from_pretrained(cases.bert(), tmp_path / "rte")
    blocks = loaded.get_base_model().bert.encoder.layer
    weights = [block.pal.units["default"].weights()["encoder.weight"] for block in blocks]
    assert all(weight is weights[0] for weight in weights)
    assert sum("shared" in name for name, _ in loaded.named_parameters()) == 4


def test_keys_and_choice_of_adapters(method: str, tmp_path: pathlib.Path) -> None:
    model = cases.peft_model(method, adapters=("rte", "sst"), task_type=None)
    model.save_pretrained(tmp_path, selected_adapters=["sst"])
    assert not (tmp_path / "rte").exists()
    saved = load_file(tmp_path / "sst" / "adapter_model.safetensors")
    own = {n.replace(".sst.", "."): p for n, p in cases.adapter_parameters(model, "sst")}
    assert set(saved) == set(own)
    assert all(torch.equal(saved[name], own[name]) for name in own)
    held = get_peft_model_state_dict(model, adapter_name="sst")
    assert set(held) == set(saved)


def test_reload_over_a_trained_adapter(method: str, tmp_path: pathlib.Path) -> None:
    """What Trainer does with the best checkpoint."""
    model = cases.peft_model(method, adapters=("default",))
    given = cases.inputs()
    expected = cases.run(model, "default", given)
    model.save_pretrained(tmp_path)
    cases.randomise(model, "default", seed=4)
    assert not torch.equal(cases.run(model, "default", given), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(cases.run(model, "default", given), expected)
    assert all(p.requires_grad for _, p in cases.adapter_parameters(model, "default"))


def test_sizes_chosen_from_the_model_are_stored(tmp_path: pathlib.Path) -> None:
    from peft import get_peft_model

    import pal_adapters as pa

    cases.bert().save_pretrained(tmp_path / "base")
    base = type(cases.bert()).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, pa.PALPeftConfig(num_heads=3, task_type="SEQ_CLS"))
    chosen = model.peft_config["default"].hidden_size
    assert isinstance(chosen, int)
    assert chosen % 3 == 0
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").hidden_size == chosen
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    given = cases.inputs()
    assert torch.equal(cases.run(loaded, "default", given), cases.run(model.eval(), "default", given))


def test_the_card_says_how_to_load(method: str, tmp_path: pathlib.Path) -> None:
    model = cases.peft_model(method)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\nTrained on RTE.\n")
    for _ in range(2):  # a second save repeats nothing
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"pal_adapters", model.base_model.method.name} <= set(card.data.tags)
    assert card.data.library_name == "peft"
    assert card.text.count("import pal_adapters\n") == 1
    assert "Trained on RTE." in card.text


def test_cards_of_other_methods_are_left_alone(tmp_path: pathlib.Path) -> None:
    get_peft_model(cases.bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    assert "pal_adapters" not in (tmp_path / "README.md").read_text()


def test_resized_embeddings_come_with_the_file(tmp_path: pathlib.Path) -> None:
    """PEFT stores them with any adapter; transformers' own loader takes them, too."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}

    def base() -> transformers.BertModel:
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes))
        model.resize_token_embeddings(23, mean_resizing=False)
        return model.eval()

    saved = get_peft_model(base(), pal_adapters.PALPeftConfig(hidden_size=6, init_weights=False)).eval()
    with torch.no_grad():
        saved.get_input_embeddings().weight[22] += 1.0
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = base()
    loaded.load_adapter(str(tmp_path), "new")
    ids = torch.tensor([[1, 2, 22]])
    with torch.no_grad():
        expected = saved(input_ids=ids).last_hidden_state
        torch.testing.assert_close(loaded.eval()(input_ids=ids).last_hidden_state, expected, atol=0, rtol=0)
