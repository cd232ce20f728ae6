"""The checkpoint of a fit, which can be killed at any moment and started again.

A folder holds `fit.json`, which says what is fitted and how, and one file for each finished site (sequential fitting)
or the moments so far (one pass). Every file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.common.config import ACTIVE
from hf_erasure.adapters.common.files import read_tensors, read_text, write_tensors, write_text
from hf_erasure.adapters.saving import digest_of_data
from hf_erasure.erasers import Eraser
from hf_erasure.models.layout import Visit

from .labels import BatchLabels, SiteStatistics, Source
from .processes import Processes
from .report import SiteReport
from .sites import SiteFit

MANIFEST = "fit.json"
ONE_SITE_A_PASS = "one-site-a-pass"
# The key in the manifest for sites that the data did not reach, or did not label.
_LEFT_OUT = "left_out"
# The key for digests of samples of the model's weights, by their names.
_WEIGHTS = "weights"
# The fields of a configuration that an eraser depends on; those of `_OPTIONAL` are written only where they are set.
_FIELDS = ("labels", "concept_dim", "site", "method", "affine", "rank")
_OPTIONAL = ("pair_rank", "environment_rank", "environments", "kept")
# Moments are written so rarely that writing takes at most this share of the time.
WRITING_SHARE = 0.1


class FitCheckpoint:
    """The folder of one fit, created if it is missing; `active` are the other adapters that act, as in `ACTIVE`.

    `samples` of the model's weights are as in the fingerprint of an adapter; without them any weights will do.
    """

    def __init__(
        self,
        folder: str | Path,
        config: ConceptErasureConfig,
        sites: Iterable[str],
        *,
        pool: str,
        sequential: bool,
        processes: int = 1,
        active: Iterable[dict[str, Any]] = (),
        samples: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.sites = list(sites)
        self.identity: dict[str, Any] = {
            "sequential": sequential,
            "pool": pool,
            "sites": self.sites,
            ACTIVE: [f"{entry.get('kind')} {entry.get('name')}" for entry in active],
            **{name: getattr(config, name) for name in _FIELDS},
            **{name: value for name in _OPTIONAL if (value := getattr(config, name))},
        }
        if processes > 1:
            self.identity["processes"] = processes
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest = self.folder / MANIFEST
        weights = {name: digest_of_data(sample) for name, sample in (samples or {}).items()}
        if not manifest.exists():
            self.identity[_WEIGHTS] = weights
            write_text(manifest, json.dumps(self.identity))
            return
        saved = json.loads(read_text(manifest))
        left_out = saved.get(_LEFT_OUT, ())
        if self.sites == [site for site in saved.get("sites", ()) if site not in left_out]:
            self.sites = self.identity["sites"] = saved["sites"]
        for name in [*self.identity, *(name for name in _OPTIONAL if name in saved)]:
            value = self.identity.get(name)
            if saved.get(name, [] if name == ACTIVE else None) != value:
                raise ValueError(
                    f"checkpoint_dir={str(self.folder)!r} holds a fit with {name}={saved.get(name)!r}, this one has "
                    f"{value!r}: give another folder, or delete that one."
                )
        known = saved.get(_WEIGHTS, {})
        if other := [name for name, digest in weights.items() if known.get(name, digest) != digest]:
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} holds a fit of a model with another {other[0]!r}: give another "
                "folder, or delete that one."
            )
        self.identity[_WEIGHTS] = {**known, **weights}

    def leave_out(self, sites: Iterable[str]) -> None:
        """Record the sites that were taken off the adapter, so that the adapter without them still fits this folder."""
        write_text(self.folder / MANIFEST, json.dumps({**self.identity, _LEFT_OUT: list(sites)}))

    # ---- finished sites ---------------------------------------------------------------------------------------------

    @property
    def one_site_a_pass(self) -> bool:
        """Whether the fit changed to one site per pass, because the model calls a site several times."""
        return (self.folder / ONE_SITE_A_PASS).exists()

    def begin_one_site_a_pass(self) -> None:
        """Start over with one site per pass: the finished sites were fitted on their first visits only."""
        for path in self.folder.glob("site-*.safetensors"):
            path.unlink()
        (self.folder / ONE_SITE_A_PASS).touch()

    def save_site(self, site: str, fit: SiteFit, data: str) -> None:
        """Save a finished site; `data` identifies the batches that it was fitted on."""
        eraser = fit.eraser
        tensors = {"left": eraser.left, "right": eraser.right, "shares": fit.shares}
        optional = {"bias": eraser.bias, "readings": fit.readings}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        figures = {"rows": fit.line.rows, "change": fit.line.change_labelled}
        facts = {"site": site, "data": data, "dtype": str(fit.dtype).removeprefix("torch."), **figures}
        write_tensors(self.folder / f"site-{self.sites.index(site):04d}.safetensors", tensors, facts)

    def load_sites(self, data: str) -> dict[str, SiteFit]:
        """Load the finished sites, and check that they were fitted on `data`."""
        found = {}
        for path in sorted(self.folder.glob("site-*.safetensors")):
            tensors, facts = read_tensors(path)
            self.check_data(facts["data"], data)
            eraser = Eraser(left=tensors["left"], right=tensors["right"], bias=tensors.get("bias"))
            figures = {"rows": facts["rows"], "change_labelled": facts["change"]}
            line = SiteReport(facts["site"], width=eraser.x_dim, rank=eraser.rank, **figures)
            dtype, readings = getattr(torch, facts["dtype"]), tensors.get("readings")
            found[line.site] = SiteFit(eraser, dtype, tensors["shares"], line, readings=readings)
        return found

    # ---- moments so far ---------------------------------------------------------------------------------------------

    def save_moments(self, name: str, source: Source, batches: int, data: str) -> None:
        """Save the moments of a source after so many batches, which `data` identifies."""
        tensors = {
            f"{self._prefix(visit)}{key}": value
            for visit, moments in source.moments.items()
            for key, value in moments.state_dict().items()
        }
        facts = {
            "batches": batches,
            "data": data,
            "examples": source.examples,
            "tokens": source.tokens,
            "widths": {str(visit): moments.x_dim for visit, moments in source.moments.items()},
            "dtypes": {str(visit): str(dtype).removeprefix("torch.") for visit, dtype in source.dtypes.items()},
        }
        write_tensors(self.folder / f"moments-{name}.safetensors", tensors, facts)

    def load_moments(self, name: str, statistics: SiteStatistics) -> dict[str, Any]:
        """Load the saved moments into empty statistics; returns the facts saved with them, empty if none were saved."""
        path = self.folder / f"moments-{name}.safetensors"
        if not path.exists():
            return {}
        tensors, facts = read_tensors(path)
        for text, width in facts["widths"].items():
            visit = Visit.named(text)
            prefix, moments = self._prefix(visit), statistics.moments_for(visit, width)
            moments.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            statistics.dtypes[visit] = getattr(torch, facts["dtypes"][text])
        return facts

    def unsaved(self, source: Source, batches: Iterable[BatchLabels], processes: Processes) -> Iterator[BatchLabels]:
        """Yield the batches of one pass that the saved moments do not hold yet, and save the moments on the way.

        The source must not have been read yet; the saved moments are loaded into it. Each of several processes saves
        the moments of its own share.
        """
        name = source.key if processes.count == 1 else f"{source.key}-{processes.rank}-of-{processes.count}"
        facts, digest, written, writing_took = self.load_moments(name, source), hashlib.sha256(), time.monotonic(), 0.0
        batches_before, number = facts.get("batches", 0), 0
        for number, labels in enumerate(batches, 1):
            update_hash(digest, labels.batch)
            if number == batches_before:
                self.check_data(facts["data"], digest.hexdigest())
            if number > batches_before:
                yield labels  # its moments have been added when the next batch is asked for
                started = time.monotonic()
                if started - written >= writing_took / WRITING_SHARE:
                    self.save_moments(name, source, number, digest.hexdigest())
                    written = time.monotonic()
                    writing_took = written - started
        if number < batches_before:
            self.check_data(facts["data"], digest.hexdigest())
        self.save_moments(name, source, number, digest.hexdigest())

    def _prefix(self, visit: Visit) -> str:
        """The prefix of the names of the tensors of a visit: the site's number stands for its name."""
        return f"{visit._replace(site=str(self.sites.index(visit.site)))}."

    def check_data(self, kept: str, data: str) -> None:
        """Raise a `ValueError` if the checkpoint comes from other batches: if the two digests differ."""
        if kept != data:
            raise ValueError(
                f"checkpoint_dir={str(self.folder)!r} was begun on other data than these batches: give the same "
                "batches in the same order, or another folder."
            )


def digest_of(batches: Sequence[BatchLabels]) -> str:
    """A hash of the tensors of batches, in order, which identifies them; empty without batches."""
    digest = hashlib.sha256()
    for labels in batches:
        update_hash(digest, labels.batch)
    return digest.hexdigest() if batches else ""


def update_hash(digest: Any, batch: Mapping[str, Any]) -> None:
    """Add the tensors of a batch to a hash of `hashlib`."""
    for name in sorted(batch):
        if isinstance(value := batch[name], Tensor):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def joint_digest(digests: list[str]) -> str:
    """The digest of the batches of all processes: that of a single process, or a hash of the digests in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
