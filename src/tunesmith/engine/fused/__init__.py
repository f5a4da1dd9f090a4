"""Autograd functions that keep as little as the mathematics allows and touch each tensor as few times as it takes.

Every function has the gradient of the plain expression in its docstring. That expression itself runs where it is the
better one: under `torch.compile` and the transforms of `torch.func`, since there the compiler decides what to keep, and
on a GPU that waits for Python (`common.light`).
"""

from .blocks import block_sum_linear, shared_block
from .common import Recipe, forms, traced
from .frozen import frozen_linear
from .loss import linear_cross_entropy
from .lowrank import dora_linear, grouped_change, grouped_lowrank_linear, lowrank_linear, weight_norm
from .remade import merged_linear, remade
from .routed import routed_change, routed_linear
from .sparse import changed, sparse_change, sparse_linear
from .spectral import spectral_linear
