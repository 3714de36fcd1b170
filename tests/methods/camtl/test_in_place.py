"""`base_weights="in_place"`: the network trains the model's own weights and computes what it does with copies."""

from __future__ import annotations

import copy
import pathlib
import pickle
import tempfile
from typing import Any

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pal_adapters import network_size, train_tasks
from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError, UnsupportedError
from tests.zoo import HOST_WARNINGS

from .network import HOSTS, Network, build, inputs

pytestmark = [
    *HOST_WARNINGS,
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
IDS = [0, 2, 1, 0]
both = pytest.mark.parametrize("host", HOSTS)
peft_only = pytest.mark.skipif("peft" not in HOSTS, reason="needs peft")
adapters_only = pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
IN_PLACE: dict[str, Any] = {"base_weights": "in_place"}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def room(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def files(room: pathlib.Path) -> list[str]:
    return sorted(path.name for path in room.glob("pal_adapters-*"))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return all(torch.equal(now[name], before[name]) for name in before)


def places(network: Network, name: str = "all") -> dict[str, nn.Parameter]:
    """The weights in place, by block and the name that a copy would have."""
    return {
        f"{i}.{key}": tensor
        for i, unit in enumerate(network.units(name))
        if unit.in_place is not None
        for key, tensor in unit.in_place.tensors().items()
    }


def copies(network: Network, name: str = "all") -> dict[str, nn.Parameter]:
    return {
        f"{i}.{part}.{key}": tensor
        for i, unit in enumerate(network.units(name))
        for part in ("base", "outer")
        for key, tensor in getattr(unit, part).items()
    }


def pair(
    host: str, kind: str = "bert", changes: dict[str, Any] | None = None, **config: Any
) -> tuple[Network, Network]:
    """A network with copies and one in place, with equal weights; `changes` are those of the model's config."""
    bases = [build(kind, **(changes or {})) for _ in range(2)]
    one = Network(host, kind, base=bases[0], **config)
    other = Network(host, kind, base=bases[1], **config, **IN_PLACE)
    one.randomise()
    values = one.parameters()
    with torch.no_grad():
        for name, parameter in other.parameters().items():
            parameter.copy_(values[name])
        trained = copies(one)
        for name, parameter in places(other).items():
            parameter.copy_(trained[name])
    return one, other


def trained(host: str, kind: str = "bert", **config: Any) -> Network:
    """A network in place whose every weight has changed."""
    network = Network(host, kind, **config, **IN_PLACE)
    network.randomise()
    with torch.no_grad():
        for number, parameter in enumerate(places(network).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    return network


def save(network: Network, folder: pathlib.Path) -> pathlib.Path:
    if network.host == "adapters":
        folder.mkdir(parents=True, exist_ok=True)
        network.model.save_adapter(str(folder / "all"), "all", use_safetensors=True)
    else:
        network.model.save_pretrained(str(folder))
    return folder / "all"


def weights_file(folder: pathlib.Path, host: str) -> pathlib.Path:
    return folder / ("adapter.safetensors" if host == "adapters" else "adapter_model.safetensors")


def load(host: str, folder: pathlib.Path, kind: str = "bert", base: Any = None, **arguments: Any) -> Any:
    base = build(kind) if base is None else base
    if host == "adapters":
        import adapters

        if not hasattr(base, "adapters_config"):
            adapters.init(base)
        base.load_adapter(str(folder), use_safetensors=True, set_active=True)
        return base.eval()
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder), adapter_name="all", **arguments).eval()


def load_over(network: Network, folder: pathlib.Path) -> None:
    options: dict[str, Any] = {"use_safetensors": True} if network.host == "adapters" else {"adapter_name": "all"}
    network.model.load_adapter(str(folder), **options)


def output(model: Any, kind: str = "bert") -> Tensor:
    with torch.no_grad():
        found = model(**inputs(kind), task_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


@both
@pytest.mark.parametrize("bottleneck", ["top", "stream"])
def test_trains_exactly_what_copies_train(host: str, bottleneck: str) -> None:
    one, other = pair(host, bottleneck=bottleneck)
    one.train()
    other.train()
    assert copies(one).keys() == places(other).keys()
    counted = [sum(p.numel() for p in n.model.parameters() if p.requires_grad) for n in (one, other)]
    assert counted[0] == counted[1]
    named = [n for n, p in other.base.named_parameters() if p.requires_grad and ".ca_mtl" not in n]
    assert {id(p) for p in places(other).values()} == {id(other.base.get_parameter(n)) for n in named}
    parameters = [p for p in other.model.parameters() if p.requires_grad]
    assert len(set(map(id, parameters))) == len(parameters)
    torch.optim.AdamW(parameters)
    assert str(network_size(one.model, "all")) == str(network_size(other.model, "all"))


@both
def test_there_is_no_second_copy(host: str) -> None:
    one, other = pair(host)
    held = [sum(t.nbytes for t in {t.data_ptr(): t for t in n.model.parameters()}.values()) for n in (one, other)]
    assert held[0] - held[1] == sum(p.nbytes for p in copies(one).values())
    assert not any(unit.base or unit.outer for unit in other.units())


@both
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "deberta", "vit", "llama"])
def test_all_weights_of_other_models(host: str, kind: str) -> None:
    results: list[list[Tensor]] = []
    for network in pair(host, kind, freeze_layers=[], freeze_embeddings=False):
        network.train()
        network.model.eval()
        value = network(inputs(kind), IDS)
        value.square().mean().backward()
        own = copies(network) or places(network)
        results.append([value.detach(), *(own[name].grad for name in sorted(own) if own[name].grad is not None)])
    assert len(results[0]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@both
def test_compiled_and_exported(host: str) -> None:
    network, batch = trained(host), inputs("bert")
    compiled = torch.compile(network.model, backend="eager", fullgraph=host == "peft")
    found = compiled(**batch, task_ids=torch.tensor(IDS)).last_hidden_state
    torch.compiler.reset()
    assert torch.allclose(found, network(batch, IDS), atol=2e-5)


@both
def test_a_task_trains_alone(host: str) -> None:
    network, batch = trained(host), inputs("bert")
    network.train()
    before = network.model.eval() and output(network.model)
    vectors = train_tasks(network.model, ["mrpc"], "all")
    trains = [p for p in network.model.parameters() if p.requires_grad]
    assert [id(p) for p in trains] == [id(p) for p in vectors]
    optimizer = torch.optim.AdamW(network.model.parameters(), 0.1, weight_decay=0.5)
    network(batch, IDS).square().mean().backward()
    optimizer.step()
    after = output(network.model)
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])  # of other tasks
    assert not torch.equal(after[2], before[2])
    train_tasks(network.model, None, "all")
    network.train()
    assert all(p.requires_grad for p in places(network).values())


