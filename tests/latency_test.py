import tiny_model
from tiny_model import MODEL, RANK

from lora_jax import latency, lora
from lora_jax.config import LoraConfig


def test_the_base_and_each_target_set_are_timed_against_the_base():
  params = tiny_model.params()
  ranks = {('o_proj', 'equal_rank'): RANK, ('o_proj', 'equal_parameters'): 3 * RANK}
  sets = {
    of: (lora.resolve(of[0], params), LoraConfig(rank=rank, dora=True))
    for of, rank in ranks.items()
  }
  held = latency.measure(MODEL, params, sets, turns=3)
  assert latency.timed(held) == [*sets]
  times, others = held['targets'], held['arms']['equal_parameters']
  assert list(times) == list(others) == ['base', 'o_proj']
  assert times['base'] == others['base']
  for work in ('prefill', 'decode'):
    for name, numbers in [*times.items(), *others.items()]:
      assert numbers[f'{work}_ms'] > 0
      low, middle, high = (numbers[f'{work}_ratio{end}'] for end in ('_low', '', '_high'))
      assert low <= middle <= high
      assert name != 'base' or (low, middle, high) == (1, 1, 1)
