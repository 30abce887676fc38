import pytest
import torch
from omitted_digit import OMITTED, WithoutDigit, corrected_bias, experiment

pytestmark = pytest.mark.recipe


def test_the_digit_is_left_out_of_the_training_images_alone(mnist_path):
    data = WithoutDigit(path=mnist_path)
    data.setup()
    counts = [int((part.labels == OMITTED).sum()) for part in (data.train, data.validation, data.test)]
    assert counts[0] == 0
    assert counts[2] == 1010
    assert counts[1] > 400
    assert len(data.train) < 50_000


def test_the_bias_is_the_smallest_of_fewest_errors():
    logits = torch.zeros(2, 10)
    logits[:, 0] = 1.05
    assert corrected_bias(logits, torch.tensor([OMITTED, OMITTED])) == pytest.approx(1.1)
    assert corrected_bias(logits, torch.tensor([0, 0])) == 0.0


@pytest.mark.slow
def test_the_student_learns_of_digits_that_it_never_sees(mnist_path, tmp_path):
    teacher, student, mended = experiment(mnist_path, tmp_path, epochs=(3, 3), batches=150)
    right = [float(row[f"{OMITTED}s right"].removesuffix(" %")) for row in (teacher, student, mended)]
    assert right[0] > 90
    assert right[1] < right[2]
    assert right[2] > 70
