"""The oracle: hides a classifier behind the Open Inference Protocol and counts every query."""
