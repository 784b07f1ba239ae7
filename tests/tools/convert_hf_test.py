"""tools/convert_hf.py as a person runs it; what it does is in weights/."""

import json

import numpy as np
from processes import run_tool
import pytest
import safetensors.numpy

V, D, F = 20, 8, 12
CONFIG = {
  "model_type": "bert",
  "architectures": ["BertModel"],
  "vocab_size": V,
  "hidden_size": D,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "intermediate_size": F,
  "max_position_embeddings": 9,
  "type_vocab_size": 2,
}


def convert(*arguments):
  """Returns the finished process."""
  return run_tool("convert_hf.py", *arguments)


def tensors():
  """Returns those of a BERT, written down one by one."""
  shapes = {
    "embeddings.word_embeddings.weight": (V, D),
    "embeddings.position_embeddings.weight": (9, D),
    "embeddings.token_type_embeddings.weight": (2, D),
    "embeddings.LayerNorm.weight": (D,),
    "embeddings.LayerNorm.bias": (D,),
  }
  for i in range(2):
    layer = f"encoder.layer.{i}"
    for name, rows, columns in (
      ("attention.self.query", D, D),
      ("attention.self.key", D, D),
      ("attention.self.value", D, D),
      ("attention.output.dense", D, D),
      ("intermediate.dense", F, D),
      ("output.dense", D, F),
    ):
      shapes[f"{layer}.{name}.weight"] = (rows, columns)
      shapes[f"{layer}.{name}.bias"] = (rows,)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
      shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (D,)
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


@pytest.fixture
def bert(tmp_path):
  path = tmp_path / "bert"
  path.mkdir()
  (path / "config.json").write_text(json.dumps(CONFIG))
  safetensors.numpy.save_file(tensors(), path / "model.safetensors")
  (path / "vocab.txt").write_text("a\n" * V)
  return path


def test_a_checkpoint_goes_in_and_out(bert, tmp_path):
  process = convert(f"--input={bert}", f"--output={tmp_path / 'in'}")
  assert process.returncode == 0, process.stderr
  lines = process.stdout.splitlines()
  assert lines[0].split() == ["theirs", "ours", "shape", "parameters"]
  query = next(line for line in lines if "query/kernel" in line)
  assert query.split() == [
    "encoder.layer.{0..1}.attention.self.query.weight",
    "layer_{0..1}/self_attention/query/kernel",
    *["[8,", "2,", "4]", "128"],
  ]
  total = sum(x.size for x in tensors().values())
  assert f"{total:,} parameters in all" in lines
  assert lines[-1].startswith("Wrote a model directory of rag_jax to")

  process = convert(
    f"--input={tmp_path / 'in'}", f"--output={tmp_path / 'out'}"
  )
  assert process.returncode == 0, process.stderr
  assert "Wrote a checkpoint of transformers to" in process.stdout
  written = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
  for name, x in tensors().items():
    assert written[name].tobytes() == x.tobytes(), name
  config = json.loads((tmp_path / "out/config.json").read_text())
  assert {name: config[name] for name in CONFIG} == CONFIG
  assert (tmp_path / "out/vocab.txt").exists()


def test_what_a_user_can_mend_is_a_message_and_no_stack_trace(bert, tmp_path):
  for arguments, message in (
    (
      (f"--input={bert}", f"--output={bert}"),
      "ValueError: Input and output are the same directory",
    ),
    (
      (f"--input={bert}", f"--output={tmp_path / 'o'}", "--kind=dpr_question"),
      "ValueError: --kind=dpr_question is for an export, but",
    ),
    (
      ("--input=hf:org/name", f"--output={tmp_path / 'o'}"),
      "FileNotFoundError: hf:org/name is not in the hub's cache",
    ),
  ):
    process = convert(*arguments)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(message), process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "o").exists()
