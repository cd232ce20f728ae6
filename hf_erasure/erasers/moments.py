"""Statistics of x and z, and the eraser that is solved from them (LEACE, arXiv 2306.03819, section 4)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .eraser import (
    FITS,
    METHODS,
    Beside,
    Eraser,
    Spread,
    append_directions,
    check_count,
    check_shrinkage,
    concept_columns,
    constrained_eraser,
    factorise,
    independent,
    leace_factors,
    mean_projection_factors,
    orth_factors,
    significance,
    whiten_concept,
)
from .least_squares import check_rounds, inlp_factors, ridge_factor
from .statistics import IGNORED, PackedGram, Sums, centred_products, infer_dims, read_rows, sum_rows


class ConceptMoments:
    """Streaming, mergeable statistics from which erasers are solved.

    Means, covariances with the concept and the solve are always float64: they decide the guarantee. The products for
    the covariance of x decide optimality only; they run in the precision of the rows, but at least float32, and are
    accumulated in float64. Every batch is centred on its own mean and merged pairwise, so the result does not depend on
    how rows are split into batches, processes or files, nor on how far they lie from zero.

    During an update all tensors together take at most 4 · x_dim² numbers of 4 bytes (for widths of 512 or more).

    Attributes:
        x_dim: Width of the activations.
        z_dim: Number of classes or concept values; 0 for a background, which has no concept.
    """

    def __init__(self, x_dim: int, z_dim: int) -> None:
        """Start empty.

        Args:
            x_dim: Width of the activations.
            z_dim: Number of classes or concept values; 0 for a background.

        Raises:
            TypeError: If a dimension is not an int.
            ValueError: If `x_dim` is below 1 or `z_dim` below 0.
        """
        check_count("x_dim", x_dim)
        check_count("z_dim", z_dim, least=0)
        self.x_dim, self.z_dim = x_dim, z_dim
        self._device: torch.device | None = None  # The device of the statistics: that of the first rows.
        self._sums: Sums | None = None
        self._gram: PackedGram | None = None
        self._is_interrupted = False

    # ------------------------------------------------------------------ gathering

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self, x: Tensor, z: Tensor | None = None, weight: Tensor | None = None, *, mask: Tensor | None = None
    ) -> ConceptMoments:
        """Add rows. If an error is raised, no row is added.

        Args:
            x: `(…, x_dim)` activations, any floating dtype, any device.
            z: Integer class ids `(…)` from 0 to z_dim − 1, −100 for a row that does not count; or one value per concept
                dimension `(…, z_dim)` (one-hot, multi-label, continuous); `(…)` floats if z_dim is 1. None for a
                background.
            weight: `(…)` non-negative weights. A row of weight 0 does not count.
            mask: `(…)` bool. Rows where it is False are not read: NaN in padding is fine.

        Returns:
            These moments. A batch without counted rows does not change them.

        Raises:
            TypeError: If an argument is not a tensor or holds the wrong kind of numbers.
            ValueError: If a shape does not fit, the batch is empty, a class id is out of range, or a counted row holds
                NaN or infinity.
        """
        self._check_complete()
        rows = read_rows(x, z, weight, mask, self.x_dim, self.z_dim, self._device)
        if rows.count == 0:
            return self
        with torch.autocast(rows.weight.device.type, enabled=False):
            sums = sum_rows(rows, self.z_dim)
            products, rounding = centred_products(rows, sums.mean_x)
        return self._add_sums(sums, products, rounding)

    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, other: ConceptMoments) -> ConceptMoments:
        """Add the rows of other moments, which do not change.

        Raises:
            TypeError: If `other` is not `ConceptMoments`.
            ValueError: If its dimensions differ.
        """
        if not isinstance(other, ConceptMoments):
            raise TypeError(f"other is {type(other).__name__}: merge takes ConceptMoments.")
        if (other.x_dim, other.z_dim) != (self.x_dim, self.z_dim):
            raise ValueError(
                f"other has x_dim={other.x_dim}, z_dim={other.z_dim}, but these moments have x_dim={self.x_dim}, "
                f"z_dim={self.z_dim}: only moments of the same site and concept merge."
            )
        self._check_complete()
        other._check_complete()
        if other._sums is None or other._gram is None:
            return self
        device = self._device or other._sums.mean_x.device
        products = PackedGram(self.x_dim, device, other._gram.values.to(device))
        return self._add_sums(other._sums.to(device), products, None)

    @property
    def shared(self) -> Sums | None:
        """The sums that `pool` needs from every process, on the CPU; None without rows."""
        self._check_complete()
        return None if self._sums is None else self._sums.to(torch.device("cpu"))

    @torch.inference_mode(False)
    @torch.no_grad()
    def pool(self, parts: Sequence[Sums | None], add: Callable[[Tensor], None]) -> ConceptMoments:
        """Merge, in every process at once, the moments of one site in all processes.

        Every process must call it, even one that has seen no rows; all end with the same numbers. The covariance of x
        is too large to be copied between processes: it is moved to the common mean and added in place.

        Args:
            parts: `shared` of all processes, in the same order in every process.
            add: Adds a tensor over all processes, in place.

        Raises:
            RuntimeError: If an earlier update was interrupted halfway.
        """
        own = self.shared
        present = [sums for sums in parts if sums is not None]
        if not present:
            return self
        merged = functools.reduce(Sums.merged, present)
        device = self._device or torch.device("cpu")
        gram = self._gram or PackedGram(self.x_dim, device)
        self._is_interrupted = True
        if own is not None:
            shift = (own.mean_x - merged.mean_x).to(device)
            scale = torch.tensor([own.weight], dtype=torch.float64, device=device)
            gram.absorb(None, shift[None], scale)
        add(gram.values)
        self._sums, self._gram, self._device, self._is_interrupted = merged.to(device), gram, device, False
        return self

    def _add_sums(self, sums: Sums, products: PackedGram, rounding: Tensor | None) -> ConceptMoments:
        """Add centred sums and products. `rounding` is the distance from the mean to the centre of the products."""
        mine, device = self._sums, sums.mean_x.device
        gram = self._gram or PackedGram(self.x_dim, device)
        merged = sums if mine is None else mine.merged(sums)
        outer: list[tuple[Tensor, float]] = []
        if rounding is not None:
            outer.append((rounding, -sums.weight))
        if mine is not None:
            outer.append((sums.mean_x - mine.mean_x, mine.weight / merged.weight * sums.weight))
        scales = torch.tensor([scale for _, scale in outer], dtype=torch.float64, device=device)
        vectors = torch.stack([vector for vector, _ in outer]) if outer else sums.mean_x.new_zeros(0, self.x_dim)
        # The code below does not raise an error, but can be interrupted. A second copy to fall back on would double the
        # memory, so a half-finished sum is marked, and not used.
        self._is_interrupted = True
        gram.absorb(products, vectors, scales)
        self._sums, self._gram, self._device, self._is_interrupted = merged, gram, device, False
        return self

    def _check_complete(self) -> None:
        if self._is_interrupted:
            raise RuntimeError(
                "An update of these moments was interrupted halfway, so they cannot be used: start new ones, or load "
                "a saved state with load_state_dict."
            )

    # ------------------------------------------------------------------ results

    @property
    def rows(self) -> int:
        """The number of counted rows."""
        return 0 if self._sums is None else self._sums.rows

    @property
    def weight(self) -> float:
        """The sum of the weights of all rows."""
        return 0.0 if self._sums is None else self._sums.weight

    @property
    def mean_x(self) -> Tensor:
        """The mean of the activations, `(x_dim,)` float64."""
        return self._statistics()[0].mean_x.clone()

    @property
    def mean_z(self) -> Tensor:
        """The mean of the concept, `(z_dim,)` float64; for class ids the shares of the classes."""
        return self._statistics()[0].mean_z.clone()

    @property
    def covariance_x(self) -> Tensor:
        """The population covariance of the activations, `(x_dim, x_dim)` float64, symmetric."""
        sums, gram = self._statistics()
        return gram.dense().div_(sums.weight)

    @property
    def variance_x(self) -> Tensor:
        """The population variances, `(x_dim,)` float64: the diagonal of `covariance_x`."""
        sums, gram = self._statistics()
        return gram.values[gram.diagonal] / sums.weight

    @property
    def cross_covariance(self) -> Tensor:
        """The population covariance of activations and concept, `(x_dim, z_dim)` float64."""
        sums, _ = self._statistics()
        return sums.cross / sums.weight

    @property
    def covariance_z(self) -> Tensor:
        """The population covariance of the concept, `(z_dim, z_dim)` float64; 0 for values that never vary."""
        sums, _ = self._statistics()
        covariance = sums.concept / sums.weight
        # Equal float64 numbers may differ from their own mean in the last digits.
        varies = covariance.diagonal() > (1e-12 * sums.mean_z).square()
        if sums.counts is not None:
            varies = (sums.counts > 0) & (sums.counts < sums.rows)
        return covariance * varies * varies[:, None]

    def check_concept(self) -> None:
        """Check that there is a concept to erase.

        Raises:
            ValueError: If no rows were seen, there is no concept, or it does not vary.
        """
        sums, _ = self._statistics()
        if self.z_dim == 0:
            raise ValueError("z_dim=0: these moments are a background without a concept. Set z_dim and give labels.")
        present = None if sums.counts is None else sums.counts.nonzero().squeeze(1)
        if present is not None and present.numel() == 1:
            raise ValueError(
                f"Only one class is present: all {sums.rows} rows have class id {int(present)}. A concept needs at "
                "least two classes; add rows of another class."
            )
        if not bool(self.covariance_z.diagonal().any()):
            raise ValueError(
                f"z does not vary over the {sums.rows} rows (mean_z={sums.mean_z.tolist()[:8]}): only one class or "
                "value is present. Add rows in which the concept differs."
            )

    def with_concept(self, mean: Tensor, cross: Tensor, covariance: Tensor) -> ConceptMoments:
        """Moments with this mean and covariance of x, and another concept; they share memory with these moments.

        Args:
            mean: `(k,)` mean of the concept.
            cross: `(x_dim, k)` covariance of x with the concept.
            covariance: `(k, k)` covariance of the concept.
        """
        sums, gram = self._statistics()
        other, weight = ConceptMoments(self.x_dim, mean.numel()), sums.weight
        other._device, other._gram = self._device, gram
        other._sums = replace(sums, mean_z=mean, cross=cross * weight, concept=covariance * weight, counts=None)
        return other

    def grouped(self, groups: Tensor, count: int) -> ConceptMoments:
        """These moments with some classes joined.

        Args:
            groups: `(z_dim,)` int64, the new class of each class.
            count: The number of new classes.
        """
        mix = torch.nn.functional.one_hot(groups.to(self.mean_z.device), count).to(self.mean_z)
        other = self.with_concept(self.mean_z @ mix, self.cross_covariance @ mix, mix.T @ self.covariance_z @ mix)
        if (counts := self._statistics()[0].counts) is not None:
            known = counts.new_zeros(count).index_add_(0, groups.to(counts.device), counts)
            other._sums = replace(other._statistics()[0], counts=known)
        return other

    def spread(self) -> Spread:
        """The mean and covariances as the methods use them; constant features have a variance of 0."""
        sums, gram = self._statistics()
        sigma = PackedGram(self.x_dim, gram.values.device, gram.values / sums.weight)
        variance = sigma.values[sigma.diagonal]
        variance[variance <= (1e-12 * sums.mean_x).square()] = 0.0
        sigma.values[sigma.diagonal] = variance
        cross, concept = sums.cross / sums.weight, self.covariance_z
        # Nor are the sums of equal numbers exact: this covariance is rounding, and next to no variance it would count.
        rounded = torch.outer(1e-12 * sums.mean_x.abs(), (concept.diagonal() + sums.mean_z.square()).sqrt())
        cross[(variance == 0)[:, None] & (cross.abs() <= rounded)] = 0.0
        return Spread(
            mean=sums.mean_x,
            shares=sums.mean_z,
            sigma=sigma,
            variance=variance,
            cross=cross,
            concept=concept,
            rows=sums.rows,
            effective_rows=sums.weight**2 / sums.weight_squares,
            resolution=sums.resolution,
        )

    def _statistics(self) -> tuple[Sums, PackedGram]:
        self._check_complete()
        if self._sums is None or self._gram is None:
            raise ValueError("These moments have seen no rows (rows=0): call update with data first.")
        return self._sums, self._gram

    # ------------------------------------------------------------------ solving

    @torch.inference_mode(False)
    @torch.no_grad()
    def eraser(
        self,
        method: str = "leace",
        *,
        affine: bool = True,
        keep_mean: bool = True,
        rank: int | None = None,
        rounds: int | None = None,
        shrinkage: str | float | None = "oas",
        background: ConceptMoments | None = None,
        background_weight: float = 1.0,
        beside: Beside = (),
        kept: Tensor | None = None,
    ) -> Eraser:
        """Solve for the eraser of the concept (arXiv 2306.03819, Theorems 4.2 and 4.3).

        After it, no linear predictor of z trained with a convex loss on these rows does better than the best
        constant. The guarantee depends on the covariances with z only; Σ, shrunk or taken from a background, only
        selects one of the maps with this guarantee. "inlp" does not have the guarantee.

        Args:
            method: "leace" changes the activations least in the metric of Σ. "orth" projects orthogonally; it is SAL
                (spectral attribute removal). "mean_projection" projects away the differences of the class means; it
                needs class ids, and is the same map as "orth" unless the rank is capped. "inlp" is iterative null-space
                projection with a least-squares probe: each round projects away the probe that best reads the rest of
                the concept after the rounds before. The probes, and so all rounds, are functions of the moments.
                For INLP with logistic regression, and for R-LACE, which need rows, see `Eraser.fit`.
            affine: Keep the mean in place by an affine part. Without it the map is linear: of all maps that erase the
                same directions and keep the mean, it is the one that changes the activations least.
            keep_mean: With `affine=False` only: whether the linear map keeps the mean. The map that does not keep it
                moves activations that are far from the origin.
            rank: The largest number of directions, those of the largest canonical correlations; None for all that are
                more than rounding, at most k − 1 for k classes. A smaller rank leaves a part of the concept. For
                "inlp" the directions of the first rounds are kept.
            rounds: For "inlp" only: the largest number of rounds. Each adds k − 1 directions for k classes. None is 10,
                or as many as a given rank needs. The rounds end early if no covariance with z is left.
            shrinkage: "oas", a share of the identity in [0, 1], or None; applied to the correlation matrix of x, so
                the scale of features does not matter. For "inlp" a ridge of that share of the mean variance.
            background: Moments of unlabelled activations that should change as little as possible; Σ and the mean are
                `background_weight` times theirs plus the rest of these moments' own. "inlp" always trains its probes on
                the labelled rows; it and the other orthogonal methods take only the mean from the background.
            background_weight: The share of the background, from 0 to 1.
            beside: Further columns to erase, as pairs of `(x_dim, m)` covariances or differences of x, and the largest
                number of their directions, None for all. Each group adds its strongest directions, in the metric of the
                method, without their part along earlier groups; the directions of the concept are always erased.
            kept: `(x_dim, m)` covariances of x with another label, which do not change (SPLINCE, arXiv 2506.10703).

        Returns:
            A frozen eraser, independent of these moments.

        Raises:
            TypeError: If `background` is not `ConceptMoments` or `rank` not an int.
            ValueError: If an option is unknown, no rows were seen, x or z does not vary, there is only one class, or no
                linear map keeps the mean.
        """
        _check_options(method, rounds, rank, shrinkage, background_weight, beside)
        self.check_concept()
        sums, labelled = self._statistics()[0], self.spread()
        if not bool((labelled.variance > 0).any()):
            raise ValueError(
                f"x is constant over all {sums.rows} rows: no feature varies, so there is nothing to erase. Check that "
                "the activations come from the right module."
            )
        if sums.rows <= self.x_dim:
            warnings.warn(
                f"Fitted on rows={sums.rows} of width x_dim={self.x_dim}: the guarantee holds for these rows, but "
                "with fewer rows than features most of it is chance. Give more rows.",
                stacklevel=4,  # past the two decorators above
            )
        columns = concept_columns(labelled)
        beside = [(independent(more.to(columns), labelled), most) for more, most in beside]
        spread, factor = labelled, None
        if background is not None:
            self._check_background(background)
            spread = labelled.with_background(background.spread(), background_weight)
        if method == "orth":
            left, right = orth_factors(columns, rank)
        elif method == "mean_projection":
            if sums.counts is None:
                raise ValueError(
                    "method is 'mean_projection', but the concept was not given as the class ids of one concept, so "
                    "there are no class means: give integer ids, or take 'orth', which removes the same directions and "
                    "needs covariances only."
                )
            shares = sums.mean_z * (sums.counts > 0)
            left, right = mean_projection_factors(columns, labelled.cross, shares, rank)
        elif method == "inlp":
            limit, ridged = check_rounds(rounds, rank), ridge_factor(labelled, shrinkage)
            left, right = inlp_factors(columns, ridged, limit, rank, significance(labelled.resolution))
        else:
            factor = factorise(spread, shrinkage)
            left, right = leace_factors(columns, factor, rank, beside, spread.resolution)
        if len(beside) and method != "leace":  # "orth" and "mean_projection" are orthogonal projections
            left, _ = append_directions(left, left, beside, spread.resolution)
            right = left.T
        return constrained_eraser(left, right, spread, affine=affine, keep_mean=keep_mean, factor=factor, kept=kept)

    def _check_background(self, background: ConceptMoments) -> None:
        if not isinstance(background, ConceptMoments):
            raise TypeError(f"background is {type(background).__name__}: give ConceptMoments of unlabelled rows.")
        if background.x_dim != self.x_dim or not background.rows:
            raise ValueError(
                f"background has x_dim={background.x_dim} and rows={background.rows}, and these moments have "
                f"x_dim={self.x_dim}: gather both at the same module, of one row or more."
            )

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all statistics, as tensors on the device of the moments."""
        dims = {"x_dim": torch.tensor(self.x_dim), "z_dim": torch.tensor(self.z_dim)}
        if self._sums is None:
            return dims
        sums, gram = self._statistics()
        return {**dims, **sums.state(), "gram": gram.values.clone()}

    @torch.inference_mode(False)
    def load_state_dict(self, d: dict[str, Tensor]) -> None:
        """Replace all statistics by a result of `state_dict`. If an error is raised, nothing is changed.

        Raises:
            ValueError: If an entry is missing, has another shape or is not finite, or the dimensions differ.
        """
        for name in ("x_dim", "z_dim"):
            if name not in d or int(d[name]) != getattr(self, name):
                raise ValueError(
                    f"The state has {name}={int(d[name]) if name in d else 'missing'}, but these moments have {name}="
                    f"{getattr(self, name)}: create ConceptMoments with the dimensions the state was saved with."
                )
        if "rows" not in d:
            self._sums, self._gram, self._is_interrupted = None, None, False
            return
        device = self._device or (d["gram"].device if "gram" in d else torch.device("cpu"))
        gram = PackedGram(self.x_dim, device)
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("rows", "weight", "weight_squares", "resolution"), ())
        shapes |= {"mean_x": (self.x_dim,), "mean_z": (self.z_dim,), "cross": (self.x_dim, self.z_dim)}
        shapes |= {"concept": (self.z_dim, self.z_dim), "gram": tuple(gram.values.shape)}
        shapes |= {"counts": (self.z_dim,)} if "counts" in d else {}
        for name, shape in shapes.items():
            if name not in d:
                raise ValueError(f"The state lacks {name!r}: give what state_dict returned, whole.")
            if tuple(d[name].shape) != shape:
                raise ValueError(f"{name!r} in the state has shape {tuple(d[name].shape)}: it must be {shape}.")
            if not bool(torch.isfinite(d[name]).all()):
                raise ValueError(f"{name!r} in the state is not finite: the file is damaged; gather the moments anew.")
        gram.values.copy_(d["gram"])
        self._sums, self._gram, self._device, self._is_interrupted = Sums.of(d).to(device), gram, device, False

    def __repr__(self) -> str:
        return f"ConceptMoments(x_dim={self.x_dim}, z_dim={self.z_dim}, rows={self.rows})"


