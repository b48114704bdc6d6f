"""Weights to INT8, rounded so that their products with real activations change least.

Rounding every weight to its nearest step leaves an error that is the same for every token. GPTQ
(Frantar et al., arXiv 2210.17323) rounds one input channel after the other. The channels that are
not rounded yet correct the error, by the activations' second moments. About a third of the error
remains here (docs/log.md).
"""

import torch
from torch import Tensor

SMALLEST = torch.finfo(
    torch.float16
).smallest_normal  # scales are numbers that float16 holds in full
_DAMPING = 0.01  # of the mean second moment: fewer tokens than channels were seen in some layers
_BLOCK = 128  # channels whose corrections are applied together


def step(largest: Tensor) -> Tensor:
    """The scale that makes `largest` 127: a float16 number in float32."""
    return (largest / 127).clamp(min=SMALLEST).half().float()


def nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> whole numbers in -127..127 [out, in] and the scales [out]."""
    scale = step(weight.abs().amax(1))
    return (weight / scale[:, None]).round().clamp(-127, 127), scale


def compensated(weight: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """As `nearest`. second: the sum over tokens of x x^T of the activation, [in, in]."""
    _, scale = nearest(weight)
    second = second.clone()
    second.diagonal().add_(_DAMPING * second.diagonal().mean().clamp(min=1e-12))
    # Round the largest columns first: the columns after them can compensate the errors.
    order = second.diagonal().argsort(descending=True)
    rest = weight[:, order].clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rounded = torch.empty_like(weight)
    for start in range(0, rest.shape[1], _BLOCK):
        end = min(start + _BLOCK, rest.shape[1])
        block, u = rest[:, start:end], upper[start:end, start:end]
        errors = torch.empty_like(block)
        for j in range(end - start):
            whole = (block[:, j] / scale).round().clamp(-127, 127)
            errors[:, j] = (block[:, j] - whole * scale) / u[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * u[j, j + 1 :]
            rounded[:, order[start + j]] = whole
        rest[:, end:] -= errors @ upper[start:end, end:]
    return rounded, scale
