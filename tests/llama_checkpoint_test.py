"""benchmarks/llama_checkpoint.py: transformers reads what we write as the same model."""

import dataclasses

import numpy as np
import pytest
import tiny_model

from benchmarks.llama_checkpoint import write_llama_checkpoint
from lora_jax.transformer import Transformer

torch = pytest.importorskip('torch', reason='the reference installs on Python 3.11')
transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize('tied', [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
  config = dataclasses.replace(tiny_model.CONFIG, tie_embeddings=tied)
  params = tiny_model.params(config)
  write_llama_checkpoint(config, params, tmp_path / 'base')

  tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
  model = Transformer(config)
  hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
  logits_BTV = model.apply({'params': params}, hidden_BTD, method='head')
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype='float32')
  with torch.no_grad():
    expected_BTV = peer(torch.from_numpy(tokens_BT)).logits.numpy()
  np.testing.assert_allclose(logits_BTV, expected_BTV, atol=1e-4)
