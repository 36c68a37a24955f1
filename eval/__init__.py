"""Evaluation: confusion matrix and IoU, colour pictures, prediction, the report page."""
