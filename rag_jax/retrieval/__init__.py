"""Passages -> embeddings -> index -> documents."""
