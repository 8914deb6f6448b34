"""Sparse formats beside each other: conversions, products, their results and plot."""
