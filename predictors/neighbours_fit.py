"""Fitting `neighbours`: the sketch of what was routed so far, the units, and how scores are read off both.

Shape letters: U units, L layers, E experts, D distances, R numbers of a sketch, Q of them that distances are measured
in, X numbers that describe a layer, F = R + X, Y choices that are forecast, K neighbours, B bandwidths.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.predictors.described import Half

NUMBERS, SKETCH, MEASURED = 2, 64, 64
NEIGHBOURS, LISTED = 8, 8
"""Of a token; of a unit, which the search goes along."""
AHEAD, FADING = 12, 0.85
"""Layers that a sketch must tell of, and the weight of each beside the one before it."""
PENALTY, CARRIED, READ = 20.0, 0.05, 40.0
"""Of the numbers of a layer; that of the sketch as a share of it; and of the readout alone."""
NARROWNESS = 6.0
"""Of the widest bandwidth, over the variance of the measured numbers."""
FAR = np.int32(1 << 26)
"""A squared distance where nobody was found."""
LOUD = 4.0
"""Factor on what neighbours say, so that the penalty on reading it is less."""
STEP = 0.01
"""Residuals are kept in steps of this."""
RECENT, EARLY = 4, 3
"""So many last layers are read as they are; under that layer, neighbours are found that are kept to the end."""
DEEP = 12
"""Layers; in a stack of fewer, each has a sketch of its own."""
EVERY = 4
"""So many layers from there on share a sketch, and those below it one: at most RECENT, which are read anyway."""
Near = tuple[NDArray[np.int32], NDArray[np.int32], np.float32]
"""[U, K] neighbours, their distances, and the factor on these."""


def renews(source: int, layers: int) -> bool:
    """Whether the sketch and the neighbours are other ones once `source` of so many layers has routed."""
    return layers < DEEP or source == 0 or (source >= EARLY and (source - EARLY) % EVERY == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sketch:
    """What becomes of a sketch under some layer, and those of all units."""

    turn_RR: Half
    """From the sketch before to this one; [0, R] of the first layer."""
    map_JXR: Half
    """Of the layers since the sketch before, this one included."""
    shift_R: Half
    step: np.float32
    unit_UQ: NDArray[np.int8]
    """The first numbers of the sketches, in steps."""
    near_UN: NDArray[np.int32]
    narrow: np.float32
    """On squared distances in steps."""

    def size(self) -> int:
        """Numbers in it."""
        return _size(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What is read after one more layer."""

    sketch: Sketch | None
    """Where it is renewed."""
    read_DFE: Half
    """[D, R + J X + V, E] from the sketch, the last J layers, and V numbers of the request."""
    usual_DE: Half
    residual_DUE: NDArray[np.int8]
    """What is read off the residuals, which is as linear as what they are of."""
    read_DEE: Half
    """By what it is read off them, in steps."""
    gain_DJB: Half
    """Of the neighbours now and early."""

    def size(self) -> int:
        """Numbers in it."""
        return _size(self) + (self.sketch.size() if self.sketch else 0)


def _size(parts: Any) -> int:
    values = [getattr(parts, one.name) for one in fields(parts)]
    return sum(value.size for value in values if isinstance(value, np.ndarray))


