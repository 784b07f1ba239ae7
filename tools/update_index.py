"""The command `rag-jax update-index`: python tools/update_index.py --help."""

from rag_jax.commands.update_index import run

if __name__ == "__main__":
  run()
