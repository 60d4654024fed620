"""Gradients on their way from backward to the ranks that want them: buckets that fill up, and are reduced in turn.

What data parallel and ZeRO share.
"""
