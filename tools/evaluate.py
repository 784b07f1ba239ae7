"""The command `rag-jax evaluate`: python tools/evaluate.py --help."""

from rag_jax.commands.evaluate import run

if __name__ == "__main__":
  run()