@peft_only
def test_loaded_to_train_on(tmp_path: pathlib.Path) -> None:
    folder = save(trained("peft"), tmp_path)
    for trains in (True, False):
        model = load("peft", folder, is_trainable=trains)
        base = [p for n, p in model.named_parameters() if p.requires_grad and "ca_mtl" not in n]
        assert bool(base) is trains


@both
def test_frozen_unless_active_and_training(host: str) -> None:
    network = trained(host)
    network.train()
    assert all(p.requires_grad for p in places(network).values())
    model = network.model
    if host == "adapters":
        from pal_adapters import PALConfig

        layers = [layer.task_layer for _, layer in model.iter_layers()]
        for layer in layers:
            layer.freeze_adapter("all")
        assert not any(p.requires_grad for p in places(network).values())
        for layer in layers:
            layer.freeze_adapter("all", freeze=False)
        assert all(p.requires_grad for p in places(network).values())
        model.add_adapter("pal", config=PALConfig(hidden_size=12))
        model.train_adapter("pal")
    else:
        model.set_requires_grad("all", False)
        assert not any(p.requires_grad for p in places(network).values())
        model.set_requires_grad("all")
        assert all(p.requires_grad for p in places(network).values())
        model.set_adapter("all", inference_mode=True)
    assert not any(p.requires_grad for p in places(network).values())
    network.train()
    assert all(p.requires_grad for p in places(network).values())
    frozen = [n for n, p in network.base.named_parameters() if not p.requires_grad and "layer.0" not in n]
    assert all("embeddings" in name for name in frozen if "pal" not in name)


