"""The Python snippets of README.md and docs/ run in their order, on a tiny random model instead of the named one.

A page that gets a new snippet fails here until `PAGES` says what the snippet starts from.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pal_adapters.cli.options import parse
from pal_adapters.multitask import load_toy_task
from tests.multitask.tiny_encoder import save_tiny_encoder

from .tiny_mpnet import save_tiny_mpnet

ROOT = Path(__file__).resolve().parents[2]
Names = dict[str, Any]  # what a page has defined
Prepare = Callable[[Names], None]
SOURCES = ("mnli", "qqp", "sst2")
TEXTS = ("sentence1", "sentence2")


def snippets(page: str, language: str = "python") -> list[str]:
    text, block = (ROOT / page).read_text(encoding="utf-8"), rf"^( *)```{language}\n(.*?)^\1```$"
    return [textwrap.dedent(found[2]) for found in re.finditer(block, text, re.M | re.S)]


def pages() -> list[str]:
    return ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]


def toy(_: str, task: str) -> Any:
    """Stands for `datasets.load_dataset("nyu-mll/glue", task)`."""
    spec, splits = load_toy_task("similarity" if task == "stsb" else "entailment", train_size=16, test_size=8)
    return {
        split: rows.rename_columns(dict(zip(spec.text_columns, TEXTS, strict=True))) for split, rows in splits.items()
    }


def nothing(names: Names) -> None:
    """The snippet starts from what those above it left, or from nothing."""


def again(number: int) -> Prepare:
    """The snippet starts from what another one of its page makes."""
    return lambda names: names["run"](number)


def plain(names: Names) -> None:
    from transformers import AutoModel

    names["base"] = names["model"] = AutoModel.from_pretrained(names["folder"])


def classifier(names: Names) -> None:
    from transformers import AutoModelForSequenceClassification

    names["base"] = names["model"] = AutoModelForSequenceClassification.from_pretrained(names["folder"])


def in_adapters(*adapters_: str) -> Prepare:
    """A model of `adapters` with bottlenecks of these names."""

    def prepare(names: Names) -> None:
        from adapters import AutoAdapterModel, SeqBnConfig

        names["base"] = names["model"] = AutoAdapterModel.from_pretrained(names["folder"])
        for name in adapters_:
            names["model"].add_adapter(name, config=SeqBnConfig(reduction_factor=1))

    return prepare


def sources_in_files(names: Names) -> None:
    in_adapters(*SOURCES)(names)
    Path("adapters").mkdir()  # the host makes no more than the last folder
    for name in SOURCES:
        names["model"].save_adapter(f"adapters/{name}", name, use_safetensors=True)


def fused(names: Names) -> None:
    """A combination that was not folded yet."""
    in_adapters(*SOURCES)(names)
    names["model"].add_adapter_fusion(names["sources"], config="scalearn")


def lora_in_files(*folders: str) -> Prepare:
    def prepare(names: Names) -> None:
        from peft import LoraConfig, get_peft_model

        for folder in folders:
            classifier(names)
            config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
            get_peft_model(names["base"], config).save_pretrained(folder)
        classifier(names)

    return prepare


def mpnet_in_a_folder(_: Names) -> None:
    save_tiny_mpnet("mpnet")


def two_in_peft(names: Names) -> None:
    from peft import get_peft_model

    from pal_adapters import PALPeftConfig

    plain(names)
    names["base"] = get_peft_model(names["base"], PALPeftConfig(), adapter_name="rte")
    names["base"].add_adapter("stsb", PALPeftConfig())


def tasks_of(*tasks: str) -> Prepare:
    """A base and tasks for it."""

    def prepare(names: Names) -> None:
        from transformers import AutoTokenizer

        from pal_adapters.multitask import Task

        plain(names)
        names["tokenizer"] = AutoTokenizer.from_pretrained(names["folder"])
        names["tasks"] = [Task(name, toy("", name), text_columns=TEXTS, num_labels=2) for name in tasks]

    return prepare


def heads_on_a_plain_base(names: Names) -> None:
    from pal_adapters.multitask import MultiTaskTrainer, MultiTaskTrainingArguments, TaskHeads

    tasks_of("rte", "mrpc", "cola")(names)
    names["model"] = TaskHeads(names["base"])
    for task in names["tasks"]:
        names["model"].add(task.name, task.head_config())
    names |= {"args": MultiTaskTrainingArguments("out"), "MultiTaskTrainer": MultiTaskTrainer}
    names["MultiTaskTrainingArguments"] = MultiTaskTrainingArguments


def served_folder(names: Names) -> None:
    heads_on_a_plain_base(names)
    names["model"].save_pretrained("out", processing_class=names["tokenizer"], tasks=names["tasks"])


def calling_the_service(names: Names) -> None:
    """The client of the snippet calls a service in this process, whose queue is full the first time."""
    from types import SimpleNamespace

    from pal_adapters.serving import create_app
    from pal_adapters.serving.batcher import Batcher, QueueFullError
    from tests.serving.fake import FakePredictor
    from tests.serving.test_app import call

    patch, submit, waits = names["monkeypatch"], Batcher.submit, names.setdefault("waits", [])

    async def busy(batcher: Batcher, requests: Any) -> Any:
        if not waits:
            raise QueueFullError
        return await submit(batcher, requests)

    def post(path: str, **body: Any) -> Any:
        return call(create_app(FakePredictor()), ("POST", path, body))[0]

    patch.setattr(Batcher, "submit", busy)
    patch.setattr("time.sleep", waits.append)
    patch.setattr("httpx.Client", lambda base_url, timeout: SimpleNamespace(post=post))


def answering(names: Names) -> None:
    """A saved model with the tasks of the page, and one with a single task."""
    from transformers import AutoTokenizer

    from pal_adapters.multitask import Task, TaskHeads

    plain(names)
    tokenizer = names["tokenizer"] = AutoTokenizer.from_pretrained(names["folder"])
    tasks = [Task(name, {}, text_columns=("sentence",), num_labels=2) for name in ("sentiment", "topic", "toxicity")]
    tasks.append(Task("rte", {}, text_columns=("premise", "hypothesis"), num_labels=2))
    tasks.append(Task("ner", {}, kind="token_tagging", label_names=("O", "B-PER", "I-PER")))
    irony = Task("irony", {}, text_columns=("sentence",), num_labels=2)
    for place, some in (("runs/irony/best", [irony]), ("out/best", tasks)):
        names["model"] = TaskHeads(names["base"])
        for task in some:
            names["model"].add(task.name, task.head_config())
        names["model"].prepare_training()
        names["model"].save_pretrained(place, processing_class=tokenizer, tasks=some)
    names |= {"Task": Task, "tasks": tasks}


def folder_of_an_earlier_release(names: Names) -> None:
    for name in names["model"].tasks:
        if name != "rte":
            names["model"].remove(name)
    names["model"].save_pretrained("old")
    Path("old/tasks.json").unlink()


def answering_again(names: Names) -> None:
    answering(names)
    names["predictor"] = names["Predictor"].from_pretrained("out/best")


# For each page, for each of its snippets in order: the host that it needs, and what it starts from.
PAGES: dict[str, list[tuple[str, Prepare]]] = {
    "README.md": [
        ("adapters", nothing),
        ("peft", nothing),
        ("peft", two_in_peft),
        ("adapters", in_adapters(*SOURCES)),
        ("peft", lora_in_files("adapters/mnli", "somebody/bert-qqp-lora")),
        ("adapters", in_adapters()),
    ],
    "docs/adapters.md": [
        ("adapters", nothing),
        ("adapters", in_adapters()),
        ("adapters", again(0)),
        ("adapters", nothing),
        ("adapters", nothing),
        ("adapters", nothing),
        ("adapters", mpnet_in_a_folder),
    ],
    "docs/ca_mtl.md": [
        ("adapters", plain),
        ("peft", plain),
        ("peft", nothing),
        ("peft", heads_on_a_plain_base),
        ("peft", tasks_of("rte", "mrpc", "cola")),
    ],
    "docs/export.md": [("peft", nothing), ("onnxruntime", again(0)), ("peft", nothing)],
    "docs/fusion_peft.md": [
        ("peft", lora_in_files("adapters/mnli", "somebody/bert-qqp-lora")),
        ("peft", nothing),
        ("peft", nothing),
        ("peft", nothing),
        ("peft", again(2)),
    ],
    "docs/houlsby.md": [("peft", classifier)],
    "docs/index.md": [("adapters", plain), ("peft", classifier)],
    "docs/multitask.md": [
        ("adapters", nothing),
        ("adapters", nothing),
        ("adapters", in_adapters("mnli", "ner", *SOURCES[1:])),
        ("adapters", nothing),
        ("adapters", nothing),
        ("adapters", again(0)),
    ],
    "docs/pals.md": [("adapters", in_adapters()), ("peft", classifier)],
    "docs/peft.md": [
        ("peft", nothing),
        ("peft", nothing),
        ("peft", nothing),
        ("peft", nothing),
        ("peft", nothing),
        ("bitsandbytes", nothing),
        ("peft", nothing),
    ],
    "docs/predict.md": [
        ("peft", answering),
        ("peft", nothing),
        ("peft", folder_of_an_earlier_release),
        ("peft", answering_again),
        ("peft", answering_again),
        ("peft", lora_in_files("rte", "sst2")),
        ("peft", answering_again),
    ],
    "docs/sampling.md": [("peft", heads_on_a_plain_base), ("peft", nothing), ("peft", heads_on_a_plain_base)],
    "docs/serve.md": [("fastapi", calling_the_service), ("uvicorn", served_folder)],
    "docs/transfer.md": [
        ("adapters", sources_in_files),
        ("adapters", nothing),
        ("adapters", nothing),
        ("adapters", fused),
        ("adapters", nothing),
        ("adapters", nothing),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_encoder(tmp_path_factory.mktemp("tiny_encoder"))


def test_every_page_is_here() -> None:
    assert {page: len(found) for page in pages() if (found := snippets(page))} == {p: len(s) for p, s in PAGES.items()}


@pytest.mark.parametrize(("page", "host"), [(p, h) for p, s in PAGES.items() for h in sorted({host for host, _ in s})])
def test_snippets_run(page: str, host: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(host)
    if host == "uvicorn":
        monkeypatch.setattr("uvicorn.run", lambda app, **_: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", toy)
    code = snippets(page)
    ids = torch.arange(5, 33).view(4, 7)

    def run(number: int) -> None:
        names["batch"] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        exec(compile(code[number].replace("bert-base-uncased", folder), f"{page}[{number}]", "exec"), names)

    names: Names = {"folder": folder, "run": run, "ids": ids[:2], "mask": torch.ones(2, 7).long()}
    names |= {"labels": torch.zeros(4).long(), "batches": [{"input_ids": ids}], "monkeypatch": monkeypatch}
    for number, (needs, prepare) in enumerate(PAGES[page]):
        if needs == host:
            prepare(names)
            run(number)


def test_the_client_of_the_service(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fastapi")
    code, _ = snippets("docs/serve.md")
    names: Names = {"monkeypatch": monkeypatch}
    calling_the_service(names)
    exec(compile(code, "docs/serve.md", "exec"), names)
    assert names["waits"] == [1]
    first, second = "the film was wonderful .", "a dull film ."
    assert capsys.readouterr().out.splitlines() == [
        f"{text} {text.upper()} {1 / len(text)}" for text in (first, second)
    ]
    with pytest.raises(ValueError, match=r"column 'hypothesis' is missing \(request 1, task pair\)"):
        names["predict"]([{"task": "sentiment", "sentence": "x"}, {"task": "pair", "premise": "x"}])
    assert len(code.strip().splitlines()) <= 25


STUBS = (
    'python() { [ "$1" = -c ] || { printf \'%q \' "$@"; echo; }; }; '
    "pal-adapters() { printf '%q ' pal-adapters \"$@\"; echo; }; "
    "PAL_ADAPTERS_ADMIN_TOKEN=; pip() { :; }; torchrun() { :; }; accelerate() { :; }; curl() { :; }"
)
SCRIPTS = {"train_tasks": "train", "transfer": "transfer"}
FOLDERS = ("predict", "serve", "info", "fold")


def check_options(command: str, options: list[str]) -> None:
    """Parses the options of a script or of a subcommand of `pal-adapters`, which end the process if one is wrong."""
    command = SCRIPTS.get(command, command)
    if command == "run":
        return
    if command == "mpnet_base":
        assert len(options) == 2  # the folder with the wheels, and the new one
        return
    if command == "serve_ray":  # needs ray to be imported; a test of its own starts it
        return
    module = importlib.import_module(command if command in ("quickstart", "glue") else f"pal_adapters.cli.{command}")
    (made,) = (value for name, value in vars(module).items() if name == f"{command.title()}Options")
    parse(command, "", options, made, **({"folder": ""} if command in FOLDERS else {}))


@pytest.mark.parametrize("page", [page for page in pages() if snippets(page, "bash")])
def test_commands_name_scripts_and_options_that_exist(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bash expands the loops and functions of a page; no script runs."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for block in snippets(page, "bash"):
        command = ["bash", "-euc", f"{STUBS}\n{block.replace('/srv/tasks', '.')}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            script, *options = shlex.split(line)
            if script == "benchmarks/claims.py":
                parse(script, "", options, importlib.import_module("claims.options").ClaimsOptions)
            elif script.startswith("examples/"):
                check_options(Path(script).stem, options)
            elif script == "pal-adapters":
                check_options(options[0], options[1:])
            assert script in ("-m", "pal-adapters") or (ROOT / script).is_file()
