"""What is shown in a browser or a notebook: HTML that needs nothing beside itself.

markup     elements, escaped by construction
sheet      the page they stand on, its tables and its style
shardings  which device holds which part of a model
losses     the curve of a training run
"""
