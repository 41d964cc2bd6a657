"""From what is optimised to the prompt: the vectors themselves, or what a small network makes of them.

Only the prompt leaves training: whatever stands behind it is folded away, so that scoring and artifacts know nothing of
it. Nothing here knows a model or a loss.
"""

from typing import Protocol

import torch
from torch import Generator, Tensor, nn


class Parameterization(Protocol):
    """Parameters, and the prompt that they stand for."""

    parameters: list[nn.Parameter]
    """What the optimizer works on, float32."""
    state: dict[str, Tensor]
    """All that training changes, by name; the tensors themselves, no copies."""

    def fold(self) -> Tensor:
        """The prompt, differentiable in the parameters."""
        ...

    def move(self, prompt: Tensor) -> None:
        """Let `fold` give this prompt from now on."""
        ...


class Direct:
    """The prompt is the parameter; of any shape."""

    def __init__(self, initial: Tensor, device: torch.device) -> None:
        self._prompt = nn.Parameter(initial.detach().to(device, torch.float32, copy=True))
        self.parameters = [self._prompt]
        self.state: dict[str, Tensor] = {"prompt": self._prompt}

    def fold(self) -> Tensor:
        """The prompt, in the shape of the initial one."""
        return self._prompt

    @torch.no_grad()
    def move(self, prompt: Tensor) -> None:
        """Write the prompt."""
        self._prompt.copy_(prompt)


_RESIDUAL = ("vectors", "down", "down_bias", "up", "up_bias", "gain", "offset", "shift")


class Residual:
    """Residual reparameterisation: `p + LayerNorm(relu(p W + a) V + b)`, one network for all vectors.

    `W` is `[H, bottleneck]`, `V` is `[bottleneck, H]`. The norm's gain begins at zero, so that the prompt begins as the
    initial one; the paper's begins at one, which suits embeddings of that size alone.

    Source: Razdaibiedina et al. 2023, "Residual Prompt Tuning" (arXiv 2305.03937), section 3.
    """

    def __init__(self, initial: Tensor, bottleneck: int, generator: Generator, device: torch.device) -> None:
        width = initial.shape[-1]
        vectors = initial.detach().float().clone()
        down, up = _draw_linear(width, bottleneck, generator), _draw_linear(bottleneck, width, generator)
        gain, offset = torch.zeros(width), torch.zeros(width)
        self.parameters = [nn.Parameter(t.to(device)) for t in (vectors, *down, *up, gain, offset)]
        self._shift = torch.zeros_like(self.parameters[0].detach())
        """What moves have added; no parameter."""
        self.state: dict[str, Tensor] = dict(zip(_RESIDUAL, [*self.parameters, self._shift], strict=True))

    def fold(self) -> Tensor:
        """The prompt `[P, H]`."""
        vectors, down, down_bias, up, up_bias, gain, offset = self.parameters
        inner = nn.functional.linear(vectors, down, down_bias).relu()
        made = nn.functional.linear(inner, up, up_bias)
        return vectors + nn.functional.layer_norm(made, gain.shape, gain, offset) + self._shift

    @torch.no_grad()
    def move(self, prompt: Tensor) -> None:
        """Shift the outcome; the network stays as it is."""
        self._shift += prompt - self.fold()


def _draw_linear(inputs: int, outputs: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Weight `[outputs, inputs]` and bias of a linear layer, from U[-1/√inputs, 1/√inputs] as torch's own begins."""
    weight, bias = torch.rand(outputs, inputs, generator=generator), torch.rand(outputs, generator=generator)
    bound = inputs**-0.5
    return (2 * weight - 1) * bound, (2 * bias - 1) * bound


def cap_norms(prompt: Tensor, most: float) -> Tensor:
    """The prompt with every vector, along the last dimension, that is longer than `most` scaled down to it."""
    shares: Tensor = most / torch.linalg.vector_norm(prompt, dim=-1, keepdim=True)
    return prompt * shares.clamp(max=1)
