"""config.json of encoders: what is read, what is refused, what is written."""

import dataclasses
import json

import pytest

from rag_jax.config_models import EncoderConfig
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.encoder_configs import encoder_config
from rag_jax.weights.encoder_configs import read_encoder_config
from rag_jax.weights.export import export_encoder
from rag_jax.weights.load import load_encoder


@pytest.mark.parametrize("model_type", ["electra", "xlnet", None, 7])
def test_another_architecture_is_refused_and_the_supported_are_named(
  checkpoints, model_type
):
  path = checkpoints.dpr()
  checkpoints.edit_json(
    path, model_type=model_type, architectures=["RobertaModel"]
  )
  with pytest.raises(
    ValueError,
    match=rf"model_type={model_type!r} \(architectures=\['RobertaModel'\]\),"
    r" which rag_jax does not have\. Supported are, as encoders: dpr .*, bert,"
    r" .*sentence-transformers.*bart, mbart, pegasus, t5 and mt5.*and rag",
  ):
    load_encoder(path)


def test_a_generator_is_no_encoder(checkpoints):
  path = checkpoints.generator(checkpoints.bart)
  with pytest.raises(
    ValueError, match=r"describes model_type='bart'; expected an encoder, one"
  ):
    load_encoder(path)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("hidden_size", "8"),
    ("hidden_size", 0),
    ("num_hidden_layers", 2.0),
    ("num_hidden_layers", True),
    ("layer_norm_eps", "small"),
    ("vocab_size", -3),
    ("projection_dim", -1),
  ],
)
def test_an_impossible_value_is_named(checkpoints, name, value):
  path = checkpoints.dpr()
  checkpoints.edit_json(path, **{name: value})
  with pytest.raises(
    ValueError, match=rf"dpr/config\.json says {name}={value!r}; expected a "
  ):
    load_encoder(path)


def test_heads_that_do_not_divide_the_width_are_named(checkpoints):
  path = checkpoints.dpr()
  checkpoints.edit_json(path, num_attention_heads=3)
  with pytest.raises(
    ValueError, match=r"hidden_size=8, num_attention_heads=3; expected a multi"
  ):
    load_encoder(path)


def test_an_activation_that_we_do_not_have_is_named(checkpoints):
  path = checkpoints.dpr()
  checkpoints.edit_json(path, hidden_act="quick_gelu")
  with pytest.raises(
    ValueError, match=r"hidden_act='quick_gelu'; expected one of gelu, .*relu"
  ):
    load_encoder(path)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("position_embedding_type", "relative_key"),
    ("is_decoder", True),
    ("add_cross_attention", True),
  ],
)
def test_a_bert_that_computes_something_else_is_refused(
  checkpoints, name, value
):
  path = checkpoints.bert()
  checkpoints.edit_json(path, **{name: value})
  with pytest.raises(
    ValueError,
    match=rf"says {name}={value!r}; rag_jax supports only {name}=.*Take",
  ):
    load_encoder(path)


@pytest.mark.parametrize(
  ("theirs", "ours"),
  [
    ("gelu", "gelu"), ("gelu_new", "gelu_new"), ("gelu_fast", "gelu_new"),
    ("gelu_pytorch_tanh", "gelu_new"), ("relu", "relu"), ("swish", "silu"),
    ("silu", "silu"), ("tanh", "tanh"),
  ],
)  # fmt: skip
def test_activations_have_our_names(theirs, ours):
  values = ConfigValues({"model_type": "bert", "hidden_act": theirs}, "c")
  assert read_encoder_config(values, has_pooler=False).activation == ours


FIELDS = EncoderConfig(
  vocab_size=30,
  max_positions=40,
  num_layers=3,
  embed_dim=12,
  num_heads=4,
  mlp_dim=20,
  activation="relu",
  norm_eps=1e-7,
  num_token_types=2,
  pooling="cls",
)


