"""benchmarks/llama_checkpoint.py: transformers reads what we write as the same model."""

import jax
import numpy as np
import pytest

from benchmarks.llama_checkpoint import write_llama_checkpoint
from lora_jax.config import ModelConfig
from lora_jax.transformer import Transformer, init_params

torch = pytest.importorskip('torch', reason='the reference installs on Python 3.11')
transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize('tied', [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
  config = ModelConfig(
    vocab_size=53,
    num_layers=3,
    model_dim=24,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=40,
    max_length=32,
    rope_theta=500.0,
    tie_embeddings=tied,
  )
  # Shifted, so that the scales of the norms are not all one.
  noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
  params = jax.tree.map(noise, init_params(config, jax.random.key(0)))
  write_llama_checkpoint(config, params, tmp_path / 'base')

  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
  model = Transformer(config)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  logits_BTV = model.apply({'params': params}, hidden_BTD, method='head')
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype='float32')
  with torch.no_grad():
    expected_BTV = peer(torch.from_numpy(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4)
