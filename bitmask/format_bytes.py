"""What a matrix takes in each sparse format, from counts alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bitmask.bitmask_tensor import BitmaskTensor
from bitmask.reference import unpack_bits

DENSE, COO, CSR, CSC, BSR, TWO_FOUR, BITMASK = FORMATS = ("dense", "COO", "CSR", "CSC", "BSR", "2:4", "bitmask")

INDEX_NBYTES = 8  # int64, as torch makes them
SHORT_INDEX_NBYTES = 4  # int32, which torch takes for CSR, CSC and BSR
_OFFSET_NBYTES = 8  # of each row of a bitmask
_UNPACKED_ELEMENTS = 2**24  # that are looked at together


@dataclass(frozen=True)
class Census:
    """What the bytes of a matrix [rows, cols] in every format follow from.

    `nnz` elements are not zero, `blocks` blocks of `block_shape` hold such, and of the groups of four columns `crowded`
    ones have more than two of them.
    """

    rows: int
    cols: int
    itemsize: int
    nnz: int
    block_shape: tuple[int, int]
    blocks: int
    crowded: int

    @classmethod
    def of(cls, matrix: Tensor, block_shape: tuple[int, int]) -> Census:
        """Count; zeros are those of the bitmask, from which all is counted."""
        packed = BitmaskTensor.from_dense(matrix)
        rows, cols = matrix.shape
        blocks = _occupied_blocks(packed.bitmasks, cols, block_shape)
        return cls(rows, cols, matrix.itemsize, packed.nnz, block_shape, blocks, _crowded_groups(packed.bitmasks))

    @classmethod
    def imagined(cls, shape: tuple[int, int], itemsize: int, block_shape: tuple[int, int], density: float) -> Census:
        """Of a matrix with such a share of non-zeros, of blocks that are not all zeros, and two in every four."""
        rows, cols = shape
        lines, columns = _grid(shape, block_shape)
        return cls(rows, cols, itemsize, round(density * rows * cols), block_shape, round(density * lines * columns), 0)

    @property
    def sparsity(self) -> float:
        """Share of zeros (0 for a matrix without elements)."""
        elements = self.rows * self.cols
        return 1 - self.nnz / elements if elements else 0.0

    @property
    def blocks_divide(self) -> bool:
        """Whether the blocks end where the matrix ends, which torch asks of BSR."""
        return self.rows % self.block_shape[0] == 0 and self.cols % self.block_shape[1] == 0

    def nbytes(self, index: int = INDEX_NBYTES) -> dict[str, int]:
        """The bytes of each format with indices of so many; of 2:4 as if the matrix fitted; COO's indices are int64."""
        elements, mask_nbytes = self.rows * self.cols, self.rows * -(-self.cols // 8)
        height, width = self.block_shape
        block_rows = _grid((self.rows, self.cols), self.block_shape)[0]
        entries = self.nnz * (self.itemsize + index)
        return {
            DENSE: elements * self.itemsize,
            COO: self.nnz * (self.itemsize + 2 * INDEX_NBYTES),
            CSR: entries + (self.rows + 1) * index,
            CSC: entries + (self.cols + 1) * index,
            BSR: self.blocks * (height * width * self.itemsize + index) + (block_rows + 1) * index,
            TWO_FOUR: elements // 2 * self.itemsize + mask_nbytes,
            BITMASK: self.nnz * self.itemsize + mask_nbytes + self.rows * _OFFSET_NBYTES,
        }

    def short_nbytes(self) -> dict[str, int]:
        """The bytes with int32 indices, of the formats that take them, where they suffice."""
        if not short_indices_suffice(self.nnz, self.rows, self.cols):
            return {}
        nbytes = self.nbytes(SHORT_INDEX_NBYTES)
        return {name: nbytes[name] for name in (CSR, CSC, BSR)}


def short_indices_suffice(nnz: int, rows: int, cols: int) -> bool:
    """Whether int32 holds every index of a matrix and every offset into its elements."""
    return max(nnz, rows, cols) < 2**31


def _grid(shape: tuple[int, int], block_shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks; those at the edges may reach past the matrix."""
    return -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])


def _crowded_groups(bitmasks: Tensor) -> int:
    """Groups of four bits of which more than two are set."""
    crowded = [sum((byte >> shift & 15).bit_count() > 2 for shift in (0, 4)) for byte in range(256)]
    return int(torch.bincount(bitmasks.flatten().cpu(), minlength=256) @ torch.tensor(crowded, device="cpu"))


def _occupied_blocks(bitmasks: Tensor, cols: int, block_shape: tuple[int, int]) -> int:
    """Blocks in which a bit is set, looked at some rows of blocks at a time."""
    height, width = (max(1, min(pair)) for pair in zip(block_shape, (len(bitmasks), cols), strict=True))
    occupied = 0
    for part in torch.split(bitmasks, height * max(1, _UNPACKED_ELEMENTS // (height * max(cols, 1)))):
        mask = F.pad(unpack_bits(part, cols), (0, -cols % width, 0, -len(part) % height))
        blocks = mask.view(len(mask) // height, height, mask.shape[1] // width, width)
        occupied += int(blocks.any(3).any(1).sum())
    return occupied
