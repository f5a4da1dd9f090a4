"""The Walsh–Hadamard transform of vectors of (nearly) any even length."""

import functools

import torch
from torch import Tensor

FIRST = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)  # which order is taken where several divide a length
WILLIAMSON = {  # the first halves of four symmetric circulants' first rows
    52: ("+-+--++", "+---+++", "++-+--+", "+----+-"),
    156: ("+++--+-+-----+--++--", "++++---+--++----+-+-", "+++--++-+---+-+--+--", "+---++-+-+-----+++-+"),
    172: ("+---++--++++-+-+++-++-", "++-++++++----+-+--++-+", "+++-+-++--+-+-++++-+--", "++---++++-+--+--++----"),
}
ONCE = 32  # a Sylvester factor of so many is one product with a matrix


def prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def _paley(order: int, first: bool) -> Tensor:
    """Paley's constructions: of order q + 1 for q ≡ 3, of order 2(q + 1) for q ≡ 1 (mod 4)."""
    q = order - 1 if first else order // 2 - 1
    squares = {x * x % q for x in range(1, q)}
    i = torch.arange(q)
    character = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)])[(i - i[:, None]) % q]
    if first:
        H = torch.ones(order, order, dtype=torch.long)
        H[0, 1:], H[1:, 1:] = -1, torch.eye(q, dtype=torch.long) - character
        return H
    C = torch.ones(q + 1, q + 1, dtype=torch.long)
    C[0, 0], C[1:, 1:] = 0, character
    eye = torch.eye(q + 1, dtype=torch.long)
    return torch.cat([torch.cat([C + eye, C - eye], 1), torch.cat([C - eye, -C - eye], 1)])


def _williamson(halves: tuple[str, ...]) -> Tensor:
    i = torch.arange(2 * len(halves[0]) - 1)
    A, B, C, D = (torch.tensor([1 if c == "+" else -1 for c in half + half[:0:-1]])[(i - i[:, None]) % len(i)] for half in halves)
    return torch.cat([torch.cat(row, 1) for row in ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))])


def _sylvester(order: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.long)
    while len(H) < order:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


def constructs(order: int) -> bool:
    """Whether a matrix of this order, a multiple of 4 that is no power of 2, is built here."""
    return order in WILLIAMSON or order == 40 or order % 4 == 0 and (prime(order - 1) or order % 8 == 4 and prime(order // 2 - 1) and order // 2 % 4 == 2)


@functools.cache
def matrix(order: int) -> Tensor:
    """The ±1 matrix of such an order, int64: Williamson's, twice Paley's of 20, or Paley's."""
    if order in WILLIAMSON:
        return _williamson(WILLIAMSON[order])
    if order == 40:
        return torch.kron(_sylvester(2), matrix(20))
    return _paley(order, prime(order - 1))


@functools.cache
def split(n: int) -> tuple[int, int] | None:
    """(K, m) with n = K·2^m for the order K whose matrix is taken, 1 for a power of 2; None where there is none."""
    odd = n // (n & -n)
    if odd == 1:
        return 1, n.bit_length() - 1
    orders = (*FIRST, *(odd * 2**e for e in range(2, (n & -n).bit_length())))
    return next(((K, (n // K).bit_length() - 1) for K in orders if n % K == 0 and (n // K) & (n // K - 1) == 0 and constructs(K)), None)


def length(n: int) -> int:
    """The smallest length from n on that has a transform."""
    return next(each for each in range(n, 2 * n + 1) if split(each))


def transform(x: Tensor, transpose: bool = False) -> Tensor:
    """x (…, n) times H (n, n), or Hᵀ: H = K ⊗ Sylvester for n = K·2^m, H Hᵀ = n·I. In small products, H is never formed.

    Raises `ValueError` for an n without a transform (see `length`).
    """
    n = x.shape[-1]
    if split(n) is None:
        raise ValueError(f"there is no Hadamard matrix of order {n} here")
    K, m = split(n)
    y, inner = x.reshape(-1, n), 1
    while inner < 2**m:
        size = min(ONCE, 2**m // inner)
        S = _sylvester(size).to(x)
        y = y.reshape(-1, size, inner)
        y = S @ y if inner > 1 else y[..., 0] @ S
        inner *= size
    if K > 1:
        H = matrix(K).to(x)
        y = (H.T if transpose else H) @ y.view(-1, K, inner)
    return y.reshape(x.shape)
