"""Several sources combined at one place, in plain torch: all sources of one kind are computed as one.

Legend: S sources, b examples, n tokens, i input width, d output width, m sum of the sources' inner widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.methods.houlsby.layer import ACTIVATIONS
from pal_adapters.nn.functional import linear
from pal_adapters.nn.unit import TaskUnit, UnitInputs, Weights

from .layer import Scales, SourceAttention, combine, normalise


class FixedScales(nn.Module):
    """Coefficients `[S, 1]` that are not trained."""

    omega: Tensor
    ablation = None

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("omega", torch.tensor(coefficients).unsqueeze(1), persistent=False)

    def forward(self) -> Tensor:
        """The coefficients, `[S, 1]`."""
        return self.omega


class SourceGroup(nn.Module):
    """Sources of one kind at one place. Their weights are non-persistent buffers, so that they never train.

    Args:
        rows: the indices of these sources among those of the place.
    """

    rows: tuple[int, ...]

    def __init__(self, rows: Iterable[int]) -> None:
        super().__init__()
        self.rows = tuple(rows)

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """Register a weight of the sources."""
        self.register_buffer(name, tensor, persistent=False)

    def acts_at(self, site: str) -> bool:
        return True

    def equals(self, other: nn.Module) -> bool:
        """Whether another group is of the same sources, so that two targets may share one."""
        if type(self) is not type(other) or self.rows != other.rows:
            return False
        mine, theirs = dict(self.named_buffers()), dict(other.named_buffers())
        return list(mine) == list(theirs) and all(
            value.shape == theirs[name].shape and torch.equal(value.cpu(), theirs[name].cpu())
            for name, value in mine.items()
        )

    def outputs(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """The term that each source adds to the value, `[..., S, d]`."""
        raise NotImplementedError

    def combined(self, omega: Tensor, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """`sum_s omega_s * a_s`, `omega` `[S, d]` or `[S, 1]`."""
        return combine(omega, self.outputs(site, value, inputs))


class Pair(NamedTuple):
    """A source at one module: `up f(down x + down_bias) + up_bias`, without the residual of a bottleneck.

    Attributes:
        down: `[r, i]`.
        up: `[d, r]`; LoRA's scaling is included.
        down_bias: `[r]`.
        up_bias: `[d]`.
        activation: the name of `f`; None for LoRA, which has none.
        embedding: whether `x` are token IDs.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str | None = None
    embedding: bool = False

    @property
    def is_lora(self) -> bool:
        return self.activation is None


