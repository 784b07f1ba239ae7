"""Questions and documents to batches of fixed shape."""
