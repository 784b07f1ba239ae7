"""Text to passages: readers, bundled corpus, tokenizers. No jax."""
