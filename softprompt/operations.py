"""Operations of a frozen decoder with their derivatives written by hand, for the CPU.

Autograd keeps and passes over more than is needed where no weight has a gradient: every pass over a hidden state costs
as much as a small product. Each operation here is one node with as few passes as the formula allows, in the precision
of the model's own: sums in float32, results in the type of the weights.

Nothing here knows of prompts, layers or attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def normed_products(hidden: Tensor, norm: nn.Module, products: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """Several linear maps of one normed `[R, H]`; a norm of an unusual kind is left to itself."""
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        normed = norm(hidden)
        return tuple(product(normed) for product in products)
    apply: Any = _NormedProducts.apply
    parts = [part for product in products for part in (product.weight, product.bias)]
    found: tuple[Tensor, ...] = apply(hidden, norm.weight, epsilon, *parts)
    return found


def normed(hidden: Tensor, norm: nn.Module) -> Tensor:
    """`[…, H]` normed."""
    epsilon = getattr(norm, "variance_epsilon", None)
    apply: Any = _RmsNorm.apply
    result: Tensor = norm(hidden) if epsilon is None else apply(hidden, norm.weight, epsilon)
    return result


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `[R, heads, D]`; cosines and sines `[R, 1, D/2]`."""
    apply: Any = _Rotation.apply
    result: Tensor = apply(heads, cos, sin)
    return result


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x²) + ε) · w`, and the factor of each row."""
    wide = x.float()
    scale = torch.rsqrt(torch.linalg.vecdot(wide, wide).unsqueeze(-1) / x.shape[-1] + epsilon)
    return (wide * scale).mul_(weight).to(x.dtype), scale


def _norm_back(gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """The norm's derivative; no gradient for the frozen weight."""
    wide, gradient = x.float(), gradient.float() * weight
    along = torch.linalg.vecdot(gradient, wide).unsqueeze(-1) * scale.square() / x.shape[-1]
    return gradient.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, scale = _norm(x, weight, epsilon)
        ctx.save_for_backward(x, scale, weight)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _norm_back(gradient, *ctx.saved_tensors), None, None


class _NormedProducts(torch.autograd.Function):
    """The normed states are not kept, and the products' gradients are summed where they are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, *parts: Tensor | None) -> tuple[Tensor, ...]:
        result, scale = _norm(x, weight, epsilon)
        matrices, biases = parts[::2], parts[1::2]
        ctx.save_for_backward(x, scale, weight, *matrices)
        return tuple(nn.functional.linear(result, m, b) for m, b in zip(matrices, biases, strict=True) if m is not None)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight, *matrices = ctx.saved_tensors
        total = gradients[0] @ matrices[0]
        for gradient, matrix in zip(gradients[1:], matrices[1:], strict=True):
            total = torch.addmm(total, gradient, matrix)
        return _norm_back(total, x, scale, weight), *[None] * (2 + 2 * len(matrices))


class _Rotation(torch.autograd.Function):
    """The derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    result = torch.empty_like(x)
    upper, lower = result.chunk(2, dim=-1)
    torch.mul(first, cos, out=upper).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=lower).addcmul_(first, sin)
    return result
