"""What `rag-jax` runs: a module per command, with its flags and its `main`."""

import os

# Before libraries are imported: hides what TensorFlow and XLA log at start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

PROGRAM = "rag-jax"

# In the order in which they are listed. The module of "build-index" is
# build_index.py, and tools/build_index.py runs the same `main`.
COMMANDS = (
  "train", "ask", "evaluate", "compare", "probe", "build-index", "search",
  "update-index", "mine-negatives", "convert-hf", "plan",
)  # fmt: skip
