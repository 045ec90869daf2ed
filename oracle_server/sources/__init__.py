"""Where a classifier may come from beside our own and torchvision's names: one module for each kind of source."""
