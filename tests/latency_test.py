import tiny_model
from tiny_model import MODEL, RANK

from lora_jax import latency, lora
from lora_jax.config import LoraConfig


def test_the_base_and_each_target_set_are_timed_against_the_base():
  params = tiny_model.params()
  sets = {targets: lora.resolve(targets, params) for targets in ('o_proj', 'all')}
  times = latency.measure(MODEL, params, sets, LoraConfig(rank=RANK, dora=True), turns=3)
  assert list(times) == ['base', 'o_proj', 'all']
  for work in ('prefill', 'decode'):
    for name, numbers in times.items():
      assert numbers[f'{work}_ms'] > 0
      low, middle, high = (numbers[f'{work}_ratio{end}'] for end in ('_low', '', '_high'))
      assert low <= middle <= high
      assert name != 'base' or (low, middle, high) == (1, 1, 1)
