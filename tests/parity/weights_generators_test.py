"""Generators of transformers, read and written, against PyTorch.

The reference: tiny random models that `save_pretrained` wrote. What is read
gives PyTorch's logits, what is written again loads in `transformers` without a
missing or unexpected key, and holds the same bits.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from rag_jax.config_models import GeneratorConfig
from rag_jax.models.rag import build_generator
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_generator
from rag_jax.weights.generator_configs import read_generator_config
from rag_jax.weights.load import load_generator

pytestmark = pytest.mark.parity

V, POSITIONS = 101, 16
BART = {
  "vocab_size": V,
  "d_model": 32,
  "encoder_layers": 2,
  "decoder_layers": 1,
  "encoder_attention_heads": 4,
  "decoder_attention_heads": 2,
  "encoder_ffn_dim": 48,
  "decoder_ffn_dim": 40,
  "max_position_embeddings": POSITIONS,
}
T5 = {
  "vocab_size": V,
  "d_model": 32,
  "d_kv": 6,
  "d_ff": 48,
  "num_layers": 3,  # with fewer than the decoder has, `generate` fails
  "num_decoder_layers": 2,
  "num_heads": 4,
  "relative_attention_num_buckets": 8,
  "relative_attention_max_distance": 12,
  "decoder_start_token_id": 0,
}
BART_CLASS = transformers.BartForConditionalGeneration
T5_CLASS = transformers.T5ForConditionalGeneration
CASES = {
  "bart": (BART_CLASS, transformers.BartConfig, BART),
  "bart scaled": (
    BART_CLASS,
    transformers.BartConfig,
    BART | {"scale_embedding": True, "activation_function": "relu"},
  ),
  "bart untied": (
    BART_CLASS,
    transformers.BartConfig,
    BART | {"tie_word_embeddings": False},
  ),
  "mbart": (
    transformers.MBartForConditionalGeneration,
    transformers.MBartConfig,
    BART | {"decoder_start_token_id": 5},
  ),
  "pegasus": (
    transformers.PegasusForConditionalGeneration,
    transformers.PegasusConfig,
    BART | {"activation_function": "relu"},
  ),
  "t5 v1.0": (T5_CLASS, transformers.T5Config, T5),
  "t5 v1.1": (
    T5_CLASS,
    transformers.T5Config,
    T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
  ),
  "t5 tied, not scaled": (
    T5_CLASS,
    transformers.T5Config,
    T5 | {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
  ),
}
KINDS = pytest.mark.parametrize("kind", list(CASES))
CONTEXT_LENGTHS, TARGET_LENGTHS = (11, 1, 5, 8), (7, 1, 4, 6)


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.2, generator=generator)
      if "norm" in name:
        x += name.endswith("weight")
    if hasattr(model, "final_logits_bias"):
      model.final_logits_bias.normal_(0.0, 1.0, generator=generator)


@functools.cache
def reference(kind):
  model_class, config_class, settings = CASES[kind]
  model = model_class(config_class(**settings)).eval()
  if (
    kind == "t5 v1.1"
  ):  # version 5 ties what it makes, and unties what it reads
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, 32))
    model.config.tie_word_embeddings = False
  randomize(model)
  if kind == "bart untied":  # ours has one table for encoder and decoder
    shared = model.model.shared.weight
    model.model.encoder.embed_tokens.weight = shared
    model.model.decoder.embed_tokens.weight = shared
  return model


def save(kind, path):
  """Writes what `save_pretrained` does; untied tables it would refuse."""
  model = reference(kind)
  model.save_pretrained(path)
  tensors = safetensors.numpy.load_file(path / "model.safetensors")
  if kind == "bart untied":
    for stack in ("encoder", "decoder"):
      name = f"model.{stack}.embed_tokens.weight"
      tensors[name] = model.model.shared.weight.detach().numpy()
  if kind in ("bart untied", "t5 v1.1"):
    tensors["lm_head.weight"] = model.lm_head.weight.detach().numpy()
    safetensors.numpy.save_file(
      tensors, path / "model.safetensors", {"format": "pt"}
    )


@pytest.fixture
def saved(kind, tmp_path):
  path = tmp_path / "theirs"
  save(kind, path)
  return path


def ragged(rng, lengths, pad):
  mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
  return np.where(mask, rng.integers(3, V, size=mask.shape), pad), mask


def inputs(start):
  """Returns context, its mask, target, and what PyTorch's decoder reads."""
  rng = np.random.default_rng(0)
  context, mask = ragged(rng, CONTEXT_LENGTHS, 1)
  target, _ = ragged(rng, TARGET_LENGTHS, 1)
  column = np.full((len(target), 1), start)
  return context, mask, target, np.concatenate([column, target[:, :-1]], axis=1)


