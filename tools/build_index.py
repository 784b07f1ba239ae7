"""The command `rag-jax build-index`: python tools/build_index.py --help."""

from rag_jax.commands.build_index import run

if __name__ == "__main__":
  run()
