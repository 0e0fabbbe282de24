"""Synthetic valleys fitted to the recorded sweeps: their shapes, their noise, their training curves.

Three kinds, so that a fit is not judged by valleys of its own making alone:

    smooth   a recorded sweep's smoothing spline; Gaussian noise of the recorded size, growth and sharing by seeds
    mixed    between two recorded sweeps, stretched; the recorded residuals themselves, drawn again
    rough    drawn from what ``mue.lab.valley.posterior`` leaves possible after a recorded sweep; Gaussian noise

Positions are d = log2(lr) - minimum. Legend: S seeds, X recorded learning rates, F frequencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mue.lab.valley import LossPoint, fit_valley
from mue.lab.valley.fit import fit_with_posterior

KINDS = ("smooth", "mixed", "rough")
Array = npt.NDArray[np.float64]
Curve = list[tuple[int, float]]

_FAR = 3.0  # octaves from the minimum beyond which the noise grows no more
_WAVES = 30  # of which a seed's noise is made
_MESH = 0.05  # octaves
_WALL = 1.0  # octaves of both walls that a recorded sweep must show to be of use
_STRETCH = 1.25  # a mixed valley is up to so many times wider or narrower than recorded


@dataclass(frozen=True)
class Recorded:
    """One sweep: losses of every seed at every learning rate (NaN where there was no run), and the training curves."""

    name: str
    x: Array  # X
    loss: Array  # SX
    curves: dict[tuple[int, int], Curve]  # of (seed's row, place in x): (step, loss)
    steps: int

    @property
    def points(self) -> list[LossPoint]:
        """The runs as the valley fit takes them."""
        rows, places = np.nonzero(np.isfinite(self.loss))
        return [LossPoint(float(self.x[j]), float(self.loss[i, j]), int(i)) for i, j in zip(rows, places, strict=True)]

    @property
    def whole(self) -> Array:
        """The rows of seeds that ran at every learning rate."""
        return self.loss[np.isfinite(self.loss).all(axis=1)]


def load(path: Path) -> list[Recorded]:
    """The recorded sweeps that are complete (three seeds at each learning rate), in the order they were recorded."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return [found for number, cell in enumerate(data["cells"]) if (found := _recorded(number, cell, data["every"]))]


def _recorded(number: int, cell: dict[str, Any], every: int) -> Recorded | None:
    runs = cell["runs"]
    x = sorted({r["log2_lr"] for r in runs})
    seeds = sorted({r["seed"] for r in runs})
    loss = np.full((len(seeds), len(x)), math.nan)
    curves = {}
    for r in runs:
        place = seeds.index(r["seed"]), x.index(r["log2_lr"])
        loss[place] = math.nan if r["loss"] is None else r["loss"]
        curves[place] = [(every * (k + 1), math.inf if y is None else y) for k, y in enumerate(r["curve"])]
    if len(x) < 13 or np.isfinite(loss).all(axis=1).sum() < 3:
        return None
    name = f"{number}: d{cell['width']} L{cell['layers']} init {cell['init_std']:g} wd {cell['weight_decay']:g}"
    return Recorded(name, np.array(x), loss, curves, cell["steps"])


# ------------------------------------------------------------------------------------------------------------- the noise


@dataclass(frozen=True)
class Noise:
    """Standard deviations in nats of a run's own noise at the minimum and of what a seed shares, growth, length."""

    own: float
    everywhere: float
    local: float
    growth: float  # octaves of the own noise per octave of learning rate
    length: float

    def spread(self, d: Array) -> Array:
        """Standard deviation of a run's own noise."""
        return np.asarray(self.own * 2.0 ** (self.growth * np.clip(d, -_FAR, _FAR)))

    def shared(self, a: Array, b: Array) -> Array:
        """Covariance of runs of one seed."""
        return np.asarray(self.everywhere**2 + self.local**2 * np.exp(-0.5 * ((a[:, None] - b) / self.length) ** 2))


def residuals(sweep: Recorded) -> Array:
    """S', X: of whole rows, what is left of the losses when the mean of each learning rate is taken away."""
    return np.asarray(sweep.whole - sweep.whole.mean(axis=0))


