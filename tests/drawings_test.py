"""What is drawn is what the labels say, and the same each time."""

import random

import numpy as np
import pytest

from lora_jax.drawings import colours, fonts, scan
from lora_jax.drawings.canvas import SHAPES, Canvas, ink_on
from lora_jax.drawings.drawing import KINDS, draw
from lora_jax.hub import tiny


@pytest.mark.parametrize('kind', KINDS)
def test_a_drawing_is_a_function_of_its_number(kind):
  one, same, other = draw(kind, 5, 1), draw(kind, 5, 1), draw(kind, 5, 2)
  assert one.image.tobytes() == same.image.tobytes()
  assert (one.text, one.questions) == (same.text, same.questions)
  for mark, again in zip(one.marks, same.marks, strict=True):
    np.testing.assert_array_equal(mark.boxes_G4, again.boxes_G4)
  assert one.text != other.text
  assert draw(kind, 6, 1).text != one.text


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('number', range(3))
def test_marks_say_what_is_written_and_where(kind, number):
  one = draw(kind, 0, number, fonts.HELD_OUT if number == 2 else fonts.FACES)
  assert one.image.mode == 'RGB'
  assert one.marks
  assert one.questions
  assert all(question and answer for question, answer in one.questions)
  width, height = one.image.size
  for mark in one.marks:
    left, top, right, bottom = mark.boxes_G4.T
    assert (right >= left).all()
    assert (bottom >= top).all()
    middle = ((left + right) / 2, (top + bottom) / 2)
    # A fold may push the end of a line over the edge, never half of it.
    inside = (middle[0] >= 0) & (middle[0] < width) & (middle[1] >= 0) & (middle[1] < height)
    assert inside.mean() > 0.5
    if mark.shape:
      assert mark.shape in SHAPES
      assert mark.colour in colours.NAMES
      assert mark.colour in mark.text
      assert len(mark.boxes_G4) == 1
    else:
      assert len(mark.boxes_G4) == len(mark.text)
      assert mark.text.isascii()
      assert mark.text.isprintable()
      # What sheets of text say is what stands on them.
      assert kind not in ('note', 'page', 'receipt') or mark.text in one.text


def ink(image, box):
  left, top, right, bottom = (round(float(side)) for side in box)
  part = np.asarray(image.convert('L'), np.float32)[top:bottom, left:right]
  return part.std() if part.size else 0.0


def test_boxes_hold_ink_where_characters_are_and_none_beside():
  canvas = Canvas(400, 200)
  for row, face in enumerate((*fonts.FACES[:3], fonts.HELD_OUT[0])):
    canvas.write(200, 40 + 40 * row, 'Ag7 x-W%', face, 24, anchor='mm')
  for mark in canvas.marks:
    for character, box in zip(mark.text, mark.boxes_G4, strict=True):
      assert (ink(canvas.image, box) > 0) == (character != ' '), (character, box)
  pixels = np.asarray(canvas.image.convert('L')) < 128
  for mark in canvas.marks:
    left, top = np.floor(mark.boxes_G4[:, :2].min(0)).astype(int)
    right, bottom = np.ceil(mark.boxes_G4[:, 2:].max(0)).astype(int)
    pixels[top : bottom + 1, left : right + 1] = False
  assert not pixels.any()


@pytest.mark.parametrize('face', fonts.FACES, ids=lambda face: face.name)
def test_characters_begin_where_the_text_before_them_ends(face):
  text = 'To AV. fi 12.50'
  for size in (11, 30):
    canvas, font = Canvas(400, 60), fonts.load(face, size)
    canvas.write(5, 5, text, face, size)
    left_G = canvas.marks[0].boxes_G4[:, 0]
    bounds_G = np.array([font.getbbox(one, anchor='la')[0] for one in text])
    ends_G = np.array([font.getlength(text[:i]) for i in range(len(text))])
    np.testing.assert_allclose(left_G, 5 + bounds_G + ends_G, atol=0.1)


def test_a_face_that_lacks_a_character_is_replaced():
  roman = next(face for face in fonts.FACES if face.lacks)
  widths = [Canvas(300, 40).write(5, 5, '<$>', face, 20) for face in (roman, fonts.AILERON)]
  assert widths[0] == widths[1] != Canvas(300, 40).write(5, 5, '<$>', fonts.FACES[1], 20)


def test_marks_move_with_the_sheet():
  canvas = Canvas(300, 300)
  canvas.shape('square', 90, 200, 40, 'grey', (0, 0, 0), outline=None)
  for seed in range(8):
    image, (mark,) = scan.scan(canvas, random.Random(seed), wear=1.0)
    dark_YX = np.asarray(image.convert('L')) < 125
    # Specks are dark too, but no row of them is.
    rows, columns = (np.nonzero(dark_YX.sum(axis) > 15)[0] for axis in (1, 0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    # The corners of a box that was turned lie a little beyond what is in it.
    np.testing.assert_allclose(mark.boxes_G4[0], found, atol=5, err_msg=str(seed))


def test_a_name_of_a_colour_is_said_of_no_other():
  rng = random.Random(0)
  seen = {name: [colours.pick(rng, name) for _ in range(40)] for name in colours.NAMES}
  for name, values in seen.items():
    others = {value for other, held in seen.items() if other != name for value in held}
    assert others.isdisjoint(values)
  assert set(colours.distinct(rng, 4)) <= set(colours.PLAIN)
  assert ink_on((255, 255, 255)) != ink_on((20, 20, 60))


def test_answers_are_text_that_a_base_can_say():
  tokenizer = tiny.chat_tokenizer()
  for kind in KINDS:
    for _, answer in draw(kind, 1, 1).questions:
      assert tokenizer.decode(tokenizer.encode_plain(answer)) == answer
