"""Classes of tokens that gates are averaged over."""

CLASSES = ("number", "word", "punctuation", "template", "special")
"""Every token is one of these; see `token_class`."""


def token_class(piece: str, *, special: bool, template: bool) -> int:
    """Say what kind of token a piece of text is.

    Args:
        piece: The token's text.
        special: Whether the tokenizer holds it for a special token.
        template: Whether it belongs to the words around a question that every question has.

    Returns:
        A place in `CLASSES`. The first that holds: special; template; a number if it has a digit; a word if it has a
        letter; else punctuation, which is also white space.
    """
    if special:
        return CLASSES.index("special")
    if template:
        return CLASSES.index("template")
    if any(one.isdigit() for one in piece):
        return CLASSES.index("number")
    return CLASSES.index("word" if any(one.isalpha() for one in piece) else "punctuation")
