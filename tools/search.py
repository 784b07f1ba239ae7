"""The command `rag-jax search`: python tools/search.py --help."""

from rag_jax.commands.search import run

if __name__ == "__main__":
  run()
