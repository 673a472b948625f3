import tiny_model
from tiny_model import MODEL, RANK

from lora_jax import latency, lora
from lora_jax.config import LoraConfig


def test_the_base_and_each_target_set_are_timed_against_the_base():
  params = tiny_model.params()
  ranks = {'o_proj': 3 * RANK, 'all': RANK}
  sets = {
    targets: (lora.resolve(targets, params), LoraConfig(rank=rank, dora=True))
    for targets, rank in ranks.items()
  }
  base, times = latency.measure(MODEL, params, sets, turns=3)
  assert list(times) == ['o_proj', 'all']
  for work in ('prefill', 'decode'):
    for name, numbers in {'base': base, **times}.items():
      assert numbers[f'{work}_ms'] > 0
      low, middle, high = (numbers[f'{work}_ratio{end}'] for end in ('_low', '', '_high'))
      assert low <= middle <= high
      assert name != 'base' or (low, middle, high) == (1, 1, 1)