@both
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not_reentrant"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "deberta-v2"])
def test_computes_and_learns_what_copies_do(host: str, kind: str, checkpointing: bool | None) -> None:
    if host == "adapters" and checkpointing:
        checkpointing = False  # the host has no reentrant one
    names = ("attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout", "attn_pdrop")
    off = dict.fromkeys(names, 0.0)
    batch, networks = inputs(kind), pair(host, kind, changes=off, freeze_layers=[0])
    results: list[list[Tensor]] = []
    for network in networks:
        network.train()
        network.model.train()
        for module in network.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing is not None:
            network.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            if checkpointing:
                network.model.enable_input_require_grads()
        optimizer = torch.optim.AdamW([p for p in network.model.parameters() if p.requires_grad], 0.01)
        found = []
        for _ in range(4):
            value = network(batch, IDS)
            loss = value.square().mean()
            optimizer.zero_grad()
            loss.backward()
            found += [value.detach(), loss.detach()]
            own = copies(network) or places(network)
            found += [own[name].grad.clone() for name in sorted(own) if own[name].grad is not None]
            optimizer.step()
        found += [own[name].detach() for name in sorted(own)]
        modules = sorted(network.parameters().items())
        found += [p.detach() for name, p in modules if ".base." not in name and ".outer." not in name]
        results.append(found)
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@peft_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_never_converted(dtype: torch.dtype) -> None:
    base = build("llama").to(dtype)
    before = {n: (p.data_ptr(), p.dtype) for n, p in base.named_parameters()}
    network = Network("peft", "llama", base=base, **IN_PLACE)
    now = {n: (p.data_ptr(), p.dtype) for n, p in base.named_parameters() if "ca_mtl" not in n}
    assert now == before
    assert {p.dtype for p in network.units()[3].bottlenecks.parameters()} == {torch.float32}
    assert torch.isfinite(network(inputs("llama"), IDS)).all()


@both
def test_converted_and_copied_models(host: str, room: pathlib.Path) -> None:
    network, pretrained = trained(host), state(build("bert"))
    expected, own = output(network.model), files(room)
    other = copy.deepcopy(network)
    assert len(files(room)) == 2 * len(own)
    assert torch.equal(output(other.model), expected)
    assert not {id(p) for p in places(other).values()} & {id(p) for p in places(network).values()}
    with torch.no_grad():
        for parameter in places(other).values():
            parameter.zero_()
    assert torch.equal(output(network.model), expected)
    network.model.to(torch.bfloat16)
    assert {p.dtype for p in places(network).values()} == {torch.bfloat16}
    _delete(network)
    now = network.base.state_dict()
    assert all(torch.equal(now[name], tensor.to(now[name].dtype)) for name, tensor in pretrained.items())
    _delete(other)
    assert same(other.base, pretrained)
    assert files(room) == []


def _delete(network: Network) -> None:
    if network.host == "adapters":
        network.model.delete_adapter("all")
    else:
        network.base = network.model.unload()


@peft_only
def test_a_pickled_model_works_but_cannot_be_restored() -> None:  # models of adapters cannot be pickled
    network = trained("peft")
    expected = output(network.model)
    again = pickle.loads(pickle.dumps(network.model))
    assert torch.equal(output(again), expected)
    before = state(again)
    for change in (lambda: again.delete_adapter("all"), again.unload):
        with pytest.raises(UnsupportedError, match="has been pickled since"):
            change()
        assert same(again, before)
        assert torch.equal(output(again), expected)


