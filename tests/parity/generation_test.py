"""Beam and greedy search write the tokens that transformers writes.

The reference: `generate` of tiny random RAG models, with settings drawn at
random, on ragged batches. Every token of every sequence is compared. With
`HfParity` where transformers has a defect: it ranks RAG-Sequence wrongly, and
if the padding is token 0, as T5's, it writes end tokens behind an end.
"""

import dataclasses
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import GeneratorConfig
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.ranking import HfParity
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.models.rag import build_generator
from rag_jax.weights.load import load_rag

pytestmark = pytest.mark.parity

V, B, K, C, FIRST_WORD = 29, 3, 4, 10, 4
NUM_SETTINGS, NUM_BATCHES = 14, 4  # of each kind with each generator
CLASSES = {
  "rag_token": transformers.RagTokenForGeneration,
  "rag_sequence": transformers.RagSequenceForGeneration,
}
# Padding, start of the text, end, what the decoder reads first.
SPECIAL = {"bart": (1, 0, 2, 2), "t5": (0, None, 1, 0)}
PAIRS = [(kind, name) for kind in CLASSES for name in SPECIAL]


def _generator_config(name: str) -> Any:
  pad, bos, eos, start = SPECIAL[name]
  ids = {
    "vocab_size": V,
    "pad_token_id": pad,
    "bos_token_id": bos,
    "eos_token_id": eos,
    "decoder_start_token_id": start,
  }
  if name == "bart":
    return transformers.BartConfig(
      d_model=16,
      encoder_layers=2,
      decoder_layers=2,
      encoder_attention_heads=2,
      decoder_attention_heads=2,
      encoder_ffn_dim=24,
      decoder_ffn_dim=24,
      max_position_embeddings=16,
      forced_eos_token_id=None,
      **ids,
    )
  return transformers.T5Config(
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    **ids,
  )


@functools.cache
def models(kind: str, name: str) -> tuple[Any, Any, Any]:
  """Returns PyTorch's model, our generator and its parameters."""
  config = transformers.RagConfig.from_question_encoder_generator_configs(
    transformers.DPRConfig(
      vocab_size=V, hidden_size=8, num_hidden_layers=1,
      num_attention_heads=2, intermediate_size=8,
    ),
    _generator_config(name),
    n_docs=K,
  )  # fmt: skip
  theirs = CLASSES[kind](config).eval()
  torch.manual_seed(5)
  with torch.no_grad():
    for path, param in theirs.generator.named_parameters():
      if "norm" in path:
        param.add_(0.2 * torch.randn(param.shape))
        continue
      # Logits some nats apart, and layers that add more than what they get:
      # else each token, whose vector is also its output, follows itself.
      scale = 1.0
      if "shared" in path or "embed_tokens" in path:
        scale = 0.4 if name == "bart" else 1.0
      elif "embed_positions" in path:
        scale = 2.0
      elif "decoder" in path and "relative_attention_bias" in path:
        scale = 3.0
      elif "decoder" in path and ("fc2" in path or "wo" in path):
        scale = 2.0
      param.copy_(torch.randn(param.shape) * scale)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    loaded = load_rag(folder)
    params = jax.tree.map(jnp.array, loaded.params["generator"])
  generator = build_generator(
    dataclasses.replace(GeneratorConfig(), **loaded.generator.fields),
    vocab_size=V,
    decoder_start_id=SPECIAL[name][3],
    dtype=jnp.float32,
  )
  return theirs, generator, {"generator": params}


