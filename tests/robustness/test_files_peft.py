"""Files of PEFT adapters that would change more than their adapter, or that are no files of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import pal_adapters as pa
from tests import zoo
from tests.robustness.model_state import changes, state

pytestmark = zoo.HOST_WARNINGS
TABLE = "base_model.model.embeddings.word_embeddings.weight"


def base() -> Any:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    ).eval()  # fmt: skip


def pal() -> Any:
    return pa.PALPeftConfig(hidden_size=12, num_heads=2)


def saved(place: Path) -> Path:
    get_peft_model(base(), pal(), adapter_name="rte").save_pretrained(str(place))
    return place / "rte"


def test_embeddings_that_other_adapters_use(tmp_path: Path) -> None:
    """PEFT saves resized embeddings with an adapter: they may not replace those of other adapters."""
    folder = saved(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = base()
    own = plain.embeddings.word_embeddings.weight.detach().clone()
    for new, fits in ((own, True), (own + 1, False)):
        save_file({**tensors, TABLE: new}, folder / "adapter_model.safetensors")
        model = get_peft_model(base(), pal(), adapter_name="sst")
        before = state(model)
        if fits:
            model.load_adapter(str(folder), "rte")
            continue
        with pytest.raises(pa.StorageError, match=r"word_embeddings.weight differs .* 'sst' also use"):
            model.load_adapter(str(folder), "rte")
        assert not changes(before, state(model))
        alone = PeftModel.from_pretrained(plain, str(folder), adapter_name="rte")
        assert torch.equal(alone.get_base_model().embeddings.word_embeddings.weight, new)


@pytest.mark.parametrize("value", [[1, 2], 3, "text"])
def test_a_pickle_of_something_else(value: object, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(value, folder / "adapter_model.bin")
    plain, other = base(), get_peft_model(base(), pal(), adapter_name="sst")
    for model, load in (
        (plain, lambda: PeftModel.from_pretrained(plain, str(folder), adapter_name="rte")),
        (other, lambda: other.load_adapter(str(folder), "rte")),
    ):
        before = state(model)
        with pytest.raises(pa.StorageError, match="not a dictionary of tensors"):
            load()
        assert not changes(before, state(model))
