"""What `make bench` runs: ratios measured side by side, in one process, on the embedded teacher and corpus."""
