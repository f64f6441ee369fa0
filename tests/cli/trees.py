"""Two sentences with dependency trees, written for these tests."""


def _sentence(name: str, *words: tuple[str, int, str]) -> str:
    rows = [
        "\t".join([str(number), form, form, "X", "X", "_", str(head), relation, "_", "_"])
        for number, (form, head, relation) in enumerate(words, start=1)
    ]
    return "\n".join([f"# sent_id = {name}", *rows, "", ""])


TREES = _sentence(
    "king", ("The", 2, "det"), ("king", 3, "nsubj"), ("loves", 0, "root"), ("the", 5, "det"),
    ("queen", 3, "obj"), (".", 3, "punct"),
) + _sentence(
    "guard", ("A", 2, "det"), ("guard", 3, "nsubj"), ("saw", 0, "root"), ("my", 5, "nmod:poss"),
    ("father", 3, "obj"), (".", 3, "punct"),
)  # fmt: skip
