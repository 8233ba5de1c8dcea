"""Token ids → logits: a frozen language model on one device, or on several.

In:    where a checkpoint is, and how to load it.
Out:   a `Teacher`, which yields logits or hidden states of sequences.
First: model.py; loading.py makes one from a checkpoint, ranks.py one over several processes.
"""
