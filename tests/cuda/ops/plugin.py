"""A pytest plugin: ops on CPU tensors become those of csrc/ops_cuda.cpp, over the twin of the CUDA runtime."""

import torch

import bitmask  # noqa: F401  # has the schemas

torch.ops.load_library("build/cuda/ops/libops.so")
