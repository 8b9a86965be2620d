"""Recurrent cells, step by step: states that pass from one step of a sequence to the next."""

from __future__ import annotations

from typing import Protocol

import numpy as np

# Of each kind: gates, states that pass from step to step, arrays of all steps that the gradients need besides the gates
# and h.
CELLS = {"rnn": (1, 1, 0), "gru": (3, 1, 1), "lstm": (4, 2, 1)}


class ProductOps(Protocol):
    """The operations that `Recurrence` needs of a backend."""

    def empty(self, size: int, dtype: np.dtype) -> np.ndarray: ...

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None: ...

    def activate(self, kind: str, y: np.ndarray) -> None: ...


class Recurrence:
    """The states of a layer of recurrent cells over some steps of sequences, and their gradients.

    With x W + b the caller's, and u = U h' + bias of the state h' before:

    rnn: h = tanh(xw + u).
    gru, gates r z n: [r z] = sigmoid(xw + u), n = tanh(xw + r u), h = (1 - z) n + z h'.
    lstm, gates i f g o: [i f o] = sigmoid(xw + u), g = tanh(xw + u), c = f c' + i g, h = o tanh(c).

    Sequences are (units, steps, b), states (carried, units, b): h, and of lstm c. Steps beyond the length of a sample
    copy its states. All arrays are contiguous and of one dtype; objects have no memory in common.
    """

    def __init__(self, kind: str, units: int, dtype: np.dtype, ops: ProductOps):
        self.kind, self.units, self.dtype, self.ops = kind, units, np.dtype(dtype), ops
        # more (kept, units, steps, b): of lstm c, of gru the n gate's u.
        self.gates, self.carried, self.kept = CELLS[kind]

    def prepare(self, u: np.ndarray) -> None:
        """Take the recurrent weights (gates * units, units) of the passes to come."""
        self.u = u

    def reserve(self, batch: int) -> None:
        """Make room for passes of up to `batch` samples."""

    def arrays(self) -> list[np.ndarray]:
        """Its buffers."""
        return []

    def forward(
        self, a: np.ndarray, bias: np.ndarray | None, before: np.ndarray, h: np.ndarray, more: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """h (units, steps, b) = the states from those `before` (carried, units, b) on.

        a (gates * units, steps, b): x W + b, becomes the gates' values, but of rnn holds anything. bias (gates *
        units,): of the recurrent product, or None. more (kept, units, steps, b): filled for the way back. lengths (b,)
        int32: the steps of each sample, 0 to all; None: all.
        """
        for t in range(h.shape[1]):
            last = before[0] if t == 0 else h[:, t - 1]
            self._step(t, a, bias, self._product(self.u, last), before, h, more, lengths)

    def backward(
        self, a: np.ndarray, before: np.ndarray, h: np.ndarray, more: np.ndarray, dh: np.ndarray, carry: np.ndarray,
        lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """The gradients, from dh (units, steps, b) and from carry (carried, units, b), that of the states at the end.

        The other arrays are those that `forward` left. a becomes the gradient of x W + b, more[0] of gru that of the n
        gate's u, whose other gates have that of x W + b; carry that of the states before. They are 0 at steps beyond a
        sample's length.
        """
        for t in reversed(range(h.shape[1])):
            du = self._step_back(t, a, before, h, more, dh, carry, lengths)
            carry[0] += self._product(self.u.T, du)

    def _product(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """weights @ values (..., b)."""
        out = np.empty((len(weights), values.shape[1]), self.dtype)
        # So that the steps of a chunk do not decide how it is summed.
        self.ops.matmul(weights, np.ascontiguousarray(values), out)
        return out

    @np.errstate(over="ignore", invalid="ignore")
    def _step(
        self, t: int, a: np.ndarray, bias: np.ndarray | None, product: np.ndarray, before: np.ndarray, h: np.ndarray,
        more: np.ndarray, lengths: np.ndarray | None,
    ) -> None:  # fmt: skip
        """Step t of `forward`; product (gates * units, b) is used up."""
        gates = a.reshape(self.gates, self.units, *a.shape[1:])[:, :, t]
        # Functions of NumPy round by the steps between numbers: of copies these are always the same.
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
        """Step t of `backward`: the gradient (gates * units, b) of U h', without whose share carry[0] is left."""
        gates = a.reshape(self.gates, self.units, *a.shape[1:])[:, :, t]
        x = gates.copy()
        live = True if lengths is None else t < lengths
        total = dh[:, t] + carry[0]
        carry[0] = np.where(live, 0, total)
        # The gates' gradients, and those of the product with the states.
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
