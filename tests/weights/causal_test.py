"""Decoder-only checkpoints: what is read, what is refused, what is written.

tests/parity/causal_test.py compares what is read with PyTorch.
"""

import dataclasses
import json
import pathlib
import time

from causal_models import CONFIGS
import jax
import numpy as np
import pytest

from rag_jax.api.configs import load_config
from rag_jax.config import Config
from rag_jax.config_models import CausalConfig
from rag_jax.config_rules import validate
from rag_jax.models.rag import build_model
from rag_jax.serving.pipeline import RagPipeline
from rag_jax.weights.brought import SAFE_LR
from rag_jax.weights.causal_configs import causal_config
from rag_jax.weights.causal_configs import causal_type
from rag_jax.weights.causal_configs import explicit_causal
from rag_jax.weights.causal_configs import read_causal_config
from rag_jax.weights.causal_configs import read_causal_ids
from rag_jax.weights.config_values import ConfigValues
from rag_jax.weights.config_values import SpecialIds
from rag_jax.weights.convert import export_model
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.init_from import load_initial
from rag_jax.weights.load import checkpoint_kind
from rag_jax.weights.load import load_causal
from rag_jax.weights.load import load_checkpoint
from rag_jax.weights.load import load_encoder
from rag_jax.weights.load import load_generator
from rag_jax.weights.load import load_rag

ROOT = pathlib.Path(__file__).parents[2]
IDS = SpecialIds(pad=1, bos=0, eos=2)
GENERATION = {
  "do_sample": True, "max_length": 9, "min_new_tokens": 2, "num_beams": 2,
  "eos_token_id": [2, 5],
}  # fmt: skip
KINDS = pytest.mark.parametrize("kind", CONFIGS)
SCALINGS = {
  "none": {},
  "linear": {"rope_factor": 3.0},
  "llama3": {
    "rope_factor": 8.0, "rope_original_positions": 33,
    "rope_low_freq_factor": 1.5, "rope_high_freq_factor": 5.0,
  },
  "yarn": {
    "rope_factor": 4.0, "rope_original_positions": 16, "rope_beta_fast": 20.0,
    "rope_beta_slow": 2.0, "rope_truncate": False,
    "rope_attention_factor": 1.25,
  },
}  # fmt: skip


def again(fields, version=5):
  """Returns what is read of what is written, as one version spells it."""
  config = causal_config(fields, causal_type(fields), IDS)
  del config["dtype" if version == 4 else "torch_dtype"]
  for name in (
    ("rope_parameters",)
    if version == 4
    else ("rope_theta", "rope_scaling", "rope_local_base_freq")
  ):
    config.pop(name, None)
  config = json.loads(json.dumps(config))
  return read_causal_config(ConfigValues(config, "c"))


@KINDS
@pytest.mark.parametrize("version", [4, 5])
def test_fields_come_back_in_the_spelling_of_both_versions(kind, version):
  fields = CONFIGS[kind]
  assert causal_type(fields) == kind
  assert explicit_causal(again(fields, version)) == explicit_causal(fields)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("version", [4, 5])
def test_scalings_of_rope_come_back(kind, scaling, version):
  fields = dataclasses.replace(
    CONFIGS[kind], rope_factor=1.0, rope_scaling="none"
  )
  fields = dataclasses.replace(
    fields, rope_scaling=scaling, **SCALINGS[scaling]
  )
  assert explicit_causal(again(fields, version)) == explicit_causal(fields)


def read(model_type="llama", **values):
  return read_causal_config(
    ConfigValues({"model_type": model_type} | values, "c")
  )


def test_null_means_none_also_where_the_class_has_a_default():
  fields = read(
    "gemma2",
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    layer_types=["full_attention"] * 26,
    sliding_window=None,
  )
  assert (fields.attention_soft_cap, fields.logits_soft_cap) == (0.0, 0.0)
  assert fields.sliding_window == 0
  assert read("qwen2", num_key_value_heads=None).num_kv_heads == 32
  values = {
    "model_type": "gemma2",
    "pad_token_id": None,
    "eos_token_id": [4, 5],
  }
  ids = read_causal_ids(ConfigValues(values, "c"))
  assert ids == SpecialIds(pad=-1, bos=2, eos=4)


def test_layers_slide_as_the_older_fields_say():
  assert read("gemma2").sliding_layers == tuple(range(0, 26, 2))
  assert read(
    "gemma3_text", num_hidden_layers=7, sliding_window_pattern=3
  ).sliding_layers == (0, 1, 3, 4, 6)
  qwen = {"num_hidden_layers": 4, "max_window_layers": 2, "sliding_window": 9}
  assert read("qwen3", **qwen).sliding_layers == ()
  fields = read("qwen3", **qwen, use_sliding_window=True)
  assert (fields.sliding_layers, fields.sliding_window) == ((2, 3), 9)


