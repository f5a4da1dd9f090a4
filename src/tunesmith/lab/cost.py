"""What techniques of FP4 training cost beside the products themselves, counted."""

from dataclasses import asdict, dataclass

from .fp4 import FP4

VECTOR = 0.01  # rate of vector operations over that of products in FP4
BYTE = 1250  # operations of products in the time that a byte takes: 10 PFLOP/s over 8 TB/s
SHAPE = (4096, 4096, 11008)  # tokens, inputs, outputs: a feed-forward layer of LLaMA-7B


@dataclass(frozen=True)
class Cost:
    """Of one training step of a linear layer: operations, bytes read and written for quantising, random draws, global reductions."""

    flops_gemm: int
    flops_hadamard: int
    ops_vector: int
    bytes: int
    rng_draws: int
    syncs: int

    @property
    def overhead(self) -> float:
        """Time beyond the products', in shares of theirs: each operand is quantised in a pass of its own, bound by memory or by vector operations."""
        return (max(self.ops_vector / VECTOR, self.bytes * BYTE) + self.flops_hadamard) / self.flops_gemm

    def to_dict(self) -> dict:
        return asdict(self) | {"overhead": self.overhead}


def cost(config: FP4 | None, M: int = SHAPE[0], K: int = SHAPE[1], N: int = SHAPE[2]) -> Cost:
    """Of a layer (K inputs, N outputs) on M tokens, forward and both products of the backward.

    An operand's element takes four operations (absmax, scale, round, pack), one more under a tensor scale, which also reads the
    operand once more and waits for all of it; two more where it is rounded at random. A Hadamard matrix of order h is a product
    of 2h operations an element on the matrix unit. Estimators take six (dge) or three operations an element of x and W.
    """
    gemm = 6 * M * K * N
    if config is None:
        return Cost(gemm, 0, 0, 0, 0, 0)
    sizes = {"x": M * K, "W": K * N, "g": M * N}
    products = (("forward", "x", "W"), ("backward", "g", "W"), ("backward", "g", "x"))
    elements = sum(sizes[a] + sizes[b] for _, a, b in products)
    turned = sum(sizes[a] + sizes[b] for where, a, b in products if config.hadamard in (where, "both"))
    drawn = sum(sizes[operand] for _, a, b in products for operand in (a, b) if operand in config.stochastic)
    estimated = {"ste": 0, "dge": 6, "scale": 3, "diagonal": 3}[config.estimator] * (sizes["x"] + sizes["W"])
    written = elements // 2 + elements // config.size  # four bits each, a byte for each block
    return Cost(
        flops_gemm=gemm,
        flops_hadamard=turned * 2 * config.h,
        ops_vector=(4 + config.tensor_scale) * elements + 2 * drawn + estimated,
        bytes=2 * elements * (1 + config.tensor_scale) + written,
        rng_draws=drawn,
        syncs=2 * len(products) * config.tensor_scale,
    )
