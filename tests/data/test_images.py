import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_edge.data.images import ImageDataset, check_labels, randomly_shifted, whole_batch


@pytest.fixture
def dataset():
    images = torch.arange(5 * 2 * 3 * 4, dtype=torch.uint8).view(5, 2, 3, 4)
    return ImageDataset(images, torch.arange(5), scale=0.5, offset=-1.0)


def test_a_batch_is_what_its_images_are_one_by_one(dataset):
    images, labels = dataset.__getitems__([3, 0, 3])
    assert labels.tolist() == [3, 0, 3]
    assert images.dtype == torch.float32
    for image, index in zip(images, [3, 0, 3], strict=True):
        assert torch.equal(image, dataset[index][0])
        np.testing.assert_array_equal(image.numpy(), dataset.images[index].numpy() * np.float32(0.5) - 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_yields_every_image_once(dataset, num_workers):
    loader = DataLoader(dataset, 2, shuffle=True, num_workers=num_workers, collate_fn=whole_batch)
    batches = list(loader)
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == [0, 1, 2, 3, 4]
    for images, labels in batches:
        assert torch.equal(images, dataset.__getitems__(labels.tolist())[0])


def test_fetching_does_not_change_the_stored_images(dataset):
    before = dataset.images.clone()
    dataset.__getitems__([0, 1])
    assert torch.equal(dataset.images, before)


def test_each_image_moves_by_its_own_whole_number_of_pixels():
    torch.manual_seed(0)
    images = torch.randint(1, 255, (200, 2, 6, 7), dtype=torch.uint8)
    shifted = randomly_shifted(images, max_shift=2)
    found = set()
    for image, moved in zip(images.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)))
        corners = [(y, x) for y in range(5) for x in range(5)]
        fitting = [(y, x) for y, x in corners if np.array_equal(padded[:, y : y + 6, x : x + 7], moved)]
        assert len(fitting) == 1
        found.update(fitting)
    assert len(found) == 25


def test_shifts_come_from_the_global_generator():
    data = ImageDataset(torch.randint(0, 255, (8, 1, 9, 9), dtype=torch.uint8), torch.arange(8), scale=1, max_shift=2)
    torch.manual_seed(3)
    first = data.__getitems__(range(8))[0]
    torch.manual_seed(3)
    assert torch.equal(data.__getitems__(range(8))[0], first)
    assert not torch.equal(data.__getitems__(range(8))[0], first)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.tensor([0, 1]), "images must be of shape"),
        (torch.zeros(0, 1, 4, 4), torch.tensor([]), "images must be of shape"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0]), "labels must be one for each of 2 images"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0, 10]), r"labels must lie in \[0, 10\), got \[0, 10\], in a file"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(images, labels, shape=(1, 4, 4), classes=10, where="a file")