@both
def test_saved_as_copies_are_and_loaded_either_way(host: str, tmp_path: pathlib.Path) -> None:
    networks = pair(host)
    folders = [save(network, tmp_path / str(number)) for number, network in enumerate(networks)]
    contents = [load_file(weights_file(folder, host)) for folder in folders]
    assert contents[0].keys() == contents[1].keys()
    assert all(torch.equal(contents[0][name], contents[1][name]) for name in contents[0])
    expected = output(networks[0].model)
    pretrained = state(build("bert"))
    for folder in folders:
        model = load(host, folder)
        assert torch.equal(output(model), expected)
    for this, there in ((0, 1), (1, 0)):
        changed = copy.deepcopy(networks[this])
        model = changed.model
        with torch.no_grad():
            for parameter in (*changed.parameters().values(), *places(changed).values()):
                parameter.mul_(0.5)
        load_over(changed, folders[there])
        assert torch.equal(output(model.eval()), expected)
    base = networks[0].base.state_dict()
    assert all(torch.equal(base[name], pretrained[name]) for name in pretrained)


def _damage(folder: pathlib.Path, host: str, how: str) -> None:
    path = weights_file(folder, host)
    tensors = load_file(path)
    names = sorted(name for name in tensors if ".base." in name)
    if how == "lacks":
        del tensors[names[-1]]
    elif how == "more":
        tensors[names[-1] + "_more"] = tensors[names[-1]].clone()
    elif how == "shape":
        tensors[names[-1]] = torch.zeros(3, 5)
    else:
        tensors[names[-1]] = torch.full_like(tensors[names[-1]], float("nan"))
    save_file(tensors, path)


@both
@pytest.mark.parametrize("how", ["lacks", "more", "shape", "nan"])
def test_a_refused_load_leaves_the_base_as_it_was(
    host: str, how: str, tmp_path: pathlib.Path, room: pathlib.Path
) -> None:
    saved = trained(host)
    folder = save(saved, tmp_path)
    _damage(folder, host, how)
    base, kept = build("bert"), files(room)
    if host == "adapters":
        import adapters

        adapters.init(base)
    before = state(base)
    with pytest.raises(StorageError):
        load(host, folder, base=base)
    assert base.state_dict().keys() == before.keys()
    assert same(base, before)
    assert files(room) == kept
    network = trained(host)
    before, expected, kept = state(network.model), output(network.model), files(room)
    with pytest.raises(StorageError):
        load_over(network, folder)
    assert same(network.model, before)
    assert torch.equal(output(network.model), expected)
    assert files(room) == kept


def _changing(host: str) -> Any:
    if host == "adapters":
        from pal_adapters.hosts.adapters.transactions import changing as of_adapters

        return of_adapters
    from pal_adapters.hosts.peft.change import changing as of_peft

    return of_peft


