"""Vocabulary: tokens that a text never uses leave the tokenizer, the embeddings and the output matrix.

In: a tokenizer and texts.
Out: `KeptTokens` (which tokens stay, and their new numbers), a smaller tokenizer, rows of the embeddings.
It is chosen by counts, not by training, and applied at the export.
"""

from typing import TYPE_CHECKING

from .. import hand_on

if TYPE_CHECKING:
    from .keep import inspect_vocabulary, keep_tokens
    from .tokens import KeptTokens

__all__ = ["KeptTokens", "inspect_vocabulary", "keep_tokens"]
__getattr__ = hand_on(__name__, {"KeptTokens": "tokens", "inspect_vocabulary": "keep", "keep_tokens": "keep"})
