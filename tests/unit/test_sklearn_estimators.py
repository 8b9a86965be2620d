"""Estimators for scikit-learn: its own checks, and their use in its pipelines, searches and clones."""

import pickle
from unittest import SkipTest

import numpy as np
import pytest
from helpers.arrays import ranks_are_threads

from psmpi.errors import UserError

pytest.importorskip("sklearn", reason="scikit-learn, in psmpi[sklearn]")

from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from psmpi.sklearn import PsmpiClassifier, PsmpiRegressor


@pytest.fixture(autouse=True)
def threads():
    with ranks_are_threads():
        yield


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("estimator", [PsmpiClassifier(), PsmpiRegressor()], ids=["classifier", "regressor"])
def test_it_passes_the_checks_of_scikit_learn(estimator, legacy):
    """The checks that scikit-learn calls legacy train more than a hundred times."""
    results = check_estimator(estimator, legacy=legacy, on_skip=None, on_fail=None)
    # scikit-learn skips checks that need other packages, or that SciPy turns off by default.
    not_passed = [(result["check_name"], result["exception"]) for result in results if result["status"] != "passed"]
    left_out = {"check_array_api_input", *(f"check_{kind}_data_not_an_array" for kind in ("classifier", "regressor"))}
    assert {name for name, _ in not_passed} <= left_out, not_passed
    assert all(isinstance(error, SkipTest) for _, error in not_passed), not_passed
    assert len(results) > (45 if legacy else 5)


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_it_learns_what_the_classifier_of_scikit_learn_learns():
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, np.array(["zero", "one", *"23456789"])[y], test_size=0.25, random_state=0)
    own, sklearn_classifier = (
        PsmpiClassifier(widths=(64,), epochs=15),
        MLPClassifier((64,), max_iter=60, random_state=0),
    )
    scores = [estimator.fit(parts[0], parts[2]).score(parts[1], parts[3]) for estimator in (own, sklearn_classifier)]
    assert scores[0] > scores[1] - 0.02 and scores[0] > 0.95
    assert own.loss_curve_[-1] < own.loss_curve_[0] / 3
    assert set(own.classes_) == {"zero", "one", *"23456789"}
    unpickled = pickle.loads(pickle.dumps(own))
    np.testing.assert_array_equal(unpickled.predict_proba(parts[1]), own.predict_proba(parts[1]))
    cloned = clone(own).fit(parts[0], parts[2])
    np.testing.assert_array_equal(cloned.predict_proba(parts[1]), own.predict_proba(parts[1]))


def test_it_is_searched_over_in_a_pipeline():
    x = np.random.default_rng(0).normal(size=(120, 4)) * 50
    pipeline = make_pipeline(StandardScaler(), PsmpiClassifier(epochs=40))
    search = GridSearchCV(pipeline, {"psmpiclassifier__widths": [(4,), (16,)]}, cv=2).fit(x, x[:, 0] > 0)
    assert search.best_score_ > 0.8


def test_wrong_settings_are_value_errors_and_user_errors():
    x = np.random.default_rng(0).normal(size=(20, 4))
    with pytest.raises(ValueError, match="unknown setting 'momntum'; did you mean momentum") as error:
        PsmpiClassifier(settings={"momntum": 0.5}).fit(x, x[:, 0] > 0)
    assert isinstance(error.value, UserError)
    with pytest.raises(ValueError, match=r"lr -1\.0: expected a number above 0"):
        PsmpiRegressor(lr=-1.0).fit(x, x[:, 0])


def test_seeds_are_random_states():
    x = np.random.default_rng(0).normal(size=(20, 4))
    predictions = [PsmpiRegressor(epochs=1, random_state=seed).fit(x, x[:, 0]).predict(x) for seed in (None, 0, 1)]
    assert (predictions[0] == predictions[1]).all() and (predictions[0] != predictions[2]).any()
    drawn = PsmpiRegressor(epochs=1, random_state=np.random.RandomState(3)).fit(x, x[:, 0])
    assert drawn.network_.settings["seed"] == np.random.RandomState(3).randint(1 << 31)
