"""Write ``data/minilm.json``: token ids and embeddings by sentence-transformers (CPU, F32).

``python -m tests.scripts.make_minilm FOLDER``, with the Hugging Face folder of all-MiniLM-L6-v2. It
needs ``sentence-transformers``.
"""

import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
TEXTS = [
    "Hello",
    "The quick brown fox jumps over the lazy dog.",
    "A fast auburn fox leapt above a sleepy hound!",
    "Quantum chromodynamics describes the strong interaction between quarks and gluons.",
    "Größe, naïveté, Ærøskøbing: crème brûlée costs 12,50 € — 漢字 and emoji 🙂 included.",
    "def embed(texts): return [model(t) for t in texts]  # list comprehension",
    " ".join(f"Sentence number {i} of a paragraph that goes on for quite a while." for i in range(10)),
    " ".join(f"Line {i}: texts beyond the longest length are cut." for i in range(40)),
]


def main() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(sys.argv[1], device="cpu")
    tokenizer = model.tokenizer
    tokenizer.backend_tokenizer.no_truncation()
    cases = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        vector = model.encode(text, batch_size=1)
        cases.append({"text": text, "tokens": ids, "embedding": [round(float(x), 7) for x in vector]})
    found = {"max_seq_length": model.max_seq_length, "cases": cases}
    lines = (
        json.dumps(found, ensure_ascii=False).replace('{"text"', '\n{"text"').replace('"embedding"', '\n"embedding"')
    )
    (DATA / "minilm.json").write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