def torch_logits(model, start):
  context, mask, _, decoder_inputs = inputs(start)
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(context),
      attention_mask=torch.tensor(mask).long(),
      decoder_input_ids=torch.tensor(decoder_inputs),
      use_cache=False,
    ).logits.numpy()


def our_logits(loaded):
  start = loaded.fields["decoder_start_id"]
  context, mask, target, _ = inputs(start)
  module = build_generator(
    GeneratorConfig(**loaded.fields),
    vocab_size=0,
    decoder_start_id=-1,
    dtype=jnp.float32,
  )
  return jax.jit(module.apply)(
    {"params": loaded.params},
    jnp.asarray(context, jnp.int32),
    jnp.asarray(mask),
    jnp.asarray(target, jnp.int32),
  )


def assert_close(ours, theirs):
  """Relative to the largest logit."""
  np.testing.assert_allclose(
    ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
  )


def assert_same_tensors(one, other):
  """Of two checkpoints, bit for bit."""
  a, b = (
    safetensors.numpy.load_file(d / "model.safetensors") for d in (one, other)
  )
  assert sorted(a) == sorted(b)
  for name, x in a.items():
    assert x.dtype == b[name].dtype, name
    assert x.tobytes() == b[name].tobytes(), name


def loads(model_class, path):
  """Returns the model; every key has to be its own."""
  model, info = model_class.from_pretrained(path, output_loading_info=True)
  assert not any(info.values()), info
  return model.eval()


@KINDS
def test_logits_are_those_of_pytorch_and_come_back_bit_for_bit(
  kind, saved, tmp_path
):
  loaded = load_generator(saved)
  start = loaded.fields["decoder_start_id"]
  assert start >= 0
  expected = torch_logits(reference(kind), start)
  assert np.std(expected) > 0.1  # or closeness would mean little
  assert_close(our_logits(loaded), expected)

  fields = dataclasses.replace(GeneratorConfig(), **loaded.fields)
  export_generator(
    tmp_path / "ours",
    fields,
    loaded.params,
    tokenizer=TokenizerFiles(ids=loaded.special_ids),
    generation=loaded.generation,
  )
  again = load_generator(tmp_path / "ours")
  assert again.fields == loaded.fields
  assert again.generation == loaded.generation
  assert again.special_ids == loaded.special_ids
  model = loads(CASES[kind][0], tmp_path / "ours")
  np.testing.assert_array_equal(torch_logits(model, start), expected)
  if kind == "t5 tied, not scaled":  # version 4 needs the head, too
    assert model.lm_head.weight is model.shared.weight
    again = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    np.testing.assert_array_equal(
      again["lm_head.weight"], again["shared.weight"]
    )
  else:
    assert_same_tensors(tmp_path / "ours", saved)


def edit_config(path, **changes):
  config = json.loads((path / "config.json").read_text())
  config |= changes
  config = {k: v for k, v in config.items() if v is not ...}
  (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["t5 v1.0", "t5 v1.1", "t5 tied, not scaled"])
def test_the_version_4_spelling_of_t5_means_the_same(kind, saved):
  before = load_generator(saved)
  edit_config(
    saved,
    tie_word_embeddings=kind == "t5 v1.0",
    scale_decoder_outputs=...,
    dtype=...,
    torch_dtype="float32",
  )
  after = load_generator(saved)
  assert after.fields == before.fields
  assert after.fields["scale_output"] == (kind == "t5 v1.0")
  assert after.fields["tied_output"] == (kind != "t5 v1.1")


