"""What the runs of a sweep say of its valley: curves drawn from the posterior of a curvature that varies.

Over d = log2(lr) - centre the loss is f = b + b' d + A (d²/2 + the double integral of a Gaussian process of variance 1):
a parabola whose curvature may double or vanish within an octave. A run adds noise of its own, which grows with the learning
rate, and noise that its seed shares between learning rates, a little of it everywhere and most of it over an octave. b, b'
and log A have flat priors; how much noise, how it grows and how much of it is shared are integrated over a grid. Of the
curves drawn only those with a single minimum are kept.

The constants are what fifteen recorded sweeps of the lab showed (``benchmarks/recorded``, measured by
``benchmarks/valley_population.py``); eight others tell how well they serve (``docs/results/valley_search.json``). A
stiffness chosen by left-out runs kept the noise that seeds share; the likelihood with the flat directions integrated
out (restricted likelihood) does not (docs/LOG.md, "Fewer runs"). Why Bayesian at all: choosing a polynomial and then
forgetting that one chose covered 0 to 99.5 % on valleys with one steep wall (docs/LOG.md, "Fitting a valley"). Noise is
relative to A, so that the unit of the loss does not matter.

Legend: N runs, D draws, M places of the mesh, R kinds of noise, G nodes of the grid, A values of A, K basis functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mue.lab.valley.prior import basis, own_noise, shared_noise
from mue.util.statistics import student_quantile

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

# Growth and sharing each off or as measured: two values integrate over whether there is any.
_GROWTH = (0.0, 0.7)  # octaves of noise per octave of learning rate
_SHARED = (0.0, 1.3)  # standard deviation of what a seed shares over that of a run's own noise
_OWN = np.geomspace(3e-3, 2.0, 12)  # standard deviation of a run's own noise over A, twice the rise an octave off
_TYPICAL, _SPREAD = math.log(0.27), 0.7  # of log own noise: mean and standard deviation of its prior
_SCALES = np.geomspace(1e-3, 2.5, 40)  # A, as a share of the spread of losses per squared octave
_DRAWS, _MESH = 1600, 97  # of a 95 % interval 20 draws are cut off at each end
_FEWEST = 30  # curves with one minimum, else the data are not a valley's and all curves are kept
_OUTLIER = 0.01  # chance that any clean run is called an outlier
_ASIDE = 1e4  # times the variance of a run that is set aside
_FLAT = 1e-8  # precision of a flat prior; zero would leave a matrix without an inverse
# Of the tails: the middle 97.5 % of the minima cover 95 % of valleys made from the fifteen sweeps. Held out: 93-97 %.
_CALIBRATION = 0.5
# More runs than this are averaged, for the work grows with their cube: octaves of a bin, groups of seeds.
_MOST, _BIN, _GROUPS = 150, 0.25, 4


@dataclass(frozen=True)
class Limits:
    """Where the minimum may lie, in log2(lr).

    An end is open where nothing beyond it was tried, else a wall: losses known to be high.
    """

    low: float
    high: float
    low_open: bool
    high_open: bool


@dataclass(frozen=True)
class NoiseModel:
    """One value for everything that the grid integrates over. own is relative to the curvature, shared to own."""

    growth: float
    own: float
    shared: float


@dataclass(frozen=True)
class Posterior:
    """Curves of the loss on a mesh of log2(lr), each with its minimum.

    Attributes:
        mesh: log2(lr). curves: the loss, in its own unit. minima: log2(lr). limits: between which they lie.
        centre: where d = 0. noise_model: the means over the grid's posterior, for whoever places the next run.
    """

    mesh: Array  # M
    curves: Array  # DM
    minima: Array  # D
    limits: Limits
    centre: float
    noise_model: NoiseModel
    noise: float
    """Standard deviation of one run's loss near the centre, all of its parts."""

    @property
    def curve(self) -> Array:
        """The mean curve."""
        return np.asarray(self.curves.mean(axis=0))

    def interval(self, confidence: float) -> tuple[float, float]:
        """The middle of the minima, with the tails cut that calibration left; unbounded where it reaches an open end.

        Args:
            confidence: 0.95, say.

        Returns:
            Its ends in log2(lr): -inf and inf where nothing bounds it.
        """
        tail = _CALIBRATION * (1 - confidence) / 2
        low, high = (float(q) for q in np.quantile(self.minima, [tail, 1 - tail]))
        return (
            -math.inf if low <= self.mesh[0] and self.limits.low_open else low,
            math.inf if high >= self.mesh[-1] and self.limits.high_open else high,
        )


