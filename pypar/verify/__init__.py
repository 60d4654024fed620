"""Holds a model under a plan against one process: loss, every gradient, every updated weight."""
