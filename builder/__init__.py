"""Logit datasets: capture what a teacher almost said, and store it so that students can learn from it."""
