"""The command `rag-jax plan`: python tools/plan.py --help."""

from rag_jax.commands.plan import run

if __name__ == "__main__":
  run()
