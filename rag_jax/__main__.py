"""`python -m rag_jax` is `rag-jax`."""

from rag_jax.commands.cli import main

if __name__ == "__main__":
  main()
