"""The command `rag-jax train`: python tools/train.py --help."""

from rag_jax.commands.train import run

if __name__ == "__main__":
  run()