@both
def test_an_error_after_the_weights_have_been_loaded_puts_them_back(
    host: str, tmp_path: pathlib.Path, room: pathlib.Path
) -> None:
    saved = trained(host)
    folder = save(saved, tmp_path)
    base, kept = build("bert"), files(room)
    if host == "adapters":
        import adapters

        adapters.init(base)
    before = state(base)

    def interrupted_load() -> None:
        with _changing(host)(base):
            load(host, folder, base=base)
            assert not same(base, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_load()
    assert same(base, before)
    assert files(room) == kept
    network, pretrained = trained(host), state(build("bert"))
    before, expected = state(network.model), output(network.model)

    def interrupted_deletion() -> None:
        with _changing(host)(network.model):
            _delete(network)
            assert same(network.base, pretrained)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_deletion()
    assert same(network.model, before)
    assert torch.equal(output(network.model), expected)
    _delete(network)
    assert same(network.base, pretrained)
    assert files(room) == kept


@both
def test_deleting_gives_the_pretrained_model_back(host: str, room: pathlib.Path) -> None:
    pretrained = build("bert")
    ways = ["delete"] if host == "adapters" else ["delete", "unload"]
    for way in ways:
        network = trained(host, top_block_init="scratch")
        assert not same(network.base, state(pretrained))
        assert files(room)
        if way == "delete":
            network.model.delete_adapter("all")
        else:
            network.base = network.model.unload()
        assert same(network.base, state(pretrained))
        assert not any(p.requires_grad for n, p in network.base.named_parameters() if "layer.3" in n)
        assert files(room) == []


@adapters_only
def test_overwriting_starts_from_the_pretrained_weights(room: pathlib.Path) -> None:
    network = trained("adapters")
    number = len(files(room))
    network.model.add_adapter("all", config=network.config(**IN_PLACE), overwrite_ok=True)
    assert same(network.base, state(build("bert")))
    assert len(files(room)) == number
    network.model.delete_adapter("all")
    assert files(room) == []


@both
def test_the_file_goes_with_the_model(host: str, room: pathlib.Path) -> None:
    import gc

    network = trained(host)
    assert files(room)
    del network
    gc.collect()
    assert files(room) == []


@both
def test_missing_originals_are_refused_before_anything_changes(host: str, room: pathlib.Path) -> None:
    network = trained(host)
    (room / files(room)[-1]).unlink()
    before, expected = state(network.model), output(network.model)
    with pytest.raises(StorageError, match="cannot be read"):
        network.model.delete_adapter("all")
    assert same(network.model, before)
    assert torch.equal(output(network.model), expected)


@both
def test_top_block_from_scratch_is_that_of_copies(host: str) -> None:
    seeded: dict[str, Any] = {"init_weights_seed": 3} if host == "adapters" else {}
    networks = []
    for weights in ("copies", "in_place"):
        torch.manual_seed(4)
        networks.append(Network(host, top_block_init="scratch", base_weights=weights, **seeded))
    expected, found = copies(networks[0]), places(networks[1])
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert found["3.base.intermediate__dense__weight"].std() < 0.03


@peft_only
def test_peft_refuses_to_disable() -> None:
    network = trained("peft")
    expected = output(network.model)
    message = "'all' trains the pretrained weights in place \\(base_weights='in_place'\\)"
    with pytest.raises(UnsupportedError, match=message), network.model.disable_adapter():
        pass
    with pytest.raises(UnsupportedError, match=message):
        network.model.base_model.disable_adapter_layers()
    assert torch.equal(output(network.model), expected)


@adapters_only
def test_without_an_active_network_adapters_runs_the_trained_base() -> None:
    from adapters import AdapterSetup

    network, batch = trained("adapters"), inputs("bert")
    plain = build("bert")
    base = plain.state_dict()
    plain.load_state_dict({name: network.base.state_dict()[name] for name in base})
    expected = plain(**batch).last_hidden_state
    network.activate(None)
    assert torch.allclose(network(batch), expected, atol=3e-6)
    network.activate("all")
    with AdapterSetup(None):
        assert torch.allclose(network(batch), expected, atol=3e-6)


@both
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"base_weights": "in_place"}, {"base_weights": "in_place"}),
        ({"base_weights": "in_place"}, {"base_weights": "copies"}),
        ({"base_weights": "copies"}, {"base_weights": "in_place"}),
        ({"train_base": False}, {"base_weights": "in_place"}),
        ({"base_weights": "in_place"}, {"train_base": False}),
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_a_second_network_is_refused(
    host: str, first: dict[str, Any], second: dict[str, Any], room: pathlib.Path
) -> None:
    network = Network(host, **first)
    before, kept = state(network.model), files(room)
    with pytest.raises(UnsupportedError, match=r"trains pretrained weights in place.*copy of the model for each"):
        network.add("other", **second)
    assert network.model.state_dict().keys() == before.keys()
    assert same(network.model, before)
    assert files(room) == kept


