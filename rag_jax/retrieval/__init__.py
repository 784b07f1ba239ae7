"""Passages to embeddings to index to documents."""
