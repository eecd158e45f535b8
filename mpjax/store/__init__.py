"""Runs that are not lost: checkpoints that are verified before they are believed, and weights for serving."""