@adapters_only
def test_beside_other_adapters() -> None:
    from adapters import ConfigUnion

    from pal_adapters import PALConfig

    network = trained("adapters")
    network.model.add_adapter("pal", config=PALConfig(hidden_size=12))
    for config in (
        PALConfig(hidden_size=12, train_base=True),
        ConfigUnion(PALConfig(hidden_size=12, train_base=True), network.config(train_base=False)),
    ):
        with pytest.raises(UnsupportedError, match="in place"):
            network.model.add_adapter("joint", config=config)
    fresh = Network("adapters", train_base=False)
    fresh.model.delete_adapter("all")
    union = ConfigUnion(PALConfig(hidden_size=12, train_base=True), fresh.config(**IN_PLACE))
    with pytest.raises(UnsupportedError, match="in place"):
        fresh.model.add_adapter("union", config=union)
    fresh.model.add_adapter("joint", config=PALConfig(hidden_size=12, train_base=True))
    with pytest.raises(UnsupportedError, match="in place"):
        fresh.model.add_adapter("all", config=fresh.config(**IN_PLACE))


@peft_only
@pytest.mark.usefixtures("transformers_takes_this_peft")
def test_beside_other_adapters_in_peft(tmp_path: pathlib.Path) -> None:
    from pal_adapters import PALPeftConfig

    folder = save(trained("peft"), tmp_path)
    model = build("bert")
    model.add_adapter(PALPeftConfig(hidden_size=12), adapter_name="pal")
    before = state(model)
    with pytest.raises(UnsupportedError, match="differ from those that 'pal' use"):
        model.load_adapter(str(folder), adapter_name="all")
    assert same(model, before)
    model.add_adapter(Network("peft", train_base=False).config(**IN_PLACE), adapter_name="all")
    with pytest.raises(UnsupportedError, match="in place"):
        model.add_adapter(PALPeftConfig(hidden_size=12, train_base=True), adapter_name="joint")


@peft_only
@pytest.mark.usefixtures("transformers_takes_this_peft")
def test_transformers_own_interface(tmp_path: pathlib.Path, room: pathlib.Path) -> None:
    network = trained("peft")
    expected, pretrained = output(network.model), state(build("bert"))
    folder = save(network, tmp_path)
    model = build("bert")
    model.load_adapter(str(folder), adapter_name="all")
    assert torch.equal(output(model.eval()), expected)
    with pytest.raises(UnsupportedError, match="cannot be disabled"):
        model.disable_adapters()
    model.set_adapter("all")
    trains = {n for n, p in model.named_parameters() if p.requires_grad and "ca_mtl" not in n}
    assert len(trains) == len(places(network))
    again = tmp_path / "again"
    model.save_pretrained(str(again))
    assert load_file(again / "adapter_model.safetensors").keys() == load_file(weights_file(folder, "peft")).keys()
    kept = files(room)
    model.delete_adapter("all")
    assert same(model, pretrained)
    assert len(files(room)) < len(kept)
    for how in ("lacks", "more", "shape", "nan"):
        broken = save(trained("peft"), tmp_path / how)
        _damage(broken, "peft", how)
        other = build("bert")
        with pytest.raises(StorageError):
            other.load_adapter(str(broken), adapter_name="all")
        assert same(other, pretrained)


@peft_only
def test_loading_on_the_meta_device(tmp_path: pathlib.Path) -> None:
    network = trained("peft")
    folder = save(network, tmp_path)
    model = load("peft", folder, low_cpu_mem_usage=True)
    assert torch.equal(output(model), output(network.model))
    base = model.unload()
    assert same(base, state(build("bert")))


@adapters_only
def test_a_model_saved_as_a_whole(tmp_path: pathlib.Path) -> None:
    from adapters import BertAdapterModel

    network = trained("adapters", base=BertAdapterModel(build("bert").config).eval())
    expected = output(network.model)
    network.model.save_pretrained(str(tmp_path))
    model = BertAdapterModel.from_pretrained(str(tmp_path))
    model.set_active_adapters("all")
    assert torch.equal(output(model), expected)
    before = state(model)
    with pytest.raises(UnsupportedError, match="the model was saved as a whole"):
        model.delete_adapter("all")
    assert same(model, before)
    assert torch.equal(output(model), expected)
    (tmp_path / "all").mkdir()
    model.save_adapter(str(tmp_path / "all"), "all", use_safetensors=True)
    fresh = BertAdapterModel(build("bert").config)
    fresh.load_state_dict(network.base.state_dict(), strict=False)  # the frozen half
    assert torch.equal(output(load("adapters", tmp_path / "all", base=fresh)), expected)


