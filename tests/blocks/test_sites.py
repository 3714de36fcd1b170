"""Finding blocks: what fits, what is refused and why, and what the user can name."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from pal_adapters import (
    BlockSites,
    CAMTLPeftConfig,
    ConfigError,
    HoulsbyPeftConfig,
    LHUCPeftConfig,
    LowRankPeftConfig,
    PALPeftConfig,
    SiteError,
    register_block,
)
from pal_adapters.blocks import sites
from pal_adapters.blocks.norms import full_norms
from pal_adapters.blocks.origin import class_keys
from pal_adapters.blocks.sites import Block, find_blocks, iter_blocks, parse_sites, resolve, sites_of
from pal_adapters.blocks.structures import REFUSED, STRUCTURES
from pal_adapters.blocks.survey import partial_reach
from tests import zoo
from tests.families.more import MORE
from tests.zoo import BY_NAME

pytestmark = zoo.HOST_WARNINGS


# A home-made model


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, states: Tensor, *, mask: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.qkv(states).chunk(3, dim=-1)
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~mask[:, None].bool(), -1e30)
        return scores.softmax(-1) @ v, None


class MyLayer(nn.Module):
    """Pre-LN, with names and a signature that no model of transformers has."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width)
        self.mixer = Attention(width)
        self.second = nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Linear(width, 30), nn.ReLU(), nn.Linear(30, width))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = states + self.mixer(self.first(states), mask=mask)[0]
        return states + self.wide(self.second(states))


class MyPostLayer(MyLayer):
    """The same modules, post-LN."""

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        states = self.first(states + self.mixer(states, mask=mask)[0])
        return self.second(states + self.wide(states))


class MyModel(nn.Module):
    def __init__(self, layer: type[nn.Module] = MyLayer, container: type[nn.Module] = nn.ModuleList) -> None:
        super().__init__()
        parts = [layer() for _ in range(3)]
        self.body = (
            container(parts) if container is nn.ModuleList else container(OrderedDict(zip("abc", parts, strict=False)))
        )

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        for layer in self.body:  # type: ignore[attr-defined]
            states = layer(states, mask)
        return states


PRE = dict(norm="pre", attention="mixer", attention_output="mixer", ffn="wide", ffn_output="wide", input_norm="first")
POST = dict(norm="post", attention="mixer", attention_output="mixer", ffn="wide", ffn_output="wide", output="second")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    return torch.randn(2, 5, 24), mask


def by_hand(model: MyModel, adapted: Any, states: Tensor, mask: Tensor, *, post: bool) -> Tensor:
    keep = mask.bool()[:, None, None, :].expand(-1, 1, states.shape[1], -1)
    for layer, source in zip(model.body, adapted.get_base_model().body, strict=True):  # type: ignore[call-overload]
        weights = zoo.weights_of(source, "pal")
        if post:
            h = layer.first(states + layer.mixer(states, mask=mask)[0])
            states = layer.second(h + layer.wide(h) + zoo.pal(states, weights, keep))
        else:
            states = layer(states, mask) + zoo.pal(layer.first(states), weights, keep)
    return states


