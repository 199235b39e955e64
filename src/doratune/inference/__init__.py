"""Using what was trained: models and adapters found and loaded, text written, inputs classified, both measured.

Nothing here imports transformers before it is used.
"""
