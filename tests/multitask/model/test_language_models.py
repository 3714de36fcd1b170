"""Language models: the base's own output layer, what of it is kept, and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbones import HOSTS, backbone
from tiny_tasks import make_task
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaModel

import pal_adapters
from pal_adapters.errors import UnsupportedError
from pal_adapters.multitask import (
    EncodedTask,
    HeadConfig,
    MultiTaskTrainer,
    MultiTaskTrainingArguments,
    TaskDataError,
    TaskHeads,
)

TEXT = HeadConfig("language_modeling", dropout=0.0)


def llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        **changes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def adapted(model: nn.Module, host: str) -> Any:
    torch.manual_seed(1)
    if host == "adapters":
        import adapters

        adapters.init(model)
        model.add_adapter("text", config=pal_adapters.PALConfig(hidden_size=8, num_heads=2))
        model.set_active_adapters("text")
    if host == "peft":
        import peft

        config = pal_adapters.PALPeftConfig(task_type="CAUSAL_LM", hidden_size=8, num_heads=2)
        model = peft.get_peft_model(model, config, adapter_name="text")
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(4, 160, (3, 7), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("host", HOSTS)
def test_the_output_layer_of_the_base(tmp_path: Path, host: str) -> None:
    base = adapted(llama(tmp_path), host)
    expected = base(input_ids=tokens(), labels=tokens())
    model = TaskHeads(base)
    model.add("text", TEXT)
    output = model.eval()(task_ids="text", labels=tokens(), input_ids=tokens())
    torch.testing.assert_close(output.logits["text"], expected.logits)
    torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("host", HOSTS[1:])
def test_a_base_that_asks_for_tasks(tmp_path: Path, host: str) -> None:
    base: Any = llama(tmp_path)
    torch.manual_seed(1)
    if host == "adapters":
        import adapters

        adapters.init(base)
        base.add_adapter("shared", config=pal_adapters.CAMTLConfig(tasks=["rte", "text"]))
        base.set_active_adapters("shared")
    else:
        import peft

        config = pal_adapters.CAMTLPeftConfig(task_type="CAUSAL_LM", tasks=["rte", "text"])
        base = peft.get_peft_model(base, config, adapter_name="shared")
    model = TaskHeads(base.eval())
    model.add("text", TEXT)
    expected = base(input_ids=tokens(), task_ids=torch.ones(3, dtype=torch.long)).logits
    torch.testing.assert_close(model.eval()(task_ids="text", input_ids=tokens()).logits["text"], expected)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("train_base", [True, False])
def test_a_trained_output_layer_is_kept(tmp_path: Path, host: str, train_base: bool) -> None:
    base = llama(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = TaskHeads(adapted(base, host))
    model.add("text", TEXT)
    names = model.prepare_training(base=train_base)
    layer = model.backbone.get_output_embeddings().weight
    assert layer.requires_grad is train_base
    assert any("lm_head" in name for name in names) is train_base
    if host == "none" and not train_base:
        return  # nothing trains
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model.train()(task_ids="text", labels=tokens(), input_ids=tokens()).loss.backward()
        optimiser.step()
    expected = model.eval()(task_ids="text", input_ids=tokens()).logits["text"]
    model.save_pretrained(tmp_path / "saved", checkpoint=True)
    assert (tmp_path / "saved" / "output_layer.safetensors").is_file() is train_base

    loaded = TaskHeads.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(task_ids="text", input_ids=tokens()).logits["text"], expected, atol=0, rtol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.restore(tmp_path / "saved")
    torch.testing.assert_close(model(task_ids="text", input_ids=tokens()).logits["text"], expected, atol=0, rtol=0)


def test_an_output_layer_that_is_the_embeddings(tmp_path: Path) -> None:
    model = TaskHeads(llama(tmp_path / "base", tie_word_embeddings=True))
    model.add("text", TEXT)
    model.prepare_training(base=True)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "output_layer.safetensors").exists()


def test_bases_that_are_no_language_models(tmp_path: Path, tiny_encoder: str) -> None:
    bare = TaskHeads(llama(tmp_path).model)
    with pytest.warns(UserWarning, match="LlamaModel has no output layer.*Pass the model with its head"):
        bare.add("text", TEXT)
    encoder = TaskHeads(backbone(tiny_encoder, "none"))
    with pytest.warns(UserWarning, match="the tokens of BertModel see the tokens after them.*Pass a decoder"):
        encoder.add("text", TEXT)
    tied = TaskHeads(LlamaModel(LlamaConfig(**{**bare.config.to_dict(), "tie_word_embeddings": True})))
    tied.add("text", TEXT)


def test_bases_that_do_more_than_their_output_layer() -> None:
    from transformers import BertConfig, BertLMHeadModel, Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    for base in (
        Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, num_key_value_heads=1)),  # a bound on the logits
        BertLMHeadModel(BertConfig(**sizes, is_decoder=True)),  # a layer in front
    ):
        model = TaskHeads(base)
        with pytest.raises(UnsupportedError, match=f"{type(base).__name__} does more than its output layer between"):
            model.add("text", TEXT)
        assert model.tasks == ()


def test_bases_of_other_shapes() -> None:
    from transformers import (
        BartConfig,
        BartForCausalLM,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        OPTConfig,
        OPTForCausalLM,
    )

    sizes: dict[str, Any] = {"vocab_size": 160, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = {**sizes, "hidden_size": 16, "ffn_dim": 24, "max_position_embeddings": 32}
    gemma = {"hidden_size": 16, "intermediate_size": 24, "head_dim": 8, "num_key_value_heads": 1}
    bart = {"d_model": 16, "decoder_layers": 1, "decoder_ffn_dim": 24, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    for base in (
        OPTForCausalLM(OPTConfig(**opt)),
        OPTForCausalLM(OPTConfig(**opt, word_embed_proj_dim=8)),  # hidden states narrower than its blocks
        BartForCausalLM(BartConfig(vocab_size=160, max_position_embeddings=32, **bart)),
        Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **gemma)),
    ):
        model = TaskHeads(base.eval())
        model.add("text", TEXT)
        got = model.eval()(task_ids="text", input_ids=tokens()).logits["text"]
        torch.testing.assert_close(got, base(input_ids=tokens()).logits, msg=type(base).__name__)


def test_an_output_layer_that_was_trained_by_hand(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = TaskHeads(base)
    model.add("text", TEXT)
    model.prepare_training()
    weight = base.lm_head.weight.requires_grad_(True)
    model.train()(task_ids="text", labels=tokens(), input_ids=tokens()).loss.backward()
    with torch.no_grad():
        weight.add_(1.0)
    model.prepare_training()  # rests from here on
    model.save_pretrained(tmp_path / "1", checkpoint=True)
    first = TaskHeads.from_pretrained(tmp_path / "1")
    first.save_pretrained(tmp_path / "2")
    assert torch.equal(TaskHeads.from_pretrained(tmp_path / "2").backbone.lm_head.weight, weight)

    other = TaskHeads(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    other.add("text", TEXT)
    other.prepare_training()
    other.restore(tmp_path / "1")
    other.save_pretrained(tmp_path / "3")
    assert torch.equal(TaskHeads.from_pretrained(tmp_path / "3").backbone.lm_head.weight, weight)
    assert not (tmp_path / "3" / "base.model").exists()


@pytest.mark.skipif("peft" not in HOSTS, reason="needs PEFT")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_adapters_on_the_output_layer_are_not_the_base(tmp_path: Path, method: str) -> None:
    import peft

    options: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "lm_head"]}
    options |= {"feedforward_modules": []} if method == "IA3Config" else {"r": 2}
    model = TaskHeads(peft.get_peft_model(llama(tmp_path / "base"), getattr(peft, method)(**options), "text"))
    model.add("text", TEXT)
    model.prepare_training()
    counts = model.count_parameters()
    assert counts["base"] == sum(p.numel() for p in LlamaForCausalLM(model.config).parameters())
    assert counts["adapters"] == counts["trainable"] > 0
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "output_layer.safetensors").exists()


@pytest.mark.parametrize("host", HOSTS)
def test_a_new_language_model_leaves_the_base_as_it_was(tmp_path: Path, host: str) -> None:
    base = adapted(llama(tmp_path, attention_dropout=0.5), host)
    for number, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    base.model.layers[0].train() if host == "none" else base.train()
    trains = [parameter.requires_grad for parameter in base.parameters()]
    modes = [module.training for module in base.modules()]
    active = str(getattr(base, "active_adapters", None)) if host != "none" else ""
    state = torch.random.get_rng_state()
    TaskHeads(base).add("text", TEXT)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in base.parameters()] == trains
    assert [module.training for module in base.modules()] == modes
    assert (str(getattr(base, "active_adapters", None)) if host != "none" else "") == active
    assert not any(module._forward_hooks for module in base.modules() if type(module).__name__ == "Linear")


@pytest.mark.parametrize("host", HOSTS)
def test_a_trained_output_layer_is_kept_for_good(tmp_path: Path, host: str) -> None:
    base = llama(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = TaskHeads(adapted(base, host))
    model.add("rte", HeadConfig("single_label", 2, pooling="last"), adapter=None if host == "none" else "text")
    model.prepare_training(base=True)
    layer = model.backbone.get_output_embeddings()
    layer.weight.requires_grad_(True)
    with torch.no_grad():
        layer.weight.add_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(4)))
    model.save_pretrained(tmp_path / "1")
    again = TaskHeads.from_pretrained(tmp_path / "1")
    again.prepare_training()
    again.save_pretrained(tmp_path / "2")
    last = TaskHeads.from_pretrained(tmp_path / "2")
    for loaded in (again, last):
        assert torch.equal(loaded.backbone.get_output_embeddings().weight, layer.weight)
    counts = last.count_parameters()
    assert counts["base"] == sum(p.numel() for p in LlamaForCausalLM(last.config).parameters())
    if host == "none":
        assert counts["adapters"] == 0


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
def test_heads_of_the_host_are_not_the_output_layer(tmp_path: Path) -> None:
    from adapters import AutoAdapterModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    base = AutoAdapterModel.from_config(config)
    base.add_causal_lm_head("text")  # with layers in front of its last one
    model = TaskHeads(base)
    with pytest.warns(UserWarning, match="the input embeddings of GPT2AdapterModel make the logits, not its heads"):
        model.add("text", TEXT)
    ids = tokens() % 40
    expected = model.eval().backbone.transformer(input_ids=ids).last_hidden_state @ base.transformer.wte.weight.T
    torch.testing.assert_close(model(task_ids="text", input_ids=ids).logits["text"], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_perplexity_is_over_all_tokens(tmp_path: Path, tiny_encoder: str, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, padding_side=side)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = LlamaModel(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    model = TaskHeads(base)
    task = make_task("language_modeling", "text", (6, 7))
    found = []
    for batch in (1, 3, 8):
        args = MultiTaskTrainingArguments(
            str(tmp_path), per_device_eval_batch_size=batch, use_cpu=True, report_to=[], disable_tqdm=True
        )
        made = MultiTaskTrainer(model, args, [task], processing_class=tokenizer)
        found.append(made.evaluate())
    total, count = 0.0, 0
    model.eval()
    for text in task.dataset["validation"]["text"]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = base(ids).last_hidden_state @ base.embed_tokens.weight.T
        total += float(F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    for scores in found:
        assert scores["eval_text_loss"] == pytest.approx(total / count, rel=1e-5)
        assert scores["eval_text_perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)
        assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} <= set(scores)
    rows = [EncodedTask(task, task.dataset["validation"], tokenizer, 32)[number] for number in range(7)]
    output = model(**made.collator(rows))  # what training sees
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
    output = made.predict({"text": task.dataset["validation"]})["text"]
    assert output.predictions is None
    assert output.metrics["test_text_loss"] == pytest.approx(total / count, rel=1e-5)
    assert output.metrics["test_text_samples_per_second"] > 0


def test_texts_that_leave_nothing_to_predict(tiny_encoder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    tokenizer.backend_tokenizer.post_processor = None  # nothing is put around a text
    task = make_task("language_modeling", "text")
    for texts, message in (
        (["the is", "", "no"], "task 'text', data, row 2: the tokenizer makes no token of the text: filter"),
        (["the", "is"], "task 'text', data: every text has one token, which leaves nothing to predict"),
    ):
        with pytest.raises(TaskDataError, match=message):
            EncodedTask(task, datasets.Dataset.from_dict({"text": texts}), tokenizer, 32)
