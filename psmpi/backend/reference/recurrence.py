"""Layers of recurrent cells (Elman RNN, GRU, LSTM), computed step by step."""

from __future__ import annotations

from typing import Protocol

import numpy as np

# For each kind of cell: the number of gates, of states that pass from step to step, and of arrays (units, steps, b)
# that the backward pass needs besides the gates and h.
CELLS = {"rnn": (1, 1, 0), "gru": (3, 1, 1), "lstm": (4, 2, 1)}


class ProductOps(Protocol):
    """The operations that `Recurrence` needs of a backend."""

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray: ...

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None: ...

    def activate(self, kind: str, y: np.ndarray) -> None: ...


class Recurrence:
    """A layer of recurrent cells over some steps of sequences: states and gradients.

    The caller computes xw = x W + b. With u = U h' + bias, where h' and c' are the states of the previous step:

    rnn: h = tanh(xw + u).
    gru, gates r z n: [r z] = sigmoid(xw + u), n = tanh(xw + r u), h = (1 - z) n + z h' (Cho et al. 2014).
    lstm, gates i f g o: [i f o] = sigmoid(xw + u), g = tanh(xw + u), c = f c' + i g, h = o tanh(c) (Hochreiter &
    Schmidhuber 1997).

    Sequences are (units, steps, b). States are (carried, units, b): h, and for lstm also c. Steps beyond the length of
    a sample copy its states. All arrays are contiguous and of one dtype. Two objects share no memory.
    """

    def __init__(self, kind: str, units: int, dtype: np.dtype, ops: ProductOps):
        self.kind, self.units, self.dtype, self.ops = kind, units, np.dtype(dtype), ops
        # The array `more` (kept, units, steps, b) has c for lstm, and u of the n gate for gru.
        self.gates, self.carried, self.kept = CELLS[kind]

    def prepare(self, u: np.ndarray) -> None:
        """Set the recurrent weights u (gates * units, units) for the next passes."""
        self.u = u

    def reserve(self, batch: int) -> None:
        """Allocate buffers for passes of up to `batch` samples."""

    def arrays(self) -> list[np.ndarray]:
        """The buffers of the layer, for the account of memory."""
        return []

    def forward(
        self, a: np.ndarray, bias: np.ndarray | None, before: np.ndarray, h: np.ndarray, more: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """h (units, steps, b) = the states h of all steps, starting from the states `before` (carried, units, b).

        a: (gates * units, steps, b), x W + b, overwritten with the values of the gates (undefined for rnn). bias:
        (gates * units,), added to U h', or None. more: (kept, units, steps, b), filled for `backward`. lengths: (b,)
        int32, the number of steps of each sample, from 0 up; None: all steps.
        """
        for t in range(h.shape[1]):
            last = before[0] if t == 0 else h[:, t - 1]
            self._step(t, a, bias, self._product(self.u, last), before, h, more, lengths)

    def backward(
        self, a: np.ndarray, before: np.ndarray, h: np.ndarray, more: np.ndarray, dh: np.ndarray, carry: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Gradients from dh (units, steps, b), that of h, and carry (carried, units, b), that of the last states.

        a, before, h, more: the arrays after `forward`. a becomes the gradient of x W + b, and carry the gradient of the
        states `before`. u has the same gradient as x W + b, except that of the n gate of gru, which more[0] becomes.
        Gradients of x W + b and u are 0 at steps beyond the length of a sample.
        """
        for t in reversed(range(h.shape[1])):
            du = self._step_back(t, a, before, h, more, dh, carry, lengths)
            carry[0] += self._product(self.u.T, du)

    def _product(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """weights @ values (..., b)."""
        out = np.empty((len(weights), values.shape[1]), self.dtype)
        # A contiguous copy, so that BLAS sums in the same order whatever the number of steps.
        self.ops.matmul(weights, np.ascontiguousarray(values), out)
        return out

    @np.errstate(over="ignore", invalid="ignore")
    def _step(
        self, t: int, a: np.ndarray, bias: np.ndarray | None, product: np.ndarray, before: np.ndarray, h: np.ndarray,
        more: np.ndarray, lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Step t of `forward`. product: (gates * units, b), U h', overwritten."""
        gates = a.reshape(self.gates, self.units, *a.shape[1:])[:, :, t]
        # NumPy's functions may round differently for different strides: a copy always has the same strides.
        x, u = gates.copy(), product.reshape(gates.shape)
        if bias is not None:
            u += bias.reshape(self.gates, self.units, 1)
        last = before[0] if t == 0 else h[:, t - 1]
        live = True if lengths is None else t < lengths
        if self.kind == "rnn":
            new = np.tanh(x[0] + u[0])
        elif self.kind == "gru":
            r, z, n = x
            x[:2] += u[:2]
            self.ops.activate("sigmoid", x[:2])
            n += r * u[2]
            self.ops.activate("tanh", n)
            more[0, :, t] = u[2]
            new = (1 - z) * n + z * last
        else:
            i, f, g, o = x
            x += u
            self.ops.activate("sigmoid", x[:2])
            self.ops.activate("tanh", g)
            self.ops.activate("sigmoid", o)
            last_c = before[1] if t == 0 else more[0, :, t - 1]
            c = f * last_c + i * g
            more[0, :, t] = np.where(live, c, last_c)
            new = o * np.tanh(c)
        gates[...] = x
        h[:, t] = np.where(live, new, last)

    @np.errstate(over="ignore", invalid="ignore")
    def _step_back(
        self, t: int, a: np.ndarray, before: np.ndarray, h: np.ndarray, more: np.ndarray, dh: np.ndarray,
        carry: np.ndarray, lengths: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Step t of `backward`: return the gradient (gates * units, b) of U h'.

        carry[0] then lacks the share of this gradient, which the caller adds.
        """
        gates = a.reshape(self.gates, self.units, *a.shape[1:])[:, :, t]
        x = gates.copy()
        live = True if lengths is None else t < lengths
        total = dh[:, t] + carry[0]
        carry[0] = np.where(live, 0, total)
        # Gradients d of x W + b, and du of U h', for each gate.
        d: tuple[np.ndarray, ...]
        du: tuple[np.ndarray, ...]
        if self.kind == "rnn":
            d = du = (total * (1 - h[:, t] ** 2),)
        elif self.kind == "gru":
            r, z, n = x
            last, u = before[0] if t == 0 else h[:, t - 1], more[0, :, t]
            dn = total * (1 - z) * (1 - n**2)
            dz = total * (last - n) * z * (1 - z)
            dr = dn * u * r * (1 - r)
            d, du = (dr, dz, dn), (dr, dz, dn * r)
            carry[0] = np.where(live, total * z, total)
            more[0, :, t] = np.where(live, du[2], 0)
        else:
            i, f, g, o = x
            last_c, tanh_c = before[1] if t == 0 else more[0, :, t - 1], np.tanh(more[0, :, t].copy())
            dc = carry[1] + total * o * (1 - tanh_c**2)
            carry[1] = np.where(live, dc * f, carry[1])
            di = dc * g * i * (1 - i)
            df = dc * last_c * f * (1 - f)
            dg = dc * i * (1 - g**2)
            do = total * tanh_c * o * (1 - o)
            d = du = (di, df, dg, do)
        gates[...] = np.where(live, d, 0)
        return np.concatenate([np.where(live, one, 0) for one in du])
