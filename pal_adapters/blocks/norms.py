"""The norms of a block over the model's width, and the one behind the blocks. Knows no method and neither host."""

from __future__ import annotations

from torch import Tensor, nn

from pal_adapters.errors import SiteError

from .sites import Block

# Norms over queries and keys are no norms of the residual stream.
_INSIDE_ATTENTION = frozenset({"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"})
_FINAL_NORMS = (
    "final_layer_norm", "final_layernorm", "final_norm", "emb_layer_norm_after", "ln_f", "norm", "layernorm",
    "layer_norm",
    "LayerNorm",
)  # fmt: skip
_ADDED = ("adapters.methods", "peft", "pal_adapters")


def is_rms(norm: nn.Module) -> bool:
    """Whether a module is an RMS norm `x / rms(x) * weight`, as in Llama and T5.

    Gemma's, which multiplies with `1 + weight`, has no `variance_epsilon`, and DeBERTa's, which has one, has a shift.
    """
    is_one = isinstance(getattr(norm, "variance_epsilon", None), float) and getattr(norm, "bias", None) is None
    return is_one and isinstance(norm.weight, Tensor)


def norm_eps(norm: nn.Module) -> float:
    """The small number in the denominator of a norm."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]


def is_norm(norm: nn.Module) -> bool:
    """Whether a module is a layer norm with a weight, or an RMS norm."""
    layer_norm = isinstance(norm, nn.LayerNorm) or type(norm).__name__ == "DebertaLayerNorm"
    return (layer_norm and norm.weight is not None) or is_rms(norm)


def _spans(norm: nn.Module, width: int) -> bool:
    weight = getattr(norm, "weight", None)
    return is_norm(norm) and isinstance(weight, Tensor) and tuple(weight.shape) == (width,)


def full_norms(block: Block) -> dict[str, nn.Module]:
    """The norms of a block over its whole width, by path.

    Raises:
        SiteError: if it has none of a known kind.
    """
    found: dict[str, nn.Module] = {}
    skipped: list[str] = []
    for path, module in block.module.named_modules():
        if any(path == s or path.startswith(s + ".") for s in skipped):
            continue
        if path and type(module).__module__.startswith(_ADDED):
            skipped.append(path)
        elif path.rpartition(".")[2] not in _INSIDE_ATTENTION and _spans(module, block.width):
            found[path] = module
    if not found:
        raise SiteError(
            f"{block.name} has no layer norm or RMS norm of a known kind over its {block.width} features, which "
            "conditional norms need: pass norm_layers=[]."
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


def required_final_norm(model: nn.Module, block: Block, what: str) -> nn.Module:
    """`final_norm` for something that needs it.

    Raises:
        SiteError: if there is none.
    """
    norm = final_norm(model, block)
    if norm is None:
        raise SiteError(f"{what} needs a norm behind the blocks, which {type(model).__name__} lacks.")
    return norm
