"""Faulty inputs as tables: what is wrong, and which words an answer must hold."""
