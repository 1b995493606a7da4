"""Embeddings in LlamaIndex, computed in this process: an index that finds texts by their meaning.

python examples/llama_index_embeddings.py [MODEL.gguf [DEVICE ...]]

The default model is all-MiniLM-L6-v2, which the script downloads (84 MB) and converts. The default device is the CPU.
"""

import asyncio
import sys
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import TextNode

from ggml_cffi import models

TEXTS = ["The striker scored twice.", "Simmer the sauce until it thickens.", "A comet's tail points away from the sun."]


class GgmlEmbedding(BaseEmbedding):
    """The vectors of an encoder for LlamaIndex."""

    _encoder: models.SentenceEncoder = PrivateAttr()

    def __init__(self, encoder: models.SentenceEncoder, **options: object) -> None:
        super().__init__(**options)
        self._encoder = encoder

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._encoder.encode(text, normalize_embeddings=True).tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._encoder.encode(texts, normalize_embeddings=True).tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, query)


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
        nodes = [TextNode(text=text) for text in TEXTS]
        index = VectorStoreIndex(nodes, embed_model=GgmlEmbedding(encoder))
        (found,) = index.as_retriever(similarity_top_k=1).retrieve("How do I cook this?")
        print(found.get_content())
        assert found.get_content() == TEXTS[1]


if __name__ == "__main__":
    main()
