import gzip
import hashlib

import numpy as np
import pytest
import torch

from lightning_edge.data import MNISTDataModule, mnist

NAMES = list(mnist.SHA256)


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0)
    return {
        "train_images": draw.integers(0, 256, (50, 28, 28), dtype=np.uint8),
        "train_labels": draw.integers(0, 10, 50, dtype=np.uint8),
        "test_images": draw.integers(0, 256, (9, 28, 28), dtype=np.uint8),
        "test_labels": draw.integers(0, 10, 9, dtype=np.uint8),
    }


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def mirror(arrays, tmp_path, monkeypatch):
    """A folder that serves as the only mirror, with the checksums of what is in it."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    checksums = {}
    for name, array in zip(NAMES, arrays.values(), strict=True):
        (folder / name).write_bytes(gzip.compress(idx(array)))
        checksums[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(mnist, "SHA256", checksums)
    monkeypatch.setattr(mnist, "MIRRORS", (folder.as_uri() + "/",))
    return folder


def prepared(**options):
    data = MNISTDataModule(**{"validation_size": 10} | options)
    data.prepare_data()
    data.setup()
    return data


def test_an_npz_is_split_and_normalised(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    data = prepared(path=tmp_path / "m.npz")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [40, 10, 9]
    images, labels = next(iter(data.test_dataloader()))
    expected = (arrays["test_images"][:, None] / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(images.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == arrays["test_labels"].tolist()
    both = torch.cat([data.train.images, data.validation.images])
    assert {image.numpy().tobytes() for image in both} == {image.tobytes() for image in arrays["train_images"]}


def test_the_split_depends_on_the_seed_alone(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    one, same, other = (prepared(path=tmp_path / "m.npz", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.validation.images, same.validation.images)
    assert not torch.equal(one.validation.images, other.validation.images)


@pytest.mark.parametrize("zipped", [True, False])
def test_original_files_in_a_folder_give_what_the_npz_gives(arrays, tmp_path, zipped):
    np.savez(tmp_path / "m.npz", **arrays)
    for name, array in zip(NAMES, arrays.values(), strict=True):
        path = tmp_path / (name if zipped else name.removesuffix(".gz"))
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    one, other = prepared(path=tmp_path / "m.npz"), prepared(path=tmp_path)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(one, part).images, getattr(other, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels)


def test_only_training_images_are_augmented(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays)
    data = prepared(path=tmp_path / "m.npz", augment=True)
    assert [part.max_shift for part in (data.train, data.validation, data.test)] == [2, 0, 0]


def test_without_a_path_the_files_are_downloaded_once(mirror, arrays, tmp_path, monkeypatch):
    data = prepared(folder=tmp_path / "here")
    assert data.test.labels.tolist() == arrays["test_labels"].tolist()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == sorted(NAMES)
    monkeypatch.setattr(mnist, "MIRRORS", ())
    assert len(prepared(folder=tmp_path / "here").train) == 40


def test_a_dead_mirror_is_passed_over(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", ((tmp_path / "none").as_uri() + "/", *mnist.MIRRORS))
    assert len(prepared(folder=tmp_path / "here").test) == 9


def test_a_download_with_a_wrong_checksum_is_refused_and_leaves_nothing(mirror, tmp_path):
    (mirror / NAMES[1]).write_bytes(b"something else")
    with pytest.raises(OSError, match=rf"{NAMES[1]} must come from one of 1 mirrors .* invalid hash value"):
        prepared(folder=tmp_path / "here")
    assert [path.name for path in (tmp_path / "here").iterdir()] == [NAMES[0]]


def test_a_file_already_there_with_a_wrong_checksum_is_refused(mirror, tmp_path):
    prepared(folder=tmp_path / "here")
    (tmp_path / "here" / NAMES[2]).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"sha256 of {NAMES[2]} must be .* delete it"):
        prepared(folder=tmp_path / "here")


def test_a_path_that_does_not_exist_is_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be an \.npz file or a folder"):
        MNISTDataModule(path=tmp_path / "absent.npz")


def test_a_folder_without_a_file_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must hold train-images-idx3-ubyte, gzipped or not"):
        prepared(path=tmp_path)


@pytest.mark.parametrize("content", [b"not a zip", b"", b"PK\x03\x04torn"])
def test_something_other_than_an_npz_is_refused(tmp_path, content):
    (tmp_path / "m.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be an \.npz with train_images"):
        prepared(path=tmp_path / "m.npz")


def test_an_npz_without_an_array_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", train_images=arrays["train_images"])
    with pytest.raises(ValueError, match="train_labels"):
        prepared(path=tmp_path / "m.npz")


def test_a_truncated_array_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "m.npz", **arrays | {"test_labels": arrays["test_labels"][:-1]})
    with pytest.raises(ValueError, match=r"labels must be one for each of 9 images, got \(8,\), in test of"):
        prepared(path=tmp_path / "m.npz")


@pytest.mark.parametrize("size", [0, 50])
def test_a_validation_part_that_leaves_nothing_is_refused(arrays, tmp_path, size):
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match="validation_size must"):
        prepared(path=tmp_path / "m.npz", validation_size=size)


def test_the_real_images_are_split_as_documented(mnist_path):
    data = MNISTDataModule(path=mnist_path)
    data.setup()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [55_000, 5_000, 10_000]
    images = data.train.__getitems__(range(55_000))[0]
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1.0) < 0.01
