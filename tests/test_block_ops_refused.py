"""What the block-sparse ops refuse: wrong arguments and indices that contradict themselves."""

import itertools

import pytest
import torch
from block_weights import Blocks, check, operands, random_blocks
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bitmask import FormatError, ops_block
from bitmask.ops_block import bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values, bsr_transpose

native = torch.ops.bitmask


def arguments():
    """Of each function, right ones by their names: four rows of three blocks, each column filled but the second."""
    col_indices = torch.tensor([0, 2, 0, 2, 2])
    blocks = Blocks(torch.ones(5, 16, 24), torch.tensor([0, 2, 2, 4, 5]), col_indices, (60, 70))
    index = {"crow_indices": blocks.crow_indices, "col_indices": blocks.col_indices}
    x, grad, bias = operands(blocks, 2)
    return {
        bsr_linear: {
            "x": x,
            "values": blocks.values,
            **index,
            "out_features": 60,
            "bias": bias,
            "transposed": blocks.transposed,
        },
        bsr_linear_backward_input: {
            "grad": grad,
            "values": blocks.values,
            "transposed": blocks.transposed,
            "in_features": 70,
        },
        bsr_linear_backward_values: {"grad": grad, "x": x, **index, "block_shape": (16, 24)},
        bsr_transpose: {**index, "cols_of_blocks": 3},
    }


def with_entry(name, index, entry):
    """A change of one entry of a part of an index, also of a transposed one."""

    def change(args):
        part = getattr(args["transposed"], name, None) if name not in args else args[name]
        part = part.clone()
        part[index] = entry
        if name in args:
            return args | {name: part}
        return args | {"transposed": args["transposed"]._replace(**{name: part})}

    return change


def with_argument(**changed):
    return lambda args: args | changed


def test_right_arguments_are_accepted():
    for function, args in arguments().items():
        function(**args)


BY_ROW = (bsr_linear, bsr_linear_backward_values, bsr_transpose)
BAD_ROWS = [
    (with_entry("crow_indices", 0, 1), r"crow_indices\[0\]: got 1, expected 0"),
    (with_entry("crow_indices", 0, -1), r"crow_indices\[0\]: got -1, expected 0"),
    (with_entry("crow_indices", 1, 6), r"crow_indices\[1\]: got 6, expected 0 to 5 \(the number of blocks\)"),
    (with_entry("crow_indices", 2, 1), r"crow_indices\[2\]: got 1, expected 2 to 5"),
    (with_entry("crow_indices", 2, -(2**63)), r"crow_indices\[2\]: got -9223372036854775808, expected 2 to 5"),
    (with_entry("crow_indices", 4, 4), r"crow_indices\[4\]: got 4, expected 5 \(the number of blocks\)"),
    (with_entry("crow_indices", 4, 2**63 - 1), r"crow_indices\[4\]: got 9223372036854775807, expected 4 to 5"),
    (with_entry("col_indices", 1, 3), r"col_indices\[1\]: got 3, expected at least 0 and less than 3"),
    (with_entry("col_indices", 4, -1), r"col_indices\[4\]: got -1, expected at least 0 and less than 3"),
    (
        with_entry("col_indices", 3, 0),
        r"col_indices\[3\]: got 0, expected more than 0, which comes before it in line 2",
    ),
    (with_entry("col_indices", 0, 2), r"col_indices\[1\]: got 2, expected more than 2"),
]
BY_COLUMN = [
    (with_entry("ccol_indices", 1, 6), r"ccol_indices\[1\]: got 6, expected 0 to 5"),
    (with_entry("ccol_indices", 3, 4), r"ccol_indices\[3\]: got 4, expected 5 \(the number of blocks\)"),
    (with_entry("row_indices", 1, 4), r"row_indices\[1\]: got 4, expected at least 0 and less than 4"),
    (with_entry("row_indices", 1, 0), r"row_indices\[1\]: got 0, expected more than 0"),
    (with_entry("order", 0, 5), r"order\[0\]: got 5, expected at least 0 and less than 5"),
    (with_entry("order", 0, -1), r"order\[0\]: got -1, expected at least 0 and less than 5"),
    (with_entry("order", 1, 0), r"order\[1\]: got 0, which is order\[0\] already, expected each block once"),
]


