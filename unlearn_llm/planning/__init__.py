"""What a run needs, before anything is loaded: memory by what it is for, and time."""
