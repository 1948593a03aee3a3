"""Published diffusion models, a file for each family, and classifiers made of one.

load.py opens any of them, pickles.py reads NVlabs' files safely. Of our rooms, only common is used.
"""
