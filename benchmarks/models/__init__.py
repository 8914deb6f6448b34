"""Whole models, dense and compressed: how they are made and what is found about them."""
