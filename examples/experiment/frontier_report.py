"""To come."""


def write_frontier(results, page):
    """To come."""
