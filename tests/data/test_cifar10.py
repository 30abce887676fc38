import hashlib
import tarfile

import numpy as np
import pytest
import torch

from lightning_edge.data import CIFAR10DataModule, cifar10


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return {
        "train_images": draw.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8),
        "train_labels": draw.integers(0, 10, 50, dtype=np.uint8),
        "test_images": draw.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8),
        "test_labels": draw.integers(0, 10, 20, dtype=np.uint8),
    }


@pytest.fixture
def npz(arrays, tmp_path):
    np.savez(tmp_path / "c.npz", **arrays)
    return tmp_path / "c.npz"


def records(images, labels):
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([labels[:, None], planes], axis=1).tobytes()


@pytest.fixture
def folder(arrays, tmp_path):
    """The original binary files, ten images each."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(5):
        part = slice(10 * number, 10 * number + 10)
        data = records(arrays["train_images"][part], arrays["train_labels"][part])
        (folder / f"data_batch_{number + 1}.bin").write_bytes(data)
    (folder / "test_batch.bin").write_bytes(records(arrays["test_images"], arrays["test_labels"]))
    return folder


def prepared(**options):
    data = CIFAR10DataModule(**{"validation_size": 5} | options)
    data.prepare_data()
    data.setup()
    data.setup()
    return data


@pytest.mark.parametrize("source", ["npz", "folder"])
def test_both_forms_are_read_split_and_normalized(source, arrays, request):
    data = prepared(path=request.getfixturevalue(source))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [45, 5, 20]
    images, labels = next(iter(data.test_dataloader()))
    pixels = arrays["test_images"].transpose(0, 3, 1, 2) / 255
    mean, std = (np.array(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(images.numpy(), (pixels - mean) / std, rtol=1e-4, atol=1e-5)
    assert labels.tolist() == arrays["test_labels"].tolist()
    both = torch.cat([data.train.images, data.validation.images])
    expected = arrays["train_images"].transpose(0, 3, 1, 2)
    assert {image.numpy().tobytes() for image in both} == {image.tobytes() for image in expected}


def test_validation_can_come_from_the_first_test_images(npz, arrays):
    data = prepared(path=npz, validation_from="test")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [50, 5, 15]
    assert data.validation.labels.tolist() == arrays["test_labels"][:5].tolist()
    assert data.test.labels.tolist() == arrays["test_labels"][5:].tolist()


def test_training_images_are_moved_and_mirrored_and_others_not(npz):
    data = prepared(path=npz)
    assert (data.train.max_shift, data.train.flip) == (4, True)
    assert (data.validation.max_shift, data.validation.flip, data.test.flip) == (0, False, False)
    assert (prepared(path=npz, augment=False).train.max_shift, prepared(path=npz, augment=False).train.flip) == (
        0,
        False,
    )


@pytest.fixture
def archive(folder, tmp_path, monkeypatch):
    path = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(path, "w:gz") as files:
        files.add(folder, arcname=folder.name)
    monkeypatch.setattr(cifar10, "URL", path.as_uri())
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_the_archive_is_fetched_once_and_unpacked(archive, tmp_path):
    data = prepared(folder=tmp_path / "kept")
    assert len(data.train) == 45
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["cifar-10-batches-bin"]
    archive.unlink()
    assert len(prepared(folder=tmp_path / "kept").train) == 45


def test_an_archive_with_another_checksum_is_not_kept(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MD5", "0" * 32)
    with pytest.raises(OSError, match="md5 of .* must be 0{32}, got"):
        prepared(folder=tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_size": 0}, "validation_size must be at least 1, got 0"),
        ({"validation_from": "both"}, "validation_from must be 'train' or 'test', got 'both'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(**options)


def test_a_path_that_does_not_exist_is_named():
    with pytest.raises(FileNotFoundError, match=r"path must be an .npz file or a folder of .bin files, got 'nowhere'"):
        CIFAR10DataModule(path="nowhere")


@pytest.mark.parametrize(("origin", "count"), [("train", 50), ("test", 20)])
def test_something_must_be_left(npz, origin, count):
    with pytest.raises(ValueError, match=f"validation_size must be less than the {count} images of validation_from="):
        prepared(path=npz, validation_from=origin, validation_size=count)


def test_damaged_files_are_named(folder, npz, arrays, tmp_path):
    (folder / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="data_batch_2.bin must be whole records of 3073 bytes, got 3 bytes"):
        prepared(path=folder)
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(FileNotFoundError, match="folder must hold data_batch_2.bin"):
        prepared(path=folder)
    np.savez(tmp_path / "flat.npz", **arrays | {"train_images": arrays["train_images"].reshape(50, -1)})
    with pytest.raises(ValueError, match=r"train_images must be of shape \(n, 32, 32, 3\), got \(50, 3072\)"):
        prepared(path=tmp_path / "flat.npz")
