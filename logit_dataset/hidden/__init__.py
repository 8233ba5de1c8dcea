"""Learning from stored hidden states: the teacher's head makes its whole distribution of them, when it is needed.

In:   batches of a dataset with `hidden_states`, and `teacher_head.safetensors` beside its data.
Out:  the KL over the whole vocabulary, at any temperature.
First: head.py
"""
