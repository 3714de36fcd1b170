"""Damaged adapter folders in PEFT: each ends in an error with the model unchanged, or loads exactly what it holds.

`PAL_ADAPTERS_FUZZ` multiplies the number of cases.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import pal_adapters as pa
from tests.hosts.peft.unchanged import differences, picture

CASES = 125 * int(os.environ.get("PAL_ADAPTERS_FUZZ", "1"))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOURCES: dict[str, str] = {}
METHODS: dict[str, Callable[[], Any]] = {
    "pal": lambda: pa.PALPeftConfig(hidden_size=4, num_heads=2, init_weights=False),
    "joint pal": lambda: pa.PALPeftConfig(hidden_size=4, num_heads=2, init_weights=False, train_base=True),
    "houlsby": lambda: pa.HoulsbyPeftConfig(hidden_size=3, init_weights=False),
    "lhuc": lambda: pa.LHUCPeftConfig(init_weights=False),
    "scalearn": lambda: pa.ScaLearnPeftConfig(adapters=dict(SOURCES)),
    "camtl": lambda: pa.CAMTLPeftConfig(tasks=["a", "b"], max_length=8, init_weights=False),
}
# What an error may be: ours, or the host's and safetensors' own for a folder that they cannot read. No KeyError,
# TypeError, AttributeError, RuntimeError, AssertionError: those say nothing of a damaged folder.
CLEAR = (pa.PalAdaptersError, ValueError, OSError, SafetensorError)


def base(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertModel(transformers.BertConfig(vocab_size=12, max_position_embeddings=8, **sizes)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folders = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        source = tmp_path_factory.mktemp("sources")
        get_peft_model(base(), METHODS["houlsby"]()).save_pretrained(source)
        SOURCES[name] = str(source)
    for name, config in METHODS.items():
        folders[name] = tmp_path_factory.mktemp("saved")
        get_peft_model(base(), config()).save_pretrained(folders[name])
    folders["lora"] = tmp_path_factory.mktemp("saved")
    get_peft_model(base(), LoraConfig(target_modules=["query"])).save_pretrained(folders["lora"])
    folders["base model"] = tmp_path_factory.mktemp("saved")
    save_file({name: value.clone() for name, value in base().state_dict().items()}, folders["base model"] / WEIGHTS)
    return folders


numbers = st.integers(0, 10**6)


def _bytes(path: pathlib.Path, kind: str, at: int) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        del data[at % len(data) :]
    elif kind == "flip":
        data[at % len(data)] ^= 1 << at % 8
    elif kind == "flip front":
        data[at % min(len(data), 200)] ^= 1 << at % 8
    else:
        data += b"\0" * (1 + at % 9)
    path.write_bytes(bytes(data))


def _tensors(path: pathlib.Path, kind: str, at: int, other: int) -> None:
    tensors = load_file(path)
    names = sorted(tensors)
    name = names[at % len(names)]
    value = tensors[name]
    second = names[other % len(names)]
    changed: dict[str, Tensor | None] = {
        "drop": {name: None},
        "drop half": dict.fromkeys(names[at % 2 :: 2]),
        "add": {f"{name}.more": value.clone()},
        "rename": {name: None, name.replace("layer.0", "layer.7"): value, f"{second}_": tensors[second].clone()},
        "exchange": {name: tensors[second].clone(), second: value.clone()},
        "nan": {
            name: torch.where(torch.arange(value.numel()).view(value.shape) == other % value.numel(), torch.nan, value)
        },
        "inf": {name: value / 0.0 + torch.inf},
        "huge": {name: torch.full_like(value, 1e39, dtype=torch.float64)},
        "integers": {name: value.to(torch.int32)},
        "bool": {name: value > 0},
        "half": {name: value.half()},
        "double": {name: value.double()},
        "flat": {name: value.flatten()},
        "empty": {name: value[:0]},
        "transposed": {name: value.permute(*reversed(range(value.dim()))).contiguous()},
        "scalar": {name: torch.tensor(1.0)},
    }[kind]  # type: ignore[assignment]
    tensors.update(changed)  # type: ignore[arg-type]
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


JSON_VALUES: list[Any] = [None, True, -1, 0, 3, 10**30, 0.5, float("nan"), "", "pal", "LORA", [], [7], {}, {"a": 1}]


def _config(path: pathlib.Path, kind: str, at: int, value: Any) -> None:
    config = json.loads(path.read_text())
    name = sorted(config)[at % len(config)]
    if (name, value) == ("peft_type", "LORA"):  # with which the host loads it as LoRA
        value = "LORE"
    if kind == "drop":
        del config[name]
    elif kind == "unknown":
        config["an_option_of_tomorrow"] = value
    elif kind == "all":
        config = value
    else:
        config[name] = value
    path.write_text(json.dumps(config))


damages = st.one_of(
    st.tuples(st.just("bytes of weights"), st.sampled_from(["cut", "flip", "flip front", "more"]), numbers),
    st.tuples(st.just("bytes of config"), st.sampled_from(["cut", "flip", "more"]), numbers),
    st.tuples(
        st.just("tensors"),
        st.sampled_from(
            ["drop", "drop half", "add", "rename", "exchange", "nan", "inf", "huge", "integers", "bool", "half",
             "double", "flat", "empty", "transposed", "scalar"]
        ),
        numbers,
        numbers,
    ),
    st.tuples(
        st.just("config"), st.sampled_from(["drop", "unknown", "all", "value", "value"]), numbers,
        st.sampled_from(JSON_VALUES),
    ),
    st.tuples(
        st.just("exchange"), st.sampled_from([*METHODS, "lora", "base model"]), st.sampled_from([WEIGHTS, CONFIG])
    ),
    st.tuples(st.just("missing"), st.sampled_from([WEIGHTS, CONFIG])),
)  # fmt: skip


def damage(folder: pathlib.Path, saved: dict[str, pathlib.Path], what: tuple[Any, ...]) -> None:
    kind, *how = what
    if kind == "bytes of weights":
        _bytes(folder / WEIGHTS, *how)
    elif kind == "bytes of config":
        _bytes(folder / CONFIG, *how)
    elif kind == "tensors":
        _tensors(folder / WEIGHTS, *how)
    elif kind == "config":
        _config(folder / CONFIG, *how)
    elif kind == "missing":
        (folder / how[0]).unlink()
    elif (saved[how[0]] / how[1]).is_file() and how != ["lora", CONFIG]:  # with which the host loads it as LoRA
        shutil.copy(saved[how[0]] / how[1], folder / how[1])


def _held(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter by the names of a file."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


MODELS: dict[tuple[str, str], nn.Module] = {}


def _model(method: str, door: str) -> nn.Module:
    """The model that a folder is loaded into: the same one again, as long as nothing was loaded."""
    if (method, door) not in MODELS:
        plain = base()
        MODELS[method, door] = (
            plain
            if door in ("from_pretrained", "transformers")
            else get_peft_model(plain, METHODS[method.removeprefix("joint ")](), adapter_name="old")
            if door == "beside"
            else get_peft_model(plain, METHODS[method](), adapter_name="new")
        )
    return MODELS[method, door]


@pytest.mark.parametrize("door", ["from_pretrained", "beside", "over", "transformers"])
@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_damaged_folders(
    joint: bool, door: str, saved: dict[str, pathlib.Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    counts = {"loaded": 0, "rejected": 0}
    names = ["joint pal"] if joint else [name for name in METHODS if name != "joint pal"]

    @settings(
        max_examples=CASES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(method=st.sampled_from(names), what=damages)
    def check(method: str, what: tuple[Any, ...]) -> None:
        folder = place / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[method], folder)
        damage(folder, saved, what)
        model = _model(method, door)
        before = picture(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if door == "from_pretrained":
                    loaded = PeftModel.from_pretrained(model, folder, adapter_name="new")
                else:
                    model.load_adapter(str(folder), "new")  # type: ignore[operator]
                    loaded = model
        except CLEAR as error:
            assert str(error)  # noqa: PT017  (many kinds, and no error is fine too)
            assert differences(before, picture(model)) == []
            counts["rejected"] += 1
            return
        del MODELS[method, door]
        counts["loaded"] += 1
        # transformers takes any character for the dots of the prefix.
        prefix = re.compile("^base_model.model." if door == "transformers" else r"^base_model\.model\.")
        file = {prefix.sub("", key, count=1): v for key, v in load_file(folder / WEIGHTS).items()}
        held = {key.removeprefix("base_model.model."): v for key, v in _held(loaded, "new").items()}
        assert set(file) == set(held)
        assert all(torch.equal(held[key], value.to(held[key].dtype)) for key, value in file.items())
        assert all(value.isfinite().all() for value in held.values())

    check()
    assert counts["loaded"], "some damage does no harm, such as another precision"
    assert counts["rejected"] > CASES // 2