def fit_noise(sweeps: Sequence[Recorded], bottoms: Sequence[float]) -> Noise:
    """The likeliest noise: the residuals' restricted likelihood does not depend on the curves. By coordinate search."""
    rests = [(s.x - at, residuals(s)) for s, at in zip(sweeps, bottoms, strict=True)]

    def cost(theta: Array) -> float:
        own, everywhere, local, length = np.exp(theta[:4])
        noise = Noise(own, everywhere, local, theta[4], length)
        total = 0.0
        for d, rest in rests:
            covariance = noise.shared(d, d) + np.diag(noise.spread(d) ** 2)
            freedom = len(rest) - 1
            total += freedom * np.linalg.slogdet(covariance)[1]
            total += float(np.einsum("sx,xy,sy->", rest, np.linalg.inv(covariance), rest))
        return total

    theta, step = np.array([math.log(0.02), math.log(0.015), math.log(0.02), 0.0, 0.4]), 0.4
    best = cost(theta)
    while step > 0.01:
        tries = [theta + sign * step * axis for axis in np.eye(5) for sign in (-1, 1)]
        costs = [cost(t) for t in tries]
        if min(costs) < best:
            best, theta = min(costs), tries[int(np.argmin(costs))]
        else:
            step /= 2
    own, everywhere, local, length = (float(v) for v in np.exp(theta[:4]))
    return Noise(own, everywhere, local, float(theta[4]), length)


# ------------------------------------------------------------------------------------------------------------ the shapes


@dataclass(frozen=True)
class Shape:
    """A curve with its minimum at d = 0, which goes on straight beyond its ends."""

    d: Array
    loss: Array

    @classmethod
    def of(cls, x: Array, loss: Array) -> Shape:
        lowest = int(np.argmin(loss))
        return cls(x - x[lowest], loss - loss[lowest])

    def at(self, d: Array) -> Array:
        k = max(1, round(0.3 / float(self.d[1] - self.d[0])))
        left = (self.loss[k] - self.loss[0]) / (self.d[k] - self.d[0])
        right = (self.loss[-1] - self.loss[-1 - k]) / (self.d[-1] - self.d[-1 - k])
        below, above = np.minimum(d - self.d[0], 0), np.maximum(d - self.d[-1], 0)
        return np.asarray(np.interp(d, self.d, self.loss) + below * left + above * right)


def smoothed(sweep: Recorded, about: float, noise: Noise) -> Shape | None:
    """The sweep's cubic smoothing spline, as stiff as is likeliest (restricted likelihood) given noise that runs share.

    Left-out runs must not choose the stiffness: neighbours of one seed err together, and their errors would be kept.
    Stiffer where there would be more than one minimum; None where it takes a minimum at an end.
    """
    x, mean = sweep.x, sweep.whole.mean(axis=0)
    errors = (noise.shared(x - about, x - about) + np.diag(noise.spread(x - about) ** 2)) / len(sweep.whole)
    mesh = np.arange(x[0], x[-1] + _MESH / 2, _MESH)
    likely: list[tuple[float, float, Array]] = []
    for roughness in np.geomspace(1e-4, 1, 40):  # variance of the slope's change per octave
        inverse = np.linalg.inv(roughness * _wiener(x, x, x[0]) + errors)
        line = np.stack([np.ones_like(x), x], axis=1)
        normal = line.T @ inverse @ line
        straight = np.linalg.solve(normal, line.T @ inverse @ mean)
        weights = inverse @ (mean - line @ straight)
        curve = straight[0] + straight[1] * mesh + roughness * _wiener(mesh, x, x[0]) @ weights
        fit = float(np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(normal)[1] - (mean - line @ straight) @ weights)
        likely.append((fit, roughness, curve))
    _, best, _ = max(likely, key=lambda row: row[0])
    single = [curve for _, roughness, curve in likely if roughness <= best and _turns(curve) == 1]
    return Shape.of(mesh, single[-1]) if single else None


