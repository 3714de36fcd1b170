"""Tiny models with a CA-MTL network in either host."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import pal_adapters

HOSTS = [h for h, c in (("peft", "CAMTLPeftConfig"), ("adapters", "CAMTLConfig")) if c in pal_adapters.__all__]
TASKS = ["rte", "mrpc", "cola"]
_SMALL: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}
_TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(kind: str, **changes: Any) -> Any:
    """A model of four blocks of width 24, with weights that make every part matter."""
    torch.manual_seed(0)
    t = transformers
    if kind == "bert":
        config: Any = t.BertConfig(hidden_size=24, vocab_size=40, **_SMALL)
        model: Any = t.BertModel
    elif kind == "roberta":
        config, model = (
            t.RobertaConfig(hidden_size=24, max_position_embeddings=40, **_SMALL, **_TOKENS),
            t.RobertaModel,
        )
    elif kind == "distilbert":
        config, model = (
            t.DistilBertConfig(dim=24, n_layers=4, n_heads=4, hidden_dim=32, vocab_size=40),
            t.DistilBertModel,
        )
    elif kind == "electra":
        config = t.ElectraConfig(hidden_size=24, embedding_size=16, vocab_size=40, **_SMALL)
        model = t.ElectraModel
    elif kind == "vit":
        config, model = t.ViTConfig(hidden_size=24, image_size=8, patch_size=4, **_SMALL), t.ViTModel
    elif kind == "gpt2":
        config, model = t.GPT2Config(n_embd=24, n_layer=4, n_head=4, n_positions=40, **_TOKENS), t.GPT2LMHeadModel
    elif kind == "llama":
        config = t.LlamaConfig(hidden_size=24, num_key_value_heads=2, **_SMALL, **_TOKENS)
        model = t.LlamaForCausalLM
    else:
        relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
        made, model = (
            (t.DebertaV2Config, t.DebertaV2Model) if kind == "deberta-v2" else (t.DebertaConfig, t.DebertaModel)
        )
        config = made(hidden_size=24, vocab_size=40, **_SMALL, **relative)
    for name, value in changes.items():
        setattr(config, name, value)
    built = model._from_config(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.15)
    return built


def inputs(kind: str, rows: int = 4, tokens: int = 9) -> dict[str, Tensor]:
    """A batch, padded on the side that the model likes, but for ViT."""
    generator = torch.Generator().manual_seed(5)
    if kind == "vit":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    ids = torch.randint(3, 40, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    left = kind in ("gpt2", "llama")
    for row in range(1, rows, 2):
        mask[row, slice(0, 3) if left else slice(tokens - 3, tokens)] = 0
    return {"input_ids": ids, "attention_mask": mask}


class Network:
    """A model with CA-MTL networks, through one host's public interface."""

    def __init__(self, host: str, kind: str = "bert", name: str = "all", *, base: Any = None, **config: Any) -> None:
        self.host, self.kind = host, kind
        self.base = build(kind) if base is None else base
        self.model: Any = self.base
        if host == "adapters":
            import adapters

            adapters.init(self.base)
        self.add(name, **config)

    def config(self, **changes: Any) -> Any:
        cls = pal_adapters.CAMTLConfig if self.host == "adapters" else pal_adapters.CAMTLPeftConfig
        values = {"tasks": list(TASKS), "max_length": 16, **changes}
        return cls(**values)

    def add(self, name: str, **config: Any) -> None:
        made = self.config(**config)
        if self.host == "adapters":
            self.model.add_adapter(name, config=made)
            self.model.set_active_adapters(name)
        elif self.model is self.base:
            from peft import get_peft_model

            self.model = get_peft_model(self.base, made, adapter_name=name)
        else:
            self.model.add_adapter(name, made)
        self.model.eval()

    def activate(self, name: str | None) -> None:
        if self.host == "adapters":
            self.model.set_active_adapters(name)
        elif name is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(name)

    def train(self, name: str = "all") -> None:
        if self.host == "adapters":
            self.model.train_adapter(name)
        else:
            self.model.set_adapter(name)

    def parameters(self, name: str = "all") -> dict[str, nn.Parameter]:
        """Everything that the adapter has."""
        marks = (f".{name}.",)
        return {n: p for n, p in self.model.named_parameters() if any(m in f".{n}" for m in marks) and "head" not in n}

    def randomise(self, name: str = "all", *, seed: int = 1, std: float = 0.15) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters(name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)

    def units(self, name: str = "all") -> list[Any]:
        from pal_adapters.blocks.sites import find_blocks

        blocks = [block.module for block in find_blocks(self.base)]
        if self.host == "adapters":
            return [next(iter(block.task_layer.units(name))) for block in blocks]
        return [block.ca_mtl.units[name] for block in blocks]

    def __call__(self, batch: dict[str, Tensor], tasks: Any = None, **arguments: Any) -> Tensor:
        extra = {} if tasks is None else {"task_ids": tasks}
        output = self.model(**batch, **extra, **arguments)
        return output.logits if "logits" in output else output.last_hidden_state


def real(batch: dict[str, Tensor], output: Tensor) -> Tensor:
    """The rows and tokens that are not padding."""
    mask = batch.get("attention_mask")
    return output if mask is None else output[mask.bool()]
