import pytest
import torch

from lab.tiny.muon import Muon, orthogonalised


def _with_torch(parameters, **options):
    return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **options)


@pytest.mark.parametrize("make", [Muon, _with_torch])
def test_updates_are_those_of_torch_but_for_its_rounding(make):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (12, 6), (6, 12), (6, 6)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    expected = [matrix.double() for matrix in start]
    averages = [torch.zeros_like(matrix) for matrix in expected]
    parameters = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    optimizer = make(parameters, lr=0.1, weight_decay=0.5, momentum=0.9, ns_steps=4)
    for step in gradients:
        for i, gradient in enumerate(step):
            parameters[i].grad = gradient.clone()
            averages[i] = 0.9 * averages[i] + 0.1 * gradient.double()
            x = 0.1 * gradient.double() + 0.9 * averages[i]
            x = x / x.norm()
            for _ in range(4):
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            expected[i] = expected[i] * (1 - 0.1 * 0.5) - 0.1 * 0.2 * max(gradient.shape) ** 0.5 * x
        optimizer.step()
    tolerance = 1e-5 if make is Muon else 3e-2
    for parameter, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 9), (2, 9, 4)])
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrices, 8))
    assert values.shape[1] == min(shape[1:]) and values.min() > 0.5 and values.max() < 1.5


def test_matrices_without_a_gradient_stay():
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    used.grad = torch.eye(2)
    Muon([used, unused], lr=0.1).step()
    assert bool((unused == 1).all()) and not bool((used == 1).all())