def adapt(model: nn.Module, **config: Any) -> Any:
    adapted = get_peft_model(model, PALPeftConfig(hidden_size=12, num_heads=2, dropout=0.0, **config)).eval()
    zoo.randomise(nn.ParameterList([p for n, p in adapted.named_parameters() if ".pal." in n]))
    return adapted


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize(("layer", "named"), [(MyLayer, PRE), (MyPostLayer, POST)])
def test_sites_in_the_config(
    layer: type[nn.Module], named: dict[str, str], container: type[nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    plain = MyModel(layer, container).eval()
    zoo.randomise(plain)
    torch.manual_seed(0)
    model = MyModel(layer, container).eval()
    zoo.randomise(model)
    adapted = adapt(model, sites={"block": layer.__name__, **named})
    with torch.no_grad():
        expected = by_hand(plain, adapted, *batch, post=layer is MyPostLayer)
        actual = adapted(*batch)
        assert zoo.difference(actual, plain(*batch)) > 1e-2
        assert zoo.difference(actual, expected) < 5e-5


def test_register_block(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_REGISTERED", {})
    model = MyModel()
    with pytest.raises(SiteError, match=r"no transformer blocks of a known structure.*register_block"):
        adapt(model)
    register_block("MyLayer", BlockSites(**PRE))  # type: ignore[arg-type]
    register_block("MyLayer", BlockSites(**PRE))  # type: ignore[arg-type]  # again, with the same sites
    with pytest.raises(ConfigError, match="'MyLayer' is registered already"):
        register_block("MyLayer", BlockSites(**POST))  # type: ignore[arg-type]
    zoo.randomise(model)
    plain = MyModel().eval()
    plain.load_state_dict(model.state_dict())
    adapted = adapt(model)
    with torch.no_grad():
        assert zoo.difference(adapted(*batch), by_hand(plain, adapted, *batch, post=False)) < 5e-5
    # A class that derives from a registered one is known too, and a wrong path is told.
    assert [b.name for b in find_blocks(MyModel(MyPostLayer))] == ["body.0", "body.1", "body.2"]
    register_block("Other", BlockSites(**{**PRE, "ffn": "nowhere"}))  # type: ignore[arg-type]
    with pytest.raises(SiteError, match=r"registered for Other.*no module 'nowhere'"):
        find_blocks(MyModel(type("Other", (MyLayer,), {})))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (dict(PRE), "needs 'block'"),
        (dict(PRE, block="MyLayer", where="there"), "the keys are block, norm, attention"),
        (dict(PRE, block="MyLayer", norm="sandwich"), "norm='sandwich'"),
        (dict(PRE, block="MyLayer", residual_at="middle"), "residual_at='middle'"),
        ({k: v for k, v in PRE.items() if k != "input_norm"} | {"block": "MyLayer"}, "input_norm=None"),
        ({"block": "MyLayer"}, "the keys are block"),
    ],
)
def test_sites_that_are_not_allowed(named: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_sites(named)
    with pytest.raises(ConfigError, match=message):
        PALPeftConfig(sites=named)


def test_sites_that_the_model_does_not_have() -> None:
    with pytest.raises(SiteError, match="no block of class 'YourLayer'"):
        find_blocks(MyModel(), dict(PRE, block="YourLayer"))
    with pytest.raises(SiteError, match="MyLayer has no module 'fan'"):
        find_blocks(MyModel(), dict(PRE, block="MyLayer", ffn="fan"))
    model = MyModel()
    for layer in model.body:  # type: ignore[attr-defined]
        layer.first, layer.second = nn.Identity(), nn.Identity()
    assert {block.width for block in find_blocks(model, dict(PRE, block="MyLayer"))} == {24}  # of its linear layers
    for layer in model.body:  # type: ignore[attr-defined]
        layer.wide = nn.Identity()
    with pytest.raises(SiteError, match="width of MyLayer could not be read"):
        find_blocks(model, dict(PRE, block="MyLayer"))


def test_the_message_says_what_to_pass() -> None:
    with pytest.raises(SiteError) as error:
        get_peft_model(nn.Sequential(nn.Linear(3, 3)), LHUCPeftConfig())
    for word in ("block", "norm", "attention", "attention_output", "ffn", "ffn_output", "output", "input_norm"):
        assert f"'{word}'" in str(error.value)
    assert isinstance(error.value, ValueError)


# Structures


def _structures_of(model: nn.Module) -> set[str]:
    blocks = list(iter_blocks(model))
    fitting = [(b.module, class_keys(b.module), sites._children(b.module)) for b in blocks]
    return {next(s.models for s in STRUCTURES if sites._fits(block, s, *rest)) for block, *rest in fitting}


# Models of the rows that no model of the zoo fits, for their structure alone, and what differs from their defaults.
_OTHERS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in (
        "BeamForCausalLM", "Blip2Model", "ClvpModelForConditionalGeneration", "ConvNextModel", "CpmAntModel",
        "CvtModel",
        "DINOv3ConvNextModel", "EsmcModel", "FSMTModel", "Glm5NextTextModel", "HiggsAudioV2ForConditionalGeneration",
        "MgpstrForSceneTextRecognition", "PoolFormerModel", "SqueezeBertModel", "T5Gemma2Model",
        "DeepseekV4ForCausalLM", "DiaModel", "DonutSwinModel", "EvollaForProteinText2Text",
        "FastSpeech2ConformerModel", "FocalNetModel",
        "Gemma3nForCausalLM", "GPTNeoXJapaneseModel", "GraniteMoeHybridModel", "HieraModel",
        "Inkling2ForConditionalGeneration", "InklingForCausalLM", "InternVLVisionModel",
        "Kosmos2ForConditionalGeneration", "Lfm3ForCausalLM", "LiltModel", "LongcatFlashForCausalLM",
        "MiniMaxForCausalLM", "Molmo2TextModel", "MoonshineForConditionalGeneration", "MuseSparkTextModel",
        "OmniASRAudioModel", "Pix2StructForConditionalGeneration", "PixtralVisionModel",
        "PocketTTSAudioTokenizerEncoderModel", "PvtModel", "RTDetrModel", "RfDetrModel", "Sam3ViTModel",
        "SamVisionModel", "SeamlessM4TModel", "SpeechT5ForSpeechToText", "Swinv2Model", "TimesFmModel",
        "TimesformerModel", "TvpModel", "VitsModel", "VoxtralRealtimeForConditionalGeneration", "Zamba2Model",
        "ZayaForCausalLM", "xLSTMModel", "KimiLinearForCausalLM", "VJEPA2Model", "ParakeetEncoder", "RwkvModel",
        "FunnelModel", "BitModel", "HYV4VLVisionModel", "IBertModel", "LevitModel", "MobileNetV2Model", "RegNetModel",
        "ResNetModel", "SwiftFormerModel",
        "Qwen2VLForConditionalGeneration", "CanineModel", "Lfm3VlVisionModel", "NeoMMEModel",
    )),
    ("Molmo2TextModel", {"norm_after": True}),
    ("FastSpeech2ConformerModel", {"encoder_normalize_before": True, "decoder_normalize_before": True}),
)  # fmt: skip