@dataclass(slots=True)
class Fitting:
    """Layer after layer."""

    chosen_ULE: NDArray[np.bool_]
    request_U: NDArray[np.int64]
    ahead: int
    width: int
    """X."""
    _z_UR: Half = field(init=False)
    _x: list[Half] = field(init=False)
    """The last layers; nothing before the first one."""
    _sketched: int = -1
    """The layer under which the sketch was renewed last."""
    _now: Near = field(init=False)
    _early: Near = field(init=False)

    def __post_init__(self) -> None:
        self._z_UR = np.zeros((len(self.chosen_ULE), 0), np.float32)
        self._x = [np.zeros((len(self.chosen_ULE), self.width), np.float32)] * RECENT

    def layer(self, source: int, x_UX: Half, beside_UV: Half, checked: slice) -> tuple[Units, list[Half]]:
        """The units once `source` has routed, described by `x_UX`, and their requests by `beside_UV`; and for each
        distance what would be said of the `checked` units if they were none, for calibration."""
        self._x = [*self._x[1:], x_UX]
        sketch = self._renewed(source) if renews(source, self.chosen_ULE.shape[1]) else None
        self._early = self._now if source <= EARLY else self._early
        read_UF = np.concatenate([self._z_UR, *self._x, beside_UV], axis=1)
        told = [self._read(read_UF, self._now, layer, checked) for layer in self._targets(source)]
        units = Units(
            sketch=sketch,
            read_DFE=np.stack([one.read_FE for one in told]),
            usual_DE=np.stack([one.usual_E for one in told]),
            residual_DUE=np.stack([one.residual_UE for one in told]),
            read_DEE=np.stack([one.read_EE for one in told]),
            gain_DJB=np.stack([one.gain_JB for one in told]),
        )
        return units, [one.score_TE for one in told]

    def _renewed(self, source: int) -> Sketch:
        new, carried = source - self._sketched, self._z_UR.shape[1]
        f_UF = np.concatenate([self._z_UR, *self._x[-new:]], axis=1)
        mean_F = f_UF.mean(axis=0)
        map_FR = self._directions(source, f_UF - mean_F)
        self._z_UR, self._sketched = f_UF @ map_FR - mean_F @ map_FR, source
        measured_UQ = self._z_UR[:, :MEASURED]
        step = np.float32(max(np.abs(measured_UQ).max(), 1e-6) / 127)
        unit_UQ = np.round(measured_UQ / step).astype(np.int8)
        narrow = np.float32(NARROWNESS * step**2 / max(measured_UQ.var(axis=0).sum(), 1e-6))
        found_UK, far_UK = _closest(unit_UQ, self.request_U)
        self._now = found_UK, far_UK, narrow
        return Sketch(
            turn_RR=map_FR[:carried],
            map_JXR=np.ascontiguousarray(map_FR[carried:].reshape(new, -1, SKETCH)),
            shift_R=-mean_F @ map_FR,
            step=step,
            unit_UQ=unit_UQ,
            near_UN=np.ascontiguousarray(found_UK[:, :LISTED]),
            narrow=narrow,
        )

    def _targets(self, source: int) -> range:
        return range(source + 1, min(source + 1 + self.ahead, self.chosen_ULE.shape[1]))

    def _directions(self, source: int, f_UF: Half) -> Half:
        """[F, R] reduced-rank regression on what the next layers choose: the directions that tell most of it, the first
        most, of equal variance but for the penalty."""
        layers = range(source + 1, min(source + 1 + AHEAD, self.chosen_ULE.shape[1]))
        y_UYs = [FADING ** (n / 2) * _centred(self.chosen_ULE[:, at]) for n, at in enumerate(layers)]
        y_UY = np.concatenate(y_UYs, axis=1)
        carried = self._z_UR.shape[1]
        penalty_F = np.full(f_UF.shape[1], PENALTY)
        penalty_F[:carried] *= CARRIED
        factor_FF = np.linalg.cholesky((f_UF.T @ f_UF).astype(np.float64) + np.diag(penalty_F))
        half_FY = np.linalg.solve(factor_FF, (f_UF.T @ y_UY).astype(np.float64))
        turned_FR = np.linalg.eigh(half_FY @ half_FY.T)[1][:, ::-1][:, :SKETCH]
        told_FR = np.linalg.solve(factor_FF.T, turned_FR)
        map_FR = np.zeros((len(told_FR), SKETCH), np.float32)  # always as wide
        map_FR[:, : told_FR.shape[1]] = told_FR / max(np.sqrt(np.square(f_UF @ told_FR).mean()), 1e-6)
        return map_FR

    def _read(self, read_UF: Half, now: Near, layer: int, checked: slice) -> Told:
        """How the choices of `layer` are read off the sketch, the last layers and the neighbours.

        1. Without neighbours; residuals are those of every unit if it had been left out. 2. Of the residuals of a
        unit's neighbours, near now or early, in four bandwidths each, how much of each is best. 3. With that sum.
        """
        from moesim.predictors.neighbours_kernels import BANDWIDTHS, mixed

        usual_E, y_UE = self.chosen_ULE[:, layer].mean(axis=0, dtype=np.float32), _centred(self.chosen_ULE[:, layer])
        first_FE, inverse_FF, mean_F = _solved(read_UF, y_UE, READ)
        error_UE = y_UE - (read_UF - mean_F) @ first_FE
        error_UE /= 1 - _leverage(read_UF - mean_F, inverse_FF)
        residual_UE = np.round(error_UE / STEP).clip(-127, 127).astype(np.int8)

        def summed(gain_JB: Half) -> Half:
            c_UE = np.zeros_like(y_UE)
            for near, gain_B in zip((now, self._early), gain_JB, strict=True):
                mixed(*near, gain_B, residual_UE, np.float32(STEP), c_UE)
            return c_UE

        ways = np.eye(2 * BANDWIDTHS, dtype=np.float32).reshape(-1, 2, BANDWIDTHS)
        by_GUE = np.stack([summed(gain_JB) for gain_JB in ways]).reshape(len(ways), -1)
        both_GG = by_GUE @ by_GUE.T
        both_GG[np.diag_indices_from(both_GG)] += 1e-3 * np.trace(both_GG) / len(ways) + 1e-6
        gain_JB = np.linalg.solve(both_GG, by_GUE @ error_UE.ravel()).reshape(2, BANDWIDTHS)
        read_UF = np.concatenate([read_UF, LOUD * summed(gain_JB)], axis=1)
        read_FE, inverse_FF, mean_F = _solved(read_UF, y_UE, PENALTY)
        f_TF, y_TE = read_UF[checked] - mean_F, y_UE[checked]
        left_TE = y_TE - (y_TE - f_TF @ read_FE) / (1 - _leverage(f_TF, inverse_FF)) + usual_E
        usual_E -= mean_F @ read_FE
        # What is read off the neighbours' residuals is the sum of what is read off each.
        read_FE, read_EE = np.split(read_FE, [-len(usual_E)])
        read_EE *= LOUD / STEP
        residual_UE = kept(STEP * residual_UE, read_EE)
        return Told(np.ascontiguousarray(read_FE), usual_E, residual_UE, read_EE, gain_JB, left_TE)


