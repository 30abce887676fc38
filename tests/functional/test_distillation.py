import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_edge.functional.distillation import (
    attention_loss,
    contrastive_loss,
    cosine_loss,
    decoupled_loss,
    hint_loss,
    relational_loss,
    similarity_loss,
    soft_target_loss,
    squared_loss,
)

ALL = [
    soft_target_loss,
    hint_loss,
    similarity_loss,
    relational_loss,
    contrastive_loss,
    squared_loss,
    cosine_loss,
]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def probabilities(logits, temperature):
    powers = [math.exp(float(logit) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


def divergence(want, own):
    return sum(p * math.log(p / q) for p, q in zip(want, own, strict=True))


@given(st.integers(0, 99), st.floats(0.5, 8.0))
@settings(max_examples=20, deadline=None)
def test_soft_targets_are_the_mean_divergence_times_the_temperature_squared(seed, temperature):
    own, want = drawn(3, 4, seed=seed), drawn(3, 4, seed=seed + 100)
    rows = [
        divergence(probabilities(w, temperature), probabilities(o, temperature)) for o, w in zip(own, want, strict=True)
    ]
    expected = temperature**2 * sum(rows) / 3
    assert soft_target_loss(own, want, temperature=temperature).item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_gradient_of_soft_targets_hardly_depends_on_a_high_temperature():
    own, want = drawn(3, 4).requires_grad_(), drawn(3, 4, seed=1)
    gradients = [torch.autograd.grad(soft_target_loss(own, want, temperature=t), own)[0] for t in (50.0, 100.0)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.05, atol=1e-3)


def test_decoupled_parts_are_the_paper_s():
    own, want, labels = drawn(3, 5), drawn(3, 5, seed=1), torch.tensor([0, 3, 4])
    expected = 0.0
    for o, w, label in zip(own, want, labels.tolist(), strict=True):
        p, q = probabilities(w, 2.0), probabilities(o, 2.0)
        target = divergence([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = [[value / (1 - r[label]) for i, value in enumerate(r) if i != label] for r in (p, q)]
        expected += 4.0 * (1.5 * target + 6.0 * divergence(*others)) / 3
    loss = decoupled_loss(own, want, labels, temperature=2.0, alpha=1.5, beta=6.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_decoupled_with_the_teacher_s_own_weight_of_the_rest_is_soft_targets():
    own, want, label = drawn(1, 5), drawn(1, 5, seed=1), torch.tensor([2])
    rest = 1 - float(torch.softmax(want / 4, 1)[0, 2])
    assert decoupled_loss(own, want, label, beta=rest).item() == pytest.approx(
        soft_target_loss(own, want).item(), rel=1e-4
    )


def test_a_hint_is_the_mean_squared_distance_over_the_teacher_s_variance():
    own, want = drawn(2, 3, 4), drawn(2, 3, 4, seed=1)
    mean = sum(want.flatten().tolist()) / 24
    variance = sum((value - mean) ** 2 for value in want.flatten().tolist()) / 24
    distance = sum((a - b) ** 2 for a, b in zip(own.flatten().tolist(), want.flatten().tolist(), strict=True)) / 24
    assert hint_loss(own, want).item() == pytest.approx(distance / variance, rel=1e-4)


def test_attention_maps_are_sums_of_squares_normalized_for_each_example():
    own, want = drawn(2, 3, 2, 2), drawn(2, 5, 2, 2, seed=1)
    expected = 0.0
    for example in range(2):
        maps = []
        for features in (own, want):
            sums = [sum(float(c[i, j]) ** 2 for c in features[example]) for i in range(2) for j in range(2)]
            maps.append([value / math.sqrt(sum(v * v for v in sums)) for value in sums])
        expected += sum((a - b) ** 2 for a, b in zip(*maps, strict=True)) / 8
    assert attention_loss(own, want).item() == pytest.approx(expected, rel=1e-4)


def test_similarity_compares_normalized_rows_of_gram_matrices():
    own, want = drawn(3, 4), drawn(3, 2, seed=1)
    matrices = []
    for features in (own, want):
        gram = [[float(a @ b) for b in features] for a in features]
        matrices.append([[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in gram])
    expected = sum((matrices[0][i][j] - matrices[1][i][j]) ** 2 for i in range(3) for j in range(3)) / 9
    assert similarity_loss(own, want).item() == pytest.approx(expected, rel=1e-4)


def huber(a, b):
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def test_relations_are_distances_over_their_mean_and_cosines_of_angles():
    own, want = drawn(4, 3), 5 * drawn(4, 2, seed=1)
    distances, angles = [], []
    for points in (own, want):
        d = [[float((a - b).norm()) for b in points] for a in points]
        mean = sum(map(sum, d)) / 12
        distances.append([value / mean for row in d for value in row])
        cosines = []
        for j in range(4):
            for i in range(4):
                for k in range(4):
                    a, b = points[i] - points[j], points[k] - points[j]
                    size = float(a.norm() * b.norm())
                    cosines.append(float(a @ b) / size if size else 0.0)
        angles.append(cosines)
    expected = sum(map(huber, *distances)) / 16 + 2 * sum(map(huber, *angles)) / 64
    assert relational_loss(own, want).item() == pytest.approx(expected, rel=1e-3)


def test_relations_of_equal_points_have_a_finite_gradient():
    points = torch.ones(3, 2, requires_grad=True)
    relational_loss(points, drawn(3, 2)).backward()
    assert points.grad.isfinite().all()


def test_contrast_is_the_cross_entropy_of_finding_the_same_example_both_ways():
    own, want = drawn(3, 4), drawn(3, 4, seed=1)
    cosines = [[float(a @ b / (a.norm() * b.norm())) / 0.5 for b in want] for a in own]
    rows = sum(-math.log(probabilities(cosines[i], 1.0)[i]) for i in range(3)) / 3
    columns = sum(-math.log(probabilities([row[i] for row in cosines], 1.0)[i]) for i in range(3)) / 3
    assert contrastive_loss(own, want, temperature=0.5).item() == pytest.approx((rows + columns) / 2, rel=1e-4)


def test_squared_is_the_mean_over_all_elements_of_the_squared_difference():
    own, want = drawn(3, 2, 4), drawn(3, 2, 4, seed=1)
    differences = [(a - b) ** 2 for a, b in zip(own.flatten().tolist(), want.flatten().tolist(), strict=True)]
    assert squared_loss(own, want).item() == pytest.approx(sum(differences) / 24, rel=1e-5)


def test_cosine_is_one_less_the_mean_cosine_of_the_last_dimension():
    own, want = drawn(3, 2, 4), drawn(3, 2, 4, seed=1)
    cosines = []
    for a, b in zip(own.view(6, 4).tolist(), want.view(6, 4).tolist(), strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosines.append(dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    assert cosine_loss(own, want).item() == pytest.approx(1 - sum(cosines) / 6, rel=1e-5)


def test_cosine_is_blind_to_lengths():
    own, want = drawn(3, 4), drawn(3, 4, seed=1)
    assert cosine_loss(own, want).item() == pytest.approx(cosine_loss(7 * own, 0.1 * want).item(), rel=1e-4)
    assert cosine_loss(own, -own).item() == pytest.approx(2.0)


@pytest.mark.parametrize("loss", ALL)
def test_only_the_student_learns_and_half_precision_is_finite(loss):
    own = drawn(4, 6).requires_grad_()
    want = drawn(4, 6, seed=1).requires_grad_(loss is not contrastive_loss)
    loss(own, want).backward()
    assert float(own.grad.abs().sum()) > 0
    assert want.grad is None
    assert loss(own.detach().bfloat16(), want.detach().bfloat16()).isfinite()


@pytest.mark.parametrize("loss", ALL)
def test_what_is_equal_is_nearest(loss):
    own = drawn(4, 6)
    assert loss(own, own).item() <= loss(own + drawn(4, 6, seed=1), own).item()


@pytest.mark.parametrize("loss", [soft_target_loss, hint_loss, contrastive_loss, squared_loss, cosine_loss])
def test_other_shapes_are_refused(loss):
    with pytest.raises(ValueError, match="must have one shape"):
        loss(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("loss", [similarity_loss, relational_loss])
def test_other_batches_are_refused(loss):
    with pytest.raises(ValueError, match="equal batch"):
        loss(torch.zeros(2, 3), torch.zeros(3, 3))


def test_bad_arguments_are_refused():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        soft_target_loss(logits, logits, temperature=0.0)
    with pytest.raises(ValueError, match="shape \\(batch, classes\\), got \\(2, 3, 4\\)"):
        soft_target_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="labels must be 2 integers"):
        decoupled_loss(logits, logits, torch.zeros(2))
    with pytest.raises(ValueError, match="equal batch and positions"):
        attention_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2))


@pytest.mark.parametrize(
    "loss", [soft_target_loss, lambda s, t: decoupled_loss(s, t, torch.arange(8)), relational_loss]
)
def test_numbers_of_half_precision_are_compared_in_float32(loss):
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(8, 100, generator=draw).bfloat16()
    student = (teacher + 0.05 * torch.randn(8, 100, generator=draw)).bfloat16()
    expected = loss(student.float(), teacher.float())
    assert torch.equal(loss(student, teacher), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)
    assert torch.isfinite(loss(3e4 * torch.eye(8).half(), torch.zeros(8, 8).half()))


def test_a_hint_of_features_that_are_all_one_number_stays_small():
    student = torch.ones(4, 3)
    assert hint_loss(student, torch.zeros(4, 3)).item() == 1.0
    assert hint_loss(student, torch.full((4, 3), 2.0)).item() == pytest.approx(0.25)
    assert hint_loss(student[:1, :1], torch.full((1, 1), 2.0)).item() == pytest.approx(0.25)


def test_cosine_of_images_is_taken_over_their_channels():
    student, teacher = torch.randn(2, 5, 3, 1), torch.randn(2, 5, 3, 1)
    expected = 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=1).mean()
    assert cosine_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_that_are_no_classes_are_refused():
    logits = torch.randn(2, 3)
    assert decoupled_loss(logits, -logits, torch.tensor([0, 2], dtype=torch.int32)) > 0
    for wrong in (-100, 3):
        with pytest.raises(ValueError, match=rf"labels must lie in \[0, 3\), got \[{wrong}\]"):
            decoupled_loss(logits, logits, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="student must have logits of two classes at least"):
        decoupled_loss(logits[:, :1], logits[:, :1], torch.tensor([0, 0]))
