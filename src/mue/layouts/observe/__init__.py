"""Roles and axes by observation: build a tiny model, double its sizes, watch it run.

Here: what can be known of any model that has a config, and every list of words that settles the rest (``names``). Not here: the
library ``transformers``, and what a user does with the answer.
"""