def fit_posterior(
    x_N: Array, y_N: Array, seed_N: Array, centre: float, limits: Limits, noise: float | None
) -> Posterior:
    """Curves that the losses of runs leave possible.

    Args:
        x_N: log2(lr). y_N: losses, all finite. seed_N: runs of one seed share noise.
        centre: about where the minimum lies, in log2(lr). limits: where it may lie.
        noise: standard deviation of a loss between seeds near there, where it is known; None: found with the curve.
    """
    level, spread = float(y_N.mean()), float(np.ptp(y_N)) or 1.0  # so that the grids need not know the loss's unit
    x_N, y_N, seed_N, count_N = _averaged(x_N, y_N, seed_N)
    clear_N = np.ones(len(x_N), dtype=bool)
    known = None if noise is None else noise / spread
    # Each round sets aside what the last one found out of line: a bad run hides another by widening the noise.
    for _ in range(4):
        grid = _Grid.of(x_N - centre, (y_N - level) / spread, seed_N, count_N, clear_N, limits, centre, known)
        found_N = clear_N & grid.clear()
        if (found_N == clear_N).all():
            break
        clear_N = found_N
    node_D, scale_D, curves_DM = grid.draws()
    mesh_M = grid.mesh
    single_D = _one_minimum(curves_DM)
    if single_D.sum() >= _FEWEST:
        node_D, scale_D, curves_DM = node_D[single_D], scale_D[single_D], curves_DM[single_D]
    own_D, shared_D = grid.own[node_D], grid.shared[node_D]
    return Posterior(
        mesh=mesh_M + centre,
        curves=level + spread * curves_DM,
        minima=_minima(mesh_M, curves_DM) + centre,
        limits=limits,
        centre=centre,
        noise_model=NoiseModel(
            float(grid.growth[node_D].mean()),
            math.exp(float(np.log(own_D).mean())),
            float(shared_D.mean()),
        ),
        noise=spread * math.exp(float(np.log(scale_D * own_D * np.hypot(1, shared_D)).mean())),
    )


def _averaged(x_N: Array, y_N: Array, seed_N: Array) -> tuple[Array, Array, Array, Array]:
    """Place, loss, seed and number of runs, or of means of runs where there are more runs than matrices of their size allow.

    Averaged are runs of similar learning rate and of one group of seeds, which is taken for one seed: its shared noise is
    then found from the means themselves.
    """
    if len(x_N) <= _MOST:
        return x_N, y_N, seed_N, np.ones(len(x_N))
    group_N = np.unique(seed_N, return_inverse=True)[1] % _GROUPS
    keys = np.stack([np.round(x_N / _BIN), group_N], axis=1)
    _, member_N, count_P = np.unique(keys, axis=0, return_inverse=True, return_counts=True)

    x_P, y_P, group_P = (np.bincount(member_N.ravel(), v) / count_P for v in (x_N, y_N, group_N))
    return x_P, y_P, group_P, count_P.astype(np.float64)


