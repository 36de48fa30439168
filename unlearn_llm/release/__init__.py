"""`unlearn release`: a folder that may be shared, made of what a finished run holds.

Nothing is copied that is not on a list: weights, settings, tokenizer. Checkpoints, the optimiser's
state, private/ and whatever else lies in the run stay where they are.
"""
