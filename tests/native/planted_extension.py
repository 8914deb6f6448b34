"""Makes the extension read past a buffer on purpose: run.sh expects AddressSanitizer to report it."""

import ctypes

import torch

import bitmask

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
lying = (ctypes.c_uint8 * 4096).from_address(libc.malloc(1024))
bitmask.compress(torch.frombuffer(lying, dtype=torch.uint8))
print("not reported")
