"""Estimators of scikit-learn that train with psmpi: `PsmpiClassifier` and `PsmpiRegressor`.

They need psmpi[sklearn]. Under mpirun every rank calls `fit` with the same arrays, as with `psmpi.fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from psmpi.arrays.fitted import Fitted
from psmpi.arrays.fitting import Training, fit
from psmpi.errors import UserError

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as missing:
    raise UserError("psmpi.sklearn needs scikit-learn 1.6 or later: pip install 'psmpi[sklearn]'") from missing

Array = npt.NDArray[Any]
# Training samples that each epoch is also tested on: `psmpi.fit` needs test samples, and all samples are for training.
TESTED = 100


class SettingsError(UserError, ValueError):
    """A UserError that is also a ValueError, as scikit-learn expects for wrong parameters and arrays."""


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise SettingsError(str(error)) from None


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """Base class of the classifier and the regressor, see `PsmpiClassifier` for parameters and attributes."""

    def __init__(
        self,
        *,
        model: str = "mlp",
        widths: Sequence[int] = (128,),
        loss: str = "",
        optimizer: str = "adam",
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        random_state: Any = None,
        threads: int = 1,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ):
        self.model = model
        self.widths = widths
        self.loss = loss
        self.optimizer = optimizer
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.threads = threads
        self.settings = settings
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _train(self, x: Any, y: Array, loss: str) -> Training:
        state, seed = self.random_state, 0
        if state is not None:
            seed = int(state) if isinstance(state, Integral) else int(check_random_state(state).randint(1 << 31))
        settings = {"model": self.model, "widths": tuple(self.widths), "loss": self.loss or loss, "seed": seed,
                    "optimizer": self.optimizer, "threads": self.threads, "epochs": self.epochs,
                    "batch_size": self.batch_size, "lr": self.lr}  # fmt: skip
        given_settings = {name: value for name, value in settings.items() if value not in (None, ())}
        with _as_value_error():
            training = fit(
                x, y, x[:TESTED], y[:TESTED], verbose=self.verbose, **{**given_settings, **(self.settings or {})}
            )
        self.network_: Fitted = training.network
        self.loss_curve_ = [float(row["train_loss"]) for row in training.metrics]
        return training

    def _checked(self, x: Any) -> Any:
        """Check the samples to predict, and that `fit` was called before; return the samples as an array."""
        check_is_fitted(self, "network_")
        return validate_data(self, x, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)


class PsmpiClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier.

    Parameters: model, widths, loss (nll, which is cross-entropy, if not given), optimizer, epochs, batch_size and lr
    are settings of `psmpi.fit`; None stands for the usual number. random_state: seed, None: 0. threads: threads of
    training and predictions. settings: any other settings of `psmpi.fit` by name. verbose: print the training.

    Attributes after `fit`: classes_, the labels, sorted, (classes,); network_, a `psmpi.Fitted`; loss_curve_, the mean
    training loss of each epoch; n_features_in_. Predictions are computed in float64. Methods raise SettingsError for
    settings that psmpi refuses.
    """

    def fit(self, X: Any, y: Any) -> PsmpiClassifier:
        """Train on samples X (n, features), dense or sparse, with labels y (n,) of any kind."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self._train(X, numbers.reshape(-1).astype(np.int64), "nll")
        return self

    def predict(self, X: Any) -> Array:
        """The most probable class of each sample, (n,)."""
        proba = self.predict_proba(X)
        predicted: Array = self.classes_[proba.argmax(axis=1)]
        return predicted

    def predict_proba(self, X: Any) -> Array:
        """The softmax of the network's scores, (n, classes) float64."""
        X = self._checked(X)
        with _as_value_error():
            return self.network_.predict_proba(X, dtype=np.float64, threads=self.threads)


class PsmpiRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor. Parameters and attributes are those of `PsmpiClassifier`, without classes_.

    loss: squared if not given.
    """

    def fit(self, X: Any, y: Any) -> PsmpiRegressor:
        """Train on samples X (n, features), dense or sparse, with values y (n,) or (n, outputs)."""
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], multi_output=True, y_numeric=True
        )
        self._train(X, np.asarray(y, np.float64), "squared")
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Any) -> Array:
        """The predicted values of each sample, (n,) or (n, outputs), float64."""
        X = self._checked(X)
        with _as_value_error():
            return self.network_.predict(X, dtype=np.float64, threads=self.threads)
