"""Idefics3 and SmolVLM against transformers: pixels, prompts, features, logits, adapters."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_vlm
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax import lora, lora_family
from lora_jax.config import ImageConfig, LoraConfig
from lora_jax.data import tiles
from lora_jax.hub import adapters, bases, huggingface, peft
from lora_jax.transformer import Transformer
from lora_jax.vision import Features, image_slots

torch = pytest.importorskip('torch', reason='the references install on Python 3.11')
transformers = pytest.importorskip('transformers')
their_peft = pytest.importorskip('peft')

CLASSES = ('Idefics3', 'SmolVLM')
TEXT = {
  'model_type': 'llama',
  'vocab_size': tiny_vlm.VOCAB,
  'hidden_size': 30,
  'intermediate_size': 44,
  'num_hidden_layers': 3,
  'num_attention_heads': 3,
  'num_key_value_heads': 1,
  'max_position_embeddings': 512,
  'pad_token_id': 0,
}
VISION = {
  'hidden_size': 24,
  'intermediate_size': 36,
  'num_hidden_layers': 2,
  'num_attention_heads': 3,
  'image_size': 28,
  'patch_size': 7,
}
# How the published checkpoints cut: SmolVLM 256M and 500M, 2.2B, Idefics3 8B.
PUBLISHED = [ImageConfig(2048, 512), ImageConfig(1536, 384), ImageConfig(1456, 364)]
SIZES = [(40, 40), (97, 31), (31, 97), (200, 3), (3, 200), (1, 1), (28, 28), (57, 56)]


def their_images(kind, config):
  if kind == 'Idefics3':
    from transformers.models.idefics3 import image_processing_pil_idefics3 as module
  else:
    from transformers.models.smolvlm import image_processing_pil_smolvlm as module
  return getattr(module, f'{kind}ImageProcessorPil')(
    size={'longest_edge': config.longest_edge},
    max_image_size={'longest_edge': config.tile},
    do_image_splitting=config.split,
    resample=config.resample,
    image_mean=list(config.mean),
    image_std=list(config.std),
  )


def write(directory, kind='SmolVLM', seed=0, vision=(), **settings):
  """A random checkpoint whose norms and biases matter, with tokenizer and processor."""
  torch.manual_seed(seed)
  config = getattr(transformers, f'{kind}Config')(
    text_config=TEXT,
    vision_config={**VISION, **dict(vision)},
    image_token_id=tiny_vlm.IMAGE_TOKEN,
    **{'scale_factor': 2, **settings},
  )
  config._attn_implementation = 'eager'
  peer = getattr(transformers, f'{kind}ForConditionalGeneration')(config)
  with torch.no_grad():
    for weight in peer.parameters():
      weight.add_(torch.randn_like(weight) * (0.3 if weight.ndim == 1 else 0.15))
  peer.save_pretrained(directory)
  tiny_vlm.write_tokenizer(directory)
  their_images(kind, tiny_vlm.IMAGES).save_pretrained(directory)
  return peer.eval()


@pytest.mark.parametrize('kind', CLASSES)
@pytest.mark.parametrize(
  'config',
  [
    tiny_vlm.IMAGES,
    ImageConfig(3 * 28 - 9, 28, mean=(0.48, 0.45, 0.4), std=(0.26, 0.27, 0.28)),
    ImageConfig(28, 28),
    ImageConfig(90, 28, split=False, resample=2),
  ],
)
def test_pixels_equal_the_reference_processors(kind, config):
  theirs = their_images(kind, config)
  for size in SIZES:
    image = tiny_vlm.image(*size)
    out = theirs(image, return_tensors='np', return_row_col_info=True)
    ours = tiles.cut(image, config)
    assert (ours.rows, ours.columns) == (out['rows'][0][0], out['cols'][0][0])
    assert tiles.grid(size, config) == (ours.rows, ours.columns)
    assert out['pixel_attention_mask'].all()
    values_IYXC = tiles.normalise(ours.pixels_IYXC, config)
    assert values_IYXC.dtype == np.float32
    np.testing.assert_array_equal(values_IYXC.transpose(0, 3, 1, 2), out['pixel_values'][0])


@pytest.mark.parametrize('config', PUBLISHED)
def test_pixels_as_published_checkpoints_cut_them(config):
  theirs = their_images('SmolVLM', config)
  for size in [(700, 300), (120, 640)]:
    out = theirs(tiny_vlm.image(*size), return_tensors='np', return_row_col_info=True)
    ours = tiles.cut(tiny_vlm.image(*size), config)
    assert (ours.rows, ours.columns) == (out['rows'][0][0], out['cols'][0][0])
    values_IYXC = tiles.normalise(ours.pixels_IYXC, config)
    np.testing.assert_array_equal(values_IYXC.transpose(0, 3, 1, 2), out['pixel_values'][0])


# Several images of all shapes to a prompt, the last of them in one tile.
PROMPTS = {
  'one': ('What is the total?', [(40, 33)]),
  'wide': ('Which\n\nletter <image> is it?', [(120, 31)]),
  'tall': ('?', [(30, 131)]),
  'several': (' Compare them.', [(97, 31), (40, 45), (20, 90), (1, 1)]),
}


def seen(name, base):
  """A prompt's ids, tiles and values as we have them."""
  text, sizes = PROMPTS[name]
  pictures = [tiny_vlm.image(*size, seed=i) for i, size in enumerate(sizes)]
  cut = [tiles.cut(picture, base.images) for picture in pictures]
  parts = [{'type': 'image'}] * len(pictures) + [{'type': 'text', 'text': text}]
  ids = base.tokenizer.encode_chat([{'role': 'user', 'content': parts}])
  grids = [(each.rows, each.columns) for each in cut]
  ids = tiles.expand(ids, base.tokenizer, base.config.vision, base.images, grids)
  pixels_IYXC = np.concatenate([each.pixels_IYXC for each in cut])
  return pictures, ids, tiles.normalise(pixels_IYXC, base.images)


