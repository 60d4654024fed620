"""`pypar train`: trains a decoder-only language model on local ranks or under torchrun. docs/train.md explains it."""
