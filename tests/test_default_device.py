"""Under a default device of torch's, here one without data, results are where that is which they are made of."""

import pytest
import torch
from conftest import assert_bits_equal, random_numbers
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

import bitmask
from bitmask import BitmaskTensor, BlockSparseLinear, SemiStructuredTensor
from bitmask.files import compress_checkpoint, decompress_checkpoint, list_checkpoint, verify_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")

MATRIX = bitmask.prune_24_(random_numbers(64, 64))
BITMASK = BitmaskTensor.from_dense(MATRIX)
BATCH = BitmaskTensor.from_dense(torch.eye(8).expand(2, 8, 8))
PAIRS = torch.tensor([[1.0, 0.0, 0.0, 2.0]]).repeat(32, 16)
HALVES = SemiStructuredTensor.from_dense(PAIRS.half())
HYBRID = torch.eye(4).repeat_interleave(3, 1).reshape(4, 4, 3).to_sparse_csr(dense_dim=1)
BLOCKS = BlockSparseLinear(64, 64, density=0.5)


def compressed_model():
    model = nn.Sequential(nn.Linear(64, 64, bias=False, device="cpu"))
    model[0].weight.data.copy_(MATRIX)
    return str(bitmask.compression_report(bitmask.compress_(model, progress=False))), model[0].weight


def crossovers():
    found = bitmask.format_crossovers((32, 32), time=True, rows=[1], sparsities=[0.5])
    return str(found.smaller_than_dense), sorted(found.speedups[1])


CALLS = {
    "from_dense": lambda: BitmaskTensor.from_dense(MATRIX),
    "pack": lambda: SemiStructuredTensor.from_dense(MATRIX),
    "to_bitmask": lambda: HALVES.to_bitmask(),
    "from_bitmask": lambda: SemiStructuredTensor.from_bitmask(HALVES.to_bitmask()),
    "rows": lambda: BITMASK[2:4],
    "linear": lambda: nn.functional.linear(MATRIX, BITMASK),
    "to_coo": lambda: BITMASK.to_coo(),
    "to_csr": lambda: BITMASK.to_csr(),
    "to_csr of a batch": lambda: BATCH.to_csr(),
    "to_csc": lambda: BITMASK.to_csc(),
    "to_bsr": lambda: BITMASK.to_bsr((2, 2)),
    "to_bsr of a layer": lambda: BLOCKS.to_bsr(),
    "from_sparse": lambda: BitmaskTensor.from_sparse(MATRIX.to_sparse()),
    "from_sparse with dense dimensions": lambda: BitmaskTensor.from_sparse(HYBRID),
    "to_torch": lambda: (HALVES.to_torch().packed, HALVES.to_torch().meta),
    "to_torch of pairs": lambda: SemiStructuredTensor.from_dense(PAIRS).to_torch().meta,
    "from_torch": lambda: SemiStructuredTensor.from_torch(HALVES.to_torch()),
    "from_torch to a bitmask": lambda: BitmaskTensor.from_sparse(HALVES.to_torch()),
    "compress_": compressed_model,
    "compare_formats": lambda: str(bitmask.compare_formats(MATRIX)),
    "compare_formats by time": lambda: [sorted(row.product_ms) for row in bitmask.compare_formats(MATRIX, time=True)],
    "format_crossovers": crossovers,
}


def rewritten(path, write, *args, **options):
    write(path, path.with_name("again"), *args, **options)
    with torch.device("cpu"):
        return load_file(path.with_name("again"))


def resave(path, target, compression_format):
    bitmask.save_compressed({"a.weight": MATRIX, "b.weight": MATRIX}, target, compression_format)


PRUNED = {"prune": 0.6, "prune_24": True}
CALLS_OF_FILES = {
    "save_compressed": lambda path: rewritten(path, resave, "sparse-bitmask"),
    "save_compressed 2:4": lambda path: rewritten(path, resave, "sparse-24-bitmask"),
    "load_compressed": lambda path: list(bitmask.load_compressed(path)),
    "load_rows": lambda path: bitmask.load_rows(path, "a.weight", 1, 3),
    "compress_checkpoint": lambda path: rewritten(path, compress_checkpoint, "sparse-24-bitmask", **PRUNED),
    "decompress_checkpoint": lambda path: rewritten(path, decompress_checkpoint),
    "list_checkpoint": lambda path: [each.sparsity for each in list_checkpoint(path)],
    "verify_checkpoint": lambda path: verify_checkpoint(path, path),
}


def assert_same_elsewhere(call, *args):
    expected = call(*args)
    with torch.device("meta"):
        found = call(*args)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.layout is other.layout
            assert_bits_equal(one.to_dense(), other.to_dense())
        else:
            assert one == other


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_is_given_stays(call):
    assert_same_elsewhere(call)


@pytest.mark.parametrize("stored_as", ["dense", "sparse-bitmask", "sparse-24-bitmask"])
@pytest.mark.parametrize("call", CALLS_OF_FILES.values(), ids=CALLS_OF_FILES.keys())
def test_what_is_read_and_written_stays(tmp_path, call, stored_as):
    bitmask.save_compressed({"a.weight": MATRIX}, tmp_path / "model.safetensors", stored_as)
    assert_same_elsewhere(call, tmp_path / "model.safetensors")
