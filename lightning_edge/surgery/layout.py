"""Where outputs and inputs are in a layer's weight."""

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd


def outputs_first(tensor: Tensor, layer: nn.Module) -> Tensor:
    """Return a tensor of the shape of a layer's weight as (outputs, inputs of one output, *kernel).

    It is so already but in a transposed convolution, whose weight is (inputs, outputs of a group, *kernel). Called on
    its own result, it gives back the shape of the weight.

    >>> layer = nn.ConvTranspose2d(8, 6, 5, groups=2)
    >>> turned = outputs_first(layer.weight, layer); tuple(layer.weight.shape), tuple(turned.shape)
    ((8, 3, 5, 5), (6, 4, 5, 5))
    """
    if not isinstance(layer, _ConvTransposeNd):
        return tensor
    return tensor.reshape(layer.groups, -1, *tensor.shape[1:]).transpose(1, 2).flatten(0, 1)
