"""CA-MTL in the hosts' trainers, with heads, and every switch of the config."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset

from pal_adapters.errors import ConfigError, UnsupportedError
from tests.zoo import HOST_WARNINGS

from .network import HOSTS, TASKS, Network, build, inputs

pytestmark = [
    *HOST_WARNINGS,
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
IDS = [0, 2, 1, 0]
both = pytest.mark.parametrize("host", HOSTS)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return float((a - b).detach().abs().max()) <= tolerance


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, vocab_size=40, num_labels=3
    )
    return transformers.BertForSequenceClassification(config).eval()


class Rows(Dataset[Any]):
    """Rows of three tasks; the label follows from the first token and the task."""

    def __init__(self) -> None:
        ids = torch.randint(3, 40, (24, 6), generator=torch.Generator().manual_seed(0))
        self.rows = [
            {"input_ids": row, "attention_mask": torch.ones(6).long(), "labels": int(row[0]) % 3, "task_ids": i % 3}
            for i, row in enumerate(ids)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@both
def test_trainer_trains_the_network_and_its_half_of_the_base(host: str, tmp_path: pathlib.Path) -> None:
    data: Any = Rows()
    base = classifier()
    pretrained = {n: p.detach().clone() for n, p in base.named_parameters()}
    arguments = transformers.TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=6, max_steps=6, learning_rate=0.01, report_to=[],
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    if host == "adapters":
        import adapters

        network = Network(host, base=base)
        network.train()
        trainer: Any = adapters.AdapterTrainer(model=network.model, args=arguments, train_dataset=data)
    else:
        network = Network(host, base=base, task_type="SEQ_CLS")
        trainer = transformers.Trainer(model=network.model, args=arguments, train_dataset=data)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in data]), "attention_mask": torch.ones(24, 6).long()}
    ids = [row["task_ids"] for row in data]
    before = network(batch, ids)
    trainer.train()
    network.model.eval()
    after = network(batch, ids)
    assert not close(before, after, 1e-3)
    for name, parameter in network.base.named_parameters():
        if name in pretrained and not name.startswith("classifier"):
            assert torch.equal(parameter, pretrained[name])
    if host == "peft":
        from peft import PeftModel

        network.model.save_pretrained(str(tmp_path))
        again = PeftModel.from_pretrained(classifier(), str(tmp_path / "all")).eval()
        assert close(again(**batch, task_ids=ids).logits, after)


@pytest.mark.usefixtures("transformers_takes_this_peft")
@pytest.mark.skipif("peft" not in HOSTS, reason="peft is not installed")
def test_transformers_own_interface(tmp_path: pathlib.Path) -> None:
    network, batch = Network("peft"), inputs("bert")
    network.randomise()
    expected = network(batch, IDS)
    network.model.save_pretrained(str(tmp_path))
    model = build("bert")
    plain = model(**batch).last_hidden_state
    model.load_adapter(str(tmp_path / "all"), adapter_name="all")
    model.eval()
    assert close(model(**batch, task_ids=[TASKS[i] for i in IDS]).last_hidden_state, expected)
    with pytest.raises(UnsupportedError, match="task_ids is None"):
        model(**batch)
    model.disable_adapters()
    assert torch.equal(model(**batch).last_hidden_state, plain)


@pytest.mark.skipif("peft" not in HOSTS, reason="peft is not installed")
def test_what_peft_refuses() -> None:
    network, batch = Network("peft"), inputs("bert")
    with pytest.raises(UnsupportedError, match="adapter_names is not supported for ca_mtl"):
        network.model(**batch, adapter_names=["all"] * 4)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        network.model.merge_and_unload()
    for name, value in (("layers_to_transform", [0]), ("exclude_modules", ["encoder.layer.0"])):
        with pytest.raises(ConfigError, match=f"{name}=.*attention_layers and norm_layers"):
            network.config(**{name: value})
    with pytest.raises(ConfigError, match="all 4 blocks, but 1"):
        Network("peft", target_modules=["encoder.layer.0"])


@pytest.mark.skipif("adapters" not in HOSTS, reason="adapters is not installed")
def test_compositions_of_adapters() -> None:
    from adapters import LoRAConfig
    from adapters.composition import Parallel, Stack

    from pal_adapters import PALConfig

    network, batch = Network("adapters"), inputs("bert")
    network.randomise()
    alone = network(batch, IDS)
    network.model.add_adapter("lora", config=LoRAConfig())
    network.model.add_adapter("pal", config=PALConfig(hidden_size=12))
    setup: Any = Stack("all", "lora", "pal")
    network.activate(setup)
    assert close(network(batch, IDS), alone)  # fresh ones change nothing
    network.activate(Parallel("all", "pal"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="steers the whole model"):
        network(batch, IDS)
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        network.model.merge_adapter("all")
    with pytest.raises(UnsupportedError, match="cannot be used"):
        network.model.add_adapter_fusion(["all", "pal"])


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_modulation": "matrix"},
        {"norm_modulate_bias": True},
        {"alignment": False},
        {"attention_layers": [1], "norm_layers": [0, 3]},
        {"bottleneck_size": 5},
        {"freeze_layers": [], "freeze_embeddings": False},
        {"train_base": False},
        {"top_block_init": "scratch"},
        {"max_length": 10},
        {"freeze_rule": "code"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_switch(host: str, changes: dict[str, Any]) -> None:
    network, batch = Network(host, **changes), inputs("bert")
    units = network.units()
    names = {n for i, unit in enumerate(units) for n, _ in unit.named_parameters(prefix=str(i))}
    has = lambda text: any(text in name for name in names)  # noqa: E731
    if "attention_layers" in changes:
        assert [unit.attention is not None for unit in units] == [False, True, False, False]
        assert [len(unit.norms) for unit in units] == [2, 0, 0, 2]
    assert has("bias_film") == ("norm_modulate_bias" in changes)
    assert ("alignment.modulation.weight" in units[0].shared_weights()) == ("alignment" not in changes)
    assert has("word_embeddings") == ("freeze_embeddings" in changes)
    assert has(".base.") == has(".outer.") == ("train_base" not in changes)
    if "top_block_init" in changes:
        copies = units[3].base
        assert 0.015 < float(copies["intermediate__dense__weight"].detach().std()) < 0.025
        assert torch.equal(copies["output__LayerNorm__weight"], torch.ones(24))
        assert not copies["output__dense__bias"].any()
    network.randomise()
    mixed = network(batch, IDS)
    alone = network({n: v[1:2] for n, v in batch.items()}, [2])
    assert close(alone, mixed[1:2])
    network.train()
    trained = {n for n, p in network.parameters().items() if p.requires_grad}
    expected = set(network.parameters())
    if "freeze_rule" in changes:
        film = network.units()[0].attention.film.parameters()
        frozen = {id(p) for p in film}
        expected -= {n for n, p in network.parameters().items() if id(p) in frozen}
        assert len(expected) == len(network.parameters()) - 2
    assert trained == expected


@both
def test_presets(host: str) -> None:
    import pal_adapters

    cls: Any = pal_adapters.CAMTLConfig if host == "adapters" else pal_adapters.CAMTLPeftConfig
    default, base = cls(tasks=TASKS), cls.preset("ca_mtl_base", tasks=TASKS)
    assert default.to_dict() == base.to_dict()
    large = cls.preset("ca_mtl_large_code", tasks=2, max_length=64)
    assert (large.bottleneck, large.freeze_rule, large.tasks, large.max_length) == ("stream", "code", ["0", "1"], 64)
    assert large.identity_init is False
    with pytest.raises(ConfigError, match="name='ca_mtl'"):
        cls.preset("ca_mtl", tasks=2)
    if host == "adapters":
        from adapters import AdapterConfig

        config = AdapterConfig.load("ca_mtl_large[tasks=8]")
        assert (config.bottleneck, len(config.tasks)) == ("stream", 8)


_NAME = "default"  # with another, transformers' trainer does not find PEFT's best checkpoint


def _fresh(host: str, weights: str) -> Network:
    more: dict[str, Any] = {} if host == "adapters" else {"task_type": "SEQ_CLS"}
    return Network(host, name=_NAME, base=classifier(), base_weights=weights, **more)


def _train(
    host: str, folder: pathlib.Path, weights: str, *, best: bool = False, resume: str | None = None
) -> tuple[Any, Any]:
    """A network that a trainer trained for six steps with a checkpoint behind each third, and its trainer."""
    data: Any = Rows()
    network = _fresh(host, weights)
    network.train(_NAME)
    more: dict[str, Any] = {}
    if best:
        more = {
            "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True,
            "metric_for_best_model": "score", "greater_is_better": True,
        }  # fmt: skip
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=6, max_steps=6, learning_rate=0.02, report_to=[],
        save_strategy="steps", save_steps=3, remove_unused_columns=False, disable_tqdm=True, use_cpu=True, **more,
    )  # fmt: skip
    scores = iter([0.9, 0.1, 0.1, 0.1])
    kind: Any = transformers.Trainer
    if host == "adapters":
        import adapters

        kind = adapters.AdapterTrainer
    evaluation = {"eval_dataset": data, "compute_metrics": lambda _: {"score": next(scores)}} if best else {}
    trainer = kind(model=network.model, args=arguments, train_dataset=data, **evaluation)
    for module in network.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train(resume_from_checkpoint=resume)
    network.model.eval()
    return network, trainer


@both
@pytest.mark.parametrize("weights", ["copies", "in_place"])
def test_trainer_resumes_and_reloads_the_best(host: str, weights: str, tmp_path: pathlib.Path) -> None:
    batch, ids = inputs("bert"), torch.tensor(IDS)
    whole, _ = _train(host, tmp_path / "whole", weights)
    expected = whole(batch, ids)
    # A fresh network that goes on from half-way ends at the same place, bases' copies, task vectors, head and all.
    resumed, _ = _train(host, tmp_path / "resumed", weights, resume=str(tmp_path / "whole" / "checkpoint-3"))
    assert close(resumed(batch, ids), expected, 1e-5)
    # The best was at step 3, which is not where training ended.
    best, trainer = _train(host, tmp_path / "best", weights, best=True)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert not close(best(batch, ids), expected, 2e-4)
    half, checkpoint = _fresh(host, weights), tmp_path / "best" / "checkpoint-3"
    if host == "adapters":
        half.model.delete_adapter(_NAME)
        half.model.load_adapter(str(checkpoint / _NAME), load_as="again")
        half.activate("again")
        half.model.classifier.load_state_dict(best.model.classifier.state_dict())
    else:
        from peft import PeftModel

        half.model = PeftModel.from_pretrained(classifier(), str(checkpoint))
    half.model.eval()
    assert close(half(batch, ids), best(batch, ids), 1e-6)
