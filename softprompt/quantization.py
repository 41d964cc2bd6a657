"""Frozen weights in 8 or 4 bits: stored so by bitsandbytes, made whole again for each product.

`y = x Wᵀ + b` with `W` as it is stored: 8 bits with a scale for each row of `W`, or the 16 values of NF4 with a scale
for each 64 numbers. Only weights are rounded, never inputs, so that no row of a batch depends on its neighbours, and
the gradient is that of the forward pass. bitsandbytes' own layers do otherwise: with 8 bits they round the inputs too,
and with 4 bits on a CPU they pass no gradient.

Embeddings and the output layer stay as they are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.errors import UserError

PRECISIONS = {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.bfloat16, "int4": torch.bfloat16}
"""For each precision of the frozen weights the type that is computed in."""
QUANTIZED = ("int8", "int4")


def require_library() -> Any:
    """bitsandbytes; UserError where it is not installed or cannot be used."""
    try:
        import bitsandbytes
    except Exception as error:  # its native library may be the wrong one for this machine
        raise UserError(
            f"precision: int8 and int4 need bitsandbytes, which cannot be imported here ({type(error).__name__}); "
            "install the extra, as in: pip install 'softprompt[quantized]'"
        ) from None
    return bitsandbytes


def quantize(model: PreTrainedModel, precision: str, device: torch.device) -> None:
    """Replace the linear layers of a model by quantised ones on a device, one after the other.

    Raises UserError where the model has none, or bitsandbytes has nothing for this device.
    """
    functional = require_library().functional
    stored = {"int8": _Int8, "int4": _Nf4}[precision]
    output = model.get_output_embeddings()
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output]
    if not found:
        raise UserError(f"precision: {precision} stores linear layers, and this model has none; use bfloat16")
    try:
        for name, layer in found:
            model.set_submodule(name, QuantizedLinear(layer, stored(layer.weight.detach().to(device), functional)))
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"precision: bitsandbytes cannot store {precision} on {device} ({str(error).partition(chr(10))[0][:200]}); "
            "use bfloat16"
        ) from error


def count_parameters(model: nn.Module) -> int:
    """Weights of a model, however they are stored."""
    stored = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return stored + sum(parameter.numel() for parameter in model.parameters())


class QuantizedLinear(nn.Module):
    """A frozen linear layer with quantised weights."""

    def __init__(self, layer: nn.Linear, stored: nn.Module) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.stored = stored
        self.bias = layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        apply: Any = _Product.apply
        product: Tensor = apply(inputs, self.stored)
        if self.bias is not None:
            product = product + self.bias
        return product


class _Product(torch.autograd.Function):
    """`x Wᵀ`; the whole `W` is made again for the backward pass, and not kept until then."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, stored: Any) -> Tensor:
        ctx.stored = stored
        whole: Tensor = stored(inputs.dtype)
        return inputs @ whole.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole: Tensor = ctx.stored(gradient.dtype)
        return gradient @ whole, None


class _Int8(nn.Module):
    """A matrix `[out, in]` in 8 bits, with a scale for each row."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, functional: Any) -> None:
        super().__init__()
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales / 127)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        whole: Tensor = self.codes * self.scales[:, None]
        return whole.to(dtype)


class _Nf4(nn.Module):
    """A matrix `[out, in]` in 4 bits, with a scale for each 64 numbers."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor, functional: Any) -> None:
        super().__init__()
        # As rows of 64: the CPU's kernel takes a row that is shorter than a block for a block.
        codes, state = functional.quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4")
        self.register_buffer("codes", codes)
        self.register_buffer("scales", state.absmax)
        self._shape = weight.shape
        self._functional = functional

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The matrix."""
        state = self._functional.QuantState(
            absmax=self.scales, shape=(len(self.scales), 64), dtype=dtype, blocksize=64, quant_type="nf4"
        )
        whole: Tensor = self._functional.dequantize_4bit(self.codes, state)
        return whole.view(self._shape)