def _wiener(a: Array, b: Array, start: float) -> Array:
    """Covariance of a random walk's integral, from ``start``.

    What is drawn with it has a cubic spline for its posterior mean (Wahba, J. R. Stat. Soc. B 40, 1978).
    """
    low, high = np.minimum(a[:, None], b) - start, np.maximum(a[:, None], b) - start
    return np.asarray(low**2 * (3 * high - low) / 6)


def _turns(curve: Array) -> int:
    """How often a curve turns from falling to rising or back; -1 where it rises first."""
    rising = np.diff(curve) > 0
    return -1 if rising[0] else int((rising[1:] != rising[:-1]).sum())


# ------------------------------------------------------------------------------------------------------ synthetic valleys


@dataclass(frozen=True)
class Parts:
    """The recorded residuals of one sweep, taken apart: what a seed shares is noise.shared(d, self.d) @ weights."""

    d: Array  # X
    weights: Array  # SX
    own: Array  # SX, of variance 1

    @classmethod
    def of(cls, sweep: Recorded, at: float, noise: Noise) -> Parts:
        d, rest = sweep.x - at, residuals(sweep)
        rest = rest * math.sqrt(len(rest) / (len(rest) - 1))  # the means took a part
        weights: Array = rest @ np.linalg.inv(noise.shared(d, d) + np.diag(noise.spread(d) ** 2))
        return cls(d, weights, (rest - weights @ noise.shared(d, d)) / noise.spread(d))


def parts_of(sweeps: Sequence[Recorded], bottoms: Sequence[float], noise: Noise) -> tuple[Parts, ...]:
    """Of every sweep, both parts at the fitted size again: taking them apart shrinks both."""
    found = [Parts.of(s, at, noise) for s, at in zip(sweeps, bottoms, strict=True)]
    shared = np.concatenate([(p.weights @ noise.shared(p.d, p.d)).ravel() for p in found]).std()
    own = np.concatenate([p.own.ravel() for p in found]).std()
    more = math.hypot(noise.everywhere, noise.local) / shared
    return tuple(Parts(p.d, p.weights * more, p.own / own) for p in found)


@dataclass(frozen=True)
class Material:
    """What valleys are made of: recorded sweeps with their smoothed shapes, possible rough ones, and the noise."""

    sweeps: tuple[Recorded, ...]
    bottoms: tuple[float, ...]  # log2(lr)
    smooth: tuple[Shape, ...]
    rough: tuple[tuple[Shape, ...], ...]
    noise: Noise
    parts: tuple[Parts, ...]

    @classmethod
    def of(cls, sweeps: Sequence[Recorded], rng: np.random.Generator, draws: int = 40) -> Material:
        """Of the sweeps whose minimum lies well inside; all of them tell the noise."""
        about = [fit_valley(s.points).minimum for s in sweeps]
        noise = fit_noise(sweeps, about)
        found = [(s, smoothed(s, at, noise)) for s, at in zip(sweeps, about, strict=True)]
        kept = [(s, shape) for s, shape in found if shape and shape.d[0] <= -_WALL and shape.d[-1] >= _WALL]
        bottoms = [float(s.x[0] - shape.d[0]) for s, shape in kept]
        rough = tuple(_rough(s, rng, draws) for s, _ in kept)
        parts = parts_of([s for s, _ in kept], bottoms, noise)
        return cls(tuple(s for s, _ in kept), tuple(bottoms), tuple(shape for _, shape in kept), rough, noise, parts)


def _rough(sweep: Recorded, rng: np.random.Generator, draws: int) -> tuple[Shape, ...]:
    """Curves that the fit leaves possible, with a minimum well inside the recorded range."""
    _, posterior, _ = fit_with_posterior(sweep.points)
    assert posterior is not None
    inside = [i for i, at in enumerate(posterior.minima) if sweep.x[0] + 0.5 < at < sweep.x[-1] - 0.5]
    return tuple(Shape.of(posterior.mesh, posterior.curves[i]) for i in rng.choice(inside, draws))


