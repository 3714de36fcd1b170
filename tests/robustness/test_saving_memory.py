"""Saving needs no memory beside the model, or at most that of one file, in both hosts and for a `TaskHeads`."""

from __future__ import annotations

import pathlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel

import pal_adapters as pa
from pal_adapters.hosts import base_files
from pal_adapters.multitask import HeadConfig, TaskHeads
from pal_adapters.multitask.model import files
from tests import zoo

pytestmark = zoo.HOST_WARNINGS
HOSTS = [host for host, config in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if config in pa.__all__]
NAMES = ("rte", "sst")
SHARD = 30_000


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is active, at the moment when most of them are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.data_ptr() for t in self._tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(t) for t in self._tensors(result) if t.data_ptr() not in given]
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        self.bytes = max(self.bytes, sum(tensor.nbytes for tensor in alive))
        return result

    @staticmethod
    def _tensors(tree: Any) -> Iterator[torch.Tensor]:
        return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and not leaf.is_meta)


def base() -> Any:
    sizes = dict(hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=96)
    return BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes))


def flat(model: Any) -> None:
    """Make all parameters parts of one tensor, as some loaders and FSDP leave them."""
    parameters = list(model.parameters())
    whole = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)


def transposed(model: Any) -> None:
    """Make all matrices views that cannot be written as they are."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def adapted(host: str, lay_out: Callable[[Any], None]) -> tuple[Any, Callable[[str], Any]]:
    """A model with adapters that train it, and its host's function that saves them all."""
    model = base()
    lay_out(model)
    if host == "adapters":
        import adapters

        adapters.init(model)
        for name in NAMES:
            model.add_adapter(name, config=pa.PALConfig(hidden_size=12, train_base=True))
        return model, lambda folder: model.save_all_adapters(folder, use_safetensors=True)
    import peft

    config = {"hidden_size": 12, "task_type": "FEATURE_EXTRACTION", "train_base": True}
    tuned: Any = peft.get_peft_model(model, pa.PALPeftConfig(**config), adapter_name=NAMES[0])
    tuned.add_adapter(NAMES[1], pa.PALPeftConfig(**config))
    return tuned, tuned.save_pretrained


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("layout", [flat, transposed])
def test_memory(
    host: str, layout: Callable[[Any], None], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (base_files, files):
        monkeypatch.setattr(module, "SHARD_SIZE", SHARD)
    model, save = adapted(host, layout)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 4 * SHARD
    heads = TaskHeads(model)
    for name in NAMES:
        heads.add(name, HeadConfig("single_label", 2), adapter=name)
    heads.prepare_training(base=True)
    for write in (
        lambda: save(str(tmp_path / "host")),
        lambda: heads.save_pretrained(tmp_path / "heads", checkpoint=True),
    ):
        with Peak() as peak:
            write()
        assert peak.bytes <= (64 if layout is flat else SHARD), f"{peak.bytes} of {size} bytes"
        assert layout is flat or peak.bytes > SHARD / 2  # it counts
    read = TaskHeads.from_pretrained(tmp_path / "heads")
    own = {name: value for name, value in heads.state_dict().items() if "position_ids" not in name}
    assert all(torch.equal(value, own[name]) for name, value in read.state_dict().items() if name in own)
