"""A text of any length → its tokens, some at a time.

In:    files of texts or lines; the parts of a text, and a tokenizer.
Out:   rows of files; pieces of a text with the token ids that the whole would have, in memory that does not grow with it.
First: pieces.py; seams.py says where a text may be cut, and why.
"""
