"""A chat with the demonstration model that keeps its history."""

import sys

from ggml_cffi import models


def main(questions: list[str]) -> None:
    """Ask ``questions`` one after another in one conversation."""
    messages = []
    with models.load(models.fetch("smollm2"), ["CPU"], n_ctx=1024) as model:
        for question in questions:
            messages.append({"role": "user", "content": question})
            print(f"> {question}")
            answer = ""
            for piece in model.generate(messages, max_tokens=24, temperature=0.7, seed=1):
                print(piece, end="", flush=True)
                answer += piece
            print()
            messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main(sys.argv[1:] or ["Hello! Who are you?", "What can you do?"])
