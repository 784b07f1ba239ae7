"""Decoder-only generators of transformers, read and written, against PyTorch.

The reference: tiny random models that `save_pretrained` wrote. What is read
gives PyTorch's logits, what is written again loads in `AutoModelForCausalLM`
without a missing or unexpected key, and holds the same bits.
"""

import json

from causal_references import CASES
from causal_references import V
from causal_references import reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from rag_jax.config_models import CausalConfig
from rag_jax.decoding.rag import RagDecoder
from rag_jax.decoding.settings import GenerationSettings
from rag_jax.models.causal import build_causal
from rag_jax.weights.causal_configs import read_causal_config
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_causal
from rag_jax.weights.load import load_causal

pytestmark = pytest.mark.parity

S = 14
KINDS = pytest.mark.parametrize("kind", list(CASES))
LENGTHS = (14, 3, 9)


@pytest.fixture
def saved(kind, tmp_path):
  path = tmp_path / "theirs"
  reference(kind).save_pretrained(path)
  return path


def inputs(*, left):
  rng = np.random.default_rng(0)
  mask = np.arange(S) < np.array(LENGTHS)[:, None]
  mask = mask[:, ::-1] if left else mask
  return np.where(mask, rng.integers(3, V, size=mask.shape), 0), mask


def torch_logits(model, *, left=False):
  tokens, mask = inputs(left=left)
  mask = torch.tensor(mask.astype(np.int64))
  with torch.no_grad():
    return model(
      input_ids=torch.tensor(tokens),
      attention_mask=mask,
      position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
      use_cache=False,
    ).logits.numpy()


def our_logits(loaded, *, left=False):
  module = build_causal(CausalConfig(**loaded.fields), dtype=jnp.float32)
  tokens, mask = inputs(left=left)
  return np.asarray(
    jax.jit(module.apply)(
      {"params": loaded.params}, jnp.asarray(tokens, jnp.int32), mask
    )
  )


def assert_close(ours, theirs, *, left=False):
  """Relative to the largest logit, at real tokens."""
  mask = inputs(left=left)[1]
  error = np.max(np.abs(ours - theirs)[mask]) / np.max(np.abs(theirs[mask]))
  assert error < 1e-5


def assert_same_tensors(one, other):
  """Of two checkpoints, bit for bit."""
  a, b = (
    safetensors.numpy.load_file(d / "model.safetensors") for d in (one, other)
  )
  assert sorted(a) == sorted(b)
  for name, x in a.items():
    assert x.dtype == b[name].dtype, name
    assert x.tobytes() == b[name].tobytes(), name


def export(loaded, path, **settings):
  export_causal(
    path,
    CausalConfig(**loaded.fields),
    loaded.params,
    tokenizer=TokenizerFiles(ids=loaded.special_ids),
    generation=loaded.generation,
    **settings,
  )


def loads(path):
  """Returns the model; every key has to be its own."""
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    path, output_loading_info=True, attn_implementation="eager"
  )
  assert not any(info.values()), info
  return model.eval()


@KINDS
def test_logits_are_those_of_pytorch_and_come_back_bit_for_bit(
  kind, saved, tmp_path
):
  loaded = load_causal(saved)
  expected = torch_logits(reference(kind))
  assert np.std(expected) > 0.1  # or closeness would mean little
  assert_close(our_logits(loaded), expected)
  assert not any("does not know" in note for note in loaded.report.notes)

  export(loaded, tmp_path / "ours")
  again = load_causal(tmp_path / "ours")
  assert again.fields == loaded.fields
  assert again.generation == loaded.generation
  assert again.special_ids == loaded.special_ids
  assert_same_tensors(tmp_path / "ours", saved)
  model = loads(tmp_path / "ours")
  np.testing.assert_array_equal(torch_logits(model), expected)


@pytest.mark.parametrize("kind", ["gemma3_text", "gpt2"])
def test_padding_on_the_left_is_as_in_pytorch(kind, saved):
  expected = torch_logits(reference(kind), left=True)
  assert_close(our_logits(load_causal(saved), left=True), expected, left=True)


