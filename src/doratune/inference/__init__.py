"""Using what was trained: base model and adapters from their folders, text written, texts and images classified.

Nothing here imports transformers before it is used.
"""
