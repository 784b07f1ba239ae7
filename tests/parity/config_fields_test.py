"""Every field of transformers' configs is used, refused, or listed as idle.

Each is changed, alone, in what its own class writes. What then happens is held
against the lists of weights/config_fields.py.
"""

import dataclasses
import json
import shutil

import pytest
from small_checkpoints import ENCODER
from small_checkpoints import GENERATOR
from small_checkpoints import T5
from small_checkpoints import random_params
import transformers

from rag_jax.config_models import CausalConfig
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.weights.causal_configs import CAUSAL_TYPES
from rag_jax.weights.causal_configs import causal_config
from rag_jax.weights.causal_configs import read_causal_config
from rag_jax.weights.causal_configs import read_causal_ids
from rag_jax.weights.causal_configs import with_causal_ids
from rag_jax.weights.config_fields import GENERATION_REFUSED
from rag_jax.weights.config_fields import GENERATION_WITHOUT_EFFECT
from rag_jax.weights.config_fields import USED
from rag_jax.weights.config_fields import field_notes
from rag_jax.weights.config_fields import without_effect
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.directory import open_directory
from rag_jax.weights.encoder_configs import PLAIN_ENCODERS
from rag_jax.weights.encoder_configs import architecture_name
from rag_jax.weights.encoder_configs import encoder_config
from rag_jax.weights.encoder_configs import read_encoder_config
from rag_jax.weights.encoder_configs import read_special_ids
from rag_jax.weights.encoder_tensors import dpr
from rag_jax.weights.export import export_rag
from rag_jax.weights.generation_settings import read_generation
from rag_jax.weights.generator_configs import generator_config
from rag_jax.weights.generator_configs import read_generator_config
from rag_jax.weights.generator_configs import read_generator_ids
from rag_jax.weights.generator_configs import with_default_ids
from rag_jax.weights.generator_tensors import generator_architecture
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import load_rag
from rag_jax.weights.saved import SavedModel

pytestmark = pytest.mark.parity

CLASSES = {
  "bert": transformers.BertConfig,
  "dpr": transformers.DPRConfig,
  "distilbert": transformers.DistilBertConfig,
  "roberta": transformers.RobertaConfig,
  "xlm-roberta": transformers.XLMRobertaConfig,
  "mpnet": transformers.MPNetConfig,
  "t5_encoder": transformers.T5Config,
  "bart": transformers.BartConfig,
  "mbart": transformers.MBartConfig,
  "pegasus": transformers.PegasusConfig,
  "t5": transformers.T5Config,
  "mt5": transformers.MT5Config,
  "llama": transformers.LlamaConfig,
  "qwen2": transformers.Qwen2Config,
  "qwen3": transformers.Qwen3Config,
  "gemma2": transformers.Gemma2Config,
  "gemma3_text": transformers.Gemma3TextConfig,
  "gpt2": transformers.GPT2Config,
}
ENCODERS = (*PLAIN_ENCODERS, "dpr")
# Where a default leaves others without effect.
SETTINGS = {
  name: {"use_sliding_window": True, "max_window_layers": 20}
  for name in ("qwen2", "qwen3")
}


def changed(name, value):
  """Returns another value of the same kind."""
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + 1
  if isinstance(value, float):
    return value + 0.25
  if isinstance(value, dict):
    return {"0": "another"}
  if name == "architectures":
    return ["DPRContextEncoder", "RagSequenceForGeneration"][:1]
  return 7 if name.endswith("_id") else "another"


def attempt(function, *args, **kwargs):
  """Returns what comes back, or the message of what is refused."""
  try:
    return function(*args, **kwargs)
  except ValueError as error:
    return str(error)


