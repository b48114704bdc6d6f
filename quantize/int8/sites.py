"""What this package knows of a model that it quantises: where its Linears are, and what they read.

A site is one activation and the Linears that multiply it. Only `Quantizable` reaches into the
model, by the module paths that the sites name.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """Linears that read one activation. Module paths."""

    group: str  # layers that are quantised together
    linears: tuple[str, ...]
    scaler: str | None  # the norm or Linear whose output channels are that activation's


@dataclass(frozen=True)
class Quantizable:
    """A float32 model and its sites, in the order in which they run."""

    module: nn.Module
    sites: tuple[Site, ...]

    def linears(self, site: Site) -> list[nn.Linear]:
        return [cast(nn.Linear, self.module.get_submodule(path)) for path in site.linears]

    def weight(self, site: Site) -> Tensor:
        """All that reads the site's activation: [out of all, in]."""
        return torch.cat([linear.weight for linear in self.linears(site)])

    def fold(self, site: Site, scale: Tensor) -> None:
        """Divide the site's activation by `scale` [in] in its scaler, and multiply its Linears.

        In exact arithmetic the model computes the same as before.
        """
        assert site.scaler is not None, "the caller asks only where a scaler is"
        with torch.no_grad():
            for parameter in self.module.get_submodule(site.scaler).parameters():
                parameter.div_(scale if parameter.ndim == 1 else scale[:, None])
            for linear in self.linears(site):
                linear.weight.mul_(scale)

    @contextmanager
    def watched(self, see: Callable[[Site, Tensor], None]) -> Iterator[None]:
        """While open, `see` gets the activation of every site that runs."""
        handles = [
            self.module.get_submodule(site.linears[0]).register_forward_pre_hook(
                lambda _, inputs, site=site: see(site, inputs[0])
            )
            for site in self.sites
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaced(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """While open, `layers` stand at their paths in the model."""
        before = {path: self.module.get_submodule(path) for path in layers}
        for path, layer in layers.items():
            self.module.set_submodule(path, layer)
        try:
            yield
        finally:
            for path, module in before.items():
                self.module.set_submodule(path, module)