BAD_CONTENTS = [(function, change, message) for change, message in BAD_ROWS for function in BY_ROW]
BAD_CONTENTS += [(bsr_linear_backward_input, change, message) for change, message in BY_COLUMN]


@pytest.mark.parametrize(("function", "change", "message"), BAD_CONTENTS)
def test_contents_that_contradict_themselves(function, change, message):
    with pytest.raises(FormatError, match=message):
        function(**change(arguments()[function]))


def test_order_that_is_not_that_of_the_values():
    args = arguments()[bsr_linear_backward_input]
    transposed = args["transposed"]._replace(order=args["transposed"].order.flip(0))
    with pytest.raises(
        FormatError, match=r"order\[.\]: got ., expected less than order\[.\] = .: blocks lie row by row"
    ):
        bsr_linear_backward_input(**args | {"transposed": transposed})


@pytest.mark.parametrize("name", ["ccol_indices", "row_indices", "order"])
def test_transposed_index_of_another_weight(name):
    """Each wrong entry is noticed in the forward pass."""
    args = arguments()[bsr_linear]
    for index, entry in enumerate(getattr(args["transposed"], name).tolist()):
        for wrong in {entry - 1, entry + 1, 0, -(2**63)} - {entry}:
            message = rf"{name}\[{index}\]: got {wrong}, expected {entry} as by crow_indices and col_indices"
            with pytest.raises(FormatError, match=message):
                bsr_linear(**with_entry(name, index, wrong)(args))


