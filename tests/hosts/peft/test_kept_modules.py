"""`modules_to_save` on modules with task modules, and pretrained weights next to other adapters."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import pal_adapters as pa

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(4, 40, (4, 6), generator=torch.Generator().manual_seed(1))


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "llama":
        sizes = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 32, "pad_token_id": 0}
        return LlamaForSequenceClassification(LlamaConfig(**sizes)).eval()
    if kind == "gpt2":
        config = GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16, pad_token_id=0)
        return GPT2ForSequenceClassification(config).eval()
    if kind == "t5":
        sizes = {"vocab_size": 40, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)).eval()
    return BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=32)).eval()


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def randomise(model: torch.nn.Module, part: str) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


CASES = [
    ("llama", "norm", pa.TopAttentionPeftConfig, {"num_layers": 1}),
    ("gpt2", "ln_f", pa.TopAttentionPeftConfig, {"num_layers": 1}),
    ("llama", "mlp", pa.PALPeftConfig, {}),
    ("gpt2", "mlp", pa.HoulsbyPALPeftConfig, {}),
    ("llama", "self_attn", pa.ParallelHoulsbyPeftConfig, {}),
    ("bert", "output", pa.LHUCPeftConfig, {}),
]


@pytest.mark.parametrize(("kind", "kept", "cls", "options"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_task_modules_on_kept_modules(kind: str, kept: str, cls: Any, options: dict[str, Any], tmp_path: Any) -> None:
    heads = {"num_heads": 2} if "num_heads" in cls.__dataclass_fields__ else {}
    sized = {"hidden_size": 12} if "hidden_size" in cls.__dataclass_fields__ else {}
    config = cls(task_type="SEQ_CLS", modules_to_save=[kept], **options, **heads, **sized)
    plain = cls(task_type="SEQ_CLS", **options, **heads, **sized)
    method = config.peft_type.lower()
    reference, model = get_peft_model(make(kind), plain), get_peft_model(make(kind), config)
    for one in (reference, model):
        randomise(one.eval(), f"{method}_")
    torch.testing.assert_close(logits(model), logits(reference))  # a copy of the module computes the same

    model.train()
    model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    trained = [name for name, p in model.named_parameters() if f"{method}_" in name and p.requires_grad]
    assert trained
    missing = [name for name in trained if model.get_parameter(name).grad is None]
    assert not missing

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(make(kind), tmp_path).eval()), expected)
    assert not torch.allclose(logits(copy.deepcopy(reference)), logits(make(kind)))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"{method}_" in name:
                parameter.zero_()
    assert not torch.allclose(logits(model), expected)
    torch.testing.assert_close(logits(copied), expected)  # a whole copy is one of its own

    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(make(kind)))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_pretrained_weights_beside_other_norms(kind: str, order: tuple[str, str], tmp_path: pathlib.Path) -> None:
    task_type = "SEQ_2_SEQ_LM" if kind == "t5" else "SEQ_CLS"
    common: dict[str, Any] = {"task_type": task_type, "train_base": True, "hidden_size": 4}
    model = get_peft_model(make(kind), pa.HoulsbyPeftConfig(**common), adapter_name="first")
    model.add_adapter("second", pa.HoulsbyPeftConfig(**common, layers_to_transform=[1]))
    model.eval()
    randomise(model, "")
    expected = {}
    for name in order:
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(str(tmp_path))

    both = PeftModel.from_pretrained(make(kind), str(tmp_path / order[0]), adapter_name=order[0])
    both.load_adapter(str(tmp_path / order[1]), order[1])
    for name in order:
        alone = PeftModel.from_pretrained(make(kind), str(tmp_path / name), adapter_name=name).eval()
        torch.testing.assert_close(logits(alone), expected[name], msg=f"{name} alone")
        both.set_adapter(name)
        torch.testing.assert_close(logits(both.eval()), expected[name], msg=f"{name} of both")
