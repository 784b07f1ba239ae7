"""RAG checkpoints of transformers, read and written, against PyTorch.

The reference: tiny random models that `save_pretrained` wrote; with a passage
encoder among the tensors, where it was trained.
"""

import dataclasses
import functools
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.config_models import GeneratorConfig
from rag_jax.models.batch import RagBatch
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.models.rag import RagModel
from rag_jax.models.rag import build_generator
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_rag
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag
from rag_jax.weights.loaded import RagSettings
from rag_jax.weights.saved import SavedModel

pytestmark = pytest.mark.parity

V, B, K = 61, 2, 3
DPR = {
  "vocab_size": V,
  "hidden_size": 16,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "intermediate_size": 24,
  "max_position_embeddings": 12,
  "projection_dim": 6,
}
GENERATORS = {
  "bart": transformers.BartConfig(
    vocab_size=V,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=16,
  ),
  "t5": transformers.T5Config(
    vocab_size=V,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_layers=1,
    num_heads=2,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
  ),
}
CLASSES = {
  "token": transformers.RagTokenForGeneration,
  "sequence": transformers.RagSequenceForGeneration,
}
KINDS = pytest.mark.parametrize(
  ("kind", "name"), [("token", "bart"), ("sequence", "t5")]
)


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.2, generator=generator)
      x += name.endswith("weight") and "norm" in name.lower()


@functools.cache
def reference(kind, name):
  config = transformers.RagConfig.from_question_encoder_generator_configs(
    transformers.DPRConfig(**DPR),
    GENERATORS[name],
    n_docs=K,
    title_sep=" | ",
    doc_sep=" || ",
    max_combined_length=16,
  )
  model = CLASSES[kind](config).eval()
  randomize(model)
  return model


def save_tokenizer(path, size, **special):
  words = [f"w{i}" for i in range(size)]
  inner = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "w0")
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner, **special
  ).save_pretrained(path)


@pytest.fixture
def saved(kind, name, tmp_path):
  path = tmp_path / "theirs"
  reference(kind, name).save_pretrained(path)
  for folder, size in (
    ("question_encoder_tokenizer", V), ("generator_tokenizer", V - 5)
  ):  # fmt: skip
    save_tokenizer(path / folder, size, pad_token="w1", eos_token="w2")
  return path


def inputs():
  rng = np.random.default_rng(0)
  question = rng.integers(3, V, (B, 5))
  context = rng.integers(3, V, (B, K, 9))
  target = rng.integers(3, V, (B, 4))
  docs = rng.normal(size=(B, K, DPR["projection_dim"])).astype(np.float32)
  return question, context, target, docs


def torch_outputs(model):
  """Returns doc_scores [B, K] and logits [B, K, T, V]."""
  question, context, target, docs = inputs()
  start = model.rag.generator.config.decoder_start_token_id
  shifted = np.concatenate([np.full((B, 1), start), target[:, :-1]], axis=1)
  with torch.no_grad():
    embedding = model.rag.question_encoder(torch.tensor(question))[0]
    scores = torch.einsum("br,bkr->bk", embedding, torch.tensor(docs))
    outputs = model(
      context_input_ids=torch.tensor(context.reshape(B * K, -1)),
      context_attention_mask=torch.ones(B * K, context.shape[-1]).long(),
      decoder_input_ids=torch.tensor(shifted),
      doc_scores=scores,
      n_docs=K,
      use_cache=False,
    )
  logits = outputs.logits.reshape(B, K, *outputs.logits.shape[1:])
  return scores.numpy(), logits.numpy()


def our_outputs(loaded):
  question, context, target, docs = inputs()
  encoder = loaded.question_encoder
  module = RagModel(
    question_encoder=RetrieverEncoder(
      EncoderConfig(**encoder.fields), dtype=jnp.float32
    ),
    passage_encoder=None,
    generator=build_generator(
      GeneratorConfig(**loaded.generator.fields),
      vocab_size=0,
      decoder_start_id=-1,
      dtype=jnp.float32,
    ),
  )

  def ids(tokens):
    return jnp.asarray(tokens, jnp.int32)

  outputs = jax.jit(module.apply)(
    {"params": loaded.params},
    RagBatch(
      context_tokens=ids(context),
      context_mask=jnp.ones(context.shape, bool),
      target_tokens=ids(target),
      target_mask=None,
      question_tokens=ids(question),
      question_mask=jnp.ones(question.shape, bool),
      doc_embeddings=jnp.asarray(docs),
    ),
  )
  return outputs.doc_scores, outputs.target_logits