@pytest.mark.parametrize('name', PROMPTS)
def test_prompts_equal_the_reference_processors(tmp_path, name):
  write(tmp_path, 'Idefics3')
  base = bases.load(str(tmp_path))
  pictures, ids, values_IYXC = seen(name, base)
  processor = transformers.Idefics3Processor(
    their_images('Idefics3', base.images),
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / 'tokenizer.json')),
    image_seq_len=tiny_vlm.TOKENS,
  )
  # What the text itself says of images must not become one, there by leaving it out.
  text = PROMPTS[name][0].replace('<image>', '')
  said = f'<|im_start|>User:{"<image>" * len(pictures)} {text}<end_of_utterance>\nAssistant:'
  out = processor(text=[said], images=[pictures], return_tensors='np')
  np.testing.assert_array_equal(values_IYXC.transpose(0, 3, 1, 2), out['pixel_values'][0])
  if '<image>' not in PROMPTS[name][0]:
    assert ids == out['input_ids'][0].tolist()
  token = tiny_vlm.IMAGE_TOKEN
  assert ids.count(token) == out['input_ids'][0].tolist().count(token) == 4 * len(values_IYXC)
  assert base.tokenizer.special_tokens['<end_of_utterance>'] == base.tokenizer.eos_id

  from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

  for shape in [(0, 0), (2, 3), (1, 2)]:
    theirs = get_image_prompt_string(
      *shape, 5, '<fake_token_around_image>', '<image>', '<global-img>'
    )
    assert tiles.image_text(*shape, 5) == theirs


def see(model, params, values_IYXC, seen_Iyx=None):
  run = jax.jit(lambda p, x, s: model.apply({'params': p}, x, s, method='see'))
  return run(params, values_IYXC, seen_Iyx)


