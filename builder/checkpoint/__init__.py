"""What a checkpoint holds, and whether all of it has arrived in the model.

In:    the files of a teacher: safetensors with a config.json, or a GGUF file.
Out:   a refusal of what would be silently wrong; for GGUF, the model.
First: checkpoint.py, then arrival.py; gguf.py for GGUF files.
"""
