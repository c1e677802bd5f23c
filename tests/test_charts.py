"""Ticks, numbers, curves and PNG files of the report."""

import math
import re

import numpy as np
import pytest
from PIL import Image

from dancegrpo_jax.report import charts, images

# Parts of charts


@pytest.mark.parametrize(
  "low, high, expected",
  [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    (0.43, 0.71, [0.4, 0.5, 0.6, 0.7, 0.8]),
    (0.99981, 1.0002, [0.9998, 0.9999, 1.0, 1.0001, 1.0002]),
    (-3, 12, [-5, 0, 5, 10, 15]),
    (0, 1e-5, [0, 2e-6, 4e-6, 6e-6, 8e-6, 1e-5]),
  ],
)
def test_ticks_are_round_and_enclose(low, high, expected):
  assert charts.ticks(low, high) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
  "value, step, text",
  [
    (0.5, 0.1, "0.5"),
    (1.0, 0.0001, "1.0000"),
    (12, 5, "12"),
    (2e-6, 2e-6, "2e-6"),
    (0, 2e-6, "0"),
    (0.51234, 0, "0.5123"),
  ],
)
def test_numbers_have_the_digits_they_need(value, step, text):
  assert charts.number_text(value, step) == text


def test_a_gap_breaks_the_line():
  x = [0, 1, 2, 3, 4]
  html = charts.chart("t", "u", [charts.Series("a", x, [0.0, 1.0, math.nan, 1.0, 0.0])])
  assert re.search(r'class="line c1" d="M[^M]+M[^M]+"', html)
  assert charts.chart("t", "u", [charts.Series("a", [0, 1], [math.nan, math.nan])]) == ""
  assert charts.histogram("t", "u", [("a", [math.nan])], "x") == ""


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [1.0, 1.0], [-2.0, -2.0], [1e-12, 3e-12]])
def test_constant_and_tiny_curves_are_drawn(values):
  html = charts.chart("t", "u", [charts.Series("a", range(len(values)), values)])
  assert "nan" not in html and "inf" not in html
  assert "nan" not in charts.histogram("t", "u", [("a", values), ("b", values)], "x")


# Images


def test_png_keeps_pixels(tmp_path):
  pixels = np.random.RandomState(0).randint(0, 256, (5, 7, 3)) / 255
  images.save(tmp_path / "new" / "a.png", pixels)
  np.testing.assert_array_equal(
    np.asarray(Image.open(tmp_path / "new" / "a.png")), np.round(pixels * 255)
  )
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_pixels_outside_the_range_are_clipped():
  assert images.to_uint8(np.array([-1.0, 0.5, 2.0, math.nan])).tolist() == [0, 128, 255, 0]


def test_files_of_a_batch_sort_in_order(tmp_path):
  paths = images.save_samples(tmp_path, np.zeros((101, 2, 2, 3)), None)
  assert (
    sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    and paths[100].name == "100.png"
  )


def test_grid_places_images_and_captions():
  pixels = np.stack([np.full((32, 32, 3), value) for value in (0.2, 0.4, 0.6)])
  sheet = np.asarray(
    images.grid(pixels, 2, captions=["one", "two", "three"], headers=["left", "right"])
  )
  plain = np.asarray(images.grid(pixels, 2))
  assert plain.shape == (2 * 96 + 3 * 6, 2 * 96 + 3 * 6, 3)  # enlarged three times, with gaps of 6
  assert (
    plain[6, 6, 0] == 51
    and plain[6, 108, 0] == 102
    and plain[108, 6, 0] == 153
    and plain[108, 108, 0] == 255
  )
  assert sheet.shape[1] == plain.shape[1] and sheet.shape[0] > plain.shape[0]