def _check_options(
    method: str,
    rounds: int | None,
    rank: int | None,
    shrinkage: str | float | None,
    background_weight: float,
    beside: Beside,
) -> None:
    if method == "rlace":
        raise ValueError(
            "method is 'rlace', which needs the rows, and moments do not keep them: call Eraser.fit(x, z, "
            "'rlace'). Its optimum for k classes and k − 1 directions is what 'orth' computes."
        )
    if rounds is not None and method != "inlp":
        raise ValueError(f"rounds is {rounds!r}, but method is {method!r}: only 'inlp' has rounds.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: it must be one of {', '.join(map(repr, METHODS))}.")
    check_count("rank", rank, none=", or None for all directions")
    check_shrinkage(shrinkage)
    if isinstance(background_weight, bool) or not isinstance(background_weight, (int, float)):
        raise TypeError(f"background_weight is {background_weight!r}: give a number from 0 to 1.")
    if not 0 <= background_weight <= 1:
        raise ValueError(f"background_weight is {background_weight!r}: it must lie between 0 and 1.")
    if method == "inlp" and len(beside):
        raise ValueError("method is 'inlp', which cannot erase further columns beside the concept: use 'leace'.")


def batch_moments(x: Tensor, z: Tensor, weight: Tensor | None, mask: Tensor | None) -> ConceptMoments:
    """The moments of one batch; its largest class id sets the number of classes."""
    return ConceptMoments(*infer_dims(x, z, mask)).update(x, z, weight, mask=mask)


