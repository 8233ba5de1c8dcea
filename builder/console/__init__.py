"""What the commands share at the terminal.

In:    what a command has to say or to count.
Out:   lines, bars or a log, in which nothing steers the terminal.
First: terminal.py; progress.py counts tokens; options.py are the options that several commands take.
"""
