"""Training and multiplying with block-sparse weights: contenders, one cell, its result and its plot."""
