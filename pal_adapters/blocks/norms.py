"""The norms of a block over the model's width, and the norm after the blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.errors import SiteError

from .sites import Block, is_added
from .walk import named_modules

# Norms of queries and keys are not norms of the residual stream, even where they span the same width.
_INSIDE_ATTENTION = frozenset({"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"})
_FINAL_NORMS = (
    "final_layer_norm", "final_layernorm", "final_norm", "emb_layer_norm_after", "embedding_norm", "ln_f", "norm_f",
    "ln", "norm", "layernorm", "layer_norm", "LayerNorm",
)  # fmt: skip


@dataclass(frozen=True)
class NormForm:
    r"""What a norm computes, $\hat x \odot (w + c) + b$.

    Attributes:
        centred: whether `x_hat` is `(x - mean) / sqrt(variance + eps)` (layer norm) or `x / sqrt(mean(x^2) + eps)`
            (RMS norm).
        eps: the number in the denominator.
        offset: `c`, 1 for norms whose stored weight is the deviation from one (Gemma, Nemotron), else 0.
    """

    centred: bool
    eps: float
    offset: float

    def standardise(self, x: Tensor) -> Tensor:
        """`x_hat` of `x` `[..., d]`, in float32."""
        return (F.layer_norm if self.centred else F.rms_norm)(x.float(), x.shape[-1:], eps=self.eps)

    def scale(self, norm: nn.Module, x: Tensor) -> Tensor:
        """`w + c`, `[d]`, for an input `x`; ones for a norm without a weight."""
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor):
            return torch.ones(x.shape[-1], device=x.device)
        return weight + self.offset if self.offset else weight


def norm_form(norm: nn.Module, width: int) -> NormForm | None:
    """What a norm over `width` features computes, or None if it is not of the form of `NormForm`.

    Found by running the norm's own forward on random numbers, because neither names nor base classes tell: Nemotron's
    norm is a subclass of `nn.LayerNorm` that adds one to the weight.
    """
    # A stand-in with the class and the attributes of the norm, but small random parameters on the CPU and no hooks.
    probe = copy.copy(norm)
    for name in norm._parameters:  # a call in another thread may hide them, see `hooks.weight_copies`
        probe.__dict__.pop(name, None)
    generator = torch.Generator().manual_seed(0)
    names = [name for name, parameter in norm._parameters.items() if parameter is not None]
    with torch.device("cpu"):
        values = {name: torch.randn(width, generator=generator) for name in names}
        probe._parameters = {name: nn.Parameter(value) for name, value in values.items()}
        probe._parameters |= {name: None for name in norm._parameters if name not in values}
        # Of small numbers too, for which `eps` matters.
        x = torch.randn(4, width, generator=generator) * torch.tensor([3.0, 0.3, 0.02, 0.003])[:, None] + 0.002
        try:
            with torch.no_grad():
                output = type(norm).forward(probe, x)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # a module with another call signature
            return None
        if not isinstance(output, Tensor) or output.shape != x.shape or not set(values) <= {"weight", "bias"}:
            return None
        numbers = {value for value in vars(norm).values() if isinstance(value, float)} | {1e-5}  # OLMo keeps none
        for centred, offset, eps in product((True, False), (0.0, 1.0), sorted(numbers)):
            form = NormForm(centred, eps, offset)
            expected = form.standardise(x) * form.scale(probe, x) + values.get("bias", 0.0)
            if torch.allclose(output.float(), expected, rtol=1e-4, atol=1e-5):
                return form
    return None


def _looks_like_a_norm(module: nn.Module, width: int) -> bool:
    if "norm" not in type(module).__name__.lower() or list(module.children()):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor):
        return tuple(weight.shape) == (width,)
    return tuple(getattr(module, "normalized_shape", ())) == (width,)


def full_norms(block: Block, without: str = "norm_layers=[]") -> dict[str, nn.Module]:
    """The norms of a block over its whole width, by path.

    Args:
        block: the block.
        without: the option that does without them, for the error.

    Raises:
        SiteError: if it has none, or one that is not of the form of `NormForm`.
    """
    found: dict[str, nn.Module] = {}
    skipped: tuple[str, ...] = ()
    for path, module in named_modules(block.module, units=False).items():
        if f"{path}.".startswith(skipped):
            continue
        if path and is_added(module):
            skipped += (f"{path}.",)
        elif path.rpartition(".")[2] not in _INSIDE_ATTENTION and _looks_like_a_norm(module, block.width):
            found[path] = module
    for path, module in found.items():
        if norm_form(module, block.width) is None:
            raise SiteError(
                f"{block.name}.{path} ({type(module).__name__}) cannot become conditional: it is neither a layer norm "
                f"nor an RMS norm. Pass {without}."
            )
    if not found:
        raise SiteError(
            f"{block.name} has no layer norm or RMS norm of a known kind over its {block.width} features, which a "
            f"network needs: pass {without}."
        )
    return found


def final_norm(model: nn.Module, block: Block) -> nn.Module | None:
    """The norm behind a pre-LN stack, or None where the stack's output is not normalised (CLIP's vision tower)."""
    path = block.name.split(".")[:-2]
    for length in (len(path), len(path) - 1):
        if length < 0:
            break
        parent = model.get_submodule(".".join(path[:length]))
        for name in _FINAL_NORMS:
            module = getattr(parent, name, None)
            if isinstance(module, nn.Module) and "norm" in type(module).__name__.lower():
                return module
    return None


def required_final_norm(model: nn.Module, block: Block, what: str) -> tuple[nn.Module, NormForm]:
    """`final_norm` for something that needs it, and what it computes.

    Raises:
        SiteError: if there is none, or it is not of the form of `NormForm`.
    """
    norm = final_norm(model, block)
    if norm is None:
        raise SiteError(
            f"{what} needs a norm behind the blocks, which {type(model).__name__} lacks: pass bottleneck='none'."
        )
    form = norm_form(norm, block.width)
    if form is None:
        raise SiteError(
            f"{what} cannot use {type(norm).__name__}: it is neither a layer norm nor an RMS norm: "
            "pass bottleneck='none'."
        )
    return norm, form
