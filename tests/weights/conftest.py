"""Small checkpoints, written without PyTorch."""

import dataclasses
import json

import causal_models
import flax.traverse_util
import numpy as np
import pytest
import safetensors.numpy

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.weights.causal_configs import causal_type
from rag_jax.weights.causal_tensors import causal_architecture
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_causal
from rag_jax.weights.export import export_encoder
from rag_jax.weights.export import export_generator
from rag_jax.weights.export import export_rag
from rag_jax.weights.generator_configs import generator_type
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.saved import SavedModel

IDS = SpecialIds(pad=1, bos=0, eos=2)
V = 23
ENCODER = EncoderConfig(
  vocab_size=V,
  max_positions=9,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  mlp_dim=12,
  num_token_types=2,
  pooling="cls",
  projection_dim=5,
)
BART = GeneratorConfig(
  vocab_size=V,
  max_positions=9,
  num_layers=2,
  num_decoder_layers=1,
  embed_dim=8,
  num_heads=2,
  mlp_dim=12,
)
T5 = GeneratorConfig(
  vocab_size=V,
  num_layers=2,
  embed_dim=8,
  num_heads=2,
  head_dim=3,
  mlp_dim=12,
  norm="pre",
  norm_kind="rms",
  use_bias=False,
  embedding_norm=False,
  positions="none",
  relative_buckets=8,
  relative_shared=True,
  scale_attention=False,
  logits_bias=False,
  scale_output=True,
  decoder_start_id=0,
)


def random_params(architecture, seed=0):
  """Returns parameters of the shapes that an architecture's rules have."""
  rng = np.random.default_rng(seed)
  return flax.traverse_util.unflatten_dict(
    {
      rule.ours: rng.normal(size=rule.shape).astype(np.float32)
      for rule in architecture.rules
    },
    sep="/",
  )


def write_tokenizer(path, size):
  """Writes the file that decides which ids there are."""
  path.mkdir(parents=True, exist_ok=True)
  vocab = {f"w{i}": i for i in range(size)}
  content = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
  (path / "tokenizer.json").write_text(json.dumps(content))
  return TokenizerFiles(str(path), IDS)


class Checkpoints:
  """Writes checkpoints below a directory, and edits them."""

  ids = IDS
  vocab_size = V
  encoder, bart, t5 = ENCODER, BART, T5
  random_params = staticmethod(random_params)
  write_tokenizer = staticmethod(write_tokenizer)

  def __init__(self, root):
    self.root = root
    self.tokenizer = write_tokenizer(root / "tokenizer", V)

  def encoder_params(self, seed=0, fields=ENCODER):
    """Returns those of a DPR encoder."""
    return random_params(dpr(fields, "question"), seed)

  def generator_params(self, fields):
    """Returns those of a generator."""
    return random_params(generator_architecture(fields, generator_type(fields)))

  def dpr(self, name="dpr", kind="dpr_question", **kwargs):
    """Writes a DPR encoder."""
    path = self.root / name
    export_encoder(
      path,
      ENCODER,
      self.encoder_params(),
      kind=kind,
      tokenizer=self.tokenizer,
      **kwargs,
    )
    return path

  def bert(self, name="bert", kind="bert", **changes):
    """Writes a BERT, by itself or with modules."""
    path = self.root / name
    fields = dataclasses.replace(ENCODER, **{"projection_dim": 0} | changes)
    export_encoder(
      path,
      fields,
      self.encoder_params(fields=fields),
      kind=kind,
      tokenizer=self.tokenizer,
    )
    return path

  def generator(self, fields, name="generator", **kwargs):
    """Writes a generator."""
    path = self.root / name
    export_generator(
      path,
      fields,
      self.generator_params(fields),
      tokenizer=self.tokenizer,
      **kwargs,
    )
    return path

  def causal(self, kind="llama", name="causal", **kwargs):
    """Writes a decoder-only generator."""
    path, fields = self.root / name, causal_models.CONFIGS[kind]
    architecture = causal_architecture(fields, causal_type(fields))
    export_causal(
      path,
      fields,
      random_params(architecture),
      tokenizer=self.tokenizer,
      **kwargs,
    )
    return path

  def rag(self, name="rag", generator=BART, tied=False, **settings):
    """Writes a RAG."""
    path = self.root / name
    export_rag(
      path,
      SavedModel(
        origin="",
        params={
          "question_encoder": self.encoder_params(),
          "generator": self.generator_params(generator),
        },
        kind="rag_token",
        encoder=dataclasses.replace(ENCODER, tied=tied),
        generator=generator,
        settings=RagSettings(**settings),
        question_tokenizer=self.tokenizer,
        generator_tokenizer=self.tokenizer,
      ),
    )
    return path

  @staticmethod
  def edit_tensors(path, edit):
    """Passes the tensors of a checkpoint through `edit`; ends its manifest."""
    file = path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors = {k: x.copy() for k, x in tensors.items()}
    changed = edit(tensors)
    safetensors.numpy.save_file(tensors if changed is None else changed, file)
    (path / "manifest.json").unlink(missing_ok=True)

  @staticmethod
  def edit_json(path, name="config.json", **changes):
    """Changes values of a JSON file; ... takes one away."""
    content = json.loads((path / name).read_text()) | changes
    content = {k: v for k, v in content.items() if v is not ...}
    (path / name).write_text(json.dumps(content))
    (path / "manifest.json").unlink(missing_ok=True)

  @staticmethod
  def flat(params):
    """Returns parameters by path, as bytes."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {k: np.asarray(x).tobytes() for k, x in flat.items()}


@pytest.fixture
def checkpoints(tmp_path):
  """Writes checkpoints below tmp_path."""
  return Checkpoints(tmp_path)