def export(loaded, path, tied=False, **changes):
  passage = loaded.passage_encoder
  export_rag(
    path,
    SavedModel(
      origin="",
      params=loaded.params,
      kind="rag_token",
      encoder=EncoderConfig(tied=tied, **loaded.question_encoder.fields),
      passage_encoder=passage and EncoderConfig(**passage.fields),
      generator=GeneratorConfig(**loaded.generator.fields),
      settings=dataclasses.replace(loaded.settings, **changes),
      question_tokenizer=TokenizerFiles(
        loaded.question_encoder.tokenizer, loaded.question_encoder.special_ids
      ),
      generator_tokenizer=TokenizerFiles(
        loaded.generator.tokenizer, loaded.generator.special_ids
      ),
      generation=loaded.generator.generation,
    ),
  )


def assert_same_params(one, other):
  a, b = (flax.traverse_util.flatten_dict(x, sep="/") for x in (one, other))
  assert sorted(a) == sorted(b)
  for path, x in a.items():
    assert np.asarray(x).tobytes() == np.asarray(b[path]).tobytes(), path


@KINDS
def test_numbers_are_those_of_pytorch_and_come_back_bit_for_bit(
  kind, name, saved, tmp_path
):
  loaded = load_rag(saved)
  model = reference(kind, name)
  for ours, theirs in zip(
    our_outputs(loaded), torch_outputs(model), strict=True
  ):
    assert np.std(theirs) > 0.1  # or closeness would mean little
    np.testing.assert_allclose(
      ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max()
    )
  assert loaded.settings == RagSettings(
    kind=kind, n_docs=K, max_combined_length=16, title_sep=" | ",
    doc_sep=" || ",
  )  # fmt: skip
  assert loaded.passage_encoder is None

  export(loaded, tmp_path / "ours")
  written, info = CLASSES[kind].from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(info.values()), info
  for got, want in zip(
    torch_outputs(written.eval()), torch_outputs(model), strict=True
  ):
    np.testing.assert_array_equal(got, want)
  a, b = (
    safetensors.numpy.load_file(path / "model.safetensors")
    for path in (saved, tmp_path / "ours")
  )
  assert {k: x.tobytes() for k, x in a.items()} == {
    k: x.tobytes() for k, x in b.items()
  }
  again = load_rag(tmp_path / "ours")
  assert again.settings == loaded.settings
  assert again.generator.generation == loaded.generator.generation
  assert again.passage_encoder is None
  assert_same_params(again.params, loaded.params)


@pytest.mark.parametrize(("kind", "name"), [("token", "bart")])
def test_a_tied_encoder_is_written_for_passages_too(
  kind, name, saved, tmp_path
):
  loaded = load_rag(saved)
  export(loaded, tmp_path / "ours", tied=True)
  again = load_rag(tmp_path / "ours")
  assert again.tied
  assert_same_params(again.params, loaded.params)
  tokens = torch.tensor(inputs()[0])
  passages = transformers.DPRContextEncoder.from_pretrained(
    tmp_path / "ours/ctx_encoder"
  )
  questions = reference(kind, name).rag.question_encoder
  with torch.no_grad():
    assert torch.equal(
      passages.eval()(tokens).pooler_output, questions(tokens).pooler_output
    )
  # The next export has no encoder for passages, and takes the old one away.
  export(loaded, tmp_path / "ours")
  assert load_rag(tmp_path / "ours").passage_encoder is None