@jax.jit
def join(features_IED, tokens_BT):
  flat_BED = features_IED.reshape(1, -1, features_IED.shape[-1])
  return Features(flat_BED, image_slots(tokens_BT, tiny_vlm.IMAGE_TOKEN))


def logits(model, params, tokens_BT, features):
  def run(params):
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT, features=features)
    return model.apply({'params': params}, hidden_BTD, method='head')

  return jax.jit(run)(params)


def their_logits(peer, ids, values_IYXC):
  with torch.no_grad():
    out = peer(
      input_ids=torch.tensor([ids]),
      pixel_values=torch.from_numpy(values_IYXC.transpose(0, 3, 1, 2)[None].copy()),
    )
  return out.logits.numpy()


@pytest.mark.parametrize(('kind', 'tied'), [('Idefics3', False), ('SmolVLM', True)])
def test_features_and_logits_equal_transformers(tmp_path, kind, tied):
  peer = write(tmp_path, kind, tie_word_embeddings=tied)
  base = bases.load(str(tmp_path))
  assert base.config.tie_embeddings is tied
  model, params = Transformer(base.config), jax.tree.map(jnp.asarray, base.params)
  for name in PROMPTS:
    _, ids, values_IYXC = seen(name, base)
    pixels = torch.from_numpy(values_IYXC.transpose(0, 3, 1, 2)[None].copy())
    with torch.no_grad():
      expected = torch.cat(list(peer.model.get_image_features(pixels).pooler_output)).numpy()
    features_IED = see(model, params, values_IYXC)
    np.testing.assert_allclose(
      features_IED.reshape(expected.shape), expected, atol=1e-4 * np.abs(expected).max()
    )
    tokens_BT = jnp.asarray([ids])
    ours_BTV = logits(model, params, tokens_BT, join(features_IED, tokens_BT))
    expected_BTV = their_logits(peer, ids, values_IYXC)
    assert expected_BTV.std() > 0.3
    np.testing.assert_allclose(ours_BTV, expected_BTV, atol=1e-3)
    # The images are seen: without them the logits are others.
    assert np.abs(logits(model, params, tokens_BT, None) - expected_BTV).max() > 0.1


@pytest.mark.parametrize('kind', CLASSES)
def test_padded_images_and_other_sizes_equal_transformers(tmp_path, kind):
  # A tile of 42 x 42 pixels on a table for 28 x 28, whose sides no patch divides.
  peer = write(tmp_path, kind, vision={'patch_size': 5, 'image_size': 32})
  config = huggingface.model_config(tmp_path)
  params = huggingface.load_params(tmp_path, config)
  rng = np.random.default_rng(0)
  values_IYXC = rng.normal(size=(4, 42, 42, 3)).astype(np.float32)
  mask_IYX = np.zeros((4, 42, 42), bool)
  for image, (height, width) in enumerate([(42, 42), (13, 42), (40, 6), (21, 22)]):
    mask_IYX[image, :height, :width] = True
  with torch.no_grad():
    out = peer.model.get_image_features(
      torch.from_numpy(values_IYXC.transpose(0, 3, 1, 2)[None].copy()),
      torch.from_numpy(mask_IYX[None]),
    )
  expected = torch.cat(list(out.pooler_output)).numpy()
  seen_Iyx = mask_IYX[:, :40, :40].reshape(4, 8, 5, 8, 5).any((2, 4))
  assert 0 < seen_Iyx.mean() < 1
  ours = see(Transformer(config), params, values_IYXC, seen_Iyx)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(ours.reshape(expected.shape), expected, atol=1e-4 * scale)
  # And the padding matters, or little would have been compared.
  other = see(Transformer(config), params, values_IYXC)
  assert np.abs(other.reshape(expected.shape) - expected).max() > 1e-2 * scale