@adapters_only
@pytest.mark.parametrize("headed", [True, False], ids=["into_a_base_model", "into_a_model_with_a_head"])
def test_with_a_head_and_without(headed: bool, tmp_path: pathlib.Path) -> None:
    import adapters

    def classifier() -> Any:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification._from_config(build("bert").config)
        model.bert.load_state_dict(build("bert").state_dict())
        adapters.init(model)
        return model.eval()

    network = trained("adapters", base=classifier() if headed else None)
    folder = save(network, tmp_path)
    model = load("adapters", folder, base=None if headed else classifier())
    base = {n.removeprefix("bert."): t for n, t in model.state_dict().items()}
    expected = {n.removeprefix("bert."): t for n, t in network.base.state_dict().items()}
    shared = [n for n in expected if n in base and not n.startswith("classifier")]
    assert len(shared) > 100
    assert all(torch.equal(base[name], expected[name]) for name in shared)
    before = dict(build("bert").state_dict())
    model.delete_adapter("all")
    base = {n.removeprefix("bert."): t for n, t in model.state_dict().items()}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())


@both
def test_configs_keep_the_choice(host: str, tmp_path: pathlib.Path) -> None:
    config = Network(host, train_base=False).config(**IN_PLACE)
    cls = type(config)
    assert config.base_weights == "in_place"
    if host == "adapters":
        values = config.to_dict()
        assert cls.from_dict(values).base_weights == "in_place"
        del values["base_weights"]
        assert cls.from_dict(values).base_weights == "copies"
    else:
        import json

        config.save_pretrained(str(tmp_path))
        assert cls.from_pretrained(str(tmp_path)).base_weights == "in_place"
        path = tmp_path / "adapter_config.json"
        values = json.loads(path.read_text())
        del values["base_weights"]
        path.write_text(json.dumps(values))
        assert cls.from_pretrained(str(tmp_path)).base_weights == "copies"
    with pytest.raises(ConfigError, match="base_weights='shared' is not allowed: use one of 'copies', 'in_place'"):
        cls(tasks=2, base_weights="shared")
    with pytest.raises(ConfigError, match="base_weights='in_place' has no effect with train_base=False"):
        cls(tasks=2, base_weights="in_place", train_base=False)


def _refused(host: str, base: Any, match: str, room: pathlib.Path, **config: Any) -> None:
    if host == "adapters":
        import adapters

        adapters.init(base)
    before, kept = dict(base.state_dict(keep_vars=True)), files(room)
    values = {n: t.detach().clone() for n, t in before.items() if not t.is_meta}
    with pytest.raises(PalAdaptersError, match=match):
        Network(host, "gpt2", base=base, **IN_PLACE, **config)
    now = base.state_dict(keep_vars=True)
    assert now.keys() == before.keys()
    assert all(now[name] is tensor for name, tensor in before.items())
    assert all(torch.equal(now[name], value) for name, value in values.items())
    assert files(room) == kept


