"""The command `rag-jax convert-hf`: python tools/convert_hf.py --help."""

from rag_jax.commands.convert_hf import run

if __name__ == "__main__":
  run()
