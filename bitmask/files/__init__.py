"""Checkpoints: safetensors files and config.json, in the layouts of every release that stored weights as bitmasks."""

from bitmask.files.config import BitmaskConfig
from bitmask.files.convert import compress_checkpoint, decompress_checkpoint
from bitmask.files.examine import list_checkpoint, verify_checkpoint
from bitmask.files.load import load_compressed, load_rows
from bitmask.files.save import save_compressed, save_compressed_model

__all__ = [
    "BitmaskConfig",
    "compress_checkpoint",
    "decompress_checkpoint",
    "list_checkpoint",
    "load_compressed",
    "load_rows",
    "save_compressed",
    "save_compressed_model",
    "verify_checkpoint",
]
