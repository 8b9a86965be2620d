"""PReLU, a layer outside the package: max(x, 0) + a min(x, 0), with a trained slope a for each unit (He et al. 2015).

Run: mpirun -n 2 python examples/own_layer.py train --config examples/own_layer.toml --colocate"""

from dataclasses import dataclass

import numpy as np

import psmpi.command
from psmpi.errors import UserError
from psmpi.layout import Parameter
from psmpi.nn.layers import LAYERS, Layer, Part
from psmpi.nn.layers.base import Initial
from psmpi.nn.layers.unit_rows import UnitRows


@LAYERS.register("prelu")
@dataclass(frozen=True)
class PReLU(Layer):
    """{type = "prelu", slope = 0.25}; slope: the initial value of all slopes."""

    slope: float

    exact = True

    @classmethod
    def read(cls, table, label, shape):
        slope = table.take("slope", 0.25)
        if not isinstance(slope, float) or not 0 <= slope < 1:
            raise UserError(f"{table.where}: slope = {slope!r}; expected a number from 0 up to 1")
        return [cls(label, shape, shape, slope)]

    def parameters(self):
        units = self.out_shape[0]
        return (Parameter(f"{self.name}.weight", (units,), units),)

    def initial(self, kind, gain):
        return {f"{self.name}.weight": Initial("constant", self.slope)}

    def part(self, stage, site):
        return PReLUPart(stage, site)


class PReLUPart(Part):
    """x (units, ..., b) -> y of the same shape."""

    def __init__(self, stage, site):
        super().__init__(stage, site)
        self.slopes = UnitRows(stage, site)

    def views(self, vector):
        return self.slopes.views(vector)

    def _by_unit(self, numbers, like):
        return numbers.reshape(-1, *(1,) * (like.ndim - 1))

    def forward(self, x, y, room):
        for (units, _), slopes in zip(self.slopes.runs, self.w, strict=True):
            y[units] = np.maximum(x[units], 0) + self._by_unit(slopes, x) * np.minimum(x[units], 0)
        return y, None

    def backward(self, x, y, kept, dy, dx, into):
        self.slopes.write_sums(dy * np.minimum(x, 0), into)
        for (units, _), slopes in zip(self.slopes.runs, self.w, strict=True):
            dy[units] *= np.where(x[units] > 0, 1, self._by_unit(slopes, x))
        return dy

    def export(self, graph, value):
        slopes = self._by_unit(np.concatenate([self.ops.host(a) for a in self.w]), np.empty(self.shape))
        return graph.node("PRelu", [value, graph.constant(f"{self.layer.name}.weight", slopes)], self.layer.name)


if __name__ == "__main__":
    raise SystemExit(psmpi.command.main())
