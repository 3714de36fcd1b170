"""Exported graphs compute what the model does, for batches and lengths that they were not traced with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import pal_adapters
from pal_adapters import export_onnx, export_program, fold
from pal_adapters.errors import ConfigError, UnknownAdapterError, UnsupportedError
from pal_adapters.hosts.method import REGISTERED
from pal_adapters.multitask import HeadConfig, TaskHeads
from tests import zoo
from tests.methods import RECORDS

HOSTS = [host for host in ("adapters", "peft") if REGISTERED[host]]
METHODS = {
    "adapters": ("pal", "low_rank", "parallel_houlsby", "ca_mtl"),
    "peft": ("pal", "low_rank", "houlsby", "ca_mtl"),
}
TASKS = {
    "rte": HeadConfig("single_label", 3),
    "stsb": HeadConfig("regression", pooling="first"),
    "ner": HeadConfig("token_tagging", 5),
    "squad": HeadConfig("span_qa"),
}
SIZES = dict(
    hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30, num_labels=3
)
TRACED = (3, 6)
OTHERS = [(4, 9), (1, 5)]

pytestmark = zoo.HOST_WARNINGS


def bert(kind: Any = BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    return kind(BertConfig(**SIZES)).eval()


def config_of(host: str, method: str, **options: Any) -> Any:
    options = {name: value for name, value in options.items() if name != "tasks" or method == "ca_mtl"}
    return RECORDS[method].config(host, **options)


def adapted(host: str, configs: dict[str, Any], kind: Any = BertForSequenceClassification) -> Any:
    """A model with adapters of random weights, the first of which is active."""
    model, first = bert(kind), next(iter(configs))
    if host == "adapters":
        import adapters

        adapters.init(model)
        for name, config in configs.items():
            model.add_adapter(name, config=config)
        model.set_active_adapters(first)
    else:
        from peft import get_peft_model

        for config in configs.values():
            config.task_type = "SEQ_CLS" if kind is BertForSequenceClassification else "FEATURE_EXTRACTION"
        model = get_peft_model(model, configs[first], adapter_name=first)
        for name in list(configs)[1:]:
            model.add_adapter(name, configs[name])
    zoo.randomise(model)
    return model.eval()


def folded(host: str, folder: Path) -> Any:
    """Two sources as one adapter."""
    if host == "adapters":
        from adapters import SeqBnConfig
        from adapters.composition import Fuse

        model = adapted(host, {name: SeqBnConfig(reduction_factor=4) for name in ("a", "b")})
        fuse = Fuse("a", "b", name="both")
        model.add_adapter_fusion(fuse, pal_adapters.ScaLearnConfig())
        fold(model, fuse, name="folded")
        model.set_active_adapters("folded")
        return model.eval()
    for name in ("a", "b"):
        adapted(host, {"default": pal_adapters.HoulsbyPeftConfig(hidden_size=4)}).save_pretrained(folder / name)
    paths = {name: str(folder / name) for name in ("a", "b")}
    model = adapted(host, {"both": pal_adapters.ScaLearnPeftConfig(adapters=paths)})
    return fold(model, "both").eval()


def heads(host: str, configs: dict[str, Any]) -> TaskHeads:
    """A task per adapter, or all tasks on the one that there is."""
    model = TaskHeads(adapted(host, configs, BertModel))
    for task, head in TASKS.items():
        model.add(task, head)
    return model.eval()


def inputs_of(size: tuple[int, int], tasks: int = 0) -> dict[str, Tensor]:
    """Padded on the right; with `tasks`, an integer for each example."""
    batch, length = size
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    given = {"input_ids": torch.randint(1, 30, size, generator=generator), "attention_mask": mask}
    return {**given, "task_ids": (torch.arange(batch) * 3 + length) % tasks} if tasks else given


Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def as_program(model: nn.Module, inputs: dict[str, Tensor], folder: Path, **fixed: Any) -> Run:
    program = export_program(model, inputs, **fixed).module()
    return lambda given: program(**given)


def as_onnx(model: nn.Module, inputs: dict[str, Tensor], folder: Path, **fixed: Any) -> Run:
    pytest.importorskip("onnxscript")
    session_of = pytest.importorskip("onnxruntime").InferenceSession
    export_onnx(model, folder / "model.onnx", inputs, **fixed)
    session = session_of(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == list(inputs)
    names = [one.name for one in session.get_outputs()]

    def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(None, {name: value.numpy() for name, value in given.items()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return run


FORMS = [pytest.param(as_program, id="program"), pytest.param(as_onnx, id="onnx", marks=pytest.mark.slow)]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], **fixed: Any) -> dict[str, Tensor]:
    found = model(**inputs, **fixed).logits
    return found if isinstance(found, dict) else {"logits": found}


def agree(model: nn.Module, run: Run, tasks: int = 0, **fixed: Any) -> None:
    for size in (TRACED, *OTHERS):
        inputs = inputs_of(size, tasks)
        expected, actual = logits(model, inputs, **fixed), run(inputs)
        for name, value in expected.items():
            found = actual[name]
            if set(expected) <= set(TASKS) and tasks:  # those of the task's own examples count
                found = found[inputs["task_ids"] == list(TASKS).index(name)]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("export", FORMS)
@pytest.mark.parametrize(("host", "method"), [(host, method) for host in HOSTS for method in METHODS[host]])
def test_one_adapter(host: str, method: str, export: Any, tmp_path: Path) -> None:
    tasks = 2 if method == "ca_mtl" else 0
    model = adapted(host, {"one": config_of(host, method, tasks=["a", "b"])})
    agree(model, export(model, inputs_of(TRACED, tasks), tmp_path), tasks)


@pytest.mark.parametrize("export", FORMS)
@pytest.mark.parametrize("host", HOSTS)
def test_folded(host: str, export: Any, tmp_path: Path) -> None:
    model = folded(host, tmp_path)
    agree(model, export(model, inputs_of(TRACED), tmp_path))


@pytest.mark.parametrize("export", FORMS)
@pytest.mark.parametrize("host", HOSTS)
def test_tasks_as_an_input(host: str, export: Any, tmp_path: Path) -> None:
    """Adapters of two sizes, so that each example passes through both kinds and keeps what is its own."""
    sizes = zip(TASKS, (12, 12, 6, 12), strict=True)
    model = heads(host, {task: config_of(host, "pal", hidden_size=size) for task, size in sizes})
    agree(model, export(model, inputs_of(TRACED, 4), tmp_path), tasks=4)


@pytest.mark.parametrize(("host", "method"), [(h, m) for h in HOSTS for m in (*METHODS[h][1:], "top_bert_layer")])
def test_tasks_as_an_input_of_every_kind_of_unit(host: str, method: str, tmp_path: Path) -> None:
    names = ["net"] if method == "ca_mtl" else list(TASKS)
    model = heads(host, {name: config_of(host, method, tasks=list(TASKS)) for name in names})
    agree(model, as_program(model, inputs_of(TRACED, 4), tmp_path), tasks=4)


@pytest.mark.parametrize("host", HOSTS)
def test_one_task_of_several(host: str, tmp_path: Path) -> None:
    model = heads(host, {task: config_of(host, "low_rank") for task in TASKS})
    active = model.backbone.active_adapters
    run = as_program(model, inputs_of(TRACED), tmp_path, task_ids="squad")
    agree(model, run, task_ids="squad")
    assert model.backbone.active_adapters == active


def test_a_decoder(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import get_peft_model

    config = LlamaConfig(
        vocab_size=30, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(LlamaForCausalLM(config), config_of("peft", "pal", task_type="CAUSAL_LM")).eval()
    zoo.randomise(model)
    agree(model, as_program(model, inputs_of(TRACED), tmp_path, use_cache=False), use_cache=False)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        export_program(model, inputs_of(TRACED))


def test_modes_stay() -> None:
    model = TaskHeads(bert(BertModel))
    model.add("rte", TASKS["rte"])
    model.train()
    model.backbone.encoder.eval()
    before = {name: module.training for name, module in model.named_modules()}
    export_program(model, inputs_of(TRACED, 1))
    assert {name: module.training for name, module in model.named_modules()} == before


def test_inputs_are_checked() -> None:
    model = bert()
    with pytest.raises(ConfigError, match="inputs is empty"):
        export_program(model, {})
    with pytest.raises(ConfigError, match="at least two examples"):
        export_program(model, inputs_of((1, 5)))
    with pytest.raises(ConfigError, match="pass a tensor"):
        export_program(model, {"input_ids": [[1, 2]]})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"ending in \.onnx"):
        export_onnx(model, "model.pt", inputs_of(TRACED))


def test_onnx_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pal_adapters.export.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=r"ONNX files need onnx and onnxscript; .*\[export\]"):
        export_onnx(nn.Linear(2, 2), tmp_path / "model.onnx", {"input": torch.ones(2, 2)})
    assert not list(tmp_path.iterdir())


def test_what_no_graph_expresses_is_refused() -> None:
    model = TaskHeads(bert(BertModel))
    model.add("rte", TASKS["rte"])
    inputs = inputs_of(TRACED)
    with pytest.raises(UnsupportedError, match="integer tensor of shape"):
        export_program(model, inputs, task_ids=["rte"] * 3)
    with pytest.raises(UnknownAdapterError, match="'cola' is not there"):
        export_program(model, inputs, task_ids="cola")
    with pytest.raises(UnsupportedError, match="labels cannot be exported"):
        export_program(model, inputs, task_ids="rte", labels=torch.zeros(3))
    model.add("copa", HeadConfig("multiple_choice", num_choices=2))
    with pytest.raises(UnsupportedError, match="several inputs per example"):
        export_program(model, inputs_of(TRACED, 2))


@pytest.mark.parametrize("host", HOSTS)
def test_methods_of_the_host_do_not_mix_in_a_graph(host: str) -> None:
    if host == "peft":
        from peft import LoraConfig

        model = heads(host, {task: LoraConfig(target_modules=["query"]) for task in TASKS})
    else:
        from adapters import SeqBnConfig

        model = heads(host, {task: SeqBnConfig() for task in TASKS})
    with pytest.raises(UnsupportedError, match="is of a method of the host"):
        export_program(model, inputs_of(TRACED, 4))


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
def test_compositions_that_fix_the_batch() -> None:
    from adapters.composition import BatchSplit, MultiTask

    model = adapted("adapters", {name: config_of("adapters", "low_rank") for name in ("a", "b")})
    model.set_active_adapters(BatchSplit("a", "b", batch_sizes=[1, 2]))
    with pytest.raises(UnsupportedError, match=r"BatchSplit.* cannot be exported"):
        export_program(model, inputs_of(TRACED))
    model.set_active_adapters(MultiTask("a", "b"))
    with pytest.raises(UnsupportedError, match="task_ids is no input"):
        export_program(model, inputs_of(TRACED), task_ids=["a", "b", "a"])
    agree(model, as_program(model, inputs_of(TRACED, 2), Path()), tasks=2)


@pytest.mark.skipif("peft" not in HOSTS, reason="needs PEFT")
def test_adapter_names() -> None:
    model = adapted("peft", {name: config_of("peft", "low_rank") for name in ("rte", "cola")})
    with pytest.raises(UnsupportedError, match="adapter_names cannot be exported"):
        export_program(model, inputs_of(TRACED), adapter_names=["rte", "cola", "rte"])