def _without_weights(name: str, changes: dict[str, Any]) -> nn.Module | None:
    """A model of its default config, without memory for its weights."""
    cls = getattr(transformers, name, None)
    with torch.device("meta"):
        return None if cls is None else cls(cls.config_class(**changes))


def test_every_structure_is_met_by_a_model() -> None:
    """A row that no tested model fits would be a guess; one that is met in one version is enough."""
    met: set[str] = set()
    for host in (*zoo.HOSTS, zoo.ALBERT, *(MORE if zoo.V5 else ())):
        if host.available:
            met |= _structures_of(host.build())
    for name, changes in _OTHERS if zoo.V5 else ():
        model = _without_weights(name, changes)
        met |= set() if model is None else _structures_of(model)
    missing = {s.models for s in STRUCTURES} - met
    assert not {models for models in missing if ("transformers 4.57" in models) is not zoo.V5}, missing


def test_paths_of_every_structure_are_named_from_its_children() -> None:
    for structure in STRUCTURES:
        paths = [p for p in (*structure.inner.split(), *structure.sites.paths()) if p]
        assert all(path.split(".")[0] in structure.known for path in paths), structure.models


def _tiny(name: str) -> Any:
    return BY_NAME[name].build()


def test_blocks_that_run_at_several_depths_are_marked() -> None:
    """ALBERT's are told by their class, other models' by standing in their list more than once."""
    assert [block.repeated for block in find_blocks(zoo.ALBERT.build())] == [True]
    model = _tiny("bert")
    assert [block.repeated for block in find_blocks(model)] == [False, False]
    model.encoder.layer.append(model.encoder.layer[0])
    assert [block.repeated for block in find_blocks(model)] == [True, False]