def test_yarn_has_the_attention_factor_of_its_paper_or_of_deepseek():
  def factor(**rope):
    rope = {"rope_type": "yarn", "factor": 8.0} | rope
    return read(rope_parameters=rope).rope_attention_factor

  assert factor() == pytest.approx(0.1 * np.log(8) + 1)
  assert factor(attention_factor=1.5) == 1.5
  assert factor(mscale=2.0, mscale_all_dim=1.0) == pytest.approx(
    (0.2 * np.log(8) + 1) / (0.1 * np.log(8) + 1)
  )
  rope = {"rope_type": "yarn", "original_max_position_embeddings": 512}
  assert read(rope_parameters=rope).rope_factor == 4.0  # 2048 / 512


@pytest.mark.parametrize(
  ("model_type", "values", "message"),
  [
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic'"),
    ("llama", {"rope_scaling": {"type": "longrope"}}, "says rope_type='longro"),
    ("llama", {"rope_parameters": {"mrope_section": [1]}}, "has 'mrope_sectio"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "factor=None; expected a"),
    ("llama", {"rope_theta": 0}, "rope_theta=0; expected a number above 0"),
    ("llama", {"rope_theta": "x"}, "rope_theta='x'; expected a number"),
    (
      "llama",
      {"rope_parameters": []},
      r"rope_parameters=\[\]; expected an obj",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5; rag"),
    (
      "llama",
      {"rope_parameters": {"partial_rotary_factor": 0.5}},
      "partial_rotary_factor=0.5; rag_jax supports only",
    ),
    ("llama", {"num_key_value_heads": 5}, "num_kv_heads=5"),
    (
      "llama",
      {"num_attention_heads": 10**400},
      "heads=1000.*expected a whole number",
    ),
    ("llama", {"head_dim": 7}, "head_dim=7 must be even"),
    ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2'; expected one of"),
    ("llama", {"is_encoder_decoder": True}, "supports only is_encoder_decoder"),
    ("llama", {"per_layer_config": {"0": {}}}, "says per_layer_config="),
    ("llama", {"rms_norm_eps": float("nan")}, "expected a finite number"),
    ("qwen2", {"layer_types": ["conv"] * 32}, "each sliding_attention or full"),
    ("qwen2", {"layer_types": [[]] * 32}, "a list of 32, each sliding"),
    ("qwen2", {"layer_types": ["full_attention"]}, "a list of 32"),
    (
      "qwen2",
      {"layer_types": ["sliding_attention"] * 32},
      "sliding layers without a sliding_window",
    ),
    ("gemma2", {"use_bidirectional_attention": True}, "supports only use_bidi"),
    ("gemma2", {"final_logit_softcapping": 0.0}, "softcapping=0.0; expected"),
    (
      "gemma2",
      {"attn_logit_softcapping": -1.0},
      "expected a number above 0, o",
    ),
    (
      "gemma3_text",
      {"attn_logit_softcapping": 5.0},
      "softcapping=5.0; rag_jax",
    ),
    (
      "gemma3_text",
      {"rope_parameters": {"rope_theta": 1e4}},
      "has 'rope_theta' for RoPE",
    ),
    (
      "gemma3_text",
      {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
      "says rope_type='yarn'; rag_jax supports only rope_type='default'",
    ),
    ("gpt2", {"n_head": 7}, "n_embd=768, n_head=7; expected a multiple"),
    ("gpt2", {"add_cross_attention": True}, "supports only add_cross_attentio"),
    (
      "gpt2",
      {"scale_attn_by_inverse_layer_idx": True},
      "supports only scale_attn_by_inverse_layer_idx=False",
    ),
    ("gpt2", {"n_positions": 2**31}, "n_positions=2147483648; expected a whol"),
    ("gemma3", {}, "model_type='gemma3' .* which rag_jax does not have"),
  ],
)
def test_what_cannot_be_computed_is_refused(model_type, values, message):
  with pytest.raises(ValueError, match=message):
    read(model_type, **values)


@pytest.mark.parametrize(
  ("kind", "changes", "nearest", "problem"),
  [
    ("qwen3", {"qkv_bias": True, "use_bias": True}, "llama", "out_bias=False,"),
    ("llama", {"logits_soft_cap": 9.0}, "llama", "soft_cap=9.0, expected 0.0"),
    ("llama", {"num_heads": 5, "num_kv_heads": 5}, "llama", "a divisor of emb"),
    ("gpt2", {"num_kv_heads": 2}, "gpt2", "num_kv_heads=2, head_dim=6, expec"),
    ("gpt2", {"norm_kind": "rms"}, "gpt2", "norm_kind='rms', expected 'layer'"),
    ("qwen2", {"qk_norm": True}, "qwen2", "qk_norm=True, expected False"),
  ],
)
def test_fields_that_no_class_has_are_named(kind, changes, nearest, problem):
  fields = dataclasses.replace(CONFIGS[kind], **changes)
  with pytest.raises(ValueError, match=r"No model of .* nearest is") as error:
    causal_type(fields)
  assert f"nearest is {nearest}, but:" in str(error.value)
  assert problem in str(error.value)


@pytest.mark.parametrize(
  ("kind", "name"), [("gemma3_text", "num_hidden_layers"), ("gpt2", "n_layer")]
)
def test_layers_are_compared_with_the_tensors_before_they_are_counted(
  checkpoints, kind, name
):
  path = checkpoints.causal(kind)
  for number in (2**31 - 1, 10_000):
    checkpoints.edit_json(path, **{name: number})
    start = time.monotonic()
    with pytest.raises(
      ValueError, match=f"there are {number} layers .* tensor"
    ):
      load_causal(path)
    assert time.monotonic() - start < 10


def test_damage_is_noticed(checkpoints):
  path = checkpoints.causal("gpt2")
  file = path / "model.safetensors"
  content = bytearray(file.read_bytes())
  content[-3] ^= 1
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r"model\.safetensors"):
    load_causal(path)
  (path / "manifest.json").unlink()
  file.write_bytes(content[:-40])
  with pytest.raises(ValueError, match=r"cannot be read .* it was cut off"):
    load_causal(path)


@pytest.mark.parametrize(
  ("kind", "edit", "message"),
  [
    (
      "gpt2",
      lambda x: x | {"transformer.h.0.attn.c_attn.weight": np.zeros((24, 48),
                     np.float32)},
      r"c_attn\.weight is \[24, 48\], expected \[24, 72\] for our layer_0",
    ),
    (
      "gemma2",
      lambda x: x | {"lm_head.weight": x["model.embed_tokens.weight"] + 1},
      "lm_head.weight differs from model.embed_tokens.weight, its copy",
    ),
    (
      "llama",
      lambda x: {k: v for k, v in x.items() if k != "lm_head.weight"},
      "missing: lm_head.weight",
    ),
    (
      "llama",
      lambda x: x | {"model.layers.0.self_attn.q_norm.weight": np.ones(6)},
      "unknown: model.layers.0.self_attn.q_norm.weight",
    ),
  ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(checkpoints, kind, edit, message):
  path = checkpoints.causal(kind)
  checkpoints.edit_tensors(path, edit)
  with pytest.raises(ValueError, match=message):
    load_causal(path)


def test_the_table_again_as_the_head_is_ignored(checkpoints):
  path = checkpoints.causal("gemma2")
  checkpoints.edit_tensors(
    path, lambda x: x | {"lm_head.weight": x["model.embed_tokens.weight"]}
  )
  loaded = load_causal(path)
  assert (
    "lm_head.weight",
    "the embedding table again",
  ) in loaded.report.ignored


def test_a_decoder_only_checkpoint_is_no_other_and_the_reverse(
  checkpoints, tmp_path
):
  causal, bart = checkpoints.causal(), checkpoints.generator(checkpoints.bart)
  assert checkpoint_kind(causal) == "llama"
  import_checkpoint(causal, tmp_path / "ours")
  import_checkpoint(bart, tmp_path / "bart")
  for load, what in (
    (load_generator, "a generator with an encoder, one of bart"),
    (load_rag, "retriever and generator together"),
    (load_encoder, "an encoder, one of"),
  ):
    with pytest.raises(
      ValueError, match=f"describes model_type='llama'; expected {what}"
    ):
      load(causal)
    with pytest.raises(ValueError, match=r"of kind 'causal', without an? "):
      load(tmp_path / "ours")
  with pytest.raises(
    ValueError, match="model_type='bart'; expected a decoder-only generator, on"
  ):
    load_causal(bart)
  with pytest.raises(
    ValueError, match="kind 'generator', without a decoder-only generator; exp"
  ):
    load_causal(tmp_path / "bart")
  with pytest.raises(ValueError, match="cannot be exported as kind 'causal'"):
    export_model(tmp_path / "bart", tmp_path / "out", "causal")


@pytest.mark.parametrize("ours", [False, True])
def test_a_run_starts_from_a_decoder_only_generator(
  checkpoints, tmp_path, ours
):
  path = checkpoints.causal("gemma2", generation=GENERATION)
  expected = load_causal(path)
  if ours:
    import_checkpoint(path, tmp_path / "ours")
    path = tmp_path / "ours"
  config = Config()
  config.generator.init_from = str(path)
  config.tokenizer.path = "given, so that the weights need none"
  config.data.target_length, config.data.context_length = 3, 20
  resolved, initial = load_initial(config)
  assert resolved.generator.kind == "causal"
  fields = dataclasses.asdict(resolved.causal)
  assert fields == expected.fields | {
    "sliding_layers": tuple(expected.fields["sliding_layers"])
  }
  jax.tree.map(
    np.testing.assert_array_equal, initial.params["generator"], expected.params
  )
  assert resolved.data.context_style == "prompt"
  assert resolved.optimizer.peak_lr == SAFE_LR
  # Lengths are the run's: there, they count the prompt.
  assert json.loads(resolved.decoding.generation_config) == {
    "bos_token_id": 0, "do_sample": True, "eos_token_id": [2, 5],
    "pad_token_id": 1,
  }  # fmt: skip
  assert resolved.decoding.num_beams == 2
  # What was resolved describes the model completely.
  again = validate(dataclasses.replace(resolved, seed=1))
  model = build_model(again, vocab_size=0, decoder_start_id=0)
  assert model.generator.config == CausalConfig(**fields)


@pytest.mark.parametrize("name", ["quickstart", "hf_finetune"])
def test_a_config_for_an_encoder_decoder_takes_a_decoder_only_one(
  checkpoints, name
):
  config = load_config(ROOT / "configs" / f"{name}.py")
  by_file = config.generator.init_from
  config.generator.init_from = str(checkpoints.causal())
  config.encoder.init_from = config.encoder.passage_init_from = ""
  config.encoder.tied = config.encoder.train_passage_encoder = True
  config.tokenizer.path = "given"
  config.data.target_length, config.data.context_length = 3, 20
  resolved, _ = load_initial(config, {"generator.init_from": by_file})
  assert resolved.generator.kind == "causal"
  assert not resolved.generator.pointer
  assert not resolved.warmup.num_steps
  # A file that names a checkpoint keeps its own contexts.
  style = {"quickstart": "prompt", "hf_finetune": "rag"}[name]
  assert resolved.data.context_style == style


def test_a_decoder_only_generator_alone_is_no_rag(checkpoints, tmp_path):
  path = checkpoints.causal()
  import_checkpoint(path, tmp_path / "ours")
  for where in (path, tmp_path / "ours"):
    with pytest.raises(
      ValueError, match="expected retriever and generator toget"
    ):
      load_initial(Config(init_from=str(where)))
    with pytest.raises(ValueError, match=r"expected|without"):
      RagPipeline.from_checkpoint(str(where), "world_facts")


def test_the_shape_of_a_checkpoint_cannot_be_chosen(checkpoints):
  config = Config()
  config.generator.init_from = str(checkpoints.causal())
  config.tokenizer.path = "given"
  config.causal.num_layers = 7
  with pytest.raises(
    ValueError, match=r"causal.num_layers=7, but the checkpoint has 2"
  ):
    load_initial(config, {"causal.num_layers": 2, "generator.init_from": ""})


def test_the_generator_of_a_rag_needs_an_encoder(checkpoints):
  path = checkpoints.rag()
  config = json.loads((path / "config.json").read_text())
  part = config["generator"] | {"model_type": "llama"}
  checkpoints.edit_json(path, generator=part)
  with pytest.raises(ValueError, match=r"'llama'; expected a generator of RAG"):
    load_rag(path)


def test_what_is_loaded_is_the_same_from_either_directory(
  checkpoints, tmp_path
):
  path = checkpoints.causal("gemma2", generation={"top_k": 4})
  import_checkpoint(path, tmp_path / "ours", origin="hf:org/name")
  one, other = load_checkpoint(path), load_checkpoint(tmp_path / "ours")
  assert one.fields == other.fields
  assert CausalConfig(**one.fields) == CausalConfig(**other.fields)
  assert checkpoints.flat(one.params) == checkpoints.flat(other.params)
  assert one.special_ids == other.special_ids == checkpoints.ids
  assert one.generation == other.generation
  assert one.generation["top_k"] == 4
  assert "decoder_start_token_id" not in one.generation


def test_a_chat_template_is_copied_along(checkpoints, tmp_path):
  path = checkpoints.causal()
  (path / "chat_template.jinja").write_text("{{ messages }}")
  (path / "manifest.json").unlink()
  import_checkpoint(path, tmp_path / "ours")
  export_model(tmp_path / "ours", tmp_path / "out")
  copied = tmp_path / "out/chat_template.jinja"
  assert copied.read_text() == "{{ messages }}"
