"""LoRA target-module selection in JAX: train, score, time and compare adapters.

The idea, in one breath: a kernel is anything `lora_jax.kernels.dot` can multiply
by; an adapter is a sparse mirror of the parameter tree; LoRA is the tree transform
that puts one into the other (`lora_jax.lora.attach`).
"""

__version__ = '0.1.0'