def test_what_a_configuration_leaves_out_is_what_transformers_takes(tmp_path):
  for kind in CLASSES:
    config = getattr(transformers, f'{kind}Config')(
      text_config={'model_type': 'llama', 'vocab_size': 130_000},
      vision_config={'image_size': 384, 'patch_size': 32},
    )
    config.save_pretrained(tmp_path)
    expected = huggingface.model_config(tmp_path)
    bare = {
      'model_type': config.model_type,
      'text_config': {'vocab_size': 130_000, 'hidden_size': 4096, 'intermediate_size': 11_008}
      | {'num_hidden_layers': 32, 'num_attention_heads': 32},
      'vision_config': {'image_size': 384},
    }
    (tmp_path / 'config.json').write_text(json.dumps(bare))
    assert huggingface.model_config(tmp_path) == expected


def test_transformers_loads_what_save_wrote(tmp_path):
  write(tmp_path / 'base')
  base = bases.load(str(tmp_path / 'base'))
  huggingface.save(tmp_path / 'out', base.config, base.params, tmp_path / 'base', shard=20_000)
  load = transformers.SmolVLMForConditionalGeneration.from_pretrained
  peers = [load(tmp_path / name, attn_implementation='eager').eval() for name in ('base', 'out')]
  _, ids, values_IYXC = seen('wide', base)
  one, other = (their_logits(peer, ids, values_IYXC) for peer in peers)
  np.testing.assert_array_equal(one, other)
  assert bases.load(str(tmp_path / 'out')).images == base.images


EVERYWHERE = 'o_proj,fc2,vision/layers/attn/(q|out)_proj,vision/layers/mlp/.*,connector/.*'


@pytest.mark.parametrize('targets', ['qkv,o_proj', EVERYWHERE])
def test_peft_computes_what_an_exported_adapter_computes(tmp_path, targets):
  write(tmp_path / 'base')
  base = bases.load(str(tmp_path / 'base'))
  config = LoraConfig(rank=3, alpha=6.0, layers='0,2')
  paths = lora.resolve(targets, base.params)
  tree = lora_family.init(jax.random.key(0), base.params, paths, config)
  rng = np.random.default_rng(0)
  # What is zero for good, in layers without an adapter, stays so.
  moved = lambda x: np.where(x == 0, 0, rng.standard_normal(x.shape) * 0.2).astype(np.float32)
  ones = jax.tree.map(lambda x: np.ones(x.shape), tree)
  chosen = lora_family.plan(config, tree).ranks
  flat = dict(flatten_dict(ones, sep='/'))
  for path, leaf in flat.items():
    leaf[np.asarray(chosen[path[:-2]]) == 0] = 0
  tree = unflatten_dict({path: jnp.asarray(moved(leaf)) for path, leaf in flat.items()}, sep='/')
  adapter = peft.of(tree, config, sees=True)
  peft.save(tmp_path / 'adapter', adapter)

  model, params = Transformer(base.config), jax.tree.map(jnp.asarray, base.params)
  _, ids, values_IYXC = seen('several', base)
  tokens_BT = jnp.asarray([ids])

  def ours(attached):
    features = join(see(model, attached, values_IYXC), tokens_BT)
    return logits(model, attached, tokens_BT, features)

  ours_BTV = ours(adapters.attach(params, adapter))
  assert np.abs(ours_BTV - ours(params)).max() > 0.1
  load = transformers.SmolVLMForConditionalGeneration.from_pretrained
  peer = load(tmp_path / 'base', attn_implementation='eager')
  with warnings.catch_warnings():
    # PEFT reads a name that transformers is about to drop.
    warnings.simplefilter('ignore', FutureWarning)
    peer = their_peft.PeftModel.from_pretrained(peer, tmp_path / 'adapter').eval()
  np.testing.assert_allclose(ours_BTV, their_logits(peer, ids, values_IYXC), atol=1e-3)
  # And back.
  again = adapters.load(tmp_path / 'adapter', base)
  assert again.ranks == adapter.ranks
  assert again.sees
  np.testing.assert_array_equal(ours(adapters.attach(params, again)), ours_BTV)