FITS["moments"] = lambda x, z, weight, mask, **options: batch_moments(x, z, weight, mask).eraser(**options)


# ---- several labels at once ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Strata:
    """The classes of a concept, split by environment and by the class of the label that is kept.

    One id stands for all three, so that the moments of one pass have the covariances with each of them.

    Attributes:
        classes: The number of classes of the concept.
        environments: The number of environments, such as templates or sources; 1 if there are none.
        kept: The number of classes of the label that is kept; 1 if there is no such label.
    """

    classes: int
    environments: int = 1
    kept: int = 1

    @property
    def size(self) -> int:
        """The number of ids."""
        return self.classes * self.environments * self.kept

    def ids(self, labels: Tensor, environments: Tensor | int = 0, kept: Tensor | int = 0) -> Tensor:
        """The ids of rows, `IGNORED` where the label is; the arguments have one shape, or broadcast to it."""
        return torch.where(
            labels == IGNORED, IGNORED, labels + self.classes * (environments + self.environments * kept)
        )

    def concept(self, moments: ConceptMoments) -> ConceptMoments:
        """The moments of the concept alone."""
        return moments if self.size == self.classes else moments.grouped(self._all_ids() % self.classes, self.classes)

    def kept_columns(self, moments: ConceptMoments) -> Tensor | None:
        """The covariances of x with the label that is kept, `(x_dim, m)`; None if there is no such label."""
        if self.kept == 1:
            return None
        whole = moments.grouped(self._all_ids() // (self.classes * self.environments), self.kept)
        return whole.cross_covariance @ whiten_concept(whole.covariance_z)

    def environment_columns(self, moments: ConceptMoments) -> Tensor:
        """The covariances of x with the concept in each environment, times the root of its share, `(x_dim, m)`.

        An environment in which only one class occurs adds no columns.
        """
        apart = moments.grouped(self._all_ids() % (self.classes * self.environments), self.classes * self.environments)
        shares = apart.mean_z.view(self.environments, self.classes)
        crosses = apart.cross_covariance.unflatten(1, shares.shape)
        columns = []
        for place, own in enumerate(shares):
            share = own.sum()
            if share > 0:
                within, cross = own / share, crosses[:, place] / share
                centred = cross - cross.sum(1, keepdim=True) * within
                concept = within.diag() - torch.outer(within, within)
                columns.append(share.sqrt() * centred @ whiten_concept(concept))
        found = torch.cat(columns, 1)
        if not found.shape[1]:
            raise ValueError("Every environment has rows of one class only: they tell nothing that differs within one.")
        return found

    def _all_ids(self) -> Tensor:
        return torch.arange(self.size, device="cpu")
