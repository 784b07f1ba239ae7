"""Checkpoint and index to answers."""
