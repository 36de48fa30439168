"""Make a language model forget what it must no longer know, and prove it."""
