"""Checkpoints on disk: saved, loaded cold and warm, and converted, dense against compressed."""
