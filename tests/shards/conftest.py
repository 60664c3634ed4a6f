"""Small photographs-to-be for the tests of the builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 4 classes of 12, 15, 18 and 21 JPEGs of 40 x 30 pixels, no two alike."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for class_number, name in enumerate(("ash", "birch", "cedar", "douglas fir")):
        (root / name).mkdir()
        for i in range(12 + 3 * class_number):
            coarse = Image.fromarray(random.integers(0, 255, (6, 8, 3)).astype(np.uint8))
            coarse.resize((40, 30)).save(root / name / f"{i:03d}.jpg", quality=90)
    return root
