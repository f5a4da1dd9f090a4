"""Number formats and models whose weights are stored in them."""

import sys
from types import ModuleType

from .formats import Format
from .model import dequantize, footprint, forget, is_quantized, packed_weights, quantize, restore, save
from .packed import PackedWeight


class _Quantize(ModuleType):
    """This package is also its main function: `tunesmith.quantize(model, "nf4")`."""

    def __call__(self, *args, **kwargs):
        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _Quantize
