"""A dataset and some of its rows → one HTML file in which a person sees what the teacher expected.

In:    a finished dataset, numbers of rows, and another dataset of the same rows, if there is one.
Out:   a page that needs no network, no server and no second file.
First: page.py and its page.html.
"""