def draw_settings(rng: np.random.Generator, kind: str, eos: int) -> dict:
  """Returns settings as keyword arguments of both sides."""

  def often(share: float) -> bool:
    return bool(rng.random() < share)

  def one_of(*choices: Any) -> Any:
    return choices[rng.integers(len(choices))]

  beams = int(rng.integers(1, 6))
  settings: dict[str, Any] = {
    "num_beams": beams,
    "num_return_sequences": int(rng.integers(1, beams + 1)),
  }
  steps = int(rng.integers(4, 10))
  # `RagTokenForGeneration.generate` does not look at max_new_tokens.
  if kind == "rag_token" or often(0.5):
    settings["max_length"] = steps + 1
  else:
    settings["max_new_tokens"] = steps
  if often(0.4):
    settings[one_of("min_length", "min_new_tokens")] = int(rng.integers(2, 5))
  if beams > 1:
    settings["length_penalty"] = one_of(-0.5, 0.0, 0.6, 1.0, 2.0)
    settings["early_stopping"] = one_of(True, False, "never")
  if often(0.3):
    settings["no_repeat_ngram_size"] = int(rng.integers(1, 4))
  if often(0.3):
    settings["repetition_penalty"] = one_of(0.8, 1.2, 1.7)
  if often(0.3):
    settings["bad_words_ids"] = [
      rng.integers(FIRST_WORD, V, size=size).tolist() for size in (1, 1, 2, 3)
    ]
  if often(0.2):
    settings["forced_bos_token_id"] = int(rng.integers(FIRST_WORD, V))
  if often(0.2):
    settings["forced_eos_token_id"] = eos
  settings["n_docs"] = one_of(1, 2, K, K)
  if kind == "rag_sequence":
    settings["do_deduplication"] = often(0.5)
  return settings


def draw_inputs(rng: np.random.Generator, pad: int, n_docs: int) -> tuple:
  """Returns doc_scores, contexts of several lengths, and their mask."""
  lengths = rng.integers(3, C + 1, size=(B, n_docs, 1))
  mask = np.arange(C) < lengths
  words = rng.integers(FIRST_WORD, V, size=mask.shape)
  tokens = np.where(mask, words, pad).astype(np.int32)
  doc_scores = rng.normal(0, 2, size=(B, n_docs)).astype(np.float32)
  return doc_scores, tokens, mask


def hf_tokens(theirs: Any, name: str, settings: dict, inputs: tuple) -> Any:
  """Returns what transformers writes, [B, R, L] without the start token."""
  pad, bos, eos, start = SPECIAL[name]
  doc_scores, tokens, mask = inputs
  base = transformers.GenerationConfig(
    pad_token_id=pad,
    bos_token_id=bos,
    eos_token_id=eos,
    decoder_start_token_id=start,
  )
  theirs.generation_config = theirs.generator.generation_config = base
  # What its RAG-Sequence ranks with, whatever it was called with.
  theirs.config.n_docs = settings["n_docs"]
  with torch.inference_mode():
    written = theirs.generate(
      context_input_ids=torch.tensor(tokens).long().reshape(-1, C),
      context_attention_mask=torch.tensor(mask).long().reshape(-1, C),
      doc_scores=torch.tensor(doc_scores),
      do_sample=False,
      **settings,
    )
  return written[:, 1:].numpy().reshape(B, -1, written.shape[1] - 1)


@pytest.mark.parametrize("number", range(NUM_SETTINGS))
@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_tokens_are_those_of_transformers(kind, name, number):
  theirs, generator, params = models(kind, name)
  pad, bos, eos, _ = SPECIAL[name]
  rng = np.random.default_rng([PAIRS.index((kind, name)), number])
  settings = draw_settings(rng, kind, eos)
  decoder = RagDecoder(
    generator,
    GenerationSettings(
      pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, **settings
    ),
    kind,
    hf_parity=None if (kind, name) == ("rag_token", "bart") else HfParity(),
  )
  for _ in range(NUM_BATCHES):
    inputs = draw_inputs(rng, pad, settings["n_docs"])
    hf = hf_tokens(theirs, name, settings, inputs)
    ours = decoder(params, *inputs)
    length = hf.shape[-1]
    np.testing.assert_array_equal(
      np.asarray(ours.tokens)[..., :length], hf, err_msg=str(settings)
    )
    assert np.max(ours.lengths) <= length


def test_these_are_more_than_200_cases():
  assert len(PAIRS) * NUM_SETTINGS * NUM_BATCHES >= 200


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_the_cases_differ(kind, name):
  """Equality means something: lengths, and what is written, vary."""
  theirs, _, _ = models(kind, name)
  settings = {
    "num_beams": 3,
    "num_return_sequences": 3,
    "max_length": 9,
    "n_docs": K,
  }
  rng = np.random.default_rng(0)
  inputs = draw_inputs(rng, SPECIAL[name][0], K)
  written = hf_tokens(theirs, name, settings, inputs).reshape(B * 3, -1)
  assert len(np.unique(written, axis=0)) > 2 * B
  assert len(np.unique(written)) > 3
  assert len(np.unique(written[::3], axis=0)) > 1  # the best of each question