MPNET = {
  "family": "mpnet", "position_offset": 2, "num_token_types": 0,
  "relative_buckets": 32,
}  # fmt: skip
T5 = {
  "family": "t5_encoder", "num_token_types": 0, "max_positions": 0,
  "pooling": "mean", "positions": "none", "embedding_norm": False,
  "norm": "pre", "norm_kind": "rms", "use_bias": False,
  "scale_attention": False, "relative_buckets": 16,
  "relative_max_distance": 50, "head_dim": 5, "dropout": 0.2,
  "attention_dropout": 0.2, "activation_dropout": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
  ("architecture", "changes"),
  [
    ("DPRQuestionEncoder", {"projection_dim": 5}),
    ("DPRContextEncoder", {"num_token_types": 0}),
    ("BertModel", {"pooler": True}),
    ("BertModel", {"question_prompt": "q: ", "title_sep": "\n"}),
    ("BertModel", {"pooler": True, "pooling": "pooler"}),
    ("BertModel", {"num_token_types": 0, "activation": "gelu_new"}),
    (
      "DistilBertModel",
      {"family": "distilbert", "num_token_types": 0, "norm_eps": 1e-12},
    ),
    ("RobertaModel", {"family": "roberta", "position_offset": 4}),
    ("XLMRobertaModel", {"family": "xlm-roberta", "position_offset": 1}),
    ("MPNetModel", MPNET | {"pooler": True}),
    ("MPNetModel", MPNET | {"pooling": "pooler", "pooler": True}),
    ("T5EncoderModel", T5),
    ("T5EncoderModel", T5 | {"gated": True, "activation": "gelu_new"}),
    ("T5EncoderModel", T5 | {"gated": True, "passage_prompt": "p: "}),
  ],
)
@pytest.mark.parametrize("version", [4, 5])
def test_fields_come_back_in_the_spelling_of_both_versions(
  architecture, changes, version
):
  fields = dataclasses.replace(FIELDS, **changes)
  pad = max(fields.position_offset - 1, 0)
  config = encoder_config(fields, architecture, SpecialIds(pad=pad))
  del config["dtype" if version == 4 else "torch_dtype"]
  config = json.loads(json.dumps(config))
  again = read_encoder_config(ConfigValues(config, "c"), has_pooler=True)
  assert again == fields


@pytest.mark.parametrize(
  ("kind", "changes", "problem"),
  [
    ("dpr_question", {"normalize": True}, "normalize=True; expected normalize"),
    ("dpr_context", {"pooling": "mean"}, "pooling='mean'; expected pooling 'c"),
    ("dpr_question", {"pooler": True}, "pooler=True; expected pooler False"),
    ("bert", {"position_offset": 2}, "offset=2; expected position_offset 0."),
    ("distilbert", {}, "num_token_types=2; expected num_token_types 0."),
    (
      "bert",
      {"relative_buckets": 32, "gated": True},
      "gated=True, encoder.relative_buckets=32; expected gated False, relative",
    ),
    ("roberta", {"norm": "pre"}, "encoder.norm='pre', encoder.position_offset"),
    ("bert", {"head_dim": 7}, "head_dim=7; expected head_dim 0 or 4. "),
    ("dpr_question", {"positions": "none"}, "expected positions 'learned'."),
    ("mpnet", MPNET | {"position_offset": 3}, "expected position_offset 2."),
    ("mpnet", MPNET | {"relative_buckets": 16}, "expected relative_buckets 32"),
    (
      "mpnet",
      MPNET | {"relative_max_distance": 64},
      "expected relative_max_distance 128.",
    ),
    ("t5_encoder", T5 | {"use_bias": True}, "expected use_bias False."),
    ("t5_encoder", T5 | {"relative_buckets": 0}, "relative_buckets 32."),
    ("t5_encoder", T5 | {"pooling": "cls"}, "expected pooling 'mean'."),
    ("t5_encoder", T5 | {"pooler": True}, "expected pooler False."),
    (
      "t5_encoder",
      T5 | {"gated": True, "activation": "gelu"},
      "activation='gelu'; expected activation 'gelu_new'.",
    ),
    ("roberta", {}, "position_offset=0; expected position_offset '1 or more'"),
    ("bert", {"truncate_dim": 3}, "truncate_dim=3; expected truncate_dim 0"),
    (
      "dpr_question",
      {"projection_dim": 3, "projection_activation": "tanh"},
      "projection_activation='tanh'; expected projection_activation 'none'",
    ),
    ("bert", {"pooling": "max"}, "pooling='max'; expected pooling 'cls' or"),
    ("bert", {"num_layers": 0}, "num_layers=0; expected num_layers '1 or more"),
    ("bert", {"normalize": True, "projection_dim": 3}, "normalize=True, encod"),
    (
      "sentence_transformers",
      {"pooling": "pooler"},
      "expected pooling cls, mean, max and truncate_dim 0",
    ),
    (
      "sentence_transformers",
      {"pooling": "learned"},
      "has no module for an encoder with encoder.pooling='learned'",
    ),
  ],
)
def test_fields_that_no_class_has_are_named(
  checkpoints, tmp_path, kind, changes, problem
):
  plain = dataclasses.replace(checkpoints.encoder, projection_dim=0)
  fields = dataclasses.replace(plain, **changes)
  known = dataclasses.replace(fields, num_layers=2)
  params = checkpoints.encoder_params(fields=known)
  with pytest.raises(ValueError, match="Choose kind") as e:
    export_encoder(tmp_path / "out", fields, params, kind=kind)
  assert problem in str(e.value)
  assert not (tmp_path / "out").exists()


