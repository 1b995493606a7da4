"""Sentence embeddings in scikit-learn: a classifier of sentences by topic, from a few examples of each topic.

python examples/embeddings.py [MODEL.gguf [DEVICE ...]]

The default model is all-MiniLM-L6-v2, which the script downloads (84 MB) and converts. The default device is the CPU.
"""

import sys

from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

from ggml_cffi import models

TOPICS = {
    "cooking": [
        "Simmer the sauce until it thickens.",
        "Whisk two eggs with a pinch of salt.",
        "The dough should rest for an hour before you bake it.",
        "Roast the carrots with a little honey.",
        "Chop the onions finely and fry them in butter.",
        "She sprinkled parsley over the soup.",
        "A good curry starts with toasted spices.",
        "Marinate the chicken overnight.",
    ],
    "sport": [
        "The striker scored twice in the second half.",
        "She broke the national record over 400 metres.",
        "The referee showed him a red card.",
        "They lost the final in extra time.",
        "He served an ace to win the match.",
        "The cyclists reached the summit in the rain.",
        "Her coach wants her to train every morning.",
        "The home team is two goals ahead.",
    ],
    "space": [
        "The probe entered orbit around Jupiter.",
        "Astronomers found a planet near a dim red star.",
        "The rocket's second stage failed to ignite.",
        "Light from that galaxy left it billions of years ago.",
        "Two astronauts repaired the station's solar panel.",
        "The telescope photographed a comet's tail.",
        "Gravity on the Moon is a sixth of ours.",
        "The rover drilled into Martian rock.",
    ],
}
NEW = ["Let the pastry cool on a rack.", "The goalkeeper saved a penalty.", "A meteor burned up in the atmosphere."]


class Embedding(TransformerMixin, BaseEstimator):
    """A transformer of texts to vectors, whose copies share one loaded model."""

    def __init__(self, model):
        self.model = model

    def __sklearn_clone__(self):
        return self

    def fit(self, texts, classes=None):
        """Return itself: the model is already trained."""
        return self

    def transform(self, texts):
        """Return one row for each text."""
        return self.model.embed(texts)


def minilm():
    """Return the file of all-MiniLM-L6-v2, and make it on first use."""
    folder = models.fetch("minilm")
    path = folder / "all-MiniLM-L6-v2.F16.gguf"
    if not path.exists():
        models.convert(folder, path)
    return path


def main():
    """Print the accuracy on sentences outside of the training data, and the topics of new sentences."""
    texts = [text for examples in TOPICS.values() for text in examples]
    classes = [topic for topic, examples in TOPICS.items() for _ in examples]
    path = sys.argv[1] if len(sys.argv) > 1 else minilm()
    with models.load(path, sys.argv[2:] or ["CPU"]) as model:
        classifier = make_pipeline(Embedding(model), LogisticRegression(C=10))
        accuracy = cross_val_score(classifier, texts, classes, cv=4).mean()
        print(f"accuracy on {len(texts)} sentences, cross-validated: {accuracy:.2f}")
        assert accuracy > 0.9
        for text, topic in zip(NEW, classifier.fit(texts, classes).predict(NEW), strict=True):
            print(f"{topic:8} {text}")


if __name__ == "__main__":
    main()