@pytest.mark.parametrize(("kind", "name"), [("token", "bart")])
def test_either_kind_is_exported_as_the_other(kind, name, saved, tmp_path):
  export(load_rag(saved), tmp_path / "ours", kind="sequence")
  model, info = CLASSES["sequence"].from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(info.values()), info
  assert load_rag(tmp_path / "ours").settings.kind == "sequence"
  for got, want in zip(
    torch_outputs(model.eval()), torch_outputs(reference(kind, name)),
    strict=True,
  ):  # fmt: skip
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("kind", "name"), [("token", "bart")])
def test_a_passage_encoder_is_read_and_gets_its_own_folder(
  kind, name, saved, tmp_path
):
  with pytest.raises(ValueError, match="holds no passage encoder"):
    load_encoder(saved, "passage")
  passage = transformers.DPRContextEncoder(transformers.DPRConfig(**DPR))
  randomize(passage)
  with torch.no_grad():
    passage.ctx_encoder.encode_proj.bias.fill_(3.0)
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  for k, x in passage.state_dict().items():
    tensors[f"rag.ctx_encoder.{k}"] = x.numpy()
  safetensors.numpy.save_file(tensors, saved / "model.safetensors")

  loaded = load_rag(saved)
  assert not loaded.tied
  alone = load_encoder(saved, "passage")
  assert_same_params(alone.params, loaded.params["passage_encoder"])
  np.testing.assert_array_equal(alone.params["projection"]["bias"], 3.0)
  export(loaded, tmp_path / "ours")
  again = load_rag(tmp_path / "ours")
  assert_same_params(again.params, loaded.params)
  folder = tmp_path / "ours/ctx_encoder"
  written, info = transformers.DPRContextEncoder.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  tokens = torch.tensor(inputs()[0])
  assert torch.equal(
    written.eval()(tokens).pooler_output, passage.eval()(tokens).pooler_output
  )
  assert_same_params(
    load_encoder(tmp_path / "ours", "passage").params, alone.params
  )


@pytest.mark.parametrize(("kind", "name"), [("sequence", "t5")])
def test_a_rag_serves_as_encoder_and_as_generator(kind, name, saved):
  loaded = load_rag(saved)
  encoder, generator = load_encoder(saved, "question"), load_generator(saved)
  assert_same_params(encoder.params, loaded.params["question_encoder"])
  assert_same_params(generator.params, loaded.params["generator"])
  assert encoder.tokenizer.endswith("question_encoder_tokenizer")
  assert generator.tokenizer.endswith("generator_tokenizer")
  assert "RAG-Sequence" in generator.report.table()


@pytest.mark.parametrize(("kind", "name"), [("token", "bart")])
def test_a_rag_of_version_4_is_read(kind, name, saved):
  """facebook/rag-token-nq: tied copies, positions, poolers, old settings."""
  loaded = load_rag(saved)
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  bart, dpr = "rag.generator.", "rag.question_encoder.question_encoder."
  shared = tensors[f"{bart}model.shared.weight"]
  for copy in ("lm_head", "model.encoder.embed_tokens"):
    tensors[f"{bart}{copy}.weight"] = shared
  d = DPR["hidden_size"]
  tensors[f"{dpr}bert_model.embeddings.position_ids"] = np.arange(12)[None]
  tensors[f"{dpr}bert_model.pooler.dense.weight"] = np.ones((d, d), np.float32)
  safetensors.numpy.save_file(tensors, saved / "model.safetensors")
  (saved / "generation_config.json").unlink()
  config = json.loads((saved / "config.json").read_text())
  config["torch_dtype"] = config.pop("dtype")
  config["generator"] |= {"num_beams": 4, "prefix": " ", "min_length": 2}
  (saved / "config.json").write_text(json.dumps(config))
  old = load_rag(saved)
  assert_same_params(old.params, loaded.params)
  assert old.settings.prefix == " "
  assert old.generator.generation == {
    "bos_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 2,
    "forced_eos_token_id": 2, "min_length": 2, "num_beams": 4,
    "pad_token_id": 1,
  }  # fmt: skip
  assert len(old.report.ignored) == 4


@pytest.mark.parametrize(("kind", "name"), [("token", "bart")])
def test_our_special_ids_reach_the_generator(kind, name, saved, tmp_path):
  loaded = load_rag(saved)
  generator = dataclasses.replace(
    loaded.generator, special_ids=SpecialIds(pad=7, bos=8, eos=9), generation={}
  )
  loaded = dataclasses.replace(loaded, generator=generator)
  loaded.generator.fields["decoder_start_id"] = -1
  export(loaded, tmp_path / "ours")
  model = CLASSES["token"].from_pretrained(tmp_path / "ours")
  config, generation = model.config.generator, model.generation_config
  assert (config.pad_token_id, config.eos_token_id) == (7, 9)
  assert config.decoder_start_token_id == 9
  assert generation.decoder_start_token_id == 9
  assert generation.forced_eos_token_id is None
