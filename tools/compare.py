"""The command `rag-jax compare`: python tools/compare.py --help."""

from rag_jax.commands.compare import run

if __name__ == "__main__":
  run()
