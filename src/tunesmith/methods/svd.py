"""Leading singular triplets of large matrices."""

import torch
from torch import Tensor

EXACT = 1024  # up to this size the decomposition is exact, above it randomised


def leading(M: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, r), σ (r,), Vᵀ (r, columns) of the r ≤ `count` largest singular values of M.

    The largest entry of each left vector is positive. Large matrices go through a random projection from a seed of its
    own with four power iterations (Halko et al. 2011, algorithm 4.4), so that the same matrix gives the same result.
    """
    if min(M.shape) <= EXACT:
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        Q = M @ torch.randn(M.shape[1], count + 16, generator=torch.Generator().manual_seed(0)).to(M)
        for _ in range(4):
            Q = M @ torch.linalg.qr(M.T @ torch.linalg.qr(Q)[0])[0]
        Q = torch.linalg.qr(Q)[0]
        U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
        U = Q @ U
    U, S, Vh = U[:, :count], S[:count], Vh[:count]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()[0]
    return U * sign, S, Vh * sign[:, None]
