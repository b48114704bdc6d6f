"""SmoothQuant: part of an activation's unevenness moves into the weights that read it.

One massive activation (trained SmolVLA reaches 1600 where others are near 1) would stretch a tensor's INT8 steps for
every token. Each input channel is divided by a scale and the weights multiplied by it, which changes nothing in
exact arithmetic. The scale is largest activation^alpha / largest weight^(1 - alpha) (Xiao et al., arXiv 2211.10438);
alpha is chosen for each activation by the error that its INT8 products have, on observations.

A norm, or a Linear, in front takes the division over (`fold`); where there is none, the INT8 layer multiplies.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from .linear import Int8Linear, Quantized, fake_dynamic, fake_static
from .rounding import compensated, nearest

ALPHAS = (0.55, 0.7, 0.85, 1.0)
WORTH = 0.7  # a multiplication of its own must bring the error down to this
OUTLIER = 30.0  # a channel whose products reach this many times the median channel's stays in float
TOKENS = 512  # of one run are enough for the second moments
EVERY = 6  # of its runs, a site's errors are measured in one: steps are much alike
LEFT = 0.3  # of the weights' plain rounding error after quantize/rounding.py


@dataclass(frozen=True)
class Site:
    """Linears of a view that read one activation. Module paths."""

    group: str  # layers that are quantised together
    linears: tuple[str, ...]
    scaler: str | None  # the norm or Linear whose output channels are that activation's


@dataclass
class Watched:
    """What was seen of one site's activation."""

    largest: Tensor = field(
        default_factory=lambda: torch.zeros(())
    )  # [in], magnitude of each channel
    second: Tensor = field(default_factory=lambda: torch.zeros(()))  # [in, in], sum of x x^T
    rows: int = 0  # tokens in one run
    tried: int = 0  # runs that `watch_errors` has seen
    error: dict[float | None, float] = field(
        default_factory=dict
    )  # alpha -> squared, relative; None: no smoothing


Seen = dict[Site, Watched]