def edit_config(path, **changes):
  config = json.loads((path / "config.json").read_text()) | changes
  config = {k: v for k, v in config.items() if v is not ...}
  (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", [
  "llama", "llama, llama3", "llama, linear", "llama, yarn", "gemma3_text"
])  # fmt: skip
def test_the_version_4_spelling_of_rope_means_the_same(kind, saved):
  before = load_causal(saved).fields
  rope = json.loads((saved / "config.json").read_text())["rope_parameters"]
  old = {}
  if kind == "gemma3_text":
    old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope["full_attention"]
  old["rope_theta"] = rope.pop("rope_theta")
  old["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
  edit_config(saved, rope_parameters=..., **old)
  assert load_causal(saved).fields == before
  if kind == "llama, linear":  # older still
    rope["type"] = rope.pop("rope_type")
    edit_config(saved, rope_scaling=rope)
    assert load_causal(saved).fields == before
  assert_close(our_logits(load_causal(saved)), torch_logits(reference(kind)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_without_its_head_is_read_and_old_constants_are_not(
  kind, saved
):
  """openai-community/gpt2: a GPT2Model with its causal masks."""
  before = load_causal(saved)
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  edit_config(saved, tie_word_embeddings=True)
  tensors.pop("lm_head.weight", None)
  prefix, constant = {
    "gpt2": ("transformer.", "h.0.attn.bias"),
    "llama": ("model.", "layers.0.self_attn.rotary_emb.inv_freq"),
  }[kind]
  bare = {name.removeprefix(prefix): x for name, x in tensors.items()}
  bare[constant] = np.ones((1, 1, 20, 20), np.float32)
  safetensors.numpy.save_file(bare, saved / "model.safetensors")
  after = load_causal(saved)
  for part in ("token_embedding", "layer_0", "layer_1", "final_norm"):
    jax.tree.map(
      np.testing.assert_array_equal, before.params[part], after.params[part]
    )
  assert constant in dict(after.report.ignored)


@pytest.mark.parametrize("kind", ["gpt2"])
def test_the_table_of_the_report_has_a_line_for_all_layers(kind, saved):
  table = load_causal(saved).report.table()
  assert "transformer.h.{0..1}.attn.c_attn.weight" in table
  assert "layer_{0..1}/self_attention/value/kernel" in table
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  total = sum(x.size for x in tensors.values())
  assert f"{total:,} parameters in all" in table


@pytest.mark.parametrize("kind", ["gemma3_text"])
def test_shards_are_read_and_written_as_transformers_does(
  kind, saved, tmp_path
):
  reference(kind).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
  assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
  loaded = load_causal(tmp_path / "shards")
  export(loaded, tmp_path / "ours", max_shard_bytes=20_000)
  assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
  np.testing.assert_array_equal(
    torch_logits(loads(tmp_path / "ours")), torch_logits(reference(kind))
  )


def test_what_a_config_leaves_out_is_the_default_of_transformers():
  """Compared with the classes themselves, so that a change is noticed."""
  for model_type, name in {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text", "gpt2": "GPT2",
  }.items():  # fmt: skip
    full = getattr(transformers, f"{name}Config")().to_dict()
    empty = ConfigValues({"model_type": model_type}, "config.json")
    assert read_causal_config(empty) == read_causal_config(
      ConfigValues(full, "config.json")
    ), name


@pytest.mark.parametrize("kind", ["llama"])
def test_it_generates_as_the_checkpoint_did(kind, saved, tmp_path):
  settings = {"do_sample": True, "top_k": 7, "eos_token_id": [2, 5]}
  (saved / "generation_config.json").write_text(json.dumps(settings))
  loaded = load_causal(saved)
  assert loaded.generation == settings
  export(loaded, tmp_path / "ours")
  after = loads(tmp_path / "ours").generation_config
  assert (after.do_sample, after.top_k) == (True, 7)
  assert after.eos_token_id == [2, 5]
  assert after.decoder_start_token_id is None


@pytest.mark.parametrize("kind", ["qwen3, sliding"])
def test_greedy_decoding_with_a_cache_writes_what_pytorch_generates(
  kind, saved
):
  loaded = load_causal(saved)
  module = build_causal(CausalConfig(**loaded.fields), dtype=jnp.float32)
  tokens, mask = inputs(left=True)
  steps = 8
  decoder = RagDecoder(
    module, GenerationSettings(max_new_tokens=steps, pad_token_id=0), "single"
  )
  found = decoder(
    {"generator": loaded.params},
    np.zeros((len(tokens), 1)),
    np.asarray(tokens, np.int32)[:, None],
    mask[:, None],
  ).tokens[:, 0]
  expected = reference(kind).generate(
    torch.tensor(tokens),
    attention_mask=torch.tensor(mask.astype(np.int64)),
    max_new_tokens=steps,
    min_new_tokens=steps,
    do_sample=False,
    pad_token_id=0,
    eos_token_id=None,
  )[:, S:]
  np.testing.assert_array_equal(found, expected.numpy())
