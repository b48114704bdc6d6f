"""SmoothQuant: part of an activation's unevenness moves into the weights that read it.

One massive activation (trained SmolVLA reaches 1600 where others are near 1) stretches a tensor's
INT8 steps for every token. So each input channel is divided by a scale and the weights are
multiplied by it, which changes nothing in exact arithmetic. The scale is
largest activation^alpha / largest weight^(1 - alpha) (Xiao et al., arXiv 2211.10438). alpha is
chosen for each activation by the error that its INT8 products have on observations.

If a norm or a Linear is before the activation, its weights include the division. If not, the INT8
layer multiplies.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.progress import SILENT, Progress
from .linear import Int8Linear, Quantized, fake_dynamic, fake_static
from .rounding import compensated, nearest
from .sites import Quantizable, Site

ALPHAS = (0.55, 0.7, 0.85, 1.0)
WORTH = 0.7  # a multiplication of its own must bring the error down to this
OUTLIER = 30.0  # a channel whose products reach this many times the median stays in float
TOKENS = 512  # of one run are enough for the second moments
EVERY = 6  # of its runs, a site's errors are measured in one: denoise steps are much alike
LEFT = 0.3  # of the weights' plain rounding error after quantize/int8/rounding.py


@dataclass
class SiteStatistics:
    """What was measured of one site's activation."""

    largest: Tensor = field(default_factory=lambda: torch.zeros(()))  # [in], of each channel
    second: Tensor = field(default_factory=lambda: torch.zeros(()))  # [in, in], sum of x x^T
    rows: int = 0  # tokens in one run
    runs: int = 0  # that `measure_errors` has seen
    # alpha -> squared relative error; None: no smoothing
    error: dict[float | None, float] = field(default_factory=dict)


StatisticsBySite = dict[Site, SiteStatistics]


def measure_moments(model: Quantizable, run: Callable[[], None]) -> StatisticsBySite:
    """Largest magnitudes and second moments of each site's activation in `run`."""
    statistics = {site: SiteStatistics() for site in model.sites}

    def see(site: Site, x: Tensor) -> None:
        found, tokens = statistics[site], x.flatten(0, -2)
        found.largest = torch.maximum(found.largest, tokens.abs().amax(0))
        some = tokens[:: max(1, len(tokens) // TOKENS)]
        even = some * _evenly(some)
        if not found.rows:
            found.second = torch.zeros(x.shape[-1], x.shape[-1])
        found.second.addmm_(even.T, even)
        found.rows = len(tokens)

    with model.watched(see):
        run()
    return statistics


def measure_errors(
    model: Quantizable, statistics: StatisticsBySite, run: Callable[[], None], *, static: bool
) -> None:
    """Add to `statistics` the error of each site's INT8 products for every alpha."""

    def see(site: Site, x: Tensor) -> None:
        found = statistics[site]
        found.runs += 1
        if found.runs % EVERY != 1:
            return
        weight = model.weight(site)
        exact = x @ weight.T
        even = _evenly(exact)
        inside = _inside(found.largest, weight)
        weight, x = weight * inside, x * inside
        for alpha in (None, *ALPHAS):
            scale = scales(found.largest * inside, weight, alpha)
            smoothed, stretched = x / scale, weight * scale
            rounded, steps = nearest(stretched)
            largest = (found.largest * inside / scale).max()
            coarse = fake_static(smoothed, largest) if static else fake_dynamic(smoothed)
            errors = (
                (coarse - smoothed) @ stretched.T,
                LEFT * smoothed @ (rounded * steps[:, None] - stretched).T,
            )
            error = sum(float((e * even).square().sum()) for e in errors)
            of = max(float((exact * even).square().sum()), 1e-12)
            found.error[alpha] = found.error.get(alpha, 0.0) + error / of

    with model.watched(see):
        run()


def _evenly(x: Tensor) -> Tensor:
    """Factors [..., 1] that make no token longer than the median one."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return torch.clamp(length.median() / length.clamp(min=1e-12), max=1)


def scales(largest: Tensor, weight: Tensor, alpha: float | None) -> Tensor:
    """-> what each input channel is divided by: float32 [in] of geometric mean near 1.

    It is 1 where a channel is silent. largest: [in], weight: [out, in].
    """
    if alpha is None:
        return torch.ones_like(largest)
    reach = weight.abs().amax(0)
    scale = largest.clamp(min=1e-5) ** alpha / reach.clamp(min=1e-5) ** (1 - alpha)
    even = scale / scale.log().mean().exp()
    return torch.where((largest > 0) & (reach > 0), even.clamp(1e-3, 1e3), 1.0)


def smooth(
    model: Quantizable,
    statistics: StatisticsBySite,
    make: Callable[[Quantized], Int8Linear],
    progress: Progress = SILENT,
) -> dict[str, Int8Linear]:
    """Fold the best scales into `model`, which computes the same as before.

    -> the INT8 layer of every Linear, by its path. `statistics` is used up.
    """
    chosen = {}
    for site, found in statistics.items():
        weight = model.weight(site)
        inside = _inside(found.largest, weight)
        alpha = min(found.error, key=lambda a: found.error[a])
        if site.scaler is None and found.error[alpha] > WORTH**2 * found.error[None]:
            alpha = None
        chosen[site] = scales(found.largest * inside, weight * inside, alpha), inside
    for site, (scale, inside) in chosen.items():
        if site.scaler is not None:
            model.fold(site, scale)
            found = statistics[site]
            found.largest = found.largest / scale
            found.second = found.second / scale / scale[:, None]
            chosen[site] = torch.ones_like(scale), inside
    layers: dict[str, Int8Linear] = {}
    for done, (site, (scale, inside)) in enumerate(chosen.items(), 1):
        layers |= _quantize(model, site, statistics[site], scale, inside, make)
        progress.count(done, len(chosen))
    return layers


def _quantize(
    model: Quantizable,
    site: Site,
    found: SiteStatistics,
    scale: Tensor,
    inside: Tensor,
    make: Callable[[Quantized], Int8Linear],
) -> dict[str, Int8Linear]:
    """The INT8 layers of one site. scale: what no layer before could take over, [in]."""
    factor = inside / scale
    second = found.second * factor * factor[:, None]
    found.second = torch.zeros(())  # the largest thing in memory
    rounded, steps = compensated(model.weight(site) * inside * scale, second)
    outliers = (inside == 0).nonzero().flatten()
    layers = {}
    start = 0
    for path, linear in zip(site.linears, model.linears(site), strict=True):
        rows = slice(start, start + len(linear.weight))
        start = rows.stop
        layers[path] = make(
            Quantized(
                rounded=rounded[rows],
                scale=steps[rows],
                bias=linear.bias,
                largest=(found.largest * factor).max(),
                factor=None if (factor == 1).all() else factor,
                outliers=outliers if len(outliers) else None,
                outlier_weight=linear.weight.T[outliers] if len(outliers) else None,
            )
        )
    return layers


def _inside(largest: Tensor, weight: Tensor) -> Tensor:
    """1 for each channel [in], 0 for outliers.

    The rounding error of an outlier in 8 bits is larger than the products of the other channels.
    """
    reach = largest * weight.abs().amax(0)
    return (reach <= OUTLIER * reach.median()).float()
