"""The augmentation of every recipe, with whatever Pillow there is."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp

from qvit.data.loader import make_transform
from qvit.data.posterize import _operations, allow_no_bits
from qvit.images import open_picture
from qvit.train.recipe import builtin_recipes, load_recipe

PREPROCESSING = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
POLICIES = ["rand-m10-inc1", "rand-m9-mstd0.5-inc1", "v0", "original", "3a", "augmix-m10-w2-d2"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_works_at_its_strongest(policy: str) -> None:
    transform = make_transform(PREPROCESSING, {"auto_augment": policy})
    operations = list(_operations(transform.args[0]))  # timm's, in what makes an image of a picture
    assert operations
    for operation in operations:
        operation.prob, operation.magnitude = 1.0, 10.0
        assert operation(IMAGE).size == IMAGE.size


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_recipe_augments(name: str) -> None:
    transform = make_transform(PREPROCESSING, load_recipe(name).augmentation)
    for _ in range(20):
        assert transform(open_picture(IMAGE)).shape == (3, 16, 16)


def test_no_bits_are_a_black_image_and_some_bits_are_pillows() -> None:
    operation = allow_no_bits(AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10))
    assert np.asarray(operation(IMAGE)).max() == 0
    operation.magnitude = 5
    assert np.array_equal(np.asarray(operation(IMAGE)), np.asarray(IMAGE) & 0b11000000)
