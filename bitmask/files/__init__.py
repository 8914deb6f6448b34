"""Checkpoints: safetensors files and config.json, in the layouts of every release that stored weights as bitmasks."""

from bitmask.files.config import BitmaskConfig
from bitmask.files.load import load_compressed, load_rows
from bitmask.files.save import save_compressed, save_compressed_model

__all__ = ["BitmaskConfig", "load_compressed", "load_rows", "save_compressed", "save_compressed_model"]
