"""Methods that train a part of a packed weight: the integers stay, and what comes out is packed as before."""

import torch
from torch import Tensor, nn

from ..engine.adapter import WeightAdapter
from ..engine.fused.quantised import passed
from ..engine.sites import Site
from ..errors import TunesmithError
from ..quantize import Format, PackedWeight


class PartLayer(WeightAdapter):
    """W read with another `part` (groups, …), trained in float32 and rounded to what is stored.

    On a base that is packed in this family of formats its codes serve; a plain weight is packed here, in `format`, anew whenever
    the layer is built.
    """

    replaces = True

    def __init__(self, part: str, format: Format, site: Site):
        super().__init__()
        self.part = part
        W = site.parameter
        if isinstance(W, PackedWeight) and W.format.family != format.family:
            raise TunesmithError(f"{site.path!r} is in {W.format.format}, which has no {part} to train; quantise the base to {format.format}, or leave it as it is")
        self.register_buffer("own", None if isinstance(W, PackedWeight) else PackedWeight.of(site.matrix(site.values)[0], format), persistent=False)
        packed = W if self.own is None else self.own
        self.stored = packed.parts[part].dtype
        self.values = self.start(packed.format.stats(packed.parts)[part])

    def start(self, part: Tensor) -> nn.Parameter:
        """What trains, from the part as it is."""
        return nn.Parameter(part.detach().clone())

    def trained(self, part: Tensor) -> Tensor:
        """The part as it is now, from what it was."""
        return self.values

    def read(self, W: Tensor) -> tuple[PackedWeight, Tensor]:
        """The packed weight and the part it is read with; the gradient passes the part's rounding."""
        packed = W if self.own is None else self.own
        exact = self.trained(packed.format.stats(packed.parts)[self.part])
        return packed, passed(exact.to(self.stored).to(exact.dtype), exact)

    def merged(self, W, b):
        packed, part = self.read(W)
        return packed.format.decode(packed.parts | {self.part: part}, packed.shape), b

    def fold(self, site, values):
        W, b = site.matrix(values)
        if torch.is_grad_enabled() or site.transposed:
            return site.raw(*self.merged(W, b))
        packed, part = self.read(W)
        return values | {site.weight: packed.with_parts(**{self.part: part.to(self.stored)}).to(W.dtype)}
