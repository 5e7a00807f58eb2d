"""torch's pipeline and our sampler draw the same picture, whatever the sampler."""

import itertools

import numpy as np
import pytest

from tests import same_picture


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return same_picture.Pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def drawn(pictures):
  """{case: our latents and pixels}"""
  return {case: pictures.jax(*case) for case in same_picture.CASES}


@pytest.mark.parametrize("case", same_picture.CASES, ids=lambda case: same_picture.describe(*case))
def test_same_picture(case, pictures, drawn):
  """Guidance and a negative prompt; one picture with all attributes set, one with one unknown, one with all unknown."""
  (latents, pixels), (their_latents, their_pixels) = drawn[case], pictures.torch(*case)
  assert np.isfinite(latents).all() and pixels.std() > 5
  np.testing.assert_allclose(latents, their_latents, atol=1e-3, rtol=0)
  np.testing.assert_allclose(pixels, their_pixels, atol=2, rtol=0)


def test_same_picture_with_the_zero_null(pictures, drawn):
  case = same_picture.CASES[1]
  (latents, pixels), (their_latents, their_pixels) = pictures.jax(*case, "zeros"), pictures.torch(*case, null="zeros")
  np.testing.assert_allclose(latents, their_latents, atol=1e-3, rtol=0)
  np.testing.assert_allclose(pixels, their_pixels, atol=2, rtol=0)
  assert np.abs(latents - drawn[case][0]).max() > 0.01


def test_samplers_differ(drawn):
  """So that the comparison above could fail."""
  for (first, _), (second, _) in itertools.combinations(drawn.values(), 2):
    assert np.abs(first - second).max() > 0.01
