"""Evaluation: confusion matrix and IoU, colour pictures, the report page, and the four scripts."""
