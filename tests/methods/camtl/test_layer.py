"""The modules of CA-MTL alone, against formulas written out here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.errors import UnsupportedError
from pal_adapters.methods.camtl.attention import ConditionalAttentionBias, block_layout
from pal_adapters.methods.camtl.bottleneck import ConditionalBottleneck, side_stream
from pal_adapters.methods.camtl.film import FiLM, condition_of
from pal_adapters.methods.camtl.norm import ConditionalLayerNorm, ConditionalNorm
from pal_adapters.methods.camtl.task import TaskConditions, align, transformed
from pal_adapters.nn.unit import batch_tasks

INDEX = torch.tensor([1, 0, 1])


def fresh(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def halves(film: FiLM, z: Tensor) -> tuple[Tensor, Tensor]:
    both = film.modulation.weight @ z + film.modulation.bias
    return both[: film.size], both[film.size :]


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_film(tasks: int) -> None:
    film, table, x = fresh(FiLM(6, 4)), torch.randn(tasks, 6), torch.randn(3, 7, 4)
    index = INDEX % tasks
    output = film(x, condition_of(table, batch_tasks(index)))
    for row, task in enumerate(index):
        gamma, beta = halves(film, table[task])  # type: ignore[arg-type]
        assert torch.allclose(output[row], (1 + gamma) * x[row] + beta, atol=1e-6)


def test_alignment_reads_the_embedding_and_everything_else_its_transformation() -> None:
    shared, x = fresh(TaskConditions(6, 2)), torch.randn(3, 4, 6)
    assert isinstance(shared, TaskConditions)
    weights = dict(shared.named_parameters())
    assert shared.alignment is not None
    for row, task in enumerate(INDEX):
        gamma, beta = halves(shared.alignment, shared.task_embedding[task])
        assert torch.allclose(align(weights, x, batch_tasks(INDEX))[row], (1 + gamma) * x[row] + beta, atol=1e-6)
    condition = transformed(weights, batch_tasks(INDEX))
    expected = shared.task_embedding @ shared.transformation.weight.T + shared.transformation.bias
    assert torch.allclose(condition.rows(condition.table), expected[INDEX], atol=1e-6)
    plain = TaskConditions(6, 2, alignment=False)
    assert align(dict(plain.named_parameters()), x, batch_tasks(INDEX)) is x


def written_out(module: ConditionalAttentionBias, z: Tensor, length: int) -> Tensor:
    """`M`, entry by entry."""
    gamma, beta = halves(module.film, z)
    c = module.columns
    if module.modulation == "matrix":
        gamma, beta = gamma.view(c, c), beta.view(c, c)
    m = torch.zeros(length, length)
    for i in range(length):
        for k in range(c):
            j = i // c * c + k
            if j < length:
                g, b = (gamma[i % c, k], beta[i % c, k]) if module.modulation == "matrix" else (gamma[k], beta[k])
                m[i, j] = (1 + g) * module.matrix[i, k] + b
    return m


@pytest.mark.parametrize("modulation", ["columns", "matrix"])
@pytest.mark.parametrize(("size", "length"), [(24, 8), (24, 10), (24, 7), (8, 20), (24, 24), (24, 1)])
def test_attention_bias(size: int, length: int, modulation: str) -> None:
    module = fresh(ConditionalAttentionBias(size, length, modulation=modulation))  # type: ignore[arg-type]
    assert isinstance(module, ConditionalAttentionBias)
    table = torch.randn(2, size)
    condition = condition_of(table, batch_tasks(INDEX))
    slots = torch.arange(length)[None]
    whole = module(condition, slots, slots, length)
    for task in range(2):
        assert torch.allclose(whole[task], written_out(module, table[task], length), atol=1e-6)
    for keys in range(1, length + 1):
        seen = slots[:, :keys]
        assert torch.equal(module(condition, seen, seen, keys), whole[:, :keys, :keys])
        assert torch.equal(module(condition, seen[:, -1:], seen, keys), whole[:, keys - 1 : keys, :keys])
    with pytest.raises(UnsupportedError, match=f"{length + 1} tokens, but max_length={length}"):
        module(condition, slots[:, -1:], slots, length + 1)
    # Each example at its own positions.
    generator = torch.Generator().manual_seed(4)
    queries, keys = (torch.randint(length, (INDEX.numel(), n), generator=generator) for n in (3, 5))
    term = module(condition, queries, keys, length)
    for example, task in enumerate(INDEX):
        expected = written_out(module, table[task], length)[queries[example]][:, keys[example]]
        assert torch.allclose(term[example], expected, atol=1e-6)


def test_released_layouts() -> None:
    assert block_layout(768, 128) == (6, 22)
    assert block_layout(1024, 128) == (8, 16)
    assert block_layout(768, 100) == (7, 15)  # 768 // 100 = 7 blocks of ceil(100 / 7)
    assert block_layout(384, 512) == (1, 512)
    module = ConditionalAttentionBias(768, 128)
    module.reset_parameters(identity=False)
    slots = torch.arange(128)[None]
    bias = module(condition_of(torch.randn(1, 768), batch_tasks(torch.tensor([0]))), slots, slots, 128)[0]
    assert float((bias != 0).float().mean()) == pytest.approx(0.16748, abs=1e-5)
    assert torch.equal(bias[0, :22], bias[21, :22])  # A = 0: the rows of a block are the same
    bias.sum().backward()
    assert module.matrix.grad is not None
    assert module.matrix.grad.any()


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("modulate_bias", [False, True])
def test_conditional_layer_norm(tasks: int, modulate_bias: bool) -> None:
    norm, table = fresh(ConditionalNorm(6, modulate_bias=modulate_bias)), torch.randn(tasks, 6)
    assert isinstance(norm, ConditionalNorm)
    x, w, b, index = torch.randn(3, 4, 6), torch.randn(6), torch.randn(6), INDEX % tasks
    condition = condition_of(table, batch_tasks(index))
    x_hat, x_rms = F.layer_norm(x, (6,), eps=1e-5), F.rms_norm(x, (6,), eps=1e-5)
    output = norm(x_hat * w + b, x_hat, w, b, condition)
    rms = norm(x_rms * w, x_rms, w, None, condition)
    for row, task in enumerate(index):
        gamma, beta = halves(norm.film, table[task])
        weight, bias = (1 + gamma) * w + beta, b
        if norm.bias_film is not None:
            gamma, beta = halves(norm.bias_film, table[task])
            bias = (1 + gamma) * b + beta
        assert torch.allclose(output[row], F.layer_norm(x[row], (6,), weight, bias, 1e-5), atol=1e-5)
        scale = (x[row].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        assert torch.allclose(rms[row], x[row] * scale * weight, atol=1e-5)


def test_own_norm_starts_as_the_identity_of_a_norm() -> None:
    norm = ConditionalLayerNorm(6)
    norm.reset_parameters(identity=True)
    x = torch.randn(3, 4, 6)
    output = norm.norm(x, 1e-5, condition_of(torch.randn(2, 6), batch_tasks(INDEX)))
    assert torch.allclose(output, F.layer_norm(x, (6,)), atol=1e-6)


def test_bottleneck_is_linear_in_what_film_gives() -> None:
    module, table, x = fresh(ConditionalBottleneck(7)), torch.randn(2, 7), torch.randn(3, 4, 7)
    assert isinstance(module, ConditionalBottleneck)
    assert module.down.weight.shape == (2, 7)  # floor(7 / 3)
    output = module(x, condition_of(table, batch_tasks(INDEX)))
    for row, task in enumerate(INDEX):
        z = module.embedding.weight @ table[task] + module.embedding.bias
        gamma, beta = halves(module.film, z)
        inner = ((1 + gamma) * x[row] + beta) @ module.down.weight.T + module.down.bias
        assert torch.allclose(output[row], inner @ module.up.weight.T + module.up.bias, atol=1e-5)


def test_side_stream() -> None:
    modules = [fresh(ConditionalBottleneck(6)) for _ in range(3)]
    condition, outputs = condition_of(torch.randn(2, 6), batch_tasks(INDEX)), [torch.randn(3, 4, 6) for _ in range(3)]
    value = torch.zeros(3, 4, 6)
    for module, output in zip(modules, outputs, strict=True):
        value = module(output + value, condition)
    assert torch.allclose(side_stream(modules, outputs, condition), value, atol=1e-6)  # type: ignore[arg-type]
