"""Shapes of well-known bases, so that a plan needs no download.

Figures are those of the published config.json of each.
"""

import dataclasses

from lora_jax.config import ModelConfig, RopeScaling

_LLAMA_3 = {'vocab_size': 128_256, 'rope_theta': 500_000.0, 'tie_embeddings': False}

SHAPES = {
  'smollm2-135m': ModelConfig(
    vocab_size=49_152,
    num_layers=30,
    model_dim=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_dim=1536,
    max_length=8192,
    rope_theta=100_000.0,
  ),
  'qwen2.5-1.5b': ModelConfig(
    vocab_size=151_936,
    num_layers=28,
    model_dim=1536,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    mlp_dim=8960,
    max_length=32_768,
    rope_theta=1_000_000.0,
    norm_eps=1e-6,
    qkv_bias=True,
  ),
  'llama-3-8b': ModelConfig(
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=14_336,
    max_length=8192,
    **_LLAMA_3,
  ),
  'llama-3-70b': ModelConfig(
    num_layers=80,
    model_dim=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=28_672,
    max_length=8192,
    **_LLAMA_3,
  ),
}
SHAPES['llama-3.1-8b'] = dataclasses.replace(
  SHAPES['llama-3-8b'],
  max_length=131_072,
  rope_scaling=RopeScaling('llama3', 8.0, 8192, 1.0, 4.0),
)
