"""What only analyze.py and extract_features.py need: metrics of features, pictures, claims.

This room imports `common` and no other room.
"""
