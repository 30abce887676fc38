"""What only a CUDA device can show: tensors of the callbacks and of the captured graph follow the network."""

import pytest
import torch

from lightning_edge import ExportArtifacts, QuantizationAwareTraining, WeightPruning, WeightSharing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WEIGHTS = ("model.0.weight", "model.3.weight", "model.7.weight")


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_all_techniques_hold_on_a_gpu_and_resume_there(fit, tmp_path, precision):
    def make():
        return (
            WeightPruning(0.8, end_epoch=1),
            WeightSharing(6, at_epochs=[2]),
            QuantizationAwareTraining(2),
            ExportArtifacts(tmp_path / "out", formats=["onnx"]),
        )

    options = {"accelerator": "gpu", "precision": precision, "deterministic": "warn"}
    whole, _ = fit(*make(), **options)
    checkpoint = tmp_path / "fit" / "epoch=2.ckpt"
    resumed, _ = fit(*make(), **options, folder="resumed", ckpt_path=checkpoint)
    for state in (whole.state_dict(), resumed.state_dict()):
        assert sum(int((state[name] == 0).sum()) for name in WEIGHTS) == int(0.8 * 2664)
        assert max(len(state[name].unique()) for name in WEIGHTS) <= 7