def test_another_child_is_no_guess() -> None:
    model = _tiny("bert")
    model.encoder.layer[0].gate = nn.Linear(24, 24)
    assert sites_of(model.encoder.layer[0]) is None
    assert [b.index for b in iter_blocks(model)] == [1]


@pytest.mark.parametrize("what", ["parameter", "buffer", "number"])
def test_a_block_with_a_scale_of_its_own_is_no_guess(what: str) -> None:
    block = _tiny("llama").model.layers[0]
    assert sites_of(block) is not None
    if what == "parameter":
        block.gate = nn.Parameter(torch.ones(24))
    elif what == "buffer":
        block.register_buffer("gate", torch.ones(24))
    else:
        block.gate = 0.5
    assert sites_of(block) is None


def _parallel(block: nn.Module) -> type[nn.Module]:
    """A class with the modules and the name of a block of Llama, whose feed-forward part reads the block's input."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        return hidden_states + self.self_attn(x, **kwargs)[0] + self.mlp(self.post_attention_layernorm(hidden_states))

    base = type(block)
    return type(base.__name__, (base,), {"forward": forward, "__module__": "transformers_modules.modeling_llama"})


def test_a_forward_that_was_not_read_is_no_guess() -> None:
    model = _tiny("llama")
    known = find_blocks(model)[0].sites
    for block in model.model.layers:
        block.__class__ = _parallel(block)
    with pytest.raises(SiteError, match=r"may add up the branches differently.*'block': 'LlamaDec"):
        find_blocks(model)
    named = {"block": "LlamaDecoderLayer", **known.to_dict()}  # as the message says
    assert [block.sites for block in find_blocks(model, named)] == [known, known]


def test_a_subclass_that_keeps_forward_is_a_known_block() -> None:
    block = _tiny("llama").model.layers[0]
    known = sites_of(block)
    block.__class__ = type("MyDecoderLayer", (type(block),), {"describe": lambda self: "mine"})
    assert sites_of(block) == known


def test_a_replaced_block_is_reported() -> None:
    model = _tiny("llama")
    model.model.layers[1].__class__ = _parallel(model.model.layers[1])
    assert "The structure of model.layers (LlamaDecoderLayer, block 1) is not known." in partial_reach(
        model, find_blocks(model)
    )


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_what_peft_puts_into_a_block_does_not_hide_it(name: str) -> None:
    before = [(b.name, b.sites) for b in find_blocks(_tiny(name))]
    for config in (LoraConfig(target_modules="all-linear", r=2), PALPeftConfig(), HoulsbyPeftConfig()):
        model = _tiny(name)
        get_peft_model(model, config)
        assert [(b.name, b.sites) for b in find_blocks(model)] == before


def norms_of(block: Block) -> list[str]:
    try:
        return list(full_norms(block))
    except SiteError:
        return []


def test_what_adapters_puts_into_a_block_does_not_hide_it() -> None:
    adapters = pytest.importorskip("adapters")
    for name in (
        "bert",
        "gpt2",
        "llama",
        "bart",
        "mbart",
        "t5",
        "vit",
        "clip",
        "distilbert",
        "deberta",
        "xmod",
        "beit",
    ):
        model = _tiny(name)
        before = [(b.name, b.sites, norms_of(b)) for b in find_blocks(model)]
        adapters.init(model)
        model.add_adapter("a", config="double_seq_bn")
        model.add_adapter("b", config="pal[hidden_size=12,num_heads=2]")
        assert [(b.name, b.sites, norms_of(b)) for b in find_blocks(model)] == before, name


def test_attention_of_torch_is_refused() -> None:
    """`nn.MultiheadAttention` takes tokens before rows unless it is told otherwise."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn, self.mlp = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    assert sites_of(Block()) is None