class StackedSources(SourceGroup):
    """Low-rank pairs or bottlenecks of several sources, side by side.

    `down` `[m, i]` and `up` `[m, d]` are the stacked projections of all sources. The coefficients scale `up`, so that
    the sum over the sources costs as much as one adapter of width `m`.
    """

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    owner: Tensor

    def __init__(self, rows: Iterable[int], pairs: Sequence[Pair]) -> None:
        super().__init__(rows)
        self.widths = [pair.down.shape[0] for pair in pairs]
        activations = [pair.activation for pair in pairs if pair.activation is not None]
        self.activations = activations or None
        self.embedding = pairs[0].embedding
        self.reads_value = bool(activations)
        self.keep("down", torch.cat([pair.down for pair in pairs]))
        self.keep("up", torch.cat([pair.up.T for pair in pairs]))
        down_biases = [pair.down_bias for pair in pairs if pair.down_bias is not None]
        self.keep("down_bias", torch.cat(down_biases) if down_biases else None)
        known = next((pair.up_bias for pair in pairs if pair.up_bias is not None), None)
        zeros = None if known is None else torch.zeros_like(known)
        biases = [zeros if pair.up_bias is None else pair.up_bias for pair in pairs]
        self.keep("up_bias", None if zeros is None else torch.stack(biases))  # type: ignore[arg-type]
        self.keep("owner", torch.repeat_interleave(torch.arange(len(self.widths)), torch.tensor(self.widths)))

    def equals(self, other: nn.Module) -> bool:
        return isinstance(other, StackedSources) and self.activations == other.activations and super().equals(other)

    def hidden(self, x: Tensor) -> Tensor:
        """`[..., i]` (token IDs for an embedding) -> `[..., m]`."""
        if self.embedding:
            return F.embedding(x, self.down.T)
        hidden = linear(x, self.down, self.down_bias)
        if self.activations is None:
            return hidden
        if len(set(self.activations)) == 1:
            return ACTIVATIONS[self.activations[0]](hidden)
        parts = hidden.split(self.widths, -1)
        return torch.cat([ACTIVATIONS[g](part) for g, part in zip(self.activations, parts, strict=True)], -1)

    def _read(self, value: Tensor, inputs: UnitInputs) -> Tensor:
        return value if self.reads_value else inputs.read("x")

    def scaled(self, omega: Tensor) -> tuple[Tensor, Tensor | None]:
        """The up-projection `[m, d]` and the bias `[d]` of the weighted sum."""
        omega = omega.to(self.up.dtype)
        bias = None if self.up_bias is None else (omega * self.up_bias).sum(0)
        return self.up * omega.index_select(0, self.owner), bias

    def combined(self, omega: Tensor, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        up, bias = self.scaled(omega)
        return linear(self.hidden(self._read(value, inputs)), up.T, bias)

    def outputs(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        hidden = self.hidden(self._read(value, inputs))
        if len(set(self.widths)) == 1:
            up = self.up.view(len(self.widths), -1, self.up.shape[1]).to(hidden.dtype)
            given = torch.einsum("...sr,srd->...sd", hidden.unflatten(-1, up.shape[:2]), up)
        else:
            pairs = zip(hidden.split(self.widths, -1), self.up.split(self.widths), strict=True)
            given = torch.stack([part @ up.to(part.dtype) for part, up in pairs], -2)
        return given if self.up_bias is None else given + self.up_bias.to(given.dtype)


class NormCopies(SourceGroup):
    """The sources' own copies of a layer norm. A norm is linear in its weights: source `s` adds `LN_s(x) - LN(x)`, and
    the weighted sum is one norm with the weights `w + sum_s omega_s (w_s - w)`.

    Args:
        copies: the weights of each source by name.
        base: those of the base model.
    """

    def __init__(
        self, rows: Sequence[int], copies: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor]
    ) -> None:
        super().__init__(rows)
        self.names = list(base)
        for name, weight in base.items():
            weight = weight.detach().float().cpu()
            self.keep(f"{name}_change", torch.stack([copy[name].float() - weight for copy in copies]))

    def weights(self, omega: Tensor, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the merged norm."""
        merged = {}
        for name in self.names:
            change = getattr(self, f"{name}_change")
            merged[name] = base[name] + (omega.to(change.dtype) * change).sum(0)
        return merged


class UnitSources(SourceGroup):
    """Task modules of the sources in one block, such as PALs; each is computed separately, without dropout.

    Args:
        units: the modules, without weights.
        own: each module's weights in this block.
        shared: the weights each module shares with other blocks.
        registers: whether the shared weights are registered here.
    """

    def __init__(
        self,
        rows: Sequence[int],
        units: Sequence[TaskUnit],
        own: Sequence[Mapping[str, Tensor]],
        shared: Sequence[HeldWeights],
        *,
        registers: bool,
    ) -> None:
        super().__init__(rows)
        self._units = tuple(units)
        self._shared = tuple(shared)
        self.own = nn.ModuleList([HeldWeights(weights) for weights in own])
        # The first block of a stack registers them, so that they follow the model to other devices.
        self.shared = nn.ModuleList(shared if registers else [])

    @property
    def needs(self) -> set[str]:
        return {name for unit in self._units for name in unit.needs}

    @property
    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for unit in self._units for site in unit.sites))

    def members(self, site: str) -> list[int]:
        """The sources that act at a site."""
        return [s for s, unit in enumerate(self._units) if site in unit.sites]

    def acts_at(self, site: str) -> bool:
        return site in self.sites

    def equals(self, other: nn.Module) -> bool:
        """False: the modules have their own settings, and share weights that only one block registers."""
        return False

    def outputs(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        given = []
        for s in self.members(site):
            unit, own = self._units[s], self.own[s]
            assert isinstance(own, HeldWeights)
            slot = inputs._replace(slot=(*inputs.slot, s))
            given.append(unit(site, value, slot, {**own.weights(), **self._shared[s].weights()}) - value)
        return torch.stack(given, -2)


class HeldWeights(nn.Module):
    """Tensors by name, as non-persistent buffers."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(weights)
        for index, tensor in enumerate(weights.values()):
            self.register_buffer(f"weight_{index}", tensor, persistent=False)

    def weights(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"weight_{index}") for index, name in enumerate(self.names)}


class CombinedUnit(TaskUnit):
    r"""The sources of one combination at one place.

    $$v' = v + \sum_s \omega_s \odot a_s, \qquad\text{or}\qquad v' = v + \mathrm{attention}(v, a_1, ..., a_S)$$

    `a_s` is the term that source `s` alone adds to the value `v`: the sources do not see each other.

    Args:
        sites: where in a block it acts; `("value",)` at the output of a module.
        mixers: the coefficients or attention of each site. Shared ones are registered at one place only.
        owned: the sites whose mixer is registered here.
        rows: for each site the rows of the coefficients that belong to this place's sources; None for all, in order.
        names: the sources at each site, in the order of the coefficients.
        regularization: weight and form of the regulariser.
    """

    needs: tuple[str, ...]  # type: ignore[misc]
    sites: tuple[str, ...]  # type: ignore[misc]

    def __init__(
        self,
        sites: Sequence[str],
        mixers: Mapping[str, nn.Module],
        owned: Sequence[str],
        rows: Mapping[str, Sequence[int] | None],
        names: Mapping[str, Sequence[str]],
        *,
        needs: Sequence[str] = (),
        regularization: tuple[float, str] = (0.0, "mean"),
    ) -> None:
        super().__init__()
        self.sites = tuple(sites)
        self.needs = tuple(needs)
        self.names = {site: tuple(given) for site, given in names.items()}
        self.regularization = regularization
        self.mixers = nn.ModuleDict({site: mixers[site] for site in owned})
        self._mixers = (dict(mixers),)
        self._rows = {site: None if index is None else list(index) for site, index in rows.items()}
        self.groups = nn.ModuleList()

    def mixer(self, site: str) -> nn.Module:
        """The coefficients or the attention of a site, wherever they are registered."""
        return self._mixers[0][site]

    def omega(self, site: str) -> Tensor:
        """The coefficients of this call at a site, `[S, d]` or `[S, 1]`."""
        return self.select(site, self.mixer(site)())

    def learned(self, site: str) -> Tensor:
        """The coefficients used in inference, without dropout and after an ablation, `[S, d]` or `[S, 1]`."""
        mixer = self.mixer(site)
        assert isinstance(mixer, (Scales, FixedScales))
        return self.select(site, normalise(mixer.omega.detach(), mixer.ablation))

    def select(self, site: str, omega: Tensor) -> Tensor:
        """The rows of shared coefficients for this place's sources."""
        rows = self._rows[site]
        return omega if rows is None else omega[rows]

    def signature(self) -> tuple[object, ...]:
        return (type(self), id(self))

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Nothing to do: mixers draw their weights when they are created."""

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        groups = [g for g in self.groups if isinstance(g, SourceGroup) and g.acts_at(site)]
        mixer = self.mixer(site)
        if isinstance(mixer, SourceAttention):
            return value + self._attend(mixer, groups, site, value, inputs).to(value.dtype)
        omega = self.omega(site)
        total = value
        for group in groups:
            own = omega if len(groups) == 1 else omega[list(group.rows)]
            total = total + group.combined(own, site, value, inputs).to(value.dtype)
        return total

    @staticmethod
    def _attend(
        mixer: SourceAttention, groups: Sequence[SourceGroup], site: str, value: Tensor, inputs: UnitInputs
    ) -> Tensor:
        outputs = torch.cat([group.outputs(site, value, inputs) for group in groups], -2)
        query = inputs.read("x") if isinstance(groups[0], UnitSources) else value
        if not torch.is_autocast_enabled(value.device.type):
            dtype = mixer.query.weight.dtype
            query, outputs = query.to(dtype), outputs.to(dtype)
        return mixer(query, outputs)[0]
