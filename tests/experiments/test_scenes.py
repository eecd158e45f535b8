"""Scenes by hand: on a canvas of an item's size there is one place, so that each scene that can come is known."""

from __future__ import annotations

import numpy as np
import pytest

from experiments._data import compose_scenes
from experiments._data.scenes import INK

WHOLE, LEFT = 3, 7
"""The classes of the two items: one fills its picture, the other its left half."""

ITEMS = {"image": np.full((2, 4, 4, 1), -1, np.float32), "label": np.array([WHOLE, LEFT], np.int32)}
ITEMS["image"][0] = 0.25
ITEMS["image"][1, :, :2] = 0.75


def test_what_came_later_lies_on_top():
    scenes = compose_scenes(ITEMS, 64, (0, 0), size=4, fewest=2, most=2)
    whole, left = np.full((4, 4), WHOLE + 1), np.full((4, 4), LEFT + 1)
    half = np.where(np.arange(4) < 2, left, whole)  # the whole one shows through where the other is nothing
    alone = np.where(np.arange(4) < 2, left, 0)
    possible = {
        "whole on any": whole,  # two of the four draws end so
        "left on whole": half,
        "left on left": alone,
    }
    seen = {name: sum((label == one).all() for label in scenes["label"]) for name, one in possible.items()}
    assert sum(seen.values()) == 64 and all(seen.values())
    assert seen["whole on any"] > seen["left on whole"] and seen["whole on any"] > seen["left on left"]
    image, label = scenes["image"][..., 0], scenes["label"]
    assert (image[label == WHOLE + 1] == 0.25).all() and (image[label == LEFT + 1] == 0.75).all()


def test_an_item_lies_wholly_inside_at_any_place_and_the_rest_is_background():
    scenes = compose_scenes(ITEMS, 200, (0, 1), size=6, fewest=1, most=1)
    whole = scenes["label"][[(label == WHOLE + 1).any() for label in scenes["label"]]]
    corners = {tuple(np.argwhere(label)[0]) for label in whole}
    assert corners == {(top, left) for top in range(3) for left in range(3)}
    assert all((label > 0).sum() == 16 for label in whole)
    assert all((np.ptp(np.argwhere(label), 0) == 3).all() for label in whole)


def test_the_background_is_noise_around_a_level_of_each_scene():
    """400 draws of sd 1/4 a scene, levels from −1 to 0: those beyond −1 are cut off, which draws the mean up."""
    scenes = compose_scenes(ITEMS, 100, (0, 2), size=20, fewest=1, most=1)
    assert scenes["image"].shape == (100, 20, 20, 1) and scenes["image"].dtype == np.float32
    assert scenes["label"].shape == (100, 20, 20) and scenes["label"].dtype == np.int32
    assert scenes["image"].min() == -1 and scenes["image"].max() <= 1
    means = [image[label == 0].mean() for image, label in zip(scenes["image"], scenes["label"], strict=True)]
    assert -1 < min(means) < -0.8 and -0.1 < max(means) < 0.1
    bright = [
        image[label == 0]
        for image, label, mean in zip(scenes["image"], scenes["label"], means, strict=True)
        if mean > -0.3
    ]
    assert all(0.2 < rest.std() < 0.3 for rest in bright)


def test_as_many_items_as_it_says():
    """Of items that fill a pixel, no two on one: a scene of 40 × 40 has as many labels as items, seldom one less."""
    items = {"image": np.ones((3, 1, 1, 1), np.float32), "label": np.arange(3)}
    counts = (compose_scenes(items, 300, (0, 3), size=40)["label"] > 0).sum((1, 2))
    assert set(counts.tolist()) == {2, 3, 4, 5} and all((counts == n).sum() > 40 for n in (2, 3, 4, 5))


def test_surroundings_as_dark_as_ink_hide_nothing():
    items = {"image": np.array([INK, INK + 0.01], np.float32).reshape(1, 1, 2, 1), "label": np.array([0])}
    label = compose_scenes(items, 1, (0, 4), size=2, fewest=1, most=1)["label"]
    assert label.sum() == 1 and label[:, :, 1].sum() == 1


def test_it_is_pure_in_its_key():
    one, same, attempt, seed = (compose_scenes(ITEMS, 3, key, size=8) for key in ((1, 2), (1, 2), (1, 3), (2, 2)))
    for name in ("image", "label"):
        assert (one[name] == same[name]).all()
        assert (one[name] != attempt[name]).any() and (one[name] != seed[name]).any()
    assert (compose_scenes(ITEMS, 3, (0, 0, 1))["image"] != compose_scenes(ITEMS, 3, (0, 0))["image"]).any()
    assert ITEMS["image"].sum() == np.float32(16 * 0.25 + 8 * 0.75 - 8)  # the items are only read


@pytest.mark.parametrize("wrong", [{"size": 3}, {"fewest": 0}, {"fewest": 3, "most": 2}])
def test_settings_that_make_no_scene_are_told(wrong):
    with pytest.raises(ValueError, match="legal is a size of at least 4, and 1 <= fewest <= most"):
        compose_scenes(ITEMS, 1, (0, 0), **wrong)