def read(content, path, kind):
  """Returns all that is made of a config.json of `kind`, one of `CLASSES`."""
  (path / "config.json").write_text(json.dumps(content))
  values = ConfigValues(content, "c")
  found = [
    attempt(checkpoint_kind, path),
    list(field_notes(values, kind=kind)),
  ]
  if kind in ENCODERS:
    encoder = attempt(read_encoder_config, values, has_pooler=True)
    refused = isinstance(encoder, str)
    return [*found, encoder, None if refused else read_special_ids(values)]
  if kind in CAUSAL_TYPES and content["model_type"] == kind:
    # Without layer_types, the older fields say which layers slide.
    older = {k: v for k, v in content.items() if k != "layer_types"}
    return [
      *found,
      *(attempt(read_causal_config, ConfigValues(each, "c"))
        for each in (content, older)),
      attempt(read_causal_ids, values),
      attempt(read_generation, open_directory(path), with_causal_ids(values)),
    ]  # fmt: skip
  # As version 4 writes T5, which has no such word, too.
  older = {k: v for k, v in content.items() if k != "scale_decoder_outputs"}
  for each in (content, older):
    values = ConfigValues(each, "c")
    found += [
      attempt(read_generator_config, values, head)
      for head in ("absent", "copy", "own")
    ]
  found.append(attempt(read_generator_ids, values))
  generation = read_generation(open_directory(path), with_default_ids(values))
  return [*found, attempt(GenerationSettings.from_dict, generation)]


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_field_of_a_model_is_used_or_refused_or_listed(
  model_type, tmp_path
):
  config = CLASSES[model_type](**SETTINGS.get(model_type, {}))
  content = json.loads(json.dumps(config.to_dict()))
  if model_type == "t5_encoder":
    content["architectures"] = [architecture_name(model_type)]
  before = read(content, tmp_path, model_type)
  assert before == read(content, tmp_path, model_type)
  assert not before[1]  # no field is unknown
  effective = {
    name
    for name, value in content.items()
    if read(content | {name: changed(name, value)}, tmp_path, model_type)
    != before
  }
  assert effective == content.keys() - without_effect(model_type)
  assert effective <= set(USED[model_type])


def test_every_field_of_rag_is_used_or_listed(tmp_path):
  export_rag(
    tmp_path,
    SavedModel(
      origin="",
      params={
        "question_encoder": random_params(dpr(ENCODER, "question"), 0),
        "generator": random_params(
          generator_architecture(GENERATOR, "bart"), 1
        ),
      },
      kind="rag_token",
      encoder=dataclasses.replace(ENCODER, tied=False),
      generator=GENERATOR,
    ),
  )
  (tmp_path / "generation_config.json").unlink()
  (tmp_path / "manifest.json").unlink()
  ours = json.loads((tmp_path / "config.json").read_text())
  content = transformers.RagConfig(**ours).to_dict()
  content["architectures"] = ours["architectures"]
  content = json.loads(json.dumps(content))

  def read_rag(content):
    (tmp_path / "config.json").write_text(json.dumps(content))
    rag = attempt(load_rag, tmp_path)
    if isinstance(rag, str):
      return rag
    parts = (rag.question_encoder, rag.generator)
    return [
      # Kept for an export alone.
      dataclasses.replace(rag.settings, reduce_loss=False),
      rag.generator.generation,
      *((p.fields, p.special_ids, p.report.notes) for p in parts),
    ]

  before = read_rag(content)
  assert not any("does not know" in note for note in before[-1][-1])
  effective = set()
  for name, value in content.items():
    other = changed(name, value)
    if name == "architectures":
      other = ["RagSequenceForGeneration"]
    if read_rag(content | {name: other}) != before:
      effective.add(name)
  assert effective == content.keys() - without_effect("rag")
  assert effective <= set(USED["rag"])
  shutil.rmtree(tmp_path)


# One of them is a value that a setting can have.
CANDIDATES = (3, 0.5, True, "never", "another", [3], [[3]], {"3": 1})


