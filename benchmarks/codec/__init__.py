"""Compressing and decompressing whole matrices: contenders, one cell, its result and its plot."""
