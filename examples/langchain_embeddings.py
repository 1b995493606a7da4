"""Embeddings in LangChain, computed in this process: a vector store that finds texts by their meaning.

python examples/langchain_embeddings.py [MODEL.gguf [DEVICE ...]]

The default model is all-MiniLM-L6-v2, which the script downloads (84 MB) and converts. The default device is the CPU.
"""

import sys
from pathlib import Path

from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from ggml_cffi import models

TEXTS = ["The striker scored twice.", "Simmer the sauce until it thickens.", "A comet's tail points away from the sun."]


class GgmlEmbeddings(Embeddings):
    """The vectors of an encoder for LangChain."""

    def __init__(self, encoder: models.SentenceEncoder) -> None:
        self.encoder = encoder

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector for each text."""
        return self.encoder.encode(texts, normalize_embeddings=True).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question."""
        return self.encoder.encode(text, normalize_embeddings=True).tolist()


def minilm() -> Path:
    """Return the file of all-MiniLM-L6-v2, and make it on first use."""
    folder = models.fetch("minilm")
    path = folder / "all-MiniLM-L6-v2.F16.gguf"
    if not path.exists():
        models.convert(folder, path)
    return path


def main() -> None:
    """Print the text that is nearest to a question."""
    path = sys.argv[1] if len(sys.argv) > 1 else minilm()
    with models.SentenceEncoder(path, sys.argv[2:] or ["CPU"]) as encoder:
        store = InMemoryVectorStore.from_texts(TEXTS, GgmlEmbeddings(encoder))
        (found,) = store.similarity_search("How do I cook this?", k=1)
        print(found.page_content)
        assert found.page_content == TEXTS[1]


if __name__ == "__main__":
    main()