def test_every_setting_of_generation_is_used_or_refused_or_listed():
  names = transformers.GenerationConfig().to_dict().keys()
  base = {"decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 0}
  before = GenerationSettings.from_dict(base)

  def outcome(name, value):
    return attempt(GenerationSettings.from_dict, base | {name: value})

  effective, refused = set(), set()
  for name in names:
    outcomes = [outcome(name, value) for value in CANDIDATES]
    if any(o != before for o in outcomes):
      effective.add(name)
    if all(f"does not support: {name}=" in str(o) for o in outcomes):
      refused.add(name)
  assert effective == names - GENERATION_WITHOUT_EFFECT.keys()
  # `True` is 1, and what asks for nothing is no reason to refuse.
  assert refused <= GENERATION_REFUSED.keys()
  supported = {f.name for f in dataclasses.fields(GenerationSettings)}
  assert effective <= supported | GENERATION_REFUSED.keys()


def test_a_field_that_nobody_knows_is_told(tmp_path, caplog):
  content = transformers.BartConfig(decoder_layerdrop=0.1).to_dict()
  content["sliding_window"] = 5
  notes = read(json.loads(json.dumps(content)), tmp_path, "bart")[1]
  assert notes == [
    "c has fields that rag_jax does not know and passes over: sliding_window",
    "c says decoder_layerdrop=0.1: transformers leaves whole layers out while"
    " training, rag_jax does not",
  ]
  GenerationSettings.from_dict({"eos_token_id": 2, "new_penalty": 2.0})
  assert "does not know and ignores: new_penalty." in caplog.text


def test_older_settings_that_are_not_supported_are_refused(tmp_path):
  older = transformers.BartConfig().to_dict() | {
    "encoder_no_repeat_ngram_size": 3, "num_beam_groups": 1
  }  # fmt: skip
  settings = read_generation(open_directory(tmp_path), older)
  assert "num_beam_groups" not in settings
  with pytest.raises(ValueError, match="support: encoder_no_repeat_ngram_size"):
    GenerationSettings.from_dict(settings)


def test_positions_that_are_relative_keys_are_refused():
  for model_type in ("bert", "roberta", "dpr"):
    content = CLASSES[model_type]().to_dict()
    content["position_embedding_type"] = "relative_key_query"
    with pytest.raises(ValueError, match="supports only position_embedding_ty"):
      read_encoder_config(ConfigValues(content, "c"), has_pooler=True)


_ENCODER_LEFT = dict.fromkeys(
  ("add_cross_attention", "is_decoder", "is_encoder_decoder"), False
)
# What an export leaves to the defaults of transformers, which are what it has.
LEFT = {
  "bert": {**_ENCODER_LEFT},
  "dpr": {**_ENCODER_LEFT},
  "distilbert": {"is_encoder_decoder": False},
  "roberta": {**_ENCODER_LEFT},
  "xlm-roberta": {**_ENCODER_LEFT},
  "mpnet": {"is_encoder_decoder": False},
  "t5_encoder": {"is_decoder": False},
  "bart": {
    "decoder_layerdrop": 0.0, "encoder_layerdrop": 0.0, "is_decoder": False,
  },
  "t5": {"is_decoder": False},
  **{
    name: {"is_encoder_decoder": False}
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")
  },
  "gpt2": {
    "is_encoder_decoder": False, "add_cross_attention": False,
    "scale_attn_by_inverse_layer_idx": False,
  },
}  # fmt: skip
# What the encoder of a class has to have.
CHANGES = {
  "distilbert": {"num_token_types": 0},
  "roberta": {"position_offset": 2},
  "xlm-roberta": {"position_offset": 2},
  "mpnet": {
    "position_offset": 2, "num_token_types": 0, "relative_buckets": 32
  },
  "t5_encoder": {
    "num_token_types": 0, "pooling": "mean", "positions": "none",
    "embedding_norm": False, "norm": "pre", "norm_kind": "rms",
    "use_bias": False, "scale_attention": False, "relative_buckets": 16,
    "relative_max_distance": 50, "head_dim": 6, "gated": True,
    "activation": "silu",
  },
}  # fmt: skip
# Those of a class with nothing at a default.
CAUSAL = CausalConfig(
  vocab_size=90, embed_dim=24, num_heads=2, num_kv_heads=1, head_dim=12,
  mlp_dim=20, num_layers=2, norm_eps=1e-3, attention_dropout=0.3,
  max_positions=55, rope_theta=7.0, sliding_layers=(1,), sliding_window=5,
  tied_output=False,
)  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_an_export_leaves_nothing_out_that_changes_what_is_computed(kind):
  ids = SpecialIds(pad=1, bos=0, eos=2)
  if kind in ENCODERS:
    encoder = dataclasses.replace(ENCODER, **CHANGES.get(kind, {}))
    ours = encoder_config(encoder, architecture_name(kind), ids)
  elif kind in CAUSAL_TYPES:
    ours = causal_config(CAUSAL, kind, ids)
  else:
    ours = generator_config(T5 if kind == "t5" else GENERATOR, kind, ids)
  theirs = CLASSES[kind](**ours).to_dict()
  wrong = {k: (v, theirs[k]) for k, v in ours.items()
           if k in theirs and theirs[k] != v}  # fmt: skip
  # T5 of version 5 sets it to True, and keeps its meaning under another name.
  renamed = {"tie_word_embeddings"} if kind == "t5" else set()
  assert wrong.keys() - {"dtype", "torch_dtype"} <= renamed
  left = theirs.keys() - ours.keys() - without_effect(kind)
  if kind.startswith("qwen"):
    left -= {"max_window_layers"}  # layer_types counts
  assert {name: theirs[name] for name in left} == LEFT[kind]