@dataclass(frozen=True)
class Synthetic:
    """A valley whose minimum is known, at which runs can be made: the same learning rate and seed give the same run."""

    kind: str
    number: int
    at: float  # log2(lr) of the minimum
    source: int  # of the recorded sweeps
    shape: Shape
    material: Material

    def run(self, log2_lr: float, seed: int) -> LossPoint:
        """A run's loss."""
        d = np.array([log2_lr - self.at])
        noise = self._resampled(d, seed) if self.kind == "mixed" else self._gaussian(d, seed)
        return LossPoint(log2_lr, float(3 + self.shape.at(d)[0] + noise), seed)

    def curve(self, log2_lr: float, seed: int) -> Curve:
        """The training curve of the recorded run nearest to this one, lifted to where this one ends.

        Below the recorded learning rates it is that of the lowest at a slower pace: progress there goes with rate times steps.
        """
        sweep = self.material.sweeps[self.source]
        rows = [i for i in range(len(sweep.loss)) if np.isfinite(sweep.loss[i]).all()]
        away = log2_lr - self.at + self.material.bottoms[self.source] - sweep.x
        place, row = int(np.argmin(np.abs(away))), rows[seed % len(rows)]
        step, loss = np.array(sweep.curves[row, place]).T
        slowed = np.interp(step * 2.0 ** min(away[0], 0.0), step, loss)
        lift = self.run(log2_lr, seed).loss - (sweep.loss[row, place] + slowed[-1] - loss[-1])
        return list(zip(step.tolist(), (slowed + lift).tolist(), strict=True))

    @property
    def steps(self) -> int:
        return self.material.sweeps[self.source].steps

    def _rng(self, seed: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.number, seed, *more])

    def _own(self, d: Array, seed: int) -> np.random.Generator:
        """Of a run's own noise: a stream for each place, to a thousandth of an octave."""
        return self._rng(seed, 1 + round(1000 * (float(d[0]) + 100)))

    def _gaussian(self, d: Array, seed: int) -> float:
        noise, rng = self.material.noise, self._rng(seed)
        everywhere = noise.everywhere * rng.normal()
        frequency_F, phase_F = rng.normal(size=_WAVES) / noise.length, rng.uniform(0, 2 * math.pi, _WAVES)
        # Random Fourier features of the Gaussian kernel (Rahimi & Recht, NIPS 2007): a curve whose value can be asked
        # for at any place, in any order.
        local = noise.local * math.sqrt(2 / _WAVES) * float(np.cos(frequency_F * d + phase_F).sum())
        return everywhere + local + float(noise.spread(d)[0]) * self._own(d, seed).normal()

    def _resampled(self, d: Array, seed: int) -> float:
        """What a recorded seed shares between learning rates, and what some run near there had of its own."""
        noise, parts = self.material.noise, self.material.parts
        rng, own = self._rng(seed), self._own(d, seed)
        donor = parts[rng.integers(len(parts))]
        shared = noise.shared(d, donor.d) @ donor.weights[rng.integers(len(donor.weights))]
        other = parts[own.integers(len(parts))]
        near = own.choice(np.argsort(np.abs(other.d - d[0]))[:3])
        return float(shared[0] + other.own[own.integers(len(other.own)), near] * noise.spread(d)[0])


def population(material: Material, count: int, low: float, high: float, seed: int) -> Iterator[Synthetic]:
    """``count`` valleys with minima anywhere between ``low`` and ``high``, kinds and recorded sweeps in turn."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        kind, source = KINDS[i % len(KINDS)], (i // len(KINDS)) % len(material.sweeps)
        shape = material.smooth[source]
        if kind == "rough":
            shape = material.rough[source][rng.integers(len(material.rough[source]))]
        if kind == "mixed":
            other, share = material.smooth[rng.integers(len(material.smooth))], rng.uniform()
            d = np.arange(-4, 4 + _MESH / 2, _MESH)
            width = _STRETCH ** rng.uniform(-1, 1)
            shape = Shape.of(d * width, share * shape.at(d) + (1 - share) * other.at(d))
        yield Synthetic(kind, 1_000_000 * seed + i, float(rng.uniform(low, high)), source, shape, material)
