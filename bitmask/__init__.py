"""Sparse weights that pay: lossless bitmask compression of PyTorch tensors, with native kernels."""

from importlib.metadata import version

import torch  # noqa: F401  # first: the native library needs torch's to be loaded

import bitmask.handlers as _handlers  # noqa: F401  # fills in what BitmaskTensor does by torch op
import bitmask.portable as _portable
from bitmask._C import available_isas, get_isa, set_isa
from bitmask.bitmask_tensor import BitmaskTensor, DecompressWarning
from bitmask.calls import FormatError
from bitmask.files import BitmaskConfig, load_compressed, load_rows, save_compressed, save_compressed_model
from bitmask.linear import BitmaskLinear
from bitmask.models import CompressionReport, compress_, compression_report, decompress_
from bitmask.native import build_info
from bitmask.ops import compress, compress_into, decompress
from bitmask.reference import NaiveBitmaskTensor

_portable.register()  # after the native libraries

__version__ = version("bitmask")

__all__ = [
    "BitmaskConfig",
    "BitmaskLinear",
    "BitmaskTensor",
    "CompressionReport",
    "DecompressWarning",
    "FormatError",
    "NaiveBitmaskTensor",
    "__version__",
    "available_isas",
    "build_info",
    "compress",
    "compress_",
    "compress_into",
    "compression_report",
    "decompress",
    "decompress_",
    "get_isa",
    "load_compressed",
    "load_rows",
    "save_compressed",
    "save_compressed_model",
    "set_isa",
]
