"""k-means of many short rows of numbers at once."""

import torch
from torch import Tensor


def kmeans(rows: Tensor, k: int, weights: Tensor | None = None, iterations: int = 100) -> Tensor:
    """k centres of each row (n, m), ascending, (n, k): Lloyd's algorithm on sorted numbers, where a cluster is an interval.

    `weights` (n, m) or (m,): how much each number counts. It starts from the weighted quantiles of the row, drawn a third
    of the way to an even spread over its range, and ends when nothing moves.
    """
    order = rows.argsort(1)
    x = rows.gather(1, order).double()
    w = torch.ones_like(x) if weights is None else weights.expand_as(rows).gather(1, order).double()
    zero = x.new_zeros(len(x), 1)
    mass, moment = torch.cat([zero, w.cumsum(1)], 1), torch.cat([zero, (w * x).cumsum(1)], 1)
    steps = (torch.arange(k, device=x.device, dtype=x.dtype) + 0.5) / k
    quantiles = x.gather(1, torch.searchsorted(mass, mass[:, -1:] * steps).sub_(1).clamp_(0, x.shape[1] - 1))
    even = x[:, :1] + (x[:, -1:] - x[:, :1]) * steps
    centres = torch.lerp(quantiles, even, 1 / 3)
    for _ in range(iterations):
        edges = torch.searchsorted(x, (centres[:, 1:] + centres[:, :-1]) / 2)
        edges = torch.cat([torch.zeros_like(edges[:, :1]), edges, torch.full_like(edges[:, :1], x.shape[1])], 1)
        inside = mass.gather(1, edges).diff(dim=1)
        new = torch.where(inside > 0, moment.gather(1, edges).diff(dim=1) / inside.clamp(min=1e-300), centres)
        if not x.is_meta and torch.equal(new, centres):
            break
        centres = new
    return centres.to(rows.dtype)