@both
def test_weights_that_cannot_be_trained_in_place(
    host: str, room: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refused(host, build("gpt2"), "tied to lm_head.weight, which the network does not", room, freeze_embeddings=False)
    base = build("gpt2")
    base.transformer.ln_f.weight = base.transformer.h[0].ln_1.weight
    _refused(host, base, "base.ln_1__weight cannot be trained in place: it is tied to", room, freeze_layers=[])
    base = build("gpt2")
    base.transformer.h[3].mlp.c_fc.weight = nn.Parameter(torch.zeros(24, 32, dtype=torch.int8), requires_grad=False)
    _refused(host, base, "packed", room)
    if host == "peft":
        _refused(host, build("gpt2").to("meta"), "has no values here", room)
        offloaded = build("gpt2")
        accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu"))
        _refused(host, offloaded, "accelerate offloads weights", room)
    monkeypatch.setattr(tempfile, "tempdir", str(room / "missing"))
    _refused(host, build("gpt2"), "set TMPDIR to a folder", room)


@both
def test_replaced_weights_are_noticed(host: str, tmp_path: pathlib.Path) -> None:
    network, batch = trained(host, freeze_embeddings=False), inputs("bert")
    embeddings = network.base.get_input_embeddings()
    network.base.set_input_embeddings(nn.Embedding(40, 24, padding_idx=0))
    with pytest.raises(UnsupportedError, match="has been replaced since the adapter was added"):
        save(network, tmp_path)
    with pytest.raises(UnsupportedError, match="has been replaced since the adapter was added"):
        network(batch, IDS)
    with torch.no_grad():
        network(batch, IDS)  # only training is wrong
    network.base.set_input_embeddings(embeddings)
    weight = embeddings.weight
    embeddings._parameters["weight"] = nn.Parameter(torch.empty(40, 24, device="meta"))
    for change in (lambda: save(network, tmp_path), lambda: network.model.delete_adapter("all")):
        with pytest.raises(UnsupportedError, match="has no values here"):
            change()
    embeddings._parameters["weight"] = weight
    network.base.resize_token_embeddings(44, mean_resizing=False)
    before = state(network.model)
    with pytest.raises(UnsupportedError, match=r"has shape \[44, 24\] now and had \[40, 24\]"):
        network.model.delete_adapter("all")
    assert same(network.model, before)


def _heads(host: str, base: Any, **config: Any) -> Any:
    from pal_adapters.multitask import HeadConfig, TaskHeads

    network = Network(host, base=base, **config)
    model = TaskHeads(network.model)
    for task in ("rte", "mrpc"):
        model.add(task, HeadConfig(num_labels=2), adapter="all")
    return model


@both
def test_task_heads(host: str, tmp_path: pathlib.Path, room: pathlib.Path) -> None:
    from pal_adapters.multitask import TaskHeads

    base = build("bert")
    base.save_pretrained(str(tmp_path / "base"))
    source = lambda: transformers.BertModel.from_pretrained(str(tmp_path / "base"))  # noqa: E731
    model, one = _heads(host, source(), **IN_PLACE), _heads(host, source())
    with pytest.raises(ConfigError, match="base=True is not allowed with an adapter that trains part"):
        model.prepare_training(base=True)
    assert model.count_parameters()["base"] == one.count_parameters()["base"]
    names = model.prepare_training()
    one.prepare_training()
    assert model.count_parameters()["trainable"] == one.count_parameters()["trainable"]
    assert any("layer.3.output.dense" in name for name in names)
    batch, ids = inputs("bert"), ["rte", "mrpc", "rte", "mrpc"]
    labels = {"rte": torch.tensor([0, 1]), "mrpc": torch.tensor([1, 0])}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model(task_ids=ids, labels=labels, **batch).loss.backward()
        optimizer.step()
    model.eval()
    assert not model.base_trained
    with torch.no_grad():
        expected = model(task_ids=ids, **batch).logits
    model.save_pretrained(tmp_path / "heads", checkpoint=True)
    assert not (tmp_path / "heads" / "base.model").exists()
    again = TaskHeads.from_pretrained(tmp_path / "heads")
    with torch.no_grad():
        found = again(task_ids=ids, **batch).logits
    assert all(torch.equal(expected[task], found[task]) for task in expected)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    model.restore(tmp_path / "heads")
    with torch.no_grad():
        found = model(task_ids=ids, **batch).logits
    assert all(torch.equal(expected[task], found[task]) for task in expected)
    model.requires_grad_(True)
    with pytest.raises(PalAdaptersError, match="the rest of it is trainable or has been trained"):
        model.save_pretrained(tmp_path / "other")
