"""The command `rag-jax mine-negatives`: tools/mine_negatives.py --help."""

from rag_jax.commands.mine_negatives import run

if __name__ == "__main__":
  run()
