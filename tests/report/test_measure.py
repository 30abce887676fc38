import sys
import types

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_edge.report import Score, measure_artifacts, score


class TemplateSession:
    """Classifies an image by the nearest mean image."""

    threads, runtime = 1, "numpy"

    def __init__(self, images, labels):
        self.means = np.stack([images[labels == label].mean(axis=0) for label in range(10)])
        self.seen = []

    def __call__(self, images):
        self.seen.append(len(images))
        return -((images[:, None] - self.means) ** 2).sum(axis=2)


@pytest.fixture
def digits():
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.float32), labels


def test_every_batch_counts_the_last_and_smaller_one_too(digits):
    session = TemplateSession(*digits)
    loader = DataLoader(TensorDataset(*map(torch.tensor, digits)), 500)
    expected = int((session(digits[0]).argmax(axis=1) != digits[1]).sum())
    assert score(session, loader) == Score(expected, 1797)
    assert session.seen[1:] == [500, 500, 500, 297]
    assert 0 < expected < 300


@pytest.mark.parametrize(("wrong", "total"), [(0, 599), (7, 599), (83, 10_000), (1, 1)])
def test_the_interval_is_that_of_wilson(wrong, total):
    expected = binomtest(wrong, total).proportion_ci(method="wilson")
    low, high = Score(wrong, total).interval_percent
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-9)
    assert low <= Score(wrong, total).error_percent == 100 * wrong / total <= high


def test_the_first_of_several_outputs_is_scored():
    assert score(lambda x: (x, None), [(torch.eye(2), torch.tensor([0, 0]))]) == Score(1, 2)


@pytest.mark.parametrize(
    ("session", "message"),
    [
        (lambda x: x[:1], r"logits must be of shape \(2, classes\), got \(1, 2\), image 0"),
        (lambda x: x.ravel(), r"logits must be of shape \(2, classes\), got \(4,\)"),
        (lambda x: x * np.nan, "logits must be finite"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(session, message):
    with pytest.raises(ValueError, match=message):
        score(session, [(torch.eye(2), torch.tensor([0, 1]))])


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="loader must yield at least one batch"):
        score(lambda x: x, [])


def test_artifacts_are_loaded_with_the_threads_asked_for_and_measured(digits, tmp_path, monkeypatch):
    session = TemplateSession(*digits)
    loaded = []

    def load_artifact(path, *, threads):
        loaded.append((path, threads))
        return session

    monkeypatch.setitem(sys.modules, "lightning_edge.artifact", types.SimpleNamespace(load_artifact=load_artifact))
    (tmp_path / "a.edge").write_bytes(b"12345")
    images, labels = map(torch.tensor, digits)
    found = measure_artifacts(
        {"small": tmp_path / "a.edge"},
        loader=[(images[:100], labels[:100])],
        example_inputs=(images[:2],),
        threads=2,
        seconds=0.05,
    )["small"]
    assert loaded == [(tmp_path / "a.edge", 2)]
    assert (found.file, found.size_bytes, found.error.total) == ("a.edge", 5, 100)
    assert (found.latency.runtime, found.latency.p50_ms > 0) == ("numpy", True)
    assert set(session.seen) == {1, 100}
