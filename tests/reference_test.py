"""Against transformers and PEFT, which install on Python 3.11 alone."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora
from lora_jax.data import tasks
from lora_jax.data.encode import encode_prompt
from lora_jax.generate import generate
from lora_jax.hub import bases, huggingface
from lora_jax.transformer import Transformer

torch = pytest.importorskip('torch', reason='the references install on Python 3.11')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')

SMOLLM2 = 'smollm2-135m-instruct'


def peer_of(config, params, directory):
  huggingface.save(directory, config, params, dtype='float32')
  return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype='float32').eval()


def peer_logits(peer, tokens_BT):
  with torch.no_grad():
    return peer(torch.from_numpy(np.array(tokens_BT, np.int64))).logits.numpy()


def peer_greedy(peer, prompt, count):
  ids = torch.tensor([prompt])
  with torch.no_grad():
    out = peer.generate(
      ids,
      attention_mask=torch.ones_like(ids),
      max_new_tokens=count,
      do_sample=False,
      eos_token_id=None,
      pad_token_id=0,
    )
  return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
  'changes',
  [
    {'num_heads': 9, 'num_kv_heads': 3, 'model_dim': 36},
    {'num_heads': 5, 'num_kv_heads': 1, 'model_dim': 20, 'tie_embeddings': False},
    {'num_heads': 7, 'num_kv_heads': 7, 'model_dim': 28, 'num_layers': 1, 'rope_theta': 1e6},
    {'norm_eps': 1e-2},
  ],
)
def test_random_llamas(tmp_path, changes):
  config = dataclasses.replace(tiny_model.CONFIG, **changes)
  params = tiny_model.params(config)
  peer = peer_of(config, params, tmp_path)
  tokens_BT = tiny_model.tokens(3, 40)
  ours = tiny_model.logits(Transformer(config), params, tokens_BT)
  np.testing.assert_allclose(ours, peer_logits(peer, tokens_BT), atol=1e-4)
  greedy = generate(Transformer(config), params, tokens_BT[:2], jnp.asarray([40, 11]), 12, -1)
  for row, length in ((0, 40), (1, 11)):
    assert greedy[row].tolist() == peer_greedy(peer, tokens_BT[row, :length].tolist(), 12)


PEFT_NAMES = {'attn': 'self_attn', 'mlp': 'mlp'}


@pytest.mark.parametrize('targets', ['o_proj', 'qkv', 'o_proj,fc2', 'all'])
def test_adapters_equal_pefts_in_value_and_gradient(tmp_path, targets):
  config, params = tiny_model.CONFIG, tiny_model.params()
  peer = peer_of(config, params, tmp_path)
  paths = lora.resolve(targets, params)
  settings = peft.LoraConfig(
    r=tiny_model.RANK,
    lora_alpha=tiny_model.RANK * tiny_model.SCALE,
    target_modules=[path.rsplit('/', 1)[-1] for path in paths],
    init_lora_weights=False,
    task_type='CAUSAL_LM',
  )
  torch.manual_seed(0)
  with warnings.catch_warnings():
    # PEFT reads a name that transformers is about to drop.
    warnings.simplefilter('ignore', FutureWarning)
    tuned = peft.get_peft_model(peer, settings)

  def theirs(path, which, layer):
    _, block, module = path.split('/')
    module = f'layers.{layer}.{PEFT_NAMES[block]}.{module}.lora_{which}.default'
    return tuned.get_parameter(f'base_model.model.model.{module}.weight')

  def tree(read):
    stack = lambda path, which: jnp.stack(
      [jnp.asarray(read(theirs(path, which, i)).numpy().T) for i in range(config.num_layers)]
    )
    leaves = {f'{path}/{leaf}': stack(path, leaf.upper()) for path in paths for leaf in 'ab'}
    return unflatten_dict(leaves, sep='/')

  adapters = tree(lambda weight: weight.detach())
  tokens_BT = tiny_model.tokens(2, 15)

  def loss(adapters):
    attached = lora.attach(params, adapters, tiny_model.SCALE)
    logits_BTV = tiny_model.logits(tiny_model.MODEL, attached, tokens_BT)
    return jnp.mean(jnp.sin(logits_BTV)), logits_BTV

  grads, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(adapters)
  their_logits = tuned(torch.from_numpy(np.array(tokens_BT, np.int64))).logits
  np.testing.assert_allclose(logits_BTV, their_logits.detach().numpy(), atol=2e-4)
  changed = np.abs(logits_BTV - tiny_model.logits(tiny_model.MODEL, params, tokens_BT)).max()
  assert changed > 0.1

  torch.mean(torch.sin(their_logits)).backward()
  expected = flatten_dict(tree(lambda weight: weight.grad))
  for path, gradient in flatten_dict(grads).items():
    np.testing.assert_allclose(gradient, expected[path], atol=1e-5, rtol=1e-3)
  trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
  assert lora.summarise(adapters).trainable_params == trainable


# The real base.


@pytest.fixture(scope='module')
def smollm2():
  return bases.load(SMOLLM2)


@pytest.fixture(scope='module')
def peer(smollm2, tmp_path_factory):
  return peer_of(smollm2.config, smollm2.params, tmp_path_factory.mktemp('base'))


def drawn_prompts(tokenizer, count, limit):
  """Chats of rows drawn from all tasks, in ids, of many lengths."""
  rng = np.random.default_rng(0)
  posed = [task for task in tasks.TASKS.values() if not task.needs_vision]
  prompts = []
  for i in range(count):
    task = posed[i % len(posed)]
    seed = int(rng.integers(1 << 30))
    row = {'id': str(seed), **task.synthetic(seed, 1)[0]}
    room = int(rng.integers(limit // 2, limit))
    prompts.append(encode_prompt(task, row, tokenizer, max(room, 450)))
  return prompts


@pytest.mark.base
@pytest.mark.slow
@pytest.mark.usefixtures('optimised')
def test_smollm2_says_what_transformers_says(smollm2, peer):
  new = 64
  prompts = drawn_prompts(smollm2.tokenizer, 5, 500)
  lengths = [len(prompt) for prompt in prompts]
  assert len(set(lengths)) > 3
  padded = np.zeros((len(prompts), max(lengths)), np.int32)
  for row, prompt in enumerate(prompts):
    padded[row, : len(prompt)] = prompt
  model, params = Transformer(smollm2.config), jax.tree.map(jnp.asarray, smollm2.params)
  greedy = np.asarray(generate(model, params, padded, jnp.asarray(lengths), new, -1))
  whole = np.pad(padded, ((0, 0), (0, new)))
  for row, length in enumerate(lengths):
    whole[row, length : length + new] = greedy[row]
  for row, length in enumerate(lengths):
    ours = tiny_model.logits(model, params, whole[row : row + 1])[0, : length + new]
    expected = peer_logits(peer, whole[row : row + 1, : length + new])[0]
    assert np.abs(ours - expected).max() < 1e-3
    # After each of our tokens theirs is the same, so greedy decoding says the same 64.
    assert expected[length - 1 : -1].argmax(-1).tolist() == greedy[row].tolist()
