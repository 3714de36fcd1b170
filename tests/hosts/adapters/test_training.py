"""Training: the host's trainer, activation checkpointing, compilation, low precision and a trained base."""

from __future__ import annotations

import copy
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any

import adapters
import pytest
import torch
from adapters import AdapterTrainer, AutoAdapterModel
from adapters.composition import Average, BatchSplit, Fuse, MultiTask, Stack
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, TrainerCallback, TrainingArguments

from pal_adapters import HoulsbyPALConfig, LowRankConfig, PALConfig, ParallelHoulsbyConfig, TopAttentionConfig

from . import reference as ref
from .tiny import SMALL, add, fresh, hidden, output, parameters_of

# The trainer


def examples() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (8, 6), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": int(row[0]) % 2} for row in ids
    ]


class Remember(TrainerCallback):
    """Keeps the model's tensors after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.states.append({k: v.clone() for k, v in kwargs["model"].state_dict().items()})


def trainer_for(
    model: nn.Module, folder: pathlib.Path, scores: list[float] | None = None
) -> tuple[AdapterTrainer, Remember]:
    """Four steps with a checkpoint each; with scores, the best one is restored at the end."""
    given, remember = iter(scores or []), Remember()
    best: dict[str, Any] = {} if scores is None else dict(
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="score"
    )  # fmt: skip
    trainer = AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=0.1, use_cpu=True,
            save_strategy="steps", save_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            remove_unused_columns=False, logging_strategy="no", **best,
        ),
        train_dataset=examples(),
        eval_dataset=examples(),
        compute_metrics=lambda prediction: {"score": next(given)},
        callbacks=[remember],
    )  # fmt: skip
    return trainer, remember


@pytest.mark.parametrize("method", ["pal", "houlsby_pal", "parallel_houlsby"])
def test_trainer_trains_saves_and_restores_the_best(
    method: str, base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = AutoAdapterModel.from_pretrained(base_path)
    model.add_adapter("a", config=SMALL[method])
    model.add_adapter("other", config=SMALL[method])
    model.add_classification_head("a", num_labels=2)
    model.train_adapter("a")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer, remember = trainer_for(model, tmp_path, scores=[0.1, 0.9, 0.3, 0.2])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = remember.states[1], remember.states[3]
    ours = [k for k in start if "pal_adapters.a." in k or "shared_parameters.a." in k]
    assert any("shared_parameters.a." in k for k in ours) == (method != "parallel_houlsby")
    for key, value in model.state_dict().items():
        if key in ours:
            assert torch.equal(value, best[key]), key
            assert not torch.equal(best[key], last[key]) or key.endswith("key.bias"), key
        elif not key.startswith("heads.a"):
            assert torch.equal(value, start[key]), key


# Activation checkpointing


SETUPS: list[Any] = [
    *SMALL, Stack("pal", "seq", "low_rank"), BatchSplit("seq", "pal", batch_sizes=2), Fuse("pal", "seq"),
    Average("pal", "parallel_houlsby"), MultiTask("pal", "lhuc"),
]  # fmt: skip


@pytest.fixture(scope="module")
def every(plain_bert: nn.Module) -> nn.Module:
    model = copy.deepcopy(plain_bert)
    torch.manual_seed(3)
    for name in SMALL:
        add(model, name, name)
    model.add_adapter("seq", config="seq_bn")
    model.add_adapter_fusion(Fuse("pal", "seq"))
    return model


def gradients(
    model: nn.Module, batch: dict[str, Tensor], setup: Any, *, how: str, checkpoint: bool
) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "adapter" in name or "shared_parameters" in name
    model.train()
    if checkpoint:
        model.gradient_checkpointing_enable()
    more = {"task_ids": [0, 1, 1, 0]} if isinstance(setup, MultiTask) else {}
    torch.manual_seed(11)  # dropout is on
    if how == "context":
        with adapters.AdapterSetup(setup):
            result = model(**batch, **more).last_hidden_state
    else:
        model.set_active_adapters(setup)
        result = model(**batch, **more).last_hidden_state
    if how == "changed":
        model.set_active_adapters("low_rank")
    result.pow(2).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"output": result.detach()}


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("how", ["active", "context"])
def test_checkpointing_is_bit_equal(how: str, setup: Any, every: nn.Module, batch: dict[str, Tensor]) -> None:
    plain = gradients(every, batch, setup, how=how, checkpoint=False)
    again = gradients(every, batch, setup, how=how, checkpoint=True)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert torch.equal(grad, again[name]), name
    assert any("pal_adapters" in name and grad.abs().max() > 0 for name, grad in plain.items())


def test_checkpointing_keeps_the_setup_of_the_forward_pass(every: nn.Module, batch: dict[str, Tensor]) -> None:
    plain = gradients(every, batch, "pal", how="changed", checkpoint=False)
    again = gradients(every, batch, "pal", how="changed", checkpoint=True)
    assert all(torch.equal(grad, again[name]) for name, grad in plain.items())


# Compilation


def test_compiled_in_one_graph(every: nn.Module, batch: dict[str, Tensor]) -> None:
    """The forward pass traces as one graph, as the host's own does; another setup is another graph."""
    torch._dynamo.reset()
    every.eval()
    compiled = torch.compile(every, backend="eager", fullgraph=True)
    for setup in (Stack("low_rank", "seq", "pal"), "parallel_houlsby"):
        every.set_active_adapters(setup)
        with torch.no_grad():
            expected = every(**batch).last_hidden_state
            torch.testing.assert_close(compiled(**batch).last_hidden_state, expected, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


def test_compiled_gradients_of_a_mixed_batch(every: nn.Module, batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(every)
    model.train_adapter(MultiTask("pal", "low_rank"))
    model.eval()
    torch._dynamo.reset()
    found = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        forward(**batch, task_ids=[0, 1, 1, 0]).last_hidden_state.pow(2).sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch._dynamo.reset()
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-4, rtol=1e-4)


# Narrow dtypes


NARROW = {
    "pal": (PALConfig(hidden_size=12, num_heads=3), "pal"),
    "low": (LowRankConfig(hidden_size=5), "low_rank"),
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_base_with_float32_adapters(
    dtype: torch.dtype, name: str, bert: nn.Module, batch: dict[str, Tensor]
) -> None:
    bert.to(dtype)
    config, method = NARROW[name]
    bert.add_adapter(name, config=config)
    for parameter in parameters_of(bert, name).values():
        assert parameter.dtype == torch.float32
        nn.init.normal_(parameter, std=0.1)
    weights = ref.weights_of(bert, name, method)

    def term(block: ref.Block, value: Tensor) -> Tensor:
        x, own = block.x.float(), weights[block.index]
        added = ref.pal(x, own, 3, block.mask) if method == "pal" else ref.low_rank(x, own)
        return value + added.to(dtype)

    expected = ref.bert(bert, batch["input_ids"], batch["attention_mask"], o2=term).detach()
    actual = output(bert, batch, name)
    assert actual.dtype == dtype
    kept = batch["attention_mask"].bool()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[kept].float(), expected[kept].float(), atol=0.06, rtol=0.06)
    bert.train_adapter(name)
    bert(**batch).last_hidden_state.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in parameters_of(bert, name).values())


