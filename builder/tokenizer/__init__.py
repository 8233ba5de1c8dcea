"""Where a teacher is → a tokenizer that does what its own tokenizer.json says.

In:    a directory, or a repository on the Hub.
Out:   a fast tokenizer whose token ids are those that the teacher was trained with, and where they come from.
First: tokenizer.py; precedence.py says who wins where file, config and class do not agree.
"""
