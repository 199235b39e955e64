"""The definition itself, checked against the paper's words and against numbers worked out by hand."""

import torch

from doratune.ops import reference


def tensors(out=5, columns=7, rank=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return new(out, columns), new(rank, columns), new(out, rank), new(out).abs() + 0.5


def test_by_hand():
    W = torch.tensor([[3.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    A = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    B = torch.tensor([[4.0], [0.0]], dtype=torch.float64)
    m = torch.tensor([10.0, 2.0], dtype=torch.float64)
    # W + s B A = [[3, 4], [0, 0.5]], its rows are 5 and 0.5 long
    expected = torch.tensor([[6.0, 8.0], [0.0, 2.0]], dtype=torch.float64)
    assert torch.allclose(reference.dora_weight(W, A, B, m, 0.5), expected)
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    b = torch.tensor([100.0, 200.0], dtype=torch.float64)
    assert torch.allclose(reference.dora_linear(x, W, b, A, B, m, 0.5), torch.tensor([114.0, 202.0]).double())


def test_every_row_is_as_long_as_its_magnitude():
    W, A, B, m = tensors()
    assert torch.allclose(reference.dora_weight(W, A, B, m, 0.7).norm(dim=1), m)


def test_training_starts_at_the_pretrained_weight():
    W, A, B, _ = tensors()
    assert torch.allclose(reference.dora_weight(W, A, 0 * B, W.norm(dim=1), 0.7), W)


def test_detached_is_the_gradient_with_a_constant_norm():
    W, A, B, m = tensors()
    A.requires_grad_(), B.requires_grad_(), m.requires_grad_()
    n = (W + 0.7 * B @ A).norm(dim=1).detach()
    dW = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad((m / n)[:, None] * (W + 0.7 * B @ A), (A, B, m), dW)
    found = torch.autograd.grad(reference.dora_weight(W, A, B, m, 0.7), (A, B, m), dW)
    exact = torch.autograd.grad(reference.dora_weight(W, A, B, m, 0.7, "exact"), (A, B, m), dW)
    assert all(torch.allclose(f, e) for f, e in zip(found, expected, strict=True))
    assert torch.allclose(exact[2], found[2])
    assert not torch.allclose(exact[0], found[0])
    assert not torch.allclose(exact[1], found[1])


def test_the_exact_gradient_is_numerically_right():
    W, A, B, m = tensors()
    A.requires_grad_(), B.requires_grad_(), m.requires_grad_()
    torch.autograd.gradcheck(lambda A, B, m: reference.dora_weight(W, A, B, m, 0.7, "exact"), (A, B, m))


def test_the_exact_gradient_is_orthogonal_to_the_direction():
    """A longer row of W + s B A is the same DoRA row: the gradient with respect to B has no part along it."""
    W, A, B, m = tensors(rank=7)
    B.requires_grad_()
    V = W + 0.7 * B @ A
    dW = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (dB,) = torch.autograd.grad(reference.dora_weight(W, A, B, m, 0.7, "exact"), B, dW)
    along = torch.linalg.solve(A.T, V.detach().T).T  # the change of B that lengthens V
    assert (dB * along).sum(1).abs().max() < 1e-9 * dB.abs().max() * along.abs().max()


def test_zero_rows_without_a_magnitude_are_plain_lora_rows():
    W, A, B, m = tensors()
    W[2], m[2] = 0, 0
    assert torch.allclose(reference.dora_weight(W, A, B, m, 0.7)[2], 0.7 * B[2] @ A)
    B[2] = 0
    assert torch.equal(reference.dora_weight(W, A, B, m, 0.7)[2], torch.zeros(7).double())
    m[2] = 3  # honoured where there is a direction
    B[2] = 1
    assert torch.allclose(reference.dora_weight(W, A, B, m, 0.7)[2].norm(), m[2])