@pytest.mark.parametrize("kind", ["t5 v1.1", "bart untied"])
def test_a_head_of_its_own_that_the_config_denies_is_refused(kind, saved):
  edit_config(saved, tie_word_embeddings=True, scale_decoder_outputs=...)
  with pytest.raises(
    ValueError, match="says tie_word_embeddings=true, but lm_"
  ):
    load_generator(saved)


@pytest.mark.parametrize("kind", ["bart"])
def test_a_bart_model_without_head_is_read_with_a_bias_of_zero(kind, saved):
  """facebook/bart-base: a BartModel, whose names have no "model." before."""
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  del tensors["final_logits_bias"]
  bare = {name.removeprefix("model."): x for name, x in tensors.items()}
  safetensors.numpy.save_file(bare, saved / "model.safetensors")
  loaded = load_generator(saved)
  model = BART_CLASS.from_pretrained(saved).eval()
  assert_close(our_logits(loaded), torch_logits(model, 2))
  assert "(missing: zeros)" in loaded.report.table()


@pytest.mark.parametrize("kind", ["bart"])
@pytest.mark.parametrize("name", ["lm_head", "model.encoder.embed_tokens"])
def test_the_table_is_found_under_the_name_of_a_copy(kind, saved, name):
  before = load_generator(saved).params["token_embedding"]["embedding"]
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  tensors[f"{name}.weight"] = tensors.pop("model.shared.weight")
  safetensors.numpy.save_file(tensors, saved / "model.safetensors")
  after = load_generator(saved).params["token_embedding"]["embedding"]
  np.testing.assert_array_equal(before, after)


def test_what_a_config_leaves_out_is_the_default_of_transformers():
  """Compared with the classes themselves, so that a change is noticed."""
  for name in ("Bart", "MBart", "Pegasus", "T5", "MT5"):
    full = getattr(transformers, f"{name}Config")().to_dict()
    empty = ConfigValues({"model_type": name.lower()}, "config.json")
    assert read_generator_config(empty, "absent") == read_generator_config(
      ConfigValues(full, "config.json"), "absent"
    )


@pytest.mark.parametrize("kind", ["bart", "t5 v1.0"])
def test_it_generates_as_the_checkpoint_did(kind, saved, tmp_path):
  """Both files of settings are read, and written for `generate`."""
  edit_config(saved, num_beams=3, no_repeat_ngram_size=2)
  (saved / "generation_config.json").unlink()
  loaded = load_generator(saved)
  assert loaded.generation["num_beams"] == 3
  fields = dataclasses.replace(GeneratorConfig(), **loaded.fields)
  export_generator(
    tmp_path / "ours",
    fields,
    loaded.params,
    tokenizer=TokenizerFiles(ids=loaded.special_ids),
    generation=loaded.generation,
  )
  context = torch.tensor(inputs(0)[0][:1])
  theirs, ours = (
    CASES[kind][0].from_pretrained(path).eval()
    for path in (saved, tmp_path / "ours")
  )
  assert ours.generation_config.num_beams == 3
  settings = {"max_new_tokens": 6, "num_beams": 3, "no_repeat_ngram_size": 2}
  torch.testing.assert_close(
    ours.generate(context, **settings), theirs.generate(context, **settings)
  )


@pytest.mark.parametrize("kind", ["t5 v1.0"])
def test_shards_are_read_and_written_as_transformers_does(
  kind, saved, tmp_path
):
  reference(kind).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
  loaded = load_generator(tmp_path / "shards")
  fields = dataclasses.replace(GeneratorConfig(), **loaded.fields)
  export_generator(tmp_path / "one", fields, loaded.params)
  assert_same_tensors(tmp_path / "one", saved)
  export_generator(
    tmp_path / "ours", fields, loaded.params, max_shard_bytes=20_000
  )
  assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
  model = loads(T5_CLASS, tmp_path / "ours")
  np.testing.assert_array_equal(
    torch_logits(model, 0), torch_logits(reference(kind), 0)
  )
