"""The command `rag-jax probe`: python tools/probe.py --help."""

from rag_jax.commands.probe import run

if __name__ == "__main__":
  run()
