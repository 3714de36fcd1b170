"""Tiny models and a small config of every method, for the tests of the PEFT half."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tests.methods import RECORDS, names

TRANSFORMERS_5 = int(transformers.__version__.partition(".")[0]) >= 5

METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    name: (RECORDS[name].config_class("peft"), dict(RECORDS[name].options)) for name in names("peft")
}
WITH_IDENTITY = [name for name in METHODS if RECORDS[name].method.identity]
# A second size of the same method, for batches that mix widths.
WIDER = {name: RECORDS[name].wider for name in METHODS if RECORDS[name].wider}
WITH_DROPOUT = tuple(name for name in METHODS if RECORDS[name].has_dropout)


def config(method: str, **changes: Any) -> Any:
    """A small config; methods without an identity initialisation always have `init_weights=False`."""
    config_class, defaults = METHODS[method]
    if not RECORDS[method].method.identity:
        changes.pop("init_weights", None)
    return config_class(**{**defaults, **changes})


def bert_config(**changes: Any) -> Any:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    return transformers.BertConfig(vocab_size=40, max_position_embeddings=32, **{**sizes, "num_labels": 3, **changes})


def _seeded(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():  # the usual 0.02 leaves nothing to see in so small a model
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def bert(**changes: Any) -> Any:
    return _seeded(lambda: transformers.BertForSequenceClassification(bert_config(**changes)))


def roberta() -> Any:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    settings = transformers.RobertaConfig(vocab_size=40, max_position_embeddings=40, pad_token_id=1, **sizes)
    return _seeded(lambda: transformers.RobertaForSequenceClassification(settings))


_DECODER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def llama(**changes: Any) -> Any:
    settings = {"vocab_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64, **_DECODER, **_TOKENS}
    return _seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})))


def qwen3() -> Any:
    """Has norms inside its attention."""
    settings = {"vocab_size": 40, "num_key_value_heads": 2, "head_dim": 6, **_DECODER, **_TOKENS}
    return _seeded(lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings)))


def gpt2(**changes: Any) -> Any:
    settings = {"vocab_size": 40, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64, **_TOKENS, **changes}
    return _seeded(lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)))


def t5() -> Any:
    settings = transformers.T5Config(
        vocab_size=40, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return _seeded(lambda: transformers.T5ForConditionalGeneration(settings))


def bart() -> Any:
    settings = transformers.BartConfig(
        vocab_size=40, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: transformers.BartForConditionalGeneration(settings))


TASK_TYPES = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama": "CAUSAL_LM", "qwen3": "CAUSAL_LM", "gpt2": "CAUSAL_LM",
              "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}  # fmt: skip
BUILDERS: dict[str, Callable[[], Any]] = {
    "bert": bert, "roberta": roberta, "llama": llama, "qwen3": qwen3, "gpt2": gpt2, "t5": t5, "bart": bart,
}  # fmt: skip


def inputs(model: str = "bert", rows: int = 4, tokens: int = 6) -> dict[str, Tensor]:
    """Token IDs with padding at the end of every second example."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 40, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, -2:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if TASK_TYPES[model] == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = torch.randint(3, 40, (rows, tokens - 1), generator=generator)
    return given


def rows_of(given: dict[str, Tensor], *indices: int) -> dict[str, Tensor]:
    return {name: value[list(indices)] for name, value in given.items()}


def adapter_parameters(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of one adapter by name, copies of heads included."""
    for name, module in model.named_modules():
        for container in getattr(module, "adapter_layer_names", ()):
            units = getattr(module, container)
            if adapter in units:
                for key, parameter in units[adapter].named_parameters():
                    yield f"{name}.{container}.{adapter}.{key}", parameter


def randomise(model: nn.Module, adapter: str, *, seed: int, scale: float = 0.3) -> None:
    """Give an adapter weights that change the model's output clearly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model, adapter):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def peft_model(
    method: str, model: str = "bert", *, adapters: tuple[str, ...] = ("rte",), randomised: bool = True, **changes: Any
) -> PeftModel:
    """A tiny model with adapters of one method, each with other random weights; the first one is active."""
    changes.setdefault("task_type", TASK_TYPES[model])

    def fresh() -> Any:
        lists = {name: list(value) for name, value in changes.items() if isinstance(value, list)}
        return config(method, **{**changes, **lists})

    wrapped = get_peft_model(BUILDERS[model](), fresh(), adapter_name=adapters[0])
    for name in adapters[1:]:
        wrapped.add_adapter(name, fresh())
    if randomised:
        for seed, name in enumerate(adapters):
            randomise(wrapped, name, seed=seed)
    return wrapped.eval()


@torch.no_grad()
def run(model: Any, adapter: str | None, given: dict[str, Tensor], **arguments: Any) -> Tensor:
    """The logits with one adapter active, or with none."""
    if adapter is None or adapter == "__base__":
        if not isinstance(model, PeftModel):
            return model(**given, **arguments).logits
        with model.disable_adapter():
            return model(**given, **arguments).logits
    model.set_adapter(adapter)
    return model(**given, **arguments).logits


def row_by_row(model: Any, names: list[str], given: dict[str, Tensor]) -> Tensor:
    """Each example on its own, with its adapter active."""
    return torch.cat([run(model, name, rows_of(given, i)) for i, name in enumerate(names)])


def hooks(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many hooks each module has."""
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def no_dropout(model: nn.Module) -> None:
    """Turn every dropout of a model off, also those that are functions."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