@dataclass(frozen=True)
class _Grid:
    """The posterior at each node of (own noise; growth and shared noise), the data in units of their spread.

    Divided by A, the losses are (d²/2) + basis · weights + noise, the weights have the prior 0 ± (flat, flat, 1, 1, ...), and
    their posterior mean is y / A - m for a y and an m that do not depend on A. That is a Gaussian process with explicit
    basis functions (Rasmussen & Williams, Gaussian Processes for Machine Learning, 2006, section 2.7): given a node and
    A everything is in closed form, and only these are integrated by sums.
    """

    d: Array  # N
    z: Array  # N
    basis: Array  # NK
    inverse: Array  # RNN: of the noise's covariance at each (growth, shared noise)
    noise: npt.NDArray[np.int_]  # G: which of these a node has
    own: Array  # G
    growth: Array  # G
    shared: Array  # G
    root: Array  # GKK: its transpose times itself is the posterior covariance of the weights
    losses: Array  # GK: root times data: of the losses ...
    parabola: Array  # GK: ... and of d²/2
    scale: Array  # GA
    weight: Array  # GA
    mesh: Array  # M
    mesh_basis: Array  # MK

    @classmethod
    def of(
        cls,
        d_N: Array,
        z_N: Array,
        seed_N: Array,
        count_N: Array,
        clear_N: Mask,
        limits: Limits,
        centre: float,
        known: float | None,
    ) -> _Grid:
        """Of losses z over their spread; clear: false where set aside; known: the noise over the spread, if it is."""
        n, low, high = len(d_N), limits.low - centre, limits.high - centre
        growth_R, shared_R, noise_RNN = _noise_kinds(d_N, seed_N, count_N, clear_N)
        inverse_RNN: Array = np.linalg.inv(noise_RNN).astype(np.float64, copy=False)

        basis_NK = basis(d_N, low, high)
        k = basis_NK.shape[1]
        columns = np.concatenate([basis_NK, d_N[:, None] ** 2 / 2, z_N[:, None]], axis=1)
        products_R = columns.T @ inverse_RNN @ columns
        # Where A follows from the noise there is no second grid to average over, so this one is finer.
        owns = _OWN if known is None else np.geomspace(_OWN[0], _OWN[-1], 4 * len(_OWN))
        own_G, r = np.repeat(owns, len(growth_R)), np.tile(np.arange(len(growth_R)), len(owns))
        products_G = products_R[r] / own_G[:, None, None] ** 2
        prior_K = np.where(np.arange(k) < 2, _FLAT, 1.0)
        root_GKK = np.linalg.inv(np.linalg.cholesky(products_G[:, :k, :k] + np.diag(prior_K)))
        parabola_GK, losses_GK = (np.einsum("gkl,gl->gk", root_GKK, products_G[:, :k, k + c]) for c in (0, 1))

        scale_GA = np.broadcast_to(_SCALES, (len(own_G), len(_SCALES)))
        if known is not None:  # then A follows from the noise
            scale_GA = (known / (own_G * np.hypot(1, shared_R[r])))[:, None]
        quadratic_GA = _misfit(products_G[:, k:, k:], losses_GK, parabola_GK, scale_GA)
        # Log evidence but for the misfit: ½ log det of the weights' posterior covariance, -½ log det of the noise's,
        # and the prior of the own noise.
        constant_G = (
            np.log(np.diagonal(root_GKK, axis1=1, axis2=2)).sum(axis=1)
            - 0.5 * np.linalg.slogdet(noise_RNN)[1][r]
            - n * np.log(own_G)
            - 0.5 * ((np.log(own_G) - _TYPICAL) / _SPREAD) ** 2
        )
        # Dividing n losses by A costs n log A; the level and the slope, flat in the losses' own unit, give two of them
        # back.
        evidence_GA = constant_G[:, None] - 0.5 * quadratic_GA - (n - 2) * np.log(scale_GA)
        weight_GA = np.exp(evidence_GA - evidence_GA.max())
        mesh_M = np.linspace(low, high, _MESH)
        return cls(
            d=d_N,
            z=z_N,
            basis=basis_NK,
            inverse=inverse_RNN,
            noise=r,
            own=own_G,
            growth=growth_R[r],
            shared=shared_R[r],
            root=root_GKK,
            losses=losses_GK,
            parabola=parabola_GK,
            scale=scale_GA,
            weight=weight_GA / weight_GA.sum(),
            mesh=mesh_M,
            mesh_basis=basis(mesh_M, low, high),
        )

    def draws(self) -> tuple[npt.NDArray[np.int_], Array, Array]:
        """Node, A and curve (on the mesh) of each draw; the same for the same data.

        Nodes are taken at equal shares of their weight instead of at random, and each twice, for a curve and its
        mirror image about the mean: fewer draws then tell the tails as well.
        """
        total = np.cumsum(self.weight.ravel())
        places = (np.arange(_DRAWS // 2).repeat(2) + 0.5) / (_DRAWS // 2) * total[-1]
        node_D, a_D = np.divmod(np.minimum(np.searchsorted(total, places), len(total) - 1), self.scale.shape[1])
        scale_D = self.scale[node_D, a_D]
        half_DK = self.losses[node_D] / scale_D[:, None] - self.parabola[node_D]
        half_DK = half_DK + _normal(_DRAWS, self.mesh_basis.shape[1])
        weights_DK = np.einsum("dk,dkl->dl", half_DK, self.root[node_D])
        curves_DM = scale_D[:, None] * (self.mesh**2 / 2 + weights_DK @ self.mesh_basis.T)
        return node_D, scale_D, curves_DM

    def clear(self) -> Mask:
        """Which runs agree with what all the others say about them: leave-one-out residuals against their own spread.

        These are externally studentised residuals (Cook & Weisberg, Residuals and Influence in Regression, 1982),
        judged at the likeliest node; the chance is divided by the number of runs and of sides (Bonferroni).
        """
        n = len(self.d)
        freedom = n - 3 - 1  # level, slope and curvature are fitted, and the run itself is left out
        if freedom < 3:
            return np.ones(n, dtype=bool)  # too few to call one of them bad
        g, a = np.unravel_index(int(np.argmax(self.weight)), self.weight.shape)
        inverse_NN = self.inverse[self.noise[g]] / self.own[g] ** 2
        root_KN = self.root[g] @ self.basis.T
        projector_NN = inverse_NN - inverse_NN @ root_KN.T @ root_KN @ inverse_NN
        residual_N = self.z / self.scale[g, a] - self.d**2 / 2
        out_N = projector_NN @ residual_N
        own_N = np.maximum(np.diag(projector_NN), 1e-300)
        others_N = np.maximum((float(residual_N @ out_N) - out_N**2 / own_N) / freedom, 1e-12)
        t_N = np.abs(out_N) / np.sqrt(own_N * others_N)
        return np.asarray(t_N < student_quantile(1 - _OUTLIER / (2 * n), freedom))


def _noise_kinds(d_N: Array, seed_N: Array, count_N: Array, clear_N: Mask) -> tuple[Array, Array, Array]:
    """R, R, RNN: growth and shared part of each kind of noise, and its covariance, a run's own noise at the centre being 1."""
    growth_R, shared_R = (g.ravel() for g in np.meshgrid(_GROWTH, _SHARED, indexing="ij"))
    own_RN = own_noise(d_N, growth_R[:, None]) * np.where(clear_N, 1.0, _ASIDE) / count_N
    same_NN = shared_noise(d_N, d_N, seed_N, seed_N)
    return growth_R, shared_R, own_RN[:, :, None] * np.eye(len(d_N)) + shared_R[:, None, None] ** 2 * same_NN


def _misfit(products_G22: Array, losses_GK: Array, parabola_GK: Array, scale_GA: Array) -> Array:
    """GA: twice the negative log likelihood, up to a constant: losses / A minus the parabola, by what the weights leave of it.

    products: of (parabola, losses) with each other, over the noise.
    """

    def left(a: int, b: int, one_GK: Array, other_GK: Array) -> Array:
        return np.asarray(products_G22[:, a, b] - (one_GK * other_GK).sum(axis=1))[:, None]

    return np.asarray(
        left(1, 1, losses_GK, losses_GK) / scale_GA**2
        - 2 * left(0, 1, parabola_GK, losses_GK) / scale_GA
        + left(0, 0, parabola_GK, parabola_GK)
    )


@lru_cache(maxsize=64)
def _normal(rows: int, columns: int) -> Array:
    """Standard normal numbers, every second row the first's mirror image: their mean is exactly zero."""
    half = np.random.default_rng(0).normal(size=(rows // 2, columns))
    return np.asarray(np.stack([half, -half], axis=1).reshape(rows, columns))


def _one_minimum(curves_DM: Array) -> Mask:
    """Which curves fall, then rise; or only fall, or only rise: none that rises and falls again."""
    rising = np.diff(curves_DM, axis=1) > 0
    return np.asarray(~(rising[:, :-1] & ~rising[:, 1:]).any(axis=1))


def _minima(mesh_M: Array, curves_DM: Array) -> Array:
    """Where each curve is lowest: a parabola through the lowest place of the mesh and its neighbours."""
    lowest_D = curves_DM.argmin(axis=1)
    inside_D = np.clip(lowest_D, 1, len(mesh_M) - 2)
    rows = np.arange(len(curves_DM))
    left, here, right = (curves_DM[rows, inside_D + k] for k in (-1, 0, 1))
    bend = left - 2 * here + right
    shift = 0.5 * (left - right) / np.where(bend > 0, bend, np.inf)
    step = mesh_M[1] - mesh_M[0]
    at_end = lowest_D != inside_D
    return np.asarray(np.where(at_end, mesh_M[lowest_D], mesh_M[inside_D] + step * np.clip(shift, -0.5, 0.5)))
