"""The classifier of ``examples/train.py``, compared with scikit-learn's of the same shape."""

import sys

import pytest

from tests.support import ROOT, need

sys.path.insert(0, str(ROOT / "examples"))

import train

MLPClassifier = pytest.importorskip("sklearn.neural_network").MLPClassifier


@pytest.mark.parametrize("device", ["CPU", "Vulkan0"])
def test_the_classifier_is_as_accurate_as_scikit_learns(device, rng):
    (device,) = need((device,))
    (points, classes), (test, truth) = train.spirals(300, rng), train.spirals(200, rng)
    theirs = MLPClassifier((64, 64), batch_size=64, learning_rate_init=5e-3, max_iter=20, random_state=0)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        theirs.fit(points, classes)
    found, losses = train.fit(points, classes, test, (device,), epochs=20)
    assert losses[-1] < losses[0] / 10
    assert (found == truth).mean() >= theirs.score(test, truth) - 0.01
