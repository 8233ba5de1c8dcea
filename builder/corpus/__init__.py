"""Text in: files or a dataset on the Hub → documents → sequences of token ids.

In:    a corpus and a tokenizer.
Out:   `Sequence`s: token ids, the text that they stand for, and which of them are a completion's.
First: documents.py, then sequences.py; chats.py where documents are conversations.
"""
