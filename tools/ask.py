"""The command `rag-jax ask`: python tools/ask.py --help."""

from rag_jax.commands.ask import run

if __name__ == "__main__":
  run()