@pytest.mark.parametrize("setup", [*SMALL, BatchSplit("seq", "pal", batch_sizes=2), MultiTask("pal", "lhuc")], ids=str)
def test_autocast(setup: Any, every: nn.Module, batch: dict[str, Tensor]) -> None:
    model = copy.deepcopy(every).eval()
    model.set_active_adapters(setup)
    more = {"task_ids": [0, 1, 1, 0]} if isinstance(setup, MultiTask) else {}
    with torch.no_grad():
        expected = model(**batch, **more).last_hidden_state
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = model(**batch, **more).last_hidden_state
    scale = expected.abs().max()
    assert (actual.float() - expected).abs().max() < 0.1 * scale
    actual.float().pow(2).sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if p.grad is not None]
    assert all(grad.dtype == torch.float32 for grad in grads)


# A base that trains too


def digest(path: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.nan_to_num(model(**batch, output_hidden_states=True).hidden_states[-1]).pow(2).mean().backward()
    optimizer.step()
    model.zero_grad()


@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification, BertForMaskedLM, "auto"])
def test_base_trains_with_the_adapter(model_class: Any, base_path: pathlib.Path, batch: dict[str, Tensor]) -> None:
    if model_class == "auto":
        model = AutoAdapterModel.from_pretrained(base_path)
        model.add_masked_lm_head("joint")
    else:
        model = fresh(base_path, model_class)
    base_names = {n for n, _ in model.base_model.named_parameters() if not n.startswith(("prompt_tuning", "prefix"))}
    model.add_adapter("joint", config=PALConfig(hidden_size=12, train_base=True))
    model.add_adapter("frozen", config=PALConfig(hidden_size=12))
    model.add_adapter("lora", config="lora")
    model.train_adapter("joint")
    trained = {n for n, p in model.base_model.named_parameters() if p.requires_grad}
    own = {n for n, _ in model.base_model.named_parameters() if "pal_adapters.joint." in n or "parameters.joint." in n}
    assert trained == base_names | own
    model.train_adapter("frozen")
    own = {
        n for n, _ in model.base_model.named_parameters() if "pal_adapters.frozen." in n or "parameters.frozen." in n
    }
    assert {n for n, p in model.base_model.named_parameters() if p.requires_grad} == own
    model.add_adapter("seq", config="seq_bn")
    model.add_adapter_fusion(Fuse("joint", "seq"))
    model.train_adapter_fusion(Fuse("joint", "seq"))
    assert all("adapter_fusion_layer" in n for n, p in model.base_model.named_parameters() if p.requires_grad)
    assert model.base_model.embeddings.word_embeddings.weight.requires_grad is False


