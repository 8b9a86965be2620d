"""Estimators of scikit-learn that train with psmpi: `PsmpiClassifier` and `PsmpiRegressor`.

Needs psmpi[sklearn]. Under mpirun every rank fits with the same arrays, as with `psmpi.fit`.
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
# Samples of the training that its epochs are tested on: all samples are for learning, and a test is made in any case.
TESTED = 100


class SettingsError(UserError, ValueError):
    """A UserError in what scikit-learn expects a ValueError for."""


@contextmanager
def _as_value_error() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise SettingsError(str(error)) from None


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """The base of classifier and regressor.

    Parameters are settings of `psmpi.fit` by their names, None: the usual numbers; random_state: the seed, None: 0;
    threads: of training and predictions; settings: all others by name. Predictions are computed in float64.

    Attributes after `fit`: network_, a `psmpi.Fitted`; loss_curve_, the mean loss of each epoch; n_features_in_.
    """

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
        given, seed = self.random_state, 0
        if given is not None:
            seed = int(given) if isinstance(given, Integral) else int(check_random_state(given).randint(1 << 31))
        settings = {"model": self.model, "widths": tuple(self.widths), "loss": self.loss or loss, "seed": seed,
                    "optimizer": self.optimizer, "threads": self.threads, "epochs": self.epochs,
                    "batch_size": self.batch_size, "lr": self.lr}  # fmt: skip
        given_settings = {name: value for name, value in settings.items() if value not in (None, ())}
        with _as_value_error():
            made = fit(
                x, y, x[:TESTED], y[:TESTED], verbose=self.verbose, **{**given_settings, **(self.settings or {})}
            )
        self.network_: Fitted = made.network
        self.loss_curve_ = [float(row["train_loss"]) for row in made.metrics]
        return made

    def _given(self, x: Any) -> Any:
        """Samples to predict, checked."""
        check_is_fitted(self, "network_")
        return validate_data(self, x, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False)


class PsmpiClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A classifier; the loss is nll, cross-entropy, if not given. Attributes after `fit` as below, and classes_.

    See psmpi.sklearn for its parameters: model, widths, loss, optimizer, epochs, batch_size, lr, random_state, threads,
    settings, verbose.
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
        found: Array = self.classes_[proba.argmax(axis=1)]
        return found

    def predict_proba(self, X: Any) -> Array:
        """The softmax of the network's scores, (n, classes) float64."""
        X = self._given(X)
        with _as_value_error():
            return self.network_.predict_proba(X, dtype=np.float64, threads=self.threads)


class PsmpiRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A regressor; the loss is squared if not given. Attributes after `fit` as of PsmpiClassifier, without classes_.

    See psmpi.sklearn for its parameters.
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
        """The values of each sample, (n,) or (n, outputs), float64."""
        X = self._given(X)
        with _as_value_error():
            return self.network_.predict(X, dtype=np.float64, threads=self.threads)