@dataclass(frozen=True, slots=True)
class Told:
    """One distance of Units."""

    read_FE: Half
    usual_E: Half
    residual_UE: NDArray[np.int8]
    read_EE: Half
    gain_JB: Half
    score_TE: Half


def kept(error_UE: Half, read_EE: Half) -> NDArray[np.int8]:
    """What a unit keeps of what no linear map said."""
    return np.asarray(np.round(error_UE @ read_EE).clip(-127, 127), np.int8)


def _centred(chosen_UE: NDArray[np.bool_]) -> Half:
    return np.asarray(chosen_UE - chosen_UE.mean(axis=0, dtype=np.float32), np.float32)


def _solved(f_UF: Half, y_UE: Half, penalty: float) -> tuple[Half, Half, Half]:
    """Ridge regression: the map, the inverse that it comes from, and the means that it is to be used without."""
    mean_F = f_UF.mean(axis=0)
    both_FF = (f_UF.T @ f_UF).astype(np.float64) - len(f_UF) * np.outer(mean_F, mean_F)
    both_FF[np.diag_indices_from(both_FF)] += penalty
    inverse_FF = np.linalg.inv(both_FF).astype(np.float32)
    return inverse_FF @ (f_UF.T @ y_UE), inverse_FF, mean_F


def _leverage(f_TF: Half, inverse_FF: Half) -> Half:
    """[T, 1] the weight of each row in what is said of it."""
    return np.asarray(np.einsum("tf,tf->t", f_TF @ inverse_FF, f_TF)[:, None].clip(max=0.9), np.float32)


def _closest(unit_UQ: NDArray[np.int8], request_U: Any, block: int = 512) -> tuple[Any, NDArray[np.int32]]:
    """[U, K] the nearest units that are not of the same request, and their squared distances, both in steps."""
    from moesim.predictors.neighbours_kernels import closest

    U = len(unit_UQ)
    found_UK, far_UK = np.zeros((U, NEIGHBOURS), np.int32), np.empty((U, NEIGHBOURS), np.float32)
    z_UQ = unit_UQ.astype(np.float32)
    length_U = np.square(z_UQ).sum(axis=1)
    for begin in range(0, U, block):
        rows = slice(begin, begin + block)
        far_TU = z_UQ[rows] @ z_UQ.T
        far_TU *= -2
        far_TU += length_U + length_U[rows, None]
        closest(far_TU, request_U[rows], request_U, found_UK[rows], far_UK[rows])
    return found_UK, far_UK.astype(np.int32)
