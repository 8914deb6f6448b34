"""Sparse weights that pay: lossless bitmask compression of PyTorch tensors, with native kernels."""

from importlib.metadata import version

import torch  # noqa: F401  # first: the native library needs torch's to be loaded

import bitmask.handlers as _handlers  # noqa: F401  # fills in what compressed tensors do by torch op
import bitmask.portable as _portable
from bitmask._C import available_isas, get_isa, set_isa
from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.block_patcher import BlockSparseModelPatcher, prune_blocks
from bitmask.block_patterns import block_norms, largest_blocks
from bitmask.block_semi_structured import SemiStructuredBlockLinear
from bitmask.block_sparse import BlockSparseLinear
from bitmask.calls import FormatError
from bitmask.compare import FormatComparison, compare_formats
from bitmask.compressed_tensor import CompressedTensor, DecompressWarning
from bitmask.crossovers import FormatCrossovers, format_crossovers
from bitmask.files import BitmaskConfig, load_compressed, load_rows, save_compressed, save_compressed_model
from bitmask.linear import BitmaskLinear
from bitmask.models import CompressionReport, compress_, compression_report, decompress_
from bitmask.native import build_info
from bitmask.ops import compress, compress_into, decompress
from bitmask.ops_two_four import pack_24, unpack_24
from bitmask.prune import prune_24_
from bitmask.reference import NaiveBitmaskTensor
from bitmask.semi_structured import SemiStructuredTensor

_portable.register()  # after the native libraries

__version__ = version("bitmask")

__all__ = [
    "BitmaskConfig",
    "BitmaskLinear",
    "BitmaskTensor",
    "BlockSparseLinear",
    "BlockSparseModelPatcher",
    "CompressedTensor",
    "CompressionReport",
    "DecompressWarning",
    "FormatComparison",
    "FormatCrossovers",
    "FormatError",
    "NaiveBitmaskTensor",
    "SemiStructuredBlockLinear",
    "SemiStructuredTensor",
    "__version__",
    "available_isas",
    "block_norms",
    "build_info",
    "compare_formats",
    "compress",
    "compress_",
    "compress_into",
    "compression_report",
    "decompress",
    "decompress_",
    "format_crossovers",
    "get_isa",
    "largest_blocks",
    "load_compressed",
    "load_rows",
    "pack_24",
    "prune_24_",
    "prune_blocks",
    "save_compressed",
    "save_compressed_model",
    "set_isa",
    "unpack_24",
]
