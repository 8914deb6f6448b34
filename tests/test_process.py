"""Signals, threads and forks; what may hang or crash runs in a process of its own, with a timeout as a guard."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    ISAS,
    assert_bits_equal,
    assert_parts_equal,
    assert_works_after_fork,
    available_memory,
    random_dense,
    run_python,
)

import bitmask
from bitmask import BitmaskTensor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and fork")


# Interrupts.

# With the slowest kernels on one thread each op takes a good part of a second on a fast machine, and the signal comes
# after a tenth; an op that is over before that is called again.
needs_memory = pytest.mark.skipif(available_memory() < 5 << 30, reason="needs 5 GB of free memory")
DENSE = "dense = torch.ones(1 << 30, dtype=torch.uint8)"
WEIGHT = """
rows, cols = {rows}, {cols}
values = torch.ones(rows * cols, dtype=torch.float16)
weight = values, torch.full((rows, cols // 8), 255, dtype=torch.uint8), torch.arange(rows) * cols, cols
x = torch.ones({m}, cols, dtype=torch.float16)
"""
LARGE = {"rows": 1 << 13, "cols": 1 << 15}
PRODUCT = "bitmask.ops.linear(x, *weight)"

BLOCKS = """
from bitmask import ops_block
lines, across = {lines}, {across}
values = torch.ones(lines * across, 64, 64)
index = (torch.arange(lines + 1) * across, torch.arange(across).repeat(lines))
transposed = ops_block.bsr_transpose(*index, across)
x, grad = torch.ones({m}, across * 64), torch.ones({m}, lines * 64)
"""
LARGE_BLOCKS = BLOCKS.format(lines=128, across=512, m=64)

TWO_FOUR = """
from bitmask import ops_two_four
rows, cols = {rows}, {cols}
parts = torch.ones(rows, cols // 2, dtype=torch.float16), torch.full((rows, cols // 8), 0x33, dtype=torch.uint8)
x, grad = torch.ones({m}, cols, dtype=torch.float16), torch.ones({m}, rows, dtype=torch.float16)
"""

# What to prepare for each op, and the op.
LONG_OPS = {
    "compress": (DENSE, "bitmask.compress(dense)"),
    "decompress": (f"{DENSE}\nparts = bitmask.compress(dense)", "bitmask.decompress(*parts, dense.shape)"),
    "from_dense": (DENSE, "bitmask.BitmaskTensor.from_dense(dense)"),
    "linear, few rows of x": (WEIGHT.format(**LARGE, m=4), PRODUCT),
    "linear, more rows of x": (WEIGHT.format(**LARGE, m=64), PRODUCT),
    "linear, many rows of x, small weight": (WEIGHT.format(rows=512, cols=512, m=200_000), PRODUCT),
    "gradient of linear": (
        WEIGHT.format(**LARGE, m=64) + f"x.requires_grad_()\ny = {PRODUCT}",
        "torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)",
    ),
    "block-sparse, few rows of x": (
        LARGE_BLOCKS + "values, x = values.half(), x[:4].half()",
        "ops_block.bsr_linear(x, values, *index, lines * 64)",
    ),
    "block-sparse, more rows of x": (LARGE_BLOCKS, "ops_block.bsr_linear(x, values, *index, lines * 64)"),
    "block-sparse, gradient of x": (
        LARGE_BLOCKS,
        "ops_block.bsr_linear_backward_input(grad, values, transposed, across * 64)",
    ),
    "block-sparse, gradient of values": (
        BLOCKS.format(lines=16, across=16, m=50_000),
        "ops_block.bsr_linear_backward_values(grad, x, *index, (64, 64))",
    ),
}
LONG_OPS |= {
    "2:4, packed": (DENSE + "[None, :]\ndense[:, 1::2] = 0", "bitmask.ops_two_four.pack_24(dense)"),
    "2:4, unpacked": (TWO_FOUR.format(**LARGE, m=1), "ops_two_four.unpack_24(*parts)"),
    "2:4, pruned": (DENSE, "bitmask.ops_two_four.prune_24(dense)"),
    "2:4, pruned in rows and columns": (
        "weight = torch.ones(1 << 13, 1 << 12)",
        "bitmask.ops_two_four.prune_24(weight, transposable=True)",
    ),
    "2:4, few rows of x": (TWO_FOUR.format(**LARGE, m=4), "ops_two_four.linear_24(x, *parts)"),
    "2:4, more rows of x": (TWO_FOUR.format(**LARGE, m=64), "ops_two_four.linear_24(x, *parts)"),
    "2:4, gradient of x": (TWO_FOUR.format(**LARGE, m=64), "ops_two_four.linear_24_backward_input(grad, *parts)"),
}
INTERRUPTS = """
import os, signal, threading, time, torch, bitmask

torch.set_num_threads(1)
{prepare}
# Started in the background, a shell leaves SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
sent = []

def op():
    return {op}

def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

def run():
    for attempt in range(10):
        timer = threading.Timer(0.1, interrupt)
        timer.start()
        op()
        timer.cancel()
    raise SystemExit("never interrupted")

def report(error):
    print(type(error).__name__, error)
    print("within 5 seconds", time.monotonic() - sent[-1] < 5)
    print("midway through the op", "bitmask: interrupted" in str(error.__context__))
    small = torch.tensor([[0, 3, 0, 4]])
    print("works after", torch.equal(bitmask.decompress(*bitmask.compress(small), [1, 4]), small))
"""


def run_interrupted(prepare, op, code):
    """Lines that code prints which runs an op of LONG_OPS and interrupts it, with the slowest kernels."""
    return run_python(INTERRUPTS.format(prepare=prepare, op=op) + code, BITMASK_ISA="scalar").stdout.splitlines()


@needs_memory
@pytest.mark.parametrize(("prepare", "op"), LONG_OPS.values(), ids=LONG_OPS)
def test_ctrl_c_interrupts_a_running_op(prepare, op):
    code = """
try:
    run()
except KeyboardInterrupt as error:
    report(error)
"""
    assert run_interrupted(prepare, op, code) == [
        "KeyboardInterrupt ",
        "within 5 seconds True",
        "midway through the op True",
        "works after True",
    ]


@needs_memory
def test_a_handler_of_ones_own_decides_what_is_raised():
    code = """
class Stop(Exception):
    pass

def handler(number, frame):
    raise Stop("asked to stop")

signal.signal(signal.SIGINT, handler)
try:
    run()
except Stop as error:
    report(error)
"""
    assert run_interrupted(*LONG_OPS["compress"], code) == [
        "Stop asked to stop",
        "within 5 seconds True",
        "midway through the op True",
        "works after True",
    ]


@needs_memory
def test_a_handler_that_raises_nothing_lets_the_op_finish():
    code = """
calls = []
signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
threading.Timer(0.1, interrupt).start()
values, bitmasks, row_offsets = op()
while not calls:
    time.sleep(0.01)
print(values.numel() == dense.numel(), bool((bitmasks == 255).all()), calls == [signal.SIGINT])
"""
    assert run_interrupted(*LONG_OPS["compress"], code) == ["True True True"]


@needs_memory
def test_the_native_op_itself_stops_midway():
    """Not just Python afterwards: called without the layer that turns it into the handler's exception, it says so."""
    code = """
try:
    run()
except RuntimeError as error:
    print(error)
    print(type(bitmask._C.take_pending_exception()).__name__, bitmask._C.take_pending_exception())
"""
    lines = run_interrupted(DENSE, "torch.ops.bitmask.compress(dense, False)", code)
    assert "bitmask: interrupted" in lines[0]
    assert lines[-1] == "KeyboardInterrupt None"


# Threads.


@pytest.fixture
def slowest_isa():
    bitmask.set_isa("scalar")
    yield
    bitmask.set_isa(None)


@pytest.mark.usefixtures("threads", "slowest_isa")
def test_other_python_threads_run_during_an_op():
    torch.set_num_threads(1)
    dense = torch.ones(1 << 28, dtype=torch.uint8)
    ticks, done = [0], threading.Event()

    def tick():
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        before = ticks[0]
        parts = bitmask.compress(dense)
        during_compress = ticks[0] - before
        before = ticks[0]
        bitmask.decompress(*parts, dense.shape)
        during_decompress = ticks[0] - before
    finally:
        done.set()
        thread.join()
    # Each op takes a tenth of a second and more; a thread that was locked out would get one tick in at its ends.
    assert during_compress > 10
    assert during_decompress > 10


def test_many_threads_at_once():
    """Also while another thread keeps changing the instruction set: any of them gives the same bits."""
    dense = [random_dense([40 + i, 5000 + i], dtype, seed=i) for i, dtype in enumerate([torch.float32, torch.int8] * 4)]
    expected = [bitmask.compress(tensor, True) for tensor in dense]
    done = threading.Event()

    def change_isa():
        while not done.is_set():
            for name in ISAS:
                bitmask.set_isa(name)
        bitmask.set_isa(None)

    def work(index):
        for _ in range(10):
            parts = bitmask.compress(dense[index], True)
            assert_parts_equal(parts, expected[index])
            assert_bits_equal(bitmask.decompress(*parts, dense[index].shape), dense[index])
        return True

    changer = threading.Thread(target=change_isa)
    changer.start()
    try:
        with ThreadPoolExecutor(len(dense)) as pool:
            assert list(pool.map(work, range(len(dense)))) == [True] * len(dense)
    finally:
        done.set()
        changer.join()


@pytest.mark.parametrize("shape", [(700, 900), (3, 200001), (200001, 3), (500001,)], ids=str)
@pytest.mark.usefixtures("threads")
def test_number_of_threads_does_not_change_a_bit(isa, shape):
    dense = random_dense(shape, torch.float32)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        parts = bitmask.compress(dense)
        results.append((*parts, bitmask.decompress(*parts, shape)))
    assert_parts_equal(results[1], results[0])
    assert_parts_equal(results[2], results[0])


def test_errors_in_worker_threads_are_errors_there():
    values, bitmasks, row_offsets = bitmask.compress(random_dense([300, 2000], torch.float32))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(bitmask.decompress, values, bitmasks, row_offsets + 1, [300, 2000])
        with pytest.raises(bitmask.FormatError, match=r"row_offsets\[0\]: got 1"):
            future.result(timeout=60)


# Forks.

FORK = """
import bitmask
import torch

torch.set_num_threads(2)
dense = torch.arange(600000, dtype=torch.int32).remainder(3).reshape(6, 100000)

def works():
    # NumPy compares without torch's own threads, which do not survive a fork.
    restored = bitmask.decompress(*bitmask.compress(dense), dense.shape)
    tensor = bitmask.BitmaskTensor.from_dense(dense)
    return (restored.numpy() == dense.numpy()).all() and (tensor[2:].to_dense().numpy() == dense[2:].numpy()).all()
"""


@pytest.mark.parametrize("use_before", [True, False])
def test_ops_work_in_a_forked_child(use_before):
    """An OpenMP pool does not survive fork(): the child must not wait for the threads of its parent."""
    assert_works_after_fork(FORK, use_before)


def test_bitmask_tensor_in_forked_data_loader_workers():
    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.tensor = BitmaskTensor.from_dense(torch.eye(200, 1000))

        def __len__(self):
            return 200

        def __getitem__(self, row):
            return self.tensor[row].to_dense()

    options = {"num_workers": 2, "timeout": 60, "multiprocessing_context": "fork"}
    loader = torch.utils.data.DataLoader(Rows(), batch_size=50, **options)
    assert torch.equal(torch.cat(list(loader)), torch.eye(200, 1000))


WRITER = """
import threading
import time
import torch
import bitmask

torch.set_num_threads(1)
dense = torch.zeros(400, 65536, dtype=torch.uint8)  # one row a task
dense[:, ::64] = 1
values, bitmasks, row_offsets = bitmask.compress(dense)
offsets, proven = row_offsets.numpy(), int(row_offsets[300])
done = False

def write():
    while not done:
        offsets[300] = -(1 << 40)
        time.sleep(0.0002)
        offsets[300] = proven
        time.sleep(0.0006)

writer = threading.Thread(target=write)
writer.start()
outcomes = set()
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        outcomes.add(torch.equal(bitmask.decompress(values, bitmasks, row_offsets, dense.shape), dense))
    except bitmask.FormatError:
        outcomes.add("refused")
done = True
writer.join()
print("refused" in outcomes, False in outcomes)
"""


def test_offsets_written_meanwhile_are_refused_or_harmless():
    """What was proven is what is used: an offset changed after its proof must not be read again."""
    assert run_python(WRITER).stdout.split() == ["True", "False"]


NARROW = """
import os
import signal
import threading
import time
import torch
import bitmask

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
dense = torch.ones(1 << 27, 1, dtype=torch.uint8)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
begin = time.monotonic()
try:
    while True:
        bitmask.compress(dense)
except KeyboardInterrupt as error:
    print("bitmask: interrupted" in str(error.__context__), time.monotonic() - begin < 4)
"""


@needs_memory
def test_ctrl_c_interrupts_many_short_rows():
    """A row costs time even where it has next to no bytes."""
    assert run_python(NARROW, BITMASK_ISA="scalar").stdout.split() == ["True", "True"]
