"""The easy task that training begins with: crops of photographs and drawings."""

from __future__ import annotations

import pytest
import torch

from timm_ghn.errors import TrainingError
from timm_ghn.training import pretext
from timm_ghn.training.pretext import DRAWINGS, PHOTOGRAPHS, Photograph, class_names, make_pretext


@pytest.fixture(scope="module")
def images() -> pretext.ImageSet:
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    return make_pretext(32, images_per_class=4)


def test_every_region_and_kind_of_drawing_is_a_class(images: pretext.ImageSet) -> None:
    assert images.classes == tuple(class_names())
    regions = sum(p.grid[0] * p.grid[1] for p in PHOTOGRAPHS)
    assert len(images.classes) == regions + len(DRAWINGS)
    assert images.labels.bincount().tolist() == [4] * len(images.classes)
    assert images.images.shape[1:] == (3, 32, 32)


def test_images_depend_on_the_seed_alone(images: pretext.ImageSet) -> None:
    torch.manual_seed(1)
    assert torch.equal(make_pretext(32, images_per_class=4).images, images.images)
    assert not torch.equal(make_pretext(32, images_per_class=4, seed=1).images, images.images)


def test_images_of_a_class_differ(images: pretext.ImageSet) -> None:
    first, second = images.images[0::4].float(), images.images[1::4].float()
    assert float((first - second).abs().mean((1, 2, 3)).min()) > 0.5


def test_missing_photographs_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretext, "PHOTOGRAPHS", (Photograph("no_such_package.data", "cat.png"),))
    with pytest.raises(TrainingError, match=r"pip install 'timm-ghn\[train\]'"):
        make_pretext()
    monkeypatch.setattr(pretext, "PHOTOGRAPHS", (Photograph("timm_ghn", "cat.png"),))
    with pytest.raises(TrainingError, match=r"cat\.png of timm_ghn"):
        make_pretext()
