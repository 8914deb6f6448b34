"""Multiplying by sparse weights: contenders, one cell, its result and its plot."""
