import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge.export.verification import ArtifactMismatchError, LabelledInputs, Verification, verify
from lightning_edge.surgery.calls import Arguments


def test_rows_agree_where_the_largest_value_is_at_the_same_place():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0], [0.0, 5.0, 0.0]])

    def session(array):
        changed = array.copy()
        changed[1] = [2.0, 2.5, 0.0]
        return changed

    result = verify(session, nn.Identity(), [logits[:2], logits[:2]])
    assert result == Verification(rows=4, agreeing=2, largest_difference=1.5)
    assert result.agreement == 0.5
    assert str(result) == "2/4 labels as trained, largest difference 1.5"


def test_the_network_runs_in_evaluation_mode_without_gradients_and_gets_its_modes_back():
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    network = nn.Sequential(Probe(), nn.Dropout(0.9))
    network[1].eval()
    assert verify(lambda x: x, network, [torch.eye(4)]).agreeing == 4
    assert seen == [(False, False)]
    assert [module.training for module in network.modules()] == [True, True, False]


def test_several_inputs_and_outputs_are_all_compared():
    class Two(nn.Module):
        def forward(self, x, y):
            return x, x + y

    result = verify(lambda x, y: (x, x + y + 0.5), Two(), [(torch.eye(2), torch.ones(2, 2))])
    assert result == Verification(rows=2, agreeing=2, largest_difference=0.5)


def test_a_file_that_gives_no_numbers_never_passes():
    result = verify(lambda x: x * np.float32("nan"), nn.Identity(), [torch.eye(2)])
    assert result.largest_difference == float("inf")
    with pytest.raises(ArtifactMismatchError, match="a finite difference"):
        result.check("model.onnx", min_agreement=0.0)


def test_the_check_names_file_counts_difference_and_limits():
    result = Verification(rows=1000, agreeing=985, largest_difference=0.25)
    with pytest.raises(ArtifactMismatchError, match=r"model\.onnx must .*0\.99 of the labels.*985/1000.*0\.25"):
        result.check("model.onnx", min_agreement=0.99)
    with pytest.raises(ArtifactMismatchError, match=r"at most 0\.1\), got 985/1000 labels .* 0\.25"):
        result.check("model.onnx", min_agreement=0.9, max_difference=0.1)


@pytest.mark.parametrize(("agreeing", "rows", "least"), [(99, 100, 0.99), (29, 100, 0.29), (7, 10, 0.7), (0, 5, 0.0)])
def test_the_least_agreement_itself_is_enough(agreeing, rows, least):
    Verification(rows=rows, agreeing=agreeing, largest_difference=0.0).check("model.pte", min_agreement=least)


def test_other_shapes_and_empty_data_are_errors():
    with pytest.raises(ArtifactMismatchError, match=r"shapes {'0': \(2, 2\)}, like the network, got {'0': \(2, 1\)}"):
        verify(lambda x: x[:, :1], nn.Identity(), [torch.eye(2)])
    with pytest.raises(ValueError, match="at least one row"):
        verify(lambda x: x, nn.Identity(), [])


def test_both_accuracies_are_counted_over_the_labels_of_the_data():
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    batches = [LabelledInputs(Arguments((logits,)), labels)] * 2
    result = verify(lambda x: x[[0, 0, 2, 3]], nn.Identity(), batches)
    assert (result.agreeing, result.right, result.right_as_trained) == (6, 4, 6)
    assert str(result) == "6/8 labels as trained, largest difference 1, 4/8 right, as trained 6/8"
    result.check("model.onnx", min_agreement=0.0, tolerance=0.25)
    with pytest.raises(ArtifactMismatchError, match=r"at most 0\.24 of the labels more wrong .*, got 4/8 .* 6/8"):
        result.check("model.onnx", min_agreement=0.0, tolerance=0.24)


def test_a_tolerance_needs_labels():
    result = verify(lambda x: x, nn.Identity(), [torch.eye(2)])
    assert result.right is None
    with pytest.raises(ValueError, match=r"tolerance must be None where batches have no targets, got 0\.1"):
        result.check("model.onnx", tolerance=0.1)


def test_outputs_of_a_dict_are_compared_by_name():
    class Named(nn.Module):
        def forward(self, x):
            return {"logits": x, "features": {"last": 2 * x}}

    class Session:
        outputs = ("features.last", "logits")

        def __call__(self, x):
            return 2 * x, x + 0.25

    assert verify(Session(), Named(), [torch.eye(2)]).largest_difference == 0.25
    Session.outputs = ("features", "logits")
    with pytest.raises(ArtifactMismatchError, match=r"shapes {'logits'.*'features.last'.* got {'features'"):
        verify(Session(), Named(), [torch.eye(2)])
