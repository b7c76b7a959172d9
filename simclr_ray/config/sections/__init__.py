"""The sections of an experiment's config tree: fields, units and bounds.

What holds between sections, and everything that is derived, is in `experiment`.
"""
