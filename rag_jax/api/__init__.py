"""The public API of `import rag_jax`."""
