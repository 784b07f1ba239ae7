"""Batch to update to checkpoint."""
