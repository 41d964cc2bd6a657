"""From parameters to the prompt: formulas, starts and moves."""

import pytest
import torch
from torch import Tensor, nn

from softprompt.parameterization import Direct, Parameterization, Residual, cap_norms

CPU = torch.device("cpu")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residual(initial: Tensor, seed: int = 0) -> Residual:
    return Residual(initial, 6, torch.Generator().manual_seed(seed), CPU)


def perturb(made: Parameterization) -> None:
    """Parameters as training may leave them."""
    with torch.no_grad():
        for n, parameter in enumerate(made.parameters):
            parameter.add_(0.3 * draw(*parameter.shape, seed=n + 1))


@pytest.mark.parametrize("shape", [(4, 16), (2, 2, 3, 4, 8)])
def test_a_direct_prompt_is_its_parameter_in_any_shape(shape: tuple[int, ...]) -> None:
    initial = draw(*shape)
    made = Direct(initial, CPU)
    assert torch.equal(made.fold(), initial)
    assert [parameter.shape for parameter in made.parameters] == [initial.shape]
    made.move(initial + 1)
    assert torch.equal(made.fold(), initial + 1)
    assert torch.equal(initial, draw(*shape))


def test_a_residual_prompt_is_vectors_plus_the_normalised_network() -> None:
    made = residual(draw(4, 16))
    perturb(made)
    vectors, *tensors = made.parameters
    network = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16), nn.LayerNorm(16))
    for own, given in zip(network.parameters(), tensors, strict=True):
        own.data.copy_(given)
    expected = vectors + network(vectors)
    torch.testing.assert_close(made.fold(), expected)
    gradients = torch.autograd.grad(made.fold().square().sum(), made.parameters)
    others = torch.autograd.grad(expected.square().sum(), [vectors, *network.parameters()])
    torch.testing.assert_close(gradients, others)


def test_a_residual_prompt_starts_as_the_initial_one_and_is_drawn_from_its_generator() -> None:
    initial = draw(4, 16)
    one, same, other = residual(initial), residual(initial), residual(initial, seed=1)
    for made in (one, same, other):
        assert torch.equal(made.fold(), initial)
    assert all(map(torch.equal, one.parameters, same.parameters))
    assert not torch.equal(one.parameters[1], other.parameters[1])


def test_a_network_begins_within_the_bounds_of_torchs_own() -> None:
    _, down, down_bias, up, up_bias, *_ = residual(draw(4, 16)).parameters
    for tensor, width in ((down, 16), (down_bias, 16), (up, 6), (up_bias, 6)):
        assert 0.5 * width**-0.5 < tensor.abs().max() <= width**-0.5
        assert tensor.min() < 0 < tensor.max()


def test_a_move_is_to_the_prompt_and_leaves_the_network_alone() -> None:
    made, target = residual(draw(4, 16)), draw(4, 16, seed=9)
    perturb(made)
    before = [parameter.detach().clone() for parameter in made.parameters]
    for _ in range(2):
        made.move(target)
        torch.testing.assert_close(made.fold(), target)
    assert all(map(torch.equal, before, made.parameters))


def test_norms_are_scaled_down_to_the_cap_and_never_up() -> None:
    prompt = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(cap_norms(prompt, 2.5), torch.tensor([[1.5, 2.0], [0.3, 0.4], [0.0, 0.0]]))