@contextmanager
def _inputs(
    views: nn.Module, sites: Iterable[Site], see: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    """While open, `see` is given the activation of every site that runs."""
    handles = [
        views.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda _, given, site=site: see(site, given[0])
        )
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch_moments(views: nn.Module, sites: Iterable[Site], run: Callable[[], None]) -> Seen:
    """Largest magnitudes and second moments of each site's activation while `run` runs the views."""
    seen = {site: Watched() for site in sites}

    def see(site: Site, x: Tensor) -> None:
        watched, tokens = seen[site], x.flatten(0, -2)
        watched.largest = torch.maximum(watched.largest, tokens.abs().amax(0))
        some = tokens[:: max(1, len(tokens) // TOKENS)]
        even = some * _evenly(some)
        if not watched.rows:
            watched.second = torch.zeros(x.shape[-1], x.shape[-1])
        watched.second.addmm_(even.T, even)
        watched.rows = len(tokens)

    with _inputs(views, seen, see):
        run()
    return seen


def watch_errors(views: nn.Module, seen: Seen, run: Callable[[], None], *, static: bool) -> None:
    """Add to `seen` the error of each site's INT8 products for every alpha, while `run` runs the views."""

    def see(site: Site, x: Tensor) -> None:
        watched = seen[site]
        watched.tried += 1
        if watched.tried % EVERY != 1:
            return
        weight = _weight(views, site)
        exact = x @ weight.T
        even = _evenly(exact)
        inside = _inside(watched.largest, weight)
        weight, x = weight * inside, x * inside
        for alpha in (None, *ALPHAS):
            scale = scales(watched.largest * inside, weight, alpha)
            smoothed, stretched = x / scale, weight * scale
            rounded, steps = nearest(stretched)
            largest = (watched.largest * inside / scale).max()
            coarse = fake_static(smoothed, largest) if static else fake_dynamic(smoothed)
            errors = (
                (coarse - smoothed) @ stretched.T,
                LEFT * smoothed @ (rounded * steps[:, None] - stretched).T,
            )
            error = sum(float((e * even).square().sum()) for e in errors)
            of = max(float((exact * even).square().sum()), 1e-12)
            watched.error[alpha] = watched.error.get(alpha, 0.0) + error / of

    with _inputs(views, seen, see):
        run()


def _evenly(x: Tensor) -> Tensor:
    """Factors [..., 1] that make no token longer than the median one: one massive token is not the only one."""
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return torch.clamp(length.median() / length.clamp(min=1e-12), max=1)


def scales(largest: Tensor, weight: Tensor, alpha: float | None) -> Tensor:
    """-> what each input channel is divided by, float32 [in], of geometric mean near 1, and 1 where a channel is
    silent. largest [in], weight [out, in]."""
    if alpha is None:
        return torch.ones_like(largest)
    reach = weight.abs().amax(0)
    scale = largest.clamp(min=1e-5) ** alpha / reach.clamp(min=1e-5) ** (1 - alpha)
    even = scale / scale.log().mean().exp()
    return torch.where((largest > 0) & (reach > 0), even.clamp(1e-3, 1e3), 1.0)


def smooth(
    views: nn.Module, seen: Seen, make: Callable[[Quantized], Int8Linear]
) -> dict[str, Int8Linear]:
    """Fold the best scales into `views`, which compute the same as before, and -> the INT8 layer of every Linear, by
    its path. What was seen is used up."""
    chosen = {}
    for site, watched in seen.items():
        weight = _weight(views, site)
        inside = _inside(watched.largest, weight)
        alpha = min(watched.error, key=lambda a: watched.error[a])
        if site.scaler is None and watched.error[alpha] > WORTH**2 * watched.error[None]:
            alpha = None
        chosen[site] = scales(watched.largest * inside, weight * inside, alpha), inside
    for site, (scale, inside) in chosen.items():
        if site.scaler is not None:
            fold(views.get_submodule(site.scaler), _linears(views, site), scale)
            watched = seen[site]
            watched.largest, watched.second = (
                watched.largest / scale,
                watched.second / scale / scale[:, None],
            )
            chosen[site] = torch.ones_like(scale), inside
    layers = {}
    for site, (scale, inside) in chosen.items():
        watched, factor = seen[site], inside / scale  # the scale of what no layer before could take
        second = watched.second * factor * factor[:, None]
        watched.second = torch.zeros(())  # the largest thing there is
        rounded, steps = compensated(_weight(views, site) * inside * scale, second)
        outliers = (inside == 0).nonzero().flatten()
        start = 0
        for path, linear in zip(site.linears, _linears(views, site), strict=True):
            rows = slice(start, start := start + len(linear.weight))
            parts = Quantized(
                rounded=rounded[rows],
                scale=steps[rows],
                bias=linear.bias,
                largest=(watched.largest * factor).max(),
                factor=None if (factor == 1).all() else factor,
                outliers=outliers if len(outliers) else None,
                outlier_weight=linear.weight.T[outliers] if len(outliers) else None,
            )
            layers[path] = make(parts)
    return layers


def _weight(views: nn.Module, site: Site) -> Tensor:
    """All that reads the site's activation: [out of all, in]."""
    return torch.cat([linear.weight for linear in _linears(views, site)])


def _linears(views: nn.Module, site: Site) -> list[nn.Linear]:
    return [cast(nn.Linear, views.get_submodule(name)) for name in site.linears]


def _inside(largest: Tensor, weight: Tensor) -> Tensor:
    """1 for each channel [in], 0 for outliers: products so large that 8 bits of them are worse than what all others
    say."""
    reach = largest * weight.abs().amax(0)
    return (reach <= OUTLIER * reach.median()).float()


def fold(scaler: nn.Module, linears: Sequence[nn.Linear], scale: Tensor) -> None:
    """Divide the output channels of `scaler` (a norm or a Linear) by `scale` and multiply the linears' inputs."""
    with torch.no_grad():
        for parameter in scaler.parameters():
            parameter.div_(scale if parameter.ndim == 1 else scale[:, None])
        for linear in linears:
            linear.weight.mul_(scale)