@pytest.mark.parametrize("class_name", ["SwinModel", "Swinv2Model"])
def test_windows_take_what_does_not_attend(class_name: str) -> None:
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2],
                                 window_size=2))  # fmt: skip
    with pytest.raises(SiteError, match="pal attends, and cannot be added to Swin"):
        get_peft_model(copy.deepcopy(model), PALPeftConfig())
    pixels = torch.randn(2, 3, 8, 8)
    before = model(pixels).last_hidden_state
    adapted = get_peft_model(model, LowRankPeftConfig(init_weights=False))
    assert (adapted(pixels).last_hidden_state - before).abs().max() > 1e-4


def test_attention_within_parts_of_a_text() -> None:
    config = transformers.MraConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, vocab_size=40
    )
    model = transformers.MraModel(config)
    with pytest.raises(SiteError, match="pal attends, and cannot be added to MraLayer"):
        get_peft_model(copy.deepcopy(model), PALPeftConfig())
    options = {"tasks": ["a", "b"], "bottleneck": "none"}
    with pytest.raises(SiteError, match=r"sees parts of a text .*attention_layers=\[\]"):
        get_peft_model(copy.deepcopy(model), CAMTLPeftConfig(**options))
    assert get_peft_model(model, CAMTLPeftConfig(**options, attention_layers=[]))


def test_refused_with_a_reason() -> None:
    model = transformers.XLNetModel(transformers.XLNetConfig(d_model=24, n_layer=2, n_head=2, d_inner=36))
    with pytest.raises(SiteError, match=r"XLNetLayer is refused because .*pass sites="):
        get_peft_model(model, PALPeftConfig(hidden_size=12, num_heads=2))


def test_the_user_may_overrule_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_REGISTERED", {})
    block = _tiny("bert").encoder.layer[0]
    monkeypatch.setitem(REFUSED, "BertLayer", "a test says so")
    assert sites_of(block) is None
    register_block("BertLayer", BlockSites("post", "attention", "attention", "intermediate", "output"))
    assert sites_of(block) is not None


def test_same_names_and_other_sums_are_told_apart() -> None:
    expected = {
        "openai-gpt": ("post", "ln_2"), "gpt2": ("pre", ""), "bart": ("post", "final_layer_norm"),
        "mbart": ("pre", ""),
        "opt": ("pre", ""), "opt-post": ("post", "final_layer_norm"), "wav2vec2": ("post", "final_layer_norm"),
        "wav2vec2-stable": ("pre", ""), "xmod": ("post", "output.LayerNorm"), "xmod-pre": ("pre", ""),
    }  # fmt: skip
    for name, (norm, output) in expected.items():
        found = find_blocks(_tiny(name))[0].sites
        assert (found.norm, found.output) == (norm, output), name
    assert find_blocks(_tiny("granite"))[0].sites.residual == ""
    assert find_blocks(_tiny("llama"))[0].sites.residual is None


def test_resolve() -> None:
    block = _tiny("t5").decoder.block[0]
    assert resolve(block, "") is block
    assert resolve(block, "layer.-1.dropout") is block.layer[-1].dropout
    assert resolve(block, "layer.0.SelfAttention") is block.layer[0].SelfAttention
    for path in ("layer.7", "layer.-9", "layer.x", "is_decoder", "nothing.there"):
        assert resolve(block, path) is None


def test_one_block_at_several_depths_is_one_block() -> None:
    class Shared(MyModel):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleList([MyLayer()] * 3)

    (block,) = find_blocks(Shared(), dict(PRE, block="MyLayer"))
    assert (block.index, block.depth, block.last) == (0, 1, True)


def test_stacks_are_counted_apart() -> None:
    blocks = find_blocks(_tiny("bart"))
    assert [(b.stack, b.index, b.last) for b in blocks] == [(0, 0, False), (0, 1, True), (1, 0, False), (1, 1, True)]
    assert sorted({(b.stack, b.width) for b in find_blocks(_tiny("clip"))}) == [(0, 24), (1, 36)]


def test_width_of_a_norm_without_weights() -> None:
    assert {b.width for b in find_blocks(_tiny("olmo"))} == {24}