def test_a_trained_base_is_in_the_file(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path, python: Callable[[str], str]
) -> None:
    on_disk = digest(base_path)
    model = fresh(base_path, BertForSequenceClassification)
    model.add_adapter("joint", config=ParallelHoulsbyConfig(hidden_size=4, train_base=True))
    model.add_adapter("j", config=HoulsbyPALConfig(hidden_size=12, bottleneck_size=4))
    model.train_adapter("joint")
    for _ in range(2):
        step(model, batch)
    model.eval()
    expected = hidden(model, batch, "joint")
    assert (expected - hidden(fresh(base_path), batch, None)).abs().max() > 1e-3
    for safe in (True, False):
        sizes = {}
        for name in ("joint", "j"):
            folder = tmp_path / f"{name}{safe}"
            model.save_adapter(str(folder), name, use_safetensors=safe)
            sizes[name] = sum(p.stat().st_size for p in folder.iterdir())
        assert sizes["joint"] > 3 * sizes["j"]
        for target in (BertModel, BertForMaskedLM):
            other = fresh(base_path, target)
            info: dict[str, Any] = {}
            other.load_adapter(str(tmp_path / f"joint{safe}"), load_as="x", use_safetensors=safe, loading_info=info)
            assert info["missing_keys"] == []
            assert torch.equal(hidden(other, batch, "x"), expected)
    torch.save({"batch": batch, "expected": expected}, tmp_path / "data.pt")
    assert "TrueTrue" in python(f"""
        import torch, adapters, pal_adapters
        from transformers import BertModel
        data = torch.load("data.pt", weights_only=True)
        for safe in (True, False):
            model = BertModel.from_pretrained({str(base_path)!r}).eval()
            adapters.init(model)
            model.load_adapter(f"joint{{safe}}", set_active=True, use_safetensors=safe)
            with torch.no_grad():
                print(torch.equal(model(**data["batch"]).last_hidden_state, data["expected"]), end="")
    """)
    assert digest(base_path) == on_disk


def test_from_a_base_model_into_one_with_a_head(
    base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    model = fresh(base_path)
    model.add_adapter("joint", config=TopAttentionConfig(hidden_size=12, num_layers=1, num_heads=2, train_base=True))
    model.train_adapter("joint")
    step(model, batch)
    model.eval()
    expected = hidden(model, batch, "joint")
    model.save_adapter(str(tmp_path / "joint"), "joint", use_safetensors=True)
    other = fresh(base_path, BertForSequenceClassification)
    other.load_adapter(str(tmp_path / "joint"), use_safetensors=True)
    assert torch.equal(hidden(other, batch, "joint"), expected)
