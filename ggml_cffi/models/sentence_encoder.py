"""`SentenceEncoder`: embeddings with the methods of sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.device import DevicesLike
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.models.load import load
from ggml_cffi.models.model import Model

Vectors = npt.NDArray[np.float32]


class SentenceEncoder(Closing):
    """A model for embeddings with the methods of ``sentence_transformers.SentenceTransformer``. A context manager.

    Parameters
    ----------
    model
        A model; or its path or ``hf://`` address, which :func:`load` opens and :meth:`close` closes.
    devices
        Devices or names for :func:`load`; only for a path.
    pooling
        Way to get a text's vector from those of its tokens, as in :meth:`Model.embed`.

    Raises
    ------
    ValueError
        If there are devices for a model that is open already.

    Examples
    --------
    >>> with SentenceEncoder("all-MiniLM-L6-v2.gguf") as encoder:  # doctest: +SKIP
    ...     vectors = encoder.encode(["How old are you?", "What is your age?"])
    ...     encoder.similarity(vectors, vectors)
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str],
        devices: DevicesLike | None = None,
        *,
        pooling: str | None = None,
    ) -> None:
        if isinstance(model, Model) and devices is not None:
            raise ValueError("the model is open already: give devices to models.load, or a path here")
        self._owns_model = not isinstance(model, Model)
        self.model = model if isinstance(model, Model) else load(model, devices)
        """The model."""
        self.pooling = pooling
        """Way to get a text's vector; None for that of the model's training."""

    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_numpy: Literal[True] = True,
        normalize_embeddings: bool = False,
    ) -> Vectors: ...
    @overload
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_numpy: bool,
        normalize_embeddings: bool = False,
    ) -> Vectors | list[Vectors]: ...
    def encode(
        self,
        sentences: str | Sequence[str],
        *,
        prompt: str = "",
        batch_size: int = 32,
        show_progress_bar: bool = False,
        convert_to_numpy: bool = True,
        normalize_embeddings: bool = False,
    ) -> Vectors | list[Vectors]:
        """Return the vector of a text, or of each text of a sequence.

        Parameters
        ----------
        sentences
            A text, or texts.
        prompt
            Text to put before each text, such as ``"query: "``, if the model was trained with one.
        batch_size
            Number of texts between two steps of the progress bar. The model divides them into runs itself.
        show_progress_bar
            True for a progress bar on standard error.
        convert_to_numpy
            False for a list of vectors in place of a matrix.
        normalize_embeddings
            True to scale the vectors to length 1. Unlike :meth:`Model.embed`, the default is False, as in
            sentence-transformers.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_embd,)`` for a text, ``(n_texts, n_embd)`` for a sequence.

        Raises
        ------
        TypeError
            If an item is not a text.
        ValueError
            If ``batch_size`` is below 1, or there is no such pooling.
        ClosedError
            If the model is closed.
        """
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        size = as_integer("batch_size", batch_size, 1)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"sentences must be a text or several texts, not {text!r:.80}")
        starts: Iterable[int] = range(0, len(texts), size)
        if show_progress_bar:
            from tqdm import tqdm

            starts = tqdm(starts, desc="Batches")
        vectors: Vectors = np.empty((len(texts), self.get_sentence_embedding_dimension()), np.float32)
        for start in starts:
            batch = [prompt + text for text in texts[start : start + size]]
            vectors[start : start + size] = self.model.embed(
                batch, pooling=self.pooling, normalize=normalize_embeddings
            )
        if isinstance(sentences, str):
            one: Vectors = vectors[0]
            return one
        return vectors if convert_to_numpy else list(vectors)

    def get_sentence_embedding_dimension(self) -> int:
        """Return the length of a vector."""
        return self.model.architecture.n_embd

    @staticmethod
    def similarity(a: npt.ArrayLike, b: npt.ArrayLike) -> Vectors:
        """Return the cosines of all pairs of vectors of ``a`` and of ``b``.

        Parameters
        ----------
        a, b
            Vectors: ``(n_a, n_embd)`` and ``(n_b, n_embd)``, or ``(n_embd,)`` for one.

        Returns
        -------
        numpy.ndarray
            float32 ``(n_a, n_b)``. A vector of zeros has the cosine 0 with every other.

        Raises
        ------
        ValueError
            If the lengths of the vectors differ.
        """
        x, y = _unit_vectors(a, b)
        cosines: Vectors = x @ y.T
        return cosines

    @staticmethod
    def similarity_pairwise(a: npt.ArrayLike, b: npt.ArrayLike) -> Vectors:
        """Return the cosine of each vector of ``a`` with the vector of ``b`` at the same place.

        Parameters
        ----------
        a, b
            Vectors, ``(n, n_embd)``, or ``(n_embd,)`` for one.

        Returns
        -------
        numpy.ndarray
            float32 ``(n,)``.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        x, y = _unit_vectors(a, b)
        if x.shape != y.shape:
            raise ValueError(f"pairs need as many vectors on both sides, not {len(x)} and {len(y)}")
        cosines: Vectors = (x * y).sum(-1)
        return cosines

    def close(self) -> None:
        """Close the model if this object opened it. Closing twice is allowed."""
        if self._owns_model:
            self.model.close()

    def __repr__(self) -> str:
        return f"<SentenceEncoder of {self.model!r}>"


def _unit_vectors(*several: npt.ArrayLike) -> list[Vectors]:
    """Return each matrix with rows of length 1; a single vector is a matrix of one row."""
    found = []
    for each in several:
        matrix = np.atleast_2d(np.asarray(each, np.float64))  # the squares of float32 may exceed its range
        if matrix.ndim != 2:
            raise ValueError(f"vectors must have the shape (n, n_embd) or (n_embd,), not {matrix.shape}")
        length = np.linalg.norm(matrix, axis=-1, keepdims=True)
        found.append((matrix / np.maximum(length, np.finfo(np.float64).tiny)).astype(np.float32))
    if len({matrix.shape[1] for matrix in found}) > 1:
        raise ValueError(f"vectors must have one length, not {' and '.join(str(m.shape[1]) for m in found)}")
    return found
