"""What `import rag_jax` gives: a function or class for all the tools do."""