LINEAR, TO_X, TO_VALUES = bsr_linear, bsr_linear_backward_input, bsr_linear_backward_values
WIDE, COLUMNS, ROWS = torch.ones(2, 3, 4, 5), torch.zeros(4).long(), torch.zeros(4).long()
BAD_ARGUMENTS = [
    (LINEAR, with_argument(x=torch.ones(2, 73)), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(x=torch.ones(())), ValueError, r"x: got size \[\], expected \[..., in_features\]"),
    (
        LINEAR,
        with_argument(x=torch.ones(2, 70).double()),
        TypeError,
        "x: got dtype torch.float64, expected torch.float32",
    ),
    (LINEAR, with_argument(x=[1.0] * 70), TypeError, "x: got list, expected a torch.Tensor"),
    (LINEAR, with_argument(x=torch.ones(2, 70).to_sparse()), TypeError, "x: got a torch.sparse_coo tensor"),
    (LINEAR, with_argument(x=torch.ones(2, 70, device="meta")), ValueError, "x: got device meta, expected cpu"),
    (LINEAR, with_argument(values=WIDE), FormatError, r"values: got size \[2, 3, 4, 5\], expected \[blocks"),
    (LINEAR, with_argument(values=torch.ones(5, 0, 24)), FormatError, r"values: got size \[5, 0, 24\], expected"),
    (LINEAR, with_argument(values=torch.ones(4, 16, 24)), FormatError, r"col_indices: got size \[5\], expected \[4\]"),
    (LINEAR, with_argument(values=torch.ones(5, 12, 24)), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (LINEAR, with_argument(values=torch.ones(5, 16, 23)), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (
        LINEAR,
        with_argument(values=torch.ones(5, 16, 24).int()),
        TypeError,
        "values: got dtype torch.int32, expected float32",
    ),
    (
        LINEAR,
        with_argument(crow_indices=ROWS.int()),
        TypeError,
        "crow_indices: got dtype torch.int32, expected torch.int64",
    ),
    (LINEAR, with_argument(crow_indices=ROWS), FormatError, r"crow_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(crow_indices=ROWS[:0]), FormatError, r"crow_indices: got size \[0\], expected \[5\]"),
    (LINEAR, with_argument(crow_indices=torch.zeros(5, 1).long()), FormatError, r"crow_indices: got size \[5, 1\]"),
    (LINEAR, with_argument(col_indices=COLUMNS.float()), TypeError, "col_indices: got dtype torch.float32"),
    (LINEAR, with_argument(col_indices=COLUMNS), FormatError, r"col_indices: got size \[4\], expected \[5\]"),
    (LINEAR, with_argument(col_indices=None), TypeError, "col_indices: got NoneType, expected a torch.Tensor"),
    (LINEAR, with_argument(out_features=65), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (LINEAR, with_argument(out_features=61), ValueError, r"bias: got size \[60\], expected \[61\]"),
    (LINEAR, with_argument(out_features=-1), ValueError, "out_features: got -1, expected 0 or more"),
    (
        LINEAR,
        with_argument(out_features=2**63 - 2),
        FormatError,
        r"crow_indices: got size \[5\], expected \[57646075230",
    ),
    (LINEAR, with_argument(out_features=2**63 - 1), ValueError, "out_features: got 9223372036854775807, expected 0 or"),
    (LINEAR, with_argument(out_features=2**64), ValueError, "out_features: got 18446744073709551616, expected 0 or"),
    (LINEAR, with_argument(out_features=60.0), TypeError, "out_features: got 60.0, expected an integer"),
    (LINEAR, with_argument(bias=torch.ones(1)), ValueError, r"bias: got size \[1\], expected \[60\] \(out_features\)"),
    (
        LINEAR,
        with_argument(bias=torch.ones(60).half()),
        TypeError,
        "bias: got dtype torch.float16, expected torch.float32",
    ),
    (LINEAR, with_argument(transposed=3), TypeError, "transposed: got int, expected the TransposedIndex"),
    (LINEAR, with_argument(transposed=(ROWS, ROWS)), TypeError, "transposed: got tuple, expected the TransposedIndex"),
    (LINEAR, with_argument(transposed=(ROWS, None, None)), ValueError, "got ccol_indices alone, expected all or none"),
    (LINEAR, with_argument(transposed=(ROWS.int(),) * 3), TypeError, "ccol_indices: got dtype torch.int32"),
    (LINEAR, with_argument(transposed=(ROWS,) * 3), FormatError, r"row_indices: got size \[4\], expected \[5\]"),
    (TO_X, with_argument(grad=torch.ones(2, 48)), FormatError, r"row_indices\[.\]: got 3, expected .* less than 3"),
    (TO_X, with_argument(grad=torch.ones(())), ValueError, r"grad: got size \[\], expected \[..., out_features\]"),
    (
        TO_X,
        with_argument(grad=torch.ones(2, 60).half()),
        TypeError,
        "grad: got dtype torch.float16, expected torch.float32",
    ),
    (TO_X, with_argument(values=torch.ones(4, 16, 24)), FormatError, r"row_indices: got size \[5\], expected \[4\]"),
    (TO_X, with_argument(transposed=None), TypeError, "ccol_indices: got NoneType, expected a torch.Tensor"),
    (TO_X, with_argument(in_features=73), FormatError, r"ccol_indices: got size \[4\], expected \[5\]"),
    (TO_X, with_argument(in_features=-1), ValueError, "in_features: got -1, expected 0 or more"),
    (TO_X, with_argument(in_features=2**63 - 2), FormatError, r"ccol_indices: got size \[4\], expected \[3843071682"),
    (TO_X, with_argument(in_features="70"), TypeError, "in_features: got '70', expected an integer"),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(3, 60)),
        ValueError,
        r"x: got size \[2, 70\], expected \[3, 'in_features'\]",
    ),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(2, 60).bfloat16()),
        TypeError,
        "x: got dtype torch.float32, expected torch.bf",
    ),
    (
        TO_VALUES,
        with_argument(grad=torch.ones(2, 60).int()),
        TypeError,
        "grad: got dtype torch.int32, expected float32",
    ),
    (TO_VALUES, with_argument(grad=torch.ones(())), ValueError, r"grad: got size \[\]"),
    (TO_VALUES, with_argument(grad=torch.ones(2, 65)), FormatError, r"crow_indices: got size \[5\], expected \[6\]"),
    (TO_VALUES, with_argument(x=torch.ones(())), ValueError, r"x: got size \[\]"),
    (
        TO_VALUES,
        with_argument(x=torch.ones(2, 48)),
        FormatError,
        r"col_indices\[1\]: got 2, expected at least 0 and less than 2",
    ),
    (TO_VALUES, with_argument(block_shape=(16,)), TypeError, r"block_shape: got \(16,\), expected two integers"),
    (TO_VALUES, with_argument(block_shape=16), TypeError, "block_shape: got 16, expected two integers"),
    (TO_VALUES, with_argument(block_shape=(16, 2.5)), TypeError, "block_shape: got 2.5, expected an integer"),
    (TO_VALUES, with_argument(block_shape=(0, 24)), ValueError, r"block_shape: got \[0, 24\], expected .* at least 1"),
    (TO_VALUES, with_argument(block_shape=(16, -24)), ValueError, "block_shape: got -24, expected 0 or more"),
    (
        TO_VALUES,
        with_argument(block_shape=(16, 2**40)),
        FormatError,
        r"block_shape: got \[16, 1099511627776\], expected",
    ),
    (TO_VALUES, with_argument(col_indices=ROWS.reshape(2, 2)), FormatError, r"col_indices: got size \[2, 2\]"),
    (bsr_transpose, with_argument(cols_of_blocks=2), FormatError, r"col_indices\[1\]: got 2, expected .* less than 2"),
    (bsr_transpose, with_argument(cols_of_blocks=-1), ValueError, "cols_of_blocks: got -1, expected 0 or more"),
    (bsr_transpose, with_argument(cols_of_blocks=2**62), RuntimeError, "cannot allocate a tensor of size"),
    (bsr_transpose, with_argument(cols_of_blocks=None), TypeError, "cols_of_blocks: got None, expected an integer"),
    (bsr_transpose, with_argument(crow_indices=ROWS[:0]), FormatError, r"crow_indices: got size \[0\], expected"),
    (bsr_transpose, with_argument(crow_indices=ROWS.reshape(2, 2)), FormatError, r"crow_indices: got size \[2, 2\]"),
    (
        bsr_transpose,
        with_argument(col_indices=ROWS[0]),
        FormatError,
        r"col_indices: got size \[\], expected \[blocks\]",
    ),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(function, change, error, message):
    args = change(arguments()[function])
    with pytest.raises(error, match=message):
        function(**args)


def test_kernels_are_for_cpus_and_nvidia_gpus():
    for function, args in arguments().items():
        with FakeTensorMode():
            results = function(**{name: move(arg, "cuda") for name, arg in args.items()})
            assert all(part.is_cuda for part in (results if isinstance(results, tuple) else [results]))
            there = {name: move(arg, "xpu") for name, arg in args.items()}
            with pytest.raises(
                NotImplementedError, match="got device xpu:0, expected cpu or cuda: bitmask has no block-sparse kernels"
            ):
                function(**there)


def move(arg, device):
    """A stand-in for it on a GPU."""
    if isinstance(arg, ops_block.TransposedIndex):
        return ops_block.TransposedIndex(*(move(part, device) for part in arg))
    return torch.empty(arg.shape, dtype=arg.dtype, device=device) if isinstance(arg, Tensor) else arg


def test_native_ops_by_themselves_refuse_the_same():
    """Whoever goes past the functions of this package gets an exception as well, whatever its kind."""
    for function, change, *_ in [*BAD_ARGUMENTS, *BAD_CONTENTS]:
        args = change(arguments()[function])
        transposed = args.pop("transposed", None)
        if isinstance(transposed, tuple) and len(transposed) == 3:
            args |= dict(zip(("ccol_indices", "row_indices", "order"), transposed, strict=True))
        elif transposed is not None:
            continue
        with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
            getattr(native, function.__name__)(**args)


def test_storage_that_was_shrunk():
    args = arguments()[bsr_linear]
    for name in ("values", "crow_indices", "col_indices", "x", "bias"):
        tensor = args[name].clone()
        tensor.untyped_storage().resize_(tensor.nbytes - 8)
        with pytest.raises(FormatError, match=rf"{name}: got a storage of"):
            bsr_linear(**args | {name: tensor})


def test_sizes_at_which_nothing_may_be_allocated():
    """No rows of x, so no memory behind a huge weight; its index has none of it either."""
    none = torch.zeros(0, dtype=torch.int64)
    huge, values = 1 << 60, torch.ones(0, 1 << 28, 1)
    starts = torch.zeros(1, dtype=torch.int64).expand((1 << 32) + 1)
    with pytest.raises(RuntimeError, match=r"cannot copy crow_indices of size"):
        bsr_linear(torch.ones(0, 3), values[:, :1], starts.expand((1 << 32) + 1), none, 1 << 32)
    assert bsr_linear(torch.empty(0, huge), torch.ones(0, 4, 1), torch.zeros(3).long(), none, 8).shape == (0, 8)
    transposed = ops_block.TransposedIndex(torch.zeros(3).long(), none, none)
    assert bsr_linear_backward_input(torch.empty(0, huge), torch.ones(0, 1, 4), transposed, 8).shape == (0, 8)
    index = (torch.tensor([0, 1, 1]), torch.tensor([7]))
    gradient = bsr_linear_backward_values(torch.empty(0, 8), torch.empty(0, huge), *index, (4, 2))
    assert torch.equal(gradient, torch.zeros(1, 4, 2))


# Random indices.


def index_is_valid(crow_indices, col_indices, lines, across):
    """The rules of the index, spelled out anew in plain Python."""
    starts, columns = crow_indices.tolist(), col_indices.tolist()
    if len(starts) != lines + 1 or starts[0] != 0 or starts[-1] != len(columns) or starts != sorted(starts):
        return False
    rows = [columns[begin:end] for begin, end in itertools.pairwise(starts)]
    return all(row == sorted(set(row)) and all(0 <= column < across for column in row) for row in rows)


def mutate(blocks, randint):
    """One small random change to the index or the sizes of the weight; some leave them valid."""
    crow_indices, col_indices, (n, k) = *(part.clone() for part in blocks.index), blocks.shape
    part = (crow_indices, col_indices)[randint(2)]
    kind, place = randint(6), randint(len(part))
    if kind == 0:
        part[place] += randint(5) - 2
    elif kind == 1:
        part[place] = part[randint(len(part))]
    elif kind == 2:
        part.view(torch.uint8)[place * 8 + randint(8)] ^= 1 << randint(8)
    elif kind == 3:
        other = randint(len(part))
        part[place], part[other] = part[other].clone(), part[place].clone()
    elif kind == 4:
        n, k = n + randint(9) - 4, k + randint(9) - 4
    elif part is col_indices:
        col_indices = torch.cat([part[:place], part[place + 1 :]])
    else:
        crow_indices = torch.cat([part[:place], part[place : place + 1], part[place:]])
    return Blocks(blocks.values, crow_indices, col_indices, (n, k))


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("block_shape", [(3, 4), (16, 16)], ids=str)
def test_changed_indices_are_refused_or_multiply_as_the_reference_does(isa, block_shape, m):
    generator = torch.Generator().manual_seed(m)
    whole = random_blocks(5 * block_shape[0], 4 * block_shape[1], block_shape).with_padding(0.0)
    refused, tries = 0, 300
    for _ in range(tries):
        blocks = mutate(whole, lambda limit: int(torch.randint(limit, (), generator=generator)))
        n, k = blocks.shape
        lines, across = -(-n // block_shape[0]), -(-k // block_shape[1])
        x, grad, _ = operands(blocks, m)
        valid = index_is_valid(*blocks.index, lines, across) and len(blocks.col_indices) == len(blocks.values)
        if valid:
            check(blocks, x, grad)
            continue
        refused += 1
        with pytest.raises(FormatError):
            bsr_linear(x, blocks.values, *blocks.index, n)
        if len(blocks.col_indices) == len(blocks.values):
            with pytest.raises(FormatError):
                bsr_linear_backward_values(grad, x, *blocks.index, block_shape)
            # The transposed weight, with the same mistake.
            transposed = ops_block.TransposedIndex(*blocks.index, torch.arange(len(blocks.values)))
            with pytest.raises(FormatError):
                bsr_linear_backward_input(x, blocks.values.transpose(1, 2), transposed, n)
    assert 0 < refused < tries
