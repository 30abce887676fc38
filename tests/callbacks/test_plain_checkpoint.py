"""A checkpoint needs nothing of this library: it is that of the plain network."""

import subprocess
import sys

from lightning_edge import QuantizationAwareTraining, WeightPruning, WeightSharing

PLAIN = """
import sys
import lightning as L
from torch import nn

class Plain(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 10),
        )

plain = Plain.load_from_checkpoint(sys.argv[1], strict=True, weights_only=True)
weights = [p for p in plain.parameters() if p.ndim > 1]
assert not [name for name in sys.modules if name.startswith("lightning_edge")]
print(sum(int((w == 0).sum()) for w in weights), max(len(w.unique()) for w in weights))
"""


def load_plainly(checkpoint):
    """Return the zeros and the largest number of distinct values that a process without this library finds."""
    command = [sys.executable, "-W", "ignore", "-c", PLAIN, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_after_pruning_and_sharing_and_during_quantization(fit, tmp_path):
    fit(WeightPruning(0.8, end_epoch=1), WeightSharing(6, at_epochs=[2]), QuantizationAwareTraining(3))
    for epoch in (2, 3):
        assert load_plainly(tmp_path / "fit" / f"epoch={epoch}.ckpt") == [int(0.8 * 2664), 7]
