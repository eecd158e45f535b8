"""Scenes: items laid over one another at random places on a noisy background, with the class of what lies on top."""

from __future__ import annotations

import numpy as np

INK = -0.8
"""What of an item is brighter hides what lies below; the rest, a tenth of the range up from black, is its surroundings."""

NOISE = 0.25
"""Standard deviation of the background, around a level of the scene's own in [-1, 0]."""


def compose_scenes(
    items: dict[str, np.ndarray],
    count: int,
    key: tuple[int, ...],
    *,
    size: int = 64,
    fewest: int = 2,
    most: int = 5,
) -> dict[str, np.ndarray]:
    """Scenes made of pictures of single items, and for each pixel what is to be seen there.

        scene = noise
        for item in fewest … most random items, each wholly inside at a random place:
            scene[ink of the item] = item;  label[ink of the item] = class of the item + 1

    Pure in (items, count, key): numpy's PCG64 is seeded with the key, and nothing else is random.

    Args:
      items: `image` float32 [n, h, w, 1] in [-1, 1], -1 where nothing is; `label` int [n] from 0.
      count: scenes.
      key: the seed of a run and the attempt, or whatever else tells one draw from another: numbers under 2³². Zeros at
        its end do not count: (7, 0) is (7,).
      size: side of a scene in pixels.
      fewest, most: items a scene.

    Returns:
      `image` float32 [count, size, size, 1] in [-1, 1]; `label` int32 [count, size, size], 0 where the background is seen,
      else the class plus 1.

    Raises:
      ValueError: a scene is smaller than an item, or fewest and most are no range.

    >>> items = {"image": np.ones((1, 2, 3, 1), np.float32), "label": np.array([6])}
    >>> scenes = compose_scenes(items, 5, key=(0, 0), size=8, fewest=1, most=1)
    >>> [int((label == 7).sum()) for label in scenes["label"]]
    [6, 6, 6, 6, 6]
    """
    images_NxHxW = items["image"][..., 0]
    height, width = images_NxHxW.shape[1:]
    if size < max(height, width) or not 1 <= fewest <= most:
        raise ValueError(
            f"got size={size}, fewest={fewest} and most={most} for items of {height} × {width} pixels; legal is a size of at "
            f"least {max(height, width)}, and 1 <= fewest <= most"
        )
    random = np.random.default_rng(key)
    level_Bx1x1 = random.uniform(-1, 0, (count, 1, 1)).astype(np.float32)
    image_BxSxS = random.standard_normal((count, size, size), np.float32)
    image_BxSxS = np.clip(level_Bx1x1 + np.float32(NOISE) * image_BxSxS, -1, 1)
    label_BxSxS = np.zeros((count, size, size), np.int32)
    for image, label, number in zip(image_BxSxS, label_BxSxS, random.integers(fewest, most + 1, count), strict=True):
        chosen = random.integers(len(images_NxHxW), size=number)
        tops = random.integers(size - height + 1, size=number)
        lefts = random.integers(size - width + 1, size=number)
        for n, top, left in zip(chosen, tops, lefts, strict=True):
            item, place = images_NxHxW[n], (slice(top, top + height), slice(left, left + width))
            ink = item > INK
            image[place][ink] = item[ink]
            label[place][ink] = items["label"][n] + 1
    return {"image": image_BxSxS[..., None], "label": label_BxSxS}