def test_a_scale_has_no_place_in_bert(checkpoints, tmp_path):
  fields = dataclasses.replace(checkpoints.encoder, projection_dim=0)
  params = checkpoints.encoder_params(fields=fields)
  with pytest.raises(
    ValueError, match=r"no place for a score scale of 2\.5; e"
  ):
    export_encoder(
      tmp_path / "out",
      dataclasses.replace(fields, score_scale=2.5),
      params,
      kind="bert",
    )


def test_positions_after_another_padding_than_the_tokenizers_are_named():
  fields = dataclasses.replace(FIELDS, position_offset=3)
  with pytest.raises(ValueError, match=r"token's id, 1, but encoder.pos.*ed 2"):
    encoder_config(fields, "RobertaModel", SpecialIds(pad=1))


@pytest.mark.parametrize(("pad", "positions"), [(-1, 9), (8, 9), (1, 2)])
def test_positions_that_begin_nowhere_are_named(pad, positions):
  content = {
    "model_type": "roberta",
    "pad_token_id": pad,
    "max_position_embeddings": positions,
  }
  with pytest.raises(
    ValueError, match=f"pad_token_id={pad}, max_position_embeddings={positions}"
  ):
    read_encoder_config(ConfigValues(content, "c"), has_pooler=False)


@pytest.mark.parametrize(
  ("model_type", "name", "value", "problem"),
  [
    ("mpnet", "relative_attention_num_buckets", 16, "num_buckets=32"),
    ("mpnet", "pad_token_id", 0, "supports only pad_token_id=1"),
    ("t5", "is_decoder", True, "supports only is_decoder=False"),
    ("t5", "feed_forward_proj", "twice-gelu", "expected an activation like"),
    ("t5", "feed_forward_proj", "gated-mish", "expected one of gelu"),
    ("t5", "relative_attention_num_buckets", 4, "number from 8"),
    ("t5", "relative_attention_max_distance", 16, "number from 17"),
  ],
)
def test_relative_positions_that_cannot_be_are_refused(
  model_type, name, value, problem
):
  values = ConfigValues({"model_type": model_type, name: value}, "c")
  with pytest.raises(ValueError, match=f"c says {name}=") as e:
    read_encoder_config(values, has_pooler=False)
  assert problem in str(e.value)
